"""What the files of a model folder say about its vectors.

The rules are those of sentence-transformers 6.2 (``modules.json``, ``sentence_bert_config.json``, prompts),
so that a folder gives the same vectors there and here. Whatever would change the vectors in a way the
engine does not know is refused by its name, and code that comes with a model is never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from app.domain.spaces import OnLong, Pooling, SpaceSpec, long_text_for
from app.errors import UnknownModel
from app.models.digest import revision
from app.models.files import read_json, unsupported
from app.models.transformer import hidden_size, max_tokens, read_config, read_sentence_config

PROVIDER: Final = "local"
ACTIVATIONS: Final = frozenset({"GELU", "Identity", "ReLU", "SiLU", "Sigmoid", "Tanh"})

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
class DenseLayer:
    """One ``Dense`` module: ``activation(x @ weight.T + bias)``; ``activation`` is one of ACTIVATIONS."""

    path: Path
    in_features: int
    out_features: int
    bias: bool
    activation: str


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model on this machine: its space, and what the engine needs beyond it."""

    name: str
    path: Path
    spec: SpaceSpec
    transformer: Path
    """Folder of config.json, tokenizer and weights: ``path``, or a folder in it."""
    modules: tuple[DenseLayer | Literal["normalize"], ...]
    """What follows the pooling, in order."""
    include_prompt: bool = True
    """False: the model reads the prompt's tokens, the pooling leaves them out."""
    lowercase: bool = False
    """Texts are lower-cased before the tokenizer's own normaliser."""


def read_folder(name: str, path: Path, *, pooling: str | None, on_long: OnLong) -> ModelFolder:
    """Read a sentence-transformers folder (it has modules.json) or a plain transformers folder."""
    if (path / "modules.json").is_file():
        return _read_sentence_folder(name, path, pooling, on_long)
    if pooling is None:
        raise UnknownModel(
            f"model {name!r}: {path} is a plain transformers folder, which does not say how its tokens "
            f"become a vector: set EMBEDDING_POOLING (or pooling=) to one of {', '.join(Pooling)}"
        )
    config = read_config(name, path)
    spec = SpaceSpec(
        provider=PROVIDER,
        model=name,
        revision=revision(name, path, transformer=path, others=(), dense=()),
        dimensions=hidden_size(name, config),
        max_tokens=max_tokens(name, path, config, {}),
        pooling=_stated_pooling(name, pooling),
        normalize=True,
        long_text=long_text_for(on_long),
    )
    return ModelFolder(name, path, spec, path, ("normalize",))


def _read_sentence_folder(name: str, path: Path, pooling: str | None, on_long: OnLong) -> ModelFolder:
    listed = [(_kind(name, entry), _subfolder(name, path, entry)) for entry in read_json(path / "modules.json")]
    kinds = [kind for kind, _ in listed]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise unsupported(name, f"modules {' → '.join(kinds)}; they must begin with Transformer → Pooling")
    transformer, pooling_folder = listed[0][1], listed[1][1]
    config = read_config(name, transformer)
    sentence, sentence_file = read_sentence_config(name, transformer)
    mode, include_prompt = _read_pooling(name, read_json(pooling_folder / "config.json"))
    modules = tuple(_read_module(name, kind, folder) for kind, folder in listed[2:])
    dense = [module for module in modules if not isinstance(module, str)]
    document, query = _prompts(path)
    spec = SpaceSpec(
        provider=PROVIDER,
        model=name,
        revision=revision(
            name,
            path,
            transformer=transformer,
            others=(path / "modules.json", pooling_folder / "config.json", sentence_file),
            dense=[layer.path for layer in dense],
        ),
        dimensions=dense[-1].out_features if dense else hidden_size(name, config),
        max_tokens=max_tokens(name, transformer, config, sentence),
        pooling=check_pooling(name, mode, pooling),
        normalize=modules[-1:] == ("normalize",),
        document_prompt=document,
        query_prompt=query,
        long_text=long_text_for(on_long),
    )
    lowercase = bool(sentence.get("do_lower_case"))
    return ModelFolder(name, path, spec, transformer, modules, include_prompt, lowercase)


def check_pooling(name: str, mode: Pooling, asked: str | None) -> Pooling:
    """A folder that states its pooling is not given another one behind its back."""
    if asked is not None and _stated_pooling(name, asked) is not mode:
        raise UnknownModel(
            f"model {name!r} states {mode} pooling and EMBEDDING_POOLING (or pooling=) asks for {asked}: "
            "leave it unset for this model"
        )
    return mode


def _stated_pooling(name: str, word: str) -> Pooling:
    try:
        return Pooling(word)
    except ValueError:
        raise UnknownModel(
            f"model {name!r}: pooling {word!r} does not exist; it is one of {', '.join(Pooling)}"
        ) from None


def _kind(name: str, entry: Mapping[str, Any]) -> str:
    """``sentence_transformers.models.Pooling`` → ``Pooling``; the folder's own classes are refused."""
    reference = str(entry["type"])
    if not reference.startswith("sentence_transformers."):
        raise unsupported(name, f"module {reference}: it is code that comes with the model")
    return reference.rpartition(".")[2]


def _subfolder(name: str, path: Path, entry: Mapping[str, Any]) -> Path:
    relative = PurePosixPath(str(entry.get("path", "")))
    if relative.is_absolute() or ".." in relative.parts:
        raise unsupported(name, f"module path {relative}: it leads out of the folder")
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


def _read_module(name: str, kind: str, folder: Path) -> DenseLayer | Literal["normalize"]:
    if kind not in ("Dense", "Normalize"):
        raise unsupported(name, f"module {kind}")
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
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
    width, depth = int(config["in_features"]), int(config["out_features"])
    return DenseLayer(folder, width, depth, bool(config.get("bias", True)), activation)


def _prompts(path: Path) -> tuple[str, str]:
    """(document, query) prompts, as ``encode_document`` and ``encode_query`` choose them.

    SentenceTransformer always has prompts named ``document`` and ``query``, empty where the file has none,
    and both methods find those before ``passage``, ``corpus`` or ``default_prompt_name`` are looked at.
    """
    file = path / "config_sentence_transformers.json"
    prompts = read_json(file).get("prompts") or {} if file.is_file() else {}
    return prompts.get("document") or "", prompts.get("query") or ""
