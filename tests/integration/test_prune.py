"""Prune and evict: what goes, what stays, and that nothing is lost while everything runs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from click.testing import CliRunner

from chunkmill import Client, InvalidInput, NotFound
from chunkmill.broker import Broker
from chunkmill.cli.__main__ import cli
from chunkmill.client import Client as ClientClass
from chunkmill.db.connect import alembic_config, create_db
from chunkmill.domain.retention import Amount, Pruned
from chunkmill.domain.states import Route
from chunkmill.errors import StoreUnavailable
from chunkmill.ledger.money import charges
from chunkmill.settings import Settings
from chunkmill.store.delete import delete_some
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.pipeline import run_chunk_batch
from tests.conftest import FIRST_IDS
from tests.integration.conftest import Runner
from tests.support.waiting import PATIENCE, running, together, until

Rows = Callable[[str], int]


def execute(db: sa.Engine, statement: str, **parameters: object) -> list[Any]:
    with db.begin() as conn:
        result = conn.execute(sa.text(statement), parameters)
        return list(result.scalars()) if result.returns_rows else []


def age(db: sa.Engine, days: float, *, job: int | None = None) -> None:
    """Make all that is there so much older, or one job."""
    which = "" if job is None else f"WHERE id = {job}"
    execute(db, f"UPDATE jobs SET finished_at = finished_at - make_interval(secs => :s) {which}", s=days * 86_400)
    if job is None:
        execute(db, "UPDATE contents SET created_at = created_at - make_interval(secs => :s)", s=days * 86_400)


def gone(pruned: Pruned) -> dict[str, int]:
    return {table: amount.rows for table, amount in pruned.amounts.items() if amount.rows}


def finished(runner: Runner, collection: str, texts: dict[str, str]) -> int:
    return runner.finish(runner.client.enqueue(texts.items(), collection=collection)).id


def test_old_jobs_go_and_what_is_referred_to_stays(runner: Runner, client: Client, db: sa.Engine, rows: Rows) -> None:
    old = finished(runner, "docs", {"a": "one", "b": "two"})
    age(db, 40)
    new = finished(runner, "docs", {"c": "three"})
    planned = client.prune(30, dry_run=True)
    assert planned.dry_run
    assert gone(planned) == {"jobs": 1, "chunk_batches": 1, "usage": 1}
    assert rows("jobs") == 2
    pruned = client.prune(30)
    assert pruned.amounts == planned.amounts
    assert pruned.total.bytes > 300  # a ChunkBatch with two hashes of 32 bytes, and the rest
    assert [job.id for job in client.jobs()] == [new]
    with pytest.raises(NotFound):
        client.job(old)
    assert client.audit("docs").complete
    assert len(client.vectors("docs")) == 3
    assert not client.prune(30).total.rows


def test_a_key_is_known_as_long_as_its_job(runner: Runner, client: Client, db: sa.Engine) -> None:
    first = runner.finish(client.enqueue([("a", "one")], collection="docs", idempotency_key="k"))
    assert client.enqueue([("a", "one")], collection="docs", idempotency_key="k").id == first.id
    age(db, 31)
    client.prune()
    again = client.enqueue([("a", "one")], collection="docs", idempotency_key="k")
    assert again.id != first.id
    assert (again.contents, again.cached) == (1, 1)


def test_charges_stay_for_they_are_the_bill(runner: Runner, client: Client, db: sa.Engine) -> None:
    job = finished(runner, "docs", {"a": "one"})
    with db.begin() as conn:
        charges.book(conn, route=Route.OPENAI, space_id=1, job_id=job, provider_batch_id=7, contents=1, tokens=5, usd=1)  # type: ignore[arg-type]
    age(db, 31)
    assert gone(client.prune())["jobs"] == 1
    assert [(row.key, row.usd) for row in client.usage("job").rows] == [(str(job), 1)]


def test_what_a_failed_job_left_without_a_vector_keeps_it(client: Client, db: sa.Engine, runner: Runner) -> None:
    """Its ChunkBatches and dead list are the only record of what to try again."""
    failed = client.enqueue([("a", "one"), ("b", "two")], collection="docs")
    execute(db, "UPDATE chunk_batches SET state = 'discarded', attempt = max_attempts, finished_at = now()")
    execute(db, "UPDATE jobs SET state = 'failed', finished_at = now()")
    cancelled = client.enqueue([("c", "three")], collection="docs")
    client.cancel(cancelled.id)
    age(db, 31)
    pruned = client.prune()
    assert (pruned.kept_jobs, gone(pruned)) == (2, {})
    client.retry(failed.id)
    client.delete("docs", ["c"])
    assert runner.finish(failed).state == "completed"
    age(db, 31)
    assert gone(client.prune())["jobs"] == 2
    assert client.audit("docs").complete


def test_a_job_with_a_dead_chunk_stays_until_the_chunk_is_settled(
    client: Client, db: sa.Engine, runner: Runner, rows: Rows
) -> None:
    job = finished(runner, "docs", {"a": "one", "b": "two"})
    execute(
        db,
        "INSERT INTO dead_chunks (job_id, chunk_id, content_hash, code, reason) "
        "SELECT :job, 'a', content_hash, 'not_finite', 'why' FROM chunks WHERE chunk_id = 'a'",
        job=job,
    )
    execute(db, "DELETE FROM vectors_1 v USING chunks c WHERE c.chunk_id = 'a' AND v.content_hash = c.content_hash")
    execute(db, "UPDATE jobs SET state = 'failed'")
    age(db, 31)
    assert client.prune().kept_jobs == 1
    client.enqueue([("a", "another text")], collection="docs")
    pruned = client.prune()
    assert (pruned.kept_jobs, gone(pruned)["dead_chunks"], rows("dead_chunks")) == (0, 1, 0)


def test_jobs_that_are_open_young_or_at_a_provider_stay(
    client: Client, db: sa.Engine, runner: Runner, rows: Rows
) -> None:
    open_job = client.enqueue([("a", "one")], collection="docs")
    finished(runner, "docs", {"b": "two"})  # runs both; a worker may still account for the last minutes
    assert not client.prune(0).total.rows
    execute(db, "UPDATE jobs SET finished_at = now() - interval '40 days'")
    execute(db, "UPDATE chunk_batches SET state = 'available' WHERE job_id = :job", job=open_job.id)
    execute(
        db,
        "INSERT INTO provider_inputs (space_id, content_hash, provider_batch_id, chunk_batch_id, attempt, job_id, "
        "n_tokens, sent_tokens, truncated) VALUES (1, 'x', 9, 9, 1, :job, 1, 1, false)",
        job=open_job.id + 1,
    )
    assert not client.prune().total.rows
    execute(db, "UPDATE chunk_batches SET state = 'completed'")
    execute(db, "DELETE FROM provider_inputs")
    assert gone(client.prune())["jobs"] == 2
    assert rows("chunk_batches") == 0


def test_provider_batches_go_with_their_last_member(client: Client, db: sa.Engine, runner: Runner, rows: Rows) -> None:
    jobs = [finished(runner, "docs", {name: name}) for name in ("a", "b")]
    execute(
        db,
        "INSERT INTO provider_batches (space_id, state, token, creating_since, closed_at) VALUES "
        "(1, 'closed', 't1', now() - interval '40 days', now() - interval '40 days'), "
        "(1, 'submitted', 't2', now() - interval '40 days', NULL)",
    )
    execute(
        db,
        "INSERT INTO provider_batch_members SELECT p.id, b.id FROM provider_batches p, chunk_batches b "
        "WHERE p.token = 't1' OR b.job_id = :second",
        second=jobs[1],
    )
    age(db, 31)
    planned = client.prune(dry_run=True)
    assert (gone(planned)["jobs"], "provider_batches" in gone(planned)) == (1, False)  # the other is at the provider
    assert client.prune().amounts == planned.amounts
    execute(db, "UPDATE provider_batches SET state = 'closed', closed_at = now() - interval '40 days'")
    planned = client.prune(dry_run=True)
    assert gone(planned) == {"jobs": 1, "chunk_batches": 1, "usage": 1, "provider_batch_members": 2,
                             "provider_batches": 2}  # fmt: skip
    assert client.prune().amounts == planned.amounts
    assert rows("provider_batches") == rows("provider_batch_members") == 0


def test_replaced_texts_go_once_they_are_old(client: Client, db: sa.Engine, runner: Runner, rows: Rows) -> None:
    finished(runner, "docs", {"a": "the first text", "b": "stays"})
    age(db, 31)
    finished(runner, "docs", {"a": "the second text"})
    finished(runner, "docs", {"a": "the third text"})  # the second is unreferenced too, and young
    planned = client.prune(dry_run=True)
    assert (gone(planned)["vectors_1"], gone(planned)["contents"]) == (1, 1)
    assert client.prune().amounts == planned.amounts
    assert (rows("vectors_1"), rows("contents")) == (3, 3)
    texts = execute(db, "SELECT text FROM contents ORDER BY text")
    assert texts == ["stays", "the second text", "the third text"]
    assert client.audit("docs").complete


def test_texts_without_a_vector_and_vectors_without_a_text(
    client: Client, db: sa.Engine, runner: Runner, rows: Rows
) -> None:
    finished(runner, "docs", {"a": "one"})
    execute(db, "INSERT INTO contents VALUES (sha256('never embedded'), 'never embedded')")
    execute(db, "INSERT INTO vectors_1 SELECT sha256('no text'), n_tokens, truncated, embedding FROM vectors_1")
    execute(db, "INSERT INTO provider_suspects VALUES (1, sha256('never embedded'))")
    assert gone(client.prune(1)) == {"vectors_1": 1}  # it has no age
    assert gone(client.prune(0)) == {"contents": 1}
    assert (rows("vectors_1"), rows("contents"), rows("provider_suspects")) == (1, 1, 0)


def test_a_text_at_a_provider_stays(client: Client, db: sa.Engine, runner: Runner, rows: Rows) -> None:
    """It is being paid for; should it come back, it must not be paid for twice."""
    finished(runner, "docs", {"a": "one"})
    execute(db, "INSERT INTO contents VALUES (sha256('on its way'), 'on its way')")
    execute(
        db,
        "INSERT INTO provider_inputs (space_id, content_hash, chunk_batch_id, attempt, job_id, n_tokens, sent_tokens, "
        "truncated) VALUES (1, sha256('on its way'), 1, 1, 1, 1, 1, false)",
    )
    assert not client.prune(0).total.rows
    assert rows("contents") == 2


def test_the_vectors_of_a_space_that_a_collection_left(client: Client, db: sa.Engine, runner: Runner) -> None:
    """The texts are in another collection, of another space; the first one's vectors are only a cache."""
    runner.finish(client.enqueue([("a", "one")], collection="old"))
    runner.finish(client.enqueue([("a", "one")], collection="new", on_long="split"))
    client.delete("old", all_chunks=True)
    (old, new) = client.cache()
    assert (old.unreferenced.rows, new.unreferenced.rows) == (1, 0)
    assert gone(client.evict(older_than=0, space=new.space)) == {}
    assert gone(client.evict(older_than=0, space=old.space[:12])) == {"vectors_1": 1}
    assert client.audit("new").complete
    assert execute(db, "SELECT text FROM contents") == ["one"]


def test_the_oldest_are_evicted_until_the_rest_fits(client: Client, db: sa.Engine, runner: Runner, rows: Rows) -> None:
    for text in ("first", "second", "third", "fourth", "kept"):
        finished(runner, "docs", {"a": text})
        age(db, 1)
    (space,) = client.cache()
    assert space.unreferenced.rows == 4
    one = space.unreferenced.bytes // 4
    planned = client.evict(max_bytes=2 * one, dry_run=True)
    evicted = client.evict(max_bytes=2 * one)
    assert evicted.amounts == planned.amounts
    assert gone(evicted) == {"vectors_1": 2, "contents": 2}
    assert execute(db, "SELECT text FROM contents ORDER BY text") == ["fourth", "kept", "third"]
    assert gone(client.evict(older_than=1.5)) == {"vectors_1": 2, "contents": 2}  # of two and three days ago
    assert gone(client.evict(max_bytes=0)) == {}
    assert client.audit("docs").complete


def test_hits_are_counted(client: Client, db: sa.Engine, runner: Runner) -> None:
    finished(runner, "docs", {"a": "one", "b": "two"})
    execute(db, "UPDATE chunk_batches SET created_at = created_at - interval '30 days'")
    finished(runner, "other", {"c": "one", "d": "three", "e": "four"})
    (space,) = client.cache()
    assert (space.contents, space.hits, space.recent_contents, space.recent_hits) == (5, 1, 3, 1)
    assert (space.hit_rate, space.recent_hit_rate) == (0.2, 1 / 3)
    assert (space.vectors, space.unreferenced, space.oldest) == (4, Amount(), None)
    assert space.table_bytes > 4 * 384 * 4
    assert space.index_bytes > 0


def test_wrong_arguments_are_refused(client: Client) -> None:
    for wrong in (-1, "30d", float("nan"), 1e12):
        with pytest.raises(InvalidInput, match="older_than"):
            client.prune(wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="either older_than or max_bytes"):
        client.evict()
    with pytest.raises(InvalidInput, match="max_bytes is -1; it must be at least 0"):
        client.evict(max_bytes=-1)
    with pytest.raises(NotFound, match="chunkmill models"):
        client.evict(max_bytes=0, space="beef")


def test_a_schema_without_ages_is_named(client: Client, settings: Settings) -> None:
    command.downgrade(alembic_config(settings.require_database_url()), "0005")
    for call in (client.prune, client.cache, lambda: client.evict(max_bytes=0)):
        with pytest.raises(StoreUnavailable, match=r"at migration 0005.*chunkmill migrate"):
            call()


def test_the_commands(
    client: Client, db: sa.Engine, runner: Runner, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", settings.require_database_url())
    monkeypatch.setenv("REDIS_URL", settings.require_redis_url())

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli, list(arguments))
        return result.exit_code, result.output

    finished(runner, "docs", {"a": "one"})
    finished(runner, "docs", {"a": "two"})
    age(db, 31)
    code, shown = run("prune", "--dry-run")
    assert code == 0
    assert "would be deleted" in shown
    assert [line.split()[:2] for line in shown.splitlines() if line.startswith("jobs")] == [["jobs", "2"]]
    code, shown = run("prune", "--json")
    assert (code, json.loads(shown)["error"]) == (1, "invalid_input")  # nobody to ask
    code, shown = run("cache", "--json")
    (space,) = json.loads(shown)["spaces"]
    assert (code, space["vectors"], space["unreferenced"]["rows"]) == (0, 2, 1)
    assert run("cache", "evict")[0] == 2
    code, shown = run("cache", "evict", "--max-size", "1GB", "--dry-run")
    assert (code, shown.strip()) == (0, "Nothing is left to evict.")
    code, shown = run("prune", "--yes", "--json")
    assert code == 0
    assert json.loads(shown)["amounts"]["jobs"]["rows"] == 2
    assert json.loads(shown)["amounts"]["contents"]["rows"] == 1
    code, shown = run("cache")
    assert code == 0
    assert "all-MiniLM-L6-v2" in shown


def watch_deletions(db: sa.Engine) -> None:
    """Have Postgres itself write down each vector and text that is deleted while a chunk refers to it."""
    with db.begin() as conn:
        conn.execute(sa.text("CREATE TABLE deleted_while_wanted (what text)"))
        conn.execute(
            sa.text(
                "CREATE FUNCTION watch_deletion() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                "IF EXISTS (SELECT FROM chunks c WHERE c.content_hash = OLD.content_hash) THEN "
                "INSERT INTO deleted_while_wanted VALUES (TG_TABLE_NAME); END IF; RETURN OLD; END $$"
            )
        )
        for table in ("vectors_1", "contents"):
            conn.execute(
                sa.text(
                    f"CREATE TRIGGER watched BEFORE DELETE ON {table} FOR EACH ROW EXECUTE FUNCTION watch_deletion()"
                )
            )


def test_nothing_is_lost_while_producers_and_workers_run(
    settings: Settings, client: Client, context: WorkerContext, db: sa.Engine
) -> None:
    """Producers keep replacing texts by others of a small pool, so contents are orphaned and wanted again all the time,
    while workers embed and everything that nobody refers to is pruned at once."""
    small = settings.model_copy(update={"chunk_batch_size": 4, "enqueue_window": 10})
    stop, dropped = threading.Event(), [0]
    client.enqueue([("c0", "text 0")], collection="x")  # registers the space
    watch_deletions(db)

    def produce(name: str) -> None:
        own = ClientClass(create_db(small.require_database_url(), role="client"), Broker.connect(small), small)
        with own:
            for turn in range(300):
                own.enqueue([(f"c{i}", f"text {(i * 7 + turn) % 30}") for i in range(20)], collection=name)
                if turn > 6 and dropped[0] > 10:
                    return

    def embed() -> None:
        while not stop.is_set():
            due = execute(db, "SELECT id FROM chunk_batches WHERE state = 'available' ORDER BY random() LIMIT 5")
            for chunk_batch_id in due:
                run_chunk_batch(context, chunk_batch_id)
            if not due:
                time.sleep(0.002)

    def prune() -> None:
        while not stop.is_set():
            # Not the latest, whose producers still look at them.
            execute(
                db,
                "UPDATE jobs SET finished_at = finished_at - interval '2 hours' WHERE finished_at IS NOT NULL "
                "AND id < (SELECT max(id) - 9 FROM jobs)",
            )
            dropped[0] += client.prune(0).amounts["contents"].rows

    with running(embed, embed, prune, release=stop.set):
        together(*[partial(produce, name) for name in ("x", "y", "z")])
    assert dropped[0] > 10, "the test means nothing where nothing was pruned"
    assert not execute(db, "SELECT what FROM deleted_while_wanted")
    # A text that nobody wanted any more may be wanted again, by another job, while its first job is open still: whoever
    # closes that one finds the vector missing and has it made again. Nothing else goes wrong.
    assert set(execute(db, "SELECT error_code FROM chunk_batches WHERE error IS NOT NULL")) <= {"vectors_missing"}
    for job in client.jobs(1000):
        if not job.state.is_final:
            Runner(context, client).finish(job)
    assert not execute(db, "SELECT 1 FROM chunk_batches WHERE state <> 'completed'")
    for name in ("x", "y", "z"):
        audit = client.audit(name)
        assert (audit.complete, audit.chunks) == (True, 20)
    assert {job.state for job in client.jobs(100)} <= {"completed"}
    # A vector is never left behind by a text that was deleted while it was made.
    assert not execute(db, "SELECT 1 FROM vectors_1 v WHERE NOT EXISTS (SELECT FROM contents c "
                           "WHERE c.content_hash = v.content_hash)")  # fmt: skip
    assert not execute(db, "SELECT 1 FROM chunks k WHERE NOT EXISTS (SELECT FROM contents c "
                           "WHERE c.content_hash = k.content_hash)")  # fmt: skip


def test_an_enqueue_that_is_about_to_refer_to_a_text_comes_first(client: Client, db: sa.Engine, runner: Runner) -> None:
    """Its window is open while the prune, which has found the text unreferenced, comes to its slice."""
    finished(runner, "docs", {"a": "wanted again"})
    finished(runner, "docs", {"a": "something else"})
    opened, go_on = threading.Event(), threading.Event()

    def stream() -> Iterator[tuple[str, str]]:
        opened.set()  # the job is there, and its window is not
        assert go_on.wait(PATIENCE)
        yield "b", "wanted again"

    def waiting(kind: str, *, mode: str) -> list[Any]:
        return execute(
            db,
            "SELECT 1 FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE l.locktype = :kind AND NOT l.granted "
            "AND l.mode = :mode AND a.datname = current_database()",
            kind=kind,
            mode=mode,
        )

    with ThreadPoolExecutor(2) as threads:
        try:
            enqueueing = threads.submit(client.enqueue, stream(), collection="docs", on_invalid="skip")
            assert opened.wait(PATIENCE)
            with db.begin() as holder:
                holder.execute(sa.text("SELECT FROM jobs WHERE state = 'enqueueing' FOR UPDATE"))
                go_on.set()
                until(lambda: enqueueing.done() or waiting("transactionid", mode="ShareLock"))  # in its window
                pruning = threads.submit(client.prune, 0)
                until(lambda: pruning.done() or waiting("advisory", mode="ExclusiveLock"))
                assert not pruning.done(), "it did not wait for the enqueue"
            assert enqueueing.result(PATIENCE).cached == 1
            assert gone(pruning.result(PATIENCE)) == {}
        finally:
            go_on.set()
    assert client.audit("docs").complete
    assert client.audit("docs").chunks == 2


def test_a_delete_beside_a_prune_takes_each_row_once(client: Client, db: sa.Engine, runner: Runner) -> None:
    finished(runner, "docs", {f"c{i}": f"text {i}" for i in range(40)})
    finished(runner, "docs", {f"c{i}": f"other {i}" for i in range(20)})
    with running(lambda: client.evict(older_than=timedelta(0))) as (pruning,):
        with db.begin() as conn:
            delete_some(
                conn, collection_id=FIRST_IDS["collections"], chunk_ids=[f"c{i}" for i in range(20, 30)], limit=100
            )
        assert gone(pruning.result())["contents"] == 20
    assert client.audit("docs").complete
    assert client.audit("docs").chunks == 30
