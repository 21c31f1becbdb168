"""Cut a window of chunks into what is cached, what must be embedded and what is refused. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass

from chunkmill.domain.chunks import PreparedChunk
from chunkmill.domain.spaces import OnLong


@dataclass(frozen=True, slots=True)
class DeadChunk:
    """A chunk without a vector. ``code`` is a stable word, ``reason`` a sentence without the text."""

    chunk_id: str
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """One window of an enqueue, decided.

    ``references``: one chunk per id, the last one given. ``cached``: distinct content hashes that have a
    vector. ``missing``: hash → UTF-8 text of those that have none, in the order they came.
    ``rejected``: chunks whose content is known to be too long under the ``reject`` policy.
    """

    references: tuple[PreparedChunk, ...]
    cached: tuple[bytes, ...]
    missing: Mapping[bytes, bytes]
    rejected: tuple[DeadChunk, ...]


@dataclass(frozen=True, slots=True)
class KnownVector:
    """What the space already knows of a content: its true token count, and whether it was cut."""

    n_tokens: int
    truncated: bool


def distinct(window: Sequence[PreparedChunk]) -> dict[str, PreparedChunk]:
    """One chunk per id: a later chunk replaces an earlier one of the same id, as two enqueues would."""
    return {chunk.id: chunk for chunk in window}


def plan_window(chunks: Mapping[str, PreparedChunk], known: Mapping[bytes, KnownVector], on_long: OnLong) -> WindowPlan:
    """Fold duplicates and separate hits from misses. ``known`` holds the window's hashes with a vector."""
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
    limit = f", the model's limit is {max_tokens}" if max_tokens else ", more than the model's limit"
    return f"the text has {n_tokens} tokens{limit}; shorten it, or enqueue with on_long='truncate' or 'split'"


def cut(missing: Mapping[bytes, Sized], max_contents: int, max_bytes: int) -> list[list[bytes]]:
    """Cut content hashes into ChunkBatches of at most ``max_contents`` hashes and ``max_bytes`` of text.

    Each hash comes with its text, or with anything as long. A text over ``max_bytes`` gets a ChunkBatch of its own.
    Order is kept.
    """
    batches: list[list[bytes]] = []
    current: list[bytes] = []
    size = 0
    for content_hash, text in missing.items():
        if current and (len(current) == max_contents or size + len(text) > max_bytes):
            batches.append(current)
            current, size = [], 0
        current.append(content_hash)
        size += len(text)
    if current:
        batches.append(current)
    return batches
