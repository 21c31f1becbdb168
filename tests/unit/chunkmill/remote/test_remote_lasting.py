"""What lasts: a flip that is asked for again, and an answer before which blank lines come."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from chunkmill.errors import BudgetExceeded, GatewayUnavailable, InvalidInput, WaitTimeout
from chunkmill.remote import asking
from tests.support.remotes import HANGS_UP, Asked, Said, refusal, remote, scripted
from tests.support.waiting import PATIENCE

MOVE = {
    "id": 7, "collection": "docs", "state": "flipped", "from_space": "a" * 64, "from_model": "old",
    "to_space": "b" * 64, "to_model": "new", "share": 100, "ramp": [100], "step_hours": 1, "keep_days": 14.0,
    "priority": "low", "route": "auto", "limits": {"missing": 0, "canary": True, "recall": 0.98},
    "gates": [], "coverage": None, "served": [], "problem": None, "paused_at": None, "job_id": 3,
    "created_at": "2026-01-02T03:04:05Z", "state_since": "2026-01-02T03:04:05Z", "flipped_at": None,
    "finished_at": None, "dropped_at": None,
}  # fmt: skip
DONE = Said(body=json.dumps(MOVE).encode())
TOO_EARLY = refusal(504, "timeout", retry=True)


def late(status: int, code: str, blank: bytes = b"\n\n") -> Said:
    error = {"message": f"refused as {code}", "type": "t", "param": None, "code": code, "status": status}
    return Said(200, blank + json.dumps({"error": error}).encode(), {"content-type": "application/json"})


def in_turn(*answers: Said) -> Callable[[Asked], Said]:
    left = list(answers)
    return lambda _: left.pop(0)


def test_a_flip_is_asked_for_again_until_the_time_of_the_call_is_over(kind: str) -> None:
    with scripted(in_turn(TOO_EARLY, TOO_EARLY, DONE)) as server, remote(kind, server.url) as client:
        assert client.flip(7, missing=2, timeout=1_000).id == 7
        assert [asked.json["missing"] for asked in server.asked] == [2, 2, 2]
        assert all(asked.json["timeout_s"] == 100 for asked in server.asked)
        assert set(server.paths()) == {"POST /v1/reembeddings/7/flip"}


def test_a_flip_without_time_is_asked_for_once(kind: str) -> None:
    with scripted(lambda _: TOO_EARLY) as server, remote(kind, server.url) as client:
        with pytest.raises(WaitTimeout, match="refused as timeout"):
            client.rollback(7, timeout=0)
        assert [asked.json for asked in server.asked] == [{"missing": None, "timeout_s": 0.0}]


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.flip(7, timeout=1_000),
        lambda c: c.cancel_reembedding(7),
        lambda c: c.finish_reembedding(7),
        lambda c: c.judge_reembedding(7),
    ],
)
def test_what_may_have_happened_is_not_asked_for_again(kind: str, call: Callable[[Any], Any]) -> None:
    for lost in (HANGS_UP, Said(502, b"<html>")):
        with scripted(in_turn(lost, DONE)) as server, remote(kind, server.url) as client:
            with pytest.raises(GatewayUnavailable):
                call(client)
            assert len(server.asked) == 1


def test_what_had_no_effect_is_asked_for_again(kind: str) -> None:
    overloaded = refusal(429, "overloaded", after_ms=1)
    for call in (lambda c: c.flip(7), lambda c: c.judge_reembedding(7), lambda c: c.cancel_reembedding(7)):
        with scripted(in_turn(overloaded, DONE)) as server, remote(kind, server.url) as client:
            assert call(client).id == 7
    for call in (lambda c: c.pause_reembedding(7), lambda c: c.resume_reembedding(7)):
        with scripted(in_turn(HANGS_UP, DONE)) as server, remote(kind, server.url) as client:
            assert call(client).id == 7


def test_an_error_behind_blank_lines_is_raised_and_nothing_is_asked_for_again(kind: str) -> None:
    kinds = [
        (400, "invalid_input", InvalidInput),
        (504, "timeout", WaitTimeout),
        (503, "overloaded", GatewayUnavailable),
        (429, "insufficient_quota", BudgetExceeded),
    ]
    for status, code, error in kinds:
        with scripted(in_turn(late(status, code), DONE)) as server, remote(kind, server.url) as client:
            with pytest.raises(error, match=f"refused as {code}"):
                client.judge_reembedding(7)
            assert len(server.asked) == 1


def test_a_result_behind_blank_lines_is_read_and_the_time_of_the_call_is_told(kind: str) -> None:
    with scripted(lambda _: Said(body=b"\n\n\n" + DONE.body)) as server, remote(kind, server.url) as client:
        assert client.judge_reembedding(7, timeout=2.5).to_model == "new"
        client.judge_reembedding(7, timeout=float("inf"))
        assert [asked.json["timeout_s"] for asked in server.asked] == [2.5, 86_400.0]


def test_a_gateway_that_falls_silent_is_gone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the call has all the time in the world."""
    monkeypatch.setattr(asking, "SILENCE_S", 0.01)

    is_over = threading.Event()

    def silent(_: Asked) -> Said:
        is_over.wait(PATIENCE)
        return DONE

    with scripted(silent) as server, remote(kind, server.url) as client:
        try:
            with pytest.raises(WaitTimeout, match="did not answer in time"):
                client.judge_reembedding(7, timeout=10_000)
        finally:
            is_over.set()


def test_a_collection_is_looked_up_by_its_name(kind: str) -> None:
    listed = Said(body=json.dumps({"reembeddings": [MOVE]}).encode())
    with scripted(in_turn(listed, DONE)) as server, remote(kind, server.url) as client:
        client.pause_reembedding("a/b")
        assert server.asked[0].path == "/v1/reembeddings?limit=1&collection=a%2Fb"
        assert server.asked[1].path == "/v1/reembeddings/7/pause"
