"""Text in, vectors out. See `workers.engine.engine`."""

from __future__ import annotations

from workers.engine.engine import Engine, Kind
from workers.engine.results import Embeddings, TextFailure, Timings, TokenBatchResult

__all__ = ["Embeddings", "Engine", "Kind", "TextFailure", "Timings", "TokenBatchResult"]
