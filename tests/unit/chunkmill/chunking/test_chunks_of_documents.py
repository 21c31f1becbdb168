"""Documents become chunks that a model reads whole, and that stay the same when the document changes elsewhere."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkmill.chunking import Chunker, Kind, Unit
from chunkmill.chunking.reading import read_text
from chunkmill.domain.chunks import Chunk
from chunkmill.errors import InvalidInput
from chunkmill.models import resolve_model
from chunkmill.openai.plan.tokens import from_tokenizer_file

WORDS = [
    "mill",
    "stone",
    "grain",
    "water",
    "wheel",
    "flour",
    "sack",
    "river",
    "mule",
    "baker",
    "oven",
    "bread",
    "salt",
    "crust",
    "knead",
    "rise",
    "sieve",
    "husk",
]
E5 = "all-MiniLM-L6-v2?document_prompt=a+passage+of+a+long+document%3A+"


@pytest.fixture(scope="module")
def by_tokens() -> Chunker:
    return Chunker(60, overlap=8)


def sentences(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(8, 20))).capitalize() + "." for _ in range(count)]


def tokens(texts: Sequence[str]) -> list[int]:
    """With the special ones, as the model reads them."""
    return from_tokenizer_file(resolve_model("all-MiniLM-L6-v2").transformer / "tokenizer.json").counts(texts)


def changes(chunker: Chunker, kind: Kind, before: str, after: str) -> tuple[int, int, int]:
    """How many chunks there are before, and how many ids and contents are in only one of both."""
    one, two = ({c.id: c.text for c in chunker.chunks("doc", text, kind=kind)} for text in (before, after))
    assert all(two[chunk_id] == text for chunk_id, text in one.items() if chunk_id in two)
    return len(one), len(one.keys() ^ two.keys()), len(set(one.values()) ^ set(two.values()))


PARTS = st.lists(
    st.one_of(
        st.sampled_from(
            ["\n", "\n\n", " ", ". ", "# Head\n", "## Sub\n\n", "```\n", "- item\n", "\t", "\r\n", "\u3002"]
        ),
        st.text(max_size=40),
        st.integers(1, 60).map(lambda n: "x" * n),
        st.integers(1, 30).map(lambda n: "five " * n),
    ),
    max_size=60,
)


@given(PARTS, st.integers(16, 70), st.integers(0, 8), st.sampled_from([Kind.TEXT, Kind.MARKDOWN]))
@settings(max_examples=60, deadline=None)
def test_chunks_are_pieces_of_the_text_and_none_is_too_large(
    parts: list[str], size: int, overlap: int, kind: Kind
) -> None:
    chunker = Chunker(size, overlap=overlap, unit=Unit.CHARACTERS)
    document = read_text("".join(parts), kind)
    at = 0
    for chunk in chunker.cut("doc", document):
        start, end = chunk.metadata["chunk_start"], chunk.metadata["chunk_end"]
        assert chunk.text == document.text[start:end]
        assert 0 < end - start <= size
        assert not document.text[at:start].strip()  # nothing is left out
        assert max(0, at - start) <= overlap
        assert end > at
        at = end
    assert not document.text[at:].strip()


def test_no_chunk_has_more_tokens_than_asked_for(by_tokens: Chunker) -> None:
    rng = random.Random(3)
    odd = "".join(chr(rng.choice([0x4E2D, 0x1F9E9, 0x0635, 0x61, 0x20, 0xE9, 0x2D])) for _ in range(3000))
    text = "\n\n".join([*sentences(60, 1), " ".join(sentences(60, 2)), odd, "a,b;c/d" * 500])
    chunks = list(by_tokens.chunks("doc", text))
    sizes = tokens([chunk.text for chunk in chunks])
    assert max(sizes) <= 60 + 2
    assert sum(sizes) / len(sizes) > 40


def test_a_prompt_of_the_model_takes_its_part_of_what_the_model_reads() -> None:
    prompt = "a passage of a long document: "
    assert Chunker(254).size == 254
    with pytest.raises(InvalidInput, match="255 tokens, and all-MiniLM-L6-v2 reads at most 254 of a text: "):
        Chunker(255)
    with pytest.raises(InvalidInput, match="reads at most 247 of a text besides its prompt"):
        Chunker(254, model=E5)
    text = " ".join(sentences(200, 4))
    assert max(tokens([prompt + chunk.text for chunk in Chunker(247, model=E5).chunks("doc", text)])) <= 256


@pytest.mark.parametrize("unit", list(Unit))
@pytest.mark.parametrize("form", ["paragraphs", "lines", "sections"])
def test_what_is_inserted_in_the_middle_changes_few_ids_and_contents(unit: Unit, form: str) -> None:
    chunker = Chunker(60, overlap=8) if unit is Unit.TOKENS else Chunker(300, overlap=40, unit=unit)
    pieces = sentences(400, 5)
    if form == "sections":
        pieces = [f"## Part {n // 10}\n\n{piece}" if n % 10 == 0 else piece for n, piece in enumerate(pieces)]
    gap, kind = ("\n", Kind.TEXT) if form == "lines" else ("\n\n", Kind.MARKDOWN)
    more = [*pieces[:205], "A paragraph that was not there before, about the miller's donkey.", *pieces[205:]]
    count, ids, contents = changes(chunker, kind, gap.join(pieces), gap.join(more))
    assert count > 100
    assert 0 < ids < count / 4  # a greedy cut changes all chunks behind the place, on both sides: as many as there are
    assert 0 < contents < count / 4
    assert changes(chunker, kind, gap.join(more), gap.join(pieces))[1:] == (ids, contents)
    assert changes(chunker, kind, gap.join(pieces), gap.join(pieces)) == (count, 0, 0)


@pytest.mark.parametrize("gap", ["\n", "\n\n"])
def test_also_among_pieces_of_equal_length_the_cuts_meet_again(gap: str) -> None:
    chunker = Chunker(300, overlap=40, unit="characters")
    pieces = [f"Sack {n:04} was ground." for n in range(1000)]
    more = [*pieces[:500], "Sack 9999 was ground.", *pieces[500:]]
    count, ids, contents = changes(chunker, Kind.TEXT, gap.join(pieces), gap.join(more))
    assert count > 80
    assert 0 < ids == contents <= 20


def test_an_overlap_begins_at_a_line_or_sentence_or_word() -> None:
    def overlaps(text: str) -> list[str]:
        chunks = list(Chunker(60, overlap=25, unit="characters").chunks("a", text))
        return [text[c.metadata["chunk_start"] : b.metadata["chunk_end"]] for b, c in pairwise(chunks)]

    assert overlaps("Corn was there. It is done now. Sieve the flour and bake a bread.") == ["It is done now."]
    code = overlaps("def mill():\n    one = 1\n    two = 2\n    three_and_much_more = 3\n    four = 4")
    assert code[0] == "    one = 1"
    words = overlaps("the mill stands by the river and turns all day long until the night comes down again")
    assert words
    assert all(
        overlap.split()[0] in ("stands", "by", "river", "and", "turns", "all", "day", "long") for overlap in words
    )


def test_a_passage_that_comes_twice_is_two_chunks() -> None:
    same = "## Note\n\nBack up the ledger first.\n\n"
    chunks = list(Chunker(100, unit="characters").chunks("a", same + "## Other\n\nGrind.\n\n" + same, kind="markdown"))
    assert len({chunk.id for chunk in chunks}) == len(chunks) == 3
    assert chunks[2].id == f"{chunks[0].id}-2"
    assert [chunk.id.partition("#")[0] for chunk in chunks] == ["a"] * 3


def test_the_metadata_are_those_of_the_document_and_the_place(by_tokens: Chunker) -> None:
    front, code = "---\ntitle: x\n---", "```sh\n# no heading\n```"
    text = f"{front}\n# Mill\n\n## Empty\n## Stones *and* [wheels](x)\n\nOne.\n\n{code}\n\nTwo\n===\n\nEnd."
    first, second, third = by_tokens.chunks("m.md", text, {"lang": "en"}, kind="markdown")
    assert first.text == front
    assert second.text.startswith("# Mill\n\n## Empty\n## Stones")
    assert second.metadata == {
        "lang": "en", "document": "m.md", "chunk_start": 17, "chunk_end": text.index("\n\nTwo"),
        "headings": ["Mill", "Stones and wheels"],
    }  # fmt: skip
    assert third.metadata["headings"] == ["Two"]
    assert third.text == "Two\n===\n\nEnd."


def test_a_key_of_the_metadata_that_says_the_place_is_refused_by_its_name(by_tokens: Chunker) -> None:
    with pytest.raises(InvalidInput, match=r"the metadata of 'a' have the key 'chunk_end'.*Rename it, or leave it out"):
        by_tokens.chunks("a", "text", {"lang": "en", "chunk_end": 4})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"size": 15}, "size is 15; it must be at least 16"),
        ({"size": "200"}, "size is '200'; it must be a whole number"),
        ({"size": 20, "overlap": 11}, "overlap is 11; it must be at most half of the size, which is 20"),
        ({"size": 20, "unit": "words"}, "unit is 'words'; it must be one of: tokens, characters"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        Chunker(**{"unit": "characters"} | arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("package", "name"), [("semantic_text_splitter", ""), ("markdown_it", "a.md"), ("selectolax.lexbor", "a.html"),
                          ("pypdfium2", "a.pdf")]
)  # fmt: skip
def test_without_a_library_the_error_says_what_to_install(
    package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunker = Chunker(20, unit="characters")
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_text("x") if name else None
    with pytest.raises(InvalidInput, match=r"needs the package [a-z0-9-]+\. Run: pip install .*\[documents\]"):
        list(chunker.file(tmp_path / name)) if name else Chunker(20, unit="characters")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    chunker = Chunker(20, unit="characters")
    (tmp_path / "a.txt").write_bytes(b"ok\nnot \xfc")
    for path, said in (
        (tmp_path / "a.txt", "a.txt: not valid UTF-8 at byte 8, in line 2"),
        (tmp_path / "b.txt", "b.txt cannot be read: No such file"),
        (tmp_path / "c.xls", "c.xls: the kind of the document is not known from its name"),
    ):
        with pytest.raises(InvalidInput, match=said):
            chunker.file(path)


def test_a_long_line_without_a_blank_is_cut_in_time() -> None:
    chunks: list[Chunk] = list(Chunker(200, unit="characters").chunks("min.js", "x=1;" * 100_000))
    assert "".join(chunk.text for chunk in chunks) == "x=1;" * 100_000
