"""A content in the form in which the provider may take it: whole, truncated, in windows, or refused. Pure.

A content's ``n_tokens`` counts its whole text, whatever part of it is sent, as everywhere in the system.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chunkmill.domain.planning import too_long_reason
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.windows import window_bounds
from chunkmill.openai.plan.limits import OVERHEAD_BYTES, BatchLimits
from chunkmill.openai.plan.tokens import TokenCounter
from chunkmill.openai.wire.jsonl import text_bytes
from chunkmill.system.numbers import np

# How many characters after the last token that fits are tried as a longer prefix, because a truncated word may have
# more tokens than the whole one: "embeddin" has more than "embedding". No token of cl100k is longer than this.
_LOOK_AHEAD = 128
# How many characters before that end are counted again for each candidate.
_LOOK_BACK = 1_000

_MOST_BYTES = 9  # of one character in JSON: six as \\u0001, and the quotes and comma if it is the whole text

_EMPTY_REASON = "the text is empty, and this provider takes no empty texts; add content to it, or leave the chunk out"


@dataclass(frozen=True, slots=True)
class TextWindow:
    """One input as it is sent. ``weight`` is that of its vector in the content's mean; 1 if it is the only one."""

    text: str
    n_tokens: int
    weight: int = 1


@dataclass(frozen=True, slots=True)
class ProviderInput:
    """A content to be sent: one window with its text or the part that fits, or several if long texts are split."""

    content_hash: bytes
    windows: tuple[TextWindow, ...]
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
    """The inputs of contents ``(content_hash, text)``, in their order. All are in memory: pass a few thousand."""
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
    windows = [TextWindow(text, n_tokens)]
    if n_tokens > limit:
        if on_long is OnLong.REJECT:
            return RefusedInput(content_hash, "too_long", too_long_reason(n_tokens, limit))
        truncated = on_long is OnLong.TRUNCATE
        windows = [longest_prefix(text, counter, limit)] if truncated else split(text, counter, limit)
    problem = _too_much(windows, n_tokens, limits)
    if problem is not None:
        return RefusedInput(content_hash, *problem)
    return ProviderInput(content_hash, tuple(windows), n_tokens, truncated)


def _too_much(windows: Sequence[TextWindow], n_tokens: int, limits: BatchLimits) -> tuple[str, str] | None:
    """``(code, reason)`` if the windows do not fit into a request of their own; None if they do."""
    most = min(limits.inputs_per_request, limits.inputs)
    if len(windows) > most or sum(window.n_tokens for window in windows) > limits.tokens_per_request:
        return "too_long", (
            f"the text has {n_tokens} tokens, and its {len(windows)} windows of up to {limits.tokens_per_input} do not "
            f"fit one request of at most {most} inputs and {limits.tokens_per_request} tokens; shorten it, or enqueue "
            "with on_long='truncate'"
        )
    largest = min(limits.bytes, limits.bytes_per_request)
    room = largest - OVERHEAD_BYTES
    if sum(len(window.text) for window in windows) * _MOST_BYTES > room:
        size = sum(text_bytes(window.text) + 1 for window in windows)
        if size > room:
            return "too_large", (
                f"the text has {size} bytes as JSON, and a request to this provider holds {largest} at most; shorten it"
            )
    return None


def longest_prefix(text: str, counter: TokenCounter, limit: int) -> TextWindow:
    """The longest prefix of ``text``, in whole characters, that has at most ``limit`` tokens by itself."""
    ends = counter.ends(text)
    room = limit - counter.overhead
    around = int(ends[room - 1])  # the end of the last token that fits, in the tokens of the whole text
    # Words are tokenized one by one, so each candidate is counted from the start of a word only.
    start = _word_end(text, around)
    kept = counter.counts([text[:start]])[0] - counter.overhead
    for end in range(min(len(text), around + _LOOK_AHEAD), start, -1):
        if kept + counter.counts([text[start:end]])[0] <= limit:
            break
    while (n_tokens := counter.counts([text[:end]])[0]) > limit:  # a tokenizer that looks across words
        end -= 1
    return TextWindow(text[:end], n_tokens)


def _word_end(text: str, before: int) -> int:
    """The last place before ``before`` at which a word ends, if there is one near; otherwise a place that is near."""
    for at in range(before - 1, max(0, before - _LOOK_BACK), -1):
        if text[at - 1].isalnum() and not text[at].isalnum():
            return at
    return max(0, before - _LOOK_BACK)


def split(text: str, counter: TokenCounter, limit: int) -> list[TextWindow]:
    """Overlapping windows of at most ``limit`` tokens each, by the rule of every split space (`window_bounds`).

    The rule counts the tokens of the whole text. A window is sent as a text of its own, in which its first and last
    words may have other tokens. If that makes a window too long, all windows are made a little shorter.
    """
    ends = np.insert(counter.ends(text), 0, 0)
    room = limit - counter.overhead
    while True:
        bounds = window_bounds(len(ends) - 1, room)
        texts = [text[ends[start] : ends[end]] for start, end, _ in bounds]
        counts = counter.counts(texts)
        excess = max(counts) - limit
        if excess <= 0:
            return [TextWindow(part, n, bound.weight) for part, n, bound in zip(texts, counts, bounds, strict=True)]
        room -= excess
