"""Who calls, and what the caller may do."""

from __future__ import annotations

from dataclasses import dataclass

from chunkmill.domain.keys import UNLIMITED, KeyLimits, Scope

__all__ = ["NOBODY", "Caller", "Scope"]


@dataclass(frozen=True, slots=True)
class Caller:
    """The owner of the key that a request came with.

    ``key_id`` is None for the key that a gateway on loopback generated for itself. Without ``models`` or
    ``collections`` the caller may use all of them. Callers of one ``tenant`` see each other's files and batches; jobs
    are seen by whoever may use their collections.
    """

    key_id: int | None
    name: str
    tenant: str
    scopes: frozenset[Scope]
    models: frozenset[str] | None = None
    collections: frozenset[str] | None = None
    limits: KeyLimits = UNLIMITED

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models

    def may_see(self, collection: str) -> bool:
        return self.collections is None or collection in self.collections


NOBODY = Caller(None, "", "", frozenset())
"""Who calls an endpoint that needs no key."""
