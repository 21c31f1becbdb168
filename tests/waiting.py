"""How tests wait: for an event, never for a time.

The bound on each wait only keeps a broken build from hanging, so it is minutes long: a machine that runs fifteen other
programs needs more than a minute to start one worker. ``TEST_PATIENCE`` changes it, in seconds; `make mutants` lowers
it, because there most waits that fail are meant to fail.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

PATIENCE = float(os.environ.get("TEST_PATIENCE", "300"))


def until(condition: Callable[[], object], explain: Callable[[], object] = str, *, pause: float = 0.02) -> None:
    """Return once ``condition()`` is true. Fail after ``PATIENCE`` seconds, with what ``explain()`` returns."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"still not true after {PATIENCE:g} s\n{explain()}")
        time.sleep(pause)
