"""Who embeds texts in this process: our engine and sentence-transformers, each in fp32 and in half precision."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from app.models import DEFAULT_MODEL, resolve_model
from benchmarks import machine, stats
from workers.engine import Engine
from workers.engine.precision import cpu_has_bf16

Embed = Callable[[Sequence[str]], NDArray[np.float32]]

REFERENCE = "sentence-transformers fp32"
_WORDS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_ST_DEFAULT_BATCH = 32
_ST_GPU_BATCH = 256
"""Half precision on a GPU: sentence-transformers' default of 32 would leave most of it idle."""


def device() -> str:
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def half() -> str | None:
    """The half precision this device computes in; None where it would be emulated."""
    if device() != "cpu":
        return "fp16"
    return "bf16" if cpu_has_bf16() else None


def our_name(engine: Engine) -> str:
    return f"chunkmill {_WORDS[engine.dtype]}"


def our_engine(dtype: str = "auto") -> Engine:
    return Engine.load(DEFAULT_MODEL, device=device(), dtype=dtype)


def sentence_transformer(word: str) -> Embed:
    """``encode`` as it comes (batches of 32); in half precision on a GPU in batches of 256."""
    from sentence_transformers import SentenceTransformer

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[word]
    model = SentenceTransformer(
        str(resolve_model(DEFAULT_MODEL).path), device=device(), local_files_only=True, model_kwargs={"dtype": dtype}
    )
    batch = _ST_GPU_BATCH if word != "fp32" and device() != "cpu" else _ST_DEFAULT_BATCH

    def encode(texts: Sequence[str]) -> NDArray[np.float32]:
        return np.asarray(model.encode(list(texts), show_progress_bar=False, batch_size=batch))

    return encode


def use_all_cores() -> int:
    """torch's threads in this process; child processes get the same through ``OMP_NUM_THREADS``."""
    torch.set_num_threads(machine.cores())
    return machine.cores()


def gated(name: str, found: NDArray[Any], reference: NDArray[Any]) -> tuple[str | None, dict[str, Any]]:
    """Why a contender's vectors do not count, if so, and its cosines to the reference as facts."""
    each = stats.cosines(found, reference)
    facts = {"cosine_min": float(each.min()), "cosine_mean": float(each.mean())}
    # A reference compared with itself is 1 up to rounding; the gate needs no exception for it.
    gate = stats.PEER if name.startswith("sentence-transformers") else stats.OURS
    return gate.refusal(**facts), facts


def single_text_ms(embed: Callable[[], object], calls: int) -> float:
    """Median milliseconds of one call, from its own start to its own end."""
    taken = []
    for _ in range(calls):
        began = time.perf_counter()
        embed()
        taken.append(1000 * (time.perf_counter() - began))
    return statistics.median(taken)
