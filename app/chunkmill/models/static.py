"""Reads a StaticEmbedding module: a tokenizer, and a table that has a vector for each of its tokens.

It is what sentence-transformers makes of a model2vec model too, whose table may have fewer rows than the tokenizer has
tokens (``mapping``), and factors for them (``weights``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from chunkmill.errors import UnknownModel
from chunkmill.models.files import MOST_FILE_BYTES, broken, parse_json, unreadable, unsupported
from chunkmill.models.weights import read_header
from chunkmill.system.files import read_at_most

WEIGHTS: Final = "model.safetensors"
NAMES: Final = ("embedding.weight", "embeddings")
"""The tensors that may be the table, of (rows, dimensions)."""
UNLIMITED: Final = 2**20
"""The most tokens of a text if the tokenizer does not cut it. sentence-transformers has no limit there."""


@dataclass(frozen=True, slots=True)
class StaticTable:
    """What the files of a StaticEmbedding module state."""

    weights: Path
    dimensions: int
    max_tokens: int


def read_static(name: str, folder: Path) -> StaticTable:
    """The table in ``folder``. Raises UnknownModel."""
    weights = folder / WEIGHTS
    if not weights.is_file():
        if (folder / "pytorch_model.bin").is_file():
            raise unsupported(
                name, f"a StaticEmbedding whose table is a pickle ({folder}): save it again with save_pretrained"
            )
        raise UnknownModel(f"model {name!r}: {folder} has no {WEIGHTS}: copy the folder again")
    tensors = read_header(weights)[1]
    shape = next((tensors[tensor].get("shape") for tensor in NAMES if tensor in tensors), None)
    if not isinstance(shape, list) or len(shape) != 2 or not all(shape):
        raise broken(weights, f"has no table of token vectors ({' or '.join(NAMES)})")
    return StaticTable(weights, shape[1], _max_tokens(name, folder / "tokenizer.json"))


def _max_tokens(name: str, file: Path) -> int:
    if not file.is_file():
        raise UnknownModel(f"model {name!r}: {file.parent} has no tokenizer.json: copy the folder again")
    try:
        tokenizer = parse_json(read_at_most(file, MOST_FILE_BYTES))
    except OSError as error:
        raise unreadable(file, error) from error
    except ValueError as error:
        raise UnknownModel(f"{file} is not JSON ({error}): copy the model folder again") from error
    truncation = tokenizer.get("truncation") if isinstance(tokenizer, dict) else None
    if truncation is None:
        return UNLIMITED
    limit = truncation.get("max_length") if isinstance(truncation, dict) else None
    if type(limit) is not int or limit < 1:
        raise broken(file, "has a truncation without a max_length")
    return min(limit, UNLIMITED)
