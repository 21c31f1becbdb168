"""Keys of a gateway: what each allows, how much, and how it ends. Two gateways, two tenants, two keys each."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from chunkmill.cli.__main__ import cli
from chunkmill.client import Client
from chunkmill.db.connect import create_db
from chunkmill.domain.keys import UNLIMITED, KeyLimits, Scope
from chunkmill.embedded import StackStatus
from chunkmill.gateway.keys import StoredKeys, ring
from chunkmill.gateway.routes import collections
from chunkmill.ledger.access import keys, usage
from chunkmill.ledger.access.usage import Demand, UsageBooking
from chunkmill.settings import Settings
from tests.conftest import fresh_settings
from tests.support.gateway_endpoints import ENDPOINTS
from tests.support.gateways import KEY, RunningGateway, running_gateway, stand_in_worker, tokens_of
from tests.support.raw_http import connect, head
from tests.support.waiting import until


@dataclass(frozen=True, slots=True)
class Two:
    """Two gateways over one database, whose worker answers."""

    settings: Settings
    db: sa.Engine
    first: RunningGateway
    second: RunningGateway

    def key(self, name: str, limits: KeyLimits = UNLIMITED, scopes: set[Scope] | None = None, **more: Any) -> str:
        with self.db.begin() as conn:
            more = {"tenant": f"tenant of {name}"} | more
            return keys.create(conn, name=name, scopes=scopes or {Scope.EMBED}, limits=limits, **more)[1]

    def embed(self, key: str | None, *texts: str, at: RunningGateway | None = None, **more: Any) -> Any:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        body = {"texts": texts or ("a b",)} | more
        return (at or self.first).http.post("/test/embed", json=body, headers=headers)

    def revoke(self, key: str) -> None:
        with self.db.begin() as conn:
            assert keys.revoke(conn, int(key.split("_")[1]))

    def used(self, key: str) -> UsageBooking:
        query = """
            SELECT sum(requests) AS requests, sum(tokens) AS tokens, sum(usd) AS usd
            FROM api_key_usage
            WHERE key_id = :id
        """
        with self.db.begin() as conn:
            row = conn.execute(sa.text(query), {"id": int(key.split("_")[1])}).one()
        return UsageBooking(int(row.requests or 0), int(row.tokens or 0), row.usd or Decimal(0))


@pytest.fixture(scope="module")
def two(stack: StackStatus) -> Iterator[Two]:
    with fresh_settings(stack) as settings:
        db = create_db(settings.require_database_url(), role="test")
        first = StoredKeys(create_db(settings.require_database_url(), role="gateway"))
        second = StoredKeys(create_db(settings.require_database_url(), role="gateway"))
        with (
            stand_in_worker(db),
            running_gateway(settings, keys=first, endpoints=[*ENDPOINTS, *collections.ENDPOINTS]) as one,
            running_gateway(settings, keys=second, endpoints=ENDPOINTS) as other,
        ):
            for ringed in (first, second):
                assert ringed._listening is not None
                until(ringed._listening.is_up.is_set)
            yield Two(settings, db, one, other)
        first._db.dispose()
        second._db.dispose()
        db.dispose()


def code_of(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_a_key_is_known_by_its_secret_in_every_header_that_clients_use(two: Two) -> None:
    mine, other = two.key("mine"), two.key("other")
    for at in (two.first, two.second):
        assert two.embed(mine, at=at).json()["tenant"] == "tenant of mine"
        assert two.embed(other, at=at).json()["tenant"] == "tenant of other"
    for name in ("api-key", "x-api-key"):
        with two.first.client(None) as http:
            answer = http.post("/test/embed", json={"texts": ["a"]}, headers={name: mine})
            assert answer.json()["tenant"] == "tenant of mine"


def test_who_has_no_key_or_another_keys_secret_gets_401(two: Two) -> None:
    mine, other = two.key("mine"), two.key("other")
    (_, id_of_mine, secret), (_, id_of_other, _) = mine.split("_", 2), other.split("_", 2)
    assert two.embed(mine).status_code == 200
    wrong = [
        f"cmk_{id_of_other}_{secret}",
        f"cmk_{id_of_mine}_{'a' * 43}",
        f"cmk_{10**9}_{secret}",
        mine[:-1],
        "nonsense",
        KEY,
    ]
    for key in wrong:
        for _ in range(2):  # looked up, and remembered
            assert code_of(two.embed(key)) == (401, "invalid_api_key")
    with two.first.client(None) as http:
        answer = http.post("/test/embed", json={"texts": ["a"]})
    assert code_of(answer) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_a_key_is_stored_as_its_digest_alone(two: Two) -> None:
    secret = two.key("mine").split("_", 2)[2]
    with two.db.begin() as conn:
        row = str(conn.execute(sa.text("SELECT k::text FROM api_keys k ORDER BY id DESC LIMIT 1")).scalar_one())
    assert secret not in row
    assert secret[:8] not in row


def test_a_revoked_key_ends_at_once_in_every_gateway_and_no_other_does(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "CACHE_SECONDS", 10_000.0)
    mine, other = two.key("mine"), two.key("other")
    for at in (two.first, two.second):
        assert two.embed(mine, at=at).status_code == 200
        assert two.embed(other, at=at).status_code == 200
    two.revoke(mine)
    for at in (two.first, two.second):
        until(lambda at=at: two.embed(mine, at=at).status_code == 401)
        assert two.embed(other, at=at).status_code == 200


def test_what_a_stranger_notifies_does_no_harm(two: Two, caplog: pytest.LogCaptureFixture) -> None:
    """Any role of the database may notify any channel."""
    mine, other = two.key("mine"), two.key("other")
    assert {two.embed(key, at=at).status_code for key in (mine, other) for at in (two.first, two.second)} == {200}
    with two.db.begin() as conn:
        for payload in ("9" * 5_000, "", "x", "-1", "1,2", "\u0661", "9" * 20):
            conn.execute(sa.text("SELECT pg_notify(:channel, :said)"), {"channel": keys.CHANNEL, "said": payload})
    two.revoke(mine)
    for at in (two.first, two.second):
        until(lambda at=at: two.embed(mine, at=at).status_code == 401)
        assert two.embed(other, at=at).status_code == 200
    assert [record.message for record in caplog.records if record.exc_info] == []


def test_a_key_that_was_read_before_it_was_revoked_is_not_remembered(two: Two) -> None:
    key = two.key("mine")
    now = [0.0]

    async def story() -> list[bool]:
        stored = StoredKeys(two.db, clock=lambda: now[0])
        read, may = threading.Event(), threading.Event()
        really = stored._read

        def slowly(ids: Any) -> Any:
            answers = really(ids)
            read.set()
            may.wait()
            return answers

        stored._ask._function = slowly
        asking = asyncio.create_task(stored.caller(key))
        await asyncio.to_thread(read.wait)
        two.revoke(key)
        stored.forget(key.split("_")[1])
        may.set()
        was_known = await asking is not None
        is_known = await stored.caller(key) is not None
        await stored.close()
        return [was_known, is_known]

    assert asyncio.run(story()) == [True, False]


def test_where_notifications_do_not_pass_a_revoked_key_ends_with_the_cache(two: Two) -> None:
    key = two.key("mine")
    now = [0.0]

    async def story() -> list[bool]:
        stored = StoredKeys(two.db, clock=lambda: now[0])
        known = [await stored.caller(key) is not None]
        two.revoke(key)
        for moment in (ring.CACHE_SECONDS - 0.1, ring.CACHE_SECONDS):
            now[0] = moment
            known.append(await stored.caller(key) is not None)
        await stored.close()
        return known

    assert asyncio.run(story()) == [True, True, False]


def test_a_key_ends_at_its_time_also_while_it_is_remembered(two: Two) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=1)
    key = two.key("mine", expires_at=soon)
    until(lambda: two.embed(key).status_code == 401)
    assert datetime.now(UTC) >= soon


def test_a_key_does_what_its_scopes_allow_and_nothing_else(two: Two) -> None:
    embeds, uploads, all_of_it = (two.key("a", scopes={scope}) for scope in (Scope.EMBED, Scope.JOBS, Scope.ADMIN))
    for key, may in ((embeds, (200, 403)), (uploads, (403, 200)), (all_of_it, (200, 200))):
        with two.first.client(key) as http:
            embedded = http.post("/test/embed", json={"texts": ["a"]})
            uploaded = http.post("/test/upload", content=b"abc")
        assert (embedded.status_code, uploaded.status_code) == may
    assert code_of(two.embed(uploads)) == (403, "scope")


def test_a_key_uses_its_models_and_no_other(two: Two) -> None:
    model = two.settings.embedding_model
    may, may_not = two.key("may", models=[model, "other"]), two.key("may not", models=["other"])
    assert two.embed(may).status_code == 200
    assert two.embed(may, model=model).status_code == 200
    assert code_of(two.embed(may_not)) == code_of(two.embed(may_not, model=model)) == (403, "model_not_allowed")


def test_requests_of_a_minute_are_counted_for_each_key_and_said_in_headers(two: Two) -> None:
    mine, other = two.key("mine", KeyLimits(requests_per_minute=2)), two.key("other", KeyLimits(requests_per_minute=2))
    answers = [two.embed(mine) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    said = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
    assert said == ["1", "0", "0"]
    assert code_of(answers[2]) == (429, "rate_limit_exceeded")
    assert answers[2].headers["x-should-retry"] == "true"
    assert 20 < int(answers[2].headers["retry-after"]) <= 30
    assert answers[0].headers["x-ratelimit-limit-requests"] == "2"
    assert two.embed(other).status_code == 200


def test_tokens_of_a_minute_are_those_that_were_used(two: Two) -> None:
    key = two.key("mine", KeyLimits(tokens_per_minute=1000))
    answer = two.embed(key, "word " * 80)
    assert answer.status_code == 200
    left = int(answer.headers["x-ratelimit-remaining-tokens"])
    assert 0 <= left - (1000 - tokens_of("word " * 80)) < 100, "the estimate was 102"
    assert two.embed(key, *["word " * 150] * 4).status_code == 200
    refused = two.embed(key, *["word " * 200] * 4)
    assert code_of(refused) == (429, "rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) > 1


def test_the_text_of_a_search_counts_and_a_vector_does_not(two: Two) -> None:
    two.first.gateway.client._client.enqueue([("a", "a text")], collection="searched")
    mine = two.key("mine", KeyLimits(tokens_per_month=100), scopes={Scope.SEARCH})
    other = two.key("other", KeyLimits(tokens_per_month=100), scopes={Scope.SEARCH})

    def search(key: str, query: str | list[float]) -> Any:
        headers = {"authorization": f"Bearer {key}"}
        return two.first.http.post("/v1/collections/searched/search", json={"query": query}, headers=headers)

    assert search(mine, "word " * 60).status_code == 200
    assert (two.used(mine).tokens, two.used(other).tokens) == (77, 0)
    assert code_of(search(mine, "word " * 60)) == (429, "insufficient_quota")
    assert search(mine, [1.0] * 384).status_code == search(other, "word " * 60).status_code == 200


def test_tokens_of_a_month_are_exact_across_gateways(two: Two) -> None:
    """Twelve requests at once at two gateways; there are tokens for seven."""
    text = "word " * 30  # 32 tokens, estimated as 39
    mine = two.key("mine", KeyLimits(tokens_per_month=6 * 32 + 39))
    other = two.key("other", KeyLimits(tokens_per_month=100))
    answers: list[Any] = []

    def ask(at: RunningGateway) -> None:
        answers.extend(two.embed(mine, text, at=at) for _ in range(3))

    threads = [threading.Thread(target=ask, args=[at]) for at in (two.first, two.second) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    while True:  # what was refused while others held more than they used
        last = two.embed(mine, text)
        if last.status_code != 200:
            break
        answers.append(last)
    assert sum(answer.status_code == 200 for answer in answers) == 7
    assert code_of(last) == (429, "insufficient_quota")
    assert last.headers["x-should-retry"] == "false"
    assert "retry-after" not in last.headers
    until(lambda: two.used(mine).tokens == 7 * 32)
    assert two.embed(other, text).status_code == 200


def test_a_key_that_is_not_there_any_more_keeps_no_other_from_being_booked(db: sa.Engine) -> None:
    limits = KeyLimits(tokens_per_month=100)
    with db.begin() as conn:
        made = {"tenant": "t", "scopes": {Scope.EMBED}, "limits": limits}
        gone, mine, other = (keys.create(conn, name=name, **made)[0] for name in ("gone", "mine", "other"))  # type: ignore[arg-type]
        conn.execute(sa.text("DELETE FROM api_keys WHERE id = :id"), {"id": gone})
    with db.begin() as conn:
        asked = [Demand(key_id, limits, 60, Decimal(0)) for key_id in (gone, mine, gone, other, mine)]
        month, verdicts = usage.reserve(conn, asked)
        assert verdicts == [None, None, "tokens", None, "tokens"]
        usage.book(conn, {(key_id, month): UsageBooking(1, 5, Decimal(0)) for key_id in (gone, mine, other)})
    with db.begin() as conn:
        used = conn.execute(sa.text("SELECT key_id, tokens FROM api_key_usage ORDER BY key_id"))
        assert [tuple(row) for row in used] == [(mine, 65), (other, 65)]


def test_two_reservations_at_once_see_each_other(db: sa.Engine) -> None:
    limits = KeyLimits(tokens_per_month=100)
    with db.begin() as conn:
        made = {"tenant": "t", "scopes": {Scope.EMBED}, "limits": limits}
        ids = [keys.create(conn, name=name, **made)[0] for name in ("mine", "other")]  # type: ignore[arg-type]
        usage.reserve(conn, [Demand(key_id, limits, 0, Decimal(0)) for key_id in ids])  # their rows are there
    verdicts: list[list[str | None]] = []

    def reserve(key_id: int) -> None:
        with db.begin() as conn:
            verdicts.append(usage.reserve(conn, [Demand(key_id, limits, 60, Decimal(0))])[1])

    with db.connect() as first, first.begin():
        assert usage.reserve(first, [Demand(ids[0], limits, 60, Decimal(0))])[1] == [None]
        second = threading.Thread(target=reserve, args=[ids[0]])
        second.start()
        reserve(ids[1])
        until(lambda: waits_for_a_lock(db) or not second.is_alive())
    second.join()
    assert verdicts == [[None], ["tokens"]]


def waits_for_a_lock(db: sa.Engine) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with db.begin() as conn:
        return bool(conn.execute(sa.text(query)).scalar_one())


def test_a_key_with_no_limit_is_booked_too(two: Two) -> None:
    key = two.key("mine")
    for at in (two.first, two.second):
        assert two.embed(key, "a b", "c", at=at).status_code == 200
    until(lambda: two.used(key) == UsageBooking(2, 2 * (4 + 3), Decimal(0)))


def test_what_fails_is_given_back(two: Two) -> None:
    key = two.key("mine", KeyLimits(tokens_per_month=50, tokens_per_minute=50))
    for _ in range(3):
        assert two.embed(key, "word " * 20 + "\0").status_code == 400
    assert two.embed(key, "word " * 20).status_code == 200
    until(lambda: two.used(key).tokens == 22)


def test_dollars_of_a_month_stop_what_costs_and_nothing_else(db: sa.Engine) -> None:
    limits = KeyLimits(usd_per_month=Decimal("0.10"))
    with db.begin() as conn:
        ids = [keys.create(conn, name=name, tenant="t", scopes={Scope.EMBED}, limits=limits)[0] for name in ("a", "b")]
        cents = [Demand(ids[0], limits, 10, Decimal("0.06")), Demand(ids[0], limits, 10, Decimal("0.05"))]
        free = [Demand(ids[0], limits, 10**6, Decimal(0)), Demand(ids[1], limits, 1, Decimal("0.10"))]
        month, verdicts = usage.reserve(conn, [*cents, *free])
        assert verdicts == [None, "usd", None, None]
        usage.book(conn, {(ids[0], month): UsageBooking(1, 0, Decimal("-0.06"))})
        assert usage.reserve(conn, cents)[1] == [None, "usd"]


def test_requests_at_once_are_bounded_and_end_with_their_callers(two: Two) -> None:
    key = two.key("mine", KeyLimits(parallel_requests=2), scopes={Scope.SEARCH, Scope.EMBED})
    other = two.key("other", KeyLimits(parallel_requests=2))
    state = two.first.gateway.limits._keys
    key_id = int(key.split("_")[1])
    with connect(two.first.url) as one, connect(two.first.url) as another:
        for connection in (one, another):
            connection.sendall(head("GET", "/test/wait/1", key))
        until(lambda: key_id in state and state[key_id].running == 2)
        assert code_of(two.embed(key)) == (429, "rate_limit_exceeded")
        assert two.embed(other).status_code == 200
        assert two.embed(key, at=two.second).status_code == 200, "it is a limit of each gateway"
    until(lambda: state[key_id].running == 0)
    assert two.embed(key).status_code == 200


def test_the_command_creates_lists_and_revokes(two: Two) -> None:
    env = {"DATABASE_URL": two.settings.require_database_url(), "REDIS_URL": two.settings.require_redis_url()}

    def run(*arguments: str) -> Any:
        result = CliRunner().invoke(cli, ["keys", *arguments, "--json"], env=env, obj=None)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    made = run(
        "create",
        "the page",
        "--scope",
        "embed",
        "--scope",
        "search",
        "--model",
        "m",
        "--collection",
        "docs",
        "--tenant",
        "us",
        "--requests-per-minute",
        "60",
        "--usd-per-month",
        "12.50",
        "--expires",
        "90d",
    )
    plain = run("create", "plain")
    assert two.embed(plain["key"]).json()["tenant"] == "plain"
    listed = {row["id"]: row for row in run("list")}
    row = listed[made["id"]]
    assert (row["name"], row["tenant"], row["scopes"]) == ("the page", "us", ["embed", "search"])
    assert (row["models"], row["collections"], row["state"]) == (["m"], ["docs"], "live")
    assert (row["limits"]["requests_per_minute"], row["limits"]["usd_per_month"]) == (60, "12.5")
    assert made["key"].startswith(f"cmk_{made['id']}_{row['prefix']}")
    shown = CliRunner().invoke(cli, ["keys", "list"], env=env)
    assert "sha256" not in shown.stdout
    assert made["key"] not in shown.stdout
    assert run("revoke", str(plain["id"])) == {"id": plain["id"], "is_last": False}
    until(lambda: two.embed(plain["key"]).status_code == 401)
    again = CliRunner().invoke(cli, ["keys", "revoke", str(plain["id"])], env=env)
    assert again.exit_code == 1
    assert f"key {plain['id']} was revoked before" in again.stderr
    never = CliRunner().invoke(cli, ["keys", "revoke", "999"], env=env)
    assert (never.exit_code, "there is no key 999" in never.stderr) == (1, True)


def test_a_new_key_that_sees_what_others_have_says_so(settings: Settings) -> None:
    env = {"DATABASE_URL": settings.require_database_url(), "REDIS_URL": settings.require_redis_url()}

    def create(*arguments: str) -> str:
        made = CliRunner().invoke(cli, ["keys", "create", *arguments], env=env)
        assert made.exit_code == 0, made.output
        return " ".join(made.stderr.split())

    assert "Its tenant is" not in create("ours", "--collection", "docs")
    assert "may use all collections" not in create("others", "--collection", "docs")
    same = create("ours")
    assert "Its tenant is 'ours', like that of key 1, so they see each other's files and batches." in same
    assert "It may use all collections, with their jobs." in same
    assert "Its tenant is" not in create("ours", "--tenant", "ours")  # it was asked for
    CliRunner().invoke(cli, ["keys", "revoke", "1"], env=env)
    assert "like that of keys 3, 4," in create("ours")


def test_a_new_key_for_a_collection_that_does_not_exist_says_so(settings: Settings, client: Client) -> None:
    client.enqueue([("a", "text")], collection="docs")
    client.set_alias("documents", "docs")
    env = {"DATABASE_URL": settings.require_database_url(), "REDIS_URL": settings.require_redis_url()}
    names = [option for name in ("docs", "dcos", "documents") for option in ("--collection", name)]
    made = CliRunner().invoke(cli, ["keys", "create", "page", *names], env=env)
    assert made.exit_code == 0, made.output
    said = " ".join(made.stderr.split())
    assert "There is no collection 'dcos' yet." in said
    assert "chunkmill keys revoke 1" in said
    assert said.count("There is no collection") == 1


@pytest.mark.parametrize("given", ["2099-01-01", "2099-01-01T12:30"])
def test_the_time_with_its_zone_that_is_advised_is_accepted(settings: Settings, given: str) -> None:
    env = {"DATABASE_URL": settings.require_database_url(), "REDIS_URL": settings.require_redis_url()}
    refused = CliRunner().invoke(cli, ["keys", "create", "x", "--expires", given], env=env)
    advised = re.search(r"Write (\S+) for UTC", refused.stderr)
    assert advised is not None, refused.output
    assert CliRunner().invoke(cli, ["keys", "create", "x", "--expires", advised[1]], env=env).exit_code == 0


@pytest.mark.parametrize("given", ["yesterday", "2020-01-01T00:00Z", "2099-01-01T00:00"])
def test_an_end_that_is_no_time_to_come_is_refused(settings: Settings, given: str) -> None:
    env = {"DATABASE_URL": settings.require_database_url(), "REDIS_URL": settings.require_redis_url()}
    result = CliRunner().invoke(cli, ["keys", "create", "x", "--expires", given], env=env)
    assert result.exit_code == 1
    assert "--expires" in result.stderr
