"""The engines that a worker has loaded: the default model's, and those of other models that jobs name."""

from __future__ import annotations

import dataclasses
import logging
import threading
import weakref
from collections import OrderedDict

import sqlalchemy as sa

from chunkmill.domain.reasons import reason_of
from chunkmill.domain.spaces import OnLong, Precision, SpaceSpec, long_text_for
from chunkmill.errors import ChunkmillError, DeviceFailed, ModelLoadError
from chunkmill.models import ModelFolder, resolve_model
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill.spaces.registry import Space
from chunkmill_workers.engine.engine import Engine, free_memory
from chunkmill_workers.engine.steps import StepClock
from chunkmill_workers.process.unserved import UnservedWork
from chunkmill_workers.tuning.tuned import load_engine, machine_for

logger = logging.getLogger(__name__)


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
        self.left_to_others = UnservedWork()
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

        Raises :class:`UnknownModel`, :class:`ModelLoadError`, :class:`InvalidSetting` or :class:`DeviceUnavailable` if
        this machine lacks the model, the operator's trust in it, the kernels of its precision or the memory, and
        :class:`SpaceMismatch` if it has other files under the same name. Then ``unserved`` lists the space.
        """
        try:
            engine = self._find(space)
            if engine is None:
                with self._loading:  # loading takes seconds, during which the other engines go on
                    engine = self._find(space)
                    if engine is None:
                        with self.loads.step():
                            engine = self._load_for(space)
        except ChunkmillError as lack:
            if not isinstance(lack, DeviceFailed):
                self.leave(space.id, lack)
            raise
        return engine

    def loaded(self, space: Space, *, use: bool = True) -> Engine | None:
        """The engine of a space, or None if it would have to be loaded. Without ``use`` it does not count as used."""
        return self._find(space, use=use)

    def leave(self, space_id: int, because: ChunkmillError) -> None:
        """Leave a space to other workers for a while."""
        self.left_to_others.leave(space_id, because)

    def unserved(self) -> dict[int, str]:
        """The ids of the spaces that are left to other workers for now, each with the reason."""
        return self.left_to_others.now()

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

    def _find(self, space: Space, *, use: bool = True) -> Engine | None:
        with self._mutex:
            for key, engine in self._engines.items():
                if _made_for(engine.spec, space) == space.spec.fingerprint:
                    if use:
                        self._engines.move_to_end(key)
                    return engine
        return None

    def _load_for(self, space: Space) -> Engine:
        """Load the model of a space. Whatever goes wrong, it is this machine's lack, unless the space's own files say
        otherwise."""
        spec = space.spec
        try:
            folder = self._read(spec.model, spec.precision)
            # Before the weights are loaded: what is wrong with other files says nothing about the space's.
            space.require_fingerprint(_made_for(folder.spec, space))
            return self._load(spec.model, folder)
        except ChunkmillError:
            raise
        except Exception as error:
            raise ModelLoadError(
                f"model {spec.model!r} cannot be loaded on {self._device} ({reason_of(error)}): check this machine's "
                "memory and the model's files; the worker's log has more."
            ) from error

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


def _made_for(made: SpaceSpec, space: Space) -> str:
    """The fingerprint of what an engine of ``made`` makes for ``space``. Vectors too short for it stay full."""
    dimensions = min(space.spec.dimensions, made.dimensions)
    long_text = long_text_for(space.spec.long_text.policy)
    return dataclasses.replace(made, long_text=long_text, dimensions=dimensions).fingerprint
