"""The canary: a worker embeds the golden texts before it serves a space, and refuses if the vectors differ too much.

The space's fingerprint covers the files of a model, but not what reads them. Another release of a library, a driver, a
processor's instructions or a bad memory chip changes vectors without changing a file, and nothing later would notice:
a search only gets worse.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import metadata
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
import sqlalchemy as sa
import torch
from numpy.typing import NDArray

from chunkmill.domain.reasons import reason_of
from chunkmill.errors import CanaryFailed, ChunkmillError
from chunkmill.spaces import canaries
from chunkmill.spaces.canaries import Canary, Maker
from chunkmill.spaces.registry import Space
from chunkmill_workers.engine.engine import Engine, Kind
from chunkmill_workers.engine.matryoshka import shorten
from chunkmill_workers.local.golden import TEXTS, VERSION

logger = logging.getLogger(__name__)

# How far from exact a worker may be, as a cosine: what promise 6 allows it. all-MiniLM-L6-v2 on these texts, lowest
# to fp32: bf16 0.99995, fp16 0.999999, fp32 in other TokenBatches 1 - 3e-13.
HALF: Final = 0.9999
FULL: Final = 0.999_999
# In int8 a last bit that differs between two machines is rounded up here and down there, and grows from layer to
# layer to the size of all rounding. Attention in bf16 to attention in fp32: 0.9958, either to exact 0.9956; on machines
# of one kind 1.
INT8: Final = 0.99

_PACKAGES: Final = ("chunkmill", "torch", "transformers", "tokenizers", "onnxruntime", "openvino")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a comparison. ``problem`` is None if the two agree."""

    problem: str | None
    similarity: float
    """The lowest of all golden texts."""
    gate: float


def compare(mine: Canary, reference: Canary) -> Verdict:
    """Compare this worker's golden vectors with the space's reference. Pure.

    The similarity of two vectors is 2ab / (aa + bb). For unit vectors it is the cosine; for others it also falls if the
    lengths differ.
    """
    gate = _gate(mine.made_by.dtype, reference.made_by.dtype)
    if mine.vectors.shape != reference.vectors.shape or mine.n_tokens.shape != reference.n_tokens.shape:
        shapes = f"{mine.vectors.shape} here, {reference.vectors.shape} in the reference"
        return Verdict(f"the golden vectors have another shape: {shapes}", 0.0, gate)
    if len(different := np.flatnonzero(mine.n_tokens != reference.n_tokens)):
        text = int(different[0])
        counts = f"{mine.n_tokens[text]} tokens here, {reference.n_tokens[text]} in the reference"
        return Verdict(f"golden text {text} has {counts}: the tokenizer differs", 0.0, gate)
    a, b = mine.vectors.astype(np.float64), reference.vectors.astype(np.float64)
    both = (a * a).sum(axis=1) + (b * b).sum(axis=1)
    # If a tokenizer finds nothing to embed, both sides have zeros.
    similarity = np.where(both == 0, 1.0, 2 * (a * b).sum(axis=1) / np.where(both == 0, 1.0, both))
    text = int(np.argmin(np.where(np.isfinite(similarity), similarity, -np.inf)))
    lowest = float(similarity[text])
    if lowest >= gate:
        return Verdict(None, lowest, gate)
    return Verdict(
        f"golden text {text} has a similarity of {lowest:.7f} to the reference, and at least {gate:.7f} is wanted",
        lowest,
        gate,
    )


def _gate(mine: str, reference: str) -> float:
    """The lowest similarity of two dtypes that are each as near to exact as promised: the two angles, added.

    0.9996 between two half precisions, 0.99988 between one and fp32, 0.999996 in fp32. Beyond all of them
    (fp32, same model and texts): every weight off by 1 % at random 0.997, weights rounded to int8 0.996, one
    row of one matrix lost 0.995. In int8 0.96: that finds another model or a CPU whose sums overflow, and no less.
    """
    exact = {"float32": FULL, "int8": INT8}
    return math.cos(sum(math.acos(exact.get(dtype, HALF)) for dtype in (mine, reference)))


class CanaryCheck:
    """Compares each engine of a worker process once with each space that it is to serve."""

    def __init__(self, begin: Callable[[], AbstractContextManager[sa.Connection]], worker: str) -> None:
        self._begin = begin
        self._worker = worker
        self._passed: WeakKeyDictionary[Engine, set[int]] = WeakKeyDictionary()
        self._mutex = threading.Lock()

    def has_passed(self, engine: Engine, space: Space) -> bool:
        """Whether the engine was compared with the space, and fits."""
        with self._mutex:
            return space.id in self._passed.get(engine, ())

    def require(self, engine: Engine, space: Space) -> None:
        """Raise :class:`CanaryFailed` unless ``engine`` makes the vectors that ``space`` was made with.

        The first worker of a space makes the reference. Two threads that meet a new space at once both check it.
        """
        if self.has_passed(engine, space):
            return
        name = f"space {space.spec.fingerprint[:12]} ({space.spec.model!r})"
        try:
            mine = embed_golden(engine, space, self._worker)
        except ChunkmillError:
            raise
        except Exception as error:  # no text of a job is at fault
            raise CanaryFailed(
                f"{name}: the golden texts could not be embedded on {engine.device} ({reason_of(error)}). Check the "
                "device and the library versions; this worker takes no work of the space."
            ) from error
        again = f"forget it with `chunkmill models canary --reset {space.spec.fingerprint[:12]}`"
        try:
            with self._begin() as conn:
                reference = canaries.find_or_keep(conn, space.id, VERSION, mine)
        except ValueError:
            raise CanaryFailed(
                f"{name}: the reference of its golden texts is damaged, so no worker can be compared with it. "
                f"If the rest of Postgres is sound, {again} and start the worker that you trust most first."
            ) from None
        verdict = compare(mine, reference)
        if verdict.problem is not None:
            raise CanaryFailed(
                f"this worker's vectors drift from {name}: {verdict.problem}. This worker is {mine.made_by}. The "
                f"reference was made by {reference.made_by}. The worker takes no work of this space. Give it the "
                "reference's library versions, EMBEDDING_DTYPE and model files, or check its device. If the "
                f"reference is wrong, {again} and embed again what the worker that made it embedded."
            )
        logger.info("%s: the canary passes, similarity %.7f, gate %.7f", name, verdict.similarity, verdict.gate)
        with self._mutex:
            self._passed.setdefault(engine, set()).add(space.id)


def embed_golden(engine: Engine, space: Space, worker: str) -> Canary:
    """The golden vectors as ``space`` would store them. Raises :class:`CanaryFailed` if it has none."""
    vectors = np.zeros((len(TEXTS), space.spec.dimensions), np.float32)
    n_tokens = np.zeros(len(TEXTS), np.int32)
    every = np.arange(len(TEXTS))
    # Where queries have a model of their own, every second text is one, so that both models are compared.
    sides: list[tuple[Kind, NDArray[np.intp]]] = [("document", every)]
    if engine.has_own_queries:
        sides = [("document", every[::2]), ("query", every[1::2])]
    for kind, at in sides:
        texts = [TEXTS[text] for text in at]
        # Urgent, because a query may be waiting for the check and the texts are short.
        for result in engine.stream(texts, kind, on_long=space.spec.long_text.policy, urgent=True):
            for failure in result.failures:
                # Some tokenizers find nothing in an empty text, and do so on every machine.
                if failure.code != "tokenize_failed":
                    raise CanaryFailed(
                        f"golden text {at[failure.index]} got no vector from {space.spec.model!r} on {engine.device}: "
                        f"{failure.code}, {failure.reason}. Check the device and the library versions; this worker "
                        "takes no work of the space."
                    )
            cut = shorten(result.vectors, space.spec.dimensions, normalize=space.spec.normalize)
            vectors[at[result.indices]] = cut
            n_tokens[at[result.indices]] = result.n_tokens
    return Canary(vectors, n_tokens, _maker(engine, worker))


def _maker(engine: Engine, worker: str) -> Maker:
    on_gpu = engine.device.startswith("cuda")
    chip = torch.cuda.get_device_name(engine.device) if on_gpu else torch.backends.cpu.get_cpu_capability()
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return Maker(worker, f"{engine.device} ({chip})", engine.dtype, versions)
