"""Sources as people have them: their encodings, formats, separators, values, and ids."""

from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import click
import pytest

from chunkmill.cli.jobs import json_arrays, sources
from chunkmill.cli.jobs.csv_files import typed
from chunkmill.cli.jobs.decoded import encoding_named, in_utf8
from chunkmill.cli.jobs.json_arrays import elements
from chunkmill.cli.jobs.source_options import Refusable, as_delimiter, split_names
from chunkmill.cli.jobs.sources import Fields, Form, Reader
from chunkmill.domain.chunks import Chunk, prepare
from chunkmill.errors import InvalidChunk, InvalidInput


def reader(
    *names: Path | str, skip: bool = False, fields: Fields | None = None, stdin: bytes = b"", **form: Any
) -> Reader:
    return Reader([str(n) for n in names], fields or Fields(), skip=skip, stdin=io.BytesIO(stdin), form=Form(**form))


def read(*names: Path | str, **options: Any) -> list[object]:
    return list(reader(*names, **options))


CAFE = [Chunk("a", "café", {"n": "1"}), Chunk("b", "naïve\nline", {"n": "2"})]
JSON = json.dumps([{"id": chunk.id, "text": chunk.text, **chunk.metadata} for chunk in CAFE], ensure_ascii=False)
CONTENTS = {
    "docs.csv": 'id,text,n\na,café,1\nb,"naïve\nline",2\n',
    "docs.tsv": 'id\ttext\tn\na\tcafé\t1\nb\t"naïve\nline"\t2\n',
    "docs.json": JSON,
    "docs.jsonl": JSON.strip("[]").replace("}, {", "}\n{"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("encoding", [None, "utf-8-sig", "cp1252", "iso8859-15", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", CONTENTS)
def test_every_format_in_any_encoding_and_compressed_or_not(
    tmp_path: Path, name: str, encoding: str | None, zipped: bool
) -> None:
    content = CONTENTS[name].encode(encoding or "utf-8")
    path = tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert read(path, encoding=encoding and encoding_named(encoding)) == CAFE
    if encoding in ("utf-8-sig", "utf-16", "utf-32"):
        assert read(path) == CAFE, "the mark at the beginning says the encoding"


@pytest.mark.parametrize(
    "encoding", [None, "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "gb18030"]
)
@pytest.mark.parametrize("mark", [False, True])
def test_only_a_mark_at_the_beginning_is_left_out(tmp_path: Path, encoding: str | None, mark: bool) -> None:
    """A zero-width no-break space in a text is a part of it, wherever the pieces end in which the file is read."""
    texts = ["\ufeff", "a\ufeff\ufeffb" * 30_000, "\ufeff" * 50_000]
    content = "".join(f'{{"id": {n}, "text": "{text}"}}\n' for n, text in enumerate(texts))
    marks_itself = encoding in ("utf-8-sig", "utf-16", "utf-32")
    path = tmp_path / "docs.jsonl"
    path.write_bytes(("\ufeff" * (mark and not marks_itself) + content).encode(encoding or "utf-8"))
    got = [prepare(item, 0).text.decode() for item in read(path, encoding=encoding and encoding_named(encoding))]
    assert got == texts


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-32"])
def test_a_document_that_begins_with_the_character_of_the_mark_keeps_it(tmp_path: Path, encoding: str) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        mark = "" if encoding in ("utf-16", "utf-32") else "\ufeff"
        (folder / name).write_bytes(f"{mark}\ufeff{name} \ufeff end".encode(encoding))
    chunks = read(folder, encoding=encoding_named(encoding))
    assert [chunk.text for chunk in chunks if isinstance(chunk, Chunk)] == [
        "\ufeffa.txt \ufeff end", "\ufeffb.txt \ufeff end",
    ]  # fmt: skip


def test_a_source_that_may_not_be_empty_is_named(tmp_path: Path) -> None:
    (tmp_path / "full.jsonl").write_text('{"id": "a", "text": "one"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "none.csv").write_text("id,text\n")
    full = tmp_path / "full.jsonl"
    for empty in ("empty.jsonl", "none.csv", "-"):
        path = empty if empty == "-" else str(tmp_path / empty)
        for both in ([str(full), path], [path, str(full)]):
            whole = Reader(both, Fields(), skip=True, stdin=io.BytesIO())
            assert len(list(whole)) == 1
            strict = Reader(both, Fields(), skip=True, stdin=io.BytesIO(), may_be_empty=False)
            with pytest.raises(InvalidInput, match=r"(empty\.jsonl|none\.csv|stdin) holds no record.*--allow-empty"):
                list(strict)


def test_a_folder_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("eins\nzwölf".encode("cp1252"))
    (tmp_path / "b.md").write_bytes("drei\nfünf".encode("utf-16"))
    with pytest.raises(InvalidInput, match=r"a\.txt: in line 2, the byte 0xF6 is not valid UTF-8.*--encoding"):
        read(tmp_path)
    bad, good = read(tmp_path, skip=True)
    assert isinstance(bad, InvalidChunk)
    assert (bad.chunk_id, bad.known_id, good) == ("a.txt", "a.txt", Chunk("b.md", "drei\nfünf", {"path": "b.md"}))
    first = next(iter(read(tmp_path, encoding="cp1252")))
    assert first == Chunk("a.txt", "eins\nzwölf", {"path": "a.txt"})


@pytest.mark.parametrize(
    ("name", "content", "encoding", "says"),
    [
        (
            "a.csv",
            b"id,text\na,x\n\nb,caf\xe9\n",
            None,
            r"a\.csv:4: in column 'text', the byte 0xE9 is not valid UTF-8",
        ),
        ("a.csv", b"id,text,\xe9\na,x,1\n", None, r"a\.csv:1: in the header, the byte 0xE9"),
        ("a.json", b'[{"id": "a",\n "text": "\xe9"}]', None, r"a\.json:1: the byte 0xE9 is not valid UTF-8"),
        ("a.jsonl", b'{"id": 1, "text": "x"}\n{"id": "\xe9"}', None, r"a\.jsonl:2: the byte 0xE9 .*\(byte 9 of the"),
        ("a.csv", b"id,text\na,x\nb,\x81\n", "cp1252", r"a\.csv:3: in column 'text', the byte 0x81 is not .* cp1252"),
        ("a.json", b'[{"id": "a", "text": "\x81"}]', "cp1252", r"a\.json:1: the byte 0x81 is not .*encoding cp1252"),
        ("a.jsonl", b'{"id": "a", "text": "\x81"}', "cp1252", r"a\.jsonl:1: the byte 0x81 is not .*encoding cp1252"),
    ],
)
def test_a_wrong_byte_is_named_with_its_file_and_line(
    tmp_path: Path, name: str, content: bytes, encoding: str | None, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=says) as told:
        read(tmp_path / name, encoding=encoding)
    assert "--encoding" in str(told.value)


def test_an_encoding_that_nobody_knows_is_refused() -> None:
    for name in ("no such", "base64", "rot13", "\ud800"):
        with pytest.raises(InvalidInput, match="no encoding is called"):
            encoding_named(name)
    assert (encoding_named("latin-1"), encoding_named("UTF8")) == ("iso8859-1", "utf-8")


def test_a_pipe_is_read_as_it_comes() -> None:
    """A line that is there is read before the next one is written."""
    here, there = os.pipe()
    with os.fdopen(here, "rb") as reading, os.fdopen(there, "wb", 0) as writing:
        for encoding in (None, "cp1252"):
            file = None
            for text in ("é", "ü"):
                writing.write(f"{text}\n".encode(encoding or "utf-8"))
                file = file or in_utf8(reading, encoding)
                assert file.readline() == f"{text}\n".encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("id;text;n\na;café;1\nb;naïve,\n", None),
        ("id;text;n\na;one, two;1\n", "semicolons"),
        ("id\ttext\tn\na\tone, two\t1\n", "tabs"),
        ("id|text|n\na|one, two|1\n", "vertical bars"),
        ("sep=;\nid;text;n\na;one, two;1\n", None),
        ('"id";"text";"n,m"\na;one, two;1\n', "semicolons"),
        ('id,text,"a;b"\na,"one, two",1\n', None),
    ],
)
def test_the_header_says_what_separates_the_columns(tmp_path: Path, content: str, said: str | None) -> None:
    path = tmp_path / "docs.csv"
    path.write_text(content)
    made = reader(path, skip=True)
    chunks = [item for item in made if isinstance(item, Chunk)]
    if "naïve," not in content:
        assert [(chunk.id, chunk.text) for chunk in chunks] == [("a", "one, two")]
        assert made.notes == ([f"{path}: the columns are separated by {said}"] if said else [])
    else:
        assert len(chunks) == 1, "a row of two columns is refused"


def test_a_separator_is_named_if_the_header_does_not_tell(tmp_path: Path) -> None:
    path = tmp_path / "docs.csv"
    path.write_text("id~text\na~one\n")
    with pytest.raises(InvalidInput, match=r"it has 'id~text'.*--delimiter"):
        read(path)
    assert read(path, delimiter="~") == [Chunk("a", "one", {})]
    assert [as_delimiter(given) for given in (None, "tab", "\\t", "\t", ";", "Semicolon")] == [None, *"\t\t\t;;"]
    for wrong in ("", ";;", '"', "\n"):
        with pytest.raises(InvalidInput, match="one character"):
            as_delimiter(wrong)


def test_stdin_and_files_of_other_names_have_the_format_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "export.dat").write_text(CONTENTS["docs.csv"])
    assert read(tmp_path / "export.dat", format="csv") == CAFE
    assert read("-", stdin=JSON.encode(), format="json") == CAFE
    assert read("-", stdin=CONTENTS["docs.tsv"].encode("cp1252"), format="tsv", encoding="cp1252") == CAFE
    with pytest.raises(InvalidInput, match="--format says"):
        read(tmp_path / "export.dat")
    with pytest.raises(InvalidInput, match="cannot be read from stdin"):
        read("-", format="parquet")


@pytest.mark.parametrize("content", ["", "\n\n", "id,text\n"])
def test_an_empty_file_of_any_format_has_no_records(tmp_path: Path, content: str) -> None:
    for name in ("a.csv", "a.tsv", "a.jsonl"):
        (tmp_path / name).write_text(content.replace(",", "\t") if name == "a.tsv" else content)
        assert read(tmp_path / name) == [] if name != "a.jsonl" or "id" not in content else True
    (tmp_path / "a.json").write_text(" [\n] ")
    assert read(tmp_path / "a.json") == []


# JSON arrays


class Slow(io.StringIO):
    """Gives a few characters at a time, however many are asked for."""

    def read(self, size: int | None = -1, /) -> str:
        return super().read(min(size or 7, 7))


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_read_element_by_element_wherever_a_piece_ends(indent: int | None) -> None:
    values: list[Any] = [
        {"a": ["]", '"', {"b": 1}]},
        12345678901,
        1.5e10,
        True,
        "x\n,]",
        [],
        None,
        {"é": "\ud83d\ude00"},
    ]
    text = json.dumps(values, indent=indent, ensure_ascii=False)
    assert [value for _, _, value in elements("a", Slow(f"\n {text} \n"), 1_000)] == values
    lines = [line for line, _, _ in elements("a", Slow(json.dumps([1, [2, 3], 4], indent=1)), 1_000)]
    assert lines == [2, 3, 7]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"id": 1}', r"a:1: it does not begin with \["),
        ("", "a:1: the file ends before"),
        ('[{"id": 1},\n', "a:2: the file ends before"),
        ('[{"id": 1}', "a:1: the file ends before"),
        ('[{"id": 1} {"id": 2}]', r"a:1: after an element there has to be a comma"),
        ('[{"id": 1},\n{"id": secret}]' + " " * 200_000, r"a:2: not valid JSON: Expecting value"),
        ('[{"id": "secret', r"a:1: the file ends inside a string"),
        ("[1] 2", "a:1: there is something after the end"),
        ("[1,]", r"a:1: not valid JSON"),
        ('["' + "x" * 2_000 + '"]', r"a:1: the element is longer than 1,000 characters"),
        ("[" * 100_000, r"a:1: (this JSON is nested too deeply|the element is longer)"),
    ],
)
def test_a_broken_array_says_where_and_quotes_nothing(text: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_arrays, "PIECE", 100)
    with pytest.raises(InvalidInput, match=says) as told:
        list(elements("a", io.StringIO(text), 1_000))
    assert "secret" not in str(told.value)


def test_an_array_of_any_length_is_never_in_memory() -> None:
    class Endless(io.StringIO):
        given = 0

        def read(self, size: int | None = -1, /) -> str:
            self.given += 1
            return "[" if self.given == 1 else '{"id": "a", "text": "x"},'

    file = Endless()
    first = [value for _, (_, _, value) in zip(range(1_000), elements("a", file, 1_000), strict=False)]
    assert first == [{"id": "a", "text": "x"}] * 1_000
    assert file.given < 1_010


def test_a_json_array_under_the_name_of_json_lines_says_so(tmp_path: Path) -> None:
    (tmp_path / "docs.jsonl").write_text(json.dumps([{"id": "a", "text": "x"}], indent=1))
    with pytest.raises(InvalidInput, match=r"docs\.jsonl:1: this is one JSON array.*--format json"):
        read(tmp_path / "docs.jsonl", skip=True)
    assert read(tmp_path / "docs.jsonl", format="json") == [Chunk("a", "x", {})]
    (tmp_path / "cut.jsonl").write_text('{"id": "a", "text": "x')
    with pytest.raises(InvalidInput, match="the line ends inside the string that begins at column 21"):
        read(tmp_path / "cut.jsonl")


# Values and ids


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("5", 5), ("-1.50", -1.5), ("1e3", 1000.0), ("0", 0), ("true", True), ("FALSE", False), ("", None),
        ("null", None),
        ("007", "007"), ("+1", "+1"), ("1,5", "1,5"), ("1 ", "1 "), ("9" * 40, "9" * 40), ("nan", "nan"), (".5", ".5"),
        ("1e999", "1e999"), ("0x10", "0x10"), ("٣", "٣"),
    ],
)  # fmt: skip
def test_a_typed_cell_is_a_number_only_if_json_would_write_it_so(cell: str, value: object) -> None:
    assert typed(cell) == value
    assert type(typed(cell)) is type(value)


def test_cells_are_text_unless_types_are_asked_for_and_ids_and_texts_always_are(tmp_path: Path) -> None:
    (tmp_path / "docs.csv").write_text("id,text,n,empty\n7,42,5,\n")
    assert read(tmp_path / "docs.csv") == [Chunk("7", "42", {"n": "5", "empty": ""})]
    assert read(tmp_path / "docs.csv", typed=True) == [Chunk("7", "42", {"n": 5, "empty": None})]


def test_ids_are_made_of_what_records_hold_and_stay_when_others_move(tmp_path: Path) -> None:
    auto = Fields(id="auto")
    rows = [{"text": "one", "n": 1.5}, {"text": "two", "n": None}, {"text": "one", "n": 2}]

    def ids(given: list[dict[str, Any]]) -> list[str]:
        (tmp_path / "docs.json").write_text(json.dumps(given))
        return [prepare(item, 0).id for item in read(tmp_path / "docs.json", fields=auto)]

    first = ids(rows)
    assert len(set(first)) == 3
    assert ids([{"n": 0, "text": "new"}, *rows[::-1]])[1:] == first[::-1]
    assert ids([{"n": 1.5, "text": "one"}]) == first[:1], "the order of the fields does not count"
    (tmp_path / "docs.csv").write_text("text,n\none,1.5\n")
    assert [chunk.id for chunk in read(tmp_path / "docs.csv", fields=auto, typed=True)] == first[:1]  # type: ignore[attr-defined]
    with pytest.raises(InvalidInput, match=r"no field 'id'.*--id-field auto"):
        read(tmp_path / "docs.json")
    with pytest.raises(InvalidInput, match=r"no column 'id'.*--id-field auto"):
        read(tmp_path / "docs.csv")


def test_two_sources_with_the_same_names_have_ids_of_their_own_under_a_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "same.md").write_text(f"text in {folder}")
    Path("rows.csv").write_text("id,text\n1,one\n")
    with pytest.raises(InvalidInput, match="--prefix-ids"):
        read("a", "b")
    both = read("a/", "./b", "rows.csv", "-", stdin=b'{"id": 7, "text": "seven"}', prefixed=True)
    assert [prepare(chunk, 0).id for chunk in both] == ["a/same.md", "b/same.md", "rows.csv/1", "stdin/7"]
    assert both[1] == Chunk("b/same.md", "text in b", {"path": "same.md"})


def test_several_names_of_fields_may_stand_in_one_option() -> None:
    assert split_names(["a,b", "c", "a"]) == ("a", "b", "c")
    assert split_names(['"a,b", c']) == ("a,b", "c")
    assert split_names([]) == ()


def test_a_number_of_chunks_or_a_share() -> None:
    convert = Refusable().convert
    assert [convert(given, None, None) for given in ("0", "10", "1%", "0.5 %", 0.25)] == [0, 10, 0.01, 0.005, 0.25]
    for wrong in ("", "-1", "100%", "1.5", "many"):
        with pytest.raises(click.BadParameter, match="neither a number"):
            convert(wrong, None, None)


def test_the_limit_of_a_record_holds_for_arrays_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 1_000)
    monkeypatch.setattr(json_arrays, "PIECE", 100)
    (tmp_path / "docs.json").write_text(json.dumps([{"id": "a", "text": "x" * 5_000}]))
    with pytest.raises(InvalidInput, match=r"docs\.json:1: the element is longer than 1,000"):
        read(tmp_path / "docs.json")


def test_half_a_character_of_utf_16_refuses_its_document_and_no_other(tmp_path: Path) -> None:
    for name, content in {"cut.txt": b"\xff\xfe\x00", "half.txt": "whole".encode("utf-16") + b"a"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "whole.txt").write_text("a whole text", "utf-16")
    items = list(Reader([str(tmp_path)], Fields(), skip=True, stdin=io.BytesIO()))
    assert [(item.id, item.text) for item in items if isinstance(item, Chunk)] == [("whole.txt", "a whole text")]
    refused = {item.known_id: item.problem for item in items if isinstance(item, InvalidChunk)}
    assert refused.keys() == {"cut.txt", "half.txt"}
    assert "in line 1, the byte 0x00 is not valid UTF-8" in refused["cut.txt"]
    assert "the byte 0x61 is not valid" in refused["half.txt"]
