"""Jobs through a gateway: enqueue, follow, cancel, retry, and what is dead."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import AsyncIterable, Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Literal, TypeVar

from chunkmill.domain.arguments import (
    as_deadline,
    as_flag,
    as_function,
    as_most_refused,
    as_number,
    as_on_invalid,
    as_seconds,
    as_text,
    as_word,
    require_name,
)
from chunkmill.domain.chosen import as_replaced
from chunkmill.domain.costs import Estimate
from chunkmill.domain.printed import Rows
from chunkmill.domain.results import Attempt, Explanation, Job, require_not_failed, still_open
from chunkmill.domain.spaces import OnLong, Precision
from chunkmill.domain.states import Priority, Route
from chunkmill.errors import GatewayUnavailable, InvalidInput, WaitTimeout
from chunkmill.remote.asking import RemoteCalls
from chunkmill.remote.lines import Lines
from chunkmill.remote.reading import parse, parse_object, read, read_list
from chunkmill.remote.refusals import Failure
from chunkmill.remote.steps import DrainStep, PauseStep, Request, Steps, TellStep
from chunkmill.telemetry.progress import JobProgress

logger = logging.getLogger(__name__)

T = TypeVar("T")

ENQUEUE_SECONDS = 600.0
"""How long an enqueue waits for the gateway to take the next piece, or to answer after the last one."""
FIRST_LOOK_S = 0.1
LONGEST_LOOK_S = 2.0
LEAST_LOOK_S = 5.0
"""How long a look at a job may take at least, also if the time of the wait is over."""
PAGE = 1_000


class Jobs(RemoteCalls):
    """The verbs that are about jobs."""

    def enqueue(
        self,
        chunks: Iterable[object] | AsyncIterable[object],
        *,
        collection: str,
        model: str | None = None,
        route: Route | str = Route.AUTO,
        priority: Priority | str = Priority.NORMAL,
        idempotency_key: str | None = None,
        on_long: OnLong | str = OnLong.TRUNCATE,
        on_invalid: Literal["raise", "skip"] = "raise",
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        deadline: datetime | timedelta | float | None = None,
        replace: bool | Mapping[str, Any] = False,
        allow_empty: bool = False,
        max_refused: float | None = None,
    ) -> Steps[Job]:
        """Ask for vectors of ``chunks``, as :meth:`Client.enqueue` does, which describes the arguments.

        The chunks are sent while they are read, in constant memory. If the connection breaks, they are sent again with
        the same idempotency key, which is made here if none is given: so a lost answer makes no second job. What can be
        read only once is kept in a temporary file for that, and read to its end before it is sent again, because a
        gateway breaks off a body that comes too slowly. Raises :class:`InvalidChunk`, with nothing written unless
        ``on_invalid`` is ``"skip"``, :class:`AccessDenied`, :class:`GatewayUnavailable`, and what
        :meth:`Client.enqueue` raises.
        """
        require_name("collection", collection)
        on_invalid = as_on_invalid(on_invalid)
        if idempotency_key is not None:
            require_name("idempotency_key", idempotency_key)
            if not idempotency_key.isascii() or not idempotency_key.isprintable():
                raise InvalidInput("idempotency_key must have printable ASCII characters only: it is sent in a header.")
        key = idempotency_key or uuid.uuid4().hex
        query = {
            "collection": collection,
            "priority": as_word(Priority, priority, "priority").value,
            **_asked_of_chunks(model, route, on_long, on_invalid, dimensions, precision, deadline, replace),
        }
        if as_flag("allow_empty", allow_empty):
            query["allow_empty"] = "true"
        if (most_refused := as_most_refused(max_refused, skips=on_invalid == "skip")) is not None:
            query["max_refused"] = repr(most_refused)
        lines = Lines(chunks, on_invalid)
        headers = {"content-type": "application/x-ndjson", "idempotency-key": key}
        try:
            return (
                yield from self._send_lines(
                    Request("POST", "/v1/jobs", ENQUEUE_SECONDS, query, headers, lines), lines, _job
                )
            )
        except (GatewayUnavailable, WaitTimeout) as error:
            raise type(error)(
                f"{error} Whether the job exists is not known. The same enqueue with idempotency_key={key!r} returns "
                "it, or completes it."
            ) from None
        finally:
            lines.close()

    def estimate(
        self,
        chunks: Iterable[object] | AsyncIterable[object],
        *,
        model: str | None = None,
        route: Route | str = Route.AUTO,
        collection: str | None = None,
        on_long: OnLong | str = OnLong.TRUNCATE,
        on_invalid: Literal["raise", "skip"] = "raise",
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        deadline: datetime | timedelta | float | None = None,
        replace: bool | Mapping[str, Any] = False,
    ) -> Steps[Estimate]:
        """What :meth:`enqueue` with the same arguments would send, and what it would cost, as :meth:`Client.estimate`
        says.

        The chunks are sent to the gateway, which counts their tokens and writes nothing. Raises what that raises.
        """
        on_invalid = as_on_invalid(on_invalid)
        query = _asked_of_chunks(model, route, on_long, on_invalid, dimensions, precision, deadline, replace)
        if collection is not None:
            require_name("collection", collection)
            query["collection"] = collection
        elif "replace" in query:
            raise InvalidInput("replace needs a collection, from which an enqueue would delete.")
        lines = Lines(chunks, on_invalid)
        headers = {"content-type": "application/x-ndjson"}
        request = Request("POST", "/v1/estimate", ENQUEUE_SECONDS, query, headers, lines)
        try:
            return (yield from self._send_lines(request, lines, lambda body: read(Estimate, parse(body))))
        finally:
            lines.close()

    def _send_lines(self, request: Request, lines: Lines, reader: Callable[[bytes], T]) -> Steps[T]:
        """What the answer holds. Attempts go on for as long as the client's timeout after the first failure.

        A gateway breaks off a body that comes too slowly. So the rest of the iterable is read before the second
        attempt, which then waits for nobody.
        """
        tries, deadline = 0, None
        while True:
            result = yield from self._attempt(self._server, request)
            if not isinstance(result, Failure):
                return (yield from self._read(self._server, result.body, partial(reader, result.body)))
            if not result.may_repeat and not (result.is_too_slow and deadline is None):
                raise result.error
            if deadline is None:
                yield DrainStep(lines)
                deadline = self._deadline()
            yield from self._wait(result, tries, deadline)
            tries += 1

    def job(self, job_id: int) -> Steps[Job]:
        """The job as it is now. Raises :class:`NotFound`."""
        return self._get(f"/v1/jobs/{as_number('job_id', job_id)}", _job)

    def jobs(self, limit: int = 20) -> Steps[list[Job]]:
        """The latest jobs, newest first."""
        limit = as_number("limit", limit, least=0)
        listed: list[Job] = []
        query: dict[str, str] = {}
        while len(listed) < limit:
            asked = min(PAGE, limit - len(listed))
            page, following = yield from self._get("/v1/jobs", _page, query={**query, "limit": str(asked)})
            listed += page
            if following is None or not page:
                break
            query = {"before": str(following)}
        return Rows(listed, Job)

    def wait(
        self,
        job_id: int,
        *,
        timeout: float | None = None,
        on_progress: Callable[[Job], object] | None = None,
        on_hindrance: Callable[[str], object] | None = None,
        progress: bool = False,
    ) -> Steps[Job]:
        """Wait until a job has finished, and return it. ``timeout`` is in seconds; None waits for ever.

        ``progress`` shows a bar: in the cell of a notebook, on a terminal (stderr), or else as a line every 5 s.
        ``on_progress`` is called with the job each time it was read. A gateway that cannot be reached for a while is
        waited for. ``on_hindrance`` is called with a sentence if something hinders the job and waiting alone does not
        help (:attr:`Job.hindrance`); without it the sentence stands under the bar, or is a warning in the log, and so
        is :attr:`Job.notice` at the end. Raises :class:`JobFailed` if chunks are left without a vector,
        :class:`JobCancelled`, which is a kind of it, if somebody cancelled the job, :class:`WaitTimeout` and
        :class:`NotFound`.
        """
        as_number("job_id", job_id)
        as_function("on_progress", on_progress)
        as_function("on_hindrance", on_hindrance)
        seconds = None if timeout is None else as_seconds("timeout", timeout)
        bar = JobProgress(job_id) if as_flag("progress", progress) else None
        try:
            return (yield from self._looks(job_id, seconds, on_progress, on_hindrance, bar))
        finally:
            if bar is not None:
                bar.close()

    def _looks(
        self,
        job_id: int,
        seconds: float | None,
        on_progress: Callable[[Job], object] | None,
        on_hindrance: Callable[[str], object] | None,
        bar: JobProgress | None,
    ) -> Steps[Job]:
        say = on_hindrance or (bar.note if bar is not None else partial(logger.warning, "job %s: %s", job_id))
        hindered = None
        deadline = None if seconds is None else self._deadline(seconds)
        pause = FIRST_LOOK_S
        while True:
            look = None if deadline is None else min(self._timeout, max(LEAST_LOOK_S, deadline - self._clock()))
            job = yield from self._get(f"/v1/jobs/{job_id}", _job, timeout=look)
            if bar is not None:
                bar.look(job)
            if on_progress:
                yield TellStep(on_progress, job)
            require_not_failed(job)
            if job.state.is_final:
                if job.notice and on_hindrance is None:
                    logger.warning("job %s: %s", job_id, job.notice)
                return job
            left = None if deadline is None else deadline - self._clock()
            if seconds is not None and left is not None and left <= 0:
                advice = job.hindrance or "GET /health says whether a worker runs."
                raise WaitTimeout(f"{still_open(job, seconds)} {advice}")
            if job.hindrance != hindered:
                hindered = job.hindrance
                if hindered:
                    yield TellStep(say, hindered)
            yield PauseStep(pause if left is None else min(pause, left))
            pause = min(LONGEST_LOOK_S, pause * 1.5)

    def cancel(self, job_id: int) -> Steps[Job]:
        """Cancel a job: no ChunkBatch of it starts any more, and workers leave those they hold.

        Written vectors stay.
        """
        return self._get(f"/v1/jobs/{as_number('job_id', job_id)}/cancel", _job, method="POST")

    def retry(self, job_id: int) -> Steps[Job]:
        """Embed what a failed or cancelled job left without a vector. Any other job is returned as it is."""
        return self._get(f"/v1/jobs/{as_number('job_id', job_id)}/retry", _job, method="POST")

    def explain(self, job_id: int) -> Steps[Explanation]:
        """Why a job is embedded where it is, and what it waits for, as :meth:`Client.explain` says it.

        The lanes are only for keys with the scope admin. Raises :class:`NotFound`.
        """
        path = f"/v1/jobs/{as_number('job_id', job_id)}/explain"
        return self._get(path, lambda body: read(Explanation, parse(body)))

    def attempts(self, job_id: int) -> Steps[list[Attempt]]:
        """All attempts at a job's ChunkBatches, the oldest first: which worker, how it ended, what it cost.

        Raises :class:`NotFound`.
        """

        def reader(body: bytes) -> list[Attempt]:
            return Rows(read_list(Attempt, parse_object(body).get("attempts"), "attempts"), Attempt)

        return self._get(f"/v1/jobs/{as_number('job_id', job_id)}/attempts", reader)


def _asked_of_chunks(
    model: str | None,
    route: Route | str,
    on_long: OnLong | str,
    on_invalid: str,
    dimensions: int | None,
    precision: Precision | str | None,
    deadline: datetime | timedelta | float | None,
    replace: bool | Mapping[str, Any],
) -> dict[str, str]:
    """The arguments that an enqueue and an estimate have in common, as they stand in an address."""
    query = {
        "route": as_word(Route, route, "route").value,
        "on_long": as_word(OnLong, on_long, "on_long").value,
        "on_invalid": on_invalid,
    }
    if model is not None:
        query["model"] = as_text("model", model)
    if dimensions is not None:
        query["dimensions"] = str(as_number("dimensions", dimensions, least=1))
    if precision is not None:
        query["precision"] = str(as_word(Precision, precision, "precision"))
    if deadline is not None:
        query["deadline"] = as_deadline(deadline, datetime.now(UTC)).isoformat()
    if as_replaced(replace) is not None:
        query["replace"] = "true" if replace is True else json.dumps(replace)
    return query


def _job(body: bytes) -> Job:
    return read(Job, parse(body))


def _page(body: bytes) -> tuple[list[Job], int | None]:
    page = parse_object(body)
    return read_list(Job, page.get("jobs"), "jobs"), read(int, page["next"], "next") if page.get("next") else None
