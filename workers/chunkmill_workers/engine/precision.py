"""Where and in which number format a model runs, and how many tokens share a forward pass."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from typing import Final

import torch

from chunkmill.errors import DeviceUnavailable, InvalidSetting
from chunkmill.machine import processor_features

_WORDS: Final = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}

# fp16 keeps three more bits of mantissa than bf16 at the same rate, but overflows past 65,504, which these
# families' activations do not reach; others keep bf16's range.
_FP16_FAMILIES: Final = frozenset(
    {"albert", "bert", "camembert", "distilbert", "electra", "mpnet", "nomic_bert", "roberta", "xlm-roberta"}
)

# all-MiniLM-L6-v2, stdlib docstrings, two Zen 4 cores, thousand tokens/s at budgets of 512 / 1,024 / 2,048 /
# 4,096: bf16 11.1 / 10.9 / 10.8 / 9.6, fp32 6.7 / 6.7 / 6.3 / 5.4. Longer passes leave the cache; shorter
# ones pay for more calls on models with wider layers.
CPU_BATCH_TOKENS: Final = 1024
# Not measured yet on a GPU: enough tokens that a pass outlasts the time Python takes to start it
# (about 2 ms for twelve layers).
CUDA_BATCH_TOKENS: Final = 32_768


def resolve_device(word: str) -> torch.device:
    """``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:<index>``."""
    if word == "auto":
        word = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = word.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise InvalidSetting(f"device {word!r} is not one of auto, cpu, cuda, cuda:<index>")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise DeviceUnavailable(
            f"device {word!r} was asked for and torch sees {count} CUDA devices: set EMBEDDING_DEVICE=auto, "
            "or check the driver and that torch was installed with CUDA"
        )
    return torch.device("cuda", int(index or 0))


def resolve_dtype(word: str, device: torch.device, model_type: str) -> torch.dtype:
    """``auto``, or one of float32/fp32, bfloat16/bf16, float16/fp16."""
    if word != "auto":
        if word not in _WORDS:
            raise InvalidSetting(f"dtype {word!r} is not one of auto, {', '.join(_WORDS)}")
        return _WORDS[word]
    if device.type == "cuda":
        return torch.float16 if model_type in _FP16_FAMILIES else torch.bfloat16
    # Without the instructions, torch emulates bf16 about a hundred times slower than fp32 runs.
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def cpu_has_bf16() -> bool:
    """Does this CPU multiply bf16 matrices natively (AVX512_BF16 or AMX)?"""
    return bool(processor_features() & {"avx512_bf16", "amx_bf16"})


def cpu_has_int8() -> bool:
    """Does this CPU multiply int8 matrices natively, adding up in 32 bits (AVX512-VNNI, AVX-VNNI or AMX-INT8)?"""
    native = bool(processor_features() & {"avx512_vnni", "avx_vnni", "amx_int8"})
    return native and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def device_name(device: torch.device) -> str:
    """A name for files: ``nvidia-h200``, ``amd-epyc-9654-2-cores``."""
    if device.type == "cuda":
        words = torch.cuda.get_device_name(device)
    else:
        words = f"{torch.cpu.get_capabilities().get('cpu_name') or platform.machine()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


@cache
def cpu_threads() -> int:
    """torch's threads before any lane took its share of them."""
    return torch.get_num_threads()


def default_batch_tokens(device: torch.device) -> int:
    """Padded tokens per forward pass."""
    return CUDA_BATCH_TOKENS if device.type == "cuda" else CPU_BATCH_TOKENS
