"""A stream comes back from the spool as it went in, however little of it fits into memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkmill.client import spool
from chunkmill.client.spool import Spool
from chunkmill.domain.chunks import PreparedChunk, prepare
from chunkmill.errors import InvalidChunk, InvalidSetting

WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=20)
CHUNKS = st.tuples(WORDS, WORDS.filter(lambda text: not text.isspace()), st.dictionaries(WORDS, WORDS, max_size=2))


@pytest.mark.parametrize("memory", [0, 1000, 1 << 20], ids=["all in the file", "some in the file", "all in memory"])
@given(stream=st.lists(CHUNKS, max_size=12))
def test_a_stream_comes_back_as_it_was(memory: int, stream: list[tuple[str, str, dict[str, str]]]) -> None:
    """Ids, texts and metadata of any letters, of one byte and of four."""
    prepared = [prepare(chunk, i) for i, chunk in enumerate(stream)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "MEMORY_BYTES", memory)
        with Spool(iter(prepared)) as kept:
            assert list(kept) == prepared


def test_what_does_not_fit_into_memory_is_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = [PreparedChunk(str(i), b"x" * 100, "{}", bytes(32)) for i in range(100)]
    monkeypatch.setattr(spool, "MEMORY_BYTES", 10 * (100 + 2 + spool.OBJECT_BYTES))
    with Spool(iter(chunks)) as kept:
        assert len(kept._kept) == 10


def test_a_refused_stream_leaves_no_open_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unnamed file takes its room on the disk until it is closed."""
    files: list[IO[bytes]] = []
    make = spool.tempfile.TemporaryFile
    monkeypatch.setattr(spool, "MEMORY_BYTES", 0)
    monkeypatch.setattr(spool.tempfile, "TemporaryFile", lambda **how: files.append(make(**how)) or files[-1])

    def stream() -> Iterator[PreparedChunk]:
        yield prepare(("a", "one"), 0)
        yield prepare(("b", "two"), 1)
        yield prepare(("c", ""), 2)

    with pytest.raises(InvalidChunk):
        Spool(stream())
    assert [file.closed for file in files] == [True]


@pytest.mark.parametrize("chunks", [30, 50_000], ids=["as it is read again", "as it is written"])
def test_a_full_disk_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch, chunks: int) -> None:
    """A real file of a device that is always full."""
    monkeypatch.setattr(spool, "MEMORY_BYTES", 0)
    monkeypatch.setattr(spool.tempfile, "TemporaryFile", lambda **how: open("/dev/full", "w+b", **how))  # noqa: PTH123, SIM115
    stream = (PreparedChunk(str(i), b"x" * 100, "{}", bytes(32)) for i in range(chunks))
    with (
        pytest.raises(InvalidSetting, match=r"No space left on device.*TMPDIR.*on_invalid='skip'"),
        Spool(stream) as it,
    ):
        list(it)


def test_a_temporary_folder_that_does_not_exist_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(spool, "MEMORY_BYTES", 0)
    monkeypatch.setattr(spool.tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(InvalidSetting, match="nowhere: No such file"):
        Spool(iter([PreparedChunk("a", b"x", "{}", bytes(32))]))


def test_an_error_of_the_source_is_not_taken_for_one_of_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "MEMORY_BYTES", 0)

    def stream() -> Iterator[PreparedChunk]:
        yield PreparedChunk("a", b"x", "{}", bytes(32))
        raise ConnectionResetError("the source is gone")

    with pytest.raises(ConnectionResetError):
        Spool(stream())
