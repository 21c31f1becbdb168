"""What one worker lacks is left to others: it is charged to no ChunkBatch, and told to no client at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.db.connect import create_db
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import JobState
from chunkmill.errors import (
    CanaryFailed,
    DeviceUnavailable,
    InvalidSetting,
    ModelLoadError,
    SpaceMismatch,
    TokenizerMismatch,
    UnknownModel,
)
from chunkmill.ledger import embed_requests
from chunkmill.ledger.embed_requests import Answer
from chunkmill.settings import Settings
from chunkmill.spaces.registry import Space
from chunkmill_workers.local import engines as engines_module
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.engines import Engines
from chunkmill_workers.local.pipeline import TaskResult, run_chunk_batch
from chunkmill_workers.local.responder import EmbedResponder
from chunkmill_workers.process.lease import LeaseKeeper
from tests.integration.conftest import Runner
from tests.integration.hands import Hands
from tests.support import one_request

LACKS = [
    UnknownModel("no model of that name is here"),
    InvalidSetting("precision int8 needs another CPU"),
    ModelLoadError("its weights are damaged"),
    SpaceMismatch("it has other files"),
    CanaryFailed("its vectors drift"),
    DeviceUnavailable("there is no such GPU"),
    MemoryError("no room for a second model, nor for SECRET"),
]


@pytest.fixture
def unfit(settings: Settings) -> Iterator[WorkerContext]:
    """A worker that has loaded nothing."""
    db = create_db(settings.require_database_url(), role="worker")
    yield WorkerContext(settings, db, Engines(settings, "cpu"), LeaseKeeper(db, settings.lease_seconds), name="unfit")
    db.dispose()


def lack(patch: pytest.MonkeyPatch, error: Exception) -> None:
    """Whatever this worker loads, or hears of its canary, fails. What others have loaded stays."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    patch.setattr(engines_module, "load_engine", fail)


@pytest.fixture
def two_spaces(client: Client, context: WorkerContext) -> tuple[Space, Space]:
    """Both are served by the fit worker, whose canaries are heard."""
    first, second = (client._space(None, on_long) for on_long in (OnLong.TRUNCATE, OnLong.SPLIT))
    for space in (first, second):
        context.engine_for(space)
    return first, second


@pytest.mark.parametrize("error", LACKS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("deaths", [0, 2], ids=["", "suspect"])
def test_a_chunk_batch_waits_uncharged_for_a_worker_that_can(
    error: Exception,
    deaths: int,
    unfit: WorkerContext,
    two_spaces: tuple[Space, Space],
    runner: Runner,
    client: Client,
    hands: Hands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs = [client.enqueue([(name, f"text {name}")], collection=name) for name in ("one", "other")]
    hands.rows("UPDATE chunk_batches SET deaths = :deaths RETURNING id", deaths=deaths)
    lack(monkeypatch, error)
    for _ in range(8):
        unfit.engines.left_to_others.clear()  # as if a minute had passed
        # Nobody rings for the other one meanwhile, or it would be its turn.
        hands.rows("UPDATE chunk_batches SET not_before = now(), rung_at = NULL RETURNING id")
        assert run_chunk_batch(unfit, 1) is TaskResult.RELEASED
    [(state, owner, charged, said)] = hands.rows(
        "SELECT state, lease_owner, attempt - max_attempts, error FROM chunk_batches WHERE id = 1"
    )
    assert (state, owner, charged) == ("available", None, -client._settings.max_attempts)
    assert "SECRET" not in said
    assert hands.rows("SELECT DISTINCT outcome FROM usage WHERE worker = 'unfit'") == [("released",)]
    for reason in (client.explain(jobs[0].id).waits[0], said):
        assert (str(error) in reason) is not isinstance(error, MemoryError)
        assert "unfit: " in reason
    assert "unfit" not in client.explain(jobs[1].id).waits[0]

    monkeypatch.undo()
    assert [runner.finish(job).state for job in jobs] == [JobState.COMPLETED] * 2
    assert hands.rows("SELECT error_code, error FROM chunk_batches") == [(None, None)] * 2


def test_a_worker_leaves_what_it_lacks_alone_for_a_while(
    unfit: WorkerContext, two_spaces: tuple[Space, Space], client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.enqueue([("a", "text a")], collection="one")
    lack(monkeypatch, LACKS[0])
    assert run_chunk_batch(unfit, 1) is TaskResult.RELEASED
    assert list(unfit.engines.unserved()) == [two_spaces[0].id]
    assert run_chunk_batch(unfit, 1) is TaskResult.NOT_OURS


def test_a_model_that_no_worker_can_read_is_given_up_at_once(
    unfit: WorkerContext, two_spaces: tuple[Space, Space], client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The space's fingerprint covers the tokenizer, so it fits the model on no worker."""
    job = client.enqueue([("a", "text a")], collection="one")
    lack(monkeypatch, TokenizerMismatch("the tokenizer is another model's"))
    assert run_chunk_batch(unfit, 1) is TaskResult.FAILED
    assert client.job(job.id).state is JobState.FAILED


def test_other_files_are_noticed_before_their_weights_are_loaded(
    unfit: WorkerContext, two_spaces: tuple[Space, Space], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what is wrong with these files would be said of the space's, which other workers have."""
    lack(monkeypatch, TokenizerMismatch("the tokenizer of the other files is another model's"))
    here = dataclasses.replace(two_spaces[0].spec, revision="sha256:other")
    with pytest.raises(SpaceMismatch):
        unfit.engines.for_space(dataclasses.replace(two_spaces[0], spec=here))


def asked(db: sa.Engine, space: Space) -> int:
    with db.begin() as conn:
        return one_request.ask(conn, space_id=space.id, kind="query", texts=["a query"])


def answer_to(db: sa.Engine, request: int) -> Answer | None:
    with db.begin() as conn:
        return one_request.take_answer(conn, request, dimensions=384)


def age(hands: Hands, request: int) -> None:
    """Nobody has answered the request for a long time."""
    query = "UPDATE embed_requests SET created_at = now() - interval '1 min' WHERE id = :id RETURNING id"
    assert hands.rows(query, id=request) == [(request,)]


@pytest.mark.parametrize("error", LACKS, ids=lambda error: type(error).__name__)
def test_a_query_is_left_to_a_worker_that_can_answer_it(
    error: Exception,
    unfit: WorkerContext,
    context: WorkerContext,
    two_spaces: tuple[Space, Space],
    db: sa.Engine,
    hands: Hands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = [asked(db, space) for space in two_spaces]
    lack(monkeypatch, error)
    responder = EmbedResponder(unfit)
    for _ in range(embed_requests.MAX_ATTEMPTS + 1):
        unfit.engines.left_to_others.clear()
        while responder.answer_next():
            pass
    assert [answer_to(db, request) for request in requests] == [None, None]
    assert hands.rows("SELECT attempts, lease_until FROM embed_requests") == [(0, None)] * 2
    while EmbedResponder(context).answer_next():
        pass
    for request in requests:
        answer = answer_to(db, request)
        assert answer is not None
        assert answer.vectors is not None


@pytest.mark.parametrize("error", LACKS, ids=lambda error: type(error).__name__)
def test_a_query_that_nobody_can_answer_gets_the_reason_after_a_while(
    error: Exception,
    unfit: WorkerContext,
    two_spaces: tuple[Space, Space],
    db: sa.Engine,
    hands: Hands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, young, other = asked(db, two_spaces[0]), asked(db, two_spaces[0]), asked(db, two_spaces[1])
    hands.rows("UPDATE embed_requests SET lease_until = now() + interval '1 h' WHERE id = :id RETURNING id", id=other)
    lack(monkeypatch, error)
    responder = EmbedResponder(unfit)
    while responder.answer_next():
        pass
    age(hands, old), age(hands, other)
    responder.answer_next()
    told = answer_to(db, old)
    assert told is not None
    assert told.error is not None
    assert (str(error) in told.error) is not isinstance(error, MemoryError)
    assert told.error.startswith("unfit: ")
    assert "SECRET" not in told.error
    assert answer_to(db, young) is None
    assert answer_to(db, other) is None, "this worker knows of nothing that it lacks for that space"


def test_a_query_that_waits_behind_another_of_its_space_is_not_refused(
    unfit: WorkerContext,
    two_spaces: tuple[Space, Space],
    db: sa.Engine,
    hands: Hands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody is at work on them, and is busy."""
    first = asked(db, two_spaces[0])
    lack(monkeypatch, LACKS[0])
    responder = EmbedResponder(unfit)
    while responder.answer_next():
        pass
    with db.begin() as conn:
        held = embed_requests.claim_next(conn)
    assert held is not None
    assert held.id == first
    second = asked(db, two_spaces[0])
    age(hands, second)
    responder.answer_next()
    assert answer_to(db, second) is None


def late(act: Callable[[sa.Connection, embed_requests.EmbedRequest], object], db: sa.Engine, hands: Hands) -> None:
    """A worker acts on a request after its lease ran out and another has claimed it."""
    with db.begin() as conn:
        first = embed_requests.claim_next(conn)
    assert first is not None
    hands.rows(
        "UPDATE embed_requests SET lease_until = now() - interval '1 s' WHERE id = :id RETURNING id", id=first.id
    )
    with db.begin() as conn:
        assert embed_requests.claim_next(conn) is not None
    with db.begin() as conn:
        act(conn, first)


def test_a_worker_that_lost_its_lease_on_a_query_neither_gives_it_back_nor_refuses_it(
    two_spaces: tuple[Space, Space], db: sa.Engine, hands: Hands
) -> None:
    for act in (embed_requests.release, lambda conn, request: embed_requests.refuse(conn, request, "no")):
        request = asked(db, two_spaces[0])
        late(act, db, hands)
        assert hands.rows("SELECT attempts, lease_until > now(), error FROM embed_requests") == [(2, True, None)]
        with db.begin() as conn:
            one_request.withdraw(conn, request)
