"""docs/architecture.md leads to every room of the tree, and no page names a path that does not exist."""

from __future__ import annotations

import ast
import itertools
import re
import tomllib
from pathlib import Path

import pytest

from chunkmill.broker import NEXT_NAMES

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/architecture.md").read_text()
PACKAGES = {"chunkmill": ROOT / "app/chunkmill", "chunkmill_workers": ROOT / "workers/chunkmill_workers"}
FOLDERS = ("app", "workers", "alembic", "tests", "docs", "deploy", "benchmarks")
PATH = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./@-]*)`")
MODULE = re.compile(r"`((?:chunkmill|chunkmill_workers)(?:\.\w+)+)`")
PAGES = [
    ROOT / "docs/architecture.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "docs/upgrades.md",
    *sorted((ROOT / "docs/decisions").glob("*.md")),
]


def section(heading: str) -> str:
    """The text from a heading to the next one."""
    return re.split(r"^#+ ", PAGE.partition(f"{heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    table = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[1:]]


def rooms(package: str) -> list[str]:
    folder = PACKAGES[package].relative_to(ROOT)
    return [row[0].strip("` ") for row in rows(section(f"### `{folder}`"))]


def is_there(module: str) -> bool:
    """Whether a dotted name leads to a module, or to a name that a module defines."""
    package, *parts = module.split(".")
    path = PACKAGES[package].joinpath(*parts)
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    return path.parent.with_suffix(".py").is_file() and defines(path.parent.with_suffix(".py"), parts[-1])


def defines(file: Path, name: str) -> bool:
    return re.search(rf"^ *(?:def|class) {name}\b|^{name}\b.* = ", file.read_text(), re.MULTILINE) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    roots = [ROOT, *PACKAGES.values()] if page.name == "architecture.md" else [ROOT]  # its rooms are named from there
    assert [path for path in PATH.findall(text) if not any((root / path).exists() for root in roots)] == []
    modules = set(MODULE.findall(text)) - set(NEXT_NAMES.values())  # these are task names
    assert [module for module in sorted(modules) if not is_there(module)] == []


def test_the_pages_name_paths() -> None:
    assert len(PATH.findall(PAGE)) > 50
    assert len(PATH.findall((ROOT / "CONTRIBUTING.md").read_text())) > 10
    assert not is_there("chunkmill.broker.NOTHING")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_has_a_line_and_only_rooms_have_one(package: str) -> None:
    root = PACKAGES[package]
    folders = {str(path.parent.relative_to(root)) for path in root.rglob("__init__.py")} - {"."}
    modules = {path.stem for path in root.glob("*.py")} - {"__init__"}
    assert sorted(rooms(package)) == sorted(folders | modules)


def test_the_rooms_stand_in_the_order_of_the_layers() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["name"] == "chunkmill runs one way")
    named = [[name.strip().removeprefix("chunkmill.") for name in layer.split("|")] for layer in layers]
    shown = [name for name in rooms("chunkmill") if "/" not in name]
    assert shown == list(itertools.chain.from_iterable(named))
    intro = section("### `app/chunkmill`")
    assert all(f"`{layer[0]}` and" in intro for layer in named if len(layer) > 1)


def test_every_name_is_in_the_file_that_the_page_sends_to() -> None:
    places = rows(section("## Where to find it"))
    assert len(places) >= 20
    assert places == [place for place in places if PATH.findall(place[1])]
    named = [
        (what, PATH.findall(paths), name) for what, paths, names in places for name in re.findall(r"`([\w.]+)`", names)
    ]
    missing = [
        f"{what}: {name}"
        for what, paths, name in named
        if not any(all(defines(ROOT / path, part) for part in name.split(".")) for path in paths)
    ]
    assert missing == []


def test_a_name_that_a_module_only_uses_is_not_defined_there() -> None:
    assert defines(ROOT / "app/chunkmill/store/write.py", "write_vectors")
    assert not defines(ROOT / "app/chunkmill/store/write.py", "copy_in")


def rooms_of(file: Path, package: str) -> set[str]:
    """The folders of a package from which a test imports something: ``cli/jobs`` for ``chunkmill.cli.jobs.sources``."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    paths = {PACKAGES[package].joinpath(*name.split(".")[1:]) for name in imported if name.split(".")[0] == package}
    folders = {path if path.is_dir() else path.parent for path in paths}
    return {str(folder.relative_to(PACKAGES[package])) for folder in folders if (folder / "__init__.py").is_file()}


UNIT_TESTS = [
    (package, path) for package in PACKAGES for path in sorted((ROOT / "tests/unit" / package).rglob("test_*.py"))
]


RUN_WHOLE = {"cli/tune/test_tune_command.py", "client/aio/test_verbs.py", "test_forks.py", "test_wheel.py"}
"""These run a command, the public names or a build, and import no module of their room."""


@pytest.mark.parametrize(("package", "path"), UNIT_TESTS, ids=lambda value: getattr(value, "name", value))
def test_a_unit_test_stands_in_the_room_that_it_tests(package: str, path: Path) -> None:
    place = path.relative_to(ROOT / "tests/unit" / package)
    room = str(place.parent)
    assert (PACKAGES[package] / room / "__init__.py").is_file(), "the folder mirrors one of the package"
    imports_room = room in rooms_of(path, package)
    assert imports_room != (str(place) in RUN_WHOLE), (
        "it uses a module of its room, not only of rooms below or beside it"
    )


def test_what_takes_a_connection_leaves_the_transaction_to_its_caller() -> None:
    files = [path for room in ("ledger", "spaces", "store") for path in (PACKAGES["chunkmill"] / room).rglob("*.py")]
    functions = [
        (node.name, {argument.arg for argument in node.args.args}, ast.unparse(node))
        for file in files
        if ".begin()" in (text := file.read_text())
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    begin = {name: arguments for name, arguments, code in functions if ".begin()" in code}
    assert {name for name, arguments in begin.items() if "conn" in arguments} == set()
    assert {"prune_jobs", "drop_unreferenced", "go_on", "flush"} <= begin.keys()


def test_only_the_rooms_that_the_page_names_begin_transactions() -> None:
    root = PACKAGES["chunkmill"]
    begin = [path.relative_to(root) for path in root.rglob("*.py") if "db.begin()" in path.read_text()]
    rooms_that_take_a_database = {"ledger", "spaces", "store", "db"}
    assert {path.parts[0] for path in begin} - rooms_that_take_a_database == {
        "client", "gateway", "poller", "monitor", "testing", "cli",
    }  # fmt: skip
    assert {str(path) for path in begin if path.parts[0] == "cli"} == {
        "cli/collections/canary.py", "cli/processes/gateway.py", "cli/processes/keys.py", "cli/watch/plot.py",
    }  # fmt: skip


def yields_in_a_transaction(code: str) -> list[int]:
    """The lines of generators that hand something out while they hold a transaction. (A context manager must.)"""
    lines: list[int] = []

    def visit(node: ast.AST, *, held: bool) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_manager = any("contextmanager" in ast.unparse(decorator) for decorator in node.decorator_list)
            for child in node.body:
                if not is_manager:
                    visit(child, held=False)
            return
        if isinstance(node, ast.With | ast.AsyncWith):
            opened = " ".join(ast.unparse(item.context_expr) for item in node.items)
            held = held or bool(re.search(r"\b(begin|_transaction|connect)\(", opened))
        if isinstance(node, ast.Yield | ast.YieldFrom) and held:
            lines.append(node.lineno)
        for child in ast.iter_child_nodes(node):
            visit(child, held=held)

    visit(ast.parse(code), held=False)
    return lines


def test_no_iterator_holds_a_transaction_while_its_caller_works() -> None:
    """It would hold a connection for as long as the caller likes, and after an error until the garbage is collected."""
    assert yields_in_a_transaction("def f():\n  with db.begin() as conn:\n    yield 1\n  yield 2") == [3]
    assert yields_in_a_transaction("@contextmanager\ndef f():\n  with db.begin() as conn:\n    yield conn") == []
    sources = [path for folder in PACKAGES.values() for path in folder.rglob("*.py")]
    assert len(sources) > 300
    assert {str(path): lines for path in sources if (lines := yields_in_a_transaction(path.read_text()))} == {}
