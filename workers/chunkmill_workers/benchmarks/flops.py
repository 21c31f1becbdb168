"""How much of the machine an engine uses: the FLOPs of a text, and the machine's rate of matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chunkmill_workers.engine.precision import cpu_has_bf16, cpu_has_int8

SECONDS = 0.2
"""How long each product is measured in each round. The best product is the machine's rate."""
CPU_ROWS, GPU_ROWS = 1_024, 32_768
"""Tokens in a product: about as many as in one forward pass."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def counts(config: Mapping[str, Any]) -> bool:
    """Whether :func:`text_flops` knows this architecture: BERT and similar ones, with two products in the MLP."""
    return config.get("model_type") in {"bert", "roberta", "xlm-roberta", "mpnet"}


def text_flops(config: Mapping[str, Any], n_tokens: NDArray[np.int64]) -> float:
    """FLOPs of a BERT for texts of ``n_tokens``, (n,) int64: for each token 2 × P_layers + 4 × L × s × h.

    P_layers are the weights of the layers, L is their number, s the length of the text and h the hidden size. Only
    matrix products and attention count, without padding.
    """
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    weights = layers * (4 * hidden**2 + 2 * hidden * config["intermediate_size"])
    return float(np.sum(n_tokens * (2 * weights + 4 * layers * hidden * n_tokens)))


def has(precision: str, device: str) -> bool:
    """Whether torch has a fast product of this precision on this machine."""
    if device != "cpu":
        return precision in DTYPES
    return {"fp32": True, "bf16": cpu_has_bf16(), "int8": cpu_has_int8()}.get(precision, False)


def gemm_rate(config: Mapping[str, Any], precision: str, device: str) -> float:
    """FLOP/s of the faster of the model's two largest products, in the fastest way that torch has."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    rows = CPU_ROWS if device == "cpu" else GPU_ROWS
    product = _int8_product if precision == "int8" else _product
    return max(product(rows, *shape, precision, device) for shape in ((hidden, inner), (inner, hidden)))


def _product(rows: int, width: int, columns: int, precision: str, device: str) -> float:
    x = torch.randn(rows, width).to(device, DTYPES[precision])
    weight = torch.randn(columns, width).to(device, DTYPES[precision])
    ways: list[Callable[[], object]] = [lambda: torch.nn.functional.linear(x, weight)]
    if device == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    return max(2 * rows * width * columns * _per_second(way, device) for way in ways)


def _int8_product(rows: int, width: int, columns: int, precision: str, device: str) -> float:
    """FLOP/s of unsigned activations times signed weights with a scale for each channel, as oneDNN has fast kernels."""
    x = torch.randint(0, 255, (rows, width), dtype=torch.uint8)
    weight = torch.randint(-127, 127, (columns, width), dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, [rows, width])
    scales, zeros = torch.full((columns,), 0.01), torch.zeros(columns, dtype=torch.int64)

    def product() -> object:
        return torch.ops.onednn.qlinear_pointwise(
            x, 0.01, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )

    return 2 * rows * width * columns * _per_second(product, device)


@torch.inference_mode()
def _per_second(way: Callable[[], object], device: str) -> float:
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
