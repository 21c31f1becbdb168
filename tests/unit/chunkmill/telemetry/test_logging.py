from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Literal

import psycopg
import pytest
import sqlalchemy as sa

from chunkmill.errors import EngineError, InvalidSetting, NotFound
from chunkmill.settings import Settings
from chunkmill.telemetry import tracing
from chunkmill.telemetry.logging import bound, configure, told, without_passwords
from tests.support.waiting import Call


def test_each_thread_has_its_own_fields(capfd: pytest.CaptureFixture[str]) -> None:
    configure()
    with bound(job=7, attempt=1):
        with bound(attempt=2):
            logging.warning("both", extra={"job": "its own"})
        Call(lambda: logging.warning("another thread")).result()
        logging.warning("outer")
    logging.warning("after")
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [(line["message"], line.get("job"), line.get("attempt")) for line in lines] == [
        ("both", "its own", 2),
        ("another thread", None, None),
        ("outer", 7, 1),
        ("after", None, None),
    ]


def test_for_a_person_fields_stand_behind(capfd: pytest.CaptureFixture[str]) -> None:
    configure(form="text")
    with bound(job=7, chunk_batch=12):
        logging.warning("it says %s", "this")
    logging.info("nothing bound")
    said = capfd.readouterr().err.splitlines()
    assert said[0].endswith("WARNING it says this  [job=7 chunk_batch=12]")
    assert said[1].endswith("nothing bound")


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_password_stands_in_a_field(form: Literal["text", "json"], capfd: pytest.CaptureFixture[str]) -> None:
    """A field may be an address, or any object that has one in what it says of itself."""
    configure(form=form)
    with bound(job=7, server="redis://me:hunter2@host:6379/0"):
        logging.warning(
            "it is away",
            extra={
                "store": OSError("postgresql://you:hunter2@host/d"),
                "tried": ["redis://:hunter2@a", ("redis://:hunter2@b", {"c": {"unix://:hunter2@/c"}})],
                "options": {"redis://:hunter2@d": OSError("password=hunter2")},
            },
        )
    said = capfd.readouterr().err
    assert "hunter2" not in said
    assert "redis://me:***@host:6379/0" in said
    if form == "json":
        assert json.loads(said)["job"] == 7


def test_level_and_format_are_settings(capfd: pytest.CaptureFixture[str]) -> None:
    settings = Settings.from_env(log_level="ERROR", log_format="text")
    configure(settings.log_level, settings.log_format)
    logging.warning("quiet")
    logging.error("loud")
    assert capfd.readouterr().err.splitlines()[0].endswith("ERROR   loud")
    with pytest.raises(InvalidSetting, match="LOG_LEVEL"):
        Settings.from_env(log_level="everything")


def test_other_libraries_are_quiet_even_at_debug(capfd: pytest.CaptureFixture[str]) -> None:
    configure("debug")
    for name in ("kombu", "httpx2", "alembic.runtime.migration", "opentelemetry.sdk", "httpcore2.connection"):
        logging.getLogger(name).info("a request with all its headers")
    assert capfd.readouterr().err == ""


def test_a_level_above_warning_holds_for_other_libraries_too(capfd: pytest.CaptureFixture[str]) -> None:
    configure("error", "text")
    logging.getLogger("kombu").warning("a warning")
    logging.getLogger("kombu").error("an error")
    assert [line.split()[1] for line in capfd.readouterr().err.splitlines()] == ["ERROR"]


@pytest.mark.parametrize("how", ["raised from it", "raised while it was handled", "raised from None"])
def test_what_an_error_was_raised_in_answer_to_is_told_unless_the_code_says_not_to(how: str) -> None:
    def fail() -> None:
        try:
            Path("/nowhere/file").read_text()
        except OSError as error:
            if how == "raised while it was handled":
                raise RuntimeError("not saved")  # noqa: B904
            raise RuntimeError("not saved") from (error if how == "raised from it" else None)

    with pytest.raises(RuntimeError) as caught:
        fail()
    assert ("FileNotFoundError: " in told(caught.value)) is (how != "raised from None")


def test_what_postgres_quotes_of_rows_is_left_out(db_error: Exception) -> None:
    error = EngineError("could not be written")
    error.__cause__ = db_error
    said = told(error)
    assert "could not be written" in said
    assert "CheckViolation" in said
    assert "violates" in said
    assert "ZEBRA" not in said


@pytest.fixture(params=["psycopg", "sqlalchemy"])
def db_error(request: pytest.FixtureRequest) -> Exception:
    quoted = "new row violates check\nDETAIL:  Failing row contains (1, ZEBRA\nTraceback\n[SQL: ZEBRA)."
    error = psycopg.errors.CheckViolation(quoted)
    if request.param == "psycopg":
        return error
    return sa.exc.IntegrityError("INSERT", {}, error, hide_parameters=True)


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("at redis://:hunter2@host:6379/0 it", "at redis://:***@host:6379/0 it"),
        ("postgresql+psycopg://me:p%40ss@h/d", "postgresql+psycopg://me:***@h/d"),
        ("unix://me:hunter2@/run/redis.sock?db=1", "unix://me:***@/run/redis.sock?db=1"),
        ("unix:///run/redis.sock?db=1&password=hunter2&x=1", "unix:///run/redis.sock?db=1&password=***&x=1"),
        ("host=h password=hunter2 dbname=d", "host=h password=*** dbname=d"),
        ("PGPASSWORD=hunter2 psql", "PGPASSWORD=*** psql"),
        ("at redis://:hunter2/hunter2#hunter2?@hunter2@host/0 it", "at redis://:***@host/0 it"),
        ("host=h password='hunter2 hunter2' dbname=d", "host=h password=*** dbname=d"),
        ("<Connection(host=h,password=hunter2,db=0)>", "<Connection(host=h,password=***,db=0)>"),
        ("{'host': 'h', 'password': 'hunter2'}", "{'host': 'h', 'password': ***}"),
        ("Illegal header value b'Bearer hunter2'", "Illegal header value b'Bearer ***'"),
        ("Incorrect API key: sk-hunter2", "Incorrect API key: sk-***"),
        ("https://me@host:8080/path and a: b@c", "https://me@host:8080/path and a: b@c"),
        ("http://127.0.0.1:8080/x", "http://127.0.0.1:8080/x"),
    ],
)
def test_urls_lose_their_passwords(said: str, left: str) -> None:
    assert without_passwords(said) == left


def test_what_nobody_caught_is_a_line_too() -> None:
    code = (
        "import threading; from chunkmill.telemetry.logging import configure; configure()\n"
        "def fail(): raise ValueError('in a thread')\n"
        "t = threading.Thread(target=fail, name='t1'); t.start(); t.join()\n"
        "import warnings; warnings.warn('a warning')\n"
        "import redis; raise redis.ConnectionError('redis://:hunter2@h is away')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["message"] for line in lines][::2] == ["ValueError ends thread t1", "ConnectionError ends the process"]
    assert "a warning" in lines[1]["message"]
    assert lines[2]["exception"].endswith("ConnectionError: redis://:***@h is away")
    assert done.returncode == 1


# Tracing, where it is off


def test_without_an_exporter_nothing_is_imported() -> None:
    code = (
        "import sys; from chunkmill.telemetry import tracing; tracing.configure('x')\n"
        "with tracing.root('a') as span, tracing.span('b'): span.set({'job': 1})\n"
        "assert tracing.traceparent() is None\n"
        "tracing.fail('x'); tracing.flush(); assert not [m for m in sys.modules if m.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("environment", "exporter"),
    [
        ({}, None),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:4318"}, None),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "console"}, None),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:4318"}, "otlp"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://h:4318/v1/traces"}, "otlp"),
    ],
)
def test_the_standard_variables_say_whether_and_where(
    environment: dict[str, str], exporter: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert tracing._exporter_name() == exporter


def test_an_exporter_that_is_not_there_is_a_wrong_setting() -> None:
    with pytest.raises(InvalidSetting, match="OTEL_TRACES_EXPORTER is 'jaeger'"):
        tracing._exporter("jaeger")


@pytest.mark.parametrize("name", tracing.HEADERS)
@pytest.mark.parametrize(
    "header", ["api-key=QUAG;GA", "api-key=QU\u00c4GGA", "QUAGGA", 'k="QUAGGA"', "k=1,x=QUAGGA%0Ax"]
)
def test_a_header_for_traces_that_cannot_be_sent_is_refused_without_being_shown(
    name: str, header: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv(name, header)
    with pytest.raises(InvalidSetting, match=name) as caught:
        tracing.configure("x")
    assert "GGA" not in f"{caught.value} {caplog.text}"


def test_headers_for_traces_that_can_be_sent_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=a%2Cb, Authorization=Basic abc==\n")
    tracing._check_headers()


def test_settings_show_no_secret() -> None:
    secrets = {
        "database_url": "postgresql://u:QUAGGA@h/d",
        "redis_url": "rediss://:QUAGGA@h",
        "openai_api_key": "sk-QUAGGA",
        "budget_webhook_url": "https://hooks.invalid/QUAGGA",
    }
    settings = Settings.from_env(**secrets)
    assert "QUAGGA" not in f"{settings!r} {settings}"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql+psycopg://user:secret@host:5432/db", "postgresql+psycopg://user:***@host:5432/db"),
        ("postgresql://user:se%40cret@host/db", "postgresql://user:***@host/db"),
        ("postgresql://host/db?user=u&password=secret", "postgresql://host/db?user=u&password=***"),
        ("postgresql://host/db?sslpassword=secret", "postgresql://host/db?sslpassword=***"),
        ("postgresql://host/db?PASSWORD=secret&x=1", "postgresql://host/db?PASSWORD=***&x=1"),
        ("redis://:secret@host:6379/0", "redis://:***@host:6379/0"),
        (
            "rediss://user:secret@host:6379/0?ssl_cert_reqs=required",
            "rediss://user:***@host:6379/0?ssl_cert_reqs=required",
        ),
        ("unix://:secret@/run/redis.sock?db=0", "unix://:***@/run/redis.sock?db=0"),
        ("unix:///run/redis.sock?db=0&password=secret", "unix:///run/redis.sock?db=0&password=***"),
        ("unix:///run/redis.sock?db=0", "unix:///run/redis.sock?db=0"),
        ("postgresql://postgres@/db?host=/run/pg&port=5432", "postgresql://postgres@/db?host=/run/pg&port=5432"),
    ],
)
def test_no_password_is_shown(url: str, expected: str) -> None:
    assert without_passwords(url) == expected


def test_a_line_of_the_log_for_people_is_one_line_and_steers_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    evil = "x\x1b]52;c;QUFB\x07\x9b2J\u202e\nINFO forged\r\nforged"
    configure("info", "text")
    logging.getLogger("a").info("message %s", evil, extra={"collection": evil}, exc_info=NotFound(evil))
    written = capfd.readouterr().err
    assert written.count("forged") == 6
    assert not [line for line in written.splitlines() if line.startswith(("INFO", "forged"))]
    assert [c for c in written if not c.isprintable() and c != "\n"] == []
