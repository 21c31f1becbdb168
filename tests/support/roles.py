"""Databases with the roles of deploy/postgres-role.sql."""

from __future__ import annotations

import psycopg
import sqlalchemy as sa

from tests.support.checkout import CHECKOUT

ROLES = CHECKOUT / "deploy" / "postgres-role.sql"


def as_role(url: str, role: str) -> str:
    """The URL with another user."""
    return sa.make_url(url).set(username=role).render_as_string(hide_password=False)


def run_file(url: str) -> None:
    """Run the file in a database, as the user of the URL."""
    with psycopg.connect(url.replace("+psycopg", "")) as conn:
        conn.execute(ROLES.read_text())
