"""Re-embeddings in the ledger: each transition is one UPDATE that names its guard, and may be made twice.

``flipping`` makes the two transitions that change the active space of a collection.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from chunkmill.db.locks import LIVES_LOCK, lock_of
from chunkmill.domain.reembedding import (
    Plan,
    Reembedding,
    ReembeddingState,
    Report,
    ServedBy,
    SpaceRole,
)
from chunkmill.domain.spaces import OnLong
from chunkmill.errors import InvalidInput, NotFound, StoreUnavailable
from chunkmill.ledger.access import spends
from chunkmill.spaces import collections, others, registry
from chunkmill.spaces.collections import Collection
from chunkmill.spaces.registry import Space

_S = ReembeddingState
BEFORE_FLIP = [state.value for state in ReembeddingState if state.is_before_flip]


@dataclass(frozen=True, slots=True)
class Life:
    """A row of ``reembeddings``, with what its collection and its spaces are now."""

    id: int
    collection_id: int
    collection: str
    is_dropped: bool
    """The collection was dropped."""
    active_space_id: int
    from_space_id: int
    to_space_id: int
    """Once the re-embedding has ended, one of the two may be dropped."""
    state: ReembeddingState
    plan: Plan
    names: dict[str, str]
    """Fingerprints and models of both spaces, which stay known once a space was dropped."""
    report: Report
    problem: str | None
    job_id: int | None
    share: int
    share_since: datetime | None
    """Since when the share is what it is."""
    kept_since: datetime | None
    """Since when the space that the collection left is kept; None if none is."""
    created_at: datetime
    state_since: datetime
    flipped_at: datetime | None
    finished_at: datetime | None
    paused_at: datetime | None
    now: datetime
    """The time of the database when this was read."""

    @property
    def kept_until(self) -> datetime | None:
        """When the space that the collection left is dropped."""
        return None if self.kept_since is None else self.kept_since + timedelta(days=self.plan.keep_days)

    def shown(self, served: tuple[ServedBy, ...] = ()) -> Reembedding:
        """The re-embedding as the API shows it."""
        plan, names = self.plan, self.names
        return Reembedding(
            id=self.id,
            collection=self.collection,
            state=self.state,
            from_space=names["from_space"],
            from_model=names["from_model"],
            to_space=names["to_space"],
            to_model=names["to_model"],
            share=100 if self.state in (_S.FLIPPED, _S.FINISHED) else self.share,
            ramp=plan.ramp,
            step_hours=plan.step_hours,
            keep_days=plan.keep_days,
            priority=plan.priority,
            route=plan.route,
            limits=plan.gates,
            gates=self.report.gates,
            coverage=self.report.coverage,
            served=served,
            problem=self.problem,
            paused_at=self.paused_at,
            job_id=self.job_id,
            created_at=self.created_at,
            state_since=self.state_since,
            flipped_at=self.flipped_at,
            finished_at=self.finished_at,
            dropped_at=self.kept_until,
            share_since=self.share_since,
        )


def are_kept(conn: sa.Connection) -> bool:
    """False on the schema of an earlier release, on which this code runs too during an upgrade."""
    query = """
        SELECT EXISTS (
            SELECT FROM pg_attribute
            WHERE attrelid = to_regclass('reembeddings') AND attname = 'cleaned_at' AND NOT attisdropped)
    """
    return bool(conn.execute(sa.text(query)).scalar_one())


def require_kept(conn: sa.Connection) -> None:
    """Raise :class:`StoreUnavailable` on the schema of an earlier release."""
    if not are_kept(conn):
        raise StoreUnavailable("the database cannot move collections to another space yet. Run: chunkmill migrate")


def get(conn: sa.Connection, reembedding_id: int) -> Life:
    """Raises :class:`NotFound`."""
    lives = _read(conn, reembedding_id=reembedding_id)
    if not lives:
        raise NotFound(f"there is no re-embedding {reembedding_id}; `chunkmill reembed list` lists the latest ones.")
    return lives[0]


def latest_of(conn: sa.Connection, collection: Collection) -> Life:
    """The latest re-embedding of a collection. Raises :class:`NotFound`."""
    lives = latest(conn, [collection.id], 1)
    if not lives:
        raise NotFound(
            f"collection {collection.name!r} was never moved to another space; `chunkmill reembed start "
            f"{shlex.quote(collection.name)} MODEL` begins it."
        )
    return lives[0]


def find(conn: sa.Connection, which: int | str) -> Life:
    """A re-embedding by its id, or the latest one of a collection by its name. Raises :class:`NotFound`."""
    if isinstance(which, int):
        return get(conn, which)
    return latest_of(conn, collections.find(conn, which))


def latest(conn: sa.Connection, collection_ids: Sequence[int] | None, limit: int) -> list[Life]:
    """The latest re-embeddings, newest first: of these collections, or of all."""
    return _read(conn, collection_ids=collection_ids, limit=limit)


def _read(
    conn: sa.Connection,
    *,
    reembedding_id: int | None = None,
    collection_ids: Sequence[int] | None = None,
    is_open: bool = False,
    limit: int = 1,
) -> list[Life]:
    """The latest re-embeddings, newest first: the one with this id, those of these collections, or all.

    ``is_open`` leaves out those that have ended.
    """
    query = """
        SELECT r.*, k.name AS collection, k.dropped_at AS collection_dropped_at, k.space_id AS active_space_id,
               now() AS now, coalesce(f.share, 0) AS share, f.since AS share_since, p.since AS kept_since
        FROM reembeddings r
        JOIN collections k ON k.id = r.collection_id
        LEFT JOIN collection_spaces f
               ON f.collection_id = r.collection_id AND f.reembedding_id = r.id AND f.role = :filling
        LEFT JOIN collection_spaces p
               ON p.collection_id = r.collection_id AND p.reembedding_id = r.id AND p.role = :previous
        WHERE (CAST(:id AS bigint) IS NULL OR r.id = :id)
          AND (CAST(:collections AS integer[]) IS NULL OR r.collection_id = ANY(:collections))
          AND (NOT :is_open OR r.finished_at IS NULL)
        ORDER BY r.id DESC
        LIMIT :limit
    """
    parameters = {
        "id": reembedding_id,
        "collections": None if collection_ids is None else list(collection_ids),
        "is_open": is_open,
        "limit": limit,
        "filling": SpaceRole.FILLING,
        "previous": SpaceRole.PREVIOUS,
    }
    return [_life(row) for row in conn.execute(sa.text(query), parameters)]


def to_care_for(conn: sa.Connection) -> list[tuple[int, int]]:
    """``(re-embedding, collection)`` of those that a poller has something to do for: open ones, and ended ones of which
    a space is still kept or something is still to be deleted."""
    query = """
        SELECT r.id, r.collection_id
        FROM reembeddings r
        WHERE r.finished_at IS NULL OR r.cleaned_at IS NULL
        ORDER BY r.id
    """
    return [(row.id, row.collection_id) for row in conn.execute(sa.text(query))]


def begin(conn: sa.Connection, collection: Collection, space: Space, plan: Plan, *, usd: Decimal = Decimal(0)) -> int:
    """Write a re-embedding of ``collection`` to ``space`` down; from now on, enqueues write into both spaces.

    Returns its id, or that of the one with the same plan that is under way. ``space`` is held by the caller. ``usd`` US
    dollars are reserved for the key that begins it. Raises :class:`InvalidInput` if the collection is in the space, or
    another re-embedding of it is open, and :class:`BudgetExceeded` if the key has too little left.
    """
    # Other transactions that move the collection or open a re-embedding of it wait here. Windows of enqueues that do
    # not know of this re-embedding have ended.
    active = others.lock_for_change(conn, collection.id).active
    if active is None or _is_dropped(conn, collection.id):
        raise collections.not_found(collection.name)
    for opened in _read(conn, collection_ids=[collection.id], is_open=True):
        return _same(opened, space, plan)
    if active == space.id:
        raise InvalidInput(
            f"collection {collection.name!r} is in space {space.spec.fingerprint[:12]} ({space.spec.model!r}) already. "
            "Name another model, or other dimensions, precision or on_long."
        )
    old = registry.get(conn, active)
    insert = """
        INSERT INTO reembeddings (collection_id, from_space_id, to_space_id, state, plan)
        VALUES (:collection, :old, :new, :planned, CAST(:plan AS jsonb))
        RETURNING id
    """
    names = {
        "from_space": old.spec.fingerprint,
        "from_model": old.spec.model,
        "to_space": space.spec.fingerprint,
        "to_model": space.spec.model,
    }
    parameters = {
        "collection": collection.id,
        "old": old.id,
        "new": space.id,
        "planned": _S.PLANNED,
        "plan": json.dumps(plan.as_json() | {"names": names}),
    }
    reembedding_id = int(conn.execute(sa.text(insert), parameters).scalar_one())
    # The space may be one that the collection left lately and still keeps.
    fill = """
        INSERT INTO collection_spaces (collection_id, space_id, role, on_long, share, reembedding_id)
        VALUES (:collection, :new, :filling, :on_long, 0, :id)
        ON CONFLICT (collection_id, space_id) DO UPDATE
        SET role = excluded.role, on_long = excluded.on_long, share = 0, reembedding_id = excluded.reembedding_id,
            since = now()
    """
    parameters = {
        "collection": collection.id,
        "new": space.id,
        "filling": SpaceRole.FILLING,
        "on_long": plan.on_long,
        "id": reembedding_id,
    }
    conn.execute(sa.text(fill), parameters)
    spends.begin(conn, reembedding_id=reembedding_id, usd=usd)
    return reembedding_id


def _is_dropped(conn: sa.Connection, collection_id: int) -> bool:
    """Whether a collection was dropped."""
    query = "SELECT dropped_at IS NOT NULL FROM collections WHERE id = :id"
    return bool(conn.execute(sa.text(query), {"id": collection_id}).scalar_one())


def _same(life: Life, space: Space, plan: Plan) -> int:
    if life.to_space_id == space.id and life.state.is_before_flip and life.plan == plan:
        return life.id
    if life.state is _S.FLIPPED:
        raise InvalidInput(
            f"collection {life.collection!r} was moved to {life.names['to_model']!r} lately and still keeps the space "
            f"that it left. Return to it (chunkmill reembed rollback {life.id}), or let it go first: chunkmill reembed "
            f"finish {life.id}."
        )
    raise InvalidInput(
        f"collection {life.collection!r} is on its way to {life.names['to_model']!r} already, by re-embedding "
        f"{life.id} ({life.state.in_words}), with other arguments. Change its gates or its ramp with chunkmill "
        f"reembed resume {life.id}, or give it up first: chunkmill reembed cancel {life.id}."
    )


def advance(conn: sa.Connection, life: Life, to: ReembeddingState) -> bool:
    """Go on to the next state. False if another process was faster, or if the re-embedding is paused."""
    update = """
        UPDATE reembeddings
        SET state = :to, state_since = now(), problem = NULL
        WHERE id = :id AND state = :state AND paused_at IS NULL
    """
    return conn.execute(sa.text(update), {"id": life.id, "state": life.state, "to": to}).rowcount == 1


def note(conn: sa.Connection, life: Life, report: Report, problem: str | None) -> None:
    """Note what was measured, and why it does not go on. Nothing is noted if its state or its plan has changed."""
    update = """
        UPDATE reembeddings
        SET report = CAST(:report AS jsonb), problem = :problem
        WHERE id = :id AND state = :state AND plan = CAST(:plan AS jsonb)
    """
    parameters = {
        "plan": json.dumps(life.plan.as_json() | {"names": life.names}),
        "id": life.id,
        "state": life.state,
        "report": json.dumps(report.as_json(), allow_nan=False),
        "problem": problem,
    }
    conn.execute(sa.text(update), parameters)


def note_problem(conn: sa.Connection, life: Life, problem: str | None) -> None:
    """Note why it does not go on. Nothing is noted if its state has changed."""
    update = """
        UPDATE reembeddings SET problem = :problem
        WHERE id = :id AND state = :state AND problem IS DISTINCT FROM :problem
    """
    conn.execute(sa.text(update), {"id": life.id, "state": life.state, "problem": problem})


def set_share(conn: sa.Connection, life: Life, share: int, *, problem: str | None = None) -> bool:
    """Let the new space answer another share of the sessions. False if another process was faster, or if it is not
    ramping any more.
    """
    update = """
        UPDATE collection_spaces o
        SET share = :share, since = now()
        FROM reembeddings r
        WHERE r.id = :id AND r.state = :ramping AND r.paused_at IS NULL
          AND o.collection_id = r.collection_id AND o.space_id = r.to_space_id AND o.reembedding_id = r.id
          AND o.role = :filling AND o.share = :was
    """
    parameters = {
        "id": life.id,
        "share": share,
        "was": life.share,
        "ramping": _S.RAMPING,
        "filling": SpaceRole.FILLING,
    }
    # The row of the re-embedding is locked first, as in all code that changes both rows.
    conn.execute(sa.text("SELECT FROM reembeddings WHERE id = :id FOR UPDATE"), {"id": life.id})
    if conn.execute(sa.text(update), parameters).rowcount != 1:
        return False
    note_problem(conn, life, problem)
    return True


def pause(conn: sa.Connection, life: Life) -> None:
    """Pause it, so that no poller advances it. Raises :class:`InvalidInput` if it has ended."""
    _require_open(life)
    update = """
        UPDATE reembeddings SET paused_at = coalesce(paused_at, now()) WHERE id = :id AND finished_at IS NULL
    """
    conn.execute(sa.text(update), {"id": life.id})


def resume(conn: sa.Connection, life: Life, plan: Plan) -> None:
    """Let it go on with ``plan``. Raises :class:`InvalidInput` if it has ended.

    Its gates are checked anew until the ramp begins. They were passed then, and nothing would check them again.
    """
    _require_open(life)
    is_judged = life.state in (_S.RAMPING, _S.FLIPPED)
    report = life.report if is_judged else dataclasses.replace(life.report, judgement={}, judged_at=None)
    update = """
        UPDATE reembeddings
        SET paused_at = NULL, problem = NULL, plan = CAST(:plan AS jsonb), report = CAST(:report AS jsonb)
        WHERE id = :id AND finished_at IS NULL
    """
    parameters = {
        "id": life.id,
        "plan": json.dumps(plan.as_json() | {"names": life.names}),
        "report": json.dumps(report.as_json(), allow_nan=False),
    }
    conn.execute(sa.text(update), parameters)
    # If it had stepped back from a share of the ramp, that share lasts its whole time again.
    again = """
        UPDATE collection_spaces SET since = now()
        WHERE reembedding_id = :id AND role = :filling
    """
    conn.execute(sa.text(again), {"id": life.id, "filling": SpaceRole.FILLING})


def cancel(conn: sa.Connection, life: Life) -> bool:
    """End it before the flip. What it leaves behind is cleaned up afterwards. False if it is not before the flip."""
    lock_of(conn, LIVES_LOCK, life.collection_id)
    update = """
        UPDATE reembeddings
        SET state = :cancelled, state_since = now(), finished_at = now(), problem = NULL, paused_at = NULL
        WHERE id = :id AND state = ANY(:before)
    """
    parameters = {"id": life.id, "cancelled": _S.CANCELLED, "before": BEFORE_FLIP}
    if conn.execute(sa.text(update), parameters).rowcount != 1:
        return False
    forget = "DELETE FROM collection_spaces WHERE reembedding_id = :id AND role = :filling"
    conn.execute(sa.text(forget), {"id": life.id, "filling": SpaceRole.FILLING})
    return True


def let_go(conn: sa.Connection, life: Life) -> bool:
    """Stop keeping the space that the collection left. It is cleaned up afterwards. False if none is kept."""
    # The collection's row is not locked, because a poller has no right to lock it.
    lock_of(conn, LIVES_LOCK, life.collection_id)
    finish = """
        UPDATE reembeddings
        SET state = CASE WHEN state = :flipped THEN :finished ELSE state END,
            state_since = CASE WHEN state = :flipped THEN now() ELSE state_since END,
            finished_at = coalesce(finished_at, now()), paused_at = NULL, problem = NULL
        WHERE id = :id AND state IN (:flipped, :rolled_back)
    """
    parameters = {"id": life.id, "flipped": _S.FLIPPED, "finished": _S.FINISHED, "rolled_back": _S.ROLLED_BACK}
    if conn.execute(sa.text(finish), parameters).rowcount != 1:
        return False
    forget = "DELETE FROM collection_spaces WHERE reembedding_id = :id AND role = :previous"
    return conn.execute(sa.text(forget), {"id": life.id, "previous": SpaceRole.PREVIOUS}).rowcount == 1


def note_cleaned(conn: sa.Connection, life: Life) -> None:
    """Note that nothing is left to delete of an ended one."""
    update = "UPDATE reembeddings SET cleaned_at = now() WHERE id = :id AND finished_at IS NOT NULL"
    conn.execute(sa.text(update), {"id": life.id})


def _require_open(life: Life) -> None:
    if life.finished_at is not None:
        raise InvalidInput(
            f"re-embedding {life.id} of collection {life.collection!r} has ended: it is {life.state.in_words}."
        )


def _life(row: sa.Row[Any]) -> Life:
    stored = dict(row.plan)
    return Life(
        id=row.id,
        collection_id=row.collection_id,
        collection=row.collection,
        is_dropped=row.collection_dropped_at is not None,
        active_space_id=row.active_space_id,
        from_space_id=row.from_space_id,
        to_space_id=row.to_space_id,
        state=ReembeddingState(row.state),
        plan=Plan.from_json(stored),
        names=stored["names"],
        report=Report.from_json(row.report),
        problem=row.problem,
        job_id=row.job_id,
        share=row.share,
        share_since=row.share_since,
        kept_since=row.kept_since,
        created_at=row.created_at,
        state_since=row.state_since,
        flipped_at=row.flipped_at,
        finished_at=row.finished_at,
        paused_at=row.paused_at,
        now=row.now,
    )


def on_long_of(space: Space) -> OnLong:
    """What happens to long texts that are embedded into a space."""
    return space.spec.long_text.policy
