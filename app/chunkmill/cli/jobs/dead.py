"""`dead list`, `dead show`, `dead retry` and `dead drop`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from chunkmill.cli.jobs.attempts import moment
from chunkmill.cli.jobs.jobs import job_fields, require_all_complete, waited
from chunkmill.cli.late import Client
from chunkmill.cli.output import Group, Screen, beginning, count, json_option
from chunkmill.domain.results import DeadDetails, DeadEntry, Job
from chunkmill.errors import InvalidInput

NARROWEST = 20
"""Width in columns that a reason gets even if the other columns fill the line."""

ID = click.IntRange(1, 2**63 - 1)
ids_argument = click.argument("ids", nargs=-1, type=ID, metavar="[ID]...")
job_option = click.option("--job", "job_id", type=ID, help="Only the dead chunks of this job.")
code_option = click.option("--code", metavar="CODE", help="Only those with this code, such as not_finite.")


@click.group(cls=Group)
@json_option
def dead() -> None:
    """List, show, retry or drop the chunks that got no vector."""


@dead.command("list")
@job_option
@click.option("-c", "--collection", help="Only those of this collection.")
@code_option
@click.option("-n", "--limit", type=click.IntRange(1), default=20, show_default=True, help="Number of chunks to list.")
@json_option
@click.pass_obj
def list_(screen: Screen, job_id: int | None, collection: str | None, code: str | None, limit: int) -> None:
    """List the dead chunks, newest first.

    The last line says how many there are of each code. The column "now" says what became of the chunk: missing (it
    still has no vector), embedded, replaced (by another text), deleted, or refused (it was never in the collection).
    """
    with Client.from_env() as client:
        listed = client.dead(job_id, collection, code, limit)
        codes = client.dead_codes(job_id, collection, code)
    if screen.json:
        screen.document({"dead": [entry_fields(entry) for entry in listed], "codes": codes})
    elif not listed:
        unfiltered = (job_id, collection, code) == (None, None, None)
        screen.say("No chunk is dead." if unfiltered else "No dead chunk matches.")
    else:
        _show_list(screen, listed, codes)


@dead.command()
@click.argument("dead_id", metavar="ID", type=ID)
@click.option("--text", is_flag=True, help="Also print the text.")
@json_option
@click.pass_obj
def show(screen: Screen, dead_id: int, text: bool) -> None:
    """Show everything that is known about one dead chunk. ID is the first column of `chunkmill dead list`."""
    with Client.from_env() as client:
        details = client.dead_chunk(dead_id, with_text=text)
    if screen.json:
        fields = asdict(details)
        del fields["entry"]
        screen.document(entry_fields(details.entry) | fields)
    else:
        _show_details(screen, details)


@dead.command()
@ids_argument
@job_option
@code_option
@click.option("--wait", is_flag=True, help="Wait until their jobs end.")
@json_option
@click.pass_obj
def retry(screen: Screen, ids: tuple[int, ...], job_id: int | None, code: str | None, wait: bool) -> None:
    """Embed the texts of dead chunks again, each in its job. Nothing else of the job is repeated.

    Name the dead chunks by ID, or choose them with --job, --code or both. With --wait, it exits with 4 if one of the
    jobs fails or is cancelled.
    """
    which = _which(ids, job_id, code)
    with Client.from_env() as client:
        retried = client.retry_dead(**which)
        if not screen.json:
            jobs = f"job {retried.jobs[0]}" if len(retried.jobs) == 1 else count(len(retried.jobs), "job")
            screen.say(
                f"{count(retried.chunks, 'chunk')} of {jobs} removed from the dead list; "
                f"{count(retried.contents, 'text')} to embed."
            )
            for why, n in retried.passed_over.items():
                screen.hint(f"{count(n, 'chunk')} skipped: {why}")
        after = [client.job(number) for number in retried.jobs]
        if wait:
            after = [waited(screen, client, job) for job in after]
    if screen.json:
        screen.document(asdict(retried) | {"jobs": [job_fields(job) for job in after]})
    else:
        _show_jobs(screen, after)
    if wait:
        require_all_complete(screen, after)


@dead.command()
@ids_argument
@job_option
@code_option
@click.option("--yes", is_flag=True, help="Delete without asking.")
@json_option
@click.pass_obj
def drop(screen: Screen, ids: tuple[int, ...], job_id: int | None, code: str | None, yes: bool) -> None:
    """Delete chunks from the dead list and from their collections.

    Name the dead chunks by ID, or choose them with --job, --code or both. A job that failed only because of them
    completes. A chunk that was replaced since, or whose text has a vector by now, stays in its collection.
    """
    which = _which(ids, job_id, code)
    with Client.from_env() as client:
        if not yes and not _confirmed(screen, client, which):
            raise SystemExit(1)
        dropped = client.drop_dead(**which)
        after = [client.job(number) for number in dropped.jobs]
    if screen.json:
        screen.document(asdict(dropped) | {"jobs": [job_fields(job) for job in after]})
        return
    screen.say(
        f"{count(dropped.entries, 'entry', 'entries')} deleted from the dead list, "
        f"{count(dropped.chunks, 'chunk')} from their collections."
    )
    _show_jobs(screen, after)


def entry_fields(entry: DeadEntry) -> dict[str, object]:
    return asdict(entry) | {"why_not_retried": entry.why_not_retried}


def _show_list(screen: Screen, listed: Sequence[DeadEntry], codes: dict[str, int]) -> None:
    heads = ["id", "job", "collection", "chunk", "code", "now", "when"]
    rows = [
        [e.id, e.job_id, e.collection, e.chunk_id, e.code, e.standing.value, f"{e.created_at.astimezone():%m-%d %H:%M}"]
        for e in listed
    ]
    used = sum(max(len(str(cell)) for cell in column) + 2 for column in zip(heads, *rows, strict=True))
    width = max(NARROWEST, screen.out.width - used)
    reasons = [beginning(entry.reason, width) for entry in listed]
    screen.table([*heads, "reason"], [[*row, reason] for row, reason in zip(rows, reasons, strict=True)])
    total = sum(codes.values())
    screen.say("")
    screen.say(", ".join(f"{n:,} {code}" for code, n in codes.items()))
    if total > len(listed):
        screen.say(f"These are the newest {len(listed):,} of {total:,}. -n shows more.")


def _show_details(screen: Screen, details: DeadDetails) -> None:
    entry = details.entry
    stored = details.characters is not None
    screen.fields(
        {
            "dead chunk": str(entry.id),
            "job": f"{entry.job_id}, {entry.job_state}",
            "collection": entry.collection,
            "chunk": entry.chunk_id,
            "content": entry.content_hash,
            "code": entry.code,
            "reason": entry.reason,
            "now": entry.standing.value,
            "retry": f"no: {entry.why_not_retried}" if entry.why_not_retried else "possible",
            "metadata": None if details.metadata is None else json.dumps(details.metadata, ensure_ascii=False),
            "text": f"{details.characters:,} characters, {details.bytes:,} bytes" if stored else "not stored",
            "when": f"{entry.created_at.astimezone():%Y-%m-%d %H:%M:%S}",
        }
    )
    if details.deaths:
        screen.say("")
        screen.table(
            ["worker that died", "when", "evidence"],
            [(death.worker, moment(death.ended_at), death.evidence) for death in details.deaths],
        )
    if details.text is not None:
        screen.say("")
        screen.text(details.text)
    elif stored:
        screen.hint(f"To see the text: chunkmill dead show {entry.id} --text")


def _show_jobs(screen: Screen, jobs: Sequence[Job]) -> None:
    for job in jobs:
        screen.say(f"Job {job.id} ({job.collection}) is {job.state}: {job.remaining:,} to go, {job.dead:,} dead.")


def _which(ids: tuple[int, ...], job_id: int | None, code: str | None) -> dict[str, Any]:
    if bool(ids) == (job_id is not None or code is not None):
        raise click.UsageError("Name dead chunks by ID, or choose them with --job, --code or both.")
    return {"ids": ids} if ids else {"job_id": job_id, "code": code}


def _confirmed(screen: Screen, client: Client, which: dict[str, Any]) -> bool:
    if screen.asked_json or not sys.stdin.isatty():
        raise InvalidInput(
            "dead drop asks before it deletes, and stdin is not a terminal: pass --yes to delete without asking."
        )
    number = len(set(which["ids"])) if "ids" in which else sum(client.dead_codes(**which).values())
    return click.confirm(
        f"Delete {count(number, 'dead chunk')} from the dead list and from their collections?", err=True
    )
