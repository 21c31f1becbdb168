"""The three ways of attention agree, whatever the pattern, and the fast one never answers wrongly in silence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from chunkmill_workers.engine.encoder.attention import Attention, Pattern
from chunkmill_workers.engine.encoder.layout import Layout, lay_out

HEADS, SIZE = 3, 8
CPU = torch.device("cpu")
PATTERNS = [
    Pattern(),
    Pattern(window=2),
    Pattern(window=500),
    Pattern(causal=True),
    Pattern(causal=True, window=3),
]


def layout(*lengths: int) -> Layout:
    return lay_out([np.ones(length, np.int32) for length in lengths], packed=False, pad_id=0, device=CPU)


def query_key_value(slots: int, *, size: float = 1.0, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [size * torch.randn(slots, HEADS, SIZE, generator=generator) for _ in range(3)]


def attend(
    on: Layout, qkv: list[torch.Tensor], pattern: Pattern, *, bias: torch.Tensor | None = None, careful: bool
) -> torch.Tensor:
    """(n, longest, heads x size); the tensors are copied, because attention may write into them."""
    attention = Attention(on, scale=SIZE**-0.5, bias=bias, varlen=None, careful=careful)
    mixed = attention(*(tensor.clone() for tensor in qkv), pattern)
    return mixed.view(len(on), on.longest, HEADS * SIZE)


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, bias: torch.Tensor | None
) -> torch.Tensor:
    """One text by the definition, in fp64: (length, heads x size) from (length, heads, size)."""
    length = len(q)
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * SIZE**-0.5
    if bias is not None:
        scores += bias[0, :, :length, :length]
    for query in range(length):
        for key in range(length):
            behind = query - key
            if (pattern.causal and behind < 0) or (pattern.window is not None and abs(behind) > pattern.window):
                scores[:, query, key] = -math.inf
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.double()).reshape(length, -1).float()


@pytest.mark.parametrize("careful", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("biased", [False, True])
def test_every_way_is_the_definition(pattern: Pattern, careful: bool, biased: bool) -> None:
    lengths = (9, 9, 4, 1)
    on = layout(*lengths)
    q, k, v = query_key_value(len(lengths) * on.longest)
    bias = torch.randn(1, HEADS, on.longest, on.longest) if biased else None

    attended = attend(on, [q, k, v], pattern, bias=bias, careful=careful)

    for text, length in enumerate(lengths):
        own = slice(text * on.longest, text * on.longest + length)
        torch.testing.assert_close(
            attended[text, :length], plain(q[own], k[own], v[own], pattern, bias), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("careful", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_what_lies_in_padding_reaches_no_token(pattern: Pattern, careful: bool) -> None:
    on = layout(7, 3)
    clean = query_key_value(14)
    dirty = [tensor.clone() for tensor in clean]
    for dirty_tensor in dirty:
        dirty_tensor[10:] = 1e4

    attended, expected = (attend(on, inputs, pattern, careful=careful) for inputs in (dirty, clean))

    torch.testing.assert_close(attended[1, :3], expected[1, :3], atol=1e-6, rtol=0)
    if not careful:
        assert torch.isfinite(attended).all(), "a padding token's NaN would be a key of the next layer"


@pytest.mark.parametrize(
    ("shift", "why"),
    [(200.0, "a score overflows"), (-200.0, "all scores of a row vanish"), (-112.0, "a row's sum loses its bits")],
)
def test_scores_out_of_range_end_in_nan_and_not_in_a_wrong_number(shift: float, why: str) -> None:
    on = layout(4)
    q, k, v = query_key_value(4)
    bias = torch.full((1, HEADS, 4, 4), shift * math.log(2))

    fast = attend(on, [q, k, v], Pattern(), bias=bias, careful=False)
    careful = attend(on, [q, k, v], Pattern(), bias=bias, careful=True)

    assert torch.isnan(fast).all(), why
    torch.testing.assert_close(careful[0], plain(q, k, v, Pattern(), None), atol=1e-5, rtol=0)


def test_in_range_large_scores_are_right() -> None:
    """Sums of many terms near the largest number do not overflow before a term does."""
    on = layout(64)
    q, k, v = query_key_value(64)
    bias = torch.full((1, HEADS, 64, 64), 110 * math.log(2))

    attended = attend(on, [0.1 * q, k, v], Pattern(), bias=bias, careful=False)

    torch.testing.assert_close(attended[0], plain(0.1 * q, k, v, Pattern(), None), atol=1e-4, rtol=0)
