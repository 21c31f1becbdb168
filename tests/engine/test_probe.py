"""Promise: every model works, or is refused when it is loaded, with a sentence that says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from chunkmill.errors import ModelLoadError
from chunkmill.models import transformer
from chunkmill_workers.engine import Engine, probe
from chunkmill_workers.engine.backends import TokenVectors
from chunkmill_workers.engine.backends.generic import TransformersBackend
from chunkmill_workers.engine.backends.native import NativeBackend
from chunkmill_workers.engine.windows import Ids
from chunkmill_workers.tuning import check

from .conftest import Toy, sample, save_toy

Call = Callable[..., TokenVectors]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is a process of its own to the probe."""
    monkeypatch.setattr(probe.MEMORY, "_passed", set())
    monkeypatch.setattr(probe.MEMORY, "_needs_fp32", set())


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of rows of each pass of our own forward pass."""
    counted: list[int] = []
    _wrap(monkeypatch, NativeBackend, lambda rows, hidden: counted.append(len(rows)))
    yield counted


def _wrap(
    monkeypatch: pytest.MonkeyPatch,
    kind: type,
    after: Callable[[Sequence[Ids], TokenVectors], object],
    *,
    half: bool = False,
) -> None:
    """Call ``after`` with the rows and the result of each pass; with ``half`` only of passes in half precision."""
    real: Call = kind.__call__

    def call(self: NativeBackend, rows: Sequence[Ids], *, only: NDArray[np.int64] | None = None) -> TokenVectors:
        hidden = real(self, rows, only=only)
        if not half or self.dtype != torch.float32:
            with torch.inference_mode():
                after(rows, hidden)
        return hidden

    monkeypatch.setattr(kind, "__call__", call)


def test_a_model_of_another_width_than_its_files_state_is_refused_at_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_toy(tmp_path, Toy("embedding-gemma2", width=48))
    # As before EmbeddingGemma 2 was known: the width is believed from hidden_size.
    monkeypatch.setattr("chunkmill.models.folder.hidden_size", lambda name, config: 32)

    with pytest.raises(ModelLoadError, match=r"gives vectors of 48 numbers, and its files state 32.*choose another"):
        Engine.load(str(folder), device="cpu", dtype="fp32")


def test_a_model_whose_kernels_lack_the_number_format_is_refused_with_the_setting_that_helps(
    toy_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(rows: Sequence[Ids], hidden: TokenVectors) -> None:
        raise RuntimeError("value cannot be converted to type c10::BFloat16 without overflow")

    _wrap(monkeypatch, NativeBackend, refuse, half=True)

    with pytest.raises(ModelLoadError, match=r"in bfloat16 \(RuntimeError: value cannot.*set EMBEDDING_DTYPE=fp32"):
        Engine.load(str(toy_path("bert-mean")), device="cpu", dtype="bf16")


@pytest.mark.parametrize("fault", ["raises", "not finite", "moves"])
def test_a_model_that_half_precision_does_not_suit_is_loaded_in_fp32_if_nobody_chose(
    fault: str,
    toy_path: Callable[[str], Path],
    toy_engine: Callable[[str], Engine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def spoil(rows: Sequence[Ids], hidden: TokenVectors) -> None:
        if fault == "raises":
            raise RuntimeError("not implemented for 'BFloat16'")
        hidden.vectors[..., 0] = float("nan") if fault == "not finite" else 100.0 * (-1) ** len(rows)

    monkeypatch.setattr("chunkmill_workers.engine.precision.cpu_has_bf16", lambda: True)
    _wrap(monkeypatch, NativeBackend, spoil, half=True)
    texts = sample(5)

    engine = Engine.load(str(toy_path("bert-mean")), device="cpu", threads=1)

    assert engine.dtype == "float32"
    assert "It is loaded in fp32 instead" in caplog.text
    np.testing.assert_allclose(engine.embed(texts).vectors, toy_engine("bert-mean").embed(texts).vectors, atol=1e-5)
    caplog.clear()
    again = Engine.load(str(toy_path("bert-mean")), device="cpu", threads=1)
    assert again.dtype == "float32"
    assert not caplog.records, "half precision was tried a second time"


def test_a_model_whose_weights_give_no_finite_vector_is_refused(
    toy_path: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(toy_path("bert-mean"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "layer.1.output.dense.weight" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelLoadError, match=r"no short text a finite vector on cpu in float32.*copy the folder again"):
        Engine.load(str(folder), device="cpu", dtype="fp32")


def test_a_model_whose_vectors_depend_on_their_neighbours_is_refused(
    toy_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_padding(rows: Sequence[Ids], hidden: TokenVectors) -> None:
        hidden.vectors[:, 0] += hidden.vectors.mean(dim=1)

    _wrap(monkeypatch, NativeBackend, read_padding)

    with pytest.raises(ModelLoadError, match=r"another vector if a longer text is beside it .* \(its numbers move by"):
        Engine.load(str(toy_path("bert-mean")), device="cpu", dtype="fp32")


def test_a_device_without_memory_for_a_text_is_not_called_a_broken_model(
    toy_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(rows: Sequence[Ids], hidden: TokenVectors) -> None:
        raise torch.OutOfMemoryError("tried to allocate more than there is")

    monkeypatch.setattr("chunkmill_workers.engine.precision.cpu_has_bf16", lambda: True)
    _wrap(monkeypatch, NativeBackend, full)

    with pytest.raises(ModelLoadError, match=r"left too little memory .*EMBEDDING_ENGINES"):
        Engine.load(str(toy_path("bert-mean")), device="cpu")


def test_deberta_v1_runs_in_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mask is the smallest number of its queries' format: with fp32 queries, torch refuses it in bf16 scores."""
    folder = str(save_toy(tmp_path, Toy("deberta")))

    assert Engine.load(folder, device="cpu", dtype="bf16").embed(["a text", "another"]).vectors.shape == (2, 32)

    monkeypatch.setattr(probe.MEMORY, "_passed", set())
    monkeypatch.setattr("chunkmill_workers.engine.backends.generic._BIASES", ())
    with pytest.raises(ModelLoadError, match=r"BFloat16.*set EMBEDDING_DTYPE=fp32"):
        Engine.load(folder, device="cpu", dtype="bf16")


def test_a_model_is_probed_once_in_a_process(toy_path: Callable[[str], Path], passes: list[int]) -> None:
    path = str(toy_path("bert-mean"))

    Engine.load(path, device="cpu", dtype="fp32")
    assert passes == [2, 1]  # two texts together, one of them alone
    Engine.load(path, device="cpu", dtype="fp32")
    assert passes == [2, 1], "the second load of the same model probed it again"

    Engine.load(path, device="cpu", dtype="bf16")
    Engine.load(str(toy_path("bert-max")), device="cpu", dtype="fp32")
    assert passes == [2, 1] * 3, "another number format, or another model, was not probed"


def test_a_model_that_was_refused_is_probed_again(
    toy_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, passes: list[int]
) -> None:
    path = str(toy_path("bert-mean"))
    with monkeypatch.context() as broken:
        _wrap(broken, NativeBackend, lambda rows, hidden: hidden.vectors.fill_(float("nan")))
        with pytest.raises(ModelLoadError):
            Engine.load(path, device="cpu", dtype="fp32")
    passes.clear()

    Engine.load(path, device="cpu", dtype="fp32")

    assert passes == [2, 1]


def test_the_number_of_threads_is_put_back(toy_path: Callable[[str], Path]) -> None:
    before = torch.get_num_threads()

    Engine.load(str(toy_path("bert-mean")), device="cpu", dtype="fp32")

    assert torch.get_num_threads() == before


def test_an_architecture_that_this_release_of_transformers_lacks_is_named(
    toy_path: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(toy_path("nomic-sqrt"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "of_next_year"}))

    with pytest.raises(ModelLoadError, match=r"architecture of_next_year, which transformers .* install a newer"):
        Engine.load(str(folder), device="cpu", dtype="fp32")


def test_the_width_of_embedding_gemma_is_read_from_its_files(tmp_path: Path) -> None:
    inner = {"model_type": "embedding_gemma2_text", "hidden_size": 512, "embedding_dim": 768}

    assert transformer.hidden_size("m", inner) == 768
    assert transformer.hidden_size("m", {"model_type": "embedding_gemma2", "text_config": inner}) == 768
    assert transformer.hidden_size("m", {"model_type": "embedding_gemma2_text", "hidden_size": 512}) == 768
    assert transformer.hidden_size("m", {"model_type": "gemma3", "text_config": {"hidden_size": 640}}) == 640


def test_the_transformers_backend_is_probed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(save_toy(tmp_path, Toy("gte", "cls")))
    _wrap(monkeypatch, TransformersBackend, lambda rows, hidden: hidden.vectors.fill_(float("nan")))

    with pytest.raises(ModelLoadError, match="no short text a finite vector"):
        Engine.load(folder, device="cpu", dtype="fp32")


def test_a_check_of_a_model_loads_it_and_measures_it(
    toy_path: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert check.main([str(toy_path("bert-mean"))]) == 0
    said = json.loads(capsys.readouterr().out)

    assert (said["device"], said["backend"]) == ("cpu", "native")
    assert min(said["load_seconds"], said["latency_ms"], said["tokens_per_second"], said["memory_mib"]) > 0

    assert check.main([str(tmp_path)]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "unknown_model"
