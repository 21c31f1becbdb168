"""Exported models: where they are, what their export.json says, and which one belongs to a model folder."""

from __future__ import annotations

import importlib.util
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import platformdirs
from numpy.typing import NDArray

from chunkmill.errors import ModelLoadError, install_command
from chunkmill.models import ModelFolder
from chunkmill.models.files import MOST_JSON_BYTES, parse_json
from chunkmill.system.files import read_at_most
from chunkmill_workers.engine.windows import Ids

Target = Literal["onnx", "openvino"]
TARGETS: Final[tuple[Target, ...]] = get_args(Target)

# It is in the path of every export. Raise it when the exporter changes, so that old exports are not found any more.
VERSION: Final = 1

INPUTS: Final = ("input_ids", "attention_mask")
"""Names of the graph's inputs, (n, longest) int64 each; the mask is 1 for tokens and 0 for padding."""
OUTPUT: Final = "last_hidden_state"
"""Name of the graph's output, (n, longest, hidden) float32."""

GRAPHS: Final[Mapping[Target, str]] = {"onnx": "model.onnx", "openvino": "model.xml"}
"""The graph's file name. The weights are in a second file beside it."""
_STATEMENT: Final = "export.json"

# Packages that run an export and that make one. Each has a module of the same name.
RUN: Final[Mapping[Target, tuple[str, ...]]] = {"onnx": ("onnxruntime",), "openvino": ("openvino",)}
MAKE: Final[Mapping[Target, tuple[str, ...]]] = {"onnx": ("onnx", "onnxscript"), "openvino": ()}


def why_not_exported(folder: ModelFolder) -> str | None:
    """Why a model has no export; None if it may have one. An export is one graph, known by the model's revision."""
    if folder.static:
        return "it is a StaticEmbedding, which has no graph"
    if folder.adapter is not None or (folder.query is not None and folder.query.adapter is not None):
        return "its name asks for the adapter of a task, and an export has the model's own weights"
    other = folder.query
    if other is not None and other.path == folder.path and other.transformer != folder.transformer and not other.static:
        return "its Router has an encoder for queries and another one for documents"
    return None


@dataclass(frozen=True, slots=True)
class Statement:
    """The content of export.json."""

    backend: Target
    model: str
    """The model's name when it was exported. Only ``revision`` says which weights they are."""
    revision: str
    embedding_rows: int
    """The size of the model's vocabulary."""
    opset: int | None
    """The opset of ONNX; None for OpenVINO."""
    min_cosine: float
    """The lowest cosine of a token's vector to that of transformers in fp32, over the texts of the check."""
    versions: Mapping[str, str]
    """The versions of the packages that made it, by package."""
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Export:
    """One folder with a graph, its weights and export.json."""

    folder: Path
    statement: Statement

    @property
    def graph(self) -> Path:
        """The graph's file."""
        return self.folder / GRAPHS[self.statement.backend]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.folder.iterdir())

    def write(self) -> None:
        """Write export.json."""
        text = json.dumps(asdict(self.statement), indent=2)
        (self.folder / _STATEMENT).write_text(text + "\n", encoding="utf-8")


def exports_folder() -> Path:
    """The folder of all exports of this user: ``~/.cache/chunkmill/exports`` on Linux, or below XDG_CACHE_HOME.

    It is not in the model folder, which may be read-only, and whose files are the space's revision. It is not in
    CHUNKMILL_HOME, because the embedded stack accepts no other files there.
    """
    return platformdirs.user_cache_path("chunkmill") / "exports"


def export_folder(folder: ModelFolder, target: Target) -> Path:
    """The folder for the export of these weights, whether it exists or not. Other weights have another path."""
    return exports_folder() / f"{folder.spec.revision.removeprefix('sha256:')}-{target}-{VERSION}"


def find(folder: ModelFolder, target: Target) -> Export:
    """The export of exactly these weights. Raises ModelLoadError, which says how to make it."""
    require(target)
    at = export_folder(folder, target)
    command = f"chunkmill models export {shlex.quote(folder.name)} --backend {target}"
    if not (at / _STATEMENT).is_file():
        others = [
            statement
            for statement in _all(target)
            if statement.model == folder.name and statement.revision != folder.spec.revision
        ]
        other = f" (there is one of {others[0].revision}, made from other weights)" if others else ""
        raise ModelLoadError(
            f"backend {target}: model {folder.name!r} ({folder.spec.revision}) has no export in {at.parent}{other}. "
            f"Make it as the user who runs the worker: {command}"
        )
    statement = _read(at)
    if statement is None or statement.backend != target or statement.revision != folder.spec.revision:
        raise ModelLoadError(
            f"backend {target}: {at / _STATEMENT} does not state an export of {folder.name!r} "
            f"({folder.spec.revision}): the folder was damaged or renamed. Make the export again: {command} --force"
        )
    return Export(at, statement)


def require(target: Target, *, to_export: bool = False) -> None:
    """Raise ModelLoadError, with the command to run, if packages for ``target`` are missing."""
    needed = RUN[target] + (MAKE[target] if to_export else ())
    if missing := [module for module in needed if importlib.util.find_spec(module) is None]:
        raise ModelLoadError(f"backend {target} needs {', '.join(missing)}. Run: {install_command(target)}")


def pad(rows: Sequence[Ids], pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Ids and mask, (n, longest) int64 each, and lengths, (n,) int64. Padding is on the right, as in `lay_out`."""
    lengths = np.array([len(row) for row in rows], np.int64)
    inside = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(inside.shape, pad_id, np.int64)
    ids[inside] = np.concatenate(rows)
    return ids, inside.astype(np.int64), lengths


def unreadable(graph: Path, error: Exception) -> ModelLoadError:
    """The error to raise if the library cannot load ``graph``: ``raise unreadable(graph, error) from error``."""
    reason = " ".join(str(error).split())
    return ModelLoadError(
        f"{graph} cannot be loaded ({type(error).__name__}: {reason}): the export is damaged, or this version of the "
        "library cannot read it. Make it again with `chunkmill models export MODEL --backend NAME --force`"
    )


def _all(target: Target) -> Iterator[Statement]:
    for file in sorted(exports_folder().glob(f"*-{target}-{VERSION}/{_STATEMENT}")):
        statement = _read(file.parent)
        if statement is not None:
            yield statement


def _read(at: Path) -> Statement | None:
    """The content of export.json; None if it cannot be read or is not one of ours."""
    try:
        content: Any = parse_json(read_at_most(at / _STATEMENT, MOST_JSON_BYTES))
        statement = Statement(**content)
    except (OSError, ValueError, TypeError):
        return None
    return statement if type(statement.embedding_rows) is int else None
