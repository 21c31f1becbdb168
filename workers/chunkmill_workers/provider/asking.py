"""Sends one plain request and reads its answer, for documents, searches and probes alike."""

from __future__ import annotations

from collections.abc import Sequence

from chunkmill.errors import ProviderSilent
from chunkmill.openai.wire.jsonl import Embedded
from chunkmill.openai.wire.vectors import read_embeddings
from chunkmill.spaces.registry import Space
from chunkmill_workers.provider.context import ProviderContext


def ask_plain(
    context: ProviderContext, space: Space, inputs: Sequence[str], *, tokens: int, idempotency_key: str
) -> Embedded:
    """The answer to one request of ``tokens`` by our own count. Raises the kinds of ``ProviderError``."""
    spec = space.spec
    form = context.form(context.model(space), space)
    body = context.provider.embed(form.model, inputs, dimensions=form.dimensions, idempotency_key=idempotency_key)
    data = body.get("data")
    if not isinstance(data, list):
        raise ProviderSilent("the provider answered an embeddings request without data", answered=True)
    vectors, problems = read_embeddings(data, len(inputs), spec.dimensions, normalize=spec.normalize)
    charged = body.get("usage")
    told = charged.get("prompt_tokens") if isinstance(charged, dict) else None
    return Embedded(0, vectors, problems, told if type(told) is int else tokens, None)
