"""Keys of the gateway: what they look like, what they allow, and how much. Pure.

A key is ``cmk_<id>_<secret>``. The secret is 32 random bytes, so its SHA-256 can be stored as it is: a hash that is
slow to compute protects secrets that can be guessed, and would cost every request milliseconds.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Final

PREFIX: Final = "cmk"
SHOWN: Final = 4
"""How many characters of the secret are kept, by which a person tells keys apart. 232 random bits are left."""
_KEY = re.compile(r"cmk_([1-9][0-9]{0,17})_([A-Za-z0-9_-]{43})", re.ASCII)


class Scope(StrEnum):
    """What a key allows. ``ADMIN`` allows everything."""

    EMBED = "embed"
    SEARCH = "search"
    JOBS = "jobs"
    BATCHES = "batches"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """How much a key may use; None means without limit.

    Limits of a minute and of requests at once are kept by each gateway on its own. Those of a month (UTC) hold for all
    gateways together.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    parallel_requests: int | None = None
    tokens_per_month: int | None = None
    usd_per_month: Decimal | None = None

    @property
    def has_month(self) -> bool:
        return self.tokens_per_month is not None or self.usd_per_month is not None


UNLIMITED: Final = KeyLimits()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as the database has it, without its digest."""

    id: int
    prefix: str
    name: str
    tenant: str
    scopes: tuple[Scope, ...]
    models: tuple[str, ...] | None
    collections: tuple[str, ...] | None
    limits: KeyLimits
    created_at: datetime
    last_used_at: datetime | None
    expires_at: datetime | None
    revoked_at: datetime | None

    def state(self, now: datetime) -> str:
        """``live``, ``revoked`` or ``expired``."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "live"


@dataclass(frozen=True, slots=True)
class MonthUsage:
    """What a key used in this month (UTC)."""

    requests: int = 0
    tokens: int = 0
    usd: Decimal = Decimal(0)
    """US dollars of its requests, and of the jobs, batches and re-embeddings that it began."""
    reserved_usd: Decimal = Decimal(0)
    """The part of ``usd`` that jobs, batches and re-embeddings under way are still expected to cost."""


def new_secret() -> str:
    """43 characters of base64url."""
    return secrets.token_urlsafe(32)


def key_of(key_id: int, secret: str) -> str:
    return f"{PREFIX}_{key_id}_{secret}"


def digest_of(secret: str) -> bytes:
    """``(32,)`` bytes."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def parse_key(key: str) -> tuple[int, str] | None:
    """The id and the secret in a key; None if it does not look like one."""
    match = _KEY.fullmatch(key)
    return None if match is None else (int(match[1]), match[2])
