"""Lets the server of a test look as if it had started at another time."""

from __future__ import annotations

import sqlalchemy as sa


def server_started(db: sa.Engine, ago: str) -> None:
    """In this database ``pg_postmaster_start_time()`` is ``ago``, such as ``'1 day'``, in connections made from now on.

    The connections of ``db`` are made anew.
    """
    start = f"""
        CREATE OR REPLACE FUNCTION public.pg_postmaster_start_time() RETURNS timestamptz LANGUAGE sql AS
        $$ SELECT clock_timestamp() - interval '{ago}' $$
    """
    before_the_real_one = """
        DO $$ BEGIN
            EXECUTE format('ALTER DATABASE %I SET search_path = public, pg_catalog', current_database());
        END $$
    """
    with db.begin() as conn:
        conn.execute(sa.text(start))
        conn.execute(sa.text(before_the_real_one))
    db.dispose()
