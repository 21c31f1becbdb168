"""What the server charged, to whom, and for what."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Charge:
    source: str
    """The batch's id, or the sync request's."""
    kind: str
    model: str
    requests: int
    inputs: int
    tokens: int


class Bill:
    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._charges: list[Charge] = []
        self._sources: dict[str, list[str]] = {}

    def charge(self, source: str, kind: str, model: str, requests: int, tokens: int, texts: Iterable[str]) -> None:
        """``texts`` are the hashes of the inputs executed. All of it is charged at once, or nothing."""
        with self._mutex:
            inputs = 0
            for text in texts:
                self._sources.setdefault(text, []).append(source)
                inputs += 1
            if inputs:
                self._charges.append(Charge(source, kind, model, requests, inputs, tokens))

    def sources(self, text: str) -> list[str]:
        with self._mutex:
            return list(self._sources.get(text, ()))

    def as_json(self) -> dict[str, Any]:
        with self._mutex:
            return {
                "texts": {text: len(sources) for text, sources in self._sources.items()},
                "tokens": sum(charge.tokens for charge in self._charges),
                "charges": [asdict(charge) for charge in self._charges],
            }
