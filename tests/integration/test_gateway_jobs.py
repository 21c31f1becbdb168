"""Jobs over HTTP: bodies of any length, progress as events, and nothing of what a key may not see."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
import sqlalchemy as sa

from chunkmill.domain.states import JobState
from chunkmill.embedded import StackStatus
from chunkmill.gateway import ndjson, streams
from tests.conftest import fresh_settings
from tests.support.gateway_scene import (
    ALIAS,
    CALLERS,
    DOCS,
    DOCS_ONLY,
    JOBS_ONLY,
    ODD,
    ODD_MODEL,
    ODD_ONLY,
    SEARCH_ONLY,
    GatewayScene,
    gateway_scene,
)
from tests.support.gateways import KEY
from tests.support.waiting import PATIENCE, until

SECRET = "zanzibarquokka"
_names = count()
_texts = ["of no test"]


@pytest.fixture(scope="module")
def scene(stack: StackStatus) -> Iterator[GatewayScene]:
    with fresh_settings(stack) as settings, gateway_scene(settings) as made:
        yield made


@pytest.fixture
def name() -> str:
    """A collection of the test's own, and texts that no other test has embedded."""
    _texts[0] = f"of test {next(_names)}"
    return _texts[0]


def lines(*chunks: Any) -> bytes:
    return b"".join(json.dumps(chunk).encode() + b"\n" for chunk in chunks)


def chunk(number: int, text: str = "text") -> dict[str, Any]:
    return {"id": f"c{number}", "text": f"{text} {number} {_texts[0]}", "metadata": {"n": number}}


def error(answer: httpx2.Response) -> dict[str, Any]:
    assert set(answer.json()) == {"error"}
    return answer.json()["error"]


def test_a_body_becomes_a_job(scene: GatewayScene, name: str) -> None:
    body = lines(chunk(0), chunk(1)) + b"\r\n" + json.dumps({"id": 7, "text": "number as id"}).encode()
    answer = scene.http.post("/v1/jobs", params={"collection": name, "priority": "high"}, content=body)
    assert answer.status_code == 200, answer.text
    job = answer.json()
    assert (job["chunks"], job["new"], job["collection"], job["priority"]) == (3, 3, name, "high")
    assert job["created_at"].endswith("Z")
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert scene.http.get(f"/v1/jobs/{job['id']}").json()["progress"] == 0.0
    assert list(scene.client.get(name, ["7", "c1"])) == ["7", "c1"]


def test_a_number_of_many_digits_in_the_metadata_stays_exact(scene: GatewayScene, name: str) -> None:
    large = {"id": "1", "text": "t", "metadata": {"n": 10**30 + 1, "deep": json.loads("[" * 300 + "]" * 300)}}
    assert scene.http.post("/v1/jobs", params={"collection": name}, content=lines(large)).status_code == 200
    answer = scene.http.get(f"/v1/collections/{name}/chunks")
    assert json.loads(answer.content)["chunks"][0]["metadata"] == large["metadata"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"id": "1", "text": "' + SECRET.encode(), "not JSON"),
        (b'["1", "' + SECRET.encode() + b'"]', "JSON object"),
        (b'{"id": "1", "text": "t", "' + SECRET.encode() + b'": 1}', "metadata"),
        (b'{"id": "1", "text": "  "}', "empty"),
        (b'{"id": "1", "text": "t", "metadata": {"n": NaN}}', "it has NaN or Infinity, which JSON does not have"),
        (b'{"id": "1", "text": "t", "metadata": {"n": ' + b"9" * 5000 + b"}}", "JSON readers"),
        (b'{"id": "1", "text": "\xff"}', "UTF-8"),
        (b"[" * 100_000, "JSON"),
        (b'{"id": "1", "text": ["' + SECRET.encode() + b'"]}', "type list"),
    ],
)
def test_a_wrong_line_is_named_by_its_number_and_nothing_is_written(
    scene: GatewayScene, name: str, line: bytes, problem: str
) -> None:
    body = lines(*map(chunk, range(200))) + b"\n \n" + line + b"\n" + lines(*map(chunk, range(200, 400)))
    answer = scene.http.post("/v1/jobs", params={"collection": name}, content=body)
    refused = error(answer)
    assert answer.status_code == 400
    assert refused["param"] == "line 203"
    assert refused["message"].startswith("line 203: ")
    assert problem in refused["message"]
    assert SECRET not in answer.text
    assert scene.http.get("/v1/jobs", params={"limit": 1}).json()["jobs"][0]["collection"] != name


def test_bad_lines_are_put_on_the_dead_list_if_they_are_to_be_skipped(scene: GatewayScene, name: str) -> None:
    body = lines(chunk(0)) + b"{broken\n" + lines({"id": "2", "text": ""}, chunk(3))
    answer = scene.http.post("/v1/jobs", params={"collection": name, "on_invalid": "skip"}, content=body)
    job = answer.json()
    assert (job["chunks"], job["dead"]) == (2, 2)
    dead = scene.http.get(f"/v1/jobs/{job['id']}/dead").json()
    assert dead["codes"] == {"bad_line": 1, "empty_text": 1}
    assert any("line 2" in entry["reason"] for entry in dead["dead"])


def test_a_body_replaces_what_it_does_not_have(scene: GatewayScene, name: str) -> None:
    def post(*chunks: Any, **params: Any) -> httpx2.Response:
        return scene.http.post("/v1/jobs", params={"collection": name, **params}, content=lines(*chunks))

    post(*map(chunk, range(4)))
    assert post(chunk(0), chunk(3), replace='{"n": {"$lt": 2}}').json()["deleted"] == 1
    assert list(scene.client.get(name, ["c0", "c1", "c2", "c3"])) == ["c0", "c2", "c3"]
    refused = post(chunk(0), {"id": "b", "text": ""}, replace="true", on_invalid="skip", max_refused="0.4")
    assert (refused.status_code, error(refused)["code"]) == (400, "too_many_refused")
    assert post(replace="true").status_code == 400
    job = post(chunk(0), {"id": "c2", "text": ""}, replace="true", on_invalid="skip", max_refused="1").json()
    assert (job["unchanged"], job["refused"], job["deleted"]) == (1, 1, 1)
    assert list(scene.client.get(name, ["c0", "c1", "c2", "c3"])) == ["c0", "c2"]
    assert post(replace="true", allow_empty="true").json()["deleted"] == 2


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({}, "collection"),
        ({"collection": "x", "onlong": "split"}, "onlong"),
        ({"collection": "x", "dimensions": "many"}, "dimensions"),
        ({"collection": "x", "deadline": "soon"}, "deadline"),
        ({"collection": "x", "on_invalid": "ignore"}, "on_invalid"),
        ({"collection": "x", "replace": "all"}, "replace"),
        ({"collection": "x", "replace": "{broken"}, "replace"),
        ({"collection": "x", "max_refused": "few", "on_invalid": "skip"}, "max_refused"),
    ],
)
def test_a_wrong_parameter_is_named(scene: GatewayScene, params: dict[str, str], param: str) -> None:
    answer = scene.http.post("/v1/jobs", params=params, content=lines(chunk(0)))
    assert (answer.status_code, error(answer)["param"]) == (400, param)


def test_the_same_key_returns_the_same_job(scene: GatewayScene, name: str) -> None:
    headers = {"idempotency-key": f"key of {name}"}
    first, second = (
        scene.http.post("/v1/jobs", params={"collection": name}, headers=headers, content=lines(chunk(0))).json()
        for _ in range(2)
    )
    assert first["id"] == second["id"]
    assert first["idempotency_key"] == headers["idempotency-key"]
    other = scene.http.post("/v1/jobs", params={"collection": name}, headers=headers, content=lines(chunk(1)))
    assert other.status_code == 400
    listed = scene.http.get("/v1/jobs", params={"idempotency_key": headers["idempotency-key"]}).json()["jobs"]
    assert [job["id"] for job in listed] == [first["id"]]


def test_keys_of_two_tenants_do_not_meet(scene: GatewayScene, name: str) -> None:
    headers = {"idempotency-key": f"common {name}"}
    mine = scene.ask(DOCS_ONLY, "POST", "/v1/jobs?collection=new+of+two", headers=headers, content=lines(chunk(0)))
    assert mine.json()["idempotency_key"] == headers["idempotency-key"]
    other = scene.ask(KEY, "POST", f"/v1/jobs?collection={name}", headers=headers, content=lines(chunk(1)))
    assert other.status_code == 200
    assert other.json()["id"] != mine.json()["id"]
    listed = scene.ask(DOCS_ONLY, "GET", f"/v1/jobs?idempotency_key={headers['idempotency-key']}").json()["jobs"]
    assert [job["id"] for job in listed] == [mine.json()["id"]]


def test_a_key_of_a_job_that_may_not_be_seen_says_nothing_of_it(scene: GatewayScene, name: str) -> None:
    """Somebody without bounds has used what happens to be the stored form of a tenant's key."""
    body = lines(chunk(0))
    scene.http.post(f"/v1/jobs?collection={name}", headers={"idempotency-key": f"two/{name}"}, content=body)
    headers = {"idempotency-key": name}
    answer = scene.ask(DOCS_ONLY, "POST", "/v1/jobs?collection=new+of+two", headers=headers, content=body)
    assert (answer.status_code, error(answer)["code"]) == (409, "idempotency_conflict")
    assert "another collection" not in answer.text
    assert scene.ask(DOCS_ONLY, "GET", "/v1/jobs", params={"idempotency_key": name}).json()["jobs"] == []


def sent_in_part(scene: GatewayScene, path: str, part: bytes, headers: str) -> socket.socket:
    """A request whose body has begun."""
    address = urlsplit(scene.running.url)
    connection = socket.create_connection((address.hostname or "", address.port or 0))
    head = [f"POST {path} HTTP/1.1", "Host: h", f"Authorization: Bearer {KEY}", "Content-Length: 1000000", headers]
    connection.sendall("\r\n".join([*head, "", ""]).encode() + part)
    return connection


def test_a_body_that_is_cut_off_leaves_a_job_that_the_same_key_completes(
    scene: GatewayScene, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = f"cut-{next(_names)}"
    first = 2 * scene.settings.chunk_batch_size + 1
    whole = lines(*map(chunk, range(first + 100)))
    path = f"/v1/jobs?collection={name.replace(' ', '%20')}&on_invalid=skip"
    with caplog.at_level("INFO", "chunkmill.gateway"):
        with sent_in_part(scene, path, lines(*map(chunk, range(first))), f"Idempotency-Key: {key}") as connection:
            until(lambda: listed(scene, key) and listed(scene, key)[0]["chunks"] == first - 1)
            connection.close()
        until(lambda: "ended early" in caplog.text)
    assert f"{first - 1:,} chunks are committed in job {listed(scene, key)[0]['id']}" in caplog.text
    assert "the same Idempotency-Key" in caplog.text
    answer = scene.http.post(path, headers={"idempotency-key": key}, content=whole)
    assert answer.json()["id"] == listed(scene, key)[0]["id"]
    assert answer.json()["chunks"] == first + 100


def test_a_body_that_is_cut_off_writes_nothing_if_it_is_to_be_checked_first(
    scene: GatewayScene, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "chunkmill.gateway"):
        sent_in_part(scene, f"/v1/jobs?collection={name.replace(' ', '%20')}", lines(chunk(0)), "X: y").close()
        until(lambda: "ended early" in caplog.text)
    assert "Nothing was written" in caplog.text
    assert scene.ask(KEY, "GET", f"/v1/collections/{name}").status_code == 404


def listed(scene: GatewayScene, key: str) -> list[dict[str, Any]]:
    return scene.http.get("/v1/jobs", params={"idempotency_key": key}).json()["jobs"]  # type: ignore[no-any-return]


def test_a_source_that_is_faster_than_the_store_is_held_back(
    scene: GatewayScene, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The body is read while a lock keeps the enqueue from committing: the sender's socket fills up."""
    sent = 0
    first = 2 * scene.settings.chunk_batch_size
    most = 40 * first  # many times what the two sockets hold
    is_enough = threading.Event()

    def body() -> Iterator[bytes]:
        nonlocal sent
        while sent < most and not is_enough.is_set():
            yield lines(chunk(sent, "x" * 4096))
            sent += 1

    with scene.db.begin() as conn:
        conn.execute(sa.text("LOCK TABLE contents IN EXCLUSIVE MODE"))
        params = {"collection": name, "on_invalid": "skip"}
        answers: list[httpx2.Response] = []
        sending = threading.Thread(
            target=lambda: answers.append(scene.http.post("/v1/jobs", params=params, content=body()))
        )
        sending.start()
        counts = [-1]

        def stands_still() -> bool:
            counts.append(sent)
            return sent >= first and counts[-20:] == [sent] * 20

        until(stands_still, pause=0.02)
        assert sent < most
        is_enough.set()
    sending.join()
    assert answers[0].json()["chunks"] == sent


def test_more_long_bodies_than_there_are_places_are_refused_before_they_are_read(
    scene: GatewayScene, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MOST_LONG", 1)
    path = f"/v1/jobs?collection={name.replace(' ', '%20')}"
    with sent_in_part(scene, path, lines(chunk(0)), "X: y"):
        until(lambda: scene.running.gateway.streams._long == 1)
        answer = scene.http.post("/v1/jobs", params={"collection": name}, content=lines(chunk(1)))
        assert (answer.status_code, error(answer)["code"]) == (429, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
    until(lambda: scene.running.gateway.streams._long == 0)


def test_a_body_that_stands_still_is_refused_and_says_what_is_committed(
    scene: GatewayScene, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ndjson, "STALL_SECONDS", 0.2)
    first = 2 * scene.settings.chunk_batch_size
    path = f"/v1/jobs?collection={name.replace(' ', '%20')}"
    body = lines(*map(chunk, range(first + 1)))
    with sent_in_part(scene, path, body, "X: y") as connection:
        assert b"Nothing was written" in answered(connection)
    with sent_in_part(scene, path + "&on_invalid=skip", body, f"Idempotency-Key: still {name}") as connection:
        assert f"{first:,} chunks are committed in job".encode() in answered(connection)


def answered(connection: socket.socket) -> bytes:
    """The answer that comes although the body is not complete."""
    connection.settimeout(PATIENCE)
    received = b""
    while b'"code"' not in received:
        part = connection.recv(65536)
        assert part, received
        received += part
    assert b"400 Bad Request" in received
    assert b"body_incomplete" in received
    return received


def test_a_line_without_an_end_is_refused(scene: GatewayScene, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ndjson, "MAX_LINE_BYTES", 10_000)
    body = lines(chunk(0)) + b'{"id": "' + b"x" * 100_000
    answer = scene.http.post("/v1/jobs", params={"collection": name}, content=body)
    assert (answer.status_code, error(answer)["code"]) == (413, "line_too_long")
    assert "line 2" in error(answer)["message"]


def test_a_compressed_body_is_refused(scene: GatewayScene) -> None:
    headers = {"content-encoding": "gzip"}
    assert scene.http.post("/v1/jobs?collection=x", headers=headers, content=b"x").status_code == 415


def events(answer: httpx2.Response) -> Iterator[tuple[str, Any]]:
    kind = ""
    for line in answer.iter_lines():
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield kind, json.loads(line.removeprefix("data: "))
        elif line.startswith(":"):
            yield "comment", line


def test_progress_comes_as_events_until_the_end(
    scene: GatewayScene, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LOOK_SECONDS", 0.02)
    job = scene.http.post("/v1/jobs", params={"collection": name}, content=lines(chunk(0), chunk(1))).json()
    path = f"/v1/jobs/{job['id']}/events"
    with scene.http.stream("GET", path) as first, scene.running.client(KEY) as other:
        assert first.headers["content-type"].startswith("text/event-stream")
        coming = events(first)
        assert next(coming)[1]["embedded"] == 0
        with other.stream("GET", path) as second:
            assert next(events(second))[1]["embedded"] == 0  # one that comes later begins with what is
        scene.embed(job["id"])
        rest = list(coming)
    assert [kind for kind, _ in rest][-2:] == ["progress", "end"]
    assert rest[-1][1]["state"] == "completed"
    assert rest[-1][1]["progress"] == 1.0
    seen = [json.dumps(data) for kind, data in rest if kind == "progress"]
    assert len(seen) == len(set(seen))  # one for each change
    # Who was cut off comes again and sees the row as it is; who has seen the end is told not to come.
    assert [kind for kind, _ in events(scene.http.get(path))] == ["progress", "end"]
    assert scene.http.get(path, headers={"last-event-id": "end"}).status_code == 204
    assert not scene.running.gateway.streams._watches


def test_a_stream_without_news_has_a_heartbeat_and_ends_when_the_gateway_leaves(
    scene: GatewayScene, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(streams, "LOOK_SECONDS", 0.02)
    job = scene.http.post("/v1/jobs", params={"collection": name}, content=lines(chunk(0))).json()
    try:
        with scene.http.stream("GET", f"/v1/jobs/{job['id']}/events") as answer:
            assert answer.status_code == 200, answer.read()
            coming = events(answer)
            assert next(kind for kind, _ in coming if kind != "comment") == "progress"
            assert [next(coming)[0] for _ in range(3)] == ["comment"] * 3
            scene.running.gateway.is_leaving = True
            assert {kind for kind, _ in coming} <= {"comment"}
    finally:
        scene.running.gateway.is_leaving = False


def test_a_stream_ends_soon_after_its_key_was_revoked(
    scene: GatewayScene, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "HEARTBEAT_SECONDS", 0.02)
    job = scene.http.post("/v1/jobs", params={"collection": name}, content=lines(chunk(0))).json()
    with scene.clients[JOBS_ONLY].stream("GET", f"/v1/jobs/{job['id']}/events") as answer:
        coming = events(answer)
        assert next(kind for kind, _ in coming if kind != "comment") == "progress"
        monkeypatch.delitem(CALLERS, JOBS_ONLY)
        assert {kind for kind, _ in coming} <= {"comment"}


def test_a_job_is_cancelled_retried_and_explained(scene: GatewayScene, name: str) -> None:
    path = f"/v1/jobs/{scene.http.post('/v1/jobs', params={'collection': name}, content=lines(chunk(0))).json()['id']}"
    assert scene.http.post(f"{path}/cancel").json()["state"] == JobState.CANCELLED
    assert scene.http.post(f"{path}/retry").json()["state"] == JobState.RUNNING
    explanation = scene.http.get(f"{path}/explain").json()
    assert explanation["open"][0]["contents"] == 1
    assert {lane["route"] for lane in explanation["lanes"]} == {"openai", "openai-sync"}
    assert scene.ask(JOBS_ONLY, "GET", f"{path}/explain").json()["lanes"] == []  # they say what was lost
    assert scene.http.get(f"{path}/attempts").json() == {"attempts": []}


def test_jobs_are_paged(scene: GatewayScene) -> None:
    pages, before = [], {}
    for _ in range(100):
        page = scene.http.get("/v1/jobs", params={"limit": 1, **before}).json()
        pages += [job["id"] for job in page["jobs"]]
        if page["next"] is None:
            break
        before = {"before": page["next"]}
    assert pages == [job.id for job in scene.client.jobs(limit=1000)]
    docs = scene.http.get("/v1/jobs", params={"collection": ALIAS}).json()["jobs"]
    assert {job["collection"] for job in docs} == {DOCS}


def test_dead_chunks_are_listed_retried_and_dropped(scene: GatewayScene) -> None:
    body = lines({"id": "1", "text": ""}, {"id": "2", "text": " "}, chunk(3))
    for name in (DOCS, ODD):
        scene.http.post("/v1/jobs", params={"collection": name, "on_invalid": "skip"}, content=body)
    both = scene.http.get("/v1/dead", params={"code": "empty_text"}).json()
    assert {entry["collection"] for entry in both["dead"]} >= {DOCS, ODD}
    mine = scene.ask(DOCS_ONLY, "GET", "/v1/dead").json()
    assert {entry["collection"] for entry in mine["dead"]} == {DOCS}
    assert mine["codes"]["empty_text"] == len([e for e in mine["dead"] if e["code"] == "empty_text"])
    of_others = next(entry for entry in both["dead"] if entry["collection"] == ODD)
    own = next(entry for entry in mine["dead"] if entry["chunk_id"] == "1")
    for verb in ("retry", "drop"):
        hidden = scene.ask(DOCS_ONLY, "POST", f"/v1/dead/{verb}", json={"ids": [own["id"], of_others["id"]]})
        missing = scene.ask(DOCS_ONLY, "POST", f"/v1/dead/{verb}", json={"ids": [999_999_999]})
        assert (hidden.status_code, missing.status_code) == (404, 404)
        assert error(hidden)["message"].replace(str(of_others["id"]), "N") == error(missing)["message"].replace(
            "999999999", "N"
        )
        assert scene.ask(DOCS_ONLY, "POST", f"/v1/dead/{verb}", json={"code": "empty_text"}).status_code == 400
    assert scene.ask(DOCS_ONLY, "GET", f"/v1/dead/{of_others['id']}").status_code == 404
    assert scene.ask(DOCS_ONLY, "GET", f"/v1/dead/{own['id']}").json()["entry"]["chunk_id"] == "1"
    dropped = scene.ask(DOCS_ONLY, "POST", "/v1/dead/drop", json={"ids": [own["id"]]})
    assert dropped.status_code == 200, dropped.text
    assert dropped.json()["entries"] == 1
    assert scene.http.post("/v1/dead/retry", json={"ids": [of_others["id"]]}).status_code == 400  # was never stored
    assert scene.http.post("/v1/dead/drop", json={"idz": [1]}).status_code == 400


@pytest.mark.parametrize(
    ("method", "rest"),
    [
        ("GET", ""),
        ("POST", "/cancel"),
        ("POST", "/retry"),
        ("GET", "/events"),
        ("GET", "/dead"),
        ("GET", "/explain"),
        ("GET", "/attempts"),
    ],
)
def test_a_job_of_a_collection_that_a_key_does_not_name_answers_as_one_that_does_not_exist(
    scene: GatewayScene, method: str, rest: str
) -> None:
    hidden = scene.ask(DOCS_ONLY, method, f"/v1/jobs/{scene.jobs[ODD].id}{rest}")
    missing = scene.ask(DOCS_ONLY, method, f"/v1/jobs/999999999{rest}")
    assert (hidden.status_code, missing.status_code) == (404, 404)
    assert hidden.text.replace(str(scene.jobs[ODD].id), "N") == missing.text.replace("999999999", "N")
    own = scene.ask(DOCS_ONLY, method, f"/v1/jobs/{scene.jobs[DOCS].id}{rest}")
    assert own.status_code == 200
    assert scene.ask(SEARCH_ONLY, method, f"/v1/jobs/{scene.jobs[DOCS].id}{rest}").status_code == 403
    assert scene.ask(None, method, f"/v1/jobs/{scene.jobs[DOCS].id}{rest}").status_code == 401


def test_lists_of_jobs_hold_what_a_key_may_see(scene: GatewayScene) -> None:
    assert {job["collection"] for job in scene.ask(ODD_ONLY, "GET", "/v1/jobs?limit=1000").json()["jobs"]} == {ODD}
    assert scene.ask(ODD_ONLY, "GET", f"/v1/jobs?collection={DOCS}").status_code == 404
    assert {job["collection"] for job in scene.http.get("/v1/jobs?limit=1000").json()["jobs"]} >= {DOCS, ODD}


def test_an_enqueue_goes_only_where_the_key_may_see(scene: GatewayScene) -> None:
    for hidden in (DOCS, "nobody has this"):
        answer = scene.ask(ODD_ONLY, "POST", "/v1/jobs", params={"collection": hidden}, content=lines(chunk(0)))
        assert answer.status_code == 404
    by_alias = scene.ask(DOCS_ONLY, "POST", "/v1/jobs", params={"collection": ALIAS}, content=lines(chunk(0)))
    assert by_alias.json()["collection"] == DOCS
    own_name = scene.ask(DOCS_ONLY, "POST", "/v1/jobs", params={"collection": DOCS}, content=lines(chunk(0)))
    assert own_name.json()["collection"] == DOCS


def test_only_an_admin_names_a_model_or_a_space_that_is_new(scene: GatewayScene, name: str, tmp_path: Path) -> None:
    """A name may be a folder of this machine, and each space is a table."""

    def code(key: str, **params: str | int) -> str:
        answer = scene.ask(key, "POST", "/v1/jobs", params={"collection": name, **params}, content=lines(chunk(0)))
        return "" if answer.status_code == 200 else error(answer)["code"]

    assert code(JOBS_ONLY, model=str(tmp_path)) == "model_not_found"
    assert code(JOBS_ONLY, dimensions=64) == "space_not_allowed"
    assert code(JOBS_ONLY, precision="int8") == "space_not_allowed"
    assert code(JOBS_ONLY, dimensions=384, precision="float", model="all-MiniLM-L6-v2") == ""
    assert code(JOBS_ONLY) == ""
    assert code(ODD_MODEL, model="all-MiniLM-L6-v2") == "model_not_allowed"
    assert code(ODD_MODEL) == "model_not_allowed"


def test_every_caller_of_the_tests_differs() -> None:
    assert len({(c.tenant, c.scopes, c.collections) for c in CALLERS.values()}) == len(CALLERS)
