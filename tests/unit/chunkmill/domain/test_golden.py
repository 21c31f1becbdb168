"""Golden queries: files of BEIR are read to the line, and titles are told from texts."""

from __future__ import annotations

import pytest

from chunkmill.domain.golden import read_judgements, read_queries, rest_of, title_and_rest
from chunkmill.errors import InvalidInput

SECRET = "a secret text"
REST = "Below it there are enough words to search for."


def test_the_files_of_beir_are_read() -> None:
    queries = read_queries(
        ['{"_id": "q1", "text": "first", "metadata": {}}\n', "\n", '{"_id": 2, "text": "second"}\n'], "queries.jsonl"
    )
    assert queries == {"q1": "first", "2": "second"}
    lines = [
        "query-id\tcorpus-id\tscore\n",
        "q1\tdoc a\t2\r\n",
        "q1\tdoc b\t0\n",
        "\n",
        "2\tdoc a\t0.5",
        "2\tdoc a\t0.5",
    ]
    assert read_judgements(lines, "qrels.tsv", queries) == {"q1": {"doc a": 2.0, "doc b": 0.0}, "2": {"doc a": 0.5}}
    assert read_judgements(["q1\ta\t1\n"], "qrels.tsv", queries) == {"q1": {"a": 1.0}}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (SECRET, "not JSON"),
        ("[" * 100_000, "not JSON"),
        (f'["{SECRET}"]', "not a JSON object"),
        (f'{{"text": "{SECRET}"}}', "_id must be"),
        (f'{{"_id": "", "text": "{SECRET}"}}', "_id must be"),
        (f'{{"_id": true, "text": "{SECRET}"}}', "_id must be"),
        (f'{{"_id": "{"x" * 2_000}", "text": "{SECRET}"}}', "_id must be"),
        ('{"_id": "a"}', "text must be"),
        ('{"_id": "a", "text": "  "}', "text must be"),
        (f'{{"_id": "a", "text": "{SECRET}\\u0000"}}', "NUL"),
        (f'{{"_id": "a", "text": "{SECRET}\\ud800"}}', "lone surrogate"),
        (f'{{"_id": "a", "text": "{"x" * 10_001}"}}', "at most 10,000"),
        (f'{{"_id": "q0", "text": "{SECRET}"}}', "'q0' was on an earlier line"),
    ],
)
def test_a_wrong_query_is_named_by_its_file_and_line_and_not_quoted(line: str, says: str) -> None:
    with pytest.raises(InvalidInput, match=rf"^set/queries.jsonl, line 3: .*{says}") as caught:
        read_queries(['{"_id": "q0", "text": "good"}\n', "\n", line], "set/queries.jsonl")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("q0 a 1", "1 columns"),
        ("q0\t0\ta\t1", "4 columns"),
        ("q0\ta\tgood", "not a number"),
        ("q0\ta\tnan", "from 0 to"),
        ("q0\ta\t-1", "from 0 to"),
        ("q0\ta\t1e9", "from 0 to"),
        ("q0\t\t1", "the chunk id must be"),
        ("q9\ta\t1", "no query 'q9'"),
        ("q0\tb\t2", "'b' has another grade for 'q0'"),
    ],
)
def test_a_wrong_judgement_is_named_by_its_file_and_line(line: str, says: str) -> None:
    with pytest.raises(InvalidInput, match=rf"^qrels.tsv, line 3: .*{says}"):
        read_judgements(["query-id\tcorpus-id\tscore\n", "q0\tb\t1\n", line], "qrels.tsv", {"q0": "good"})


@pytest.mark.parametrize(
    ("text", "title"),
    [
        (f"Return the next item.\n\n{REST}", "Return the next item."),
        (f"# How to index  a table #\n{REST}", "How to index a table"),
        (f"The first sentence ends here. {REST}", "The first sentence ends here."),
        (f"It breaks\nits lines anywhere, and ends. {REST}", "It breaks its lines anywhere, and ends."),
        (f"Version 1.2 of it is here! {REST}", "Version 1.2 of it is here!"),
        (f"人工智能是计算机科学的一个分支领域。{'它试图了解智能的实质。' * 5}", "人工智能是计算机科学的一个分支领域。"),
        ("Return the next item.\n\nToo short.", None),
        (f"{'word ' * 60}. {REST}", None),
        ("no end and no line " * 9, None),
        (f"Usage:\n{REST} It has two.", REST.join(["Usage: ", ""])),
        ("", None),
    ],
)
def test_a_title_is_a_first_line_or_sentence_with_enough_below(text: str, title: str | None) -> None:
    made = title_and_rest(text)
    assert (made[0] if made else None) == (title.strip() if title and len(text) > len(title) + 40 else title and None)


def test_the_title_is_not_in_the_rest_and_a_chunk_with_another_title_has_no_rest() -> None:
    text = f"Return the next item.\n\n{REST}"
    assert title_and_rest(text) == ("Return the next item.", REST)
    assert rest_of(text, "Return the next item.") == REST
    assert rest_of(text.replace("next", "last"), "Return the next item.") is None
    assert rest_of("Return the next item.", "Return the next item.") is None
