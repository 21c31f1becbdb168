"""The text of HTML and PDF files, with what they say about headings and pages."""

from __future__ import annotations

import io
import socket
from pathlib import Path

import pytest

from chunkmill.chunking import Chunker, Document, Kind
from chunkmill.chunking.reading import UnreadableDocument, read, read_text
from tests.support.pdf_files import pdf

PAGE = """<!doctype html><html><head><title>t</title><style>x {}</style></head><body>
<nav>menu</nav><header>site</header><aside>advert</aside><div hidden>no</div><div role=search>find</div>
<h1>Big <span>mill</span> <div>stone</div><a class=headerlink href=#a>\u00b6</a></h1>
<p>One<a href=#p>\u00b6</a><br>two   three <b>bold</b>!<script>evil()</script></p>
<ul><li>a<li><p>b</p><p>more of b</p><li>c</ul>
<pre>
  x = 1
    y</pre>
<table><tr><th>k</th><th>v</th></tr><tr><td></td><td></td></tr><tr><td><p>1</p></td><td>2</td><td></td></tr></table>
<table><tr><td></td><td>a ||</td><td> </td><td></td></tr></table>
<table><tr><td><h2>Sub</h2><p>in a layout</p></td><td>side</td></tr></table>
tail<footer>foot</footer></body></html>"""


def blocks(document: Document) -> list[tuple[int, str]]:
    return [(block.level, document.text[block.start : block.end]) for block in document.blocks]


def from_bytes(content: bytes, kind: Kind, name: str) -> Document:
    return read(io.BytesIO(content), kind, name)


def test_a_page_gives_its_text_without_what_stands_around_it() -> None:
    document = read_text(PAGE, Kind.HTML)
    assert blocks(document) == [
        (1, "Big mill stone"), (0, "One\ntwo three bold!"), (0, "- a"), (0, "- b"), (0, "more of b"), (0, "- c"),
        (0, "  x = 1\n    y"), (0, "k | v\n1 | 2"), (0, "| a ||"), (2, "Sub"), (0, "in a layout"), (0, "side"),
        (0, "tail"),
    ]  # fmt: skip
    assert "- a\n- b\n\nmore of b" in document.text


def test_the_main_content_is_what_the_page_calls_so() -> None:
    main = "<p>around</p><div role=main><header><h1>Head</h1></header><p>text<aside>note</aside></div><p>after"
    assert read_text(main, Kind.HTML).text == "Head\n\ntext\n\nnote"
    assert read_text("<main> </main><article>one</article>", Kind.HTML).text == "one"
    assert read_text("<article>one</article><article>two</article>", Kind.HTML).text == "one\n\ntwo"


def test_a_page_that_nests_deeply_is_read() -> None:
    assert read_text("<p>text" * 5_000 + "<div>" * 990 + "deep", Kind.HTML).text.endswith("text\n\ndeep")
    with pytest.raises(UnreadableDocument, match="nest more than 1,000 deep"):
        read_text("<div>" * 1_001 + "deep", Kind.HTML)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("<meta charset=iso-8859-1><p>M\u00fchle \x96".encode("latin-1"), "M\u00fchle \u2013"),
        ('<meta http-equiv=x content="text/html; charset=koi8-r"><p>\u0436\u044f'.encode("koi8-r"), "\u0436\u044f"),
        ("<p>M\u00fchle".encode("utf-16"), "M\u00fchle"),
        ("\ufeff<meta charset=latin1><p>M\u00fchle".encode(), "M\u00fchle"),
        ("<p>M\u00fchle".encode(), "M\u00fchle"),
    ],
)  # fmt: skip
def test_a_page_is_read_in_the_encoding_that_it_states(content: bytes, text: str) -> None:
    assert from_bytes(content, Kind.HTML, "a.html").text == text


def test_python_states_its_encoding_in_its_first_lines() -> None:
    assert from_bytes("# coding: latin-1\n# M\u00fchle".encode("latin-1"), Kind.TEXT, "a.py").text.endswith(
        "M\u00fchle"
    )
    with pytest.raises(UnreadableDocument, match="its first lines state is not known"):
        from_bytes(b"# coding: none-such\n", Kind.TEXT, "a.py")
    with pytest.raises(UnreadableDocument, match="not valid UTF-8 at byte 19"):
        from_bytes("# coding: latin-1\n\u00fc".encode("latin-1"), Kind.TEXT, "a.txt")


def test_the_blanks_before_code_stay() -> None:
    document = read_text("def f():\n    one()\n\n    two()\n", Kind.TEXT)
    assert blocks(document) == [(0, "def f():\n    one()"), (0, "    two()")]


def test_no_document_makes_its_reader_ask_an_address(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("zanzibarquokka")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        html = f"""
            <html><head><link rel=stylesheet href="{url}"><meta http-equiv=refresh content="0;{url}">
            <script>fetch("{url}")</script></head><body background="{url}"><p>stones</p><img src="{url}">
            <iframe src="{url}"></iframe><object data="file://{tmp_path}/secret.txt"></object></body></html>
        """
        actions = [
            f"/JavaScript /JS (this.submitForm\\('{url}'\\);)",
            f"/URI /URI ({url})",
            f"/GoToR /F << /Type /Filespec /FS /URL /F ({url}) >>",
            f"/Launch /F ({tmp_path}/secret.txt)",
            f"/ImportData /F ({tmp_path}/secret.txt)",
        ]
        books = [pdf([["stones"]], action=action) for action in actions]
        texts = [from_bytes(html.encode(), Kind.HTML, "a.html")]
        texts += [from_bytes(book, Kind.PDF, "a.pdf") for book in books]
        assert [document.text for document in texts] == ["stones"] * 6
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_chunk_of_a_pdf_says_its_pages(tmp_path: Path) -> None:
    (tmp_path / "b.pdf").write_bytes(
        pdf([["The first page is about stones."] * 3, ["The second page is about flour."] * 3])
    )
    (tmp_path / "c.pdf").write_bytes(pdf([["Another one."]]))
    chunker = Chunker(60, unit="characters")
    chunks = [(c.metadata["page"], c.metadata["last_page"], c.text) for c in chunker.file(tmp_path / "b.pdf")]
    assert chunks[0] == (1, 1, "The first page is about stones.")
    assert chunks[-1][:2] == (2, 2)
    (whole,) = Chunker(400, unit="characters").file(tmp_path / "b.pdf", document_id="book")
    assert (whole.metadata["page"], whole.metadata["last_page"], whole.metadata["document"]) == (1, 2, "book")
    assert [chunk.metadata["page"] for chunk in chunker.file(tmp_path / "c.pdf")] == [1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no pdf", "it is no PDF file that can be read"),
        (pdf([[]]), "it has no text; if its pages are pictures"),
        (pdf([["x"]], encrypted=True), "it is encrypted"),
    ],
)
def test_a_pdf_that_cannot_be_read_says_why(content: bytes, said: str) -> None:
    with pytest.raises(UnreadableDocument, match=said):
        from_bytes(content, Kind.PDF, "a.pdf")
