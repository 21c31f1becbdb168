"""What the toolkit is given, as rows that are read and checked block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from chunkmill.errors import InvalidInput
from chunkmill.system.numbers import DTypeLike, NDArray, np

Floats: TypeAlias = "NDArray[np.floating[Any]]"
"""float32 or float64."""
Float64s: TypeAlias = "NDArray[np.float64]"
BLOCK_BYTES = 32 * 2**20
"""The size of one temporary array. A call has a few of them."""


class Rows:
    """The rows of an argument. They stay where they are, such as in a file, until :meth:`take` reads some of them.

    ``dtype`` is the type of results: float32, or float64 for what float32 cannot hold exactly. ``is_vector`` says that
    a single vector ``(d,)`` was given, which is one row here. ``shape`` is what was given.
    """

    __slots__ = ("argument", "array", "dtype", "is_vector", "shape")

    def __init__(self, argument: str, given: object) -> None:
        array = _as_array(argument, given)
        self.shape = array.shape
        if array.dtype.kind not in "fiub":
            raise InvalidInput(f"{argument} has the type {array.dtype}; it must have real numbers.")
        if array.shape == (0,):
            array = array.reshape(0, 1)
        if array.ndim not in (1, 2):
            raise InvalidInput(
                f"{argument} has the shape {array.shape}; it must be one vector (d,), or vectors as the rows (n, d)."
            )
        self.argument = argument
        self.is_vector = array.ndim == 1
        self.array = array[np.newaxis] if self.is_vector else array
        self.dtype = np.dtype(np.float32 if np.can_cast(array.dtype, np.float32) else np.float64)
        if len(self) and not self.array.shape[1]:
            raise InvalidInput(f"{argument} has the shape {array.shape}; a vector has at least one number.")

    def __len__(self) -> int:
        return len(self.array)

    @property
    def dimensions(self) -> int:
        return int(self.array.shape[1])

    def take(self, rows: slice | NDArray[np.intp], dtype: DTypeLike) -> Floats:
        """``(b, d)`` contiguous: the rows in ``dtype``. Raises :class:`InvalidInput` if a number is not finite."""
        with np.errstate(over="ignore"):  # a longdouble beyond float64 becomes infinite, and is refused here
            block: Floats = np.ascontiguousarray(self.array[rows], dtype=dtype)
        if block.size and self.array.dtype.kind == "f":
            flat = block.ravel()
            # This is finite only if all numbers are, and takes half the time of looking at each.
            with np.errstate(over="ignore", invalid="ignore"):
                squares = np.dot(flat, flat)
            if not np.isfinite(squares) and not (finite := np.isfinite(block).all(axis=1)).all():
                self._refuse(block, int(finite.argmin()), rows)
        return block

    def _refuse(self, block: Floats, at: int, rows: slice | NDArray[np.intp]) -> None:
        position = int((~np.isfinite(block[at])).argmax())
        row = range(len(self))[rows][at] if isinstance(rows, slice) else int(rows[at])
        where = "" if self.is_vector else f"row {row}, "
        raise InvalidInput(
            f"{self.argument} has {_name(block[at, position])} at {where}position {position} (both count from 0). "
            "Replace the number, or leave the vector out."
        )


def require_same_dimensions(a: Rows, b: Rows) -> int:
    """The dimensions of both. An argument without rows agrees with any."""
    if len(a) and len(b) and a.dimensions != b.dimensions:
        raise InvalidInput(
            f"{a.argument} has vectors of {a.dimensions} numbers and {b.argument} of {b.dimensions}; "
            "only vectors of one space can be compared."
        )
    return (a if len(a) else b).dimensions


def result_type(*rows: Rows) -> np.dtype[Any]:
    """float64 if any of them needs it, else float32."""
    return np.result_type(np.float32, *(part.dtype for part in rows))


def slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def fitting(bytes_a_row: int, *, most: int) -> int:
    """How many rows of this size fit into one temporary array: from 1 to ``most``."""
    return max(1, min(most, BLOCK_BYTES // max(1, bytes_a_row)))


def _as_array(argument: str, given: object) -> NDArray[Any]:
    if isinstance(given, np.ma.MaskedArray) and np.ma.is_masked(given):
        raise InvalidInput(f"{argument} has masked numbers; fill them, or leave their rows out.")
    try:
        return np.asarray(given)
    except (TypeError, ValueError, OverflowError):
        raise InvalidInput(
            f"{argument}{_ragged(given)} is not a vector or an array of vectors; all rows need equally many numbers."
        ) from None


def _ragged(given: object) -> str:
    """Where a list of lists stops being an array, if it is one."""
    if not isinstance(given, Sequence) or not given:
        return ""
    shapes = [np.shape(row) if isinstance(row, np.ndarray) else _length(row) for row in given]
    row = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
    return "" if row is None else f" (see row {row}, which differs from row 0)"


def _length(row: object) -> tuple[int, ...]:
    return (len(row),) if isinstance(row, Sequence) else ()


def _name(number: np.floating[Any]) -> str:
    return "NaN" if np.isnan(number) else "an infinite number"
