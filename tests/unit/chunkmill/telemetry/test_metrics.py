"""The table of metrics, the process's counts and the page that serves them."""

from __future__ import annotations

import contextlib
import http.client
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from chunkmill.errors import InvalidSetting
from chunkmill.settings import Settings
from chunkmill.telemetry import exposition
from chunkmill.telemetry import metrics as m
from chunkmill.telemetry.counts import Counts
from chunkmill.telemetry.exposition import MOST_CONNECTIONS, REQUEST_SECONDS, MetricsServer, Process
from chunkmill.telemetry.metrics import METRICS, Kind, Role
from tests.support.waiting import PATIENCE, until

WORKER = Process(frozenset({Role.WORKER}), "host:1", "cpu-1@host", "cpu")
FIRST_PORT = 21464


@pytest.fixture
def counts() -> Counts:
    return Counts()


@pytest.fixture
def server(counts: Counts) -> Iterator[MetricsServer]:
    made = MetricsServer.start(Settings(metrics_port=FIRST_PORT), WORKER, counts)
    assert made is not None
    yield made
    made.stop()


def scraped(port: int) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE) as answer:
        page = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def test_names_follow_the_rules_of_prometheus() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names) > 30
    for metric in METRICS:
        assert metric.name.startswith("chunkmill_")
        assert metric.name.endswith("_total") is (metric.kind is Kind.COUNTER), metric.name
        assert metric.help.endswith(".")
        assert metric.roles


def test_no_label_makes_series_without_bound() -> None:
    """What each process says of itself is one series; all else has the values that the table lists."""
    for metric in METRICS:
        if metric is not m.INFO:
            assert all(label.values for label in metric.labels), metric.name
            assert len(metric.combinations()) <= 40, metric.name
    forbidden = {"job", "job_id", "chunk", "chunk_id", "chunk_batch", "collection", "text", "model"}
    assert not forbidden & {label.name for metric in METRICS for label in metric.labels}


def test_a_value_that_the_table_does_not_have_counts_as_other(counts: Counts) -> None:
    counts.add(m.PROVIDER_REQUESTS, 1, "embed", "teapot")
    counts.add(m.PROVIDER_REQUESTS, 2, "embed", "kettle")
    series = dict(counts.series(m.PROVIDER_REQUESTS, frozenset({Role.PROVIDER})))
    assert series["embed", "other"] == 3
    assert counts.total(m.PROVIDER_REQUESTS) == 3
    with pytest.raises(ValueError, match="2 labels, not 1"):
        counts.add(m.PROVIDER_REQUESTS, 1, "embed")


def test_a_counter_is_there_from_the_start_and_a_gauge_when_it_is_known(counts: Counts) -> None:
    worker, poller = frozenset({Role.WORKER}), frozenset({Role.POLLER})
    assert counts.series(m.CLAIMS, worker) == [(("claimed",), 0.0), (("nothing",), 0.0)]
    assert counts.series(m.CLAIMS, poller) == []
    assert counts.series(m.HELD, worker) == []
    counts.set(m.HELD, 2)
    assert counts.series(m.HELD, worker) == [((), 2)]


def test_what_is_not_seen_any_more_is_not_said_any_more(counts: Counts) -> None:
    counts.replace(m.LEDGER, [(m.BUDGET, (), 10.0), (m.JOBS, ("failed",), 1)])
    counts.replace(m.LEDGER, [(m.JOBS, ("running",), 2)])
    poller = frozenset({Role.POLLER})
    assert counts.series(m.BUDGET, poller) == []
    assert counts.series(m.JOBS, poller) == [(("running",), 2)]
    assert m.ROUNDS not in m.LEDGER
    assert m.LAST_ROUND not in m.LEDGER


def test_the_page(server: MetricsServer, counts: Counts) -> None:
    counts.add_all(((m.TOKENS, 30), (m.PADDED_TOKENS, 40)))
    counts.add(m.TOKENS, 5)
    samples = scraped(server.port)
    assert samples["chunkmill_tokens_total", frozenset()] == 35
    assert samples["chunkmill_padded_tokens_total", frozenset()] == 40
    assert samples["chunkmill_claims_total", frozenset({("result", "claimed")})] == 0
    assert "process_resident_memory_bytes" in {name for name, _ in samples}
    assert not [name for name, _ in samples if name.startswith("chunkmill_poller")]
    info = next(dict(labels) for name, labels in samples if name == "chunkmill_process_info")
    assert info == info | {"role": "worker", "name": "host:1", "label": "cpu-1@host", "device": "cpu"}


def test_there_is_nothing_but_the_page(server: MetricsServer) -> None:
    for path in ("/", "/metrics/../etc/passwd", "/metricsx"):
        with pytest.raises(urllib.error.HTTPError, match="404") as caught:
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=PATIENCE)
        caught.value.close()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.request("POST", "/metrics", body=b"x")
    assert connection.getresponse().status == 501
    connection.close()


def test_a_second_process_takes_the_next_port(server: MetricsServer) -> None:
    second = MetricsServer.start(Settings(metrics_port=server.port), WORKER, Counts())
    assert second is not None
    try:
        assert second.port > server.port
        assert scraped(second.port)
    finally:
        second.stop()


def test_the_last_port_there_is_can_be_had(counts: Counts) -> None:
    """At an address of the loopback that nobody else uses."""
    made = MetricsServer.start(Settings(metrics_port=65535, metrics_address="127.77.12.3"), WORKER, counts)
    assert made is not None
    made.stop()
    assert made.port == 65535


def test_none_is_served_unless_asked_for(counts: Counts) -> None:
    assert MetricsServer.start(Settings(), WORKER, counts) is None


def test_an_address_that_is_not_ours_is_named(counts: Counts) -> None:
    settings = Settings(metrics_port=FIRST_PORT, metrics_address="203.0.113.1")
    with pytest.raises(InvalidSetting, match=rf"203\.0\.113\.1:{FIRST_PORT}.*METRICS_ADDRESS"):
        MetricsServer.start(settings, WORKER, counts)


def test_without_the_package_the_command_that_installs_it_is_named(
    counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(InvalidSetting, match=r"pip install -c constraints.txt '\.\[metrics\]'"):
        MetricsServer.start(Settings(metrics_port=FIRST_PORT), WORKER, counts)


def test_with_a_package_that_is_too_old_nothing_starts(monkeypatch: pytest.MonkeyPatch, counts: Counts) -> None:
    """A page that fails at each scrape would be noticed by nobody."""
    monkeypatch.delattr("prometheus_client.exposition.CONTENT_TYPE_PLAIN_0_0_4")
    with pytest.raises(InvalidSetting, match="too old"):
        MetricsServer.start(Settings(metrics_port=FIRST_PORT), WORKER, counts)


def test_a_page_that_fails_is_an_error_in_the_log_and_a_scraper_that_hangs_up_is_not(
    server: MetricsServer, counts: Counts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for error in (BrokenPipeError("gone"), AttributeError("a fault")):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(counts, "series", fail)
        with pytest.raises(http.client.HTTPException):
            scraped(server.port)
    assert [(record.levelname, record.message) for record in caplog.records if record.levelname != "DEBUG"] == [
        ("ERROR", "a request for metrics failed")
    ]


def threads() -> int:
    """Return how many threads serve requests now."""
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def open_half(server: MetricsServer) -> socket.socket:
    half = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
    half.sendall(b"GET /metr")
    return half


def ended(half: socket.socket) -> bool:
    try:
        return half.recv(1) == b""
    except ConnectionResetError:
        return True


def test_half_open_requests_hold_few_threads_and_keep_no_scrape_out(server: MetricsServer) -> None:
    with contextlib.ExitStack() as stack:
        halves = [stack.enter_context(open_half(server)) for _ in range(4 * MOST_CONNECTIONS)]
        assert scraped(server.port)
        for half in halves[: 3 * MOST_CONNECTIONS]:
            assert ended(half)
        until(lambda: threads() <= MOST_CONNECTIONS)
        assert threads() > 1
        assert scraped(server.port)
    until(lambda: threads() == 0)


def test_a_client_that_sends_a_byte_now_and_then_is_hung_up_on(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is one of the whole request. A limit for each read would never end it."""
    slow = [open_half(server) for _ in range(3)]
    until(lambda: threads() == 3)

    def send_and_count() -> int:
        for half in slow:
            with contextlib.suppress(ConnectionError):
                half.send(b"i")
        return threads()

    assert send_and_count() == 3
    later = time.monotonic() + REQUEST_SECONDS + 1
    monkeypatch.setattr(exposition, "time", SimpleNamespace(monotonic=lambda: later))
    until(lambda: send_and_count() == 0)
    for half in slow:
        assert ended(half)
        half.close()
    monkeypatch.undo()
    assert scraped(server.port)
