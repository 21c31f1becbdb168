"""The watcher against each cloud's metadata service, played on the loopback."""

from __future__ import annotations

import http.client
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from chunkmill.errors import InvalidSetting
from chunkmill.settings import Settings
from chunkmill_workers.host.preemption import PreemptionWatcher
from tests.support.metadata_servers import (
    AwsServer,
    AzureServer,
    GcpServer,
    MetadataServer,
    Trouble,
    drips,
    event,
    falls_silent,
    floods,
    hangs_up,
    says,
    sends,
    stub,
)
from tests.support.waiting import PATIENCE, until

CLOUDS: list[type[MetadataServer]] = [GcpServer, AwsServer, AzureServer]
each_cloud = pytest.mark.parametrize("cloud", CLOUDS, ids=lambda cloud: cloud.cloud)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds in the field and would only be waited for here; and patience that no stalled machine ends."""
    monkeypatch.setattr("chunkmill_workers.host.preemption.POLL_SECONDS", 0.02)
    monkeypatch.setattr("chunkmill_workers.host.preemption.MOST_BACK_OFF_SECONDS", 0.1)
    monkeypatch.setattr("chunkmill_workers.host.preemption.PROBE_SECONDS", 60)
    monkeypatch.setattr("chunkmill_workers.host.metadata.REQUEST_SECONDS", 60)


class Watch:
    """A running watcher and what it said."""

    def __init__(self, url: str, notice: str, **settings: Any) -> None:
        self.notices: list[str] = []
        told = Settings.from_env(preemption_notice=notice, preemption_metadata_url=url, **settings)
        watcher = PreemptionWatcher.from_settings(told, self.notices.append)
        assert watcher is not None
        self.watcher = watcher

    def ended(self) -> bool:
        self.watcher.join(PATIENCE)
        return not self.watcher.is_alive()

    def allow(self, seconds: float) -> None:
        """How long a whole exchange may take from the next request on."""
        self.watcher._service.patience = seconds


@pytest.fixture
def watch() -> Iterator[Callable[..., Watch]]:
    started: list[Watch] = []

    def start(server: MetadataServer, notice: str | None = None, **settings: Any) -> Watch:
        started.append(Watch(server.url, notice or server.cloud, **settings))
        started[-1].watcher.start()
        return started[-1]

    yield start
    for worker in started:
        worker.watcher.stop()
    assert all(process.ended() for process in started)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# --- a notice -----------------------------------------------------------------------------------------------------

EXPECTED = {
    "gcp": "gcp: instance/preempted is TRUE",
    "aws": "aws: spot instance-action is terminate, at 2026-11-21T08:22:00Z",
    "azure": "azure: scheduled event Preempt, not before Sat, 21 Nov 2026 08:22:30 GMT",
}


@each_cloud
@pytest.mark.parametrize("notice", ["auto", "named"])
def test_a_notice_is_told_once_and_ends_the_watch(
    watch: Callable[..., Watch], cloud: type[MetadataServer], notice: str
) -> None:
    with cloud() as server:
        watching = watch(server, "auto" if notice == "auto" else None)
        server.wait_for(lambda: server.asked(server.notice_path) >= 2)
        assert watching.notices == []
        assert watching.watcher.daemon
        server.preempt()
        assert watching.ended()
        asked = len(server.requests)
        assert watching.notices == [EXPECTED[cloud.cloud]]
        assert len(server.requests) == asked


@each_cloud
def test_a_machine_that_is_taken_already_is_told_at_the_first_look(
    watch: Callable[..., Watch], cloud: type[MetadataServer]
) -> None:
    with cloud() as server:
        server.preempt()
        watching = watch(server)
        assert watching.ended()
        assert watching.notices == [EXPECTED[cloud.cloud]]
        assert server.asked(server.notice_path) == 1


def test_gcp_misses_no_change_between_two_looks(watch: Callable[..., Watch]) -> None:
    """The value changes after the first answer and before the request that hangs, which could wait for another one."""
    with GcpServer() as server:
        first = server.etag
        server.after_answer = server.preempt
        watching = watch(server)
        assert watching.ended()
        assert watching.notices == [EXPECTED["gcp"]]
        looked, hung = server.requests
        assert "wait_for_change" not in looked.query
        assert (hung.query["wait_for_change"], hung.query["last_etag"]) == ("true", first)
        assert 1 <= int(hung.query["timeout_sec"]) <= 60


def test_gcp_asks_again_where_nothing_changes(
    watch: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("chunkmill_workers.host.preemption.HANG_SECONDS", 1)
    with GcpServer() as server:
        watching = watch(server)
        server.wait_for(lambda: server.asked(server.notice_path) >= 3)
        server.set_value("FALSE")  # another etag, the same value
        server.wait_for(lambda: server.asked(server.notice_path) >= 4)
        assert (watching.notices, warnings(caplog)) == ([], [])


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
def test_aws_takes_a_machine_in_three_ways(watch: Callable[..., Watch], action: str) -> None:
    with AwsServer() as server:
        server.action = f'{{"action": "{action}", "time": "2026-11-21T08:22:00Z"}}'
        server.preempt()
        watching = watch(server)
        assert watching.ended()
        assert watching.notices == [f"aws: spot instance-action is {action}, at 2026-11-21T08:22:00Z"]


def test_aws_tokens_are_renewed_before_they_end(
    watch: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("chunkmill_workers.host.preemption.time", clock)
    with AwsServer() as server:
        server.most_seconds = 3600
        watching = watch(server)
        for tokens in (1, 2, 3):
            server.wait_for(lambda tokens=tokens: server.asked(server.token_path) == tokens)
            clock.now += 1799  # one token serves many looks, for half of its life
            looked = server.asked(server.notice_path)
            server.wait_for(lambda looked=looked: server.asked(server.notice_path) >= looked + 3)
            assert server.asked(server.token_path) == tokens
            clock.now += 2
        used = [r.headers["x-aws-ec2-metadata-token"] for r in server.requests if r.method == "GET"]
        assert set(used) <= set(server.tokens)
        assert 401 not in {r.status for r in server.requests}
        server.preempt()
        assert watching.ended()
        assert len(warnings(caplog)) == 1  # the notice itself


def test_aws_gets_another_token_when_its_own_is_refused(
    watch: Callable[..., Watch], caplog: pytest.LogCaptureFixture
) -> None:
    with AwsServer() as server:
        watching = watch(server)
        server.wait_for(lambda: server.asked(server.notice_path) >= 2)
        assert server.asked(server.token_path) == 1
        server.forget_tokens()
        server.wait_for(lambda: server.asked(server.token_path) >= 2)
        server.preempt()
        assert watching.ended()
        assert [r.status for r in server.requests].count(401) == 1
        assert server.asked(server.token_path) == 2
        assert len(warnings(caplog)) == 1  # the notice itself


def test_aws_rebalance_is_a_hint(watch: Callable[..., Watch], caplog: pytest.LogCaptureFixture) -> None:
    with AwsServer() as server:
        server.hint = '{"noticeTime": "2026-11-21T08:00:00Z"}'
        watching = watch(server)
        server.wait_for(lambda: server.asked(server.hint_path) >= 4)
        assert watching.notices == []
        (said,) = warnings(caplog)
        assert "2026-11-21T08:00:00Z" in said
        assert "PREEMPTION_DRAIN_ON_REBALANCE" in said
        server.preempt()
        assert watching.ended()
        assert watching.notices == [EXPECTED["aws"]]


def test_aws_rebalance_is_a_notice_where_that_is_wanted(watch: Callable[..., Watch]) -> None:
    with AwsServer() as server:
        watching = watch(server, preemption_drain_on_rebalance=True)
        server.wait_for(lambda: server.asked(server.hint_path) >= 2)
        assert watching.notices == []
        server.hint = '{"noticeTime": "2026-11-21T08:00:00Z"}'
        assert watching.ended()
        assert watching.notices == ["aws: rebalance recommendation of 2026-11-21T08:00:00Z"]


@pytest.mark.parametrize("hint", [" ", "{", "[]", "7", "{}", '{"noticeTime": 7}'], ids=repr)
def test_a_hint_that_is_garbage_hides_no_notice(
    watch: Callable[..., Watch], caplog: pytest.LogCaptureFixture, hint: str
) -> None:
    with AwsServer() as server:
        server.hint = hint
        watching = watch(server, preemption_drain_on_rebalance=True)
        server.wait_for(lambda: server.asked(server.hint_path) >= 3)
        assert watching.notices == []
        assert len(warnings(caplog)) == 1
        server.preempt()
        assert watching.ended()
        assert watching.notices == [EXPECTED["aws"]]


@pytest.mark.parametrize("kind", ["Preempt", "Terminate"])
def test_azure_takes_a_machine_in_two_ways_and_by_name(
    watch: Callable[..., Watch], caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    with AzureServer() as server:
        others = [event(kind, "spot_2", "spot_30"), event("Reboot", "spot_3"), event("Freeze", "spot_3")]
        server.schedule(*others)
        watching = watch(server)
        server.wait_for(lambda: server.asked(server.notice_path) >= 3)
        assert (watching.notices, warnings(caplog)) == ([], [])
        server.schedule(*others, event(kind, "spot_2", "SPOT_3"))
        assert watching.ended()
        assert watching.notices == [f"azure: scheduled event {kind}, not before Sat, 21 Nov 2026 08:22:30 GMT"]
        assert server.asked(server.name_path) == 1


def test_azure_waits_while_the_first_request_switches_events_on(
    watch: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("chunkmill_workers.host.metadata.REQUEST_SECONDS", 0.2)
    with AzureServer() as server:
        server.enabled = False
        watching = watch(server)
        server.wait_for(lambda: server.asked(server.notice_path) == 1)
        watching.watcher.join(0.5)  # longer than any other request may take
        said = [message for message in warnings(caplog) if server.notice_path in message]
        assert (server.asked(server.notice_path), said) == (1, [])
        server.enable()
        server.wait_for(lambda: server.asked(server.notice_path) >= 3)
        server.preempt()
        assert watching.ended()
        assert watching.notices == [EXPECTED["azure"]]


# --- trouble ------------------------------------------------------------------------------------------------------

GOOGLE = {"Metadata_Flavor": "Google", "ETag": "0123456789abcdef"}
CHUNKED = b"HTTP/1.1 200 OK\r\nMetadata-Flavor: Google\r\nTransfer-Encoding: chunked\r\n\r\n"
DEEP = "[" * 200_000
ENDLESS: set[Trouble] = {falls_silent, drips}
"""Only patience ends these. All others are answered whole, and must not be mistaken for a service that is slow."""
TROUBLES: dict[str, Trouble] = {
    "500": says(500),
    "503": says(503, "TRUE", **GOOGLE),
    "403": says(403, "TRUE", **GOOGLE),
    "429": says(429, '{"action": "terminate"}'),
    "201": says(201, "TRUE", **GOOGLE),
    "empty": says(200),
    "html": says(200, "<html>ZEBRAFISH TRUE</html>", **GOOGLE),
    "deep": says(200, DEEP, **GOOGLE),
    "not utf-8": sends(b"HTTP/1.1 200 OK\r\nMetadata-Flavor: Google\r\nContent-Length: 2\r\n\r\n\xff\xfe"),
    "not http": sends(b"220 ZEBRAFISH ESMTP\r\n"),
    "no status": sends(b"HTTP/1.1 ZEBRAFISH OK\r\n\r\n"),
    "nothing": hangs_up,
    "cut head": sends(b"HTTP/1.1 200 OK\r\nMetadata-Fla"),
    "cut body": sends(b"HTTP/1.1 200 OK\r\nMetadata-Flavor: Google\r\nContent-Length: 50\r\n\r\nTRUE"),
    "cut chunk": sends(CHUNKED + b"4\r\nTRUE\r\n"),
    "bad chunk": sends(CHUNKED + b"TRUE\r\n"),
    "many heads": sends(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\nTRUE"),
    "long head": sends(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\nTRUE"),
    "continue": sends(b"HTTP/1.1 100 Continue\r\n\r\n" * 50),
    "flood": floods,
    "silence": falls_silent,
    "drip": drips,
}


@each_cloud
@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
def test_trouble_is_said_once_and_outlived_and_no_notice(
    watch: Callable[..., Watch],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cloud: type[MetadataServer],
    trouble: Trouble,
) -> None:
    monkeypatch.setattr("chunkmill_workers.host.preemption.HANG_SECONDS", 1)
    with cloud() as server:
        watching = watch(server)
        server.wait_for(lambda: server.asked(server.notice_path) >= 2)
        if trouble in ENDLESS:
            # A good answer that a loaded machine gives too late from here on is said in the same words as the trouble.
            watching.allow(0.3)
            looked = server.asked(server.notice_path)
            server.wait_for(lambda: server.asked(server.notice_path) >= looked + 2)  # none has the old patience then
        server.misbehave(trouble)
        # AWS's hint is asked for between two looks, and its trouble is said apart.
        server.wait_for(lambda: server.asked(server.notice_path, troubled=True) >= 3)
        assert watching.notices == []
        said = [message for message in warnings(caplog) if "hint" not in message]
        assert len(said) == 1
        assert server.notice_path in said[0]
        assert "ZEBRAFISH" not in said[0]
        watching.allow(60)
        server.misbehave(None)
        server.preempt()
        assert watching.ended()
        assert watching.notices == [EXPECTED[cloud.cloud]]


@each_cloud
def test_a_redirect_is_not_followed(watch: Callable[..., Watch], cloud: type[MetadataServer]) -> None:
    with cloud() as server, cloud() as elsewhere:
        elsewhere.preempt()
        watching = watch(server)
        server.wait_for(lambda: server.asked(server.notice_path) >= 2)
        server.misbehave(lambda handler: says(307, Location=elsewhere.url + handler.path)(handler))
        server.wait_for(lambda: server.asked(server.notice_path, troubled=True) >= 3)
        assert (watching.notices, elsewhere.requests) == ([], [])


GARBAGE: list[tuple[type[MetadataServer], str]] = [
    (GcpServer, "MAYBE"),
    (GcpServer, "TRUE FALSE"),
    (GcpServer, "true"),
    (AwsServer, "[]"),
    (AwsServer, "{}"),
    (AwsServer, '"terminate"'),
    (AwsServer, '{"action": "dance", "time": "2026-11-21T08:22:00Z"}'),
    (AwsServer, '{"action": ["terminate"]}'),
    (AzureServer, "7"),
    (AzureServer, "{}"),
    (AzureServer, '{"Events": {"EventType": "Preempt", "Resources": ["spot_3"]}}'),
    (AzureServer, '{"Events": ["Preempt"]}'),
    (AzureServer, '{"Events": [{"EventType": "Preempt", "Resources": "spot_3"}]}'),
    (AzureServer, '{"Events": [{"EventType": "Preempt"}]}'),
    (AzureServer, '{"Events": [{"EventType": null, "Resources": ["spot_3"]}]}'),
]


@pytest.mark.parametrize(("cloud", "body"), GARBAGE, ids=[f"{c.cloud} {body}" for c, body in GARBAGE])
def test_an_answer_that_is_nearly_right_is_no_notice(
    watch: Callable[..., Watch], caplog: pytest.LogCaptureFixture, cloud: type[MetadataServer], body: str
) -> None:
    with cloud() as server:
        watching = watch(server)
        server.wait_for(lambda: server.asked(server.notice_path) >= 2)
        server.misbehave(says(200, body, **GOOGLE))
        server.wait_for(lambda: server.asked(server.notice_path, troubled=True) >= 3)
        assert watching.notices == []
        assert len([message for message in warnings(caplog) if "hint" not in message]) == 1


def test_gcp_takes_no_answer_without_googles_header(watch: Callable[..., Watch]) -> None:
    with GcpServer() as server:
        watching = watch(server)
        server.misbehave(says(200, "TRUE", ETag="0123456789abcdef"))
        server.wait_for(lambda: server.asked(server.notice_path, troubled=True) >= 3)
        assert watching.notices == []


def test_azure_finds_the_notice_among_events_it_does_not_understand(watch: Callable[..., Watch]) -> None:
    with AzureServer() as server:
        server.schedule({"EventType": "Preempt"}, event("Preempt", server.machine))
        watching = watch(server)
        assert watching.ended()
        assert watching.notices == [EXPECTED["azure"]]


@each_cloud
def test_a_service_that_comes_up_late_is_waited_for(
    watch: Callable[..., Watch], caplog: pytest.LogCaptureFixture, cloud: type[MetadataServer]
) -> None:
    """Its first requests fail in every way at once: the token's and the name's too."""
    with cloud() as server:
        server.misbehave(says(503))
        watching = watch(server)
        server.wait_for(lambda: len(server.requests) >= 4)
        assert len(warnings(caplog)) == 1
        server.misbehave(None)
        server.wait_for(lambda: server.asked(server.notice_path) >= 2)
        server.preempt()
        assert watching.ended()
        assert watching.notices == [EXPECTED[cloud.cloud]]


def test_nobody_there_is_no_notice(watch: Callable[..., Watch], caplog: pytest.LogCaptureFixture) -> None:
    with GcpServer() as server:
        pass  # its port is closed again
    watching = watch(server)
    until(lambda: warnings(caplog))
    watching.watcher.join(0.5)  # it asks again, and says nothing more
    assert watching.watcher.is_alive()
    assert watching.notices == []
    (said,) = warnings(caplog)
    assert "Connection refused" in said


@each_cloud
def test_no_proxy_is_used(
    watch: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch, cloud: type[MetadataServer]
) -> None:
    with cloud() as server, stub(says(200, "TRUE", **GOOGLE)) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        server.preempt()
        watching = watch(server)
        assert watching.ended()
        assert watching.notices == [EXPECTED[cloud.cloud]]
        assert proxy.requests == []


# --- auto ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [says(404), says(200, "<html>Please log in</html>"), says(302, Location="/"), hangs_up],
    ids=["404", "portal", "redirect", "hangs up"],
)
def test_auto_ends_where_no_cloud_answers(
    watch: Callable[..., Watch], caplog: pytest.LogCaptureFixture, answer: Trouble
) -> None:
    caplog.set_level(logging.INFO)
    with stub(answer) as server:
        watching = watch(server, "auto")
        assert watching.ended()
        assert watching.notices == []
        (said,) = [r for r in caplog.records if r.name.startswith("chunkmill_workers")]
        assert said.levelno == logging.INFO
        assert "no cloud's metadata service answers" in said.getMessage()


def test_auto_does_not_wait_for_a_service_that_is_silent(
    watch: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chunkmill_workers.host.preemption.PROBE_SECONDS", 0.1)
    with stub(falls_silent) as server:
        watching = watch(server, "auto")
        assert watching.ended()
        assert watching.notices == []


@each_cloud
def test_auto_finds_a_service_that_is_there_at_the_second_look(
    watch: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch, cloud: type[MetadataServer]
) -> None:
    monkeypatch.setattr("chunkmill_workers.host.preemption.PROBE_ROUNDS", 1000)  # so that the test need not be quick
    with cloud() as server:
        server.misbehave(hangs_up)
        watching = watch(server, "auto")
        server.wait_for(lambda: len(server.requests) >= 4)
        server.misbehave(None)
        server.preempt()
        assert watching.ended()
        assert watching.notices == [EXPECTED[cloud.cloud]]


# --- the end ------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chunkmill_workers.host.metadata.REQUEST_SECONDS", 3600)
    for name in ("HANG_SECONDS", "ENABLE_SECONDS", "PROBE_SECONDS", "POLL_SECONDS", "MOST_BACK_OFF_SECONDS"):
        monkeypatch.setattr(f"chunkmill_workers.host.preemption.{name}", 3600)


@each_cloud
@pytest.mark.usefixtures("nothing_ends_by_itself")
@pytest.mark.parametrize("trouble", [None, says(503), falls_silent, drips], ids=["well", "503", "silent", "drips"])
def test_it_ends_when_asked(watch: Callable[..., Watch], cloud: type[MetadataServer], trouble: Trouble | None) -> None:
    """In the middle of a request, or in the pause between two."""
    with cloud() as server:
        server.misbehave(trouble)
        watching = watch(server)
        server.wait_for(lambda: server.requests)
        watching.watcher.join(0.1)  # most often in the pause by now; it must end at any other point too
        watching.watcher.stop()
        watching.watcher.stop()  # twice is as good as once
        assert watching.ended()
        server.misbehave(None)
        server.preempt()
        assert watching.notices == []


@pytest.mark.usefixtures("nothing_ends_by_itself")
def test_it_ends_while_gcps_request_hangs(watch: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chunkmill_workers.host.preemption.POLL_SECONDS", 0)
    with GcpServer() as server:
        watching = watch(server)
        server.wait_for(lambda: server.asked(server.notice_path) == 2)
        watching.watcher.join(0.1)
        assert server.requests[1].status == 0  # no answer yet
        watching.watcher.stop()
        assert watching.ended()


@pytest.mark.usefixtures("nothing_ends_by_itself")
def test_it_ends_while_azure_switches_events_on(watch: Callable[..., Watch]) -> None:
    with AzureServer() as server:
        server.enabled = False
        watching = watch(server)
        server.wait_for(lambda: server.asked(server.notice_path) == 1)
        watching.watcher.stop()
        assert watching.ended()


@pytest.mark.usefixtures("nothing_ends_by_itself")
def test_it_ends_while_it_connects(watch: Callable[..., Watch]) -> None:
    """A listener whose queue is full answers no further connection."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        try:
            for waiter in waiting:
                waiter.setblocking(False)
                waiter.connect_ex(address)
            watching = Watch(f"http://127.0.0.1:{address[1]}", "gcp")
            watching.watcher.start()
            watching.watcher.join(0.2)
            watching.watcher.stop()
            assert watching.ended()
        finally:
            for thread in waiting:
                thread.close()


def test_one_that_is_stopped_before_it_starts_asks_nobody() -> None:
    with GcpServer() as server:
        server.preempt()
        watching = Watch(server.url, "auto")
        watching.watcher.stop()
        watching.watcher.start()
        assert watching.ended()
        assert (watching.notices, server.requests) == ([], [])


def test_a_stop_at_the_last_moment_prevents_the_notice(watch: Callable[..., Watch]) -> None:
    with GcpServer() as server:
        server.preempt()
        watching = Watch(server.url, "gcp")
        server.after_answer = watching.watcher.stop  # before the answer is on its way
        watching.watcher.start()
        assert watching.ended()
        assert watching.notices == []


# --- settings -----------------------------------------------------------------------------------------------------


def test_off_means_off() -> None:
    before = threading.active_count()
    settings = Settings.from_env(preemption_notice="off", preemption_metadata_url="http://127.0.0.1:1")
    assert PreemptionWatcher.from_settings(settings, lambda _: None) is None
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "url", ["127.0.0.1", "https://h", "http://", "http://h:x", "http://u@h", "http://h/?a", "http://h#a", "http://[::1"]
)
def test_a_wrong_address_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("PREEMPTION_METADATA_URL", url)
    with pytest.raises(InvalidSetting, match=r"PREEMPTION_METADATA_URL: .*such as http://127\.0\.0\.1:8080"):
        Settings.from_env()


def test_a_wrong_cloud_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREEMPTION_NOTICE", "gpc")
    with pytest.raises(InvalidSetting, match=r"PREEMPTION_NOTICE: .*'gcp'"):
        Settings.from_env()


# --- the servers are as strict as the clouds, or the tests above would prove little ---------------------------------

GCP, TOKEN, ACTION = GcpServer.notice_path, AwsServer.token_path, AwsServer.notice_path
NAME = AzureServer.name_path + "?api-version=2021-02-01&format=text"
EVENTS = AzureServer.notice_path + "?api-version=2020-07-01"
TTL = "X-aws-ec2-metadata-token-ttl-seconds"


@pytest.mark.parametrize(
    ("cloud", "method", "path", "headers", "status"),
    [
        (GcpServer, "GET", GCP, {"Metadata-Flavor": "Google"}, 200),
        (GcpServer, "GET", GCP, {}, 403),
        (GcpServer, "GET", GCP, {"Metadata-Flavor": "Amazon"}, 403),
        (GcpServer, "GET", GCP, {"Metadata-Flavor": "Google", "X-Forwarded-For": "10.0.0.1"}, 403),
        (GcpServer, "GET", "/latest/meta-data", {"Metadata-Flavor": "Google"}, 404),
        (AwsServer, "PUT", TOKEN, {TTL: "21600"}, 200),
        (AwsServer, "PUT", TOKEN, {}, 400),
        (AwsServer, "PUT", TOKEN, {TTL: "21601"}, 400),
        (AwsServer, "PUT", TOKEN, {TTL: "21600", "X-Forwarded-For": "10.0.0.1"}, 403),
        (AwsServer, "GET", TOKEN, {}, 405),
        (AwsServer, "GET", ACTION, {}, 401),
        (AwsServer, "GET", ACTION, {"X-aws-ec2-metadata-token": "made-up"}, 401),
        (AzureServer, "GET", NAME, {"Metadata": "true"}, 200),
        (AzureServer, "GET", EVENTS, {"Metadata": "true"}, 200),
        (AzureServer, "GET", EVENTS, {}, 400),
        (AzureServer, "GET", EVENTS, {"Metadata": "false"}, 400),
        (AzureServer, "GET", EVENTS, {"Metadata": "true", "X-Forwarded-For": "10.0.0.1"}, 400),
        (AzureServer, "GET", AzureServer.notice_path, {"Metadata": "true"}, 400),
        (AzureServer, "GET", EVENTS + "1", {"Metadata": "true"}, 400),
        (AzureServer, "GET", NAME.partition("&")[0], {"Metadata": "true"}, 400),
    ],
)
def test_the_servers_refuse_what_the_clouds_refuse(
    cloud: type[MetadataServer], method: str, path: str, headers: dict[str, str], status: int
) -> None:
    with cloud() as server:
        assert _ask(server, method, path, headers)[0] == status


def test_the_aws_server_refuses_a_token_that_is_over() -> None:
    with AwsServer() as server:
        _, token = _ask(server, "PUT", TOKEN, {TTL: "60"})
        assert _ask(server, "GET", ACTION, {"X-aws-ec2-metadata-token": token})[0] == 404
        server.tokens[token] = 0.0
        assert _ask(server, "GET", ACTION, {"X-aws-ec2-metadata-token": token})[0] == 401


def _ask(server: MetadataServer, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=PATIENCE)
    try:
        connection.request(method, path, headers=headers)
        with connection.getresponse() as response:
            return response.status, response.read().decode()
    finally:
        connection.close()
