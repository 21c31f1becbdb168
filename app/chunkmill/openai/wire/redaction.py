"""What a provider's message may say in our ledger and logs. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

MAX_CHARACTERS: Final = 300
_REDACTED: Final = "[redacted]"
_READ: Final = 10_000  # characters that are looked at; a body sent back whole can have millions

_KEYS = re.compile(r"\b(?:sk|pk|key|rk|sess)[-_][\w*.-]{6,}|(?<=bearer )[^\s'\",]+", re.IGNORECASE | re.ASCII)
# A passage in quotes that is longer than any name, or that never ends. A quote after a letter is an apostrophe.
_QUOTED = re.compile(r"(?<!\w)(['\"`])(?:(?!\1(?!\w)).){41,}(?:\1|$)")


def redact(message: object, secrets: Sequence[str] = ()) -> str:
    """At most 300 characters on one line, without ``secrets``, anything like a key, and long quoted passages (they
    are the caller's text, sent back)."""
    text = message if isinstance(message, str) else "" if message is None else str(message)
    for secret in secrets:
        if secret:
            text = text.replace(secret, _REDACTED)
    text = " ".join(text[:_READ].split())
    text = _QUOTED.sub(r"\1…\1", _KEYS.sub(_REDACTED, text))
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
