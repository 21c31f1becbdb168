"""Finds the peers that run on this machine and the best setting of each, and measures how long each takes to start."""

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
from chunkmill_workers.benchmarks.peers.process import PeerError, PeerProcess
from chunkmill_workers.benchmarks.report import Say
from chunkmill_workers.engine.precision import cpu_has_bf16
from chunkmill_workers.engine.tokenizer import TextTokenizer

SAMPLE = 300
"""How many texts the sweep embeds: enough for every batch size, and a few seconds for the slowest peer."""
STARTS = 3
"""How often the start of each peer is measured."""
EXPORTED_POOLING = {Pooling.MEAN, Pooling.CLS}


@dataclass(frozen=True, slots=True)
class Ground:
    """What is the same for all contenders: model, device, number of threads, and the folder for texts and logs."""

    folder: ModelFolder
    device: str
    threads: int
    path: Path
    quick: bool

    @property
    def half(self) -> str | None:
        """The half precision in which this device computes; None if it would be emulated."""
        if self.device != "cpu":
            return "fp16"
        return "bf16" if cpu_has_bf16() else None

    @property
    def model(self) -> Model:
        """The model as peers' processes get it."""
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
        """Write ``texts`` to a file for the peers' processes, and return its path."""
        path = self.path / f"{name}.json"
        path.write_text(json.dumps(list(texts)), encoding="utf-8")
        return str(path)

    def token_counts(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """``(n,)`` int64: tokens that the model reads, with special tokens, without padding and what is cut off."""
        tokenizer = TextTokenizer.load(self.folder.transformer, lowercase=self.folder.lowercase)
        ids = tokenizer.encode(texts, self.folder.spec.document_prompt)
        return np.array([min(len(row), self.folder.spec.max_tokens) for row in ids], np.int64)  # type: ignore[arg-type]


@dataclass(slots=True)
class Contender:
    """A peer that takes part: its process, loaded with its best setting."""

    peer: Peer
    setting: Setting
    tried: list[dict[str, Any]]
    starts: list[float]
    running: PeerProcess
    versions: dict[str, str]

    def embed(self, name: str) -> float:
        """Embed the texts called ``name``, and return the seconds that it took."""
        return float(self.running.ask("embed", name=name)["seconds"])

    def vectors(self, name: str, folder: Path) -> tuple[NDArray[np.float32], float]:
        """The vectors of the texts called ``name``, and the seconds that they took."""
        path = folder / "vectors.npy"
        seconds = self.running.ask("embed", name=name, save=str(path))["seconds"]
        return np.load(path), seconds

    def as_json(self) -> dict[str, Any]:
        entry = {
            "name": self.peer.name,
            "setting": dict(self.setting),
            "threads": self.peer.threads,
            "versions": self.versions,
            "tried": self.tried,
        }
        return entry | ({"environment": self.peer.environment} if self.peer.environment else {})


@dataclass(frozen=True, slots=True)
class AbsentPeer:
    """A peer that does not take part, the reason, and the command that may install what it needs."""

    name: str
    reason: str
    install: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "reason": self.reason} | ({"install": self.install} if self.install else {})


@dataclass(slots=True)
class Field:
    """All peers: those that take part, and those that do not."""

    contenders: list[Contender] = field(default_factory=list)
    skipped: list[AbsentPeer] = field(default_factory=list)

    def __getitem__(self, name: str) -> Contender:
        return next(contender for contender in self.contenders if contender.peer.name == name)

    def alive(self) -> list[Contender]:
        """The contenders whose process is still running."""
        return [contender for contender in self.contenders if not contender.running.ended]

    def as_json(self) -> dict[str, Any]:
        return {
            "contenders": [contender.as_json() for contender in self.contenders],
            "skipped": [peer.as_json() for peer in self.skipped],
        }


@contextlib.contextmanager
def ground(model: str, *, quick: bool) -> Iterator[Ground]:
    """The `Ground` of a benchmark. It sets this process's threads, and deletes the folder at the end."""
    torch.set_num_threads(machine.cores())
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="cm-bench-") as path:
        yield Ground(resolve_model(model), device, machine.cores(), Path(path), quick)


def select(known: Sequence[Peer], only: Sequence[str]) -> list[Peer]:
    """The peers whose name contains a word of ``only``, in upper or lower case, and always the reference.

    Raises InvalidInput for a word that no name contains.
    """
    for word in only:
        if not any(word.lower() in peer.name.lower() for peer in known):
            raise InvalidInput(f"no peer's name contains {word!r}. They are: {', '.join(peer.name for peer in known)}")
    return [
        peer
        for peer in known
        if not only or peer.name == REFERENCE or any(word.lower() in peer.name.lower() for word in only)
    ]


@contextlib.contextmanager
def enter(chosen: Sequence[Peer], on: Ground, sample: Sequence[str], say: Say) -> Iterator[Field]:
    """Find the best setting of each peer on ``sample``, and start it again with that. The processes end with the block.

    A peer that cannot run is skipped, with the reason. The benchmark fails if the reference cannot run, or if our own
    engine is available and breaks.
    """
    entered = Field()
    tokens = int(on.token_counts(sample).sum())
    path = on.file("sample", sample)
    with contextlib.ExitStack() as stack:
        for peer in chosen:
            try:
                entered.contenders.append(_enter(peer, on, path, tokens, say, stack))
            except PeerError as error:
                if peer.name == REFERENCE or (peer.ours and not error.unavailable):
                    raise
                say(f"{peer.name} is skipped: {error}")
                if not error.unavailable:
                    print(*error.log, sep="\n", file=sys.stderr)
                entered.skipped.append(AbsentPeer(peer.name, str(error), error.install))
        yield entered


def _enter(peer: Peer, on: Ground, sample: str, tokens: int, say: Say, stack: contextlib.ExitStack) -> Contender:
    if peer.cpu_only and on.device != "cpu":
        raise PeerError(f"it is measured on CPUs; this is {on.device}", unavailable=True)
    if peer.environment and not environments.installed(peer.environment):
        raise PeerError(
            "it needs an environment of its own, which is not installed", install=environments.INSTALL, unavailable=True
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


def start(peer: Peer, setting: Setting, on: Ground) -> PeerProcess:
    """Start a process of ``peer``. Raises PeerError."""
    return PeerProcess(peer, on.model, setting, threads=on.threads, device=on.device, logs=on.path)


def best_setting(peer: Peer, on: Ground, sample: str, tokens: int, say: Say) -> tuple[Setting, list[dict[str, Any]]]:
    """The fastest setting on the sample, and the results of all.

    Each setting gets a process, a pass to warm up, and two passes, of which the faster counts. Raises the last
    PeerError if no setting runs.
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
    if failure and all("error" in attempt for attempt in tried):
        raise failure
    return fastest(tried), tried


def fastest(tried: Sequence[Mapping[str, Any]]) -> Setting:
    """The setting with the most tokens per second, of those that ran."""
    ran = [attempt for attempt in tried if "error" not in attempt]
    setting: Setting = max(ran, key=lambda attempt: attempt["tokens_per_second"])["setting"]
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
        say(f"{peer.name}: exporting the model as {peer.needs}")
    try:
        export.make(on.model, peer.needs)
    except RuntimeError as error:
        missing = str(error).startswith("No module named")
        raise PeerError(str(error), install=environments.EXTRA if missing else None, unavailable=missing) from None
