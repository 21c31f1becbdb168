"""A model of BERT's kind is read from its file without transformers, and is the model that transformers would load."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from chunkmill.models import resolve_model
from chunkmill.models.files import read_json
from chunkmill_workers.engine import Engine, load
from chunkmill_workers.engine.backends.stored import StoredModel, read_stored
from tests.support.checkout import PYTHONPATH
from tests.support.waiting import PATIENCE

from .conftest import sample

Change = Callable[[Path], None]


def configure(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def rename(folder: Path, new_name: Callable[[str], str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {new_name(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def convert(folder: Path, dtype: torch.dtype) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def stored(folder: Path) -> StoredModel | None:
    return read_stored(resolve_model(str(folder)), read_json(folder / "config.json"))


def vectors(folder: Path) -> np.ndarray:
    return Engine.load(str(folder), device="cpu", dtype="fp32", backend="native").embed(sample(12)).vectors


def vectors_by_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    with monkeypatch.context() as patched:
        patched.setattr(load, "read_stored", lambda *_: None)
        return vectors(folder)


def as_another_family(name: str) -> Change:
    return lambda folder: configure(folder, model_type=name, architectures=None)


SAME: dict[str, tuple[str, Change]] = {
    "bert": ("bert-mean", lambda _: None),
    "xlm-roberta": ("xlm-roberta-cls", lambda _: None),
    "roberta": ("xlm-roberta-cls", as_another_family("roberta")),
    "camembert": ("xlm-roberta-cls", as_another_family("camembert")),
    "a file that also holds a head": (
        "bert-mean",
        lambda folder: rename(folder, lambda name: "bert." + name),
    ),
    "a file in fp16": ("bert-mean", lambda folder: convert(folder, torch.float16)),
    "a file in fp32 that the config wants in bf16": ("bert-mean", lambda folder: configure(folder, dtype="bfloat16")),
    "a file in fp32 that an old config wants in fp16": (
        "bert-mean",
        lambda folder: configure(folder, dtype=None, torch_dtype="float16"),
    ),
    "a file in fp16 and a config that wants nothing": (
        "bert-mean",
        lambda folder: (convert(folder, torch.float16), configure(folder, dtype=None))[0],
    ),
}


@pytest.mark.parametrize("kind", SAME)
def test_what_is_read_from_the_file_is_what_transformers_loads(
    kind: str, toy_path: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy, change = SAME[kind]
    folder = tmp_path / "model"
    shutil.copytree(toy_path(toy), folder)
    change(folder)
    assert stored(folder) is not None
    assert np.array_equal(vectors(folder), vectors_by_transformers(folder, monkeypatch))


def without(name: str) -> Change:
    return lambda folder: configure(folder, **{name: None})


def with_two_formats(folder: Path) -> None:
    configure(folder, dtype=None)
    tensors = load_file(folder / "model.safetensors")
    name = "embeddings.position_embeddings.weight"
    tensors[name] = tensors[name].to(torch.float16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


LEFT: dict[str, Change] = {
    "a config that leaves the epsilon to the default": without("layer_norm_eps"),
    "a config that leaves the activation to the default": without("hidden_act"),
    "a config that leaves the padding to the default": without("pad_token_id"),
    "names of old files": lambda folder: rename(
        folder, lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta")
    ),
    "a file of two number formats": with_two_formats,
}


@pytest.mark.parametrize("kind", LEFT)
def test_a_file_or_a_config_that_leaves_something_open_is_left_to_transformers(
    kind: str, toy_path: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(toy_path("bert-mean"), folder)
    LEFT[kind](folder)
    assert stored(folder) is None
    assert np.isfinite(vectors(folder)).all()


@pytest.mark.parametrize(
    "setting",
    [{"quantization_config": {"bits": 8}}, {"auto_map": {"AutoModel": "odd.Odd"}}, {"pruned_heads": {"0": [1]}}],
)
def test_weights_that_need_more_than_reading_are_left_to_transformers(
    setting: dict[str, object], toy_path: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(toy_path("bert-mean"), folder)
    model = resolve_model(str(folder))
    assert read_stored(model, read_json(folder / "config.json") | setting) is None


def test_a_file_that_is_replaced_afterwards_changes_nothing(toy_path: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(toy_path("bert-mean"), folder)
    engine = Engine.load(str(folder), device="cpu", dtype="fp32")
    before = engine.embed(sample(12)).vectors
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:  # in place, so that a mapped file would change under the engine
        file.seek(weights.stat().st_size // 2)
        file.write(bytes(weights.stat().st_size // 2))
    assert np.array_equal(engine.embed(sample(12)).vectors, before)


def test_the_default_model_needs_no_transformers() -> None:
    """Importing it takes longer than everything else that a worker does at its start."""
    program = (
        "import sys; from chunkmill_workers.engine import Engine; "
        "print(Engine.load('all-MiniLM-L6-v2', device='cpu').embed(['a text']).vectors.shape, "
        "sorted(set(sys.modules) & {'transformers', 'torch._dynamo'}))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": PYTHONPATH, "HF_HUB_OFFLINE": "1", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "(1, 384) []\n"
