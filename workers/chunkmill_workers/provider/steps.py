"""Takes a ProviderBatch step by step as far as it can go now. However this ends, the row in the ledger is correct."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from chunkmill.db.retry import is_transient
from chunkmill.domain.reasons import reason_of
from chunkmill.domain.states import ProviderBatchState as State
from chunkmill.domain.states import Route
from chunkmill.errors import (
    ChunkmillError,
    LeaseLost,
    ProviderBusy,
    ProviderError,
    ProviderRefused,
    ProviderSilent,
    ProviderStopped,
)
from chunkmill.ledger.provider import provider_batches, provider_lanes
from chunkmill.ledger.provider.provider_batches import Step
from chunkmill.openai.plan.endings import backoff
from chunkmill.openai.wire.status import RemoteStatus, read_status
from chunkmill.telemetry.logging import bound
from chunkmill_workers.process.context import saying_limits
from chunkmill_workers.process.work_context import ids, step_of
from chunkmill_workers.provider.collect import collect
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.endings import VANISHED
from chunkmill_workers.provider.flow import StepDelayed, StepReleased, pause_failing_lane, pause_lane, stop_lane
from chunkmill_workers.provider.follow import is_ours, poll
from chunkmill_workers.provider.gather import gather
from chunkmill_workers.provider.send import adopt, create, file_name, upload

logger = logging.getLogger(__name__)

EQUAL_FAILURES = 10
"""After how many failures in a row, of which the last ones are equal, a step stops its lane. That takes about a quarter
of an hour."""
SILENT_FAILURES = 60
"""The same if the provider gives no answer or a broken one. That takes about five hours, because most outages are
shorter."""
LAST_LOOKS = 60
"""How often a batch that was let go is looked at until it has ended and its result files can be deleted."""
CLEAN_TRIES = 5
"""How often deleting a ProviderBatch's files may fail before they are left to the provider, which expires them."""


def advance_provider_batch(context: ProviderContext, provider_batch_id: int) -> None:
    """Claim a ProviderBatch and take one step after the other until it must wait, or another worker has it."""
    context.last_doorbell = time.monotonic()
    if not context.stopping.is_set():
        with saying_limits():
            _answer(context, provider_batch_id)


def _answer(context: ProviderContext, provider_batch_id: int) -> None:
    made: Step | None = None

    def claim(conn: sa.Connection) -> Step | None:
        nonlocal made
        if made is None or not provider_batches.is_held(conn, made, owner=context.name):  # the answer was lost
            made = provider_batches.claim_if_due(
                conn,
                provider_batch_id,
                owner=context.name,
                lease_seconds=context.settings.lease_seconds,
                server=context.provider.server,
                not_spaces=list(context.unserved.now()),
            )
        return made

    step = context.transact(claim, "claim a step", give_up=True)
    if step is None:
        return
    with context.steps.holding(step), bound(**ids(step), worker=context.name):
        _run(context, step)


def _run(context: ProviderContext, step: Step) -> None:
    following: Step | None = step
    try:
        while following is not None and following.state is not State.CLOSED:
            step = following
            following = _take(context, step)
            if step.state is not State.GATHERING:
                context.health.answered(Route.OPENAI)
    except StepReleased:
        context.health.answered(Route.OPENAI)
        return
    except LeaseLost as lost:
        logger.warning("%s", lost)
    except StepDelayed as delayed:
        _release(context, step, delayed.delay_s, delayed.failed, **delayed.columns)
    except ProviderBusy as busy:
        delay = pause_lane(context, Route.OPENAI, busy, tries=step.failures + 1)
        logger.warning("%s: the provider's limit is reached; its lane pauses %.0f s: %s", step.name, delay, busy.brief)
        # The failure is counted to make the next pause longer. No attempt is charged.
        _release(context, step, delay, str(busy))
    except ProviderStopped as stopped:
        stop_lane(context, Route.OPENAI, stopped)
        _release(context, step, context.settings.openai_poll_seconds, str(stopped))
    except Exception as error:
        if is_transient(error):
            raise  # Postgres went away outside a retry. Another worker goes on when the lease ends.
        _fail(context, step, error)


def _take(context: ProviderContext, step: Step) -> Step | None:
    if context.stopping.is_set():
        raise StepDelayed(0.0)
    # Another worker may have paused or stopped the lane since this one claimed the step.
    lane = context.transact(lambda conn: provider_lanes.lane(conn, Route.OPENAI), "look at the lane")
    if lane.paused_until is not None or (lane.is_stopped and step.state.spends):
        raise StepDelayed(0.0)
    with step_of(context, step, expected=(StepDelayed, StepReleased)):
        return _STEPS[step.state](context, step)


def _fail(context: ProviderContext, step: Step, error: Exception) -> None:
    if isinstance(error, ChunkmillError) and error.elsewhere:
        context.unserved.leave(step.space_id, error)
        logger.warning("%s, step %s is left to other workers: %s", step.name, step.state, error)
        _release(context, step, 0.0, None, error=f"{context.name}: {error}")
        return
    delay, reason, times = backoff(step.failures + 1), reason_of(error), step.failures + 1
    enough = SILENT_FAILURES if isinstance(error, ProviderSilent) else EQUAL_FAILURES
    if times >= enough and step.error == reason and step.state.spends:
        stop_lane(context, Route.OPENAI, _fails_equally(step, times, reason))
    elif isinstance(error, ProviderSilent):
        context.health.failed(Route.OPENAI)
        pause_failing_lane(context, Route.OPENAI, error)
    if isinstance(error, ChunkmillError):
        said = error.brief if isinstance(error, ProviderError) else error
        logger.warning("%s, step %s: %s. Again in %.0f s", step.name, step.state, said, delay)
    else:
        logger.error("%s, step %s failed and is tried again in %.0f s", step.name, step.state, delay, exc_info=error)
    _release(context, step, delay, reason)


def _fails_equally(step: Step, times: int, reason: str) -> ProviderStopped:
    return ProviderStopped(
        f"{step.name} failed {times} times in a row at step {step.state}, the last times equally",
        words=reason,
        provider_code="step_failed",
        advice=f"Fix that, or let go of it (chunkmill lanes abandon {step.id}), then: chunkmill lanes resume openai",
    )


def _release(context: ProviderContext, step: Step, delay_s: float, failed: str | None, **columns: object) -> None:
    try:
        context.transact(
            lambda conn: provider_batches.release(conn, step, delay_s=delay_s, failed=failed, **columns),
            "release a step",
        )
    except LeaseLost as lost:
        logger.warning("%s", lost)


def _clean(context: ProviderContext, step: Step) -> Step | None:
    """``cleaning`` → ``closed``: delete the files at the provider. They hold texts and expire only after a month."""
    step = _let_go(context, step)
    files = {step.input_file_id, step.output_file_id, step.error_file_id} - {None}
    try:
        if step.uploads > 1 or (step.uploads and step.input_file_id is None):
            files |= set(context.provider.files_named(file_name(step)))
        for file_id in sorted(file_id for file_id in files if file_id):
            context.provider.delete_file(file_id)
    except (ProviderBusy, ProviderStopped):
        raise
    except ProviderError as error:
        if not isinstance(error, ProviderRefused) and step.failures < CLEAN_TRIES:
            raise
        logger.warning("%s: files are left at the provider until they expire: %s", step.name, error.brief)
    context.transact(lambda conn: provider_batches.close(conn, step), "close")
    return None


def _let_go(context: ProviderContext, step: Step) -> Step:
    """Cancel a batch that was abandoned or given up, and wait until it has ended, to learn the ids of its files.

    What it says is only used to delete them. If it never ends, they are left to the provider.
    """
    if step.batch_id is None or step.provider_status is None or step.provider_status == VANISHED:
        return step
    if read_status(step.provider_status).is_terminal or step.looks >= LAST_LOOKS:
        return step
    try:
        remote = context.provider.retrieve(step.batch_id)
        if not is_ours(remote, step):
            return step
        if not remote.is_terminal and remote.status is not RemoteStatus.CANCELLING:
            remote = context.provider.cancel(step.batch_id)
    except (ProviderSilent, ProviderRefused) as error:
        if isinstance(error, ProviderRefused) and error.status == 404:
            return step
        raise StepDelayed(backoff(step.looks + 1), looks=step.looks + 1) from None
    seen: dict[str, Any] = {"provider_status": remote.status, "looks": step.looks + 1}
    if not remote.is_terminal:
        raise StepDelayed(backoff(step.looks + 1), **seen)
    seen |= {"output_file_id": remote.output_file_id, "error_file_id": remote.error_file_id}
    return context.transact(lambda conn: provider_batches.note(conn, step, **seen), "note its files")


_STEPS: dict[State, Callable[[ProviderContext, Step], Step | None]] = {
    State.GATHERING: gather,
    State.GATHERED: upload,
    State.UPLOADED: create,
    State.CREATING: adopt,
    State.SUBMITTED: poll,
    State.COLLECTING: collect,
    State.CLEANING: _clean,
}
