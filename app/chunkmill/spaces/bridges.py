"""The bridges of collections: adapters that carry queries of another model into a collection's active space.

A bridge ends by itself. The trigger ``end_bridges`` deletes it in the transaction that moves the collection out of the
space that the bridge leads into, and in the one that drops the collection.
"""

from __future__ import annotations

import json
import shlex
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakKeyDictionary

import sqlalchemy as sa

from chunkmill.bridge.adapters import Adapter
from chunkmill.domain.bridges import AdapterKind, Bridge, BridgeTrial
from chunkmill.errors import NotFound, StoreUnavailable
from chunkmill.spaces import others
from chunkmill.spaces.collections import Collection
from chunkmill.spaces.registry import Space, get
from chunkmill.system.forks import renew_in_child

KEPT_BYTES = 128 * 1024 * 1024
"""How many bytes of adapters a process keeps for each database, and in any case the one used last."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """A bridge as a search uses it."""

    name: str
    query_space: Space
    adapter: Adapter


def are_kept(conn: sa.Connection) -> bool:
    """False on the schema of an earlier release, on which this code runs too during an upgrade."""
    return bool(conn.execute(sa.text("SELECT to_regclass('bridges') IS NOT NULL")).scalar_one())


def require_kept(conn: sa.Connection) -> None:
    """Raise :class:`StoreUnavailable` on the schema of an earlier release."""
    if not are_kept(conn):
        raise StoreUnavailable("the database has no table for bridges yet. Run: chunkmill migrate")


def find(conn: sa.Connection, collection: Collection, name: str) -> Crossing | None:
    """The bridge by which queries of the model ``name`` are answered in a collection.

    None if the collection is in a space of that model: the bridge has ended, and none is needed. Raises
    :class:`NotFound` if there is neither.
    """
    require_kept(conn)
    query = """
        SELECT id, name, query_space_id
        FROM bridges
        WHERE collection_id = :collection AND space_id = :space AND name = :name
    """
    parameters = {"collection": collection.id, "space": collection.space_id, "name": name}
    row = conn.execute(sa.text(query), parameters).one_or_none()
    if row is not None:
        return Crossing(row.name, get(conn, row.query_space_id), _adapter(conn, row.id))
    if get(conn, collection.space_id).spec.model == name:
        return None
    names = [bridge.name for bridge in of_collections(conn, [collection.id])]
    known = f"It has these: {', '.join(map(repr, names))}." if names else "It has none."
    raise NotFound(
        f"collection {collection.name!r} has no bridge {name!r}. {known} "
        f"To learn one: client.bridge({collection.name!r}, MODEL), or: "
        f"chunkmill bridge learn {shlex.quote(collection.name)} MODEL"
    )


def other_space(conn: sa.Connection, collection: Collection, model: str) -> Space | None:
    """The space of a model that the collection has beside its active one; None if it has none, or several."""
    beside = (get(conn, space_id) for space_id in others.of(conn, collection.id).others)
    of_model = [space for space in beside if space.spec.model == model]
    return of_model[0] if len(of_model) == 1 else None


def keep(conn: sa.Connection, bridge: Bridge, adapter: Adapter, collection: Collection, query_space: Space) -> bool:
    """Store a bridge in place of the one of the same name. False if the collection has left the space meanwhile.

    ``query_space`` must be held, as by ``registry.register_and_hold``.
    """
    # A flip that is under way is waited for, and its new space is then seen. So is another one who learns a bridge.
    hold = """
        SELECT id
        FROM collections
        WHERE id = :collection AND space_id = :space AND dropped_at IS NULL
        FOR NO KEY UPDATE
    """
    parameters: dict[str, object] = {"collection": collection.id, "space": collection.space_id}
    if conn.execute(sa.text(hold), parameters).one_or_none() is None:
        return False
    delete = "DELETE FROM bridges WHERE collection_id = :collection AND name = :name"
    conn.execute(sa.text(delete), {"collection": collection.id, "name": bridge.name})
    insert = """
        INSERT INTO bridges (collection_id, name, query_space_id, space_id, kind, shapes, arrays, report)
        VALUES (:collection, :name, :query_space, :space, :kind, CAST(:shapes AS jsonb), :arrays,
                CAST(:report AS jsonb))
    """
    report = {name: value for name, value in asdict(bridge).items() if name not in _COLUMNS}
    parameters |= {
        "name": bridge.name,
        "query_space": query_space.id,
        "kind": adapter.kind,
        "shapes": json.dumps(adapter.shapes()),
        "arrays": adapter.to_bytes(),
        "report": json.dumps(report),
    }
    conn.execute(sa.text(insert), parameters)
    return True


_COLUMNS = {"collection", "name", "query_space", "space", "kind", "created_at"}
"""What a report has besides is in columns of its own."""


def of_collections(conn: sa.Connection, ids: Sequence[int] | None = None) -> list[Bridge]:
    """The bridges of these collections, or of all, by collection and name."""
    query = """
        SELECT k.name AS collection, b.name, q.fingerprint AS query_space, s.fingerprint AS space, b.kind, b.report,
               b.created_at
        FROM bridges b
        JOIN collections k ON k.id = b.collection_id
        JOIN spaces q ON q.id = b.query_space_id
        JOIN spaces s ON s.id = b.space_id
        WHERE CAST(:ids AS integer[]) IS NULL OR k.id = ANY(CAST(:ids AS integer[]))
        ORDER BY k.name, b.name
    """
    rows = conn.execute(sa.text(query), {"ids": None if ids is None else list(ids)})
    return [_bridge(dict(row)) for row in rows.mappings()]


def _bridge(row: dict[Any, Any]) -> Bridge:
    report = row["report"]
    trials = tuple(BridgeTrial(**{**trial, "kind": AdapterKind(trial["kind"])}) for trial in report["trials"])
    columns = {name: row[name] for name in _COLUMNS} | {"kind": AdapterKind(str(row["kind"]))}
    return Bridge(**{**report, **columns, "trials": trials})


def drop(conn: sa.Connection, collection: Collection, name: str) -> bool:
    """Delete a bridge. Returns whether there was one."""
    delete = "DELETE FROM bridges WHERE collection_id = :collection AND name = :name"
    return bool(conn.execute(sa.text(delete), {"collection": collection.id, "name": name}).rowcount)


def user_of(conn: sa.Connection, space_id: int) -> str | None:
    """The name of a collection with a bridge from or into a space; None if there is none."""
    query = """
        SELECT k.name
        FROM bridges b
        JOIN collections k ON k.id = b.collection_id
        WHERE :space IN (b.query_space_id, b.space_id)
        ORDER BY k.name
        LIMIT 1
    """
    name: str | None = conn.execute(sa.text(query), {"space": space_id}).scalar_one_or_none()
    return name


_mutex = threading.Lock()
renew_in_child(sys.modules[__name__], "_mutex")
_kept: WeakKeyDictionary[sa.Engine, OrderedDict[int, Adapter]] = WeakKeyDictionary()


def _adapter(conn: sa.Connection, bridge_id: int) -> Adapter:
    """The adapter of a bridge, from memory if this process has read it. A bridge that is learnt anew has a new id."""
    with _mutex:
        kept = _kept.setdefault(conn.engine, OrderedDict())
        if (known := kept.get(bridge_id)) is not None:
            kept.move_to_end(bridge_id)
            return known
    query = "SELECT kind, shapes, arrays FROM bridges WHERE id = :id"
    row = conn.execute(sa.text(query), {"id": bridge_id}).one_or_none()
    if row is None:
        raise NotFound("the bridge has just been dropped or learnt anew. The same call may be made again.")
    try:
        adapter = Adapter.from_bytes(row.kind, row.shapes, bytes(row.arrays))
    except (ValueError, TypeError) as error:
        raise StoreUnavailable(
            f"the stored bridge {bridge_id} is damaged ({error}). Learn it anew: client.bridge(…)"
        ) from None
    with _mutex:
        kept[bridge_id] = adapter
        while len(kept) > 1 and sum(one.nbytes for one in kept.values()) > KEPT_BYTES:
            kept.popitem(last=False)
    return adapter
