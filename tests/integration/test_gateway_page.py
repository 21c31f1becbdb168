"""The page: who may see what, who may send its forms, and what hostile names do to it, which is nothing."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

import httpx2
import pytest

from chunkmill import Chunk
from chunkmill.embedded import StackStatus
from chunkmill.gateway.page.rendering import STATIC
from tests.conftest import fresh_settings
from tests.support.gateway_scene import (
    DOCS,
    DOCS_ONLY,
    JOBS_ONLY,
    ODD,
    ODD_ONLY,
    SEARCH_ONLY,
    GatewayScene,
    gateway_scene,
)
from tests.support.gateways import KEY, stand_in_worker

HOSTILE = "<script>alert(1)</script>\"'&{{ 7 * 7 }}"


@pytest.fixture(scope="module")
def scene(stack: StackStatus) -> Iterator[GatewayScene]:
    with fresh_settings(stack) as settings, gateway_scene(settings) as made:
        yield made


class Browser:
    """What a browser sends: its cookie, and with each form where it comes from."""

    def __init__(self, scene: GatewayScene, key: str | None = None) -> None:
        self.url = scene.running.url
        self.http = scene.clients[None]
        self.http.cookies.clear()
        if key is not None:
            answer = self.post("/page/login", key=key)
            assert (answer.status_code, answer.headers["location"]) == (303, "/")
            self.set_cookie = answer.headers["set-cookie"]

    def get(self, path: str, **headers: str) -> httpx2.Response:
        return self.http.get(path, headers=headers)

    def post(self, path: str, origin: str | None = "own", **fields: str) -> httpx2.Response:
        headers = {} if origin is None else {"origin": self.url if origin == "own" else origin}
        return self.http.post(path, data=fields, headers=headers)


@pytest.fixture(autouse=True)
def _forget(scene: GatewayScene) -> Iterator[None]:
    yield
    scene.clients[None].cookies.clear()


def test_without_a_key_there_is_only_the_form(scene: GatewayScene) -> None:
    browser = Browser(scene)
    for path in ("/", "/page/live", "/page/search", f"/page/jobs/{scene.jobs[DOCS].id}"):
        answer = browser.get(path)
        assert answer.status_code == 401
        assert "API key" in answer.text
        assert f">{DOCS}<" not in answer.text
    assert browser.get(f"/page/jobs/{scene.jobs[DOCS].id}/events").status_code == 401
    assert browser.post(f"/page/jobs/{scene.jobs[DOCS].id}/cancel").status_code == 401
    wrong = browser.post("/page/login", key="cmk_wrong")
    assert (wrong.status_code, "set-cookie" in wrong.headers) == (401, False)
    assert "cmk_wrong" not in wrong.text


def test_the_key_is_kept_where_no_script_and_no_other_site_has_it(scene: GatewayScene) -> None:
    browser = Browser(scene, KEY)
    attributes = {part.strip().lower() for part in browser.set_cookie.split(";")[1:]}
    assert {"httponly", "samesite=strict", "path=/"} <= attributes
    assert not {part for part in attributes if part.startswith(("max-age", "expires", "domain"))}
    assert browser.get("/").status_code == 200
    assert browser.post("/page/logout").status_code == 303
    assert browser.get("/").status_code == 401


def test_the_address_with_the_key_leads_to_one_without(scene: GatewayScene) -> None:
    browser = Browser(scene)
    answer = browser.get(f"/?key={KEY}")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert browser.get("/").status_code == 200
    assert browser.get("/?key=cmk_wrong").status_code == 401
    browser.http.cookies.clear()
    # Another site may not log somebody in with a key of its own.
    assert "set-cookie" not in browser.get(f"/?key={KEY}", **{"sec-fetch-site": "cross-site"}).headers


@pytest.mark.parametrize("origin", ["https://evil.example", "http://127.0.0.1:1", "null", None])
@pytest.mark.parametrize("path", ["/page/jobs/{}/cancel", "/page/jobs/{}/retry", "/page/logout", "/page/login"])
def test_forms_of_other_sites_are_refused(scene: GatewayScene, path: str, origin: str | None) -> None:
    browser = Browser(scene, KEY)
    answer = browser.post(path.format(scene.jobs[DOCS].id), origin=origin, key=KEY)
    assert answer.status_code == 403
    assert browser.get("/").status_code == 200  # and nobody was logged out


def test_a_job_is_cancelled_and_retried_by_forms(scene: GatewayScene) -> None:
    job = scene.client.enqueue([Chunk("1", "to cancel by a form")], collection="forms")
    browser = Browser(scene, KEY)
    answer = browser.post(f"/page/jobs/{job.id}/cancel")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/page/jobs/{job.id}")
    assert "cancelled" in browser.get(f"/page/jobs/{job.id}").text
    browser.post(f"/page/jobs/{job.id}/retry")
    assert scene.client.job(job.id).state == "running"


def test_the_overview_shows_what_the_key_may_see(scene: GatewayScene) -> None:
    def parts(key: str) -> set[str]:
        text = Browser(scene, key).get("/").text
        return set(re.findall(r"<h2>([^<]+)</h2>", text)) | {n for n in (DOCS, ODD) if f">{html.escape(n)}<" in text}

    assert parts(KEY) == {"Jobs", "Collections", "Lanes and money", "Workers", DOCS, ODD}
    assert parts(DOCS_ONLY) == {"Jobs", "Collections", "Lanes and money", "Workers", DOCS}
    assert parts(ODD_ONLY) == {"Jobs", "Collections", ODD}
    assert parts(SEARCH_ONLY) == {"Collections", DOCS, ODD}
    assert parts(JOBS_ONLY) == {"Jobs", DOCS, ODD}


def test_a_hidden_job_and_a_hidden_collection_are_not_found(scene: GatewayScene) -> None:
    browser = Browser(scene, ODD_ONLY)
    hidden, missing = (browser.get(f"/page/jobs/{number}") for number in (scene.jobs[DOCS].id, 999_999_999))
    assert (hidden.status_code, missing.status_code) == (404, 404)
    assert browser.get(f"/page/jobs/{scene.jobs[DOCS].id}/events").status_code == 404
    assert browser.post(f"/page/jobs/{scene.jobs[DOCS].id}/cancel").status_code == 404
    assert browser.post("/page/search", collection=DOCS, query="x").status_code == 404
    assert Browser(scene, SEARCH_ONLY).get(f"/page/jobs/{scene.jobs[DOCS].id}").status_code == 403
    assert Browser(scene, JOBS_ONLY).get("/page/search").status_code == 403


def test_hostile_names_ids_and_texts_are_shown_as_they_are(scene: GatewayScene) -> None:
    chunks = [Chunk(HOSTILE, f"text {HOSTILE}", {HOSTILE: HOSTILE}), Chunk("bad", "")]
    job = scene.client.enqueue(chunks, collection=HOSTILE, on_invalid="skip", idempotency_key=HOSTILE)
    scene.embed(job.id)
    browser = Browser(scene, KEY)
    with stand_in_worker(scene.db):
        pages = [
            browser.get("/"),
            browser.get("/page/live"),
            browser.get(f"/page/jobs/{job.id}"),
            browser.post("/page/search", collection=HOSTILE, query=HOSTILE),
            browser.post("/page/search", collection=f"{HOSTILE} is not there", query=HOSTILE),
        ]
    for page in pages:
        assert "<script>alert" not in page.text, page.url
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.text, page.url
        assert "{{ 7 * 7 }}" in page.text, page.url
    assert "text &lt;script&gt;" in pages[3].text


def test_a_search_stands_in_no_address(scene: GatewayScene) -> None:
    browser = Browser(scene, KEY)
    assert 'method="post" action="/page/search"' in browser.get("/page/search").text
    assert "a secret query" not in browser.get("/page/search?query=a+secret+query&collection=docs").text


def test_pages_are_strict(scene: GatewayScene) -> None:
    browser = Browser(scene, KEY)
    for path in ("/", "/page/search", "/docs", f"/page/jobs/{scene.jobs[DOCS].id}", *(f"/{name}" for name in STATIC)):
        answer = browser.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert ("no-store" in answer.headers["cache-control"]) is (path.lstrip("/") not in STATIC)
    assert browser.get("/openapi.json").json()["openapi"] == "3.1.0"


def test_too_large_and_broken_forms_are_refused(scene: GatewayScene) -> None:
    browser = Browser(scene, KEY)
    assert browser.post("/page/search", collection=DOCS, query="x" * 100_000).status_code == 413
    own = {"origin": scene.running.url, "content-type": "application/x-www-form-urlencoded"}
    assert browser.http.post("/page/search", content=b"\xff=1", headers=own).status_code == 400
    assert browser.http.post("/page/search", content=b"&".join([b"a=1"] * 50), headers=own).status_code == 400
