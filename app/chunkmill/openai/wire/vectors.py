"""Reads and checks the vectors of an answer, and pools the vectors of windows into a content's. Pure."""

from __future__ import annotations

import binascii
from collections.abc import Sequence

from chunkmill.system.numbers import NDArray, np

_NUMBERS = "fiu"  # kinds of NumPy arrays that are vectors; those of texts and booleans are not


def read_embeddings(
    data: Sequence[object], count: int, dimensions: int, *, normalize: bool
) -> tuple[NDArray[np.float32], dict[int, str]]:
    """``(vectors, problems)`` in the ``data`` of an answer to ``count`` inputs, whether base64 or float.

    ``vectors`` is (count, dimensions) float32, ordered by the ``index`` of the items; the rows with a problem are zero.
    Two items with the same index are a problem of that position, because nothing says which is right. An item without
    an index is at its place in ``data`` if the answer is complete and no other item says that it is not in order.
    """
    ordered = _is_ordered(data, count)
    vectors = np.zeros((count, dimensions), np.float32)
    problems = dict.fromkeys(range(count), "the answer has no vector for this input")
    seen: set[int] = set()
    for place, item in enumerate(data):
        if not isinstance(item, dict):
            continue
        index = item.get("index")
        if index is None and ordered:
            index = place
        if type(index) is not int or not 0 <= index < count:
            continue  # the input that it was meant for stays without a vector
        if index in seen:
            problems[index] = "the answer has several vectors for this input"
            continue
        seen.add(index)
        vector = _read(item.get("embedding"), dimensions)
        if isinstance(vector, str):
            problems[index] = vector
        else:
            vectors[index] = vector
            del problems[index]
    # In float64 the squares of float32 numbers do not overflow, and a sum of 3,072 of them keeps its digits.
    squares = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
    for index in np.flatnonzero(~(np.isfinite(squares) & (squares > 0))).tolist():
        word = "is zero" if squares[index] == 0 else "holds numbers that are not finite"
        problems.setdefault(index, f"the vector {word}")
    vectors[list(problems)] = 0
    if normalize:
        lengths = np.sqrt(squares)
        lengths[list(problems)] = 1
        vectors = (vectors / lengths[:, None]).astype(np.float32)
    return vectors, problems


def _is_ordered(data: Sequence[object], count: int) -> bool:
    """Whether the items are as many as the inputs and each says that it is in its place, or says nothing.

    Some servers leave ``index`` out, and some only where it is 0.
    """
    return len(data) == count and all(
        isinstance(item, dict) and (item.get("index") is None or _is(item["index"], place))
        for place, item in enumerate(data)
    )


def _is(index: object, place: int) -> bool:
    return type(index) is int and index == place


def _read(embedding: object, dimensions: int) -> NDArray[np.float32] | str:
    """(dimensions,) float32, or a text that says what is wrong."""
    if isinstance(embedding, str):
        try:
            raw = binascii.a2b_base64(embedding, strict_mode=True)
        except ValueError:  # also binascii.Error, and characters that are not ASCII
            return "the vector is not valid base64"
        if len(raw) % 4:
            return f"the vector has {len(raw)} bytes, which is not a whole number of float32 numbers"
        vector = np.frombuffer(raw, "<f4")
    elif isinstance(embedding, list):
        try:
            numbers = np.asarray(embedding)
        except ValueError:  # lists of different lengths within it
            return "the vector is not a list of numbers"
        if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in _NUMBERS):
            return "the vector is not a list of numbers"
        with np.errstate(over="ignore"):  # what is too large becomes infinite, which is found
            vector = numbers.astype(np.float32)
    else:
        return "the answer has no vector for this input"
    if len(vector) != dimensions:
        return f"the vector has {len(vector)} dimensions, the space has {dimensions}"
    return vector


def pool(vectors: NDArray[np.float32], weights: Sequence[int], *, normalize: bool) -> NDArray[np.float32] | None:
    """(dimensions,) float32: the weighted mean of (windows, dimensions) float32; None if it is zero."""
    share = np.asarray(weights, np.float64) / sum(weights)
    mean = share @ vectors.astype(np.float64)
    length = float(np.sqrt(mean @ mean))
    if length == 0:
        return None
    pooled: NDArray[np.float32] = (mean / length if normalize else mean).astype(np.float32)
    return pooled
