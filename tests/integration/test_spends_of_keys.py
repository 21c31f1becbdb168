"""The dollars of jobs, served batches and re-embeddings are booked to the key that began them, and to no other.

Two keys with a limit, two collections, and a text that both of them enqueue. The provider is the test server.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import partial
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from chunkmill import Gates
from chunkmill.bridge import fitting
from chunkmill.cli.__main__ import cli
from chunkmill.client import Client
from chunkmill.client import bridges as client_bridges
from chunkmill.client.aio import AsyncClient
from chunkmill.client.spool import Spool
from chunkmill.domain.chunks import prepare_or_skip
from chunkmill.domain.costs import Spent
from chunkmill.domain.embedded import EmbeddedTexts, estimated_tokens
from chunkmill.domain.keys import KeyLimits, Scope
from chunkmill.errors import BudgetExceeded, EngineError, InvalidChunk
from chunkmill.gateway.keys import StoredKeys
from chunkmill.ledger.access import keys, spends
from chunkmill.ledger.reembedding import fill
from chunkmill.poller import poller
from chunkmill.store import golden
from chunkmill_workers.provider import responder
from chunkmill_workers.provider.responder import ProviderResponder
from tests.support.corridor import MODEL, Corridor
from tests.support.corridor_scene import Scene
from tests.support.gateways import RunningGateway, running_gateway
from tests.support.paid_ledger import LARGE, register
from tests.support.remotes import remote
from tests.support.served import ended, line, openai_client, start
from tests.support.waiting import PATIENCE, until

ENOUGH = Decimal("0.01")
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Books:
    """The paid corridor behind a gateway, and what is booked to its keys."""

    scene: Scene
    gateway: RunningGateway

    @property
    def corridor(self) -> Corridor:
        return self.scene.corridor

    def key(self, name: str, usd: Decimal | None, *scopes: Scope, **more: Any) -> str:
        with self.corridor.db.begin() as conn:
            made = keys.create(
                conn,
                name=name,
                tenant=f"tenant of {name}",
                scopes=set(scopes) or {Scope.JOBS, Scope.BATCHES, Scope.EMBED},
                limits=KeyLimits(usd_per_month=usd),
                **more,
            )
        return made[1]

    def revoke(self, key: str) -> None:
        with self.corridor.db.begin() as conn:
            assert keys.revoke(conn, id_of(key))

    def ask(self, key: str, method: str, path: str, **rest: Any) -> httpx2.Response:
        with self.gateway.client(key) as http:
            return http.request(method, path, **rest)

    def enqueue(self, key: str, collection: str, texts: list[str], route: str = "openai", **more: Any) -> Any:
        """The answer to an enqueue of the texts, whose ids count from 0."""
        body = b"".join(json.dumps({"id": str(i), "text": text}).encode() + b"\n" for i, text in enumerate(texts))
        headers = more.pop("headers", {})
        params = {"collection": collection, "route": route, **more}
        return self.ask(key, "POST", "/v1/jobs", params=params, content=body, headers=headers)

    def run(self, *job_ids: int) -> None:
        """Let the jobs end, and everything that is at the provider."""
        self.scene.finish(*(self.corridor.client.job(job_id) for job_id in job_ids))
        self.settle()

    def settle(self) -> None:
        with self.corridor.db.begin() as conn:
            for spend in spends.due(conn, again=True):
                spends.settle(conn, spend)

    def used(self, key: str) -> Decimal:
        """US dollars in all months."""
        query = "SELECT coalesce(sum(usd), 0) FROM api_key_usage WHERE key_id = :key"
        return Decimal(self.corridor.one(query, key=id_of(key)))

    def months(self, key: str) -> list[Row]:
        return self.corridor.rows(
            "SELECT m.month, m.charged, m.reserved FROM api_key_spend_months m JOIN api_key_spends s "
            "ON s.id = m.spend_id WHERE s.key_id = :key AND m.charged + m.reserved <> 0 ORDER BY m.month",
            key=id_of(key),
        )

    def charged(self, *job_ids: int) -> Decimal:
        query = "SELECT coalesce(sum(usd), 0) FROM charges WHERE job_id = ANY(:jobs)"
        return Decimal(self.corridor.one(query, jobs=list(job_ids)))

    def reserved(self, key: str) -> Decimal:
        with self.corridor.db.begin() as conn:
            return next(used.reserved_usd for made, used in keys.list_all(conn) if made.id == id_of(key))


def id_of(key: str) -> int:
    return int(key.split("_")[1])


def job_of(answer: httpx2.Response) -> int:
    assert answer.status_code == 200, answer.text
    return int(answer.json()["id"])


def refused(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.fixture
def books(stage: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[Books]:
    monkeypatch.setattr(poller, "SPENDS_SECONDS", 0.0)
    ring = StoredKeys(stage.corridor.db)
    with running_gateway(stage.corridor.settings, keys=ring) as gateway:
        yield Books(stage, gateway)


def test_what_a_job_is_expected_to_cost_is_reserved_and_the_bill_replaces_it(books: Books) -> None:
    key, other = books.key("one", ENOUGH), books.key("two", ENOUGH)
    job = job_of(books.enqueue(key, "docs", [f"text {i} of the job" for i in range(9)]))
    reserved = books.used(key)
    assert reserved > 0
    assert (books.reserved(key), books.used(other)) == (reserved, 0)
    books.run(job)
    assert books.used(key) == books.charged(job) > 0
    assert (books.reserved(key), books.used(other)) == (0, 0)
    books.settle()
    assert books.used(key) == books.charged(job)


def test_two_keys_never_pay_for_each_other_also_if_they_share_a_text(books: Books) -> None:
    first, second = books.key("one", ENOUGH), books.key("two", ENOUGH)
    shared = "a text that both of them have, and that is longer than the others are"
    one = job_of(books.enqueue(first, "docs", [shared, "only of the first"]))
    two = job_of(books.enqueue(second, "notes", [shared, "only of the second", "and one more"]))
    nobodys = books.corridor.client.enqueue([("1", "of the command line")], collection="more", route="openai")
    books.run(one, two, nobodys.id)
    used = {key: books.used(key) for key in (first, second)}
    assert used == {first: books.charged(one), second: books.charged(two)}
    total = Decimal(books.corridor.one("SELECT sum(usd) FROM charges"))
    assert sum(used.values()) == total - books.charged(nobodys.id)
    assert all(used.values()) and books.charged(nobodys.id) > 0
    # The text was sent once, so it was charged to one of the jobs.
    assert books.corridor.one("SELECT sum(contents)::int FROM charges") == 5


def test_a_job_for_which_too_little_is_left_is_not_begun(books: Books) -> None:
    texts = [f"text {i} of a job that is too dear" for i in range(50)]
    key, other = books.key("poor", Decimal("0.000001")), books.key("rich", ENOUGH)
    for skip in ("raise", "skip"):
        answer = books.enqueue(key, "docs", texts, on_invalid=skip)
        assert refused(answer) == (429, "insufficient_quota")
        assert "0.000001 US dollars a month (UTC)" in answer.json()["error"]["message"]
        assert answer.headers["x-should-retry"] == "false"
    assert books.corridor.rows("SELECT FROM jobs") == []
    assert books.corridor.rows("SELECT FROM contents") == []
    assert books.used(key) == 0
    job_of(books.enqueue(key, "docs", texts[:1]))
    job_of(books.enqueue(other, "docs", texts))


def test_what_is_reserved_for_one_job_is_not_left_for_the_next(books: Books) -> None:
    texts = [f"text {i} of the first" for i in range(20)]
    key = books.key("one", None)
    job_of(books.enqueue(key, "docs", texts))
    with books.corridor.db.begin() as conn:  # as it is for a key without a limit: nothing is reserved
        assert conn.execute(sa.text("SELECT count(*) FROM api_key_spend_months")).scalar_one() == 0
    limited = books.key("limited", ENOUGH)
    job_of(books.enqueue(limited, "notes", [f"{text}, again" for text in texts]))
    limit = books.used(limited)
    with books.corridor.db.begin() as conn:
        conn.execute(
            sa.text("UPDATE api_keys SET usd_per_month = :usd WHERE id = :id"), {"usd": limit, "id": id_of(limited)}
        )
    assert refused(books.enqueue(limited, "notes", ["one more"])) == (429, "insufficient_quota")


def test_a_key_that_is_revoked_pays_for_what_it_began_which_goes_on(books: Books) -> None:
    key = books.key("one", ENOUGH)
    job = job_of(books.enqueue(key, "docs", ["a text", "another text"]))
    books.revoke(key)
    # The poller's rounds alone settle it.
    books.scene.run_until(lambda: books.corridor.one("SELECT settled_at IS NOT NULL FROM api_key_spends"))
    assert books.corridor.client.job(job).state == "completed"
    assert books.used(key) == books.charged(job) > 0


def test_each_charge_counts_in_the_month_of_its_day_and_what_is_still_expected_in_the_present_one(
    books: Books,
) -> None:
    key = books.key("one", ENOUGH)
    job = job_of(books.enqueue(key, "docs", ["a text of two months", "another one"]))
    with books.corridor.db.begin() as conn:
        # The job was begun last month, and a part of it was charged on its last day.
        conn.execute(sa.text("UPDATE api_key_spend_months SET month = month - interval '1 month'"))
        conn.execute(sa.text("UPDATE api_key_usage SET month = month - interval '1 month'"))
        conn.execute(
            sa.text(
                "INSERT INTO charges (day, route, space_id, job_id, provider_batch_id, contents, tokens, usd) "
                "SELECT date_trunc('month', now() AT TIME ZONE 'UTC')::date - 1, 'openai', space_id, id, 0, 1, 1, "
                "0.00000001 FROM jobs WHERE id = :job"
            ),
            {"job": job},
        )
        estimated = conn.execute(sa.text("SELECT estimated FROM api_key_spends")).scalar_one()
        this_month: date = conn.execute(
            sa.text("SELECT date_trunc('month', now() AT TIME ZONE 'UTC')::date")
        ).scalar_one()
    books.settle()
    before, now = books.months(key)
    assert (before["charged"], before["reserved"]) == (Decimal("0.00000001"), 0)
    assert (now["month"], now["reserved"]) == (this_month, estimated - Decimal("0.00000001"))
    assert books.used(key) == estimated
    books.run(job)
    before, now = books.months(key)
    assert before["charged"] + now["charged"] == books.charged(job) == books.used(key)
    assert now["charged"] > 0 == now["reserved"]


def test_a_correction_of_the_bill_after_the_end_reaches_the_key(books: Books) -> None:
    key, other = books.key("one", ENOUGH), books.key("two", ENOUGH)
    job = job_of(books.enqueue(key, "docs", ["a text"]))
    books.run(job)
    books.corridor.client.correct_charge(
        Decimal("0.002"), route="openai", job_id=job, day=datetime.now(UTC).date(), reason="as invoiced", author="me"
    )
    books.settle()
    assert books.used(key) == books.charged(job) + Decimal("0.002")
    assert books.used(other) == 0


def test_only_the_key_that_pays_for_a_job_goes_on_with_it(books: Books) -> None:
    first, second = books.key("one", ENOUGH), books.key("two", ENOUGH)
    job = job_of(books.enqueue(first, "docs", ["a text", "another"], headers={"Idempotency-Key": "same"}))
    assert books.ask(first, "POST", f"/v1/jobs/{job}/cancel").status_code == 200
    books.settle()
    assert books.used(first) == 0
    answer = books.ask(second, "POST", f"/v1/jobs/{job}/retry")
    assert answer.status_code == 400
    assert "not begun by this API key" in answer.json()["error"]["message"]
    assert books.corridor.client.job(job).state == "cancelled"
    assert books.ask(first, "POST", f"/v1/jobs/{job}/retry").status_code == 200
    assert books.used(first) > 0
    books.run(job)
    assert (books.used(first), books.used(second)) == (books.charged(job), 0)


def test_dead_chunks_are_tried_again_by_the_key_that_pays_alone(books: Books) -> None:
    first, second = books.key("one", ENOUGH), books.key("two", ENOUGH)
    job = job_of(books.enqueue(first, "docs", ["a text", "another"]))
    with books.corridor.db.begin() as conn:  # as if the provider had refused all
        conn.execute(sa.text("UPDATE chunk_batches SET state = 'completed', finished_at = now()"))
        conn.execute(
            sa.text(
                "INSERT INTO dead_chunks (job_id, chunk_id, code, reason, content_hash) "
                "SELECT :job, chunk_id, 'refused', 'it was refused', content_hash FROM chunks"
            ),
            {"job": job},
        )
        conn.execute(sa.text("UPDATE jobs SET state = 'failed', finished_at = now()"))
    books.settle()
    assert books.used(first) == 0
    assert books.ask(second, "POST", "/v1/dead/retry", json={"job_id": job}).status_code == 400
    assert books.corridor.client.job(job).state == "failed"
    assert books.ask(first, "POST", "/v1/dead/retry", json={"job_id": job}).status_code == 200
    assert books.used(first) > 0
    books.run(job)
    assert (books.used(first), books.used(second)) == (books.charged(job), 0)


def test_an_enqueue_that_was_cut_off_is_completed_by_the_key_that_began_it_alone(books: Books) -> None:
    first, second = books.key("one", ENOUGH), books.key("two", ENOUGH)
    texts, headers = ["a text", "another"], {"Idempotency-Key": "same"}
    job = job_of(books.enqueue(first, "docs", texts, headers=headers))
    with books.corridor.db.begin() as conn:  # as if its producer had died before the end
        conn.execute(sa.text("UPDATE jobs SET state = 'failed', sealed_at = NULL, finished_at = now()"))
    assert books.enqueue(second, "docs", texts, headers=headers).status_code == 400
    assert job_of(books.enqueue(first, "docs", texts, headers=headers)) == job
    books.run(job)
    assert (books.used(first), books.used(second)) == (books.charged(job), 0)


def test_a_served_batch_is_paid_by_the_key_that_made_it_also_after_that_was_revoked(books: Books) -> None:
    first, second, poor = books.key("one", ENOUGH), books.key("two", ENOUGH), books.key("poor", Decimal("1e-12"))
    lines = [line(f"l{i}", f"input {i}") | {"body": {"model": MODEL, "input": f"input {i}"}} for i in range(5)]
    with openai_client(books.gateway, poor) as api:
        batch = ended(api, start(api, *lines, extra_body={"route": "openai"}).id)
        assert batch.status == "failed"
        (error,) = batch.errors.data
        assert error.code == "insufficient_quota"
        assert "US dollars a month (UTC)" in error.message
    with openai_client(books.gateway, first) as api:
        made = start(api, *lines, extra_body={"route": "openai"})
    with openai_client(books.gateway, second) as api:
        watched = start(api, *lines[:2], {**lines[2], "body": {"model": MODEL, "input": "of the second"}})
        query = "SELECT count(job_id) FROM served_batches WHERE state = 'in_progress'"
        books.scene.run_until(lambda: books.corridor.one(query) == 2)
        books.revoke(first)
    jobs = {row["name"]: row["job_id"] for row in books.corridor.rows("SELECT name, job_id FROM served_batches")}
    books.run(jobs[made.id], jobs[watched.id])
    assert books.used(first) == books.charged(jobs[made.id])
    assert books.used(second) == books.charged(jobs[watched.id])
    assert books.used(first) + books.used(second) == Decimal(books.corridor.one("SELECT sum(usd) FROM charges"))
    assert books.used(poor) == 0


def test_a_batch_on_a_paid_route_is_refused_at_once_if_nothing_is_left(books: Books) -> None:
    spent, other = books.key("spent", Decimal(0)), books.key("two", ENOUGH)
    body = {"input_file_id": "file-x", "endpoint": "/v1/embeddings", "completion_window": "24h", "route": "openai"}
    assert refused(books.ask(spent, "POST", "/v1/batches", json=body)) == (429, "insufficient_quota")
    assert refused(books.ask(other, "POST", "/v1/batches", json=body))[0] == 400  # there is no such file


def test_a_reembedding_is_paid_by_the_key_that_began_it(books: Books) -> None:
    admin, other = books.key("admin", ENOUGH, Scope.ADMIN), books.key("other", ENOUGH, Scope.ADMIN)
    poor = books.key("poor", Decimal("1e-12"), Scope.ADMIN)
    texts = [f"text {i} that moves" for i in range(6)]
    stored = books.corridor.client.enqueue(
        ((str(i), text) for i, text in enumerate(texts)), collection="docs", route="openai"
    )
    books.run(stored.id)
    body = {"to": MODEL, "dimensions": 4, "route": "openai", "gates": {"canary": False}}
    assert refused(books.ask(poor, "POST", "/v1/collections/docs/reembed", json=body)) == (429, "insufficient_quota")
    few: dict[str, Any] = {"route": "openai", "gates": Gates(canary=False), "max_usd": "0.0000000001"}
    with (
        remote("sync", books.gateway.url, admin) as client,
        pytest.raises(BudgetExceeded, match=r"\(max_usd\).*Nothing was begun"),
    ):
        client.reembed("docs", to=MODEL, dimensions=4, **few)
    assert books.corridor.rows("SELECT FROM reembeddings") == []
    answer = books.ask(admin, "POST", "/v1/collections/docs/reembed", json=body)
    assert answer.status_code == 201, answer.text
    assert books.used(admin) > 0
    # The same words of another key find it under way, and begin nothing.
    assert books.ask(other, "POST", "/v1/collections/docs/reembed", json=body).json()["id"] == answer.json()["id"]
    # What is enqueued meanwhile goes into both spaces, and its key pays for both.
    beside = job_of(books.enqueue(other, "docs", ["a text that comes meanwhile"], on_long="truncate"))
    query = "SELECT count(*) FROM jobs WHERE idempotency_key = :key AND state = 'completed'"
    fill_key = f"reembed:{answer.json()['id']}"

    def filled() -> bool:
        fill.fill_some(books.corridor.db, books.corridor.settings, answer.json()["id"])
        return bool(books.corridor.one(query, key=fill_key))

    books.scene.run_until(filled)
    books.run(beside)
    jobs = {row["id"]: row["idempotency_key"] for row in books.corridor.rows("SELECT id, idempotency_key FROM jobs")}
    of_fill = [job for job, key in jobs.items() if key == fill_key]
    of_other = [job for job, key in jobs.items() if key is None and job != stored.id]
    assert len(of_other) == 2
    assert books.used(admin) == books.charged(*of_fill) + books.reserved(admin) > 0
    assert books.used(other) == books.charged(*of_other) > 0


def test_keys_list_shows_what_a_key_has_spent_and_reserved(books: Books) -> None:
    key, other = books.key("one", ENOUGH), books.key("two", ENOUGH)
    job_of(books.enqueue(key, "docs", ["a text"]))
    settings = books.corridor.settings
    env = {"DATABASE_URL": settings.require_database_url(), "REDIS_URL": settings.require_redis_url()}
    listed = json.loads(CliRunner().invoke(cli, ["keys", "list", "--json"], env=env).stdout)
    months = {row["id"]: row["month"] for row in listed}
    assert Decimal(months[id_of(key)]["usd"]) == Decimal(months[id_of(key)]["reserved_usd"]) == books.used(key)
    assert Decimal(months[id_of(other)]["reserved_usd"]) == 0
    shown = CliRunner().invoke(cli, ["keys", "list"], env=env).stdout
    assert "reserved" in shown


def test_a_spool_gives_bad_chunks_back_from_its_file_and_can_be_looked_at_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("chunkmill.client.spool.MEMORY_BYTES", 1)
    given = [("1", "one"), ("2", ""), ("", "three"), ("4", "four")]

    def shown(items: Any) -> list[Any]:
        return [(str(item), item.reason) if isinstance(item, InvalidChunk) else item for item in items]

    wanted = shown(prepare_or_skip(given))
    with Spool(prepare_or_skip(given)) as spool:
        assert shown(spool.look()) == shown(spool.look()) == wanted
        assert shown(spool) == wanted


def store(books: Books, name: str, n: int) -> None:
    """Make a collection of texts with titles, all of which have a vector."""
    texts = [f"A title of number {i} in {name}\nWhat number {i} says of all the things in {name}." for i in range(n)]
    books.run(job_of(books.enqueue(books.key(f"filler of {name}", None), name, texts)))


@pytest.fixture
def judged(books: Books) -> Iterator[Books]:
    """Two collections with golden queries and keywords, whose texts have vectors. A worker answers questions."""
    client = books.corridor.client
    for name in ("docs", "notes"):
        store(books, name, 6)
        client.keywords(name, language="simple")
        assert client.golden(name).from_titles(6)
    answering = ProviderResponder(books.corridor.context)
    answering.start()
    yield books
    answering.stop()


def answered(response: httpx2.Response) -> Any:
    """What an answer holds that may have begun with blank lines."""
    assert response.status_code == 200, response.text
    body = response.json()
    assert "error" not in body, body
    return body


def test_a_comparison_costs_the_key_that_asked_for_it_what_was_quoted(judged: Books) -> None:
    rich, other = (judged.key(name, ENOUGH, Scope.ADMIN) for name in ("rich", "other"))
    asked = {"model": LARGE, "dimensions": 8}
    quotes = {
        name: answered(judged.ask(rich, "POST", f"/v1/collections/{name}/compare", json={**asked, "dry_run": True}))
        for name in ("docs", "notes")
    }
    usd = {name: Decimal(quote["old_usd"]) + Decimal(quote["new_usd"]) for name, quote in quotes.items()}
    assert all(usd.values()) and judged.used(rich) == 0
    questions = "SELECT coalesce(sum(usd), 0) FROM charges WHERE job_id = 0"
    before = Decimal(judged.corridor.one(questions))

    told = answered(judged.ask(rich, "POST", "/v1/collections/docs/compare", json=asked))

    assert (told["sample"], told["new"]["embedded"], told["old"]["embedded"]) == (6, 6, 0)
    assert judged.used(rich) == usd["docs"] == Decimal(judged.corridor.one(questions)) - before
    assert judged.used(other) == 0
    # The second comparison is dearer than what is left.
    with judged.corridor.db.begin() as conn:
        left = usd["docs"] + usd["notes"] - Decimal("1e-9")
        conn.execute(
            sa.text("UPDATE api_keys SET usd_per_month = :usd WHERE id = :id"), {"usd": left, "id": id_of(rich)}
        )
    judged.gateway.gateway.keys.forget()
    answer = judged.ask(rich, "POST", "/v1/collections/notes/compare", json=asked)
    assert refused(answer) == (429, "insufficient_quota")
    assert judged.used(rich) == usd["docs"]
    assert Decimal(judged.corridor.one(questions)) == before + usd["docs"]


def test_a_comparison_that_is_dearer_than_its_limit_costs_nothing(judged: Books) -> None:
    """And it is not begun."""
    key, asked = judged.key("one", ENOUGH, Scope.ADMIN), {"model": LARGE, "dimensions": 8, "max_usd": "0.0000001"}
    questions = judged.corridor.one("SELECT sum(contents) FROM charges")
    for _ in range(2):  # the reservation of the second one writes what the first one gave back
        answer = judged.ask(key, "POST", "/v1/collections/docs/compare", json=asked)
        assert "and the most that it may cost" in answer.json()["error"]["message"]
    until(lambda: judged.used(key) == 0, lambda: judged.used(key))
    assert judged.corridor.one("SELECT sum(contents) FROM charges") == questions


def test_a_comparison_that_fails_in_the_middle_costs_what_was_embedded_until_then(
    judged: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here that is the queries, in both models, and no text of the sample."""
    key, other = (judged.key(name, ENOUGH, Scope.ADMIN) for name in ("one", "two"))
    before = Decimal(judged.corridor.one(QUESTIONS))

    def fails(*_: object) -> None:
        raise EngineError("no vectors today")

    monkeypatch.setattr(Client, "_compare_sample", fails)
    whole = judged.corridor.client.quote_comparison("docs", LARGE, dimensions=8).usd

    answer = judged.ask(key, "POST", "/v1/collections/docs/compare", json={"model": LARGE, "dimensions": 8})

    assert "no vectors today" in answer.json()["error"]["message"]
    spent = Decimal(judged.corridor.one(QUESTIONS)) - before
    assert whole is not None
    assert 0 < spent < whole
    until(lambda: judged.used(key) == spent, lambda: (judged.used(key), spent))
    assert judged.used(other) == 0


def test_a_comparison_takes_the_tokens_that_were_quoted_from_its_key_before_it_begins(judged: Books) -> None:
    """A key with one token less than that gets none of it, and a key with as many gets all of it."""
    quote = judged.corridor.client.quote_comparison("docs", LARGE, dimensions=8)
    with judged.corridor.db.begin() as conn:
        (_, enough), (_, poor) = (
            keys.create(
                conn, name=f"{n}", tenant="t", scopes={Scope.ADMIN}, limits=KeyLimits(tokens_per_month=quote.tokens - n)
            )
            for n in (0, 1)
        )
    before, asked = judged.corridor.one(QUESTIONS), {"model": LARGE, "dimensions": 8}
    assert refused(judged.ask(poor, "POST", "/v1/collections/docs/compare", json=asked)) == (429, "insufficient_quota")
    assert judged.corridor.one(QUESTIONS) == before
    told = answered(judged.ask(enough, "POST", "/v1/collections/docs/compare", json=asked))
    assert told["new"]["tokens"] > told["old"]["tokens"] > 0
    assert told["new"]["tokens"] + told["old"]["tokens"] == quote.tokens
    booked = partial(
        judged.corridor.one, "SELECT sum(tokens) FROM api_key_usage WHERE key_id = :key", key=id_of(enough)
    )
    until(lambda: booked() == quote.tokens, booked)


def test_the_golden_queries_of_a_collection_cost_the_key_that_has_its_search_tuned(judged: Books) -> None:
    rich, other, poor = (
        judged.key(name, usd, Scope.ADMIN)
        for name, usd in (("rich", ENOUGH), ("other", ENOUGH), ("poor", Decimal("1e-8")))
    )
    assert refused(judged.ask(poor, "POST", "/v1/collections/docs/tune-search")) == (429, "insufficient_quota")

    before = Decimal(judged.corridor.one(QUESTIONS))
    told = answered(judged.ask(rich, "POST", "/v1/collections/docs/tune-search", json={"space": "active"}))

    assert (told["collection"], told["n"]) == ("docs", 6)
    charged = Decimal(judged.corridor.one(QUESTIONS)) - before
    until(lambda: judged.used(rich) == charged > 0, lambda: (judged.used(rich), charged))
    assert (judged.used(other), judged.used(poor)) == (0, 0)
    # The queries are in the cache by now. The texts under the titles, which are sent too, are not.
    answered(judged.ask(other, "POST", "/v1/collections/docs/tune-search", json={"space": "active"}))
    again = Decimal(judged.corridor.one(QUESTIONS)) - before - charged
    until(lambda: judged.used(other) == again, lambda: (judged.used(other), again))
    assert 0 < again < charged
    assert judged.used(rich) == charged


def test_what_is_expected_of_golden_queries_has_the_texts_under_their_titles(judged: Books) -> None:
    """Of two keys, the one has enough for the titles alone."""
    with judged.corridor.db.begin() as conn:
        collection = judged.corridor.one("SELECT id FROM collections WHERE name = 'docs'")
        questions = golden.judgeable(conn, collection, golden.read(conn, collection, most=100))
    titles = sum(estimated_tokens(question.text) for question in questions)
    rests = sum(estimated_tokens(question.rest or "") for question in questions)
    price = Decimal("0.02") / 1_000_000
    titles_only, enough = (
        judged.key(name, tokens * price, Scope.ADMIN)
        for name, tokens in (("titles only", titles + rests - 1), ("enough", titles + rests))
    )
    path = "/v1/collections/docs/tune-search"
    assert refused(judged.ask(titles_only, "POST", path)) == (429, "insufficient_quota")
    answered(judged.ask(enough, "POST", path))


def test_texts_that_are_embedded_at_once_cost_the_key_what_the_provider_charges(judged: Books) -> None:
    """Of two keys and two models, with a text that is too long and a text that is there twice."""
    first, second = (judged.key(name, ENOUGH, Scope.EMBED, Scope.SEARCH) for name in ("one", "two"))
    models = {model["id"] for model in judged.ask(first, "GET", "/v1/models").json()["data"]}
    assert MODEL in models
    questions = "SELECT coalesce(sum(usd), 0) FROM charges WHERE job_id = 0"
    before = Decimal(judged.corridor.one(questions))
    texts = ["a short text", "word " * 9000, "a text that is there twice, and is sent once", "a short text"]

    said = answered(judged.ask(first, "POST", "/v1/embeddings", json={"model": MODEL, "input": texts}))
    charged = Decimal(judged.corridor.one(questions)) - before
    tokens = judged.corridor.one("SELECT sum(tokens) FROM charges WHERE job_id = 0")
    assert charged > 0
    assert said["truncated"] == [1]
    assert 0 < said["usage"]["total_tokens"] - tokens < 10  # the usage has the text twice, and the bill has it once
    until(lambda: judged.used(first) == charged, lambda: (judged.used(first), charged))
    assert judged.used(second) == 0

    body = {"query": "a question of the second key", "exact": True}
    answered(judged.ask(second, "POST", "/v1/collections/docs/search", json=body))
    asked = Decimal(judged.corridor.one(questions)) - before - charged
    until(lambda: judged.used(second) == asked, lambda: (judged.used(second), asked))
    assert asked > 0
    assert judged.used(first) == charged


def test_a_text_that_was_not_sent_to_the_provider_costs_the_key_no_dollars(judged: Books) -> None:
    """Ten equal texts, a query that was asked before, and a stored text, of two keys in two models."""
    register(judged.corridor.db, judged.corridor.settings, LARGE)
    first, second = (judged.key(name, ENOUGH, Scope.EMBED) for name in ("one", "two"))
    stored = judged.corridor.one("SELECT text FROM contents ORDER BY content_hash LIMIT 1")
    texts = {"ten": ["a text that is there ten times"] * 10, "query": ["a question"], "stored": [stored]}

    def ask(key: str, name: str, model: str, kind: str = "document") -> tuple[int, Decimal]:
        """The tokens of the answer, and what the provider charged."""
        before = Decimal(judged.corridor.one(QUESTIONS))
        body = {"model": model, "input": texts[name], "input_type": kind}
        said = answered(judged.ask(key, "POST", "/v1/embeddings", json=body))
        return said["usage"]["total_tokens"], Decimal(judged.corridor.one(QUESTIONS)) - before

    tokens, dollars = zip(*(ask(first, "ten", model) for model in (MODEL, LARGE)), strict=True)
    assert all(dollars) and tokens[0] % 10 == 0
    asked, again, other = (ask(key, "query", MODEL, "query") for key in (first, first, second))
    assert asked[1] > 0
    assert again == other == (asked[0], 0)
    known, unknown = ask(second, "stored", MODEL), ask(second, "stored", LARGE)
    assert known[0] > 0 == known[1]
    assert unknown[1] > 0

    paid = {first: sum(dollars) + asked[1], second: unknown[1]}
    used = {first: sum(tokens) + 2 * asked[0], second: asked[0] + known[0] + unknown[0]}
    booked = "SELECT sum(tokens)::int FROM api_key_usage WHERE key_id = :key"
    for key in (first, second):
        of_key = partial(judged.corridor.one, booked, key=id_of(key))
        until(lambda of_key=of_key, n=used[key]: of_key() == n, of_key)
        assert judged.used(key) == paid[key]


def test_a_search_costs_what_was_sent_to_the_provider_for_it(judged: Books) -> None:
    """Several queries with one that is there twice, one that was asked before, and a vector; of two keys."""
    first, second = (judged.key(name, ENOUGH, Scope.SEARCH) for name in ("one", "two"))
    long = "which of them says the most about all these things, and where does it stand? " * 4

    def search(key: str, name: str, query: Any) -> tuple[int, Decimal]:
        """The tokens and dollars that the provider charged."""
        was, before = (
            judged.corridor.one(f"SELECT coalesce(sum({what}), 0) FROM charges") for what in ("tokens", "usd")
        )
        answered(judged.ask(key, "POST", f"/v1/collections/{name}/search", json={"query": query, "k": 2}))
        now, after = (
            judged.corridor.one(f"SELECT coalesce(sum({what}), 0) FROM charges") for what in ("tokens", "usd")
        )
        return int(now - was), Decimal(after) - Decimal(before)

    tokens, usd = search(first, "docs", [long, "what is in it?", long])
    assert usd == tokens * Decimal("0.02") / 1_000_000 > 0
    assert search(second, "notes", long) == (0, 0)  # its vector is in the cache
    more, dollars = search(second, "notes", "a query of the second key")
    assert search(second, "docs", judged.corridor.client.embed([long], kind="query")[0].tolist()) == (0, 0)

    [twice] = judged.corridor.client.embed_texts([long], kind="query").tokens
    used = {first: tokens + int(twice), second: int(twice) + more}
    assert more != estimated_tokens("a query of the second key")
    booked = "SELECT sum(tokens)::int FROM api_key_usage WHERE key_id = :key"
    for key, paid in ((first, usd), (second, dollars)):
        of_key = partial(judged.corridor.one, booked, key=id_of(key))
        until(lambda of_key=of_key, n=used[key]: of_key() == n, lambda of_key=of_key, key=key: (of_key(), used[key]))
        assert judged.used(key) == paid


def test_a_search_that_asks_in_two_spaces_costs_what_each_of_their_models_costs(
    judged: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its collection leaves a space meanwhile. The other key asks in one space."""
    other_space = register(judged.corridor.db, judged.corridor.settings, LARGE)
    first, second = (judged.key(name, ENOUGH, Scope.SEARCH) for name in ("one", "two"))
    search, path = AsyncClient._search_and_tell, "/v1/collections/docs/search"
    told: list[EmbeddedTexts] = []

    async def in_two(client: AsyncClient, tell: Any, query: Any, **asked: Any) -> Any:
        hits = await search(client, told.append, query, **asked)
        told.append(replace(told[0], spec=other_space.spec))
        for embedded in told:
            tell(embedded)
        return hits

    with monkeypatch.context() as patch:
        patch.setattr(AsyncClient, "_search_and_tell", in_two)
        answered(judged.ask(first, "POST", path, json={"query": "a question in two spaces"}))
    answered(judged.ask(second, "POST", path, json={"query": "a question in one space, of another key"}))

    usd = int(told[0].tokens.sum()) * (Decimal("0.02") + Decimal("0.13")) / 1_000_000
    until(lambda: judged.used(first) == usd > 0, lambda: (judged.used(first), usd))
    until(lambda: judged.used(second) > 0, lambda: judged.used(second))
    assert judged.used(second) % (Decimal("0.02") / 1_000_000) == 0


def test_a_text_whose_worker_is_of_the_last_release_costs_the_key_what_was_expected(
    judged: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While workers are replaced, one answer has parts of both. The old one does not say how many tokens it sent."""
    register(judged.corridor.db, judged.corridor.settings, LARGE)
    answer = responder._Question.answer

    def of_an_old_worker(question: Any) -> Any:
        made = answer(question)
        return made[:1] if len(question.request.texts) == 8 else made

    monkeypatch.setattr(responder._Question, "answer", of_an_old_worker)
    first, second = (judged.key(name, ENOUGH, Scope.EMBED) for name in ("one", "two"))
    texts = [f"text {i} of forty, which are two requests to workers" for i in range(40)]
    body = {"input": texts, "return_tokens": True}
    for key, model, price in ((first, MODEL, "0.02"), (second, LARGE, "0.13")):
        tokens = answered(judged.ask(key, "POST", "/v1/embeddings", json={**body, "model": model}))["tokens"]
        assert [i for i, n in enumerate(tokens) if n == 0] == list(range(32, 40))
        expected = sum(tokens) + sum(map(estimated_tokens, texts[32:]))
        usd = expected * Decimal(price) / 1_000_000
        until(lambda key=key, usd=usd: judged.used(key) == usd, lambda key=key, usd=usd: (judged.used(key), usd))


@pytest.mark.parametrize("verb", ["tune-search", "judge"])
def test_what_is_refused_before_a_query_is_embedded_costs_nothing(judged: Books, verb: str) -> None:
    """A collection without keywords is not tuned, and a re-embedding that has just begun is not judged."""
    client, key = judged.corridor.client, judged.key("one", ENOUGH, Scope.ADMIN)
    client.drop_keywords("docs")
    move = client.reembed("docs", to=LARGE, dimensions=8)
    path = "/v1/collections/docs/tune-search" if verb == "tune-search" else f"/v1/reembeddings/{move.id}/judge"
    for _ in range(2):  # the reservation of the second one writes what the first one gave back
        assert refused(judged.ask(key, "POST", path)) == (400, "invalid_input")
    until(lambda: judged.used(key) == 0, lambda: judged.used(key))


def test_the_queries_of_a_judgement_cost_the_key_that_asked_for_it_in_both_spaces(judged: Books) -> None:
    """Only the key that asked, and by the collection of the re-embedding."""
    client = judged.corridor.client
    asking, other = (judged.key(name, ENOUGH, Scope.ADMIN) for name in ("asking", "other"))
    moves = {name: client.reembed(name, to=LARGE, dimensions=8) for name in ("docs", "notes")}
    client.golden("notes").clear()
    with judged.corridor.db.begin() as conn:  # before anything is filled, so that nobody else judges them
        conn.execute(sa.text("UPDATE reembeddings SET state = 'judging'"))
    before = Decimal(judged.corridor.one(QUESTIONS))

    for move in moves.values():
        answered(judged.ask(asking, "POST", f"/v1/reembeddings/{move.id}/judge"))

    spaces = "SELECT count(DISTINCT space_id) FROM charges WHERE job_id = 0 AND usd > 0"
    assert judged.corridor.one(spaces) == 2
    usd = Decimal(judged.corridor.one(QUESTIONS)) - before
    until(lambda: judged.used(asking) == usd > 0, lambda: (judged.used(asking), usd))
    assert judged.used(other) == 0


BRIDGE = "/v1/collections/docs/bridges"
LEARNT = {"model": LARGE, "dimensions": 8, "compare_old": True}
QUESTIONS = "SELECT coalesce(sum(usd), 0) FROM charges WHERE job_id = 0"


@pytest.fixture
def bridgeable(books: Books, monkeypatch: pytest.MonkeyPatch) -> Iterator[Books]:
    """Two collections with enough texts to learn a bridge from. A worker answers questions."""
    with with_texts_for_bridges(books, monkeypatch):
        yield books


@pytest.fixture
def half_priced(stage: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[Books]:
    """The same, and the model of the two collections has no price. The other model has one."""
    settings = stage.corridor.settings
    models = {MODEL: replace(settings.provider_models[MODEL], prices=())}
    corridor = Corridor(settings.model_copy(update={"openai_models": models}), stage.server)
    with running_gateway(corridor.settings, keys=StoredKeys(corridor.db)) as gateway:
        books = Books(Scene(corridor, stage.name), gateway)
        with with_texts_for_bridges(books, monkeypatch):
            yield books
    corridor.close()


@contextmanager
def with_texts_for_bridges(books: Books, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, few in {"EPOCHS": 1, "HIDDEN": 4, "RIDGES": (10.0,), "RANKS": (4,)}.items():
        monkeypatch.setattr(fitting, name, few)
    monkeypatch.setattr(client_bridges, "WINDOW", 20)
    for name in ("docs", "notes"):
        store(books, name, 48)
    answering = ProviderResponder(books.corridor.context)
    answering.start()
    yield
    answering.stop()


def test_a_bridge_costs_the_key_that_asked_for_it_what_was_quoted_in_both_spaces(bridgeable: Books) -> None:
    rich, other = (bridgeable.key(name, ENOUGH, Scope.ADMIN) for name in ("rich", "other"))
    quote = answered(bridgeable.ask(rich, "POST", BRIDGE, json={**LEARNT, "dry_run": True}))
    alone = answered(bridgeable.ask(rich, "POST", BRIDGE, json={**LEARNT, "compare_old": False, "dry_run": True}))
    usd = Decimal(quote["usd"])
    assert (quote["queries"], quote["texts"], quote["to_embed"]) == (12, 48, 48)
    assert usd > Decimal(alone["usd"]) > 0
    assert quote["tokens"] > alone["tokens"] > 48
    assert bridgeable.used(rich) == 0
    assert bridgeable.corridor.one(QUESTIONS) == 0

    told = answered(bridgeable.ask(rich, "POST", BRIDGE, json=LEARNT))

    assert (told["embedded"], told["queries"], told["name"]) == (48, 12, LARGE)
    until(lambda: bridgeable.used(rich) == usd, lambda: (bridgeable.used(rich), usd))
    assert Decimal(bridgeable.corridor.one(QUESTIONS)) == usd
    tokens = "SELECT sum(tokens) FROM api_key_usage WHERE key_id = :key"
    assert bridgeable.corridor.one(tokens, key=id_of(rich)) == quote["tokens"]
    assert bridgeable.used(other) == 0


@pytest.mark.parametrize("limit", ["usd", "tokens"])
def test_a_bridge_that_is_dearer_than_what_its_key_has_left_is_not_begun(bridgeable: Books, limit: str) -> None:
    quote = bridgeable.corridor.client.quote_bridge("docs", LARGE, dimensions=8, compare_old=True)
    assert quote.usd
    dollars, tokens = KeyLimits(usd_per_month=quote.usd - Decimal("1e-9")), KeyLimits(tokens_per_month=quote.tokens - 1)
    rich = bridgeable.key("rich", ENOUGH, Scope.ADMIN)
    with bridgeable.corridor.db.begin() as conn:
        limits = dollars if limit == "usd" else tokens
        _, poor = keys.create(conn, name="poor", tenant="t", scopes={Scope.ADMIN}, limits=limits)
    asked = answered(bridgeable.ask(poor, "POST", BRIDGE, json={**LEARNT, "dry_run": True}))
    assert asked["tokens"] == quote.tokens  # to ask costs nothing
    assert refused(bridgeable.ask(poor, "POST", BRIDGE, json=LEARNT)) == (429, "insufficient_quota")
    assert bridgeable.corridor.one(QUESTIONS) == 0
    assert bridgeable.corridor.client.bridges() == []
    answered(bridgeable.ask(rich, "POST", BRIDGE, json=LEARNT))


def test_the_tokens_of_a_bridge_are_taken_from_the_minute_of_its_key_before_it_begins(bridgeable: Books) -> None:
    """A key may owe its minute one request that is larger, and no second one."""
    with bridgeable.corridor.db.begin() as conn:
        limits = KeyLimits(tokens_per_minute=30)
        (_, one), (_, other) = (
            keys.create(conn, name=name, tenant="t", scopes={Scope.ADMIN}, limits=limits) for name in ("one", "other")
        )
    answered(bridgeable.ask(one, "POST", BRIDGE, json=LEARNT))
    before = bridgeable.corridor.one(QUESTIONS)
    assert refused(bridgeable.ask(one, "POST", BRIDGE, json=LEARNT)) == (429, "rate_limit_exceeded")
    assert bridgeable.corridor.one(QUESTIONS) == before
    answered(bridgeable.ask(other, "POST", BRIDGE, json=LEARNT))


def test_a_bridge_that_fails_in_the_middle_costs_what_was_embedded_until_then(
    bridgeable: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here that is all but the queries that the collection's own model would have been asked."""
    key, other = (bridgeable.key(name, ENOUGH, Scope.ADMIN) for name in ("one", "two"))

    def fails(_: object) -> None:
        raise EngineError("no adapter today")

    monkeypatch.setattr(fitting, "fit_all", fails)
    whole = bridgeable.corridor.client.quote_bridge("docs", LARGE, dimensions=8, compare_old=True).usd

    answer = bridgeable.ask(key, "POST", BRIDGE, json=LEARNT)

    assert "no adapter today" in answer.json()["error"]["message"]
    spent = Decimal(bridgeable.corridor.one(QUESTIONS))
    assert whole is not None
    assert 0 < spent < whole
    until(lambda: bridgeable.used(key) == spent, lambda: (bridgeable.used(key), spent))
    assert bridgeable.used(other) == 0


def test_a_bridge_whose_request_to_workers_fails_costs_that_request_too(
    bridgeable: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here workers had embedded all of it. What would have come after it is free."""
    key, other = (bridgeable.key(name, ENOUGH, Scope.ADMIN) for name in ("one", "two"))
    asking_all = Client._asking_all
    asked: list[int] = []

    def fails_at_the_second(self: Client, space: Any, texts: list[str], *rest: Any, **more: Any) -> Any:
        asked.append(len(texts))
        made = yield from asking_all(self, space, texts, *rest, **more)
        if len(asked) == 2:
            raise EngineError("no answer today")
        return made

    monkeypatch.setattr(Client, "_asking_all", fails_at_the_second)

    answer = bridgeable.ask(key, "POST", BRIDGE, json=LEARNT)

    assert "no answer today" in answer.json()["error"]["message"]
    assert asked == [20, 20]
    assert bridgeable.corridor.one("SELECT sum(contents) FROM charges WHERE job_id = 0") == 40
    spent = Decimal(bridgeable.corridor.one(QUESTIONS))
    until(lambda: bridgeable.used(key) == spent, lambda: (bridgeable.used(key), spent))
    assert bridgeable.used(other) == 0


def test_a_bridge_that_is_refused_before_a_text_is_embedded_costs_nothing(bridgeable: Books) -> None:
    key, client = bridgeable.key("one", ENOUGH, Scope.ADMIN), bridgeable.corridor.client
    quote = client.quote_bridge("docs", LARGE, dimensions=8, compare_old=True)
    assert quote.usd
    below = quote.usd - Decimal("1e-10")
    for _ in range(2):  # the reservation of the second one writes what the first one gave back
        answer = bridgeable.ask(key, "POST", BRIDGE, json={**LEARNT, "max_usd": f"{below:f}"})
        assert "the bridge would cost about" in answer.json()["error"]["message"]
        assert refused(bridgeable.ask(key, "POST", BRIDGE, json={**LEARNT, "model": MODEL}))[1] == "invalid_input"
    until(lambda: bridgeable.used(key) == 0, lambda: bridgeable.used(key))
    with pytest.raises(BudgetExceeded, match="and the most that it may cost"):
        client.bridge("docs", LARGE, dimensions=8, compare_old=True, max_usd=below)
    assert bridgeable.corridor.one(QUESTIONS) == 0

    told: list[Spent] = []
    made = client.bridge(
        "docs", LARGE, dimensions=8, compare_old=True, max_usd=quote.usd, on_progress=told.append, timeout=PATIENCE
    )
    assert told[-1] == Spent(made.embedded + 2 * 12, quote.tokens, quote.usd, quote.usd)
    assert [spent.texts for spent in told] == [20, 20, 40, 40, 48, 48, 60, 60, 72, 72]


@pytest.mark.parametrize("verb", ["bridges", "compare"])
def test_a_model_without_a_price_does_not_hide_what_the_other_one_costs(half_priced: Books, verb: str) -> None:
    """The collection's own model has none, and is asked too. The other key may ask, and pays what is known."""
    path, asked = f"/v1/collections/docs/{verb}", {"model": LARGE, "dimensions": 8}
    if verb == "bridges":
        asked["compare_old"] = True
    rich, poor = (half_priced.key(name, usd, Scope.ADMIN) for name, usd in {"a": ENOUGH, "b": Decimal("1e-9")}.items())
    of_large = (
        "SELECT coalesce(sum(c.usd), 0) FROM charges c JOIN spaces s ON s.id = c.space_id "
        "WHERE c.job_id = 0 AND s.model = :model"
    )
    quote = answered(half_priced.ask(poor, "POST", path, json={**asked, "dry_run": True}))
    assert quote["usd" if verb == "bridges" else "old_usd"] is None

    assert refused(half_priced.ask(poor, "POST", path, json=asked)) == (429, "insufficient_quota")
    assert half_priced.corridor.one("SELECT count(*) FROM charges WHERE job_id = 0") == 0

    answered(half_priced.ask(rich, "POST", path, json=asked))
    usd = Decimal(half_priced.corridor.one(of_large, model=LARGE))
    assert usd == Decimal(quote["known_usd" if verb == "bridges" else "new_usd"]) > 0
    assert half_priced.corridor.one("SELECT count(*) FROM charges WHERE job_id = 0 AND usd = 0") > 0
    until(lambda: half_priced.used(rich) == usd, lambda: (half_priced.used(rich), usd))
    assert half_priced.used(poor) == 0


def test_a_quote_over_http_leaves_nothing_behind(bridgeable: Books) -> None:
    """No space, and no table of its vectors: of two models that nobody has used yet, in two verbs."""
    key = bridgeable.key("one", ENOUGH, Scope.ADMIN)
    spaces, tables = "SELECT array_agg(fingerprint) FROM spaces", "SELECT count(*) FROM pg_tables"
    before = bridgeable.corridor.one(spaces), bridgeable.corridor.one(tables)
    bridge = answered(bridgeable.ask(key, "POST", BRIDGE, json={**LEARNT, "dry_run": True}))
    body = {"model": LARGE, "dimensions": 4, "against": LARGE, "dry_run": True}
    comparison = answered(bridgeable.ask(key, "POST", "/v1/collections/notes/compare", json=body))
    assert (bridge["to_embed"], comparison["old_to_embed"], comparison["new_to_embed"]) == (48, 48, 48)
    assert (bridgeable.corridor.one(spaces), bridgeable.corridor.one(tables)) == before


def test_what_is_dearer_than_was_reserved_is_not_begun(bridgeable: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here both verbs were quoted when the collection was half as large. A key without a limit reserves nothing."""
    limited, free = (bridgeable.key(name, usd, Scope.ADMIN) for name, usd in {"a": ENOUGH, "b": None}.items())
    quote_bridge, quote_comparison = Client.quote_bridge, Client.quote_comparison

    def half_a_bridge(*asked: Any, **more: Any) -> Any:
        quote = quote_bridge(*asked, **more)
        assert quote.usd
        return replace(quote, usd=quote.usd / 2, known_usd=quote.usd / 2)

    def half_a_comparison(*asked: Any, **more: Any) -> Any:
        quote = quote_comparison(*asked, **more)
        assert quote.old_usd
        assert quote.new_usd
        return replace(quote, old_usd=quote.old_usd / 2, new_usd=quote.new_usd / 2)

    monkeypatch.setattr(Client, "quote_bridge", half_a_bridge)
    monkeypatch.setattr(Client, "quote_comparison", half_a_comparison)
    body = {"model": LARGE, "dimensions": 8}
    for path in (BRIDGE, "/v1/collections/docs/compare"):
        said = bridgeable.ask(limited, "POST", path, json=body).json()["error"]["message"]
        assert "would cost about" in said and "and the most that it may cost" in said
    assert bridgeable.corridor.one(QUESTIONS) == 0
    answered(bridgeable.ask(free, "POST", "/v1/collections/docs/compare", json=body))
    until(lambda: bridgeable.used(limited) == 0, lambda: bridgeable.used(limited))


def test_a_search_through_a_bridge_costs_what_the_model_of_its_queries_costs(bridgeable: Books) -> None:
    client = bridgeable.corridor.client
    client.bridge("docs", LARGE, dimensions=8, timeout=PATIENCE)
    key, other = (bridgeable.key(name, ENOUGH, Scope.SEARCH) for name in ("one", "two"))
    narrow = bridgeable.key("narrow", ENOUGH, Scope.SEARCH, models={MODEL})
    query, path = "which number is in it?", "/v1/collections/{}/search"
    body = {"query": query, "k": 3, "bridge": LARGE}
    before = Decimal(bridgeable.corridor.one(QUESTIONS))

    told = answered(bridgeable.ask(key, "POST", path.format("docs"), json=body))

    assert {hit["bridge"] for hit in told["hits"]} == {LARGE}
    usd = Decimal(bridgeable.corridor.one(QUESTIONS)) - before
    assert usd % (Decimal("0.13") / 1_000_000) == 0 < usd
    until(lambda: bridgeable.used(key) == usd, lambda: (bridgeable.used(key), usd))
    assert bridgeable.used(other) == 0
    assert refused(bridgeable.ask(narrow, "POST", path.format("docs"), json=body)) == (403, "model_not_allowed")
    answered(bridgeable.ask(narrow, "POST", path.format("docs"), json={"query": query}))
    assert refused(bridgeable.ask(key, "POST", path.format("notes"), json=body))[0] == 404
