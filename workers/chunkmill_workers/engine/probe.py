"""Tests a model before it is used: does it give the vectors that its folder promises?

A model may load and still fail with every text: because it projects its token vectors to another width, because a
kernel does not know the number format, or because a text's vector depends on the texts beside it. Such a model is
refused when it is loaded, with a sentence that says why, and not at the first text of a job.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from chunkmill.domain.spaces import Precision
from chunkmill.errors import ModelLoadError
from chunkmill.models import ModelFolder
from chunkmill_workers.engine.backends import Backend
from chunkmill_workers.engine.precision import cpu_threads
from chunkmill_workers.engine.run import Runner, TokenBatch, is_out_of_memory
from chunkmill_workers.engine.tokenizer import TextTokenizer
from chunkmill_workers.engine.windows import Ids

logger = logging.getLogger(__name__)

_TEXT: Final = "The mill grinds slowly, and it grinds all."
# How far a text's vector may move if a longer text is beside it, as a share of its largest number. 19 sound models
# moved by at most 7e-7 in fp32 and 8e-3 in bf16. Eight of them without their attention mask, so that padding is read,
# moved by 0.27 to 0.54.
_MOVES_EXACT: Final = 1e-3
_MOVES_ROUNDED: Final = 0.1
_REASON_LENGTH: Final = 500

_Identity = tuple[str, ...]


class UnfitModel(ModelLoadError):
    """The model gives no usable vectors in this number format, and may give them in fp32."""


class _Memory:
    """What this process knows of the models that it has loaded. Several threads may ask."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._passed: set[_Identity] = set()
        self._needs_fp32: set[_Identity] = set()

    def has_passed(self, identity: _Identity) -> bool:
        with self._mutex:
            return identity in self._passed

    def passed(self, identity: _Identity) -> None:
        with self._mutex:
            self._passed.add(identity)

    def needs_fp32(self, folder: ModelFolder, device: torch.device) -> bool:
        """Whether the model was unfit for half precision on this device before."""
        with self._mutex:
            return _of_folder(folder, device) in self._needs_fp32

    def failed_in_half(self, folder: ModelFolder, device: torch.device) -> None:
        """Note that the model is unfit for half precision on this device."""
        with self._mutex:
            self._needs_fp32.add(_of_folder(folder, device))


MEMORY: Final = _Memory()


def _of_folder(folder: ModelFolder, device: torch.device) -> _Identity:
    # The revision covers samples of large weights only, so the path is part of it.
    return (str(folder.path), folder.spec.fingerprint, str(device))


def require_fit(
    folder: ModelFolder, tokenizer: TextTokenizer, backend: Backend, runner: Runner, *, chosen: bool
) -> None:
    """Raise ModelLoadError unless the model gives finite vectors of the right width, the same alone and in a batch.

    It takes two short forward passes. A model that passed is not asked again in this
    process: not in the same number format, by the same backend and on the same device. ``chosen`` says that the
    operator chose the number format. If not, a model whose vectors are finite in fp32 only is :class:`UnfitModel`.
    """
    identity = (*_of_folder(folder, backend.device), backend.name, _format(backend))
    if MEMORY.has_passed(identity):
        return
    rows = _rows(tokenizer, folder.spec.max_tokens)
    if rows:  # if the tokenizer finds no token in our texts, every text fails by itself and says so
        probe = _Probe(folder, backend, runner, chosen=chosen)
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_on_one_core, probe.ask, rows).result()
    MEMORY.passed(identity)


def _on_one_core(ask: Callable[[Sequence[Ids]], None], rows: Sequence[Ids]) -> None:
    """Ask with one thread of torch, in a thread that is used for nothing else.

    With two threads on two busy cores, these few tokens take 15 times as long, because each operation waits for both
    threads (all-MiniLM-L6-v2: 600 ms instead of 40). The number is that of this thread, and of threads that start
    later, so it is put back.
    """
    before = cpu_threads()
    torch.set_num_threads(1)
    try:
        ask(rows)
    finally:
        torch.set_num_threads(before)


def _rows(tokenizer: TextTokenizer, most: int) -> list[Ids]:
    """The token ids of a short text, and of a longer one if the model reads that many."""
    rows = [tokenizer.probe[:most]]
    (longer,) = tokenizer.encode([_TEXT])
    if isinstance(longer, np.ndarray) and len(longer[:most]) > len(rows[0]):
        rows.append(longer[:most])
    return [row for row in rows if len(row)]


def _format(backend: Backend) -> str:
    return str(backend.dtype).removeprefix("torch.")


class _Probe:
    """The questions to one model, and the sentences for its failures."""

    def __init__(self, folder: ModelFolder, backend: Backend, runner: Runner, *, chosen: bool) -> None:
        self._folder = folder
        self._backend = backend
        self._runner = runner
        self._chosen = chosen
        self._name = f"model {folder.name!r}"
        self._where = f"on {backend.device} in {_format(backend)}"
        in_int8 = folder.spec.precision is Precision.INT8
        self._half = backend.dtype != torch.float32 and not in_int8
        self._most_moves = _MOVES_ROUNDED if self._half or in_int8 else _MOVES_EXACT
        setting = "EMBEDDING_PRECISION=float" if in_int8 else "EMBEDDING_DTYPE=fp32" if self._half else None
        self._otherwise = "choose another model" if setting is None else f"set {setting}, or choose another model"

    def ask(self, rows: Sequence[Ids]) -> None:
        """Embed ``rows`` together, and the first of them alone. Raises ModelLoadError."""
        together = self.vectors(rows)
        if len(rows) > 1:
            self.require_same(self.vectors(rows[:1])[0], together[0])

    def vectors(self, rows: Sequence[Ids]) -> NDArray[np.float32]:
        """(n, dimensions) float32: the finite vectors of ``rows`` in one forward pass. Raises ModelLoadError."""
        batch = TokenBatch(rows, np.zeros(len(rows), np.bool_), np.zeros(len(rows), np.int32))
        width = self._folder.spec.dimensions
        try:
            vectors = self._runner.attempt(batch)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:_REASON_LENGTH]
            if is_out_of_memory(error):
                raise ModelLoadError(
                    f"{self._name} was loaded, and left too little memory for a short text {self._where} ({reason}): "
                    "lower EMBEDDING_ENGINES, end what else uses the memory, or choose a smaller model"
                ) from error
            raise UnfitModel(
                f"{self._name} was loaded, and then could not embed a short text {self._where} ({reason}): "
                f"{self._otherwise}; if other models fail here too, check the device"
            ) from error
        if vectors.shape[1] != width:
            raise ModelLoadError(
                f"{self._name} gives vectors of {vectors.shape[1]:,} numbers, and its files state {width:,} "
                f"({self._folder.path}): copy the folder again. If it is complete, this architecture makes its vectors "
                "in a way that Chunkmill does not know, so choose another model"
            )
        return vectors if np.isfinite(vectors).all() else self._repaired(batch)

    def _repaired(self, batch: TokenBatch) -> NDArray[np.float32]:
        """The vectors of a batch whose fast vectors are not finite: the engine computes such texts again, exactly."""
        if self._half and not self._chosen:
            raise UnfitModel(
                f"{self._name} gives a short text a vector that is not finite {self._where}: {self._otherwise}"
            )
        result = self._runner(batch)
        if result.failures:
            _, reason = next(iter(result.failures.values()))
            raise UnfitModel(
                f"{self._name} gives no short text a finite vector {self._where} ({reason}): its weights are damaged "
                "or belong to another architecture, so copy the folder again, or choose another model"
            )
        if self._half:
            logger.warning(
                "%s gives a short text a vector that is not finite %s. Such texts are computed a second time in fp32, "
                "which is slow: set EMBEDDING_DTYPE=fp32",
                self._name, self._where,
            )  # fmt: skip
        return result.vectors

    def require_same(self, alone: NDArray[np.float32], beside: NDArray[np.float32]) -> None:
        """Raise ModelLoadError unless a text's vector is the same alone and ``beside`` a longer text."""
        size = float(np.abs(alone).max())
        moved = float(np.abs(alone - beside).max()) / size if size else float(np.abs(beside).max())
        if moved > self._most_moves:
            raise UnfitModel(
                f"{self._name} gives a text another vector if a longer text is beside it {self._where} (its numbers "
                f"move by {moved:.1%}), so no search could rely on its vectors: {self._otherwise}"
            )
