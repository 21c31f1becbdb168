from __future__ import annotations

import pytest

from chunkmill.db.compatibility import SchemaLevel, why_not

KNOWN = ("0004", "0005", "0006")


@pytest.mark.parametrize(
    ("current", "oldest_code", "problem"),
    [
        ("0006", None, None),
        ("0005", None, None),  # new code beside the last release's schema
        ("0004", None, "at migration 0004, this version needs 0006 (or 0005"),
        (None, None, "the database is empty, this version needs 0006"),
        ("0007", "0006", None),  # old code beside the next release's schema
        ("0009", "0005", None),
        ("0009", "0007", "allows code of 0007 or later beside it, and this code is of 0006. Upgrade this process"),
        ("0009", None, "allows code of a later one beside it, and this code is of 0006. Upgrade this process"),
    ],
)
def test_which_code_runs_on_which_schema(current: str | None, oldest_code: str | None, problem: str | None) -> None:
    reason = why_not(SchemaLevel(current, KNOWN, oldest_code), oldest_schema="0005")
    assert (reason is None) == (problem is None)
    assert (problem or "") in (reason or "")
