"""Which models a provider serves, and the spaces of their vectors."""

from __future__ import annotations

from app.domain.providers import OPENAI, ProviderModel
from app.domain.spaces import OnLong, Precision, SpaceSpec
from app.errors import InvalidInput, UnknownModel
from app.models import resolve_spec
from app.models.locate import DEFAULT_MODEL, DEFAULT_NAMES
from app.settings import Settings


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
    if model is not None and not fits(model, spec):
        raise InvalidInput(
            f"model {name!r} gives {model.dimensions} dimensions{' and cannot be cut' if not model.can_cut else ''}, "
            f"and the space of {spec.model!r} has {spec.dimensions}. Mend dimensions or same_as in OPENAI_MODELS, or "
            "leave dimensions out of the call."
        )
    return spec


def model_for(settings: Settings, spec: SpaceSpec) -> ProviderModel | None:
    """The provider's model that gives vectors of a space; None: only local workers do."""
    models = settings.provider_models
    if spec.provider == OPENAI:
        found = models.get(spec.model)
        return found if found is not None and found.same_as is None else None
    return next((m for m in models.values() if _label(m.same_as) == spec.model and fits(m, spec)), None)


def fits(model: ProviderModel, spec: SpaceSpec) -> bool:
    """Whether its vectors can be those of the space: as long, and of full precision."""
    cut = model.can_cut and spec.dimensions < model.dimensions
    return spec.precision is Precision.FLOAT and (spec.dimensions == model.dimensions or cut)


def _label(name: str | None) -> str | None:
    """How a local model's space calls it."""
    return DEFAULT_MODEL if name in DEFAULT_NAMES else name
