"""Names in the JSON of results, for the modules that write them and those that read them."""

from __future__ import annotations

OUR = "chunkmill"
REFERENCE = "sentence-transformers fp32"
LIMIT = "GEMM rate"
LATENCY = "one short text"
MEMORY = "peak memory"
START = "process start to first vector"
