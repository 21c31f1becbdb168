"""A folder of documents that a stranger made: nothing outside of it is read, and nothing in it blocks."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chunkmill.chunking import Chunker
from chunkmill.cli.jobs.cutting import Cutter
from chunkmill.cli.jobs.folders import SkippedEntries, documents
from chunkmill.cli.jobs.sources import Fields, Reader
from chunkmill.domain.chunks import Chunk
from chunkmill.errors import InvalidChunk, InvalidInput
from chunkmill.system.files import Folder, open_regular, read_at_most


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "docs"
    (made / "sub").mkdir(parents=True)
    (made / "a.md").write_text("own a")
    (made / "sub" / "b.txt").write_text("own b")
    (tmp_path / "secret.txt").write_text("SECRET")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "more.md").write_text("SECRET")
    (tmp_path / "docs-too").mkdir()
    (tmp_path / "docs-too" / "x.md").write_text("SECRET of a folder whose name begins in the same way")
    return made


def read(folder: Path) -> tuple[dict[str, str], SkippedEntries, list[str]]:
    """The texts by their ids, what was skipped, and what could not be read."""
    reader = Reader([str(folder)], Fields(), skip=True, stdin=io.BytesIO())
    texts, refused = {}, []
    for item in reader:
        if isinstance(item, Chunk):
            texts[item.id] = item.text
        else:
            assert isinstance(item, InvalidChunk)
            refused.append(f"{item.chunk_id}: {item.problem}")
    return texts, reader.skipped, refused


def test_files_that_are_not_read_because_of_their_kind_are_counted(folder: Path) -> None:
    for name in ("page.html", "sub/Page.HTML", "map.png", "LICENSE", ".hidden.pdf", "a.very-long-end-of-a-name"):
        (folder / name).write_text("x")
    _, skipped, _ = read(folder)
    assert skipped.of_other_kinds() == "not read because of their kind: 2 of other names, 2 .html, 1 .png"
    assert skipped.of_other_kinds({".html", ".pdf"}).endswith("1 .png; --chunk 200 reads .html too")
    (folder / "a.md").unlink()
    (folder / "sub" / "b.txt").unlink()
    with pytest.raises(
        InvalidInput,
        match=r"contains no .* file \(not read because .*; --chunk 200 reads .html",
    ):
        read(folder)
    assert SkippedEntries().of_other_kinds({".html"}) == ""


def test_a_link_that_leaves_the_folder_is_named_and_skipped(folder: Path) -> None:
    (folder / "l1.txt").symlink_to("../secret.txt")
    (folder / "l2.txt").symlink_to(folder.parent / "secret.txt")
    (folder / "l3.md").symlink_to("sub/l4.md")
    (folder / "sub" / "l4.md").symlink_to("../../docs-too/x.md")
    (folder / "l5").symlink_to("../secrets")
    (folder / "l6.txt").symlink_to("l6.txt")
    (folder / "l7.txt").symlink_to("gone")
    (folder / "picture.png").symlink_to("/etc/passwd")
    texts, skipped, refused = read(folder)
    assert (texts, refused) == ({"a.md": "own a", "sub/b.txt": "own b"}, [])
    assert skipped.count == 7
    assert skipped.first[0] == f"{folder}/l1.txt is a link that leads out of the folder"
    assert skipped.first[3] == f"{folder}/l5 is a link that leads out of the folder"
    assert str(skipped).endswith("and 2 more")
    assert "picture" not in str(skipped)


def test_a_link_inside_the_folder_is_read(folder: Path) -> None:
    (folder / "l1.md").symlink_to("sub/b.txt")
    (folder / "l2.md").symlink_to(folder / "l1.md")
    (folder / "l3").symlink_to("sub")
    (folder / "up").symlink_to(".")
    texts, skipped, refused = read(folder)
    assert texts == {"a.md": "own a", "l1.md": "own b", "l2.md": "own b", "sub/b.txt": "own b"}
    assert (skipped.count, refused) == (0, [])


def test_the_folder_itself_may_be_named_by_a_link(folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder)
    assert set(read(folder.parent / "link")[0]) == {"a.md", "sub/b.txt"}


@pytest.fixture
def short_path(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """A socket's path has 107 bytes at most."""

    def name(path: Path) -> str:
        monkeypatch.chdir(path.parent)
        return path.name

    return name


def test_what_is_no_regular_file_cannot_block(folder: Path, short_path: Callable[[Path], str]) -> None:
    os.mkfifo(folder / "f.txt")
    (folder / "l.txt").symlink_to("f.txt")
    (folder / "null.txt").symlink_to("/dev/null")
    (folder / "d.txt").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(short_path(folder / "s.txt"))
        texts, skipped, refused = read(folder)
    assert (set(texts), refused) == ({"a.md", "sub/b.txt"}, [])
    assert skipped.count == 4
    assert f"{folder}/f.txt is not a regular file" in skipped.first
    only = folder.parent / "only"
    only.mkdir()
    os.mkfifo(only / "f.txt")
    with pytest.raises(InvalidInput, match=r"contains no .* \(skipped: .*f\.txt is not a regular file\)"):
        read(only)


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.parquet"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["fifo", "device"])
def test_a_source_that_is_no_regular_file_is_refused(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    make(tmp_path / name)
    with pytest.raises(InvalidInput, match=r"not a regular file.* pipe it into stdin"):
        Reader([str(tmp_path / name)], Fields(), skip=False, stdin=io.BytesIO())


def swap_file(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parents[1] / "secret.txt")


def swap_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("swap", "why"), [(swap_file, "Too many levels of symbolic links"), (swap_fifo, "not a regular file")]
)
def test_a_file_that_is_replaced_after_the_look_is_not_read(
    folder: Path, swap: Callable[[Path], None], why: str
) -> None:
    for document in documents(folder, SkippedEntries()):
        if document.name == "a.md":
            swap(folder / "a.md")
            with pytest.raises(OSError, match=why):
                document.open()


def test_a_folder_that_becomes_a_link_is_not_entered(folder: Path) -> None:
    read: Iterator[object] = documents(folder, SkippedEntries())
    next(read)  # a.md: the list of the root has been read by now
    (folder / "sub").rename(folder.parent / "old")
    (folder / "sub").symlink_to(folder.parent / "secrets")
    left = list(documents(folder, SkippedEntries()))
    assert [document.name for document in left] == ["a.md"]
    (late,) = read
    assert getattr(late, "name", None) == "sub"
    assert "cannot be read" in str(getattr(late, "problem", None))


def test_a_folder_between_that_becomes_a_link_leads_nowhere(folder: Path) -> None:
    (document,) = [document for document in documents(folder, SkippedEntries()) if document.name == "a.md"]
    with Folder(folder) as opened:
        with opened.open(("sub", "b.txt")) as file:
            assert file.read() == b"own b"
        (folder / "sub" / "b.txt").rename(folder.parent / "secrets" / "b.txt")
        (folder / "sub").rmdir()
        (folder / "sub").symlink_to("../secrets")
        with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
            opened.open(("sub", "b.txt"))
    assert document.parts == ("a.md",)


def test_a_folder_that_cannot_be_listed_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Folder.list

    def refuse(self: Folder, parts: tuple[str, ...]) -> object:
        if parts:
            raise PermissionError(13, "Permission denied")
        return whole(self, parts)

    monkeypatch.setattr(Folder, "list", refuse)
    texts, _, refused = read(folder)
    assert set(texts) == {"a.md"}
    assert refused == [f"{folder}/sub: cannot be read: Permission denied"]


def test_a_tree_without_end_is_left_where_no_id_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    depth = 600
    monkeypatch.chdir(folder)
    for _ in range(depth):
        Path("d").mkdir()
        os.chdir("d")
    Path("deep.md").write_text("deep")
    os.chdir(folder)
    texts, _, refused = read(folder)
    assert set(texts) == {"a.md", "sub/b.txt"}
    (said,) = refused
    assert said.endswith("d/d: the path is too long for an id, which may have 1024 bytes")


@pytest.mark.parametrize("is_cut", [True, False])
def test_a_name_that_is_no_utf8_is_refused_and_can_be_stored(folder: Path, is_cut: bool) -> None:
    """It cannot be an id. The refusal has one, because no collection can have this document: --sync loses nothing."""
    (Path(os.fsdecode(os.fsencode(folder) + b"/\xff.txt"))).write_bytes(b"a good text")
    cutter = Cutter(Chunker(100, unit="characters")) if is_cut else None
    items = Reader([str(folder)], Fields(), skip=True, stdin=io.BytesIO(), cutter=cutter)
    (bad,) = [item for item in items if isinstance(item, InvalidChunk)]
    assert (bad.chunk_id, bad.known_id) == ("\\udcff.txt", "\\udcff.txt")
    assert bad.problem == "its path is not valid UTF-8, so it cannot be an id; give it another name"


def test_a_regular_file_is_read_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_at_most(path, 5) == b"12345"
    with pytest.raises(OSError, match="longer than 4 bytes"):
        read_at_most(path, 4)
    with pytest.raises(OSError, match="not a regular file"):
        open_regular("/dev/zero")
