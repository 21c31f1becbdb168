"""The engines a worker has loaded: the default model's, and those that jobs name beside it."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import OrderedDict

import sqlalchemy as sa

from app.db import spaces
from app.db.spaces import Space
from app.domain.spaces import OnLong, long_text_for
from app.errors import ModelLoadError, SpaceMismatch, TokenizerMismatch, UnknownModel
from app.models import resolve_model
from app.settings import Settings
from workers.engine.engine import Engine

logger = logging.getLogger(__name__)

UNSERVED_SECONDS = 60.0
"""So long a worker leaves alone a space whose model it could not load, for others to take."""


class Engines:
    """One engine per model, shared by all task threads; the least recently used makes room for another."""

    def __init__(self, settings: Settings, device: str) -> None:
        self._settings = settings
        self._device = device
        self._engines: OrderedDict[str, Engine] = OrderedDict()
        self._unserved: dict[int, float] = {}
        self._mutex = threading.Lock()
        self._loading = threading.Lock()

    def load_default(self, db: sa.Engine) -> None:
        """Load the worker's own model and register its space, so that producers without its files find it."""
        engine = self._load(self._settings.embedding_model)
        with db.begin() as conn:
            spaces.register(conn, engine.spec, storage=self._settings.vector_storage)

    def for_space(self, space: Space) -> Engine:
        """The engine whose vectors belong into ``space``, whatever path its files were found under.

        Raises :class:`UnknownModel` or :class:`ModelLoadError` where this machine lacks the model, and
        :class:`SpaceMismatch` where it has other files under the same name; ``unserved`` names the space then.
        """
        try:
            engine = self._find(space)
            if engine is None:
                with self._loading:  # loading takes seconds; engines that are there go on meanwhile
                    engine = self._find(space) or self._load(space.spec.model)
            space.require_fingerprint(fingerprint(engine, _policy(space)))
        except (UnknownModel, ModelLoadError, TokenizerMismatch, SpaceMismatch):
            with self._mutex:
                self._unserved[space.id] = time.monotonic() + UNSERVED_SECONDS
            raise
        return engine

    def unserved(self) -> list[int]:
        """Ids of spaces to leave to other workers for now.

        A worker that lacks a model fails fast, so it would take most of that model's ChunkBatches and use
        up their attempts, while others could do the work.
        """
        now = time.monotonic()
        with self._mutex:
            return [space_id for space_id, until in self._unserved.items() if until > now]

    def _find(self, space: Space) -> Engine | None:
        with self._mutex:
            for model, engine in self._engines.items():
                if fingerprint(engine, _policy(space)) == space.spec.fingerprint:
                    self._engines.move_to_end(model)
                    return engine
        return None

    def _load(self, model: str) -> Engine:
        settings = self._settings
        folder = resolve_model(model, pooling=settings.embedding_pooling, download=True)
        with self._mutex:
            while len(self._engines) >= settings.embedding_engines:
                dropped, _ = self._engines.popitem(last=False)
                logger.info("dropped the engine of %s to make room", dropped)
        engine = Engine.load(
            folder,
            device=self._device,
            dtype=settings.embedding_dtype,
            batch_tokens=settings.embedding_batch_tokens or None,
        )
        with self._mutex:
            self._engines[model] = engine
        logger.info(
            "loaded %s on %s as %s, %s tokens per forward pass", model, engine.device, engine.dtype, engine.batch_tokens
        )
        return engine


def fingerprint(engine: Engine, on_long: OnLong) -> str:
    """The fingerprint of the vectors that ``engine`` makes under a policy."""
    return dataclasses.replace(engine.spec, long_text=long_text_for(on_long)).fingerprint


def _policy(space: Space) -> OnLong:
    return OnLong(space.spec.long_text.value)
