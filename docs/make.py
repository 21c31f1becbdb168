"""``make docs`` writes the generated pages.

docs/api.md comes from the docstrings of the public names, docs/settings.md from the fields of the settings, and the
list of decisions in docs/architecture.md from the titles of those pages. The methods of ``AsyncClient`` are made as
well: see ``async_verbs.py``.
"""

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
from types import FunctionType

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import chunkmill  # noqa: E402
from chunkmill import chunking, errors, remote, similarity  # noqa: E402
from chunkmill.settings import Settings  # noqa: E402
from chunkmill.settings.gateway import GatewaySettings  # noqa: E402
from chunkmill.settings.provider import ProviderSettings  # noqa: E402
from docs.async_verbs import VERBS, verbs  # noqa: E402

API = ROOT / "docs" / "api.md"
SETTINGS = ROOT / "docs" / "settings.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
DECISIONS = re.compile(r"(<!-- decisions: .* -->\n).*?(<!-- end -->)", re.DOTALL)
HEAD = """# API reference

`make docs` writes this page from the docstrings, and a test checks that it is up to date. The names are imported from
`chunkmill`: `from chunkmill import Chunk, Client`. The [glossary](glossary.md) defines the words, and the
[quick start](quickstart.md) shows the steps.
"""
SETTINGS_HEAD = """# Settings

Every setting is an environment variable, and none is required. `make docs` writes this page from the code, and a test
checks that it is up to date. With Docker Compose the settings stand in `.env`
([deploy/env.example](../deploy/env.example)), with systemd in `/etc/chunkmill/chunkmill.env`
([deploy/chunkmill.env.example](../deploy/chunkmill.env.example)). The [glossary](glossary.md) defines the words.
"""
SETTINGS_GROUPS = {
    "database_url": "Servers and folders",
    "embedding_model": "Models and computing",
    "vector_storage": "Storing, queueing and recovering",
    "preemption_notice": "Machines that are taken away",
    "metrics_port": "Metrics and logs",
    "gateway_model_aliases": "The gateway",
    "embedding_provider": "Paid routes and costs",
}
"""The heading of each group, by its first field. Fields keep the order of the source, with the paid routes last."""
SECTIONS = {
    "Client": ["Client", "Batcher", "GoldenQueries"],
    "AsyncClient": ["AsyncClient", "AsyncBatcher", "AsyncGoldenQueries"],
    "What goes in": ["Chunk", "Route", "Priority", "OnLong", "Precision"],
    "What comes back: jobs": ["Job", "JobState", "DeadChunk", "Attempt", "FailingChunkBatch", "ChunkBatchState"],
    "What comes back: collections": [
        "Hits", "SearchHit", "SearchPlan", "SearchCounts", "StoredChunk", "ChunkState", "Exported", "Audit", "Index",
        "CollectionInfo", "DroppedCollection", "Keywords", "Outdated", "GoldenQuery", "GoldenLoaded", "SearchTuning",
        "Bridge", "BridgeTrial", "BridgeQuote", "AdapterKind", "CollectionMap", "MapMethod", "Legend",
    ],
    "What comes back: judged models": [
        "Comparison", "Contender", "Changes", "Change", "LosingQuery", "ComparisonQuote",
    ],
    "What comes back: re-embeddings": [
        "Reembedding", "ReembeddingState", "Coverage", "ServedBy", "Quote", "Gates", "GateResult",
    ],
    "What comes back: the dead list": ["DeadEntry", "Standing", "DeadDetails", "RetriedDead", "DroppedDead"],
    "What comes back: routes and money": [
        "Estimate", "LaneEstimate", "Budget", "Costs", "CostsBy", "Cost", "Adjustment", "AdjustmentKind", "Correction",
        "Spent", "Lane", "Explanation", "RoutingStep", "OpenWork", "JobProviderBatch", "ProviderBatchState",
        "Abandoned",
    ],
    "What comes back: vectors of texts": [
        "EmbeddedTexts", "SpaceSpec", "Pooling", "Concatenated", "LongText", "QueryCache",
    ],
    "What comes back: retention": ["Pruned", "CacheSpace", "Amount"],
}  # fmt: skip
SIMILARITY = [
    "cosine", "dot", "euclidean", "manhattan", "blocks", "normalise", "top_k", "top_k_of_batches", "kmeans",
    "principal_components",
]  # fmt: skip
SIMILARITY_TYPES = ["Measure", "Nearest", "Clusters", "Components"]


def pages() -> dict[Path, str]:
    """Return the text that each generated page should have."""
    decisions = "".join(f"- {decision(path)}\n" for path in sorted((ROOT / "docs" / "decisions").glob("*.md")))
    architecture = ARCHITECTURE.read_text(encoding="utf-8")
    return {
        API: api(),
        SETTINGS: settings(),
        ARCHITECTURE: DECISIONS.sub(lambda match: match[1] + decisions + match[2], architecture),
        VERBS: verbs(),
    }


def decision(path: Path) -> str:
    title = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    number, _, words = title.partition(". ")
    return f"{number} · [{words}](decisions/{path.name})"


def api() -> str:
    parts = [HEAD]
    for title, names in SECTIONS.items():
        parts.append(f"## {title}\n")
        for name in names:
            parts += described(getattr(chunkmill, name))
    parts += remote_clients()
    parts += documents()
    parts += similarity_toolkit()
    parts.append("## Errors\n")
    parts += errors_table()
    return "\n".join(parts).rstrip() + "\n"


def remote_clients() -> Iterator[str]:
    yield "## chunkmill.remote\n"
    yield f"These names are imported from `chunkmill.remote`. {prose(inspect.getdoc(remote))}\n"
    for name in remote.__all__:
        if inspect.isfunction(what := getattr(remote, name)):
            yield f"### `{name}`\n\n```python\n{signature(name, what)}\n```\n"
            yield prose(inspect.getdoc(what)) + "\n"
        else:
            yield from described(what)


def documents() -> Iterator[str]:
    yield "## chunkmill.chunking\n"
    yield f"These names are imported from `chunkmill.chunking`. {prose(inspect.getdoc(chunking))}\n"
    for name in ("Chunker", "Kind", "Unit", "Document", "Block"):
        yield from described(getattr(chunking, name))


def similarity_toolkit() -> Iterator[str]:
    yield "## chunkmill.similarity\n"
    yield f"These names are imported from `chunkmill.similarity`. {prose(inspect.getdoc(similarity))}\n"
    for name in SIMILARITY:
        function = getattr(similarity, name)
        yield f"### `{name}`\n\n```python\n{signature(name, function)}\n```\n"
        yield prose(inspect.getdoc(function)) + "\n"
    for name in SIMILARITY_TYPES:
        yield from described(getattr(similarity, name))


def settings() -> str:
    parts = [SETTINGS_HEAD]
    for name in [*list_own(Settings), *list_own(GatewaySettings), *list_own(ProviderSettings)]:
        if title := SETTINGS_GROUPS.get(name):
            parts.append(f"\n## {title}\n\n| variable | default | what it is |\n|---|---|---|\n")
        field = Settings.model_fields[name]
        parts.append(f"| `{name.upper()}` | {default_of(field.default)} | {field.description} |\n")
    return "".join(parts)


def list_own(what: type) -> list[str]:
    """Return the names of the fields that the class itself declares."""
    return [name for name in inspect.get_annotations(what) if name in Settings.model_fields]


def default_of(value: object) -> str:
    """Return the value as the environment would have it, as code; nothing if there is no default."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def described(what: type) -> Iterator[str]:
    yield f"### `{what.__name__}`\n"
    yield prose(inspect.getdoc(what)) + "\n"
    if issubclass(what, enum.Enum):
        notes = attribute_notes(what)
        yield "\n".join(f"- `{member.value}`{says(notes.get(member.name))}" for member in what) + "\n"
    elif dataclasses.is_dataclass(what):
        yield from fields(what)
        yield from methods(what)
    else:
        yield from methods(what)


def fields(what: type) -> Iterator[str]:
    notes = attribute_notes(what)
    lines = []
    for field in dataclasses.fields(what):
        default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
        lines.append(f"- `{field.name}: {field.type}{default}`{says(notes.get(field.name))}")
    yield "\n".join(lines) + "\n"


def methods(what: type) -> Iterator[str]:
    """Yield the methods that have a docstring: its own, then those of its base classes, in the order of the source."""
    # The other methods of AsyncClient are those of Client.
    kinds = [what] if what.__name__ == "AsyncClient" else what.__mro__
    members = [item for kind in kinds if kind.__module__.startswith("chunkmill.") for item in vars(kind).items()]
    for name, member in members:
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if name.startswith("_") or not inspect.isfunction(function) or not inspect.getdoc(function):
            continue
        if what.__name__ == "AsyncRemoteClient" and hasattr(function, "__wrapped__"):
            continue  # a method of RemoteClient, as a coroutine
        yield f"#### `{what.__name__}.{name}`\n"
        if not isinstance(member, property):
            yield f"```python\n{signature(name, function)}\n```\n"
        yield prose(inspect.getdoc(function)) + "\n"


def signature(name: str, function: FunctionType) -> str:
    """Return the signature as the source has it, without ``self``: on one line, or with a line for each argument."""
    node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    given = node.args
    arguments = given.args[1:] if given.args and given.args[0].arg in ("self", "cls") else given.args
    defaults = [None] * (len(arguments) - len(given.defaults)) + list(given.defaults)
    parts = [argument(given_argument, default) for given_argument, default in zip(arguments, defaults, strict=True)]
    if given.kwonlyargs:
        parts += ["*", *map(argument, given.kwonlyargs, given.kw_defaults)]
    returns = f" -> {what_is_returned(node.returns)}" if node.returns else ""
    line = f"{name}({', '.join(parts)}){returns}"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"


def what_is_returned(node: ast.expr) -> str:
    """Return the type that the caller gets. The verbs of the remote clients are written as steps."""
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in ("Steps", "Items"):
        inner = ast.unparse(node.slice)
        return inner if node.value.id == "Steps" else f"Iterator[{inner}]"
    return ast.unparse(node)


def argument(given: ast.arg, default: ast.expr | None) -> str:
    name = f"{given.arg}: {ast.unparse(given.annotation)}" if given.annotation else given.arg
    return f"{name} = {ast.unparse(default)}" if default else name


def attribute_notes(what: type) -> dict[str, str]:
    """Return the strings below fields and members, which Python itself does not keep."""
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
    yield "| error | `code` | `retryable` | `http_status` | |\n|---|---|---|---|---|"
    for error in tree(errors.ChunkmillError):
        said = prose(inspect.getdoc(error) if vars(error).get("__doc__") else "").replace("\n", " ")
        again = "yes" if error.retryable else "no"
        yield f"| `{error.__name__}` | `{error.code}` | {again} | {error.http_status} | {said} |"


def tree(root: type[errors.ChunkmillError]) -> Iterator[type[errors.ChunkmillError]]:
    for error in sorted(root.__subclasses__(), key=lambda kind: kind.__name__):
        if error.__module__ == errors.__name__:
            yield error
        yield from tree(error)


def says(note: str | None) -> str:
    return f": {prose(inspect.cleandoc(note))}" if note else ""


def prose(text: str | None) -> str:
    """Return a docstring as Markdown: roles and double backticks become code, and so do literal blocks."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text or "")
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    return re.sub(r"::\n\n((?: {4}.*\n|\n)+(?: {4}.*)?)", lambda block: f":\n\n{fenced(block[1])}\n\n", text).rstrip()


def fenced(code: str) -> str:
    return f"```python\n{textwrap.dedent(code).strip()}\n```"


if __name__ == "__main__":
    VERBS.write_text(verbs(), encoding="utf-8")  # first, because AsyncClient can only be imported with what it needs
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
