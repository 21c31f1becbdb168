"""Sends one plain request and reads its answer within bounds, for documents, searches and probes alike."""

from __future__ import annotations

from collections.abc import Sequence

from chunkmill.openai.wire.answers import EmbeddedRequest, SentRequest, longest_answer, read_plain
from chunkmill.spaces.registry import Space
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.oddities import tokens_factor

BESIDE_ASKING_SECONDS = 30.0
"""How many seconds a request may take in addition to the wait for the provider's answer."""


def asking_seconds(context: ProviderContext) -> float:
    """More seconds than one request may take. A worker that was silent for longer counts as dead."""
    return context.settings.openai_timeout_seconds + BESIDE_ASKING_SECONDS


def ask_plain(
    context: ProviderContext, space: Space, inputs: Sequence[str], *, tokens: int, idempotency_key: str
) -> EmbeddedRequest:
    """The answer to one request of ``tokens`` by our own count. Raises the kinds of ``ProviderError``."""
    model = context.model(space)
    form = context.form(model, space)
    body = context.provider.embed(
        form.model,
        inputs,
        dimensions=form.dimensions,
        idempotency_key=idempotency_key,
        longest=longest_answer(len(inputs), model.dimensions),
    )
    answer = read_plain(
        body,
        SentRequest(len(inputs), tokens),
        space.spec.dimensions,
        normalize=space.spec.normalize,
        tokens_factor=tokens_factor(model),
        secrets=context.provider.secrets,
    )
    context.oddities.count(model, dict.fromkeys(answer.oddities, 1))
    context.oddities.compare(model, answer, tokens)
    return answer
