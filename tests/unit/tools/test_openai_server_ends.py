"""Batches of the test server that end in no documented way, seen by the official SDK."""

from __future__ import annotations

import openai
import pytest

from tests.openai_server.asking import Asking, jsonl
from tests.openai_server.fixtures import asking, client, server
from tests.support.waiting import PATIENCE

__all__ = ["asking", "client", "server"]


def test_file_ids_may_come_some_looks_after_the_end(asking: Asking) -> None:
    asking.server.misbehave("late_file_ids", times=2)
    batch = asking.run()
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("completed", None, None)
    assert batch.request_counts is not None and batch.request_counts.completed == 10
    assert asking.client.batches.retrieve(batch.id).output_file_id is None
    assert asking.client.batches.retrieve(batch.id).output_file_id is not None


@pytest.mark.parametrize("usage", [True, False])
def test_a_batch_may_fail_after_it_ran(asking: Asking, usage: bool) -> None:
    asking.server.misbehave("failed_after_running", usage=usage)
    batch = asking.run()
    assert (batch.status, batch.output_file_id) == ("failed", None)
    assert batch.request_counts is not None and batch.request_counts.completed == 10
    assert batch.usage is not None and (batch.usage.total_tokens > 0) == usage
    assert asking.charged() == [1] * 10


@pytest.mark.parametrize("status", ["in_progress", "finalizing"])
def test_a_batch_may_never_end(asking: Asking, status: str) -> None:
    asking.server.misbehave("stuck", status=status)
    asking.server.misbehave("no_expiry", times=None)
    batch = asking.until(asking.create(jsonl(asking.lines())).id, status)
    assert batch.expires_at is None
    asking.client.batches.cancel(batch.id)
    assert [asking.client.batches.retrieve(batch.id).status for _ in range(3)] == ["cancelling"] * 3


def test_what_one_project_made_another_does_not_find(asking: Asking) -> None:
    asking.server.control(other_keys=["sk-other-project"])
    batch = asking.run()
    with openai.OpenAI(
        base_url=asking.server.url, api_key="sk-other-project", max_retries=0, timeout=PATIENCE
    ) as other:
        with pytest.raises(openai.NotFoundError, match="No batch found"):
            other.batches.retrieve(batch.id)
        for file_id in (batch.input_file_id, batch.output_file_id):
            with pytest.raises(openai.NotFoundError, match="No such File"):
                other.files.content(file_id or "")
        assert batch.id not in [item.id for item in other.batches.list(limit=100).data]
        with pytest.raises(openai.BadRequestError, match="Cannot find file"):
            other.batches.create(input_file_id=batch.input_file_id, endpoint="/v1/embeddings", completion_window="24h")
    assert asking.client.batches.retrieve(batch.id).status == "completed"


def test_a_server_that_forgets_everything_counts_anew(asking: Asking) -> None:
    asking.server.control(counts_batches=True)
    asking.server.forget()
    assert asking.run().id == "batch_1"
    asking.server.forget()
    with pytest.raises(openai.NotFoundError):
        asking.client.batches.retrieve("batch_1")
    assert asking.run().id == "batch_1"


def test_uploads_may_be_too_large_for_a_gateway_and_may_not_expire(asking: Asking) -> None:
    asking.server.control(max_file_bytes=1_000, too_large_status=413, file_expiry=False)
    with pytest.raises(openai.APIStatusError) as error:
        asking.upload(b"x" * 1_001)
    assert error.value.status_code == 413
    with pytest.raises(openai.BadRequestError, match="expires_after"):
        asking.client.files.create(
            file=("a.jsonl", b"{}\n"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
    assert asking.upload(b"{}\n")
