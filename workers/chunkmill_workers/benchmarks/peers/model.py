"""What a peer's process has to know of the model. Standard library only: it is read in every environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class Unavailable(Exception):
    """An adapter's peer cannot run here; the message says why."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model on this machine, as JSON carries it into a peer's process."""

    name: str
    folder: str
    """As sentence-transformers reads it."""
    transformer: str
    """config.json, tokenizer.json and the weights."""
    dimensions: int
    max_tokens: int
    pooling: str
    exported: str
    """Where :mod:`chunkmill_workers.benchmarks.peers.export` puts what it makes of the model."""

    def made(self, name: str) -> Path:
        return Path(self.exported) / name
