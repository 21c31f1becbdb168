"""Model folders that are not whole: refused before anything is loaded or written, each with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chunkmill.errors import UnknownModel
from chunkmill.models import resolve_spec
from tests.unit.chunkmill.models.test_models import BERT, sentence_folder, weights


def lying(data: int) -> bytes:
    """A safetensors file whose header states 1,000 bytes of data and which holds ``data``."""
    return weights()[: len(weights()) - 1000] + bytes(data)


def embeddings(rows: int, width: int) -> bytes:
    """A safetensors file of one byte an element, with the token embeddings of a model."""
    end = rows * width
    header = json.dumps({"bert.embeddings.word_embeddings.weight": _tensor([rows, width], end)}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(end)


def _tensor(shape: list[int], end: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": shape, "data_offsets": [0, end]}


SHARDED = {"weight_map": {"a": "one.safetensors"}}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.safetensors": lying(999)}, r"model\.safetensors holds 999 bytes .* states 1,000: copy"),
        ({"model.safetensors": lying(1001)}, r"model\.safetensors holds 1,001 bytes"),
        ({"model.safetensors": weights()[:20]}, r"model\.safetensors .*cut off in its header: copy"),
        ({"model.safetensors": b""}, r"model\.safetensors .*cut off"),
        ({"model.safetensors": b"<html>502 Bad Gateway</html>" * 9}, r"model\.safetensors is not a safetensors file"),
        ({"model.safetensors": (4).to_bytes(8, "little") + b"[{}]"}, "its header cannot be read"),
        ({"model.safetensors": (2).to_bytes(8, "little") + b"{x"}, "its header cannot be read"),
        ({"model.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"}, "LFS.*git lfs pull"),
        ({"model.safetensors.index.json": b"{"}, r"index\.json is not JSON"),
        ({"model.safetensors.index.json": {}}, r"index\.json has no weight_map.*copy"),
        ({"model.safetensors.index.json": {"weight_map": {"a": "../one.safetensors"}}}, "not a file beside it"),
        ({"model.safetensors.index.json": SHARDED}, r"lacks one\.safetensors, listed in model\.safetensors\.index"),
        ({"config.json": []}, r"config\.json does not hold a JSON object: copy"),
        ({"config.json": b"\xff\xfe"}, r"config\.json is not JSON"),
        ({"config.json": BERT | {"vocab_size": 40}, "model.safetensors": embeddings(30, 8)}, "states 40 × 8"),
        ({"config.json": BERT | {"vocab_size": 30}, "model.safetensors": embeddings(30, 16)}, "16, .*30 × 8"),
        ({"modules.json": {"a": 1}}, r"modules\.json is not a list of modules"),
        ({"modules.json": [{"path": ""}]}, r"modules\.json is not a list of modules"),
        ({"1_Pooling/config.json": b""}, r"1_Pooling/config\.json is not JSON"),
        ({"1_Pooling/config.json": "mean"}, r"1_Pooling/config\.json does not hold a JSON object"),
        ({"tokenizer_config.json": [], "sentence_bert_config.json": {}}, r"tokenizer_config\.json does not hold a"),
        ({"config_sentence_transformers.json": {"prompts": ["q"]}}, "prompts or a truncate_dim of an unknown form"),
    ],
)  # fmt: skip
def test_a_broken_folder_names_the_file_the_problem_and_what_to_do(
    tmp_path: Path, files: dict[str, Any], message: str
) -> None:
    folder = sentence_folder(tmp_path, **files)
    if "model.safetensors.index.json" in files:
        (folder / "model.safetensors").unlink()

    with pytest.raises(UnknownModel, match=message):
        resolve_spec(str(folder))


def test_missing_files_are_named(tmp_path: Path) -> None:
    for gone, message in {
        "tokenizer.json": r"has no tokenizer\.json .*save_pretrained",
        "config.json": r"has no config\.json",
        "model.safetensors": r"has no model\.safetensors: copy",
        "1_Pooling/config.json": r"1_Pooling/config\.json cannot be read",
    }.items():
        folder = sentence_folder(tmp_path / gone)
        (folder / gone).unlink()
        with pytest.raises(UnknownModel, match=message):
            resolve_spec(str(folder))


def test_a_dense_module_without_its_shape(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"2_Dense/config\.json does not state in_features"):
        resolve_spec(str(sentence_folder(tmp_path, ("Dense", {"in_features": 8}))))


def test_a_dense_module_of_another_width(tmp_path: Path) -> None:
    layers = [("Dense", {"in_features": width, "out_features": 4}) for width in (8, 8)]

    with pytest.raises(UnknownModel, match=r"3_Dense/config\.json takes 8 dimensions and gets 4: copy"):
        resolve_spec(str(sentence_folder(tmp_path, *layers)))


def test_embeddings_that_fit_are_no_mismatch(tmp_path: Path) -> None:
    config = BERT | {"vocab_size": 30, "embedding_size": 4}
    for width in (8, 4):  # ALBERT's kind has narrower embeddings than its layers
        files = {"config.json": config, "model.safetensors": embeddings(30, width)}
        assert resolve_spec(str(sentence_folder(tmp_path / str(width), **files))).dimensions == 8
