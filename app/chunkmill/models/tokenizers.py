"""Looks at a tokenizer of a folder before it sees a text: whether it makes much more of a text than there is.

A ``tokenizer.json`` is a small program. Five replacements of a letter by fifty turn forty letters into gigabytes, and
the Rust library then ends the process, so nothing could be told about it afterwards. The library is not imported here.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

_MOST_GROWTH: Final = 64
"""The most characters that one may become. XLM-R's table has a character that becomes 18, and doubles at most."""
_MOST_STEPS: Final = 100
"""The most normalisers in a row."""
_MOST_ADDED: Final = 1_000
"""The most special tokens around a text, and characters before it."""
_LONGEST_WORD: Final = 10_000
"""WordPiece takes the square of a word's length; a longer word is unknown as a whole. Models state 100."""
_ZERO_WIDTH: Final = re.compile(r"\(\?|\\[bBAzZG]|(?<!\[)\^|\$")


def load_tokenizer(library: Any, content: bytes) -> Any:
    """The tokenizer that ``content``, a tokenizer.json, states.

    ``library`` is the class ``tokenizers.Tokenizer``. Raises ValueError, also where the library panics.
    """
    try:
        tokenizer = library.from_buffer(content)
        require_bounded(tokenizer)
    except BaseException as error:
        raise_unless_panic(error)
        raise ValueError(str(error)[:300]) from error
    return tokenizer


def raise_unless_panic(error: BaseException) -> None:
    """Raise ``error`` again if it is not an Exception. A panic of the Rust library is not, but is handled like one."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def require_bounded(tokenizer: Any) -> None:
    """Raise ValueError if the tokenizer may make much more of a text than there is."""
    steps = list(_flat(_state(tokenizer.normalizer), "normalizers"))
    if len(steps) > _MOST_STEPS:
        raise ValueError(f"it has {len(steps):,} normalisers, and at most {_MOST_STEPS} are supported")
    growth = 1
    for step in steps:
        growth *= _growth(step)
        if growth > _MOST_GROWTH:
            raise ValueError(f"its normalisers may make more than {_MOST_GROWTH} characters of one")
    added = 0
    for step in _flat(_state(tokenizer.post_processor), "processors"):
        pieces = step.get("single", []) if step.get("type") == "TemplateProcessing" else []
        names = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
        if len(pieces) - len(names) > 1:
            raise ValueError("its template repeats the text")
        added += sum(len(step["special_tokens"][name]["ids"]) for name in names)
    added += sum(len(step.get("prepend", "")) for step in steps)
    model = tokenizer.model
    added += sum(len(getattr(model, name, None) or "") for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    if added > _MOST_ADDED:
        raise ValueError(f"it adds {added:,} tokens or characters to a text, and at most {_MOST_ADDED:,} are supported")
    if getattr(model, "max_input_chars_per_word", 0) > _LONGEST_WORD:
        raise ValueError(f"its max_input_chars_per_word is more than {_LONGEST_WORD:,}")


def _state(part: Any) -> Mapping[str, Any]:
    """What a part of a tokenizer consists of, as tokenizer.json states it; empty if there is no such part."""
    if part is None:
        return {}
    state: Mapping[str, Any] = json.loads(part.__getstate__())
    return state


def _flat(state: Mapping[str, Any], children: str) -> Iterator[Mapping[str, Any]]:
    if state.get("type") != "Sequence":
        if state:
            yield state
        return
    for child in state[children]:
        yield from _flat(child, children)


def _growth(step: Mapping[str, Any]) -> int:
    """How many characters a normaliser makes of one, at most, where that is up to the file."""
    kind = step["type"]
    if kind == "Replace":
        pattern, content = step["pattern"], step["content"]
        if text := pattern.get("String"):
            return max(1, -(-len(content) // len(text)))
        return max(1, len(content) + (1 if _may_be_empty(pattern.get("Regex", "")) else 0))
    if kind == "Precompiled":
        return max(1, _longest_entry(base64.b64decode(step["precompiled_charsmap"])))
    return 4 if kind == "ByteLevel" else 1


def _may_be_empty(pattern: str) -> bool:
    """Whether a regular expression may match between two characters, and add its replacement there."""
    try:
        return bool(_ZERO_WIDTH.search(pattern)) or re.compile(pattern).match("") is not None
    except (re.error, RecursionError, OverflowError):  # it is one of another library's
        return True


def _longest_entry(table: bytes) -> int:
    """The most characters that SentencePiece's table puts in place of one: the length of a trie, the trie, and then
    the texts, with a NUL behind each."""
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    return max(len(text.decode("utf-8", "replace")) for text in texts.split(b"\0"))
