"""Texts that every machine has: the docstrings of Python's own standard library."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from chunkmill.domain.chunks import Chunk
from chunkmill.system.python import parsed

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}

GOLDEN_RATIO = 0.618033988749895

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def stdlib_docstrings() -> Iterator[Chunk]:
    """Every docstring of the running Python's standard library, in the order of its files.

    The id is ``module:qualified.name``, or ``module`` for the module's own docstring. A name that is defined a second
    time gets ``#2``. The metadata has ``module`` and ``kind``, which is module, class or function.
    """
    for path, module in _modules():
        yield from _docstrings(path, module)


def some_stdlib_docstrings(limit: int) -> list[Chunk]:
    """At most ``limit`` of the docstrings, of modules from all over the library. No other module is read."""
    modules = _modules()
    # Multiples of the golden ratio lie evenly, so that whichever modules come first are from everywhere in the list.
    order = sorted(range(len(modules)), key=lambda index: index * GOLDEN_RATIO % 1)
    some: list[Chunk] = []
    for index in order:
        if len(some) >= limit:
            break
        docstrings = list(_docstrings(*modules[index]))
        some += docstrings[: max(1, limit // 10)]
    return some[:limit]


def _modules() -> list[tuple[Path, str]]:
    """The files of the standard library and the names of their modules, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        # A part that is not an identifier is a folder of build files, such as config-3.11-x86_64-linux-gnu.
        if SKIPPED_FOLDERS.isdisjoint(parts) and all(part.isidentifier() for part in parts):
            modules.append((path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)))
    return modules


def _docstrings(path: Path, module: str) -> Iterator[Chunk]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler warns about escapes in old files
            tree = parsed(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and samples of other versions
        return
    seen: Counter[str] = Counter()
    for name, node in _definitions(tree, ""):
        text = ast.get_docstring(node)
        if not text or text.isspace():
            continue
        seen[name] += 1
        chunk_id = f"{module}:{name}" if name else module
        if seen[name] > 1:
            chunk_id += f"#{seen[name]}"
        yield Chunk(chunk_id, text, {"module": module, "kind": _kind(node)})


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    if isinstance(node, ast.Module):
        yield "", node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}{child.name}"
            yield name, child
            yield from _definitions(child, f"{name}.")
        elif not isinstance(child, ast.expr):
            # Definitions can also be inside `if` and `try`.
            yield from _definitions(child, prefix)


def _kind(node: Definition) -> str:
    if isinstance(node, ast.Module):
        return "module"
    return "class" if isinstance(node, ast.ClassDef) else "function"
