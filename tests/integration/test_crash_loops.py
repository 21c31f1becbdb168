"""A worker that ends again and again: its supervisor clears the queue, in which the cause may stand."""

from __future__ import annotations

import logging
import sys

import pytest

from chunkmill.broker import SYNC_BELLS, Broker, Doorbell
from chunkmill.settings import Settings
from chunkmill_workers.supervisor import supervisor as supervising
from chunkmill_workers.supervisor.supervision import Place
from chunkmill_workers.supervisor.supervisor import QueueClearing, Supervisor
from tests.support.waiting import until


def waiting(broker: Broker) -> dict[str, int]:
    return broker.doorbells_by_queue()


@pytest.mark.parametrize(
    ("arguments", "left"),
    [(("-Q", "gpu"), {"gpu": 0, "openai": 2}), (("-Q", "gpu", "--queues=openai"), {"gpu": 0, "openai": 0})],
)
def test_the_queue_is_cleared_at_the_third_end_and_the_log_says_why(
    arguments: tuple[str, ...],
    left: dict[str, int],
    settings: Settings,
    broker: Broker,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(supervising, "back_off", lambda failures, _: (failures + 1, 0.0))
    broker.ring([Doorbell(1, 0), Doorbell(2, 3), Doorbell(3, 9)])
    broker.ring([Doorbell(4, 3)] * 2, SYNC_BELLS)
    ends = [sys.executable, "-c", "raise SystemExit(1)", *arguments]
    supervisor = Supervisor(
        [Place("the CPU", {})], ends, lambda pid, evidence: None, QueueClearing(settings, ends).start
    )

    def end_once() -> None:
        supervisor._start_due()
        process = supervisor._posts[0].process
        assert process is not None
        process.wait()
        supervisor._see_who_ended()

    with caplog.at_level(logging.INFO, logger=supervising.logger.name):
        for _ in range(2):
            end_once()
        assert waiting(broker) == {"gpu": 3, "openai": 2}
        end_once()
        until(lambda: waiting(broker) == left)
    until(lambda: "worker on the CPU ended 3 times in a row soon after its start" in caplog.text)
    assert "queue gpu was cleared: 3 doorbells were deleted" in caplog.text


def test_a_queue_that_cannot_be_cleared_is_said(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    away = settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    QueueClearing(away, ["-Q", "gpu"])._clear("worker on the CPU ended 3 times in a row")
    assert "its queue cannot be cleared" in caplog.text
    assert "Traceback" not in caplog.text
