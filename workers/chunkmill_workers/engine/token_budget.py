"""How many tokens share a pass, and what is learned about it when the device's memory says no."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)


class Budget:
    """Tokens of one pass, for one device, model and number format.

    A pass that did not fit halves it for good: ``file`` keeps the number, so the next process on this machine does
    not run into the same wall, whatever a profile says. Delete the file to start again.
    """

    def __init__(self, tokens: int, file: Path | None = None, *, least: int = 1) -> None:
        """``least`` is where shrinking ends: below the model's longest row nothing is won."""
        self._file = file
        self._least = least
        learned = _read(file) if file is not None else None
        self.tokens = tokens if learned is None else min(tokens, learned)

    def shrink(self, failed: int) -> None:
        """Passes of ``failed`` tokens do not fit."""
        tokens = max(failed // 2, self._least)
        if tokens >= self.tokens:
            return
        logger.warning(
            "a forward pass of %s tokens did not fit the device's memory; from now on %s at most", failed, tokens
        )
        self.tokens = tokens
        if self._file is not None:
            _write(self._file, tokens)


def _read(file: Path) -> int | None:
    try:
        tokens = json.loads(file.read_text(encoding="utf-8"))["batch_tokens"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        logger.warning("%s is not a file of ours: what it says of this device's memory is left out", file)
        return None
    return tokens if isinstance(tokens, int) and tokens > 0 else None


def _write(file: Path, tokens: int) -> None:
    """Whole or not at all. A disk that is full costs the lesson and not the work."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump({"batch_tokens": tokens}, stream)
        Path(name).replace(file)
    except OSError as error:
        logger.warning("%s cannot be written (%s): the smaller passes are forgotten with this process", file, error)
