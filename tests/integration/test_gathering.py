"""Workers that gather at the same moment see each other's ProviderBatches, so that no limit is passed."""

from __future__ import annotations

import threading
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.domain.states import ProviderBatchState as State
from chunkmill.ledger.provider import provider_batches
from chunkmill.ledger.provider.provider_batches import Step
from chunkmill.ledger.provider.provider_room import ProviderRoom, room
from chunkmill.settings import Settings
from chunkmill.spaces.registry import Space
from chunkmill_workers.provider import gather
from chunkmill_workers.provider.steps import _STEPS
from tests.openai_server import OpenAIServer
from tests.support.corridor import Corridor, corridor
from tests.support.waiting import PATIENCE, until

LIMITS: dict[str, dict[str, Any]] = {
    "batches": {"openai_max_batches_per_hour": 1},
    "requests": {"openai_max_enqueued_requests": 1},
    "money": {"openai_monthly_budget_usd": Decimal("0.000003")},
}


def gatherings(mill: Corridor) -> list[Step]:
    """Of two spaces, claimed: each has texts that fill more than half of every limit."""
    for dimensions in (8, 16):
        text = f"of {dimensions} dimensions: {{}} " + "word " * 60
        mill.enqueue(4, text=text, collection=f"of-{dimensions}", dimensions=dimensions)
    mill.poller.round()
    server = mill.context.provider.server
    with mill.db.begin() as conn:
        batches = conn.execute(sa.text("SELECT id FROM provider_batches ORDER BY id")).scalars().all()
        steps = [
            provider_batches.claim_if_due(conn, batch, owner="w", lease_seconds=600, server=server) for batch in batches
        ]
    return [step for step in steps if step is not None]


@pytest.mark.parametrize("limit", LIMITS)
def test_of_two_gatherings_at_once_only_one_takes_the_room_that_is_left_for_one(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """The first has seen the room and not yet taken it when the second comes."""
    looked, go_on = threading.Event(), threading.Event()

    def look_slowly(conn: sa.Connection, given: Settings, space: Space) -> ProviderRoom:
        space_left = room(conn, given, space)
        if not looked.is_set():
            looked.set()
            go_on.wait(PATIENCE)
        return space_left

    monkeypatch.setattr(gather, "room", look_slowly)
    ended: list[Step | None] = []

    def take(mill: Corridor, step: Step) -> threading.Thread:
        thread = threading.Thread(target=lambda: ended.append(_STEPS[State.GATHERING](mill.context, step)), daemon=True)
        thread.start()
        return thread

    with OpenAIServer() as server, corridor(settings, server, openai_request_inputs=4, **LIMITS[limit]) as mill:
        first, second = gatherings(mill)
        waiting = "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database "
        waiting += "WHERE d.datname = current_database() AND l.locktype = 'advisory' AND NOT l.granted"
        try:
            threads = [take(mill, first)]
            assert looked.wait(PATIENCE)
            threads.append(take(mill, second))
            until(lambda: mill.one(waiting) or ended)
            assert ended == []
        finally:
            go_on.set()
            for thread in threads:
                thread.join(PATIENCE)

        assert sorted(step is None for step in ended) == [False, True]
        assert [batch["state"] for batch in mill.batches()] == ["gathered"]
        assert mill.client.lanes()[0].held_reason is not None
