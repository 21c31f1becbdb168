"""`enqueue --chunk` cuts documents of folders, single documents and the texts of records."""

from __future__ import annotations

import gzip
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
    assert items.of_other_kinds() == "not read because of their kind: 1 .docx"


def test_a_table_in_a_folder_is_counted_unless_it_is_a_source_of_its_own(chunker: Chunker, folder: Path) -> None:
    (folder / "prices.csv").write_text("id,text\n1,flour\n")
    items = reader(chunker, folder)
    assert len(by_document(items)) == 4
    counted = (
        "not read because of their kind: 1 .csv, 1 .docx; to enqueue the records of a table, name it beside the folder"
    )
    assert items.of_other_kinds() == counted
    both = reader(chunker, folder, folder / "prices.csv")
    assert by_document(both)["1"] == 1
    assert both.of_other_kinds() == "not read because of their kind: 1 .docx"


def test_compressed_documents_are_read_like_others(chunker: Chunker, folder: Path) -> None:
    page = (folder / "sub" / "b.html").read_bytes()
    (folder / "sub" / "c.HTML.GZ").write_bytes(gzip.compress(page))
    (folder / "p.pdf.gz").write_bytes(gzip.compress(pdf([["flour"]])))
    (folder / "broken.md.gz").write_bytes(gzip.compress(page)[:40])
    (folder / "plain.txt.gz").write_bytes(b"no gzip")
    items = reader(chunker, folder, folder / "p.pdf.gz", skip=True)
    read = list(items)
    texts = {name: [c.text for c in read if isinstance(c, Chunk) and c.metadata["document"] == name] for name in
             ("sub/b.html", "sub/c.HTML.GZ", "p.pdf.gz")}  # fmt: skip
    assert texts["sub/b.html"] == texts["sub/c.HTML.GZ"] != []
    assert texts["p.pdf.gz"] == ["flour", "flour"]  # in the folder, and named itself
    refused = {item.known_id: item.problem for item in read if isinstance(item, InvalidChunk)}
    assert refused == dict.fromkeys(
        ("broken.md.gz", "plain.txt.gz"), "the gzip file is damaged or incomplete; write it again"
    )


def test_what_sphinx_puts_beside_its_pages_is_skipped_and_said(chunker: Chunker, folder: Path) -> None:
    for at in ("manual/_sources", "manual/_static", "notes/_sources"):
        (folder / at).mkdir(parents=True)
    for name in ("manual/a.html", "manual/_sources/a.rst.txt", "manual/_static/theme.js", "notes/_sources/a.txt"):
        (folder / name).write_text(LONG)
    (folder / "manual" / "searchindex.js").write_text("Search.setIndex({})")
    items = reader(chunker, folder)
    assert {name for name in by_document(items) if "/" in name} == {
        "manual/a.html",
        "sub/b.html",
        "notes/_sources/a.txt",
    }
    assert [said.partition(" ")[0] for said in items.skipped.first if "which Sphinx made" in said] == [
        f"{folder}/manual/{name}" for name in ("_sources", "_static", "searchindex.js")
    ]
    # Without --chunk no page is read, so the texts that it was made from are.
    texts = Reader([str(folder)], Fields(), skip=True, stdin=io.BytesIO())
    assert {item.id for item in texts if isinstance(item, Chunk)} > {"manual/_sources/a.rst.txt"}


def test_a_page_of_links_is_skipped_in_a_folder_and_read_if_it_is_named(chunker: Chunker, folder: Path) -> None:
    links = "".join(f"<li><a href=x{n}>chapter {n}</a>" for n in range(20))
    (folder / "toc.html").write_text(f"<h1>All</h1><ul>{links}</ul>")
    (folder / "said.html").write_text(f"<h1>All</h1><ul>{links}</ul><p>{LONG}</p>")
    (folder / "anchors.html").write_text(f"<ul>{links.replace('href', 'name')}</ul>")
    (folder / "few.html").write_text(f"<ul>{links.partition('<li><a href=x1>')[0]}</ul>")
    items = reader(chunker, folder, suffixes=[".html"])
    assert by_document(items).keys() == {"anchors.html", "few.html", "said.html", "sub/b.html"}
    assert items.skipped.first == [f"{folder}/toc.html has only links"]
    assert by_document(reader(chunker, folder / "toc.html")).keys() == {"toc.html"}


def test_only_the_suffixes_that_are_named_are_read(chunker: Chunker, folder: Path) -> None:
    assert by_document(reader(chunker, folder, suffixes=["HTML", ".docx"])).keys() == {"sub/b.html", "g.docx"}
    with pytest.raises(InvalidInput, match=r"contains no \.odt file"):
        list(reader(chunker, folder, suffixes=[".odt"]))


def test_a_document_is_cut_before_the_next_one_is_opened(chunker: Chunker, folder: Path) -> None:
    (folder / "z.md").write_bytes(b"\xff")
    items = iter(reader(chunker, folder, suffixes=[".md"]))
    for _ in range(5):
        assert isinstance(next(items), Chunk)
    with pytest.raises(
        InvalidInput, match=r"z\.md: in line 1, the byte 0xFF is not valid UTF-8; if .*--encoding cp1252"
    ):
        list(items)
    (bad,) = (item for item in reader(chunker, folder, skip=True) if not isinstance(item, Chunk))
    assert isinstance(bad, InvalidChunk)
    assert (bad.reason, bad.chunk_id, bad.known_id) == ("unreadable", "z.md", "z.md")


def test_a_document_can_be_named_itself(chunker: Chunker, folder: Path) -> None:
    assert by_document(reader(chunker, folder / "a.md", folder / "f.PDF")).keys() == {"a.md", "f.PDF"}
    (folder / "sub" / "a.md").write_text("other")
    with pytest.raises(InvalidInput, match=r"would have the same id 'a.md'"):
        reader(chunker, folder / "a.md", folder / "sub" / "a.md")
    with pytest.raises(InvalidInput, match=r"this is one document\. To cut it into chunks of their own, pass --chunk"):
        Reader([str(folder / "a.md")], Fields(), skip=False, stdin=io.BytesIO())


def test_a_document_beside_a_folder_has_no_id_of_one_at_its_top(chunker: Chunker, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    for name in ("a.md", "new.md"):
        (other / name).write_text("# Another\n\nA text that is not in the folder.")
    for sources in ((folder, other / "a.md"), (other / "a.md", folder), (other / "new.md", other / "a.md", folder)):
        with pytest.raises(InvalidInput, match=r"would have the same id 'a\.md'.*--prefix-ids"):
            reader(chunker, *sources)
    assert {"a.md", "new.md"} <= by_document(reader(chunker, folder, other / "new.md")).keys()
    assert "a.md" in by_document(reader(chunker, folder, folder / "a.md")), "it is the same document"


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
    (tmp_path / "new.md").write_text("Die Kühe kauen.", "utf-8")
    (tmp_path / "windows.txt").write_text("Die Kühe muhen.", "utf-16")
    (tmp_path / "code.py").write_bytes("# coding: latin-1\n# Kühe".encode("latin-1"))
    (tmp_path / "page.html").write_text('<meta charset="utf-8"><p>Die Kühe stehen auf der Wiese.</p>', "utf-8")
    cutter = Cutter(Chunker(60, unit="characters"))
    fields = Fields("id", "text", None)
    reader = Reader(
        [str(tmp_path)], fields, skip=False, stdin=io.BytesIO(), form=Form(encoding="cp1252"), cutter=cutter
    )
    assert sorted(chunk.text for chunk in reader if isinstance(chunk, Chunk)) == [
        "# coding: latin-1\n# Kühe",
        "Die Kühe kauen.",
        "Die Kühe muhen.",
        "Die Kühe schlafen im Stall.",
        "Die Kühe stehen auf der Wiese.",
    ]
