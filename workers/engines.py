"""The engines a worker has loaded: the default model's, and those that jobs name beside it."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import OrderedDict

import sqlalchemy as sa

from app.db import spaces
from app.db.spaces import Space
from app.domain.spaces import OnLong, long_text_for
from app.models import resolve_model
from app.settings import Settings
from workers.engine.engine import Engine

logger = logging.getLogger(__name__)


class Engines:
    """One engine per model, shared by all task threads; the least recently used makes room for another."""

    def __init__(self, settings: Settings, device: str) -> None:
        self._settings = settings
        self._device = device
        self._engines: OrderedDict[str, Engine] = OrderedDict()
        self._mutex = threading.Lock()

    def load_default(self, db: sa.Engine) -> None:
        """Load the worker's own model and register its space, so that producers without its files find it."""
        engine = self._load(self._settings.embedding_model)
        with db.begin() as conn:
            spaces.register(conn, engine.spec, storage=self._settings.vector_storage)

    def for_space(self, space: Space) -> Engine:
        """The engine whose vectors belong into ``space``.

        Raises :class:`UnknownModel` or :class:`ModelLoadError` where this machine lacks the model, and
        :class:`SpaceMismatch` where it has other files under the same name.
        """
        with self._mutex:
            engine = self._engines.get(space.spec.model)
            if engine is None:
                engine = self._load(space.spec.model)
            self._engines.move_to_end(space.spec.model)
        space.require_fingerprint(fingerprint(engine, OnLong(space.spec.long_text.value)))
        return engine

    def _load(self, model: str) -> Engine:
        settings = self._settings
        while len(self._engines) >= settings.embedding_engines:
            dropped, _ = self._engines.popitem(last=False)
            logger.info("dropped the engine of %s to make room", dropped)
        folder = resolve_model(model, pooling=settings.embedding_pooling, download=True)
        engine = Engine.load(
            folder,
            device=self._device,
            dtype=settings.embedding_dtype,
            batch_tokens=settings.embedding_batch_tokens or None,
        )
        self._engines[model] = engine
        logger.info(
            "loaded %s on %s as %s, %s tokens per forward pass",
            model,
            engine.device,
            engine.dtype,
            engine.batch_tokens,
        )
        return engine


def fingerprint(engine: Engine, on_long: OnLong) -> str:
    """The fingerprint of the vectors that ``engine`` makes under a policy."""
    return dataclasses.replace(engine.spec, long_text=long_text_for(on_long)).fingerprint
