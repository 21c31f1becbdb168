"""Reads the modules of a sentence-transformers folder: which there are, and those that follow the pooling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from chunkmill.domain.spaces import AnyPooling, Pooling, pooling_of
from chunkmill.models.files import broken, read_json, read_object, unsupported
from chunkmill.models.weights import weight_files

ACTIVATIONS: Final = frozenset({"GELU", "Identity", "ReLU", "SiLU", "Sigmoid", "Tanh"})
_POOLING_WORDS: Final[Mapping[str, Pooling]] = {
    "cls": Pooling.CLS,
    "mean": Pooling.MEAN,
    "lasttoken": Pooling.LAST_TOKEN,
    "max": Pooling.MAX,
    "mean_sqrt_len_tokens": Pooling.MEAN_SQRT_LEN,
    "weightedmean": Pooling.WEIGHTED_MEAN,
}
# In the order in which sentence-transformers puts the vectors of several one behind the other.
_OLD_POOLING_KEYS: Final[Mapping[str, str]] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """One ``Dense`` module: ``activation(x @ weight.T + bias)``. ``activation`` is one of ACTIVATIONS.

    With ``residual``, x is added to that; if the two have other sizes, ``x @ residual.weight.T``.
    """

    path: Path
    """The module's folder."""
    in_features: int
    out_features: int
    bias: bool
    activation: str
    residual: bool
    weights: Path
    """Its safetensors file. It is a ``.bin``, which is a pickle, only if the operator trusts the model with that."""


@dataclass(frozen=True, slots=True)
class LayerNormLayer:
    """One ``LayerNorm`` module over the dimensions of a vector, with torch's epsilon of 1e-5."""

    path: Path
    """The module's folder."""
    in_features: int
    weights: Path
    """As that of a DenseLayer."""

    @property
    def out_features(self) -> int:
        return self.in_features


Layer = DenseLayer | LayerNormLayer
Module = Layer | Literal["normalize"]
WITHOUT_EFFECT: Final = frozenset({"Dropout"})
"""Modules that only training needs."""
Entry = tuple[str, Path]
"""The class of a module, such as ``Pooling``, and its folder."""


def listed_modules(name: str, path: Path) -> list[Entry]:
    """The modules that modules.json lists, in order. Raises UnknownModel."""
    modules = read_json(path / "modules.json")
    if not isinstance(modules, list) or not all(isinstance(entry, dict) and "type" in entry for entry in modules):
        raise broken(path / "modules.json", "is not a list of modules")
    return [(kind_of(name, entry["type"]), inside(name, path, entry.get("path", ""))) for entry in modules]


def kind_of(name: str, reference: Any) -> str:
    """The class of a module, such as ``Pooling`` for ``sentence_transformers.models.Pooling``.

    Raises UnknownModel for a class of the folder's own.
    """
    reference = str(reference)
    if not reference.startswith("sentence_transformers."):
        raise unsupported(name, f"module {reference}: it is code that comes with the model")
    return str(reference.rpartition(".")[2])


def inside(name: str, path: Path, folder: Any) -> Path:
    """The folder of a module in ``path``. Raises UnknownModel if it would be elsewhere."""
    relative = PurePosixPath(str(folder))
    if relative.is_absolute() or ".." in relative.parts:
        raise unsupported(name, f"module path {relative}: it is not inside the folder")
    return path / relative


def read_pooling(name: str, file: Path) -> tuple[AnyPooling, bool]:
    """How the Pooling module of ``file`` pools, and whether it pools the tokens of the prompt. Raises UnknownModel."""
    config = read_object(file)
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [word for key, word in _OLD_POOLING_KEYS.items() if config.get(key)] or ["mean"]
    elif isinstance(modes, str):
        modes = [modes]
    if not isinstance(modes, list) or not modes or not all(isinstance(mode, str) for mode in modes):
        raise broken(file, "has a pooling_mode that is neither a word nor a list of words")
    if unknown := [mode for mode in modes if mode not in _POOLING_WORDS]:
        raise unsupported(name, f"pooling mode {unknown[0]}")
    pooling = pooling_of("+".join(_POOLING_WORDS[mode] for mode in modes))
    return pooling, bool(config.get("include_prompt", True))


def read_module(name: str, kind: str, folder: Path, *, pickle: bool) -> Module:
    """A module that follows the pooling. Raises UnknownModel."""
    if kind not in ("Dense", "LayerNorm", "Normalize"):
        raise unsupported(name, f"module {kind}")
    file = folder / "config.json"
    config = read_object(file) if file.is_file() else {}
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise unsupported(name, f"module {kind} with {key} {config[key]}")
    if kind == "Normalize":
        return "normalize"
    if kind == "LayerNorm":
        if type(dimension := config.get("dimension")) is not int:
            raise broken(file, "does not state dimension")
        return LayerNormLayer(folder, dimension, weight_files(name, folder, pickle=pickle)[0])
    library, _, activation = str(config.get("activation_function", "torch.nn.Tanh")).rpartition(".")
    if not library.startswith("torch.") or activation not in ACTIVATIONS:
        raise unsupported(name, f"the activation {activation} of module Dense")
    width, depth = config.get("in_features"), config.get("out_features")
    if not isinstance(width, int) or not isinstance(depth, int):
        raise broken(file, "does not state in_features and out_features")
    weights = weight_files(name, folder, pickle=pickle)[0]
    bias, residual = bool(config.get("bias", True)), bool(config.get("use_residual"))
    return DenseLayer(folder, width, depth, bias, activation, residual, weights)
