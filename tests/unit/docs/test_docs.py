"""The pages say what the code says, and lead where they say."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import chunkmill
import chunkmill.chunking
import chunkmill.remote
import chunkmill.testing
from chunkmill import Client, Job, SearchHit
from chunkmill.remote import RemoteClient

ROOT = Path(__file__).parents[3]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = HEADING.findall(FENCE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(FENCE.sub("", page.read_text())):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{page.name} links to {target}#{anchor}"


EXAMPLES = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    if page.name != "api.md"  # whose signatures are made from the code
    for number, block in enumerate(block for language, block in FENCE.findall(page.read_text()) if language == "python")
]
MODULES = {
    "chunkmill": chunkmill,
    "chunkmill.chunking": chunkmill.chunking,
    "chunkmill.remote": chunkmill.remote,
    "chunkmill.testing": chunkmill.testing,
}
OF = {"client": Client, "chunkmill_client": Client, "remote": RemoteClient, "job": Job, "hit": SearchHit}
"""What the variables of an example are, by their names."""


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_python_example_uses_what_there_is(example: str) -> None:
    """Names that can be imported, methods with the arguments they take, and attributes that what they return has."""
    used = 0
    for node in ast.walk(ast.parse(example)):
        if isinstance(node, ast.ImportFrom):
            if not str(node.module).startswith("chunkmill"):
                continue
            assert {name.name for name in node.names} <= set(MODULES[str(node.module)].__all__)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in OF:
            kind = OF[node.value.id]
            assert node.attr in dir(kind), f"{kind.__name__} has no {node.attr}"
            used += 1
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id in OF:
                taken = inspect.signature(getattr(OF[called.value.id], called.attr))
                words = {str(keyword.arg): None for keyword in node.keywords}
                taken.bind(None, *node.args, **words)  # raises TypeError, with the argument that is wrong
    assert used, "the example uses the client or what it returns"


def test_there_are_python_examples() -> None:
    assert {param.id for param in EXAMPLES} >= {"README-0", "quickstart-0"}


def test_what_is_made_from_the_code_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "docs" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for page, text in module.pages().items():
        assert page.read_text() == text, f"{page.name} is not what the code says now. Run: make docs"
    api, settings, architecture, _verbs = module.pages().values()
    assert "#### `Client.enqueue`" in api
    assert "| `DATABASE_URL` |" in settings
    assert architecture.count("](decisions/") >= 27


def test_the_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    missing = [path.name for path in (ROOT / "docs").glob("*.md") if f"](docs/{path.name}" not in readme]
    assert missing == []
    assert all(f"]({name}" in readme for name in ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"))


def test_the_changelog_knows_this_version_and_the_licence_is_the_one_named() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert re.search(rf"^## \[{re.escape(project['version'])}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert project["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text()
