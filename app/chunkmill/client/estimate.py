"""What an enqueue would cost, before it is made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import sqlalchemy as sa

from chunkmill.client.enqueue import windows
from chunkmill.db.copy import copy_binary, encode_rows
from chunkmill.domain.chunks import PreparedChunk
from chunkmill.domain.costs import Estimate, LaneEstimate, machine_usd
from chunkmill.domain.prices import Price
from chunkmill.domain.providers import CL100K
from chunkmill.domain.spaces import OnLong, SpaceSpec
from chunkmill.domain.states import Route
from chunkmill.domain.windows import window_bounds
from chunkmill.errors import InvalidChunk, InvalidSetting, SpaceMismatch, UnknownModel
from chunkmill.ledger.jobs import routing
from chunkmill.ledger.money import budget, charges
from chunkmill.models import resolve_model
from chunkmill.openai.catalogue import model_for
from chunkmill.openai.plan import inputs, tokens
from chunkmill.openai.plan.limits import BatchLimits
from chunkmill.settings import Settings
from chunkmill.spaces import registry


@dataclass(frozen=True, slots=True)
class EstimateRequest:
    """What would be enqueued. ``route`` is as asked."""

    spec: SpaceSpec
    route: Route
    deadline: datetime | None
    on_long: OnLong
    collection: str | None = None


class Estimating:
    """``run`` it once.

    Memory is that of one window. Which texts the stream has held is kept in a temporary table of Postgres, 32 bytes
    and an index entry for each distinct one, dropped at the end: nothing else is written.
    """

    def __init__(self, db: sa.Engine, settings: Settings, request: EstimateRequest) -> None:
        self._db = db
        self._settings = settings
        self._request = request
        self._chunks = self._contents = self._cached = self._in_flight = 0

    def run(self, prepared: Iterable[PreparedChunk | InvalidChunk]) -> Estimate:
        """Raises :class:`UnknownRoute`, :class:`SpaceMismatch`, and what ``prepared`` raises."""
        request, settings = self._request, self._settings
        spec = request.spec
        with self._db.connect() as conn:
            with conn.begin():
                choice = routing.decide(conn, settings, spec, request.route, request.deadline)
                space = registry.find(conn, spec.fingerprint)
                self._require_collection(conn)
            counters = [_Counter(route, settings, request) for route in routing.lanes_of(settings, spec)]
            with _seen_table(conn):
                for chunks, _ in windows(prepared, settings.enqueue_window, settings.enqueue_window):
                    fresh = self._look(conn, space, chunks)
                    counted: dict[object, tuple[int, int]] = {}  # the two paid lanes count alike
                    for counter in counters:
                        counter.add(fresh, counted)
            with conn.begin():
                price = charges.price_today(conn, model_for(settings, spec))
                rate = routing.seconds_per_token(conn, spec)
                return Estimate(
                    spec.model,
                    spec.fingerprint,
                    self._chunks,
                    self._contents,
                    self._cached,
                    self._in_flight,
                    self._contents - self._cached - self._in_flight,
                    choice.route,
                    choice.because,
                    tuple(counter.estimate(price, rate) for counter in counters),
                    budget.read(conn, settings),
                )

    def _require_collection(self, conn: sa.Connection) -> None:
        """Say now what ``enqueue`` would say: a collection with chunks stays in its space."""
        row = conn.execute(
            sa.text(
                "SELECT s.model, s.fingerprint FROM collections c JOIN spaces s ON s.id = c.space_id "
                "WHERE c.name = :name AND EXISTS (SELECT FROM chunks k WHERE k.collection_id = c.id)"
            ),
            {"name": self._request.collection},
        ).one_or_none()
        if row is not None and row.fingerprint != self._request.spec.fingerprint:
            raise SpaceMismatch(
                f"collection {self._request.collection!r} holds vectors of another space (of model {row.model!r}). "
                "Enqueue into another collection, or with the model, on_long, dimensions and precision of the first."
            )

    def _look(
        self, conn: sa.Connection, space: registry.Space | None, chunks: Sequence[PreparedChunk]
    ) -> list[tuple[bytes, str]]:
        """Count a window; returns the contents ``(hash, text)`` that are met for the first time and have to be sent."""
        texts = {chunk.content_hash: chunk.text for chunk in chunks}
        cached = in_flight = "false"
        joins = ""
        if space is not None:
            cached, in_flight = "v.content_hash IS NOT NULL", "i.content_hash IS NOT NULL"
            joins = (
                f"LEFT JOIN {space.table_name} v USING (content_hash) LEFT JOIN provider_inputs i "
                f"ON i.space_id = {space.id} AND i.content_hash = fresh.content_hash"
            )
        with conn.begin():
            copy_binary(conn, "estimated_window (content_hash)", encode_rows((each,) for each in texts))
            rows = conn.execute(
                sa.text(
                    "WITH fresh AS (INSERT INTO estimated_contents SELECT content_hash FROM estimated_window "
                    "ON CONFLICT DO NOTHING RETURNING content_hash) "
                    f"SELECT fresh.content_hash, {cached} AS cached, {in_flight} AS in_flight FROM fresh {joins}"
                )
            ).fetchall()
        self._chunks += len(chunks)
        self._contents += len(rows)
        self._cached += sum(row.cached for row in rows)
        self._in_flight += sum(row.in_flight and not row.cached for row in rows)
        return [(r.content_hash, texts[r.content_hash].decode()) for r in rows if not (r.cached or r.in_flight)]


class _Rule(Protocol):
    def __call__(self, contents: Sequence[tuple[bytes, str]]) -> tuple[int, int]:
        """Tokens that would be sent of the contents, and how many of them would be refused."""
        ...


class _Counter:
    """One lane's tokens. Without its tokenizer it says why, and counts nothing."""

    def __init__(self, route: Route, settings: Settings, request: EstimateRequest) -> None:
        self._route = route
        self._settings = settings
        self._kind = "local" if route is Route.LOCAL else "provider"
        self._tokens = self._refused = 0
        self._unknown: str | None = None
        self._rule: _Rule | None = None
        try:
            self._rule = (_local_rule if route is Route.LOCAL else _provider_rule)(settings, request)
        except (UnknownModel, InvalidSetting) as error:
            self._unknown = f"tokens cannot be counted here: {error}"

    def add(self, contents: Sequence[tuple[bytes, str]], counted: dict[object, tuple[int, int]]) -> None:
        """``counted`` has what another lane of the same kind has found of these contents."""
        if self._rule is None or not contents:
            return
        if self._kind not in counted:
            counted[self._kind] = self._rule(contents)
        n_tokens, refused = counted[self._kind]
        self._tokens += n_tokens
        self._refused += refused

    def estimate(self, price: Price | None, seconds_per_token: float | None) -> LaneEstimate:
        if self._rule is None:
            return LaneEstimate(self._route, None, None, None, unknown=self._unknown)
        if self._route is not Route.LOCAL:
            usd = price.of(self._tokens, self._route) if price else None
            unknown = None if price else "the model has no price: give it one in OPENAI_MODELS"
            return LaneEstimate(self._route, self._tokens, self._refused, usd, unknown=unknown)
        if seconds_per_token is None:
            unknown = "nothing was embedded in this space by local workers yet, so their speed is not known"
            return LaneEstimate(self._route, self._tokens, self._refused, None, unknown=unknown)
        seconds = self._tokens * seconds_per_token
        cost = machine_usd(seconds, self._settings.gpu_hour_usd)
        unknown = "GPU_HOUR_USD is not set" if cost is None else None
        return LaneEstimate(self._route, self._tokens, self._refused, cost, seconds, unknown)


def _provider_rule(settings: Settings, request: EstimateRequest) -> _Rule:
    """The very code that prepares what is sent."""
    model = model_for(settings, request.spec)
    assert model is not None  # noqa: S101 - a paid lane serves the space
    counter = tokens.cl100k() if model.tokenizer == CL100K else tokens.from_tokenizer_file(model.tokenizer)
    limits = BatchLimits(
        inputs_per_request=settings.openai_request_inputs,
        tokens_per_request=max(settings.openai_request_tokens, model.max_tokens),
        tokens_per_input=min(model.max_tokens, request.spec.max_tokens),
    )

    def count(contents: Sequence[tuple[bytes, str]]) -> tuple[int, int]:
        prepared = inputs.prepare(contents, counter, limits, request.on_long)
        sent = [each for each in prepared if isinstance(each, inputs.ProviderInput)]
        return sum(each.sent_tokens for each in sent), len(prepared) - len(sent)

    return count


def _local_rule(settings: Settings, request: EstimateRequest) -> _Rule:
    """The model's own tokenizer, and the limit and windows of the engine."""
    spec = request.spec
    folder = resolve_model(spec.model, pooling=settings.embedding_pooling, trust=settings.trust)
    file = folder.transformer / "tokenizer.json"
    if not file.is_file():
        raise UnknownModel(f"{folder.transformer} has no tokenizer.json.")
    counter = tokens.from_tokenizer_file(file)
    room = spec.max_tokens - counter.overhead

    def sent(n_tokens: int) -> int:
        if n_tokens <= spec.max_tokens:
            return n_tokens
        if request.on_long is OnLong.TRUNCATE:
            return spec.max_tokens
        bounds = window_bounds(n_tokens - counter.overhead, room)
        return sum(each.end - each.start + counter.overhead for each in bounds)

    def count(contents: Sequence[tuple[bytes, str]]) -> tuple[int, int]:
        counts = counter.counts([text for _, text in contents])
        taken = [n for n in counts if n <= spec.max_tokens or request.on_long is not OnLong.REJECT]
        return sum(map(sent, taken)), len(counts) - len(taken)

    return count


@contextlib.contextmanager
def _seen_table(conn: sa.Connection) -> Iterator[None]:
    """The session's table of texts met, in transactions of their own: one long transaction would hold up vacuum."""
    with conn.begin():
        conn.execute(sa.text("CREATE TEMP TABLE estimated_contents (content_hash bytea PRIMARY KEY)"))
        conn.execute(sa.text("CREATE TEMP TABLE estimated_window (content_hash bytea) ON COMMIT DELETE ROWS"))
    try:
        yield
    finally:
        try:
            conn.rollback()
            with conn.begin():
                conn.execute(sa.text("DROP TABLE estimated_contents, estimated_window"))
        except sa.exc.SQLAlchemyError:
            conn.invalidate()  # the tables end with their connection, so the pool must not keep it
