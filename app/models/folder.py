"""What the files of a model folder say about its vectors.

The rules are those of sentence-transformers 6.2 (``modules.json``, ``sentence_bert_config.json``, prompts),
so that a folder gives the same vectors there and here. Whatever would change the vectors in a way the
engine does not know is refused by its name, and code that comes with a model is never run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from app.domain.spaces import OnLong, Pooling, SpaceSpec, long_text_for
from app.errors import UnknownModel
from app.models.digest import revision

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

# Architectures with a table of learned positions, and how many of its rows lie before position 0: RoBERTa's
# kind counts from padding_idx + 1, so that 514 rows hold 512 tokens.
_LEARNED_POSITIONS: Final[Mapping[str, int]] = {
    "albert": 0,
    "bert": 0,
    "camembert": 2,
    "distilbert": 0,
    "electra": 0,
    "mpnet": 2,
    "roberta": 2,
    "xlm-roberta": 2,
}
# What transformers runs with code of its own even where config.json has an auto_map to the folder's code.
_NATIVE: Final = frozenset({*_LEARNED_POSITIONS, "modernbert", "nomic_bert", "qwen2", "qwen3"})
_ENCODER_DECODER: Final = frozenset({"bart", "m2m_100", "marian", "mbart", "mt5", "pegasus", "t5", "umt5"})

_SENTENCE_CONFIGS: Final = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Settings of the Transformer module that change what the model sees, and that the engine does not know.
_UNKNOWN_SETTINGS: Final = ("query_length", "document_length", "query_expansion", "processing_kwargs")


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
            f"model {name!r}: {path} is a plain transformers folder, which does not say how its tokens become "
            f"a vector: set EMBEDDING_POOLING (or pooling=) to one of {', '.join(Pooling)}"
        )
    config = _read_config(name, path)
    spec = SpaceSpec(
        provider=PROVIDER,
        model=name,
        revision=revision(name, path, transformer=path, others=(), dense=()),
        dimensions=_hidden_size(name, config),
        max_tokens=_max_tokens(name, path, config, {}),
        pooling=_stated_pooling(name, pooling),
        normalize=True,
        long_text=long_text_for(on_long),
    )
    return ModelFolder(name, path, spec, path, ("normalize",))


def _read_sentence_folder(name: str, path: Path, pooling: str | None, on_long: OnLong) -> ModelFolder:
    listed = [(_kind(name, entry), _subfolder(name, path, entry)) for entry in _json(path / "modules.json")]
    kinds = [kind for kind, _ in listed]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise _unsupported(name, f"modules {' → '.join(kinds)}; they must begin with Transformer → Pooling")
    transformer, pooling_folder = listed[0][1], listed[1][1]
    config = _read_config(name, transformer)
    sentence, sentence_file = _sentence_config(name, transformer)
    mode, include_prompt = _read_pooling(name, _json(pooling_folder / "config.json"))
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
        dimensions=dense[-1].out_features if dense else _hidden_size(name, config),
        max_tokens=_max_tokens(name, transformer, config, sentence),
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
        raise _unsupported(name, f"module {reference}: it is code that comes with the model")
    return reference.rpartition(".")[2]


def _subfolder(name: str, path: Path, entry: Mapping[str, Any]) -> Path:
    relative = PurePosixPath(str(entry.get("path", "")))
    if relative.is_absolute() or ".." in relative.parts:
        raise _unsupported(name, f"module path {relative}: it leads out of the folder")
    return path / relative


def _read_config(name: str, transformer: Path) -> dict[str, Any]:
    if (transformer / "adapter_config.json").is_file():
        raise _unsupported(name, "a PEFT adapter: merge it into its model and save that")
    if not (transformer / "config.json").is_file():
        raise UnknownModel(f"model {name!r}: {transformer} has no config.json, so it is not a model folder")
    config: dict[str, Any] = _json(transformer / "config.json")
    kind = config.get("model_type")
    if "auto_map" in config and kind not in _NATIVE:
        raise _unsupported(
            name, f"architecture {kind}: it is code that comes with the model, which is never run here"
        )
    if kind in _ENCODER_DECODER or config.get("is_encoder_decoder"):
        raise _unsupported(name, f"architecture {kind}: it is an encoder with a decoder")
    return config


def _sentence_config(name: str, transformer: Path) -> tuple[dict[str, Any], Path]:
    files = [transformer / item for item in _SENTENCE_CONFIGS]
    file = next((item for item in files if item.is_file()), files[0])
    settings: dict[str, Any] = _json(file) if file.is_file() else {}
    if settings.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise _unsupported(name, f"transformer_task {settings['transformer_task']} in {file.name}")
    if "message" in settings.get("modality_config", {}):
        raise _unsupported(name, f"the chat template that {file.name} asks for (modality_config: message)")
    for key in _UNKNOWN_SETTINGS:
        if settings.get(key):
            raise _unsupported(name, f"{key} in {file.name}")
    return settings, file


def _read_pooling(name: str, config: Mapping[str, Any]) -> tuple[Pooling, bool]:
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [word for key, word in _OLD_POOLING_KEYS.items() if config.get(key)] or ["mean"]
    elif isinstance(modes, str):
        modes = [modes]
    if len(modes) != 1:
        raise _unsupported(name, f"several pooling modes at once ({', '.join(modes)})")
    if modes[0] not in _POOLING_WORDS:
        raise _unsupported(name, f"pooling mode {modes[0]}")
    return _POOLING_WORDS[modes[0]], bool(config.get("include_prompt", True))


def _read_module(name: str, kind: str, folder: Path) -> DenseLayer | Literal["normalize"]:
    if kind not in ("Dense", "Normalize"):
        raise _unsupported(name, f"module {kind}")
    config = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise _unsupported(name, f"module {kind} with {key} {config[key]}")
    if kind == "Normalize":
        return "normalize"
    library, _, activation = config.get("activation_function", "torch.nn.Tanh").rpartition(".")
    if not library.startswith("torch.") or activation not in ACTIVATIONS:
        raise _unsupported(name, f"the activation {activation} of module Dense")
    if config.get("use_residual"):
        raise _unsupported(name, "module Dense with use_residual")
    width, depth = int(config["in_features"]), int(config["out_features"])
    return DenseLayer(folder, width, depth, bool(config.get("bias", True)), activation)


def _prompts(path: Path) -> tuple[str, str]:
    """(document, query) prompts, as ``encode_document`` and ``encode_query`` choose them.

    SentenceTransformer always has prompts named ``document`` and ``query``, empty where the file has none,
    and both methods find those before ``passage``, ``corpus`` or ``default_prompt_name`` are looked at.
    """
    file = path / "config_sentence_transformers.json"
    prompts = _json(file).get("prompts") or {} if file.is_file() else {}
    return prompts.get("document") or "", prompts.get("query") or ""


def _hidden_size(name: str, config: Mapping[str, Any]) -> int:
    for key in ("hidden_size", "d_model", "n_embd", "dim"):
        if isinstance(config.get(key), int):
            return int(config[key])
    raise UnknownModel(f"model {name!r}: its config.json does not state hidden_size")


def _max_tokens(
    name: str, transformer: Path, config: Mapping[str, Any], sentence: Mapping[str, Any]
) -> int:
    """max_seq_length, else the smaller of the tokenizer's and the positions' limit; never past the table.

    sentence-transformers lets 514 through for RoBERTa's kind where the tokenizer states nothing, and then
    fails on the 513th token; here the table's last row is the limit.
    """
    limits = []
    if isinstance(sentence.get("max_seq_length"), int):
        limits.append(sentence["max_seq_length"])
    else:
        file = transformer / "tokenizer_config.json"
        limits.append((_json(file) if file.is_file() else {}).get("model_max_length"))
        limits.append(config.get("max_position_embeddings", config.get("n_positions")))
    if config.get("model_type") in _LEARNED_POSITIONS and "max_position_embeddings" in config:
        limits.append(config["max_position_embeddings"] - _LEARNED_POSITIONS[config["model_type"]])
    # A tokenizer without a limit states 1e30.
    stated = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < 10**9]
    if not stated:
        raise UnknownModel(
            f"model {name!r}: nothing in {transformer} states its longest input: write model_max_length "
            "into tokenizer_config.json"
        )
    return min(stated)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnknownModel(f"{path} cannot be read ({error.strerror}): copy the model folder again") from error
    except ValueError as error:
        raise UnknownModel(f"{path} is not JSON ({error}): copy the model folder again") from error


def _unsupported(name: str, what: str) -> UnknownModel:
    return UnknownModel(f"model {name!r} uses {what}. Chunkmill does not support that; choose another model")
