"""The models that people use, by name: what is known of them without their files.

The data is in ``known.toml`` beside this file. What a model's own folder says holds over it.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final, Literal

from chunkmill.domain.providers import OPENAI_MODELS
from chunkmill.models.locate import DEFAULT_NAMES
from chunkmill.models.matryoshka import known_sizes
from chunkmill.models.names import without_given

Runs = Literal["native", "transformers", "static", "paid"]

NATIVE_ARCHITECTURES: Final = frozenset(
    {"bert", "camembert", "modernbert", "mpnet", "nomic_bert", "qwen3", "roberta", "xlm-roberta"}
)
"""What our own forward pass knows. A test compares it with ``chunkmill_workers.engine.encoder.architectures``."""

_DEFAULT: Final = "sentence-transformers/all-MiniLM-L6-v2"
_SPECIAL: Final = {"static": "static", "openai": "paid"}
_COMMERCIAL: Final = frozenset({"Apache-2.0", "MIT", "Gemma"})


@dataclass(frozen=True, slots=True)
class KnownModel:
    """One model. What is not known is None."""

    name: str
    """``org/name`` on the Hub, without a revision, or the provider's name."""
    architecture: str
    """``model_type`` in its config.json; ``static`` for a StaticEmbedding, ``openai`` for a model that is paid for."""
    dimensions: int
    languages: str
    """``English`` or ``many``."""
    max_tokens: int | None = None
    parameters: int | None = None
    embedding_parameters: int | None = None
    """Those of ``parameters`` that are the table of tokens."""
    licence: str | None = None
    prompts: str | None = None
    """One of ``chunkmill.models.names.PROMPTS``, which its card asks for."""
    prompts_note: str | None = None
    note: str | None = None
    score: float | None = None
    """Its average over the tasks of MTEB, as ``score_source`` states it."""
    score_source: str | None = None

    @property
    def runs(self) -> Runs:
        """What computes it: our own forward pass, that of transformers, a table look-up, or a provider."""
        if self.architecture in _SPECIAL:
            return _SPECIAL[self.architecture]  # type: ignore[return-value]
        return "native" if self.architecture in NATIVE_ARCHITECTURES else "transformers"

    @property
    def computed(self) -> int | None:
        """The parameters that each token passes through: about half the floating point operations of a token."""
        if self.parameters is None or self.embedding_parameters is None:
            return None
        return self.parameters - self.embedding_parameters

    @property
    def sizes(self) -> Sequence[int]:
        """The smaller numbers of dimensions that its vectors may be cut to."""
        if self.runs == "paid":
            return range(1, self.dimensions) if OPENAI_MODELS[self.name].can_cut else ()
        return known_sizes(self.name, self.dimensions)

    @property
    def is_commercial(self) -> bool:
        """Whether its licence is known to allow commercial use. Gemma's has terms of its own; a provider's are a
        contract."""
        return self.licence in _COMMERCIAL or self.runs == "paid"

    def most_dimensions(self, most: int) -> int | None:
        """The largest number of dimensions up to ``most`` that its vectors may have; None if there is none."""
        if self.dimensions <= most:
            return self.dimensions
        return max((size for size in self.sizes if size <= most), default=None)


@functools.cache
def known_models() -> tuple[KnownModel, ...]:
    """All of them: local ones by their size, and then those that are paid for."""
    data = tomllib.loads(resources.files(__package__).joinpath("known.toml").read_text(encoding="utf-8"))
    sources = data["sources"]
    paid = {entry["name"]: entry for entry in data["paid"]}
    return (
        *sorted((_model(entry, sources) for entry in data["model"]), key=lambda model: model.parameters or 0),
        *(
            _model(
                {"name": name, "architecture": "openai", "dimensions": model.dimensions, "languages": "many"}
                | {"max_tokens": model.max_tokens}
                | paid.get(name, {}),
                sources,
            )
            for name, model in OPENAI_MODELS.items()
        ),
    )


def find_known(name: str) -> KnownModel | None:
    """The model that a name such as ``org/name@revision?prompts=e5`` means; None if it is not in the table."""
    bare = without_given(name).partition("@")[0]
    wanted = _DEFAULT if bare in DEFAULT_NAMES else bare
    return next((model for model in known_models() if model.name == wanted), None)


def _model(entry: dict[str, Any], sources: dict[str, str]) -> KnownModel:
    fields = {key: value for key, value in entry.items() if key != "mteb"}
    if score := entry.get("mteb"):
        fields |= {"score": float(score["score"]), "score_source": sources[score["source"]]}
    return KnownModel(**fields)
