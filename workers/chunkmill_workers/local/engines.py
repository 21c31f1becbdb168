"""The engines that a worker has loaded: the default model's, and those of other models that jobs name."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
import weakref
from collections import OrderedDict

import sqlalchemy as sa

from chunkmill.domain.spaces import OnLong, Precision, long_text_for
from chunkmill.errors import InvalidSetting, ModelLoadError, SpaceMismatch, TokenizerMismatch, UnknownModel
from chunkmill.models import ModelFolder, resolve_model
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill.spaces.registry import Space
from chunkmill_workers.engine.engine import Engine, free_memory
from chunkmill_workers.engine.steps import StepClock
from chunkmill_workers.tuning.tuned import load_engine, machine_for

logger = logging.getLogger(__name__)

UNSERVED_SECONDS = 60.0
"""How long a worker leaves a space to other workers after it could not load its model."""


class Engines:
    """One engine per model and precision, shared by all task threads. The least recently used one is dropped first.

    An engine makes full vectors and serves all spaces that cut them (see ``chunkmill_workers.engine.matryoshka``).
    """

    def __init__(self, settings: Settings, device: str) -> None:
        self._settings = settings
        self._device = device
        self._machine = machine_for(device)
        self._engines: OrderedDict[tuple[str, Precision], Engine] = OrderedDict()
        self._living: weakref.WeakSet[Engine] = weakref.WeakSet()
        """All engines that exist, including dropped ones that a thread still uses."""
        self.loads = StepClock()
        """Models that are being downloaded or loaded."""
        self._unserved: dict[int, float] = {}
        self._mutex = threading.Lock()
        self._loading = threading.Lock()

    def load_default(self, db: sa.Engine) -> Space:
        """Load the worker's own model and register its space, so that producers that lack its files find it."""
        settings = self._settings
        folder = self._read(settings.embedding_model, settings.embedding_precision)
        spec = folder.space(settings.embedding_dimensions)  # a wrong number is refused before the weights are loaded
        self._load(settings.embedding_model, folder)
        with db.begin() as conn:
            return registry.register(conn, spec, storage=settings.vector_storage)

    def for_space(self, space: Space) -> Engine:
        """The engine whose vectors belong into ``space``, whatever path its files were found under.

        Raises :class:`UnknownModel`, :class:`ModelLoadError` or :class:`InvalidSetting` if this machine lacks the
        model, the operator's trust in it or the kernels of its precision, and :class:`SpaceMismatch` if it has other
        files under the same name. Then ``unserved`` lists the space.
        """
        try:
            engine = self._find(space)
            if engine is None:
                with self._loading:  # loading takes seconds, during which the other engines go on
                    engine = self._find(space)
                    if engine is None:
                        with self.loads.step():
                            engine = self._load(space.spec.model, self._read_for(space))
            space.require_fingerprint(_made_for(engine, space))
        except (UnknownModel, InvalidSetting, ModelLoadError, TokenizerMismatch, SpaceMismatch):
            self.leave(space)
            raise
        return engine

    def leave(self, space: Space) -> None:
        """Leave a space to other workers for a while."""
        with self._mutex:
            self._unserved[space.id] = time.monotonic() + UNSERVED_SECONDS

    def unserved(self) -> list[int]:
        """The ids of the spaces that are left to other workers for now.

        A worker that lacks a model fails fast. So it would take most of that model's ChunkBatches and use up their
        attempts, although others could do the work.
        """
        now = time.monotonic()
        with self._mutex:
            return [space_id for space_id, until in self._unserved.items() if until > now]

    def longest_step(self) -> tuple[float, str]:
        """How many seconds the longest forward pass or tokenizer call has been running, and which of the two it is.

        (0.0, "") if none is running.
        """
        return max(((step.longest(), what) for what, step in self._steps()), default=(0.0, ""))

    def quiet(self) -> float:
        """Seconds since the last step or load of any engine ended; 0.0 while one is running."""
        return min(step.quiet() for step in [self.loads, *(step for _, step in self._steps())])

    def _steps(self) -> list[tuple[str, StepClock]]:
        with self._mutex:
            return [step for engine in self._living for step in engine.steps.items()]

    def _find(self, space: Space) -> Engine | None:
        with self._mutex:
            for key, engine in self._engines.items():
                if _made_for(engine, space) == space.spec.fingerprint:
                    self._engines.move_to_end(key)
                    return engine
        return None

    def _read_for(self, space: Space) -> ModelFolder:
        return self._read(space.spec.model, space.spec.precision)

    def _read(self, model: str, precision: Precision) -> ModelFolder:
        settings = self._settings
        return resolve_model(
            model, pooling=settings.embedding_pooling, precision=precision, trust=settings.trust, download=True
        )

    def _load(self, model: str, folder: ModelFolder) -> Engine:
        precision = folder.spec.precision
        self._make_room()
        engine = load_engine(self._settings, folder, self._device, self._machine)
        with self._mutex:
            self._engines[model, precision] = engine
            self._living.add(engine)
        logger.info(
            "loaded %s on %s: %s in %s, %s tokens per forward pass",
            model, engine.device, engine.backend, engine.dtype, engine.batch_tokens,
        )  # fmt: skip
        return engine

    def _make_room(self) -> None:
        """Drop the engines that were used least recently, and free their memory before the next model is loaded.

        An engine that a thread still uses is freed when that thread is done.
        """
        while True:
            with self._mutex:
                if len(self._engines) < self._settings.embedding_engines:
                    return
                (name, _), engine = self._engines.popitem(last=False)
            engine.close()
            del engine
            free_memory(self._device)
            logger.info("dropped the engine of %s to make room", name)


def fingerprint(engine: Engine, on_long: OnLong, dimensions: int) -> str:
    """The fingerprint of the vectors that ``engine`` makes under a policy, cut to ``dimensions``."""
    return dataclasses.replace(engine.spec, long_text=long_text_for(on_long), dimensions=dimensions).fingerprint


def _made_for(engine: Engine, space: Space) -> str:
    """The fingerprint of what ``engine`` makes for ``space``. Vectors too short for it stay full."""
    return fingerprint(engine, space.spec.long_text.policy, min(space.spec.dimensions, engine.dimensions))
