"""How the attempts of a job are shown."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from chunkmill.cli.jobs.attempts import show_attempts
from chunkmill.cli.output import Screen
from chunkmill.domain.results import Attempt


def attempt(number: int, outcome: str) -> Attempt:
    return Attempt(
        chunk_batch_id=number,
        attempt=1,
        worker=f"vm:{number}",
        outcome=outcome,
        evidence=None,
        contents=8,
        recomputed=0,
        at_risk=number,
        tokens=40,
        engine_seconds=0.5,
        first_write_at=None,
        ended_at=datetime(2027, 1, 31, tzinfo=UTC),
    )


@pytest.mark.parametrize(
    ("outcomes", "listed", "said"),
    [
        (["died", "completed", "failed", "running"], 2, "4 attempts (the table shows those that ended early), 1"),
        (["died", "failed"], 2, "2 attempts, 1 death"),
        (["completed", "completed"], 0, "2 attempts, 0 deaths"),
    ],
)
def test_a_table_without_some_attempts_says_so(
    outcomes: list[str], listed: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    attempts = [attempt(number, outcome) for number, outcome in enumerate(outcomes, 1)]
    show_attempts(Screen(as_json=False), attempts)
    shown = capsys.readouterr().out
    assert shown.count("vm:") == listed
    assert said in " ".join(shown.split())
