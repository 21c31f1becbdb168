"""Asks a model for the vector of one word, before texts are sent to it, and when nobody knows who is at fault.

A worker does so before its first request to a model, and after its lane was resumed or had failed. The word is
harmless. So if the provider refuses it, every text would be refused, and finding that out costs one token.
"""

from __future__ import annotations

import contextlib
import secrets
import time

from chunkmill.domain.states import Route
from chunkmill.errors import ProviderBusy, ProviderError, ProviderRefused, ProviderSilent, ProviderStopped
from chunkmill.ledger.money import questions
from chunkmill.ledger.provider import provider_lanes
from chunkmill.ledger.provider.provider_inputs import UnansweredRequests
from chunkmill.openai.plan.refusals import RESUME
from chunkmill.spaces.registry import Space
from chunkmill.telemetry import metrics
from chunkmill.telemetry.counts import COUNTS
from chunkmill_workers.provider.asking import ask_plain, asking_seconds
from chunkmill_workers.provider.books import book_answer, book_silence
from chunkmill_workers.provider.context import ProviderContext

PROBE = "probe"


def require_answer(
    context: ProviderContext, route: Route, space: Space, *, again: bool = False, asked_at: float | None = None
) -> None:
    """Raise a ProviderError unless the model gives a vector of the space for one word.

    Once it has, this worker does not ask again, except ``again`` after the moment ``asked_at`` (of ``time.monotonic``;
    now if it is None). Raises :class:`ProviderStopped` for whatever the provider refuses.
    """
    form = context.form(context.model(space), space)
    key = (form.model, form.dimensions)
    since = (time.monotonic() if asked_at is None else asked_at) if again else 0.0
    with context.health.probing:
        if not context.health.proves(key, since=since):
            try:
                _ask(context, space)
            except ProviderSilent:
                context.health.probe_failed(route)
                raise
            context.health.prove(key)
            context.transact(lambda conn: provider_lanes.prove(conn, route), "prove the lane")


def try_answer(context: ProviderContext, space: Space) -> None:
    """As `require_answer`, before a ProviderBatch is sent. Only a definite refusal raises.

    Plain requests have rate limits of their own, which must not hold up the Batch API.
    """
    with context.begin() as conn:
        unproved = provider_lanes.is_unproved(conn, Route.OPENAI)
    with contextlib.suppress(ProviderBusy, ProviderSilent):
        require_answer(context, Route.OPENAI, space, again=unproved)


def _ask(context: ProviderContext, space: Space) -> None:
    model = context.model(space)
    tokens = context.counter(model).counts([PROBE])[0]
    key = secrets.token_bytes(16)
    with context.begin() as conn:
        questions.add_sent(
            conn, key, space_id=space.id, contents=1, tokens=tokens, lease_seconds=asking_seconds(context)
        )
    try:
        embedded = ask_plain(context, space, [PROBE], tokens=tokens, idempotency_key=f"probe-{secrets.token_hex(8)}")
    except ProviderSilent as silent:
        with context.begin() as conn:
            if questions.end(conn, key):
                book_silence(conn, context, space, [UnansweredRequests(0, 1, tokens)], silent)
        raise
    except ProviderError as error:
        with context.begin() as conn:
            questions.end(conn, key)  # it was not charged
        if not isinstance(error, ProviderRefused):
            raise
        raise ProviderStopped(
            f"{error.brief}, although one word was sent",
            words=error.words,
            advice=f"Check OPENAI_MODELS and OPENAI_BASE_URL. {RESUME}",
            provider_code=error.provider_code,
        ) from None
    charged = tokens if embedded.prompt_tokens is None else embedded.prompt_tokens
    with context.begin() as conn:
        if questions.end(conn, key):
            book_answer(conn, context, space, contents=1, tokens=charged)
    COUNTS.add(metrics.TOKENS, charged)
    if embedded.problems:
        raise ProviderStopped(
            f"{context.provider.server} answered model {model.name!r} without a vector of the space: "
            f"{embedded.problems[0]}",
            advice=f"Check `dimensions` and `can_cut` of the model in OPENAI_MODELS, and the server. {RESUME}",
            provider_code="bad_vector",
        )
