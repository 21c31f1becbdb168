"""The `chunkmill` command on a real stack, with a real worker and poller."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result

from chunkmill.cli.__main__ import cli
from chunkmill.client import Client
from chunkmill.embedded import Stack
from chunkmill.embedded.process import command_line
from chunkmill.errors import InvalidSetting
from tests.support import forks
from tests.support.checkout import CHECKOUT, PYTHONPATH
from tests.support.embedded_homes import folder_for_homes
from tests.support.forks import Process
from tests.support.imports import assert_light
from tests.support.waiting import PATIENCE, until

DOCS = [
    {"id": "tls", "text": "How to rotate a TLS certificate before it expires.", "source": "ops"},
    {"id": "bread", "text": "Knead the dough, let it rise, and bake the bread.", "source": "kitchen"},
    {"id": "disk", "text": "The disk is full: find large files and delete old logs.", "source": "ops"},
]


@pytest.fixture(scope="module", autouse=True)
def home() -> Iterator[Path]:
    """An embedded stack of this module's own, which every command here finds by itself."""
    with folder_for_homes() as folder, pytest.MonkeyPatch.context() as patch:
        for name in ("DATABASE_URL", "REDIS_URL"):
            patch.delenv(name, raising=False)
        patch.setenv("CHUNKMILL_HOME", str(folder / "home"))
        patch.setenv("PYTHONPATH", PYTHONPATH)
        Stack(folder / "home", fsync=False).up()  # which `up` finds running, and starts in a third of the time
        assert (document("up")["running"], document("up")["started"]) == (True, [])
        yield folder


@pytest.fixture(scope="module")
def processes(home: Path) -> Iterator[dict[str, Process]]:
    """A worker and a poller, started as a user starts them."""
    started: dict[str, Process] = {}
    try:
        for name, arguments in (("worker", ["-c", "1"]), ("poller", [])):
            with (home / f"{name}.log").open("wb") as log:
                command = ["chunkmill.cli", name, *arguments]
                started[name] = forks.start(command, env=os.environ, cwd=CHECKOUT, stdout=log, stderr=log)

        def connected() -> bool:
            for name, child in started.items():
                assert child.poll() is None, (home / f"{name}.log").read_text()
            database = document("status")["database"]
            return bool(database["worker_connections"] and database["poller_connections"])

        until(connected, (home / "worker.log").read_text, pause=0.2)
        yield started
    finally:
        for child in started.values():
            child.terminate()
        codes = {name: end_of(child) for name, child in started.items()}
    assert codes == {"worker": 0, "poller": 0}


def end_of(child: Process) -> int:
    """The exit code; a process that does not go is killed."""
    try:
        return child.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


@pytest.fixture(scope="module")
def docs(home: Path) -> Path:
    path = home / "docs.jsonl"
    path.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    return path


@pytest.fixture(scope="module")
def embedded(processes: object, docs: Path) -> dict[str, Any]:
    """The job that embedded `docs` into the collection `docs`."""
    job: dict[str, Any] = document("enqueue", str(docs), "-c", "docs", "--wait")
    return job


def call(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, list(arguments), input=stdin)


def document(*arguments: str, exit_code: int = 0) -> Any:
    done = call(*arguments, "--json")
    assert done.exit_code == exit_code, done.output
    return json.loads(done.stdout)


def screen(*arguments: str, exit_code: int = 0) -> str:
    done = call(*arguments)
    assert done.exit_code == exit_code, done.output
    return done.stdout


def refusal(*arguments: str, exit_code: int = 1) -> str:
    """The one line on stderr, the same for a person and as JSON."""
    for_people, for_programs = call(*arguments), call(*arguments, "--json")
    assert (for_people.exit_code, for_programs.exit_code) == (exit_code, exit_code)
    assert for_people.stdout == for_programs.stdout == ""
    message = str(json.loads(for_programs.stderr.splitlines()[-1])["message"])
    assert for_people.stderr.splitlines()[-1] == f"error: {message}"
    return message


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a shell runs it, without a terminal."""
    return forks.run(["chunkmill.cli", *arguments], env=os.environ, cwd=CHECKOUT)


# Without a worker


@pytest.fixture
def empty_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """DATABASE_URL, with a password, and REDIS_URL of servers that somebody else runs; nothing is migrated."""
    status = Stack().status()
    plain = status.database_url.replace("+psycopg", "")
    with psycopg.connect(plain, autocommit=True) as conn:
        conn.execute("DROP DATABASE IF EXISTS elsewhere WITH (FORCE)")
        conn.execute("CREATE DATABASE elsewhere")
    url = plain.replace("postgres@", "postgres:hunter2@").replace("/chunkmill?", "/elsewhere?")
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.setenv("REDIS_URL", status.redis_url.replace("db=0", "db=1"))


def test_commands_that_find_the_embedded_stack_import_no_more_than_others() -> None:
    """They ask both servers whether they run, before everything else."""
    assert_light(["jobs", "collections", "cost", "status"], environment=os.environ)


def test_an_empty_database_is_migrated_and_no_password_is_shown(empty_database: None) -> None:
    before = document("status")
    assert not before["embedded"]
    assert before["database"]["migration"] is None
    assert before["database"]["open_jobs"] is None
    done = process("jobs")
    assert done.returncode == 1
    assert (
        done.stderr
        == f"error: the database is empty, this version needs {before['database']['head']}. Run: chunkmill migrate\n"
    )
    migrated = document("migrate")
    assert migrated["before"] is None
    assert migrated["after"] == document("status")["database"]["head"]
    assert "already" in screen("migrate")
    for arguments in (["status"], ["status", "--json"], ["doctor"], ["doctor", "--json"]):
        assert "hunter2" not in call(*arguments).output
    assert "postgres:***@" in screen("status")


def test_nothing_is_there_yet(empty_database: None) -> None:
    call("migrate")
    assert "No jobs yet" in screen("jobs")
    assert document("jobs") == []
    assert "no collections" in screen("audit")
    assert document("audit") == []
    assert "No space" in screen("models")
    assert screen("poller", "--check", exit_code=1) == "No poller is connected.\n"
    assert document("poller", "--check", exit_code=1) == {"connected": False, "connections": 0}
    assert "none connected" in screen("status")


def test_a_search_without_a_worker_says_how_to_start_one(empty_database: None, docs: Path) -> None:
    call("migrate")
    assert document("enqueue", str(docs), "-c", "docs", "--no-wait")["state"] == "running"
    done = call("search", "certificate", "-c", "docs", "--timeout", "0.2")
    assert done.exit_code == 1
    assert "No worker is connected" in done.stderr
    assert "error: no worker answered" in done.stderr
    assert document("audit", "docs", exit_code=3)["missing_ids"] == ["bread", "disk", "tls"]
    assert "Missing in docs:\n  bread\n" in screen("audit", exit_code=3)
    job = document("cancel", "1")
    assert job["state"] == "cancelled"
    assert "cancelled" in screen("jobs")
    shown = call("job", "1")
    assert "0 from the cache, 3 left without a vector" in shown.stdout
    assert "To embed the 3 texts without a vector: chunkmill retry 1" in shown.stderr


def test_postgres_that_is_down_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:hunter2@127.0.0.1:1/chunkmill")
    monkeypatch.setenv("REDIS_URL", "redis://:hunter2@127.0.0.1:1/0")
    message = refusal("jobs")
    assert "127.0.0.1:1" in message
    assert "hunter2" not in message
    status = document("status")
    assert "cannot connect to Postgres" in status["database"]["error"]
    assert "cannot use Redis" in status["broker"]["error"]
    doctor = document("doctor", exit_code=1)
    assert {c["name"] for c in doctor["checks"] if c["state"] == "fail"} == {"Postgres", "Redis"}
    assert "2 of" in screen("doctor", exit_code=1)
    assert "hunter2" not in json.dumps(status) + json.dumps(doctor)


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://host/db")
    assert "REDIS_URL" in refusal("status")
    assert "REDIS_URL" in refusal("jobs")


def test_only_up_starts_servers(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("CHUNKMILL_HOME", str(home / "other"))
    assert document("status")["running"] is False
    assert "chunkmill up" in screen("status")
    assert "was not running" in screen("down")
    assert "chunkmill up" in refusal("jobs")
    assert "chunkmill up" in refusal("migrate")
    assert "chunkmill up" in refusal("enqueue", str(CHECKOUT / "docs"), "-c", "docs")
    with pytest.raises(InvalidSetting, match="DATABASE_URL and REDIS_URL are not set"):
        Client.from_env()
    # These two last: with servers they would run, in this process and without an end.
    assert "chunkmill up" in refusal("worker")
    assert "chunkmill up" in refusal("poller")
    assert not (home / "other").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["enqueue", "-"],
        ["search"],
        ["search", "-c", "docs"],
        ["search", "q", "-c", "docs", "--like", "a"],
        ["search", "q", "-c", "docs", "--where", "[1]"],
        ["nothing"],
        ["job", "x"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert call(*arguments).exit_code == 2
    done = call(*arguments, "--json")
    assert done.exit_code == 2
    assert json.loads(done.stderr)["error"] == "usage"


def test_a_bad_line_or_chunk_is_named_by_its_place(home: Path) -> None:
    path = home / "bad.jsonl"
    path.write_text('{"id": "a", "text": "fine"}\nnot JSON\n{"id": "b", "text": "  "}\n')
    assert f"{path}:2: not valid JSON" in refusal("enqueue", str(path), "-c", "bad")
    path.write_text('{"id": "a", "text": "fine"}\n\n{"id": "b", "text": "  "}\n')
    assert f"{path}:3: chunk 'b': the text is empty" in refusal("enqueue", str(path), "-c", "bad")
    assert "no file or folder" in refusal("enqueue", str(home / "none.csv"), "-c", "bad")
    path.write_text('{"id": "a", "text": "fine"}\n')
    assert "gives 384 dimensions" in refusal("enqueue", str(path), "-c", "bad", "--dimensions", "96")
    assert call("enqueue", str(path), "-c", "bad", "--precision", "int4").exit_code == 2
    assert "there is no collection 'bad'" in refusal("audit", "bad")


def test_a_folder_is_kept_in_step_and_too_many_bad_records_exit_with_5(home: Path) -> None:
    folder, options = home / "in_step", ("-c", "in_step", "--sync", "--no-wait")
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.md").write_text(f"text of {name}")
    document("enqueue", str(folder), *options)
    (folder / "a.md").unlink()
    (folder / "b.md").write_text("another text of b")
    (folder / "c.md").write_text(" ")
    assert "text of c" not in refusal("enqueue", str(folder), *options)
    assert "1 of 2 chunks are refused" in refusal("enqueue", str(folder), *options, "--max-refused", "1%", exit_code=5)
    rehearsed = document("enqueue", str(folder), *options, "--dry-run", "--on-invalid", "skip")
    assert rehearsed["deleted"] == 1
    assert document("audit", "in_step", exit_code=3)["chunks"] == 3
    done = screen("enqueue", str(folder), *options, "--max-refused", "50%")
    assert "0 new, 1 replaced, 0 unchanged, 1 deleted, 1 refused" in done
    job = document("jobs", "-n", "1")[0]
    assert job["deleted"] == job["refused"] == 1
    (dead,) = document("job", str(job["id"]))["dead_chunks"]
    assert (dead["chunk_id"], f"{folder}/c.md: the text is empty" in dead["reason"]) == ("c.md", True)
    assert call("job", str(job["id"]), "--max-refused", "0").exit_code == 5
    assert call("job", str(job["id"]), "--max-refused", "50%").exit_code == 0
    (folder / "b.md").write_text(" ")
    # Two documents without a text are more than any limit allows here, and skipping all was asked for.
    assert call("enqueue", str(folder), "-c", "in_step", "--no-wait", "--on-invalid", "skip").exit_code == 0
    assert document("jobs", "-n", "1")[0]["refused"] == 2
    assert "--sync-where needs --sync" in refusal("enqueue", str(folder), "-c", "in_step", "--sync-where", '{"a": 1}')
    document("delete", "in_step", "--all", "--yes")


def test_what_does_not_exist_is_an_error() -> None:
    assert "no job 999" in refusal("job", "999")
    assert "no job 999" in refusal("cancel", "999")
    assert "no job 999" in refusal("retry", "999")
    assert "no collection" in refusal("index", "none")
    assert "pass --yes" in refusal("delete", "none", "--all")
    assert "no collection" in refusal("delete", "none", "--all", "--yes")
    assert "cannot be found" in refusal("migrate", "--revision", "nonesuch")


@pytest.mark.parametrize("arguments", [["--yes"], ["a", "--all", "--yes"]], ids=["an empty $(cat ids.txt)", "both"])
def test_a_delete_names_its_chunks_or_says_all(arguments: list[str]) -> None:
    done = call("delete", "docs", *arguments)
    assert done.exit_code == 2
    assert "pass --all" in done.stderr


# With a worker


def test_enqueue_and_search(embedded: dict[str, Any]) -> None:
    assert (embedded["state"], embedded["chunks"], embedded["embedded"]) == ("completed", 3, 3)
    hits = document("search", "renew an expiring certificate", "-c", "docs", "-k", "2")
    assert hits[0]["chunk_id"] == "tls"
    assert hits[0]["score"] > hits[1]["score"]
    assert hits[0]["metadata"] == {"source": "ops"}
    shown = screen("search", "renew an expiring certificate", "-c", "docs", "--exact")
    assert shown.index("tls\n") < shown.index("How to rotate a TLS certificate")
    where = '{"source": "kitchen"}'
    assert [hit["chunk_id"] for hit in document("search", "certificate", "-c", "docs", "--filter", where)] == ["bread"]
    assert screen("search", "x", "-c", "docs", "--where", '{"source": "none"}') == "Nothing was found.\n"
    where = '{"source": {"$gt": "kitchen"}}'
    ids = [hit["chunk_id"] for hit in document("search", "certificate", "-c", "docs", "--where", where)]
    assert ids[0] == "tls"
    assert "bread" not in ids
    assert "filter at source.$above: there is no such operator" in refusal(
        "search", "x", "-c", "docs", "--where", '{"source": {"$above": 1}}'
    )


def test_the_neighbours_of_a_chunk_come_in_pages_with_reasons(embedded: dict[str, Any]) -> None:
    everything = document("search", "--like", "tls", "-c", "docs")
    assert len(everything) == 2
    pages = [document("search", "--like", "tls", "-c", "docs", "-k", "1", "--offset", f"{i}") for i in range(3)]
    assert pages == [everything[:1], everything[1:], []]
    least = str(everything[0]["score"])
    explained = document("search", "--like", "tls", "-c", "docs", "--min-score", least, "--explain", "--exact")
    assert explained["hits"] == everything[:1]
    assert (explained["plan"]["is_exact"], explained["plan"]["candidates"]) == (True, 3)
    shown = screen("search", "--like", "tls", "-c", "docs", "--explain", "--exact")
    assert "Exact: An exact search was asked for.\n3 chunks compared with the query." in shown
    assert "there is no chunk 'none'" in refusal("search", "--like", "none", "-c", "docs")


def test_the_texts_of_a_job_are_not_called_distinct_where_they_may_repeat(embedded: dict[str, Any]) -> None:
    """Each window counts its own texts, and 3,000 chunks are more than one window."""
    lines = "".join(json.dumps({"id": str(i), "text": f"repeated text {i % 2}"}) + "\n" for i in range(3_000))
    enqueued = call("enqueue", "-", "--collection", "repeats", "--wait", "--json", stdin=lines)
    job = json.loads(enqueued.stdout)
    assert (job["chunks"], document("audit", "repeats")["contents"]) == (3_000, 2)
    assert job["contents"] > 2
    shown = screen("job", str(job["id"]))
    assert f" {job['contents']}: {job['embedded']} embedded, {job['cached']} from the cache, 0 to go" in shown
    assert "distinct" not in shown
    assert "counted again" in " ".join(call("job", "--help").stdout.split())


def test_jobs_and_audit(embedded: dict[str, Any]) -> None:
    assert embedded["id"] in [job["id"] for job in document("jobs", "--limit", "50")]
    assert "completed" in screen("jobs")
    assert document("job", str(embedded["id"])) == embedded
    assert "3 embedded, 0 from the cache, 0 to go" in screen("job", str(embedded["id"]), "--wait")
    assert document("retry", str(embedded["id"])) == embedded
    assert document("cancel", str(embedded["id"]))["state"] == "completed"
    audit = document("audit", "docs")
    assert (audit["chunks"], audit["missing"], audit["complete"]) == (3, 0, True)
    assert [audited["collection"] for audited in document("audit")].count("docs") == 1


def test_models_and_index(embedded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (space,) = [s for s in document("models") if s["fingerprint"] == embedded["space"]]
    assert (space["model"], space["dimensions"]) == ("all-MiniLM-L6-v2", 384)
    assert "docs" in space["collections"]
    assert "all-MiniLM-L6-v2" in screen("models")
    assert "needs no serving index" in screen("index", "docs")
    monkeypatch.setattr("chunkmill.store.indexing.MIN_ROWS", 2)
    assert "docs is served by 1 segment with 3 rows" in screen("index", "docs")
    assert document("index", "docs")["is_ready"] is True
    assert document("search", "certificate", "-c", "docs", "-k", "1")[0]["chunk_id"] == "tls"


def test_the_canary_is_shown_with_its_maker_and_forgotten(embedded: dict[str, Any]) -> None:
    (kept,) = [reference for reference in document("models", "canary") if reference["fingerprint"] == embedded["space"]]
    assert kept["made_by"]["worker"].partition(":")[2].isdigit()
    assert "torch" in kept["made_by"]["versions"]
    assert kept["made_by"]["worker"] in screen("models", "canary")
    assert "no space has a fingerprint that begins with 'none'" in refusal("models", "canary", "--reset", "none")
    assert document("models", "canary", "--reset", "all-MiniLM-L6-v2") == {"forgotten": [embedded["space"]]}
    assert "nothing was changed" in screen("models", "canary", "--reset", embedded["space"][:12])
    assert document("models", "canary") == []
    assert "There is no reference yet" in screen("models", "canary")


def test_status_and_doctor_see_the_processes(processes: dict[str, Process], home: Path) -> None:
    status = document("status")
    assert status["home"] == str(home / "home")
    assert status["database"]["migration"] == status["database"]["head"]
    assert status["broker"]["doorbells"] >= 0
    assert str(status["postgres"]["pid"]) in screen("status")
    until(lambda: document("status")["database"]["workers"] == 1, lambda: screen("status"))
    assert "workers    1 ready: " in screen("status")
    assert screen("poller", "--check") == "A poller is connected.\n"
    doctor = document("doctor")
    states = {check["name"]: check["state"] for check in doctor["checks"]}
    assert states.items() >= {
        "Python": "ok", "pgvector": "ok", "migration": "ok", "worker": "ok", "poller": "ok", "Redis eviction": "ok",
        "Postgres clock": "ok", "Redis clock": "ok",
    }.items()  # fmt: skip
    # The servers from wheels may lack security fixes, which is a warning.
    assert {states["Postgres"], states["Redis"]} <= {"ok", "warn"}
    assert "No check failed." in screen("doctor")
    # `worker` became the supervisor, so that signals reach it, and hands its arguments on to Celery.
    assert "chunkmill_workers.supervisor.supervisor -c 1" in command_line(processes["worker"].pid)
    started = re.findall(r"started, pid (\d+)", (home / "worker.log").read_text())
    assert ["-P -m chunkmill_workers worker -Q gpu -c 1" in command_line(int(pid)) for pid in started] == [True]


def test_bad_records_are_skipped_into_the_dead_list(processes: object, home: Path) -> None:
    path = home / "some.csv"
    path.write_text("key,body,lang\na,first,en\nb\nc,,en\nd,last,de\n")
    job = document(
        "enqueue",
        str(path),
        "-c",
        "some",
        "--id-field",
        "key",
        "--text-field",
        "body",
        "--on-invalid",
        "skip",
        "--wait",
    )
    assert (job["state"], job["chunks"], job["dead"]) == ("completed", 2, 2)
    assert [d["chunk_id"] for d in job["dead_chunks"]] == [f"{path}:3", "c"]
    dead = screen("job", str(job["id"]), "--dead")
    assert "1 columns, the header has 3" in dead
    assert "empty_text" in dead


def test_a_failed_job_exits_with_4(processes: object, home: Path) -> None:
    path = home / "long.jsonl"
    path.write_text(json.dumps({"id": "long", "text": "word " * 2000}) + "\n")
    rejected = document("enqueue", str(path), "-c", "rejected", "--on-long", "reject", "--wait")
    assert rejected["dead"] == 1
    job = document("enqueue", str(path), "-c", "failed", "--no-wait", "--on-long", "split")
    document("job", str(job["id"]), "--wait")
    with psycopg.connect(Stack().status().database_url.replace("+psycopg", "")) as conn:
        conn.execute("UPDATE chunkmill.jobs SET state = 'failed', error = 'made up.' WHERE id = %s", (job["id"],))
    done = call("job", str(job["id"]), "--json")
    assert done.exit_code == 4
    assert json.loads(done.stdout)["state"] == "failed"
    assert json.loads(done.stderr)["error"] == "job_failed"
    again = call("retry", str(job["id"]), "--wait")
    assert again.exit_code == 0
    assert "completed" in again.stdout


def test_what_is_cut_is_said_at_the_end_and_a_folder_in_chunks_is_found_by_its_paragraph(
    processes: object, home: Path
) -> None:
    folder = home / "handbook"
    folder.mkdir()
    filler = "\n\n".join(f"In room {n} the clerks copy letters and file them by number." for n in range(40))
    (folder / "mill.md").write_text(f"# Mill\n\n{filler}\n\n## Beekeeping\n\nFeed the bees syrup before winter.\n")
    whole = call("enqueue", str(folder), "-c", "whole", "--wait")
    assert "1 text is longer than the model reads" in whole.stderr
    assert "--chunk 200" in whole.stderr
    (job_id,) = re.findall(r"^job +(\d+)$", whole.stdout, re.MULTILINE)
    assert "1 text is longer" in call("job", job_id).stderr
    cut = call("enqueue", str(folder), "-c", "cut", "--chunk", "60", "--overlap", "10", "--wait")
    assert "longer than the model" not in cut.stderr
    assert "1 document cut into" in cut.stderr
    (hit,) = document("search", "bees in the cold season", "-c", "cut", "-k", "1")
    assert hit["text"] == "## Beekeeping\n\nFeed the bees syrup before winter."
    assert hit["metadata"]["headings"] == ["Mill", "Beekeeping"]
    assert hit["truncated"] is False
    with Client.from_env() as client:
        assert client.wait(int(job_id)).notice is not None


def test_a_folder_stdin_and_parquet_together(processes: object, home: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = home / "texts"
    (texts / "sub").mkdir(parents=True)
    (texts / "sub" / "a.md").write_text("# A page")
    parquet.write_table(pa.table({"id": [1], "text": ["a row"]}), home / "rows.parquet")
    line = '{"id": "line", "text": "a line"}\n'
    arguments = ["enqueue", "-", str(texts), str(home / "rows.parquet"), "-c", "mixed", "--wait", "--json"]
    done = call(*arguments, "--idempotency-key", "mixed", stdin=line)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["chunks"] == 3
    assert (
        json.loads(call(*arguments, "--idempotency-key", "mixed", stdin=line).stdout)["id"]
        == json.loads(done.stdout)["id"]
    )
    assert "Deleted 1 chunk of 'mixed'" in screen("delete", "mixed", "1", "--yes")
    assert document("delete", "mixed", "--all", "--yes") == {"collection": "mixed", "deleted": 2}


def on_a_terminal(*arguments: str, interrupt_after: str | None = None) -> tuple[int, str]:
    """Exit code and screen of a real process on a terminal of 80 columns.

    Ctrl-C is typed after a word is seen. It has its effect in a suite that runs in a shell's background too, whose
    processes are started with SIGINT ignored: a fork never ignores it.
    """
    controller, terminal = pty.openpty()
    child = forks.start(
        ["chunkmill.cli", *arguments], cwd=CHECKOUT, stdin=terminal, stdout=terminal, stderr=terminal, new_session=True,
        env=os.environ | {"COLUMNS": "80", "TERM": "xterm"},
    )  # fmt: skip
    os.close(terminal)
    seen = b""
    deadline = time.monotonic() + PATIENCE  # a bar never stops writing
    try:
        while select.select([controller], [], [], PATIENCE)[0] and time.monotonic() < deadline:
            try:
                part = os.read(controller, 65536)
            except OSError:  # the terminal's last user has gone
                break
            seen += part
            if interrupt_after and interrupt_after.encode() in seen:
                child.send_signal(signal.SIGINT)
                interrupt_after = None
        return child.wait(PATIENCE), seen.decode(errors="replace")
    finally:
        os.close(controller)
        if child.poll() is None:
            child.kill()
            child.wait()


def test_on_a_terminal_enqueue_waits_behind_a_bar(processes: object, docs: Path) -> None:
    code, seen = on_a_terminal("enqueue", str(docs), "-c", "terminal")
    assert code == 0
    assert "completed" in seen
    assert "reading" in seen


def test_ctrl_c_leaves_the_job_going_and_exits_with_130(empty_database: None, docs: Path) -> None:
    call("migrate")
    code, seen = on_a_terminal("enqueue", str(docs), "-c", "docs", interrupt_after="/3 texts")
    assert code == 130
    assert "continues. To follow it: chunkmill job" in seen
    assert "Traceback" not in seen


def test_a_dry_run_does_not_say_that_it_stores(processes: object, docs: Path) -> None:
    _, seen = on_a_terminal("enqueue", str(docs), "-c", "rehearsed", "--dry-run")
    assert ("counting 3 chunks" in seen, "storing" in seen) == (True, False)
    _, seen = on_a_terminal("enqueue", str(docs), "-c", "in_earnest", "--wait")
    assert ("storing 3 chunks" in seen, "counting" in seen) == (True, False)


def test_the_demo_does_it_all_and_leaves_nothing(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = home / "demo"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for unset in ("XDG_RUNTIME_DIR", "WORKER_SOCKET"):
        monkeypatch.delenv(unset, raising=False)
    done = process("demo", "--limit", "60", "--home", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["job"]["state"], told["job"]["chunks"]) == ("completed", 60)
    assert told["again"]["embedded"] == 0
    assert told["audit"]["complete"]
    assert len(told["searches"]) == 4
    assert all(search["hits"] for search in told["searches"])
    assert not folder.exists()
    assert list(tmp_path.iterdir()) == []


def test_the_readme_shows_what_the_demo_prints(home: Path) -> None:
    done = process("demo", "--limit", "60", "--home", str(home / "shown"))
    assert done.returncode == 0, done.stderr
    assert steps(done.stdout) == steps((CHECKOUT / "README.md").read_text())
    assert "longer than the model reads" not in done.stderr, "a warning stands between the steps"


def steps(text: str) -> list[str]:
    """The lines with a check mark, without their numbers, times and what only root is told."""
    shown = [re.split(" {2,}", line)[0] for line in text.splitlines() if line.startswith("✓ ")]
    shown = [line.partition(", but for the system user")[0].rstrip(".") for line in shown]
    return [re.sub(r"[0-9][0-9,.]*\b", "#", line) for line in shown]
