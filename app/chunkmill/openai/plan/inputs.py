"""A content as the provider may take it: whole, cut, in windows, or refused. Pure.

A content's ``n_tokens`` is that of its whole text, whatever is sent of it, as everywhere in the system.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chunkmill.domain.planning import too_long_reason
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.windows import window_bounds
from chunkmill.openai.plan.limits import OVERHEAD_BYTES, BatchLimits
from chunkmill.openai.plan.tokens import TokenCounter
from chunkmill.openai.wire.jsonl import text_bytes

# How far behind the end of the last token that fits a longer prefix is looked for: a cut changes the tokens before
# it, so "embeddin" may have more of them than "embedding". No token of cl100k is longer.
_LOOK_AHEAD = 128
# How far before that end the tokens are counted anew for each candidate.
_LOOK_BACK = 1_000

_MOST_BYTES = 9  # of a character in JSON: six as \\u0001, and the quotes and comma of a text of only one

_EMPTY_REASON = "the text is empty, and this provider takes no empty text; give it content, or leave the chunk out"


@dataclass(frozen=True, slots=True)
class Window:
    """One input as it is sent. ``weight`` is what its vector counts for in the content's mean; 1 where it is alone."""

    text: str
    n_tokens: int
    weight: int = 1


@dataclass(frozen=True, slots=True)
class ProviderInput:
    """A content to be sent: one window with its text (or the part of it that fits), several under SPLIT."""

    content_hash: bytes
    windows: tuple[Window, ...]
    n_tokens: int
    """Of the whole text."""
    truncated: bool = False

    @property
    def sent_tokens(self) -> int:
        return sum(window.n_tokens for window in self.windows)


@dataclass(frozen=True, slots=True)
class RefusedInput:
    """A content that cannot be sent: ``code`` is ``empty_text``, ``too_long`` or ``too_large``."""

    content_hash: bytes
    code: str
    reason: str


def prepare(
    contents: Sequence[tuple[bytes, str]], counter: TokenCounter, limits: BatchLimits, on_long: OnLong
) -> list[ProviderInput | RefusedInput]:
    """One answer per content ``(content_hash, text)``, in order. Give some thousand at a time: all are held."""
    counts = counter.counts([text for _, text in contents])
    return [
        _prepare(content_hash, text, n_tokens, counter, limits, on_long)
        for (content_hash, text), n_tokens in zip(contents, counts, strict=True)
    ]


def _prepare(
    content_hash: bytes, text: str, n_tokens: int, counter: TokenCounter, limits: BatchLimits, on_long: OnLong
) -> ProviderInput | RefusedInput:
    limit = limits.tokens_per_input
    if not text:
        return RefusedInput(content_hash, "empty_text", _EMPTY_REASON)
    truncated = False
    windows = [Window(text, n_tokens)]
    if n_tokens > limit:
        if on_long is OnLong.REJECT:
            return RefusedInput(content_hash, "too_long", too_long_reason(n_tokens, limit))
        truncated = on_long is OnLong.TRUNCATE
        windows = [longest_prefix(text, counter, limit)] if truncated else split(text, counter, limit)
    problem = _too_much(windows, n_tokens, limits)
    if problem is not None:
        return RefusedInput(content_hash, *problem)
    return ProviderInput(content_hash, tuple(windows), n_tokens, truncated)


def _too_much(windows: Sequence[Window], n_tokens: int, limits: BatchLimits) -> tuple[str, str] | None:
    """``(code, reason)`` if the windows fit no request of their own."""
    most = min(limits.inputs_per_request, limits.inputs)
    if len(windows) > most or sum(window.n_tokens for window in windows) > limits.tokens_per_request:
        return "too_long", (
            f"the text has {n_tokens} tokens, and its {len(windows)} windows of up to {limits.tokens_per_input} do not "
            f"fit one request of at most {most} inputs and {limits.tokens_per_request} tokens; shorten it, or enqueue "
            "with on_long='truncate'"
        )
    room = limits.bytes - OVERHEAD_BYTES
    if sum(len(window.text) for window in windows) * _MOST_BYTES > room:
        size = sum(text_bytes(window.text) + 1 for window in windows)
        if size > room:
            return "too_large", (
                f"the text has {size} bytes as JSON, and a file for this provider holds {limits.bytes} at most; "
                "shorten it"
            )
    return None


def longest_prefix(text: str, counter: TokenCounter, limit: int) -> Window:
    """The longest beginning of ``text``, in whole characters, of at most ``limit`` tokens when it is counted alone."""
    ends = counter.ends(text)
    room = limit - counter.overhead
    around = int(ends[room - 1])  # where the last token that fits ends, as the whole text is cut
    # Words are tokenized one by one, so only what follows the start of one needs to be counted for each candidate.
    start = _word_end(text, around)
    kept = counter.counts([text[:start]])[0] - counter.overhead
    for end in range(min(len(text), around + _LOOK_AHEAD), start, -1):
        if kept + counter.counts([text[start:end]])[0] <= limit:
            break
    while (n_tokens := counter.counts([text[:end]])[0]) > limit:  # a tokenizer that looks across words
        end -= 1
    return Window(text[:end], n_tokens)


def _word_end(text: str, before: int) -> int:
    """The last place up to ``before`` where a letter or digit is followed by something else, if one is near."""
    for at in range(before - 1, max(0, before - _LOOK_BACK), -1):
        if text[at - 1].isalnum() and not text[at].isalnum():
            return at
    return max(0, before - _LOOK_BACK)


def split(text: str, counter: TokenCounter, limit: int) -> list[Window]:
    """Overlapping windows of at most ``limit`` tokens each, by the rule of every split space (`window_bounds`).

    The rule is over the text's tokens. A window is sent as text, and its first and last word may have other tokens
    alone than in the text: where that makes one too long, all are made a little shorter.
    """
    ends = np.insert(counter.ends(text), 0, 0)
    room = limit - counter.overhead
    while True:
        bounds = window_bounds(len(ends) - 1, room)
        texts = [text[ends[start] : ends[end]] for start, end, _ in bounds]
        counts = counter.counts(texts)
        excess = max(counts) - limit
        if excess <= 0:
            return [Window(part, n, bound.weight) for part, n, bound in zip(texts, counts, bounds, strict=True)]
        room -= excess
