"""The names under which results stand in the JSON, for those who write them and those who read them."""

from __future__ import annotations

OUR = "chunkmill"
REFERENCE = "sentence-transformers fp32"
LIMIT = "GEMM rate"
LATENCY = "one short text"
MEMORY = "peak memory"
START = "process start to first vector"
