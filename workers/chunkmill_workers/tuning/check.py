"""Loads one model and embeds a few texts with it, for ``chunkmill models check``.

``python -m chunkmill_workers.tuning.check MODEL`` prints one JSON document: what loaded, or ``error`` and ``message``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

import torch

from chunkmill.errors import ChunkmillError
from chunkmill.models import resolve_model
from chunkmill.settings import Settings
from chunkmill_workers.engine.encoder.calibration import DOCUMENTS
from chunkmill_workers.engine.engine import Engine
from chunkmill_workers.tuning.candidate import peak_rss_mib

_SHORT: Final = "How do I rotate a TLS certificate?"
_CALLS: Final = 5


def check(model: str) -> dict[str, Any]:
    """What a worker with these settings would make of the model, measured with a few texts. Raises ChunkmillError."""
    settings = Settings.from_env()
    folder = resolve_model(
        model, pooling=settings.embedding_pooling, precision=settings.embedding_precision, trust=settings.trust
    )
    started = time.perf_counter()
    engine = Engine.load(
        folder,
        device=settings.embedding_device,
        dtype=settings.embedding_dtype,
        batch_tokens=settings.embedding_batch_tokens or None,
        precision=settings.embedding_precision,
        backend=settings.embedding_backend,
        threads=settings.embedding_threads or None,
    )
    loaded = time.perf_counter()
    try:
        engine.embed([_SHORT], "query")
        latencies = []
        for _ in range(_CALLS):
            began = time.perf_counter()
            engine.embed([_SHORT], "query", urgent=True)
            latencies.append(time.perf_counter() - began)
        embedded = engine.embed(DOCUMENTS)
        on_gpu = engine.device != "cpu"
        memory = torch.cuda.max_memory_reserved(engine.device) / 2**20 if on_gpu else peak_rss_mib()
        return {
            "device": engine.device,
            "backend": engine.backend,
            "dtype": engine.dtype,
            "load_seconds": loaded - started,
            "latency_ms": 1e3 * statistics.median(latencies),
            "tokens_per_second": embedded.timings.tokens / embedded.timings.total,
            "memory_mib": memory,
        }
    finally:
        engine.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 1 with ``error`` and ``message`` in the document."""
    parser = argparse.ArgumentParser(prog="python -m chunkmill_workers.tuning.check")
    parser.add_argument("model")
    given = parser.parse_args(arguments)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the document alone
            document = check(given.model)
    except ChunkmillError as error:
        print(json.dumps({"error": error.code, "message": str(error)}))
        return 1
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
