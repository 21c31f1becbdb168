"""The paid routes as processes: real Celery workers on queue ``openai``, a real poller, the test server's bill."""

from __future__ import annotations

from app.settings import Settings
from tests.openai_chaos.run import run


def test_killed_at_some_steps_it_is_complete_and_paid_once(settings: Settings) -> None:
    """``python -m tests.openai_chaos`` is the long form: twenty seeds, every step."""
    report = run(settings, 1, kills=5, contents=400)
    assert report.problems == []
    assert report.kills.total() >= 3
