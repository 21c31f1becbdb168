"""What the transformer's own files say: config.json, tokenizer_config.json, sentence_bert_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from app.errors import UnknownModel
from app.models.files import read_json, unsupported

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


def read_config(name: str, transformer: Path) -> dict[str, Any]:
    """config.json, if the engine can run its architecture; UnknownModel where it cannot."""
    if (transformer / "adapter_config.json").is_file():
        raise unsupported(name, "a PEFT adapter: merge it into its model and save that")
    if not (transformer / "config.json").is_file():
        raise UnknownModel(f"model {name!r}: {transformer} has no config.json, so it is not a model folder")
    config: dict[str, Any] = read_json(transformer / "config.json")
    kind = config.get("model_type")
    if "auto_map" in config and kind not in _NATIVE:
        raise unsupported(name, f"architecture {kind}: it is code that comes with the model, which is never run here")
    if kind in _ENCODER_DECODER or config.get("is_encoder_decoder"):
        raise unsupported(name, f"architecture {kind}: it is an encoder with a decoder")
    return config


def read_sentence_config(name: str, transformer: Path) -> tuple[dict[str, Any], Path]:
    """The settings of the Transformer module and the file they come from (it may be absent: no settings)."""
    files = [transformer / item for item in _SENTENCE_CONFIGS]
    file = next((item for item in files if item.is_file()), files[0])
    settings: dict[str, Any] = read_json(file) if file.is_file() else {}
    if settings.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise unsupported(name, f"transformer_task {settings['transformer_task']} in {file.name}")
    if "message" in settings.get("modality_config", {}):
        raise unsupported(name, f"the chat template that {file.name} asks for (modality_config: message)")
    for key in _UNKNOWN_SETTINGS:
        if settings.get(key):
            raise unsupported(name, f"{key} in {file.name}")
    return settings, file


def hidden_size(name: str, config: Mapping[str, Any]) -> int:
    """The width of a token vector, under the names that architectures give it."""
    for key in ("hidden_size", "d_model", "n_embd", "dim"):
        if isinstance(config.get(key), int):
            return int(config[key])
    raise UnknownModel(f"model {name!r}: its config.json does not state hidden_size")


def max_tokens(name: str, transformer: Path, config: Mapping[str, Any], sentence: Mapping[str, Any]) -> int:
    """max_seq_length, else the smaller of the tokenizer's and the positions' limit; never past the table.

    sentence-transformers lets 514 through for RoBERTa's kind where the tokenizer states nothing, and then
    fails on the 513th token; here the table's last row is the limit.
    """
    limits = []
    if isinstance(sentence.get("max_seq_length"), int):
        limits.append(sentence["max_seq_length"])
    else:
        file = transformer / "tokenizer_config.json"
        limits.append((read_json(file) if file.is_file() else {}).get("model_max_length"))
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
