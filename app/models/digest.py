"""A model's revision: one digest of the files that reach its vectors, equal on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from app.errors import UnknownModel

# Files of a transformer's folder that reach the vectors. README, onnx/, openvino/, training records and
# config_sentence_transformers.json (versions and prompts; the prompts are fields of the space) do not.
_FILES: Final = (
    "added_tokens.json",
    "config.json",
    "merges.txt",
    "model.safetensors.index.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 64 * 1024


def revision(name: str, root: Path, *, transformer: Path, others: Iterable[Path], dense: Iterable[Path]) -> str:
    """``sha256:`` and 32 hexadecimal digits over sorted (relative path, content) pairs.

    ``transformer`` is the folder of config, tokenizer and weights; ``others`` are further configuration
    files; ``dense`` are folders of Dense modules. Weights are sampled, see `_add_weights`.
    """
    texts = {transformer / item for item in _FILES} | {*others}
    weights = {*weight_files(name, transformer)}
    for folder in dense:
        texts.add(folder / "config.json")
        weights |= {*weight_files(name, folder)}
    digest = hashlib.sha256()
    present = [path for path in texts | weights if path.is_file()]
    for path in sorted(present, key=lambda item: item.relative_to(root).as_posix()):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        if path in weights:
            _add_weights(digest, path)
        else:
            content = path.read_bytes()
            digest.update(len(content).to_bytes(8, "big") + content)
    return f"sha256:{digest.hexdigest()[:32]}"


def weight_files(name: str, folder: Path) -> list[Path]:
    """The safetensors files that are loaded from ``folder``. Pickled weights are refused: they run code."""
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            raise UnknownModel(f"model {name!r}: {folder} lacks {', '.join(missing)}: copy the folder again")
        return [folder / shard for shard in shards]
    if pickled := sorted(folder.glob("*.bin")):
        raise UnknownModel(
            f"model {name!r}: {pickled[0]} is a pickle, which can run code when it is read, and is never "
            "loaded: convert it once with model.save_pretrained(folder), which writes model.safetensors"
        )
    raise UnknownModel(f"model {name!r}: {folder} has no model.safetensors")


def _add_weights(digest: hashlib._Hash, path: Path) -> None:
    """Size, safetensors header, and 64 evenly spaced samples of 64 KiB.

    Samples, because a 16 GB model would take half a minute to read and takes milliseconds this way, on
    every start of every worker and producer. Training moves every matrix it touches, and a sample falls
    into every 1/64 of the file, so two trained models do not pass for one; this is no defence against
    someone who alters single weights on purpose.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")  # the format: u64 header length, JSON header, data
        if header > size:
            raise UnknownModel(f"{path} is not a safetensors file: copy it again")
        digest.update(size.to_bytes(8, "big") + file.read(header))
        last = max(size - _SAMPLE_BYTES, 0)
        for sample in range(_SAMPLES):
            file.seek(last * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
