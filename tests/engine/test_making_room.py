"""An engine that makes room has freed its memory before the next model is loaded."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chunkmill.models import resolve_model
from chunkmill.settings import Settings
from chunkmill.spaces.registry import Space
from chunkmill_workers.engine import Engine
from chunkmill_workers.local import engines as engines_module
from chunkmill_workers.local.engines import Engines


def spaces_of(*paths: Path) -> list[Space]:
    return [Space(number, resolve_model(str(path)).spec, "vector") for number, path in enumerate(paths, 1)]


def test_an_idle_engine_that_makes_room_is_gone_before_the_next_model_is_loaded(
    toy_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = spaces_of(toy_path("bert-mean"), toy_path("xlm-roberta-cls"))
    engines = Engines(Settings.from_env(embedding_engines=1), "cpu")
    engine = engines.for_space(first)
    engine.embed(["a text", "another"])  # its device threads are idle now, and would stay so for 10 s
    backend, weights = weakref.ref(engine._backend), weakref.ref(engine._backend._encoder.words)  # type: ignore[attr-defined]
    del engine
    alive: list[bool] = []
    load = engines_module.load_engine

    def noted(*arguments: Any) -> Engine:
        alive.append(backend() is not None or weights() is not None)
        return load(*arguments)

    monkeypatch.setattr(engines_module, "load_engine", noted)

    engines.for_space(second)

    assert alive == [False]


def test_an_engine_that_made_room_still_serves_whoever_has_it(toy_path: Callable[[str], Path]) -> None:
    first, second = spaces_of(toy_path("bert-mean"), toy_path("xlm-roberta-cls"))
    engines = Engines(Settings.from_env(embedding_engines=1), "cpu")
    engine = engines.for_space(first)
    stream = engine.stream(["a text"] * 40)
    next(stream)  # tokenized; the passes run

    engines.for_space(second)

    assert sum(len(result.indices) for result in stream) == 40
    assert engine.embed(["later"]).vectors.shape == (1, 32)
    assert dataclasses.replace(first).spec == engine.spec
