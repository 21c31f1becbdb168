"""What is odd about a provider's answers. Each kind is counted, and each worker logs it once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

from chunkmill.domain.providers import ProviderModel
from chunkmill.openai.wire.answers import EmbeddedRequest
from chunkmill.openai.wire.bounds import TOKENS_FACTOR
from chunkmill.telemetry import metrics
from chunkmill.telemetry.counts import COUNTS

logger = logging.getLogger(__name__)

RATIO = 1.5
"""A provider that charges more than this many times our own count probably uses another tokenizer, or counts
characters."""
ENOUGH_TOKENS = 1_000
"""Tokens that must be counted before the ratio says something: a short text has a few special tokens."""


def tokens_factor(model: ProviderModel) -> float:
    """How many times our own count of tokens the provider of a model may charge."""
    return float(getattr(model, "tokens_factor", TOKENS_FACTOR))


class Oddities:
    """What this worker has logged already, and how the counts of tokens compare, by model. It is thread-safe."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._said: set[tuple[str, str]] = set()
        self._charged: dict[str, int] = {}
        self._counted: dict[str, int] = {}

    def count(self, model: ProviderModel, kinds: Mapping[str, int]) -> None:
        """Count oddities of the answers of a model, and log those that money depends on."""
        for kind, n in kinds.items():
            COUNTS.add(metrics.PROVIDER_ODDITIES, n, kind)
        if kinds.get("usage") and self._first(model.name, "usage"):
            logger.warning(
                "model %s: the provider's count of tokens cannot be true; our own is booked in its place. If its "
                "tokenizer differs so much from ours, set tokens_factor in OPENAI_MODELS (docs/openai.md)",
                model.name,
            )

    def compare(self, model: ProviderModel, answer: EmbeddedRequest, counted: int) -> None:
        """Log once if the provider charges many more tokens than we count."""
        if answer.prompt_tokens is None:
            return
        name = model.name
        with self._mutex:
            self._charged[name] = charged = self._charged.get(name, 0) + answer.prompt_tokens
            self._counted[name] = own = self._counted.get(name, 0) + counted
        if own >= ENOUGH_TOKENS and charged > RATIO * own and self._first(name, "ratio"):
            logger.warning(
                "model %s: the provider charges %.1f times as many tokens as we count, so that estimates are too low. "
                "Check tokenizer in OPENAI_MODELS, or that the server counts tokens and not characters",
                name,
                charged / own,
            )

    def _first(self, model: str, kind: str) -> bool:
        with self._mutex:
            is_first = (model, kind) not in self._said
            self._said.add((model, kind))
        return is_first
