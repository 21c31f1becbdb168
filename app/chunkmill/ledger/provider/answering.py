"""Which model of the provider answered for each space. The first answer says it, and every later one must agree."""

from __future__ import annotations

import logging

import sqlalchemy as sa

from chunkmill.domain.providers import OPENAI_MODELS
from chunkmill.openai.wire.models import is_another, is_same_model

OTHER_MODEL = "other_model"
"""The code of a lane that stopped, and the kind of an oddity, because another model answered."""

logger = logging.getLogger(__name__)


def refuse_model(conn: sa.Connection, space_id: int, *, asked: str, answered: str | None) -> str | None:
    """Why vectors that the model ``answered`` has made may not enter the space; None if they may.

    An answer that does not name its model may enter. Call it in the transaction that writes the vectors.
    """
    if answered is None or not _is_kept(conn):
        return None
    known = _noted(conn, space_id)
    if known is None:
        if is_another(answered, asked, OPENAI_MODELS):
            return _reason(conn, space_id, asked, answered)
        known = _note(conn, space_id, answered)
        if not is_same_model(known, asked):
            logger.warning(
                "space %s: the provider was asked for model %s and answers as %s. From now on only that model's "
                "vectors enter the space",
                space_id,
                asked,
                known,
            )
    if not is_same_model(known, answered):
        return _reason(conn, space_id, known, answered)
    if len(answered) > len(known):  # the name now has a date; from now on another date is another model
        conn.execute(
            sa.text("UPDATE answering_models SET model = :model WHERE space_id = :space"),
            {"space": space_id, "model": answered},
        )
    return None


def forget_model(conn: sa.Connection, space_id: int) -> int:
    """Forget which model answered for a space: the next answer says it. Returns how many names were deleted."""
    if not _is_kept(conn):
        return 0
    return conn.execute(sa.text("DELETE FROM answering_models WHERE space_id = :space"), {"space": space_id}).rowcount


def _noted(conn: sa.Connection, space_id: int) -> str | None:
    query = "SELECT model FROM answering_models WHERE space_id = :space"
    return conn.execute(sa.text(query), {"space": space_id}).scalar_one_or_none()


def _note(conn: sa.Connection, space_id: int, answered: str) -> str:
    """Note the model, unless another worker has noted one at the same moment; returns the model that is noted."""
    conn.execute(
        sa.text("""
            INSERT INTO answering_models (space_id, model)
            VALUES (:space, :model)
            ON CONFLICT (space_id) DO NOTHING
        """),
        {"space": space_id, "model": answered},
    )
    return _noted(conn, space_id) or answered


def _reason(conn: sa.Connection, space_id: int, expected: str, answered: str) -> str:
    query = "SELECT left(fingerprint, 12) FROM spaces WHERE id = :id"
    space = conn.execute(sa.text(query), {"id": space_id}).scalar_one_or_none()
    return (
        f"the provider answered with model {answered!r}, and space {space} has vectors of {expected!r}. Nothing of "
        "the answer was written. Make the server answer with that model, or, if both names mean the same weights, run: "
        f"chunkmill models canary --reset {space}"
    )


def _is_kept(conn: sa.Connection) -> bool:
    """False on the schema of the last release, on which this code runs too during an upgrade."""
    return bool(conn.execute(sa.text("SELECT to_regclass('answering_models') IS NOT NULL")).scalar_one())
