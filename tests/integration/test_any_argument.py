"""Whatever argument a method of the client is given: a result, or an error of ours that says what is wrong."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.client.base import ClientPart
from chunkmill.domain.sessions import SearchId
from chunkmill.domain.spaces import OnLong
from chunkmill.embedded import StackStatus
from chunkmill.errors import ChunkmillError, InvalidChunk, InvalidInput, InvalidSetting, NotFound, StoreUnavailable
from chunkmill.models import DEFAULT_MODEL
from chunkmill.settings import Settings
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.engines import Engines
from chunkmill_workers.local.responder import EmbedResponder
from tests.conftest import client_for, fresh_settings
from tests.integration.conftest import Runner, worker_context

NAN, INF = float("nan"), float("inf")
ODD: dict[str, Callable[[], Any]] = {
    repr(value)[:40]: lambda value=value: value  # type: ignore[misc]
    for value in (
        None, "", " ", "a", "a\x00b", "\ud800", "x" * 300, "x" * 100_000, "a/b@/proc/nothing", b"ab",
        0, -1, 1, 2**31, 2**63, 2**200, 1.5, NAN, INF, -INF, True,
        [], ["a"], ["a\x00"], ["\ud800"], [1], [None], [[]], [2**63], [("a", "b", "c", "d")], {"a", "b"}, ("a", 1),
        {"a": 1}, {"a": NAN}, {"a": date(2026, 1, 1)}, {"a\x00": "b"}, {"a": "\ud800"}, {("a",): 1},
        datetime(2026, 1, 1), datetime.max, date.min, timedelta(-1), timedelta.max, object(),
        np.zeros(384, np.float32), np.full(384, NAN), np.full(384, 1e300), np.ones((2, 384)), np.array(["a"]),
    )
}  # fmt: skip
ODD["a generator"] = lambda: (chunk_id for chunk_id in ("a", "b"))

JOB_METHODS = ("job", "dead_chunks", "wait", "end_of", "cancel", "retry", "attempts", "failing", "explain")
KNOWN: dict[str, dict[str, Any]] = {
    "enqueue": {"chunks": [("n", "a new text")], "collection": "docs"},
    "estimate": {"chunks": [("n", "a new text")]},
    "search": {"query": np.ones(384), "collection": "docs"},
    "feedback": {"search_id": str(SearchId.new(201, 1)), "chunk_id": "a"},
    "embed": {"texts": ["a text"]},
    "embed_texts": {"texts": ["a text"]},
    "resume_lane": {"route": "openai"},
    "abandon": {"provider_batch_id": 401},
    "correct_charge": {
        "usd": "1",
        "route": "openai",
        "day": date(2026, 1, 1),
        "reason": "the invoice",
        "author": "ada",
    },
    "dead_chunk": {"dead_id": 501},
    "evict": {"older_than": 1},
    "drop_space": {"space": "a"},
    "drop_collection": {"name": "docs"},
    "rename_collection": {"name": "docs", "to": "papers"},
    "set_alias": {"alias": "live", "collection": "docs"},
    "remove_alias": {"alias": "live"},
    "retry_dead": {"job_id": 301},
    "drop_dead": {"job_id": 301},
    **{
        name: {"job_id": 301}
        for name in ("job", "dead_chunks", "wait", "end_of", "cancel", "retry", "attempts", "failing", "explain")
    },
    **{
        name: {"collection": "docs"}
        for name in (
            "vectors",
            "delete",
            "audit",
            "index",
            "chunks",
            "count",
            "keywords",
            "drop_keywords",
            "golden",
            "tune_search",
            "search_counts",
            "outdated",
            "batcher",
            "map",
        )
    },
    "compare": {"collection": "docs", "model": DEFAULT_MODEL},
    "quote_comparison": {"collection": "docs", "model": DEFAULT_MODEL},
    "reembed": {"collection": "docs", "to": DEFAULT_MODEL},
    **{
        name: {"which": "docs"}
        for name in (
            "reembedding",
            "flip",
            "rollback",
            "judge_reembedding",
            "pause_reembedding",
            "resume_reembedding",
            "cancel_reembedding",
            "finish_reembedding",
        )
    },
    "bridge": {"collection": "docs", "model": "all-MiniLM-L6-v2"},
    "quote_bridge": {"collection": "docs", "model": "all-MiniLM-L6-v2"},
    "drop_bridge": {"collection": "docs", "name": "all-MiniLM-L6-v2"},
    "get": {"collection": "docs", "ids": ["a"]},
    "update_metadata": {"collection": "docs", "metadata": {"a": 1}, "ids": ["a"]},
    "iter_vectors": {"collection": "docs"},
    "export": {"collection": "docs", "path": "docs.jsonl", "overwrite": True},
    "save_query_cache": {"path": "queries"},
    "load_query_cache": {"path": "queries"},
}
"""Good values of the arguments that must be given, by method."""
METHODS = {
    name: member
    for name, member in inspect.getmembers(Client, inspect.isfunction)
    if not name.startswith("_") and name != "close"
}


@pytest.fixture(scope="module")
def template(stack: StackStatus, engines: Engines) -> Iterator[str]:
    """A database in which two collections have vectors. Each test gets a copy."""
    with fresh_settings(stack) as settings:
        with worker_context(settings, engines) as context, client_for(settings) as client:
            for collection in ("docs", "other"):
                job = client.enqueue([("a", f"text of {collection}"), ("b", "a text")], collection=collection)
                Runner(context, client).finish(job)
        yield str(sa.make_url(settings.require_database_url()).database)


@pytest.fixture
def settings(stack: StackStatus, template: str) -> Iterator[Settings]:
    with fresh_settings(stack, template) as made:
        yield made


@pytest.fixture
def filled(client: Client, context: WorkerContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """Two collections with vectors, a worker that answers queries, and a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    responder = EmbedResponder(context)
    responder.start()
    yield client
    responder.stop()


@pytest.mark.parametrize("method", METHODS)
def test_any_argument_gives_a_result_or_an_error_of_ours(method: str, filled: Client) -> None:
    call = getattr(filled, method)
    wrong = []
    for name in list(inspect.signature(call).parameters):
        for shown, make in ODD.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    answer = call(**{**KNOWN.get(method, {}), name: make()})
                    if isinstance(answer, Iterator):
                        list(answer)
            except ChunkmillError as error:
                str(error).encode()  # a message that can be printed
                assert "[SQL" not in str(error)
            except Exception as error:  # noqa: BLE001 - the point of the test
                wrong.append(f"{method}({name}={shown}): {type(error).__name__}: {str(error)[:100]}")
    assert not wrong, "\n".join(wrong)


def test_every_argument_that_must_be_given_has_a_good_value(filled: Client) -> None:
    """Else the test above would see one refusal only."""
    for method in METHODS:
        needed = {
            name
            for name, parameter in inspect.signature(getattr(filled, method)).parameters.items()
            if parameter.default is inspect.Parameter.empty
        }
        assert needed <= KNOWN.get(method, {}).keys(), method


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda client: client.search("a\x00b", collection="docs"), "query"),
        (lambda client: client.search("\ud800", collection="docs"), "query"),
        (lambda client: client.search("a", collection="docs", metadata={"a": NAN}), "metadata"),
        (lambda client: client.search("a", collection="docs", k=-1), "k is -1"),
        (lambda client: client.search("a", collection="docs", timeout=NAN), "timeout"),
        (lambda client: client.search(np.zeros(384), collection="docs"), "zero"),
        (lambda client: client.vectors("docs", "ab"), "ids is a str"),
        (lambda client: client.delete("docs", [1]), "ids"),
        (lambda client: client.delete("docs", "ab"), "ids is a str"),
        (lambda client: client.jobs(-1), "limit is -1"),
        (lambda client: client.dead(limit=-1), "limit is -1"),
        (lambda client: client.job(2**63), "job_id"),
        (lambda client: client.embed(b"ab"), "texts"),
        (lambda client: client.enqueue("ab", collection="docs"), "chunks is a str"),
    ],
)
def test_the_refusal_names_the_argument(call: Callable[[Client], Any], says: str, filled: Client) -> None:
    with pytest.raises(InvalidInput, match=says):
        call(filled)


def test_ids_may_come_in_any_iterable(filled: Client) -> None:
    assert filled.vectors("docs", {"a", "b"}).keys() == {"a", "b"}
    assert filled.vectors("docs", (name for name in "ab")).keys() == {"a", "b"}
    assert filled.delete("docs", []) == 0
    assert filled.delete("docs", {"a", "nothing"}) == 1
    assert filled.delete("docs", (name for name in "ab")) == 1
    assert filled.audit("other").chunks == 2


def test_a_query_vector_of_any_length_finds_the_same(filled: Client) -> None:
    filled._settings = filled._settings.model_copy(update={"vector_storage": "halfvec"})
    vector = filled.embed(["a text"])[0]
    searches = [filled.search(vector * scale, collection="docs") for scale in (1.0, 1e-30, 1e30)]
    assert [[hit.chunk_id for hit in hits] for hits in searches] == [["b", "a"]] * 3
    assert [hits[0].score for hits in searches] == pytest.approx([1.0] * 3, abs=1e-5)


class Part(ClientPart):
    def fails(self, error: Exception) -> None:
        raise error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (psycopg.errors.DeadlockDetected("deadlock detected"), StoreUnavailable),
        (psycopg.errors.DiskFull("no space left"), StoreUnavailable),
        (psycopg.errors.InsufficientPrivilege("permission denied for table jobs"), StoreUnavailable),
        (psycopg.OperationalError("connection refused"), StoreUnavailable),
        (psycopg.InterfaceError("the connection is closed"), StoreUnavailable),
        (psycopg.errors.NumericValueOutOfRange("integer out of range"), InvalidInput),
        (psycopg.DataError("PostgreSQL text fields cannot contain NUL"), InvalidInput),
        (NotFound("it is ours"), NotFound),
        (ZeroDivisionError("the caller's own"), ZeroDivisionError),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True], ids=["psycopg", "sqlalchemy"])
def test_what_postgres_says_is_an_error_of_ours(
    error: Exception, kind: type[Exception], wrapped: bool, client: Client
) -> None:
    if wrapped and isinstance(error, psycopg.Error):
        error = sa.exc.DBAPIError.instance("SELECT secret", {}, error, psycopg.Error, hide_parameters=True)  # type: ignore[assignment]
    with pytest.raises(kind) as caught:
        Part(client._db, client._broker, client._settings).fails(error)
    assert type(caught.value) is kind
    assert "SELECT" not in str(caught.value)


def test_an_enqueue_of_nothing_that_can_be_iterated_writes_nothing(client: Client) -> None:
    before = client.jobs()
    for chunks in (5, None, object()):
        with pytest.raises(InvalidInput, match="chunks"):
            client.enqueue(chunks, collection="docs")  # type: ignore[arg-type]
    with pytest.raises(InvalidChunk):
        client.enqueue([b"ab"], collection="docs")
    assert client.jobs() == before
    assert client._space(None, OnLong.TRUNCATE).id == 1


def test_a_client_takes_any_setting_or_names_it() -> None:
    """No server is asked. All settings are given at once, because reading all takes as long as reading one."""
    for shown, make in ODD.items():
        given = {name: make() for name in Settings.model_fields}
        with pytest.raises(InvalidSetting) as caught:
            Settings.from_env(**given)
        said = str(caught.value)
        said.encode()
        assert "vector_storage (VECTOR_STORAGE): " in said, shown
        assert said.endswith("Fix the argument; docs/settings.md lists every setting.")
    for name in ("a", "", "\ud800", "x" * 300):
        with pytest.raises(InvalidSetting, match="there is no setting"):
            Client(**{name: 1})


def test_golden_queries_and_batchers_take_any_argument_or_name_it(filled: Client) -> None:
    wrong = []
    golden = filled.golden("docs")
    with filled.batcher("docs", max_chunks=10_000, max_seconds=1e9) as add:
        calls: list[tuple[str, Callable[[Any], Any]]] = [
            ("load(queries)", lambda odd: golden.load(odd, "qrels")),
            ("load(qrels)", lambda odd: golden.load("queries", odd)),
            ("from_titles", golden.from_titles),
            ("add(chunk)", add),
            ("add(id, text)", lambda odd: add(odd, "a text")),
            ("add(text)", lambda odd: add("a", odd)),
            ("add(metadata)", lambda odd: add("a", "a text", odd)),
        ]
        for what, call in calls:
            for shown, make in ODD.items():
                try:
                    call(make())
                except ChunkmillError as error:
                    str(error).encode()
                except Exception as error:  # noqa: BLE001 - the point of the test
                    wrong.append(f"{what} with {shown}: {type(error).__name__}: {str(error)[:100]}")
    assert not wrong, "\n".join(wrong)
    assert len(add.jobs) == 1
