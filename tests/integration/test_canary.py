"""The golden texts against a real database: who may serve a space, and who may not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill import Client, JobState
from chunkmill.db.connect import create_db
from chunkmill.errors import CanaryFailed
from chunkmill.models import resolve_spec
from chunkmill.settings import Settings
from chunkmill.spaces import canaries, registry
from chunkmill.spaces.registry import Space
from chunkmill_workers.engine.precision import cpu_has_bf16
from chunkmill_workers.engine.results import TextFailure, TokenBatchResult
from chunkmill_workers.local import canary
from chunkmill_workers.local.canary import embed_golden
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.engines import Engines
from chunkmill_workers.local.golden import TEXTS, VERSION
from chunkmill_workers.local.pipeline import TaskResult, run_chunk_batch
from chunkmill_workers.local.responder import EmbedResponder
from chunkmill_workers.process.lease import LeaseKeeper
from tests.integration.conftest import Runner
from tests.support import one_request
from tests.support.damaged_model import damaged_model
from tests.support.waiting import together


@pytest.fixture(autouse=True)
def _each_check_embeds(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "embed_golden", embed_golden)


@pytest.fixture(scope="module")
def odd_engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """A worker's engines on a disk that lost a part of the weights; nothing in the fingerprint shows it."""
    folder = damaged_model(tmp_path_factory.mktemp("odd") / "model")
    assert resolve_spec(str(folder)).fingerprint == resolve_spec("all-MiniLM-L6-v2").fingerprint
    return Engines(Settings.from_env(embedding_model=str(folder), embedding_dtype="fp32"), "cpu")


@pytest.fixture
def odd(settings: Settings, odd_engines: Engines) -> Iterator[WorkerContext]:
    """The drifting worker, with its model loaded and its space registered, before it hears its canary."""
    db = create_db(settings.require_database_url(), role="worker")
    odd_engines.left_to_others.clear()
    odd_engines.load_default(db)
    yield WorkerContext(settings, db, odd_engines, LeaseKeeper(db, settings.lease_seconds), name="odd-worker")
    db.dispose()


@pytest.fixture
def space(context: WorkerContext) -> Space:
    """The default model's space, with the reference that a healthy worker made."""
    with context.db.begin() as conn:
        registered = registry.register(conn, resolve_spec("all-MiniLM-L6-v2"))
    context.engine_for(registered)
    return registered


@pytest.fixture
def restarted(context: WorkerContext) -> Iterator[WorkerContext]:
    """A healthy worker that has heard no canary yet."""
    yield WorkerContext(context.settings, context.db, context.engines, context.leases, name="restarted")
    context.engines.left_to_others.clear()  # these engines serve other tests, too


def test_the_first_worker_makes_the_reference_and_signs_it(space: Space, context: WorkerContext) -> None:
    with context.db.begin() as conn:
        (kept,) = canaries.all_kept(conn)
        assert (kept.space_id, kept.version) == (space.id, VERSION)
        assert (kept.made_by.worker, kept.made_by.dtype) == ("test-worker", "float32")
        assert kept.made_by.device.startswith("cpu (")
        assert kept.made_by.versions.keys() >= {"chunkmill", "torch", "transformers", "tokenizers"}
        engine = context.engines.for_space(space)
        reference = canaries.find_or_keep(conn, space.id, VERSION, embed_golden(engine, space, "a second worker"))
        assert reference.made_by == kept.made_by  # what stands is not replaced
    golden = engine.embed(TEXTS)
    assert reference.vectors.shape == (len(TEXTS), 384)
    assert (reference.n_tokens == golden.n_tokens).all()
    assert reference.n_tokens.max() > 512 > engine.max_tokens  # one text is past the limit of this and most models
    assert abs(reference.vectors - golden.vectors).max() < 1e-5


def test_of_workers_that_are_first_at_once_one_makes_the_reference(context: WorkerContext) -> None:
    with context.db.begin() as conn:
        registered = registry.register(conn, resolve_spec("all-MiniLM-L6-v2"))
    engine = context.engines.for_space(registered)
    mine = embed_golden(engine, registered, "w")

    def keep(name: str) -> str:
        own = canaries.Canary(mine.vectors, mine.n_tokens, canaries.Maker(name, "cpu", "float32", {}))
        with context.db.begin() as conn:
            return canaries.find_or_keep(conn, registered.id, VERSION, own).made_by.worker

    assert len(set(together(*[partial(keep, f"w{i}") for i in range(8)]))) == 1


@pytest.mark.skipif(
    not cpu_has_bf16(), reason="this processor does not multiply bf16, and emulates it a hundred times slower"
)
def test_half_and_full_precision_share_a_space(space: Space, context: WorkerContext, settings: Settings) -> None:
    half = Engines(Settings.from_env(embedding_dtype="bf16"), "cpu")
    other = WorkerContext(settings, context.db, half, context.leases, name="half-worker")
    assert other.engine_for(space).dtype == "bfloat16"


def test_a_drifting_worker_leaves_its_chunk_batch_uncharged_to_a_healthy_one(
    space: Space, odd: WorkerContext, runner: Runner, client: Client, db: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    job = client.enqueue([(str(i), f"text {i}") for i in range(5)], collection="docs")
    assert run_chunk_batch(odd, 1) is TaskResult.RELEASED
    with db.begin() as conn:
        row = conn.execute(sa.text("SELECT * FROM chunk_batches")).one()
        assert (row.state, row.lease_owner, row.rung_at, row.max_attempts - row.attempt) == ("available", None, None, 5)
        assert row.error_code == "canary_failed"
        assert conn.execute(sa.text(f"SELECT count(*) FROM {space.table_name}")).scalar_one() == 0
        assert conn.execute(sa.text("SELECT contents, outcome FROM usage")).all() == [(0, "released")]
    for told in (row.error, caplog.text):
        assert "golden text" in told
        assert "odd-worker" in told
        assert "test-worker" in told
        assert f"chunkmill models canary --reset {space.spec.fingerprint[:12]}" in told
    assert list(odd.engines.unserved()) == [space.id]
    assert run_chunk_batch(odd, 1) is TaskResult.NOT_OURS  # nor does it try again at once
    job = runner.finish(job)
    assert (job.state, job.embedded) == (JobState.COMPLETED, 5)
    with db.begin() as conn:
        assert tuple(conn.execute(sa.text("SELECT error_code, error FROM chunk_batches")).one()) == (None, None)


def test_a_drifting_worker_answers_no_query(space: Space, odd: WorkerContext, context: WorkerContext) -> None:
    with odd.db.begin() as conn:
        request = one_request.ask(conn, space_id=space.id, kind="query", texts=["a query"])
    responder = EmbedResponder(odd)
    assert responder.answer_next()
    with odd.db.begin() as conn:
        assert one_request.take_answer(conn, request, dimensions=384) is None
        one_request.ask(conn, space_id=space.id, kind="query", texts=["the next one"])
    assert not responder.answer_next()  # left to other workers
    assert EmbedResponder(context).answer_next()
    with odd.db.begin() as conn:
        answer = one_request.take_answer(conn, request, dimensions=384)
        assert answer is not None
        assert answer.vectors is not None


def test_a_space_is_heard_once_per_engine_and_again_after_a_refusal(
    space: Space, odd: WorkerContext, context: WorkerContext, restarted: WorkerContext, db: sa.Engine
) -> None:
    with pytest.raises(CanaryFailed):
        odd.engine_for(space)
    with db.begin() as conn:
        assert canaries.forget(conn, space.id) == 1
    odd.engine_for(space)  # nothing to compare with: this one makes the reference
    context.engine_for(space)  # heard before, and not asked again
    with pytest.raises(CanaryFailed, match=r"This worker is restarted: .*The reference was made by odd-worker"):
        restarted.engine_for(space)


def test_an_engine_that_is_loaded_again_is_heard_again(
    space: Space, odd: WorkerContext, restarted: WorkerContext
) -> None:
    """Each engine is: what the one before it made says nothing about what this one reads from the disk."""
    good = restarted.engine_for(space)  # still there, in the thread that uses it
    restarted.engines = odd.engines
    for _ in range(2):
        with pytest.raises(CanaryFailed, match="drift"):
            restarted.engine_for(space)
    assert good is not odd.engines.for_space(space)


def test_each_space_of_a_model_has_its_own_reference(context: WorkerContext, runner: Runner, client: Client) -> None:
    long = "many words in one long text " * 80
    for on_long in ("truncate", "split"):
        runner.finish(client.enqueue([("a", long)], collection=on_long, on_long=on_long))
    with context.db.begin() as conn:
        kept = canaries.all_kept(conn)
        cut, split = (canaries._find(conn, one.space_id, VERSION) for one in kept)
    assert cut is not None
    assert split is not None
    differ = [bool(abs(a - b).max() > 1e-3) for a, b in zip(cut.vectors, split.vectors, strict=True)]
    assert differ == (cut.n_tokens > 256).tolist()  # as the space stores them: in windows, where the text is long


def test_a_reference_is_kept_and_forgotten_by_space_and_version(db: sa.Engine) -> None:
    def canary(value: float) -> canaries.Canary:
        maker = canaries.Maker(f"worker-{value}", "cpu", "float32", {})
        return canaries.Canary(np.full((2, 8), value, np.float32), np.array([3, 5], np.int32), maker)

    def kept(conn: sa.Connection, space_id: int, version: int) -> float:
        return float(canaries.find_or_keep(conn, space_id, version, canary(-1.0)).vectors[0, 0])

    with db.begin() as conn:
        spec = resolve_spec("all-MiniLM-L6-v2")
        one, two = (registry.register(conn, dataclasses.replace(spec, revision=f"sha256:{i}")).id for i in range(2))
        for value, (space_id, version) in enumerate([(one, 7), (one, 8), (two, 7)]):
            canaries.find_or_keep(conn, space_id, version, canary(value))
        assert [kept(conn, *of) for of in ((one, 7), (one, 8), (two, 7))] == [0.0, 1.0, 2.0]
        assert canaries.forget(conn, one) == 2
        assert [(reference.space_id, reference.version) for reference in canaries.all_kept(conn)] == [(two, 7)]
        assert kept(conn, one, 7) == -1.0  # the next worker's
        assert kept(conn, two, 7) == 2.0


def test_a_drifting_tokenizer_is_named(space: Space, restarted: WorkerContext, db: sa.Engine) -> None:
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE space_canaries SET n_tokens[9] = n_tokens[9] + 1"))
    with pytest.raises(CanaryFailed, match=r"golden text 8 has \d+ tokens here, \d+ in the reference"):
        restarted.engine_for(space)


@pytest.mark.parametrize("change", ["substr(vectors, 2)", "substr(vectors, 5)", "''::bytea"])
def test_a_damaged_reference_is_called_so(space: Space, restarted: WorkerContext, db: sa.Engine, change: str) -> None:
    with db.begin() as conn:
        conn.execute(sa.text(f"UPDATE space_canaries SET vectors = {change}"))
    with pytest.raises(CanaryFailed, match=r"damaged|another shape"):
        restarted.engine_for(space)


@pytest.mark.parametrize("code", ["not_finite", "forward_failed", "tokenize_failed"])
def test_an_engine_that_fails_on_a_golden_text_makes_no_reference(
    context: WorkerContext, db: sa.Engine, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """But where a tokenizer finds nothing in a text, that is the model's way, on every machine."""
    with db.begin() as conn:
        registered = registry.register(conn, resolve_spec("all-MiniLM-L6-v2"))
    engine = context.engines.for_space(registered)
    real = list(engine.stream(TEXTS))

    def one_fails(*args: object, **kwargs: object) -> Iterator[TokenBatchResult]:
        for result in real:
            keep = result.indices != 1
            yield dataclasses.replace(
                result,
                indices=result.indices[keep],
                vectors=result.vectors[keep],
                n_tokens=result.n_tokens[keep],
                truncated=result.truncated[keep],
                failures=() if keep.all() else (TextFailure(1, code, "a reason"),),
            )

    monkeypatch.setattr(engine, "stream", one_fails)
    if code == "tokenize_failed":
        context.engine_for(registered)
        with db.begin() as conn:
            reference = canaries._find(conn, registered.id, VERSION)
        assert reference is not None
        assert (reference.n_tokens[1], reference.n_tokens.min(initial=9, where=reference.n_tokens > 0)) == (0, 2)
        return
    with pytest.raises(CanaryFailed, match=f"golden text 1 got no vector .*{code}, a reason"):
        context.engine_for(registered)
    context.engines.left_to_others.clear()
    with db.begin() as conn:
        assert canaries.all_kept(conn) == []
