"""What the name of a model may say beside which model it is, and the folders that need it. No torch."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from chunkmill.domain.spaces import OnLong, Pooling, Precision
from chunkmill.domain.trust import Trust
from chunkmill.errors import InvalidInput, UnknownModel
from chunkmill.models import DEFAULT_MODEL, DEFAULT_SPEC, resolve_model, resolve_spec

from .test_models import BERT, module, sentence_folder, weights, write


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "is not of the form key=value&key=value"),
        ("prompts", "is not of the form key=value"),
        ("prompt=e5", "'prompt' behind the [?] is unknown or is there twice; the keys are prompts, query_prompt"),
        ("prompts=e5&prompts=bge", "'prompts' behind the [?] is unknown or is there twice"),
        ("prompts=e6", "prompts=e6 does not exist; it is one of bge, e5"),
        ("query_prompt_name=sts", "has no prompt called 'sts'; it has passage, query"),
        ("query_prompt=a&query_prompt_name=query", "both state the prompt of a query"),
        ("task=../../etc", "is not the name of a folder"),
        ("task=..", "is not the name of a folder"),
        ("query_task=/etc", "is not the name of a folder"),
        ("task=sts", "has no adapter called 'sts'; its adapters are classification, retrieval"),
        ("query_model=a&query_task=retrieval", "leave one out"),
        ("query_model=a&query_prompt_name=query", "state it in the name of that model"),
        ("query_model=a%3Fquery_model%3Db", "cannot have a query_model of its own"),
        ("query_model=nowhere", "model 'nowhere' is not a folder on this machine"),
        ("query_model=./nowhere", r"model './nowhere' is not a folder on this machine.*: check the path$"),
        ("query_model=../no/where", r"model '../no/where' is not a folder on this machine.*: check the path$"),
        ("pooling=cls", "states mean pooling"),
        ("&".join(f"k{n}=1" for n in range(50)), "with at most"),
    ],
)
def test_what_a_name_may_not_say_is_refused_with_what_it_may(tmp_path: Path, given: str, message: str) -> None:
    files = {
        "config_sentence_transformers.json": {"prompts": {"query": "q: ", "passage": "p: "}},
        "retrieval/adapter_config.json": {},
        "adapters/classification/adapter_config.json": {},
    }
    folder = sentence_folder(tmp_path, **files)

    with pytest.raises(UnknownModel, match=message):
        resolve_spec(f"{folder}?{given}")


def test_a_prompt_may_be_longer_than_a_files_name(tmp_path: Path) -> None:
    prompt = "Instruct: " + "find it " * 100

    assert resolve_spec(f"{sentence_folder(tmp_path)}?query_prompt={quote(prompt)}").query_prompt == prompt


def test_a_folder_may_have_a_question_mark_in_its_name(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "who?")

    assert resolve_spec(str(folder)).document_prompt == ""


def test_a_name_keeps_what_it_says_and_is_trusted_as_the_model_alone(tmp_path: Path) -> None:
    folder = str(sentence_folder(tmp_path))

    spec = resolve_spec(f"{folder}?prompts=e5", dimensions=4, trust=Trust(matryoshka={folder}))

    assert (spec.model, spec.query_prompt, spec.document_prompt) == (f"{folder}?prompts=e5", "query: ", "passage: ")
    assert spec.dimensions == 4
    assert spec.revision == resolve_spec(folder).revision
    assert spec.fingerprint != resolve_spec(folder).fingerprint
    with pytest.raises(InvalidInput, match="Matryoshka"):
        resolve_spec(f"{folder}?prompts=e5", dimensions=4, trust=Trust(matryoshka={"another"}))


def test_a_producer_without_the_package_knows_the_default_space_with_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{DEFAULT_MODEL}?prompts=e5"
    of_the_folder = resolve_spec(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    assert resolve_spec(name) == resolve_spec(f"sentence-transformers/{name}") == of_the_folder
    assert of_the_folder.query_prompt == "query: "
    assert resolve_spec(DEFAULT_MODEL) == DEFAULT_SPEC
    with pytest.raises(UnknownModel, match="worker"):
        resolve_spec(f"{DEFAULT_MODEL}?task=retrieval")


def test_a_plain_folder_may_be_told_its_pooling_by_its_name(tmp_path: Path) -> None:
    folder = write(tmp_path, {"config.json": BERT, "tokenizer.json": {}, "model.safetensors": weights()})

    assert resolve_spec(f"{folder}?pooling=cls", pooling="mean").pooling is Pooling.CLS
    joined = resolve_spec(f"{folder}?pooling=cls%2Bmean")
    assert (joined.pooling, joined.dimensions) == ("cls+mean", 16)
    with pytest.raises(UnknownModel, match="joined by"):
        resolve_spec(f"{folder}?pooling=cls%2Bmedian")


LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def tensors(*names: str) -> bytes:
    listed = {name: {"dtype": "U8", "shape": [4], "data_offsets": [4 * n, 4 * n + 4]} for n, name in enumerate(names)}
    header = json.dumps(listed).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4 * len(names))


@pytest.mark.parametrize(
    ("config", "content", "message"),
    [
        ({"peft_type": "IA3"}, b"", "an adapter of type IA3"),
        (LORA | {"use_dora": True}, b"", "use_dora in .*adapter_config.json"),
        (LORA | {"bias": "all"}, b"", "bias in"),
        (LORA | {"modules_to_save": ["pooler"]}, b"", "modules_to_save in"),
        (LORA | {"rank_pattern": {"query": 8}}, b"", "rank_pattern in"),
        (LORA | {"init_lora_weights": "pissa"}, b"", "init_lora_weights in"),
        (LORA | {"kasa_config": {}}, b"", "kasa_config in"),
        (LORA | {"r": 0}, b"", "does not state r and lora_alpha"),
        (LORA, b"", "has no adapter_model.safetensors"),
        (LORA, tensors("a.lora_A.weight", "a.lora_magnitude_vector"), "a.lora_magnitude_vector .* is no LoRA matrix"),
        (LORA, tensors("a.lora_A.weight")[:-1], "holds 3 bytes of tensors"),
    ],
)
def test_an_adapter_that_cannot_be_added_is_refused_before_weights_are_loaded(
    tmp_path: Path, config: dict[str, Any], content: bytes, message: str
) -> None:
    files: dict[str, Any] = {"retrieval/adapter_config.json": config}
    folder = sentence_folder(tmp_path, **files, **({"retrieval/adapter_model.safetensors": content} if content else {}))

    with pytest.raises(UnknownModel, match=message):
        resolve_spec(f"{folder}?task=retrieval")


def router_folder(folder: Path, structure: Any, **changed: Any) -> Path:
    types = {"a": "sentence_transformers.models.Transformer", "b": "sentence_transformers.models.Pooling"}
    files = {f"0_Router/a/{name}": content for name, content in _encoder().items()}
    files["0_Router/b/config.json"] = {"pooling_mode": "cls"}
    files["0_Router/router_config.json"] = {"types": types, "structure": structure, "parameters": {}} | changed
    return write(folder, {"modules.json": [module("Router", "0_Router")]} | files)


def _encoder() -> dict[str, Any]:
    return {
        "config.json": BERT,
        "tokenizer.json": {},
        "tokenizer_config.json": {"model_max_length": 512},
        "model.safetensors": weights(),
    }


BOTH = {"document": ["a", "b"], "query": ["a", "b"]}


def test_a_router_whose_sides_are_the_same_is_one_model(tmp_path: Path) -> None:
    folder = resolve_model(str(router_folder(tmp_path, BOTH)))

    assert folder.query is None
    assert folder.spec.pooling is Pooling.CLS


def test_the_routes_are_part_of_the_revision(tmp_path: Path) -> None:
    one, other = (
        resolve_spec(str(router_folder(tmp_path / str(n), BOTH, parameters={"default_route": side}))).revision
        for n, side in enumerate(BOTH)
    )
    assert one != other


@pytest.mark.parametrize(
    ("structure", "changed", "message"),
    [
        ({"query": ["a", "b"]}, {}, "a Router without a route for document .it has query"),
        (BOTH | {"query": ["a", "c"]}, {}, "names a module of which it does not state the type"),
        (BOTH | {"query": ["b", "a"]}, {}, "modules Pooling → Transformer; they must begin with"),
        (BOTH | {"query": []}, {}, "modules ; they must begin with"),
        (BOTH, {"parameters": {"route_mappings": {"('query', None)": "gone"}}}, "to a route that does not exist"),
        (BOTH, {"types": []}, "does not map routes to modules"),
        (BOTH, {"types": {"a": "sentence_transformers.models.Asym", "b": ""}}, "a Router inside a Router"),
        (BOTH, {"types": {"a": "own.Transformer", "b": ""}}, "own.Transformer: it is code"),
        ({"document": ["../../x"], "query": ["../../x"]}, {
            "types": {"../../x": "sentence_transformers.models.Transformer"}}, "it is not inside the folder"),
    ],
)  # fmt: skip
def test_a_router_that_leads_nowhere_is_refused(
    tmp_path: Path, structure: Any, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnknownModel, match=message):
        resolve_spec(str(router_folder(tmp_path, structure, **changed)))


def static_folder(folder: Path, **files: Any) -> Path:
    table = json.dumps({"embedding.weight": {"dtype": "F32", "shape": [5, 4], "data_offsets": [0, 80]}}).encode()
    content = {
        "modules.json": [module("StaticEmbedding", "")],
        "tokenizer.json": {"truncation": None},
        "model.safetensors": len(table).to_bytes(8, "little") + table + bytes(80),
    }
    return write(folder, content | files)


def test_a_static_folder_states_its_dimensions_and_its_limit(tmp_path: Path) -> None:
    free, cut = static_folder(tmp_path / "a"), static_folder(tmp_path / "b", **{
        "tokenizer.json": {"truncation": {"max_length": 512}}})  # fmt: skip

    assert resolve_spec(str(free)).dimensions == 4
    assert [resolve_spec(str(folder)).max_tokens for folder in (free, cut)] == [2**20, 512]
    assert resolve_spec(str(free), on_long=OnLong.SPLIT).max_tokens == 2**20


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": {"truncation": {"max_length": "512"}}}, "has a truncation without a max_length"),
        ({"tokenizer.json": b"{"}, "is not JSON"),
        ({"model.safetensors": weights()}, "has no table of token vectors"),
    ],
)
def test_a_static_folder_that_is_not_whole_is_refused(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownModel, match=message):
        resolve_spec(str(static_folder(tmp_path, **files)))


def test_what_a_static_model_has_not_is_not_asked_of_it(tmp_path: Path) -> None:
    folder = static_folder(tmp_path)

    with pytest.raises(UnknownModel, match="StaticEmbedding, which has no matrix products, in precision int8"):
        resolve_spec(str(folder), precision=Precision.INT8)
    with pytest.raises(UnknownModel, match="is an adapter of a transformer, and the model has none"):
        resolve_spec(f"{folder}?task=retrieval")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnknownModel, match="whose table is a pickle"):
        resolve_spec(str(folder))


def test_a_model2vec_folder_without_modules_says_how_to_save_it(tmp_path: Path) -> None:
    folder = write(tmp_path, {"config.json": {"model_type": "model2vec"}, "tokenizer.json": {}})

    with pytest.raises(UnknownModel, match=r"StaticEmbedding\.from_model2vec"):
        resolve_spec(str(folder), pooling="mean")


def test_a_query_model_is_in_the_fingerprint_and_its_documents_are_not(tmp_path: Path) -> None:
    large = sentence_folder(tmp_path / "large")
    prompts = [{"query": "q: "}, {"query": "q: ", "document": "d: "}, {"query": "other: "}]
    small = [
        sentence_folder(tmp_path / str(n), **{"config_sentence_transformers.json": {"prompts": given}})
        for n, given in enumerate(prompts)
    ]

    alone, first, second, third = (
        resolve_spec(f"{large}?query_model={quote(str(folder))}" if folder else str(large)) for folder in (None, *small)
    )

    assert first.query_prompt == "q: "
    assert first.fingerprint == second.fingerprint
    assert len({alone.fingerprint, first.fingerprint, third.fingerprint}) == 3
