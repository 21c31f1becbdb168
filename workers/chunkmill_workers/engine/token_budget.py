"""How many tokens may share a forward pass, and the lower number that an out-of-memory error teaches."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)


class TokenBudget:
    """The most tokens of one forward pass, for one device, model and number format.

    A pass that did not fit the device's memory halves the number for good. It is kept in ``file``, so the next process
    on this machine does not fail in the same way, whatever a profile says. To start again, delete the file.
    """

    def __init__(self, tokens: int, file: Path | None = None, *, least: int = 1) -> None:
        """``tokens`` is the configured number; a smaller one that ``file`` holds takes its place.

        ``least`` is the smallest number that `shrink` may set: the model's longest row, because below it nothing is
        won.
        """
        self._file = file
        self._least = least
        learned = _read(file) if file is not None else None
        self.tokens = tokens if learned is None else min(tokens, learned)

    def shrink(self, failed: int) -> None:
        """Lower the number to half of ``failed``, the tokens of a pass that did not fit. It is never raised."""
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
    """The number in ``file``; None if the file does not exist or is not one of ours."""
    try:
        tokens = json.loads(file.read_text(encoding="utf-8"))["batch_tokens"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        logger.warning("%s cannot be read, or Chunkmill did not write it; it is ignored. Delete it", file)
        return None
    return tokens if isinstance(tokens, int) and tokens > 0 else None


def _write(file: Path, tokens: int) -> None:
    """Replace ``file`` in one step. If the disk is full, the number is lost and the work goes on."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump({"batch_tokens": tokens}, stream)
        Path(name).replace(file)
    except OSError as error:
        logger.warning("%s cannot be written (%s): the next process starts with larger passes again", file, error)
