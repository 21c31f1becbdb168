"""Promise 9 ("texts and secrets stay put") in what processes print: a worker, a poller and the command, at the lowest
log level and with failures, print no text and no secret, and their lines say whose work they are about."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa

from chunkmill import JobState
from chunkmill.settings import Settings
from tests.acceptance.conftest import Processes
from tests.conftest import client_for
from tests.support import forks
from tests.support.waiting import PATIENCE, until

WORD = "ZEBRAFISH"
"""In every text and in a query."""
SECRETS = {
    "Postgres": "PELICAN-password-of-postgres",
    "Redis": "WALRUS-password-of-redis",
    "wrong": "OSPREY-password-that-is-wrong",
    "key": "sk-proj-QUAGGAKEY-0123456789abcdefghijklmnopqrstuvwxyz",
    "webhook": "DODO-token-of-the-webhook",
}


@pytest.fixture
def secret(settings: Settings, db: sa.Engine) -> Iterator[dict[str, str]]:
    """Yield an environment whose addresses hold passwords. Redis asks for its password; Postgres' socket does not."""
    with redis.Redis.from_url(settings.require_redis_url()) as store:
        store.acl_setuser("marked", enabled=True, passwords=[f"+{SECRETS['Redis']}"], categories=["+@all"], keys=["*"],
                          channels=["*"])  # fmt: skip
        yield {
            "DATABASE_URL": sa.make_url(settings.require_database_url())
            .set(password=SECRETS["Postgres"])
            .render_as_string(hide_password=False),
            "REDIS_URL": redis_url(settings, SECRETS["Redis"]),
            "OPENAI_API_KEY": SECRETS["key"],
            "BUDGET_WEBHOOK_URL": f"https://hooks.invalid/{SECRETS['webhook']}",
            "LOG_LEVEL": "debug",
        }
        store.acl_deluser("marked")


def redis_url(settings: Settings, password: str) -> str:
    return settings.require_redis_url().replace("unix://", f"unix://marked:{password}@")


def cli(processes: Processes, *arguments: str, text: str = "", **env: str) -> str:
    done = forks.run(["chunkmill.cli", *arguments], env=processes.env | env, text=text)
    return f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"


def program(processes: Processes, statement: str, **env: str) -> str:
    """Return what a producer's own program prints when it ends with an error."""
    code = f"from chunkmill import Client\nwith Client.from_env() as client:\n    {statement}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=processes.env | env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done.stdout
    return done.stdout + done.stderr


def lines(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def test_texts_and_secrets_are_in_no_output(
    processes: Processes, settings: Settings, db: sa.Engine, secret: dict[str, str], tmp_path: Path
) -> None:
    worker, poller = processes.worker(**secret), processes.start("chunkmill.cli", "poller", **secret)
    client = client_for(settings)
    with client:
        # Postgres refuses what the worker writes, and its error quotes the row. This counts as a failure of the work.
        with db.begin() as conn:
            conn.execute(sa.text("ALTER TABLE usage ADD CONSTRAINT forced CHECK (contents <> 3)"))
        job = client.enqueue([(f"doc-{i}", f"{WORD} {i} of the house") for i in range(3)], collection="docs")
        until(lambda: "failed and is" in worker.output(), worker.output)
        # Postgres goes away in the middle of a job.
        with db.begin() as conn:
            conn.execute(sa.text("ALTER TABLE usage DROP CONSTRAINT forced"))
            conn.execute(
                sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = ANY(:names)"),
                {"names": ["chunkmill-worker", "chunkmill-poller"]},
            )
        until(lambda: client.job(job.id).state is JobState.COMPLETED, worker.output)
        client.search(f"{WORD} 1", collection="docs", timeout=PATIENCE)
        # Postgres goes away during a query, and a program that does not expect this ends with a traceback.
        with db.begin() as conn:
            conn.execute(
                sa.text(
                    "CREATE FUNCTION go() RETURNS trigger LANGUAGE plpgsql AS "
                    "$$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END $$"
                )
            )
            conn.execute(
                sa.text("CREATE TRIGGER go BEFORE INSERT ON embed_requests FOR EACH ROW EXECUTE FUNCTION go()")
            )
        through_rows = secret | {"WORKER_SOCKET": "off"}
        said = [program(processes, f"client.search('{WORD} 2', collection='docs', timeout=60)", **through_rows)]
        assert "INSERT INTO embed_requests" in said[0]
        # Postgres refuses a producer's texts, and its error quotes them.
        with db.begin() as conn:
            conn.execute(sa.text("ALTER TABLE contents ADD CONSTRAINT forced CHECK (text NOT LIKE '%forbidden%')"))
        record = json.dumps({"id": "doc-9", "text": f"{WORD} forbidden\nDETAIL: {WORD}\nTraceback {WORD}"})
        said += [cli(processes, "enqueue", "-", "-c", "docs", "--no-wait", text=record, **secret)]
        assert "Postgres refused (CheckViolation)" in said[-1]
    away = secret | {"DATABASE_URL": f"postgresql://marked:{SECRETS['wrong']}@127.0.0.1:1/none"}
    nobody = secret | {
        "DATABASE_URL": sa.make_url(secret["DATABASE_URL"])
        .set(username="nobody", password=SECRETS["wrong"])
        .render_as_string(hide_password=False)
    }
    refused = secret | {"REDIS_URL": redis_url(settings, SECRETS["wrong"])}
    malformed = secret | {"DATABASE_URL": f"postgresql://u:{SECRETS['wrong']}@host:port/x"}
    said += [cli(processes, "status", **env) for env in (secret, away, nobody, refused, malformed)]
    said += [cli(processes, "doctor", **env) for env in (secret, nobody | refused)]
    said += [cli(processes, "job", "301", **secret)]
    for env in (refused, secret | {"EMBEDDING_MODEL": str(tmp_path / "none")}):
        broken = processes.worker(ready=False, **env)
        until(lambda broken=broken: broken.popen.poll() is not None or "rying" in broken.output(), broken.output)
        broken.popen.terminate()
        broken.popen.wait(PATIENCE)
        said.append(broken.output())
    assert worker.terminate() == 0
    poller.terminate()
    said += [worker.output(), poller.output()]
    everything = "\n".join(said)
    # All these failures happened, and each was logged.
    for word in (
        "CheckViolation",
        "cannot connect to Postgres",
        "invalid username-password pair",
        "is not a folder",
        '"level": "debug"',
    ):
        assert word in everything, word
    words = [WORD, *SECRETS.values(), *(value.partition("-")[0] for name, value in SECRETS.items() if name != "key")]
    assert [line for line in everything.splitlines() for word in words if word in line] == []
    # Each line is JSON, whoever wrote it.
    assert len(lines(worker.output())) == len(worker.output().splitlines())
    assert len(lines(poller.output())) == len(poller.output().splitlines())
    # One line for each ChunkBatch says whose it was and what it took.
    [done] = [line for line in lines(worker.output()) if line["message"] == "ChunkBatch completed"]
    assert (done["job"], done["chunk_batch"], done["texts"], done["level"]) == (job.id, 1, 3, "info")
    assert done["tokens"] >= 3
    assert done["seconds"] > 0
    # The worker's lines say in fields whose work they are about.
    (failed,) = [line for line in lines(worker.output()) if "failed and is" in line["message"]][:1]
    assert {key: failed.get(key) for key in ("job", "chunk_batch", "attempt", "space")} == {
        "job": job.id, "chunk_batch": 1, "attempt": 1, "space": 1
    }  # fmt: skip
    assert str(worker.popen.pid) in failed["worker"]
    assert "job" not in next(line for line in lines(worker.output()) if line["message"].endswith("ready."))
