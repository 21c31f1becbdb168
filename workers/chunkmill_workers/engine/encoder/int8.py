"""The products of an encoder in int8, on a CPU: oneDNN's, of unsigned activations and signed weights.

Scales are found once, on calibration texts: a scale taken from the TokenBatch at hand would make a text's vector
depend on its neighbours. Weights have a scale per output. Activations that are quantised in a pass of their own have
one per channel, as in SmoothQuant (Xiao et al., 2023): a channel with large values is made smaller, and its weights
larger by the same factor. Between the two products of an MLP there is no such pass: the first one writes uint8
itself, with one scale for all channels, and the few channels that would make this scale coarse go beside it in fp32,
as in LLM.int8() (Dettmers et al., 2022).

All that is decided here is part of what an int8 vector means: another rule or constant is another value of
`chunkmill.domain.spaces.Precision`. docs/decisions/0011 has the measurements.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from chunkmill_workers.engine.encoder.linear import ACTIVATIONS, EPILOGUES, Linear, make_linear

# Chosen on all-MiniLM-L6-v2 by the cosine to fp32 of docstrings, odd texts and pieces of code, translations and noise.
ALPHA: Final = {"qkv": 0.75, "out": 0.5, "up": 0.75, "down": 0.5}
"""How much of a channel's range moves to the weights."""

# What is past the range is cut off, and a wider range is coarser. The lowest at 1, 1.05, 1.1, 1.15 and 1.2: of the
# docstrings 0.9983, 0.9978, 0.9976, 0.9969, 0.9972; of the pieces, 0.9936, 0.9962, 0.9964, 0.9958, 0.9955.
MARGIN: Final = 1.1
"""The range, as a multiple of what the calibration texts reach."""

# Mean / lowest of the docstrings with 4, 8, 16 and 32: 0.99899 / 0.9979, 0.99907 / 0.9976, 0.99913 / 0.9982,
# 0.99921 / 0.9984. With none, 0.994 / 0.988. Sixteen take 2 % of a layer's time.
KEPT: Final = 16
"""Channels between the MLP's products that stay in fp32."""

# oneDNN has no fast product of signed activations: it takes seconds for one.
_ZERO: Final = 128
_ROLES: Final = ("qkv", "out", "up", "down")
_NONE: Final = ("none", "")

Product = Callable[[torch.Tensor], torch.Tensor]
"""(slots, in) uint8 → (slots, out)."""


@dataclass(slots=True)
class Range:
    """What the input of one product was on the calibration texts: (in,) fp32."""

    low: torch.Tensor
    high: torch.Tensor
    total: torch.Tensor
    tokens: int = 0

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.tokens


class Observer:
    """`Build.products` that makes fp32 layers, which note the range of their inputs."""

    def __init__(self, *, slots: int) -> None:
        self.ranges: list[Range] = []
        self.inside: torch.Tensor | None = None
        """(slots,) bool of the pass under way: what is no padding; None where nothing is."""
        self._slots = slots

    def __call__(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> Linear:
        width = weight.shape[1]
        seen = Range(torch.full((width,), math.inf), torch.full((width,), -math.inf), torch.zeros(width))
        self.ranges.append(seen)
        run = make_linear(
            weight, bias, dtype=torch.float32, device=weight.device, slots=self._slots, activation=activation
        )

        def linear(x: torch.Tensor) -> torch.Tensor:
            own = x if self.inside is None else x[self.inside]
            seen.low = torch.minimum(seen.low, own.amin(0))
            seen.high = torch.maximum(seen.high, own.amax(0))
            seen.total += own.sum(0)
            seen.tokens += len(own)
            return run(x)

        return linear


@dataclass(frozen=True, slots=True)
class Grid:
    """How a product's input lies in uint8: channel j of value x is ``zero + (x - middle[j]) / (scale * smooth[j])``."""

    scale: float
    zero: int
    smooth: torch.Tensor
    """(in,) fp32, as ``middle``."""
    middle: torch.Tensor

    def quantiser(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """From (slots, in) in any format to uint8. What is not a number comes out as one."""
        multiplier = 1 / (self.smooth * self.scale)
        offset = self.zero + 0.5 - self.middle * multiplier

        def quantise(x: torch.Tensor) -> torch.Tensor:
            # 1,024 x 384 from fp32 straight to uint8 take 0.20 ms, for which torch has no vector code; through int16
            # 0.05 ms.
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
        """With (out, in) weights, (out,) bias and the input's (in,) mean, all fp32; ``scale`` and ``zero`` are of a
        uint8 output."""
        smoothed = weight * self.smooth
        steps = smoothed.abs().amax(1).clamp(min=1e-8) / 127
        rounded = torch.round(smoothed / steps[:, None]).clamp_(-127, 127)
        packed = torch.ops.onednn.qlinear_prepack(rounded.to(torch.int8), [slots, weight.shape[1]])
        # The bias takes back the middle, and what rounding the weights does to the mean input.
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
    """`Build.products` that makes int8 layers, in the order in which an `Observer` saw them.

    ``half`` is the format of what goes into attention and gates; what goes to the residual stream is fp32.
    """

    def __init__(self, ranges: Sequence[Range], *, slots: int, half: torch.dtype) -> None:
        self._ranges = iter(ranges)
        self._roles = itertools.cycle(_ROLES)
        self._slots = slots
        self._half = half
        self._up: _Up | None = None

    def __call__(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> Linear:
        role, seen = next(self._roles), next(self._ranges)
        weight = weight.detach().float()
        bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().float()
        if role == "up" and activation in EPILOGUES:
            self._up = _Up(weight, bias, activation, seen)
            return lambda x: x  # `down` does the work of both
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

    def _mlp(self, up: _Up, weight: torch.Tensor, bias: torch.Tensor, seen: Range) -> Linear:
        """Both products; ``weight``, ``bias`` and ``seen`` are the second's."""
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
class _Up:
    """The first product of an MLP, until its second is known."""

    weight: torch.Tensor
    bias: torch.Tensor
    activation: str | None
    seen: Range


def _smooth_grid(seen: Range, weight: torch.Tensor, alpha: float) -> Grid:
    reach = ((seen.high - seen.low) / 2 * MARGIN).clamp(min=1e-5)
    columns = weight.abs().amax(0).clamp(min=1e-5)
    smooth = reach**alpha / columns ** (1 - alpha)
    scale = float((reach / smooth).max()) / 127
    # On a step of the grid, so that zero, where values crowd, is met exactly.
    step = smooth * scale
    middle = torch.round((seen.low + seen.high) / 2 / step) * step
    return Grid(scale, _ZERO, smooth, middle)


def _keep_not_finite(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``y``, with NaN in the rows in which ``x`` is not finite: attention says so where it cannot be right, and in
    uint8 it is lost."""
    if not math.isfinite(x.sum()):
        y.add_(x.float().sum(1, keepdim=True).mul_(0))
    return y
