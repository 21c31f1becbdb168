"""Turns texts into vectors. See `chunkmill_workers.engine.engine`."""

from __future__ import annotations

from chunkmill_workers.engine.engine import Engine, Kind
from chunkmill_workers.engine.results import Embeddings, TextFailure, Timings, TokenBatchResult

__all__ = ["Embeddings", "Engine", "Kind", "TextFailure", "Timings", "TokenBatchResult"]
