"""Binary COPY and the write path, row for row."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill.db.copy import copy_binary, encode_rows, encode_vectors
from chunkmill.domain.spaces import Pooling, SpaceSpec
from chunkmill.spaces import registry
from chunkmill.store.write import write_vectors


def spec(dimensions: int) -> SpaceSpec:
    return SpaceSpec("local", "m", "sha256:00", dimensions, 256, Pooling.MEAN, normalize=True)


def hashes(n: int) -> list[bytes]:
    return [hashlib.sha256(str(i).encode()).digest() for i in range(n)]


def write(conn: sa.Connection, space: registry.Space, digests: list[bytes], matrix: NDArray[np.float32]) -> int:
    n = len(digests)
    return write_vectors(
        conn,
        space,
        space.spec.fingerprint,
        digests,
        np.arange(n, dtype=np.int32),
        np.arange(n) % 3 == 0,
        matrix,
    )


@pytest.mark.parametrize(("storage", "tolerance"), [("vector", 0.0), ("halfvec", 1e-3)])
def test_what_is_written_is_what_is_read(db: sa.Engine, storage: str, tolerance: float) -> None:
    matrix = np.random.default_rng(7).normal(size=(500, 37)).astype(np.float32)
    digests = hashes(500)
    with db.begin() as conn:
        space = registry.register(conn, spec(37), storage=storage)
        assert write(conn, space, digests, matrix) == 500
        rows = conn.execute(
            sa.text(f"SELECT content_hash, n_tokens, truncated, embedding::real[] AS e FROM {space.table_name}")
        ).all()
    by_hash = {bytes(row.content_hash): row for row in rows}
    for i, digest in enumerate(digests):
        assert (by_hash[digest].n_tokens, by_hash[digest].truncated) == (i, i % 3 == 0)
        stored = np.asarray(by_hash[digest].e, dtype=np.float32)
        np.testing.assert_allclose(stored, matrix[i], rtol=tolerance, atol=tolerance)


def test_a_content_keeps_its_first_vector_and_others_still_arrive(db: sa.Engine) -> None:
    matrix = np.ones((4, 8), dtype=np.float32)
    with db.begin() as conn:
        space = registry.register(conn, spec(8))
        assert write(conn, space, hashes(2), matrix[:2]) == 2
        assert write(conn, space, hashes(4), matrix * 5) == 2  # in the same transaction, too
    with db.begin() as conn:
        sums = conn.execute(sa.text(f"SELECT (embedding::real[])[1]::int FROM {space.table_name} ORDER BY 1")).scalars()
        assert list(sums) == [1, 1, 5, 5]
        assert write(conn, space, [], np.empty((0, 8), dtype=np.float32)) == 0


def test_the_payload_is_one_buffer() -> None:
    payload = encode_vectors(
        hashes(3), np.ones(3, np.int32), np.zeros(3, bool), np.zeros((3, 5), np.float32), half=False
    )
    assert payload.nbytes == 3 * (2 + 4 + 32 + 4 + 4 + 4 + 1 + 4 + 4 + 5 * 4)
    assert payload.contiguous


def test_rows_of_any_text_survive_the_copy(db: sa.Engine) -> None:
    texts = ["", "plain", "tab\tand\nnewline\\N", "ümläut 漢字 🧪", "'; DROP TABLE chunks; --"]
    with db.begin() as conn:
        conn.execute(sa.text("CREATE TEMP TABLE t (a text, b jsonb)"))
        copy_binary(conn, "t (a, b)", encode_rows((t.encode(), b'\x01{"k": 1}') for t in texts))
        assert [tuple(r) for r in conn.execute(sa.text("SELECT a, b FROM t"))] == [(t, {"k": 1}) for t in texts]
