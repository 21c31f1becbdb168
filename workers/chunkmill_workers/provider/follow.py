"""A ProviderBatch at the provider: look at it now and then, and cancel it when nobody wants it any more."""

from __future__ import annotations

import logging
from typing import Any

import sqlalchemy as sa

from chunkmill.domain.states import ProviderBatchState as State
from chunkmill.domain.states import Route
from chunkmill.errors import ProviderRefused
from chunkmill.ledger.provider import provider_batches, provider_inputs, provider_lanes, provider_work
from chunkmill.ledger.provider.provider_batches import Step
from chunkmill.openai.plan.endings import (
    GiveUp,
    Isolate,
    Resend,
    Reupload,
    Split,
    StopLane,
    Wait,
    after_validation_failure,
    poll_pause,
)
from chunkmill.openai.wire.status import RemoteBatch, RemoteStatus
from chunkmill.spaces import registry
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.send import Released, cancel_doubled, give_up

logger = logging.getLogger(__name__)

LOST_AFTER = 5
"""Looks at a batch that the provider does not know any more, before it is given up for lost, and paid again."""
VANISHED = "vanished"
TOO_MANY = "too_many_tasks"
"""Alone of the codes it says something of the provider: how much a batch may hold."""


def poll(context: ProviderContext, step: Step) -> Step:
    """``submitted`` → ``collecting`` once the provider is through with it."""
    assert step.batch_id is not None  # noqa: S101 - a state of the row
    cancel_doubled(context, step)
    try:
        remote = context.provider.retrieve(step.batch_id)
        if step.cancel_requested and not remote.is_terminal and remote.status is not RemoteStatus.CANCELLING:
            logger.info("%s: cancelling %s, which nobody waits for any more", step.name, step.batch_id)
            remote = context.provider.cancel(step.batch_id)
    except ProviderRefused as refused:
        if refused.status != 404:
            raise
        return _vanished(context, step, refused)
    facts: dict[str, Any] = {"provider_status": remote.status, "n_done": (remote.completed or 0) + (remote.failed or 0)}
    if not remote.is_terminal:
        pause = poll_pause(step.submitted_for_s, longest_s=context.settings.openai_poll_seconds)
        context.transact(
            lambda conn: provider_batches.release(conn, step, delay_s=pause, failures=0, **facts), "look again later"
        )
        raise Released
    logger.info(
        "%s: %s is %s: %s of %s requests", step.name, step.batch_id, remote.status, remote.completed, remote.total
    )
    if remote.status is RemoteStatus.FAILED and not (remote.output_file_id or remote.error_file_id):
        return _failed_validation(context, step, remote)
    return context.transact(
        lambda conn: provider_batches.advance(
            conn,
            step,
            State.COLLECTING,
            output_file_id=remote.output_file_id,
            error_file_id=remote.error_file_id,
            ended_at=sa.func.now(),
            error="; ".join(f"{each.code}: {each.message}" for each in remote.errors)[:2000] or None,
            **facts,
        ),
        "ended",
    )


def _vanished(context: ProviderContext, step: Step, refused: ProviderRefused) -> Step:
    # Failures of another kind before the first of these looks do not count.
    looks = 1 + (step.failures if step.provider_status == VANISHED else 0)
    if looks < LOST_AFTER:
        missing: dict[str, Any] = {"failures": looks, "provider_status": VANISHED, "error": str(refused)[:2000]}
        pause = context.settings.openai_poll_seconds
        context.transact(lambda conn: provider_batches.release(conn, step, delay_s=pause, **missing), "not found")
        raise Released
    logger.error("%s: the provider does not know %s any more", step.name, step.batch_id)
    return context.transact(
        lambda conn: provider_batches.advance(
            conn, step, State.COLLECTING, provider_status=VANISHED, ended_at=sa.func.now(), error=str(refused)
        ),
        "vanished",
    )


def _failed_validation(context: ProviderContext, step: Step, remote: RemoteBatch) -> Step:
    """It failed as a whole, before any request of it ran, so nothing was charged: decide what helps."""
    verdict = after_validation_failure(
        remote.errors,
        attempts=step.resends + 1,
        n_inputs=step.n_inputs,
        n_requests=step.n_requests,
        max_attempts=context.settings.max_attempts,
    )
    if isinstance(verdict, GiveUp):
        if step.n_inputs == 1:
            return context.transact(lambda conn: _bury(conn, step, verdict.code, verdict.reason), "bury")
        return give_up(context, step, code=verdict.code, reason=verdict.reason)
    codes = ", ".join(sorted({each.code for each in remote.errors})) or "no code"
    logger.warning("%s: the provider refused it (%s): %s", step.name, codes, type(verdict).__name__)
    if isinstance(verdict, Split) and all(error.code.lower() != TOO_MANY for error in remote.errors):
        return _halve(context, step, verdict, remote)
    if isinstance(verdict, Split | Isolate):
        return context.transact(lambda conn: _return_all(conn, step, verdict), "return")
    context.transact(lambda conn: _send_again(conn, context, step, verdict), "send again")
    raise Released


def _return_all(conn: sa.Connection, step: Step, verdict: Split | Isolate) -> Step:
    """Its contents wait again, to be packed otherwise."""
    returned = provider_inputs.remove_all(conn, step.id)
    if isinstance(verdict, Split):
        provider_lanes.learn_max_inputs(conn, Route.OPENAI, verdict.inputs)
    else:
        named = set(verdict.requests)
        accused = [each for each in returned if each.packed.request_no in named]
        provider_inputs.add_suspects(conn, step.space_id, [each.content_hash for each in accused])
        alone = _alone(accused)
        provider_work.bury_in_flight(conn, [(each, verdict.code, verdict.reason) for each in alone])
    cleaning = provider_batches.advance(
        conn, step, State.CLEANING, n_returned=len(returned), error=verdict.reason[:2000], provider_status="failed"
    )
    provider_work.settle(conn, registry.get(conn, step.space_id), provider_work.members(conn, step.id))
    return cleaning


def _halve(context: ProviderContext, step: Step, verdict: Split, remote: RemoteBatch) -> Step:
    """Nothing says what is at fault, so the latter half goes on in a ProviderBatch of its own. Each half is tried once
    before it is halved in turn, after longer and longer: an outage must not take it all to pieces."""

    def halve(conn: sa.Connection) -> Step | None:
        if provider_inputs.count(conn, step.id) < 2:  # one content in several windows
            code = remote.errors[0].code if remote.errors else "unknown_error"
            return _bury(conn, step, code, verdict.reason)
        facts: dict[str, Any] = {"resends": step.resends + 1, "error": verdict.reason[:2000]}
        half = provider_batches.open_half(conn, step, **facts)
        provider_inputs.move_half(conn, step.id, half.id)
        again = provider_batches.advance(conn, step, State.GATHERED, batch_id=None, submitted_at=None, **facts)
        for each in (half, again):
            provider_batches.count_inputs(conn, each.id)
            provider_batches.release(conn, each, delay_s=min(300.0, 2.0**step.resends))
        return None

    following = context.transact(halve, "halve")
    if following is None:
        raise Released
    return following


def _bury(conn: sa.Connection, step: Step, code: str, reason: str) -> Step:
    """The one content of a ProviderBatch is at fault, for there is no other."""
    returned = provider_inputs.remove_all(conn, step.id)
    provider_work.bury_in_flight(conn, [(each, code, reason) for each in returned])
    provider_inputs.drop_suspects(conn, step.space_id, [each.content_hash for each in returned])
    cleaning = provider_batches.advance(
        conn, step, State.CLEANING, n_dead=len(returned), error_code=code, error=reason[:2000], provider_status="failed"
    )
    provider_work.settle(conn, registry.get(conn, step.space_id), provider_work.members(conn, step.id))
    return cleaning


def _alone(accused: list[provider_inputs.InFlight]) -> list[provider_inputs.InFlight]:
    """Those that had their request to themselves: nobody else can be at fault."""
    together: dict[int, int] = {}
    for each in accused:
        together[each.packed.request_no] = together.get(each.packed.request_no, 0) + 1
    return [each for each in accused if together[each.packed.request_no] == 1]


def _send_again(
    conn: sa.Connection, context: ProviderContext, step: Step, verdict: Resend | Reupload | Wait | StopLane
) -> None:
    """The same contents in a new batch: from the file that is there, or from a new one."""
    facts: dict[str, Any] = {"batch_id": None, "submitted_at": None, "error": verdict.reason[:2000]}
    if isinstance(verdict, Wait | StopLane):
        # A limit, or the account: no fault of the work, which stays as it is.
        if isinstance(verdict, StopLane):
            provider_lanes.stop(conn, Route.OPENAI, code=verdict.code, reason=verdict.reason)
        again = provider_batches.advance(conn, step, State.UPLOADED, **facts)
        provider_batches.release(conn, again, delay_s=context.settings.openai_poll_seconds)
        return
    again = provider_batches.advance(conn, step, State.GATHERED, resends=step.resends + 1, **facts)
    provider_batches.release(conn, again, delay_s=min(60.0, 2.0**step.resends))
