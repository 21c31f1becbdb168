"""Sends a gathered ProviderBatch to the provider: upload, create, and what to do when no answer came.

Uploading twice costs nothing. Creating twice costs the whole batch twice. So the intention to create is committed
first, and if a create gets no answer, ``adopt`` searches the provider's list of batches before it creates another.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import IO

import sqlalchemy as sa

from chunkmill.domain.spaces import LongText, OnLong
from chunkmill.domain.states import ProviderBatchState as State
from chunkmill.errors import LeaseLost, ProviderBusy, ProviderError, ProviderRefused, ProviderSilent, ProviderStopped
from chunkmill.ledger.provider import provider_batches, provider_inputs
from chunkmill.ledger.provider.provider_batches import Step
from chunkmill.ledger.provider.provider_inputs import InFlight
from chunkmill.openai.plan.endings import Split
from chunkmill.openai.plan.inputs import ProviderInput, prepare
from chunkmill.openai.wire.jsonl import custom_id, encode_request
from chunkmill.openai.wire.status import RemoteBatch, RemoteStatus
from chunkmill.spaces import registry
from chunkmill.spaces.registry import Space
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.endings import book_doubled, give_back, give_up, repack, require_own_key
from chunkmill_workers.provider.flow import StepDelayed, StepReleased
from chunkmill_workers.provider.probe import try_answer
from chunkmill_workers.provider.quota import names_quota, refused_by_quota, too_many_tokens

logger = logging.getLogger(__name__)

REQUESTS_AT_A_TIME = 64
UNKNOWN_FOR_S = 3600.0
"""How many seconds the provider's list may fail while we look for a batch whose creation got no answer."""
LOOK_FOR_DOUBLES_S = 600.0
"""For how long after its creation a ProviderBatch is searched for duplicates: the provider's list may be behind."""
CLOCKS_APART = timedelta(hours=1)
"""By how much the provider's clock may differ from ours."""
_CANCELLED = (RemoteStatus.CANCELLED, RemoteStatus.CANCELLING)
IN_MEMORY_BYTES = 16 * 1024 * 1024
"""A larger file is kept in an unlinked file on disk until it is uploaded."""


class LimitsChanged(Exception):
    """A text would be truncated or split differently now than when it was gathered, because a limit or the tokenizer
    has changed.
    """


def upload(context: ProviderContext, step: Step) -> Step:
    """``gathered`` → ``uploaded``: make the file from the contents in flight, and upload it."""
    if step.cancel_requested:
        return give_back(context, step, "cancelled before it was sent")
    if too_many_tokens(context, step):
        return give_back(context, step, "the limit of tokens at the provider is lower than when it was gathered")

    def begin(conn: sa.Connection) -> tuple[Space, Step]:
        provider_inputs.remove_deleted(conn, step.id)
        server, key = context.provider.server, context.provider.key_digest
        noted = provider_batches.note(conn, step, uploads=step.uploads + 1, server=server, key_digest=key)
        return registry.get(conn, step.space_id), noted

    space, step = context.transact(begin, "upload")
    try_answer(context, space)
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
            if step.n_inputs > 1 and (refused.status == 413 or "too large" in str(refused).lower()):
                smaller = Split(-(-step.n_inputs // 2), str(refused))
                return context.transact(lambda conn: repack(conn, step, smaller), "too large")
            if step.failures + 1 < context.settings.max_attempts:
                raise
            return give_up(context, step, code=refused.provider_code, reason=str(refused))
    logger.info("%s: uploaded %.1f MB as %s", step.name, n_bytes / 1e6, file_id)
    return context.transact(
        lambda conn: provider_batches.advance(conn, step, State.UPLOADED, input_file_id=file_id, n_bytes=n_bytes),
        "upload",
    )


def _write(context: ProviderContext, step: Step, space: Space, file: IO[bytes]) -> int:
    """Write the file, some requests at a time, and return its bytes. The same rows always make the same file."""
    form = context.form(context.model(space), space)
    written = 0
    for inputs, texts in _slices(context, step):
        parts = _windows(context, space, inputs, texts)
        for request_no, members in groupby(inputs, key=lambda row: row.packed.request_no):
            texts_sent = [text for row in members for text in parts[row.content_hash]]
            written += file.write(encode_request(custom_id(step.id, request_no), form, texts_sent))
        if context.stopping.is_set():
            raise StepDelayed(0.0)
    return written


def _slices(context: ProviderContext, step: Step) -> Iterator[tuple[list[InFlight], dict[bytes, str]]]:
    """The contents in flight and their texts, ``REQUESTS_AT_A_TIME`` requests at a time."""
    for first in range(0, step.n_requests, REQUESTS_AT_A_TIME):
        with context.begin() as conn:
            inputs = provider_inputs.slice_of(conn, step.id, after=first - 1, limit=REQUESTS_AT_A_TIME)
            texts = provider_inputs.texts(conn, [row.content_hash for row in inputs])
        if len(texts) < len(inputs):
            raise StepDelayed(0.0)  # a text was deleted just now, so the step starts again without it
        yield inputs, texts


def _windows(
    context: ProviderContext, space: Space, inputs: list[InFlight], texts: dict[bytes, str]
) -> dict[bytes, list[str]]:
    """``content_hash → inputs`` as packed. Truncated and split texts are prepared again; all others are sent whole."""
    parts = {content_hash: [text] for content_hash, text in texts.items()}
    long = [row for row in inputs if row.packed.truncated or row.packed.weights]
    if long:
        model = context.model(space)
        policy = OnLong.SPLIT if space.spec.long_text is not LongText.TRUNCATE else OnLong.TRUNCATE
        prepared = prepare(
            [(row.content_hash, texts[row.content_hash]) for row in long],
            context.counter(model),
            context.limits(model, space),
            policy,
        )
        for row, item in zip(long, prepared, strict=True):
            if not isinstance(item, ProviderInput) or len(item.windows) != row.packed.windows:
                raise LimitsChanged
            parts[row.content_hash] = [window.text for window in item.windows]
    return parts


def file_name(step: Step, upload: int | None = None) -> str:
    """A name that nobody else uses, by which an upload without an answer is found. Without ``upload``, its prefix."""
    prefix = f"chunkmill-{step.token}-"
    return prefix if upload is None else f"{prefix}{step.id}-{upload}.jsonl"


def create(context: ProviderContext, step: Step) -> Step:
    """``uploaded`` → ``creating`` → ``submitted``: commit the intention, then create the batch."""
    if step.cancel_requested:
        return give_back(context, step, "cancelled before it was created")
    if too_many_tokens(context, step):
        return give_back(context, step, "the limit of tokens at the provider is lower than when it was gathered")

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
        # The batch may exist. `adopt` finds it, or creates it if it does not appear in the list for long enough.
        raise StepDelayed(min(1.0, context.settings.openai_adopt_seconds), str(silent)) from None
    except (ProviderBusy, ProviderStopped) as none_made:
        if isinstance(none_made, ProviderBusy) and names_quota(str(none_made)):
            return refused_by_quota(context, step, none_made)
        # Nothing was created, and the contents are not the reason. The lane must learn of it even if the lease is lost.
        with contextlib.suppress(LeaseLost):
            context.transact(lambda conn: provider_batches.advance(conn, step, State.UPLOADED), "not created")
        raise
    except ProviderRefused as refused:
        return _refused(context, step, refused)
    return submitted(context, step, made)


def adopt(context: ProviderContext, step: Step) -> Step:
    """``creating`` after a restart or without an answer: take the batch that exists, or finally create it again.

    A restored backup knows no file of a batch that was uploaded later (``chunkmill.ledger.restored``). Then the batch
    is known by its token alone, and if there is none, the file is made.
    """
    grace = context.settings.openai_adopt_seconds
    # A batch that failed validation was not charged, and may come from an earlier create.
    try:
        listed = _find(context, step)
    except (ProviderRefused, ProviderSilent) as error:
        if step.creating_for_s < (grace if isinstance(error, ProviderRefused) else max(grace, UNKNOWN_FOR_S)):
            raise
        raise _unknown(step, error) from None
    existing = [remote for remote in listed if remote.status is not RemoteStatus.FAILED or remote.may_have_run]
    if existing:
        best = min(existing, key=_promises_least)  # the oldest of equals
        logger.info("%s: found it at the provider as %s", step.name, best.id)
        return submitted(context, step, best)
    if step.creating_for_s < grace:
        raise StepDelayed(min(grace / 4, grace - step.creating_for_s) + 0.01)
    require_own_key(context, step, "a batch that it may have created without an answer")
    logger.info("%s: %.0f s after its creation the provider does not list it", step.name, step.creating_for_s)
    if step.input_file_id is None:
        return context.transact(
            lambda conn: provider_batches.advance(conn, step, State.GATHERED, error=None), "upload after all"
        )
    back = context.transact(
        lambda conn: provider_batches.advance(conn, step, State.UPLOADED, error=None), "create again"
    )
    return create(context, back)


def _promises_least(remote: RemoteBatch) -> int:
    return 2 if remote.status is RemoteStatus.FAILED else int(remote.status in _CANCELLED)


def _unknown(step: Step, error: ProviderError) -> ProviderStopped:
    """What stops the lane if a create got no answer and the list of batches cannot say whether there is a batch."""
    return ProviderStopped(
        f"the create of {step.name} got no answer, and the provider's list cannot say whether there is a batch "
        f"({error.brief})",
        provider_code="create_unknown",
        advice=f"Look for a batch of file {step.input_file_id} on the provider's page and cancel it. Let go of ours, "
        f"which books it as maybe charged (chunkmill lanes abandon {step.id}), and: chunkmill lanes resume openai",
    )


def submitted(context: ProviderContext, step: Step, made: RemoteBatch) -> Step:
    """``creating`` → ``submitted``: note the batch that the provider has. ``cancel_doubled`` looks for a second one."""

    def note(conn: sa.Connection) -> Step:
        return provider_batches.advance(
            conn,
            step,
            State.SUBMITTED,
            batch_id=made.id,
            provider_status=made.status,
            submitted_at=sa.func.now(),
            error_code=None,
        )

    try:
        following = context.transact(note, "submitted")
    except sa.exc.IntegrityError:
        raise _given_twice(context, made) from None
    logger.info("%s: the provider has it as %s", step.name, made.id)
    return following


def _given_twice(context: ProviderContext, made: RemoteBatch) -> ProviderError:
    server = context.provider.server
    with context.begin() as conn:
        other = provider_batches.followed_as(conn, server, made.id)
    return ProviderSilent(
        f"{server} gave the id {made.id} to a new batch, and ProviderBatch {other} is followed under that id. "
        f"This happens if a server counts from the beginning after a restart. ProviderBatch {other} is given up when "
        f"it is not found any more, or by: chunkmill lanes abandon {other}"
    )


def cancel_doubled(context: ProviderContext, step: Step) -> None:
    """Cancel any other batch of the same file: a create without an answer may have succeeded late.

    One that has run already is booked as lost.
    """
    if step.submitted_for_s > LOOK_FOR_DOUBLES_S:
        return
    try:
        for other in _find(context, step):
            if other.id == step.batch_id:
                continue
            if other.is_terminal:
                book_doubled(context, step, other)
            if other.is_terminal or other.status in _CANCELLED:
                continue
            logger.warning("%s: it is at the provider twice; cancelling %s", step.name, other.id)
            context.provider.cancel(other.id)
    except (ProviderSilent, ProviderRefused) as error:
        # The next poll tries again. A server that cannot list its batches must not hide the batch that we know.
        logger.warning("%s: the provider's list could not be searched for a duplicate: %s", step.name, error.brief)


def _find(context: ProviderContext, step: Step) -> list[RemoteBatch]:
    since = datetime.now(UTC) - timedelta(seconds=step.creating_for_s) - CLOCKS_APART
    return context.provider.find(step.input_file_id or "", step.token, since=since)


def _refused(context: ProviderContext, step: Step, refused: ProviderRefused) -> Step:
    """Release the step to create the batch again, as none was created. A file that is not found is uploaded again."""
    gone = refused.status == 404 or "file" in str(refused).lower()
    if gone and step.key_digest != context.provider.key_digest:
        # The file was uploaded with another project's key. It costs nothing to upload it again, with this one.
        return context.transact(lambda conn: provider_batches.advance(conn, step, State.GATHERED), "create refused")
    if step.failures + step.resends >= context.settings.max_attempts:
        return give_up(context, step, code=refused.provider_code, reason=str(refused))
    back = State.GATHERED if gone else State.UPLOADED
    context.transact(
        lambda conn: provider_batches.release(
            conn, provider_batches.advance(conn, step, back, resends=step.resends + 1), delay_s=2.0, error=str(refused)
        ),
        "create refused",
    )
    raise StepReleased
