"""Our engine, as a worker loads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkmill.errors import InvalidSetting, ModelLoadError
from chunkmill_workers.benchmarks.peers.model import Model, Unavailable
from chunkmill_workers.engine import Engine


class OwnEngine:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._engine.embed(texts).vectors


def load(
    model: Model, *, options: Mapping[str, Any], setting: Mapping[str, Any], threads: int, device: str
) -> OwnEngine:
    try:
        return OwnEngine(Engine.load(model.name, device=device, threads=threads, **options, **setting))
    except (InvalidSetting, ModelLoadError) as error:
        if options.keys() <= {"dtype"}:
            raise  # the engine as a worker takes it by itself has to run
        raise Unavailable(str(error)) from None  # no kernels for this precision, no export for this backend
