"""From a gathered ProviderBatch to one that the provider has: upload, create, and what to do when no answer came.

Uploading twice costs nothing. Creating twice costs the whole batch twice, so the intention is committed first, and a
create without an answer is looked for among the provider's batches before another is made (``_adopt``).
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import IO, Any

import sqlalchemy as sa

from chunkmill.domain.spaces import LongText, OnLong
from chunkmill.domain.states import ProviderBatchState as State
from chunkmill.errors import LeaseLost, ProviderBusy, ProviderRefused, ProviderSilent, ProviderStopped
from chunkmill.ledger.provider import provider_batches, provider_inputs, provider_work
from chunkmill.ledger.provider.provider_batches import Step
from chunkmill.ledger.provider.provider_inputs import InFlight
from chunkmill.openai.plan.inputs import ProviderInput, prepare
from chunkmill.openai.wire.jsonl import custom_id, encode_request
from chunkmill.openai.wire.status import RemoteBatch, RemoteStatus
from chunkmill.spaces import registry
from chunkmill.spaces.registry import Space
from chunkmill_workers.provider.context import ProviderContext

logger = logging.getLogger(__name__)

REQUESTS_AT_A_TIME = 64
LOOK_FOR_DOUBLES_S = 600.0
"""So long after it was made a ProviderBatch is looked for a second time: a list may be behind."""
CLOCKS_APART = timedelta(hours=1)
_CANCELLED = (RemoteStatus.CANCELLED, RemoteStatus.CANCELLING)
IN_MEMORY_BYTES = 16 * 1024 * 1024
"""A larger file is spooled to disk, unlinked, until it is uploaded."""


class LimitsChanged(Exception):
    """A text would be cut otherwise than when it was gathered: a limit or the tokenizer is another one since."""


class Waits(Exception):
    """The step is due again after ``delay_s``. ``failed``: what went wrong, None for nothing; ``facts`` for its row."""

    def __init__(self, delay_s: float, failed: str | None = None, **facts: Any) -> None:
        self.delay_s = delay_s
        self.failed = failed
        self.facts = facts
        super().__init__(failed or f"due again in {delay_s:g} s")


class Released(Exception):
    """The step's lease was given back in the transaction that changed it."""


def upload(context: ProviderContext, step: Step) -> Step:
    """``gathered`` → ``uploaded``: the file is made of what is in flight, and sent."""
    if step.cancel_requested:
        return give_back(context, step, "cancelled before it was sent")

    def begin(conn: sa.Connection) -> tuple[Space, Step]:
        provider_inputs.remove_deleted(conn, step.id)
        noted = provider_batches.note(conn, step, uploads=step.uploads + 1, server=context.provider.server)
        return registry.get(conn, step.space_id), noted

    space, step = context.transact(begin, "upload")
    with tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES) as file:
        try:
            n_bytes = _write(context, step, space, file)
        except LimitsChanged:
            return give_back(context, step, "a limit changed since it was gathered")
        if not n_bytes:
            return give_back(context, step, "all its texts were deleted before it was sent")
        file.seek(0)
        try:
            file_id = context.provider.upload(file_name(step, step.uploads), file)
        except ProviderRefused as refused:
            if step.failures + 1 < context.settings.max_attempts:
                raise
            return give_up(context, step, code=refused.provider_code, reason=str(refused))
    logger.info("%s: uploaded %.1f MB as %s", step.name, n_bytes / 1e6, file_id)
    return context.transact(
        lambda conn: provider_batches.advance(conn, step, State.UPLOADED, input_file_id=file_id, n_bytes=n_bytes),
        "upload",
    )


def _write(context: ProviderContext, step: Step, space: Space, file: IO[bytes]) -> int:
    """Write its lines, some requests at a time; returns the bytes. The same rows make the same file."""
    form = context.form(context.model(space), space)
    written = 0
    for inputs, texts in _slices(context, step):
        parts = _windows(context, space, inputs, texts)
        for request_no, members in groupby(inputs, key=lambda each: each.packed.request_no):
            texts_sent = [text for each in members for text in parts[each.content_hash]]
            written += file.write(encode_request(custom_id(step.id, request_no), form, texts_sent))
        if context.stopping.is_set():
            raise Waits(0.0)
    return written


def _slices(context: ProviderContext, step: Step) -> Iterator[tuple[list[InFlight], dict[bytes, str]]]:
    for first in range(0, step.n_requests, REQUESTS_AT_A_TIME):
        with context.begin() as conn:
            inputs = provider_inputs.slice_of(conn, step.id, after=first - 1, limit=REQUESTS_AT_A_TIME)
            texts = provider_inputs.texts(conn, [each.content_hash for each in inputs])
        if len(texts) < len(inputs):
            raise Waits(0.0)  # deleted since a moment ago; the step begins again without them
        yield inputs, texts


def _windows(
    context: ProviderContext, space: Space, inputs: list[InFlight], texts: dict[bytes, str]
) -> dict[bytes, list[str]]:
    """``content_hash → inputs`` as they were packed: cut and split texts are prepared again, the others sent whole."""
    parts = {content_hash: [text] for content_hash, text in texts.items()}
    long = [each for each in inputs if each.packed.truncated or each.packed.weights]
    if long:
        model = context.model(space)
        policy = OnLong.SPLIT if space.spec.long_text is not LongText.TRUNCATE else OnLong.TRUNCATE
        prepared = prepare(
            [(each.content_hash, texts[each.content_hash]) for each in long],
            context.counter(model),
            context.limits(model, space),
            policy,
        )
        for each, item in zip(long, prepared, strict=True):
            if not isinstance(item, ProviderInput) or len(item.windows) != each.packed.windows:
                raise LimitsChanged
            parts[each.content_hash] = [window.text for window in item.windows]
    return parts


def file_name(step: Step, upload: int | None = None) -> str:
    """Known to nobody else, so that an upload without an answer is found by it. Without ``upload`` their prefix."""
    prefix = f"chunkmill-{step.token}-"
    return prefix if upload is None else f"{prefix}{step.id}-{upload}.jsonl"


def create(context: ProviderContext, step: Step) -> Step:
    """``uploaded`` → ``creating`` → ``submitted``. The intention is committed before it is acted on."""
    if step.cancel_requested:
        return give_back(context, step, "cancelled before it was created")

    def intend(conn: sa.Connection) -> Step:
        return provider_batches.advance(
            conn,
            step,
            State.CREATING,
            creates=step.creates + 1,
            creating_since=sa.func.clock_timestamp(),
        )

    return _create(context, context.transact(intend, "create"))


def _create(context: ProviderContext, step: Step) -> Step:
    assert step.input_file_id is not None  # noqa: S101 - a state of the row
    try:
        made = context.provider.create(step.input_file_id, step.token)
    except ProviderSilent as silent:
        # It may exist. The next look adopts it, or makes it when it has not shown up for long enough.
        raise Waits(min(1.0, context.settings.openai_adopt_seconds), str(silent)) from None
    except (ProviderBusy, ProviderStopped):
        # A definite no, and no fault of the work. It holds for the lane, whoever has the step by now.
        with contextlib.suppress(LeaseLost):
            context.transact(lambda conn: provider_batches.advance(conn, step, State.UPLOADED), "not created")
        raise
    except ProviderRefused as refused:
        return _refused(context, step, refused)
    return submitted(context, step, made)


def adopt(context: ProviderContext, step: Step) -> Step:
    """``creating`` after a restart or without an answer: take the batch that exists, or in the end make it anew."""
    assert step.input_file_id is not None  # noqa: S101 - a state of the row
    # One that failed validation was charged nothing, and may be of an earlier create.
    found = [each for each in _find(context, step) if each.status is not RemoteStatus.FAILED]
    if found:
        best = min(found, key=lambda each: each.status in _CANCELLED)  # of equals the oldest
        logger.info("%s: found it at the provider as %s", step.name, best.id)
        return submitted(context, step, best)
    grace = context.settings.openai_adopt_seconds
    if step.creating_for_s < grace:
        raise Waits(min(grace / 4, grace - step.creating_for_s) + 0.01)
    # Nothing of it has shown up: the provider's list has had time enough.
    logger.info("%s: %.0f s after the create nothing of it is at the provider", step.name, step.creating_for_s)
    back = context.transact(
        lambda conn: provider_batches.advance(conn, step, State.UPLOADED, error=None), "create again"
    )
    return create(context, back)


def submitted(context: ProviderContext, step: Step, made: RemoteBatch) -> Step:
    """The provider has it. One that was asked for more than once is looked for again, for it may be there twice."""
    following = context.transact(
        lambda conn: provider_batches.advance(
            conn,
            step,
            State.SUBMITTED,
            batch_id=made.id,
            provider_status=made.status,
            submitted_at=sa.func.now(),
            error_code=None,
            error=None,
        ),
        "submitted",
    )
    logger.info("%s: the provider has it as %s", step.name, made.id)
    return following


def cancel_doubled(context: ProviderContext, step: Step) -> None:
    """Cancel what else the provider made of the same file: a create that was given up and came through after all."""
    if step.submitted_for_s > LOOK_FOR_DOUBLES_S:
        return
    try:
        for other in _find(context, step):
            if other.id == step.batch_id or other.is_terminal or other.status in _CANCELLED:
                continue
            logger.warning("%s: it is at the provider twice; cancelling %s", step.name, other.id)
            context.provider.cancel(other.id)
    except (ProviderSilent, ProviderRefused) as error:
        # The next look tries again; a server that lists nothing must not keep us from the batch we know.
        logger.warning("%s: it could not be looked for a second one: %s", step.name, error.brief)


def _find(context: ProviderContext, step: Step) -> list[RemoteBatch]:
    since = datetime.now(UTC) - timedelta(seconds=step.creating_for_s) - CLOCKS_APART
    return context.provider.find(step.input_file_id or "", step.token, since=since)


def _refused(context: ProviderContext, step: Step, refused: ProviderRefused) -> Step:
    """A definite no: nothing was made. A file that it does not find is uploaded again."""
    gone = refused.status == 404 or "file" in str(refused).lower()
    if step.failures + step.resends >= context.settings.max_attempts:
        return give_up(context, step, code=refused.provider_code, reason=str(refused))
    back = State.GATHERED if gone else State.UPLOADED
    context.transact(
        lambda conn: provider_batches.release(
            conn, provider_batches.advance(conn, step, back, resends=step.resends + 1), delay_s=2.0, error=str(refused)
        ),
        "create refused",
    )
    raise Released


def give_back(context: ProviderContext, step: Step, why: str) -> Step:
    """Uncharged: nothing of it was sent. → ``cleaning``, for a file may be there."""
    logger.info("%s: given back, %s", step.name, why)

    def back(conn: sa.Connection) -> Step:
        provider_inputs.remove_all(conn, step.id)
        cleaning = provider_batches.advance(conn, step, State.CLEANING, error=why)
        provider_work.settle(conn, registry.get(conn, step.space_id), provider_work.members(conn, step.id))
        return cleaning

    return context.transact(back, "give back")


def give_up(context: ProviderContext, step: Step, *, code: str, reason: str) -> Step:
    """Its ChunkBatches fail for good with the reason; ``retry`` takes them up again."""
    logger.error("%s: given up, %s; the ledger has the provider's words", step.name, code)

    def back(conn: sa.Connection) -> Step:
        provider_inputs.remove_all(conn, step.id)
        cleaning = provider_batches.advance(conn, step, State.CLEANING, error_code=code, error=reason[:2000])
        provider_work.discard(conn, provider_work.members(conn, step.id), code=code, reason=f"{step.name}: {reason}")
        return cleaning

    return context.transact(back, "give up")
