"""Which models a provider serves, and the spaces of their vectors."""

from __future__ import annotations

from chunkmill.domain.providers import OPENAI, ProviderModel
from chunkmill.domain.spaces import LongText, OnLong, Precision, SpaceSpec
from chunkmill.errors import InvalidInput, UnknownModel
from chunkmill.models import resolve_spec
from chunkmill.models.locate import DEFAULT_MODEL, DEFAULT_NAMES
from chunkmill.settings import Settings


def provider_model(settings: Settings, name: str) -> ProviderModel | None:
    """The provider's model that ``name`` means; None: a local model. Raises :class:`UnknownModel`."""
    if settings.embedding_provider == "local":
        return None
    model = settings.provider_models.get(name)
    if model is None and settings.embedding_provider == "openai":
        raise UnknownModel(
            f"EMBEDDING_PROVIDER is openai, and model {name!r} is none that the provider is known to serve: "
            f"{', '.join(settings.provider_models)}. Name one of them (model, EMBEDDING_MODEL), describe yours in "
            "OPENAI_MODELS, or set EMBEDDING_PROVIDER to auto."
        )
    return model


def local_name(settings: Settings, name: str) -> str | None:
    """The local model of the space that ``name`` means; None where only the provider serves it."""
    model = provider_model(settings, name)
    return name if model is None else model.same_as


def resolve_space(
    settings: Settings, name: str, *, on_long: OnLong, dimensions: int | None, precision: Precision
) -> SpaceSpec:
    """The space of a model: the provider's, or, of a local one and of one that is ``same_as`` it, the local model's.

    Raises :class:`UnknownModel` and :class:`InvalidInput`.
    """
    model = provider_model(settings, name)
    if model is not None and precision is not Precision.FLOAT:
        raise InvalidInput(
            f"precision (EMBEDDING_PRECISION) is {precision}, which is how a local worker computes, and model {name!r} "
            "is the provider's. Pass precision='float', or name a local model."
        )
    if model is not None and model.same_as is None:
        return model.space(on_long, dimensions)
    spec = resolve_spec(
        name if model is None or model.same_as is None else model.same_as,
        pooling=settings.embedding_pooling,
        on_long=on_long,
        dimensions=dimensions,
        precision=precision,
        trust=settings.trust,
    )
    if model is not None and (problem := why_unfit(model, spec)):
        raise InvalidInput(
            f"model {name!r} cannot serve the space of {spec.model!r}: {problem}. Mend its entry in OPENAI_MODELS, "
            "leave dimensions out of the call, or name the local model."
        )
    return spec


def model_for(settings: Settings, spec: SpaceSpec) -> ProviderModel | None:
    """The provider's model that gives vectors of a space; None: only local workers do."""
    models = settings.provider_models
    if spec.provider == OPENAI:
        found = models.get(spec.model)
        return found if found is not None and found.same_as is None else None
    twins = [model for model in models.values() if model.same_as is not None and why_unfit(model, spec) is None]
    return next((twin for twin in twins if _label(twin.same_as) == spec.model or _is_of(settings, twin, spec)), None)


def why_unfit(model: ProviderModel, spec: SpaceSpec) -> str | None:
    """Why its vectors cannot be those of the space; None: they can."""
    if spec.precision is not Precision.FLOAT:
        return "the space is int8, which is how a local worker computes"
    if spec.dimensions != model.dimensions and not (model.can_cut and spec.dimensions < model.dimensions):
        cut = "" if model.can_cut else " and cannot be cut"
        return f"it gives {model.dimensions} dimensions{cut}, and the space has {spec.dimensions}"
    if spec.long_text is LongText.SPLIT_APART:
        return "the space's long texts were cut by a rule of an earlier version"
    if spec.document_prompt:
        return "the space has a document prompt, which is not sent to a provider"
    return None


def _is_of(settings: Settings, model: ProviderModel, spec: SpaceSpec) -> bool:
    """Whether the space is that of ``same_as``, registered under another name of the same files."""
    try:
        own = resolve_spec(
            model.same_as or "",
            pooling=settings.embedding_pooling,
            on_long=spec.long_text.policy,
            dimensions=None if spec.dimensions == model.dimensions else spec.dimensions,
            trust=settings.trust,
        )
    except InvalidInput:  # its files are not here, or cannot be cut
        return False
    return own.fingerprint == spec.fingerprint


def _label(name: str | None) -> str | None:
    """How a local model's space calls it."""
    return DEFAULT_MODEL if name in DEFAULT_NAMES else name
