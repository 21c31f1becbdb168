"""Token ids of long texts, in bounded memory, and the first ids of a text without tokenizing all of it.

The Rust tokenizer needs about 200 bytes for each character of a call, and it keeps a word whole however long it is. A
text may have 16 MiB, while the model reads a few hundred tokens of it. So a text is cut before it is tokenized, only in
places where that provably changes no id:

- between two words, if the tokenizer treats a word in the same way whatever its neighbours are (`splits_at_spaces`);
- anywhere, if every possible end of the next tokens gives the same first ids (`first_ids`);
- inside a word that is too long for a WordPiece model in any case (`squeeze`).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
from tokenizers import models, normalizers, pre_tokenizers

from chunkmill_workers.engine.overlaps import Overlaps, ends_before
from chunkmill_workers.engine.windows import Ids

Encode = Callable[[Sequence[str]], list[list[int]]]
"""From texts to the ids of each, without special tokens."""

LONG_TEXT: Final = 65_536
"""Characters from which a text is handled here. Shorter ones are tokenized whole, many in one call."""

# The most characters of a call, which take about 110 MB. A call has more if a longer stretch of a text has no place
# between two words.
_PIECE: Final = 500_000
# first_ids gives up if the beginning that it needs, or what its comparison would tokenize, has more characters than
# this.
_LONGEST_BEGINNING: Final = 1_000_000
_MOST_COMPARED: Final = 4_000_000
# How many more tokens than those that are asked for must be read, because the last ones of a beginning may change with
# what follows.
_MORE: Final = 8

# The last place between two words of ASCII letters: normalisers do not act across it. The next piece begins with the
# space, so a tokenizer that puts a space before every text does not put a second one there.
_BETWEEN_WORDS: Final = re.compile(r"(?s:.*)[A-Za-z](?= [A-Za-z])")
_NEXT_BETWEEN_WORDS: Final = re.compile(r"[A-Za-z](?= [A-Za-z])")
_PROBES: Final = (
    ("the cat sat on a mat", " with Some Words I saw"),
    ("a b c d", " e f g h"),
    ("tokenization of unbelievably", " long antidisestablishmentarianism"),
    ("naïve x", " Ünicode 漢字 y"),
)


def splits_at_spaces(tokenizer: Any, encode: Encode) -> bool:
    """Whether the ids of a text are those of its parts, if it is cut before a space between two letters."""
    for left, right in _PROBES:
        whole, first, second = encode([left + right, left, right])
        if whole != first + second:
            return False
    for token in tokenizer.get_added_tokens_decoder().values():
        if re.search(r"\S\s", token.content) or (token.rstrip and token.content[-1:].isalpha()):
            return False
    # Without a split at spaces, one token may hold the end of a word and a space. WordPiece always splits there.
    across = re.compile(r"[^\s▁Ġ][ ▁Ġ]")
    return isinstance(tokenizer.model, models.WordPiece) or not any(map(across.search, tokenizer.get_vocab()))


def window_size(tokenizer: Any) -> int:
    """In how many visible characters of any text a token must end: those of the longest token, or WordPiece's word."""
    longest = max(map(len, tokenizer.get_vocab()))
    return max(longest, getattr(tokenizer.model, "max_input_chars_per_word", 0)) + 1


def first_ids(text: str, count: int, encode: Encode, *, at_spaces: bool, window: int) -> list[int] | None:
    """The first ``count`` ids of ``text``, without special tokens; None if a beginning of the text does not show them.

    They come from a beginning that ends between two words. If there is no such place, then from one that ends anywhere:
    the best path of a Unigram model, and the merges of a BPE model, up to the end of a token depend only on what is
    before it. In ``window`` visible characters at least one token ends. So if the beginnings that end at each of these
    places agree on the first ids, those of the whole text are the same. A WordPiece word that is longer than the window
    is unknown as a whole, whatever follows.
    """
    end = max(8 * count, 4_096)
    while end < min(len(text), _LONGEST_BEGINNING):
        between = _BETWEEN_WORDS.match(text, end // 2, end) if at_spaces else None
        if between is not None:
            ids = encode([text[: between.end()]])[0]
            if len(ids) >= count:
                return ids[:count]
        else:
            cuts = ends_before(text, end, window)
            if cuts is not None and len(cuts) * end <= _MOST_COMPARED:
                ids, *others = encode([text[:cut] for cut in cuts])
                enough = all(len(other) >= count + _MORE for other in (ids, *others))
                if enough and all(other[:count] == ids[:count] for other in others):
                    return ids[:count]
        end *= 4
    return None


def pieces(text: str, *, at_spaces: bool) -> Iterator[str]:
    """``text`` in parts whose ids make those of the text, of at most _PIECE characters if there are places to cut."""
    start = 0
    while at_spaces and len(text) - start > _PIECE:
        between = _BETWEEN_WORDS.match(text, start + _PIECE // 2, start + _PIECE)
        between = between or _NEXT_BETWEEN_WORDS.search(text, start + _PIECE)
        if between is None:
            break
        yield text[start : between.end()]
        start = between.end()
    yield text[start:]


def squeeze(text: str, tokenizer: Any, encode: Encode) -> str:
    """A shorter text with the same ids, if a BERT tokenizer makes one token or none of a run of many characters.

    A word of more than ``max_input_chars_per_word`` characters is one unknown token, however long it is, and white
    space and invisible characters are none.
    """
    own = tokenizer.normalizer
    if not (
        isinstance(tokenizer.model, models.WordPiece)
        and isinstance(own, normalizers.BertNormalizer)
        and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
    ):
        return text
    if any(token.content.isalnum() for token in tokenizer.get_added_tokens_decoder().values()):
        return text
    most = tokenizer.model.max_input_chars_per_word + 1
    text = re.sub(rf"([A-Za-z0-9]{{{most}}})[A-Za-z0-9]+", r"\1", text)
    text = re.sub(r"([ \t\r\n])[ \t\r\n]{100,}", r"\1", text)

    def shorter(run: re.Match[str]) -> str:
        short = run[1] * most
        return short if len(encode([short])[0]) <= 1 else run[0]

    return re.sub(rf"(?s:(.))\1{{{most},}}", shorter, text)


def joined(parts: Iterator[str], encode: Encode, overlaps: Overlaps) -> Ids:
    """The ids of a text from those of its parts, (length,) int32."""
    return np.concatenate(
        [overlaps.ids(part) if len(part) > _PIECE else np.array(encode([part])[0], np.int32) for part in parts]
    )


def give_back_memory() -> None:
    """Return to the system what the tokenizer has freed: glibc keeps gigabytes of small blocks after a long text."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl and macOS have no such function
    if trim is not None:
        trim(0)
