"""Which requests are embedded together, in which order, and what becomes of those that nobody waits for."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from chunkmill.domain.embedded import EmbeddedTexts
from chunkmill.errors import DeviceFailed, EngineError, ModelLoadError
from chunkmill.models import DEFAULT_SPEC
from chunkmill.spaces.registry import Space
from chunkmill_workers.engine.loop import URGENT_RUN
from chunkmill_workers.engine.results import TextFailure, TokenBatchResult
from chunkmill_workers.local import embedder as embedder_module
from chunkmill_workers.local.embedder import (
    SLICE_TEXTS,
    AwaitedRequest,
    Kind,
    NobodyWaits,
    RequestEmbedder,
    WorkerLeaves,
)
from tests.support.waiting import PATIENCE, running, until

SPEC = dataclasses.replace(DEFAULT_SPEC, dimensions=2, normalize=False)
ONE, OTHER = (Space(number, dataclasses.replace(SPEC, model=f"org/{number}"), "vector") for number in (11, 12))


class FakeEngine:
    """Answers the text "7" with the vector (7, 7), some texts in each pass."""

    def __init__(self, per_pass: int = 1_000) -> None:
        self.calls: list[list[str]] = []
        self.large: list[bool] = []
        self.passes = 0
        self.per_pass = per_pass
        self.before: Callable[[list[str]], object] = lambda texts: None
        """Called at the beginning of each call."""
        self.between: Callable[[], object] = lambda: None
        """Called after each pass."""
        self.failing: set[str] = set()

    def stream(
        self, texts: Sequence[str], *, stop: Callable[[], bool], urgent: bool, large: bool, **_: object
    ) -> Iterator[TokenBatchResult]:
        assert urgent
        self.calls.append(list(texts))
        self.large.append(large)
        self.before(list(texts))
        for first in range(0, len(texts), self.per_pass):
            if stop():
                return
            self.passes += 1
            at = np.arange(first, min(first + self.per_pass, len(texts)), dtype=np.int32)
            good = np.array([i for i in at if texts[i] not in self.failing], np.int32)
            values = np.array([float(texts[i]) for i in good], np.float32)
            yield TokenBatchResult(
                good,
                np.repeat(values[:, None], 2, axis=1),
                (values + 3).astype(np.int32),
                values > 1_000,
                tuple(TextFailure(int(i), "not_finite", "no") for i in at if texts[i] in self.failing),
                0.01,
                tokens=len(at),
            )
            self.between()


class FakeModels:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.loaded = {ONE.id, OTHER.id}
        self.hold: threading.Event | None = None
        self.error: Exception | None = None
        self.loads: list[int] = []

    def ready_engine(self, space: Space) -> Any:
        return self.engine if space.id in self.loaded else None

    def engine_for(self, space: Space) -> Any:
        self.loads.append(space.id)
        if self.hold is not None:
            assert self.hold.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        return self.engine


class Asker:
    """Submits requests, and keeps what came of each under its name."""

    def __init__(self, embedder: RequestEmbedder) -> None:
        self.embedder = embedder
        self.answers: dict[str, EmbeddedTexts] = {}
        self.errors: dict[str, Exception] = {}
        self.withdrawn: set[str] = set()

    def ask(
        self, name: str, *texts: object, space: Space = ONE, kind: Kind = "query", urgency: int = 0, **more: Any
    ) -> None:
        self.embedder.submit(
            AwaitedRequest(
                space,
                kind,
                tuple(map(str, texts)),
                on_answer=lambda answer: self.answers.__setitem__(name, answer),
                on_error=lambda error: self.errors.__setitem__(name, error),
                is_wanted=lambda: name not in self.withdrawn,
                urgency=urgency,
                **more,
            )
        )

    def values(self) -> dict[str, list[float]]:
        return {name: answer.vectors[:, 0].tolist() for name, answer in self.answers.items()}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def models(engine: FakeEngine) -> FakeModels:
    return FakeModels(engine)


@pytest.fixture
def embedder(models: FakeModels) -> Iterator[RequestEmbedder]:
    made = RequestEmbedder(models)
    yield made
    made.close()
    made.join(PATIENCE)


@pytest.fixture
def asker(embedder: RequestEmbedder) -> Asker:
    return Asker(embedder)


def test_what_waits_is_embedded_together_and_each_gets_its_own(
    embedder: RequestEmbedder, asker: Asker, engine: FakeEngine
) -> None:
    asker.ask("a", 1, 2_000)
    asker.ask("b", 3)
    asker.ask("none")
    embedder.settle()
    assert engine.calls == [["1", "2000", "3"]]
    assert asker.values() == {"a": [1, 2_000], "b": [3], "none": []}
    assert asker.answers["a"].tokens.tolist() == [4, 2_003]
    assert asker.answers["a"].truncated.tolist() == [False, True]
    assert asker.answers["none"].vectors.shape == (0, 2)
    assert (asker.errors, embedder.n_open) == ({}, 0)


def test_what_came_while_slices_were_computed_is_embedded_together_next(
    embedder: RequestEmbedder, asker: Asker, engine: FakeEngine
) -> None:
    go_on = threading.Event()
    engine.before = lambda texts: go_on.wait(PATIENCE)
    embedder.start()
    for name in "ab":
        asker.ask(name, 1)
        until(lambda name=name: len(engine.calls) == "ab".index(name) + 1)
    for n in range(20):
        asker.ask(f"later {n}", n)
    go_on.set()
    until(lambda: not embedder.n_open)
    assert sorted(map(len, engine.calls)) == [1, 1, 20]
    assert asker.values()["later 7"] == [7]


@pytest.mark.parametrize("two", [{"space": OTHER}, {"kind": "document"}], ids=["spaces", "kinds"])
def test_two_spaces_or_kinds_do_not_share_a_call(
    two: dict[str, Any], embedder: RequestEmbedder, asker: Asker, engine: FakeEngine
) -> None:
    for n in range(3):
        asker.ask(f"a{n}", n)
        asker.ask(f"b{n}", 10 + n, **two)
    embedder.settle()
    assert engine.calls == [["0", "1", "2"], ["10", "11", "12"]]


def test_an_interactive_request_goes_between_the_slices_of_a_large_one(
    embedder: RequestEmbedder, asker: Asker, engine: FakeEngine
) -> None:
    asker.ask("large", *range(3 * SLICE_TEXTS), urgency=1)
    engine.before = lambda texts: len(engine.calls) == 1 and asker.ask("short", 5_000)
    embedder.settle()
    assert [len(call) for call in engine.calls] == [SLICE_TEXTS, 1, SLICE_TEXTS, SLICE_TEXTS]
    assert engine.large == [True, False, True, True]
    assert asker.values() == {"short": [5_000], "large": list(range(3 * SLICE_TEXTS))}
    assert list(asker.answers) == ["short", "large"]


@pytest.mark.parametrize("texts", [range(SLICE_TEXTS + 1), ["9" * 17_000]], ids=["many", "long"])
def test_many_or_long_texts_are_not_interactive_whatever_their_caller_says(
    texts: Sequence[object], embedder: RequestEmbedder, asker: Asker, engine: FakeEngine
) -> None:
    asker.ask("large", *texts)
    embedder.settle()
    assert all(engine.large)


def test_a_flood_of_interactive_requests_does_not_stop_a_large_one(
    embedder: RequestEmbedder, asker: Asker, engine: FakeEngine
) -> None:
    asker.ask("large", *range(2 * SLICE_TEXTS), urgency=1)
    asker.ask("first", 7)

    def ask_again(_: list[str]) -> None:
        if "large" not in asker.answers and len(engine.calls) < 4 * URGENT_RUN:
            asker.ask(f"next {len(engine.calls)}", 7)

    engine.before = ask_again
    embedder.settle()
    places = [place for place, large in enumerate(engine.large) if large]
    assert places == [URGENT_RUN, 2 * URGENT_RUN + 1]


def test_callers_take_turns_slice_by_slice(embedder: RequestEmbedder, asker: Asker, engine: FakeEngine) -> None:
    for n in range(3):
        asker.ask(f"busy {n}", *[1] * SLICE_TEXTS, urgency=1, caller="busy")
    asker.ask("other", *[2] * (SLICE_TEXTS + 8), urgency=1, caller="other")
    asker.ask("nameless", *[3] * SLICE_TEXTS, urgency=1)
    asker.ask("nameless too", *[4] * SLICE_TEXTS, urgency=1)
    embedder.settle()
    assert [call[0] for call in engine.calls] == ["1", "2", "3", "4", "1", "2", "1"]
    assert engine.calls[5] == ["2"] * 8 + ["1"] * 24
    assert len(asker.answers) == 6


def test_one_caller_with_many_interactive_requests_does_not_hold_up_another(
    embedder: RequestEmbedder, asker: Asker, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedder_module, "TOGETHER_TEXTS", 4)
    for n in range(9):
        asker.ask(f"busy {n}", n, caller="busy")
    asker.ask("other", 99, caller="other")
    embedder.settle()
    assert engine.calls == [["0", "99", "1", "2"], ["3", "4", "5", "6"], ["7", "8"]]


def test_a_text_that_fails_fails_its_own_request_alone(
    embedder: RequestEmbedder, asker: Asker, engine: FakeEngine
) -> None:
    engine.failing = {"4"}
    asker.ask("a", 1, 2)
    asker.ask("b", 3, 4, 5)
    asker.ask("c", 6)
    embedder.settle()
    assert asker.values() == {"a": [1, 2], "c": [6]}
    assert list(asker.errors) == ["b"]
    assert isinstance(asker.errors["b"], EngineError)
    assert str(asker.errors["b"]) == "text 1 of 3 got no vector: not_finite, no"


def test_the_failing_text_of_a_large_request_has_its_own_number_and_ends_it(
    embedder: RequestEmbedder, asker: Asker, engine: FakeEngine
) -> None:
    engine.failing = {str(SLICE_TEXTS + 3)}
    asker.ask("large", *range(3 * SLICE_TEXTS), urgency=1)
    embedder.settle()
    assert str(asker.errors["large"]).startswith(f"text {SLICE_TEXTS + 3} of {3 * SLICE_TEXTS} ")
    assert len(engine.calls) == 2, "the third slice is for nobody"


def test_if_a_call_breaks_each_request_has_one_of_its_own(
    embedder: RequestEmbedder, asker: Asker, engine: FakeEngine
) -> None:
    engine.per_pass = 1

    def breaks(texts: list[str]) -> None:
        if "13" in texts:
            raise ValueError("a defect that SECRET shows")

    engine.before = breaks
    for name, text in (("a", 1), ("b", 13), ("c", 3)):
        asker.ask(name, text)
    embedder.settle()
    assert asker.values() == {"a": [1], "c": [3]}
    assert isinstance(asker.errors["b"], ValueError)


def test_a_broken_device_is_told_once_and_is_not_tried_with_each_request(
    embedder: RequestEmbedder, asker: Asker, engine: FakeEngine
) -> None:
    def gone(_: list[str]) -> None:
        raise DeviceFailed("it is gone")

    engine.before = gone
    asker.ask("a", 1)
    asker.ask("b", 2)
    embedder.settle()
    assert len(engine.calls) == 1
    assert {name: type(error) for name, error in asker.errors.items()} == {"a": DeviceFailed, "b": DeviceFailed}


def test_what_nobody_waits_for_is_not_computed(embedder: RequestEmbedder, asker: Asker, engine: FakeEngine) -> None:
    asker.ask("late", 1, deadline=time.monotonic() - 1)
    asker.ask("withdrawn", 2)
    asker.ask("wanted", 3, deadline=time.monotonic() + 1_000)
    asker.withdrawn.add("withdrawn")
    embedder.settle()
    assert engine.calls == [["3"]]
    assert {name: type(error) for name, error in asker.errors.items()} == {
        "late": NobodyWaits,
        "withdrawn": NobodyWaits,
    }


def test_a_large_request_that_is_withdrawn_has_no_further_slice(
    embedder: RequestEmbedder, asker: Asker, engine: FakeEngine
) -> None:
    asker.ask("large", *range(5 * SLICE_TEXTS), urgency=1)
    engine.between = lambda: len(engine.calls) == 2 and asker.withdrawn.add("large")
    embedder.settle()
    assert len(engine.calls) == 2
    assert isinstance(asker.errors["large"], NobodyWaits)


def test_a_slice_ends_early_once_none_of_its_callers_waits(
    embedder: RequestEmbedder, asker: Asker, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedder_module, "ASK_AGAIN_SECONDS", 0.0)
    engine.per_pass = 4
    asker.ask("a", *range(10))
    asker.ask("b", *range(10))
    engine.between = lambda: asker.withdrawn.add("ab"[min(engine.passes - 1, 1)])
    embedder.settle()
    assert engine.passes == 2, "after the first pass b still waited"
    assert {type(error) for error in asker.errors.values()} == {NobodyWaits}


def test_an_answer_is_given_with_the_pass_of_its_last_text(models: FakeModels, engine: FakeEngine) -> None:
    engine.per_pass = 2
    landed: list[set[str]] = []
    embedder = RequestEmbedder(models, on_landed=lambda: landed.append(set(asker.answers)))
    asker = Asker(embedder)
    for n in range(4):
        asker.ask(f"{n}", n)
    engine.between = lambda: landed.append({"the next pass"})
    embedder.settle()
    assert landed[:3] == [{"0", "1"}, {"the next pass"}, {"0", "1", "2", "3"}]


def test_a_model_is_loaded_aside_while_requests_of_other_spaces_are_answered(
    embedder: RequestEmbedder, asker: Asker, models: FakeModels
) -> None:
    models.loaded.discard(OTHER.id)
    models.hold = threading.Event()
    asker.ask("must load", 1, space=OTHER)
    asker.ask("loads too", *range(2 * SLICE_TEXTS), space=OTHER, kind="document", urgency=1)
    with running(embedder.settle, release=models.hold.set):
        until(lambda: models.loads)
        for n in range(3):
            asker.ask(f"{n}", n)
        until(lambda: len(asker.answers) == 3)
        asker.ask("came later", 7, space=OTHER)
        assert embedder.loading == [OTHER.id]
        assert set(asker.answers) == {"0", "1", "2"}
    assert {"must load", "loads too", "came later"} < set(asker.answers)
    assert models.loads == [OTHER.id], "the engine that was loaded answers, even if it was dropped since"


def test_a_model_that_cannot_be_loaded_is_told_to_all_that_wait_for_it(
    embedder: RequestEmbedder, asker: Asker, models: FakeModels
) -> None:
    models.loaded.discard(OTHER.id)
    models.error = ModelLoadError("its weights are damaged")
    asker.ask("a", 1, space=OTHER)
    asker.ask("b", 1, space=OTHER, urgency=1)
    asker.ask("fine", 2)
    embedder.settle()
    assert asker.errors == {"a": models.error, "b": models.error}
    assert asker.values() == {"fine": [2]}


def test_if_it_cannot_be_told_whether_a_model_is_loaded_its_requests_are_answered_all_the_same(
    embedder: RequestEmbedder, asker: Asker, models: FakeModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of the embedder that ended would leave the worker deaf."""

    def ready_engine(space: Space) -> Any:
        if space is OTHER:
            raise RuntimeError("the device is gone")
        return models.engine

    monkeypatch.setattr(models, "ready_engine", ready_engine)
    asker.ask("a", 1, space=OTHER)
    asker.ask("fine", 2)
    embedder.settle()
    assert asker.values() == {"a": [1], "fine": [2]}


def test_who_waits_for_a_model_past_the_deadline_is_let_go(
    embedder: RequestEmbedder, asker: Asker, models: FakeModels
) -> None:
    models.loaded.discard(OTHER.id)
    models.hold = threading.Event()
    asker.ask("late", 1, space=OTHER, deadline=time.monotonic() - 1)
    asker.ask("patient", 1, space=OTHER, deadline=time.monotonic() + 1_000)
    with running(embedder.settle, release=models.hold.set):
        until(lambda: models.loads)
        embedder.drop_late()
        assert list(asker.errors) == ["late"]
    assert list(asker.answers) == ["patient"]


def test_a_lane_that_is_closed_gives_back_what_waits_and_answers_what_it_computes(
    embedder: RequestEmbedder, asker: Asker, engine: FakeEngine
) -> None:
    go_on = threading.Event()
    engine.before = lambda texts: go_on.wait(PATIENCE)
    embedder.start()
    asker.ask("computed", 1)
    until(lambda: engine.calls)
    for n in range(2):
        asker.ask(f"large {n}", *range(9 * SLICE_TEXTS), urgency=1)
    until(lambda: len(engine.calls) == 3)
    embedder.close()
    asker.ask("too late", 1)
    go_on.set()
    embedder.join(PATIENCE)
    assert asker.values() == {"computed": [1]}
    assert {name: type(error) for name, error in asker.errors.items()} == dict.fromkeys(
        ("large 0", "large 1", "too late"), WorkerLeaves
    )


def test_slices_of_one_request_that_land_at_once_make_one_answer(
    embedder: RequestEmbedder, asker: Asker, engine: FakeEngine
) -> None:
    engine.per_pass = 1
    embedder.start()
    for n in range(6):
        asker.ask(f"{n}", *range(n, n + 4 * SLICE_TEXTS), urgency=1)
    until(lambda: not embedder.n_open)
    assert asker.errors == {}
    assert asker.values() == {f"{n}": list(range(n, n + 4 * SLICE_TEXTS)) for n in range(6)}


def test_two_slices_of_a_large_request_are_under_way_and_interactive_ones_are_computed_beside_them(
    embedder: RequestEmbedder, asker: Asker, engine: FakeEngine
) -> None:
    """The texts of one slice are made ready while those of another are computed."""
    go_on = threading.Event()
    engine.before = lambda texts: texts == ["7"] or go_on.wait(PATIENCE)
    embedder.start()
    asker.ask("large", *range(100, 100 + 9 * SLICE_TEXTS), urgency=1)
    until(lambda: len(engine.calls) == 2)
    asker.ask("short", 7)
    until(lambda: asker.answers)
    go_on.set()
    assert asker.values() == {"short": [7]}
    until(lambda: len(asker.answers) == 2)


def test_a_callback_that_raises_ends_no_thread_and_no_other_request(
    embedder: RequestEmbedder, asker: Asker, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(_: object) -> None:
        raise ValueError("the socket is gone")

    embedder.submit(AwaitedRequest(ONE, "query", ("1",), on_answer=breaks, on_error=breaks))
    asker.ask("a", 2)
    embedder.settle()
    assert asker.values() == {"a": [2]}
    assert "an answer could not be handed over" in caplog.text
