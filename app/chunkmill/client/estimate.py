"""What an enqueue would cost, said before it is made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import sqlalchemy as sa

from chunkmill.chunking.counting import of_folder
from chunkmill.client.enqueue import windows
from chunkmill.client.replacing import rehearse
from chunkmill.db.copy import copy_binary, encode_rows
from chunkmill.db.temporary import dropping
from chunkmill.domain.budget import Budget
from chunkmill.domain.chunks import PreparedChunk
from chunkmill.domain.costs import Estimate, LaneEstimate, machine_usd
from chunkmill.domain.filters import Filter
from chunkmill.domain.prices import Price
from chunkmill.domain.spaces import OnLong, SpaceSpec
from chunkmill.domain.states import Route
from chunkmill.domain.windows import window_bounds
from chunkmill.errors import ChunkmillError, InvalidChunk, InvalidSetting, UnknownModel
from chunkmill.ledger.jobs import routing
from chunkmill.ledger.money import budget, charges
from chunkmill.ledger.reembedding.beside import choose
from chunkmill.openai.catalogue import model_for, request_limits
from chunkmill.openai.plan import inputs
from chunkmill.openai.plan.tokens import of_provider_model
from chunkmill.settings import Settings
from chunkmill.spaces import collections, others, registry


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
    with db.connect() as conn:
        with conn.begin():
            counts = [_Count(conn, settings, request)]
            if request.collection is not None:
                collections.require_space(conn, request.collection, request.spec)
                counts += _beside(conn, settings, request.collection)
        with _temporary_tables(conn):
            deleted = None
            with contextlib.ExitStack() as stack:
                replacement = None
                if request.replaces is not None and request.collection is not None:
                    replacement = stack.enter_context(rehearse(conn, request.collection, request.replaces))
                    prepared = replacement.noting(prepared)
                for chunks, _ in windows(prepared, settings.enqueue_window, settings.enqueue_window):
                    texts = {chunk.content_hash: chunk.text for chunk in chunks}
                    with conn.begin():
                        new = _new_in_stream(conn, texts)
                        missing = [count.add(conn, len(chunks), new) for count in counts]
                    for count, hashes in zip(counts, missing, strict=True):
                        count.add_tokens([(content_hash, texts[content_hash].decode()) for content_hash in hashes])
                if replacement is not None:
                    deleted = replacement.missing()
        with conn.begin():
            money = budget.read(conn, settings)
            first, *beside = [count.estimate(conn, settings, money) for count in counts]
    return replace(first, beside=tuple(beside), deleted=deleted)


def _beside(conn: sa.Connection, settings: Settings, name: str) -> list[_Count]:
    """One count for each other space of the collection, because the enqueue fills it too."""
    collection = collections.resolve(conn, name)
    lives = others.of(conn, collection.id).others if collection is not None else {}
    made = []
    for other in lives.values():
        space = registry.get_if_readable(conn, other.id)
        if space is not None:
            request = EstimateRequest(space.spec, Route.AUTO, None, other.on_long)
            made.append(_Count(conn, settings, request, reembedding_id=other.reembedding_id))
    return made


def _new_in_stream(conn: sa.Connection, hashes: Iterable[bytes]) -> list[bytes]:
    """Those of the contents that the stream has not held before."""
    query = """
        INSERT INTO estimated_contents
        SELECT content_hash FROM estimated_window
        ON CONFLICT DO NOTHING
        RETURNING content_hash
    """
    copy_binary(conn, "estimated_window (content_hash)", encode_rows((content_hash,) for content_hash in hashes))
    return list(conn.execute(sa.text(query)).scalars())


class _Count:
    """What the stream would send into one space."""

    def __init__(
        self, conn: sa.Connection, settings: Settings, request: EstimateRequest, *, reembedding_id: int | None = None
    ) -> None:
        """With ``reembedding_id`` it is a space beside the active one.

        Raises :class:`UnknownRoute`, but not for a space beside: the poller may have settings that serve it.
        """
        self._spec = request.spec
        self._space = registry.find(conn, request.spec.fingerprint)
        self._chunks = self._contents = self._cached = self._in_flight = 0
        self._no_lane: str | None = None
        try:
            if reembedding_id is None:
                choice = routing.decide(conn, settings, request.spec, request.route, request.deadline)
            else:
                _, choice = choose(conn, settings, request.spec, reembedding_id)
        except ChunkmillError as error:
            if reembedding_id is None:
                raise
            self._route, self._because, self._no_lane = Route.AUTO, "the poller chooses a lane", str(error)
            self._counters: list[LaneCounter] = []
        else:
            self._route, self._because = choice.route, choice.because
            lanes = routing.lanes_of(settings, request.spec)
            self._counters = [LaneCounter(route, settings, request) for route in lanes]

    def add(self, conn: sa.Connection, n_chunks: int, new: Sequence[bytes]) -> list[bytes]:
        """Add a window with the contents that are new in the stream. Returns those that must be sent."""
        self._chunks += n_chunks
        self._contents += len(new)
        if self._space is None or not new:
            return list(new)
        query = f"""
            SELECT new.content_hash, v.content_hash IS NOT NULL AS cached, i.content_hash IS NOT NULL AS in_flight
            FROM unnest(CAST(:new AS bytea[])) AS new (content_hash)
            LEFT JOIN {self._space.table_name} v ON v.content_hash = new.content_hash
            LEFT JOIN provider_inputs i ON i.space_id = :space AND i.content_hash = new.content_hash
        """
        rows = conn.execute(sa.text(query), {"new": list(new), "space": self._space.id}).all()
        self._cached += sum(row.cached for row in rows)
        self._in_flight += sum(row.in_flight and not row.cached for row in rows)
        return [row.content_hash for row in rows if not (row.cached or row.in_flight)]

    def add_tokens(self, contents: Sequence[tuple[bytes, str]]) -> None:
        """Count the tokens of contents that must be sent."""
        counted: dict[object, tuple[int, int]] = {}  # both paid lanes count tokens in the same way
        for counter in self._counters:
            counter.add(contents, counted)

    def estimate(self, conn: sa.Connection, settings: Settings, money: Budget) -> Estimate:
        price = charges.price_today(conn, model_for(settings, self._spec))
        rate = routing.seconds_per_token(conn, self._spec)
        lanes = [counter.estimate(price, rate) for counter in self._counters]
        if self._no_lane is not None:
            lanes = [LaneEstimate(self._route, None, None, None, unknown=self._no_lane)]
        return Estimate(
            self._spec.model,
            self._spec.fingerprint,
            self._chunks,
            self._contents,
            self._cached,
            self._in_flight,
            self._contents - self._cached - self._in_flight,
            self._route,
            self._because,
            tuple(lanes),
            money,
        )


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
    counter = of_provider_model(model)
    limits = request_limits(settings, model, request.spec)

    def count(contents: Sequence[tuple[bytes, str]]) -> tuple[int, int]:
        prepared = inputs.prepare(contents, counter, limits, request.on_long)
        sent = [content for content in prepared if isinstance(content, inputs.ProviderInput)]
        return sum(content.sent_tokens for content in sent), len(prepared) - len(sent)

    return count


def _local_rule(settings: Settings, request: EstimateRequest) -> Rule:
    """Counts with the model's own tokenizer and prompt, and with the limit and the windows of the engine."""
    limit = request.spec.max_tokens
    counter = of_folder(settings, request.spec)
    room = limit - counter.around

    def sent(n_tokens: int) -> int:
        if n_tokens <= limit:
            return n_tokens
        if request.on_long is OnLong.TRUNCATE:
            return limit
        windows_of_text = window_bounds(n_tokens - counter.around, room)
        return sum(window.end - window.start + counter.around for window in windows_of_text)

    def count(contents: Sequence[tuple[bytes, str]]) -> tuple[int, int]:
        counts = counter.counts([text for _, text in contents])
        taken = [n for n in counts if n <= limit or request.on_long is not OnLong.REJECT]
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
