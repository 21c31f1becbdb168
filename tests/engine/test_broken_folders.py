"""A folder that is broken or dangerous never becomes an engine, and nothing that lies in it is run unasked."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from chunkmill.domain.trust import Trust
from chunkmill.errors import ChunkmillError, ModelLoadError, UnknownModel
from chunkmill.models import resolve_model
from chunkmill_workers.engine import Engine
from chunkmill_workers.engine.backends import loading
from chunkmill_workers.engine.backends.exported import export_folder, find

from .conftest import sample


@pytest.fixture
def folder(toy_path: Callable[[str], Path], tmp_path: Path) -> Path:
    """A small BERT's folder of the test's own, to be broken."""
    copied = tmp_path / "model"
    shutil.copytree(toy_path("bert-mean"), copied)
    return copied


def load(folder: Path, trust: Trust | None = None) -> Engine:
    return Engine.load(resolve_model(str(folder), trust=trust or Trust()), device="cpu", dtype="fp32")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "layer.1.output.dense.weight" in name)
    tensors[name] = tensors[name][:, :10].contiguous()


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "one tensor is too narrow": (lambda f: rewrite(f, narrow), r"layer\.1\.output\.dense\.weight"),
    "config states wider layers": (lambda f: configure(f, intermediate_size=128), r"intermediate|output\.dense"),
    "config states wider tokens": (lambda f: configure(f, hidden_size=64), r"500 × 32.*states 500 × 64"),
    "config states more tokens": (lambda f: configure(f, vocab_size=600), r"500 × 32.*states 600 × 32"),
    "config states more layers": (lambda f: configure(f, num_hidden_layers=3), r"lack 16 tensors.*layer\.2"),
    "weights are cut off": (lambda f: _halve(f / "model.safetensors"), r"model\.safetensors holds .* bytes"),
    "weights are missing": (lambda f: (f / "model.safetensors").unlink(), r"no model\.safetensors"),
    "tokenizer is missing": (lambda f: (f / "tokenizer.json").unlink(), r"no tokenizer\.json"),
    "tokenizer is cut off": (lambda f: _halve(f / "tokenizer.json"), r"tokenizer in .* cannot be read"),
    "config is cut off": (lambda f: _halve(f / "config.json"), r"config\.json is not JSON"),
    "architecture is unknown": (lambda f: configure(f, model_type="no-such-thing"), "no-such-thing"),
}


def _halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_refused_with_its_reason(kind: str, folder: Path) -> None:
    damage, message = BROKEN[kind]
    damage(folder)

    with pytest.raises(ChunkmillError, match=message) as caught:
        load(folder)
    assert isinstance(caught.value, UnknownModel | ModelLoadError)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("is_named_alone", [True, False])
def test_tensors_of_wrong_shapes_are_named_as_either_release_of_transformers_gives_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, is_named_alone: bool
) -> None:
    """Before 5 it gives their names, and since then each with both shapes."""
    wrong = [name if is_named_alone else (name, [1], [2]) for name in ("layer.1.weight", "layer.0.weight")]

    class Kind:
        @staticmethod
        def from_pretrained(*_: object, **__: object) -> tuple[object, dict[str, object]]:
            return torch.nn.Identity(), {"missing_keys": [], "mismatched_keys": wrong}

    monkeypatch.setattr(loading, "_class_of", lambda _: Kind)
    monkeypatch.setattr(loading, "_require_stored", lambda *_: None)

    with pytest.raises(ModelLoadError, match=r"2 tensors in .*, layer\.0\.weight first"):
        loading.load_model(resolve_model(str(folder), trust=Trust()))


class Payload:
    """What an attacker puts into a pickle: reading it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.marker,)


def make_pickle(weights: Path, *, payload: Path | None = None) -> Path:
    """The same tensors, or an attack, as PyTorch's own pickle in the place of safetensors."""
    pickled = weights.with_name("pytorch_model.bin")
    torch.save(load_file(weights) if payload is None else {"weight": Payload(payload)}, pickled)
    weights.unlink()
    return pickled


def weights_in(folder: Path, module: str) -> Path:
    (weights_file,) = folder.glob(f"{module}model.safetensors")
    return weights_file


@pytest.fixture(params=["", "2_*/"], ids=["transformer", "dense"])
def with_weights(request: pytest.FixtureRequest, toy_path: Callable[[str], Path], tmp_path: Path) -> tuple[Path, Path]:
    """A folder, and the weights in it that are to become a pickle."""
    folder = tmp_path / "model"
    shutil.copytree(toy_path("mpnet-dense"), folder)
    return folder, weights_in(folder, request.param)


def test_a_pickle_becomes_an_engine_only_where_it_is_trusted(with_weights: tuple[Path, Path]) -> None:
    folder, weights = with_weights
    texts = sample(3)
    expected = load(folder).embed(texts).vectors
    make_pickle(weights)

    with pytest.raises(UnknownModel, match="EMBEDDING_TRUST_PICKLE"):
        load(folder)
    trusted = load(folder, Trust(pickle={str(folder)}))
    np.testing.assert_allclose(trusted.embed(texts).vectors, expected, atol=1e-6)


def test_even_a_trusted_pickle_gives_tensors_only(with_weights: tuple[Path, Path], tmp_path: Path) -> None:
    folder, weights = with_weights
    marker = tmp_path / "it ran"
    pickled = make_pickle(weights, payload=marker)

    with pytest.raises(UnknownModel, match="pickle"):
        load(folder)
    with pytest.raises(ModelLoadError):
        load(folder, Trust(pickle={str(folder)}))
    assert not marker.exists()
    with contextlib.suppress(Exception):
        torch.load(pickled, weights_only=False)  # the payload is a live one
    assert marker.exists()


CODE = """
from pathlib import Path
from transformers import BertConfig, BertModel
Path({marker!r}).touch()
class OwnConfig(BertConfig):
    model_type = "own"
class OwnModel(BertModel):
    config_class = OwnConfig
"""


def test_code_in_the_folder_is_run_only_where_it_is_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # transformers adds its cache
    texts = sample(3)
    expected = load(folder).embed(texts).vectors
    marker = tmp_path / "it ran"
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    configure(folder, model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"})

    with pytest.raises(UnknownModel, match="EMBEDDING_TRUST_REMOTE_CODE"):
        load(folder)
    with pytest.raises(UnknownModel, match="EMBEDDING_TRUST_REMOTE_CODE"):
        load(folder, Trust(pickle={str(folder)}, remote_code={str(folder.parent)}))
    assert not marker.exists()
    trusted = load(folder, Trust(remote_code={str(folder)}))
    assert marker.exists()
    np.testing.assert_allclose(trusted.embed(texts).vectors, expected, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": 10**9},
        {"max_position_embeddings": 10**9, "vocab_size": 500},
        {"num_hidden_layers": 100, "intermediate_size": 100_000},
    ],
    ids=["wide", "long", "many"],
)
def test_a_config_that_asks_for_more_than_the_files_hold_takes_no_memory(
    folder: Path, changes: dict[str, object]
) -> None:
    """transformers would make up what is missing, and the worker would be killed for its memory."""
    configure(folder, **changes)
    with pytest.raises(ModelLoadError, match=r"asks for [\d,]+ numbers, and the weights hold [\d,]+"):
        load(folder)


def test_kernels_of_the_hub_are_not_used() -> None:
    assert os.environ["USE_HUB_KERNELS"] == "NO"


@pytest.mark.parametrize("content", ["[" * 200_000, '{"a": 1}', "{}", "null"])
def test_a_statement_of_an_export_that_cannot_be_read_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = resolve_model(str(folder))
    at = export_folder(model, "onnx")
    at.mkdir(parents=True)
    (at / "export.json").write_text(content)
    with pytest.raises(ModelLoadError, match="does not state an export"):
        find(model, "onnx")
