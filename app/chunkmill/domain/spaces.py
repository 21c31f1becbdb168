"""Embedding spaces: what must be equal before two vectors may be compared."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from enum import StrEnum


class Pooling(StrEnum):
    """How token vectors become one text vector; the words of sentence-transformers' configuration."""

    CLS = "cls"
    MEAN = "mean"
    LAST_TOKEN = "last_token"  # noqa: S105 - a pooling mode, not a password
    MAX = "max"
    MEAN_SQRT_LEN = "mean_sqrt_len"
    PROVIDER = "provider"
    """A provider's own, which it does not tell."""


class Precision(StrEnum):
    """Precision class. fp32, fp16 and bf16 agree to a cosine of 0.9999 and share one class.

    The value is part of the fingerprint. What int8 vectors are depends on how they are rounded, so theirs names the
    recipe: the texts of ``chunkmill_workers.engine.encoder.calibration`` and the rules of ``int8`` beside it.
    Another recipe is another value; the old one then stays here so that its spaces stay readable. Users say and
    see ``int8``.
    """

    FLOAT = "float"
    INT8 = "int8-1"

    def __str__(self) -> str:
        return self.value.partition("-")[0]

    @classmethod
    def _missing_(cls, value: object) -> Precision | None:
        return cls.INT8 if value == "int8" else None


class OnLong(StrEnum):
    """What to do with a text longer than the space's ``max_tokens``."""

    TRUNCATE = "truncate"
    """Embed the first ``max_tokens`` tokens; count it and mark the vector."""
    REJECT = "reject"
    """Put the chunk into the job's dead list."""
    SPLIT = "split"
    """Embed overlapping windows of the text and pool their vectors, weighted by their tokens."""


class LongText(StrEnum):
    """How a space represents a long text. REJECT writes nothing, so it shares TRUNCATE's space.

    The value is part of the fingerprint, so it names the rule: another rule for windows is another value.
    """

    TRUNCATE = "truncate"
    SPLIT = "split-overlap-8"
    """As few windows as hold the text, each repeating an eighth of a window's room: ``chunkmill.domain.windows``."""
    SPLIT_APART = "split"
    """Windows without overlap: spaces of an earlier version. They stay readable, and no worker adds to them."""

    @property
    def policy(self) -> OnLong:
        """What an engine is told to do with a long text."""
        return OnLong.TRUNCATE if self is LongText.TRUNCATE else OnLong.SPLIT


def long_text_for(on_long: OnLong) -> LongText:
    """The representation that a policy writes."""
    return LongText.SPLIT if on_long is OnLong.SPLIT else LongText.TRUNCATE


@dataclass(frozen=True, slots=True)
class SpaceSpec:
    """One embedding space. ``fingerprint`` covers every field but ``model``, which is its label.

    A local model's ``revision`` is a digest of its files (``chunkmill.models``), so the same weights are the
    same space under any path or name, and other weights under the same name are another space.
    """

    provider: str
    model: str
    revision: str
    dimensions: int
    max_tokens: int
    pooling: Pooling
    normalize: bool
    document_prompt: str = ""
    query_prompt: str = ""
    long_text: LongText = LongText.TRUNCATE
    precision: Precision = Precision.FLOAT

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits: SHA-256 of the canonical JSON of all fields but ``model``."""
        fields = {name: value for name, value in asdict(self).items() if name != "model"}
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()
