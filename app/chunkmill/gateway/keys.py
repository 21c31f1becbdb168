"""Whose key a request came with."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Protocol

from starlette.datastructures import Headers

from chunkmill.gateway.caller import Caller, Scope
from chunkmill.gateway.errors import Refusal


class KeyRing(Protocol):
    async def caller(self, key: str) -> Caller | None:
        """Who owns the key; None if nobody does."""


class OneKey:
    """The key that a gateway on loopback generates for itself while the database has none."""

    def __init__(self, key: str | None = None) -> None:
        self.key = key or f"cmk_{secrets.token_urlsafe(32)}"
        self._digest = _digest(self.key)

    async def caller(self, key: str) -> Caller | None:
        if not hmac.compare_digest(_digest(key), self._digest):
            return None
        return Caller(None, "local", "local", frozenset(Scope))


def key_in(headers: Headers) -> str:
    """The key of a request, in any of the headers that clients send it in. Raises :class:`Refusal` if there is none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    for name in ("api-key", "x-api-key"):
        if headers.get(name):
            return headers[name]
    raise Refusal(401, "invalid_api_key", "no API key was given. Send it as 'Authorization: Bearer KEY'.")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
