"""A statement of SQL stands whole where it runs. What code puts into one is a name, or has its reason."""

from __future__ import annotations

import ast
import itertools
import re
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import pytest

from chunkmill.domain import reembedding, served, serving, states
from chunkmill.domain.costs import AdjustmentKind
from chunkmill.domain.providers import OPENAI
from chunkmill.ledger.work.usage import Outcome

ROOT = Path(__file__).parents[3]
SOURCES = sorted(path for folder in ("app", "workers") for path in (ROOT / folder).rglob("*.py"))
BEGINNING = re.compile(r"(?:[(\s]|EXISTS)*(?:SELECT|INSERT INTO|UPDATE|DELETE FROM|WITH|CREATE|COPY|UNION)\b")
"""How a statement, or a query inside one, begins."""
REST = re.compile(r"\{\}\s+(?:WHERE|FOR|ORDER BY|UNION)\b")
"""How a statement goes on after a head that code puts in front of it."""
NAMES = {"table", "schema", "quoted", "staging", "target", "peer"}
"""Variables with the name of a table, of a schema, or of what a COPY fills."""
NAMED = {"table_name", "vector_type", "storage", "name"}
"""Attributes that are the name of a table or of a type."""

A_FILTER = "what a caller's filter became"
OF_AN_OLD_SCHEMA = "the schema of an earlier release lacks what it reads"
A_ROOM_OF_THE_INDEX = "a search reads as many segments as its collection has"
A_NUMBER = "a number or a name that is declared in the file"

PIECES: dict[str, dict[str, str]] = {
    "app/chunkmill/db/home.py": {
        "quoted(home.schema)": "the name of a schema",
        "VERSION_TABLE": "the name of a table",
        "OLD_VERSION_TABLE": "the name of a table",
    },
    "app/chunkmill/embedded/postgres.py": {"DATABASE": "the name of a database"},
    "app/chunkmill/ledger/dropping.py": {"of_keywords": OF_AN_OLD_SCHEMA, "of_spaces": OF_AN_OLD_SCHEMA},
    "app/chunkmill/ledger/embed_requests.py": {"columns": OF_AN_OLD_SCHEMA, "values": OF_AN_OLD_SCHEMA},
    "app/chunkmill/ledger/money/adjustments.py": {"charged": OF_AN_OLD_SCHEMA},
    "app/chunkmill/ledger/money/budget.py": {"adjustments.charged_or_lost(conn)": OF_AN_OLD_SCHEMA},
    "app/chunkmill/ledger/money/charges.py": {
        "f'UNION ALL {adjusted}' if keeps_adjustments(conn) else ''": OF_AN_OLD_SCHEMA,
        "adjusted": OF_AN_OLD_SCHEMA,
    },
    "app/chunkmill/ledger/prune.py": {
        "key": "the name of a column",
        "table.row_bytes": "a dry run must count what a prune counts, table by table",
        "_PROVIDER_BATCHES.row_bytes": "a dry run must count what a prune counts, table by table",
    },
    "app/chunkmill/ledger/served/batches.py": {"state.value": "each final state has a column of its name"},
    "app/chunkmill/spaces/serving.py": {
        "of_name": "a name and an alias are read by two statements that must find the same of a collection",
        "others if is_known else ''": OF_AN_OLD_SCHEMA,
        "is_other if conn.engine in _with_others else 'false'": OF_AN_OLD_SCHEMA,
    },
    "app/chunkmill/store/chunks.py": {"condition": A_FILTER},
    "app/chunkmill/store/indexing.py": {
        "_OTHER_SPACES if has_others else ''": OF_AN_OLD_SCHEMA,
        "is_other if has_others else 'false'": OF_AN_OLD_SCHEMA,
        "_MAY_FLUSH if builder is BuilderKind.FLUSH else _MAY_MERGE": "both builders must agree about all the rest",
    },
    "app/chunkmill/store/keywords.py": {"condition": A_FILTER, "score": "a query has as many terms as it has words"},
    "app/chunkmill/store/outdated.py": {
        "new": A_FILTER,
        "old": A_FILTER,
        "condition(conn) or 'false'": OF_AN_OLD_SCHEMA,
        "distance": "hits are ordered by what their scores are made of",
        "_waiting(space)": "what is found, counted and taken as a query must be the same chunks",
    },
    "app/chunkmill/store/read.py": {
        "hashes": "two libraries run it, which write parameters in two ways",
        "space_id": "two libraries run it, which write parameters in two ways",
        "fingerprint": "two libraries run it, which write parameters in two ways",
    },
    "app/chunkmill/store/replacing.py": {
        "condition": A_FILTER,
        "is_old('c.written_by')": "what is picked and what is deleted must be old by one rule",
        "is_old('CAST(CAST(c.xmin AS text) AS bigint)')": "what is picked and what is deleted must be old by one rule",
    },
    "app/chunkmill/store/segments.py": {"told": "conditions of a search, which must hold at its one moment"},
    "app/chunkmill/store/search.py": {
        "is_served": "a collection has one space or several; who asks knows the condition",
        "filtered": A_FILTER,
        "self.filtered": A_FILTER,
        **dict.fromkeys(
            ("candidates", "near", "passing", "others", "graphs", "n_rows", "gave_up", "judged", "rows"),
            A_ROOM_OF_THE_INDEX,
        ),
        **dict.fromkeys(("segment.id", "part.id", "half", "distance", "wanted", "further"), A_ROOM_OF_THE_INDEX),
        "_nearest(space, filtered)": "both ways through the index must rank their candidates alike",
        "_has_chunk('t', filtered)": "the tail, each segment and each estimate must mean the same chunks",
        "_has_chunk('s', filtered)": "the tail, each segment and each estimate must mean the same chunks",
        "_has_chunk('s', self.filtered)": "the tail, each segment and each estimate must mean the same chunks",
    },
    "workers/chunkmill_workers/benchmarks/pipeline.py": {"TABLE": A_NUMBER, "columns": A_NUMBER},
    "workers/chunkmill_workers/benchmarks/provider.py": {"DIMENSIONS": A_NUMBER},
    "workers/chunkmill_workers/benchmarks/reembed.py": {"_TEXTS": "texts are made of row numbers in two statements"},
    "workers/chunkmill_workers/benchmarks/search.py": {
        "DIMENSIONS": A_NUMBER,
        "K": A_NUMBER,
        "passes": "the benchmark runs with a filter and without",
    },
}
"""``file → {what code puts into its statements: why}``. If a new statement fails here, write it whole, and if two are
nearly equal, write both. Only a condition or a list of columns that must not differ in several statements is worth a
name: a constant, which says below it why."""

GLUED = {"app/chunkmill/store/search.py": (3, A_ROOM_OF_THE_INDEX)}
"""``file → (how many statements are made by ``+`` or by a method of strings, why)``."""


STATES = {
    str(word.value)
    for module in (states, reembedding, serving, served)
    for enum in vars(module).values()
    if isinstance(enum, type) and issubclass(enum, StrEnum) and enum is not StrEnum
    for word in enum
} | {OPENAI, *AdjustmentKind, *Outcome}
"""The words of states, of routes, and of the ledger."""
WRITTEN_OUT = {
    "app/chunkmill/ledger/provider/provider_batches.py": "ON CONFLICT names a partial index, and takes no parameter",
    "app/chunkmill/ledger/restored.py": "psql runs it in a database of any release, without parameters",
}
"""``file → why its statements say words of states themselves``."""


class Pieces(NamedTuple):
    """What code puts into statements, and the statements that are made by ``+`` or by a method of strings."""

    pieces: set[str]
    glued: list[str]


def pieces_of(text: str) -> Pieces:
    pieces: set[str] = set()
    glued: list[str] = []
    module = ast.parse(text)
    heads = {
        target.id
        for node in module.body
        if isinstance(node, ast.Assign) and begins_a_statement(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(module):
        if isinstance(node, ast.JoinedStr):
            values = [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
            if begins_a_statement(node) or first_name(node) in heads:
                pieces |= {ast.unparse(value) for value in values if not is_name(value)}
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mod):
            if any(begins_a_statement(part) for part in (node.left, node.right)):
                glued.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            inside = (part for child in (node.func.value, *node.args) for part in ast.walk(child))
            if node.func.attr in ("format", "replace", "join") and any(map(begins_a_statement, inside)):
                glued.append(ast.unparse(node))
    return Pieces(pieces, glued)


def first_name(node: ast.JoinedStr) -> str | None:
    """The variable with which a string begins."""
    first = node.values[0] if node.values else None
    return first.value.id if isinstance(first, ast.FormattedValue) and isinstance(first.value, ast.Name) else None


def begins_a_statement(node: ast.AST) -> bool:
    if isinstance(node, ast.JoinedStr):
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        return BEGINNING.match(text) is not None or REST.match(text.strip()) is not None
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and BEGINNING.match(node.value) is not None


def is_name(value: ast.expr) -> bool:
    return (
        value.attr in NAMED if isinstance(value, ast.Attribute) else isinstance(value, ast.Name) and value.id in NAMES
    )


def is_constant(code: str) -> bool:
    """Whether it is a shared piece, such as ``charges.TODAY``."""
    return re.fullmatch(r"(?:\w+\.)?_?[A-Z][A-Z_]+", code) is not None


def constants(text: str) -> dict[str, bool]:
    """The constants of a module, and whether there is a sentence below each."""
    return {
        target.id: isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        for node, after in itertools.pairwise([*ast.parse(text).body, ast.Pass()])
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


@pytest.fixture(scope="module")
def joined() -> dict[str, Pieces]:
    made = {str(path.relative_to(ROOT)): pieces_of(path.read_text()) for path in SOURCES}
    return {file: pieces for file, pieces in made.items() if pieces != (set(), [])}


def test_what_code_puts_into_a_statement_has_its_reason(joined: dict[str, Pieces]) -> None:
    shared = {
        file: {code for code in made.pieces if is_constant(code)} - PIECES.get(file, {}).keys()
        for file, made in joined.items()
    }
    listed = {file: made.pieces - shared[file] for file, made in joined.items() if made.pieces - shared[file]}
    assert listed == {file: set(codes) for file, codes in PIECES.items()}
    assert {file: len(made.glued) for file, made in joined.items() if made.glued} == {
        file: n for file, (n, _) in GLUED.items()
    }


def test_what_statements_share_says_below_it_why(joined: dict[str, Pieces]) -> None:
    declared = {str(path.relative_to(ROOT)): constants(path.read_text()) for path in SOURCES}
    shared = {
        (file, code.rpartition(".")[2])
        for file, made in joined.items()
        for code in made.pieces
        if is_constant(code) and code not in PIECES.get(file, {})
    }
    assert len(shared) > 10
    unsaid = {
        f"{file}: {name}"
        for file, name in shared
        if not declared[file].get(name, any(names.get(name) for names in declared.values()))
    }
    assert unsaid == set()


def test_words_of_states_come_from_their_enums() -> None:
    said = {}
    for path in SOURCES:
        statements = [
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and BEGINNING.match(node.value)
        ]
        words = {word for statement in statements for word in re.findall(r"'([a-z_-]+)'", statement)}
        if words & STATES:
            said[str(path.relative_to(ROOT))] = words & STATES
    assert said.keys() == WRITTEN_OUT.keys(), said


@pytest.mark.parametrize(
    "code",
    ['f"{_READ} WHERE r.id = :id"', 'f"SELECT {COLUMNS} FROM jobs"', 'f"""\\n{HEAD}\\nORDER BY id"""',
     'HEAD = "SELECT id FROM jobs"\nf"{HEAD}, 1 AS n"',
     'f"SELECT id FROM jobs WHERE {condition}"', 'f"UPDATE {table} SET {column} = 1"'],
)  # fmt: skip
def test_a_piece_of_a_statement_is_noticed(code: str) -> None:
    assert len(pieces_of(code).pieces) == 1


@pytest.mark.parametrize(
    "code",
    ['"SELECT id FROM jobs" + where', 'where + "SELECT id"', '"SELECT %s" % columns', '"SELECT {}".format(columns)',
     '" UNION ".join(["SELECT 1"])', '" UNION ALL ".join(f"SELECT {n}" for n in ids)'],
)  # fmt: skip
def test_a_statement_that_is_glued_is_noticed(code: str) -> None:
    assert pieces_of(code).glued


def test_a_name_in_a_statement_and_an_error_about_one_are_not_pieces() -> None:
    code = """
query = f"SELECT content_hash FROM {space.table_name} v WHERE v.content_hash = :hash"
message = f"the statement {name!r} cannot SELECT from {where}"
"""
    assert pieces_of(code) == (set(), [])
