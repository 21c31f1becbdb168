"""The space that a call means: by the caller's words, the settings, and what others have registered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import replace

from chunkmill.domain.arguments import as_word
from chunkmill.domain.spaces import OnLong, Precision, SpaceSpec, long_text_for
from chunkmill.domain.trust import Trust
from chunkmill.errors import InvalidInput, UnknownModel
from chunkmill.models import cut_space
from chunkmill.openai.catalogue import local_name, resolve_space
from chunkmill.settings import Settings


def asked_spec(
    settings: Settings,
    model: str | None,
    *,
    on_long: OnLong,
    dimensions: int | None,
    precision: Precision | str | None,
    registered: Callable[[], Iterable[SpaceSpec]],
) -> SpaceSpec:
    """The space of a provider's model, of one that can be read here, or that a worker has ``registered`` one of.

    Raises :class:`UnknownModel` and :class:`InvalidInput`.
    """
    name = settings.embedding_model if model is None else model
    if dimensions is None and name == settings.embedding_model:
        dimensions = settings.embedding_dimensions
    if dimensions is not None and (not isinstance(dimensions, int) or isinstance(dimensions, bool)):
        raise InvalidInput(f"dimensions is {dimensions!r}; it must be a whole number.")
    precise = settings.embedding_precision if precision is None else as_word(Precision, precision, "precision")
    local = local_name(settings, name)
    try:
        return resolve_space(settings, name, on_long=on_long, dimensions=dimensions, precision=precise)
    except UnknownModel:
        named = [spec for spec in registered() if local is not None and spec.model == local]
        wanted = {replace(spec, long_text=long_text_for(on_long), precision=precise) for spec in named}
        found = _choose(wanted, dimensions, settings.trust)
        if found is None:
            raise
        return found


def _choose(registered: Set[SpaceSpec], dimensions: int | None, trust: Trust) -> SpaceSpec | None:
    """The space to use of a model whose files are not here, among those that others have registered under its name.

    Without ``dimensions`` that of the longest vectors. None where there is none, or where two revisions are meant.
    Raises InvalidInput where vectors may not be cut to ``dimensions``.
    """
    longest = max((spec.dimensions for spec in registered), default=0)
    asked = longest if dimensions is None else dimensions
    meant = [spec for spec in registered if spec.dimensions == asked]
    if not meant and dimensions is not None:
        meant = [cut_space(spec, dimensions, trust=trust) for spec in registered if spec.dimensions == longest]
    return meant[0] if len(meant) == 1 else None
