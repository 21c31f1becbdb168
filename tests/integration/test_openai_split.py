"""Work is cut into ProviderBatches under every limit at once; each limit is met exactly, and none is passed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from chunkmill.domain.states import JobState
from chunkmill.settings import Settings
from tests.openai_server import OpenAIServer
from tests.support.corridor import Corridor, corridor


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    """As strict as the limits that it is told; fast to count."""
    with OpenAIServer(max_inputs_per_batch=500, max_inputs_per_request=64) as running:
        yield running


def sizes(mill: Corridor) -> list[int]:
    return [batch["n_contents"] for batch in mill.batches()]


def done(mill: Corridor, n: int, **more: Any) -> None:
    """Enqueue and finish: complete, every content paid once, nothing refused on the way."""
    (job,) = mill.finish(mill.enqueue(n, **more))
    assert (job.state, job.embedded) == (JobState.COMPLETED, n)
    assert mill.client.audit("docs").complete
    bill = mill.server.bill()
    assert (len(bill), set(bill.values())) == (n, {1})
    assert {batch["creates"] for batch in mill.batches()} == {1}
    assert {batch["status"] for batch in mill.server.state()["batches"]} == {"completed"}


def test_1200_contents_by_inputs(settings: Settings, server: OpenAIServer) -> None:
    """500 + 500 + 200, in requests of 64: the ChunkBatch on the border is cut, and its contents go once."""
    with corridor(settings, server, openai_batch_max_inputs=500, openai_request_inputs=64) as mill:
        done(mill, 1200)
        assert sizes(mill) == [500, 500, 200]
        assert [batch["n_requests"] for batch in mill.batches()] == [8, 8, 4]
        assert [batch["requests"] for batch in mill.server.state()["batches"]] == [8, 8, 4]


def test_by_enqueued_tokens(settings: Settings, server: OpenAIServer) -> None:
    """The organisation's budget: what is at the provider never passes it, and the next batch uses what it leaves."""
    text = "{} " + "word " * 120
    with corridor(settings, server, openai_max_enqueued_tokens=10_000, openai_request_inputs=64) as mill:
        done(mill, 200, text=text)
        tokens = [batch["n_tokens"] for batch in mill.batches()]
        assert sum(tokens) > 20_000
        assert max(tokens) <= 10_000
        assert min(tokens[:-1]) > 10_000 - 200  # the next text would not have fitted
        assert server.state()["peak_enqueued_tokens"] <= 10_000


def test_by_enqueued_requests(settings: Settings, server: OpenAIServer) -> None:
    with corridor(settings, server, openai_max_enqueued_requests=10, openai_request_inputs=7) as mill:
        done(mill, 200)
        assert sizes(mill) == [70, 70, 60]
        assert server.state()["peak_enqueued_requests"] <= 10


def test_by_tokens_of_a_request(settings: Settings, server: OpenAIServer) -> None:
    """8,192 tokens a request: eight texts of 1,000 fit, and the ninth begins another."""
    text = "{} " + "word " * 998
    with corridor(settings, server, openai_request_tokens=8192) as mill:
        done(mill, 40, text=text)
        (batch,) = mill.batches()
        assert (batch["n_contents"], batch["n_requests"]) == (40, 5)


def test_by_bytes_of_a_file(settings: Settings, server: OpenAIServer) -> None:
    """The size that was counted while packing is the file's, to the byte."""
    server.control(max_file_bytes=1_000_000)
    text = "{} " + "é" * 4_000
    with corridor(settings, server, openai_batch_max_bytes=1_000_000, openai_request_inputs=64) as mill:
        job = mill.enqueue(150, text=text)
        mill.run_until(lambda: len(server.state()["files"]) > 0)
        uploaded = {file["filename"]: file["bytes"] for file in server.state()["files"] if file["purpose"] == "batch"}
        assert set(uploaded.values()) <= {batch["n_bytes"] for batch in mill.batches()}
        (job,) = mill.finish(job)
        assert (job.state, job.embedded) == (JobState.COMPLETED, 150)
        sent = [batch["n_bytes"] for batch in mill.batches()]
        assert len(sent) == 2
        assert 1_000_000 - 8_100 < sent[0] <= 1_000_000


def test_by_batches_of_an_hour(settings: Settings, server: OpenAIServer) -> None:
    """No more are made until an hour has passed; the rest waits, and `lanes` says for what."""
    with corridor(settings, server, openai_batch_max_inputs=50, openai_max_batches_per_hour=2) as mill:
        job = mill.enqueue(120)
        mill.run_until(lambda: [batch["state"] for batch in mill.batches()] == ["closed", "closed"])
        mill.run_until(lambda: any(lane.held_reason for lane in mill.client.lanes()))
        for _ in range(5):
            mill.turn()
        assert server.state()["batches_created"] == 2
        with mill.db.begin() as conn:
            conn.exec_driver_sql(
                "UPDATE provider_batches SET creating_since = creating_since - interval '61 minutes', "
                "created_at = created_at - interval '61 minutes'"
            )
        (job,) = mill.finish(job)
        assert (job.state, job.embedded) == (JobState.COMPLETED, 120)
        assert sizes(mill) == [50, 50, 20]
