"""The references of the spaces: what a first worker made of the golden texts (``chunkmill_workers.local.golden``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Maker:
    """The worker that embedded the golden texts, and its software."""

    worker: str
    """``host:pid``."""
    device: str
    dtype: str
    """The type in which the model ran, for example ``bfloat16``."""
    versions: Mapping[str, str]
    """Package → version, of the packages that can change a vector."""

    def __str__(self) -> str:
        versions = ", ".join(f"{package} {version}" for package, version in sorted(self.versions.items()))
        return f"{self.worker}: {self.dtype} on {self.device}, {versions}"


@dataclass(frozen=True, slots=True)
class Canary:
    """The vectors that one maker made of the golden texts, in their order."""

    vectors: NDArray[np.float32]
    """(n, dimensions) float32, C order; a row is zeros if its ``n_tokens`` is 0."""
    n_tokens: NDArray[np.int32]
    """(n,) int32, before any truncation; 0 for a text in which the tokenizer finds no token."""
    made_by: Maker


@dataclass(frozen=True, slots=True)
class KeptCanary:
    """One reference in the database, as an operator sees it."""

    space_id: int
    version: int
    made_by: Maker
    created_at: datetime


def find_or_keep(conn: sa.Connection, space_id: int, version: int, canary: Canary) -> Canary:
    """Return the space's reference of ``version``. If there is none, keep ``canary`` as the reference.

    If several workers are the first at once, one of theirs is kept. Raises ``ValueError`` if the row in the database
    cannot be a reference.
    """
    kept = _find(conn, space_id, version)
    if kept is None:
        insert = """
            INSERT INTO space_canaries (space_id, version, vectors, n_tokens, made_by)
            VALUES (:space, :version, :vectors, :n_tokens, CAST(:made_by AS jsonb))
            ON CONFLICT DO NOTHING
        """
        parameters = {
            "space": space_id,
            "version": version,
            "vectors": np.ascontiguousarray(canary.vectors, dtype="<f4").tobytes(),
            "n_tokens": canary.n_tokens.tolist(),
            "made_by": json.dumps(asdict(canary.made_by)),
        }
        conn.execute(sa.text(insert), parameters)
        kept = _find(conn, space_id, version)
    return kept or canary  # None if an operator made the space forget it in between


def all_kept(conn: sa.Connection) -> list[KeptCanary]:
    """The references of all spaces, without their vectors."""
    query = "SELECT space_id, version, made_by, created_at FROM space_canaries ORDER BY space_id, version"
    rows = conn.execute(sa.text(query))
    return [KeptCanary(row.space_id, row.version, _maker(row.made_by), row.created_at) for row in rows]


def forget(conn: sa.Connection, space_id: int) -> int:
    """Delete a space's references; the next worker that starts makes a new one. Returns how many were deleted."""
    return conn.execute(sa.text("DELETE FROM space_canaries WHERE space_id = :space"), {"space": space_id}).rowcount


def _find(conn: sa.Connection, space_id: int, version: int) -> Canary | None:
    query = "SELECT vectors, n_tokens, made_by FROM space_canaries WHERE space_id = :space AND version = :version"
    row = conn.execute(sa.text(query), {"space": space_id, "version": version}).one_or_none()
    if row is None:
        return None
    n_tokens = np.array(row.n_tokens, np.int32)
    return Canary(np.frombuffer(row.vectors, "<f4").reshape(len(n_tokens), -1), n_tokens, _maker(row.made_by))


def _maker(fields: Mapping[str, Any]) -> Maker:
    # By name, so that a field which a later version adds does not stop this one.
    return Maker(fields["worker"], fields["device"], fields["dtype"], fields["versions"])
