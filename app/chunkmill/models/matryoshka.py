"""Which numbers of dimensions a model's vectors may be cut to.

Any vector can be cut, but unless the model was trained for it (Matryoshka representation learning), cut vectors search
badly. What a model's files state is accepted. Of the models that state nothing, a few are known by their name on the
Hub, because their cards say that they were trained so. The operator can vouch for any other model. A README is not
read, because its words may be those of another model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from chunkmill.errors import InvalidInput, UnknownModel
from chunkmill.models.locate import hub_repo
from chunkmill.models.names import without_given

# The smallest size for which a model's publisher gives results. A model that was trained at nested sizes also serves
# the sizes between them. None of these models states its sizes in a file; few have matryoshka_dimensions in
# config.json.
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
    "sentence-transformers/static-retrieval-mrl-en-v1": 32,
    "sentence-transformers/static-similarity-mrl-multilingual-v1": 32,
}


def stated_sizes(name: str, full: int, config: Mapping[str, Any], default: int) -> Sequence[int]:
    """The sizes below ``full`` that a model's folder states, or that are known for its name on the Hub.

    ``config`` is its config.json, with the keys that vLLM reads. ``default`` is the size that the folder states as its
    own. Raises UnknownModel.
    """
    sizes = config.get("matryoshka_dimensions")
    if sizes is not None:
        if not isinstance(sizes, list) or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise UnknownModel(
                f"model {name!r}: matryoshka_dimensions in its config.json is not a list of sizes: fix it"
            )
        return sorted({size for size in [*sizes, default] if size < full})
    if config.get("is_matryoshka") is True:
        return range(1, full)
    return known_sizes(name, full) or ([default] if default < full else [])


def known_sizes(name: str, full: int) -> Sequence[int]:
    """The sizes that are known for a name on the Hub, without its files; none for a folder on this machine."""
    smallest = _SMALLEST.get(hub_repo(without_given(name)) or "")
    return range(smallest, full) if smallest is not None else ()


def check_dimensions(name: str, full: int, dimensions: int, sizes: Sequence[int], *, trusted: bool) -> int:
    """``dimensions``, if vectors of ``full`` dimensions may be cut to it. Raises InvalidInput with the reason."""
    if dimensions == full or (dimensions in sizes) or (trusted and 0 < dimensions < full):
        return dimensions
    asked = f"model {name!r} gives {full} dimensions, but dimensions= (or EMBEDDING_DIMENSIONS) asks for {dimensions}"
    if not 0 < dimensions < full:
        raise InvalidInput(f"{asked}: it must be from 1 to {full}.")
    if sizes:
        shown = f"{sizes[0]} to {full}" if isinstance(sizes, range) else ", ".join(map(str, [*sizes, full]))
        raise InvalidInput(f"{asked}: it was trained to be cut to {shown}. Ask for one of these.")
    raise InvalidInput(
        f"{asked}: nothing says that the model was trained for shorter vectors (Matryoshka), and without that they "
        "search badly. Leave the setting out, or choose another model. If you know that the model was trained so, name "
        "it in EMBEDDING_MATRYOSHKA."
    )
