"""Statements whose state words Postgres must read as constants."""

from __future__ import annotations

from enum import StrEnum

import sqlalchemy as sa


def with_constants(statement: str, **words: StrEnum) -> sa.TextClause:
    """A statement into which ``words`` are written as literals when it runs, instead of being sent beside it.

    Postgres uses a partial index, such as one ``WHERE state = 'available'``, only if it sees that very word while it
    plans. The plan that it keeps for a prepared statement knows no parameters.
    """
    return sa.text(statement).bindparams(
        *(sa.bindparam(name, word.value, sa.String, literal_execute=True) for name, word in words.items())
    )
