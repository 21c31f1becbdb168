"""The matrix products of an encoder in int8, on a CPU, by oneDNN: unsigned activations times signed weights.

Scales are measured once, on calibration texts, because with a scale from each TokenBatch a text's vector would depend
on its neighbours. Weights have one scale for each output. Activations that are quantised in a step of their own have
one scale for each channel, as in SmoothQuant (Xiao et al., 2023): a channel with large values is made smaller, and its
weights larger by the same factor. Between the two products of an MLP there is no such step. The first product writes
uint8 itself, with one scale for all channels, and the few channels that would make this scale coarse are computed
beside it in fp32, as in LLM.int8() (Dettmers et al., 2022).

Everything that this module decides is part of what an int8 vector means: another rule or constant needs another value
of `chunkmill.domain.spaces.Precision`. docs/decisions/0011 has the measurements.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from chunkmill_workers.engine.encoder.linear import ACTIVATIONS, EPILOGUES, Linear, make_linear

# The constants were chosen with all-MiniLM-L6-v2, by the cosine to fp32 of docstrings, and of pieces: odd texts, code,
# translations and noise.
ALPHA: Final = {"qkv": 0.75, "out": 0.5, "up": 0.75, "down": 0.5}
"""How much of a channel's range moves to the weights, from 0 to 1, for each product of a layer."""

# Values beyond the range are cut off, and a wider range is coarser. Lowest cosine with 1, 1.05, 1.1, 1.15 and 1.2:
# docstrings 0.9983, 0.9978, 0.9976, 0.9969, 0.9972; pieces 0.9936, 0.9962, 0.9964, 0.9958, 0.9955.
MARGIN: Final = 1.1
"""The range, as a multiple of the largest value on the calibration texts."""

# Mean / lowest cosine of the docstrings with 4, 8, 16 and 32: 0.99899 / 0.9979, 0.99907 / 0.9976, 0.99913 / 0.9982,
# 0.99921 / 0.9984. With 0: 0.994 / 0.988. Sixteen channels take 2 % of a layer's time.
KEPT: Final = 16
"""How many channels between the MLP's two products stay in fp32."""

# Zero in uint8. oneDNN has no fast product of signed activations: one product takes seconds.
_ZERO: Final = 128
_ROLES: Final = ("qkv", "out", "up", "down")
_NONE: Final = ("none", "")

Product = Callable[[torch.Tensor], torch.Tensor]
"""From (slots, in) uint8 to (slots, out)."""


@dataclass(slots=True)
class Range:
    """The range of one product's input on the calibration texts; ``low``, ``high`` and ``total`` are (in,) fp32."""

    low: torch.Tensor
    high: torch.Tensor
    total: torch.Tensor
    tokens: int = 0

    @property
    def mean(self) -> torch.Tensor:
        """The mean of each channel, (in,) fp32."""
        return self.total / self.tokens


class Observer:
    """A `Build.products` that makes fp32 layers and notes the ranges of their inputs."""

    def __init__(self, *, slots: int) -> None:
        self.ranges: list[Range] = []
        self.inside: torch.Tensor | None = None
        """(slots,) bool: the slots of the running pass that are not padding; None if none is."""
        self._slots = slots

    def __call__(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> Linear:
        width = weight.shape[1]
        seen = Range(torch.full((width,), math.inf), torch.full((width,), -math.inf), torch.zeros(width))
        self.ranges.append(seen)
        run = make_linear(
            weight, bias, dtype=torch.float32, device=weight.device, slots=self._slots, activation=activation
        )

        def linear(x: torch.Tensor) -> torch.Tensor:
            tokens = x if self.inside is None else x[self.inside]
            seen.low = torch.minimum(seen.low, tokens.amin(0))
            seen.high = torch.maximum(seen.high, tokens.amax(0))
            seen.total += tokens.sum(0)
            seen.tokens += len(tokens)
            return run(x)

        return linear


@dataclass(frozen=True, slots=True)
class Grid:
    """How a product's input becomes uint8: channel j of value x is ``zero + (x - middle[j]) / (scale * smooth[j])``."""

    scale: float
    zero: int
    smooth: torch.Tensor
    """(in,) fp32."""
    middle: torch.Tensor
    """(in,) fp32."""

    def quantiser(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function from (slots, in) in any number format to uint8. NaN becomes some number."""
        multiplier = 1 / (self.smooth * self.scale)
        offset = self.zero + 0.5 - self.middle * multiplier

        def quantise(x: torch.Tensor) -> torch.Tensor:
            # From fp32 directly to uint8, 1,024 x 384 values take 0.20 ms, because torch has no vector code for it.
            # Through int16 they take 0.05 ms.
            scaled = torch.addcmul(offset, x.float(), multiplier)
            return scaled.clamp_(0, 255).to(torch.int16).to(torch.uint8)

        return quantise

    def product(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        mean: torch.Tensor,
        *,
        slots: int,
        out: torch.dtype,
        epilogue: tuple[str, str] = _NONE,
        scale: float = 1.0,
        zero: int = 0,
    ) -> Product:
        """The product with (out, in) weights, (out,) bias and the input's (in,) mean, all in fp32.

        ``scale`` and ``zero`` are those of a uint8 output.
        """
        smoothed = weight * self.smooth
        steps = smoothed.abs().amax(1).clamp(min=1e-8) / 127
        rounded = torch.round(smoothed / steps[:, None]).clamp_(-127, 127)
        packed = torch.ops.onednn.qlinear_prepack(rounded.to(torch.int8), [slots, weight.shape[1]])
        # The bias corrects for the middle, which was subtracted, and for what the rounding of the weights does to the
        # mean input.
        rounded = rounded * steps[:, None] / self.smooth
        bias = bias + weight @ mean - rounded @ (mean - self.middle)
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        run, (name, algorithm) = torch.ops.onednn.qlinear_pointwise, epilogue
        own_scale, own_zero = self.scale, self.zero

        def product(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = run(
                x, own_scale, own_zero, packed, steps, zeros, bias, scale, zero, out, name, [], algorithm
            )
            return y

        return product


class Quantizer:
    """A `Build.products` that makes int8 layers, in the order in which an `Observer` saw them.

    ``half`` is the number format of outputs that go into attention and gates. Those that go into the residual stream
    are fp32.
    """

    def __init__(self, ranges: Sequence[Range], *, slots: int, half: torch.dtype) -> None:
        self._ranges = iter(ranges)
        self._roles = itertools.cycle(_ROLES)
        self._slots = slots
        self._half = half
        self._up: _FirstProduct | None = None

    def __call__(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> Linear:
        role, seen = next(self._roles), next(self._ranges)
        weight = weight.detach().float()
        bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().float()
        if role == "up" and activation in EPILOGUES:
            self._up = _FirstProduct(weight, bias, activation, seen)
            return lambda x: x  # `down` computes both products
        if role == "down" and self._up is not None:
            up, self._up = self._up, None
            return self._mlp(up, weight, bias, seen)
        grid = _smooth_grid(seen, weight, ALPHA[role])
        quantise = grid.quantiser()
        residual = role in ("out", "down")
        run = grid.product(weight, bias, seen.mean, slots=self._slots, out=torch.float32 if residual else self._half)
        if role == "out":
            return lambda x: _keep_not_finite(x, run(quantise(x)))
        act = ACTIVATIONS[activation] if activation is not None else None
        return lambda x: run(quantise(x)) if act is None else act(run(quantise(x)))

    def _mlp(self, up: _FirstProduct, weight: torch.Tensor, bias: torch.Tensor, seen: Range) -> Linear:
        """A layer that computes both products; ``weight``, ``bias`` and ``seen`` are those of the second one."""
        outer = _smooth_grid(up.seen, up.weight, ALPHA["up"])
        kept = seen.high.topk(min(KEPT, len(seen.high) // 2)).indices
        rest = torch.ones_like(seen.high).index_fill_(0, kept, 0)
        low, high = float(seen.low.min()), float((seen.high * rest).max()) * MARGIN
        scale = max(high - low, 1e-5) / 255
        zero = round(-low / scale)
        inner = Grid(scale, zero, torch.ones_like(rest), torch.zeros_like(rest))
        epilogue, slots, mean = EPILOGUES[up.activation], self._slots, up.seen.mean
        quantise = outer.quantiser()
        first = outer.product(
            up.weight, up.bias, mean, slots=slots, out=torch.uint8, epilogue=epilogue, scale=scale, zero=zero
        )
        beside = outer.product(up.weight[kept], up.bias[kept], mean, slots=slots, out=torch.float32, epilogue=epilogue)
        second = inner.product(weight * rest, bias, seen.mean * rest, slots=slots, out=torch.float32)
        columns = weight[:, kept].t().contiguous()

        def mlp(x: torch.Tensor) -> torch.Tensor:
            q = quantise(x)
            return second(first(q)).addmm_(beside(q), columns)

        return mlp


@dataclass(frozen=True, slots=True)
class _FirstProduct:
    """The first product of an MLP, kept until the second is known."""

    weight: torch.Tensor
    bias: torch.Tensor
    activation: str | None
    seen: Range


def _smooth_grid(seen: Range, weight: torch.Tensor, alpha: float) -> Grid:
    reach = ((seen.high - seen.low) / 2 * MARGIN).clamp(min=1e-5)
    columns = weight.abs().amax(0).clamp(min=1e-5)
    smooth = reach**alpha / columns ** (1 - alpha)
    scale = float((reach / smooth).max()) / 127
    # The middle is a whole number of steps, so zero, near which most values are, is represented exactly.
    step = smooth * scale
    middle = torch.round((seen.low + seen.high) / 2 / step) * step
    return Grid(scale, _ZERO, smooth, middle)


def _keep_not_finite(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``y``, with NaN in the rows in which ``x`` is not finite.

    Attention gives NaN if its result would be wrong, and uint8 cannot hold NaN.
    """
    if not math.isfinite(x.sum()):
        y.add_(x.float().sum(1, keepdim=True).mul_(0))
    return y
