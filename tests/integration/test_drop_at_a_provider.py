"""A collection is dropped while its texts are at a provider: the batch is followed to its end, and booked."""

from __future__ import annotations

import pytest

from chunkmill.domain.states import JobState
from tests.openai_server import OpenAIServer
from tests.support.corridor_scene import Scene

N = 6


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "with a text of another collection"])
def test_what_is_at_a_provider_is_followed_to_its_end_and_booked(
    stage: Scene, server: OpenAIServer, shared: bool
) -> None:
    """The batch runs on at the provider when its job is cancelled, or it ends cancelled; either is booked once."""
    server.control(validating_seconds=600.0)
    texts, others = stage.texts(N), stage.texts(N, first=50)
    if shared:
        others |= {"shared": texts["c0"]}
    job = stage.enqueue(texts, idempotency_key="k")
    stage.run_until(lambda: stage.corridor.rows("SELECT FROM provider_batches WHERE state = 'submitted'"))
    other = stage.enqueue(others, collection="others")

    stage.corridor.client.drop_collection("docs")

    assert stage.corridor.one("SELECT count(*) FROM chunks WHERE collection_id = 201") == 0
    server.control(validating_seconds=0.0)
    again = stage.enqueue({"new": "a new text"}, idempotency_key="k")
    job, other, again = stage.finish(job, other, again)
    assert (job.state, other.state, again.state) == (JobState.CANCELLED, JobState.COMPLETED, JobState.COMPLETED)
    assert stage.corridor.rows("SELECT FROM provider_batches WHERE state <> 'closed'") == []
    stage.check_books()
    assert stage.corridor.client.audit("others").complete
    stored = {row["text"] for row in stage.corridor.rows("SELECT text FROM contents")}
    assert stored == {*others.values(), "a new text"}
    assert set(stage.bill(others).values()) == {1}
