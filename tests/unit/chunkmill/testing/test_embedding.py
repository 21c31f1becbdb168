"""The vectors of ``chunkmill.testing``."""

from __future__ import annotations

import hashlib

import numpy as np

from chunkmill.domain.spaces import LongText
from chunkmill.testing.embedding import MAX_TOKENS, MODELS, OTHER_MODEL, embed


def test_a_text_has_the_same_vector_on_every_machine() -> None:
    """A program may keep what its tests measured, so a change needs a new revision of the models."""
    signs = np.sign(embed(["the sea"])[0])
    assert hashlib.sha256(signs.astype("<i1").tobytes()).hexdigest()[:16] == "1ec64ba392fd6cb6"
    assert {spec.fingerprint[:12] for spec in MODELS.values()} == {"308eeca21474", "e2a326fad32a"}


def test_texts_that_share_words_are_near_each_other_and_no_two_are_equal() -> None:
    texts = ["A quick fox jumps over a dog", "the fox jumps", "jumps the fox", "The sea is deep", "!!!", "???"]
    vectors = embed(texts)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-6)
    near = vectors @ vectors.T
    assert near[0, 1] > 0.3 > near[0, 3]
    assert 0.9 < near[1, 2] < 0.999
    assert abs(near[4, 5]) < 0.5
    assert not np.allclose(embed(texts, model=OTHER_MODEL), vectors[:, :128], atol=0.1)


def test_a_long_text_is_cut_or_read_whole() -> None:
    head = " ".join(f"w{n}" for n in range(MAX_TOKENS))
    texts = [head, f"{head} end"]
    cut = embed(texts)
    assert cut[0] @ cut[1] > 0.98
    whole = embed(texts, long_text=LongText.SPLIT)
    assert whole[0] @ cut[0] > 0.999
    assert whole[1] @ embed(["end"])[0] > cut[1] @ embed(["end"])[0]
