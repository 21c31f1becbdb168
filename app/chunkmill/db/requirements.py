"""What the database server must be, in the words that ``migrate``, ``doctor``, clients and workers share."""

from __future__ import annotations

import re

OLDEST_POSTGRES = (15,)
OLDEST_PGVECTOR = (0, 8)


def version_problem(version: str) -> str | None:
    """Why this version of Postgres will not do, and what to do; None if it will."""
    if numbers(version) >= OLDEST_POSTGRES:
        return None
    return f"Postgres is {version}. Chunkmill needs 15 or later."


def encoding_problem(encoding: str) -> str | None:
    """Why a database of this encoding will not do, and what to do; None if it will."""
    if encoding == "UTF8":
        return None
    return (
        f"the encoding of the database is {encoding}, which cannot hold every text. Chunkmill needs UTF8. Create "
        "another database: CREATE DATABASE chunkmill ENCODING 'UTF8' TEMPLATE template0 LOCALE 'C'; and name it in "
        "DATABASE_URL."
    )


def pgvector_problem(installed: str | None, available: str | None) -> str | None:
    """Why this pgvector will not do, and what to do; None if it will.

    ``installed`` is the version in the database, and ``available`` the one that the server could install; None if there
    is none.
    """
    if installed is None and available is None:
        return "pgvector is not on the database server. Install the extension pgvector there, 0.8 or later."
    if installed is None:
        if numbers(available or "") >= OLDEST_PGVECTOR:
            return None
        return f"the server would install pgvector {available}. Chunkmill needs 0.8 or later: upgrade it on the server."
    if numbers(installed) >= OLDEST_PGVECTOR:
        return None
    return (
        f"pgvector is {installed}. Chunkmill needs 0.8 or later: upgrade it on the server, then let the extension's "
        "owner run: ALTER EXTENSION vector UPDATE;"
    )


def numbers(version: str) -> tuple[int, ...]:
    """The first numbers of a version, for comparisons: ``(0, 8, 1)``."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
