"""Finds the space that a call asks for, from its arguments, the settings, and the spaces that others registered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import replace

from chunkmill.domain.arguments import as_text, as_word
from chunkmill.domain.reasons import reason_of
from chunkmill.domain.spaces import OnLong, Precision, SpaceSpec, long_text_for
from chunkmill.domain.trust import Trust
from chunkmill.errors import InvalidInput, UnknownModel
from chunkmill.models import cut_space
from chunkmill.openai.catalogue import local_name, resolve_space
from chunkmill.settings import Settings

MAX_NAME = 4096
"""The most characters of a model's name or path, which is Linux' limit of a path."""


def requested_spec(
    settings: Settings,
    model: str | None,
    *,
    on_long: OnLong,
    dimensions: int | None,
    precision: Precision | str | None,
    registered: Callable[[], Iterable[SpaceSpec]],
) -> SpaceSpec:
    """The space of a model, and of the caller's ``on_long``, ``dimensions`` and ``precision``.

    The model is a provider's, or its files can be read here, or a worker has ``registered`` a space of it. Raises
    :class:`UnknownModel` and :class:`InvalidInput`.
    """
    name = settings.embedding_model if model is None else as_text("model", model)
    if len(name) > MAX_NAME:
        raise InvalidInput(f"model has {len(name):,} characters; a name or a path has at most {MAX_NAME:,}.")
    if not name.strip():
        raise InvalidInput(
            "model is empty; give the name of a model or its folder, or leave it out for EMBEDDING_MODEL."
        )
    if dimensions is None and name == settings.embedding_model:
        dimensions = settings.embedding_dimensions
    if dimensions is not None and (not isinstance(dimensions, int) or isinstance(dimensions, bool)):
        raise InvalidInput(f"dimensions is {dimensions!r}; it must be a whole number.")
    precise = settings.embedding_precision if precision is None else as_word(Precision, precision, "precision")
    local = local_name(settings, name)
    try:
        try:
            return resolve_space(settings, name, on_long=on_long, dimensions=dimensions, precision=precise)
        except OSError as error:
            raise UnknownModel(f"model {name!r} cannot be read ({reason_of(error)}): check the name.") from error
    except UnknownModel:
        of_model = [spec for spec in registered() if local is not None and spec.model == local]
        candidates = {replace(spec, long_text=long_text_for(on_long), precision=precise) for spec in of_model}
        chosen = _choose(candidates, dimensions, settings.trust)
        if chosen is None:
            raise
        return chosen


def _choose(registered: Set[SpaceSpec], dimensions: int | None, trust: Trust) -> SpaceSpec | None:
    """The space to use of a model whose files are not here, among those that others registered under its name.

    If ``dimensions`` is None it is the one with the longest vectors. Returns None if there is none, or if two revisions
    match. Raises :class:`InvalidInput` if vectors may not be shortened to ``dimensions``.
    """
    longest = max((spec.dimensions for spec in registered), default=0)
    wanted = longest if dimensions is None else dimensions
    matching = [spec for spec in registered if spec.dimensions == wanted]
    if not matching and dimensions is not None:
        matching = [cut_space(spec, dimensions, trust=trust) for spec in registered if spec.dimensions == longest]
    return matching[0] if len(matching) == 1 else None
