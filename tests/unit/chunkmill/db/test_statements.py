"""State words that Postgres reads as constants while it plans."""

from __future__ import annotations

from sqlalchemy.dialects import postgresql

from chunkmill.db.statements import with_constants
from chunkmill.domain.states import ChunkBatchState


def test_state_words_are_written_into_the_statement_and_other_parameters_are_not() -> None:
    statement = with_constants("WHERE state = :available AND id = :id", available=ChunkBatchState.AVAILABLE)
    compiled = statement.bindparams(id=1).compile(
        dialect=postgresql.dialect(), compile_kwargs={"render_postcompile": True}
    )
    assert str(compiled) == "WHERE state = 'available' AND id = %(id)s::INTEGER"
