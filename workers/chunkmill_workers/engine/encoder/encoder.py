"""A transformer's forward pass over one TokenBatch, for every architecture that `architectures` can describe.

In half precision, matrix products and attention run in bf16 or fp16. With bf16, the residual stream, norms and
embeddings stay in fp32 (docs/decisions/0007).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from chunkmill_workers.engine.encoder.attention import Attention, Heads, Pattern, Varlen
from chunkmill_workers.engine.encoder.layout import Layout
from chunkmill_workers.engine.encoder.linear import Linear


@dataclass(frozen=True, slots=True)
class Norm:
    """LayerNorm; with ``rms`` RMSNorm, which does not subtract the mean. It computes in fp32, whatever its input is."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    rms: bool = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.rms:
            return functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class Layer:
    """One transformer layer. With the encoder's ``norms_first``, norms precede attention and MLP, else they follow."""

    qkv: Linear
    out: Linear
    up: Linear
    """The first product of the MLP, with its activation. In a gated MLP it gives gate and value, side by side."""
    down: Linear
    attention_norm: Norm | None
    mlp_norm: Norm
    pattern: Pattern
    gate: Callable[[torch.Tensor], torch.Tensor] | None = None
    """The activation of a gated MLP; None if the MLP has no gate."""
    rotary: int | None = None
    """The number of the encoder's rotary table that turns queries and keys; None if they are not turned."""
    query_norm: Norm | None = None
    key_norm: Norm | None = None


@dataclass(frozen=True, slots=True)
class Rotary:
    """Tables of rotary positions, (max_tokens, size) fp32. Both halves of a row are written out."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class Encoder:
    """A whole model with its weights. It is frozen, and its tensors are on one device."""

    words: torch.Tensor
    """Token embeddings, (vocabulary, hidden)."""
    positions: torch.Tensor | None
    """Learned positions, (max positions, hidden), with the embedding of segment 0 added; None if there are none."""
    pad_position: int | None
    """RoBERTa's way to count: positions begin at ``pad_position + 1``, and a token whose id is ``pad_position`` has
    that position. None for positions from 0."""
    embedding_norm: Norm | None
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    heads: Heads
    norms_first: bool
    dtype: torch.dtype
    """The number format of matrix products and attention."""
    residual: torch.dtype
    """The number format of the residual stream, norms and embeddings."""
    rotaries: tuple[Rotary, ...] = ()
    bias: Callable[[int], torch.Tensor] | None = None
    """MPNet's position bias: from ``longest`` to (1, heads, longest, longest), which is added to all scores."""
    rounds: bool = False
    """Slots are rounded up (:func:`_rounded`) for matrix products, norms and the residual stream, but not for
    attention."""

    def __call__(
        self, layout: Layout, *, varlen: Varlen | None, careful: bool = False, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Token vectors, (slots, hidden); with ``keep``, (n,) int64 slots, only those, (n, hidden).

        A model that pools one token does not need the others after its last attention, so ``keep`` saves two thirds of
        the last layer.
        """
        attention = Attention(
            layout,
            scale=self.heads.size**-0.5,
            bias=self.bias(layout.longest) if self.bias is not None else None,
            varlen=varlen,
            careful=careful,
        )
        at = layout.at
        turns = [(table.cos[at, None].to(self.dtype), table.sin[at, None].to(self.dtype)) for table in self.rotaries]
        x = self._round(self._embed(layout))
        for number, layer in enumerate(self.layers):
            last = number == len(self.layers) - 1
            x = self._layer(layer, x, attention, turns, keep if last else None)
        x = self.final_norm(x) if self.final_norm is not None else x
        return x[: len(layout.ids) if keep is None else len(keep)]

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        more = _rounded(len(x)) - len(x) if self.rounds else 0
        return functional.pad(x, (0, 0, 0, more)) if more else x

    def _embed(self, layout: Layout) -> torch.Tensor:
        x = functional.embedding(layout.ids, self.words)
        if self.positions is not None:
            x = x + (self._positions(layout) if self.pad_position is not None else self.positions[layout.at])
        return (self.embedding_norm(x) if self.embedding_norm is not None else x).to(self.residual)

    def _positions(self, layout: Layout) -> torch.Tensor:
        """Position embeddings as in ``create_position_ids_from_input_ids`` of transformers, (slots, hidden).

        A text may contain the padding token, so the padding id does not say where a text ends.
        """
        assert self.positions is not None and self.pad_position is not None  # noqa: S101
        real = (layout.ids != self.pad_position).long()
        counted = torch.cumsum(real, 0)
        before = (counted - real)[layout.slots(torch.zeros_like(layout.lengths))]
        sizes = layout.lengths if layout.packed else torch.full_like(layout.lengths, layout.longest)
        before = torch.repeat_interleave(before, sizes, output_size=len(real))
        return self.positions[(counted - before) * real + self.pad_position]

    def _layer(
        self,
        layer: Layer,
        x: torch.Tensor,
        attention: Attention,
        turns: list[tuple[torch.Tensor, torch.Tensor]],
        keep: torch.Tensor | None,
    ) -> torch.Tensor:
        inner = layer.attention_norm(x) if self.norms_first and layer.attention_norm is not None else x
        mixed = attention(*self._query_key_value(layer, inner, turns, attention.slots), layer.pattern)
        if keep is not None:
            mixed, x = mixed[keep], self._round(x[keep])
        x = x + layer.out(self._round(mixed))
        if not self.norms_first and layer.attention_norm is not None:
            x = layer.attention_norm(x)
        x = x + self._mlp(layer, layer.mlp_norm(x) if self.norms_first else x)
        return x if self.norms_first else layer.mlp_norm(x)

    def _query_key_value(
        self, layer: Layer, x: torch.Tensor, turns: list[tuple[torch.Tensor, torch.Tensor]], slots: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, (slots, heads, size), and keys and values, (slots, key heads, size) each."""
        queries, keys, size = self.heads.queries, self.heads.keys, self.heads.size
        qkv = layer.qkv(x)[:slots].view(slots, queries + 2 * keys, size)
        q, k, v = torch.split(qkv, [queries, keys, keys], dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            q, k = layer.query_norm(q.float()).to(self.dtype), layer.key_norm(k.float()).to(self.dtype)
        if layer.rotary is not None:
            cos, sin = turns[layer.rotary]
            q, k = _turn(q, cos, sin), _turn(k, cos, sin)
        return q, k, v

    def _mlp(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        up = layer.up(x)
        if layer.gate is not None:
            gate, value = up.chunk(2, dim=-1)
            up = layer.gate(gate) * value
        return layer.down(up)


def _rounded(slots: int) -> int:
    """``slots``, rounded up to a multiple of 8 up to 64, and of 32 or a thirty-second of it above.

    oneDNN compiles a product anew for each number of slots. On a processor with AMX that takes 11 ms in bf16, as long
    as the four products of a layer take for 1,000 slots, and half a megabyte stays in a cache of 1,024 products.
    Rounded, there are some forty numbers of slots up to 1,024, and in a large pass one slot in fifty more.
    """
    step = 8 if slots <= 64 else max(32, 1 << (slots.bit_length() - 6))
    return -(-slots // step) * step


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``x``, (slots, heads, size), turned by its rotary positions (Su et al., 2021), which pair the two halves of a
    head.

    ``cos`` and ``sin`` are (slots, 1, size).
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
