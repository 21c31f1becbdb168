"""Finds and checks the adapter (LoRA, as PEFT saves it) that a task names. It is added to the weights at load.

A folder may hold several, one for each task: ``<transformer>/<task>/adapter_config.json``, or in a folder called
``adapters`` there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from chunkmill.errors import UnknownModel
from chunkmill.models.files import broken, read_object, unsupported
from chunkmill.models.weights import read_header

CONFIG: Final = "adapter_config.json"
_WEIGHTS: Final = "adapter_model.safetensors"
_STARTS: Final = (None, True, False, "gaussian", "orthogonal", "eva")
"""What ``init_lora_weights`` may be. Others, such as ``pissa``, change the weights of the model before they add."""
# What changes how an adapter is computed, and what it must state (or leave out) for `merge` to be right.
_PLAIN: Final[Mapping[str, tuple[Any, ...]]] = {
    "bias": (None, "none"),
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "lora_bias": (None, False),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "init_lora_weights": _STARTS,
    **dict.fromkeys(
        (f"{kind}_config" for kind in ("arrow", "corda", "kasa", "lora_ga", "monteclora", "velora")), (None,)
    ),
}
_PARTS: Final = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B", ".base_layer.weight")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter: for each layer that it changes, ``weight + scale * (B @ A)``.

    If it changes the table of token embeddings, PEFT saves that table with it, as ``base_layer``.
    """

    path: Path
    """Its folder."""
    scale: float

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def weights(self) -> Path:
        """Safetensors with the matrices A and B."""
        return self.path / _WEIGHTS


def find_adapter(name: str, transformer: Path, task: str) -> Adapter:
    """The adapter for ``task`` in the folder of a transformer. Raises UnknownModel if none there can be used."""
    places = [transformer / task, transformer / "adapters" / task]
    folder = next((place for place in places if (place / CONFIG).is_file()), None)
    if folder is None:
        there = sorted(
            file.parent.name for pattern in ("*/", "adapters/*/") for file in transformer.glob(pattern + CONFIG)
        )
        raise UnknownModel(
            f"model {name!r}: {transformer} has no adapter called {task!r}; its adapters are "
            f"{', '.join(there) or 'none'}. Name one of them with task="
        )
    file = folder / CONFIG
    config = read_object(file)
    if (kind := config.get("peft_type")) != "LORA":
        raise unsupported(name, f"an adapter of type {kind} in {file}, and only LORA can be added to its weights")
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain:
            raise unsupported(name, f"{key} in {file}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise broken(file, "does not state r and lora_alpha")
    if not (folder / _WEIGHTS).is_file():
        raise UnknownModel(f"model {name!r}: {folder} has no {_WEIGHTS}: copy the folder again")
    for tensor in read_header(folder / _WEIGHTS)[1]:
        if not tensor.endswith(_PARTS):
            raise unsupported(name, f"the tensor {tensor[:200]} in {folder / _WEIGHTS}, which is no LoRA matrix")
    return Adapter(folder, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
