"""`enqueue`, `jobs`, `job`, `cancel` and `retry`."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from typing import Any, Literal

import click

from chunkmill.chunking import Chunker, Unit
from chunkmill.chunking.chunker import LEAST_SIZE
from chunkmill.cli.arguments import JsonObject, watch_options
from chunkmill.cli.jobs.attempts import attempt_totals, show_attempts
from chunkmill.cli.jobs.cutting import Cutter
from chunkmill.cli.jobs.decoded import encoding_named
from chunkmill.cli.jobs.source_options import Refusable, as_delimiter, split_names
from chunkmill.cli.jobs.sources import FORMATS, Fields, Form, Reader
from chunkmill.cli.late import Client, Environment
from chunkmill.cli.output import Screen, count, duration, json_option
from chunkmill.cli.paid.costs import show_estimate
from chunkmill.cli.paid.lanes import lane_fields, show_explanation
from chunkmill.cli.progress import PACE_SECONDS, Bar, rates
from chunkmill.domain.chunks import prepare
from chunkmill.domain.reasons import printable
from chunkmill.domain.results import Job, cancelled
from chunkmill.domain.spaces import OnLong, Precision
from chunkmill.domain.states import JobState, Priority, Route
from chunkmill.errors import InvalidChunk, InvalidInput, JobCancelled, JobFailed, TooManyRefused
from chunkmill.telemetry.pace import Pace

JOB_FAILED = 4
"""Exit code for a job that ended with chunks that have no vector, because it failed or was cancelled."""
TOO_MANY_REFUSED = 5
"""Exit code for a job that has more dead chunks than --max-refused allows."""


class Deadline(click.ParamType[datetime | timedelta]):
    """A point in time with its time zone, or a time span such as `90m`, `36h` or `2d`."""

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
            self.fail(
                "it must be a time span such as 36h, or a point in time such as 2027-01-31T18:00+00:00", param, ctx
            )
        return moment.astimezone() if moment.tzinfo is None else moment


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("-c", "--collection", required=True, help="Collection of the chunks. It is created if it does not exist.")
@click.option(
    "--model", help="Name of the bundled model, local folder, or org/name@revision.  [default: EMBEDDING_MODEL]"
)
@click.option(
    "--route",
    type=click.Choice([r.value for r in Route]),
    default=Route.AUTO.value,
    show_default=True,
    help="Where to embed: local is your workers, openai the Batch API, openai-sync plain requests; auto chooses.",
)
@click.option(
    "--priority",
    type=click.Choice([p.value for p in Priority]),
    default=Priority.NORMAL.value,
    show_default=True,
    help="Jobs of a higher priority are embedded first.",
)
@click.option("--idempotency-key", metavar="KEY", help="Key that makes a repeated enqueue return the first one's job.")
@click.option(
    "--on-long",
    type=click.Choice([o.value for o in OnLong]),
    default=OnLong.TRUNCATE.value,
    show_default=True,
    help="What to do with a text that is too long for the model: truncate it, reject it, or split it for embedding.",
)
@click.option(
    "--dimensions",
    type=click.IntRange(1),
    help="Number of dimensions to shorten the vectors to, if the model was trained for that.  [default: "
    "EMBEDDING_DIMENSIONS]",
)
@click.option(
    "--precision",
    type=click.Choice([str(p) for p in Precision]),
    help="Precision of the vectors. int8 is faster on a CPU and less exact.  [default: EMBEDDING_PRECISION]",
)
@click.option(
    "--on-invalid",
    type=click.Choice(["raise", "skip"]),
    default="raise",
    show_default=True,
    help="What to do with an invalid chunk. raise: stop, and write nothing. skip: put it into the job's dead list; "
    "the command then exits with 0, however many chunks are invalid. --max-refused sets a limit.",
)
@click.option(
    "--max-refused",
    type=Refusable(),
    metavar="N",
    help="How many chunks may be invalid: a number, or a share such as 1%. Invalid chunks are skipped. If more chunks "
    "are invalid, nothing is written. If more chunks are dead when the job ends, the job is kept. In both cases the "
    "command exits with 5.",
)
@click.option(
    "--id-field",
    default="id",
    show_default=True,
    help="Name of the field with a record's id. auto: make ids of what the records hold.",
)
@click.option("--text-field", default="text", show_default=True, help="Name of the field with a record's text.")
@click.option(
    "--metadata-field",
    "metadata_fields",
    multiple=True,
    metavar="FIELD",
    help="Name of a field that becomes metadata. Separate several names by commas, or repeat the option.  [default: "
    "all other fields]",
)
@click.option(
    "--chunk",
    type=click.IntRange(LEAST_SIZE),
    metavar="SIZE",
    help="Cut documents and long texts into chunks of at most this many tokens of the model. Folders then also give "
    "HTML, PDF and source files.",
)
@click.option(
    "--overlap",
    type=click.IntRange(0),
    metavar="N",
    help="How many tokens from the end of one chunk the next one repeats. It needs --chunk.  [default: 0]",
)
@click.option(
    "--chunk-unit",
    type=click.Choice([unit.value for unit in Unit]),
    help="What --chunk and --overlap count. It needs --chunk.  [default: tokens]",
)
@click.option(
    "--suffix",
    "suffixes",
    multiple=True,
    metavar=".EXT",
    help="Read only files of a folder whose name ends with this, such as .html; may be given several times. It needs "
    "--chunk.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(sorted({*FORMATS.values()})),
    help="Format of the files and of stdin.  [default: what the name of the file says; JSON lines on stdin]",
)
@click.option(
    "--encoding",
    metavar="NAME",
    help="Encoding of the texts, such as cp1252. A document that is valid UTF-8 is read as UTF-8 all the same.  "
    "[default: UTF-8]",
)
@click.option(
    "--delimiter",
    metavar="CHAR",
    help="What separates the columns of CSV: one character, or the word tab.  [default: recognized from the header]",
)
@click.option("--typed", is_flag=True, help="Keep numbers, true, false and empty cells of CSV as such in the metadata.")
@click.option(
    "--prefix-ids", is_flag=True, help="Put the SOURCE in front of each id, so that ids of two sources differ."
)
@click.option(
    "--sync",
    is_flag=True,
    help="After all sources were read, delete the chunks of the collection that are in none of them.",
)
@click.option(
    "--sync-where",
    type=JsonObject(),
    metavar="JSON",
    help='Filter for --sync: delete only chunks that pass it, such as {"source": "wiki"}.',
)
@click.option("--allow-empty", is_flag=True, help="Let --sync delete chunks although the sources are empty.")
@click.option(
    "--deadline",
    type=Deadline(),
    metavar="WHEN",
    help="When the job has to be done: a time span (90m, 36h, 2d) or a point in time (2027-01-31T18:00). Route auto "
    "chooses accordingly.",
)
@click.option("--dry-run", is_flag=True, help="Write nothing; show the tokens and the cost on each lane.")
@click.option("--wait/--no-wait", default=None, help="Wait until the job ends.  [default: wait on a terminal]")
@json_option
@click.pass_obj
def enqueue(
    screen: Screen,
    /,
    sources: tuple[str, ...],
    on_invalid: Literal["raise", "skip"],
    id_field: str,
    text_field: str,
    metadata_fields: tuple[str, ...],
    chunk: int | None,
    overlap: int | None,
    chunk_unit: str | None,
    suffixes: tuple[str, ...],
    kind: str | None,
    encoding: str | None,
    delimiter: str | None,
    typed: bool,
    prefix_ids: bool,
    max_refused: float | None,
    sync: bool,
    sync_where: dict[str, Any] | None,
    allow_empty: bool,
    dry_run: bool,
    wait: bool | None,
    **options: Any,
) -> None:
    """Read chunks from files and have them embedded.

    SOURCE is a file, a folder, or - for JSON lines on stdin. Files are read record by record, so they may be of any
    size. If an id comes twice, the last chunk with it is kept.

    A file is .jsonl, .ndjson, .json (an array), .csv, .tsv or .parquet; all but the last may also end in .gz. Each
    record of a file has an id and a text; its other fields become metadata, by which searches can filter.

    In a folder, each .txt, .md and .rst file is one chunk, whose id is its path inside the folder. Hidden files are not
    read, and files of other kinds are counted. A link that leads out of the folder, and anything that is not a regular
    file, is skipped and named in a warning.

    With --chunk, documents are cut into chunks: .txt, .md, .html, .pdf and source files, in a folder or named by
    themselves, and also with .gz. The texts of records are cut too.

    With --wait, the command exits with 0 if the job is complete, with 4 if it failed or was cancelled, and with 5 if
    more chunks are dead than --max-refused allows.
    """
    fields = Fields(id_field, text_field, split_names(metadata_fields) or None)
    form = Form(kind, encoding and encoding_named(encoding), as_delimiter(delimiter), typed, prefix_ids)
    if max_refused is not None:
        on_invalid = "skip"
    if sync_where is not None and not sync:
        raise InvalidInput("--sync-where needs --sync.")
    cutter = _cutter(chunk, overlap, chunk_unit, suffixes, options["model"])
    skips = on_invalid == "skip"
    reader = Reader(
        sources,
        fields,
        skip=skips,
        stdin=sys.stdin.buffer,
        form=form,
        cutter=cutter,
        may_be_empty=allow_empty or dry_run or not sync,
    )
    replace: bool | dict[str, Any] = sync if sync_where is None else sync_where
    with Client.from_env() as client:
        with Bar(screen, "reading") as bar:
            try:
                if dry_run:
                    del options["priority"], options["idempotency_key"]
                    estimate = client.estimate(
                        _counted(reader, bar, "counting"), on_invalid=on_invalid, replace=replace, **options
                    )
                else:
                    job = client.enqueue(
                        _counted(reader, bar, "storing"),
                        on_invalid=on_invalid,
                        replace=replace,
                        allow_empty=allow_empty,
                        max_refused=max_refused,
                        **options,
                    )
            except InvalidChunk as error:
                # The client checks each chunk as it comes, so the reader's place is that of the refused chunk.
                raise InvalidInput(
                    f"{reader.place}: chunk {error.chunk_id!r}: {error.problem}. Nothing was written. Fix the chunk, "
                    "or pass --on-invalid skip to put bad chunks into the job's dead list and enqueue the rest."
                ) from None
            except TooManyRefused as error:
                screen.error(error.code, str(error))
                raise SystemExit(TOO_MANY_REFUSED) from None
            for note in reader.notes:
                bar.note(note)
            if cutter is not None:
                bar.note(f"{count(cutter.documents, 'document')} cut into {count(cutter.chunks, 'chunk')}")
            if reader.skipped.count:
                bar.note(str(reader.skipped))
            if others := reader.of_other_kinds():
                bar.note(others)
        if dry_run:
            show_estimate(screen, estimate)
        else:
            job = finish(screen, client, job, wait=screen.out.is_terminal if wait is None else wait)
            require_few_dead(screen, job, max_refused)


@click.command()
@click.option("-n", "--limit", type=click.IntRange(1), default=20, show_default=True, help="Number of jobs to list.")
@click.option("--watch", "watching", is_flag=True, help="Show them with bars, and keep them up to date.")
@watch_options
@json_option
@click.pass_obj
def jobs(screen: Screen, limit: int, watching: bool, every: float, times: int | None) -> None:
    """List the latest jobs, newest first."""
    if watching:
        from chunkmill.cli.watch.jobs import watch

        watch(screen, limit, every=every, times=times)
        return
    with Client.from_env() as client:
        latest = client.jobs(limit)
    if screen.json:
        screen.document([job_fields(job) for job in latest])
    elif not latest:
        screen.say("No jobs yet. Start with: ", ("chunkmill enqueue docs.jsonl --collection docs", "bold"))
    else:
        screen.table(
            ["job", "state", "collection", "chunks", "done", "dead", "began", "took", "tokens/s"],
            [_row(job) for job in latest],
            optional=["tokens/s", "took"],
        )


@click.command()
@click.argument("job_id", metavar="ID", type=click.IntRange(1))
@click.option("--dead", is_flag=True, help="List the dead chunks with their reasons.")
@click.option("--attempts", is_flag=True, help="List the attempts that did not complete, and the work that was lost.")
@click.option("--explain", is_flag=True, help="Show why the job is embedded on its lane, and what it waits for.")
@click.option("--wait", is_flag=True, help="Wait for the job to end.")
@click.option(
    "--max-refused", type=Refusable(), metavar="N", help="Exit with 5 if more chunks are dead: a number, or 1% of all."
)
@json_option
@click.pass_obj
def job(
    screen: Screen, job_id: int, dead: bool, attempts: bool, explain: bool, wait: bool, max_refused: float | None
) -> None:
    """Show one job: its state, its counts and its dead chunks.

    A text that comes again in a later part of the same enqueue is embedded once and counted again. `chunkmill audit`
    counts the distinct texts of a collection.

    The exit code is 4 if the job failed or was cancelled. With --wait, 0 means that the job is complete.
    """
    with Client.from_env() as client:
        current = client.job(job_id)
        ended = finish(screen, client, current, wait=wait, dead=dead, attempts=attempts, explain=explain)
        require_few_dead(screen, ended, max_refused)


@click.command()
@click.argument("job_id", metavar="ID", type=click.IntRange(1))
@json_option
@click.pass_obj
def cancel(screen: Screen, job_id: int) -> None:
    """Stop a job. Vectors that are already written are kept, and `chunkmill retry` continues the job."""
    with Client.from_env() as client:
        show_job(screen, client, client.cancel(job_id))


@click.command()
@click.argument("job_id", metavar="ID", type=click.IntRange(1))
@click.option("--wait", is_flag=True, help="Wait for the job to end.")
@json_option
@click.pass_obj
def retry(screen: Screen, job_id: int, wait: bool) -> None:
    """Embed what a failed or cancelled job left without a vector.

    With --wait, the command exits with 0 if the job is complete, and with 4 if it fails or is cancelled again.
    """
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
) -> Job:
    """Wait for the job if asked, show it, and exit with 4 if it failed or was cancelled. Returns the job."""
    if wait:
        job = waited(screen, client, job)
    if dead:
        job = replace(job, dead_chunks=tuple(client.dead_chunks(job.id)))
    show_job(screen, client, job, dead=dead, attempts=attempts, explain=explain)
    require_all_complete(screen, [job])
    return job


def require_all_complete(screen: Screen, jobs: Sequence[Job]) -> None:
    """Exit with 4 if one of the jobs failed or was cancelled, and say of each why. A job that is open is neither."""
    for job in jobs:
        if job.state is JobState.FAILED:
            screen.error(JobFailed.code, f"job {job.id} failed: {job.error} `chunkmill job {job.id} --dead` says more.")
        elif job.state is JobState.CANCELLED:
            screen.error(JobCancelled.code, cancelled(job))
    if any(job.state in (JobState.FAILED, JobState.CANCELLED) for job in jobs):
        raise SystemExit(JOB_FAILED)


def require_few_dead(screen: Screen, job: Job, most: float | None) -> None:
    """Exit with 5 if more chunks of the job are dead than ``most``, a number or a share below 1; None allows all."""
    if most is None:
        return
    allowed = most * (job.chunks + (job.refused or 0)) if most < 1 else most
    if job.dead > allowed:
        screen.error(
            TooManyRefused.code,
            f"{count(job.dead, 'chunk')} of job {job.id} have no vector, more than --max-refused allows. "
            f"`chunkmill job {job.id} --dead` says why.",
        )
        raise SystemExit(TOO_MANY_REFUSED)


def waited(screen: Screen, client: Client, job: Job) -> Job:
    """Wait for the job's end, and return the job, however it ended."""
    if job.state.is_final:
        return job
    try:
        return follow(screen, client, job.id)
    except JobFailed as error:
        return client.job(error.job_id)
    except KeyboardInterrupt:
        screen.hint(f"Job {job.id} continues. To follow it: chunkmill job {job.id} --wait")
        raise


def follow(screen: Screen, client: Client, job_id: int, *, on_look: Callable[[], None] | None = None) -> Job:
    """Show a progress bar until the job ends, and call ``on_look`` at every update. Raises :class:`JobFailed`."""
    pace = Pace(PACE_SECONDS)
    with Bar(screen, f"job {job_id}") as bar:

        def look(job: Job) -> None:
            if on_look:
                on_look()
            done = job.contents - job.remaining
            bar.update(done, job.contents, "texts", rates(pace, job.embedded, job.remaining, job.tokens))

        return client.wait(job_id, on_progress=look, on_hindrance=bar.note)


def job_fields(job: Job) -> dict[str, object]:
    return asdict(job) | {"progress": round(job.progress, 4)}


def show_job(
    screen: Screen, client: Client, job: Job, *, dead: bool = False, attempts: bool = False, explain: bool = False
) -> None:
    failing = client.failing(job.id)
    attempted = client.attempts(job.id) if attempts else []
    if screen.json:
        document = job_fields(job) | {"failing": failing and asdict(failing)}
        if attempts:
            document |= {"attempts": [asdict(one) for one in attempted], "attempt_totals": attempt_totals(attempted)}
        if explain:
            reasons = client.explain(job.id)
            document |= {"explanation": asdict(reasons) | {"lanes": [lane_fields(lane) for lane in reasons.lanes]}}
        screen.document(document)
        return
    fields: dict[str, object] = {
        "job": str(job.id),
        "state": job.state.value,
        "collection": job.collection,
        "model": job.model,
        "space": job.space[:12],
        "route": f"{job.route}, priority {job.priority}",
        "chunks": f"{job.chunks:,}",
        "stored": _stored(job),
        # They need not be distinct: one that comes again in a later window is counted again.
        "texts": f"{job.contents:,}: {job.embedded:,} embedded, {job.cached:,} from the cache, {_left(job)}",
        "truncated": count(job.truncated, "text") if job.truncated else None,
        "dead": count(job.dead, "chunk") if job.dead else None,
        "tokens": _tokens(job) if job.tokens else None,
        "key": job.idempotency_key,
        "began": f"{job.created_at.astimezone():%Y-%m-%d %H:%M:%S}",
        "took": duration((job.finished_at - job.created_at).total_seconds()) if job.finished_at else None,
        "error": job.error,
        "failing": failing and failing.sentence,
        "hindered": None if failing else job.hindrance,
    }
    screen.fields({name: value for name, value in fields.items() if value is not None})
    if dead and job.dead_chunks:
        screen.say("")
        screen.table(["dead chunk", "code", "reason"], [(d.chunk_id, d.code, d.reason) for d in job.dead_chunks])
        if job.dead > len(job.dead_chunks):
            screen.say(f"These are the first {len(job.dead_chunks):,} of {job.dead:,}.")
    elif job.dead:
        screen.hint(f"To see why chunks are dead: chunkmill job {job.id} --dead")
    if attempts:
        show_attempts(screen, attempted)
    if explain:
        show_explanation(screen, client.explain(job.id))
    if job.notice:
        screen.hint(job.notice)
    if not job.state.is_final:
        screen.hint(f"To follow it: chunkmill job {job.id} --wait")
    elif job.undone:
        screen.hint(f"To embed the {count(job.undone, 'text')} without a vector: chunkmill retry {job.id}")


def _cutter(
    size: int | None, overlap: int | None, unit: str | None, suffixes: tuple[str, ...], model: str | None
) -> Cutter | None:
    if size is None:
        given = {"--overlap": overlap is not None, "--chunk-unit": unit is not None, "--suffix": bool(suffixes)}
        for name in (name for name, is_given in given.items() if is_given):
            raise click.UsageError(f"{name} needs --chunk.")
        return None
    settings = Environment.load().settings
    chunker = Chunker(size, overlap=overlap or 0, unit=unit or Unit.TOKENS.value, model=model, settings=settings)
    return Cutter(chunker, suffixes)


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


def _counted(reader: Reader, bar: Bar, then: str) -> Iterator[object]:
    """The chunks, while ``bar`` counts them; ``then`` says what is done with them when all are read."""
    pace = Pace(PACE_SECONDS)
    number = 0
    for number, chunk in enumerate(reader, 1):
        yield _placed(chunk, reader.place, number - 1) if reader.skips else chunk
        if number % 64 == 0:
            (per_s,) = pace.add(time.monotonic(), number)
            bar.update(number, None, "chunks", {"per_s": per_s} if per_s else None)
    bar.stage(f"{then} {count(number, 'chunk')}")


def _placed(item: object, place: str, position: int) -> object:
    """The chunk, checked: if it is refused, its reason begins with its place in the sources."""
    try:
        return prepare(item, position)
    except InvalidChunk as error:
        if error is item:
            return error
        return InvalidChunk(
            f"{printable(place)}: {error.problem}",
            chunk_id=error.chunk_id,
            position=position,
            reason=error.reason,
            known_id=error.known_id,
        )


def _left(job: Job) -> str:
    return f"{job.undone:,} left without a vector" if job.undone else f"{job.remaining:,} to go"


def _stored(job: Job) -> str | None:
    if job.new is None:
        return None
    repeated = f"; {count(job.repeated, 'id')} came again, and the last one counts" if job.repeated else ""
    refused = f", {job.refused:,} refused" if job.refused else ""
    deleted = "" if job.deleted is None else f", {job.deleted:,} deleted"
    return f"{job.new:,} new, {job.replaced:,} replaced, {job.unchanged:,} unchanged{deleted}{refused}{repeated}"


def _tokens(job: Job) -> str:
    engine = f" in {duration(job.engine_seconds)} of engine time" if job.engine_seconds else ""
    return f"{job.tokens:,}{engine}"
