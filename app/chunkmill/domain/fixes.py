"""Which releases of the servers have the security fixes that matter here. Carry the table along with new advisories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fixes:
    """The fixes of one server."""

    what: str
    first: Mapping[tuple[int, ...], int]
    """By branch, the first patch release that has the fixes. Later branches have them from the start, and a branch
    between two of these never got them."""

    def are_in(self, version: tuple[int, ...]) -> bool:
        """Whether this version has them."""
        length = len(next(iter(self.first)))
        branch, patch = version[:length], version[length : length + 1]
        if branch in self.first:
            return patch >= (self.first[branch],)
        return branch > max(self.first)

    def releases(self) -> str:
        """The first releases that have them, for messages."""
        return ", ".join(".".join(map(str, (*branch, patch))) for branch, patch in self.first.items())


_SCRIPTS = "the fixes of October 2025 (CVE-2025-49844: whoever may run a script in Redis may run code as its user)"
FIXES = {
    "redis": Fixes(_SCRIPTS, {(6, 2): 20, (7, 2): 11, (7, 4): 6, (8, 0): 4, (8, 2): 2}),
    "valkey": Fixes(_SCRIPTS, {(7, 2): 11, (8, 0): 6, (8, 1): 4}),
    "postgres": Fixes(
        "the fixes of May 2026 (CVE-2026-6473: any role may corrupt the server's memory)",
        {(15,): 18, (16,): 14, (17,): 10, (18,): 4},
    ),
}
