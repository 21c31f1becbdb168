"""The elements of one JSON array of any length, with one of them in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

from chunkmill.errors import InvalidInput

PIECE = 64 * 1024
"""How many characters are read at a time, at least."""
NEAR_END = 16
"""An error so few characters before the end of what was read may only say that the rest is missing."""
_WHITE = " \t\r\n"
_decode = json.JSONDecoder(parse_constant=lambda _: None).raw_decode


def elements(name: str, file: TextIO, limit: int) -> Iterator[tuple[int, str, Any]]:
    """``(line, source, value)`` of each element: the line where it begins, its text, and what it is.

    Raises :class:`InvalidInput` if the file is not an array, is broken somewhere, or has an element of more than
    ``limit`` characters.
    """
    array = _Array(name, file, limit)
    array.expect("[", 'it does not begin with [. A .json file holds one array of objects, such as [{"id": "a", '
                 '"text": "…"}, …]; name a file with an object on each line .jsonl')  # fmt: skip
    if array.next_one() == "]":
        array.expect("]", "")
    else:
        while True:
            yield array.element()
            if array.next_one() != ",":
                break
            array.expect(",", "")
        array.expect("]", "after an element there has to be a comma or a ]")
    if array.next_one():
        raise array.broken("there is something after the end of the array")


class _Array:
    def __init__(self, name: str, file: TextIO, limit: int) -> None:
        self._name = name
        self._file = file
        self._limit = limit
        self._text = ""
        self._at = 0
        self._line = 1
        self._is_whole = False

    def next_one(self) -> str:
        """The next character that is not white space, without taking it; empty at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _WHITE:
                self._line += self._text[self._at] == "\n"
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def expect(self, character: str, problem: str) -> None:
        if self.next_one() != character:
            raise self.broken(problem if self.next_one() else "the file ends before its array does")
        self._at += 1

    def element(self) -> tuple[int, str, Any]:
        if not self.next_one():
            raise self.broken("the file ends before its array does")
        while True:
            try:
                value, end = _decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - NEAR_END
                if is_cut and not self._is_whole:
                    self._more()
                    continue
                self._line += self._text.count("\n", self._at, error.pos)
                if is_cut and error.msg.startswith("Unterminated string"):
                    raise self.broken("the file ends inside a string that begins here") from None
                raise self.broken(f"not valid JSON: {error.msg}") from None
            except (RecursionError, ValueError):
                raise self.broken("this JSON is nested too deeply, or a number is too long") from None
            # A number may go on behind what was read.
            if end == len(self._text) and not self._is_whole:
                self._more()
                continue
            line, source = self._line, self._text[self._at : end]
            self._line += source.count("\n")
            self._at = end
            return line, source, value

    def broken(self, problem: str) -> InvalidInput:
        return InvalidInput(f"{self._name}:{self._line}: {problem}. Nothing after it can be read. Fix the file.")

    def _more(self) -> bool:
        """Read more behind what is left. It doubles what is there, so that an element is decoded a few times only."""
        self._text = self._text[self._at :]
        self._at = 0
        if len(self._text) >= self._limit:
            raise self.broken(f"the element is longer than {self._limit:,} characters")
        more = self._file.read(max(PIECE, len(self._text)))
        self._text += more
        self._is_whole = not more
        return bool(more)
