"""What peers need made of a model, kept in the user's cache: ONNX graphs, a folder around one, CTranslate2's form.

``python -m chunkmill_workers.benchmarks.peers.export KIND``, with the model as JSON on stdin, in a process of its own,
because tracing leaves much behind. A folder is renamed into its place when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chunkmill.system.python import module_command
from chunkmill_workers.benchmarks import machine
from chunkmill_workers.benchmarks.peers.batching import Batches, padded
from chunkmill_workers.benchmarks.peers.environments import variables
from chunkmill_workers.benchmarks.peers.model import Model

VERSION = 1
"""Part of the cache's folder name: raise it when what is made here changes."""
OPSET = 17
CALIBRATION_TEXTS, CALIBRATION_BUDGET = 300, 512
"""NNCF's own default is 300 samples; here they come in batches of at most this many tokens."""


def make(model: Model, kind: str) -> None:
    """Make ``kind`` of ``model`` unless it is there. Raises RuntimeError with what the exporter said last."""
    if model.made(kind).is_dir():
        return
    done = subprocess.run(
        module_command("chunkmill_workers.benchmarks.peers.export", kind),
        input=json.dumps(asdict(model)), text=True, capture_output=True, env=variables(machine.cores(), own=False),
    )  # fmt: skip
    if done.returncode:
        missing = [line for line in done.stderr.splitlines() if line.startswith("ModuleNotFoundError: ")]
        last = (missing or done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(last.removeprefix("ModuleNotFoundError: "))


def _pooled(model: Model, folder: Path) -> None:
    """Two graphs from ids to unit vectors: as traced, and with ONNX Runtime's fused operators."""
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    heads, hidden = _trace(model, folder / "plain.onnx", pool=True)
    fused = optimizer.optimize_model(
        str(folder / "plain.onnx"), model_type="bert", num_heads=heads, hidden_size=hidden, opt_level=0,
        optimization_options=FusionOptions("bert"),
    )  # fmt: skip
    fused.save_model_to_file(str(folder / "fused.onnx"))


def _pooled_int8(model: Model, folder: Path) -> None:
    make(model, "pooled")
    for graph in ("plain", "fused"):
        _quantize(model.made("pooled") / f"{graph}.onnx", folder / f"{graph}.onnx")


def _openvino_int8(model: Model, folder: Path) -> None:
    """NNCF's quantisation after training, calibrated on docstrings that are not among those measured."""
    os.environ["NNCF_CI"] = "1"  # or it reports its use over the network
    import nncf
    import openvino

    from chunkmill_workers.benchmarks.texts import corpus

    make(model, "pooled")
    batches = Batches(model, CALIBRATION_BUDGET)([chunk.text for chunk in corpus()[-CALIBRATION_TEXTS:]])
    fed = [dict(zip(("input_ids", "attention_mask"), padded(ids), strict=True)) for _, ids in batches]
    graph = openvino.Core().read_model(model.made("pooled") / "plain.onnx")
    quantized = nncf.quantize(graph, nncf.Dataset(fed), subset_size=len(fed), model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(quantized, folder / "int8.xml")


def _folder(model: Model, folder: Path) -> None:
    """A folder as the Hub has them, its graphs in ``onnx/``, its settings saying the model's own limit."""
    for source in Path(model.folder).rglob("*"):
        if source.suffix in {".json", ".txt", ".model"}:
            target = folder / source.relative_to(model.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    (folder / "onnx").mkdir()
    _trace(model, folder / "onnx" / "model.onnx", pool=False)
    _quantize(folder / "onnx" / "model.onnx", folder / "onnx" / "model_quantized.onnx")
    # fastembed cuts at model_max_length, Infinity's ONNX engine at max_position_embeddings.
    _change(folder / "tokenizer.json", padding=None, truncation=None)
    _change(folder / "tokenizer_config.json", model_max_length=model.max_tokens, max_length=model.max_tokens)
    _change(folder / "config.json", max_position_embeddings=model.max_tokens)


def _flat(model: Model, folder: Path) -> None:
    """The same with its int8 graph beside the settings: where Infinity can open it, through this optimum-onnx."""
    make(model, "folder")
    shutil.copytree(model.made("folder"), folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("onnx"))
    shutil.copyfile(model.made("folder") / "onnx" / "model_quantized.onnx", folder / "model_quantized.onnx")


def _ct2(model: Model, folder: Path) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(model.transformer).convert(str(folder), force=True)


def _trace(model: Model, path: Path, *, pool: bool) -> tuple[int, int]:
    """Write the graph; returns the number of heads and the hidden size."""
    import torch
    from transformers import AutoModel

    class Graph(torch.nn.Module):
        def __init__(self, transformer: Any) -> None:
            super().__init__()
            self.transformer = transformer

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.transformer(input_ids=input_ids, attention_mask=attention_mask)[0]
            if not pool:
                return hidden
            if model.pooling == "cls":
                pooled = hidden[:, 0]
            else:
                weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
                pooled = (hidden * weights).sum(1) / weights.sum(1)
            return torch.nn.functional.normalize(pooled)

    transformer = AutoModel.from_pretrained(
        model.transformer, local_files_only=True, dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.full((2, 7), 5)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    rows, length = {0: "rows"}, {0: "rows", 1: "length"}
    output = "sentence_embedding" if pool else "last_hidden_state"
    torch.onnx.export(
        Graph(transformer).eval(), (ids, mask), str(path), opset_version=OPSET, dynamo=False,
        input_names=["input_ids", "attention_mask"], output_names=[output],
        dynamic_axes={"input_ids": length, "attention_mask": length, output: rows if pool else length},
    )  # fmt: skip
    return transformer.config.num_attention_heads, transformer.config.hidden_size


def _quantize(source: Path, target: Path) -> None:
    """Dynamic int8, a scale for each channel; the type of what fused operators give is told, as it is not known."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source, target, per_channel=True, weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )  # fmt: skip


def _change(path: Path, **values: Any) -> None:
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | values), encoding="utf-8")


KINDS: dict[str, Callable[[Model, Path], None]] = {
    "pooled": _pooled,
    "pooled int8": _pooled_int8,
    "openvino int8": _openvino_int8,
    "folder": _folder,
    "flat": _flat,
    "ct2": _ct2,
}


def _main(kind: str) -> None:
    model = Model(**json.load(sys.stdin))
    target = model.made(kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        folder = Path(temporary) / "whole"
        folder.mkdir()
        KINDS[kind](model, folder)
        folder.rename(target)


if __name__ == "__main__":
    _main(sys.argv[1])
