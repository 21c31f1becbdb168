"""What ``torch.nn.attention.varlen.varlen_attn`` computes, on any device and in any format, text by text.

It holds its caller to what the CUDA kernel demands, so that a pass that runs here runs there.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import math

import torch


@functools.cache
def signature() -> inspect.Signature:
    """What torch's own takes. Its import takes two seconds, so that only a test that calls it pays for it."""
    return inspect.signature(importlib.import_module("torch.nn.attention.varlen").varlen_attn)


def plain_varlen(*args: object, **kwargs: object) -> torch.Tensor:
    """Takes whatever torch's own takes, and nothing else."""
    given = signature().bind(*args, **kwargs)
    given.apply_defaults()
    asked = dict(given.arguments)
    unused = {name: asked.pop(name) for name in ("return_aux", "seqused_k", "block_table", "num_splits")}
    assert not any(unused.values())
    check(**asked)
    return attend(**asked)


def check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> None:
    """FlashAttention 2's demands (``mha_varlen_fwd``), but for the number format."""
    tokens, heads, size = query.shape
    assert size % 8 == 0
    assert size <= 256
    assert key.shape == value.shape == (tokens, key.shape[1], size)
    assert (heads == key.shape[1]) != enable_gqa
    assert heads % key.shape[1] == 0
    for tensor in (query, key, value):
        assert tensor.stride(-1) == 1, "the last dimension is contiguous"
        assert all(stride % 8 == 0 for stride in tensor.stride()[:-1]), "16 bytes are read at a time"
        assert tensor.storage_offset() % 8 == 0
        assert tensor.dtype == query.dtype
    for offsets in (cu_seq_q, cu_seq_k):
        assert offsets.dtype == torch.int32
        assert offsets.is_contiguous()
        assert offsets.device == query.device
    assert type(max_q) is int
    assert max_q == max_k
    assert isinstance(window_size, tuple), "torch compares it with (-1, 0) to know a causal model"
    assert all(type(size) is int and size >= -1 for size in window_size)
    assert scale is None or isinstance(scale, float)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    mixed = torch.empty_like(query)
    scale = scale if scale is not None else 1 / math.sqrt(query.shape[-1])
    bounds = cu_seq_q.tolist()
    assert bounds[-1] == len(query)
    assert max(end - start for start, end in itertools.pairwise(bounds)) == max_q
    shared = query.shape[1] // key.shape[1]
    for start, end in itertools.pairwise(bounds):
        q = query[start:end].float().transpose(0, 1)  # (heads, length, size)
        k, v = (tensor[start:end].float().transpose(0, 1).repeat_interleave(shared, 0) for tensor in (key, value))
        scores = q @ k.transpose(1, 2) * scale
        at = torch.arange(end - start)
        ahead = at - at[:, None]  # how far the key is ahead of the query
        left, right = window_size
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        if left >= 0:
            hidden |= ahead < -left
        if right >= 0:
            hidden |= ahead > right
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        mixed[start:end] = (weights @ v).transpose(0, 1).to(mixed.dtype)
    return mixed
