"""The gates of a re-embedding are checked: by a poller, or by somebody whose role may read texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import sqlalchemy as sa

from chunkmill.ledger import judging
from chunkmill.ledger.judging import Count, Judgement, uncounted
from chunkmill.ledger.reembedding import lives
from chunkmill.ledger.reembedding.lives import Life
from chunkmill.settings import Settings
from chunkmill.spaces import registry


def judge(
    db: sa.Engine,
    settings: Settings,
    life: Life,
    *,
    timeout: float = 600.0,
    is_stopping: Callable[[], bool] = lambda: False,
    count: Count = uncounted,
) -> Judgement:
    """Measure a collection in both spaces, check the gates of the plan, and note what they said.

    ``count`` is told what is embedded for it.
    It may take minutes. Nothing is noted if the re-embedding goes by another plan, or is in another state, by then.
    """
    with db.begin() as conn:
        old, new = registry.get(conn, life.from_space_id), registry.get(conn, life.to_space_id)
    judgement = judging.judge(
        db,
        settings,
        life.collection_id,
        old,
        new,
        life.plan.gates,
        timeout=timeout,
        is_stopping=is_stopping,
        count=count,
    )
    refused = [result.sentence for result in judgement.results if not result.passed]
    problem = None
    if refused:
        problem = (
            f"{' '.join(refused)} The searches stay in the old space. The gates are checked again by and by, or "
            f"at once after `chunkmill reembed resume {life.id}`, which can also change them."
        )
    with db.begin() as conn:
        now = conn.execute(sa.text("SELECT now()")).scalar_one()
        report = replace(life.report, judgement=judgement.report(), judged_at=now)
        lives.note(conn, life, report, problem)
    return judgement
