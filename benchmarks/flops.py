"""How much of the machine the engine uses: FLOPs of a text, and the rate of matrix products to hold them against."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

SECONDS = 0.2
"""Of each product in each round; the best of a few products is the machine's rate."""


def text_flops(config: Mapping[str, Any], n_tokens: NDArray[np.int64]) -> float:
    """FLOPs of texts of ``n_tokens`` (n,) through a BERT: per token 2 × P_layers + 4 × L × s × h.

    Matrix products and attention only, without padding: embeddings, norms and activations count as nothing.
    """
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    weights = layers * (4 * hidden**2 + 2 * hidden * config["intermediate_size"])
    return float(np.sum(n_tokens * (2 * weights + 4 * layers * hidden * n_tokens)))


def gemm_rate(config: Mapping[str, Any], rows: int, dtype: torch.dtype, device: str) -> float:
    """FLOP/s of the model's two largest products on ``rows`` tokens, the best way torch has of running them."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    return max(_product(rows, *shape, dtype, device) for shape in ((hidden, inner), (inner, hidden)))


def _product(rows: int, width: int, columns: int, dtype: torch.dtype, device: str) -> float:
    x = torch.randn(rows, width).to(device, dtype)
    weight = torch.randn(columns, width).to(device, dtype)
    ways = [lambda: torch.nn.functional.linear(x, weight)]
    if device == "cpu" and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    return max(2 * rows * width * columns * _per_second(way, device) for way in ways)


@torch.inference_mode()
def _per_second(way: Any, device: str) -> float:
    way()
    done = 0
    _wait(device)
    began = time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        for _ in range(20):
            way()
        _wait(device)
        done += 20
    return done / (time.perf_counter() - began)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
