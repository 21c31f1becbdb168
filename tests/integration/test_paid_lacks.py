"""What one worker of the paid routes lacks is charged to no ChunkBatch and to no ProviderBatch."""

from __future__ import annotations

from typing import Any

import pytest

from chunkmill.errors import UnknownModel
from chunkmill_workers.provider.context import ProviderContext
from tests.support.corridor_scene import Scene


@pytest.mark.parametrize("route", ["openai", "openai-sync"])
def test_work_waits_uncharged_for_a_worker_that_knows_the_model(
    route: str, stage: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def unknown(self: ProviderContext, space: Any) -> Any:
        tries.append(space.id)
        raise UnknownModel("OPENAI_MODELS of this worker does not describe it")

    monkeypatch.setattr(ProviderContext, "model", unknown)
    texts = stage.texts(4)
    jobs = [stage.enqueue(texts, route=route), stage.enqueue(stage.texts(2, first=4), route=route, collection="other")]

    def tried_often() -> bool:
        stage.corridor.context.unserved.clear()  # as if a minute had passed
        return len(tries) > 7

    stage.run_until(tried_often)
    assert stage.corridor.rows("SELECT max(max_attempts - attempt) AS left FROM chunk_batches") == [{"left": 5}]
    assert stage.corridor.rows("SELECT coalesce(max(failures), 0) AS n FROM provider_batches") == [{"n": 0}]
    table = "provider_batches" if route == "openai" else "chunk_batches"
    said = stage.corridor.one(f"SELECT error FROM {table} ORDER BY id LIMIT 1")
    assert said.endswith("OPENAI_MODELS of this worker does not describe it")

    monkeypatch.undo()
    stage.corridor.context.unserved.clear()
    assert [job.state for job in stage.finish(*jobs)] == ["completed"] * 2
    stage.check_books()
