"""What models a provider of embeddings serves. Pure.

OpenAI's own models are known here. ``OPENAI_MODELS`` adds those of a compatible server. If one of them gives the same
vectors as a local model (``same_as``), both have one space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal, InvalidOperation
from typing import Any, Final

from chunkmill.domain.prices import OPENAI_PRICES, Price
from chunkmill.domain.spaces import OnLong, Pooling, Precision, SpaceSpec, long_text_for
from chunkmill.errors import InvalidInput

OPENAI: Final = "openai"
"""The value of ``SpaceSpec.provider`` if only a provider serves the space."""
CL100K: Final = "cl100k"
"""The tokenizer of OpenAI's embedding models."""


@dataclass(frozen=True, slots=True)
class ProviderModel:
    """A model that ``OPENAI_BASE_URL`` serves.

    ``dimensions`` are those of its full vectors; ``can_cut`` says whether it takes ``dimensions=``. ``tokenizer`` is
    ``cl100k`` or the path of a ``tokenizer.json``. ``same_as`` names the local model whose space it shares.
    """

    name: str
    dimensions: int
    max_tokens: int = 8192
    can_cut: bool = False
    tokenizer: str = CL100K
    prices: tuple[Price, ...] = ()
    same_as: str | None = None

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

_FIELDS: Final = frozenset({"dimensions", "max_tokens", "can_cut", "tokenizer", "usd", "batch_usd", "same_as"})


def read_models(given: Mapping[str, Any]) -> dict[str, ProviderModel]:
    """The models of ``OPENAI_MODELS``: ``{"name": {"dimensions": 384, "max_tokens": 512, "usd": 0.02, ...}}``.

    ``usd`` and ``batch_usd`` are US dollars per million tokens; if the second is left out, it is half of the first.
    Raises a ValueError that names the model and the field.
    """
    models = {}
    for name, fields in given.items():
        known = OPENAI_MODELS.get(name)
        if not isinstance(fields, Mapping):
            raise ValueError(f"{name!r} must be an object with at least dimensions")  # noqa: TRY004 - pydantic's kind
        if unknown := sorted(set(fields) - _FIELDS):
            raise ValueError(f"{name!r}: there is no field {unknown[0]!r}; the fields are {', '.join(sorted(_FIELDS))}")
        if known is None and "dimensions" not in fields:
            raise ValueError(f"{name!r} must say its dimensions")
        if fields.get("same_as") is not None and "tokenizer" not in fields:
            raise ValueError(
                f"{name!r} is same_as a local model and must say its tokenizer, the path of that model's "
                "tokenizer.json, because texts must be counted and truncated as local workers do it"
            )
        dimensions = _whole(name, "dimensions", fields.get("dimensions", known.dimensions if known else 0))
        models[name] = ProviderModel(
            name,
            dimensions,
            max_tokens=_whole(name, "max_tokens", fields.get("max_tokens", known.max_tokens if known else 8192)),
            can_cut=bool(fields.get("can_cut", known.can_cut if known else False)),
            tokenizer=str(fields.get("tokenizer", CL100K)),
            prices=_prices(name, fields) if "usd" in fields else known.prices if known else (),
            same_as=None if fields.get("same_as") is None else str(fields["same_as"]),
        )
    return models


def _whole(model: str, field: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{model!r}: {field} is {value!r}; it must be a whole number above 0")
    return value


def _prices(model: str, fields: Mapping[str, Any]) -> tuple[Price, ...]:
    try:
        standard = Decimal(str(fields["usd"]))
        batch = Decimal(str(fields["batch_usd"])) if "batch_usd" in fields else standard / 2
    except InvalidOperation:
        raise ValueError(f"{model!r}: usd and batch_usd must be numbers") from None
    if not (standard.is_finite() and batch.is_finite()) or standard < 0 or batch < 0:
        raise ValueError(f"{model!r}: usd and batch_usd must not be negative")
    return (Price(date(1970, 1, 1), standard, batch),)
