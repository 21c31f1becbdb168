"""Reads a large JSON object without holding the interpreter, and within bounds of memory.

orjson holds the GIL while it reads, so a thread alone does not help: 32 MiB of ``[],[],`` would stop the event loop for
seconds, and become a gigabyte. So the body is first looked at for where its values begin and end, which is done by
NumPy, MiB by MiB, and mostly without the GIL. A body with too many values is refused then. The others are read by
orjson in pieces of some milliseconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from chunkmill.gateway.errors import Refusal

MAX_COMMAS: Final = 400_000
"""There may be 300,000 token ids."""
MAX_CONTAINERS: Final = 16_384
MAX_STRINGS: Final = 16_384
MAX_VALUE: Final = 4 * 1024 * 1024
"""The most bytes of one value, which orjson reads in some 10 ms. A text of this size has a million tokens."""
PIECE: Final = 256 * 1024
"""How many bytes of a list orjson reads at a time: 1 ms."""
SLICE: Final = 1024 * 1024

_LIST, _OBJECT, _LIST_END, _OBJECT_END, _COMMA, _COLON = 1, 2, 3, 4, 5, 6
_KINDS = np.zeros(256, np.uint8)
_KINDS[np.frombuffer(b"[{]},:", np.uint8)] = (_LIST, _OBJECT, _LIST_END, _OBJECT_END, _COMMA, _COLON)
_STEPS = np.array([0, 1, 1, -1, -1, 0, 0], np.int64)


@dataclass(frozen=True, slots=True)
class _Marks:
    """The brackets, commas and colons of a body that are in no string, in order."""

    places: NDArray[np.int64]
    kinds: NDArray[np.uint8]
    depths: NDArray[np.int64]
    """How many brackets are open behind the mark."""

    def within(self, begin: int, end: int) -> _Marks:
        chosen = slice(*np.searchsorted(self.places, (begin, end)))
        return _Marks(self.places[chosen], self.kinds[chosen], self.depths[chosen])

    def at(self, kind: int, depth: int) -> list[int]:
        places: list[int] = self.places[(self.kinds == kind) & (self.depths == depth)].tolist()
        return places


def loads_object(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``. Raises :class:`Refusal`, also for a value of more than ``MAX_VALUE`` bytes."""
    if len(body) <= MAX_VALUE and _is_simple(body):
        value = _loads(body, 0, len(body))
        if not isinstance(value, dict):
            raise Refusal(400, "invalid_json", "the body must be a JSON object.")
        return value
    marks = _marks(body)
    if not len(marks.places) or marks.kinds[0] != _OBJECT:
        raise Refusal(400, "invalid_json", "the body must be a JSON object.")
    begin, end = int(marks.places[0]), int(marks.places[-1])
    if marks.kinds[-1] != _OBJECT_END or np.flatnonzero(marks.depths == 0).tolist() != [len(marks.depths) - 1]:
        raise _not_json("its brackets do not match")
    if not (_is_blank(body, 0, begin) and _is_blank(body, end + 1, len(body))):
        raise _not_json("there is something beside the object")
    members = [begin, *marks.at(_COMMA, 1), end]
    if len(members) == 2 and _is_blank(body, begin + 1, end):
        return {}
    read: dict[str, Any] = {}
    for before, after in itertools.pairwise(members):
        own = marks.within(before + 1, after)
        colons = own.at(_COLON, 1)
        if len(colons) != 1:
            raise _not_json(f"a field is not of the form name: value after byte {before:,}")
        name = _loads(body, before + 1, colons[0])
        if not isinstance(name, str):
            raise _not_json(f"a field has no name after byte {before:,}")
        read[name] = _value(body, colons[0] + 1, after, own)
    return read


def _is_simple(body: bytes) -> bool:
    """Whether there are few values, even if all that looks like one, also in texts, is one."""
    counts = dict.fromkeys((b",", b"[", b"{", b'"'), 0)
    for start in range(0, len(body), SLICE):
        for byte in counts:
            counts[byte] += body.count(byte, start, start + SLICE)
    return (
        counts[b","] <= MAX_COMMAS and counts[b"["] + counts[b"{"] <= MAX_CONTAINERS and counts[b'"'] <= 2 * MAX_STRINGS
    )


def _value(body: bytes, begin: int, end: int, marks: _Marks) -> Any:
    """A value of the object. A long list is read piece by piece."""
    if end - begin <= PIECE:
        return _loads(body, begin, end)
    inner = marks.within(begin, end)
    if len(inner.kinds):
        if not _is_blank(body, begin, int(inner.places[0])):
            raise _not_json(f"a value has something before its bracket after byte {begin:,}")
        if inner.kinds[0] != _LIST:
            raise _too_large()
        last = int(inner.places[-1])
        if inner.kinds[-1] != _LIST_END or not _is_blank(body, last + 1, end):
            raise _not_json(f"a list does not end before byte {end:,}")
        items: list[Any] = []
        for piece_begin, piece_end in _pieces([int(inner.places[0]), *inner.at(_COMMA, 2), last]):
            if piece_end - piece_begin > MAX_VALUE:
                raise _too_large()
            items += _items(body, piece_begin, piece_end)
        return items
    if end - begin > MAX_VALUE:
        raise _too_large()
    return _loads(body, begin, end)


def _pieces(separators: list[int]) -> Iterator[tuple[int, int]]:
    """Runs of whole items, of ``PIECE`` bytes or one item. Separators are the brackets and the commas of a list."""
    begin = separators[0]
    for separator, following in zip(separators[1:], [*separators[2:], None], strict=True):
        if following is None or following - begin > PIECE:
            yield begin + 1, separator
            begin = separator


def _items(body: bytes, begin: int, end: int) -> list[Any]:
    """The items between two separators of a list, at least one."""
    if _is_blank(body, begin, end):
        raise _not_json(f"a list has an empty place at byte {begin:,}")
    try:
        items: list[Any] = orjson.loads(b"".join((b"[", memoryview(body)[begin:end], b"]")))
    except orjson.JSONDecodeError as error:
        raise _not_json(f"{error.msg} after byte {begin:,}") from None
    return items


def _loads(body: bytes, begin: int, end: int) -> Any:
    try:
        return orjson.loads(memoryview(body)[begin:end])
    except orjson.JSONDecodeError as error:
        # The message of the error is about the place alone; its ``doc`` is the body.
        where = f"at character {error.pos:,}" if begin == 0 else f"after byte {begin:,}"
        raise _not_json(f"{error.msg} {where}") from None


def _marks(body: bytes) -> _Marks:
    """Where the marks of a body are. Raises :class:`Refusal` if there are too many."""
    places, kinds = [np.empty(0, np.int64)], [np.empty(0, np.uint8)]
    counts = np.zeros(7, np.int64)
    n_quotes, run = 0, 0
    for start in range(0, len(body), SLICE):
        data = np.frombuffer(body, np.uint8, min(SLICE, len(body) - start), start)
        quotes, run = _quotes(data, run)
        kind = _KINDS[data]
        spots = np.flatnonzero(kind)
        # A place is in a string if an odd number of quotes comes before it.
        spots = spots[(np.searchsorted(quotes, spots) + n_quotes) % 2 == 0]
        n_quotes += len(quotes)
        outside = kind[spots]
        counts += np.bincount(outside, minlength=7)
        if (
            counts[_COMMA] > MAX_COMMAS
            or counts[_LIST] + counts[_OBJECT] > MAX_CONTAINERS
            or n_quotes > 2 * MAX_STRINGS
        ):
            raise Refusal(
                400,
                "too_many_inputs",
                "the body has more values than a request may have, which is 2,048 inputs or 300,000 token ids. Send "
                "several smaller requests.",
            )
        places.append(spots + start)
        kinds.append(outside)
    if n_quotes % 2:
        raise _not_json("a string does not end")
    all_kinds = np.concatenate(kinds)
    return _Marks(np.concatenate(places), all_kinds, np.cumsum(_STEPS[all_kinds]))


def _quotes(data: NDArray[np.uint8], run: int) -> tuple[NDArray[np.int64], int]:
    """Where a slice has quotes that begin or end a string, and how many backslashes are at its end.

    ``run`` is the number of backslashes before the slice. A quote behind an odd number of them is a part of a text.
    """
    quotes = np.flatnonzero(data == 34)
    is_backslash = data == 92
    if not run and not is_backslash.any():
        return quotes, 0
    # The last place up to each one that has no backslash: -1 if all have one.
    other = np.maximum.accumulate(np.where(is_backslash, -1, np.arange(len(data))))
    other = np.concatenate(([-1], other))  # at i: before place i
    length = np.arange(len(data) + 1) - 1 - other
    length[other == -1] += run
    return quotes[length[quotes] % 2 == 0], int(length[-1])


def _is_blank(body: bytes, begin: int, end: int) -> bool:
    return not any(body[i : min(i + SLICE, end)].strip(b" \t\r\n") for i in range(begin, end, SLICE))


def _not_json(problem: str) -> Refusal:
    return Refusal(400, "invalid_json", f"the body is not JSON: {problem}.")


def _too_large() -> Refusal:
    return Refusal(
        400,
        "invalid_input",
        f"the body has a value of more than {MAX_VALUE:,} bytes, or an object of more than {PIECE:,}. Split the text.",
    )
