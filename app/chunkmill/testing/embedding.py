"""Vectors for tests: the same for the same text on every machine, and near each other for texts that share words.

Each word has a vector of signs, made from its digest, and a text has the sum of its words' vectors (feature hashing,
Weinberger et al. 2009). Nothing is learnt, so "car" is not nearer to "automobile" than to "moon".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from chunkmill.domain.spaces import LongText, Pooling, SpaceSpec

MODEL = "chunkmill-testing"
OTHER_MODEL = "chunkmill-testing-other"
"""A second model, for tests of what moves from one model to another."""
DIMENSIONS = 256
OTHER_DIMENSIONS = 128
MAX_TOKENS = 256
"""How many words are read of a text. Each counts as a token."""
OWN_PART = 0.1
"""How much the text as a whole counts beside its words, so that two texts of the same words differ."""

_WORD = re.compile(r"\w+")


def _spec(model: str, dimensions: int) -> SpaceSpec:
    revision = "sha256:" + hashlib.sha256(f"chunkmill.testing 1 {model}".encode()).hexdigest()
    return SpaceSpec("local", model, revision, dimensions, MAX_TOKENS, Pooling.MEAN, normalize=True)


MODELS = {MODEL: _spec(MODEL, DIMENSIONS), OTHER_MODEL: _spec(OTHER_MODEL, OTHER_DIMENSIONS)}
"""The models that the worker of the tests serves, with their spaces."""


def words_of(text: str) -> list[str]:
    """The words of a text in lower case. One without any is one word."""
    return _WORD.findall(text.lower()) or [text]


def embed(texts: Sequence[str], *, model: str = MODEL, long_text: LongText = LongText.TRUNCATE) -> NDArray[np.float32]:
    """The vectors of texts, ``(n, dimensions)`` float32 of length 1: those that the worker of the tests writes.

    Of a longer text the first 256 words are read, or all of them if long texts are split.
    """
    dimensions = MODELS[model].dimensions
    vectors = np.zeros((len(texts), dimensions), np.float32)
    for row, text in enumerate(texts):
        words = words_of(text)
        for word in words if long_text is LongText.SPLIT else words[:MAX_TOKENS]:
            vectors[row] += _signs(word, model, dimensions)
        vectors[row] /= np.linalg.norm(vectors[row]) or 1.0
        vectors[row] += OWN_PART * _signs(f"\0{text}", model, dimensions) / np.sqrt(dimensions)
        vectors[row] /= np.linalg.norm(vectors[row])
    return vectors


@lru_cache(maxsize=10_000)
def _signs(word: str, model: str, dimensions: int) -> NDArray[np.float32]:
    """``(dimensions,)`` of 1 and -1."""
    digest = hashlib.blake2b(word.encode(), digest_size=dimensions // 8, key=model.encode()).digest()
    bits = np.unpackbits(np.frombuffer(digest, np.uint8))
    return bits.astype(np.float32) * 2 - 1
