"""Books what probes and questions (searches and ``client.embed``) cost, and what no answer confirmed."""

from __future__ import annotations

from collections.abc import Iterable

import sqlalchemy as sa

from chunkmill.domain.costs import AdjustmentKind
from chunkmill.domain.states import Route
from chunkmill.errors import ProviderSilent
from chunkmill.ledger.money import adjustments, charges
from chunkmill.ledger.provider.provider_inputs import UnansweredRequests
from chunkmill.spaces.registry import Space
from chunkmill_workers.provider.context import ProviderContext

NO_ANSWER = "a plain request got no answer, or its worker ended before the answer was written"


def book_answer(conn: sa.Connection, context: ProviderContext, space: Space, *, contents: int, tokens: int) -> None:
    """Book a plain request that belongs to no job as soon as it is answered: it was charged, whatever comes next."""
    charges.book_tokens(
        conn,
        charges.price_today(conn, context.model(space)),
        route=Route.OPENAI_SYNC,
        space_id=space.id,
        contents=contents,
        tokens=tokens,
    )


def book_unanswered(
    conn: sa.Connection,
    context: ProviderContext,
    space: Space,
    sent: Iterable[UnansweredRequests],
    *,
    kind: AdjustmentKind = AdjustmentKind.MAYBE_CHARGED,
    reason: str = NO_ANSWER,
) -> None:
    """Book, by our own count, plain requests that were sent and whose answers nobody can use."""
    for request in sent:
        adjustments.add_tokens(
            conn,
            charges.price_today(conn, context.model(space)),
            kind=kind,
            route=Route.OPENAI_SYNC,
            space_id=space.id,
            job_id=request.job_id,
            contents=request.contents,
            tokens=request.tokens,
            reason=reason,
        )


def book_silence(
    conn: sa.Connection,
    context: ProviderContext,
    space: Space,
    sent: Iterable[UnansweredRequests],
    silent: ProviderSilent,
) -> None:
    """Book a plain request that ended with ``silent``: as ``lost`` if it was answered, else as ``maybe_charged``."""
    if silent.was_sent:
        kind = AdjustmentKind.LOST if silent.answered else AdjustmentKind.MAYBE_CHARGED
        book_unanswered(conn, context, space, sent, kind=kind, reason=silent.brief)
