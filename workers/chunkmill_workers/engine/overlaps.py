"""Token ids of a text that has no place between two words, such as Chinese or base64, in bounded memory.

The text is read in windows that overlap. Two of them are joined at a place where that changes no id:

- between two words of the pre-tokenizer, because a model sees one word at a time;
- inside a word of a BPE model, if the second window would be cut there wherever it ended, within the length of the
  longest token: one of these ends is the end of a token of the text. What is before it does not depend on what follows;
- inside an unknown token that both windows show throughout their overlap.

A word of a Unigram model has no such place. Two paths through it may have the same tokens in another order, and then
the rounding of their sums decides, which depends on the word from its beginning.

Both windows must show the same tokens and the same beginnings of words on both sides of the place, with visible
characters up to their own ends. So what normalisers and pre-tokenizers do at the end of a window does not reach the
place, and from there on they do the same in both. If a window has no such place, a longer one is read.

If half a million characters have no such place, memory counts for more than the last id: the text is cut between two
tokens all the same. All of its characters are read, and a few ids beside the cut may be others than those of the whole.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from tokenizers import models

from chunkmill_workers.engine.windows import Ids

# Characters of a window. A window of Chinese, of which each character is three bytes, takes 80 MB.
_WINDOW: Final = 131_072
# The least characters of a window that is cut although that may change the ids beside the cut.
_WORTH_A_CUT: Final = 4 * _WINDOW
# The least characters between a place and the end of either window.
_MARGIN: Final = 1_024
# How many tokens on each side of a place must be the same in both windows.
_AROUND: Final = 16
# How many tokens of a window are examined, from its end, and how many places are tried in a second window.
_MOST_TOKENS: Final = 4_096
_MOST_TRIALS: Final = 16


@dataclass(frozen=True, slots=True)
class _Token:
    id: int
    start: int
    end: int
    """The token's characters are ``text[start:end]``."""
    begins_word: bool


@dataclass(frozen=True, slots=True)
class _Joint:
    """Where a window ends and the next one goes on: behind ``count`` tokens of the first, at ``text[place]``."""

    count: int
    place: int
    start: int
    """Where the next window begins."""
    around: tuple[_Token, ...] | None
    """The tokens on both sides, or the unknown token that the place is inside; None if they need not be the same."""


class _Window:
    def __init__(self, tokenizer: Any, text: str, start: int, end: int) -> None:
        self.start, self.end = start, end
        [self._encoding] = tokenizer.encode_batch([text[start:end]], add_special_tokens=False)
        self.ids: Ids = np.array(self._encoding.ids, np.int32)

    def token(self, at: int) -> _Token:
        start, end = self._encoding.token_to_chars(at)
        word = self._encoding.token_to_word
        return _Token(int(self.ids[at]), self.start + start, self.start + end, at == 0 or word(at) != word(at - 1))

    def token_start(self, place: int) -> int:
        """The beginning of the token that ``text[place]`` is in, or ``place`` if it is in none."""
        at = self._encoding.char_to_token(place - self.start)
        return place if at is None else self.token(at).start

    def around(self, at: int) -> tuple[_Token, ...]:
        return tuple(self.token(near) for near in range(max(at - _AROUND, 0), min(at + _AROUND, len(self.ids))))

    def first_after(self, place: int) -> int:
        """The index of the first token that ends after ``text[place]``."""
        ends = range(len(self.ids))
        return bisect_right(ends, place - self.start, key=lambda at: self._encoding.token_to_chars(at)[1])

    def first_behind(self, joint: _Joint) -> int | None:
        """The index of the first token behind ``joint``; None if this window cannot be joined there."""
        if joint.around is None:
            return self.first_after(joint.place)
        at = self._encoding.char_to_token(joint.place - self.start)
        if at is None:
            return None
        if len(joint.around) == 1:
            [unknown], token = joint.around, self.token(at)
            same = token.id == unknown.id and token.start <= unknown.start and token.end >= unknown.end
            return at + 1 if same else None
        while at > 0 and self.token(at - 1).start >= joint.place:
            at -= 1
        return at if self.around(at) == joint.around else None


class Overlaps:
    """Reads long texts in windows. ``visible`` is `long_texts.window_size`."""

    def __init__(self, tokenizer: Any, visible: int) -> None:
        self._tokenizer = tokenizer
        self._visible = visible
        self._margin = max(_MARGIN, 4 * visible)

    def ids(self, text: str) -> Ids:
        """The ids of ``text``, (length,) int32, without special tokens."""
        parts: list[Ids] = []
        window, first = self._read(text, 0, _WINDOW), 0
        while window.end < len(text):
            joint = self._joint(text, window) or self._inexact_joint(text, window)
            if joint is not None:
                following = self._read(text, joint.start, _WINDOW)
                behind = following.first_behind(joint)
                if behind is not None:
                    parts.append(window.ids[first : joint.count])
                    window, first = following, behind
                    continue
                del following
            start, length = window.start, window.end - window.start
            del window  # first, so that only one of them is in memory
            window = self._read(text, start, 4 * length)
        return np.concatenate([*parts, window.ids[first:]])

    def _read(self, text: str, start: int, length: int) -> _Window:
        return _Window(self._tokenizer, text, start, min(start + length, len(text)))

    def _joint(self, text: str, window: _Window) -> _Joint | None:
        last = len(window.ids) - 1
        while last > 0 and window.token(last).start > window.end - self._margin:
            last -= 1
        trials = 0
        for at in range(last, max(last - _MOST_TOKENS, 0), -1):
            token, before = window.token(at), window.token(at - 1)
            place = token.start
            if place - self._margin <= window.start or trials == _MOST_TRIALS:
                break
            if not before.start < before.end <= place:
                continue
            if token.begins_word:
                trials += 1
                joint = self._tried(text, window, at)
                if joint is not None:
                    return joint
        return self._inside_unknown(text, window) or self._by_ends(text, window, last)

    def _tried(self, text: str, window: _Window, at: int, *, earlier: int = 0) -> _Joint | None:
        """A joint before the token ``at``, if a window that begins ``earlier`` or more characters before shows it."""
        place = window.token(at).start
        start = window.token_start(place - self._margin) - earlier
        if start <= window.start or not (
            self._sees(text, start, place) and self._sees(text, place, place + self._margin)
        ):
            return None
        joint = _Joint(at, place, start, window.around(at))
        probe = self._read(text, start, window.end - start)
        return None if probe.first_behind(joint) is None else joint

    def _by_ends(self, text: str, window: _Window, at: int) -> _Joint | None:
        """A joint that a second window shows wherever it ends: see above. It must begin in step with the first one."""
        ends = ends_before(text, window.end, self._visible) if self._may_cut_words else None
        while at > 0 and not window.token(at - 1).start < window.token(at - 1).end <= window.token(at).start:
            at -= 1  # the tokens of one character, which it takes several of
        if ends is None or at == 0:
            return None
        for earlier in range(_MOST_TRIALS):
            joint = self._tried(text, window, at, earlier=earlier)
            if joint is not None:
                same = (self._read(text, joint.start, end - joint.start).first_behind(joint) for end in ends)
                return joint if all(behind is not None for behind in same) else None
        return None

    def _inexact_joint(self, text: str, window: _Window) -> _Joint | None:
        """A joint before the last token that is not too near to the end, if no longer window may be read.

        The next window begins where it has a token that begins there too, or the same token throughout, so that no
        character is read twice. Where there is no such place, the token that holds it is read again.
        """
        if window.end - window.start < max(_WORTH_A_CUT, 8 * self._margin):
            return None
        place = window.end - self._margin
        count = window.first_after(place)
        around = None
        if count < len(window.ids):
            token = window.token(count)
            if token.start - self._margin > window.start:
                place = token.start
            else:  # one token is most of the window
                count, around = count + 1, (_Token(token.id, place, place, False),)
        start = max(window.token_start(place - self._margin), place - 2 * self._margin)
        for earlier in range(_MOST_TRIALS):
            joint = _Joint(count, place, start - earlier, around)
            probe = self._read(text, joint.start, window.end - joint.start)
            first = probe.first_behind(joint)
            if first is not None and (around or first == len(probe.ids) or probe.token(first).start >= place):
                return joint
        return _Joint(count, place, start, None)

    def _inside_unknown(self, text: str, window: _Window) -> _Joint | None:
        """A joint inside the last token, if that is longer than a token of the vocabulary can be."""
        if not len(window.ids) or isinstance(self._tokenizer.model, models.Unigram):
            return None
        token, place = window.token(len(window.ids) - 1), window.end - self._margin
        start, end = place - self._margin // 2, place + self._margin // 2
        if token.start > start or token.end < end or start - self._margin < window.start:
            return None
        if not (self._sees(text, start, place) and self._sees(text, place, end)):
            return None
        return _Joint(len(window.ids), place, start - self._margin, (_Token(token.id, start, end, False),))

    def _sees(self, text: str, start: int, end: int) -> bool:
        """Whether ``text[start:end]`` has as many visible characters as the longest token."""
        seen = sum(unicodedata.category(character)[0] in "LNPS" for character in text[start:end])
        return seen >= self._visible

    @cached_property
    def _may_cut_words(self) -> bool:
        """Whether a word has the same tokens if it is cut between two of them. WordPiece judges whole words."""
        model = self._tokenizer.model
        return isinstance(model, models.BPE) and not (
            model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix
        )


def ends_before(text: str, end: int, window: int) -> range | None:
    """The places where a beginning of about ``end`` characters may end, so that they enclose ``window`` visible ones.

    None if there are too few: white space, accents and invisible characters may vanish or join what is far apart.
    """
    visible = 0
    for first in range(end - 1, max(end - 4 * window, 0), -1):
        visible += unicodedata.category(text[first])[0] in "LNPS"
        if visible == window:
            return range(end, first - 1, -1)
    return None
