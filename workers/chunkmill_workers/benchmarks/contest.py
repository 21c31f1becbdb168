"""Who takes part on this machine, and at which setting: every peer's best is found here, and its start is timed."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chunkmill.domain.spaces import Pooling
from chunkmill.errors import InvalidInput
from chunkmill.models import ModelFolder, resolve_model
from chunkmill_workers.benchmarks import machine
from chunkmill_workers.benchmarks.names import REFERENCE
from chunkmill_workers.benchmarks.peers import Peer, Setting, environments, export, peers
from chunkmill_workers.benchmarks.peers.model import Model
from chunkmill_workers.benchmarks.peers.process import PeerError, Running
from chunkmill_workers.benchmarks.report import Say
from chunkmill_workers.engine.precision import cpu_has_bf16
from chunkmill_workers.engine.tokenizer import TextTokenizer

SAMPLE = 300
"""Texts of the sweep: enough for every batch size of the grids, and a few seconds for the slowest."""
STARTS = 3
EXPORTED_POOLING = {Pooling.MEAN, Pooling.CLS}


@dataclass(frozen=True, slots=True)
class Ground:
    """What is the same for all: the model, the device, the number of threads, and the folder for texts and logs."""

    folder: ModelFolder
    device: str
    threads: int
    path: Path
    quick: bool

    @property
    def half(self) -> str | None:
        """The half precision this device computes in; None where it would be emulated."""
        if self.device != "cpu":
            return "fp16"
        return "bf16" if cpu_has_bf16() else None

    @property
    def model(self) -> Model:
        spec = self.folder.spec
        name = f"{self.folder.path.name}-{spec.revision.rpartition(':')[2]}-{export.VERSION}"
        return Model(
            name=self.folder.name,
            folder=str(self.folder.path),
            transformer=str(self.folder.transformer),
            dimensions=spec.dimensions,
            max_tokens=spec.max_tokens,
            pooling=spec.pooling,
            exported=str(environments.cache() / "models" / name),
        )

    def peers(self) -> list[Peer]:
        return peers(self.half, self.device)

    def file(self, name: str, texts: Sequence[str]) -> str:
        """Texts where the peers' processes find them."""
        path = self.path / f"{name}.json"
        path.write_text(json.dumps(list(texts)), encoding="utf-8")
        return str(path)

    def token_counts(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """``(n,)`` tokens that the model sees: special tokens in, padding and what is cut off not."""
        tokenizer = TextTokenizer.load(self.folder.transformer, lowercase=self.folder.lowercase)
        ids = tokenizer.encode(texts, self.folder.spec.document_prompt)
        return np.array([min(len(each), self.folder.spec.max_tokens) for each in ids], np.int64)  # type: ignore[arg-type]


@dataclass(slots=True)
class Contender:
    """A peer that runs: its process, loaded with its best setting."""

    peer: Peer
    setting: Setting
    tried: list[dict[str, Any]]
    starts: list[float]
    running: Running
    versions: dict[str, str]

    def embed(self, name: str) -> float:
        """Seconds that the texts of ``name`` took."""
        return float(self.running.ask("embed", name=name)["seconds"])

    def vectors(self, name: str, folder: Path) -> tuple[NDArray[np.float32], float]:
        """The vectors of the texts of ``name``, and the seconds of this pass."""
        path = folder / "vectors.npy"
        seconds = self.running.ask("embed", name=name, save=str(path))["seconds"]
        return np.load(path), seconds

    def as_json(self) -> dict[str, Any]:
        found = {
            "name": self.peer.name,
            "setting": dict(self.setting),
            "threads": self.peer.threads,
            "versions": self.versions,
            "tried": self.tried,
        }
        return found | ({"environment": self.peer.environment} if self.peer.environment else {})


@dataclass(frozen=True, slots=True)
class Skipped:
    """A peer that takes no part, why, and the command that may mend it."""

    name: str
    reason: str
    install: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "reason": self.reason} | ({"install": self.install} if self.install else {})


@dataclass(slots=True)
class Field:
    contenders: list[Contender] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def __getitem__(self, name: str) -> Contender:
        return next(each for each in self.contenders if each.peer.name == name)

    def alive(self) -> list[Contender]:
        """Those that have not broken since they entered."""
        return [each for each in self.contenders if not each.running.ended]

    def as_json(self) -> dict[str, Any]:
        return {
            "contenders": [each.as_json() for each in self.contenders],
            "skipped": [each.as_json() for each in self.skipped],
        }


@contextlib.contextmanager
def ground(model: str, *, quick: bool) -> Iterator[Ground]:
    """The model found, this process's threads set, and a folder that goes with the benchmark."""
    torch.set_num_threads(machine.cores())
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="cm-bench-") as path:
        yield Ground(resolve_model(model), device, machine.cores(), Path(path), quick)


def select(known: Sequence[Peer], only: Sequence[str]) -> list[Peer]:
    """Those whose names hold one of the words of ``only``, in any case of letters, and always the reference."""
    for word in only:
        if not any(word.lower() in peer.name.lower() for peer in known):
            raise InvalidInput(f"no peer's name holds {word!r}. They are: {', '.join(peer.name for peer in known)}")
    return [
        peer
        for peer in known
        if not only or peer.name == REFERENCE or any(word.lower() in peer.name.lower() for word in only)
    ]


@contextlib.contextmanager
def enter(chosen: Sequence[Peer], on: Ground, sample: Sequence[str], say: Say) -> Iterator[Field]:
    """Find everyone's best setting on ``sample``, then start them anew with it; their processes end with the block.

    A peer that cannot run is skipped with the reason. Our own engine may be unavailable, but if it or the reference
    breaks, so does the benchmark.
    """
    found = Field()
    tokens = int(on.token_counts(sample).sum())
    path = on.file("sample", sample)
    with contextlib.ExitStack() as stack:
        for peer in chosen:
            try:
                found.contenders.append(_enter(peer, on, path, tokens, say, stack))
            except PeerError as error:
                if peer.name == REFERENCE or (peer.ours and not error.unavailable):
                    raise
                say(f"{peer.name} is skipped: {error}")
                if not error.unavailable:
                    print(*error.log, sep="\n", file=sys.stderr)
                found.skipped.append(Skipped(peer.name, str(error), error.install))
        yield found


def _enter(peer: Peer, on: Ground, sample: str, tokens: int, say: Say, stack: contextlib.ExitStack) -> Contender:
    if peer.cpu_only and on.device != "cpu":
        raise PeerError(f"it is measured on CPUs; this is {on.device}", unavailable=True)
    if peer.environment and not environments.installed(peer.environment):
        raise PeerError(
            "it needs an environment of its own, which is not there", install=environments.INSTALL, unavailable=True
        )
    if peer.needs:
        _export(peer, on, say)
    setting, tried = best_setting(peer, on, sample, tokens, say)
    say(f"{peer.name}: start")
    starts = []
    for _ in range(0 if on.quick else STARTS - 1):
        with start(peer, setting, on) as running:
            starts.append(running.start_seconds)
    running = stack.enter_context(start(peer, setting, on))
    starts.append(running.start_seconds)
    return Contender(peer, setting, tried, starts, running, running.ask("versions"))


def start(peer: Peer, setting: Setting, on: Ground) -> Running:
    return Running(peer, on.model, setting, threads=on.threads, device=on.device, logs=on.path)


def best_setting(peer: Peer, on: Ground, sample: str, tokens: int, say: Say) -> tuple[Setting, list[dict[str, Any]]]:
    """The fastest setting on the sample, and what was tried: a process each, a pass to warm up, the better of two.

    Raises the last PeerError when no setting runs.
    """
    settings = peer.settings[:2] if on.quick else peer.settings
    if len(settings) == 1:
        return settings[0], []
    tried: list[dict[str, Any]] = []
    failure: PeerError | None = None
    for setting in settings:
        say(f"{peer.name}: {', '.join(f'{name} {value}' for name, value in setting.items())}")
        try:
            with start(peer, setting, on) as running:
                running.ask("texts", name="sample", path=sample)
                running.ask("embed", name="sample")
                seconds = min(running.ask("embed", name="sample")["seconds"] for _ in range(1 if on.quick else 2))
            tried.append({"setting": dict(setting), "tokens_per_second": tokens / seconds})
        except PeerError as error:
            if error.unavailable:
                raise
            failure = error
            tried.append({"setting": dict(setting), "error": str(error)})
    if failure and all("error" in each for each in tried):
        raise failure
    return fastest(tried), tried


def fastest(tried: Sequence[Mapping[str, Any]]) -> Setting:
    """The setting that embedded most, of those that ran."""
    ran = [each for each in tried if "error" not in each]
    setting: Setting = max(ran, key=lambda each: each["tokens_per_second"])["setting"]
    return setting


def _export(peer: Peer, on: Ground, say: Say) -> None:
    assert peer.needs
    folder = on.folder
    plain = folder.modules == ("normalize",) and not folder.spec.document_prompt and not folder.lowercase
    if not plain or folder.spec.pooling not in EXPORTED_POOLING:
        raise PeerError(
            "the benchmark exports models with mean or CLS pooling and normalisation, without prompt", unavailable=True
        )
    if not on.model.made(peer.needs).is_dir():
        say(f"{peer.name}: making {peer.needs} of the model")
    try:
        export.make(on.model, peer.needs)
    except RuntimeError as error:
        missing = str(error).startswith("No module named")
        raise PeerError(str(error), install=environments.EXTRA if missing else None, unavailable=missing) from None
