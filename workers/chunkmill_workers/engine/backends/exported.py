"""Exported models: where they lie, what each says of itself, and which one belongs to a model folder."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import platformdirs
from numpy.typing import NDArray

from chunkmill.errors import ModelLoadError
from chunkmill.models import ModelFolder
from chunkmill_workers.engine.windows import Ids

Target = Literal["onnx", "openvino"]
TARGETS: Final[tuple[Target, ...]] = get_args(Target)

# In the path of every export: a change of what is exported, or of how, makes the old ones invisible.
VERSION: Final = 1

INPUTS: Final = ("input_ids", "attention_mask")
"""(n, longest) int64 each; the mask is 1 for tokens and 0 for padding."""
OUTPUT: Final = "last_hidden_state"
"""(n, longest, hidden) float32."""

GRAPHS: Final[Mapping[Target, str]] = {"onnx": "model.onnx", "openvino": "model.xml"}
"""The graph's file; its weights are in a second one beside it."""
_STATEMENT: Final = "export.json"

# Packages, each with a module of that name.
RUN: Final[Mapping[Target, tuple[str, ...]]] = {"onnx": ("onnxruntime",), "openvino": ("openvino",)}
MAKE: Final[Mapping[Target, tuple[str, ...]]] = {"onnx": ("onnx", "onnxscript"), "openvino": ()}


@dataclass(frozen=True, slots=True)
class Statement:
    """export.json."""

    backend: Target
    model: str
    """The name it was exported under; the weights are known by ``revision`` alone."""
    revision: str
    embedding_rows: int
    """Tokens that the model knows."""
    opset: int | None
    """ONNX's; None for OpenVINO."""
    min_cosine: float
    """Lowest cosine of a token's vector to transformers' own in fp32, over the texts of the check."""
    versions: Mapping[str, str]
    """Of the packages that made it."""
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Export:
    """One folder with a graph, its weights and export.json."""

    folder: Path
    statement: Statement

    @property
    def graph(self) -> Path:
        return self.folder / GRAPHS[self.statement.backend]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.folder.iterdir())

    def write(self) -> None:
        text = json.dumps(asdict(self.statement), indent=2)
        (self.folder / _STATEMENT).write_text(text + "\n", encoding="utf-8")


def exports_folder() -> Path:
    """Where all exports of this user are: ``~/.cache/chunkmill/exports`` on Linux, or below XDG_CACHE_HOME.

    Not in the model folder, which may be read-only and whose files are the space's revision; not in
    CHUNKMILL_HOME, where the embedded stack tolerates no files but its own.
    """
    return platformdirs.user_cache_path("chunkmill") / "exports"


def export_folder(folder: ModelFolder, target: Target) -> Path:
    """Where the export of these weights is, or would be. Other weights have another path."""
    return exports_folder() / f"{folder.spec.revision.removeprefix('sha256:')}-{target}-{VERSION}"


def find(folder: ModelFolder, target: Target) -> Export:
    """The export of these very weights. Raises ModelLoadError, saying how to make it."""
    require(target)
    at = export_folder(folder, target)
    command = f"chunkmill models export {folder.name} --backend {target}"
    if not (at / _STATEMENT).is_file():
        others = [each for each in _all(target) if each.model == folder.name and each.revision != folder.spec.revision]
        found = f" (one of {others[0].revision} is there, made from other weights)" if others else ""
        raise ModelLoadError(
            f"backend {target}: model {folder.name!r} ({folder.spec.revision}) has no export in {at.parent}{found}. "
            f"Make it as the user who runs the worker: {command}"
        )
    statement = _read(at)
    if statement is None or statement.backend != target or statement.revision != folder.spec.revision:
        raise ModelLoadError(
            f"backend {target}: {at / _STATEMENT} does not state an export of {folder.name!r} "
            f"({folder.spec.revision}): its folder was damaged or renamed. Make it again: {command} --force"
        )
    return Export(at, statement)


def require(target: Target, *, to_export: bool = False) -> None:
    """Raise ModelLoadError with the command that installs what is missing."""
    needed = RUN[target] + (MAKE[target] if to_export else ())
    if missing := [module for module in needed if importlib.util.find_spec(module) is None]:
        raise ModelLoadError(f"backend {target} needs {', '.join(missing)}. Run: pip install 'chunkmill[{target}]'")


def pad(rows: Sequence[Ids], pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Ids and mask, (n, longest) int64 each, and lengths, (n,) int64. Padding is on the right, see ``lay_out``."""
    lengths = np.array([len(row) for row in rows], np.int64)
    inside = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(inside.shape, pad_id, np.int64)
    ids[inside] = np.concatenate(rows)
    return ids, inside.astype(np.int64), lengths


def unreadable(graph: Path, error: Exception) -> ModelLoadError:
    """``raise unreadable(graph, error) from error``: the library refuses the files."""
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
    """None where export.json is not one of ours."""
    try:
        content: Any = json.loads((at / _STATEMENT).read_text(encoding="utf-8"))
        return Statement(**content)
    except (OSError, ValueError, TypeError):
        return None
