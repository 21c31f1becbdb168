"""Makes a provider's words safe for our ledger, logs and terminals. Pure.

Secrets, texts and signs that cannot be seen are removed from them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

MAX_CHARACTERS: Final = 300
_REDACTED: Final = "[redacted]"
_READ: Final = 10_000  # characters that are read; a body that is sent back whole can have millions

_KEYS = re.compile(r"\b(?:sk|pk|key|rk|sess)[-_][\w*.-]{6,}|(?<=bearer )[^\s'\",]+", re.IGNORECASE | re.ASCII)
# A quoted passage that is longer than any name, or whose quote is never closed. After a letter it is an apostrophe.
_QUOTED = re.compile(r"(?<!\w)(['\"`])(?:(?!\1(?!\w)).){41,}(?:\1|$)")

# What no terminal and no table of Postgres should be given: control characters (NUL and ESC are among them), signs that
# are invisible or turn the direction of a line, and halves of characters. What breaks a line becomes a blank instead.
_HIDDEN = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ud800-\udfff"
    "\ufe00-\ufe0f\ufeff\ufff9-\ufffb\U000e0000-\U000e01ef]"
)


def clean(message: object) -> str:
    """A provider's words on one line, without signs that cannot be seen. An object is written as Python writes it."""
    try:
        text = message if isinstance(message, str) else "" if message is None else str(message)
    except (RecursionError, ValueError):  # a list that is nested too deeply, or a number of too many digits
        text = f"something of type {type(message).__name__} that cannot be shown"
    return " ".join(_HIDDEN.sub("", text).split())


def redact(message: object, secrets: Sequence[str] = ()) -> str:
    """At most 300 characters of a message, on one line.

    ``secrets``, whatever looks like a key, and long quoted passages (the caller's text, sent back) are removed.
    """
    text = clean(message)  # before the secrets are looked for, so that no hidden sign splits one
    for secret in secrets:
        if secret:
            text = text.replace(secret, _REDACTED)
    text = _QUOTED.sub(r"\1…\1", _KEYS.sub(_REDACTED, text[:_READ]))
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
