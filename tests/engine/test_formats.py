"""Formats of sentence-transformers beyond Transformer → Pooling → Dense: each gives the vectors that it gives there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from tokenizers import processors

from chunkmill.domain.spaces import OnLong
from chunkmill.errors import InvalidSetting, ModelLoadError, TokenizerMismatch, UnknownModel
from chunkmill.models import resolve_model
from chunkmill.spaces.registry import Space
from chunkmill_workers.engine import Engine
from chunkmill_workers.engine.backends.export import export
from chunkmill_workers.local.canary import compare, embed_golden

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


def dense(width: int, out: int, seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    return st_modules().Dense(width, out, activation_function=torch.nn.Tanh(), **options)


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


def save_residual(folder: Path) -> Path:
    """Of the same size, and of another one; Dropout does nothing outside training."""
    layers = [dense(32, 32, 1, use_residual=True), st_modules().Dropout(), dense(32, 24, 2, use_residual=True)]
    return save(folder / "saved", [*encoder(folder / "plain"), *layers])


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
    "residual": save_residual,
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


def adapted(folder: Path, task: str, seed: int, **settings: Any) -> Path:
    """``folder`` with an adapter for ``task`` in the form of PEFT: two products of each layer, and the table."""
    from safetensors.torch import save_file

    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query", "dense"]} | settings
    torch.manual_seed(seed)
    prefix = "base_model.model."
    tensors = {
        f"{prefix}embeddings.word_embeddings.lora_embedding_A": 0.3 * torch.randn(4, vocabulary(folder)),
        f"{prefix}embeddings.word_embeddings.lora_embedding_B": 0.3 * torch.randn(32, 4),
    }
    for layer in range(2):
        for name, out, width in (("attention.self.query", 32, 32), ("output.dense", 32, 64)):
            tensors[f"{prefix}encoder.layer.{layer}.{name}.lora_A.weight"] = 0.3 * torch.randn(4, width)
            tensors[f"{prefix}encoder.layer.{layer}.{name}.lora_B.weight"] = 0.3 * torch.randn(out, 4)
    (folder / task).mkdir(parents=True)
    (folder / task / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, str(folder / task / "adapter_model.safetensors"))
    return folder


def vocabulary(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def with_adapter(folder: Path, task: str, scale: float) -> Any:
    """sentence-transformers on ``folder``, with what the adapter adds computed beside each layer, and not merged."""
    from safetensors.torch import load_file

    model = reference(folder)
    tensors = load_file(str(folder / task / "adapter_model.safetensors"))
    layers = dict(model[0].auto_model.named_modules())

    def beside(down: torch.Tensor, up: torch.Tensor, *, table: bool) -> Any:
        def add(_module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
            inner = down.T[given[0]] if table else given[0] @ down.T
            return out + scale * (inner @ up.T)

        return add

    for name, down in tensors.items():
        if "_A" not in name:
            continue
        layer = name.removeprefix("base_model.model.").partition(".lora_")[0]
        hook = beside(down, tensors[name.replace("_A", "_B")], table="embedding_A" in name)
        layers[layer].register_forward_hook(hook)
    return model


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    saved = save(folder / "saved", encoder(folder / "plain"))
    adapted(saved, "retrieval.passage", 5)
    return adapted(saved, "adapters/retrieval.query", 6, use_rslora=True)


def test_a_task_adds_its_adapter_to_the_weights(tasks: Path) -> None:
    engine, plain = load(f"{tasks}?task=retrieval.passage"), load(tasks)
    two = load(f"{tasks}?task=retrieval.passage&query_task=retrieval.query")

    passages = with_adapter(tasks, "retrieval.passage", 8 / 4).encode(TEXTS)
    queries = with_adapter(tasks, "adapters/retrieval.query", 8 / 2).encode(TEXTS)

    assert_equal(engine.embed(TEXTS).vectors, passages)
    assert_equal(engine.embed(TEXTS, "query").vectors, passages)
    assert_equal(two.embed(TEXTS).vectors, passages)
    assert_equal(two.embed(TEXTS, "query").vectors, queries)
    assert np.abs(passages - plain.embed(TEXTS).vectors).max() > 0.1, "the adapter changes nothing"
    specs = [engine_or_folder.spec for engine_or_folder in (engine, plain, two)]
    assert [(spec.task, spec.query_task) for spec in specs] == [
        ("retrieval.passage", ""), ("", ""), ("retrieval.passage", "retrieval.query")
    ]  # fmt: skip
    assert len({spec.fingerprint for spec in specs}) == 3


def test_other_weights_of_an_adapter_are_another_space(tasks: Path, tmp_path: Path) -> None:
    name = "?task=retrieval.passage"
    copy = Path(shutil.copytree(tasks, tmp_path / "copy"))
    before = resolve_model(str(copy)).spec.fingerprint
    assert resolve_model(f"{copy}{name}").spec.fingerprint == resolve_model(f"{tasks}{name}").spec.fingerprint
    shutil.rmtree(copy / "retrieval.passage")
    adapted(copy, "retrieval.passage", 7)

    assert resolve_model(f"{copy}{name}").spec.fingerprint != resolve_model(f"{tasks}{name}").spec.fingerprint
    assert resolve_model(str(copy)).spec.fingerprint == before, "a space without a task does not depend on adapters"


def test_a_table_that_is_saved_with_an_adapter_takes_the_place_of_the_models_own(tasks: Path, tmp_path: Path) -> None:
    """PEFT saves the table beside the matrices that change it, because it may have been trained, too."""
    from safetensors.torch import load_file, save_file

    trained, whole = (Path(shutil.copytree(tasks, tmp_path / name)) for name in ("trained", "whole"))
    file, own = trained / "retrieval.passage" / "adapter_model.safetensors", whole / "model.safetensors"
    weights = load_file(str(own))
    [name] = [name for name in weights if name.endswith("word_embeddings.weight")]
    table = weights[name].flip(0).contiguous()
    layer = "base_model.model.embeddings.word_embeddings.base_layer.weight"
    save_file(load_file(str(file)) | {layer: table}, str(file))
    save_file(weights | {name: table}, str(own), metadata={"format": "pt"})

    vectors = load(f"{trained}?task=retrieval.passage").embed(TEXTS).vectors

    assert_equal(vectors, with_adapter(whole, "retrieval.passage", 8 / 4).encode(TEXTS))


def test_an_adapter_of_another_model_is_refused_at_load(tasks: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(tasks, tmp_path / "copy"))
    file = str(copy / "retrieval.passage" / "adapter_model.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    for change, problem in (
        ({name: torch.randn(4, 48)}, "belong to another model"),
        ({name.replace("layer.0", "layer.9"): tensors[name].clone()}, "changes 'encoder.layer.9"),
    ):
        save_file(tensors | change, file)
        with pytest.raises(ModelLoadError, match=problem):
            load(f"{copy}?task=retrieval.passage")


def test_queries_may_go_to_another_model_of_the_same_space(tmp_path: Path) -> None:
    large = save(tmp_path / "large", [*encoder(tmp_path / "a", family="mpnet"), dense(32, 16, 1)], PROMPTS)
    small = save(tmp_path / "small", [static(16), base_modules().Normalize()], {"query": "q: ", "document": "d: "})
    name = f"{large}?query_model={quote(str(small))}"

    engine = load(name)

    assert_equal(engine.embed(TEXTS).vectors, reference(large).encode_document(TEXTS))
    assert_equal(engine.embed(TEXTS, "query").vectors, reference(small).encode_query(TEXTS))
    assert engine.spec.query_prompt == "q: "
    assert engine.spec.fingerprint != load(large).spec.fingerprint
    # A worker compares what its engine makes under another policy with the space, which a producer has read.
    split = resolve_model(name, on_long=OnLong.SPLIT).spec
    assert split.query_model == engine.spec.query_model != ""


def test_vectors_of_other_lengths_are_in_no_space_together(tmp_path: Path) -> None:
    large = save(tmp_path / "large", encoder(tmp_path / "a"))
    small = save(tmp_path / "small", [static(16)])

    with pytest.raises(UnknownModel, match=r"have 32 dimensions and those of the query_model .* have 16"):
        resolve_model(f"{large}?query_model={quote(str(small))}")
    with pytest.raises(UnknownModel, match="16 dimensions for documents and 32 for queries"):
        resolve_model(str(router(tmp_path / "r", query=encoder(tmp_path / "b"), document=[static(16)])))


@pytest.mark.parametrize(
    ("given", "query", "document"),
    [
        ("prompts=e5", "query: ", "passage: "),
        ("query_prompt=find:+", "find: ", "title: "),
        ("prompts=e5&document_prompt=", "query: ", ""),
        ("document_prompt_name=passage&query_prompt=%C3%9C%20", "Ü ", "a passage: "),
    ],
)
def test_prompts_may_be_given_by_the_name(given: str, query: str, document: str, tmp_path: Path) -> None:
    prompts = PROMPTS | {"passage": "a passage: "}
    folder = save(tmp_path / "saved", encoder(tmp_path / "plain"), prompts)

    engine, expected = load(f"{folder}?{given}"), reference(folder)

    assert_equal(engine.embed(TEXTS).vectors, expected.encode(TEXTS, prompt=document))
    assert_equal(engine.embed(TEXTS, "query").vectors, expected.encode(TEXTS, prompt=query))
    assert (engine.spec.query_prompt, engine.spec.document_prompt) == (query, document)
    assert engine.spec.model == f"{folder}?{given}", "a worker that is given the space finds the same model"


def test_a_static_model_reads_long_texts_to_their_end(saved: Callable[[str], Path]) -> None:
    texts = ["word and other words. " * 4_000, "a" * 70_000 + " end", TEXTS[0]]
    engine = load(saved("static"))

    result = engine.embed(texts)

    assert_equal(result.vectors, reference(saved("static")).encode_document(texts))
    assert not result.truncated.any()
    cut = load(saved("static-truncated")).embed(texts)
    assert cut.truncated.tolist() == [True, False, True], "the second text is one unknown word, and another one"
    assert_equal(cut.vectors, reference(saved("static-truncated")).encode_document(texts))


def test_a_text_without_a_token_has_no_vector_in_a_static_model(saved: Callable[[str], Path]) -> None:
    """sentence-transformers gives it zeros, whose cosine with everything is undefined."""
    [result] = [part for part in load(saved("model2vec")).stream([TEXTS[0], "  "]) if part.failures]

    assert [(failure.index, failure.code) for failure in result.failures] == [(1, "tokenize_failed")]


def test_a_table_without_a_row_for_each_token_is_refused_at_load(saved: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    copy = Path(shutil.copytree(saved("static"), tmp_path / "copy"))
    [file] = copy.rglob("model.safetensors")
    save_file({"embedding.weight": torch.randn(50, 32)}, str(file))

    with pytest.raises(TokenizerMismatch, match="the model knows 50 tokens"):
        load(copy)


@pytest.mark.parametrize("backend", ["onnx", "native", "transformers"])
def test_a_static_model_is_computed_in_one_way_whatever_other_models_need(
    backend: Any, saved: Callable[[str], Path]
) -> None:
    engine = Engine.load(str(saved("static")), device="cpu", dtype="bf16", backend=backend)

    assert (engine.backend, engine.dtype, engine.device) == ("static", "float32", "cpu")
    assert_equal(engine.embed(TEXTS[:5]).vectors, load(saved("static")).embed(TEXTS[:5]).vectors)


def test_what_an_export_cannot_hold_is_neither_exported_nor_run_from_one(
    tasks: Path, saved: Callable[[str], Path]
) -> None:
    """An export is found by the revision, which is the same for both sides of a Router."""
    for name, reason in (
        (f"{tasks}?task=retrieval.passage", "asks for the adapter of a task"),
        (f"{tasks}?query_task=retrieval.passage", "asks for the adapter of a task"),
        (str(saved("router")), "an encoder for queries and another one for documents"),
    ):
        with pytest.raises(InvalidSetting, match=f"backend onnx cannot run model .*{reason}"):
            load(name, backend="onnx")
        with pytest.raises(ModelLoadError, match=f"cannot be exported, because .*{reason}"):
            export(resolve_model(name), "onnx")
    with pytest.raises(ModelLoadError, match="StaticEmbedding, which has no graph"):
        export(resolve_model(str(saved("static"))), "openvino")


@pytest.mark.parametrize("side", ["document", "query"])
def test_the_canary_hears_both_sides_of_a_model(side: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    """A library that changes what it makes of queries alone would be heard by nobody else."""
    engine, drifting = load(saved("router")), load(saved("router"))
    space = Space(1, engine.spec, "vector")
    assert drifting._queries is not None
    changed = drifting._queries if side == "query" else drifting
    torch.manual_seed(9)
    weight = changed._head._inner[0].weight
    weight.mul_(1 + 0.1 * torch.randn_like(weight))

    reference = embed_golden(engine, space, "one")

    assert compare(embed_golden(load(saved("router")), space, "two"), reference).problem is None
    assert "similarity" in str(compare(embed_golden(drifting, space, "three"), reference).problem)


@pytest.mark.parametrize("name", ["router-after-pooling", "router"])
def test_the_sides_of_a_router_share_their_weights_if_these_are_the_same(
    name: str, saved: Callable[[str], Path]
) -> None:
    engine = load(saved(name))
    assert engine._queries is not None
    assert (engine._queries._backend is engine._backend) is (name == "router-after-pooling")
    assert {*engine.steps} == {
        f"a {step}{side}" for step in ("forward pass", "call of the tokenizer") for side in ("", " for queries")
    }
