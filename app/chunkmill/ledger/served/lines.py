"""The lines of a served batch: written when its file is validated, judged when its job has ended, read for downloads.

The texts of a line are chunks of the batch's hidden collection; ``chunkmill.domain.served.chunk_id`` says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill.db.copy import copy_in
from chunkmill.domain.served import chunk_id, position_of
from chunkmill.spaces.registry import Space, VectorTable
from chunkmill.store.chunks import decoded

OK = 200
NEVER_EXECUTED = 0
SLICE_LINES, SLICE_INPUTS = 500, 1_000
"""The most lines, and about the most inputs, that are in memory at a time."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line, numbered from 0. ``status`` is an HTTP status, 0 if it was never executed, None while it is not known.

    ``param`` is the field of the body that is wrong. ``dimensions`` are None if the line does not say.
    """

    line: int
    custom_id: str
    n_inputs: int
    dimensions: int | None = None
    is_base64: bool = False
    refuses_long: bool = False
    status: int | None = None
    code: str | None = None
    message: str | None = None
    param: str | None = None

    @property
    def chunk_ids(self) -> list[str]:
        """The ids of its chunks, in the order of its inputs."""
        return [chunk_id(self.line, position) for position in range(self.n_inputs)]


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What is known of the inputs of one line that have a vector, by their positions."""

    positions: list[int]
    n_tokens: list[int]
    """How many tokens of each the model read."""
    truncated: list[int]
    """The positions of those that were truncated."""
    vectors: NDArray[np.float32]
    """``(len(positions), d)``."""
    normalize: bool = True
    """Whether vectors of the space have the length 1."""


NO_INPUTS = Inputs([], [], [], np.empty((0, 0), np.float32))


def forget(conn: sa.Connection, batch_id: int) -> None:
    """Delete what an earlier try of the validation has written."""
    conn.execute(sa.text("DELETE FROM served_batch_lines WHERE served_batch_id = :batch"), {"batch": batch_id})


def add(conn: sa.Connection, batch_id: int, lines: Iterable[Line]) -> None:
    """Add lines, by COPY."""
    columns = (
        "served_batch_id, line, custom_id, n_inputs, dimensions, is_base64, refuses_long, status, code, message, param"
    )
    with copy_in(conn, f"served_batch_lines ({columns})") as copy:
        copy.set_types(["int8", "int4", "text", "int4", "int4", "bool", "bool", "int2", "text", "text", "text"])
        for line in lines:
            copy.write_row(
                (
                    batch_id,
                    line.line,
                    line.custom_id,
                    line.n_inputs,
                    line.dimensions,
                    line.is_base64,
                    line.refuses_long,
                    line.status,
                    line.code,
                    line.message,
                    line.param,
                )
            )


def read(conn: sa.Connection, batch_id: int, *, after: int = -1) -> list[Line]:
    """The next lines behind the number ``after``: about ``SLICE_INPUTS`` inputs, and at least one line."""
    query = """
        SELECT *
        FROM (
            SELECT l.*, row_number() OVER by_line AS n, sum(n_inputs) OVER by_line AS inputs
            FROM served_batch_lines l
            WHERE served_batch_id = :batch AND line > :after AND line <= :last
            WINDOW by_line AS (ORDER BY line)
        ) x
        WHERE n = 1 OR inputs <= :inputs
        ORDER BY line
    """
    # The sum is made here and not in Postgres, because psycopg sends small numbers as smallints, and their sum could
    # overflow.
    parameters = {"batch": batch_id, "after": after, "last": after + SLICE_LINES, "inputs": SLICE_INPUTS}
    return [
        Line(
            row.line,
            row.custom_id,
            row.n_inputs,
            row.dimensions,
            row.is_base64,
            row.refuses_long,
            row.status,
            row.code,
            row.message,
            row.param,
        )
        for row in conn.execute(sa.text(query), parameters)
    ]


def read_inputs(conn: sa.Connection, space: Space, collection_id: int, lines: Sequence[Line]) -> dict[int, Inputs]:
    """What is known of the inputs of ``lines``, by their numbers. A line without any vector is left out."""
    query = f"""
        SELECT c.chunk_id, v.n_tokens, v.truncated, {space.storage}_send(v.embedding) AS embedding
        FROM chunks c
        JOIN {space.table_name} v USING (content_hash)
        WHERE c.collection_id = :collection AND c.chunk_id = ANY(:ids)
        ORDER BY c.chunk_id
    """
    ids = [chunk for line in lines for chunk in line.chunk_ids]
    rows = conn.execute(sa.text(query), {"collection": collection_id, "ids": ids}).all()
    vectors = decoded(space, [row.embedding for row in rows])
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(position_of(row.chunk_id)[0], []).append(place)
    of_lines = {}
    for line, of_line in places.items():
        positions = [position_of(rows[place].chunk_id)[1] for place in of_line]
        of_lines[line] = Inputs(
            positions,
            [min(rows[place].n_tokens, space.spec.max_tokens) for place in of_line],
            [position for position, place in zip(positions, of_line, strict=True) if rows[place].truncated],
            vectors[of_line],
            space.spec.normalize,
        )
    return of_lines


@dataclass(frozen=True, slots=True)
class DeadInput:
    """Why an input has no vector."""

    position: int
    code: str
    reason: str


def read_dead(conn: sa.Connection, job_id: int, lines: Sequence[Line]) -> dict[int, DeadInput]:
    """The first dead input of each of ``lines`` that has one, by the numbers of the lines."""
    query = """
        SELECT chunk_id, code, reason
        FROM dead_chunks
        WHERE job_id = :job AND chunk_id = ANY(:ids)
        ORDER BY chunk_id DESC
    """
    ids = [chunk for line in lines for chunk in line.chunk_ids]
    dead = {}
    for row in conn.execute(sa.text(query), {"job": job_id, "ids": ids}):
        line, position = position_of(row.chunk_id)
        dead[line] = DeadInput(position, row.code, row.reason)
    return dead


def totals(conn: sa.Connection, batch_id: int) -> tuple[int, int]:
    """How many lines a batch has, and how many of them were refused when its file was validated."""
    query = """
        SELECT count(*) AS n, count(*) FILTER (WHERE n_inputs = 0) AS refused
        FROM served_batch_lines
        WHERE served_batch_id = :batch
    """
    row = conn.execute(sa.text(query), {"batch": batch_id}).one()
    return int(row.n), int(row.refused)


def set_outcomes(conn: sa.Connection, batch_id: int, lines: Sequence[Line]) -> None:
    """Write down how these lines ended."""
    update = """
        UPDATE served_batch_lines l
        SET status = o.status, code = o.code, message = o.message, param = o.param
        FROM unnest(
            CAST(:lines AS int[]), CAST(:statuses AS int[]), CAST(:codes AS text[]), CAST(:messages AS text[]),
            CAST(:params AS text[])
        ) AS o(line, status, code, message, param)
        WHERE l.served_batch_id = :batch AND l.line = o.line
    """
    parameters = {
        "batch": batch_id,
        "lines": [line.line for line in lines],
        "statuses": [line.status for line in lines],
        "codes": [line.code for line in lines],
        "messages": [line.message for line in lines],
        "params": [line.param for line in lines],
    }
    conn.execute(sa.text(update), parameters)


def count(conn: sa.Connection, batch_id: int, space: VectorTable, collection_id: int) -> tuple[int, int]:
    """``(completed, failed)`` of the lines of a batch in progress: those whose inputs all have a vector, and those that
    failed when the file was validated.
    """
    query = f"""
        WITH embedded AS (
            SELECT CAST(left(c.chunk_id, 6) AS integer) AS line, count(*) AS n
            FROM chunks c
            JOIN {space.table_name} v USING (content_hash)
            WHERE c.collection_id = :collection
            GROUP BY 1
        )
        SELECT count(*) FILTER (WHERE l.status IS NULL AND e.n = l.n_inputs) AS completed,
               count(*) FILTER (WHERE l.status >= 400) AS failed
        FROM served_batch_lines l
        LEFT JOIN embedded e USING (line)
        WHERE l.served_batch_id = :batch
    """
    row = conn.execute(sa.text(query), {"batch": batch_id, "collection": collection_id}).one()
    return int(row.completed), int(row.failed)
