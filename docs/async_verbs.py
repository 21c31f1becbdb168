"""Writes ``app/chunkmill/client/aio/verbs.py``: the methods of ``AsyncClient``, from those of ``Client``.

A type checker, an editor and ``help`` see each method with its own arguments, which a ``__getattr__`` would hide. A
test compares the file with what this module makes.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import subprocess
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

from chunkmill.client import Client

VERBS = Path(__file__).parents[1] / "app" / "chunkmill" / "client" / "aio" / "verbs.py"
OWN = {"from_env", "close", "batcher", "golden"}
"""What AsyncClient has in its own way."""
LONG = {
    "audit", "bridge", "cancel", "export", "flip", "index", "judge_reembedding", "keywords", "map", "outdated",
    "quote_bridge", "quote_comparison", "reembed", "retry", "rollback", "tune_search",
}  # fmt: skip
"""What may hold a connection for minutes, or for 20 s as `outdated` may, beside all that takes an iterable or a
function. All other methods take moments, or wait in steps."""
HEAD = '''"""The methods of ``AsyncClient``. `make docs` writes this file from those of ``Client``."""

from __future__ import annotations

{imports}


class AsyncVerbs(RunningCalls):
    """Every public method of ``Client``, with its arguments."""
'''


def verbs() -> str:
    """Return the whole file."""
    methods = [method for name, function in public_methods() for method in forms(name, function)]
    imports = sorted({line for method in methods for line in method.imports()} | {RUNNING})
    text = HEAD.format(imports="\n".join(imports)) + "".join(f"\n{method.source()}" for method in methods)
    for command in (["check", "--quiet", "--select", "I,F401", "--fix"], ["format", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", VERBS, "-"]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout
    return text


NEW_NAMES = {"AsyncIterable", "AsyncGenerator", "Awaitable", "Callable"}
RUNNING = "from chunkmill.client.aio.running import RunningCalls"


def public_methods() -> Iterator[tuple[str, FunctionType]]:
    """Yield the methods of the parts of ``Client``, in the order of its parts and of their sources."""
    for part in Client.__mro__[1:-1]:
        for name, member in vars(part).items():
            if not name.startswith("_") and name not in OWN and inspect.isfunction(member):
                yield name, inspect.unwrap(member)


def forms(name: str, function: FunctionType) -> Iterator[Method]:
    """Yield the forms of a method that a type checker tells apart, and at last the method itself."""
    for form in typing.get_overloads(function):
        yield Method(name, form, is_form=True)  # type: ignore[arg-type]
    yield Method(name, function)


class Method:
    """A method of ``Client``, or one of its forms, and what becomes of it."""

    def __init__(self, name: str, function: FunctionType, *, is_form: bool = False) -> None:
        self._is_form = is_form
        self.name = name
        self._function = function
        node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        assert isinstance(node, ast.FunctionDef)
        assert node.returns is not None, f"{name} says what it returns"
        self._node = node
        self._waits = hasattr(Client, f"_{name}_steps")
        self._items = item_of(node.returns)

    def imports(self) -> Iterator[str]:
        """Yield the imports that the names in its signature need."""
        module = inspect.getmodule(self._function)
        assert module is not None
        known = imports_of(module)
        for name in sorted(names_in(self.signature()) - NEW_NAMES):
            if not hasattr(builtins, name):
                yield known.get(name) or f"from {module.__name__} import {name}"
        yield f"from collections.abc import {', '.join(sorted(NEW_NAMES))}"
        yield "from typing import overload"

    def signature(self) -> ast.FunctionDef | ast.AsyncFunctionDef:
        given = self._node.args
        arguments = [
            ast.arg(argument.arg, argument.annotation and Widened().visit(parsed(argument.annotation)))
            for argument in given.args
        ]
        named = [
            ast.arg(argument.arg, argument.annotation and Widened().visit(parsed(argument.annotation)))
            for argument in given.kwonlyargs
        ]
        takes = ast.arguments([], arguments, None, named, given.kw_defaults, None, given.defaults)
        returns = self._node.returns
        kind: type[ast.FunctionDef | ast.AsyncFunctionDef] = ast.AsyncFunctionDef
        if self._items is not None:
            kind = ast.FunctionDef
            returns = ast.Subscript(ast.Name("AsyncGenerator"), ast.Tuple([self._items, ast.Constant(None)]))
        made = kind(self.name, takes, [ast.Pass()], [], returns)
        made.type_params = []
        return ast.fix_missing_locations(made)

    def source(self) -> str:
        head = ast.unparse(self.signature()).rsplit("\n", 1)[0]
        if self._is_form:
            return textwrap.indent(f"@overload\n{head} ...", "    ") + "\n"
        said = inspect.getdoc(self._function) or ""
        lines = [
            head,
            textwrap.indent(f'"""{said}{chr(10) if chr(10) in said else ""}"""', "    "),
            f"    {self.body()}",
        ]
        return textwrap.indent("\n".join(lines), "    ") + "\n"

    def body(self) -> str:
        given = self._node.args
        passed = [self.passed(argument) for argument in given.args[1:]]
        passed += [f"{argument.arg}={self.passed(argument)}" for argument in given.kwonlyargs]
        arguments = ", ".join(passed)
        if self._waits:
            return f"return await self._wait(self._client._{self.name}_steps({arguments}))"
        is_long = self.name in LONG or not names_in(self._node.args).isdisjoint({"Iterable", "Callable", "OnProgress"})
        how = "_items" if self._items is not None else "_long" if is_long else "_short"
        waits = "" if self._items is not None else "await "
        return f"return {waits}self.{how}(self._client.{self.name}, {arguments})"

    def passed(self, argument: ast.arg) -> str:
        may_be_asynchronous = (
            self._waits and argument.annotation is not None and "Iterable" in names_in(argument.annotation)
        )
        return f"await self._gathered({argument.arg})" if may_be_asynchronous else argument.arg


def item_of(returns: ast.expr) -> ast.expr | None:
    """Return the type of the items of a method that hands them out one after the other; None for any other method."""
    if isinstance(returns, ast.Subscript) and isinstance(returns.value, ast.Name):
        if returns.value.id == "Iterator":
            return returns.slice
        if returns.value.id == "Generator":
            assert isinstance(returns.slice, ast.Tuple)
            return returns.slice.elts[0]
    return None


class Widened(ast.NodeTransformer):
    """Iterables may also be asynchronous, and functions that are called may be coroutine functions."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return told("[str, int, int]") if node.id == "OnProgress" else node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        name = node.value.id if isinstance(node.value, ast.Name) else ""
        if name == "Callable":
            assert isinstance(node.slice, ast.Tuple)
            return told(ast.unparse(node.slice.elts[0]))
        if name == "Iterable":
            return ast.BinOp(node, ast.BitOr(), ast.Subscript(ast.Name("AsyncIterable"), node.slice))
        return node


def told(arguments: str) -> ast.expr:
    return ast.parse(f"Callable[{arguments}, Awaitable[None] | None]", mode="eval").body


def parsed(node: ast.expr) -> ast.expr:
    """Return a copy."""
    return ast.parse(ast.unparse(node), mode="eval").body


def names_in(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def imports_of(module: ModuleType) -> dict[str, str]:
    """Return the names that a module imports, each with an import of it alone."""
    known: dict[str, str] = {}
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom):
            known |= {
                alias.asname or alias.name: f"from {node.module} import {ast.unparse(alias)}" for alias in node.names
            }
        elif isinstance(node, ast.Import):
            known |= {alias.asname or alias.name: f"import {ast.unparse(alias)}" for alias in node.names}
    return known


if __name__ == "__main__":
    VERBS.write_text(verbs(), encoding="utf-8")
