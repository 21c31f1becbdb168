"""One trace leads from a producer's span to the vectors that a worker wrote. It has ids and counts, never a text."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from chunkmill.settings import Settings
from tests.acceptance.conftest import Processes
from tests.support.waiting import PATIENCE

pytest.importorskip("opentelemetry.sdk", reason="the extra `tracing` is not installed")

SECRET = "ZEBRAFISH"
PRODUCER = f"""
from opentelemetry import trace
from chunkmill import Client
chunks = [(f"doc-{{i}}", f"{SECRET} {{i}} of the house") for i in range(70)]
with Client.from_env() as client, trace.get_tracer("host").start_as_current_span("the producer's own"):
    job = client.enqueue(chunks, collection="the-collection")
client = Client.from_env()
client.wait(job.id, timeout={PATIENCE})
client.close()
"""


def spans_in(output: str) -> list[dict[str, Any]]:
    """Return what the console exporter printed between other lines: objects over several lines, from ``{`` to ``}``."""
    spans, lines = [], []
    for line in output.splitlines():
        if line == "{":
            lines = []
        lines.append(line)
        if line == "}":
            spans.append(json.loads("\n".join(lines)))
    return spans


def test_one_trace_from_the_producer_to_the_last_vector(processes: Processes, settings: Settings) -> None:
    traced = {"OTEL_TRACES_EXPORTER": "console", "OTEL_BSP_SCHEDULE_DELAY": "100"}
    worker = processes.worker(**traced)
    processes.poller()
    producer = subprocess.run(
        [sys.executable, "-c", PRODUCER],
        env=processes.env | traced, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert producer.returncode == 0, producer.stderr
    assert worker.terminate() == 0
    mine, theirs = spans_in(producer.stdout), spans_in(worker.output())
    spans = {span["context"]["span_id"]: span for span in [*mine, *theirs]}
    parents = {span["name"]: spans[span["parent_id"]]["name"] for span in spans.values() if span["parent_id"]}
    assert parents.pop("write vectors", "embed") == "embed"  # there is no such span if "complete" writes all vectors
    assert parents == {
        "ring": "chunkmill.enqueue",
        "chunkmill.enqueue": "the producer's own",
        "chunkmill.chunk_batch": "chunkmill.enqueue",
        "claim": "chunkmill.chunk_batch",
        "read texts": "chunkmill.chunk_batch",
        "embed": "chunkmill.chunk_batch",
        "complete": "chunkmill.chunk_batch",
        "finish job": "chunkmill.chunk_batch",
    }
    assert len({span["context"]["trace_id"] for span in spans.values()}) == 1
    batches = [span for span in theirs if span["name"] == "chunkmill.chunk_batch"]
    assert len(batches) == 2
    assert sum(span["attributes"]["chunkmill.contents"] for span in theirs if span["name"] == "embed") == 70
    assert [span["resource"]["attributes"]["service.name"] for span in batches] == ["chunkmill-worker"] * 2
    (enqueued,) = (span for span in mine if span["name"] == "chunkmill.enqueue")
    assert enqueued["attributes"]["chunkmill.chunks"] == enqueued["attributes"]["chunkmill.contents"] == 70
    assert {span["attributes"]["chunkmill.job"] for span in batches} == {enqueued["attributes"]["chunkmill.job"]}
    assert not [word for word in (SECRET, "doc-1", "the-collection") if word in json.dumps([*mine, *theirs])]


ASKER = f"""
from opentelemetry import trace
from chunkmill import Client
with Client.from_env() as client:
    for name in ("one", "other"):
        with trace.get_tracer("host").start_as_current_span(name):
            client.embed([f"{SECRET} of the {{name}}"], timeout={PATIENCE})
"""


@pytest.mark.parametrize("socket", ["auto", pytest.param("off", marks=pytest.mark.slow)])
def test_a_call_that_waits_for_a_worker_is_one_trace_with_it(processes: Processes, socket: str) -> None:
    traced = {"OTEL_TRACES_EXPORTER": "console", "OTEL_BSP_SCHEDULE_DELAY": "100", "WORKER_SOCKET": socket}
    worker = processes.worker(**traced)
    asker = subprocess.run(
        [sys.executable, "-c", ASKER],
        env=processes.env | traced, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert asker.returncode == 0, asker.stderr
    assert worker.terminate() == 0
    everything = [*spans_in(asker.stdout), *spans_in(worker.output())]
    spans = {span["context"]["span_id"]: span for span in everything}
    parents = sorted((span["name"], spans[span["parent_id"]]["name"]) for span in everything if span["parent_id"])
    # The transaction with the answer is below the pass if the same thread wrote it.
    assert [parent for parent in parents if parent != ("answer", "embed")] == [
        ("chunkmill.embed_request", "one"),
        ("chunkmill.embed_request", "other"),
        ("embed", "chunkmill.embed_request"),
        ("embed", "chunkmill.embed_request"),
    ]
    assert len({span["context"]["trace_id"] for span in everything}) == 2
    assert SECRET not in json.dumps(everything)
