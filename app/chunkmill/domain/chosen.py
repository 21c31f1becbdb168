"""Which chunks a call means that changes or deletes some. What is missing by mistake never means everything. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from chunkmill.domain import filters
from chunkmill.domain.arguments import as_flag, as_ids, as_items, as_text
from chunkmill.domain.chunks import MAX_METADATA_BYTES, metadata_json
from chunkmill.domain.filters import Filter
from chunkmill.errors import InvalidInput


def as_chosen(
    ids: Iterable[str] | None, given: Mapping[str, Any] | None, *, all_chunks: bool, verb: str
) -> tuple[list[str] | None, Filter]:
    """The ids, or None if none are given; and the filter ``given``, which is empty if none is given.

    Raises :class:`InvalidInput` unless exactly one of the two or ``all_chunks`` is given, and if every chunk passes the
    filter: an empty one, or one of lists that are empty. ``verb`` is what the call does to chunks.
    """
    named = None if ids is None else as_ids("ids", ids)
    if [named is not None, given is not None, as_flag("all_chunks", all_chunks)].count(True) != 1:
        raise InvalidInput(f"give either ids, or filter, or all_chunks=True to {verb} all chunks of the collection.")
    chosen = filters.parse(given, "filter")
    if given is not None and _decided(given) is True:
        raise InvalidInput(
            f"every chunk passes this filter, because it or a list in it is empty. To {verb} all chunks of the "
            "collection, give all_chunks=True (--all on the command line)."
        )
    return named, chosen


def as_replaced(given: bool | Mapping[str, Any]) -> Filter | None:
    """Of which chunks those are deleted that a source does not have: all if ``given`` is true, and None for false.

    Raises :class:`InvalidInput` for what is neither true nor false nor a filter, and if every chunk passes the filter.
    """
    if isinstance(given, bool):
        return Filter() if given else None
    if not isinstance(given, Mapping):
        raise InvalidInput(
            f"replace is of type {type(given).__name__}; it must be True, False, or a filter on metadata such as "
            '{"source": "wiki"}.'
        )
    chosen = filters.parse(given, "replace")
    if _decided(given) is True:
        raise InvalidInput(
            "every chunk passes the filter replace, because it or a list in it is empty. Give replace=True to replace "
            "all chunks of the collection."
        )
    return chosen


def as_changes(metadata: Mapping[str, Any] | None, remove: Iterable[str], *, replaces: bool) -> tuple[str, list[str]]:
    """The JSON of the metadata to set, and the keys to remove. Raises :class:`InvalidInput`."""
    try:
        as_json = metadata_json(metadata)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"metadata is not a JSON object that jsonb can hold: {error}.") from None
    if (size := len(as_json.encode())) > MAX_METADATA_BYTES:
        raise InvalidInput(f"metadata has {size:,} bytes as JSON; the limit is {MAX_METADATA_BYTES:,}.")
    removed = [as_text("a key in remove", key) for key in as_items("remove", remove)]
    if replaces and (removed or metadata is None):
        raise InvalidInput("replace=True sets all metadata of a chunk: give metadata, and no keys to remove.")
    if not replaces and as_json == "{}" and not removed:
        raise InvalidInput("give metadata to set, or keys to remove. replace=True with {} removes all metadata.")
    return as_json, removed


def _decided(given: Mapping[str, Any]) -> bool | None:
    """Whether every chunk passes a valid filter (True) or none does (False), as its empty parts alone decide it."""
    return _all(_decided_key(key, value) for key, value in given.items())


def _decided_key(key: str, value: Any) -> bool | None:
    if key == "$and":
        return _all(_decided(one) for one in value)
    if key == "$or":
        return _not(_all(_not(_decided(one)) for one in value))
    if key == "$not":
        return _not(_decided(value))
    if key in ("$in", "$nin") and not value:
        return key == "$nin"
    # A field that must be there is a condition, also if nothing is asked of it: {"a": {}}.
    return _decided(value) if isinstance(value, Mapping) and value else None


def _all(parts: Iterable[bool | None]) -> bool | None:
    together: bool | None = True
    for part in parts:
        if part is False:
            return False
        together = together if part else None
    return together


def _not(part: bool | None) -> bool | None:
    return None if part is None else not part
