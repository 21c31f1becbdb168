"""Reads from the files of a model folder how its vectors are made.

The rules are those of sentence-transformers 6.2 (``modules.json``, ``sentence_bert_config.json``, prompts), so a folder
gives the same vectors there and here. Everything that would change the vectors in a way that the engine does not
support is refused by its name. Code that comes with a model is run, and a pickle is read, only if the operator trusts
that model by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from chunkmill.domain.spaces import OnLong, Pooling, Precision, SpaceSpec, long_text_for
from chunkmill.errors import UnknownModel
from chunkmill.models.digest import revision
from chunkmill.models.files import broken, read_json, read_object, unsupported
from chunkmill.models.matryoshka import check_dimensions, stated_sizes
from chunkmill.models.transformer import hidden_size, max_tokens, read_config, read_sentence_config
from chunkmill.models.weights import check_shapes, weight_files

PROVIDER: Final = "local"
ACTIVATIONS: Final = frozenset({"GELU", "Identity", "ReLU", "SiLU", "Sigmoid", "Tanh"})

_OURS: Final = tuple(mode for mode in Pooling if mode is not Pooling.PROVIDER)
_POOLING_WORDS: Final[Mapping[str, Pooling]] = {
    "cls": Pooling.CLS,
    "mean": Pooling.MEAN,
    "lasttoken": Pooling.LAST_TOKEN,
    "max": Pooling.MAX,
    "mean_sqrt_len_tokens": Pooling.MEAN_SQRT_LEN,
}
_OLD_POOLING_KEYS: Final[Mapping[str, str]] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """What the caller and the operator say about a model, in addition to its files."""

    pooling: str | None = None
    """The pooling of a plain transformers folder."""
    on_long: OnLong = OnLong.TRUNCATE
    precision: Precision = Precision.FLOAT
    pickle: bool = False
    """Its weights may be read from a pickle."""
    remote_code: bool = False
    """Its Python files may be run."""
    matryoshka: bool = False
    """It was trained for any number of dimensions."""


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """One ``Dense`` module: ``activation(x @ weight.T + bias)``. ``activation`` is one of ACTIVATIONS."""

    path: Path
    """The module's folder."""
    in_features: int
    out_features: int
    bias: bool
    activation: str
    weights: Path
    """Its safetensors file. It is a ``.bin``, which is a pickle, only if the operator trusts the model with that."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model on this machine: the space of its full vectors, and what else the engine needs to make them."""

    name: str
    path: Path
    spec: SpaceSpec
    transformer: Path
    """The folder of config.json, tokenizer and weights: ``path``, or a folder in it."""
    modules: tuple[DenseLayer | Literal["normalize"], ...]
    """The modules after the pooling, in order."""
    include_prompt: bool = True
    """If False, the model reads the prompt's tokens, and the pooling leaves them out."""
    lowercase: bool = False
    """Texts are turned into lower case before the tokenizer's own normaliser."""
    pickle: bool = False
    """The weights are a pickle that the operator trusts, because there is no model.safetensors."""
    remote_code: bool = False
    """The architecture is code in the folder that the operator trusts."""
    default_dimensions: int = 0
    """The number of dimensions that the folder states (``truncate_dim``); 0 for all that the model gives."""
    sizes: Sequence[int] = ()
    """The smaller numbers of dimensions that its vectors may be cut to."""
    matryoshka: bool = False
    """The operator says that the model was trained for any number of dimensions."""

    def space(self, dimensions: int | None = None) -> SpaceSpec:
        """The space of vectors with ``dimensions``; None takes the number that the folder states.

        The engine makes full vectors and cuts them for each space. Raises InvalidInput if they may not be cut.
        """
        full = self.spec.dimensions
        if dimensions is None:
            dimensions = self.default_dimensions or full
        checked = check_dimensions(self.name, full, dimensions, self.sizes, trusted=self.matryoshka)
        return replace(self.spec, dimensions=checked)


def read_folder(name: str, path: Path, options: ModelOptions) -> ModelFolder:
    """The model in ``path``: a sentence-transformers folder, which has modules.json, or a plain transformers folder.

    Raises UnknownModel.
    """
    if (path / "modules.json").is_file():
        return _read_sentence_folder(name, path, options)
    if options.pooling is None:
        raise UnknownModel(
            f"model {name!r}: {path} is a plain transformers folder, which does not say how token vectors "
            f"become a text vector: set EMBEDDING_POOLING (or pooling=) to one of {', '.join(_OURS)}"
        )
    pooling = _stated_pooling(name, options.pooling)
    return _assemble(name, path, options, path, pooling=pooling, modules=("normalize",))


def _read_sentence_folder(name: str, path: Path, options: ModelOptions) -> ModelFolder:
    listed = [(_kind(name, entry), _subfolder(name, path, entry)) for entry in _module_list(path)]
    kinds = [kind for kind, _ in listed]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise unsupported(name, f"modules {' → '.join(kinds)}; they must begin with Transformer → Pooling")
    transformer, pooling_folder = listed[0][1], listed[1][1]
    sentence, sentence_file = read_sentence_config(name, transformer)
    mode, include_prompt = _read_pooling(name, read_object(pooling_folder / "config.json"))
    return _assemble(
        name,
        path,
        options,
        transformer,
        pooling=check_pooling(name, mode, options.pooling),
        modules=tuple(_read_module(name, kind, folder, pickle=options.pickle) for kind, folder in listed[2:]),
        sentence=sentence,
        used=_read_sentence_config(path),
        others=(path / "modules.json", pooling_folder / "config.json", sentence_file),
        include_prompt=include_prompt,
    )


@dataclass(frozen=True, slots=True)
class _SentenceConfig:
    """The content of config_sentence_transformers.json, which the revision does not cover."""

    document_prompt: str = ""
    query_prompt: str = ""
    truncate_dim: int | None = None


def _assemble(
    name: str,
    path: Path,
    options: ModelOptions,
    transformer: Path,
    *,
    pooling: Pooling,
    modules: tuple[DenseLayer | Literal["normalize"], ...],
    sentence: Mapping[str, Any] | None = None,
    used: _SentenceConfig | None = None,
    others: Sequence[Path] = (),
    include_prompt: bool = True,
) -> ModelFolder:
    """The model of a folder of either kind, from its configuration and weights."""
    sentence, used = sentence or {}, used or _SentenceConfig()
    config, code = read_config(name, transformer, remote_code=options.remote_code)
    weights = weight_files(name, transformer, pickle=options.pickle)
    check_shapes(name, weights, config)
    dense = [module for module in modules if not isinstance(module, str)]
    pickle = weights[0].suffix == ".bin"
    index = [transformer / "pytorch_model.bin.index.json"] if pickle else []
    full = hidden_size(name, config)
    for layer in dense:
        if layer.in_features != full:
            raise broken(layer.path / "config.json", f"takes {layer.in_features} dimensions and gets {full}")
        full = layer.out_features
    default = min(used.truncate_dim or full, full)
    spec = SpaceSpec(
        provider=PROVIDER,
        model=name,
        revision=revision(
            path,
            transformer=transformer,
            others=[*others, *(layer.path / "config.json" for layer in dense), *code, *index],
            weights=[*weights, *(layer.weights for layer in dense)],
        ),
        dimensions=full,
        max_tokens=max_tokens(name, transformer, config, sentence),
        pooling=pooling,
        normalize=modules[-1:] == ("normalize",),
        document_prompt=used.document_prompt,
        query_prompt=used.query_prompt,
        long_text=long_text_for(options.on_long),
        precision=options.precision,
    )
    return ModelFolder(
        name,
        path,
        spec,
        transformer,
        modules,
        include_prompt=include_prompt,
        lowercase=bool(sentence.get("do_lower_case")),
        pickle=pickle,
        remote_code=bool(code),
        default_dimensions=default,
        sizes=stated_sizes(name, full, config, default),
        matryoshka=options.matryoshka,
    )


def check_pooling(name: str, mode: Pooling, asked: str | None) -> Pooling:
    """The pooling ``mode`` that a folder states. Raises UnknownModel if the caller asks for another one."""
    if asked is not None and _stated_pooling(name, asked) is not mode:
        raise UnknownModel(
            f"model {name!r} states {mode} pooling, but EMBEDDING_POOLING (or pooling=) asks for {asked}: "
            "leave it unset for this model"
        )
    return mode


def _stated_pooling(name: str, word: str) -> Pooling:
    if word not in _OURS:
        raise UnknownModel(f"model {name!r}: pooling {word!r} does not exist; it is one of {', '.join(_OURS)}")
    return Pooling(word)


def _module_list(path: Path) -> list[dict[str, Any]]:
    modules = read_json(path / "modules.json")
    if not isinstance(modules, list) or not all(isinstance(entry, dict) and "type" in entry for entry in modules):
        raise broken(path / "modules.json", "is not a list of modules")
    return modules


def _kind(name: str, entry: Mapping[str, Any]) -> str:
    """The class of a module, such as ``Pooling`` for ``sentence_transformers.models.Pooling``.

    Raises UnknownModel for a class of the folder's own.
    """
    reference = str(entry["type"])
    if not reference.startswith("sentence_transformers."):
        raise unsupported(name, f"module {reference}: it is code that comes with the model")
    return reference.rpartition(".")[2]


def _subfolder(name: str, path: Path, entry: Mapping[str, Any]) -> Path:
    relative = PurePosixPath(str(entry.get("path", "")))
    if relative.is_absolute() or ".." in relative.parts:
        raise unsupported(name, f"module path {relative}: it is not inside the folder")
    return path / relative


def _read_pooling(name: str, config: Mapping[str, Any]) -> tuple[Pooling, bool]:
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [word for key, word in _OLD_POOLING_KEYS.items() if config.get(key)] or ["mean"]
    elif isinstance(modes, str):
        modes = [modes]
    if len(modes) != 1:
        raise unsupported(name, f"several pooling modes at once ({', '.join(modes)})")
    if modes[0] not in _POOLING_WORDS:
        raise unsupported(name, f"pooling mode {modes[0]}")
    return _POOLING_WORDS[modes[0]], bool(config.get("include_prompt", True))


def _read_module(name: str, kind: str, folder: Path, *, pickle: bool) -> DenseLayer | Literal["normalize"]:
    if kind not in ("Dense", "Normalize"):
        raise unsupported(name, f"module {kind}")
    file = folder / "config.json"
    config = read_object(file) if file.is_file() else {}
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise unsupported(name, f"module {kind} with {key} {config[key]}")
    if kind == "Normalize":
        return "normalize"
    library, _, activation = config.get("activation_function", "torch.nn.Tanh").rpartition(".")
    if not library.startswith("torch.") or activation not in ACTIVATIONS:
        raise unsupported(name, f"the activation {activation} of module Dense")
    if config.get("use_residual"):
        raise unsupported(name, "module Dense with use_residual")
    width, depth = config.get("in_features"), config.get("out_features")
    if not isinstance(width, int) or not isinstance(depth, int):
        raise broken(file, "does not state in_features and out_features")
    weights = weight_files(name, folder, pickle=pickle)[0]
    return DenseLayer(folder, width, depth, bool(config.get("bias", True)), activation, weights)


def _read_sentence_config(path: Path) -> _SentenceConfig:
    """The prompts that ``encode_document`` and ``encode_query`` choose, and the size that vectors are cut to.

    SentenceTransformer always has prompts named ``document`` and ``query``, which are empty if the file has none. Both
    methods find these first, so ``passage``, ``corpus`` and ``default_prompt_name`` are never used.
    """
    file = path / "config_sentence_transformers.json"
    content = read_object(file) if file.is_file() else {}
    prompts = content.get("prompts") or {}
    size = content.get("truncate_dim")
    if not isinstance(prompts, dict) or not (size is None or (isinstance(size, int) and size > 0)):
        raise broken(file, "has prompts or a truncate_dim of an unknown form")
    return _SentenceConfig(prompts.get("document") or "", prompts.get("query") or "", size)
