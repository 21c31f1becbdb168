"""References kept with a space: what its first worker made of the golden texts (``chunkmill_workers.local.golden``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.dialects.postgresql import insert

from chunkmill.db.schema import SpaceCanaryRow


@dataclass(frozen=True, slots=True)
class Maker:
    """Who embedded the golden texts, and with what."""

    worker: str
    """``host:pid``."""
    device: str
    dtype: str
    """``float32``, ``bfloat16`` …: what the model ran in."""
    versions: Mapping[str, str]
    """Package → version, of those that reach a vector."""

    def __str__(self) -> str:
        versions = ", ".join(f"{package} {version}" for package, version in sorted(self.versions.items()))
        return f"{self.worker}: {self.dtype} on {self.device}, {versions}"


@dataclass(frozen=True, slots=True)
class Canary:
    """What one maker made of the golden texts, in their order."""

    vectors: NDArray[np.float32]
    """(n, dimensions) float32, C order; a row of zeros where ``n_tokens`` is 0."""
    n_tokens: NDArray[np.int32]
    """(n,) int32, before any truncation; 0 for a text in which the tokenizer finds nothing to embed."""
    made_by: Maker


@dataclass(frozen=True, slots=True)
class Kept:
    """One reference in the database, for an operator to look at."""

    space_id: int
    version: int
    made_by: Maker
    created_at: datetime


def find_or_keep(conn: sa.Connection, space_id: int, version: int, canary: Canary) -> Canary:
    """The space's reference of ``version``; ``canary`` where there was none. Of several first ones, one stands.

    Raises ``ValueError`` when what is kept cannot be a reference.
    """
    found = _find(conn, space_id, version)
    if found is None:
        conn.execute(
            insert(SpaceCanaryRow)
            .values(
                space_id=space_id,
                version=version,
                vectors=np.ascontiguousarray(canary.vectors, dtype="<f4").tobytes(),
                n_tokens=canary.n_tokens.tolist(),
                made_by=asdict(canary.made_by),
            )
            .on_conflict_do_nothing()
        )
        found = _find(conn, space_id, version)
    return found or canary  # forgotten again in between


def all_kept(conn: sa.Connection) -> list[Kept]:
    table = SpaceCanaryRow
    rows = conn.execute(
        sa.select(table.space_id, table.version, table.made_by, table.created_at).order_by(
            table.space_id, table.version
        )
    )
    return [Kept(row.space_id, row.version, _maker(row.made_by), row.created_at) for row in rows]


def forget(conn: sa.Connection, space_id: int) -> int:
    """Delete a space's references; the next worker that starts makes a new one. Returns how many there were."""
    return conn.execute(sa.delete(SpaceCanaryRow).where(SpaceCanaryRow.space_id == space_id)).rowcount


def _find(conn: sa.Connection, space_id: int, version: int) -> Canary | None:
    row = conn.execute(
        sa.select(SpaceCanaryRow.__table__).where(
            SpaceCanaryRow.space_id == space_id, SpaceCanaryRow.version == version
        )
    ).one_or_none()
    if row is None:
        return None
    n_tokens = np.array(row.n_tokens, np.int32)
    return Canary(np.frombuffer(row.vectors, "<f4").reshape(len(n_tokens), -1), n_tokens, _maker(row.made_by))


def _maker(fields: Mapping[str, Any]) -> Maker:
    # By name, so that what a later version adds does not stop this one.
    return Maker(fields["worker"], fields["device"], fields["dtype"], fields["versions"])
