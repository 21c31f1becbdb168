"""Removes secrets and texts from a provider's messages before they enter our ledger and logs. Pure."""

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


def redact(message: object, secrets: Sequence[str] = ()) -> str:
    """At most 300 characters of a message, on one line.

    ``secrets``, whatever looks like a key, and long quoted passages (the caller's text, sent back) are removed.
    """
    text = message if isinstance(message, str) else "" if message is None else str(message)
    for secret in secrets:
        if secret:
            text = text.replace(secret, _REDACTED)
    text = " ".join(text[:_READ].split())
    text = _QUOTED.sub(r"\1…\1", _KEYS.sub(_REDACTED, text))
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
