"""Files as chunks: each kind, and what becomes of a record that cannot be read."""

from __future__ import annotations

import csv
import io
import json
import uuid
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from chunkmill.cli.jobs import sources
from chunkmill.cli.jobs.sources import Fields, Form, Reader
from chunkmill.cli.start import corpus
from chunkmill.cli.start.corpus import some_stdlib_docstrings, stdlib_docstrings
from chunkmill.domain.chunks import Chunk, prepare
from chunkmill.errors import InvalidChunk, InvalidInput


def read(
    *names: Path | str,
    skip: bool = False,
    fields: Fields | None = None,
    stdin: bytes = b"",
    form: Form | None = None,
) -> list[object]:
    return list(Reader([str(n) for n in names], fields or Fields(), skip=skip, stdin=io.BytesIO(stdin), form=form))


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text(
        '\ufeff{"id": "a", "text": "one", "source": "x", "metadata": {"page": 3}}\n\n{"id": 7, "text": "two"}', "utf-8"
    )
    seven: Any = 7  # the client takes it for its text
    assert read(path) == [Chunk("a", "one", {"source": "x", "page": 3}), Chunk(seven, "two", {})]


def test_stdin_and_several_sources(tmp_path: Path) -> None:
    path = tmp_path / "docs.ndjson"
    path.write_text('{"id": "b", "text": "two"}\n')
    assert read("-", path, stdin=b'{"id": "a", "text": "one"}\n') == [Chunk("a", "one", {}), Chunk("b", "two", {})]
    with pytest.raises(InvalidInput, match="twice"):
        read("-", "-")


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "docs.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "body", "metadata"])
        writer.writerow(["a", 'a "text",\nof two lines', "m"])
    assert read(path, fields=Fields("key", "body")) == [Chunk("a", 'a "text",\nof two lines', {"metadata": "m"})]


def test_parquet_with_values_that_json_lacks(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "docs.parquet"
    columns = {"id": [1, 2], "text": ["one", "two"], "day": [date(2024, 2, 29)] * 2, "price": [Decimal("1.50")] * 2}
    parquet.write_table(pa.table(columns), path)
    metadata = {"day": "2024-02-29", "price": "1.50"}
    ids: list[Any] = [1, 2]
    assert read(path) == [Chunk(ids[0], "one", metadata), Chunk(ids[1], "two", metadata)]


@pytest.mark.parametrize(
    ("kind", "value", "becomes"),
    [
        ("timestamp[ns]", 1_709_164_800_123_456_789, "2024-02-29T00:00:00.123456"),
        ("duration[ns]", 1_500_000_001, 1.5),
        ("time64[ns]", 1_000_000_001, "00:00:01"),
        ("double", float("nan"), None),
        ("float", float("-inf"), None),
        ("binary", "größer".encode(), "größer"),
        ("binary", b"\xff\xd8", "the field 'extra' holds bytes .* --metadata-field"),
        ("list<timestamp[ns]>", [1_709_164_800_000_000_001], ["2024-02-29T00:00:00"]),
        ("struct", {"day": date(2024, 2, 29), "rate": float("nan")}, {"day": "2024-02-29", "rate": None}),
        ("map", [("day", date(2024, 2, 29))], {"day": "2024-02-29"}),
    ],
)
def test_every_kind_of_parquet_column_is_metadata_or_says_why_not(
    tmp_path: Path, kind: str, value: Any, becomes: Any
) -> None:
    pa = pytest.importorskip("pyarrow")
    types = {
        "timestamp[ns]": pa.timestamp("ns"), "duration[ns]": pa.duration("ns"), "time64[ns]": pa.time64("ns"),
        "double": pa.float64(), "float": pa.float32(), "binary": pa.binary(),
        "list<timestamp[ns]>": pa.list_(pa.timestamp("ns")),
        "struct": pa.struct({"day": pa.date32(), "rate": pa.float64()}), "map": pa.map_(pa.string(), pa.date32()),
    }  # fmt: skip
    columns = {"id": ["a", "b"], "text": ["one", "two"], "extra": pa.array([value, None], types[kind])}
    path = tmp_path / "docs.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(pa.table(columns), path)
    if isinstance(becomes, str) and "the field" in becomes:
        with pytest.raises(InvalidInput, match=rf"row 1: {becomes}"):
            read(path)
        assert read(path, skip=True)[1] == Chunk("b", "two", {"extra": None})
    else:
        chunks = read(path)
        assert chunks == [Chunk("a", "one", {"extra": becomes}), Chunk("b", "two", {"extra": None})]
        assert [prepare(chunk, 0).id for chunk in chunks] == ["a", "b"]
    assert read(path, fields=Fields(metadata=())) == [Chunk("a", "one", {}), Chunk("b", "two", {})]


@pytest.mark.parametrize("kind", ["no UTF-8", "far time", "far day", "unknown zone"])
def test_a_parquet_value_that_python_cannot_hold_refuses_its_row_alone(tmp_path: Path, kind: str) -> None:
    pa = pytest.importorskip("pyarrow")
    values = {
        "no UTF-8": pa.array([b"\xff", None], pa.binary()).view(pa.string()),
        "far time": pa.array([2**62, None], pa.timestamp("us")),
        "far day": pa.array([2**30, None], pa.date32()),
        "unknown zone": pa.array([1, None], pa.timestamp("us", "No/Zone")),
    }
    path = tmp_path / "docs.parquet"
    table = pa.table({"id": ["a", "b"], "text": ["one", "two"], "extra": values[kind]})
    pytest.importorskip("pyarrow.parquet").write_table(table, path)
    with pytest.raises(InvalidInput, match=r"row 1: the field 'extra' holds a value that cannot be read"):
        read(path)
    refused, kept = read(path, skip=True)
    assert (refused.reason, kept) == ("unreadable", Chunk("b", "two", {"extra": None}))
    assert read(path, fields=Fields(metadata=())) == [Chunk("a", "one", {}), Chunk("b", "two", {})]


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    path = tmp_path / "docs.parquet"
    table = pa.table([pa.array(["a"])] * 4, names=["id", "text", "x", "x"])
    pytest.importorskip("pyarrow.parquet").write_table(table, path)
    with pytest.raises(InvalidInput, match="several columns are called 'x'"):
        read(path)


@pytest.mark.parametrize("name", ["docs.csv", "docs.jsonl"])
def test_only_the_fields_that_are_named_become_metadata(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".csv"):
        path.write_text("id,text,kept,left\na,one,1,2\n")
    else:
        path.write_text('{"id": "a", "text": "one", "kept": "1", "left": NaN, "metadata": {"n": 1}}\n')
    assert read(path, fields=Fields(metadata=("kept",))) == [Chunk("a", "one", {"kept": "1"})]


def test_a_csv_column_that_is_named_and_absent_is_told(tmp_path: Path) -> None:
    path = tmp_path / "docs.csv"
    path.write_text("id,text\na,one\n")
    with pytest.raises(InvalidInput, match=r"no column 'lang'.*--metadata-field"):
        read(path, fields=Fields(metadata=("lang",)))


def test_a_number_that_is_none_is_null(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text('{"id": "a", "text": "one", "n": NaN, "m": [-Infinity, 1]}\n')
    assert read(path) == [Chunk("a", "one", {"n": None, "m": [None, 1]})]


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "docs.parquet"
    path.touch()

    def absent(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(sources.importlib, "import_module", absent)
    with pytest.raises(InvalidInput, match=r"pip install -c constraints.txt '\.\[parquet\]'"):
        read(path)


def test_a_folder_is_one_chunk_per_text_file(tmp_path: Path) -> None:
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    for name in ("b.md", "sub/a.txt", "sub/c.RST", "sub/.git/no.txt", "no.png", ".no.md"):
        (tmp_path / name).write_text(f"text of {name}")
    assert read(tmp_path) == [
        Chunk(name, f"text of {name}", {"path": name}) for name in ("b.md", "sub/a.txt", "sub/c.RST")
    ]


def test_files_of_two_folders_have_ids_of_their_own_or_are_refused(tmp_path: Path) -> None:
    for name in ("a/one.md", "a/sub/same.txt", "b/two.md", "c/sub/same.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")

    def ids(*sources: Path) -> list[str]:
        reader = Reader([str(source) for source in sources], Fields(), skip=True, stdin=io.BytesIO())
        return [chunk.id for chunk in reader if isinstance(chunk, Chunk)]

    a, b, c = (tmp_path / name for name in "abc")
    assert ids(a, b) == ["one.md", "sub/same.txt", "two.md"]
    for both in ((a, c), (b, a, c), (a, a)):
        with pytest.raises(InvalidInput, match=r"would have the same id .*folder above both"):
            ids(*both)
    assert ids(tmp_path) == ["a/one.md", "a/sub/same.txt", "b/two.md", "c/sub/same.txt"]


def bad_jsonl(path: Path) -> Path:
    path.write_bytes(
        b'{"id": "a", "text": "one"}\nsecret words\n["secret words"]\n{"id": "b"}\n'
        b'{"id": "c", "text": "\xff"}\n' + b"[" * 100_000 + b'\n{"id": "z", "text": "last"}\n'
    )
    return path


def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path) -> None:
    path = bad_jsonl(tmp_path / "bad.jsonl")
    with pytest.raises(InvalidInput, match=r"bad\.jsonl:2: not valid JSON.*--on-invalid skip") as caught:
        read(path)
    assert "secret" not in str(caught.value)


def test_a_skipped_line_is_refused_by_the_client_under_its_place(tmp_path: Path) -> None:
    items = read(bad_jsonl(tmp_path / "bad.jsonl"), skip=True)
    assert items[0] == Chunk("a", "one", {})
    assert items[-1] == Chunk("z", "last", {})
    refusals = []
    for position, item in enumerate(items[1:-1]):
        with pytest.raises(InvalidChunk) as caught:
            prepare(item, position)
        refusals.append(caught.value)
    assert [Path(r.chunk_id).name for r in refusals] == [f"bad.jsonl:{n}" for n in range(2, 7)]
    problems = [r.problem for r in refusals]
    for problem, words in zip(problems, ["JSON", "not a JSON object", "'text'", "UTF-8", "too deep"], strict=True):
        assert words in problem
        assert "secret" not in problem


def test_a_line_without_end_is_skipped_in_constant_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 100)
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"id": "a", "text": "x" * 1000}) + '\n{"id": "b", "text": "short"}\n')
    with pytest.raises(InvalidInput, match=r"long\.jsonl:1: the line is longer than 100 bytes"):
        read(path)
    assert read(path, skip=True)[1:] == [Chunk("b", "short", {})]


def test_bad_csv_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text('id,text\na,"two\nlines"\nb\nc,three\n')
    with pytest.raises(InvalidInput, match=r"bad\.csv:4: it has 1 columns, the header has 2"):
        read(path)
    assert read(path, skip=True)[::2] == [Chunk("a", "two\nlines", {}), Chunk("c", "three", {})]


def test_a_csv_in_another_encoding_is_refused_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "latin.csv"
    path.write_bytes('id,text\na,"a line\nand café"\nb,plain\n'.encode("latin-1"))
    with pytest.raises(InvalidInput, match=r"latin\.csv:2: in column 'text', the byte 0xE9 is not .*--encoding cp1252"):
        read(path)
    first, second = read(path, skip=True)
    assert isinstance(first, InvalidChunk)
    assert (Path(first.chunk_id).name, first.known_id, second) == ("latin.csv:2", None, Chunk("b", "plain", {}))
    assert read(path, form=Form(encoding="iso8859-1"))[0] == Chunk("a", "a line\nand café", {})


@pytest.mark.parametrize(
    ("after", "last"),
    [("c,three\nd,four\n", 5), ('c,"three"\nd,four\n', 4)],
    ids=["never closed", "closed by another quote"],
)
def test_a_csv_quote_that_is_not_closed_takes_no_rows_in_silence(tmp_path: Path, after: str, last: int) -> None:
    path = tmp_path / "docs.csv"
    path.write_text('id,text\na,one\nb,"two\n' + after)
    with pytest.raises(InvalidInput, match=rf"docs\.csv:3: not valid CSV: .*lines 3 to {last} .*quote not closed"):
        read(path)
    skipped = [item.chunk_id for item in read(path, skip=True) if isinstance(item, InvalidChunk)]
    assert [Path(place).name for place in skipped] == ["docs.csv:3"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("twice.csv", "id,text,x,x\n", r"twice\.csv:1: several columns are called 'x'"),
        ("missing.jsonl", None, "there is no file or folder"),
        ("page.docx", "<p>", "the format is not known from the name"),
        ("page.html", "<p>", "this is one document. To cut it into chunks of their own, pass --chunk, such as"),
        ("heads.csv", "key,text\n", r"heads\.csv:1: there is no column 'id'; it has 'key', 'text'.*--id-field"),
        ("broken.parquet", "no parquet", "this Parquet file cannot be read"),
    ],
)
def test_a_source_that_cannot_be_used_says_why(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InvalidInput, match=message):
        read(tmp_path / name)


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"the folder .* contains no "):
        read(tmp_path)


def test_a_missing_source_is_found_before_the_first_one_is_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="there is no file"):
        Reader(["-", str(tmp_path / f"{uuid.uuid4()}.jsonl")], Fields(), skip=False, stdin=io.BytesIO())


def test_records_are_read_one_by_one() -> None:
    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            line = b'{"id": "a", "text": "x"}\n'
            buffer[: len(line)] = line
            return len(line)

    reader: Iterator[object] = iter(Reader(["-"], Fields(), skip=False, stdin=io.BufferedReader(Endless(), 64)))
    assert [next(reader) for _ in range(1000)] == [Chunk("a", "x", {})] * 1000


def test_the_standard_library_as_a_corpus() -> None:
    by_id = {}
    for chunk in stdlib_docstrings():
        assert chunk.id not in by_id
        by_id[chunk.id] = chunk
        if chunk.metadata["module"] > "argparse":
            break
    assert by_id["abc"].metadata == {"module": "abc", "kind": "module"}
    assert by_id["abc:ABC"].metadata == {"module": "abc", "kind": "class"}
    assert by_id["abc:ABCMeta.register"].text.startswith("Register a virtual subclass")
    assert not any(id_.startswith(("test.", "idlelib.idle_test", "site-packages")) for id_ in by_id)


def test_a_csv_record_has_a_limit_however_many_fields_and_lines_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 100)
    path = tmp_path / "wide.csv"
    path.write_text("id,text\na," + "x," * 80 + '\nc,short\nb,"' + "line\n" * 30)
    with pytest.raises(InvalidInput, match=r"wide\.csv:2: not valid CSV: the record is longer than 100 characters"):
        read(path)
    wide, short, *lines = read(path, skip=True)
    assert isinstance(wide, InvalidChunk)
    assert short == Chunk("c", "short", {})
    assert lines
    assert all(isinstance(item, InvalidChunk) for item in lines)
    path.write_text("x," * 80)
    with pytest.raises(InvalidInput, match="not a CSV header: the record is longer"):
        read(path)


def test_an_error_about_columns_names_a_few_of_them(tmp_path: Path) -> None:
    path = tmp_path / "wide.csv"
    path.write_text(",".join(f"column{n}" for n in range(10_000)) + "\n")
    with pytest.raises(InvalidInput, match="and 9,980 more") as refused:
        read(path)
    assert len(str(refused.value)) < 1_000


def test_a_few_docstrings_are_from_many_modules_and_read_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path), read_bytes(path))[1])
    few = some_stdlib_docstrings(60)
    assert len(few) == len({chunk.id for chunk in few}) == 60
    modules = [chunk.metadata["module"] for chunk in few]
    assert len(set(modules)) >= 10
    assert len(read) < 60
    monkeypatch.undo()
    # `stdlib_docstrings` reads all modules, and here those that the few are from.
    all_modules = corpus._modules()
    monkeypatch.setattr(corpus, "_modules", lambda: [entry for entry in all_modules if entry[1] in modules])
    everything = {chunk.id: chunk for chunk in stdlib_docstrings()}
    assert len(everything) > len(few)
    assert all(everything[chunk.id] == chunk for chunk in few)
