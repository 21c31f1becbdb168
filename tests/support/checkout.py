"""The paths of this checkout, for tests that start processes in other folders."""

from __future__ import annotations

import os
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join(str(CHECKOUT / folder) for folder in ("app", "workers", ""))
"""With this PYTHONPATH a child imports this checkout's code and tests, wherever it runs and whatever is installed."""
