"""Both remote clients beside ``Client``, through a real gateway on a real database: the same results and errors."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill import (
    AccessDenied,
    Chunk,
    ClientClosed,
    DroppedDead,
    GatewayUnavailable,
    InvalidChunk,
    InvalidInput,
    JobCancelled,
    JobFailed,
    NotFound,
    SpaceMismatch,
    UnknownModel,
    WaitTimeout,
)
from chunkmill.db.connect import create_db
from chunkmill.domain.states import JobState
from chunkmill.domain.stored import StoredChunk
from chunkmill.embedded import StackStatus
from chunkmill.gateway.routes import collections as gateway_collections
from chunkmill.remote import AsyncRemoteClient, RemoteClient, RemoteEmbedder
from chunkmill.remote import collections as remote_collections
from chunkmill.remote import upkeep as remote_upkeep
from tests.conftest import fresh_settings
from tests.support.gateway_scene import ALIAS, DOCS, DOCS_ONLY, ODD, SEARCH_ONLY, GatewayScene, gateway_scene
from tests.support.gateways import KEY, StandInWorker, running_gateway, stand_in_worker, tokens_of, vector_of
from tests.support.remotes import HANGS_UP, Asked, Remote, Said, remote, same, scripted
from tests.support.tls import make_authority, tls_proxy
from tests.support.waiting import PATIENCE, until

_numbers = itertools.count()


@pytest.fixture(scope="module")
def scene(stack: StackStatus) -> Iterator[GatewayScene]:
    with fresh_settings(stack) as settings, gateway_scene(settings) as made:
        yield made


@pytest.fixture(scope="module")
def worker(scene: GatewayScene) -> Iterator[StandInWorker]:
    with stand_in_worker(scene.db) as running:
        yield running


@pytest.fixture(scope="module", params=["sync", "async"])
def client(request: pytest.FixtureRequest, scene: GatewayScene, worker: StandInWorker) -> Iterator[Remote]:
    with remote(request.param, scene.running.url, KEY) as made:
        yield made


@pytest.fixture
def name() -> str:
    """A collection of the test's own."""
    return f"of test {next(_numbers)}"


def listed(result: Any) -> Any:
    return list(result) if hasattr(result, "send") else result


CALLS: list[tuple[str, Callable[[Any, GatewayScene], Any]]] = [
    ("a job", lambda c, s: c.job(s.jobs[DOCS].id)),
    ("jobs", lambda c, s: c.jobs(1_500)),
    ("one job", lambda c, s: c.jobs(limit=1)),
    ("no jobs", lambda c, s: c.jobs(0)),
    ("wait", lambda c, s: c.wait(s.jobs[ODD].id)),
    ("a cancelled job that is complete", lambda c, s: c.cancel(s.jobs[ODD].id)),
    ("a retried job that is complete", lambda c, s: c.retry(s.jobs[ODD].id)),
    ("dead", lambda c, s: c.dead()),
    ("codes of the dead", lambda c, s: c.dead_codes(collection=ODD)),
    ("dead chunks", lambda c, s: c.dead_chunks(s.jobs[ODD].id, limit=3)),
    ("explain", lambda c, s: c.explain(s.jobs[DOCS].id)),
    ("attempts", lambda c, s: c.attempts(s.jobs[ODD].id)),
    ("lanes", lambda c, s: c.lanes()),
    ("a lane that is resumed", lambda c, s: c.resume_lane("openai")),
    ("usage", lambda c, s: c.usage()),
    ("usage of a day", lambda c, s: c.usage("job", since=date(2026, 1, 1))),
    ("dead of a job", lambda c, s: c.dead(s.jobs[DOCS].id, limit=0)),
    ("collections", lambda c, s: c.collections(exact=True)),
    ("audit", lambda c, s: c.audit(ODD)),
    ("audit by an alias", lambda c, s: c.audit(ALIAS)),
    ("count", lambda c, s: c.count(DOCS)),
    ("count by a filter", lambda c, s: c.count(ODD, filter={"n": {"$gte": 2}})),
    ("search by a text", lambda c, s: c.search("docs number 3", collection=DOCS, k=3)),
    ("search by texts", lambda c, s: c.search(["one", "two"], collection=ODD, k=2)),
    ("search by no texts", lambda c, s: c.search([], collection=ODD)),
    ("search by a vector", lambda c, s: c.search(vector_of("x", "query", 384), collection=DOCS)),
    ("search by vectors", lambda c, s: c.search(np.eye(3, 384, dtype=np.float32), collection=DOCS, k=1)),
    ("search like a chunk", lambda c, s: c.search(like="2", collection=ODD, k=2)),
    ("search with a filter", lambda c, s: c.search("x", collection=DOCS, metadata={"n": {"$in": [1, 4]}})),
    ("search with all else", lambda c, s: c.search("x", collection=DOCS, exact=True, offset=1, min_score=-0.5, k=2)),
    ("search that does not mix", lambda c, s: c.search("x", collection=DOCS, hybrid=False)),
    ("chunks", lambda c, s: listed(c.chunks(DOCS))),
    ("chunks by a filter", lambda c, s: listed(c.chunks(ODD, filter={"n": {"$lt": 3}}, with_text=False))),
    ("chunks of a page", lambda c, s: listed(c.chunks(ODD, after="1", limit=2))),
    ("no chunks", lambda c, s: listed(c.chunks(ODD, limit=0))),
    ("embed", lambda c, s: c.embed(["one", "two words"], kind="query")),
    ("embed shorter", lambda c, s: c.embed([f"text {i}" for i in range(300)], model="all-MiniLM-L6-v2")),
    ("embed nothing", lambda c, s: c.embed([])),
]


@pytest.mark.parametrize("call", [call for _, call in CALLS], ids=[what for what, _ in CALLS])
def test_a_remote_client_returns_what_a_client_returns(
    scene: GatewayScene, client: Remote, call: Callable[[Any, GatewayScene], Any]
) -> None:
    expected, got = call(scene.client, scene), call(client, scene)
    assert type(got) is type(expected)
    assert same(got, expected)


def test_a_search_that_is_asked_to_explains_itself(scene: GatewayScene, client: Remote) -> None:
    expected = scene.client.search("docs number 3", collection=DOCS, explain=True)
    got = client.search("docs number 3", collection=DOCS, explain=True)
    assert got.explanation == expected.explanation and got.explanation is not None
    many = client.search(["a", "b"], collection=DOCS, explain=True)
    assert [type(hits.explanation) for hits in many] == [type(expected.explanation)] * 2


def test_tokens_and_cuts_of_each_text_come_along(client: Remote) -> None:
    texts = ["one", "two words", "word " * 600]
    made = client.embed_texts(texts)
    assert made.tokens.tolist() == [tokens_of(texts[0]), tokens_of(texts[1]), 256]
    assert made.truncated.tolist() == [False, False, True]
    assert (made.vectors == np.stack([vector_of(text, "document", 384) for text in texts])).all()


def test_more_queries_than_a_request_may_have_are_answered_in_order(
    client: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_collections, "MOST_QUERIES", 3)
    queries = [f"docs number {i}" for i in range(8)]
    together = client.search(queries, collection=DOCS, k=1)
    assert together == [client.search(query, collection=DOCS, k=1) for query in queries]


@pytest.mark.parametrize("batch_size", [1, 4, 6, 1000])
def test_vectors_come_in_batches_of_the_size_that_was_asked_for(
    scene: GatewayScene, client: Remote, batch_size: int
) -> None:
    expected = list(scene.client.iter_vectors(DOCS, batch_size=batch_size))
    got = client.iter_vectors(DOCS, batch_size=batch_size)
    assert [ids for ids, _ in got] == [ids for ids, _ in expected]
    for (_, rows), (_, others) in zip(got, expected, strict=True):
        assert same(rows, others)
    only = client.iter_vectors(DOCS, filter={"n": 3})
    assert [ids for ids, _ in only] == [["3"]]


def test_chunks_have_their_vectors_and_pages_fit_together(
    scene: GatewayScene, client: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_collections, "PAGE_WITH_TEXT", 2)
    got = client.chunks(ODD, with_vector=True)
    expected = list(scene.client.chunks(ODD, with_vector=True))
    assert got == expected
    for one, other in zip(got, expected, strict=True):
        assert one.vector is not None and same(one.vector, other.vector) and one.text == other.text


def test_an_enqueue_is_followed_to_its_end_and_its_chunks_are_deleted(
    scene: GatewayScene, client: Remote, name: str
) -> None:
    chunks = [Chunk(f"c{i}", f"{name} {i} {client.kind}", {"n": i}) for i in range(300)]
    job = client.enqueue(iter(chunks), collection=name, idempotency_key=f"key of {name}")
    assert (job.chunks, job.collection, job.new) == (300, name, 300)
    assert client.enqueue(chunks, collection=name, idempotency_key=f"key of {name}").id == job.id
    with pytest.raises(WaitTimeout, match="goes on"):
        client.wait(job.id, timeout=0)
    seen: list[JobState] = []

    def embed(current: Any) -> None:
        seen.append(current.state)
        if len(seen) == 1:
            scene.embed(job.id)

    done = client.wait(job.id, on_progress=embed)
    assert done == scene.client.job(job.id) and done.state is JobState.COMPLETED
    assert seen[-1] is JobState.COMPLETED and len(seen) > 1
    assert client.delete(name, ["c1", "c2", "absent"]) == 2
    assert client.delete(name, filter={"n": {"$lt": 10}}) == 8
    assert client.count(name) == 290
    assert client.delete(name, all_chunks=True) == 290
    for wrong in ({}, {"ids": ["a"], "all_chunks": True}, {"filter": {}}):
        with pytest.raises(InvalidInput):
            client.delete(name, **wrong)


def test_bad_chunks_are_dead_or_refuse_the_enqueue(scene: GatewayScene, client: Remote, name: str) -> None:
    before = len(client.jobs(1000))
    with pytest.raises(InvalidInput, match="'b'"):
        client.enqueue([("a", f"good {name}"), ("b", " ")], collection=name)
    assert len(client.jobs(1000)) == before
    job = client.enqueue(
        [("a", f"good {name} {client.kind}"), ("b", " "), ("c", "x", {"n": object()}), ("d", "\ud800")],
        collection=name,
        on_invalid="skip",
    )
    scene.embed(job.id)
    assert {entry.chunk_id: entry.code for entry in client.dead(job.id)} == {
        "b": "empty_text",
        "c": "bad_metadata",
        "d": "surrogate_in_text",
    }
    assert client.dead(job.id) == scene.client.dead(job.id)
    assert client.dead(collection=name, code="empty_text")[0].chunk_id == "b"
    assert client.wait(job.id) == scene.client.job(job.id)


def test_a_job_that_failed_is_an_error_with_its_number(scene: GatewayScene, client: Remote, name: str) -> None:
    job = client.enqueue([("a", f"failed {name} {client.kind}")], collection=name)
    with scene.db.begin() as conn:
        failed = sa.text(
            "UPDATE jobs SET state = 'failed', error = 'no worker lived', finished_at = now() WHERE id = :id"
        )
        conn.execute(failed, {"id": job.id})
    with pytest.raises(JobFailed, match="no worker lived") as raised:
        client.wait(job.id)
    assert raised.value.job_id == job.id


def test_a_wait_says_what_hinders_the_job(
    scene: GatewayScene, client: Remote, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    job = client.enqueue([("a", f"hindered {name} {client.kind}")], collection=name)
    other = client.enqueue([("a", f"not hindered {name} {client.kind}")], collection=name)
    with scene.db.begin() as conn:
        failed = """
            UPDATE chunk_batches
            SET attempt = 1, error_code = 'model_not_found', error = 'there is no model quokka'
            WHERE job_id = :id
        """
        conn.execute(sa.text(failed), {"id": job.id})
    for waits in (job, other):
        with pytest.raises(WaitTimeout) as raised:
            client.wait(waits.id, timeout=0)
        assert ("no model quokka" in str(raised.value)) is (waits is job)
        answer = scene.http.get(f"/v1/jobs/{waits.id}").json()
        assert ("no model quokka" in str(answer["hindrance"])) is (waits is job)
        assert answer["hindrance"] == client.job(waits.id).hindrance
    with scene.http.stream("GET", f"/v1/jobs/{job.id}/events") as events:
        event = next(line for line in events.iter_lines() if line.startswith("data: "))
    assert "no model quokka" in event
    said: list[str] = []
    looks = itertools.count()

    def look(_: Any) -> None:
        if next(looks) == 2:
            scene.embed(job.id)

    assert client.wait(job.id, on_progress=look, on_hindrance=said.append).state is JobState.COMPLETED
    assert sum("no model quokka" in sentence for sentence in said) == 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert client.job(job.id).hindrance is None
    client.cancel(other.id)


def test_a_job_is_cancelled_and_retried(scene: GatewayScene, client: Remote, name: str) -> None:
    job = client.enqueue([("a", f"cancelled {name} {client.kind}")], collection=name)
    assert client.cancel(job.id).state is JobState.CANCELLED
    with pytest.raises(JobCancelled) as raised:
        client.wait(job.id)
    assert raised.value.job_id == job.id
    assert client.retry(job.id).state is JobState.RUNNING
    scene.embed(job.id)
    assert client.wait(job.id).state is JobState.COMPLETED


def test_metadata_and_names_are_changed_and_the_other_collection_stays(
    scene: GatewayScene, client: Remote, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_upkeep, "MOST_IDS", 2)
    other = f"beside {name}"
    for one in (name, other):
        client.enqueue([(f"{i}", f"{one} {i} {client.kind}", {"n": i, "old": True}) for i in range(5)], collection=one)
    assert client.update_metadata(name, {"seen": [1]}, ids=["0", "1", "2", "absent"], remove=["old"]) == 3
    assert client.update_metadata(name, {"n": "all"}, filter={"n": {"$gte": 4}}) == 1
    assert client.update_metadata(other, {}, all_chunks=True, replace=True) == 5
    expected = [
        *({"n": i, "seen": [1]} for i in range(3)), {"n": 3, "old": True}, {"n": "all", "old": True},
    ]  # fmt: skip
    assert [chunk.metadata for chunk in client.chunks(name)] == expected
    assert {str(chunk.metadata) for chunk in client.chunks(other)} == {"{}"}
    assert client.rename_collection(name, f"new {name}") is None
    assert client.set_alias(f"alias/of {name}", f"new {name}") is None
    assert client.count(f"alias/of {name}") == 5
    assert client.remove_alias(f"alias/of {name}") is None
    dropped = client.drop_collection(f"new {name}")
    assert (dropped.name, dropped.chunks, dropped.complete) == (f"new {name}", 5, True)
    left = {one.name for one in scene.client.collections()}
    assert other in left and f"new {name}" not in left


def test_dead_chunks_are_looked_at_retried_and_dropped(scene: GatewayScene, client: Remote, name: str) -> None:
    other = f"beside {name}"
    for one in (name, other):
        client.enqueue([("good", f"{one} {client.kind}"), ("bad", " ")], collection=one, on_invalid="skip")
    (entry,), (beside,) = client.dead(collection=name), client.dead(collection=other)
    assert client.dead_codes(entry.job_id) == scene.client.dead_codes(entry.job_id) == {"empty_text": 1}
    assert client.dead_chunks(entry.job_id) == scene.client.dead_chunks(entry.job_id)
    assert client.dead_chunk(entry.id, with_text=True) == scene.client.dead_chunk(entry.id, with_text=True)
    for one in (scene.client, client):
        with pytest.raises(InvalidInput):
            one.retry_dead([entry.id])  # enqueue refused it
    dropped = client.drop_dead(job_id=entry.job_id, code="empty_text")
    assert (type(dropped), dropped.entries) == (DroppedDead, 1)
    assert client.dead(collection=name) == [] and client.dead(collection=other) == [beside]
    assert client.drop_dead([beside.id]).entries == 1


def test_chunks_and_vectors_by_their_ids_are_those_of_a_client(
    scene: GatewayScene, client: Remote, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_collections, "PAGE_WITH_TEXT", 4)
    monkeypatch.setattr(remote_collections, "PAGE_WITHOUT", 5)
    monkeypatch.setattr(gateway_collections, "IDS_STEP", 2)
    monkeypatch.setattr(remote_collections, "WHOLE_BATCH", 3)
    job = client.enqueue([(f"id {i}/é", f"{name} {i}", {"n": i}) for i in range(11)], collection=name)
    scene.embed(job.id)
    client.enqueue([("id 3/é", "no vector yet"), ("id 4/é", "neither")], collection=name)
    wanted = [f"id {i}/é" for i in (9, 3, 0, 77, 9, 1, 2, 5, 6, 10)]
    for collection, ids in ((name, wanted), (DOCS, ["a", *(chunk.id for chunk in scene.client.chunks(DOCS))])):
        for more in ({}, {"with_text": False}, {"with_vector": True}):
            mine, theirs = client.get(collection, ids, **more), scene.client.get(collection, ids, **more)
            assert list(mine) == list(theirs)
            assert [_plain(chunk) for chunk in mine.values()] == [_plain(chunk) for chunk in theirs.values()]
        for chosen in (ids, None):
            rows, expected = client.vectors(collection, chosen), scene.client.vectors(collection, chosen)
            assert rows.keys() == expected.keys()
            assert all(np.array_equal(rows[chunk_id], expected[chunk_id]) for chunk_id in expected)
    assert client.get(name, []) == client.vectors(name, []) == {}
    assert len(client.vectors(name)) == 9


def _plain(chunk: StoredChunk) -> tuple[object, ...]:
    vector = None if chunk.vector is None else chunk.vector.tolist()
    return chunk.id, chunk.text, chunk.metadata, chunk.truncated, vector


def test_chunks_by_id_whose_texts_are_too_much_for_one_answer_come_in_several(
    scene: GatewayScene, client: Remote, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_collections, "PAGE_BYTES", 1_000)
    monkeypatch.setattr(gateway_collections, "IDS_STEP", 1)
    texts = {f"{i}": f"{name} {i} {client.kind} " + "x" * (400 * i) for i in range(6)}
    client.enqueue(list(texts.items()), collection=name)

    assert {chunk.id: chunk.text for chunk in client.get(name, texts).values()} == texts


def test_an_estimate_is_that_of_a_client_and_writes_nothing(scene: GatewayScene, client: Remote, name: str) -> None:
    scene.embed(client.enqueue([("0", f"{name} 0"), ("1", f"{name} 1")], collection=name).id)
    chunks = [("0", f"{name} 0"), ("2", f"{name} is new"), ("3", f"{name} is new")]
    jobs = scene.client.jobs()
    for more in (
        {}, {"collection": name}, {"collection": name, "replace": True}, {"on_long": "split"}, {"route": "local"},
        {"collection": "a new collection"},
    ):  # fmt: skip
        told = client.estimate(chunks, **more)
        assert told == scene.client.estimate(chunks, **more), more
        assert (told.chunks, told.contents) == (3, 2)
    assert (told.cached, told.to_embed) == (1, 1)
    assert client.estimate(iter(chunks), collection=name, replace=True).deleted == 1
    bad = [*chunks, ("4", " ")]
    assert client.estimate(bad, on_invalid="skip") == scene.client.estimate(bad, on_invalid="skip")
    for one in (scene.client, client):
        with pytest.raises(InvalidChunk) as raised:
            one.estimate(bad)
        assert raised.value.position == 3
        with pytest.raises(InvalidInput, match="replace needs a collection"):
            one.estimate(chunks, replace=True)
        with pytest.raises(UnknownModel):
            one.estimate(chunks, model="no such model")
    assert scene.client.jobs() == jobs
    assert scene.client.count(name) == 2
    with remote(client.kind, scene.running.url, DOCS_ONLY) as docs, pytest.raises(NotFound):
        docs.estimate(chunks, collection=name)
    with remote(client.kind, scene.running.url, SEARCH_ONLY) as search, pytest.raises(AccessDenied):
        search.estimate(chunks)


def test_keywords_and_indexes_are_made_and_dropped_and_the_other_collection_keeps_its_own(
    scene: GatewayScene, client: Remote, name: str
) -> None:
    other = f"beside {name}"
    for one in (name, other):
        scene.embed(client.enqueue([(f"{i}", f"{one} {i}") for i in range(3)], collection=one).id)
        assert client.keywords(one) is None
        assert client.keywords(one, language="simple") == client.keywords(one) == scene.client.keywords(one)
        assert client.index(one) == client.index(one, space="active") == scene.client.index(one)
    with pytest.raises(InvalidInput, match="drop_keywords"):
        client.keywords(name, language="english")
    assert [client.drop_keywords(name), client.drop_keywords(name)] == [True, False]
    assert (client.keywords(name), client.keywords(other)) == (None, scene.client.keywords(other))
    assert client.keywords(other) is not None


def test_outdated_chunks_are_served_through_a_gateway_by_collection(scene: GatewayScene, client: Remote) -> None:
    name, other = f"outdated of {client.kind}", f"not of {client.kind}"
    for one in (name, other):
        scene.embed(client.enqueue([(f"{i}", f"{one} {i}") for i in range(3)], collection=one).id)
    assert client.outdated(name) == scene.client.outdated(name)
    assert client.outdated(name, serve=True) == client.outdated(name) == scene.client.outdated(name)
    for one in (name, other):
        client.cancel(client.enqueue([("1", f"new text of {one}")], collection=one).id)  # no worker embeds it
    vector = scene.client.vectors(name, ["1", "2"])["2"]
    hits = client.search(vector, collection=name)
    assert hits == scene.client.search(vector, collection=name)
    assert [(hit.chunk_id, hit.text) for hit in hits if hit.outdated] == [("1", f"{name} 1")]
    assert sorted(hit.chunk_id for hit in client.search(vector, collection=other)) == ["0", "2"]
    assert (client.outdated(name).waiting, client.outdated(other).waiting) == (1, 0)
    assert not client.outdated(name, serve=False).is_served
    assert len(client.search(vector, collection=name)) == 2


def test_how_searches_went_is_told_by_collection(scene: GatewayScene, client: Remote) -> None:
    for collection in (DOCS, ODD):
        mine, theirs = client.search_counts(collection, hours=2.5), scene.client.search_counts(collection, hours=2.5)
        assert mine == theirs
        assert (type(mine), [counts.role for counts in mine]) == (type(theirs), ["active"])


def test_a_key_keeps_in_order_what_it_may(scene: GatewayScene, client: Remote) -> None:
    with remote(client.kind, scene.running.url, DOCS_ONLY) as docs:
        for call in (
            lambda: docs.update_metadata(ODD, {"a": 1}, all_chunks=True),
            lambda: docs.drop_collection(ODD),
            lambda: docs.explain(scene.jobs[ODD].id),
            lambda: docs.dead_codes(collection=ODD),
            lambda: docs.get(ODD, ["a"]),
            lambda: docs.vectors(ODD),
            lambda: docs.index(ODD),
            lambda: docs.keywords(ODD),
            lambda: docs.keywords(ODD, language="simple"),
            lambda: docs.drop_keywords(ODD),
            lambda: docs.search_counts(ODD),
            lambda: docs.outdated(ODD),
            lambda: docs.outdated(ODD, serve=True),
        ):
            with pytest.raises(NotFound):
                call()
        with pytest.raises(AccessDenied):
            docs.set_alias("a name of somebody else", DOCS)
    with remote(client.kind, scene.running.url, SEARCH_ONLY) as search:
        for verb, given in (
            ("update_metadata", (DOCS, {"a": 1})), ("drop_collection", (DOCS,)), ("rename_collection", (DOCS, "x")),
            ("lanes", ()), ("usage", ()), ("dead_codes", ()), ("explain", (scene.jobs[DOCS].id,)),
        ):  # fmt: skip
            more = {"all_chunks": True} if verb == "update_metadata" else {}
            with pytest.raises(AccessDenied):
                getattr(search, verb)(*given, **more)
        for call in (
            lambda: search.index(DOCS), lambda: search.keywords(DOCS, language="simple"),
            lambda: search.drop_keywords(DOCS), lambda: search.outdated(DOCS, serve=True),
        ):  # fmt: skip
            with pytest.raises(AccessDenied):
                call()
        assert search.get(DOCS, []) == {} and search.keywords(DOCS) is None and not search.outdated(DOCS).is_served
    assert {one.name for one in scene.client.collections()} >= {DOCS, ODD}


ERRORS: list[tuple[type[Exception], Callable[[Any], Any]]] = [
    (NotFound, lambda c: c.job(10**9)),
    (NotFound, lambda c: c.cancel(10**9)),
    (NotFound, lambda c: c.wait(10**9)),
    (NotFound, lambda c: c.audit("absent")),
    (NotFound, lambda c: c.count("absent")),
    (NotFound, lambda c: c.search("x", collection="absent")),
    (NotFound, lambda c: c.search([], collection="absent")),
    (NotFound, lambda c: listed(c.chunks("absent"))),
    (NotFound, lambda c: listed(c.iter_vectors("absent"))),
    (NotFound, lambda c: c.dead(10**9)),
    (NotFound, lambda c: c.delete("absent", ["a"])),
    (UnknownModel, lambda c: c.embed(["a"], model="no such model")),
    (InvalidInput, lambda c: c.search("x", collection=DOCS, metadata={"n": {"$odd": 1}})),
    (InvalidInput, lambda c: c.search(np.zeros(384, np.float32), collection=DOCS)),
    (InvalidInput, lambda c: c.search(np.ones(3, np.float32), collection=DOCS)),
    (InvalidInput, lambda c: c.search("x", collection=DOCS, k=0)),
    (InvalidInput, lambda c: c.search(collection=DOCS)),
    (InvalidInput, lambda c: c.count(DOCS, filter={"n": {"$odd": 1}})),
    (InvalidInput, lambda c: c.job("a")),
    (NotFound, lambda c: c.explain(10**9)),
    (NotFound, lambda c: c.attempts(10**9)),
    (NotFound, lambda c: c.dead_chunk(10**9)),
    (NotFound, lambda c: c.dead_codes(collection="absent")),
    (NotFound, lambda c: c.drop_dead([10**9])),
    (NotFound, lambda c: c.drop_collection("absent")),
    (NotFound, lambda c: c.rename_collection("absent", "new")),
    (NotFound, lambda c: c.set_alias("new alias", "absent")),
    (NotFound, lambda c: c.remove_alias("absent")),
    (NotFound, lambda c: c.update_metadata("absent", {"a": 1}, ids=["1"])),
    (NotFound, lambda c: c.get("absent", ["1"])),
    (NotFound, lambda c: c.get("absent", [])),
    (NotFound, lambda c: c.vectors("absent")),
    (NotFound, lambda c: c.vectors("absent", ["1"])),
    (NotFound, lambda c: c.index("absent")),
    (NotFound, lambda c: c.keywords("absent")),
    (NotFound, lambda c: c.keywords("absent", language="simple")),
    (NotFound, lambda c: c.drop_keywords("absent")),
    (NotFound, lambda c: c.search_counts("absent")),
    (NotFound, lambda c: c.outdated("absent")),
    (InvalidInput, lambda c: c.outdated(DOCS, serve=1)),
    (InvalidInput, lambda c: c.get(DOCS, "one id")),
    (InvalidInput, lambda c: c.get(DOCS, [1])),
    (InvalidInput, lambda c: c.vectors(DOCS, "one id")),
    (NotFound, lambda c: c.index(DOCS, space="no such space")),
    (InvalidInput, lambda c: c.keywords(DOCS, language="no such language")),
    (InvalidInput, lambda c: c.search_counts(DOCS, hours=1e9)),
    (InvalidInput, lambda c: c.update_metadata(DOCS, {"a": 1})),
    (InvalidInput, lambda c: c.update_metadata(DOCS, {"a": 1}, filter={})),
    (InvalidInput, lambda c: c.rename_collection(DOCS, ODD)),
    (InvalidInput, lambda c: c.set_alias(ODD, DOCS)),
    (InvalidInput, lambda c: c.drop_collection(ALIAS)),
    (InvalidInput, lambda c: c.retry_dead()),
    (InvalidInput, lambda c: c.resume_lane("local")),
    (InvalidInput, lambda c: c.usage(since="today")),
    (InvalidInput, lambda c: c.embed(["a"], dimensions=3)),
]


@pytest.mark.parametrize(("kind_of_error", "call"), ERRORS)
def test_a_remote_client_raises_what_a_client_raises(
    scene: GatewayScene, client: Remote, kind_of_error: type[Exception], call: Callable[[Any], Any]
) -> None:
    for one in (scene.client, client):
        with pytest.raises(kind_of_error) as raised:
            call(one)
        assert type(raised.value) is kind_of_error, one


def test_a_key_sees_what_it_may_see(scene: GatewayScene, client: Remote) -> None:
    with remote(client.kind, scene.running.url, DOCS_ONLY) as docs:
        assert [one.name for one in docs.collections()] == [DOCS]
        with pytest.raises(NotFound):
            docs.audit(ODD)
        with pytest.raises(NotFound):
            docs.job(scene.jobs[ODD].id)
    with remote(client.kind, scene.running.url, SEARCH_ONLY) as search, pytest.raises(AccessDenied):
        search.jobs()
    with remote(client.kind, scene.running.url, "cmk_unknown") as nobody, pytest.raises(AccessDenied):
        nobody.collections()


def passed_on(url: str, asked: Asked) -> Said:
    """The answer of the gateway at ``url``."""
    kept = ("authorization", "content-type", "idempotency-key")
    headers = {name: value for name, value in asked.headers.items() if name in kept}
    with httpx2.Client(trust_env=False, timeout=PATIENCE, verify=False) as http:
        answer = http.request(asked.method, url + asked.path, content=asked.body, headers=headers)
    wanted = ("content-type", "x-chunkmill-fingerprint", "x-should-retry")
    return Said(
        answer.status_code, answer.content, {name: value for name, value in answer.headers.items() if name in wanted}
    )


@pytest.mark.parametrize("on_invalid", ["raise", "skip"])
def test_a_lost_answer_to_an_enqueue_makes_no_second_job(
    scene: GatewayScene, client: Remote, name: str, on_invalid: str
) -> None:
    answers = itertools.count()

    def answer(asked: Asked) -> Said:
        said = passed_on(scene.running.url, asked)
        return HANGS_UP if next(answers) < 2 else said

    before = {job.id for job in client.jobs(1000)}
    with scripted(answer) as between, remote(client.kind, between.url, KEY) as cut_off:
        job = cut_off.enqueue(
            (Chunk(f"{i}", f"{name} {i} {client.kind}") for i in range(50)), collection=name, on_invalid=on_invalid
        )
        assert len(between.asked) == 3
    assert {job.id for job in client.jobs(1000)} - before == {job.id}
    assert (job.chunks, client.count(name)) == (50, 50)


def test_a_delete_whose_answer_is_lost_is_not_repeated(scene: GatewayScene, client: Remote, name: str) -> None:
    client.enqueue([Chunk(f"{i}", f"{name} {i} {client.kind}") for i in range(5)], collection=name)

    def answer(asked: Asked) -> Said:
        passed_on(scene.running.url, asked)
        return HANGS_UP

    with scripted(answer) as between, remote(client.kind, between.url, KEY) as cut_off:
        with pytest.raises(GatewayUnavailable, match="hung up"):
            cut_off.delete(name, ["1", "2"])
        assert len(between.asked) == 1
    assert client.count(name) == 3


def test_vectors_go_on_behind_the_last_that_came(
    scene: GatewayScene, client: Remote, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_collections, "VECTORS_STEP", 10)
    monkeypatch.setattr(remote_collections, "PAGE_WITHOUT", 7)
    job = client.enqueue([Chunk(f"{i:03}", f"{name} {i} {client.kind}") for i in range(60)], collection=name)
    scene.embed(job.id)
    whole = client.iter_vectors(name, batch_size=1000)
    assert [ids for ids, _ in whole] == [[f"{i:03}" for i in range(60)]]
    for share in (0.0, 0.3, 0.99):

        def answer(asked: Asked, share: float = share) -> Said:
            said = passed_on(scene.running.url, asked)
            if "/vectors" not in asked.path:
                return said
            head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(said.body)}\r\n\r\n".encode()
            return Said(raw=head + said.body[: int(share * len(said.body))])

        with scripted(answer) as between, remote(client.kind, between.url, KEY) as cut_off:
            got = cut_off.iter_vectors(name, batch_size=16)
            assert [len(ids) for ids, _ in got] == [16, 16, 16, 12]
            assert [one for ids, _ in got for one in ids] == whole[0][0]
            assert same(np.concatenate([rows for _, rows in got]), whole[0][1])
            assert any("/chunks" in asked.path for asked in between.asked)


def test_a_gateway_that_goes_away_is_replaced_by_one_of_the_same_space(
    stack: StackStatus, scene: GatewayScene, client: Remote
) -> None:
    with fresh_settings(stack) as settings, contextlib.ExitStack() as first_ends:
        db = create_db(settings.require_database_url(), role="test")
        first_ends.callback(db.dispose)
        first_ends.enter_context(stand_in_worker(db))
        first = first_ends.enter_context(running_gateway(settings))
        with remote(client.kind, first.url, KEY, fallback=scene.running.url) as two:
            before = two.embed(["one", "two"])
            first_ends.close()
            assert same(two.embed(["one", "two"]), before)
            with pytest.raises(GatewayUnavailable):
                two.client._verbs._timeout = 0.1
                two.jobs()  # jobs are in the database of the first


def test_two_models_behind_one_address_are_not_mixed(scene: GatewayScene, client: Remote) -> None:
    models = itertools.cycle(["all-MiniLM-L6-v2", "no other"])

    def answer(asked: Asked) -> Said:
        said = passed_on(scene.running.url, asked)
        if next(models) == "no other":
            said.headers["x-chunkmill-fingerprint"] = "0" * 64
        return said

    with scripted(answer) as between, remote(client.kind, between.url, KEY) as mixed:
        mixed.embed(["one"])
        with pytest.raises(SpaceMismatch):
            mixed.embed(["one"])


def test_tls_is_verified_with_a_private_ca_before_the_key_is_sent(
    scene: GatewayScene, client: Remote, tmp_path: Path
) -> None:
    authority = make_authority(tmp_path)
    port = int(scene.running.url.rpartition(":")[2])
    with tls_proxy(authority.good, port) as behind:
        with remote(client.kind, f"https://localhost:{behind}", KEY, verify=authority.ca) as trusted:
            assert trusted.count(DOCS) == 6
        with (
            remote(client.kind, f"https://localhost:{behind}", KEY) as stranger,
            pytest.raises(GatewayUnavailable, match="verify="),
        ):
            stranger.count(DOCS)
    with (
        tls_proxy(authority.elsewhere, port) as behind,
        remote(client.kind, f"https://localhost:{behind}", KEY, verify=authority.ca) as stranger,
        pytest.raises(GatewayUnavailable, match="certificate"),
    ):
        stranger.count(DOCS)


def test_an_embedder_has_the_four_methods_that_programs_know(scene: GatewayScene, worker: StandInWorker) -> None:
    async def main() -> None:
        embedder = RemoteEmbedder(base_url=scene.running.url, batch_size=32, key=KEY)
        with pytest.raises(InvalidInput, match="initialize"):
            embedder.get_dimension()
        await embedder.initialize()
        assert embedder.get_dimension() == 384
        rows = await embedder.embed(["one", "two"])
        assert rows == [vector_of(text, "document", 384).tolist() for text in ("one", "two")]
        await embedder.close()
        with pytest.raises(ClientClosed):
            await embedder.embed(["three"])

    asyncio.run(main())


def test_the_example_of_the_page_runs(scene: GatewayScene, worker: StandInWorker) -> None:
    page = (Path(__file__).parents[2] / "docs" / "gateway.md").read_text()
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "RemoteClient" in block)
    environment = os.environ | {"CHUNKMILL_URL": scene.running.url, "CHUNKMILL_API_KEY": KEY}
    before = scene.client.jobs(1)[0].id
    running = subprocess.Popen([sys.executable, "-c", example], env=environment, stdout=subprocess.PIPE, text=True)

    def ended() -> bool:
        # A job can be seen before its TokenBatches are written, so one look may come too early.
        if (newest := scene.client.jobs(1)[0].id) > before:
            scene.embed(newest)
        return running.poll() is not None

    try:
        until(ended)
        said, _ = running.communicate(timeout=PATIENCE)
    finally:
        running.kill()
        running.wait()
        scene.client.delete(DOCS, ["page-0", "page-1"])  # the other tests know what is in the collection
    assert running.returncode == 0
    assert len(said.splitlines()) == 3


def test_a_closed_client_says_so(scene: GatewayScene, client: Remote) -> None:
    closed = Remote(client.kind, scene.running.url, KEY)
    assert closed.count(DOCS) == 6
    closed.client.close() if client.kind == "sync" else closed._runner.run(closed.client.close())  # type: ignore[union-attr]
    with pytest.raises(ClientClosed, match="was closed"):
        closed.count(DOCS)
    closed.close()


def test_an_async_client_serves_several_event_loops(scene: GatewayScene) -> None:
    made = AsyncRemoteClient(scene.running.url, KEY)
    assert [asyncio.run(made.count(DOCS)) for _ in range(3)] == [6, 6, 6]


def test_a_cancelled_call_ends_and_withdraws_what_it_asked(scene: GatewayScene, worker: StandInWorker) -> None:
    def waiting() -> int:
        with scene.db.begin() as conn:
            return int(conn.execute(sa.text("SELECT count(*) FROM embed_requests")).scalar_one())

    async def main() -> None:
        async with AsyncRemoteClient(scene.running.url, KEY) as made:
            call = asyncio.ensure_future(made.embed(["cancelled"], timeout=PATIENCE))
            await asyncio.to_thread(until, lambda: waiting() > 0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await asyncio.to_thread(until, lambda: waiting() == 0)

    worker.may.clear()
    try:
        asyncio.run(main())
    finally:
        worker.may.set()


def test_many_threads_use_one_client(scene: GatewayScene, worker: StandInWorker) -> None:
    with RemoteClient(scene.running.url, KEY) as made, ThreadPoolExecutor(8) as threads:
        asked = [[f"text {i} {j}" for j in range(i % 5 + 1)] for i in range(40)]
        for texts, got in zip(asked, threads.map(made.embed, asked), strict=True):
            assert same(got, np.stack([vector_of(text, "document", 384) for text in texts]))


FORKING = """
import os, sys
from chunkmill.remote import RemoteClient
client = RemoteClient(sys.argv[1], sys.argv[2])
before = client.embed([f"text {i}" for i in range(600)]).tolist()
child = os.fork()
same = client.embed([f"text {i}" for i in range(600)]).tolist() == before
if child == 0:
    os._exit(0 if same else 1)
_, status = os.waitpid(child, 0)
sys.exit(0 if same and status == 0 and client.embed(["a"]).shape == (1, 384) else 1)
"""


def test_a_forked_process_makes_connections_of_its_own(scene: GatewayScene, worker: StandInWorker) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKING, scene.running.url, KEY], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
