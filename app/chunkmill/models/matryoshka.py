"""Which dimensions a model's vectors may be cut to.

Any vector can be cut, and one that was not trained for it (Matryoshka representation learning) searches badly then.
What a model states is taken; of models that state nothing, a few are known by their name on the Hub, because their
cards say it; the operator can vouch for any other. A README is not read: its words may be another model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from chunkmill.errors import InvalidInput, UnknownModel
from chunkmill.models.locate import hub_repo

# The smallest size that a model's publisher gives numbers for. Trained at nested sizes, it serves those between, too.
# None of these states it in a file; config.json's matryoshka_dimensions is so far a habit of few.
_SMALLEST: Final[Mapping[str, int]] = {
    "Qwen/Qwen3-Embedding-0.6B": 32,
    "Qwen/Qwen3-Embedding-4B": 32,
    "Qwen/Qwen3-Embedding-8B": 32,
    "Snowflake/snowflake-arctic-embed-l-v2.0": 256,
    "Snowflake/snowflake-arctic-embed-m-v1.5": 256,
    "Snowflake/snowflake-arctic-embed-m-v2.0": 256,
    "google/embeddinggemma-300m": 128,
    "mixedbread-ai/mxbai-embed-2d-large-v1": 64,
    "mixedbread-ai/mxbai-embed-large-v1": 128,
    "nomic-ai/modernbert-embed-base": 256,
    "nomic-ai/nomic-embed-text-v1.5": 64,
    "nomic-ai/nomic-embed-text-v2-moe": 256,
}


def stated_sizes(name: str, full: int, config: Mapping[str, Any], default: int) -> Sequence[int]:
    """The sizes below ``full`` that a model's folder states, or that its name on the Hub is known for.

    ``config`` is its config.json, with vLLM's words for it; ``default`` is the size that the folder is used with.
    """
    sizes = config.get("matryoshka_dimensions")
    if sizes is not None:
        if not isinstance(sizes, list) or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise UnknownModel(f"model {name!r}: matryoshka_dimensions in its config.json is no list of sizes: mend it")
        return sorted({size for size in [*sizes, default] if size < full})
    if config.get("is_matryoshka") is True:
        return range(1, full)
    return known_sizes(name, full) or ([default] if default < full else [])


def known_sizes(name: str, full: int) -> Sequence[int]:
    """The sizes that a name on the Hub is known for, without its files; none for a folder, whatever it is called."""
    smallest = _SMALLEST.get(hub_repo(name) or "")
    return range(smallest, full) if smallest is not None else ()


def check_dimensions(name: str, full: int, dimensions: int, sizes: Sequence[int], *, trusted: bool) -> int:
    """``dimensions``, if vectors of ``full`` may be cut to it. Raises InvalidInput with the reason."""
    if dimensions == full or (dimensions in sizes) or (trusted and 0 < dimensions < full):
        return dimensions
    asked = f"model {name!r} gives {full} dimensions and dimensions= (or EMBEDDING_DIMENSIONS) asks for {dimensions}"
    if not 0 < dimensions < full:
        raise InvalidInput(f"{asked}: it must be from 1 to {full}.")
    if sizes:
        shown = f"{sizes[0]} to {full}" if isinstance(sizes, range) else ", ".join(map(str, [*sizes, full]))
        raise InvalidInput(f"{asked}: it was trained to be cut to {shown}. Ask for one of these.")
    raise InvalidInput(
        f"{asked}: nothing says that it was trained to be cut (Matryoshka), and a cut vector of a model that was not "
        "searches badly. Leave it unset or take another model; if you know that it was, name it in "
        "EMBEDDING_MATRYOSHKA."
    )
