"""Chunks as they are in a collection, which is what the client returns of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from chunkmill.domain.printed import PrintedResult
from chunkmill.system.numbers import NDArray, np


class ChunkState(StrEnum):
    """Whether a chunk has a vector, and if not, whether it will get one."""

    EMBEDDED = "embedded"
    """It has a vector, so a search can find it."""
    PENDING = "pending"
    """It waits in an open ChunkBatch."""
    DEAD = "dead"
    """It is on the dead list of a job, which says why there is no vector."""
    MISSING = "missing"
    """It has no vector and waits for none, for example because its job was cancelled. ``retry`` embeds it."""


@dataclass(frozen=True, slots=True)
class StoredChunk(PrintedResult):
    """One chunk of a collection, as it was at one moment."""

    id: str
    metadata: Mapping[str, Any]
    state: ChunkState
    truncated: bool | None
    """The vector stands only for the part of the text that the model reads; None if there is no vector."""
    content_hash: str
    """64 hexadecimal digits: the SHA-256 of the text's UTF-8 bytes."""
    job_id: int
    """The job that added the chunk or last replaced it."""
    text: str | None = field(default=None, repr=False)
    """None if it was not asked for."""
    vector: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)
    """``(d,)``; None if it was not asked for, or if the chunk has no vector."""


EXPORTED = frozenset(("id", "text", "metadata", "vector", "truncated", "content_hash"))
"""The fields of an exported chunk, by which `chunkmill enqueue` knows one. There may be no text or no vector."""


@dataclass(frozen=True, slots=True)
class Exported(PrintedResult):
    """What an export wrote."""

    path: Path
    chunks: int
    without_vector: int
    """Chunks that had no vector when they were read; theirs is null in the file."""
    bytes: int
    """The size of the file."""
