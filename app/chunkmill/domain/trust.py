"""What the operator vouches for, model by model: nothing in here can be switched on for all of them."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Trust:
    """Names of models, exactly as ``EMBEDDING_MODEL`` or ``model=`` gives them, path or ``org/name@revision``."""

    pickle: Set[str] = frozenset()
    """Their weights may be read from a pickle."""
    remote_code: Set[str] = frozenset()
    """The Python files in their folders may be run."""
    matryoshka: Set[str] = frozenset()
    """Their vectors were trained to be cut."""
