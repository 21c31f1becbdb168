"""The models that the operator vouches for. Each is named: nothing here can be switched on for all models."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Trust:
    """Names of models as ``EMBEDDING_MODEL`` or ``model=`` gives them: a path, or ``org/name@revision``."""

    pickle: Set[str] = frozenset()
    """Models whose weights may be read from a pickle."""
    remote_code: Set[str] = frozenset()
    """Models whose Python files may be run."""
    matryoshka: Set[str] = frozenset()
    """Models that were trained for shorter vectors."""
