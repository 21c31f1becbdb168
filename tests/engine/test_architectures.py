"""Promise 6 for the architectures that run through transformers: the vectors are those of sentence-transformers.

Each has small random weights, saved by sentence-transformers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from chunkmill.errors import UnknownModel
from chunkmill.models import resolve_model
from chunkmill_workers.engine import Engine

from .conftest import Toy, libraries, reference, sample, save_toy

ARCHITECTURES = {
    # As sentence-t5 and gtr: mean pooling, a Dense module, Normalize.
    "t5": Toy("t5", dense="Identity"),
    "deberta": Toy("deberta"),
    "eurobert": Toy("eurobert", prompts=(("query", "Query: "), ("document", "Document: "))),
    "gte": Toy("gte", "cls"),
    "jina-v3": Toy("jina-v3"),
    "embedding-gemma2": Toy("embedding-gemma2", width=48),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def build(name: str) -> Path:
        return save_toy(tmp_path_factory.mktemp(name), ARCHITECTURES[name])

    return build


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_vectors_are_those_of_sentence_transformers(name: str, saved: Callable[[str], Path]) -> None:
    folder, texts = saved(name), sample(12)
    engine = Engine.load(str(folder), device="cpu", dtype="fp32", batch_tokens=256)
    expected = reference(folder)

    for kind, encode in (("document", expected.encode_document), ("query", expected.encode_query)):
        result = engine.embed(texts, kind)  # type: ignore[arg-type]
        np.testing.assert_allclose(result.vectors, encode(texts), atol=1e-5, rtol=0)
    assert engine.dimensions == result.vectors.shape[1]
    alone = np.vstack([engine.embed([text], "query").vectors for text in texts])
    np.testing.assert_allclose(result.vectors, alone, atol=1e-5, rtol=0)
    assert result.truncated.any(), "no text reached the limit"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_runs_in_half_precision(name: str, saved: Callable[[str], Path]) -> None:
    folder, texts = str(saved(name)), sample(12)

    half = Engine.load(folder, device="cpu", dtype="bf16", threads=1)

    assert half.dtype == "bfloat16"
    exact = Engine.load(folder, device="cpu", dtype="fp32").embed(texts).vectors.astype(np.float64)
    vectors = half.embed(texts).vectors.astype(np.float64)
    cosines = (vectors * exact).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(exact, axis=1)
    assert cosines.min() >= 0.999  # wide random weights lose more than those of trained models


@pytest.mark.parametrize("name", ["eurobert", "gte", "jina-v3", "embedding-gemma2"])
def test_code_in_the_folder_is_not_needed_if_transformers_has_the_architecture(
    name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved(name), tmp_path / "model"))
    _change(folder / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('this code must not run')")

    vectors = Engine.load(str(folder), device="cpu", dtype="fp32").embed(["a text"]).vectors

    np.testing.assert_array_equal(
        vectors, Engine.load(str(saved(name)), device="cpu", dtype="fp32").embed(["a text"]).vectors
    )


def test_a_folder_with_gtes_own_code_is_refused_and_the_built_in_one_is_named(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved("gte"), tmp_path / "model"))
    _change(folder / "config.json", model_type="new", auto_map={"AutoModel": "Alibaba-NLP/new-impl--modeling.NewModel"})

    with pytest.raises(UnknownModel, match=r"built in under the name gte.*gte-multilingual-base"):
        resolve_model(str(folder))


def test_a_folder_with_the_whole_of_t5_gives_the_vectors_of_its_encoder(tmp_path: Path) -> None:
    """The hub's sentence-t5 states an encoder with a decoder, and some copies hold the decoder's weights."""
    saved = save_toy(tmp_path, ARCHITECTURES["t5"])
    expected = Engine.load(str(saved), device="cpu", dtype="fp32").embed(["one text", "and another"]).vectors
    _, transformers = libraries()
    whole = transformers.T5Model(transformers.T5Config.from_pretrained(str(saved), is_encoder_decoder=True))
    tensors = {
        **{key: value.contiguous().clone() for key, value in whole.state_dict().items() if key.startswith("decoder.")},
        **load_file(saved / "model.safetensors"),
    }
    tensors.pop("decoder.embed_tokens.weight", None)
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    _change(saved / "config.json", is_encoder_decoder=True, architectures=["T5ForConditionalGeneration"])

    engine = Engine.load(str(saved), device="cpu", dtype="fp32")

    np.testing.assert_allclose(engine.embed(["one text", "and another"]).vectors, expected, atol=1e-6)


def _change(file: Path, **entries: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
