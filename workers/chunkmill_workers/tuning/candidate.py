"""Runs one setup of the engine in a process of its own, so that its peak memory and its crashes are its own.

``python -m chunkmill_workers.tuning.candidate`` reads JSON lines from stdin and answers each with one on stdout: first
what to load, then commands. It ends when stdin does. ``chunkmill_workers.tuning.process``
sets the number of threads in its environment.
"""

from __future__ import annotations

import base64
import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from chunkmill.domain.spaces import Precision
from chunkmill.errors import ChunkmillError, EngineError
from chunkmill.machine import memory_mib
from chunkmill.models import resolve_model
from chunkmill.settings import Settings
from chunkmill_workers.engine.engine import Engine
from chunkmill_workers.tuning.process import private_stdout

SHORT_TEXT = "How do I rotate a TLS certificate?"
_LATENCY_CALLS = 15


class LoadedEngine:
    """An engine that is loaded as its setup says."""

    def __init__(self, order: dict[str, Any]) -> None:
        """Raises ChunkmillError."""
        settings = Settings.from_env()
        folder = resolve_model(
            order["model"],
            pooling=settings.embedding_pooling,
            precision=Precision(order["precision"]),
            trust=settings.trust,
        )
        setup = order["setup"]
        self._engine = Engine.load(
            folder,
            device=order["device"],
            dtype=setup["dtype"],
            batch_tokens=setup["batch_tokens"] or None,
            precision=Precision(order["precision"]),
            backend=setup["backend"],
            threads=setup["threads"],
        )
        self._asked = setup["batch_tokens"]
        self._parallel = setup["parallel_batches"]
        self._chunk_batch = order["chunk_batch"]
        self._texts: list[str] = order["texts"]
        self.description = {
            "backend": self._engine.backend,
            "dtype": self._engine.dtype,
            "max_tokens": folder.spec.max_tokens,
        }

    def vectors(self, texts: Sequence[str]) -> dict[str, Any]:
        """The vectors of ``texts`` as float32 in base64, with the tokens and seconds of a second pass over them."""
        self._engine.embed(texts)
        started = time.perf_counter()
        embedded = self._engine.embed(texts)
        seconds = time.perf_counter() - started
        self._check_token_limit()
        return {
            "vectors": base64.b64encode(np.ascontiguousarray(embedded.vectors, "<f4").tobytes()).decode(),
            "tokens": embedded.timings.tokens,
            "n_tokens": embedded.n_tokens.tolist(),
            "seconds": seconds,
        }

    def turn(self) -> dict[str, Any]:
        """Measure one pass over all texts in ChunkBatches, as in a worker, and then one short text several times."""
        size = self._chunk_batch
        parts = [self._texts[first : first + size] for first in range(0, len(self._texts), size)]
        started = time.perf_counter()
        with ThreadPoolExecutor(self._parallel) as pool:
            tokens = sum(pool.map(lambda part: self._engine.embed(part).timings.tokens, parts))
        seconds = time.perf_counter() - started
        self._check_token_limit()
        latencies = []
        for _ in range(_LATENCY_CALLS):
            asked = time.perf_counter()
            self._engine.embed([SHORT_TEXT], "query", urgent=True)
            latencies.append((time.perf_counter() - asked) * 1e3)
        numbers = {"tokens": tokens, "seconds": seconds, "latency_ms": statistics.median(latencies)}
        return numbers | {"peak_mib": self._peak_mib(), "memory_mib": self._memory_mib()}

    def _check_token_limit(self) -> None:
        if self._engine.batch_tokens < self._asked:
            raise EngineError(
                f"a pass of {self._asked:,} tokens does not fit the device's memory; {self._engine.batch_tokens:,} do"
            )

    def _peak_mib(self) -> float:
        """The most memory, in MiB, that torch held on the GPU, or that the process held on a CPU."""
        if self._engine.device != "cpu":
            import torch

            peak = torch.cuda.max_memory_reserved(self._engine.device) / 2**20
            gc.collect()
            torch.cuda.empty_cache()  # other candidates have the next turns
            return peak
        return peak_rss_mib()

    def _memory_mib(self) -> float:
        """The memory of the device, in MiB."""
        if self._engine.device != "cpu":
            import torch

            return float(torch.cuda.mem_get_info(self._engine.device)[1] / 2**20)
        return memory_mib()


def peak_rss_mib() -> float:
    """The most memory that this process held. It is VmHWM, because ``ru_maxrss`` starts with the parent's value."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def main() -> None:
    out = private_stdout()

    def answer(data: dict[str, Any]) -> None:
        out.write(json.dumps(data) + "\n")
        out.flush()

    loaded: LoadedEngine | None = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if loaded is None:
                loaded = LoadedEngine(order)
                answer(loaded.description)
            else:
                answer(loaded.vectors(order["texts"]) if order["do"] == "vectors" else loaded.turn())
        except ChunkmillError as error:
            answer({"problem": str(error)})
        except Exception as error:  # noqa: BLE001 - whatever a backend raises, it is the reason in its row
            answer({"problem": f"{type(error).__name__}: {str(error)[:500]}"})


if __name__ == "__main__":
    main()
