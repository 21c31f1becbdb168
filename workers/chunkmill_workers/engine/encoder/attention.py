"""Softmax attention over the texts of one TokenBatch, in three ways.

``exp2``     CPU: three batched products and one ``exp2`` per group of heads; short texts.
``sdpa``     torch's fused kernel on a padded layout: any device, any length.
``varlen``   CUDA: torch's FlashAttention over a packed layout; no padding anywhere.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from chunkmill_workers.engine.encoder.layout import Layout

Varlen = Callable[..., torch.Tensor]
"""A function with the arguments of ``torch.nn.attention.varlen.varlen_attn``."""

_ONE = 2.0**-10
_SMALLEST_SUM = 2.0**-100

# Two Zen 4 cores, 12 heads of 32 in bf16, 1,024 tokens a pass, ms per layer at texts of 16 / 64 / 128 / 256:
# sdpa 2.2 / 2.9 / 3.2 / 4.2, exp2 0.5 / 0.8 / 1.3 / 2.2. The memory of its scores grows with the square of the length.
EXP2_LONGEST = 1_024


@dataclass(frozen=True, slots=True)
class Heads:
    """How many attention heads a model has, and their size."""

    queries: int
    keys: int
    """Fewer than ``queries`` if several query heads share a key head."""
    size: int
    """Numbers in one head's vector."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which tokens of its own text a token attends to."""

    causal: bool = False
    window: int | None = None
    """Tokens at a distance of up to ``window`` on either side, or only before it if ``causal``; None for all tokens."""

    def hidden(self, longest: int, device: torch.device) -> torch.Tensor | None:
        """(longest, longest) bool: the pairs (query, key) without attention; None if every pair has it."""
        if not self.causal and (self.window is None or self.window >= longest):
            return None
        at = torch.arange(longest, device=device)
        distance = at[:, None] - at
        hidden = distance < 0 if self.causal else torch.zeros_like(distance, dtype=torch.bool)
        if self.window is not None:
            hidden = hidden | (distance.abs() > self.window)
        return hidden


class Attention:
    """The attention of one pass over ``slots`` slots. All layers share it, and layers with the same pattern share its
    masks.

    ``careful`` leaves out ``exp2``, the only way whose scores have a limit.
    """

    def __init__(
        self, layout: Layout, *, scale: float, bias: torch.Tensor | None, varlen: Varlen | None, careful: bool
    ) -> None:
        self.slots = len(layout.ids)
        self._layout = layout
        self._scale = scale
        self._bias = bias
        self._varlen = varlen
        self._careful = careful
        self._masks: dict[tuple[Pattern, str], torch.Tensor | None] = {}

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        """The mixed values, (slots, heads x size), from q (slots, heads, size) and k, v (slots, key heads, size)."""
        if self._layout.packed:
            return self._by_varlen(q, k, v, pattern)
        grouped = k.shape[1] != q.shape[1]
        if q.device.type == "cpu" and self._layout.longest <= EXP2_LONGEST and not (grouped or self._careful):
            return self._by_exp2(q, k, v, pattern)
        return self._by_sdpa(q, k, v, pattern)

    def _by_exp2(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        """Attention by one ``exp2``: softmax(s) v = (2^t v) / (2^t 1) with t = s log2(e).

        The values get one more column with a constant, so their product also gives the sums 2^t 1. Values and constant
        are zero at padding, so padding needs no mask.

        The maximum of a row is not subtracted. Scores beyond the exponent's range therefore end in NaN, and the engine
        computes a text whose vector is not finite once more, in fp32 and by ``sdpa``. The constant is so small that no
        sum overflows before one of its terms does. Sums near the smallest numbers are made NaN.
        """
        n, longest = len(self._layout), self._layout.longest
        heads, size = q.shape[1:]
        q = q.view(n, longest, heads, size).transpose(1, 2).reshape(n * heads, longest, size)
        # Keys must be zero at padding as the values are: a score that overflows, times a value of zero, is NaN.
        k, v = (tensor.index_fill_(0, self._layout.padding, 0) for tensor in (k, v))
        k = k.view(n, longest, heads, size).transpose(1, 2).reshape(n * heads, longest, size)
        values = v.new_empty(n, heads, longest, size + 1)
        values[..., :size] = v.view(n, longest, heads, size).transpose(1, 2)
        values[..., size] = _ONE if self._layout.full else self._ones(v.dtype)
        added = self._added(pattern, "exp2", q.dtype)
        scale = self._scale * math.log2(math.e)
        if added is None:
            scores = torch.baddbmm(q.new_zeros(1), q, k.transpose(1, 2), beta=0, alpha=scale)
        else:
            added = added.expand(n, heads, longest, longest).reshape(n * heads, longest, longest)
            scores = torch.baddbmm(added, q, k.transpose(1, 2), alpha=scale)
        summed = torch.bmm(scores.exp2_(), values.view(n * heads, longest, size + 1))
        sums = summed[..., size:]
        mixed = summed[..., :size] / sums.masked_fill_(sums < _SMALLEST_SUM, float("nan")).mul_(1 / _ONE)
        mixed = mixed.view(n, heads, longest, size).transpose(1, 2).reshape(n * longest, heads * size)
        # A query at padding may have attended to nothing at all. Its result must not reach the next layer's keys.
        return mixed.index_fill_(0, self._layout.padding, 0)

    def _by_sdpa(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        n, longest = len(self._layout), self._layout.longest
        heads, size = q.shape[1:]
        query, key, value = (x.view(n, longest, x.shape[1], size).transpose(1, 2) for x in (q, k, v))
        mixed = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=self._added(pattern, "sdpa", q.dtype),
            scale=self._scale,
            enable_gqa=k.shape[1] != heads,
        )
        return mixed.transpose(1, 2).reshape(n * longest, heads * size)

    def _by_varlen(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        assert self._varlen is not None  # noqa: S101 - a packed layout is made only where the kernel is
        reach = -1 if pattern.window is None else pattern.window
        # Given only if it is needed, because torch 2.11 has the kernel without this argument.
        shared = {"enable_gqa": True} if k.shape[1] != q.shape[1] else {}
        mixed = self._varlen(
            q,
            k,
            v,
            self._layout.offsets,
            self._layout.offsets,
            self._layout.longest,
            self._layout.longest,
            scale=self._scale,
            window_size=(reach, 0 if pattern.causal else reach),
            **shared,
        )
        return mixed.reshape(len(mixed), -1)

    def _ones(self, dtype: torch.dtype) -> torch.Tensor:
        """The constant column, (n, 1, longest): 0 at padding."""
        key = (Pattern(), "ones")
        if key not in self._masks:
            self._masks[key] = self._layout.inside[:, None].to(dtype) * _ONE
        ones = self._masks[key]
        assert ones is not None  # noqa: S101
        return ones

    def _added(self, pattern: Pattern, way: str, dtype: torch.dtype) -> torch.Tensor | None:
        """The tensor to add to the scores, (1 or n, 1 or heads, longest, longest); None if there is none."""
        key = (pattern, way)
        if key not in self._masks:
            self._masks[key] = self._make_added(pattern, way, dtype)
        return self._masks[key]

    def _make_added(self, pattern: Pattern, way: str, dtype: torch.dtype) -> torch.Tensor | None:
        layout = self._layout
        added = self._bias
        if added is not None and way == "exp2":
            added = added * math.log2(math.e)
        hidden = pattern.hidden(layout.longest, layout.lengths.device)
        if hidden is not None:
            hidden = hidden[None, None]
        if way == "sdpa" and not layout.full and not pattern.causal:
            # Padding is on the right, so a causal query, which attends to earlier tokens only, never sees it.
            outside = ~layout.inside[:, None, None, :]
            hidden = outside if hidden is None else hidden | outside
        if hidden is not None:
            base = torch.zeros(1, 1, 1, 1, device=hidden.device) if added is None else added
            # A window may leave a query at padding without any key. With -inf the softmax would then give NaN, and NaN
            # spreads.
            lowest = float("-inf") if way == "exp2" else torch.finfo(dtype).min
            added = torch.where(hidden, lowest, base)
        return None if added is None else added.to(dtype)


def find_varlen(heads: Heads, dtype: torch.dtype, device: torch.device) -> Varlen | None:
    """torch's kernel for packed texts; None if this torch lacks it, or it does not run such a model on ``device``.

    FlashAttention runs on Ampere and later, in fp16 and bf16, with heads of at most 256 numbers. The size of a head
    must be a multiple of 8, and the last dimension contiguous.
    """
    fits = dtype in (torch.float16, torch.bfloat16) and heads.size % 8 == 0 and heads.size <= 256
    if device.type != "cuda" or not fits or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    return torch_varlen(grouped=heads.keys != heads.queries)


def torch_varlen(*, grouped: bool) -> Varlen | None:
    """``varlen_attn``; None if this torch has none with the arguments that are used here.

    ``grouped``: several query heads share a key head.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    wanted = {"scale", "window_size"} | ({"enable_gqa"} if grouped else set())
    kernel: Any = varlen_attn
    return kernel if wanted <= set(inspect.signature(kernel).parameters) else None
