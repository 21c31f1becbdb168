"""Golden queries: queries of a collection whose answers are known. Pure.

They are read from the files of a BEIR data set, or made of the titles of chunks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from chunkmill.domain.reasons import printable
from chunkmill.errors import InvalidInput

MAX_QUERY_CHARACTERS = 10_000
MAX_ID_BYTES = 1_024
MAX_GRADE = 1_000
MAX_JUDGED = 2_000
"""The most golden queries that are judged in one call. They are chosen at random, and are the same ones each time. The
bounds of a gain or a loss of nDCG are then about ±0.008."""
MAX_LINE = 16 * 1024 * 1024
"""The most characters of a line of a file."""
TITLE_WORDS, TITLE_CHARACTERS = (3, 40), (12, 250)
"""A title has so many words and characters, at least and at most. A text without blanks counts its characters only."""
MIN_REST = 40
"""A chunk is asked for by its title only if so many characters follow."""

_SENTENCE_END = re.compile(r"[.!?\u2026](?=\s)|[\u3002\uff01\uff1f]")


@dataclass(frozen=True, slots=True)
class GoldenQuery:
    """A query, and how good each chunk is as an answer."""

    id: str
    text: str
    relevant: Mapping[str, float]
    """Chunk id → grade. 0 is a wrong answer, and a higher grade is a better one."""
    is_title: bool = False
    """It is the title of the relevant chunks. When they are judged, it is cut off them."""


def title_and_rest(text: str) -> tuple[str, str] | None:
    """The title of a text and what follows it; None if it has none, or too little follows.

    The title is the first line if the text goes on below, and else the first sentence.
    """
    text = text.strip()
    line, _, below = text.partition("\n")
    if below.strip() and (title := _as_title(line)):
        return (title, below.strip()) if len(below.strip()) >= MIN_REST else None
    # The first paragraph may break its lines anywhere.
    for match in _SENTENCE_END.finditer(text, 0, TITLE_CHARACTERS[1] + 1):
        rest = text[match.end() :].strip()
        if title := _as_title(text[: match.end()]):
            return (title, rest) if len(rest) >= MIN_REST else None
    return None


def rest_of(text: str, title: str) -> str | None:
    """What follows ``title`` in ``text``; None if that is no longer its title."""
    made = title_and_rest(text)
    return made[1] if made and made[0] == title else None


def _as_title(text: str) -> str | None:
    title = " ".join(text.split()).strip("#*=- ")
    n_words = len(title.split())
    fits = TITLE_CHARACTERS[0] <= len(title) <= TITLE_CHARACTERS[1]
    return title if fits and (TITLE_WORDS[0] <= n_words <= TITLE_WORDS[1] or n_words == 1) and _is_text(title) else None


def _is_text(title: str) -> bool:
    """A single word is a title only in a writing without blanks."""
    return " " in title or not title.isascii()


def read_queries(lines: Iterable[str], file: str) -> dict[str, str]:
    """Query id → text of a ``queries.jsonl``, whose lines are ``{"_id": "…", "text": "…"}``.

    Raises :class:`InvalidInput` that names the file and the line. It never quotes a text.
    """
    queries: dict[str, str] = {}
    for where, line in _lines(lines, file):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise InvalidInput(f"{where}: this is not JSON.") from None
        if not isinstance(row, dict):
            raise InvalidInput(f'{where}: this is not a JSON object such as {{"_id": "q1", "text": "…"}}.')
        query_id, text = row.get("_id"), row.get("text")
        if isinstance(query_id, int) and not isinstance(query_id, bool):
            query_id = str(query_id)
        query_id = _as_id(where, "_id", query_id)
        if not isinstance(text, str) or not text.strip():
            raise InvalidInput(f"{where}: text must be a text that is not empty.")
        if len(text) > MAX_QUERY_CHARACTERS:
            raise InvalidInput(f"{where}: the text has {len(text):,} characters; at most {MAX_QUERY_CHARACTERS:,}.")
        if not _is_storable(text):
            raise InvalidInput(
                f"{where}: the text has a NUL character or a lone surrogate, which Postgres cannot store."
            )
        if query_id in queries:
            raise InvalidInput(f"{where}: query {_shown(query_id)} was on an earlier line too.")
        queries[query_id] = text
    return queries


def read_judgements(lines: Iterable[str], file: str, queries: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Query id → chunk id → grade of a ``qrels.tsv``, whose columns are query id, chunk id and grade.

    A first line with other words than a number as its grade is its head. Raises :class:`InvalidInput` that names the
    file and the line, also for a query that is not among ``queries``.
    """
    judged: dict[str, dict[str, float]] = {}
    for number, (where, line) in enumerate(_lines(lines, file)):
        cells = line.rstrip("\r\n").split("\t")
        if len(cells) != 3:
            raise InvalidInput(
                f"{where}: there are {len(cells)} columns with tabs between them; it must be three: query id, chunk id "
                "and grade."
            )
        try:
            grade = float(cells[2])
        except ValueError:
            if number == 0:
                continue
            raise InvalidInput(f"{where}: the grade is not a number.") from None
        if not 0 <= grade <= MAX_GRADE:
            raise InvalidInput(f"{where}: the grade is {cells[2].strip()}; it must be from 0 to {MAX_GRADE:,}.")
        query_id, chunk_id = _as_id(where, "the query id", cells[0]), _as_id(where, "the chunk id", cells[1])
        if query_id not in queries:
            raise InvalidInput(f"{where}: there is no query {_shown(query_id)} in the file of queries.")
        of_query = judged.setdefault(query_id, {})
        if of_query.get(chunk_id, grade) != grade:
            raise InvalidInput(f"{where}: chunk {_shown(chunk_id)} has another grade for {_shown(query_id)} above.")
        of_query[chunk_id] = grade
    return judged


def _lines(lines: Iterable[str], file: str) -> Iterator[tuple[str, str]]:
    """Where each line that is not empty stands, and the line."""
    for number, line in enumerate(lines, 1):
        where = f"{printable(file)}, line {number}"
        if len(line) > MAX_LINE:
            raise InvalidInput(f"{where}: the line has more than {MAX_LINE:,} characters.")
        if line.strip():
            yield where, line


def _as_id(where: str, what: str, given: object) -> str:
    if not isinstance(given, str) or not given or not _is_storable(given) or len(given.encode()) > MAX_ID_BYTES:
        raise InvalidInput(f"{where}: {what} must be a text of 1 to {MAX_ID_BYTES:,} bytes without NUL.")
    return given


def _is_storable(text: str) -> bool:
    return "\x00" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _shown(identifier: str) -> str:
    return printable(repr(identifier))[:80]
