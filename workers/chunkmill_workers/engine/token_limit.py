"""How many tokens may share a forward pass, and the lower number that holds after an out-of-memory error."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
from pathlib import Path

from chunkmill.models.files import MOST_JSON_BYTES, parse_json
from chunkmill.system.files import read_at_most

logger = logging.getLogger(__name__)


# After this many full passes that fitted, the number is doubled again. A pass that does not fit costs little more than
# itself, but when the number fails after it was raised, twice as many passes must fit before the next trial.
TRIAL_AFTER = 64
_LONGEST_PATIENCE = 65_536


class TokenLimit:
    """The most tokens of one forward pass, for one device, model and number format.

    A pass that did not fit the device's memory halves the number. Memory may be short for a moment only, because
    another model was loaded or another process ended late, so the number rises again, up to the configured one, while
    passes fit. It is kept in ``file``, so that the next process on this machine starts with it.
    """

    def __init__(self, tokens: int, file: Path | None = None, *, least: int = 1) -> None:
        """``tokens`` is the configured number; a smaller one that ``file`` holds takes its place at first.

        ``least`` is the smallest number that `shrink` may set: the model's longest row, because a smaller one would not
        make passes smaller.
        """
        self._file = file
        self._most = tokens
        self._least = least
        self._fitted = 0
        self._patience = TRIAL_AFTER
        self._tried = False
        """The number was raised since the last pass that did not fit."""
        self._changing = threading.Lock()
        learned = _read(file) if file is not None else None
        self.tokens = tokens if learned is None else min(tokens, learned)

    def shrink(self, failed: int) -> None:
        """Lower the number to half of ``failed``, the tokens of a pass that did not fit. It never raises it."""
        with self._changing:
            tokens = max(failed // 2, self._least)
            self._fitted = 0
            if tokens >= self.tokens:
                return
            logger.warning(
                "a forward pass of %s tokens did not fit the device's memory; %s at most until %s passes have fitted",
                failed, tokens, self._patience,
            )  # fmt: skip
            if self._tried:
                self._patience = min(2 * self._patience, _LONGEST_PATIENCE)
                self._tried = False
            self._set(tokens)

    def fitted(self, tokens: int) -> None:
        """Note a pass of ``tokens`` that fitted. Enough full ones raise the number again."""
        if self.tokens >= self._most or tokens <= self.tokens // 2:
            return
        with self._changing:
            self._fitted += 1
            if self._fitted < self._patience:
                return
            self._fitted = 0
            self._tried = True
            self._set(min(2 * self.tokens, self._most))
            logger.info("forward passes may have %s tokens again", self.tokens)

    def _set(self, tokens: int) -> None:
        self.tokens = tokens
        if self._file is not None:
            _write(self._file, tokens)


def _read(file: Path) -> int | None:
    """The number in ``file``; None if the file does not exist or is not one of ours."""
    try:
        tokens = parse_json(read_at_most(file, MOST_JSON_BYTES))["batch_tokens"]
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
