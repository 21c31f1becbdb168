"""`enqueue --chunk` cuts documents of folders, single documents and the texts of records."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from chunkmill.chunking import Chunker
from chunkmill.cli.jobs.cutting import Cutter
from chunkmill.cli.jobs.jobs import enqueue
from chunkmill.cli.jobs.sources import Fields, Form, Reader
from chunkmill.cli.output import Screen
from chunkmill.domain.chunks import Chunk
from chunkmill.domain.results import Job
from chunkmill.errors import InvalidChunk, InvalidInput
from tests.support.pdf_files import pdf

LONG = "One short sentence. " * 30


@pytest.fixture(scope="module")
def chunker() -> Chunker:
    return Chunker(100, unit="characters")


def reader(
    chunker: Chunker, *sources: Path | str, skip: bool = False, stdin: bytes = b"", suffixes: Any = ()
) -> Reader:
    cutter = Cutter(chunker, suffixes)
    names = [str(source) for source in sources]
    return Reader(names, Fields(), skip=skip, stdin=io.BytesIO(stdin), cutter=cutter)


def by_document(items: Reader) -> dict[str, int]:
    counted: dict[str, int] = {}
    for item in items:
        assert isinstance(item, Chunk), item
        counted[item.metadata["document"]] = counted.get(item.metadata["document"], 0) + 1
    return counted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "d" / "sub").mkdir(parents=True)
    for name, content in {
        "a.md": f"# A\n\n{LONG}",
        "sub/b.html": f"<p>{LONG}",
        "c.py": "x = 1\n",
        "e.txt": " \n",
    }.items():
        (tmp_path / "d" / name).write_text(content)
    (tmp_path / "d" / "f.PDF").write_bytes(pdf([["flour"]]))
    (tmp_path / "d" / "g.docx").write_text("not read")
    return tmp_path / "d"


def test_all_kinds_of_documents_in_a_folder_are_cut(chunker: Chunker, folder: Path) -> None:
    items = reader(chunker, folder)
    counted = by_document(items)
    assert counted.keys() == {"a.md", "sub/b.html", "c.py", "f.PDF"}
    assert counted["a.md"] > 4
    assert counted["f.PDF"] == 1
    assert items.skipped.first == [f"{folder}/e.txt has no text"]


def test_only_the_suffixes_that_are_named_are_read(chunker: Chunker, folder: Path) -> None:
    assert by_document(reader(chunker, folder, suffixes=["HTML", ".docx"])).keys() == {"sub/b.html", "g.docx"}
    with pytest.raises(InvalidInput, match=r"contains no \.odt file"):
        list(reader(chunker, folder, suffixes=[".odt"]))


def test_a_document_is_cut_before_the_next_one_is_opened(chunker: Chunker, folder: Path) -> None:
    (folder / "z.md").write_bytes(b"\xff")
    items = iter(reader(chunker, folder, suffixes=[".md"]))
    for _ in range(5):
        assert isinstance(next(items), Chunk)
    with pytest.raises(InvalidInput, match=r"z\.md: not valid UTF-8 at byte 1, in line 1\. Nothing was written"):
        list(items)
    (bad,) = (item for item in reader(chunker, folder, skip=True) if not isinstance(item, Chunk))
    assert isinstance(bad, InvalidChunk)
    assert (bad.reason, bad.chunk_id) == ("unreadable", f"{folder}/z.md")


def test_a_document_can_be_named_itself(chunker: Chunker, folder: Path) -> None:
    assert by_document(reader(chunker, folder / "a.md", folder / "f.PDF")).keys() == {"a.md", "f.PDF"}
    (folder / "sub" / "a.md").write_text("other")
    with pytest.raises(InvalidInput, match=r"would have the same id 'a.md'"):
        reader(chunker, folder / "a.md", folder / "sub" / "a.md")
    with pytest.raises(InvalidInput, match=r"this is one document\. To cut it into chunks of their own, pass --chunk"):
        Reader([str(folder / "a.md")], Fields(), skip=False, stdin=io.BytesIO())


def test_the_texts_of_records_are_cut_and_keep_their_metadata(chunker: Chunker) -> None:
    lines = [{"id": "r", "text": LONG, "lang": "en"}, {"id": "s", "text": ""}, {"id": "t", "text": "x", "chunk_end": 1}]
    stdin = "\n".join(map(json.dumps, lines)).encode()
    *cut, empty, taken = reader(chunker, "-", stdin=stdin, skip=True)
    assert {(c.metadata["document"], c.metadata["lang"]) for c in cut if isinstance(c, Chunk)} == {("r", "en")}
    assert len(cut) > 4
    assert empty == Chunk("s", "", {})  # which the client refuses, with its reason
    assert isinstance(taken, InvalidChunk)
    assert "the key 'chunk_end'" in taken.problem


@pytest.mark.parametrize("option", [["--overlap", "20"], ["--chunk-unit", "characters"], ["--suffix", ".md"]])
def test_what_belongs_to_chunk_needs_it(option: list[str], folder: Path) -> None:
    done = CliRunner().invoke(enqueue, [str(folder), "-c", "x", *option], obj=Screen(as_json=False))
    assert done.exit_code == 2
    assert f"{option[0]} needs --chunk." in done.output


def test_a_job_says_how_many_texts_were_cut_and_what_to_do() -> None:
    fields: dict[str, Any] = dict.fromkeys(Job.__dataclass_fields__)
    said = [Job(**fields | {"truncated": n}).notice for n in (0, 1, 2000)]
    assert said[0] is None
    assert said[1] is not None and said[1].startswith(
        "1 text is longer than the model reads, so the vector stands only"
    )
    assert said[2] is not None and said[2].startswith("2,000 texts are longer")
    assert "--chunk 200" in said[2]


def test_documents_are_read_in_the_encoding_that_is_named_and_pages_in_their_own(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_bytes("Die Kühe schlafen im Stall.".encode("cp1252"))
    (tmp_path / "page.html").write_text('<meta charset="utf-8"><p>Die Kühe stehen auf der Wiese.</p>', "utf-8")
    cutter = Cutter(Chunker(60, unit="characters"))
    fields = Fields("id", "text", None)
    reader = Reader(
        [str(tmp_path)], fields, skip=False, stdin=io.BytesIO(), form=Form(encoding="cp1252"), cutter=cutter
    )
    assert sorted(chunk.text for chunk in reader if isinstance(chunk, Chunk)) == [
        "Die Kühe schlafen im Stall.",
        "Die Kühe stehen auf der Wiese.",
    ]
