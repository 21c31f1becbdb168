"""Every `chunkmill` command that the documents show is run: here, or by the test that ``ELSEWHERE`` names."""

from __future__ import annotations

import gzip
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from chunkmill.cli.__main__ import cli
from chunkmill.client import Client
from chunkmill.ledger.dead import dead_chunks
from chunkmill.ledger.dead.dead_chunks import DeadContent
from chunkmill.ledger.jobs.finish import finish_if_done
from chunkmill.ledger.work import chunk_batches, usage
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill.store.read import read_work
from chunkmill.store.write import write_vectors
from tests.unit.docs.test_commands import DOCUMENTS, commands_in

ROOT = Path(__file__).parents[2]
QUICKSTART = "tests/acceptance/test_quickstart.py"
ELSEWHERE = {
    **{f"golden {name}": "tests/integration/test_hybrid.py" for name in ("load", "titles", "tune")},
    "": QUICKSTART,
    "chunks get": "tests/integration/test_chunk_commands.py",
    "collections alias": "tests/integration/test_lives_of_collections.py",
    "collections unalias": "tests/integration/test_lives_of_collections.py",
    "collections outdated": "tests/integration/test_outdated_chunks.py",
    "cost correct": "tests/integration/test_corrections.py",
    "enqueue docs.parquet --collection copy": "tests/integration/test_export.py",
    "lanes abandon": "tests/integration/test_openai_let_go.py",
    "backup": "tests/integration/test_backup.py",
    "bridge": "tests/integration/test_bridges.py",
    "enqueue handbook": "tests/integration/test_cli.py",
    "enqueue handbook.jsonl --collection docs --wait": "tests/integration/test_exit_codes.py",
    "enqueue FOLDER --chunk 200": "tests/integration/test_cli.py",
    "compare": "tests/unit/chunkmill/cli/collections/test_compare.py",
    "map": "tests/integration/test_maps.py",
    "jobs --watch": "tests/integration/test_waiting_for_jobs.py",
    "status --plot": "tests/integration/test_history.py",
    "cost --plot": "tests/integration/test_history.py",
    "reembed": "tests/integration/test_reembed_command.py",
    "bench": "tests/unit/chunkmill_workers/benchmarks/test_benchmarks.py",
    "demo": "tests/integration/test_cli.py",
    "down": QUICKSTART,
    "flower": "tests/acceptance/test_flower.py",
    "gateway": "tests/integration/test_gateway_docs.py",
    "keys revoke": "tests/integration/test_gateway_keys.py",
    "models export": "tests/engine/test_exported_backends.py",
    "models check": "tests/unit/chunkmill/cli/models/test_models_commands.py",
    "models choose": "tests/unit/chunkmill/cli/models/test_models_commands.py",
    "models canary": "tests/integration/test_canary.py",
    "models drop": "tests/integration/test_unused_spaces.py",
    "poller": "tests/acceptance/conftest.py",
    "restore": "tests/integration/test_backup.py",
    "search": QUICKSTART,
    "search --like": "tests/integration/test_search_page.py",
    "status --watch": "tests/integration/test_looking.py",
    "tune": "tests/engine/test_tune.py",
    "up": QUICKSTART,
    "worker": "tests/acceptance/test_supervisor.py",
    # Needs a model from a hub: the test reads the settings it is shown with, and takes the route.
    "enqueue chunks.jsonl --collection docs --model BAAI/bge-base-en-v1.5": "tests/integration/test_routing.py",
}
"""By how a command begins: what runs for ever, takes minutes, or has a real worker, and which test runs it."""
WORDS = {"ID": "42", "JOB": "42", "FILE": "chunks.jsonl", "NAME": "other", "COLLECTION": "docs"}
COMPLETED = {
    "delete": "delete docs --all --yes",
    "delete docs --all": "delete docs --all --yes",
    'delete docs --filter \'{"source": "old-wiki"}\'': 'delete docs --filter \'{"source": "old-wiki"}\' --yes',
    "export": "export docs docs.jsonl",
    "enqueue": "enqueue chunks.jsonl --collection docs --no-wait",
    "cancel": "cancel 42",
    "collections drop": "collections drop docs --yes",
    "collections drop docs": "collections drop docs --yes",
    "index": "index docs",
    "keys": "keys list",
    "lanes resume": "lanes resume openai",
    "retry": "retry 42",
    "prune": "prune --yes",
    "dead drop": "dead drop 7 --yes",
    "dead drop 7": "dead drop 7 --yes",
    "dead retry": "dead retry 7",
}
"""What a sentence leaves out, and the answer of whoever is asked."""
FOUND = {"audit": 3, "job 42": 4, "job ID": 4, "poller --check": 1}
"""Commands whose exit code says that something is not as it should be, which here is so."""


def shown() -> list[tuple[str, str]]:
    """``(page, command)``, each command once."""
    seen: dict[str, str] = {}
    for page in DOCUMENTS:
        for command in commands_in(page.read_text()):
            seen.setdefault(" ".join(command.split()), page.stem)
    return [(page, command) for command, page in seen.items()]


def runs_elsewhere(page: str, command: str) -> str | None:
    if page == "quickstart":
        return QUICKSTART  # block by block
    begins = [words for words in ELSEWHERE if begins_with(command, words)]
    return ELSEWHERE[max(begins, key=len)] if begins and command not in FOUND else None


def begins_with(command: str, words: str) -> bool:
    return command == words or (bool(words) and command.startswith(f"{words} "))


HERE = [(page, command) for page, command in shown() if runs_elsewhere(page, command) is None]
PAID = {"EMBEDDING_MODEL": "text-embedding-3-small"}
DEPLOYMENT = {
    "OPENAI_BATCHES": "false",
    "OPENAI_MODELS": '{"my-deployment": {"dimensions": 1536, "max_tokens": 8191, "can_cut": true, "usd": 0.02}}',
}


@pytest.fixture
def place(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """The database and the folder in which the pages' examples are at home."""

    def prepare(page: str, command: str) -> None:
        monkeypatch.chdir(tmp_path)
        texts = [{"id": f"c{i}", "text": f"number {i}"} for i in range(5)]
        Path("chunks.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
        _sources()
        paid = page == "openai" or "--route" in command
        for name, value in {
            "DATABASE_URL": settings.require_database_url(),
            "REDIS_URL": settings.require_redis_url(),
            "CHUNKMILL_HOME": str(tmp_path / "home"),
            **(PAID if paid else {}),
            **(DEPLOYMENT if "my-deployment" in command else {}),
        }.items():
            monkeypatch.setenv(name, value)
        with Client.from_env() as client:
            with client._transaction() as conn:
                conn.execute(sa.text("ALTER TABLE jobs ALTER COLUMN id RESTART WITH 1"))  # the documents' first job
            if paid and not command.startswith("enqueue"):
                client.enqueue([("a", "a text")], collection="docs", route="openai")  # job 1
            elif not paid:
                _job_42(client)

    return prepare


def _sources() -> None:
    """The files and the folder of the page on sources."""
    Path("docs").mkdir()
    Path("docs/a.md").write_text("a document")
    Path("wiki.jsonl").write_text(json.dumps({"id": "w", "text": "an article", "source": "wiki"}))
    Path("prices.csv").write_bytes("id;text;price;valid_from\n1;Käse;2.5;2026-11-29\n".encode("cp1252"))
    Path("export.json.gz").write_bytes(gzip.compress(json.dumps([{"body": "a note"}]).encode()))


def _job_42(client: Client) -> None:
    """A failed job, 42, of collection docs: one text of three is dead, as number 7."""
    with client._db.begin() as conn:
        conn.execute(sa.text("ALTER TABLE jobs ALTER COLUMN id RESTART WITH 42"))
        conn.execute(sa.text("ALTER TABLE dead_chunks ALTER COLUMN id RESTART WITH 7"))
    job = client.enqueue([("a", "one"), ("b", "two"), ("c", "three")], collection="docs")
    with client._db.begin() as conn:
        lease = chunk_batches.claim_if_due(conn, 1, owner="host:1", lease_seconds=60)
        assert lease is not None
        space = registry.get(conn, lease.space_id)
        work = read_work(conn, space, 1)
        hashes = [content_hash for content_hash, _ in work.texts]
        vectors = np.eye(3, space.spec.dimensions, dtype=np.float32)[:2]
        write_vectors(
            conn, space, space.spec.fingerprint, hashes[:2], np.ones(2, np.int32), np.zeros(2, np.bool_), vectors
        )
        dead = DeadContent(hashes[2], "kills_workers", "4 workers died with it")
        dead_chunks.add_contents(conn, [dead], job_id=lease.job_id, collection_id=lease.collection_id)
        usage.book(conn, lease, usage.Usage("local", "host:1", 2, 2, 0.1), usage.Outcome.COMPLETED)
        chunk_batches.complete_if_held(conn, lease, n_embedded=2, n_truncated=0)
        finish_if_done(conn, job.id, space)
    assert (job.id, client.job(job.id).state) == (42, "failed")


@pytest.mark.parametrize(("page", "command"), HERE, ids=[f"{page}: {command}" for page, command in HERE])
def test_a_command_of_the_documents_does_what_it_says(
    page: str, command: str, place: Callable[[str, str], None]
) -> None:
    place(page, command)
    arguments = [WORDS.get(word, word) for word in shlex.split(COMPLETED.get(command, command))]
    done = CliRunner().invoke(cli, arguments)
    expected = next((code for words, code in FOUND.items() if begins_with(command, words)), 0)
    assert done.exit_code == expected, done.output
    assert "Traceback" not in done.output


def test_what_runs_elsewhere_does() -> None:
    for page, command in shown():
        where = runs_elsewhere(page, command)
        if where not in (None, QUICKSTART):  # which takes its commands from the page
            word = (command.split() or ["chunkmill"])[0]
            assert word in (ROOT / str(where)).read_text(), f"{where} does not run {command!r} of {page}"
    assert len(HERE) >= 30
