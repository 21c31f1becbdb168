"""Embeds the texts that somebody waits for (searches and ``client.embed``) in spaces that a provider serves."""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Iterator, Sequence
from decimal import Decimal

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill.domain.costs import AdjustmentKind
from chunkmill.domain.providers import OPENAI
from chunkmill.domain.spaces import LongText, OnLong
from chunkmill.domain.states import Route
from chunkmill.errors import (
    BudgetExceeded,
    ChunkmillError,
    LeaseLost,
    ProviderBusy,
    ProviderError,
    ProviderRefused,
    ProviderSilent,
    ProviderStopped,
)
from chunkmill.ledger import embed_requests
from chunkmill.ledger.embed_requests import EmbedRequest
from chunkmill.ledger.money import budget, charges, questions
from chunkmill.ledger.provider import provider_lanes
from chunkmill.ledger.provider.answering import OTHER_MODEL, refuse_model
from chunkmill.ledger.provider.provider_inputs import UnansweredRequests
from chunkmill.openai.plan.assemble import assemble
from chunkmill.openai.plan.endings import SendAlone, after_line_error
from chunkmill.openai.plan.inputs import ProviderInput, RefusedInput, prepare
from chunkmill.openai.plan.requests import PlainRequest, first_request
from chunkmill.openai.wire.answers import EmbeddedRequest
from chunkmill.spaces import registry
from chunkmill.spaces.registry import Space
from chunkmill.telemetry import metrics, tracing
from chunkmill.telemetry.counts import COUNTS
from chunkmill_workers.process.responder import Responder
from chunkmill_workers.process.unserved import UnservedWork
from chunkmill_workers.provider.asking import ask_plain, asking_seconds
from chunkmill_workers.provider.books import book_answer, book_silence, book_unanswered
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.flow import pause_failing_lane, pause_lane, stop_lane
from chunkmill_workers.provider.probe import require_answer

logger = logging.getLogger(__name__)

LOCAL_FIRST_SECONDS = 2.0
"""How many seconds a request waits for local workers, if they serve its space too, before this worker takes it."""


class ProviderResponder(Responder[ProviderContext]):
    """Does by plain requests what ``chunkmill_workers.local.responder.EmbedResponder`` does with an engine."""

    def __init__(self, context: ProviderContext) -> None:
        super().__init__("embed-requests-openai", context)

    @property
    def unserved(self) -> UnservedWork:
        return self._context.unserved

    def answer_next(self) -> bool:
        """Answer one request. Returns False if there is none, the lane is paused, or this worker leaves."""
        if self._context.stopping.is_set():
            return False
        self._book_overdue()

        def claim_next(conn: sa.Connection, unserved: list[int]) -> list[EmbedRequest]:
            if provider_lanes.lane(conn, Route.OPENAI_SYNC).paused_until is not None:
                return []  # whoever asked decides how long to wait
            spaces = [space for space in registry.all_spaces(conn) if space.id not in unserved]
            served = [space for space in spaces if self._context.serves(space)]
            own = [space.id for space in served if space.spec.provider == OPENAI]
            shared = [space.id for space in served if space.spec.provider != OPENAI]
            request = embed_requests.claim_next(
                conn, spaces=own, lease_seconds=self._lease_seconds
            ) or embed_requests.claim_next(
                conn, spaces=shared, min_age_s=LOCAL_FIRST_SECONDS, lease_seconds=self._lease_seconds
            )
            return [request] if request else []

        claimed = self.claim(claim_next)
        if not claimed:
            return False
        self._context.questions += 1
        try:
            request, space = claimed[0]
            with _traced(request):
                self._answer(request, space)
        finally:
            self._context.questions -= 1
        return True

    def stop(self) -> None:
        """End the thread after the question that is with the provider, whose answer is paid for."""
        self._stop_listening.set()
        self.wake()
        self.join(timeout=self._context.answer_seconds + 5)

    def _book_overdue(self) -> None:
        """Book what workers that are gone had sent of questions, whether or not anybody still waits for an answer."""
        with self._context.begin() as conn:
            for space_id in questions.overdue_spaces(conn):
                space = registry.get_if_readable(conn, space_id)
                if space is None or not self._context.serves(space):
                    continue  # workers that know its price book it
                sent = [
                    UnansweredRequests(0, row.contents, row.tokens) for row in questions.take_overdue(conn, space_id)
                ]
                book_unanswered(conn, self._context, space, sent)

    @property
    def _lease_seconds(self) -> float:
        """The lease lasts until the request is surely over, because the question must not be sent, and paid for, a
        second time meanwhile.
        """
        return asking_seconds(self._context)

    def _answer(self, request: EmbedRequest, space: Space) -> None:
        question = _Question(self._context, request, space, self._lease_seconds)
        try:
            answer = question.answer()
        except LeaseLost as lost:
            logger.warning("%s", lost)
            question.end()
            return
        except Exception as error:  # noqa: BLE001 - whatever it was, whoever waits must get a reason
            tracing.fail(type(error).__name__)
            if isinstance(error, ProviderBusy):
                pause_lane(self._context, Route.OPENAI_SYNC, error, tries=1)
            elif isinstance(error, ProviderStopped):
                stop_lane(self._context, Route.OPENAI_SYNC, error)
            elif isinstance(error, ProviderSilent):
                pause_failing_lane(self._context, Route.OPENAI_SYNC, error)
            if isinstance(error, ChunkmillError) and error.elsewhere:
                self._context.unserved.leave(space.id, error)
            self.end_without_vectors(question.request, error)
            if isinstance(error, ProviderError):
                question.end()  # after any other error nobody knows whether something was sent and is not booked
            return
        with self._context.begin() as conn:
            embed_requests.answer(conn, request.id, *answer)
        question.end()


@contextlib.contextmanager
def _traced(request: EmbedRequest) -> Iterator[None]:
    """A span below that of the caller, if it has one."""
    if request.traceparent is None:
        yield
        return
    attributes = {"request": request.id, "space": request.space_id, "texts": len(request.texts)}
    with tracing.root("chunkmill.embed_request", attributes, kind="CONSUMER", parents=[request.traceparent]):
        yield


class _Question:
    """One request for vectors while it is asked. ``request`` has the lease as it is now."""

    def __init__(self, context: ProviderContext, request: EmbedRequest, space: Space, lease_seconds: float) -> None:
        self.request = request
        self._context = context
        self._space = space
        self._lease_seconds = lease_seconds
        self._key = secrets.token_bytes(16)

    def answer(self) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.bool_]]:
        """One vector per text, how many tokens of each were charged, and whether it was cut.

        A text that is too long is treated as the space treats long documents.
        """
        context, space, spec = self._context, self._space, self._space.spec
        model = context.model(space)
        with context.begin() as conn:
            lane = provider_lanes.lane(conn, Route.OPENAI_SYNC)
            if lane.is_stopped:
                raise ProviderError(f"lane {Route.OPENAI_SYNC} is stopped: {lane.stop_reason}")
            unproved = provider_lanes.is_unproved(conn, Route.OPENAI_SYNC)
        prompt = spec.query_prompt if self.request.kind == "query" else spec.document_prompt
        texts = [(str(i).encode(), prompt + text) for i, text in enumerate(self.request.texts)]
        limits = context.limits(model, space)
        items: list[ProviderInput] = []
        for item in prepare(texts, context.counter(model), limits, _POLICIES[spec.long_text]):
            if isinstance(item, RefusedInput):
                raise ProviderRefused(item.reason, status=400, provider_code=item.code)
            items.append(item)
        self._commit_money(items)
        if unproved or len(items) > 1:
            require_answer(context, Route.OPENAI_SYNC, space, again=unproved)
        vectors: list[NDArray[np.float32]] = []
        tokens: list[NDArray[np.int32]] = []
        truncated = np.array([item.truncated for item in items], np.bool_)
        while items:
            most = context.health.most_inputs(model.name, limits.inputs_per_request)
            part = first_request(items, limits, inputs=most)
            try:
                made, charged = self._ask(part, len(vectors))
            except ProviderRefused as refused:
                if len(part.items) == 1 or not _is_too_large(refused):
                    raise
                context.health.too_large(model.name, part.inputs)
            else:
                items = items[len(part.items) :]
                vectors.append(made)
                tokens.append(charged)
        return np.concatenate(vectors), np.concatenate(tokens), truncated

    def _commit_money(self, items: Sequence[ProviderInput]) -> None:
        """Let the budget count the question before it is sent. Raises :class:`BudgetExceeded`."""
        context, space = self._context, self._space
        tokens = sum(item.sent_tokens for item in items)
        with context.begin() as conn:
            price = charges.price_today(conn, context.model(space))
            usd = price.of(tokens, Route.OPENAI_SYNC) if price else Decimal(0)
            if (held := budget.why_held(conn, context.settings, space.spec, usd)) is not None:
                raise BudgetExceeded(held)
            questions.add(conn, self._key, space_id=space.id, tokens=tokens, until=self.request.lease_until)

    def end(self) -> None:
        """Take the question out of flight. What was sent of it must be booked, or surely not charged."""
        with self._context.begin() as conn:
            questions.end(conn, self._key)

    def _ask(self, part: PlainRequest, number: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Send one request and book it as soon as it is answered, because the next one of the question may fail.

        Returns the vectors, and how many of the booked tokens are those of each text. Raises :class:`LeaseLost` if
        nobody waits for the question any more.
        """
        context, request, space = self._context, self.request, self._space
        contents = len(part.items)
        with context.begin() as conn:
            renewed = embed_requests.renew(conn, request, lease_seconds=self._lease_seconds)
            if renewed is None or not questions.mark_sent(
                conn, self._key, contents=contents, tokens=part.tokens, until=renewed.lease_until
            ):
                raise LeaseLost(f"embed request {request.id}: nobody waits for it any more, or another worker has it")
        self.request = renewed
        try:
            embedded = ask_plain(
                context,
                space,
                part.texts,
                tokens=part.tokens,
                idempotency_key=f"embed-request-{request.id}-{number}-{secrets.token_hex(4)}",
            )
        except ProviderSilent as silent:
            context.health.failed(Route.OPENAI_SYNC)
            if silent.timed_out:
                context.health.too_large(context.model(space).name, part.inputs)
            with context.begin() as conn:
                if questions.take_sent(conn, self._key):
                    book_silence(conn, context, space, [UnansweredRequests(0, contents, part.tokens)], silent)
            raise
        context.health.answered(Route.OPENAI_SYNC)
        tokens = self._book(part, embedded)
        made = assemble(embedded, part.rows, normalize=space.spec.normalize)
        if made.problems:
            raise ProviderSilent(f"the provider answered without a usable vector: {made.problems[0][1]}")
        return made.vectors, _shares([item.sent_tokens for item in part.items], tokens)

    def _book(self, part: PlainRequest, embedded: EmbeddedRequest) -> int:
        """Book a request. Returns how many tokens were charged.

        Raises :class:`ProviderStopped` if another model answered than the space has vectors of.
        """
        context, space, model = self._context, self._space, self._context.model(self._space)
        contents = len(part.items)
        tokens = part.tokens if embedded.prompt_tokens is None else embedded.prompt_tokens

        def book(conn: sa.Connection) -> str | None:
            refusal = refuse_model(conn, space.id, asked=model.name, answered=embedded.model)
            if not questions.take_sent(conn, self._key):
                return refusal  # an earlier run was committed, or another worker has booked it
            if refusal is None:
                book_answer(conn, context, space, contents=contents, tokens=tokens)
            else:
                lost = UnansweredRequests(0, contents, tokens)
                book_unanswered(conn, context, space, [lost], kind=AdjustmentKind.LOST, reason=refusal)
            return refusal

        refusal = context.transact(book, "book an answer", is_paid=True)
        if refusal is not None:
            context.oddities.count(model, {OTHER_MODEL: 1})
            raise ProviderStopped(refusal, advice="Then: chunkmill lanes resume", provider_code=OTHER_MODEL)
        COUNTS.add_all(((metrics.TOKENS, tokens), (metrics.URGENT_TEXTS, contents)))
        return tokens


def _shares(sent: Sequence[int], charged: int) -> NDArray[np.int32]:
    """The tokens that a provider charged for a request, ``(n,)``, in the proportion of those that we count of its
    texts. Their sum is exact, because keys of the gateway pay for it."""
    ends = np.cumsum(sent, dtype=np.int64)
    return np.diff(ends * charged // max(1, int(ends[-1])), prepend=0).astype(np.int32)


def _is_too_large(refused: ProviderRefused) -> bool:
    verdict = after_line_error(refused.status, refused.provider_code, str(refused), n_inputs_in_request=2)
    return isinstance(verdict, SendAlone) and verdict.too_large


_POLICIES = {LongText.TRUNCATE: OnLong.TRUNCATE, LongText.SPLIT: OnLong.SPLIT, LongText.SPLIT_APART: OnLong.SPLIT}
