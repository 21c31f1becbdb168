"""Formats of sentence-transformers beyond Transformer → Pooling → Dense: each gives the vectors that it gives there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors

from chunkmill_workers.engine import Engine

from .conftest import _wordpiece, libraries, reference, sample, save_transformer

# StaticEmbedding gives a text without any token a vector of zeros, which has no direction. Here it is a failure.
TEXTS = [text for text in sample(30) if text.strip()]


def st_modules() -> Any:
    return libraries()[0].sentence_transformer.modules


def base_modules() -> Any:
    import sentence_transformers.base.modules

    return sentence_transformers.base.modules


def save(folder: Path, modules: Sequence[Any], prompts: dict[str, str] | None = None) -> Path:
    model = libraries()[0].SentenceTransformer(modules=list(modules), device="cpu", prompts=prompts)
    model.save(str(folder), create_model_card=False)
    return folder


def encoder(folder: Path, pooling: Any = "mean", family: str = "bert", *, seed: int = 0, **options: Any) -> list[Any]:
    plain = save_transformer(folder, family, seed=seed)
    modules = st_modules()
    return [modules.Transformer(str(plain)), modules.Pooling(32, pooling_mode=pooling, **options)]


def norm(width: int) -> Any:
    """A LayerNorm that training has changed."""
    module = st_modules().LayerNorm(width)
    torch.manual_seed(3)
    torch.nn.init.normal_(module.norm.weight)
    torch.nn.init.normal_(module.norm.bias)
    return module


def dense(width: int, out: int, seed: int) -> Any:
    torch.manual_seed(seed)
    return st_modules().Dense(width, out, activation_function=torch.nn.Tanh())


def static_tokenizer() -> Any:
    """One that frames a text and pads, as those of BERT do: StaticEmbedding uses neither."""
    tokenizer = _wordpiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "[UNK]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding()
    return tokenizer


def static(width: int = 32, *, truncate: int | None = None, half: bool = False, direction: str = "right") -> Any:
    tokenizer = static_tokenizer()
    if truncate:
        tokenizer.enable_truncation(truncate, direction=direction)
    torch.manual_seed(2)
    table = torch.randn(tokenizer.get_vocab_size(), width)
    return st_modules().StaticEmbedding(tokenizer, embedding_weights=table.half() if half else table)


PROMPTS = {"query": "search for this: ", "document": "title: "}


def save_norm(folder: Path) -> Path:
    return save(folder / "saved", [*encoder(folder / "plain"), dense(32, 24, 1), norm(24), base_modules().Normalize()])


def save_concatenated(folder: Path) -> Path:
    poolings = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
    return save(folder / "saved", [*encoder(folder / "plain", poolings), norm(6 * 32)])


def save_concatenated_without_prompt(folder: Path) -> Path:
    modules = encoder(folder / "plain", ["mean", "weightedmean", "cls"], "mpnet", include_prompt=False)
    return save(folder / "saved", [*modules, dense(96, 16, 1)], PROMPTS)


def save_weighted(folder: Path) -> Path:
    return save(folder / "saved", encoder(folder / "plain", "weightedmean", "qwen3"), PROMPTS)


def save_weighted_without_prompt(folder: Path) -> Path:
    return save(folder / "saved", encoder(folder / "plain", "weightedmean", include_prompt=False), PROMPTS)


def save_static(folder: Path) -> Path:
    return save(folder / "saved", [static(), base_modules().Normalize()], PROMPTS)


def save_static_cut(folder: Path) -> Path:
    return save(folder / "saved", [static(truncate=12), dense(32, 20, 1), norm(20)])


def save_static_cut_left(folder: Path) -> Path:
    return save(folder / "saved", [static(truncate=12, direction="left")])


def save_model2vec(folder: Path) -> Path:
    """As model2vec saves a quantised vocabulary: fewer rows than tokens, and a factor for each token."""
    from safetensors.torch import save_file

    saved = save(folder / "saved", [static(), base_modules().Normalize()])
    inner = saved / "0_StaticEmbedding"
    inner = inner if inner.is_dir() else saved
    count = static_tokenizer().get_vocab_size()
    torch.manual_seed(4)
    tensors = {
        "embeddings": torch.randn(50, 32),
        "mapping": torch.randint(0, 50, (count,)),
        "weights": torch.rand(count, dtype=torch.float64),
    }
    save_file(tensors, str(inner / "model.safetensors"))
    return saved


def router(folder: Path, *more: Any, query: Sequence[Any], document: Sequence[Any], prompts: Any = PROMPTS) -> Path:
    sides = base_modules().Router.for_query_document(query_modules=list(query), document_modules=list(document))
    return save(folder, [sides, *more], prompts)


def save_router(folder: Path) -> Path:
    """Two encoders of different families, with different heads."""
    return router(
        folder / "saved",
        base_modules().Normalize(),
        query=[*encoder(folder / "q", "mean", "mpnet"), dense(32, 24, 1)],
        document=[*encoder(folder / "d", ["cls", "mean"]), dense(64, 24, 2), norm(24)],
    )


def save_static_router(folder: Path) -> Path:
    """A static model for queries, as the documentation of sentence-transformers proposes."""
    return router(
        folder / "saved",
        base_modules().Normalize(),
        query=[static()],
        document=encoder(folder / "d", "cls", "xlm-roberta"),
    )


def save_late_router(folder: Path) -> Path:
    """One encoder, and a Dense for each side: what Asym was made for."""
    sides = base_modules().Router.for_query_document(
        query_modules=[dense(32, 16, 1)], document_modules=[dense(32, 16, 2)]
    )
    return save(folder / "saved", [*encoder(folder / "plain"), sides, base_modules().Normalize()], PROMPTS)


def save_mapped_router(folder: Path) -> Path:
    sides = base_modules().Router(
        {"document": [static()], "small": encoder(folder / "q"), "text": encoder(folder / "d", "max", "mpnet")},
        route_mappings={("query", "text"): "small", ("document", None): "text"},
    )
    return save(folder / "saved", [sides])


FORMATS: dict[str, Callable[[Path], Path]] = {
    "layer-norm": save_norm,
    "concatenated": save_concatenated,
    "concatenated-prompt-excluded": save_concatenated_without_prompt,
    "weighted-mean": save_weighted,
    "weighted-mean-prompt-excluded": save_weighted_without_prompt,
    "static": save_static,
    "static-truncated": save_static_cut,
    "static-truncated-left": save_static_cut_left,
    "model2vec": save_model2vec,
    "router": save_router,
    "router-static-queries": save_static_router,
    "router-after-pooling": save_late_router,
    "router-with-mappings": save_mapped_router,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def build(name: str) -> Path:
        return FORMATS[name](tmp_path_factory.mktemp(name))

    return build


def load(model: Path | str, **options: Any) -> Engine:
    return Engine.load(str(model), device="cpu", dtype="fp32", batch_tokens=256, threads=1, **options)


def assert_equal(vectors: Any, wanted: Any) -> None:
    np.testing.assert_allclose(vectors, wanted, atol=1e-5 * max(1.0, float(np.abs(wanted).max())), rtol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_vectors_of_sentence_transformers(name: str, saved: Callable[[str], Path]) -> None:
    engine, expected = load(saved(name)), reference(saved(name))

    documents, queries = engine.embed(TEXTS), engine.embed(TEXTS, "query")

    assert_equal(documents.vectors, expected.encode_document(TEXTS))
    assert_equal(queries.vectors, expected.encode_query(TEXTS))
    assert engine.dimensions == expected.get_embedding_dimension() == documents.vectors.shape[1]
    alone = np.vstack([engine.embed([text]).vectors for text in TEXTS[:8]])
    np.testing.assert_allclose(documents.vectors[:8], alone, atol=1e-5 * max(1.0, float(np.abs(alone).max())), rtol=0)
    engine.close()
