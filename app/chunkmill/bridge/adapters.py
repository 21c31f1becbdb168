"""What carries a vector of one space into another, and how it is written down. Pure.

Every adapter is one formula for a row ``x`` of length 1, with the means ``m`` and ``n`` of the two spaces::

    carried = n + (x - m) @ rotation + (x - m) @ down @ up + gelu((x - m) @ inner + bias) @ outer

The result has length 1. Each kind has what the one before has: a rotation has no ``down`` and no ``up``, and only a
network has ``inner``, ``bias`` and ``outer``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from chunkmill.domain.bridges import AdapterKind
from chunkmill.domain.vectors import to_unit_length
from chunkmill.system.numbers import NDArray, np

Floats: TypeAlias = "NDArray[np.float32]"

MAX_BYTES = 256 * 1024 * 1024
"""The most bytes of the arrays of one adapter."""


_NAMES = {
    AdapterKind.ROTATION: ("mean_from", "mean_to", "rotation"),
    AdapterKind.LOW_RANK: ("mean_from", "mean_to", "rotation", "down", "up"),
    AdapterKind.NETWORK: ("mean_from", "mean_to", "rotation", "down", "up", "inner", "bias", "outer"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """Carries vectors of ``d`` dimensions into a space of ``e`` dimensions.

    Raises :class:`ValueError` if the arrays do not fit together, or have a number that is not finite.
    """

    kind: AdapterKind
    arrays: Mapping[str, Floats]
    """``mean_from`` (d,), ``mean_to`` (e,), ``rotation`` (d, e), ``down`` (d, r), ``up`` (r, e), ``inner`` (d, h),
    ``bias`` (h,) and ``outer`` (h, e), as far as the kind has them."""

    def __post_init__(self) -> None:
        names = _NAMES[self.kind]
        if tuple(self.arrays) != names:
            raise ValueError(f"an adapter of kind {self.kind} has the arrays {names}, and not {tuple(self.arrays)}")
        d, e = self.dimensions
        rank, hidden = (len(self.arrays[name]) if name in self.arrays else 0 for name in ("up", "bias"))
        wanted: dict[str, tuple[int, ...]] = {
            "mean_from": (d,),
            "mean_to": (e,),
            "rotation": (d, e),
            "down": (d, rank),
            "up": (rank, e),
            "inner": (d, hidden),
            "bias": (hidden,),
            "outer": (hidden, e),
        }
        for name, array in self.arrays.items():
            if array.shape != wanted[name] or 0 in array.shape:
                raise ValueError(f"array {name} of an adapter has the shape {array.shape}, and not {wanted[name]}")
            if array.dtype != np.float32 or not np.isfinite(array).all():
                raise ValueError(f"array {name} of an adapter must be of finite numbers in float32")

    @property
    def dimensions(self) -> tuple[int, int]:
        """Those of the space that vectors come from, and of the one that they are carried into."""
        return len(self.arrays["mean_from"]), len(self.arrays["mean_to"])

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def carry(self, vectors: Floats) -> Floats:
        """``(n, e)`` float32 of length 1, from ``(n, d)`` float32 of any length.

        A vector of zeros has no direction, and is carried as the mean of its space is.
        """
        centred: Floats = to_unit_length(vectors) - self.arrays["mean_from"]
        carried: Floats = centred @ self.arrays["rotation"]
        carried += self.arrays["mean_to"]
        if "up" in self.arrays:
            narrow: Floats = centred @ self.arrays["down"]
            carried += narrow @ self.arrays["up"]
        if "inner" in self.arrays:
            before: Floats = centred @ self.arrays["inner"]
            before += self.arrays["bias"]
            carried += gelu(before) @ self.arrays["outer"]
        return to_unit_length(carried)

    def to_bytes(self) -> bytes:
        """All arrays one after the other, row by row, as float32 with the low byte first. :meth:`shapes` says where."""
        return b"".join(array.astype("<f4").tobytes() for array in self.arrays.values())

    def shapes(self) -> dict[str, list[int]]:
        """The shape of each array, in the order of :meth:`to_bytes`."""
        return {name: list(array.shape) for name, array in self.arrays.items()}

    @classmethod
    def from_bytes(cls, kind: str, shapes: Mapping[str, list[int]], data: bytes) -> Adapter:
        """The adapter that :meth:`to_bytes` and :meth:`shapes` wrote. Raises :class:`ValueError` if they do not fit."""
        known = AdapterKind(kind)
        if set(shapes) != set(_NAMES[known]):
            raise ValueError(f"an adapter of kind {known} has no arrays {sorted(shapes)}")
        # A JSON object of Postgres has an order of its own.
        sizes = {name: math.prod(shapes[name]) for name in _NAMES[known]}
        if min(sizes.values()) < 0 or 4 * sum(sizes.values()) != len(data) or len(data) > MAX_BYTES:
            raise ValueError(f"{len(data):,} bytes are not those of arrays with {sum(sizes.values()):,} numbers")
        numbers = np.frombuffer(data, dtype="<f4").astype(np.float32)
        arrays, start = {}, 0
        for name, size in sizes.items():
            arrays[name] = numbers[start : start + size].reshape(shapes[name])
            start += size
        return cls(known, arrays)


def gelu(x: Floats) -> Floats:
    """``x`` times about the probability that a normal number is below it (Hendrycks and Gimpel, 2016, by tanh)."""
    activated: Floats = 0.5 * x * (1 + np.tanh(_SCALE * (x + _CUBIC * x * x * x)))
    return activated


def gelu_slope(x: Floats) -> Floats:
    """The derivative of :func:`gelu`."""
    bent = np.tanh(_SCALE * (x + _CUBIC * x * x * x))
    slope: Floats = 0.5 * (1 + bent) + 0.5 * x * (1 - bent * bent) * _SCALE * (1 + 3 * _CUBIC * x * x)
    return slope


# Python's numbers keep the arrays in float32.
_SCALE = math.sqrt(2 / math.pi)
_CUBIC = 0.044715
