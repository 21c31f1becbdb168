"""What the watch for a notice does after trouble, and how long it waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from chunkmill.settings import Settings
from chunkmill_workers.host.metadata import REQUEST_SECONDS, MetadataError, MetadataService
from chunkmill_workers.host.preemption import MOST_BACK_OFF_SECONDS, POLL_SECONDS, Gcp, PreemptionWatcher
from tests.support.metadata_servers import AwsServer, GcpServer, says, stub


def watcher_of(url: str, notice: str) -> PreemptionWatcher:
    return PreemptionWatcher(
        Settings.from_env(preemption_notice=notice, preemption_metadata_url=url), lambda reason: None
    )


class Scripted:
    """A cloud that gives these answers, one a look. An exception is raised."""

    name = "scripted"

    def __init__(self, *answers: str | MetadataError | None) -> None:
        self._answers: Iterator[str | MetadataError | None] = iter(answers)

    def identify(self) -> None:
        return None

    def look(self) -> str | None:
        answer = next(self._answers)
        if isinstance(answer, MetadataError):
            raise answer
        return answer


def test_pauses_grow_with_trouble_and_begin_anew_after_a_good_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = watcher_of("http://127.0.0.1:1", "gcp")
    pauses: list[float] = []
    monkeypatch.setattr(watcher._service, "pause", pauses.append)
    bad = MetadataError("answered 503")

    assert watcher._await_notice(Scripted(bad, bad, bad, bad, None, bad, None, "taken")) == "taken"

    one = POLL_SECONDS
    assert pauses == [one, 2 * one, 4 * one, MOST_BACK_OFF_SECONDS, one, one, one]


def test_gcp_is_looked_at_without_waiting_after_trouble() -> None:
    """A request that waits for a change would not be answered, if the change came during the trouble."""
    with GcpServer() as server:
        gcp = Gcp(MetadataService(server.url))
        assert gcp.look() is None
        server.misbehave(says(503))
        with pytest.raises(MetadataError):
            gcp.look()
        server.misbehave(None)
        server.preempt()
        assert gcp.look() == "instance/preempted is TRUE"
        waited = ["wait_for_change" in request.query for request in server.requests]
        assert waited == [False, True, False]


@pytest.mark.parametrize(("server", "cloud"), [(GcpServer, "gcp"), (AwsServer, "aws"), (lambda: stub(says(404)), None)])
def test_the_patience_of_the_search_for_a_cloud_is_not_that_of_the_watch(
    server: Any, cloud: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "chunkmill_workers.host.preemption.PROBE_SECONDS", 60.0
    )  # no loaded machine is to be taken for no cloud
    monkeypatch.setattr("chunkmill_workers.host.preemption.POLL_SECONDS", 0.01)
    with server() as running:
        watcher = watcher_of(running.url, "auto")
        provider = watcher._ask_around()
        assert (provider.name if provider else None) == cloud
        assert watcher._service.patience == REQUEST_SECONDS
