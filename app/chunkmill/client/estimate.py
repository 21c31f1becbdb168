"""What an enqueue would cost, said before it is made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from chunkmill.client.enqueue import windows
from chunkmill.client.replacing import rehearse
from chunkmill.db.copy import copy_binary, encode_rows
from chunkmill.db.temporary import dropping
from chunkmill.domain.chunks import PreparedChunk
from chunkmill.domain.costs import Estimate, LaneEstimate, machine_usd
from chunkmill.domain.filters import Filter
from chunkmill.domain.prices import Price
from chunkmill.domain.providers import CL100K
from chunkmill.domain.spaces import OnLong, SpaceSpec
from chunkmill.domain.states import Route
from chunkmill.domain.windows import window_bounds
from chunkmill.errors import InvalidChunk, InvalidSetting, UnknownModel
from chunkmill.ledger.jobs import routing
from chunkmill.ledger.money import budget, charges
from chunkmill.models import resolve_model
from chunkmill.openai.catalogue import model_for, request_limits
from chunkmill.openai.plan import inputs, tokens
from chunkmill.settings import Settings
from chunkmill.spaces import collections, registry


@dataclass(frozen=True, slots=True)
class EstimateRequest:
    """What would be enqueued. ``route`` is the one that the caller named."""

    spec: SpaceSpec
    route: Route
    deadline: datetime | None
    on_long: OnLong
    collection: str | None = None
    replaces: Filter | None = None
    """Also count what an enqueue would delete from ``collection`` with this filter."""


def estimate(
    db: sa.Engine, settings: Settings, request: EstimateRequest, prepared: Iterable[PreparedChunk | InvalidChunk]
) -> Estimate:
    """What an enqueue of ``prepared`` would send and cost.

    Memory is that of one window. A temporary table of Postgres remembers which texts the stream has held: 32 bytes and
    an index entry for each distinct one. It is dropped at the end, and nothing else is written. Raises
    :class:`UnknownRoute`, :class:`SpaceMismatch`, and what ``prepared`` raises.
    """
    spec = request.spec
    totals = _Totals()
    with db.connect() as conn:
        with conn.begin():
            choice = routing.decide(conn, settings, spec, request.route, request.deadline)
            space = registry.find(conn, spec.fingerprint)
            if request.collection is not None:
                collections.require_space(conn, request.collection, spec)
        counters = [LaneCounter(route, settings, request) for route in routing.lanes_of(settings, spec)]
        with _temporary_tables(conn):
            deleted = None
            with contextlib.ExitStack() as stack:
                replacement = None
                if request.replaces is not None and request.collection is not None:
                    replacement = stack.enter_context(rehearse(conn, request.collection, request.replaces))
                    prepared = replacement.noting(prepared)
                for chunks, _ in windows(prepared, settings.enqueue_window, settings.enqueue_window):
                    to_send = _count_window(conn, space, chunks, totals)
                    counted: dict[object, tuple[int, int]] = {}  # the two paid lanes count alike
                    for counter in counters:
                        counter.add(to_send, counted)
                if replacement is not None:
                    deleted = replacement.missing()
        with conn.begin():
            price = charges.price_today(conn, model_for(settings, spec))
            rate = routing.seconds_per_token(conn, spec)
            return Estimate(
                spec.model,
                spec.fingerprint,
                totals.chunks,
                totals.contents,
                totals.cached,
                totals.in_flight,
                totals.contents - totals.cached - totals.in_flight,
                choice.route,
                choice.because,
                tuple(counter.estimate(price, rate) for counter in counters),
                budget.read(conn, settings),
                deleted,
            )


@dataclass(slots=True)
class _Totals:
    """What the stream has held so far."""

    chunks: int = 0
    contents: int = 0
    """Distinct ones."""
    cached: int = 0
    in_flight: int = 0
    """Without those that are also cached."""


def _count_window(
    conn: sa.Connection, space: registry.Space | None, chunks: Sequence[PreparedChunk], totals: _Totals
) -> list[tuple[bytes, str]]:
    """Add a window to ``totals``. Returns ``(hash, text)`` of the contents that are new in the stream and must be sent.

    ``space`` is None if it is not registered; it then has no vectors.
    """
    texts = {chunk.content_hash: chunk.text for chunk in chunks}
    if space is None:
        query = """
            INSERT INTO estimated_contents
            SELECT content_hash FROM estimated_window
            ON CONFLICT DO NOTHING
            RETURNING content_hash, false AS cached, false AS in_flight
        """
    else:
        query = f"""
            WITH new AS (
                INSERT INTO estimated_contents
                SELECT content_hash FROM estimated_window
                ON CONFLICT DO NOTHING
                RETURNING content_hash
            )
            SELECT new.content_hash, v.content_hash IS NOT NULL AS cached, i.content_hash IS NOT NULL AS in_flight
            FROM new
            LEFT JOIN {space.table_name} v ON v.content_hash = new.content_hash
            LEFT JOIN provider_inputs i ON i.space_id = :space AND i.content_hash = new.content_hash
        """
    with conn.begin():
        copy_binary(conn, "estimated_window (content_hash)", encode_rows((content_hash,) for content_hash in texts))
        rows = conn.execute(sa.text(query), {"space": space.id} if space else {}).fetchall()
    totals.chunks += len(chunks)
    totals.contents += len(rows)
    totals.cached += sum(row.cached for row in rows)
    totals.in_flight += sum(row.in_flight and not row.cached for row in rows)
    return [(r.content_hash, texts[r.content_hash].decode()) for r in rows if not (r.cached or r.in_flight)]


Rule = Callable[[Sequence[tuple[bytes, str]]], tuple[int, int]]
"""From contents ``(hash, text)``: how many tokens would be sent of them, and how many of them would be refused."""


class LaneCounter:
    """Counts the tokens of one lane. Without the lane's tokenizer it counts nothing and says why."""

    def __init__(self, route: Route, settings: Settings, request: EstimateRequest) -> None:
        self._route = route
        self._settings = settings
        self._kind = "local" if route is Route.LOCAL else "provider"
        self._tokens = self._refused = 0
        self._unknown: str | None = None
        self._rule: Rule | None = None
        try:
            self._rule = (_local_rule if route is Route.LOCAL else provider_rule)(settings, request)
        except (UnknownModel, InvalidSetting) as error:
            self._unknown = f"tokens cannot be counted here: {error}"

    def add(self, contents: Sequence[tuple[bytes, str]], counted: dict[object, tuple[int, int]]) -> None:
        """Add the tokens of ``contents``. ``counted`` holds what another lane of the same kind has counted of them."""
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


def provider_rule(settings: Settings, request: EstimateRequest) -> Rule:
    """Counts with the code that also prepares what is sent."""
    model = model_for(settings, request.spec)
    assert model is not None  # noqa: S101 - a paid lane serves the space
    counter = tokens.cl100k() if model.tokenizer == CL100K else tokens.from_tokenizer_file(model.tokenizer)
    limits = request_limits(settings, model, request.spec)

    def count(contents: Sequence[tuple[bytes, str]]) -> tuple[int, int]:
        prepared = inputs.prepare(contents, counter, limits, request.on_long)
        sent = [content for content in prepared if isinstance(content, inputs.ProviderInput)]
        return sum(content.sent_tokens for content in sent), len(prepared) - len(sent)

    return count


def _local_rule(settings: Settings, request: EstimateRequest) -> Rule:
    """Counts with the model's own tokenizer, and with the limit and the windows of the engine."""
    spec = request.spec
    folder = resolve_model(spec.model, pooling=settings.embedding_pooling, trust=settings.trust)
    file = folder.transformer / "tokenizer.json"
    if not file.is_file():
        raise UnknownModel(f"{folder.transformer} has no tokenizer.json.")
    counter = tokens.from_tokenizer_file(file)
    unused = counter.overhead if folder.static else 0  # special tokens, which a static model does not read
    overhead = counter.overhead - unused
    room = spec.max_tokens - overhead

    def sent(n_tokens: int) -> int:
        if n_tokens <= spec.max_tokens:
            return n_tokens
        if request.on_long is OnLong.TRUNCATE:
            return spec.max_tokens
        windows_of_text = window_bounds(n_tokens - overhead, room)
        return sum(window.end - window.start + overhead for window in windows_of_text)

    def count(contents: Sequence[tuple[bytes, str]]) -> tuple[int, int]:
        counts = [n - unused for n in counter.counts([text for _, text in contents])]
        taken = [n for n in counts if n <= spec.max_tokens or request.on_long is not OnLong.REJECT]
        return sum(map(sent, taken)), len(counts) - len(taken)

    return count


@contextlib.contextmanager
def _temporary_tables(conn: sa.Connection) -> Iterator[None]:
    """Create the tables of this session and drop them afterwards, each in a transaction of its own.

    One long transaction would hold up vacuum.
    """
    with dropping(conn, "estimated_contents", "estimated_window"):
        with conn.begin():
            conn.execute(sa.text("CREATE TEMP TABLE estimated_contents (content_hash bytea PRIMARY KEY)"))
            conn.execute(sa.text("CREATE TEMP TABLE estimated_window (content_hash bytea) ON COMMIT DELETE ROWS"))
        yield
