"""Which engines a worker keeps, which make room, and which of them the watchdog sees."""

from __future__ import annotations

import dataclasses
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from chunkmill.domain.spaces import Precision
from chunkmill.errors import ModelLoadError
from chunkmill.models import DEFAULT_SPEC
from chunkmill.settings import Settings
from chunkmill.spaces.registry import Space
from chunkmill_workers.engine.steps import StepClock
from chunkmill_workers.local import engines as engines_module
from chunkmill_workers.local.engines import Engines
from chunkmill_workers.process.unserved import UNSERVED_SECONDS
from tests.support.waiting import PATIENCE, until

SPACES = {
    name: Space(number, dataclasses.replace(DEFAULT_SPEC, model=f"org/{name}", revision=f"digest:{name}"), "vector")
    for number, name in enumerate(("a", "b", "c"), start=11)
}


class StandIn(SimpleNamespace):
    """For an engine, which is known by its identity and held by a weak reference too."""

    __hash__ = object.__hash__


class Loading:
    """In the place of the loader: notes what is loaded, and fails or waits if it is told to."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.error: Exception | None = None
        self.hold: threading.Event | None = None

    def read(self, model: str, **_: Any) -> Any:
        return SimpleNamespace(spec=next(space.spec for space in SPACES.values() if space.spec.model == model))

    def load(self, settings: Settings, folder: Any, device: str, machine: Any) -> Any:
        self.loaded.append(folder.spec.model.removeprefix("org/"))
        if self.hold is not None:
            assert self.hold.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        steps = {"a forward pass": StepClock(), "a call of the tokenizer": StepClock()}
        attributes = {"device": "cpu", "backend": "", "dtype": "float32", "batch_tokens": 1, "dimensions": 384}
        return StandIn(spec=folder.spec, steps=steps, close=lambda: None, **attributes)


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> Loading:
    made = Loading()
    monkeypatch.setattr(engines_module, "resolve_model", made.read)
    monkeypatch.setattr(engines_module, "load_engine", made.load)
    return made


@pytest.fixture
def engines(loading: Loading) -> Engines:
    """Room for two."""
    return Engines(Settings.from_env(embedding_engines=2), "cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    turned = SimpleNamespace(now=1e6, monotonic=lambda: turned.now)
    for module in ("chunkmill_workers.process.unserved", "chunkmill_workers.engine.steps"):
        monkeypatch.setattr(f"{module}.time", turned)
    return turned


def use(engines: Engines, *names: str) -> list[str]:
    return [engines.for_space(SPACES[name]).spec.model.removeprefix("org/") for name in names]


def test_the_engine_that_was_used_least_recently_makes_room(engines: Engines, loading: Loading) -> None:
    assert use(engines, *"abac") == ["a", "b", "a", "c"]
    assert loading.loaded == ["a", "b", "c"]
    use(engines, *"ac")
    assert loading.loaded == ["a", "b", "c"], "the one that was used since stayed"
    use(engines, "b")
    assert loading.loaded == ["a", "b", "c", "b"]
    use(engines, "c")
    assert loading.loaded == ["a", "b", "c", "b"]


def test_two_precisions_of_one_model_are_two_engines(
    engines: Engines, loading: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = SPACES["a"]
    small = Space(21, dataclasses.replace(whole.spec, precision=Precision.INT8), "vector")
    specs = {space.spec.precision: space.spec for space in (whole, small)}
    monkeypatch.setattr(
        engines_module, "resolve_model", lambda model, *, precision, **_: SimpleNamespace(spec=specs[precision])
    )
    for _ in range(2):
        assert [engines.for_space(space).spec.precision for space in (whole, small)] == [*specs]
    assert loading.loaded == ["a", "a"]


def test_threads_that_need_one_model_at_once_load_it_once(
    engines: Engines, loading: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading.hold = threading.Event()
    missed: set[int] = set()
    got: list[Any] = []
    real = engines._find

    def find(space: Space) -> Any:
        engine = real(space)
        if engine is None:
            missed.add(threading.get_ident())
        return engine

    monkeypatch.setattr(engines, "_find", find)
    threads = [
        threading.Thread(target=lambda: got.append(engines.for_space(SPACES["a"])), daemon=True) for _ in range(3)
    ]
    try:
        for thread in threads:
            thread.start()
        until(lambda: len(missed) == 3)
    finally:
        loading.hold.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert loading.loaded == ["a"]
    assert len(got) == 3
    assert len({id(engine) for engine in got}) == 1


def test_a_space_whose_model_could_not_be_loaded_is_left_to_others_for_a_while(
    engines: Engines, loading: Loading, clock: SimpleNamespace
) -> None:
    loading.error = ModelLoadError("its weights are damaged")
    with pytest.raises(ModelLoadError):
        engines.for_space(SPACES["a"])
    clock.now += UNSERVED_SECONDS / 2
    with pytest.raises(ModelLoadError):
        engines.for_space(SPACES["b"])
    assert engines.unserved() == dict.fromkeys((11, 12), "its weights are damaged")
    clock.now += UNSERVED_SECONDS / 2
    assert list(engines.unserved()) == [12]
    clock.now += UNSERVED_SECONDS / 2
    assert engines.unserved() == {}


def test_a_step_that_hangs_in_an_engine_that_made_room_is_seen(engines: Engines, clock: SimpleNamespace) -> None:
    """Its model is no longer the worker's, but the thread that is in it holds the device."""
    dropped = engines.for_space(SPACES["a"])
    with dropped.steps["a call of the tokenizer"].step():
        use(engines, "b", "c")
        clock.now += 100
        with engines.for_space(SPACES["c"]).steps["a forward pass"].step():
            clock.now += 5
            assert engines.longest_step() == (105, "a call of the tokenizer")
        assert engines.quiet() == 0.0
    clock.now += 7
    assert (engines.longest_step()[0], engines.quiet()) == (0.0, 7)


def test_the_load_of_a_model_is_no_step_and_no_quiet(engines: Engines, clock: SimpleNamespace) -> None:
    use(engines, "a")
    with engines.loads.step():
        clock.now += 50
        assert (engines.longest_step()[0], engines.loads.longest(), engines.quiet()) == (0.0, 50, 0.0)
