"""Reads the text of a query for keyword search. Pure.

Everything is a query, and nothing a syntax error: ``"…"`` is a phrase, ``term*`` is a prefix, and all else are words. A
quotation mark without a partner is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_CHARACTERS = 4_000
"""How many characters of a query are read. A longer text has more terms than are looked up anyway."""
MAX_PHRASES, MAX_PREFIXES = 8, 8
"""How many phrases and prefixes of a query are looked up."""
MIN_PREFIX = 3
"""A shorter prefix is taken for a word, because it would match a large part of the texts."""

_PHRASE = re.compile(r'"([^"]*)"')
_PREFIX = re.compile(r"(?<!\S)(\w[\w'\u2019-]*)\*(?!\S)")


@dataclass(frozen=True, slots=True)
class KeywordQuery:
    """What a query asks for. Its words become lexemes in Postgres, in the collection's language."""

    words: str
    phrases: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()


def read(text: str) -> KeywordQuery:
    """The words, phrases and prefixes of a query's text."""
    text = text[:MAX_CHARACTERS]
    phrases = [" ".join(phrase.split()) for phrase in _PHRASE.findall(text)]
    rest = _PHRASE.sub(" ", text).replace('"', " ")
    prefixes = [prefix for prefix in _PREFIX.findall(rest) if len(prefix) >= MIN_PREFIX]
    rest = _PREFIX.sub(lambda match: " " if len(match[1]) >= MIN_PREFIX else match[1], rest)
    many_words = [phrase for phrase in dict.fromkeys(phrases) if " " in phrase][:MAX_PHRASES]
    single = [phrase for phrase in phrases if phrase and " " not in phrase]
    return KeywordQuery(
        " ".join([*rest.split(), *single]), tuple(many_words), tuple(dict.fromkeys(prefixes))[:MAX_PREFIXES]
    )
