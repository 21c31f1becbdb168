"""Write docs/api.md from the docstrings of the public names: ``python docs/make_api.py``."""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import app  # noqa: E402
from app import errors  # noqa: E402

PAGE = ROOT / "docs" / "api.md"
HEAD = """# API reference

Made from the docstrings by `make docs`; a test holds it to them. Everything here is imported from `app`:
`from app import Chunk, Client`. [Concepts](concepts.md) has the words, the [quick start](quickstart.md) the first steps.
"""
SECTIONS = {
    "Client": ["Client"],
    "What goes in": ["Chunk", "Route", "Priority", "OnLong"],
    "What comes back": ["Job", "JobState", "SearchHit", "Audit", "DeadChunk"],
}


def page() -> str:
    parts = [HEAD]
    for title, names in SECTIONS.items():
        parts.append(f"## {title}\n")
        for name in names:
            parts += described(getattr(app, name))
    parts.append("## Errors\n")
    parts += errors_table()
    return "\n".join(parts).rstrip() + "\n"


def described(what: type) -> Iterator[str]:
    yield f"### `{what.__name__}`\n"
    yield prose(inspect.getdoc(what)) + "\n"
    if issubclass(what, enum.Enum):
        notes = attribute_notes(what)
        yield "\n".join(f"- `{each.value}`{says(notes.get(each.name))}" for each in what) + "\n"
    elif dataclasses.is_dataclass(what):
        yield from fields(what)
        yield from methods(what)
    else:
        yield from methods(what)


def fields(what: type) -> Iterator[str]:
    notes = attribute_notes(what)
    lines = []
    for each in dataclasses.fields(what):
        default = "" if each.default is dataclasses.MISSING else f" = {each.default!r}"
        lines.append(f"- `{each.name}: {each.type}{default}`{says(notes.get(each.name))}")
    yield "\n".join(lines) + "\n"


def methods(what: type) -> Iterator[str]:
    """In the order of the source; what has no docstring needs none."""
    for name, member in vars(what).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if name.startswith("_") or not inspect.isfunction(function) or not inspect.getdoc(function):
            continue
        yield f"#### `{what.__name__}.{name}`\n"
        if not isinstance(member, property):
            yield f"```python\n{signature(name, function)}\n```\n"
        yield prose(inspect.getdoc(function)) + "\n"


def signature(name: str, function: object) -> str:
    """As it is written in the source, without ``self``; on one line, or an argument a line."""
    node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]  # type: ignore[arg-type]
    assert isinstance(node, ast.FunctionDef)
    if node.args.args and node.args.args[0].arg in ("self", "cls"):
        del node.args.args[0]
    arguments = ast.unparse(node.args)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{name}({arguments}){returns}"
    if len(line) <= 100:
        return line
    parts = [ast.unparse(ast.arguments([], [each], None, [], [], None, [])) for each in node.args.args]
    defaults = dict(zip([a.arg for a in node.args.args][::-1], node.args.defaults[::-1], strict=False))
    parts = [f"{part} = {ast.unparse(defaults[a.arg])}" if a.arg in defaults else part
             for part, a in zip(parts, node.args.args, strict=True)]  # fmt: skip
    if node.args.kwonlyargs:
        parts.append("*")
        for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
            shown = ast.unparse(ast.arguments([], [argument], None, [], [], None, []))
            parts.append(f"{shown} = {ast.unparse(default)}" if default else shown)
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"


def attribute_notes(what: type) -> dict[str, str]:
    """The strings below fields and members, which Python itself throws away."""
    node = ast.parse(textwrap.dedent(inspect.getsource(what))).body[0]
    assert isinstance(node, ast.ClassDef)
    notes: dict[str, str] = {}
    for before, after in zip(node.body, node.body[1:], strict=False):
        target = before.target if isinstance(before, ast.AnnAssign) else None
        if isinstance(before, ast.Assign):
            target = before.targets[0] if isinstance(before.targets[0], ast.Name) else None
        if isinstance(target, ast.Name) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            notes[target.id] = str(after.value.value)
    return notes


def errors_table() -> Iterator[str]:
    yield prose(inspect.getdoc(errors.ChunkmillError)) + "\n"
    yield "| error | code | try again | HTTP | |\n|---|---|---|---|---|"
    for each in tree(errors.ChunkmillError):
        said = inspect.getdoc(each) if "__doc__" in vars(each) and vars(each)["__doc__"] else ""
        again = "yes" if each.retryable else "no"
        yield f"| `{each.__name__}` | `{each.code}` | {again} | {each.http_status} | {prose(said).replace(chr(10), ' ')} |"


def tree(root: type[errors.ChunkmillError]) -> Iterator[type[errors.ChunkmillError]]:
    for each in sorted(root.__subclasses__(), key=lambda found: found.__name__):
        if each.__module__ == errors.__name__:
            yield each
        yield from tree(each)


def says(note: str | None) -> str:
    return f": {prose(inspect.cleandoc(note))}" if note else ""


def prose(text: str | None) -> str:
    """Markdown of a docstring: roles and double backticks become code."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text or "")
    return re.sub(r"``([^`]+)``", r"`\1`", text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
