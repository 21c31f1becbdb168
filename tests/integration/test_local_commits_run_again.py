"""A commit of a local worker whose answer was lost is run again: nothing is counted or written twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.errors import EngineError
from chunkmill.spaces.registry import all_spaces
from chunkmill_workers.local.context import WorkerContext
from tests.integration.conftest import Runner

TEXTS = {f"c{i}": f"text {i} of a commit that is run again" for i in range(6)}
OTHERS = dict(list(TEXTS.items())[3:]) | {f"c{i}": f"text {i} of another job" for i in range(6, 9)}


def stop_early(context: WorkerContext, patch: pytest.MonkeyPatch) -> None:
    """The worker is told to go while it reads its first texts."""
    transact = context.transact

    def told(work: Any, what: str, **more: Any) -> Any:
        if what == "read texts":
            patch.setattr(context, "transact", transact)
            context.stopping.set()
        return transact(work, what, **more)

    patch.setattr(context, "transact", told)


def fail_once(context: WorkerContext, patch: pytest.MonkeyPatch) -> None:
    engine_for = context.engine_for

    def broken(*_: Any) -> Any:
        patch.setattr(context, "engine_for", engine_for)
        raise EngineError("the first try fails")

    patch.setattr(context, "engine_for", broken)


def suspect_all(context: WorkerContext, patch: pytest.MonkeyPatch) -> None:
    with context.db.begin() as conn:
        conn.execute(sa.text("UPDATE chunk_batches SET deaths = 2"))


PREPARE: dict[str, Callable[[WorkerContext, pytest.MonkeyPatch], object]] = {
    "released": stop_early,
    "failed": fail_once,
    "release": suspect_all,
}


@pytest.mark.parametrize(
    "commit", ["claim", "read texts", "write vectors", "complete", "release", "released", "failed"]
)
def test_a_commit_of_a_local_worker_that_is_run_again_changes_nothing(
    context: WorkerContext,
    runner: Runner,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
    commit: str,
) -> None:
    # Else all vectors are written by the commit that completes.
    monkeypatch.setattr("chunkmill_workers.local.pipeline.FLUSH_SECONDS", 0.0 if commit == "write vectors" else 1e9)
    jobs = [client.enqueue(TEXTS.items(), collection="docs"), client.enqueue(OTHERS.items(), collection="other")]
    times = run_twice(monkeypatch, context, commit)
    if commit in PREPARE:
        PREPARE[commit](context, monkeypatch)

    for _ in range(20):
        context.stopping.clear()
        runner.run_due()
        with context.db.begin() as conn:
            # A doorbell that a leaving worker heard in vain is rung again by a repair, which need not be waited for.
            again = "UPDATE chunk_batches SET not_before = now(), rung_at = NULL WHERE state = 'available'"
            conn.execute(sa.text(again))
        if all(client.job(job.id).state.is_final for job in jobs):
            break

    assert times, "it happened"
    with context.db.begin() as conn:
        batches = conn.execute(
            sa.text(
                "SELECT job_id, state, attempt - (max_attempts - :most) AS charged, n_embedded, n_truncated "
                "FROM chunk_batches ORDER BY id"
            ),
            {"most": context.settings.max_attempts},
        ).all()
        account = tuple(
            conn.execute(
                sa.text(
                    "SELECT sum(contents), sum(recomputed), sum(tokens), "
                    "count(*) FILTER (WHERE outcome = 'completed'), "
                    "count(*) FILTER (WHERE outcome = 'failed') FROM usage"
                )
            ).one()
        )
    assert [tuple(row) for row in batches] == [
        (jobs[0].id, "completed", 2 if commit == "failed" else 1, 6, 0),
        (jobs[1].id, "completed", 1, 6, 0),
    ]
    assert account == (9, 0, sum_of_tokens(context), 2, 1 if commit == "failed" else 0)
    assert client.vectors("docs").keys() == TEXTS.keys()
    assert client.vectors("other").keys() == OTHERS.keys()


def sum_of_tokens(context: WorkerContext) -> int:
    """Of all texts, each embedded once."""
    with context.db.begin() as conn:
        [space] = all_spaces(conn)
        return int(conn.execute(sa.text(f"SELECT sum(n_tokens) FROM {space.table_name}")).scalar_one())


def run_twice(patch: pytest.MonkeyPatch, context: WorkerContext, commit: str) -> list[str]:
    """Each transaction of this name is committed, its answer is lost, and it is run again; returns which were."""
    times: list[str] = []
    transact = context.transact

    def run(work: Callable[[sa.Connection], Any], what: str, **more: Any) -> Any:
        if what == commit:
            times.append(what)
            transact(work, what, **more)
        return transact(work, what, **more)

    patch.setattr(context, "transact", run)
    return times
