"""Reads a model of BERT's kind straight from its safetensors file, for our own forward pass.

Importing transformers and its model classes is more than half of what a worker computes before it takes its first
doorbell. If a file holds exactly what its config.json promises, under the usual names, this import is not needed.
Everything else is left to transformers: older names, shards, pickles, quantized weights, and every error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from chunkmill.models import ModelFolder

_PREFIXES = {"bert": "bert.", "camembert": "roberta.", "roberta": "roberta.", "xlm-roberta": "roberta."}
"""For each family, what stands before the names of its tensors in a file that also holds a head."""

_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "pad_token_id",
    "type_vocab_size",
    "vocab_size",
)
"""The config.json must state these, the activation and the norms' epsilon. Only transformers knows their defaults."""

_LEFT_TO_TRANSFORMERS = ("auto_map", "pruned_heads", "quantization_config")


@dataclass(frozen=True, slots=True)
class _Tensors:
    """The file's tensors. Each is copied as it is asked for, so that the file may be replaced afterwards."""

    file: Any
    dtype: torch.dtype
    eps: float
    padding_idx: int
    config: SimpleNamespace


class StoredModel:
    """The tensors whose names begin with ``prefix``, under the attributes that the modules of transformers have."""

    def __init__(self, tensors: _Tensors, prefix: str) -> None:
        self._tensors = tensors
        self._prefix = prefix
        self.config = tensors.config
        self.eps = tensors.eps
        self.padding_idx = tensors.padding_idx

    @property
    def weight(self) -> torch.Tensor:
        return self._read("weight")

    @property
    def bias(self) -> torch.Tensor:
        return self._read("bias")

    def __getattr__(self, name: str) -> StoredModel:
        return StoredModel(self._tensors, f"{self._prefix}{name}.")

    def __iter__(self) -> Iterator[StoredModel]:
        """The layers, if this is their list."""
        return (getattr(self, str(number)) for number in range(self.config.num_hidden_layers))

    def _read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._tensors.file.get_tensor(self._prefix + name)
        return tensor.to(self._tensors.dtype, copy=True)


def read_stored(folder: ModelFolder, config: Mapping[str, Any]) -> StoredModel | None:
    """The model in ``folder``, whose config.json is ``config``; None if transformers has to load it."""
    path = folder.transformer / "model.safetensors"
    family = _PREFIXES.get(config.get("model_type", ""))
    if (
        family is None
        or folder.remote_code
        or any(type(config.get(name)) is not int for name in _COUNTS)
        or not isinstance(config.get("layer_norm_eps"), float)
        or "hidden_act" not in config
        or config["hidden_size"] % config["num_attention_heads"]
        or any(config.get(name) for name in _LEFT_TO_TRANSFORMERS)
        or not path.is_file()
    ):
        return None
    try:
        file: Any = safe_open(path, framework="pt")
        stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is not a mapping)
    except (OSError, SafetensorError):
        return None
    shapes = {name: tuple(tensor.get_shape()) for name, tensor in stored.items()}
    expected = _shapes(config)
    for prefix in ("", family):
        if all(shapes.get(prefix + name) == shape for name, shape in expected.items()):
            dtype = _dtype(config, {stored[prefix + name].get_dtype() for name in expected})
            break
    else:
        return None
    if dtype is None:
        return None
    tensors = _Tensors(file, dtype, config["layer_norm_eps"], config["pad_token_id"], SimpleNamespace(**config))
    return StoredModel(tensors, prefix)


def _dtype(config: Mapping[str, Any], stored: set[str]) -> torch.dtype | None:
    """The number format that transformers loads the tensors in: the one that config.json states, or the file's."""
    formats = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    if not stored <= formats.keys():
        return None
    stated = config.get("dtype") or config.get("torch_dtype")
    if stated is not None:
        dtype = getattr(torch, str(stated).removeprefix("torch."), None)
        return dtype if dtype in formats.values() else None
    return formats[stored.pop()] if len(stored) == 1 else None


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors that our forward pass reads, and the shapes that config.json gives them."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], hidden),
        "embeddings.LayerNorm.weight": (hidden,),
        "embeddings.LayerNorm.bias": (hidden,),
    }
    products = {
        "attention.self.query": (hidden, hidden),
        "attention.self.key": (hidden, hidden),
        "attention.self.value": (hidden, hidden),
        "attention.output.dense": (hidden, hidden),
        "intermediate.dense": (inner, hidden),
        "output.dense": (hidden, inner),
    }
    for number in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{number}."
        for name, (rows, columns) in products.items():
            shapes |= {f"{layer}{name}.weight": (rows, columns), f"{layer}{name}.bias": (rows,)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{layer}{name}.weight": (hidden,), f"{layer}{name}.bias": (hidden,)}
    return shapes
