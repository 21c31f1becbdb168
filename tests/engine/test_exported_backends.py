"""Promise 6 on ONNX Runtime and OpenVINO: exported from the same weights, they give the torch engine's vectors."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from chunkmill.cli.__main__ import cli
from chunkmill.domain.trust import Trust
from chunkmill.errors import InvalidSetting, ModelLoadError
from chunkmill.models import ModelFolder, resolve_model
from chunkmill_workers.engine import Engine
from chunkmill_workers.engine.backends import Backend
from chunkmill_workers.engine.backends.export import export
from chunkmill_workers.engine.backends.exported import MAKE, RUN, TARGETS, Target, export_folder, exports_folder
from chunkmill_workers.engine.backends.generic import TransformersBackend
from chunkmill_workers.engine.backends.loading import load_model
from chunkmill_workers.engine.backends.onnx import OnnxBackend
from chunkmill_workers.engine.backends.openvino import OpenVinoBackend
from chunkmill_workers.engine.pooling import Head
from chunkmill_workers.engine.precision import cpu_has_bf16
from chunkmill_workers.engine.windows import Ids
from tests.support.checkout import PYTHONPATH
from tests.support.waiting import PATIENCE

from .conftest import FAMILIES, sample, save_transformer

CPU = torch.device("cpu")
MINILM = "all-MiniLM-L6-v2"
MOST_TOKENS = 160
LENGTHS = (1, 2, 127, 128, 129, MOST_TOKENS)
# A sliding window's NaN would need a layer after it to spread; elsewhere the default model stands for depth.
LAYERS = {"modernbert": 3}
# RoBERTa's kind counts positions from 2.
POSITIONS = {"xlm-roberta": MOST_TOKENS + 2, "mpnet": MOST_TOKENS + 2}
POOLINGS = {
    "bert": "mean",
    "multilingual-bert": "mean",
    "xlm-roberta": "cls",
    "mpnet": "mean",
    "nomic": "mean_sqrt_len",
    "modernbert": "max",
    "qwen3": "last_token",
}


def needs(target: Target) -> Any:
    """A parameter that is skipped where the packages are missing; all of a target's tests share its exports."""
    missing = [package for package in (*RUN[target], *MAKE[target]) if importlib.util.find_spec(package) is None]
    reason = f"needs {', '.join(missing)}: pip install -c constraints.txt '.[{target}]'"
    return pytest.param(target, marks=pytest.mark.skipif(bool(missing), reason=reason))


every_target = pytest.mark.parametrize("target", [needs(target) for target in TARGETS])
onnx_alone = pytest.mark.parametrize("target", [needs("onnx")])
openvino_alone = pytest.mark.parametrize("target", [needs("openvino")])


@pytest.fixture(scope="module", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The exports of this module's tests."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        # pytest listens to every logger that does not propagate, and torch then writes pages about each export.
        patch.setattr(logging.getLogger("torch.__trace"), "propagate", True)
        yield folder


@pytest.fixture(scope="module")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelFolder]:
    """A small model that reads texts of 160 tokens."""

    @cache
    def build(family: str) -> ModelFolder:
        folder = tmp_path_factory.mktemp("models") / family
        options = {"max_position_embeddings": POSITIONS.get(family, MOST_TOKENS)}
        save_transformer(folder, family, num_hidden_layers=LAYERS.get(family, 1), **options)
        return resolve_model(str(folder), pooling=POOLINGS[family])

    return build


@pytest.fixture(scope="module")
def minilm_folder() -> Callable[[Target], ModelFolder]:
    """The default model, exported: by the command for one backend, by the function for the other."""

    @cache
    def exported(target: Target) -> ModelFolder:
        folder = resolve_model(MINILM)
        if target == "onnx":
            export(folder, target)
        else:
            result = chunkmill("models", "export", MINILM, "--backend", target, "--json")
            assert result.exit_code == 0, result.stderr
            assert json.loads(result.stdout)["path"] == str(export_folder(folder, target))
        return folder

    return exported


def chunkmill(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def load(folder: ModelFolder, target: Target, dtype: torch.dtype = torch.float32, pad_id: int = 0) -> Backend:
    kind = {"onnx": OnnxBackend, "openvino": OpenVinoBackend}[target]
    return kind.load(folder, dtype=dtype, threads=1, pad_id=pad_id)


def embed(backend: Backend, head: Head, rows: Sequence[Ids]) -> NDArray[np.float32]:
    """(n, dimensions): the rows in one TokenBatch, as the engine runs one."""
    skips = np.zeros(len(rows), np.int32)
    hidden = backend(rows, only=head.only([len(row) for row in rows], skips))
    return head.finish(head(hidden, skips=skips)).numpy()


def random_rows(lengths: Sequence[int], seed: int = 0) -> list[Ids]:
    """Ids that every family's toy knows, none of them special."""
    random = np.random.default_rng(seed)
    return [random.integers(5, 300, length).astype(np.int32) for length in lengths]


def cosine(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    a, b = left.astype(np.float64), right.astype(np.float64)
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


@every_target
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "bert" else pytest.mark.slow) for name in FAMILIES]
)
def test_every_family_gives_the_vectors_of_torch_at_every_length(
    family: str, target: Target, family_folder: Callable[[str], ModelFolder]
) -> None:
    folder = family_folder(family)
    made, _ = export(folder, target)
    model = load_model(folder, dtype=torch.float32)
    reference = TransformersBackend(model, dtype=torch.float32, device=CPU, pad_id=0)
    backend, head = load(folder, target), Head(folder, CPU)
    rows = random_rows([*LENGTHS, *reversed(LENGTHS)])

    together = embed(backend, head, rows)
    alone = np.vstack([embed(backend, head, [row]) for row in rows[: len(LENGTHS)]])

    np.testing.assert_allclose(together, embed(reference, head, rows), atol=1e-5, rtol=0)
    np.testing.assert_allclose(together[: len(LENGTHS)], alone, atol=1e-5, rtol=0)
    assert len(np.unique(together.round(3), axis=0)) == len(rows), "all texts have one vector"
    assert backend.embedding_rows == reference.embedding_rows
    assert made.statement.min_cosine >= 0.9999


@pytest.mark.slow
@every_target
def test_the_default_model_gives_the_vectors_of_the_torch_engine(
    target: Target, minilm_folder: Callable[[Target], ModelFolder], minilm: Engine
) -> None:
    engine = Engine.load(minilm_folder(target), device="cpu", dtype="fp32", backend=target, threads=1)
    texts = [*sample(15), "مرحبا بالعالم", "x" * 1_000_000]

    together = engine.embed(texts)
    alone = np.vstack([engine.embed([text]).vectors for text in texts[::3]])

    expected = minilm.embed(texts).vectors
    assert engine.backend == target
    assert together.n_tokens[together.truncated].min() > 256
    np.testing.assert_allclose(together.vectors, expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(alone, expected[::3], atol=1e-5, rtol=0)


@pytest.mark.slow
@openvino_alone
@pytest.mark.skipif(not cpu_has_bf16(), reason="this processor does not multiply bf16")
def test_openvino_stays_within_its_gate_in_bf16(
    target: Target, minilm_folder: Callable[[Target], ModelFolder], minilm: Engine
) -> None:
    engine = Engine.load(minilm_folder(target), device="cpu", dtype="bf16", backend=target, threads=1)
    texts = sample(30)

    together = engine.embed(texts).vectors
    alone = np.vstack([engine.embed([text]).vectors for text in texts[::3]])

    expected = minilm.embed(texts).vectors
    assert engine.dtype == "bfloat16"
    assert np.abs(together - expected).max() > 1e-5, "this is no bf16"
    assert cosine(together, expected).min() >= 0.9999
    assert cosine(together[::3], alone).min() >= 0.9999


@openvino_alone
@pytest.mark.slow
@pytest.mark.skipif(cpu_has_bf16(), reason="this processor multiplies bf16")
def test_openvino_refuses_bf16_where_it_would_be_emulated(
    target: Target, minilm_folder: Callable[[Target], ModelFolder]
) -> None:
    with pytest.raises(ModelLoadError, match="does not multiply bf16; set EMBEDDING_DTYPE=fp32"):
        load(minilm_folder(target), target, torch.bfloat16)


@every_target
@pytest.mark.slow
def test_a_pass_is_its_own(target: Target, minilm_folder: Callable[[Target], ModelFolder]) -> None:
    backend = load(minilm_folder(target), target)
    rows = random_rows([7, 3, 11])

    first = backend(rows)
    before = first.vectors.clone()
    backend(random_rows([7, 3, 11], seed=1))
    assert torch.equal(first.vectors, before), "the next pass wrote over this one"

    picked = backend(rows, only=np.array([6, 0, 2]))
    assert first.vectors.shape == (3, 11, 384)
    assert first.vectors.dtype == torch.float32
    assert first.lengths.tolist() == [7, 3, 11]
    assert torch.equal(picked.vectors[:, 0], before[[0, 1, 2], [6, 0, 2]])
    assert picked.lengths.tolist() == [1, 1, 1]


@onnx_alone
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_onnx_runs_in_fp32_alone(
    target: Target, dtype: torch.dtype, family_folder: Callable[[str], ModelFolder]
) -> None:
    folder = family_folder("bert")
    export(folder, target)
    with pytest.raises(InvalidSetting, match=r"onnx runs only in fp32.*EMBEDDING_DTYPE=fp32"):
        load(folder, target, dtype)


@openvino_alone
def test_openvino_runs_in_fp32_or_bf16(target: Target, family_folder: Callable[[str], ModelFolder]) -> None:
    folder = family_folder("bert")
    export(folder, target)
    with pytest.raises(InvalidSetting, match="openvino runs in fp32 or bf16, not in float16"):
        load(folder, target, torch.float16)


@openvino_alone
def test_an_export_serves_the_weights_it_was_made_from_and_no_others(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = save_transformer(tmp_path / "model", "bert", num_hidden_layers=1)
    files = sorted(model.rglob("*"))
    first = resolve_model(str(model), pooling="mean")
    command = f"chunkmill models export {model} --backend {target}"
    with pytest.raises(ModelLoadError, match=f"has no export in .*: {command}"):
        load(first, target)

    made, new = export(first, target)
    graph = made.graph.stat().st_ino
    assert (new, export(first, target)) == (True, (made, False))
    assert export(first, target, force=True)[1]
    assert made.graph.stat().st_ino != graph, "it was not made again"
    load(first, target)
    assert sorted(model.rglob("*")) == files, "the model's own folder was written to"
    assert list(exports_folder().iterdir()) == [made.folder], "something was left behind"

    save_transformer(model, "bert", seed=1, num_hidden_layers=1)
    second = resolve_model(str(model), pooling="mean")
    with pytest.raises(ModelLoadError, match=rf"\(there is one of {first.spec.revision}, made from other weights\)"):
        load(second, target)
    made.folder.rename(export_folder(second, target))
    for use in (load, export):
        with pytest.raises(ModelLoadError, match=f"damaged or renamed. Make the export again: {command} --force"):
            use(second, target)


@every_target
def test_a_damaged_export_is_told(
    target: Target, family_folder: Callable[[str], ModelFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family_folder("bert")
    made, _ = export(folder, target)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    copy = export_folder(folder, target)
    shutil.copytree(made.folder, copy)
    load(folder, target)
    weights = max(copy.iterdir(), key=lambda file: file.stat().st_size)
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)

    with pytest.raises(ModelLoadError, match=r"cannot be loaded.*--force"):
        load(folder, target)


OWN_CODE = """
import torch
from transformers import BertConfig, BertModel
class OwnConfig(BertConfig):
    model_type = "own"
class OwnModel(BertModel):
    config_class = OwnConfig
    def forward(self, input_ids=None, **options):
        if self.config.trick == "reads its input" and int(input_ids.sum()) < 0:
            input_ids = -input_ids
        output = super().forward(input_ids=input_ids, **options)
        if self.config.trick == "is another one" and torch.compiler.is_exporting():
            output.last_hidden_state = output.last_hidden_state.flip(-1)
        return output
"""


@openvino_alone
@pytest.mark.parametrize(
    ("trick", "message"),
    [
        ("reads its input", r"model '.*' \(own\) cannot be exported \(.*\): use the backend native or transformers"),
        ("is another one", r"\(own\) gives other vectors than the model: .* 0.9999 is required. Nothing was kept"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_its_reason(
    target: Target, trick: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # transformers adds its cache
    model = save_transformer(tmp_path / trick.replace(" ", "_"), "bert", num_hidden_layers=1)
    (model / "own.py").write_text(OWN_CODE)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "trick": trick}
    config |= {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    (model / "config.json").write_text(json.dumps(config))
    folder = resolve_model(str(model), pooling="mean", trust=Trust(remote_code=frozenset({str(model)})))

    with pytest.raises(ModelLoadError, match=message):
        export(folder, target)
    assert not list(exports_folder().iterdir())


@pytest.mark.parametrize("target", TARGETS)
def test_a_missing_extra_is_named(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_model(MINILM)
    for package in (*RUN[target], *MAKE[target]):
        monkeypatch.setitem(sys.modules, package, None)  # which is how Python remembers what is not there

    with pytest.raises(
        ModelLoadError, match=rf"needs {RUN[target][0]}.*pip install -c constraints.txt '\.\[{target}\]'"
    ):
        load(folder, target)
    with pytest.raises(ModelLoadError, match=rf"pip install -c constraints.txt '\.\[{target}\]'"):
        export(folder, target)


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    target = next((target for target in TARGETS if importlib.util.find_spec(RUN[target][0])), None)
    if target is None:
        pytest.skip("needs one of the extras onnx and openvino")

    with pytest.raises(ModelLoadError, match=r"cannot be written to .*Not a directory.*XDG_CACHE_HOME"):
        export(resolve_model(MINILM), target)


@every_target
def test_neither_library_tells_its_makers(
    target: Target, tmp_path: Path, family_folder: Callable[[str], ModelFolder], cache_folder: Path
) -> None:
    """Both send events over the network by default, and leave an identifier of the machine in the user's folders."""
    folder = family_folder("bert")
    export(folder, target)
    kind = {"onnx": "OnnxBackend", "openvino": "OpenVinoBackend"}[target]
    code = (
        "import sys, torch, numpy as np\n"
        "from chunkmill.models import resolve_model\n"
        f"from chunkmill_workers.engine.backends.{target} import {kind}\n"
        f"folder = resolve_model({str(folder.path)!r}, pooling={POOLINGS['bert']!r})\n"
        f"backend = {kind}.load(folder, dtype=torch.float32, threads=1, pad_id=0)\n"
        "backend([np.array([101, 102], np.int32)])\n"
        "assert sys.modules.get('openvino_telemetry') is None\n"
    )
    exports = cache_folder / "chunkmill"
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "chunkmill").symlink_to(exports)
    unset = {"ORT_DISABLE_TELEMETRY", "CI", "HOME", "XDG_CACHE_HOME"}
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(cache), "PYTHONPATH": PYTHONPATH}

    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=PATIENCE)

    assert [file.name for file in tmp_path.iterdir()] == ["cache"]
    assert [file.name for file in cache.iterdir()] == ["chunkmill"]


@pytest.mark.slow  # the others make and check such exports without a command
@openvino_alone
def test_the_command_says_what_it_made(
    target: Target, minilm_folder: Callable[[Target], ModelFolder], cache_folder: Path
) -> None:
    folder = minilm_folder(target)  # made by the command

    result = chunkmill("models", "export", MINILM, "--backend", target)

    assert result.exit_code == 0
    assert f"{MINILM} was already exported" in result.stdout
    assert str(export_folder(folder, target)) in result.stdout
    assert "this takes about a minute" in result.stderr


def test_the_command_passes_an_error_on() -> None:
    result = chunkmill("models", "export", "nowhere", "--backend", "onnx", "--json")

    assert result.exit_code == 1
    assert json.loads(result.stderr)["error"] == "unknown_model"
