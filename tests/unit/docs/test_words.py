"""Words have one meaning, and names say what a thing is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import chunkmill

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "docs/glossary.md", ROOT / "docs/architecture.md", ROOT / "CONTRIBUTING.md"]
EMPTY_NAMES = {"each", "found", "facts"}
HINT = re.compile(
    r"\b(?:for|as|def) _*(?:each|found|facts)(?: in\b|[,:(])|(?<![\w.])_*(?:each|found|facts)(?:, \w+|: [^=\n]+)* :?= "
)
"""Only files with such a line are parsed, because parsing all of them takes seconds."""


def empty_names(text: str) -> set[str]:
    """The names of variables, arguments and functions that do not say what the thing is."""
    if not HINT.search(text):
        return set()
    tree = ast.parse(text)
    declared = {id(node.target) for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and node.value is None}
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in declared:
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
    return {name for name in names if name.strip("_") in EMPTY_NAMES}


def test_no_name_in_the_code_says_nothing_about_the_thing() -> None:
    folders = ("app", "workers", "tests", "docs", "deploy", "alembic", "benchmarks")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 900
    assert {str(path): names for path in sources if (names := empty_names(path.read_text()))} == {}


@pytest.mark.parametrize(
    "code",
    ["found = f()", "for each in rows: pass", "x = [n for each in rows]", "facts: dict[str, int] = {}",
     "found, n = f()", "if (found := f()): pass", "def _each(self): pass"],
)  # fmt: skip
def test_such_a_name_is_noticed(code: str) -> None:
    assert empty_names(code)


ELSEWHERE = {
    "lane": "workers/chunkmill_workers/(?:local|engine|host|supervisor|tuning)/",  # a lane is a paid or local route
    "budget": "workers/chunkmill_workers/(?:local|engine|host|supervisor|tuning)/",  # a budget is in US dollars
    "room": "workers/chunkmill_workers/(?:local|engine)/|app/chunkmill/gateway/",
    "window": "app/chunkmill/openai/|workers/chunkmill_workers/process/",  # there a window is a text window
    "cut": "(?!app/chunkmill/(?:chunking|cli/jobs)/)",  # only documents are cut
}
"""``word → the files in which no class or function has this word alone as its name``, or, for a lane and a budget,
as a part of it."""


def declared_names(text: str) -> set[str]:
    """The names of the classes and functions of a module, in words: ``TokenLimit`` is ``token_limit``."""
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    names = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)}
    return {re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).strip("_").lower() for name in names}


def misused(word: str, path: str, text: str) -> set[str]:
    if not re.match(ELSEWHERE[word], path):
        return set()
    whole = word not in ("lane", "budget")
    return {name for name in declared_names(text) if (name == word if whole else word in name.split("_"))}


@pytest.mark.parametrize("word", ELSEWHERE)
def test_a_word_of_the_glossary_names_nothing_else(word: str) -> None:
    sources = [path for folder in ("app", "workers") for path in (ROOT / folder).rglob("*.py")]
    assert {
        str(path): names
        for path in sources
        if word in (text := path.read_text()).lower() and (names := misused(word, str(path.relative_to(ROOT)), text))
    } == {}


@pytest.mark.parametrize(
    ("word", "path", "code"),
    [
        ("lane", "workers/chunkmill_workers/local/lane.py", "class Lane: ..."),
        ("budget", "workers/chunkmill_workers/engine/token_budget.py", "class TokenBudget: ..."),
        ("room", "app/chunkmill/gateway/limits/room.py", "class Room: ..."),
        ("window", "workers/chunkmill_workers/process/reporting.py", "class Window: ..."),
        ("cut", "app/chunkmill/domain/planning.py", "def cut(): ..."),
    ],
)
def test_another_meaning_of_a_word_is_noticed(word: str, path: str, code: str) -> None:
    assert misused(word, path, code)
    assert not misused(word, path, "class Nothing: ...")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_table_explains_a_thing_twice(page: Path) -> None:
    first = re.findall(r"^\| (.+?) \|", page.read_text().partition("## States")[0], re.MULTILINE)
    words = [word for word in first if set(word) != {"-"} and word not in ("word", "where", "room", "command")]
    rooms_of_both = {"`tuning`"}  # a room of each package
    assert sorted({word for word in words if words.count(word) > 1} - rooms_of_both) == []


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs/api.md").read_text()
    names = set(chunkmill.__all__) - {
        "ChunkmillError"
    }  # the base of the errors, which the head of their table explains
    assert {name for name in names if f"\n### `{name}`\n" not in page and f"\n| `{name}` |" not in page} == set()
