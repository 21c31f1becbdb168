"""A ProviderBatch while it is at the provider: it is polled, and cancelled when no job waits for it any more."""

from __future__ import annotations

import logging
from typing import Any

import sqlalchemy as sa

from chunkmill.domain.states import ProviderBatchState as State
from chunkmill.domain.states import Route
from chunkmill.errors import ProviderRefused
from chunkmill.ledger.provider import provider_batches, provider_inputs, provider_lanes
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
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.endings import bury, give_up, repack
from chunkmill_workers.provider.flow import StepReleased
from chunkmill_workers.provider.send import cancel_doubled

logger = logging.getLogger(__name__)

LOST_AFTER = 5
"""How many polls must find that the provider does not know a batch before it counts as lost and is paid for again."""
VANISHED = "vanished"
TOO_MANY = "too_many_tasks"
"""The only code that says something about the provider: how much a batch may hold."""


def poll(context: ProviderContext, step: Step) -> Step:
    """``submitted`` → ``collecting`` once the provider has ended the batch; until then the step is released."""
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
    n_done = (remote.completed or 0) + (remote.failed or 0)
    progress: dict[str, Any] = {"provider_status": remote.status, "n_done": n_done}
    if not remote.is_terminal:
        pause = poll_pause(step.submitted_for_s, longest_s=context.settings.openai_poll_seconds)
        context.transact(
            lambda conn: provider_batches.release(conn, step, delay_s=pause, failures=0, **progress), "look again later"
        )
        raise StepReleased
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
            error="; ".join(f"{error.code}: {error.message}" for error in remote.errors) or None,
            **progress,
        ),
        "ended",
    )


def _vanished(context: ProviderContext, step: Step, refused: ProviderRefused) -> Step:
    """Look again later, or collect without a result after the provider has not known the batch often enough."""
    # Failures of another kind do not count: `failures` is theirs until the first poll that did not find the batch.
    looks = 1 + (step.failures if step.provider_status == VANISHED else 0)
    if looks < LOST_AFTER:
        missing: dict[str, Any] = {"failures": looks, "provider_status": VANISHED, "error": str(refused)}
        pause = context.settings.openai_poll_seconds
        context.transact(lambda conn: provider_batches.release(conn, step, delay_s=pause, **missing), "not found")
        raise StepReleased
    logger.error("%s: the provider does not know %s any more", step.name, step.batch_id)
    return context.transact(
        lambda conn: provider_batches.advance(
            conn, step, State.COLLECTING, provider_status=VANISHED, ended_at=sa.func.now(), error=str(refused)
        ),
        "vanished",
    )


def _failed_validation(context: ProviderContext, step: Step, remote: RemoteBatch) -> Step:
    """Decide what helps a batch that failed as a whole, before any of its requests ran: nothing was charged for it."""
    verdict = after_validation_failure(
        remote.errors,
        attempts=step.resends + 1,
        n_inputs=step.n_inputs,
        n_requests=step.n_requests,
        max_attempts=context.settings.max_attempts,
    )
    if isinstance(verdict, GiveUp):
        if step.n_inputs == 1:
            return context.transact(lambda conn: bury(conn, step, verdict.code, verdict.reason), "bury")
        return give_up(context, step, code=verdict.code, reason=verdict.reason)
    codes = ", ".join(sorted({error.code for error in remote.errors})) or "no code"
    logger.warning("%s: the provider refused it (%s): %s", step.name, codes, type(verdict).__name__)
    if isinstance(verdict, Split) and all(error.code.lower() != TOO_MANY for error in remote.errors):
        return _halve(context, step, verdict, remote)
    if isinstance(verdict, Split | Isolate):
        return context.transact(lambda conn: repack(conn, step, verdict), "return")
    context.transact(lambda conn: _send_again(conn, context, step, verdict), "send again")
    raise StepReleased


def _halve(context: ProviderContext, step: Step, verdict: Split, remote: RemoteBatch) -> Step:
    """Move the second half of the contents into a ProviderBatch of its own, because nothing says which are at fault.

    Each half is tried once before it is halved in turn, and waits longer each time: an outage must not cut a
    ProviderBatch into single contents.
    """

    def halve(conn: sa.Connection) -> Step | None:
        if provider_inputs.count(conn, step.id) < 2:  # one content in several windows
            code = remote.errors[0].code if remote.errors else "unknown_error"
            return bury(conn, step, code, verdict.reason)
        columns: dict[str, Any] = {"resends": step.resends + 1, "error": verdict.reason}
        second = provider_batches.open_half(conn, step, **columns)
        provider_inputs.move_half(conn, step.id, second.id)
        first = provider_batches.advance(conn, step, State.GATHERED, batch_id=None, submitted_at=None, **columns)
        for half in (second, first):
            provider_batches.count_inputs(conn, half.id)
            provider_batches.release(conn, half, delay_s=min(300.0, 2.0**step.resends))
        return None

    following = context.transact(halve, "halve")
    if following is None:
        raise StepReleased
    return following


def _send_again(
    conn: sa.Connection, context: ProviderContext, step: Step, verdict: Resend | Reupload | Wait | StopLane
) -> None:
    """Release the step to send the same contents in a new batch: from the file that is there, or from a new one."""
    columns: dict[str, Any] = {"batch_id": None, "submitted_at": None, "error": verdict.reason}
    if isinstance(verdict, Wait | StopLane):
        # A limit or the account is the reason and not the contents. After a limit, the file stays as it is; after a
        # stop, a setting may have changed, for example the model's name.
        if isinstance(verdict, StopLane):
            provider_lanes.stop(conn, Route.OPENAI, code=verdict.code, reason=verdict.reason)
        back = State.UPLOADED if isinstance(verdict, Wait) else State.GATHERED
        again = provider_batches.advance(conn, step, back, **columns)
        provider_batches.release(conn, again, delay_s=context.settings.openai_poll_seconds)
        return
    again = provider_batches.advance(conn, step, State.GATHERED, resends=step.resends + 1, **columns)
    provider_batches.release(conn, again, delay_s=min(60.0, 2.0**step.resends))
