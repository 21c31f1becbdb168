"""Which models a provider serves, and the spaces of their vectors."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path

from chunkmill.domain.providers import OPENAI, ProviderModel
from chunkmill.domain.spaces import LongText, OnLong, Precision, SpaceSpec
from chunkmill.domain.trust import Trust
from chunkmill.errors import ChunkmillError, InvalidInput, UnknownModel
from chunkmill.models import resolve_spec
from chunkmill.models.known import known_models
from chunkmill.models.locate import DEFAULT_MODEL, DEFAULT_NAMES
from chunkmill.openai.plan.limits import MAX_BYTES, BatchLimits
from chunkmill.settings import Settings


def provider_model(settings: Settings, name: str) -> ProviderModel | None:
    """The provider's model of this name; None if it is a local model.

    Raises :class:`UnknownModel`, and :class:`InvalidSetting` if the provider's settings are wrong.
    """
    if settings.embedding_provider == "local":
        return None
    if settings.embedding_provider == "openai" or settings.may_be_described(name):
        settings.require_provider()  # whatever this name means, it is not another model
    model = settings.provider_models.get(name)
    if model is None and settings.embedding_provider == "openai":
        raise UnknownModel(
            f"EMBEDDING_PROVIDER is openai, and the provider is not known to serve model {name!r}. It serves "
            f"{', '.join(settings.provider_models)}. Name one of them (model, EMBEDDING_MODEL), describe yours in "
            "OPENAI_MODELS, or set EMBEDDING_PROVIDER to auto."
        )
    return model


def local_name(settings: Settings, name: str) -> str | None:
    """The local model of the space that ``name`` means; None if only the provider serves it."""
    model = provider_model(settings, name)
    return name if model is None else model.same_as


def resolve_space(
    settings: Settings, name: str, *, on_long: OnLong, dimensions: int | None, precision: Precision
) -> SpaceSpec:
    """The space of a model. A provider's model that is ``same_as`` a local one has the local model's space.

    Reads model files, so do not call it inside a transaction. Raises :class:`UnknownModel` and :class:`InvalidInput`.
    """
    read_twins(settings)
    model = provider_model(settings, name)
    if model is not None and precision is not Precision.FLOAT:
        raise InvalidInput(
            f"precision (EMBEDDING_PRECISION) is {precision}, which is how a local worker computes, and model {name!r} "
            "is the provider's. Pass precision='float', or name a local model."
        )
    if model is not None and model.same_as is None:
        return model.space(on_long, dimensions)
    try:
        spec = resolve_spec(
            name if model is None or model.same_as is None else model.same_as,
            pooling=settings.embedding_pooling,
            on_long=on_long,
            dimensions=dimensions,
            precision=precision,
            trust=settings.trust,
        )
    except UnknownModel as error:
        known = str(error).rstrip(".")
        if settings.provider_problem is None:
            if "/" in name or name in DEFAULT_NAMES or Path(name).exists():
                raise
            raise UnknownModel(f"{known}. {_known_names(settings, name)}") from error
        raise UnknownModel(f"{known}. If it is the provider's model: {settings.provider_problem}") from error
    if model is not None and (problem := why_unfit(model, spec)):
        raise InvalidInput(
            f"model {name!r} cannot serve the space of {spec.model!r}: {problem}. Fix its entry in OPENAI_MODELS, "
            "leave dimensions out of the call, or name the local model."
        )
    return spec


def _known_names(settings: Settings, name: str) -> str:
    """Which names a model has that is neither a path nor of the form org/name, and which of them are like ``name``."""
    paid = [] if settings.embedding_provider == "local" else list(settings.provider_models)
    names = {model.name.rpartition("/")[2].lower(): model.name for model in known_models()} | {one: one for one in paid}
    within = [short for short in names if len(name) > 3 and name.lower() in short]
    close = [*within, *difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.8)]
    meant = list(dict.fromkeys(names[short] for short in close))[:3]
    said = [f"Did you mean {' or '.join(meant)}?"] if meant else []
    if paid:
        said.append(f"The provider serves {', '.join(paid)}; describe another one in OPENAI_MODELS.")
    return " ".join([*said, "`chunkmill models list` lists models that workers run."])


def model_for(settings: Settings, spec: SpaceSpec) -> ProviderModel | None:
    """The provider's model that gives vectors of a space; None if only local workers give them.

    Once `read_twins` has run in this process, it reads no files, and so may be called inside a transaction.
    """
    models = settings.provider_models
    if spec.provider == OPENAI:
        model = models.get(spec.model)
        return model if model is not None and model.same_as is None else None
    twins = [model for model in models.values() if model.same_as is not None and why_unfit(model, spec) is None]
    return next((twin for twin in twins if _label(twin.same_as) == spec.model or _is_of(settings, twin, spec)), None)


def read_twins(settings: Settings) -> None:
    """Read the local models that provider models are ``same_as``, so that `model_for` need not.

    A model that was read is not read again in this process; one whose files are missing is looked for in each call.
    """
    for model in settings.provider_models.values():
        if model.same_as is not None and _twin_specs.get(key := _twin_key(settings, model)) is None:
            _twin_specs[key] = _read_twin(settings, model)


_TwinKey = tuple[str | None, str | None, Trust]
_twin_specs: dict[_TwinKey, SpaceSpec | None] = {}
"""What `read_twins` has read. None: the model's files are not on this machine."""


def _twin_key(settings: Settings, model: ProviderModel) -> _TwinKey:
    return model.same_as, settings.embedding_pooling, settings.trust


def _read_twin(settings: Settings, model: ProviderModel) -> SpaceSpec | None:
    try:
        return resolve_spec(model.same_as or "", pooling=settings.embedding_pooling, trust=settings.trust)
    except (ChunkmillError, OSError):
        return None  # what is wrong with one model's files is no reason to stop the others


def request_limits(
    settings: Settings, model: ProviderModel, spec: SpaceSpec, *, max_inputs: int | None = None
) -> BatchLimits:
    """The limits of requests. A text is cut where its space cuts it, even if the model takes longer ones.

    ``max_inputs`` is a limit on the inputs of a ProviderBatch that the server itself has named.
    """
    return BatchLimits(
        inputs=min(settings.openai_batch_max_inputs, max_inputs or settings.openai_batch_max_inputs),
        bytes=settings.openai_batch_max_bytes,
        inputs_per_request=model.request_inputs or settings.openai_request_inputs,
        tokens_per_request=max(settings.openai_request_tokens, model.max_tokens),
        tokens_per_input=min(model.max_tokens, spec.max_tokens),
        bytes_per_request=model.request_bytes or MAX_BYTES,
    )


def why_unfit(model: ProviderModel, spec: SpaceSpec) -> str | None:
    """Why a model's vectors cannot be those of the space; None if they can."""
    if spec.precision is not Precision.FLOAT:
        return "the space is int8, and only local workers compute in int8"
    if spec.dimensions != model.dimensions and not (model.can_cut and spec.dimensions < model.dimensions):
        cut = "" if model.can_cut else " and cannot be cut"
        return f"it gives {model.dimensions} dimensions{cut}, and the space has {spec.dimensions}"
    if spec.long_text is LongText.SPLIT_APART:
        return "the space's long texts were split by a rule of an earlier version"
    if spec.task or spec.query_task or spec.query_model:
        return "the space has a task or a query_model, which only local workers compute"
    if spec.document_prompt:
        return "the space has a document prompt, and prompts are not sent to a provider"
    return None


def _is_of(settings: Settings, model: ProviderModel, spec: SpaceSpec) -> bool:
    """Whether the space is that of ``same_as``, registered under another name of the same files.

    Its vectors may be cut and its long texts be treated in another way.
    """
    key = _twin_key(settings, model)
    own = _twin_specs[key] if key in _twin_specs else _read_twin(settings, model)
    if own is None:
        return False
    return replace(own, dimensions=spec.dimensions, long_text=spec.long_text).fingerprint == spec.fingerprint


def _label(name: str | None) -> str | None:
    """The name of a local model in its space."""
    return DEFAULT_MODEL if name in DEFAULT_NAMES else name
