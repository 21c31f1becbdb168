"""Collects a ProviderBatch's results: reads both files, writes the vectors, and accounts for every content.

A request's contents leave flight in the transaction that writes its vectors and books its charge. So reading a file
twice changes nothing, and the contents that are still in flight at the end are those that no line has answered.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import sqlalchemy as sa

from chunkmill.domain.states import ProviderBatchState as State
from chunkmill.domain.states import Route
from chunkmill.errors import ProviderRefused, ProviderSilent
from chunkmill.ledger.money import charges
from chunkmill.ledger.provider import provider_batches, provider_inputs, provider_lanes, provider_work
from chunkmill.ledger.provider.answering import OTHER_MODEL, refuse_model
from chunkmill.ledger.provider.provider_batches import Step
from chunkmill.ledger.provider.provider_endings import settle
from chunkmill.ledger.provider.provider_inputs import InFlight
from chunkmill.ledger.work import usage
from chunkmill.openai.plan.assemble import assemble
from chunkmill.openai.plan.endings import (
    BuryContent,
    RetryCharged,
    RetryUncharged,
    SendAlone,
    StopLane,
    after_line_error,
)
from chunkmill.openai.wire.answers import EmbeddedRequest, longest_file
from chunkmill.openai.wire.jsonl import RefusedRequest, UnreadableLine, decode_line
from chunkmill.openai.wire.status import RemoteStatus
from chunkmill.spaces import registry
from chunkmill.telemetry import metrics
from chunkmill.telemetry.counts import COUNTS
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.endings import VANISHED, book_unanswered, require_own_key
from chunkmill_workers.provider.flow import StepDelayed, StepReleased
from chunkmill_workers.provider.oddities import tokens_factor
from chunkmill_workers.provider.writing import write

K = TypeVar("K")

logger = logging.getLogger(__name__)

FLUSH_BYTES = 8 * 1024 * 1024
"""How many bytes of result lines are read before their vectors are committed."""
DOWNLOADS = 6
"""How often a file that is not whole is read again, which takes some minutes. Contents that are still unanswered then
were paid for and lost, and are sent again."""
SILENT_DOWNLOADS = 30
"""How often it is read again if the provider does not answer or breaks off. That takes some hours, so that an outage
does not cost money."""


@dataclass(slots=True)
class _Pending:
    """The answers that are read and not yet committed, at most one for each request."""

    embedded: dict[int, EmbeddedRequest] = field(default_factory=dict)
    refused: dict[int, RefusedRequest] = field(default_factory=dict)
    bytes: int = 0


class ResultReader:
    """Reads a ProviderBatch's files once and commits their answers."""

    def __init__(self, context: ProviderContext, step: Step) -> None:
        self._context = context
        self._step = step
        with context.begin() as conn:
            self._space = registry.get(conn, step.space_id)
            self._sent = provider_inputs.sent(conn, step.id)
        self.model = self._model = context.model(self._space)
        # The file also has the lines of requests that an earlier reading has committed.
        widest = max([context.settings.openai_request_inputs, *(sent.inputs for sent in self._sent.values())])
        self._longest = longest_file(step.n_requests, step.n_inputs, widest, self._model.dimensions)
        self._pending = _Pending()
        self._answered: set[int] = set()
        self._of_another_model: set[int] = set()
        self.oddities: Counter[str] = Counter()
        """How many lines of the files are not as they should be, by kind."""

    def read(self, file_id: str) -> None:
        """Read a file to its end. Raises ProviderError; what was read before stays committed."""
        with self._context.provider.lines(file_id, self._longest) as lines:
            for line in lines:
                self._take(line)
                if self._pending.bytes >= FLUSH_BYTES:
                    self.flush()
                if self._context.stopping.is_set():
                    self.flush()
                    raise StepDelayed(0.0)
        self.flush()

    @property
    def unanswered(self) -> int:
        """How many requests no line has answered."""
        return len(self._sent.keys() - self._answered)

    def _take(self, line: bytes) -> None:
        spec = self._space.spec
        answer = decode_line(
            line,
            batch_id=self._step.id,
            sent=self._sent.get,
            dimensions=spec.dimensions,
            normalize=spec.normalize,
            tokens_factor=tokens_factor(self._model),
            secrets=self._context.provider.secrets,
        )
        if isinstance(answer, UnreadableLine):
            if not self._was_answered_before(answer.request_no):
                self.oddities[answer.code] += 1
        elif answer.request_no in self._answered:
            self.oddities["duplicate"] += 1
        else:
            self._answered.add(answer.request_no)
            if isinstance(answer, EmbeddedRequest):
                self.oddities.update(answer.oddities)
                self._context.oddities.compare(self._model, answer, self._sent[answer.request_no].tokens)
                self._pending.embedded[answer.request_no] = answer
            else:
                self._pending.refused[answer.request_no] = answer
            self._pending.bytes += len(line)

    def _was_answered_before(self, request_no: int | None) -> bool:
        """Whether an earlier reading has committed this request: its contents are not in flight any more."""
        return request_no is not None and request_no < self._step.n_requests and request_no not in self._sent

    def flush(self) -> None:
        """Commit the answers that were read since the last commit."""
        pending, self._pending = self._pending, _Pending()
        if not pending.embedded and not pending.refused:
            return
        self._step, new, tokens = self._context.transact(lambda conn: self._commit(conn, pending), "collect")
        COUNTS.add_all(((metrics.CONTENTS, new), (metrics.TOKENS, tokens)))

    def _commit(self, conn: sa.Connection, pending: _Pending) -> tuple[Step, int, int]:
        """Returns the step as it is now, how many vectors are new, and how many tokens were charged."""
        step, space = self._step, self._space
        sent = provider_inputs.of_requests(conn, step.id, [*pending.embedded, *pending.refused])
        written: list[InFlight] = []
        vectors: list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = []
        returned = _ReturnedContents()
        answered = _AnsweredCounts()
        refusals = {
            name: refuse_model(conn, space.id, asked=self._model.name, answered=name)
            for name in dict.fromkeys(answer.model for answer in pending.embedded.values())
        }
        for number, answer in pending.embedded.items():
            rows = sent.get(number, [])
            if (refusal := refusals[answer.model]) is not None:
                answered.add(rows, answer.prompt_tokens)
                returned.refuse(rows, f"{refusal} Then: chunkmill lanes resume {Route.OPENAI}")
                self._of_another_model.add(number)
                self.oddities[OTHER_MODEL] = len(self._of_another_model)  # also if this transaction runs again
                continue
            by_place = {row.packed.position: row for row in rows}
            made = assemble(answer, [row.packed for row in rows], normalize=space.spec.normalize, half=space.is_half)
            written += [by_place[row.position] for row in made.rows]
            vectors.append(made.vectors)
            returned.failed += [(by_place[row.position], "bad_vector", why) for row, why in made.problems]
            answered.add(rows, answer.prompt_tokens)
        for number, refused in pending.refused.items():
            returned.add(sent.get(number, []), refused)
        n_written = write(conn, space, [row.packed for row in written], np.concatenate(vectors)) if written else 0
        gone = [row.content_hash for row in (*written, *returned.all)]
        provider_inputs.remove(conn, space_id=space.id, hashes=gone, provider_batch_id=step.id)
        provider_inputs.drop_suspects(conn, space.id, [row.content_hash for row in written])
        returned.record(conn, step)
        if returned.limit is not None:
            # Without a pause, the contents would be sent again at once, in one small ProviderBatch after the other.
            pause = self._context.settings.openai_poll_seconds
            provider_lanes.pause(conn, Route.OPENAI, seconds=pause, reason=returned.limit.reason)
        price = charges.price_today(conn, self._model)
        for job_id, (contents, tokens) in sorted(answered.by_job.items()):
            charges.book_tokens(
                conn,
                price,
                route=Route.OPENAI,
                space_id=space.id,
                job_id=job_id,
                provider_batch_id=step.id,
                contents=contents,
                tokens=tokens,
            )
        usage.add(conn, answered.by_attempt)
        noted = provider_batches.note(
            conn,
            step,
            failures=0,
            n_written=provider_batches.plus("n_written", n_written),
            n_dead=provider_batches.plus("n_dead", len(returned.dead)),
            n_returned=provider_batches.plus("n_returned", len(returned.all) - len(returned.dead)),
        )
        return noted, n_written, sum(tokens for _, tokens in answered.by_job.values())

    @property
    def step(self) -> Step:
        return self._step


@dataclass(slots=True)
class _ReturnedContents:
    """Contents that came back without a vector, by what happens to them next: a dead chunk, a request alone, or another
    attempt.
    """

    dead: list[tuple[InFlight, str, str]] = field(default_factory=list)
    alone: list[tuple[InFlight, str]] = field(default_factory=list)
    failed: list[tuple[InFlight, str, str]] = field(default_factory=list)
    uncharged: list[InFlight] = field(default_factory=list)
    stop: StopLane | None = None
    limit: RetryUncharged | None = None

    def add(self, rows: Sequence[InFlight], refusal: RefusedRequest) -> None:
        verdict = after_line_error(refusal.status, refusal.code, refusal.message, n_inputs_in_request=len(rows))
        if isinstance(verdict, BuryContent):
            self.dead += [(row, verdict.code, verdict.reason) for row in rows]
        elif isinstance(verdict, SendAlone):
            self.alone += [(row, verdict.reason) for row in rows]
        elif isinstance(verdict, RetryCharged):
            self.failed += [(row, refusal.code, verdict.reason) for row in rows]
        else:
            self.uncharged += rows
            if isinstance(verdict, StopLane):
                self.stop = verdict
            elif verdict.limited:
                self.limit = verdict

    def refuse(self, rows: Sequence[InFlight], reason: str) -> None:
        """Refuse the vectors, because another model made them. Every further answer would be refused too, so the lane
        stops.
        """
        self.failed += [(row, OTHER_MODEL, reason) for row in rows]
        self.stop = StopLane(OTHER_MODEL, reason)

    @property
    def all(self) -> list[InFlight]:
        named = [row for row, _, _ in (*self.dead, *self.failed)]
        return [*named, *(row for row, _ in self.alone), *self.uncharged]

    def record(self, conn: sa.Connection, step: Step) -> None:
        provider_work.bury_in_flight(conn, self.dead)
        provider_inputs.drop_suspects(conn, step.space_id, [row.content_hash for row, _, _ in self.dead])
        if self.alone:
            # No attempt is charged, because it is not known which of them is at fault.
            provider_inputs.add_suspects(conn, step.space_id, [row.content_hash for row, _ in self.alone])
        provider_work.charge_failure(
            conn, {(row.chunk_batch_id, row.attempt): (code, reason) for row, code, reason in self.failed}
        )
        if self.stop is not None:
            provider_lanes.stop(conn, Route.OPENAI, code=self.stop.code, reason=self.stop.reason)


@dataclass(slots=True)
class _AnsweredCounts:
    """How many contents and tokens were answered, and so are paid for: by job for the bill, and by attempt."""

    by_job: dict[int, tuple[int, int]] = field(default_factory=dict)
    by_attempt: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)

    def add(self, rows: Sequence[InFlight], prompt_tokens: int | None) -> None:
        """Share the ``prompt_tokens`` of a request among its contents, in proportion to our own counts."""
        counted = sum(row.packed.sent_tokens for row in rows)
        left, total = counted, counted if prompt_tokens is None else prompt_tokens
        for row in rows:
            share = total * row.packed.sent_tokens // left if left else 0
            left -= row.packed.sent_tokens
            total -= share
            _add(self.by_job, row.job_id, share)
            _add(self.by_attempt, (row.chunk_batch_id, row.attempt), share)


def _add(sums: dict[K, tuple[int, int]], key: K, tokens: int) -> None:
    contents, before = sums.get(key, (0, 0))
    sums[key] = (contents + 1, before + tokens)


def collect(context: ProviderContext, step: Step) -> Step:
    """``collecting`` → ``cleaning``: read both files, whatever the status is, and return what they do not answer.

    While a file that may have the missing answers has no id yet, it goes back to ``submitted``, to ask for the id.
    """
    reader = ResultReader(context, step)
    problem: str | None = None
    tries = DOWNLOADS
    for file_id in (step.output_file_id, step.error_file_id):
        if file_id:
            try:
                reader.read(file_id)
            except ProviderSilent as silent:
                problem, tries = silent.brief, SILENT_DOWNLOADS
            except ProviderRefused as refused:
                if refused.status != 404:
                    raise
                require_own_key(context, step, f"file {file_id}")
                problem = f"file {file_id} is gone: {refused.brief}"
            finally:
                reader.flush()
    step = reader.step
    completed = step.provider_status == RemoteStatus.COMPLETED
    # A line that is cut off means that the download broke off, whatever the status is.
    torn = bool(problem or reader.oddities["not_json"])
    if reader.unanswered and not problem and (completed or torn):
        problem = f"{reader.unanswered} requests have no answer in its files"
    if reader.unanswered and problem and step.downloads + 1 < tries:
        pause, downloads = min(300.0, 2.0 * 4**step.downloads), step.downloads + 1
        if not torn and not (step.output_file_id and step.error_file_id):
            context.transact(lambda conn: _ask_again(conn, step, pause, problem, downloads), "ask for the files again")
            raise StepReleased
        raise StepDelayed(pause, problem, downloads=downloads)
    context.oddities.count(reader.model, reader.oddities)
    if reader.oddities or problem:
        logger.warning("%s: %s; in its files: %s", step.name, problem or "all is answered", dict(reader.oddities))
    return context.transact(lambda conn: _end(context, conn, step, reader.oddities, problem), "account")


def _ask_again(conn: sa.Connection, step: Step, pause_s: float, problem: str, downloads: int) -> None:
    again = provider_batches.advance(conn, step, State.SUBMITTED, downloads=downloads, error=problem)
    provider_batches.release(conn, again, delay_s=pause_s)


def _end(
    context: ProviderContext, conn: sa.Connection, step: Step, oddities: Counter[str], problem: str | None
) -> Step:
    """Return the contents that no line has answered. If they surely never ran, no attempt is charged. Otherwise the
    attempt has failed, and what they may have cost is booked.
    """
    left = provider_inputs.remove_all(conn, step.id)
    reason = f"{step.name} ended {step.provider_status}: {problem or step.error or 'without an answer to it'}"
    if left:
        oddities = oddities + Counter({"unanswered": len(left)})
        # No attempt is charged for what we cancelled either, because the attempts that brought these contents had ended
        # before.
        if problem or step.provider_status != RemoteStatus.EXPIRED:
            provider_work.charge_failure(
                conn, {(row.chunk_batch_id, row.attempt): ("no_answer", reason) for row in left}
            )
    may_have_run = problem is not None or step.provider_status in (RemoteStatus.COMPLETED, VANISHED)
    book_unanswered(conn, context, step, left, may_have_run=may_have_run, reason=reason)
    provider_batches.count_oddities(conn, step, dict(oddities))
    returned = provider_batches.plus("n_returned", len(left))
    return settle(conn, step, n_returned=returned, error=problem or step.error)
