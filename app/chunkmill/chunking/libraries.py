"""The libraries of the extra ``documents``, which are imported when a document needs them."""

from __future__ import annotations

import importlib
from typing import Any

from chunkmill.errors import InvalidInput, install_command


def library(name: str) -> Any:
    """A library of the extra ``documents``. Raises :class:`InvalidInput`, which says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0].replace("_", "-")
        raise InvalidInput(
            f"cutting this document needs the package {package}. Run: {install_command('documents')}"
        ) from None
