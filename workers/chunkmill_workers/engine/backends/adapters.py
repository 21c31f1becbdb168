"""Adds a LoRA adapter to the weights of a loaded model, so that the forward pass costs what it costs without one.

``weight + scale * (B @ A)``, in fp32: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv
2106.09685, section 4.1. The names of the tensors are those of PEFT.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from chunkmill.errors import ModelLoadError
from chunkmill.models.adapters import Adapter

_PREFIX: Final = "base_model.model."


def merge(model: Any, adapter: Adapter) -> None:
    """Change the weights of ``model``, a model of transformers, in place. Raises ModelLoadError."""
    from safetensors.torch import load_file

    try:
        tensors = load_file(str(adapter.weights))
    except Exception as error:
        raise ModelLoadError(f"{adapter.weights} cannot be read ({type(error).__name__}: {error})") from error
    modules = dict(model.named_modules())
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.removesuffix(".weight").rpartition(".")
        pairs.setdefault(layer.removeprefix(_PREFIX), {})[part] = tensor.float()
    for layer, parts in pairs.items():
        module = modules.get(layer)
        base = parts.pop("base_layer", None)
        linear = parts.keys() == {"lora_A", "lora_B"} and isinstance(module, torch.nn.Linear)
        table = parts.keys() == {"lora_embedding_A", "lora_embedding_B"} and isinstance(module, torch.nn.Embedding)
        if module is None or not (linear or table):
            raise ModelLoadError(
                f"{adapter.weights} changes {layer!r}, which is not a linear layer or a table of embeddings of this "
                "model, or has one matrix of two: copy the adapter of this model again"
            )
        down, up = (parts[f"lora_{'' if linear else 'embedding_'}{half}"] for half in ("A", "B"))
        weight: torch.Tensor = module.weight if base is None else base
        shape = tuple(module.weight.shape)[:: 1 if linear else -1]
        if (
            weight.shape != module.weight.shape
            or down.ndim != 2
            or up.ndim != 2
            or up.shape[1] != down.shape[0]
            or (len(up), down.shape[1]) != shape
        ):
            raise ModelLoadError(
                f"the matrices for {layer!r} in {adapter.weights} are {tuple(up.shape)} and {tuple(down.shape)}, which "
                f"do not give {shape}: they belong to another model. Copy the adapter of this model again"
            )
        change = adapter.scale * (up @ down)
        # In the table's own format the sum would lose what is smaller than its last digit.
        module.weight.data = weight.data.float() + (change if linear else change.T)
