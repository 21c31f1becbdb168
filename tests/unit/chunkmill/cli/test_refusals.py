"""What is said to a login that Postgres refuses something."""

from __future__ import annotations

import psycopg
import pytest
import sqlalchemy as sa

from chunkmill.cli.__main__ import _known
from chunkmill.client.door import translated
from tests.support.checkout import CHECKOUT


@pytest.mark.parametrize("what", ["function serve_outdated_chunks", "table jobs"])
def test_nobody_is_sent_to_the_login_that_may_do_everything(what: str) -> None:
    refused = psycopg.errors.InsufficientPrivilege(f"permission denied for {what}")
    error = sa.exc.ProgrammingError("SELECT", {}, refused)
    code, of_command = _known(error)
    assert code == "not_allowed"
    for said in (of_command, str(translated("postgresql://reader@here/db", error))):
        assert f"permission denied for {what}. Use a login that may do it; docs/security.md" in said
        assert "owns" not in said
    assert "chunkmill_readers" in (CHECKOUT / "docs/security.md").read_text()
