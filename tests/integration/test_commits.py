"""Whether a transaction was committed whose answer was lost."""

from __future__ import annotations

import sqlalchemy as sa

from chunkmill.db.retry import is_committed, transaction_id
from tests.support.waiting import running


def test_postgres_tells_what_became_of_a_transaction(db: sa.Engine) -> None:
    with db.begin() as conn:
        committed = transaction_id(conn)
    with db.connect() as conn, conn.begin() as transaction:
        taken_back = transaction_id(conn)
        transaction.rollback()
    with db.begin() as conn:
        assert [is_committed(conn, number) for number in (committed, taken_back)] == [True, False]


def test_a_number_that_the_server_has_not_given_yet_was_not_committed(db: sa.Engine) -> None:
    """As after a failover to a server that had not heard of the transaction."""
    with db.begin() as conn:
        assert not is_committed(conn, str(10**12))
        assert conn.execute(sa.text("SELECT 1")).scalar_one() == 1


def test_a_transaction_whose_session_is_still_at_it_is_waited_for(db: sa.Engine) -> None:
    def ask() -> bool:
        with db.begin() as conn:
            return is_committed(conn, number)

    with db.connect() as conn, conn.begin() as transaction:
        number = transaction_id(conn)
        with running(ask) as (asking,):
            transaction.commit()
    assert asking.result()
