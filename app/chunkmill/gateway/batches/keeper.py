"""Brings served batches from state to state, in a thread of each gateway.

Any gateway takes the next step of any batch. A step that ends early, because its gateway was killed or Postgres was
away, is taken again from its start once its lease is over: every step may run twice. The lines are written anew, the
job is found by its key, and the last transaction of a step names its attempt.

=============== ===================================================================================================
state           step
=============== ===================================================================================================
``validating``  judges the file line by line, enqueues its texts as a job, and is ``in_progress``, or ``failed``
``in_progress`` has nothing to do until the job has ended or the completion window is over; then ``finalizing``
``finalizing``  judges each line by its vectors and dead chunks, and is ``completed`` or ``expired``
``cancelling``  cancels the job, judges the lines, and is ``cancelled``
=============== ===================================================================================================
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from typing import Any, Final, TypeVar

import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.client.hidden import HiddenJobs
from chunkmill.db.retry import is_transient
from chunkmill.domain.reasons import reason_of
from chunkmill.domain.served import ServedState
from chunkmill.domain.states import JobState
from chunkmill.errors import (
    BudgetExceeded,
    InvalidInput,
    LeaseLost,
    NotFound,
    StoreUnavailable,
)
from chunkmill.gateway.batches import results
from chunkmill.gateway.batches.lines import MOST_ERRORS, FileError, FileModel, LineReader, split_lines, texts_of
from chunkmill.gateway.batches.recovery import JobRecovery
from chunkmill.gateway.caller import Caller
from chunkmill.gateway.errors import Refusal
from chunkmill.gateway.models import Models, ServedModel
from chunkmill.ledger.access import spends
from chunkmill.ledger.served import batches, files, lines
from chunkmill.ledger.served.batches import Result, ServedBatch
from chunkmill.ledger.served.lines import NEVER_EXECUTED, NO_INPUTS, OK, DeadInput, Inputs, Line
from chunkmill.settings import Settings
from chunkmill.spaces import hidden

logger = logging.getLogger(__name__)

T = TypeVar("T")

SLICE_LINES: Final = 2_000
"""Lines that one transaction writes."""
HOLD_SECONDS: Final = 2.0
"""How long a validation reads before it renews its lease, also if it has few lines to write."""
PAUSE_SECONDS: Final = 5.0
"""How long a batch rests whose step failed for a reason that may pass."""
MODEL_SECONDS: Final = 60.0
"""How long a look for a model may take, which reads a folder."""

EXPIRED: Final = ("batch_expired", "This request could not be executed before the completion window expired.")
CANCELLED: Final = ("batch_cancelled", "This request was not executed, because the batch was cancelled before.")
FAULTS_OF_OURS: Final = re.compile(
    "kills_workers|damaged_text|vectors_missing|not_finite|out_of_range"
    # On the paid routes: nothing usable came back, or the provider's server failed.
    "|no_answer|bad_vector|other_model|server_error|http_(408|409|424|425|5[0-9]{2})"
)
"""Codes of dead chunks whose text is not to blame. Those of any other code are refused with the status 400."""


class BatchKeeper:
    """``loop`` is the gateway's event loop, in which models are looked up."""

    def __init__(self, db: sa.Engine, settings: Settings, models: Models, loop: asyncio.AbstractEventLoop) -> None:
        self._db = db
        self._settings = settings
        self._models = models
        self._loop = loop
        self._broker = Broker.connect(settings)
        self._jobs = HiddenJobs(db, self._broker, settings)
        self._stopping = threading.Event()
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._run, name="served batches", daemon=True)
        self._said: str | None = None
        self._waits: dict[int, str] = {}
        """Why the last step of a batch, by its id, did not work, although it may work later."""
        self._recovery = JobRecovery(db, self._broker, settings)

    def start(self) -> None:
        self._thread.start()
        self._recovery.start()

    def wake(self) -> None:
        """There is something to do."""
        self._woken.set()

    def stop(self) -> None:
        """End after the slice in hand. What is left is done by another gateway, or by the next one."""
        self._stopping.set()
        self._woken.set()
        self._thread.join()
        self._recovery.stop()
        self._broker.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._woken.clear()
            try:
                is_busy = self.take_step()
            except Exception as error:  # noqa: BLE001 - without this thread no batch goes on
                is_busy = False
                self._say(f"the batches cannot be looked at: {reason_of(error)}", error)
            else:
                self._said = None
            if not is_busy:
                self._woken.wait(self._settings.poll_interval)

    def take_step(self) -> bool:
        """Take the step of one batch. False if nothing is due."""
        with self._db.begin() as conn:
            batch = batches.claim_due(conn)
        if batch is None:
            return False
        try:
            self._step(batch)
        except LeaseLost:
            logger.info("batch %s: it is cancelled, or another gateway has it", batch.name)
        except _Stopped:
            self._leave(batch, 0.0)
        except Exception as error:
            self._leave(batch, 0.0 if self._stopping.is_set() else PAUSE_SECONDS)
            if not isinstance(error, StoreUnavailable) and not is_transient(error):
                logger.exception("batch %s: its step failed and is tried again", batch.name)
            elif self._waits.get(batch.id) != (reason := reason_of(error)):
                # It is said once for each reason, however often the step is tried.
                self._waits[batch.id] = reason
                logger.warning(
                    "batch %s waits, and its step is tried again every %g seconds until it works: %s",
                    batch.name, PAUSE_SECONDS, reason,
                )  # fmt: skip
            return True
        self._waits.pop(batch.id, None)
        return True

    def _leave(self, batch: ServedBatch, pause: float) -> None:
        try:
            with self._db.begin() as conn:
                batches.release(conn, batch, pause_seconds=pause)
        except sa.exc.SQLAlchemyError as error:
            self._say(f"batch {batch.name} waits for the end of its lease: {reason_of(error)}", error)

    def _say(self, said: str, error: Exception) -> None:
        if self._said != said:
            logger.error("%s", said, exc_info=None if isinstance(error, sa.exc.SQLAlchemyError) else error)
        self._said = said

    def _step(self, batch: ServedBatch) -> None:
        steps = {
            ServedState.VALIDATING: self._validate,
            ServedState.IN_PROGRESS: self._close,
            ServedState.FINALIZING: self._finalize,
            ServedState.CANCELLING: self._cancel,
        }
        steps[batch.state](batch)

    # --- validating ---------------------------------------------------------------------------------------------

    def _validate(self, batch: ServedBatch) -> None:
        try:
            file_id = self._input_file(batch)
            try:
                model, size, refused = self._read_file(batch, file_id)
                with spends.paid_by(batch.key_id):
                    job_id = self._enqueue(batch, file_id, model, size, refused)
            except NotFound:
                self._require_held(batch)  # a cancel drops the collection
                raise _no_file(batch) from None
        except FileError as error:
            self._fail(batch, [error])
        except _FileErrors as error:
            self._fail(batch, error.errors)
        except (InvalidInput, BudgetExceeded) as error:
            self._fail(batch, [FileError(error.code, str(error))])
        else:
            with self._db.begin() as conn:
                batches.hold(conn, batch)
                n_total, n_failed = lines.totals(conn, batch.id)
                batches.start(conn, batch, job_id=job_id, n_total=n_total, n_failed=n_failed)

    def _input_file(self, batch: ServedBatch) -> int:
        if batch.is_expired:
            raise FileError("batch_expired", "The completion window ended before the file was validated.")
        with self._db.begin() as conn:
            file = files.find(conn, batch.tenant, batch.input_file)
        if file is None:
            raise _no_file(batch)
        return file.id

    def _read_file(self, batch: ServedBatch, file_id: int) -> tuple[ServedModel, int | None, frozenset[int]]:
        """Write down the lines of the file. Returns its model, the dimensions to ask for, and the refused lines.

        Raises :class:`_FileErrors`, and :class:`NotFound` if the file is deleted.
        """
        models = _ModelOfFile(self, batch)
        reader = LineReader(
            batch.asked.endpoint,
            self._settings.gateway_token_ids,
            open_model=models.open,
            check_dimensions=models.check,
        )
        with self._db.begin() as conn:
            batches.hold(conn, batch)
            lines.forget(conn, batch.id)
        errors: list[FileError] = []
        waiting: list[Line] = []
        refused = set()
        held_at = time.monotonic()
        try:
            for number, data in enumerate(split_lines(files.read_pieces(self._db, file_id))):
                try:
                    line = reader.read(number, data)
                except FileError as error:
                    errors.append(error)
                    if error.code in ("too_many_tasks", "model_not_found") or len(errors) == MOST_ERRORS:
                        break
                    continue
                if line.status is not None:
                    refused.add(number)
                if not errors:
                    waiting.append(line)
                if len(waiting) == SLICE_LINES or time.monotonic() - held_at > HOLD_SECONDS:
                    self._write(batch, waiting)
                    waiting, held_at = [], time.monotonic()
        except FileError as error:  # a line that is too long ends the reading
            errors.append(error)
        if errors:
            raise _FileErrors(errors)
        self._write(batch, waiting)
        if models.model is None:
            raise FileError("empty_file", "The input file is empty.")
        return models.model, models.size, frozenset(refused)

    def _write(self, batch: ServedBatch, waiting: list[Line]) -> None:
        self._go_on()
        with self._db.begin() as conn:
            batches.hold(conn, batch)
            lines.add(conn, batch.id, waiting)

    def _enqueue(
        self, batch: ServedBatch, file_id: int, model: ServedModel, size: int | None, refused: frozenset[int]
    ) -> int:
        spec = model.spec if size is None else self._jobs.spec_of(model.target, size)
        with self._db.begin() as conn:
            space = self._jobs.register(conn, spec)
            batches.hold(conn, batch)
            batches.set_model(conn, batch, model.name)
            hidden.create(conn, batch.name, space)
        texts = texts_of(
            split_lines(files.read_pieces(self._db, file_id)), self._settings.gateway_token_ids, refused=refused
        )
        job_id = self._jobs.enqueue_hidden(
            self._held(batch, texts),
            collection=batch.name,
            spec=spec,
            route=batch.asked.route,
            priority=batch.asked.priority,
            deadline=batch.expires_at,
            idempotency_key=batch.job_key,
            on_window=lambda: self._require_held(batch),
        )
        with self._db.begin() as conn:
            if batches.is_being_enqueued(conn, job_id):
                raise StoreUnavailable(f"another gateway has not yet noticed that it lost batch {batch.name}.")
        return job_id

    def _held(self, batch: ServedBatch, texts: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """The texts. The lease is renewed while they are read, because a window of long lines may take a while."""
        held_at = time.monotonic()
        for text in texts:
            if time.monotonic() - held_at > HOLD_SECONDS:
                self._require_held(batch)
                held_at = time.monotonic()
            yield text

    def _fail(self, batch: ServedBatch, errors: list[FileError]) -> None:
        with self._db.begin() as conn:
            batches.hold(conn, batch)
            hidden.drop(conn, batch.name)
            lines.forget(conn, batch.id)
            batches.end(conn, batch, ServedState.FAILED, Result(), errors=[error.as_json() for error in errors])

    # --- the end ------------------------------------------------------------------------------------------------

    def _close(self, batch: ServedBatch) -> None:
        """The job has ended, or the window is over."""
        state = self._job_state(batch)
        if state is JobState.CANCELLED and not batch.is_expired:
            # Somebody has cancelled the job itself.
            with self._db.begin() as conn:
                batches.hold(conn, batch)
                batches.cancel_if_open(conn, batch.id)
            return
        if state is not None and not state.is_final and batch.job_id is not None:
            self._jobs.cancel(batch.job_id)
        with self._db.begin() as conn:
            batches.hold(conn, batch)
            batches.finalize(conn, batch)

    def _finalize(self, batch: ServedBatch) -> None:
        is_expired = self._job_state(batch) is JobState.CANCELLED
        result = self._judge(batch, batch.job_id, EXPIRED if is_expired else None)
        with self._db.begin() as conn:
            batches.hold(conn, batch)
            batches.end(conn, batch, ServedState.EXPIRED if is_expired else ServedState.COMPLETED, result)

    def _cancel(self, batch: ServedBatch) -> None:
        with self._db.begin() as conn:
            batches.hold(conn, batch)
            # A validation that was interrupted may be about to open the job, which needs this row.
            hidden.lock(conn, batch.name)
            job_id = batches.job_of_key(conn, batch.job_key)
            if job_id is None:
                hidden.drop(conn, batch.name)
                lines.forget(conn, batch.id)
                batches.end(conn, batch, ServedState.CANCELLED, Result())
                return
        self._jobs.cancel(job_id)
        result = self._judge(batch, job_id, CANCELLED)
        with self._db.begin() as conn:
            batches.hold(conn, batch)
            batches.end(conn, batch, ServedState.CANCELLED, result)

    def _job_state(self, batch: ServedBatch) -> JobState | None:
        with self._db.begin() as conn:
            query = "SELECT state FROM jobs WHERE id = :id"
            state = conn.execute(sa.text(query), {"id": batch.job_id}).scalar_one_or_none()
        return None if state is None else JobState(state)

    def _judge(self, batch: ServedBatch, job_id: int | None, never: tuple[str, str] | None) -> Result:
        """Write down how each line ended, and count. ``never`` is said of lines that were not executed."""
        result, after = Result(), -1
        while True:
            self._go_on()
            with self._db.begin() as conn:
                batches.hold(conn, batch)
                of_slice = lines.read(conn, batch.id, after=after)
                if not of_slice:
                    return result
                space, collection_id = results.place_of(conn, batch)
                inputs = lines.read_inputs(conn, space, collection_id, of_slice)
                dead = {} if job_id is None else lines.read_dead(conn, job_id, of_slice)
                judged = [
                    judge(line, inputs.get(line.line, NO_INPUTS), dead.get(line.line), never) for line in of_slice
                ]
                lines.set_outcomes(conn, batch.id, judged)
            result = _counted(batch, result, judged, inputs)
            after = of_slice[-1].line

    # --- what the steps share -----------------------------------------------------------------------------------

    def look_up(self, question: Coroutine[Any, Any, T]) -> T:
        """What a coroutine of ``Models`` returns. Raises :class:`Refusal`."""
        return asyncio.run_coroutine_threadsafe(question, self._loop).result(MODEL_SECONDS)

    @property
    def models(self) -> Models:
        return self._models

    def _require_held(self, batch: ServedBatch) -> None:
        self._go_on()
        with self._db.begin() as conn:
            batches.hold(conn, batch)

    def _go_on(self) -> None:
        if self._stopping.is_set():
            raise _Stopped


class _Stopped(Exception):
    """The gateway is shutting down."""


class _FileErrors(Exception):
    def __init__(self, errors: list[FileError]) -> None:
        super().__init__()
        self.errors = errors


class _ModelOfFile:
    """The model of a file, and the least dimensions from which the vectors of every line can be cut."""

    def __init__(self, keeper: BatchKeeper, batch: ServedBatch) -> None:
        self.model: ServedModel | None = None
        self.size: int | None = None
        """How many dimensions to ask for; None for the model's usual number."""
        self._keeper = keeper
        self._caller = Caller(None, "", batch.tenant, frozenset(), models=batch.models)
        self._checked: set[int] = set()

    def open(self, name: str) -> FileModel:
        try:
            self.model = self._keeper.look_up(self._keeper.models.find(name, self._caller))
        except Refusal as refusal:
            raise FileError("model_not_found", refusal.message, 1, "body.model") from None
        return FileModel(self.model.spec.dimensions, self.model.spec.normalize)

    def check(self, wanted: int) -> None:
        assert self.model is not None, "opened by the first line"  # noqa: S101
        if wanted not in self._checked:
            size = self._keeper.look_up(self._keeper.models.dimensions_to_ask(self.model, wanted))
            self._checked.add(wanted)
            if size is not None:
                self.size = max(size, self.size or 0)


def judge(line: Line, inputs: Inputs, dead: DeadInput | None, never: tuple[str, str] | None) -> Line:
    """The line with its end. ``dead`` is the first of its inputs that is on the job's dead list."""
    if not line.n_inputs:
        return line  # it was refused when the file was validated
    if len(inputs.positions) == line.n_inputs:
        if line.refuses_long and inputs.truncated:
            return replace(
                line,
                status=400,
                code="context_length_exceeded",
                message="the text has more tokens than the model reads, and 'truncate' is false. Shorten it.",
                param=f"input[{inputs.truncated[0]}]",
            )
        return replace(line, status=OK, code=None, message=None, param=None)
    if dead is not None:
        status = 500 if FAULTS_OF_OURS.fullmatch(dead.code) else 400
        return replace(line, status=status, code=dead.code, message=dead.reason, param=f"input[{dead.position}]")
    if never is not None:
        return replace(line, status=NEVER_EXECUTED, code=never[0], message=never[1], param=None)
    message = "The request could not be executed, although it was tried several times. Send it again."
    return replace(line, status=500, code="server_error", message=message, param=None)


def _counted(batch: ServedBatch, result: Result, judged: list[Line], inputs: dict[int, Inputs]) -> Result:
    answered = [line for line in judged if line.status == OK]
    return Result(
        n_total=result.n_total + len(judged),
        n_completed=result.n_completed + len(answered),
        n_failed=result.n_failed + len(judged) - len(answered),
        n_tokens=result.n_tokens + sum(sum(inputs[line.line].n_tokens) for line in answered),
        output_bytes=result.output_bytes
        + sum(len(results.output_line(batch, line, inputs[line.line])) for line in answered),
        error_bytes=result.error_bytes
        + sum(len(results.error_line(batch, line)) for line in judged if line.status != OK),
    )


def _no_file(batch: ServedBatch) -> FileError:
    message = f"Cannot find file {batch.input_file}, or tenant {batch.tenant} does not have access to it."
    return FileError("invalid_request", message, param="file_id")
