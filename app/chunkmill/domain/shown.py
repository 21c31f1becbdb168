"""How a text that came from outside may be shown: on a terminal, in a log for people, and as JSON on a terminal.

An id, a collection, a file's name, a metadata value and a server's message may hold characters that move the cursor,
set the terminal's title or clipboard, turn the text round or draw a line that nobody printed. Everything that is shown
to a person goes through here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

LINE_BREAK = "\u23ce"
"""The sign ⏎, which stands for a line break in a text that must stay on its line."""
UNPRINTABLE = "\ufffd"

_JOINERS = "\u200c\u200d"
"""They spell words of Persian and Hindi, and hold emoji together. They move no cursor and turn no text round."""
_BREAK = re.compile(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")


def shown(text: str, *, lines: bool = False) -> str:
    """The text with control and format characters replaced by �, and blanks of all kinds by a blank.

    A line break becomes ⏎, so that a name cannot draw a line of its own. With ``lines`` it stays one, for a text that
    has lines.
    """
    text = _BREAK.sub("\n" if lines else LINE_BREAK, text)
    if text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character.isprintable() or character in _JOINERS or character == "\n":
        return character
    return " " if character.isspace() else UNPRINTABLE


def shown_json(
    data: object, *, indent: int | None = None, ascii_only: bool, default: Callable[[object], object]
) -> str:
    """The JSON of ``data``. It holds no character that could steer a terminal, because these are written as escapes,
    and read back as they were."""
    text = json.dumps(data, indent=indent, ensure_ascii=ascii_only, default=default)
    return "".join(c if c.isprintable() or c in _JOINERS or c == "\n" else json.dumps(c)[1:-1] for c in text)
