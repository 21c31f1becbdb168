"""Sorts the chunks of a window into those that are cached, must be embedded, or are refused. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass

from chunkmill.domain.chunks import PreparedChunk
from chunkmill.domain.printed import PrintedResult
from chunkmill.domain.spaces import OnLong


@dataclass(frozen=True, slots=True)
class DeadChunk(PrintedResult):
    """A chunk that got no vector, and the reason."""

    chunk_id: str
    code: str
    """A stable word for the reason."""
    reason: str
    """A sentence that says why there is no vector. It does not hold the text."""


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """What to do with the chunks of one window of an enqueue."""

    references: tuple[PreparedChunk, ...]
    """The chunks to store, one for each id."""
    cached: tuple[bytes, ...]
    """Distinct content hashes that have a vector."""
    missing: Mapping[bytes, bytes]
    """Content hash to UTF-8 text for contents without a vector, in the order in which they came."""
    rejected: tuple[DeadChunk, ...]
    """Chunks whose content is known to be too long, under the policy ``reject``."""


@dataclass(frozen=True, slots=True)
class MergeCounts:
    """How the chunks of an enqueue met their collection."""

    new: int = 0
    """Chunks whose id was not in the collection."""
    replaced: int = 0
    """Chunks whose text or metadata differ from those that were in the collection."""
    unchanged: int = 0
    """Chunks that were in the collection already, with the same text and metadata."""
    repeated: int = 0
    """Chunks whose id the same enqueue had given before. The last one counts."""
    refused: int = 0
    """Chunks that were not accepted: bad ones that were skipped, and texts that are known to be too long."""
    deleted: int | None = None
    """Chunks that were deleted because the source does not have them; None if the enqueue was not to delete."""


@dataclass(frozen=True, slots=True)
class KnownVector:
    """What the space knows about a content that has a vector: its true number of tokens, and whether it was cut."""

    n_tokens: int
    truncated: bool


def distinct(window: Sequence[PreparedChunk]) -> dict[str, PreparedChunk]:
    """One chunk for each id. A later chunk replaces an earlier one with the same id, as in two enqueues."""
    return {chunk.id: chunk for chunk in window}


def plan_window(chunks: Mapping[str, PreparedChunk], known: Mapping[bytes, KnownVector], on_long: OnLong) -> WindowPlan:
    """The plan for the chunks of one window. ``known`` has the content hashes that have a vector."""
    references: list[PreparedChunk] = []
    cached: dict[bytes, None] = {}
    missing: dict[bytes, bytes] = {}
    rejected: list[DeadChunk] = []
    for chunk in chunks.values():
        hit = known.get(chunk.content_hash)
        if hit is None:
            missing[chunk.content_hash] = chunk.text
        elif hit.truncated and on_long is OnLong.REJECT:
            rejected.append(DeadChunk(chunk.id, "too_long", too_long_reason(hit.n_tokens)))
            continue
        else:
            cached[chunk.content_hash] = None
        references.append(chunk)
    return WindowPlan(tuple(references), tuple(cached), missing, tuple(rejected))


def too_long_reason(n_tokens: int, max_tokens: int | None = None) -> str:
    """The reason of a dead chunk whose text has more tokens than the model reads.

    ``max_tokens`` is the limit of a provider's model, whose tokens are all counted. Of a long text a local model counts
    only the first tokens (docs/decisions/0043).
    """
    least = "" if max_tokens else "at least "
    limit = f", the model's limit is {max_tokens}" if max_tokens else ", more than the model's limit"
    return f"the text has {least}{n_tokens} tokens{limit}; shorten it, or enqueue with on_long='truncate' or 'split'"


MAX_BATCH_BYTES = 4 * 1024 * 1024
"""The most text of one ChunkBatch. It bounds a worker's memory when chunks are large."""


def into_chunk_batches(missing: Mapping[bytes, Sized], max_contents: int, max_bytes: int) -> list[list[bytes]]:
    """The content hashes of each ChunkBatch: at most ``max_contents`` hashes with ``max_bytes`` of text. Order is kept.

    ``missing`` has for each hash its text, or anything of the same length. A text over ``max_bytes`` gets a ChunkBatch
    of its own.
    """
    chunk_batches: list[list[bytes]] = []
    current: list[bytes] = []
    size = 0
    for content_hash, text in missing.items():
        if current and (len(current) == max_contents or size + len(text) > max_bytes):
            chunk_batches.append(current)
            current, size = [], 0
        current.append(content_hash)
        size += len(text)
    if current:
        chunk_batches.append(current)
    return chunk_batches
