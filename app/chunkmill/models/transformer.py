"""Reads the transformer's own files: config.json, tokenizer_config.json and sentence_bert_config.json."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from chunkmill.errors import UnknownModel
from chunkmill.models.choices import check_choices
from chunkmill.models.files import broken, read_object, unsupported

# Models of RoBERTa's kind: a token's position is counted from padding_idx + 1, over the tokens that are not padding.
POSITIONS_FROM_PAD: Final = frozenset(
    {"camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta"}
    | {"roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
)
# Architectures with a table of learned positions, and the number of its rows before position 0. In models of RoBERTa's
# kind padding_idx is 1, so 514 rows hold 512 tokens.
_LEARNED_POSITIONS: Final[Mapping[str, int]] = {
    **dict.fromkeys(("albert", "bert", "distilbert", "electra"), 0),
    **dict.fromkeys(POSITIONS_FROM_PAD - {"esm"}, 2),
}
# Architectures that transformers runs with its own code, even if auto_map in config.json names code in the folder. For
# the second line, transformers took the code of such folders over.
_BUILT_IN: Final = frozenset(
    {*_LEARNED_POSITIONS, "modernbert", "nomic_bert", "qwen2", "qwen3"}
    | {"embedding_gemma2", "embedding_gemma2_text", "eurobert", "gte", "jina_embeddings_v3"}
)
# Architectures of folders whose own code transformers took over under another name, with a repository that has it.
_TAKEN_OVER: Final[Mapping[str, tuple[str, str]]] = {
    "new": ("gte", "alibaba-nlp-community/gte-multilingual-base"),
}
_MOST_TOKENS: Final = 2**20
"""A larger limit states nothing: tokenizers without a limit have 10^30. Tables of positions are made for each token."""
_MOST_HIDDEN: Final = 65_536
_ENCODER_DECODER: Final = frozenset({"bart", "m2m_100", "marian", "mbart", "pegasus"})
ENCODERS_OF_T5: Final[Mapping[str, str]] = {
    "mt5": "MT5EncoderModel",
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
}
"""Architectures with a decoder whose encoder alone makes vectors (sentence-t5, gtr), and its class in transformers. A
folder may hold the decoder's weights too. They are not loaded."""

_SENTENCE_CONFIGS: Final = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Settings of the Transformer module that change the model's input, and that the engine does not support.
_UNKNOWN_SETTINGS: Final = (
    *("query_length", "document_length", "query_expansion", "processing_kwargs", "tokenizer_name_or_path"),
)
# Arguments for transformers that the Transformer module may state, by their names of today and of before, and those of
# them that change no vector: how the model is computed, and where its files are.
_ARGUMENTS: Final[Mapping[str, str]] = {
    "model_args": "model_kwargs",
    "tokenizer_args": "processor_kwargs",
    "config_args": "config_kwargs",
}
_LENGTH_ARGUMENT: Final = ("processor_kwargs", "model_max_length")
_HARMLESS: Final = frozenset(
    {"add_pooling_layer", "attn_implementation", "cache_dir", "clean_up_tokenization_spaces", "device_map", "dtype"}
    | {"local_files_only", "low_cpu_mem_usage", "padding_side", "token", "torch_dtype", "trust_remote_code"}
    | {"unpad_inputs", "use_cache", "use_fast", "use_memory_efficient_attention", "use_safetensors"}
)


# One of these files must exist, or the folder has no tokenizer.
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
    """config.json, and the code in the folder that its architecture needs; none if transformers knows it.

    Raises UnknownModel if the engine cannot run the architecture, or could only with code that ``remote_code`` does not
    allow.
    """
    if (transformer / "adapter_config.json").is_file():
        raise unsupported(name, "a PEFT adapter: merge it into its model and save the result")
    if not (transformer / "config.json").is_file():
        raise UnknownModel(f"model {name!r}: {transformer} has no config.json, so it is not a model folder")
    config = read_object(transformer / "config.json")
    check_choices(name, config, transformer / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise broken(transformer / "config.json", "does not state a model_type")
    if kind in _ENCODER_DECODER or (config.get("is_encoder_decoder") and kind not in ENCODERS_OF_T5):
        raise unsupported(name, f"architecture {kind}, which is an encoder with a decoder")
    code: list[Path] = []
    if "auto_map" in config and kind not in _BUILT_IN:
        if not remote_code:
            built_in = _TAKEN_OVER.get(kind)
            other = (
                "Choose another model"
                if built_in is None
                else f"transformers has it built in under the name {built_in[0]}: take a folder that was saved for it, "
                f"such as {built_in[1]}"
            )
            raise UnknownModel(
                f"model {name!r}: the architecture {kind} in {transformer / 'config.json'} is code that comes with the "
                f"model (auto_map), which is not run here. {other}, or read its .py files and, if you trust them, name "
                "this model in EMBEDDING_TRUST_REMOTE_CODE"
            )
        code = _code(name, transformer, config["auto_map"])
    if not any((transformer / file).is_file() for file in _TOKENIZERS):
        raise UnknownModel(
            f"model {name!r}: {transformer} has no tokenizer.json (nor vocab.txt or a SentencePiece model): copy the "
            "folder again, or save its tokenizer there with AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    return config, code


def _code(name: str, transformer: Path, auto_map: Any) -> list[Path]:
    """Every Python file of the folder, because the files that auto_map names import others beside them."""
    if not isinstance(auto_map, dict):
        raise broken(transformer / "config.json", "has an auto_map that does not map classes to code")
    # A tokenizer has two references, one for the slow and one for the fast class, and either may be null.
    listed = [reference for value in auto_map.values() for reference in (value if isinstance(value, list) else [value])]
    for reference in map(str, filter(None, listed)):
        if "--" in reference:
            raise UnknownModel(
                f"model {name!r}: its code {reference} is in another repository, which its revision does not cover: "
                "copy that .py file and those that it imports into the folder, and remove the part up to -- in auto_map"
            )
        if not (file := transformer / f"{reference.partition('.')[0]}.py").is_file():
            raise UnknownModel(f"model {name!r}: {file}, which auto_map names, is missing: copy or download it too")
    return sorted(transformer.rglob("*.py"))


def read_sentence_config(name: str, transformer: Path) -> tuple[dict[str, Any], Path]:
    """The settings of the Transformer module, and their file. If it does not exist, there are no settings.

    Raises UnknownModel for a setting that the engine does not support.
    """
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
    for key, argument, value in _arguments(settings, file):
        if value is not None and argument not in _HARMLESS and (key, argument) != _LENGTH_ARGUMENT:
            raise unsupported(name, f"{key} {argument} in {file.name}")
    return settings, file


def _arguments(settings: Mapping[str, Any], file: Path) -> Iterator[tuple[str, str, Any]]:
    """The arguments for transformers that the Transformer module states: (``processor_kwargs``, name, value)."""
    for old, key in _ARGUMENTS.items():
        arguments = settings.get(key) or settings.get(old) or {}
        if not isinstance(arguments, dict):
            raise broken(file, f"has {key} of an unknown form")
        for argument, value in arguments.items():
            yield key, argument, value


def hidden_size(name: str, config: Mapping[str, Any]) -> int:
    """Numbers in a token vector, which architectures call by different names. Raises UnknownModel.

    EmbeddingGemma 2 projects its token vectors before it returns them, and is made of one model for each kind of input.
    """
    if isinstance(text := config.get("text_config"), dict):
        config = text
    if str(config.get("model_type")).startswith("embedding_gemma2"):
        config = {"hidden_size": config.get("embedding_dim", 768)}  # the default of transformers, which it leaves out
    for key in ("hidden_size", "d_model", "n_embd", "dim"):
        if isinstance(config.get(key), int):
            if not 0 < config[key] <= _MOST_HIDDEN:
                raise UnknownModel(f"model {name!r}: {key} in its config.json must be from 1 to {_MOST_HIDDEN:,}")
            return int(config[key])
    raise UnknownModel(f"model {name!r}: its config.json does not state hidden_size")


def max_tokens(name: str, transformer: Path, config: Mapping[str, Any], sentence: Mapping[str, Any]) -> int:
    """The most tokens that the model reads, special tokens included. Raises UnknownModel if nothing states it.

    It is model_max_length of processor_kwargs, or max_seq_length, else the smaller limit of tokenizer and positions,
    and never more than the table of positions holds. In sentence-transformers a model of RoBERTa's kind may read 514
    tokens if its tokenizer states no limit, and fails at the 513th; here the limit is 512.
    """
    sentence_file = transformer / _SENTENCE_CONFIGS[0]
    arguments = {(key, argument): value for key, argument, value in _arguments(sentence, sentence_file)}
    own = [
        _limit(arguments.get(_LENGTH_ARGUMENT), sentence_file, "model_max_length"),
        _limit(sentence.get("max_seq_length"), sentence_file, "max_seq_length"),
    ]
    limits: list[int | None] = []
    limits += [limit for limit in own if limit is not None][:1]
    config_file = transformer / "config.json"
    if not limits:
        file = transformer / "tokenizer_config.json"
        tokenizer = read_object(file) if file.is_file() else {}
        positions = config.get("max_position_embeddings", config.get("n_positions"))
        limits += [
            _limit(tokenizer.get("model_max_length"), file, "model_max_length"),
            _limit(positions, config_file, "max_position_embeddings"),
        ]
    rows = _limit(config.get("max_position_embeddings"), config_file, "max_position_embeddings")
    if config.get("model_type") in _LEARNED_POSITIONS and rows is not None:
        limits.append(rows - _LEARNED_POSITIONS[config["model_type"]])
    stated = [limit for limit in limits if limit is not None and 0 < limit <= _MOST_TOKENS]
    if not stated:
        raise UnknownModel(
            f"model {name!r}: nothing in {transformer} states the most tokens that it reads: write model_max_length "
            "into tokenizer_config.json"
        )
    return min(stated)


def _limit(value: Any, file: Path, key: str) -> int | None:
    """A number of tokens, which some programs write as ``"32"`` or ``32.0``; None if it is null.

    A tokenizer without a limit states 1e30, and XLNet has -1 positions.
    """
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not number.is_integer():
        raise broken(file, f"has a {key} that is not a number of tokens ({str(value)[:40]!r})")
    return int(number)
