"""What is exported is what is stored, in each format, and comes back through `chunkmill enqueue`."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result

from chunkmill import Client
from chunkmill.cli.__main__ import cli
from chunkmill.client import written
from chunkmill.errors import InvalidInput
from chunkmill.settings import Settings
from chunkmill.store import chunks as store
from tests.integration.test_chunks import DIMENSIONS, NAMES, embed, vector_of

FORMATS = (".parquet", ".jsonl", ".ndjson.gz")
Command = Callable[..., Result]
CHUNKS: list[tuple[str, str, dict[str, Any]]] = [
    ("a/1", 'A text with "quotes",\nlines\u2028and 中文.', {"n": 1, "deep": {"list": [1, 2.5, None, {"a": True}]}}),
    ("b", "another text", {}),
    ("c", "a text that is cut", {"id": "own", "text": "own", "metadata": {"x": 1}, "vector": [1], "f": 0.1 + 0.2}),
    ("d,e", "no vector yet", {"big": 2**70, "small": 1e-300, "text": "é"}),
    ("\u4e2d", "another text", {"content_hash": "x", "truncated": 1}),
]


@pytest.fixture
def command(settings: Settings) -> Command:
    env = {"DATABASE_URL": settings.require_database_url(), "REDIS_URL": settings.require_redis_url()}
    return lambda *arguments: CliRunner().invoke(cli, [str(argument) for argument in arguments], env=env)


@pytest.fixture
def filled(client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> Client:
    """Two collections in two spaces, of several pages and row groups."""
    monkeypatch.setattr(store, "MAX_WINDOW", 2)
    monkeypatch.setattr(written, "GROUP_ROWS", 2)
    for name, on_long in zip(NAMES, ("truncate", "split"), strict=True):
        job = client.enqueue([(i, t, {**m, "in": name}) for i, t, m in CHUNKS], collection=name, on_long=on_long)
        embed(db, job.id, ["a text that is cut"], truncated=True)
        embed(db, job.id, [CHUNKS[0][1], "another text"])
    return client


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def records(path: Path) -> list[dict[str, Any]]:
    """The records of a file, read by other people's code."""
    if path.suffix == ".parquet":
        rows = pyarrow.parquet.read_table(path).to_pylist()
        return [{**row, "metadata": json.loads(row["metadata"])} for row in rows]
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in content.decode().split("\n") if line]


@pytest.mark.parametrize("ending", FORMATS)
def test_a_file_holds_what_is_stored_and_comes_back_as_it_was(
    filled: Client, command: Command, tmp_path: Path, ending: str
) -> None:
    path = tmp_path / f"docs{ending}"
    done = command("export", "docs", path)
    assert (done.exit_code, f"Wrote 5 chunks, 1 of them without a vector to {path}" in done.output) == (0, True), done
    assert names_in(tmp_path) == [path.name]
    stored = list(filled.chunks("docs", with_vector=True))
    for record, chunk in zip(records(path), stored, strict=True):
        vector = record.pop("vector")
        assert record == {
            "id": chunk.id,
            "text": chunk.text,
            "metadata": chunk.metadata,
            "truncated": chunk.truncated,
            "content_hash": chunk.content_hash,
        }
        assert (vector is None) == (chunk.text == "no vector yet")
        if vector is not None:
            np.testing.assert_array_equal(np.array(vector, np.float32), vector_of(chunk.text or ""))
    done = command("enqueue", path, "--collection=again", "--no-wait")
    assert done.exit_code == 0, done.output
    again = list(filled.chunks("again"))
    kept = [(c.id, c.text, c.metadata, c.state) for c in again]
    assert kept == [(c.id, c.text, c.metadata, c.state) for c in stored]
    assert filled.job(again[0].job_id).cached == 3
    assert {json.dumps(c.metadata) for c in again} == {json.dumps(c.metadata) for c in stored}


def test_parquet_has_vectors_of_a_fixed_size_and_says_where_they_come_from(filled: Client, tmp_path: Path) -> None:
    path = tmp_path / "docs.parquet"
    filled.export("docs", path)
    table = pyarrow.parquet.read_table(path)
    assert str(table.schema.field("vector").type).endswith(f"float>[{DIMENSIONS}]")
    about = json.loads(table.schema.metadata[b"chunkmill"])
    assert (about["collection"], about["space"]) == ("docs", filled.audit("docs").space)
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 3
    vectors = table["vector"].combine_chunks().drop_null().flatten().to_numpy().reshape(-1, DIMENSIONS)
    np.testing.assert_array_equal(vectors, np.concatenate([v for _, v in filled.iter_vectors("docs")]))


@pytest.mark.parametrize("ending", FORMATS)
def test_a_part_can_be_exported_without_texts_or_vectors(
    filled: Client, command: Command, tmp_path: Path, ending: str
) -> None:
    path = tmp_path / f"part{ending}"
    assert command("export", "docs", path, "--no-text", "--no-vectors", "--where", '{"n": 1}').exit_code == 0
    (record,) = records(path)
    assert record.keys() == {"id", "metadata", "truncated", "content_hash"}
    done = command("enqueue", path, "--collection=again", "--no-wait")
    assert (done.exit_code, "exported without their texts" in done.output) == (1, True), done.output
    done = command("export", "docs", path, "--no-vectors", "--force", "--json")
    assert json.loads(done.stdout)["chunks"] == 5
    assert command("enqueue", path, "--collection=again", "--no-wait").exit_code == 0
    kept = [(c.id, c.text, c.metadata) for c in filled.chunks("again")]
    assert kept == [(c.id, c.text, c.metadata) for c in filled.chunks("docs")]
    filled.delete("docs", all_chunks=True)
    assert filled.export("docs", path, overwrite=True).chunks == 0
    assert records(path) == []


@pytest.mark.parametrize("ending", FORMATS)
def test_a_file_appears_whole_or_not_at_all_and_none_is_overwritten(
    filled: Client, command: Command, tmp_path: Path, ending: str
) -> None:
    path = tmp_path / f"docs{ending}"
    filled.export("docs", path)
    before = path.read_bytes()
    done = command("export", "docs", path)
    assert (done.exit_code, "exists already" in done.output, path.read_bytes()) == (1, True, before)

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert total == 5
        if done == 4:
            raise Stopped

    for target in (path, tmp_path / f"new{ending}"):
        with pytest.raises(Stopped):
            filled.export("docs", target, overwrite=True, on_progress=stop)
    assert (names_in(tmp_path), path.read_bytes()) == ([path.name], before)
    taken = tmp_path / f"taken{ending}"
    with pytest.raises(InvalidInput, match="exists already"):
        filled.export("docs", taken, on_progress=lambda *_: taken.write_text("somebody else's"))
    assert taken.read_text() == "somebody else's"
    assert names_in(tmp_path) == sorted([path.name, taken.name])
    filled.export("others", path, overwrite=True)
    assert {record["metadata"]["in"] for record in records(path)} == {"others"}


def test_a_name_that_cannot_be_written_is_refused(filled: Client, tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, says in {
        "docs.csv": "the format is not known",
        "none/docs.jsonl": "there is no folder",
        "folder.jsonl": "not a regular file",
        "pipe.jsonl": "not a regular file",
        "x" * 300 + ".jsonl": "cannot be written",
    }.items():
        with pytest.raises(InvalidInput, match=says):
            filled.export("docs", tmp_path / name, overwrite=True)
    assert names_in(tmp_path) == ["folder.jsonl", "pipe.jsonl"]


def test_records_that_only_look_like_an_export_and_broken_files(
    client: Client, command: Command, tmp_path: Path
) -> None:
    own = {"id": "a", "text": "one", "metadata": {"m": 1}, "vector": [1.0], "truncated": False}
    (tmp_path / "own.jsonl").write_text(json.dumps(own) + "\n")
    assert command("enqueue", tmp_path / "own.jsonl", "-c", "docs", "--no-wait").exit_code == 0
    assert client.get("docs", ["a"])["a"].metadata == {"m": 1, "vector": [1.0], "truncated": False}
    exported = {**own, "content_hash": "x", "metadata": "no object"}
    (tmp_path / "odd.jsonl").write_text(json.dumps(exported) + "\n")
    whole = gzip.compress(b'{"id": "a", "text": "one"}\n' * 1_000)
    (tmp_path / "half.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "none.jsonl.gz").write_bytes(b"no gzip")
    for name, says in {
        "odd.jsonl": "must be a JSON object",
        "half.jsonl.gz": "this gzip file is broken or not complete",
        "none.jsonl.gz": "this gzip file is broken or not complete",
    }.items():
        done = command("enqueue", tmp_path / name, "-c", "docs", "--no-wait")
        assert (done.exit_code, says in done.output) == (1, True), done.output
    assert client.count("docs") == 1


MEASURE = """
import resource, sys
from chunkmill import Client
with Client.from_env() as client:
    client.export("docs", sys.argv[1])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", FORMATS)
def test_memory_does_not_grow_with_the_collection(
    client: Client, db: sa.Engine, settings: Settings, tmp_path: Path, ending: str
) -> None:
    """100,000 chunks have 150 MB of vectors and as much text."""
    env = {
        **os.environ,
        "DATABASE_URL": settings.require_database_url(),
        "REDIS_URL": settings.require_redis_url(),
    }
    used = []
    for n in (20_000, 100_000):
        first = 20_000 if used else 0
        job = client.enqueue(((f"c{i}", f"{i} " + "x" * 1_500, {"n": i}) for i in range(first, n)), collection="docs")
        with db.begin() as conn:
            fill = """
                INSERT INTO vectors_1
                SELECT content_hash, 3, false, array_fill(random()::real, ARRAY[384])::vector
                FROM contents
                ON CONFLICT DO NOTHING
            """
            conn.execute(sa.text(fill))
        assert job.chunks == n - first
        path = tmp_path / f"{n}{ending}"
        measured = subprocess.run(
            [sys.executable, "-c", MEASURE, str(path)], env=env, capture_output=True, text=True, check=True
        )
        used.append(int(measured.stdout) / 1_000)
    assert used[1] < used[0] + 60, used
