"""The SQL that the documents show is SQL that this schema answers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sqlalchemy as sa

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```sql\n(.*?)^```$", re.DOTALL | re.MULTILINE)
QUERIES = [
    pytest.param(query, id=f"{page.stem}-{number}")
    for page in sorted((ROOT / "docs").glob("*.md"))
    for number, query in enumerate(query for block in BLOCK.findall(page.read_text()) for query in block.split(";\n"))
    if query.strip()
]


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_of_the_documents_runs_and_changes_nothing(query: str, db: sa.Engine) -> None:
    with db.connect() as conn:
        conn.execute(sa.text("SET TRANSACTION READ ONLY"))
        conn.execute(sa.text(query)).all()


def test_the_documents_have_queries() -> None:
    assert len(QUERIES) >= 10
