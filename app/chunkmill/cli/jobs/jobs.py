"""`enqueue`, `jobs`, `job`, `cancel` and `retry`."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from typing import Any, Literal

import click

from chunkmill.cli.jobs.attempts import attempt_totals, show_attempts
from chunkmill.cli.jobs.sources import Fields, Reader
from chunkmill.cli.output import Screen, count, duration, json_option
from chunkmill.cli.paid.costs import show_estimate
from chunkmill.cli.paid.lanes import lane_fields, show_explanation
from chunkmill.cli.progress import PACE_SECONDS, Bar, rates
from chunkmill.client import Client
from chunkmill.domain.results import Job
from chunkmill.domain.spaces import OnLong, Precision
from chunkmill.domain.states import JobState, Priority, Route
from chunkmill.embedded.environment import Environment
from chunkmill.errors import InvalidChunk, InvalidInput, JobFailed
from chunkmill.monitor.servers import read_database
from chunkmill.telemetry.pace import Pace

JOB_FAILED = 4
"""Exit code: the job ended with chunks that have no vector."""


class Deadline(click.ParamType[datetime | timedelta]):
    """A moment with its time zone, or a span such as `90m`, `36h` or `2d`."""

    name = "deadline"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> datetime | timedelta:
        if isinstance(value, datetime | timedelta):
            return value
        if span := re.fullmatch(r"(\d{1,6}(?:\.\d+)?)([smhd])", str(value)):
            unit = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}[span[2]]
            return timedelta(**{unit: float(span[1])})
        try:
            moment = datetime.fromisoformat(str(value))
        except ValueError:
            self.fail("it must be a span such as 36h, or a moment such as 2027-01-31T18:00+00:00", param, ctx)
        return moment.astimezone() if moment.tzinfo is None else moment


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("-c", "--collection", required=True, help="Where the chunks go. Made if it is new.")
@click.option("--model", help="Bundled name, local folder or org/name@revision.  [default: EMBEDDING_MODEL]")
@click.option("--route", type=click.Choice([r.value for r in Route]), default=Route.AUTO.value, show_default=True)
@click.option(
    "--priority", type=click.Choice([p.value for p in Priority]), default=Priority.NORMAL.value, show_default=True
)
@click.option(
    "--idempotency-key", metavar="KEY", help="A second enqueue under the same key returns the first one's job."
)
@click.option(
    "--on-long",
    type=click.Choice([o.value for o in OnLong]),
    default=OnLong.TRUNCATE.value,
    show_default=True,
    help="What becomes of a text longer than the model takes.",
)
@click.option(
    "--dimensions",
    type=click.IntRange(1),
    help="Cut the vectors to so many dimensions: for models trained for it.  [default: EMBEDDING_DIMENSIONS]",
)
@click.option(
    "--precision",
    type=click.Choice([str(p) for p in Precision]),
    help="int8 is faster on a CPU and less exact.  [default: EMBEDDING_PRECISION]",
)
@click.option(
    "--on-invalid",
    type=click.Choice(["raise", "skip"]),
    default="raise",
    show_default=True,
    help="raise: one bad chunk, and nothing is written. skip: it goes to the job's dead list.",
)
@click.option("--id-field", default="id", show_default=True)
@click.option("--text-field", default="text", show_default=True)
@click.option(
    "--deadline",
    type=Deadline(),
    metavar="WHEN",
    help="When it must be done: 90m, 36h, 2d, or a moment such as 2027-01-31T18:00. Route auto keeps to it.",
)
@click.option("--dry-run", is_flag=True, help="Say what it would send and cost on each lane, and write nothing.")
@click.option("--wait/--no-wait", default=None, help="Wait for the job to end.  [default: on a terminal]")
@json_option
@click.pass_obj
def enqueue(
    screen: Screen,
    /,
    sources: tuple[str, ...],
    on_invalid: Literal["raise", "skip"],
    id_field: str,
    text_field: str,
    dry_run: bool,
    wait: bool | None,
    **options: Any,
) -> None:
    """Read chunks and have them embedded.

    SOURCE is a .jsonl, .ndjson, .csv or .parquet file whose records carry an id, a text and whatever else (which
    becomes metadata to filter searches by); a folder, whose .txt, .md and .rst files are one chunk each; or - for
    JSON lines on stdin. Files are read record by record, so their size does not matter.
    """
    fields = Fields(id_field, text_field)
    reader = Reader(sources, fields, skip=on_invalid == "skip", stdin=sys.stdin.buffer)
    with Client.from_env() as client:
        with Bar(screen, "reading") as bar:
            try:
                if dry_run:
                    del options["priority"], options["idempotency_key"]
                    estimate = client.estimate(_counted(reader, bar), on_invalid=on_invalid, **options)
                else:
                    job = client.enqueue(_counted(reader, bar), on_invalid=on_invalid, **options)
            except InvalidChunk as error:
                # The reader stands where the refused chunk came from: the client checks each as it comes.
                raise InvalidInput(
                    f"{reader.place}: chunk {error.chunk_id!r}: {error.problem}. Nothing was written; mend the chunk, "
                    "or pass --on-invalid skip to put bad chunks into the job's dead list and enqueue the rest."
                ) from None
        if dry_run:
            show_estimate(screen, estimate)
        else:
            finish(screen, client, job, wait=screen.out.is_terminal if wait is None else wait)


@click.command()
@click.option("-n", "--limit", type=click.IntRange(1), default=20, show_default=True)
@json_option
@click.pass_obj
def jobs(screen: Screen, limit: int) -> None:
    """The latest jobs, newest first."""
    with Client.from_env() as client:
        latest = client.jobs(limit)
    if screen.json:
        screen.document([job_fields(job) for job in latest])
    elif not latest:
        screen.say("No jobs yet. Begin with: ", ("chunkmill enqueue docs.jsonl --collection docs", "bold"))
    else:
        screen.table(
            ["job", "state", "collection", "chunks", "done", "dead", "began", "took", "tokens/s"],
            [_row(job) for job in latest],
        )


@click.command()
@click.argument("job_id", metavar="ID", type=click.IntRange(1))
@click.option("--dead", is_flag=True, help="List the dead chunks with their reasons.")
@click.option("--attempts", is_flag=True, help="List the attempts that did not complete, and what they cost.")
@click.option("--explain", is_flag=True, help="Say why it is embedded where it is, and what it waits for.")
@click.option("--wait", is_flag=True, help="Wait for the job to end.")
@json_option
@click.pass_obj
def job(screen: Screen, job_id: int, dead: bool, attempts: bool, explain: bool, wait: bool) -> None:
    """One job: its state, its counts and its dead chunks. Exits with 4 when it failed."""
    with Client.from_env() as client:
        finish(screen, client, client.job(job_id), wait=wait, dead=dead, attempts=attempts, explain=explain)


@click.command()
@click.argument("job_id", metavar="ID", type=click.IntRange(1))
@json_option
@click.pass_obj
def cancel(screen: Screen, job_id: int) -> None:
    """Stop a job. Vectors already written stay, and `retry` takes the job up again."""
    with Client.from_env() as client:
        show_job(screen, client, client.cancel(job_id))


@click.command()
@click.argument("job_id", metavar="ID", type=click.IntRange(1))
@click.option("--wait", is_flag=True, help="Wait for the job to end.")
@json_option
@click.pass_obj
def retry(screen: Screen, job_id: int, wait: bool) -> None:
    """Try again what a failed or cancelled job left without a vector."""
    with Client.from_env() as client:
        finish(screen, client, client.retry(job_id), wait=wait)


def finish(
    screen: Screen,
    client: Client,
    job: Job,
    *,
    wait: bool,
    dead: bool = False,
    attempts: bool = False,
    explain: bool = False,
) -> None:
    """Wait for the job if asked, show it, and exit with 4 if it failed."""
    if wait:
        job = waited(screen, client, job)
    if dead:
        job = replace(job, dead_chunks=tuple(client.dead_chunks(job.id)))
    show_job(screen, client, job, dead=dead, attempts=attempts, explain=explain)
    if job.state is JobState.FAILED:
        screen.error(JobFailed.code, f"job {job.id} failed: {job.error} `chunkmill job {job.id} --dead` says more.")
        raise SystemExit(JOB_FAILED)


def waited(screen: Screen, client: Client, job: Job) -> Job:
    """The job at its end, failed or not."""
    if job.state.is_final:
        return job
    _hint_absent(screen, job)
    try:
        return follow(screen, client, job.id)
    except JobFailed as error:
        return client.job(error.job_id)
    except KeyboardInterrupt:
        screen.hint(f"Job {job.id} goes on. Follow it: chunkmill job {job.id} --wait")
        raise


def follow(screen: Screen, client: Client, job_id: int, *, on_look: Callable[[], None] | None = None) -> Job:
    """Wait for a job's end behind a bar. ``on_look`` is called at every look. Raises :class:`JobFailed`."""
    pace = Pace(PACE_SECONDS)
    with Bar(screen, f"job {job_id}") as bar:

        def look(job: Job) -> None:
            if on_look:
                on_look()
            done = job.contents - job.remaining
            bar.update(done, job.contents, "texts", rates(pace, job.embedded, job.remaining, job.tokens))

        return client.wait(job_id, on_progress=look)


def job_fields(job: Job) -> dict[str, object]:
    return asdict(job) | {"progress": round(job.progress, 4)}


def show_job(
    screen: Screen, client: Client, job: Job, *, dead: bool = False, attempts: bool = False, explain: bool = False
) -> None:
    failing = client.failing(job.id)
    booked = client.attempts(job.id) if attempts else []
    if screen.json:
        document = job_fields(job) | {"failing": failing and asdict(failing)}
        if attempts:
            document |= {"attempts": [asdict(each) for each in booked], "attempt_totals": attempt_totals(booked)}
        if explain:
            told = client.explain(job.id)
            document |= {"explanation": asdict(told) | {"lanes": [lane_fields(lane) for lane in told.lanes]}}
        screen.document(document)
        return
    facts: dict[str, object] = {
        "job": str(job.id),
        "state": job.state.value,
        "collection": job.collection,
        "model": job.model,
        "space": job.space[:12],
        "route": f"{job.route}, priority {job.priority}",
        "chunks": f"{job.chunks:,} of {count(job.contents, 'distinct text')}",
        "texts": f"{job.embedded:,} embedded, {job.cached:,} from the cache, {job.remaining:,} to go",
        "truncated": count(job.truncated, "text") if job.truncated else None,
        "dead": count(job.dead, "chunk") if job.dead else None,
        "tokens": _tokens(job) if job.tokens else None,
        "key": job.idempotency_key,
        "began": f"{job.created_at.astimezone():%Y-%m-%d %H:%M:%S}",
        "took": duration((job.finished_at - job.created_at).total_seconds()) if job.finished_at else None,
        "error": job.error,
        "failing": failing
        and f"ChunkBatch {failing.id}, {failing.state}, attempt {failing.attempt} of {failing.max_attempts}: "
        f"{failing.error}",
    }
    screen.fields({name: value for name, value in facts.items() if value is not None})
    if dead and job.dead_chunks:
        screen.say("")
        screen.table(["dead chunk", "code", "reason"], [(d.chunk_id, d.code, d.reason) for d in job.dead_chunks])
        if job.dead > len(job.dead_chunks):
            screen.say(f"These are the first {len(job.dead_chunks):,} of {job.dead:,}.")
    elif job.dead:
        screen.hint(f"Why chunks are dead: chunkmill job {job.id} --dead")
    if attempts:
        show_attempts(screen, booked)
    if explain:
        show_explanation(screen, client.explain(job.id))
    if not job.state.is_final:
        screen.hint(f"Follow it: chunkmill job {job.id} --wait")


def _row(job: Job) -> list[object]:
    seconds = (job.finished_at - job.created_at).total_seconds() if job.finished_at else None
    return [
        job.id,
        job.state.value,
        job.collection,
        job.chunks,
        f"{100 * job.progress:.0f} %",
        job.dead,
        f"{job.created_at.astimezone():%m-%d %H:%M}",
        None if seconds is None else duration(seconds),
        int(job.tokens / seconds) if seconds and job.tokens else None,
    ]


def _counted(reader: Reader, bar: Bar) -> Iterator[object]:
    pace = Pace(PACE_SECONDS)
    number = 0
    for number, chunk in enumerate(reader, 1):
        yield chunk
        if number % 64 == 0:
            (per_s,) = pace.add(time.monotonic(), number)
            bar.update(number, None, "chunks", {"per_s": per_s} if per_s else None)
    bar.stage(f"storing {count(number, 'chunk')}")


def _tokens(job: Job) -> str:
    engine = f" in {duration(job.engine_seconds)} of engine time" if job.engine_seconds else ""
    return f"{job.tokens:,}{engine}"


def _hint_absent(screen: Screen, job: Job) -> None:
    """Whoever waits should know when nobody works."""
    database = read_database(Environment.load(start_embedded=False).settings)
    if start := database.start_for(job.route):
        screen.hint(f"No worker is connected, so nothing will move. Start one: {start}")
    elif not database.connections.pollers:
        screen.hint("No poller is connected: lost doorbells will not be rung again. Start one: chunkmill poller")
