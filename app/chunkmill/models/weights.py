"""Finds the weight files of a folder and checks that they are complete. No code in them is run for that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from chunkmill.errors import UnknownModel
from chunkmill.models.files import broken, read_object, unreadable

# The safetensors format: header length (8 bytes, little endian), JSON header, data. The library limits the header too.
_LENGTH_BYTES: Final = 8
_LONGEST_HEADER: Final = 100_000_000
_LFS_POINTER: Final = b"version https://git-lfs"

# The names of the matrix whose rows are tokens, and the keys of config.json that may state its width.
_TOKEN_EMBEDDINGS: Final = ("word_embeddings.weight", "embed_tokens.weight", "tok_embeddings.weight", "wte.weight")
_WIDTHS: Final = ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim")


def weight_files(name: str, folder: Path, *, pickle: bool) -> list[Path]:
    """The weight files in ``folder``: safetensors, or if there are none and ``pickle`` allows it, those of PyTorch.

    Raises UnknownModel for pickled weights that are not allowed, because reading a pickle can run the code in it.
    """
    if safe := _listed(folder, "model.safetensors"):
        return safe
    pickled = _listed(folder, "pytorch_model.bin")
    if pickled and pickle:
        return pickled
    if pickled:
        raise UnknownModel(
            f"model {name!r}: {pickled[0]} is a pickle, which can run code when it is read, so it is not loaded. "
            "Convert it once with model.save_pretrained(folder), which writes model.safetensors. Or, if you trust its "
            "author, name this model in EMBEDDING_TRUST_PICKLE"
        )
    raise UnknownModel(f"model {name!r}: {folder} has no model.safetensors: copy the folder again")


def _listed(folder: Path, file: str) -> list[Path]:
    """``file``, or the shards that its index lists; none if neither exists. Raises UnknownModel if one is missing."""
    if (folder / file).is_file():
        return [folder / file]
    index = folder / f"{file}.index.json"
    if not index.is_file():
        return []
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) and shard for shard in shards.values()):
        raise broken(index, "has no weight_map from tensors to files")
    names = sorted(set(shards.values()))
    if outside := [shard for shard in names if Path(shard).name != shard]:
        raise broken(index, f"names {outside[0]}, which is not a file beside it")
    if missing := [shard for shard in names if not (folder / shard).is_file()]:
        raise UnknownModel(f"{folder} lacks {', '.join(missing)}, listed in {index.name}: copy the folder again")
    return [folder / shard for shard in names]


def read_header(path: Path) -> tuple[bytes, Mapping[str, Any]]:
    """The header of a safetensors file, as bytes and as JSON: from tensor to dtype, shape and data_offsets.

    Raises UnknownModel for a file that is not complete, so that producer and worker notice it in the same way.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(_LENGTH_BYTES)
            length = int.from_bytes(first, "little")
            if first + file.read(len(_LFS_POINTER) - len(first)) == _LFS_POINTER:
                raise UnknownModel(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
            if len(first) < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _LONGEST_HEADER):
                raise broken(path, "is not a safetensors file, or is cut off in its header")
            file.seek(_LENGTH_BYTES)
            header = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        tensors = json.loads(header)
        end = max((tensor["data_offsets"][1] for key, tensor in tensors.items() if key != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise broken(path, "is not a safetensors file: its header cannot be read") from error
    held = size - _LENGTH_BYTES - length
    if end != held:
        raise broken(path, f"holds {held:,} bytes of tensors, but its header states {end:,}")
    return header, tensors


def check_shapes(name: str, files: list[Path], config: Mapping[str, Any]) -> None:
    """Raise UnknownModel unless the token embeddings have the shape that this config.json states.

    So a config.json beside the weights of another model is noticed before a worker loads gigabytes. The engine compares
    all other tensors when it loads them.
    """
    widths = {config[key] for key in _WIDTHS if isinstance(config.get(key), int)}
    for path in files:
        if path.suffix != ".safetensors":
            continue
        for tensor, entry in read_header(path)[1].items():
            shape = entry.get("shape")
            if not tensor.endswith(_TOKEN_EMBEDDINGS) or not isinstance(shape, list) or len(shape) != 2:
                continue
            rows, width = shape
            if (widths and width not in widths) or rows != config.get("vocab_size", rows):
                stated = f"{config.get('vocab_size', rows)} × {' or '.join(map(str, sorted(widths)))}"
                raise UnknownModel(
                    f"model {name!r}: the token embeddings in {path} are {rows} × {width}, but its config.json states "
                    f"{stated}, so they belong to two models. Copy both from the same model again"
                )
