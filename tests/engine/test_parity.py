"""Promise 6: a text's vector is sentence-transformers' on the same weights, whoever its neighbours are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from chunkmill.models import resolve_model
from chunkmill_workers.engine import Engine

from .conftest import TOYS, reference, sample, save_transformer


def cosine(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    a, b = left.astype(np.float64), right.astype(np.float64)
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


@pytest.fixture(scope="session")
def minilm_reference() -> Any:
    return reference(resolve_model("all-MiniLM-L6-v2").path)


def test_the_default_model_gives_the_vectors_of_sentence_transformers(minilm: Engine, minilm_reference: Any) -> None:
    texts = sample(60)

    result = minilm.embed(texts)

    np.testing.assert_allclose(result.vectors, minilm_reference.encode_document(texts), atol=1e-5, rtol=0)
    assert result.truncated.any()
    assert not result.truncated.all()
    assert result.vectors.dtype == np.float32
    assert result.vectors.flags.c_contiguous
    assert np.asarray(result).shape == (len(texts), minilm.dimensions)


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("kind", ["document", "query"])
def test_every_family_gives_the_vectors_of_sentence_transformers(
    name: str, kind: str, toy_path: Callable[[str], Path], toy_engine: Callable[[str], Engine]
) -> None:
    texts = sample(40)
    engine = toy_engine(name)
    expected = reference(toy_path(name))

    result = engine.embed(texts, "query" if kind == "query" else "document")

    encode = expected.encode_query if kind == "query" else expected.encode_document
    wanted = encode(texts)
    # Poolings that do not divide by the number of tokens give numbers up to 8, and fp32 has seven digits.
    np.testing.assert_allclose(result.vectors, wanted, atol=1e-5 * max(1.0, float(np.abs(wanted).max())), rtol=0)
    assert result.truncated.any(), "no text reached the limit"
    assert engine.max_tokens == expected.max_seq_length
    assert engine.dimensions == result.vectors.shape[1]


@pytest.mark.parametrize("name", [*TOYS, "all-MiniLM-L6-v2"])
def test_an_empty_text_has_the_vector_that_sentence_transformers_gives_it(
    name: str, minilm: Engine, toy_path: Callable[[str], Path], toy_engine: Callable[[str], Engine]
) -> None:
    is_toy = name in TOYS
    engine = toy_engine(name) if is_toy else minilm
    texts = ["", " ", "\n\t", "a"]

    result = engine.embed(texts)

    expected = reference(toy_path(name) if is_toy else resolve_model(name).path).encode_document(texts)
    np.testing.assert_allclose(result.vectors, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [*TOYS, "all-MiniLM-L6-v2"])
def test_alone_equals_in_a_batch(name: str, minilm: Engine, toy_engine: Callable[[str], Engine]) -> None:
    engine = toy_engine(name) if name in TOYS else minilm
    texts = sample(25)

    together = engine.embed(texts)
    alone = np.vstack([engine.embed([text]).vectors for text in texts])

    assert together.timings.token_batches < len(texts), "no two texts shared a forward pass"
    np.testing.assert_allclose(together.vectors, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name",
    ["bert-mean", "xlm-roberta-cls", "mpnet-dense", "nomic-sqrt", "modernbert-max", "qwen3-last", "all-MiniLM-L6-v2"],
)
def test_bf16_stays_within_its_gate(name: str, minilm: Engine, toy_path: Callable[[str], Path]) -> None:
    path = str(toy_path(name)) if name in TOYS else name
    half = Engine.load(path, device="cpu", dtype="bf16", batch_tokens=512)
    texts = sample(25)

    together = half.embed(texts).vectors
    alone = np.vstack([half.embed([text]).vectors for text in texts])

    assert half.dtype == "bfloat16"
    assert cosine(together, alone).min() >= 0.9999
    if name not in TOYS:  # random weights of initializer range 0.3 are no measure of bf16
        assert cosine(together, minilm.embed(texts).vectors).min() >= 0.9999


def test_a_plain_transformers_folder_is_pooled_as_asked_and_normalised(tmp_path: Path) -> None:
    folder = save_transformer(tmp_path / "plain", "bert")
    with_cls = Engine.load(str(folder), device="cpu", dtype="fp32", pooling="cls")
    with_mean = Engine.load(str(folder), device="cpu", dtype="fp32", pooling="mean")
    texts = sample(10)

    expected = reference(folder)  # sentence-transformers adds mean pooling, and no Normalize
    mean = expected.encode(texts, normalize_embeddings=True)

    np.testing.assert_allclose(with_mean.embed(texts).vectors, mean, atol=1e-5, rtol=0)
    assert not np.allclose(with_cls.embed(texts).vectors, mean, atol=1e-2)
    assert with_cls.spec.fingerprint != with_mean.spec.fingerprint


def test_texts_are_lower_cased_where_the_folder_says_so(toy_path: Callable[[str], Path]) -> None:
    import json
    import shutil

    source = toy_path("modernbert-max")
    folder = source.parent / "lower"
    shutil.copytree(source, folder)
    file = folder / "sentence_bert_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_lower_case": True}))
    texts = ["Some UPPER case Words", *sample(5)]

    vectors = Engine.load(str(folder), device="cpu", dtype="fp32").embed(texts).vectors

    np.testing.assert_allclose(vectors, reference(folder).encode_document(texts), atol=1e-5, rtol=0)


def test_no_texts_give_an_empty_matrix(minilm: Engine) -> None:
    assert minilm.embed([]).vectors.shape == (0, 384)
