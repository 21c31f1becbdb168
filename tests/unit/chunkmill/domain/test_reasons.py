"""What may be told of an error, and in which form."""

from __future__ import annotations

import psycopg
import pytest
import redis
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from chunkmill.domain.reasons import LONGEST, code_of, reason_of, storable
from chunkmill.errors import EngineError, InvalidSetting

TEXT = "SECRET words of a text"


@given(st.text(st.characters(), max_size=LONGEST + 50))
def test_any_reason_can_be_stored(said: str) -> None:
    stored = storable(said)
    assert "\x00" not in stored
    assert len(stored.encode()) >= len(stored)  # it is UTF-8
    assert len(stored) <= LONGEST
    assert storable(stored) == stored


def test_an_ordinary_reason_stays_as_it_is() -> None:
    assert storable("größer als 3 €") == "größer als 3 €"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(TEXT),
        KeyError(TEXT),
        MemoryError(TEXT),
        OSError(TEXT),
        UnicodeEncodeError("utf-8", TEXT, 0, 1, TEXT),
        psycopg.errors.InvalidTextRepresentation(f'invalid input syntax for type json: "{TEXT}"'),
        psycopg.DataError(TEXT),
        sa.exc.DataError("INSERT", {}, psycopg.DataError(TEXT), hide_parameters=True),
        psycopg.errors.CheckViolation(f"the first line\nDETAIL: {TEXT}"),
        sa.exc.IntegrityError("INSERT", {}, psycopg.errors.CheckViolation(f"the first line\nDETAIL: {TEXT}")),
        type("OwnError", (Exception,), {"__module__": "a_model_with_code"})(TEXT),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_message_of_an_error_that_may_quote_a_text_is_left_out(error: Exception) -> None:
    assert "SECRET" not in reason_of(error)
    named = getattr(error, "orig", None) or error
    assert type(named).__name__ in reason_of(error)
    assert code_of(error) == "worker_error"


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (EngineError("a message\x00 of ours"), "a message\\x00 of ours", "engine_error"),
        (InvalidSetting("set it \ud800"), "set it \\ud800", "invalid_setting"),
        (FileNotFoundError(2, "Not there", "/model"), "FileNotFoundError: Not there: '/model'", "worker_error"),
        (psycopg.errors.DiskFull("no space left"), "DiskFull: no space left", "worker_error"),
        (psycopg.OperationalError("connection refused"), "OperationalError: connection refused", "worker_error"),
        (redis.ConnectionError("Error 111 connecting"), "ConnectionError: Error 111 connecting", "worker_error"),
        (RuntimeError(), "RuntimeError", "worker_error"),
        (
            psycopg.errors.DuplicatePreparedStatement('prepared statement "_pg3_0" already exists'),
            (
                'DuplicatePreparedStatement: prepared statement "_pg3_0" already exists. It seems that a pooler before '
                "Postgres gives each transaction another session: let DATABASE_URL name Postgres itself, or set "
                "pool_mode = session in PgBouncer."
            ),
            "worker_error",
        ),
    ],
)  # fmt: skip
def test_what_surely_quotes_no_text_is_told(error: Exception, said: str, code: str) -> None:
    assert (reason_of(error), code_of(error)) == (said, code)
