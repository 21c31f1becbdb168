"""Embeds the texts that somebody waits for (searches and ``client.embed``) in spaces that a provider serves."""

from __future__ import annotations

import logging
import secrets

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill.domain.providers import OPENAI
from chunkmill.domain.spaces import LongText, OnLong
from chunkmill.domain.states import Route
from chunkmill.errors import (
    ChunkmillError,
    ProviderBusy,
    ProviderError,
    ProviderRefused,
    ProviderSilent,
    ProviderStopped,
)
from chunkmill.ledger import embed_requests
from chunkmill.ledger.embed_requests import EmbedRequest
from chunkmill.ledger.money import budget, charges
from chunkmill.ledger.provider import provider_lanes
from chunkmill.ledger.provider.answering import OTHER_MODEL, refuse_model
from chunkmill.openai.plan.assemble import assemble
from chunkmill.openai.plan.inputs import RefusedInput, prepare
from chunkmill.openai.plan.packing import Packer
from chunkmill.openai.wire.answers import Embedded
from chunkmill.spaces import registry
from chunkmill.spaces.registry import Space
from chunkmill.telemetry import metrics
from chunkmill.telemetry.counts import COUNTS
from chunkmill_workers.process.responder import Responder
from chunkmill_workers.process.unserved import Unserved
from chunkmill_workers.provider.asking import ask_plain, book_lost
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.flow import pause_lane, stop_lane

logger = logging.getLogger(__name__)

LOCAL_FIRST_SECONDS = 2.0
"""How long local workers may take a request of a space that they serve too, before this worker does."""


class ProviderResponder(Responder[ProviderContext]):
    """Does by plain requests what ``chunkmill_workers.local.responder.EmbedResponder`` does with an engine."""

    def __init__(self, context: ProviderContext) -> None:
        super().__init__("embed-requests-openai", context)

    @property
    def unserved(self) -> Unserved:
        return self._context.unserved

    def answer_next(self) -> bool:
        """Answer one request. Returns False if there is none, the lane is paused, or this worker leaves."""
        if self._context.stopping.is_set():
            return False

        def claim_next(conn: sa.Connection, unserved: list[int]) -> EmbedRequest | None:
            if provider_lanes.lane(conn, Route.OPENAI_SYNC).paused_until is not None:
                return None  # whoever asked decides how long to wait
            spaces = [space for space in registry.all_spaces(conn) if space.id not in unserved]
            served = [space for space in spaces if self._context.serves(space)]
            own = [space.id for space in served if space.spec.provider == OPENAI]
            shared = [space.id for space in served if space.spec.provider != OPENAI]
            return embed_requests.claim_next(conn, spaces=own) or embed_requests.claim_next(
                conn, spaces=shared, min_age_s=LOCAL_FIRST_SECONDS
            )

        claimed = self.claim(claim_next)
        if claimed is None:
            return False
        self._answer(*claimed)
        return True

    def _answer(self, request: EmbedRequest, space: Space) -> None:
        try:
            vectors = self._embed(request, space)
        except Exception as error:  # noqa: BLE001 - whatever it was, whoever waits must get a reason
            if isinstance(error, ProviderBusy):
                pause_lane(self._context, Route.OPENAI_SYNC, error, tries=1)
            elif isinstance(error, ProviderStopped):
                stop_lane(self._context, Route.OPENAI_SYNC, error)
            if isinstance(error, ChunkmillError) and error.elsewhere:
                self._context.unserved.leave(space.id, error)
            self.end_without_vectors(request, error)
            return
        with self._context.begin() as conn:
            embed_requests.answer(conn, request.id, vectors)

    def _ask(self, space: Space, inputs: list[str], *, contents: int, tokens: int, idempotency_key: str) -> Embedded:
        """Send one request, and book it as soon as it is answered: the next request of the question may fail."""
        try:
            embedded = ask_plain(self._context, space, inputs, tokens=tokens, idempotency_key=idempotency_key)
        except ProviderSilent as silent:
            if silent.answered:
                with self._context.begin() as conn:
                    book_lost(conn, self._context, space, contents=contents, tokens=tokens, reason=silent.brief)
            raise
        self._book(space, embedded, contents, tokens if embedded.prompt_tokens is None else embedded.prompt_tokens)
        return embedded

    def _book(self, space: Space, embedded: Embedded, contents: int, tokens: int) -> None:
        """Book a request. Raises :class:`ProviderStopped` if another model answered than the space has vectors of."""
        model = self._context.model(space)
        with self._context.begin() as conn:
            refusal = refuse_model(conn, space.id, asked=model.name, answered=embedded.model)
            if refusal is not None:
                book_lost(conn, self._context, space, contents=contents, tokens=tokens, reason=refusal)
            else:
                charges.book_tokens(
                    conn,
                    charges.price_today(conn, model),
                    route=Route.OPENAI_SYNC,
                    space_id=space.id,
                    contents=contents,
                    tokens=tokens,
                )
        if refusal is not None:
            self._context.oddities.count(model, {OTHER_MODEL: 1})
            raise ProviderStopped(refusal, advice="Then: chunkmill lanes resume", provider_code=OTHER_MODEL)
        COUNTS.add_all(((metrics.TOKENS, tokens), (metrics.URGENT_TEXTS, contents)))

    def _embed(self, request: EmbedRequest, space: Space) -> NDArray[np.float32]:
        """One vector per text. A text that is too long is treated as the space treats long documents."""
        context, spec = self._context, space.spec
        model = context.model(space)
        with context.begin() as conn:
            budget.require_budget(conn, context.settings)
            lane = provider_lanes.lane(conn, Route.OPENAI_SYNC)
            if lane.is_stopped:
                raise ProviderError(f"lane {Route.OPENAI_SYNC} is stopped: {lane.stop_reason}")
        prompt = spec.query_prompt if request.kind == "query" else spec.document_prompt
        texts = [(str(i).encode(), prompt + text) for i, text in enumerate(request.texts)]
        limits = context.limits(model, space)
        items = []
        for item in prepare(texts, context.counter(model), limits, _POLICIES[spec.long_text]):
            if isinstance(item, RefusedInput):
                raise ProviderRefused(item.reason, status=400, provider_code=item.code)
            items.append(item)
        vectors = []
        packer = Packer(1, context.form(model, space), limits)
        for item in items:
            packer.add(item)
        for number in range(packer.requests):
            rows = [row for row in packer.rows if row.request_no == number]
            sent = [window.text for row in rows for window in items[int(row.content_hash)].windows]
            embedded = self._ask(
                space,
                sent,
                contents=len(rows),
                tokens=sum(row.sent_tokens for row in rows),
                idempotency_key=f"embed-request-{request.id}-{number}-{secrets.token_hex(4)}",
            )
            made = assemble(embedded, rows, normalize=spec.normalize)
            if made.problems:
                raise ProviderSilent(f"the provider answered without a usable vector: {made.problems[0][1]}")
            vectors.append(made.vectors)
        return np.concatenate(vectors)


_POLICIES = {LongText.TRUNCATE: OnLong.TRUNCATE, LongText.SPLIT: OnLong.SPLIT, LongText.SPLIT_APART: OnLong.SPLIT}
