"""What the task threads of a worker on queue ``openai`` share. It loads no model and needs no GPU."""

from __future__ import annotations

import logging
import os
from typing import ClassVar

import sqlalchemy as sa

from chunkmill.broker import PROVIDER_QUEUE
from chunkmill.db.connect import create_db, require_at_least, require_migrated
from chunkmill.domain.providers import ProviderModel
from chunkmill.errors import UnknownModel
from chunkmill.ledger.provider import provider_inputs
from chunkmill.openai.catalogue import model_for, read_twins, request_limits
from chunkmill.openai.http import Provider
from chunkmill.openai.plan.limits import BatchLimits
from chunkmill.openai.plan.tokens import TokenCounter, cl100k, of_provider_model
from chunkmill.openai.wire.jsonl import RequestForm
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill.spaces.registry import Space
from chunkmill_workers.process.context import QueueContext
from chunkmill_workers.process.lease import LeaseKeeper, owner_name
from chunkmill_workers.process.unserved import UnservedWork
from chunkmill_workers.provider.health import Health
from chunkmill_workers.provider.keeper import StepKeeper
from chunkmill_workers.provider.oddities import Oddities

logger = logging.getLogger(__name__)


def make_provider(settings: Settings) -> Provider:
    """The provider that the settings name. Raises :class:`InvalidSetting` without a key or a package, too."""
    cl100k()  # so that a missing package is reported now and not in the middle of a job
    return Provider(settings)


class ProviderContext(QueueContext):
    """A worker of the paid routes, on queue ``openai``."""

    queue: ClassVar[str] = PROVIDER_QUEUE

    def __init__(self, settings: Settings, db: sa.Engine, provider: Provider) -> None:
        super().__init__(settings, db, LeaseKeeper(db, settings.lease_seconds), name=owner_name(os.getpid()))
        self.provider = provider
        self.steps = StepKeeper(db, settings.lease_seconds)
        self.health = Health()
        self.questions = 0
        """How many questions (searches and ``client.embed``) are with the provider. One thread answers them."""
        self.oddities = Oddities()
        self.unserved = UnservedWork()
        """The spaces that this worker leaves to other workers, because its OPENAI_MODELS does not describe them."""

    @classmethod
    def start(cls, settings: Settings) -> ProviderContext:
        """Connect and start the lease keepers. Raises :class:`InvalidSetting` without a key or the package."""
        provider = make_provider(settings)
        db = create_db(
            settings.require_database_url(), role="worker-openai", pool_size=settings.openai_parallel_requests + 4
        )
        require_migrated(db)
        with db.begin() as conn:
            require_at_least(conn, "0032")
        read_twins(settings)
        context = cls(settings, db, provider)
        context.become_current()
        return context

    def model(self, space: Space) -> ProviderModel:
        """The provider's model that serves a space. Raises :class:`UnknownModel` if there is none."""
        model = model_for(self.settings, space.spec)
        if model is None:
            raise UnknownModel(
                f"no model of the provider serves space {space.spec.fingerprint[:12]} ({space.spec.model!r}). "
                "Describe it in OPENAI_MODELS on this worker, as the producer did, or cancel the job."
            )
        return model

    def serves(self, space: Space) -> bool:
        return model_for(self.settings, space.spec) is not None

    def counter(self, model: ProviderModel) -> TokenCounter:
        return of_provider_model(model)

    def limits(self, model: ProviderModel, space: Space, *, max_inputs: int | None = None) -> BatchLimits:
        return request_limits(self.settings, model, space.spec, max_inputs=max_inputs)

    def form(self, model: ProviderModel, space: Space) -> RequestForm:
        """What requests say of the model. ``dimensions`` is sent only to models that can cut; others refuse it."""
        dimensions = space.spec.dimensions if model.can_cut else None
        return RequestForm(model.name, dimensions, self.provider.encoding(model.name))

    @property
    def answer_seconds(self) -> float:
        """How many seconds one request may take if a ChunkBatch or a question is with the provider, otherwise 0."""
        return self.settings.openai_timeout_seconds if self.leases.n_held or self.questions else 0.0

    def book_abandoned(self) -> None:
        from chunkmill_workers.provider.books import book_unanswered

        try:
            with self.db.begin() as conn:
                for space_id, sent in provider_inputs.take_sent_by(conn, self.name):
                    book_unanswered(conn, self, registry.get(conn, space_id), [sent])
        except Exception:
            logger.exception("requests without an answer are booked by the next attempt")

    def become_current(self) -> None:
        self.steps.start()
        super().become_current()

    def close(self) -> None:
        self.steps.stop()
        self.provider.close()
        super().close()
