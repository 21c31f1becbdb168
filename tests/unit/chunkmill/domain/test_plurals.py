from __future__ import annotations

from chunkmill.domain.plurals import count


def test_counts() -> None:
    assert count(0, "chunk") == "0 chunks"
    assert count(1, "chunk") == "1 chunk"
    assert count(2000, "chunk") == "2,000 chunks"
    were = [count(n, "ChunkBatch was", "ChunkBatches were") for n in (1, 2)]
    assert were == ["1 ChunkBatch was", "2 ChunkBatches were"]
