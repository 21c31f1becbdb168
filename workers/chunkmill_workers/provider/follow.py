"""A ProviderBatch while it is at the provider: it is polled, and cancelled when no job waits for it any more."""

from __future__ import annotations

import logging
from typing import Any, NoReturn

import sqlalchemy as sa

from chunkmill.domain.states import ProviderBatchState as State
from chunkmill.domain.states import Route
from chunkmill.errors import ProviderBusy, ProviderRefused, ProviderSilent
from chunkmill.ledger.provider import provider_batches, provider_inputs, provider_lanes
from chunkmill.ledger.provider.provider_batches import Step
from chunkmill.openai.http import TOKEN_KEY
from chunkmill.openai.plan.endings import (
    GiveUp,
    Isolate,
    Resend,
    Reupload,
    Split,
    StopLane,
    Wait,
    after_validation_failure,
    backoff,
    poll_pause,
)
from chunkmill.openai.wire.status import RemoteBatch, RemoteStatus
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.endings import VANISHED, believed_usage, bury, give_up, repack, require_own_key
from chunkmill_workers.provider.flow import StepDelayed, StepReleased
from chunkmill_workers.provider.quota import refused_by_quota
from chunkmill_workers.provider.send import cancel_doubled

logger = logging.getLogger(__name__)

LOST_AFTER = 5
"""How many polls must find that the provider does not know a batch before it counts as lost and is paid for again."""
LOOKS_FOR_RESULTS = 60
"""How often a batch that ended is asked for result files that it does not name, which takes about five hours."""
LONGEST_HOURS = 7 * 24.0
"""A batch counts as overdue after this time at the latest, whatever the provider says of when it expires."""
WINDOW_HOURS = 24.0
"""The ``completion_window`` of our batches. Before it is over, no batch counts as overdue."""
CANCEL_AFTER_S = 3600.0
"""How long after a batch should have ended it is cancelled."""
GIVE_UP_AFTER_S = 6 * 3600.0
"""How long after its cancellation was requested a batch that has not ended is given up."""
TOO_MANY = "too_many_tasks"
"""The only error code from which something is learnt about the provider: how much a batch may hold."""


def poll(context: ProviderContext, step: Step) -> Step:
    """``submitted`` → ``collecting`` once the provider has ended the batch; until then the step is released."""
    assert step.batch_id is not None  # noqa: S101 - a state of the row
    cancel_doubled(context, step)
    try:
        remote = context.provider.retrieve(step.batch_id)
    except ProviderRefused as refused:
        if refused.status != 404:
            raise
        return _not_found(context, step, str(refused))
    if not is_ours(remote, step):
        return _not_found(context, step, f"{context.provider.server} has another batch under the id {step.batch_id}")
    if not remote.is_terminal:
        remote = _await_end(context, step, remote)
    seen = _seen(context, step, remote)
    logger.info(
        "%s: %s is %s: %s of %s requests", step.name, step.batch_id, remote.status, remote.completed, remote.total
    )
    has_file = bool(remote.output_file_id or remote.error_file_id)
    ran = bool(seen["n_completed"] or seen["used_tokens"]) or _may_have_run(step, remote)
    if remote.status is RemoteStatus.FAILED and not has_file and not ran:
        return _failed_validation(context, step, remote)
    if not remote.output_file_id and (ran or (remote.status is RemoteStatus.COMPLETED and not has_file)):
        if step.looks + 1 < LOOKS_FOR_RESULTS:
            _look_for_results(context, step, remote, seen)
        elif ran or remote.completed != 0:
            return _without_results(context, step, remote, seen)
    return context.transact(
        lambda conn: provider_batches.advance(
            conn,
            step,
            State.COLLECTING,
            output_file_id=remote.output_file_id,
            error_file_id=remote.error_file_id,
            ended_at=sa.func.now(),
            error="; ".join(f"{error.code}: {error.message}" for error in remote.errors) or None,
            **seen,
        ),
        "ended",
    )


def _may_have_run(step: Step, remote: RemoteBatch) -> bool:
    """Whether a batch failed after its validation and does not say how much of it ran, so that it may be charged."""
    seen_running = step.provider_status in (RemoteStatus.IN_PROGRESS, RemoteStatus.FINALIZING)
    began = remote.has_begun or seen_running or step.looks > 0  # it is looked at again only if it may have run
    return remote.status is RemoteStatus.FAILED and began and remote.has_unknown_cost


def is_ours(remote: RemoteBatch, step: Step) -> bool:
    """Whether a batch is the one that we created. A server that numbers batches anew after a restart gives the same id
    to another batch.
    """
    token = remote.metadata.get(TOKEN_KEY)
    if token is not None:
        return token == step.token
    return remote.input_file_id in (None, step.input_file_id)


def _seen(context: ProviderContext, step: Step, remote: RemoteBatch) -> dict[str, Any]:
    """The columns for what the provider says of the batch. Values that cannot be true are left out."""
    n_done = (remote.completed or 0) + (remote.failed or 0)
    return {
        "provider_status": remote.status,
        "key_digest": context.provider.key_digest,
        "n_done": min(n_done, step.n_requests),
        "n_completed": None if remote.completed is None else min(remote.completed, step.n_requests),
        "used_tokens": believed_usage(context, step, remote) if remote.is_terminal else None,
    }


def _await_end(context: ProviderContext, step: Step, remote: RemoteBatch) -> RemoteBatch:
    """Check a running batch again later. If it never ends, the log has a warning, then it is cancelled, and at last
    given up.

    Returns the batch if it has ended by being cancelled.
    """
    overdue_s = step.submitted_for_s - allowed_s(remote, context.settings.openai_batch_hours)
    too_late, since = overdue_s > CANCEL_AFTER_S, step.cancelled_for_s
    columns: dict[str, Any] = {}
    if too_late and not step.cancel_requested:
        columns["cancel_requested_at"] = sa.func.now()
    if (too_late or step.cancel_requested) and remote.status is not RemoteStatus.CANCELLING:
        remote = _cancel(context, step, remote)
        if remote.is_terminal:
            return remote
    seen = _seen(context, step, remote)
    if since > GIVE_UP_AFTER_S:
        reason = (
            f"it was cancelled {since / 3600:.0f} hours ago, and the provider still says {remote.status}. It may have "
            "been charged. To send its texts again: chunkmill retry JOB"
        )
        give_up(context, step, code="never_ended", reason=f"given up: {reason}", may_have_run=True, **seen)
        raise StepDelayed(0.0)
    error = None
    if overdue_s > 0:
        error = (
            f"it should have ended {overdue_s / 3600:.0f} hours ago, and the provider still says {remote.status}. An "
            "hour after its end it is cancelled, and six hours later given up. To let go of it now: chunkmill lanes "
            f"abandon {step.id}"
        )
        if step.error is None or not step.error.startswith("it should have ended"):
            logger.warning("%s: %s", step.name, error)
    pause = poll_pause(step.submitted_for_s, longest_s=context.settings.openai_poll_seconds)
    columns |= {"failures": 0, "error": error, **seen}
    context.transact(lambda conn: provider_batches.release(conn, step, delay_s=pause, **columns), "look again later")
    raise StepReleased


def _cancel(context: ProviderContext, step: Step, remote: RemoteBatch) -> RemoteBatch:
    """Ask the provider to cancel it. If that fails, the next look asks again; until then the batch is as it was."""
    logger.info("%s: cancelling %s, which nobody waits for any more or which never ends", step.name, remote.id)
    try:
        return context.provider.cancel(remote.id)
    except (ProviderSilent, ProviderRefused) as error:
        logger.warning("%s: it could not be cancelled: %s", step.name, error.brief)
        return remote


def allowed_s(remote: RemoteBatch, hours: float) -> float:
    """How many seconds a batch may take: what the provider says, within reason, or ``hours`` if it does not say.

    Both times are by the provider's clock, which may differ from ours.
    """
    if remote.expires_at is not None and remote.created_at is not None:
        hours = (remote.expires_at - remote.created_at).total_seconds() / 3600
    return 3600 * min(LONGEST_HOURS, max(WINDOW_HOURS, hours))


def _look_for_results(context: ProviderContext, step: Step, remote: RemoteBatch, seen: dict[str, Any]) -> NoReturn:
    """Check again later: the batch has ended but names no result file yet. Some providers are late with the names."""
    looks = step.looks + 1
    said = f"it is {remote.status} with {_done(remote)}, and names no result file yet"
    columns: dict[str, Any] = {**seen, "failures": 0, "looks": looks, "error": said}
    context.transact(
        lambda conn: provider_batches.release(conn, step, delay_s=backoff(looks), **columns), "no result file yet"
    )
    raise StepReleased


def _without_results(context: ProviderContext, step: Step, remote: RemoteBatch, seen: dict[str, Any]) -> Step:
    """Give up a batch that ran and whose results cannot be found. It is not sent again before a person says so."""
    charged = "It may have been charged" if remote.completed is None else "It was charged"
    reason = (
        f"it ended {remote.status} with {_done(remote)}, and named no result file. "
        f"{charged}, and is not sent again by itself. To pay for it again: chunkmill retry JOB"
    )
    return give_up(context, step, code="no_results", reason=reason, may_have_run=True, ended_at=sa.func.now(), **seen)


def _done(remote: RemoteBatch) -> str:
    if remote.completed is None:
        return "an unknown number of requests done"
    return f"{remote.completed} of {remote.total} requests done"


def _not_found(context: ProviderContext, step: Step, why: str) -> Step:
    """Check again later. After enough checks in which the provider did not know the batch, go on without results."""
    require_own_key(context, step, f"batch {step.batch_id}")
    # Failures of another kind do not count: `failures` is theirs until the first poll that did not find the batch.
    looks = 1 + (step.failures if step.provider_status == VANISHED else 0)
    if looks < LOST_AFTER:
        missing: dict[str, Any] = {"failures": looks, "provider_status": VANISHED, "error": why}
        pause = context.settings.openai_poll_seconds
        context.transact(lambda conn: provider_batches.release(conn, step, delay_s=pause, **missing), "not found")
        raise StepReleased
    logger.error("%s: the provider does not know %s any more", step.name, step.batch_id)
    return context.transact(
        lambda conn: provider_batches.advance(
            conn, step, State.COLLECTING, provider_status=VANISHED, ended_at=sa.func.now(), error=why
        ),
        "vanished",
    )


def _failed_validation(context: ProviderContext, step: Step, remote: RemoteBatch) -> Step:
    """Decide what to do with a batch that failed before any of its requests ran. Nothing was charged for it."""
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
        return give_up(
            context, step, code=verdict.code, reason=verdict.reason, provider_status=RemoteStatus.FAILED.value
        )
    if isinstance(verdict, Wait):
        return refused_by_quota(context, step, ProviderBusy(verdict.reason))
    codes = ", ".join(sorted({error.code for error in remote.errors})) or "no code"
    logger.warning("%s: the provider refused it (%s): %s", step.name, codes, type(verdict).__name__)
    if isinstance(verdict, Split) and all(error.code.lower() != TOO_MANY for error in remote.errors):
        return _halve(context, step, verdict, remote)
    if isinstance(verdict, Split | Isolate):
        return context.transact(lambda conn: repack(conn, step, verdict), "return")
    context.transact(lambda conn: _send_again(conn, context, step, verdict), "send again")
    raise StepReleased


def _halve(context: ProviderContext, step: Step, verdict: Split, remote: RemoteBatch) -> Step:
    """Move the second half of the contents into a ProviderBatch of its own, because it is not known which contents are
    at fault.

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
    conn: sa.Connection, context: ProviderContext, step: Step, verdict: Resend | Reupload | StopLane
) -> None:
    """Release the step to send the same contents in a new batch: from the file that is there, or from a new one."""
    columns: dict[str, Any] = {"batch_id": None, "submitted_at": None, "error": verdict.reason}
    if isinstance(verdict, StopLane):
        # The account or a setting is the reason and not the contents. The setting may have changed when the lane is
        # resumed, for example the model's name, so that the file is made again.
        provider_lanes.stop(conn, Route.OPENAI, code=verdict.code, reason=verdict.reason)
        again = provider_batches.advance(conn, step, State.GATHERED, **columns)
        provider_batches.release(conn, again, delay_s=context.settings.openai_poll_seconds)
        return
    again = provider_batches.advance(conn, step, State.GATHERED, resends=step.resends + 1, **columns)
    provider_batches.release(conn, again, delay_s=min(60.0, 2.0**step.resends))
