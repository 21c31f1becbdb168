"""What `status --plot` and `cost --plot` draw is what the ledger holds."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from chunkmill.broker import Broker
from chunkmill.cli.__main__ import cli
from chunkmill.client import Client
from chunkmill.domain.states import Route
from chunkmill.monitor import history, minutes
from chunkmill.monitor.history import PARTS, Span, WaitCounts, longest, spread
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from tests.integration.hands import Hands

HOUR = 3600.0
PART = HOUR / PARTS


def execute(db: sa.Engine, statement: str, **given: object) -> None:
    with db.begin() as conn:
        conn.execute(sa.text(statement), given)


def at(parts_ago: float) -> datetime:
    """The middle of the part that ended so many parts before the last one, as far as a test can say."""
    return datetime.now(UTC) - timedelta(seconds=(parts_ago + 0.5) * PART)


def read(db: sa.Engine) -> history.History:
    with db.begin() as conn:
        return history.read(conn, HOUR)


@pytest.fixture
def worked(client: Client, hands: Hands, db: sa.Engine) -> None:
    """Jobs of two collections with a ChunkBatch each: the first was embedded long ago, the second waits."""
    for name in ("one", "other"):
        client.enqueue([(name, f"text {name}")], collection=name)
    hands.embed(hands.claim(1), {})
    execute(db, "UPDATE chunk_batches SET created_at = :t WHERE id = 1", t=at(100))
    execute(db, "UPDATE chunk_batches SET created_at = :t WHERE id = 2", t=at(30))
    execute(
        db,
        """
        INSERT INTO usage (chunk_batch_id, attempt, job_id, space_id, provider, worker, contents, tokens,
                           engine_seconds, created_at, ended_at)
        VALUES (1, 1, 301, 1, 'local', 'host:1', 1, 600, 2, :began, :ended)
        """,
        began=at(80),
        ended=at(61),
    )


@pytest.mark.usefixtures("worked")
def test_a_drawing_without_a_span_begins_with_the_first_work_of_the_last_day(db: sa.Engine) -> None:
    def seconds(most: float = 24 * HOUR) -> float:
        with db.begin() as conn:
            return history.seconds_of_work(conn, most)

    assert 100 * PART <= seconds() <= 105 * PART
    assert seconds(60 * PART) == 60 * PART  # the attempt began before, and the second ChunkBatch waits
    execute(db, "UPDATE chunk_batches SET created_at = :t, finished_at = :t WHERE id = 1", t=at(119))
    assert 119 * PART <= seconds() <= 123 * PART
    execute(db, "UPDATE chunk_batches SET created_at = now(), finished_at = NULL")
    assert 80 * PART <= seconds() <= 84 * PART  # an attempt is work too
    execute(db, "DELETE FROM usage")
    assert seconds() == history.SHORTEST
    execute(
        db,
        """
        UPDATE chunk_batches
        SET created_at = now() - interval '9 days', finished_at = now() - interval '8 days', state = 'completed'
        """,
    )
    assert seconds() == 24 * HOUR


@pytest.mark.usefixtures("worked")
def test_tokens_stand_where_an_attempt_ran_and_waits_end_with_the_claim(db: sa.Engine) -> None:
    told = read(db)
    tokens = told.tokens[Route.LOCAL]
    assert sum(tokens) == pytest.approx(600)
    first, last = PARTS - 1 - 80, PARTS - 1 - 61
    assert [i for i, n in enumerate(tokens) if n] == list(range(first, last + 1))
    assert tokens[first] == pytest.approx(30)
    assert told.tokens_per_s(Route.LOCAL)[first] == pytest.approx(30 / PART)
    waits = told.waits[Route.LOCAL]
    # The first came 100 parts ago and was claimed 20 parts later; the second has waited for 30 parts and goes on.
    assert waits[first] == pytest.approx(20 * PART, abs=1)
    assert waits[first - 1] == pytest.approx(19.5 * PART, abs=1)
    assert waits[first + 1 : PARTS - 31] == [0.0] * (PARTS - 31 - first - 1)
    assert waits[-1] == pytest.approx(30.5 * PART, abs=2)
    assert told.waits.keys() == told.tokens.keys() == {Route.LOCAL}


@pytest.mark.usefixtures("worked")
def test_an_attempt_that_still_runs_counts_until_now_and_one_that_lost_its_lease_when_it_began(
    db: sa.Engine, hands: Hands
) -> None:
    execute(db, "UPDATE usage SET ended_at = NULL")
    assert [i for i, n in enumerate(read(db).tokens[Route.LOCAL]) if n] == [PARTS - 1 - 80]
    execute(db, "UPDATE chunk_batches SET state = 'running' WHERE id = 1")
    assert [i for i, n in enumerate(read(db).tokens[Route.LOCAL]) if n] == list(range(PARTS - 1 - 80, PARTS))


@pytest.mark.usefixtures("worked")
def test_what_ended_without_a_worker_waits_no_more(client: Client, db: sa.Engine) -> None:
    client.cancel(302)
    execute(db, "UPDATE chunk_batches SET finished_at = :t WHERE id = 2", t=at(10))
    waits = read(db).waits[Route.LOCAL]
    assert waits[PARTS - 1 - 10] > 0
    assert waits[-5:] == [0.0] * 5


def test_what_began_before_the_time_is_cut_there() -> None:
    assert spread([Span(Route.LOCAL, -10, 9, 200), Span(Route.LOCAL, 5, 5, 7)])[Route.LOCAL][:11] == [
        10, 10, 10, 10, 10, 17, 10, 10, 10, 10, 0,
    ]  # fmt: skip
    worst = longest(
        [WaitCounts(Route.OPENAI, -1, 2, -50.0, 250.0), WaitCounts(Route.OPENAI, 1, PARTS, 150.0, 0.0)], 100.0
    )
    assert worst[Route.OPENAI][:4] == [150.0, 250.0, 250.0, 250.0]
    assert list(longest([WaitCounts(Route.OPENAI, 0, 0, 0.0, 1.0), WaitCounts(Route.LOCAL, 0, 0, 0.0, 1.0)], 1.0)) == [
        Route.LOCAL, Route.OPENAI,
    ]  # fmt: skip


REPORT = """
    INSERT INTO worker_reports (name, kind, label, started_at, seen_at, window_seconds, contents, tokens, padded_tokens,
                                engine_seconds, held)
    VALUES (:name, 'local', :name, now(), now() - make_interval(secs => :silent), 60, 1, :tokens, :padded, 1, 0)
"""


def test_a_minute_is_written_once_by_whichever_poller_comes_first_and_deleted_after_its_time(
    db: sa.Engine, broker: Broker, settings: Settings
) -> None:
    Poller(db, broker, settings).round()  # nobody computes anything
    for name, tokens, padded, silent in (("a", 80, 100, 0), ("b", 10, 100, 0), ("idle", 5, 0, 0), ("gone", 1, 100, 60)):
        execute(db, REPORT, name=name, tokens=tokens, padded=padded, silent=silent)
    execute(db, "INSERT INTO engine_minutes SELECT now() - interval '36 days', 1, 1, 1, 1")
    for _ in range(2):
        Poller(db, broker, settings).round()
    with db.begin() as conn:
        rows = conn.execute(sa.text("SELECT workers, tokens, padded_tokens FROM engine_minutes")).all()
    assert {tuple(row) for row in rows} == {(2, 90, 200)}
    assert len(rows) <= 2  # the minute may have ended meanwhile
    padding = read(db).padding
    assert padding[-1] == pytest.approx(0.55) or padding[-2] == pytest.approx(0.55)
    assert padding[0] is None


@pytest.mark.usefixtures("worked")
def test_a_schema_without_minutes_has_no_padding_and_keeps_nobody_up(
    db: sa.Engine, broker: Broker, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    execute(db, "DROP TABLE engine_minutes")
    Poller(db, broker, settings).round()
    assert caplog.records == []
    with db.begin() as conn:
        assert not minutes.add(conn)
    told = read(db)
    assert set(told.padding) == {None}
    assert told.tokens


@pytest.mark.usefixtures("worked")
def test_the_commands_draw_give_json_and_write_pictures(db: sa.Engine, settings: Settings, tmp_path: Path) -> None:
    execute(db, "INSERT INTO engine_minutes VALUES (date_trunc('minute', now() - interval '9 minutes'), 1, 90, 100, 1)")
    execute(db, """
        INSERT INTO charges (day, route, space_id, job_id, provider_batch_id, contents, tokens, usd)
        SELECT (now() AT TIME ZONE 'UTC')::date - ago, 'openai', 1, 0, 0, 1, 1500000, 0.25
        FROM unnest(ARRAY[1, 4]) AS a(ago)
    """)  # fmt: skip
    env = {"DATABASE_URL": settings.require_database_url(), "REDIS_URL": settings.require_redis_url()}

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(cli, arguments, env=env)
        assert done.exit_code == 0, done.output
        return done.output

    drawn = run("status", "--plot", "--last", "1h")
    for words in (
        "The last 1 hour",
        "tokens/s, local",
        "600 tokens in all",
        "padding",
        "10.0 % at most",
        "waiting, local",
    ):
        assert words in drawn
    assert max(map(len, drawn.splitlines())) <= 80
    told = json.loads(run("status", "--plot", "--last", "60min", "--json", "--picture", str(tmp_path / "status.svg")))
    assert sum(told["lanes"]["local"]["tokens"]) == pytest.approx(600)
    assert [share for share in told["padding"] if share is not None] == pytest.approx([0.1, 0.1])
    assert "tokens/s, local" in (tmp_path / "status.svg").read_text()

    costs = run("cost", "--plot", "--picture", str(tmp_path / "cost.svg")).splitlines()
    assert costs[0].split() == ["day", "route", "tokens", "USD"]
    assert len([line for line in costs if "openai" in line and "1.5 M" in line and "0.25" in line]) == 2
    assert len(costs[1:6]) == 5  # two days between the charges have a line too
    assert costs[2].strip() == (datetime.now(UTC) - timedelta(days=3)).strftime("%Y-%m-%d")
    assert max(map(len, costs[:6])) <= 80
    assert "US dollars" in (tmp_path / "cost.svg").read_text()
    assert "month" in run("cost", "--plot", "--by", "month").splitlines()[0]
    refused = CliRunner().invoke(cli, ["status", "--plot", "--picture", "status.gif"], env=env)
    assert refused.exit_code == 2
    assert "must end with .png or .svg" in refused.output
