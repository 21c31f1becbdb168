"""What may wait in one gateway: texts and tokens, with a share that small requests have for themselves. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

SMALL_TEXTS = 8
"""A request of at most so many texts may use the whole room, as it also goes first at the workers."""
SHARE_FOR_ALL = 0.75
"""Larger requests find the room full when so much of it is taken."""
BYTES_PER_TOKEN = 4
"""What English text in UTF-8 has, for bodies that nobody has read yet."""
SMALL_BYTES = 16 * 1024
"""A body that is not longer is taken for a small request, until its texts are counted."""
WINDOW_SECONDS = 10.0
"""The drain rate is that of so many seconds."""
MOST_SECONDS = 30.0
"""Nobody is told to wait longer, because the rate may be another one by then."""


@dataclass(slots=True, eq=False)
class Hold:
    """What one request holds of the room."""

    texts: int
    tokens: int
    is_small: bool


class WaitingRoom:
    def __init__(self, most_texts: int, most_tokens: int) -> None:
        self._most_texts = most_texts
        self._most_tokens = most_tokens
        self.texts = 0
        self.tokens = 0
        self._drained: deque[tuple[float, int]] = deque()

    def take(self, texts: int, tokens: int, *, is_small: bool) -> Hold | None:
        """A hold, or None if there is no room. A request that is larger than the whole room finds it if it is empty."""
        hold = Hold(0, 0, is_small)
        return hold if self.resize(hold, texts, tokens, is_small=is_small) else None

    def resize(self, hold: Hold, texts: int, tokens: int, *, is_small: bool) -> bool:
        """Let the request hold so much instead; False, and nothing changes, if there is no room for that."""
        share = 1.0 if is_small else SHARE_FOR_ALL
        others_texts, others_tokens = self.texts - hold.texts, self.tokens - hold.tokens
        fits = others_texts + texts <= share * self._most_texts and others_tokens + tokens <= share * self._most_tokens
        shrinks = texts <= hold.texts and tokens <= hold.tokens and is_small >= hold.is_small
        if not fits and not shrinks and (others_texts or others_tokens):
            return False
        self.texts, self.tokens = others_texts + texts, others_tokens + tokens
        hold.texts, hold.tokens, hold.is_small = texts, tokens, is_small
        return True

    def leave(self, hold: Hold, now: float, *, answered: bool) -> None:
        """Give the hold back. Answered tokens count for the drain rate."""
        if answered and hold.tokens:
            self._drained.append((now, hold.tokens))
            self._forget(now)
        self.texts -= hold.texts
        self.tokens -= hold.tokens
        hold.texts = hold.tokens = 0

    def retry_after(self, now: float) -> float:
        """In how many seconds what waits now will be answered, at the rate of the last seconds."""
        self._forget(now)
        drained = sum(tokens for _, tokens in self._drained)
        if not drained:
            return MOST_SECONDS if self.tokens else 1.0
        elapsed = min(WINDOW_SECONDS, max(1.0, now - self._drained[0][0]))
        return min(MOST_SECONDS, max(1.0, self.tokens * elapsed / drained))

    def _forget(self, now: float) -> None:
        while self._drained and self._drained[0][0] < now - WINDOW_SECONDS:
            self._drained.popleft()
