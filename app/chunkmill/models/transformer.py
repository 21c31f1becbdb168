"""What the transformer's own files say: config.json, tokenizer_config.json, sentence_bert_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from chunkmill.errors import UnknownModel
from chunkmill.models.files import broken, read_object, unsupported

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


# Of these one must be there, or the folder has no tokenizer.
_TOKENIZERS: Final = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "tokenizer.model",
)


def read_config(name: str, transformer: Path, *, remote_code: bool) -> tuple[dict[str, Any], list[Path]]:
    """config.json, and the code in the folder that its architecture needs; none for those transformers knows.

    UnknownModel where the engine cannot run the architecture, or only with code that it was not trusted with
    (``remote_code``).
    """
    if (transformer / "adapter_config.json").is_file():
        raise unsupported(name, "a PEFT adapter: merge it into its model and save that")
    if not (transformer / "config.json").is_file():
        raise UnknownModel(f"model {name!r}: {transformer} has no config.json, so it is not a model folder")
    config = read_object(transformer / "config.json")
    kind = config.get("model_type")
    if kind in _ENCODER_DECODER or config.get("is_encoder_decoder"):
        raise unsupported(name, f"architecture {kind}: it is an encoder with a decoder")
    code: list[Path] = []
    if "auto_map" in config and kind not in _NATIVE:
        if not remote_code:
            raise UnknownModel(
                f"model {name!r}: the architecture {kind} in {transformer / 'config.json'} is code that comes with the "
                "model (auto_map), which is not run here. Choose another model, or read its .py files and, if you "
                "trust them, name this model in EMBEDDING_TRUST_REMOTE_CODE"
            )
        code = _code(name, transformer, config["auto_map"])
    if not any((transformer / file).is_file() for file in _TOKENIZERS):
        raise UnknownModel(
            f"model {name!r}: {transformer} has no tokenizer.json (nor vocab.txt or a SentencePiece model): copy the "
            "folder again, or save its tokenizer there with AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    return config, code


def _code(name: str, transformer: Path, auto_map: Any) -> list[Path]:
    """Every Python file of the folder: what auto_map names imports others beside it."""
    if not isinstance(auto_map, dict):
        raise broken(transformer / "config.json", "has an auto_map that is not from classes to code")
    # A tokenizer has two: the slow one and the fast one, either of which may be null.
    listed = [each for value in auto_map.values() for each in (value if isinstance(value, list) else [value])]
    for reference in map(str, filter(None, listed)):
        if "--" in reference:
            raise UnknownModel(
                f"model {name!r}: its code {reference} lies in another repository, which its revision says nothing of: "
                "copy that .py file and those it imports into the folder and take the part up to -- out of auto_map"
            )
        if not (file := transformer / f"{reference.partition('.')[0]}.py").is_file():
            raise UnknownModel(f"model {name!r}: {file} is missing, which auto_map names: copy or download it, too")
    return sorted(transformer.rglob("*.py"))


def read_sentence_config(name: str, transformer: Path) -> tuple[dict[str, Any], Path]:
    """The settings of the Transformer module and the file they come from (it may be absent: no settings)."""
    files = [transformer / item for item in _SENTENCE_CONFIGS]
    file = next((item for item in files if item.is_file()), files[0])
    settings = read_object(file) if file.is_file() else {}
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
        limits.append((read_object(file) if file.is_file() else {}).get("model_max_length"))
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
