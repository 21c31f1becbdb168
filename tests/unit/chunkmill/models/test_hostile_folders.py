"""Model folders that were made to harm: each is refused by an error that names it, soon and with little memory."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chunkmill.errors import UnknownModel
from chunkmill.models import resolve_spec
from chunkmill.models.digest import revision
from tests.unit.chunkmill.models.test_models import BERT, sentence_folder, weights

DEEP = b"[" * 200_000
HEADER_BYTES = 16_000_000


def header(tensors: Any, data: int = 0) -> bytes:
    raw = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(data)


def tensor(begin: int, end: int, **changes: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]} | changes


@pytest.mark.parametrize("file", ["config.json", "modules.json", "tokenizer_config.json", "1_Pooling/config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (DEEP, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"hidden_size": ' + b"9" * 100_000 + b"}", "is not JSON"),
        (b"{" + b" " * (17 * 1024 * 1024), "longer than 16,777,216 bytes"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b"NaN", "does not|is not a list"),
    ],
    ids=["brackets", "objects", "digits", "blanks", "mark", "nan"],
)
def test_json_that_cannot_be_read_is_an_error(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    folder = sentence_folder(tmp_path, **{file: content, "sentence_bert_config.json": {}})
    with pytest.raises(UnknownModel, match=message):
        resolve_spec(str(folder))


# Written by hand: json.dumps takes a second, in each pytest process.
MANY_TENSORS = header(
    b"{%s}" % b",".join(b'"t%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(100_001))
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(DEEP), "header cannot be read"),
        (header(b'{"a":' * 100_000), "header cannot be read"),
        (header(b" " * (HEADER_BYTES + 1)), "has a header of 16,000,001 bytes"),
        (MANY_TENSORS, "has 100,001 tensors"),
        (header({"a": tensor(0, 8), "b": tensor(4, 12)}, 12), "header cannot be read"),
        (header({"a": tensor(0, 4), "b": tensor(8, 12)}, 12), "header cannot be read"),
        (header({"a": tensor(0, 8, shape=[2, 5])}, 8), "header cannot be read"),
        (header({"a": tensor(0, 8, shape=[2**62, 2**62])}, 8), "header cannot be read"),
        (header({"a": tensor(0, 8, shape=[-2, -4])}, 8), "header cannot be read"),
        (header({"a": tensor(0, 8, shape=[True, 8])}, 8), "header cannot be read"),
        (header({"a": tensor(0, 8, dtype="evil")}, 8), "header cannot be read"),
        (header({"a": tensor(0, 8, data_offsets=[0, 8, 9])}, 8), "header cannot be read"),
        (header({"a": tensor(0, 8, data_offsets=[0, 1e300])}, 8), "header cannot be read"),
        (header([1, 2]), "header cannot be read"),
        (header({"a": []}), "header cannot be read"),
    ],
)
def test_a_header_that_lies_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    folder = sentence_folder(tmp_path, **{"model.safetensors": content})
    with pytest.raises(UnknownModel, match=message):
        resolve_spec(str(folder))


@pytest.mark.parametrize(
    "key",
    [
        *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation"),
        *("_experts_implementation_internal", "quantization_config", "compression_config", "fusion_config"),
        *("kernel_config", "use_kernels", "transformers_weights"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_key_that_chooses_a_program_is_refused_by_its_name(tmp_path: Path, key: str, nested: bool) -> None:
    for value in ("evil/kernel", {"": "evil/kernel"}, {"quant_method": "bitsandbytes"}, ["x"]):
        config = BERT | ({"text_config": [{"vision_config": {key: value}}]} if nested else {key: value})
        with pytest.raises(UnknownModel, match=key):
            resolve_spec(str(sentence_folder(tmp_path, **{"config.json": config})))


@pytest.mark.parametrize("value", [None, "eager", "sdpa"])
def test_the_plain_implementations_may_be_stated(tmp_path: Path, value: str | None) -> None:
    config = BERT | {"_attn_implementation": value, "quantization_config": None, "use_kernels": False}
    assert resolve_spec(str(sentence_folder(tmp_path, **{"config.json": config})))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 200_000}, "num_hidden_layers 200,000, and at most 1,000"),
        ({"n_layer": 10**30}, "n_layer of more than 18 digits"),
        ({"text_config": {"encoder_layers": 1_001}}, "encoder_layers 1,001"),
        ({"num_labels": 10**9}, "num_labels 1,000,000,000, and at most 100,000"),
        ({"num_hidden_layers": 1_000, "num_local_experts": 1_000}, "1,000 layers of 1,000 experts"),
        ({"num_hidden_layers": 60, "n_routed_experts": 10**6}, "60 layers of 1,000,000 experts"),
        ({"hidden_size": 10**9}, "hidden_size in its config.json must be from 1 to 65,536"),
        ({"hidden_size": -1}, "hidden_size in its config.json must be from 1 to 65,536"),
        ({"model_type": ["bert"]}, "does not state a model_type"),
    ],
)
def test_a_size_without_measure_is_an_error(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownModel, match=message):
        resolve_spec(str(sentence_folder(tmp_path, **{"config.json": BERT | config})))


def test_a_limit_of_tokens_without_measure_states_nothing(tmp_path: Path) -> None:
    files = {"sentence_bert_config.json": {"max_seq_length": 10**8}, "tokenizer_config.json": {}}
    assert resolve_spec(str(sentence_folder(tmp_path, **files))).max_tokens == 512
    files |= {"config.json": BERT | {"model_type": "qwen3", "max_position_embeddings": 10**8}}
    with pytest.raises(UnknownModel, match="states the most tokens"):
        resolve_spec(str(sentence_folder(tmp_path, **files)))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "modules.json"])
@pytest.mark.parametrize(
    "make",
    [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()],
    ids=["fifo", "device", "folder"],
)
def test_what_is_no_regular_file_blocks_nothing(tmp_path: Path, file: str, make: Callable[[Path], None]) -> None:
    folder = sentence_folder(tmp_path)
    (folder / file).unlink()
    make(folder / file)
    with pytest.raises(UnknownModel):
        resolve_spec(str(folder))


def test_a_file_that_becomes_a_fifo_after_the_look_blocks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sentence_folder(tmp_path)
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    monkeypatch.setattr(Path, "is_file", lambda path: path.exists())
    with pytest.raises(UnknownModel, match="not a regular file"):
        revision(folder, transformers=[folder], others=[], weights=[])


def test_an_endless_file_is_not_read_whole(tmp_path: Path) -> None:
    """A sparse file takes no room on the disk, and would take all of the memory."""
    folder = sentence_folder(tmp_path)
    with (folder / "vocab.txt").open("wb") as file:
        file.truncate(2**40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnknownModel, match=r"vocab\.txt cannot be read \(it is longer than"):
        resolve_spec(str(folder))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


def test_a_value_of_a_kind_that_nobody_expects_is_an_error_of_ours(tmp_path: Path) -> None:
    values: list[Any] = [None, True, -1, 10**400, 1e300, "x", "\0", "/etc", [], [[]], {}, {"a": None}]
    files = {
        "config.json": BERT,
        "sentence_bert_config.json": {"max_seq_length": 128, "modality_config": {}, "model_args": {}},
        "1_Pooling/config.json": {"pooling_mode": "mean", "include_prompt": True},
        "config_sentence_transformers.json": {"prompts": {}, "truncate_dim": 4},
    }
    for file, content in files.items():
        for key in content:
            for value in values:
                folder = sentence_folder(tmp_path, **files | {file: content | {key: value}})
                try:
                    resolve_spec(str(folder))
                except UnknownModel:
                    continue


def test_weights_of_every_usual_type_are_read(tmp_path: Path) -> None:
    kinds = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "BOOL": 1, "F8_E4M3": 1}
    begin, tensors = 0, {}
    for kind, size in kinds.items():
        tensors[kind] = tensor(begin, begin + 6 * size, dtype=kind, shape=[2, 3])
        begin += 6 * size
    tensors["scalar"] = tensor(begin, begin + 1, shape=[])
    tensors["none"] = tensor(begin, begin, shape=[0, 3])
    folder = sentence_folder(tmp_path, **{"model.safetensors": header({"__metadata__": {}} | tensors, begin + 1)})
    assert (
        resolve_spec(str(folder)).revision
        != resolve_spec(str(sentence_folder(tmp_path, **{"model.safetensors": weights()}))).revision
    )
