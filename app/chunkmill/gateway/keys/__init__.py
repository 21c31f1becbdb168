"""Whose key a request came with: ``ring`` says so, and ``listening`` hears which keys were revoked."""

from chunkmill.gateway.keys.headers import key_in
from chunkmill.gateway.keys.ring import KeyRing, OneKey, StoredKeys

__all__ = ["KeyRing", "OneKey", "StoredKeys", "key_in"]
