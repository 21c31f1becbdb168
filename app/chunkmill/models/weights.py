"""Finds the weight files of a folder and checks that they are complete. No code in them is run for that."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from chunkmill.errors import UnknownModel
from chunkmill.models.files import broken, parse_json, read_object, unreadable
from chunkmill.system.files import open_regular

# The safetensors format: header length (8 bytes, little endian), JSON header, data. The library allows headers of 100
# million bytes, and needs minutes for their million tensors. Models have a few hundred, those of many experts 20,000.
_LENGTH_BYTES: Final = 8
_LONGEST_HEADER: Final = 16_000_000
_MOST_TENSORS: Final = 100_000
_BITS: Final[Mapping[str, int]] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
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
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(_LENGTH_BYTES)
            length = int.from_bytes(first, "little")
            if first + file.read(len(_LFS_POINTER) - len(first)) == _LFS_POINTER:
                raise UnknownModel(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
            if len(first) < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
                raise broken(path, "is not a safetensors file, or is cut off in its header")
            if length > _LONGEST_HEADER:
                raise broken(path, f"has a header of {length:,} bytes, and at most {_LONGEST_HEADER:,} are read")
            file.seek(_LENGTH_BYTES)
            header = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        tensors = {key: tensor for key, tensor in parse_json(header).items() if key != "__metadata__"}
        if len(tensors) > _MOST_TENSORS:
            raise broken(path, f"has {len(tensors):,} tensors, and at most {_MOST_TENSORS:,} are read")
        end = _end_of(tensors)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise broken(path, "is not a safetensors file: its header cannot be read") from error
    held = size - _LENGTH_BYTES - length
    if end != held:
        raise broken(path, f"holds {held:,} bytes of tensors, but its header states {end:,}")
    return header, tensors


def _end_of(tensors: Mapping[str, Any]) -> int:
    """The end of the last tensor. Raises ValueError, TypeError or KeyError unless each begins where another one ends
    and has the length of its shape."""
    places = []
    for tensor in tensors.values():
        begin, stop = map(_whole, tensor["data_offsets"])
        places.append((begin, stop, math.prod(map(_whole, tensor["shape"])) * _BITS[tensor["dtype"]]))
    end = 0
    for begin, stop, bits in sorted(places):
        if begin != end or (stop - begin) * 8 != bits:
            raise ValueError("its tensors overlap, or do not have the lengths of their shapes")
        end = stop
    return end


def _whole(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 2**63:
        raise ValueError("it is not a length")
    return number


def n_elements(files: Sequence[Path]) -> int:
    """How many numbers the safetensors ``files`` hold. Raises UnknownModel."""
    return sum(math.prod(tensor["shape"]) for file in files for tensor in read_header(file)[1].values())


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
