"""On which device and in which number format a model runs, and how many tokens share a forward pass."""

from __future__ import annotations

import os
import re
from functools import cache
from typing import Final

import torch

from chunkmill.errors import DeviceUnavailable, InvalidSetting
from chunkmill.machine import processor_features, this_machine

_WORDS: Final = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}

# fp16 has three more bits of mantissa than bf16 and is as fast, but it overflows beyond 65,504. The activations of
# these families stay below that; other models get bf16, which has the range of fp32.
_FP16_FAMILIES: Final = frozenset(
    {"albert", "bert", "camembert", "distilbert", "electra", "mpnet", "nomic_bert", "roberta", "xlm-roberta"}
)

# all-MiniLM-L6-v2, docstrings of the standard library, two Zen 4 cores, thousand tokens/s with 512 / 1,024 / 2,048 /
# 4,096 tokens in a pass: bf16 11.1 / 10.9 / 10.8 / 9.6, fp32 6.7 / 6.7 / 6.3 / 5.4. Longer passes do not fit the cache.
# With shorter passes, models with wider layers spend more time on calls.
CPU_BATCH_TOKENS: Final = 1024
# Not measured on a GPU yet. With this many tokens a pass takes longer than Python takes to start it (about 2 ms for
# twelve layers).
CUDA_BATCH_TOKENS: Final = 32_768


def resolve_device(word: str) -> torch.device:
    """The device that ``word`` names: ``auto`` (CUDA if there is a GPU), ``cpu``, ``cuda`` or ``cuda:<index>``.

    Raises InvalidSetting for another word, and DeviceUnavailable for a GPU that torch does not see.
    """
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
            f"device {word!r} was asked for, but torch sees {count} CUDA devices: set EMBEDDING_DEVICE=auto, "
            "or check the driver and that torch was installed with CUDA"
        )
    return torch.device("cuda", int(index or 0))


def resolve_dtype(word: str, device: torch.device, model_type: str) -> torch.dtype:
    """The number format that ``word`` names: ``auto``, float32/fp32, bfloat16/bf16 or float16/fp16.

    ``auto`` chooses by device and by ``model_type`` of config.json. Raises InvalidSetting.
    """
    if word != "auto":
        if word not in _WORDS:
            raise InvalidSetting(f"dtype {word!r} is not one of auto, {', '.join(_WORDS)}")
        return _WORDS[word]
    if device.type == "cuda":
        if model_type in _FP16_FAMILIES:
            return torch.float16
        return torch.bfloat16 if gpu_has_bf16(device) else torch.float32
    # On a CPU without the instructions, torch emulates bf16, about a hundred times slower than fp32.
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def gpu_has_bf16(device: torch.device) -> bool:
    """Whether the GPU computes in bf16. A T4 (7.5) emulates it more slowly than fp32, and torch says that it has it."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices natively (AVX512_BF16 or AMX)."""
    return bool(processor_features() & {"avx512_bf16", "amx_bf16"})


def cpu_has_int8() -> bool:
    """Whether this CPU multiplies int8 matrices natively with sums in 32 bits (AVX512-VNNI, AVX-VNNI or AMX-INT8)."""
    native = bool(processor_features() & {"avx512_vnni", "avx_vnni", "amx_int8"})
    return native and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def device_name(device: torch.device) -> str:
    """A name of the device for file names, such as ``nvidia-h200`` or ``amd-epyc-9654-2-cores``."""
    if device.type == "cuda":
        words = torch.cuda.get_device_name(device)
    else:
        words = f"{this_machine().cpu} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


@cache
def cpu_threads() -> int:
    """How many threads torch had when this was first called: later each device thread has only its share of them."""
    return torch.get_num_threads()


def default_batch_tokens(device: torch.device) -> int:
    """The most tokens of a forward pass unless EMBEDDING_BATCH_TOKENS says otherwise."""
    return CUDA_BATCH_TOKENS if device.type == "cuda" else CPU_BATCH_TOKENS
