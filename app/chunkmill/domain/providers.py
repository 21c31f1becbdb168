"""What models a provider of embeddings serves. Pure.

OpenAI's own models are known here. ``OPENAI_MODELS`` adds those of a compatible server. If one of them gives the same
vectors as a local model (``same_as``), both have one space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Final, Literal

from chunkmill.domain.model_fields import WrongModels, check_fields
from chunkmill.domain.prices import OPENAI_PRICES, Price
from chunkmill.domain.spaces import OnLong, Pooling, Precision, SpaceSpec, long_text_for
from chunkmill.errors import InvalidInput

OPENAI: Final = "openai"
"""The value of ``SpaceSpec.provider`` if only a provider serves the space."""
CL100K: Final = "cl100k"
"""The tokenizer of OpenAI's embedding models."""
Encoding = Literal["base64", "float"]
"""The form of the vectors in a provider's answers."""


@dataclass(frozen=True, slots=True)
class ProviderModel:
    """A model that ``OPENAI_BASE_URL`` serves.

    ``dimensions`` are those of its full vectors; ``can_cut`` says whether it takes ``dimensions=``. ``tokenizer`` is
    ``cl100k`` or the path of a ``tokenizer.json``. ``same_as`` names the local model whose space it shares.

    The other fields say how the server differs from OpenAI's. ``encoding`` is the form of the vectors in answers; if it
    is None, it is base64 until the server refuses that. ``request_inputs`` and ``request_bytes`` are the most inputs
    and bytes of JSON of one request; None: as the settings say. The server's count of tokens is believed up to
    ``tokens_factor`` times our own (and some more for short texts), and not at all if it is 0.
    """

    name: str
    dimensions: int
    max_tokens: int = 8192
    can_cut: bool = False
    tokenizer: str = CL100K
    prices: tuple[Price, ...] = ()
    same_as: str | None = None
    encoding: Encoding | None = None
    request_inputs: int | None = None
    request_bytes: int | None = None
    tokens_factor: Decimal = Decimal(4)

    def space(self, on_long: OnLong, dimensions: int | None) -> SpaceSpec:
        """The space of its vectors, which the provider cuts to ``dimensions``. Raises :class:`InvalidInput`.

        A model with ``same_as`` has the local model's space instead, which ``chunkmill.models`` reads.
        """
        if dimensions is not None and dimensions != self.dimensions and not self.can_cut:
            raise InvalidInput(
                f"model {self.name!r} gives {self.dimensions} dimensions and cannot be cut to {dimensions}; leave "
                "dimensions (EMBEDDING_DIMENSIONS) out, or use a text-embedding-3 model."
            )
        if dimensions is not None and not 1 <= dimensions <= self.dimensions:
            raise InvalidInput(f"dimensions is {dimensions}; model {self.name!r} gives 1 to {self.dimensions}.")
        return SpaceSpec(
            provider=OPENAI,
            model=self.name,
            revision=self.name,  # a provider says nothing else about the weights
            dimensions=dimensions or self.dimensions,
            max_tokens=self.max_tokens,
            pooling=Pooling.PROVIDER,
            normalize=True,
            long_text=long_text_for(on_long),
            precision=Precision.FLOAT,
        )


OPENAI_MODELS: Final = {
    model.name: model
    for model in (
        ProviderModel("text-embedding-3-small", 1536, can_cut=True, prices=OPENAI_PRICES["text-embedding-3-small"]),
        ProviderModel("text-embedding-3-large", 3072, can_cut=True, prices=OPENAI_PRICES["text-embedding-3-large"]),
        ProviderModel("text-embedding-ada-002", 1536, prices=OPENAI_PRICES["text-embedding-ada-002"]),
    )
}


def read_models(given: Mapping[str, Any]) -> dict[str, ProviderModel]:
    """The models of ``OPENAI_MODELS``: ``{"name": {"dimensions": 384, "max_tokens": 512, "usd": 0.02, ...}}``.

    ``usd`` and ``batch_usd`` are US dollars per million tokens; if the second is left out, it is half of the first.
    ``prices`` is a list of both, each ``from`` a day on. Of a model that OpenAI has, only what differs need be said.
    Raises :class:`WrongModels`, which names every wrong field of every model.
    """
    models = {}
    problems = []
    for name, fields in given.items():
        if not name.strip() or not name.isprintable():
            problems.append(f"{name[:40]!r} is not the name of a model; write the name that the server has for it")
            continue
        if not isinstance(fields, Mapping):
            problems.append(f"model {name!r} must be an object with at least dimensions")
            continue
        values, wrong = check_fields(fields)
        known = OPENAI_MODELS.get(name)
        if known is None and fields.get("dimensions") is None:
            wrong.append("dimensions is missing; say how many numbers a vector has")
        if fields.get("same_as") is not None and fields.get("tokenizer") is None:
            wrong.append(
                "tokenizer is missing; with same_as it is the path of the local model's tokenizer.json, because texts "
                "must be counted and truncated as local workers do it"
            )
        problems += [f"model {name!r}: {problem}" for problem in wrong]
        if not wrong:
            models[name] = ProviderModel(name=name, **values) if known is None else replace(known, **values)
    if problems:
        counted = f"{len(problems)} faults: " if len(problems) > 1 else ""
        raise WrongModels(counted + "; ".join(problems), frozenset(given))
    return models
