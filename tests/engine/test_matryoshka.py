"""A space's cut vectors are sentence-transformers' own with ``truncate_dim``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from chunkmill.domain.spaces import OnLong
from chunkmill.models import resolve_model
from chunkmill_workers.engine import Engine
from chunkmill_workers.engine.matryoshka import shorten

from .conftest import libraries, sample


@pytest.mark.parametrize("name", ["bert-mean", "mpnet-dense", "nomic-sqrt", "qwen3-last"])
def test_cut_vectors_are_those_of_truncate_dim(
    name: str, toy_engine: Callable[[str], Engine], toy_path: Callable[[str], Path]
) -> None:
    engine, texts = toy_engine(name), sample(12)
    model = libraries()[0].SentenceTransformer(
        str(toy_path(name)), device="cpu", local_files_only=True, truncate_dim=10
    )
    normalize = engine.spec.normalize

    full = engine.embed(texts).vectors
    queries = engine.embed(texts, "query").vectors

    for ours, theirs in ((full, model.encode_document), (queries, model.encode_query)):
        expected = theirs(texts, normalize_embeddings=normalize)
        cut = shorten(ours, 10, normalize=normalize)
        assert cut.shape == expected.shape == (len(texts), 10)
        np.testing.assert_allclose(cut, expected, atol=1e-5 * max(1.0, float(np.abs(expected).max())), rtol=0)


def test_the_cut_of_a_split_text_is_the_cut_of_its_pooled_windows(toy_engine: Callable[[str], Engine]) -> None:
    engine = toy_engine("bert-mean")
    text = sample(1)[0]

    full = engine.embed([text], on_long=OnLong.SPLIT).vectors

    assert not np.allclose(full, engine.embed([text]).vectors, atol=1e-3)
    first = full[0, :10].astype(np.float64)
    np.testing.assert_allclose(shorten(full, 10, normalize=True)[0], first / np.linalg.norm(first), atol=1e-6)


def test_a_folder_saved_with_truncate_dim_has_that_space(toy_path: Callable[[str], Path], tmp_path: Path) -> None:
    model = libraries()[0].SentenceTransformer(
        str(toy_path("bert-mean")), device="cpu", local_files_only=True, truncate_dim=12
    )
    model.save(str(tmp_path / "cut"), create_model_card=False)
    texts = sample(3)

    folder = resolve_model(str(tmp_path / "cut"))
    space = folder.space()
    engine = Engine.load(folder, device="cpu", dtype="fp32")

    assert (space.dimensions, engine.dimensions) == (12, 32)
    expected = (
        libraries()[0]
        .SentenceTransformer(str(tmp_path / "cut"), device="cpu", local_files_only=True)
        .encode_document(texts, normalize_embeddings=True)
    )
    cut = shorten(engine.embed(texts).vectors, space.dimensions, normalize=space.normalize)
    np.testing.assert_allclose(cut, expected, atol=1e-5)
