"""`demo`: everything from text to search, on a machine where nothing runs yet. It leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

import click
from rich.cells import cell_len

from chunkmill.cli.collections.search import audit_fields, show_hits
from chunkmill.cli.jobs.jobs import follow, job_fields
from chunkmill.cli.late import Broker, Client, Settings, Stack, create_db, migrate, temporary_folder
from chunkmill.cli.output import Screen, count, duration, json_option
from chunkmill.cli.processes.processes import require_extra
from chunkmill.cli.start.children import Child
from chunkmill.cli.start.corpus import some_stdlib_docstrings, stdlib_docstrings
from chunkmill.domain.chunks import Chunk
from chunkmill.domain.shown import shown
from chunkmill.errors import InvalidInput, WaitTimeout
from chunkmill.system.python import module_command

COLLECTION = "python-stdlib"
QUERIES = ["compress a file", "parse command line arguments", "rotate a log file", "send an email over SMTP"]
HITS = 5
ACTIVATES = "the shell then finds chunkmill"
READY_SECONDS = 600.0
"""How many seconds the worker may take to start. On a busy machine it may read torch and the model from a cold disk."""


@click.command()
@click.option(
    "--limit", type=click.IntRange(1), help="At most how many docstrings are embedded; all of them by default."
)
@click.option(
    "--home",
    type=click.Path(path_type=Path),
    help="New or empty folder for data and logs.  [default: a temporary folder]",
)
@click.option("--keep", is_flag=True, help="Keep the folder at the end.")
@json_option
@click.pass_obj
def demo(screen: Screen, limit: int | None, home: Path | None, keep: bool) -> None:
    """Embed and search the documentation of Python's own standard library.

    It starts a real Postgres, Redis, worker and poller in a folder of their own, enqueues about 8,600 docstrings,
    waits until they are embedded, proves that none is missing, and searches them. Then it stops everything and deletes
    the folder.
    """
    require_extra("worker", "torch", "the demo's worker")
    folder = _new_folder(home)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    run = _Run(screen, folder)
    try:
        run.play(limit)
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt | SystemExit):
            run.show_worker_log()
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave servers behind
        run.clean_up(keep=keep)
    _show_end(screen, run, keep=keep)


@dataclass
class _Run:
    """What is running, and the results so far."""

    screen: Screen
    folder: Path
    children: list[Child] = field(default_factory=list)
    results: dict[str, object] = field(default_factory=dict)
    client: Client | None = None

    @property
    def stack(self) -> Stack:
        return Stack(self.folder / "stack")

    def play(self, limit: int | None) -> None:
        self.screen.say(("Chunkmill", "bold"), ": the documentation of Python's own library, made searchable.")
        self.screen.say("")
        with self._step("starting Postgres and Redis") as said:
            status = self.stack.up()
            settings = Settings.from_env(database_url=status.database_url, redis_url=status.redis_url)
            migrate(settings.require_database_url())
            said.append(f"Postgres {status.postgres.version} with pgvector, and Redis {status.redis.version}")
        self._start_processes()
        db = create_db(settings.require_database_url(), role="client")
        client = self.client = Client(db, Broker.connect(settings), settings)
        with self._step("reading docstrings") as said:
            chunks = _read(limit, said)
        with self._step("loading the model") as said:
            self._await_worker(client)
            pids = ", ".join(f"{child.name} (pid {child.pid})" for child in self.children)
            said.append(f"{pids}: {settings.embedding_model} is loaded")
        self._embed(client, chunks)
        self._enqueue_again(client, chunks)
        self._audit(client)
        self._search(client)

    def _start_processes(self) -> None:
        env = {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "REDIS_URL")}
        env["CHUNKMILL_HOME"] = str(self.stack.home)
        env.setdefault("WORKER_SOCKET", f"unix:{self.folder}")  # where `auto` listens, a folder would be left
        celery = module_command("chunkmill_workers", "worker", "-Q", "gpu")
        poller = module_command("chunkmill.cli", "poller")
        for name, argv in (("worker", celery), ("poller", poller)):
            self.children.append(Child(name, argv, env=env, log=self.folder / f"{name}.log"))

    def _await_worker(self, client: Client) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                client.embed(["ready?"], timeout=1)
            except WaitTimeout:
                self._require_alive()
                if time.monotonic() > deadline:
                    raise
            else:
                return

    def _require_alive(self) -> None:
        for child in self.children:
            child.require_alive()

    def _embed(self, client: Client, chunks: list[Chunk]) -> None:
        began = time.monotonic()
        with self._step("enqueueing") as said:
            job = client.enqueue(chunks, collection=COLLECTION)
            said.append(f"{count(job.chunks, 'chunk')} enqueued, with {count(job.contents, 'text')}")
        with self._step("") as said:
            job = follow(self.screen, client, job.id, on_look=self._require_alive)
            seconds = time.monotonic() - began
            said.append(
                f"{count(job.embedded, 'text')} embedded, {job.tokens:,} tokens: "
                f"{job.embedded / seconds:,.0f} texts/s, {job.tokens / seconds:,.0f} tokens/s"
            )
            if job.truncated:
                said.append(f"{job.truncated:,} of them are longer than the model reads, and marked with (cut) below")
        self.results["job"] = job_fields(job) | {"seconds": round(seconds, 3)}

    def _enqueue_again(self, client: Client, chunks: list[Chunk]) -> None:
        began = time.monotonic()
        with self._step("enqueueing again") as said:
            job = follow(self.screen, client, client.enqueue(chunks, collection=COLLECTION).id)
            said.append(f"the same chunks again: {job.cached:,} texts from the cache, {job.embedded:,} embedded")
        self.results["again"] = job_fields(job) | {"seconds": round(time.monotonic() - began, 3)}

    def _audit(self, client: Client) -> None:
        with self._step("auditing") as said:
            audit = client.audit(COLLECTION)
            said.append(
                f"audit: {audit.embedded:,} of {count(audit.chunks, 'chunk')} have a vector, {audit.missing:,} missing"
            )
        self.results["audit"] = audit_fields(audit)

    def _search(self, client: Client) -> None:
        searches = self.results["searches"] = []
        for query in QUERIES:
            began = time.monotonic()
            hits = client.search(query, collection=COLLECTION, k=HITS)
            seconds = time.monotonic() - began
            searches.append({"query": query, "seconds": round(seconds, 4), "hits": [asdict(hit) for hit in hits]})
            self.screen.say("")
            self.screen.say(("search ", "dim"), (query, "bold"), (f"  {1000 * seconds:.0f} ms", "dim"))
            show_hits(self.screen, hits)

    @contextlib.contextmanager
    def _step(self, doing: str) -> Iterator[list[str]]:
        """Show a spinner during one step, then a check mark, what was ``said``, and how long the step took."""
        began = time.monotonic()
        said: list[str] = []
        spinner = self.screen.err.status(doing) if doing and self.screen.err.is_terminal else contextlib.nullcontext()
        with spinner:
            yield said
        took = duration(time.monotonic() - began)
        for index, line in enumerate(said):
            end = took if index == 0 else ""
            gap = " " * max(2, 77 - cell_len(line) - len(end))
            self.screen.say(("✓ " if index == 0 else "  ", "green"), line, gap if end else "", (end, "dim"))

    def show_worker_log(self) -> None:
        for child in self.children[:1]:
            self.screen.err.print(f"The end of the {child.name}'s log:", style="yellow")
            for line in child.tail():
                self.screen.err.print("  " + shown(line), soft_wrap=True)

    def clean_up(self, *, keep: bool) -> None:
        for child in self.children:
            child.ask_to_stop()
        for child in self.children:
            child.stop()
        if self.client:
            self.client.close()
        if keep:
            self.stack.down()
        else:
            self.stack.destroy()
            shutil.rmtree(self.folder)


def _new_folder(home: Path | None) -> Path:
    if home is None:
        return temporary_folder("chunkmill-demo-")
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise InvalidInput(
            f"{home} is not empty. The demo deletes its folder at the end, so name a new or an empty one."
        )
    home.mkdir(parents=True, exist_ok=True)
    return home.resolve()


def _read(limit: int | None, said: list[str]) -> list[Chunk]:
    chunks = list(stdlib_docstrings()) if limit is None else some_stdlib_docstrings(limit)
    said.append(f"{len(chunks):,} docstrings of Python {platform.python_version()} read")
    return chunks


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _activation() -> list[tuple[str, str]]:
    """What a shell needs first that would not find `chunkmill`, as after `make demo`."""
    script = Path(sys.prefix) / "bin" / "activate"
    if shutil.which("chunkmill") or not script.exists():
        return []
    below = Path.cwd() in script.parents[1:]  # the shell looks up a name without a slash on its PATH
    here = script.relative_to(Path.cwd()) if below else script
    return [(f". {shlex.quote(str(here))}", ACTIVATES)]


def _show_end(screen: Screen, run: _Run, *, keep: bool) -> None:
    if screen.json:
        screen.document(run.results | ({"home": run.folder} if keep else {}))
        return
    kept = f"The data is in {run.folder}: CHUNKMILL_HOME={run.stack.home} chunkmill up"
    if not keep:
        of_root = ", but for the system user chunkmill, which runs the servers of root" if os.geteuid() == 0 else ""
        kept = f"Nothing is left behind{of_root}."
    screen.say("")
    screen.say(("✓ ", "green"), "everything stopped. ", kept)
    screen.say("")
    screen.say(("With your own texts", "bold"))
    for command, what in (
        *_activation(),
        ("chunkmill up", "Postgres and Redis, to stay"),
        ("chunkmill worker", "in another terminal: it embeds"),
        ("chunkmill poller", "in a third: repeats lost work"),
        ("chunkmill enqueue FOLDER -c docs --chunk 200", "documents, or FILE.csv"),
        ('chunkmill search "a question" -c docs', ""),
    ):
        screen.say(f"  {command:<45} ", (what, "dim"), indent=48)
    screen.say("")
    screen.say(("In Python", "bold"))
    for line in (
        "from chunkmill import Client",
        "client = Client.from_env()",
        'job = client.enqueue([("id-1", "a text")], collection="docs")',
        "client.wait(job.id)",
        'print(client.search("a question", collection="docs", k=5))',
    ):
        screen.say(f"  {line}")
