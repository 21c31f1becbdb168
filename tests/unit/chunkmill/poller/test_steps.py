"""A step that fails keeps no other from being done, and its reason quotes no text."""

from __future__ import annotations

import logging
import threading

import psycopg
import pytest
import sqlalchemy as sa

from chunkmill.poller.steps import Steps
from chunkmill.telemetry.logging import _Json, _Text


def raising(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("cannot read SECRET"),
        sa.exc.IntegrityError("INSERT SECRET", {}, psycopg.errors.CheckViolation("violates check\nDETAIL: SECRET")),
    ],
    ids=["unknown", "of Postgres"],
)
def test_a_reason_is_said_once_and_quotes_no_text(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    steps = Steps()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert steps.run("the first step", lambda: raising(error)) is None
            assert steps.run("the second step", lambda: 7) == 7
    [record] = caplog.records
    assert "the first step" in record.getMessage()
    assert type(getattr(error, "orig", error)).__name__ in record.getMessage()
    for form in (_Json(), _Text()):
        assert "SECRET" not in form.format(record)


def test_a_thread_that_repeats_a_step_outlives_every_failure(caplog: pytest.LogCaptureFixture) -> None:
    stop, calls = threading.Event(), []
    failures = [
        ValueError("a fault of ours"),
        sa.exc.OperationalError("SELECT", {}, psycopg.OperationalError("Postgres is away")),
        sa.exc.OperationalError("SELECT", {}, psycopg.errors.QueryCanceled("a timeout")),
        sa.exc.TimeoutError("no connection is free"),
    ]

    def step() -> None:
        calls.append(1)
        if len(calls) > len(failures):
            stop.set()
            return
        raise failures[len(calls) - 1]

    Steps().repeat("the step", step, stop, 0.0)
    assert len(calls) == len(failures) + 1
    # An outage is not said: the poller's rounds do.
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == len(failures) - 1
