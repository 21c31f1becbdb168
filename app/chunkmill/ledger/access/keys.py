"""Creates, lists and revokes the keys of the gateway, and reads them for it.

``NOTIFY`` tells every gateway that a key was revoked, as soon as that is committed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from chunkmill.domain.keys import SHOWN, ApiKey, KeyLimits, MonthUsage, Scope, digest_of, key_of, new_secret
from chunkmill.ledger.access import spends
from chunkmill.spaces import collections

CHANNEL = "chunkmill_api_keys"
"""The payload of a notification is the id of the key that changed."""

_CREATE = sa.text("""
INSERT INTO api_keys (
    prefix, sha256, name, tenant, scopes, models, collections, requests_per_minute, tokens_per_minute,
    parallel_requests, tokens_per_month, usd_per_month, expires_at
)
VALUES (
    :prefix, :sha256, :name, :tenant, :scopes, :models, :collections, :requests_per_minute, :tokens_per_minute,
    :parallel_requests, :tokens_per_month, :usd_per_month, :expires_at
)
RETURNING id
""")
_LIST = sa.text("""
SELECT
    k.id, k.prefix, k.name, k.tenant, k.scopes, k.models, k.collections, k.requests_per_minute, k.tokens_per_minute,
    k.parallel_requests, k.tokens_per_month, k.usd_per_month, k.created_at, k.last_used_at, k.expires_at, k.revoked_at,
    coalesce(u.requests, 0) AS used_requests, coalesce(u.tokens, 0) AS used_tokens, coalesce(u.usd, 0) AS used_usd
FROM api_keys k
LEFT JOIN api_key_usage u
    ON u.key_id = k.id AND u.month = date_trunc('month', now() AT TIME ZONE 'UTC')::date
ORDER BY k.id
""")
_RESERVED = sa.text("""
SELECT s.key_id, sum(m.reserved) AS usd
FROM api_key_spends s
JOIN api_key_spend_months m
    ON m.spend_id = s.id AND m.month = date_trunc('month', now() AT TIME ZONE 'UTC')::date
WHERE s.settled_at IS NULL
GROUP BY s.key_id
""")
_READ = sa.text("""
SELECT
    id, prefix, sha256, name, tenant, scopes, models, collections, requests_per_minute, tokens_per_minute,
    parallel_requests, tokens_per_month, usd_per_month, created_at, last_used_at, expires_at, revoked_at
FROM api_keys
WHERE id = ANY(:ids) AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())
""")
_REVOKE = sa.text("""
UPDATE api_keys
SET revoked_at = now()
WHERE id = :id AND revoked_at IS NULL
""")
_LIVE = sa.text("""
SELECT EXISTS (
    SELECT FROM api_keys
    WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())
)
""")
_USED = sa.text("""
UPDATE api_keys
SET last_used_at = now()
WHERE id = ANY(:ids) AND (last_used_at IS NULL OR last_used_at < now() - make_interval(secs => :seconds))
""")


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key that is neither revoked nor expired, and the SHA-256 of its secret."""

    key: ApiKey
    sha256: bytes


def create(
    conn: sa.Connection,
    *,
    name: str,
    tenant: str,
    scopes: Collection[Scope],
    models: Sequence[str] | None = None,
    collections: Sequence[str] | None = None,
    limits: KeyLimits,
    expires_at: datetime | None = None,
) -> tuple[int, str]:
    """Create a key and return its id and the key itself, which nobody can read again."""
    secret = new_secret()
    parameters = {
        "prefix": secret[:SHOWN],
        "sha256": digest_of(secret),
        "name": name,
        "tenant": tenant,
        "scopes": sorted(scopes),
        "models": None if models is None else sorted(set(models)),
        "collections": None if collections is None else sorted(set(collections)),
        "requests_per_minute": limits.requests_per_minute,
        "tokens_per_minute": limits.tokens_per_minute,
        "parallel_requests": limits.parallel_requests,
        "tokens_per_month": limits.tokens_per_month,
        "usd_per_month": limits.usd_per_month,
        "expires_at": expires_at,
    }
    key_id: int = conn.execute(_CREATE, parameters).scalar_one()
    return key_id, key_of(key_id, secret)


def list_all(conn: sa.Connection) -> list[tuple[ApiKey, MonthUsage]]:
    """All keys, also revoked ones, and what they used in this month, in the order of their ids."""
    reserved = {row.key_id: row.usd for row in conn.execute(_RESERVED)} if spends.are_kept(conn) else {}
    return [
        (_key(row), MonthUsage(row.used_requests, row.used_tokens, row.used_usd, reserved.get(row.id, Decimal(0))))
        for row in conn.execute(_LIST)
    ]


def read(conn: sa.Connection, ids: Collection[int]) -> dict[int, StoredKey]:
    """The given keys by id, without those that are revoked or expired."""
    rows = conn.execute(_READ, {"ids": list(ids)})
    return {row.id: StoredKey(_key(row), bytes(row.sha256)) for row in rows}


def revoke(conn: sa.Connection, key_id: int) -> bool:
    """Revoke a key in every gateway, at the commit. False if there is no such key, or if it was revoked before."""
    if not conn.execute(_REVOKE, {"id": key_id}).rowcount:
        return False
    conn.execute(sa.text("SELECT pg_notify(:channel, :id)"), {"channel": CHANNEL, "id": str(key_id)})
    return True


def any_live(conn: sa.Connection) -> bool:
    """Whether any key is neither revoked nor expired."""
    return bool(conn.execute(_LIVE).scalar_one())


def unknown_collections(conn: sa.Connection, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that no collection has yet. None of them if this login may not read the collections."""
    may = """
        SELECT has_table_privilege('collections', 'SELECT') AND has_table_privilege('collection_aliases', 'SELECT')
    """
    if not conn.execute(sa.text(may)).scalar_one():
        return []
    return [name for name in names if collections.resolve(conn, name) is None]


def note_used(conn: sa.Connection, ids: Collection[int], *, seconds: float) -> None:
    """Note that the keys are used now. A key whose use was noted less than ``seconds`` ago is left out."""
    conn.execute(_USED, {"ids": sorted(ids), "seconds": seconds})


def _key(row: Any) -> ApiKey:
    return ApiKey(
        id=row.id,
        prefix=row.prefix,
        name=row.name,
        tenant=row.tenant,
        scopes=tuple(Scope(scope) for scope in row.scopes),
        models=None if row.models is None else tuple(row.models),
        collections=None if row.collections is None else tuple(row.collections),
        limits=KeyLimits(
            row.requests_per_minute,
            row.tokens_per_minute,
            row.parallel_requests,
            row.tokens_per_month,
            row.usd_per_month,
        ),
        created_at=row.created_at,
        last_used_at=row.last_used_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )
