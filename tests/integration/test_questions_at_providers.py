"""A question on a paid route is booked once, and the budget counts it, whatever its caller and its worker do."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.domain.providers import read_models
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import Route
from chunkmill.errors import ProviderError, StoreLimit
from chunkmill.ledger.money import budget, questions
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill_workers.provider import probe, responder
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.health import Health
from chunkmill_workers.provider.responder import ProviderResponder
from tests.openai_server import OpenAIServer
from tests.support import one_request
from tests.support.corridor_scene import Scene, scene
from tests.support.paid_ledger import LARGE, SMALL
from tests.support.waiting import PATIENCE, together

USD = {SMALL: Decimal("0.02"), LARGE: Decimal("0.13")}
"""US dollars per million tokens of a plain request."""
ONE_OF_THEM = Decimal("0.00017")
"""A question of a thousand words to the large model, and not a second one."""
CALLERS = ("waits", "has withdrawn", "is answered late", "is asked for a second time")
ENDS = ("alive", "killed before it sends", "killed after it has sent", "alive, and the answer to its commit is lost")


class Died(BaseException):
    """As a SIGKILL: nothing that comes after it runs."""


@pytest.fixture
def stage(settings: Settings, server: OpenAIServer, request: pytest.FixtureRequest) -> Iterator[Scene]:
    with scene(settings, server, request, openai_monthly_budget_usd=Decimal(1)) as made:
        yield made


@pytest.fixture
def limited(settings: Settings, server: OpenAIServer, request: pytest.FixtureRequest) -> Iterator[Scene]:
    with scene(settings, server, request, openai_monthly_budget_usd=ONE_OF_THEM) as made:
        yield made


@pytest.fixture
def workers(request: pytest.FixtureRequest) -> Iterator[Callable[[Scene], ProviderContext]]:
    """Makes one more worker, and closes it at the end of the test."""
    made: list[ProviderContext] = []

    def make(stage: Scene) -> ProviderContext:
        made.append(stage.corridor.worker())
        return made[-1]

    yield make
    for worker in made:
        worker.close()


def register(stage: Scene, model: str) -> registry.Space:
    with stage.corridor.db.begin() as conn:
        return registry.register(conn, stage.corridor.settings.provider_models[model].space(OnLong.TRUNCATE, 8))


def ask(stage: Scene, space: registry.Space, texts: list[str]) -> int:
    with stage.corridor.db.begin() as conn:
        return one_request.ask(conn, space_id=space.id, kind="query", texts=texts)


def send_probe(worker: ProviderContext, space: registry.Space) -> None:
    worker.health = Health()
    probe.require_answer(worker, Route.OPENAI_SYNC, space, again=True)


def answer(worker: ProviderContext) -> None:
    """Let a worker answer one question, or die of it."""
    with contextlib.suppress(Died):
        assert ProviderResponder(worker).answer_next()


def book_overdue(worker: ProviderContext) -> None:
    """Let a worker look for questions. None waits, and so it books what workers that are gone have left."""
    assert not ProviderResponder(worker).answer_next()


def during(worker: ProviderContext, *, before: Callable[[], object] = str, after: Callable[[], object] = str) -> None:
    """Do something before each request of a worker is sent, and after it was answered."""
    embed = worker.provider.embed

    def disturbed(*given: Any, **more: Any) -> Any:
        before()
        answered = embed(*given, **more)
        after()
        return answered

    worker.provider.embed = disturbed  # type: ignore[method-assign]


def die() -> None:
    raise Died


def change(stage: Scene, statement: str) -> None:
    with stage.corridor.db.begin() as conn:
        conn.execute(sa.text(statement))


def make_overdue(stage: Scene) -> None:
    change(stage, "UPDATE provider_questions SET until = now() - interval '1 s'")


def withdraw_all(stage: Scene) -> None:
    change(stage, "DELETE FROM embed_requests")


def billed(stage: Scene) -> Decimal:
    """US dollars that the server charged."""
    return sum((charge["tokens"] * USD[charge["model"]] for charge in stage.charges()), Decimal(0)) / 1_000_000


def counted(stage: Scene) -> Decimal:
    """US dollars that the budget counts: booked or in flight."""
    with stage.corridor.db.begin() as conn:
        now = budget.read(conn, stage.corridor.settings)
    return now.spent + now.committed


def usd_of(stage: Scene, space: registry.Space, texts: list[str]) -> Decimal:
    context = stage.corridor.context
    return sum(context.counter(context.model(space)).counts(texts)) * USD[space.spec.model] / 1_000_000


def booked(stage: Scene, table: str, column: str = "contents") -> dict[int, int]:
    """The sum of a column by space."""
    query = f"SELECT space_id, sum({column})::int AS n FROM {table} GROUP BY space_id"
    return {row["space_id"]: row["n"] for row in stage.corridor.rows(query)}


def commit_twice(worker: ProviderContext) -> None:
    """As if the answer to the commit of each booking were lost."""
    transact = worker.transact

    def run(work: Callable[[sa.Connection], Any], what: str, **more: Any) -> Any:
        if what == "book an answer":
            transact(work, what, **more)
        return transact(work, what, **more)

    worker.transact = run  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("caller", CALLERS)
def test_a_question_is_booked_once_whatever_becomes_of_its_caller_and_its_worker(
    stage: Scene, workers: Callable[[Scene], ProviderContext], caller: str, end: str
) -> None:
    """Two questions in two spaces are with two workers at the same time."""
    spaces = [register(stage, model) for model in (SMALL, LARGE)]
    texts = {space.id: (space, [f"{stage.name} {space.id} {i}" for i in range(2)]) for space in spaces}
    asked = [ask(stage, *question) for question in texts.values()]
    third = workers(stage)
    n_lost, n_charged = 0, 0  # bookings of each question

    def they_are_sent() -> None:
        assert counted(stage) > 0
        if caller == "has withdrawn":
            in_flight = counted(stage)
            withdraw_all(stage)
            assert counted(stage) == in_flight

    def they_are_answered() -> None:
        assert counted(stage) >= billed(stage) > 0
        if caller == "is answered late":
            make_overdue(stage)
            book_overdue(third)
            assert counted(stage) == billed(stage)

    if caller == "is asked for a second time":
        first = [workers(stage) for _ in spaces]
        for worker in first:
            during(worker, after=die)
        together(*(partial(answer, worker) for worker in first))
        make_overdue(stage)
        change(stage, "UPDATE embed_requests SET lease_until = now() - interval '1 s'")
        n_lost += 1
    both_sent, both_answered = (threading.Barrier(2, action) for action in (they_are_sent, they_are_answered))
    pair = [workers(stage) for _ in spaces]
    for worker in pair:
        if end == "killed before it sends":
            during(worker, before=die)
        during(worker, before=lambda: both_sent.wait(PATIENCE), after=lambda: both_answered.wait(PATIENCE))
        if end == "killed after it has sent":
            during(worker, after=die)
        if end == "alive, and the answer to its commit is lost":
            commit_twice(worker)
    together(*(partial(answer, worker) for worker in pair))
    if end.startswith("killed") or caller == "is answered late":
        n_lost += 1
    else:
        n_charged += 1
    assert counted(stage) >= billed(stage)
    make_overdue(stage)
    together(*(partial(book_overdue, worker) for worker in (third, stage.corridor.context)))

    for table, times in (("charges", n_charged), ("adjustments", n_lost)):
        assert booked(stage, table) == ({space.id: 2 * times for space in spaces} if times else {})
    kinds = stage.corridor.rows("SELECT DISTINCT kind FROM adjustments")
    assert kinds == ([{"kind": "maybe_charged"}] if n_lost else [])
    assert counted(stage) == (n_lost + n_charged) * sum(usd_of(stage, *question) for question in texts.values())
    assert stage.corridor.rows("SELECT FROM provider_questions") == []
    n_billed = (caller == "is asked for a second time") + (end != "killed before it sends")
    assert len(stage.charges()) == 2 * n_billed
    with stage.corridor.db.begin() as conn:
        answers = [one_request.take_answer(conn, number, dimensions=8) for number in asked]
    has_answer = end.startswith("alive") and caller != "has withdrawn"
    assert [made is not None and made.vectors is not None for made in answers] == [has_answer] * 2


def test_a_question_that_nobody_waits_for_any_more_leaves_no_room_for_another_one(
    limited: Scene, workers: Callable[[Scene], ProviderContext]
) -> None:
    """Neither while it is with the provider, nor after its worker was killed: it may have been charged."""
    small, large = register(limited, SMALL), register(limited, LARGE)
    words = " word" * 1000
    ask(limited, large, ["first" + words])
    killed, other = workers(limited), workers(limited)
    errors: list[str | None] = []

    def another_is_asked() -> None:
        for space, texts in ((large, ["second" + words]), (small, ["third" + words] * 3)):
            number = ask(limited, space, texts)
            answer(other)
            with limited.corridor.db.begin() as conn:
                given = one_request.take_answer(conn, number, dimensions=8)
            assert given is not None
            errors.append(given.error)

    def nobody_waits() -> None:
        withdraw_all(limited)
        another_is_asked()
        die()

    during(killed, after=nobody_waits)
    answer(killed)
    another_is_asked()
    make_overdue(limited)
    another_is_asked()

    assert len(errors) == 6
    assert all("the budget for paid routes is used up" in str(error) for error in errors)
    assert 0 < billed(limited) <= ONE_OF_THEM
    assert booked(limited, "adjustments") == {large.id: 1}


@pytest.mark.parametrize("is_awaited", [True, False])
def test_only_the_request_that_was_sent_is_booked_of_a_question_whose_worker_was_killed(
    stage: Scene, workers: Callable[[Scene], ProviderContext], is_awaited: bool
) -> None:
    """What was answered is charged, and what was not sent yet costs nothing. The worker dies of its second request."""
    spaces = [register(stage, model) for model in (SMALL, LARGE)]
    for space in spaces:
        ask(stage, space, [f"{stage.name} {is_awaited} {i}" for i in range(10)])
        worker, number = workers(stage), iter(range(3))
        during(worker, after=lambda number=number: die() if next(number) else None)
        answer(worker)
    if not is_awaited:
        withdraw_all(stage)
    assert counted(stage) > billed(stage)

    make_overdue(stage)
    book_overdue(stage.corridor.context)

    assert [booked(stage, table) for table in ("charges", "adjustments")] == [dict.fromkeys(map(_id, spaces), 4)] * 2
    assert counted(stage) == billed(stage)


def _id(space: registry.Space) -> int:
    return space.id


def test_a_question_of_which_nothing_was_sent_is_not_booked(
    stage: Scene, workers: Callable[[Scene], ProviderContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker was killed when the budget counted it already."""
    for model in (SMALL, LARGE):
        ask(stage, register(stage, model), ["word"])
        monkeypatch.setattr(responder, "first_request", lambda *_, **__: die())
        answer(workers(stage))
    assert counted(stage) > 0
    monkeypatch.undo()

    make_overdue(stage)
    book_overdue(stage.corridor.context)

    assert (booked(stage, "adjustments"), stage.charges(), counted(stage)) == ({}, [], 0)


def test_a_question_that_was_booked_meanwhile_is_not_asked_any_further(
    stage: Scene, workers: Callable[[Scene], ProviderContext]
) -> None:
    """Its worker was so slow that it was taken for dead. Its other requests would be in no budget."""
    slow, other = workers(stage), workers(stage)
    spaces = [register(stage, model) for model in (SMALL, LARGE)]

    def taken_for_dead() -> None:
        make_overdue(stage)
        book_overdue(other)

    during(slow, after=taken_for_dead)
    for space in spaces:
        ask(stage, space, [f"{stage.name} {i}" for i in range(10)])
        answer(slow)

    assert len(stage.charges()) == 2
    assert booked(stage, "adjustments") == {space.id: 4 for space in spaces}
    assert (booked(stage, "charges"), counted(stage)) == ({}, billed(stage))


@pytest.mark.parametrize("kind", ["cut", "http_error", "rate_limited"])
def test_a_request_that_fails_is_booked_once_though_its_worker_was_taken_for_dead(
    stage: Scene, server: OpenAIServer, workers: Callable[[Scene], ProviderContext], kind: str
) -> None:
    """Once by whoever took its worker for dead, and once by its worker if nobody did."""
    options: dict[str, dict[str, Any]] = {"cut": {"applied": True}, "http_error": {"status": 503}}
    server.misbehave(kind, times=None, where={"endpoint": "embeddings.create"}, **options.get(kind, {}))
    worker, other = workers(stage), workers(stage)
    small, large = (register(stage, model) for model in (SMALL, LARGE))
    ask(stage, small, ["word"])
    answer(worker)
    ask(stage, large, ["word"])
    embed = worker.provider.embed

    def taken_for_dead(*given: Any, **more: Any) -> Any:
        try:
            return embed(*given, **more)
        finally:
            make_overdue(stage)
            book_overdue(other)

    worker.provider.embed = taken_for_dead  # type: ignore[method-assign]
    stage.end_pauses()
    answer(worker)

    # A limit charges nothing, and whoever took the worker for dead could not know that there was one.
    assert booked(stage, "adjustments") == {large.id: 1} | ({} if kind == "rate_limited" else {small.id: 1})
    assert stage.corridor.rows("SELECT FROM provider_questions") == []


def test_two_workers_that_look_at_once_book_a_question_once(
    stage: Scene, workers: Callable[[Scene], ProviderContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither commits before the other has looked, and neither waits for the other."""
    spaces = [register(stage, model) for model in (SMALL, LARGE)]
    for space in spaces:
        ask(stage, space, ["word", "another"])
        killed = workers(stage)
        during(killed, after=die)
        answer(killed)
    make_overdue(stage)
    both_took = threading.Barrier(2)
    book = responder.book_unanswered

    def wait_and_book(*given: Any, **more: Any) -> None:
        both_took.wait(PATIENCE)
        book(*given, **more)

    monkeypatch.setattr(responder, "book_unanswered", wait_and_book)
    together(*(partial(book_overdue, workers(stage)) for _ in range(2)))

    assert booked(stage, "adjustments") == {space.id: 2 for space in spaces}
    assert counted(stage) == billed(stage)


def test_a_question_whose_worker_may_still_answer_is_left_to_it(
    stage: Scene, workers: Callable[[Scene], ProviderContext]
) -> None:
    """As long as a request may take, counted from the moment when it is sent. Another one of its space is booked."""
    spaces = [register(stage, model) for model in (SMALL, LARGE)]
    worker, other = workers(stage), workers(stage)
    left: list[float] = []

    def look() -> None:
        left.append(stage.corridor.one(_SECONDS_LEFT))
        with stage.corridor.db.begin() as conn:
            until = conn.execute(sa.text("SELECT now() - interval '1 s'")).scalar_one()
            questions.add(conn, b"of a worker that is gone", space_id=space.id, tokens=5, until=until)
            assert questions.mark_sent(conn, b"of a worker that is gone", contents=3, tokens=4, until=until)
        book_overdue(other)

    def look_and_spend_the_time() -> None:
        look()
        change(stage, "UPDATE provider_questions SET until = now() + interval '1 s'")

    during(worker, before=look, after=look_and_spend_the_time)
    for space in spaces:
        ask(stage, space, [f"{stage.name} {i}" for i in range(8)])
        answer(worker)

    assert len(left) == 8
    assert all(seconds > stage.corridor.settings.openai_timeout_seconds for seconds in left)
    assert booked(stage, "adjustments") == {space.id: 4 * 3 for space in spaces}
    assert booked(stage, "adjustments", "tokens") == {space.id: 4 * 4 for space in spaces}
    stage.check_books()


_SECONDS_LEFT = "SELECT extract(epoch FROM until - clock_timestamp())::float FROM provider_questions"


@pytest.mark.parametrize("end", ["refused", "taken back"])
def test_a_question_that_ends_early_leaves_the_budget_at_once(
    stage: Scene, server: OpenAIServer, workers: Callable[[Scene], ProviderContext], end: str
) -> None:
    """What a provider refuses costs nothing, and what nobody waits for any more is not sent."""
    for model in (SMALL, LARGE):
        ask(stage, register(stage, model), [f"{stage.name} {i}" for i in range(8)])
        worker = workers(stage)
        if end == "refused":
            server.misbehave("http_error", after=1, status=400, where={"endpoint": "embeddings.create"})
        else:
            during(worker, after=lambda: withdraw_all(stage))
        answer(worker)
        assert stage.corridor.rows("SELECT FROM provider_questions") == []

    assert len(stage.charges()) == 2
    assert counted(stage) == billed(stage)
    stage.check_books()


def test_an_answer_that_could_not_be_booked_stays_in_the_budget(
    stage: Scene, workers: Callable[[Scene], ProviderContext]
) -> None:
    """Whatever prevented it, such as a limit of Postgres: it was charged, and is booked as charged perhaps."""
    spaces = [register(stage, model) for model in (SMALL, LARGE)]
    for space in spaces:
        number = ask(stage, space, [f"{stage.name} {i}" for i in range(2)])
        worker = workers(stage)

        def fail(work: object, what: str, **_: object) -> None:
            raise StoreLimit(f"{what}: statement_timeout")

        worker.transact = fail  # type: ignore[method-assign, assignment]
        answer(worker)
        with stage.corridor.db.begin() as conn:
            told = one_request.take_answer(conn, number, dimensions=8)
        assert told is not None
        assert "statement_timeout" in str(told.error)
    assert counted(stage) == billed(stage) > 0

    make_overdue(stage)
    book_overdue(workers(stage))

    assert (booked(stage, "charges"), counted(stage)) == ({}, billed(stage))
    assert booked(stage, "adjustments") == {space.id: 2 for space in spaces}


def test_a_question_of_a_model_that_a_worker_does_not_know_is_left_to_one_that_knows_its_price(
    stage: Scene, workers: Callable[[Scene], ProviderContext]
) -> None:
    mine = read_models({"mine": {"dimensions": 8, "max_tokens": 100, "usd": 7}})
    knowing = workers(stage)
    knowing.settings = stage.corridor.settings.model_copy(update={"openai_models": mine})
    with stage.corridor.db.begin() as conn:
        spaces = [
            registry.register(conn, context.settings.provider_models[model].space(OnLong.TRUNCATE, 8))
            for context, model in ((stage.corridor.context, SMALL), (knowing, "mine"))
        ]
        until = conn.execute(sa.text("SELECT now() - interval '1 s'")).scalar_one()
        for number, space in enumerate(spaces):
            key = bytes([number])
            questions.add(conn, key, space_id=space.id, tokens=1_000_000, until=until)
            assert questions.mark_sent(conn, key, contents=1, tokens=1_000_000, until=until)

    book_overdue(stage.corridor.context)
    assert booked(stage, "adjustments") == {spaces[0].id: 1}
    book_overdue(knowing)
    assert booked(stage, "adjustments") == {space.id: 1 for space in spaces}
    assert stage.corridor.one("SELECT sum(usd) FROM adjustments") == Decimal("7.02")


@pytest.mark.parametrize("end", ["killed before it sends", "killed after it has sent", "alive", "taken for dead"])
def test_a_probe_is_booked_once_whatever_becomes_of_its_worker(
    stage: Scene, workers: Callable[[Scene], ProviderContext], end: str
) -> None:
    """The one word before the first request costs money too, and it belongs to no caller."""
    spaces = [register(stage, model) for model in (SMALL, LARGE)]
    other = workers(stage)

    def taken_for_dead() -> None:
        assert counted(stage) >= billed(stage) > 0
        make_overdue(stage)
        book_overdue(other)

    for space in spaces:
        worker = workers(stage)
        if end == "taken for dead":
            during(worker, after=taken_for_dead)
        elif end != "alive":
            during(worker, **{"before" if "before" in end else "after": die})
        with contextlib.suppress(Died):
            send_probe(worker, space)
    assert counted(stage) == sum(usd_of(stage, space, [probe.PROBE]) for space in spaces)
    make_overdue(stage)
    together(*(partial(book_overdue, worker) for worker in (other, stage.corridor.context)))

    once = {space.id: 1 for space in spaces}
    assert booked(stage, "charges") == (once if end == "alive" else {})
    assert booked(stage, "adjustments") == ({} if end == "alive" else once)
    assert len(stage.charges()) == (0 if "before" in end else 2)
    assert stage.corridor.rows("SELECT FROM provider_questions") == []


@pytest.mark.parametrize("kind", ["cut", "http_error", "rate_limited", "unauthorized"])
def test_a_probe_that_fails_leaves_the_budget_at_once(
    stage: Scene, server: OpenAIServer, workers: Callable[[Scene], ProviderContext], kind: str
) -> None:
    """Booked as charged perhaps if there was no answer, and not at all if it was refused."""
    options: dict[str, dict[str, Any]] = {"cut": {"applied": True}, "http_error": {"status": 503}}
    server.misbehave(kind, times=None, where={"endpoint": "embeddings.create"}, **options.get(kind, {}))
    spaces = [register(stage, model) for model in (SMALL, LARGE)]
    for space in spaces:
        with pytest.raises(ProviderError):
            send_probe(workers(stage), space)

    unanswered = kind in ("cut", "http_error")
    assert booked(stage, "adjustments") == ({space.id: 1 for space in spaces} if unanswered else {})
    assert booked(stage, "charges") == {}
    assert stage.corridor.rows("SELECT FROM provider_questions") == []


def test_a_crash_of_postgres_empties_no_question(stage: Scene) -> None:
    """It empties the unlogged table of requests, and begins their ids anew: the keys are none of those."""
    kept = "SELECT relpersistence::text AS kept FROM pg_class WHERE relname = 'provider_questions'"
    assert stage.corridor.one(kept) == "p"
