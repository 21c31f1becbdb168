"""Embedding spaces: everything that must be equal before two vectors may be compared."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from enum import StrEnum


class Pooling(StrEnum):
    """How token vectors become one text vector. The words are those of sentence-transformers' configuration."""

    CLS = "cls"
    MEAN = "mean"
    LAST_TOKEN = "last_token"  # noqa: S105 - a pooling mode, not a password
    MAX = "max"
    MEAN_SQRT_LEN = "mean_sqrt_len"
    WEIGHTED_MEAN = "weighted_mean"
    """The mean of all tokens, in which the first token counts once, the second twice, and so on."""
    PROVIDER = "provider"
    """The provider's own, which it does not publish."""

    @property
    def modes(self) -> tuple[Pooling, ...]:
        """This pooling alone. ``Concatenated`` has several."""
        return (self,)


class Concatenated(str):
    """Several poolings whose vectors stand one behind the other, such as ``cls+mean``. It has twice the dimensions.

    It is a word as a ``Pooling`` is one, so it is stored, compared and fingerprinted in the same way.
    """

    __slots__ = ()

    @property
    def modes(self) -> tuple[Pooling, ...]:
        """The poolings, in the order of their vectors."""
        return tuple(Pooling(word) for word in self.split("+"))


AnyPooling = Pooling | Concatenated


def pooling_of(word: str) -> AnyPooling:
    """The pooling of a word such as ``mean`` or ``cls+mean``. Raises ValueError if there is none."""
    if "+" not in word:
        return Pooling(word)
    pooling = Concatenated(word)
    if Pooling.PROVIDER in pooling.modes:
        raise ValueError(f"{word!r} is not a valid Pooling")
    return pooling


class Precision(StrEnum):
    """The class of number formats that a space's vectors are computed in.

    The value is part of the fingerprint. int8 vectors depend on how they are rounded, so their value names the recipe:
    the texts of ``chunkmill_workers.engine.encoder.calibration`` and the rules of ``int8`` beside it. Another recipe
    needs another value. The old one then stays here, so that its spaces can still be read. Users write and see
    ``int8``.
    """

    FLOAT = "float"
    """fp32, fp16 or bf16, whose vectors agree to a cosine of 0.9999."""
    INT8 = "int8-1"
    """Matrix products in int8, on a CPU."""

    def __str__(self) -> str:
        return self.value.partition("-")[0]

    @classmethod
    def _missing_(cls, value: object) -> Precision | None:
        return cls.INT8 if value == "int8" else None


class OnLong(StrEnum):
    """What to do with a text longer than the space's ``max_tokens``."""

    TRUNCATE = "truncate"
    """Embed the first ``max_tokens`` tokens, count the text and mark its vector."""
    REJECT = "reject"
    """Put the chunk on the job's dead list."""
    SPLIT = "split"
    """Embed overlapping windows of the text, and average their vectors, weighted by their tokens."""


class LongText(StrEnum):
    """How a space represents a long text. The policy REJECT writes no vector, so it shares the space of TRUNCATE.

    The value is part of the fingerprint. It names the rule, so another rule for windows needs another value.
    """

    TRUNCATE = "truncate"
    """The vector of the first ``max_tokens`` tokens."""
    SPLIT = "split-overlap-8"
    """The mean of as few windows as hold the text, each overlapping the next by an eighth:
    ``chunkmill.domain.windows``."""
    SPLIT_APART = "split"
    """The mean of windows without overlap, in spaces of an earlier version. They can be read, and no worker adds to
    them."""

    @property
    def policy(self) -> OnLong:
        """The policy that an engine follows to make the vectors of such a space."""
        return OnLong.TRUNCATE if self is LongText.TRUNCATE else OnLong.SPLIT


def long_text_for(on_long: OnLong) -> LongText:
    """The representation of long texts in the vectors that ``on_long`` writes."""
    return LongText.SPLIT if on_long is OnLong.SPLIT else LongText.TRUNCATE


@dataclass(frozen=True, slots=True)
class SpaceSpec:
    """One embedding space. ``fingerprint`` covers every field except ``model``, which is only a label.

    The ``revision`` of a local model is a digest of its files (``chunkmill.models``). So the same weights are the same
    space under any path or name, and other weights under the same name are another space.
    """

    provider: str
    model: str
    revision: str
    dimensions: int
    max_tokens: int
    pooling: AnyPooling
    normalize: bool
    document_prompt: str = ""
    query_prompt: str = ""
    long_text: LongText = LongText.TRUNCATE
    precision: Precision = Precision.FLOAT
    task: str = ""
    """The adapter of the model that makes the vectors of documents, and of queries unless ``query_task`` names another
    one. The revision covers its files."""
    query_task: str = ""
    """The adapter for queries; empty if it is that of documents."""
    query_model: str = ""
    """The fingerprint of the model that makes the vectors of queries; empty if it is the model of the documents."""

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits: the SHA-256 of the canonical JSON of all fields except ``model``.

        A field that a later release added is left out while it is empty, so older spaces keep their fingerprints.
        """
        return _fingerprint(self)


_ADDED = frozenset({"task", "query_task", "query_model"})
"""Fields that an earlier release does not have."""


@functools.lru_cache(maxsize=256)  # every call for vectors needs it, and it takes 40 µs
def _fingerprint(spec: SpaceSpec) -> str:
    fields = {name: value for name, value in asdict(spec).items() if name != "model" and (value or name not in _ADDED)}
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def told_apart(old: tuple[str, str], new: tuple[str, str]) -> tuple[str, str]:
    """The models of two spaces, each given as ``(model, fingerprint)``, for people to read. If both have the same
    model, the beginning of the fingerprint follows."""
    if old[0] != new[0]:
        return old[0], new[0]
    return f"{old[0]} ({old[1][:12]})", f"{new[0]} ({new[1][:12]})"
