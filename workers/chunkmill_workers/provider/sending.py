"""Sends the contents of one attempt in plain requests, which become smaller where a server does not take them whole.

Before a text is blamed, a probe must show that the provider answers at all. If the provider refuses everything, or is
silent to everybody, no text may be buried for it, and the texts need not be tried one after the other.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace

import sqlalchemy as sa

from chunkmill.domain.states import Route
from chunkmill.errors import ProviderRefused, ProviderSilent
from chunkmill.ledger.dead.dead_chunks import DeadContent
from chunkmill.ledger.money import budget
from chunkmill.ledger.provider import provider_inputs, provider_lanes
from chunkmill.openai.plan.endings import BuryContent, SendAlone, after_line_error
from chunkmill.openai.plan.inputs import ProviderInput
from chunkmill.openai.plan.requests import PlainRequest, first_request
from chunkmill.spaces.registry import Space
from chunkmill_workers.process.lease import HeldLease
from chunkmill_workers.provider.asking import ask_plain
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.health import FAILURES
from chunkmill_workers.provider.plain_attempt import NO_ANSWER, Answer, PlainAttempt
from chunkmill_workers.provider.probe import require_answer

LANE = Route.OPENAI_SYNC
SILENT_TRIES = 2
"""Up to this attempt, a request without an answer ends the attempt. Later attempts look for the text that is at
fault."""
LONGEST_RUN = 12
"""After this many requests in a row without an answer, no text is at fault, even if a probe gets an answer: a search by
halves for one bad text in 2,048 gets an answer earlier."""
SAME_REFUSALS = 3
"""After this many refusals with the same words, such as of a request and two parts of it, a probe tells whether every
request is refused."""


class Interrupted(Exception):
    """The worker was told to leave, or its lane was paused or stopped."""


class Sender:
    """Sends the contents of one attempt."""

    def __init__(self, context: ProviderContext, held: HeldLease, attempt: PlainAttempt) -> None:
        self._context = context
        self._held = held
        self._attempt = attempt
        self._model = context.model(attempt.space)
        self._limits = context.limits(self._model, attempt.space)
        self._refusal: tuple[str, int] = ("", 0)
        """The words of the latest refusal, and how many refusals in a row had the same words."""

    def send(self, items: Sequence[ProviderInput]) -> None:
        """Send all contents. Their vectors are committed, or the attempt knows why there is none.

        Raises :class:`Interrupted` and the kinds of ``ProviderError`` that concern more than single texts.
        """
        if not items:
            return
        attempt = self._attempt
        require_answer(self._context, LANE, attempt.space, again=attempt.lane_is_unproved, asked_at=attempt.started_at)
        with self._context.begin() as conn:
            suspects = provider_inputs.suspects(conn, attempt.space.id, [item.content_hash for item in items])
        self._send([item for item in items if item.content_hash not in suspects])
        for item in items:
            if item.content_hash in suspects:
                self._send([item])
        silent = [code for code, _ in attempt.failed.values() if code == NO_ANSWER]
        if len(silent) == len(items) > 1:
            raise ProviderSilent("none of the texts got an answer, neither together nor alone", was_sent=False)

    def _send(self, items: Sequence[ProviderInput]) -> None:
        while items:
            most = self._context.health.most_inputs(self._model.name, self._limits.inputs_per_request)
            request = first_request(items, self._limits, inputs=most)
            items = items[len(request.items) :]
            try:
                self._ask(request)
            except ProviderRefused as refused:
                self._refused(request, refused)
            except ProviderSilent as silent:
                self._silent(request, silent)
            else:
                self._refusal = ("", 0)
                self._context.health.answered(LANE)
                self._context.health.fits(self._model.name, request.inputs)
                if len(request.items) > 1 and all(item.content_hash in self._attempt.failed for item in request.items):
                    # Each of them was paid for, so a probe tells whether the next ones would be in vain, too.
                    require_answer(self._context, LANE, self._attempt.space, again=True)

    def _ask(self, request: PlainRequest) -> None:
        """Send one request and commit its answer."""
        context, attempt, settings = self._context, self._attempt, self._context.settings
        rows = request.rows

        def take_turn(conn: sa.Connection) -> float | None:
            if not provider_lanes.lane(conn, LANE).is_healthy:
                return None  # another worker has paused or stopped the lane
            if budget.is_exceeded(conn, settings):
                return None  # what was in flight has cost more than it was committed for
            return provider_lanes.take_turn(
                conn,
                LANE,
                tokens=request.tokens,
                requests_per_minute=settings.openai_sync_requests_per_minute,
                tokens_per_minute=settings.openai_sync_tokens_per_minute,
            )

        wait = context.transact(take_turn, "take turn")
        if wait is None or context.stopping.wait(wait):
            raise Interrupted
        self._held.check()
        self._held.moved()
        with attempt.sending(rows):
            embedded = ask_plain(
                context,
                attempt.space,
                request.texts,
                tokens=request.tokens,
                idempotency_key=_key(attempt.space, request),
            )
            if embedded.prompt_tokens is None:
                embedded = replace(embedded, prompt_tokens=request.tokens)
            attempt.commit(Answer(embedded, rows))

    def _refused(self, request: PlainRequest, refused: ProviderRefused) -> None:
        """A refusal costs nothing. The request is halved until one content is left, and that one is dead."""
        words = re.sub(r"\d+", "#", f"{refused.status} {refused.provider_code} {refused.words}")
        self._refusal = (words, self._refusal[1] + 1 if words == self._refusal[0] else 1)
        if self._refusal[1] == SAME_REFUSALS:
            require_answer(self._context, LANE, self._attempt.space, again=True)
        verdict = after_line_error(
            refused.status, refused.provider_code, str(refused), n_inputs_in_request=len(request.items)
        )
        if isinstance(verdict, BuryContent):
            content = request.items[0].content_hash
            self._attempt.dead.append(DeadContent(content, verdict.code, verdict.reason))
        elif isinstance(verdict, SendAlone):
            failed = self._attempt.n_failed
            if verdict.too_large:
                self._context.health.too_large(self._model.name, request.inputs)
            for half in request.halves():
                self._send(half)
            if self._attempt.n_failed == failed:  # each of them was accepted, so there were too many
                self._context.health.too_large(self._model.name, request.inputs)
        else:
            raise refused

    def _silent(self, request: PlainRequest, silent: ProviderSilent) -> None:
        """A request without an answer may have been charged. What took too long is sent again in halves.

        So is everything after some attempts, because a text may be at fault. A content that gets no answer alone,
        although a probe does, has failed in this attempt.
        """
        failures = self._context.health.failed(LANE)
        if silent.timed_out:
            self._context.health.too_large(self._model.name, request.inputs)
        elif self._attempt.lease.attempt <= SILENT_TRIES:
            raise silent
        if failures >= LONGEST_RUN:
            raise silent
        if failures >= FAILURES or len(request.items) == 1:
            require_answer(self._context, LANE, self._attempt.space, again=True)
        if len(request.items) == 1:
            self._attempt.failed[request.items[0].content_hash] = (NO_ANSWER, str(silent))
            return
        for half in request.halves():
            self._send(half)


def _key(space: Space, request: PlainRequest) -> str:
    """The idempotency key of a request. A server that knows such keys does not charge the same request twice."""
    digest = hashlib.sha256(space.spec.fingerprint.encode())
    for item in request.items:
        digest.update(item.content_hash)
    return digest.hexdigest()
