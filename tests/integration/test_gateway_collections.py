"""Collections over HTTP: search, chunks, vectors, audits and names, for those who may see them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import pytest

from chunkmill.embedded import StackStatus
from chunkmill.gateway import streams
from chunkmill.gateway.routes import collections as routes
from chunkmill.gateway.routes import indexes
from tests.conftest import fresh_settings
from tests.support.gateway_scene import (
    ALIAS,
    DOCS,
    DOCS_ONLY,
    JOBS_ONLY,
    ODD,
    ODD_ONLY,
    SEARCH_ONLY,
    GatewayScene,
    gateway_scene,
    of,
)
from tests.support.gateways import KEY, stand_in_worker, vector_of
from tests.support.waiting import until

D = 384
BOTH = pytest.mark.parametrize("name", [DOCS, ODD])


@pytest.fixture(scope="module")
def scene(stack: StackStatus) -> Iterator[GatewayScene]:
    with fresh_settings(stack) as settings, gateway_scene(settings) as made:
        yield made


def error(answer: httpx2.Response) -> dict[str, Any]:
    return answer.json()["error"]  # type: ignore[no-any-return]


def near(text: str) -> list[float]:
    return vector_of(text, "document", D).tolist()  # type: ignore[no-any-return]


@BOTH
def test_a_vector_is_searched(scene: GatewayScene, name: str) -> None:
    body = {"query": near(f"{name} number 3"), "k": 2, "explain": True, "exact": True}
    answer = scene.http.post(of(name, "/search"), json=body).json()
    assert answer["hits"][0] == {
        "score": pytest.approx(1.0),
        "chunk_id": "3",
        "text": f"{name} number 3",
        "metadata": {"n": 3, "of": name},
        "truncated": False,
        "keyword": None,
        "mixed": None,
        "bridge": None,
        "outdated": False,
    }
    assert len(answer["hits"]) == 2
    assert answer["explanation"]["is_exact"] is True
    assert answer["space"] == scene.jobs[name].space
    assert answer["took_ms"] > 0


@BOTH
def test_texts_are_searched_as_the_client_searches_them(scene: GatewayScene, name: str) -> None:
    texts = ["one query", "another query"]
    with stand_in_worker(scene.db):
        expected = scene.client.search(texts, collection=name, k=3)
        several = scene.http.post(of(name, "/search"), json={"query": texts, "k": 3}).json()["results"]
        one = scene.http.post(of(name, "/search"), json={"query": texts[1], "k": 3}).json()["hits"]
    for hits, right in zip([*several, {"hits": one}], [*expected, expected[1]], strict=True):
        assert [(h["chunk_id"], h["score"]) for h in hits["hits"]] == [
            (h.chunk_id, pytest.approx(h.score)) for h in right
        ]


@pytest.mark.parametrize(
    ("filter_in_json", "said"),
    [
        ('{"n": NaN}', "the body cannot be read, because it has NaN or Infinity, which JSON does not have"),
        ('{"n": {"$gt": -Infinity}}', "it has NaN or Infinity"),
        ('{"n": 1e400}', "filter at n: it is NaN or infinite; give a finite number"),
        ('{"n": {"$in": 1}}', "filter at n.$in: it is a number; give a list of values"),
        ('{"n": {"$bad": 1}}', "filter at n.$bad: there is no such operator; the operators are $eq"),
        ('{"n": "\\ud800"}', "filter at n: it contains a lone surrogate"),
        ('["zanzibarquokka"]', "filter is of type list; it must be a dict"),
    ],
)
def test_an_odd_filter_gets_a_sentence(scene: GatewayScene, filter_in_json: str, said: str) -> None:
    body, headers = f'{{"query": "x", "filter": {filter_in_json}}}', {"content-type": "application/json"}
    answer = scene.http.post(of(DOCS, "/search"), content=body, headers=headers)
    assert (answer.status_code, said in answer.json()["error"]["message"]) == (400, True), answer.text
    assert "zanzibarquokka" not in answer.text


def test_a_search_takes_a_filter_an_offset_a_least_score_and_a_chunk(scene: GatewayScene) -> None:
    def ids(**body: Any) -> list[str]:
        answer = scene.http.post(of(DOCS, "/search"), json={"query": near(f"{DOCS} number 3"), **body})
        assert answer.status_code == 200, answer.text
        return [hit["chunk_id"] for hit in answer.json()["hits"]]

    everything = ids(offset=0)
    assert ids(offset=1) == everything[1:]
    assert ids(filter={"n": {"$gte": 4}}) == [i for i in everything if i in "45"]
    assert ids(min_score=0.9) == ["3"]
    like = scene.http.post(of(DOCS, "/search"), json={"like": "3", "k": 6}).json()["hits"]
    assert [hit["chunk_id"] for hit in like] == everything[1:]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"query": "x", "fliter": {}}, "fliter"),
        ({"query": "x", "k": 1001}, "k"),
        ({"query": "x", "k": True}, "k"),
        ({"query": ["x"] * 101}, "query"),
        ({"query": {"a": 1}}, "query"),
        ({"query": "x", "offset": -1}, "offset"),
        ({"query": "x", "exact": "yes"}, "exact"),
        ({"query": "x", "timeout_ms": 0}, "timeout_ms"),
        ({}, None),
        ({"query": [1.0, 2.0]}, None),
        ({"query": [[1.0], ["a"]]}, None),
        ({"query": "x", "filter": {"$no": 1}}, None),
        ({"query": "x", "hybrid": "maybe"}, None),
    ],
)
def test_a_wrong_search_is_refused(scene: GatewayScene, body: dict[str, Any], param: str | None) -> None:
    answer = scene.http.post(of(DOCS, "/search"), json=body)
    assert (answer.status_code, error(answer)["param"]) == (400, param)


def test_collections_are_listed_as_far_as_a_key_may_see(scene: GatewayScene) -> None:
    listed = {collection["name"]: collection for collection in scene.http.get("/v1/collections").json()["collections"]}
    assert listed.keys() == {DOCS, ODD}
    assert (listed[ODD]["chunks"], listed[ODD]["embedded"], listed[DOCS]["aliases"]) == (6, 6, [ALIAS])
    for key, name in ((DOCS_ONLY, DOCS), (ODD_ONLY, ODD)):
        assert scene.ask(key, "GET", "/v1/collections").json()["collections"] == [listed[name]]
    assert scene.http.get(of(ODD)).json() == listed[ODD]
    assert scene.http.get(of(ALIAS)).json() == listed[DOCS]


HIDDEN = [
    ("GET", ""),
    ("GET", "/audit"),
    ("GET", "/chunks"),
    ("GET", "/chunks?id=1"),
    ("POST", "/chunks/get"),
    ("GET", "/count"),
    ("GET", "/keywords"),
    ("POST", "/keywords"),
    ("DELETE", "/keywords"),
    ("GET", "/outdated"),
    ("POST", "/outdated"),
    ("GET", "/searches"),
    ("GET", "/vectors"),
    ("POST", "/search"),
    ("PATCH", "/chunks"),
    ("DELETE", "/chunks?id=none"),
    ("POST", "/index"),
    ("DELETE", ""),
    ("PATCH", ""),
]


@pytest.mark.parametrize(("method", "rest"), HIDDEN)
def test_a_collection_that_a_key_does_not_name_answers_as_one_that_does_not_exist(
    scene: GatewayScene, method: str, rest: str
) -> None:
    missing = "nobody has this"
    answers = [scene.ask(DOCS_ONLY, method, of(name, rest)) for name in (ODD, missing)]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert error(answers[0])["message"] == error(answers[1])["message"].replace(missing, ODD)
    assert error(answers[0])["code"] == error(answers[1])["code"]


def test_every_path_of_a_collection_is_among_those_that_hide_it() -> None:
    paths = {
        (e.method, e.path.removeprefix("/v1/collections/{collection}")) for e in (*routes.ENDPOINTS, *indexes.ENDPOINTS)
    }
    tested = {(method, rest.partition("?")[0]) for method, rest in HIDDEN}
    others = {("GET", "/v1/collections"), ("PUT", "/v1/aliases/{alias}"), ("DELETE", "/v1/aliases/{alias}")}
    others.add(("POST", "/v1/feedback"))  # test_searches_of_several_spaces.py
    assert paths == tested | others


def test_a_key_gives_only_names_that_it_names(scene: GatewayScene) -> None:
    scene.client.set_alias("odd alias", ODD)
    try:
        refused = [
            scene.ask(DOCS_ONLY, "PUT", f"/v1/aliases/{alias}", json={"collection": ALIAS})
            for alias in ("odd%20alias", "nobody%20has%20this")
        ] + [scene.ask(DOCS_ONLY, "PATCH", of(ALIAS), json={"name": name}) for name in (ODD, "nobody has this")]
        assert {(answer.status_code, answer.text) for answer in refused} == {(403, refused[0].text)}
        assert scene.ask(DOCS_ONLY, "DELETE", "/v1/aliases/odd%20alias").status_code == 404
        assert scene.http.get(of("odd alias")).json()["name"] == ODD
        own = scene.ask(DOCS_ONLY, "PUT", "/v1/aliases/new%20of%20two", json={"collection": ALIAS})
        assert own.json() == {"alias": "new of two", "collection": DOCS}
        assert scene.ask(DOCS_ONLY, "DELETE", "/v1/aliases/new%20of%20two").status_code == 200
        assert scene.http.put("/v1/aliases/a%2Fb", json={"collection": DOCS}).json()["alias"] == "a/b"
        assert scene.http.delete("/v1/aliases/a%2Fb").status_code == 200
    finally:
        scene.client.remove_alias("odd alias")


def test_scopes_are_asked_for(scene: GatewayScene) -> None:
    def status(key: str | None, method: str, path: str) -> int:
        return scene.ask(key, method, path).status_code

    assert status(SEARCH_ONLY, "GET", of(DOCS)) == 200
    assert status(JOBS_ONLY, "GET", of(DOCS)) == 403
    assert status(SEARCH_ONLY, "DELETE", of(DOCS, "/chunks?id=none")) == 403
    assert status(JOBS_ONLY, "DELETE", of(DOCS, "/chunks?id=none")) == 200
    for key in (SEARCH_ONLY, JOBS_ONLY):
        for method, path in (
            ("DELETE", of(DOCS)),
            ("PATCH", of(DOCS)),
            ("POST", of(DOCS, "/index")),
            ("GET", "/v1/lanes"),
            ("GET", "/v1/costs"),
            ("PUT", "/v1/aliases/x"),
        ):
            assert status(key, method, path) == 403
    assert status(None, "GET", of(DOCS)) == 401


@BOTH
def test_an_audit_and_a_count_and_an_index_are_the_clients(scene: GatewayScene, name: str) -> None:
    audit = scene.http.get(of(name, "/audit")).json()
    assert (audit["collection"], audit["chunks"], audit["missing"], audit["complete"]) == (name, 6, 0, True)
    assert scene.http.get(of(name, "/count"), params={"filter": '{"n": {"$lt": 2}}'}).json() == {"count": 2}
    assert scene.http.post(of(name, "/index")).json()["is_ready"] in (True, False)


@BOTH
def test_chunks_are_paged_and_read_by_their_ids(scene: GatewayScene, name: str) -> None:
    ids: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = scene.http.get(of(name, "/chunks"), params={"limit": 4, "with_text": "false", **after}).json()
        ids += [chunk["id"] for chunk in page["chunks"]]
        assert all(chunk["text"] is None for chunk in page["chunks"])
        if page["next"] is None:
            break
        after = {"after": page["next"]}
    assert ids == list("012345")
    params = [("id", "5"), ("id", "none"), ("id", "0"), ("with_vector", "true")]
    by_id = scene.http.get(of(name, "/chunks"), params=params).json()["chunks"]
    assert [chunk["id"] for chunk in by_id] == ["5", "0"]
    assert by_id[0]["vector"] == pytest.approx(near(f"{name} number 5"), abs=1e-6)
    filtered = scene.http.get(of(name, "/chunks"), params={"filter": '{"n": 2}'}).json()["chunks"]
    assert [chunk["metadata"]["n"] for chunk in filtered] == [2]


def test_a_page_of_large_chunks_ends_early(scene: GatewayScene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "PAGE_BYTES", 40)
    monkeypatch.setattr(routes, "IDS_STEP", 2)
    page = scene.http.get(of(DOCS, "/chunks")).json()
    assert ([chunk["id"] for chunk in page["chunks"]], page["next"]) == (["0", "1"], "1")
    by_id = scene.http.get(of(DOCS, "/chunks"), params=[("id", str(i)) for i in range(6)])
    assert (by_id.status_code, error(by_id)["code"]) == (413, "answer_too_large")


@pytest.mark.parametrize(("what", "most"), [("metadata", 30), ("vectors", 10_000)])
def test_metadata_and_vectors_count_in_a_page_without_texts(
    scene: GatewayScene, monkeypatch: pytest.MonkeyPatch, what: str, most: int
) -> None:
    monkeypatch.setattr(routes, "PAGE_BYTES", most)
    monkeypatch.setattr(routes, "IDS_STEP", 2)
    options = {"with_text": "false", "with_vector": str(what == "vectors").lower()}
    page = scene.http.get(of(DOCS, "/chunks"), params=options).json()
    assert 0 < len(page["chunks"]) < 6
    assert page["next"] == page["chunks"][-1]["id"]
    by_id = scene.http.get(of(DOCS, "/chunks"), params=[("id", str(i)) for i in range(6)] + list(options.items()))
    assert (by_id.status_code, error(by_id)["code"]) == (413, "answer_too_large")


def test_metadata_are_changed_and_chunks_deleted(scene: GatewayScene) -> None:
    body = b"".join(
        json.dumps({"id": str(i), "text": f"to delete {i}", "metadata": {"n": i}}).encode() + b"\n" for i in range(6)
    )
    path = of("x/y", "/chunks")
    assert scene.http.post("/v1/jobs", params={"collection": "x/y"}, content=body).status_code == 200
    try:
        assert scene.http.patch(path, json={"ids": ["1"], "metadata": {"m": 1}}).json() == {"changed": 1}
        assert scene.http.patch(path, json={"filter": {"n": {"$gt": 3}}, "remove": ["n"]}).json() == {"changed": 2}
        assert scene.client.get("x/y", ["1"])["1"].metadata == {"n": 1, "m": 1}
        large = {"ids": ["3"], "metadata": {"large": 10**30 + 1}}
        assert scene.http.patch(path, json=large).json() == {"changed": 1}
        assert scene.client.get("x/y", ["3"])["3"].metadata["large"] == 10**30 + 1
        assert scene.http.patch(path, json={"metadata": {"m": 2}}).status_code == 400  # nobody said which
        assert scene.http.patch(path, json={"filter": {}, "metadata": {"m": 2}}).status_code == 400
        assert scene.http.delete(path, params={"id": ["0", "none"]}).json() == {"deleted": 1}
        assert scene.http.delete(path, params={"filter": '{"n": 2}'}).json() == {"deleted": 1}
        assert scene.http.request("DELETE", path, json={"ids": ["1"]}).json() == {"deleted": 1}
        for wrong in ({}, {"filter": {}}, {"ids": ["3"], "all": True}, {"all": 1.5}, {"ids": "3"}, {"typo": ["3"]}):
            assert scene.http.request("DELETE", path, json=wrong).status_code == 400, wrong
        assert scene.http.delete(path).status_code == 400
        assert scene.http.request("DELETE", path, params={"id": "3"}, json={"ids": ["4"]}).status_code == 400
        assert scene.http.get(of("x/y", "/count")).json() == {"count": 3}
        assert scene.http.request("DELETE", path, json={"all": True}).json() == {"deleted": 3}
    finally:
        assert scene.http.patch(of("x/y"), json={"name": "x%y"}).json() == {"name": "x%y"}
        assert scene.http.get(of("x/y")).status_code == 404
        assert scene.http.delete(of("x%y"), params={"wait": "true"}).json()["complete"] is True


@BOTH
def test_vectors_are_streamed_as_lines_and_as_blocks(
    scene: GatewayScene, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "VECTORS_STEP", 4)
    answer = scene.http.get(of(name, "/vectors"))
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    rows = [json.loads(line) for line in answer.text.splitlines()]
    assert [row["id"] for row in rows] == list("012345")
    blocks = scene.http.get(of(name, "/vectors"), params={"format": "binary", "filter": '{"n": {"$gte": 1}}'}).content
    ids: list[str] = []
    vectors = []
    at = 0
    while (length := struct.unpack_from("<I", blocks, at)[0]) > 0:
        header = json.loads(blocks[at + 4 : at + 4 + length])
        at += 4 + length
        n = len(header["ids"]) * header["dimensions"]
        vectors.append(np.frombuffer(blocks, "<f4", n, at).reshape(-1, header["dimensions"]))
        at += 4 * n
        ids += header["ids"]
    assert at + 4 == len(blocks)
    assert ids == list("12345")
    assert [len(block) for block in vectors] == [4, 1]
    np.testing.assert_allclose(np.concatenate(vectors), [row["vector"] for row in rows[1:]], atol=1e-7)


def test_a_reader_who_leaves_gives_the_place_back(scene: GatewayScene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MOST_LONG", 1)
    with scene.http.stream("GET", of(DOCS, "/vectors")) as answer:
        assert answer.status_code == 200
    until(lambda: scene.running.gateway.streams._long == 0)
    assert scene.http.get(of(DOCS, "/vectors")).status_code == 200
    assert scene.http.get(of("nobody has this", "/vectors")).status_code == 404
    assert scene.http.head(of(DOCS, "/vectors")).status_code == 200
    until(lambda: scene.running.gateway.streams._long == 0)


def test_lanes_and_costs_are_the_clients(scene: GatewayScene) -> None:
    lanes = scene.http.get("/v1/lanes").json()["lanes"]
    assert {lane["route"]: lane["state"] for lane in lanes} == {"openai": "idle", "openai-sync": "idle"}
    assert lanes[0]["lost_usd"] == "0"
    costs = scene.http.get("/v1/costs", params={"by": "day", "since": "2020-01-01"}).json()
    assert (costs["by"], costs["since"]) == ("day", "2020-01-01")
    assert costs["budget"]["limit"] is None
    assert scene.http.get("/v1/costs", params={"by": "hour"}).status_code == 400
    assert scene.http.get("/v1/costs", params={"since": "yesterday"}).status_code == 400
    assert scene.http.post("/v1/lanes/openai/resume").json() == {"resumed": False}
    assert scene.http.post("/v1/lanes/nowhere/resume").status_code == 400


@pytest.mark.parametrize("name", ["%", "a%2Fb", "..", "ü/ß", "a b+c", "x/search", "#?&", "%25"])
def test_any_name_stands_in_a_path(scene: GatewayScene, name: str) -> None:
    """The answer names the collection that was asked for, which does not exist."""
    answer = scene.ask(KEY, "POST", of(name, "/search") if name != ".." else "/v1/collections/%2E%2E/search", json={})
    assert answer.status_code == 404
    assert repr(name) in error(answer)["message"]


def test_a_path_whose_letters_are_escaped_is_the_same_path(scene: GatewayScene) -> None:
    assert scene.http.get("/v1/%63ollections").status_code == 200
