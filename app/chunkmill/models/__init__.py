"""Models: from a name to a folder, and from the folder's files to the embedding space of its vectors.

It uses the standard library only, so a producer can read the space of a model without torch.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import Final

from chunkmill.domain.spaces import OnLong, Pooling, Precision, SpaceSpec, long_text_for
from chunkmill.domain.trust import Trust
from chunkmill.errors import UnknownModel
from chunkmill.models.folder import PROVIDER, DenseLayer, ModelFolder, ModelOptions, check_pooling, read_folder
from chunkmill.models.kept import read_or_keep
from chunkmill.models.locate import DEFAULT_MODEL, DEFAULT_NAMES, bundled_folder, cache_advice, locate_folder
from chunkmill.models.matryoshka import check_dimensions, known_sizes

__all__ = [
    "DEFAULT_MODEL",
    "DEFAULT_SPEC",
    "DenseLayer",
    "ModelFolder",
    "cut_space",
    "resolve_model",
    "resolve_spec",
]

# The space that reading the bundled folder gives (tests/unit/chunkmill/models/test_models.py compares the two). It is
# written down here for producers without the worker's packages.
DEFAULT_SPEC: Final = SpaceSpec(
    provider=PROVIDER,
    model=DEFAULT_MODEL,
    revision="sha256:508661683600909917412bc80bd55be3",
    dimensions=384,
    max_tokens=256,
    pooling=Pooling.MEAN,
    normalize=True,
)
_NO_TRUST: Final = Trust()


def resolve_model(
    name: str,
    *,
    pooling: str | None = None,
    on_long: OnLong = OnLong.TRUNCATE,
    precision: Precision = Precision.FLOAT,
    trust: Trust = _NO_TRUST,
    download: bool = False,
    keep: bool = False,
) -> ModelFolder:
    """The model called ``name``: ``all-MiniLM-L6-v2``, a folder, or ``org/name@revision``.

    ``pooling`` is for a plain transformers folder, which does not state its own. ``download`` fetches a Hugging Face
    model that is not on this machine yet; without it the network is not used. ``trust`` names the models whose pickles
    and code may be used. With ``keep``, a folder that this process has read is not read again until a file in it
    changes. Raises UnknownModel, which says what to do.
    """
    label = _label(name)
    pickle, code = _is_in(label, trust.pickle), _is_in(label, trust.remote_code)
    folder = locate_folder(name, pickle=pickle, remote_code=code, download=download)
    options = ModelOptions(
        pooling, on_long, Precision(precision), pickle, code, matryoshka=_is_in(label, trust.matryoshka)
    )
    try:
        try:
            return (read_or_keep if keep else read_folder)(label, folder, options)
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, OSError) as error:
            raise UnknownModel(
                f"model {name!r}: a file in {folder} holds what no model's file holds ({type(error).__name__}): "
                "copy the model folder again"
            ) from error
    except UnknownModel as error:
        if (advice := cache_advice(folder)) is None:
            raise
        raise UnknownModel(f"{error}; {advice}") from error


def resolve_spec(
    name: str,
    *,
    pooling: str | None = None,
    on_long: OnLong = OnLong.TRUNCATE,
    dimensions: int | None = None,
    precision: Precision = Precision.FLOAT,
    trust: Trust = _NO_TRUST,
) -> SpaceSpec:
    """The space of a model's vectors. For the default model the worker's packages need not be installed.

    ``dimensions`` may be fewer than the model gives if it was trained for that. Raises InvalidInput if it was not, and
    UnknownModel.
    """
    if name in DEFAULT_NAMES and bundled_folder() is None:
        check_pooling(name, DEFAULT_SPEC.pooling, pooling)
        spec = replace(DEFAULT_SPEC, long_text=long_text_for(on_long), precision=precision)
        return spec if dimensions is None else cut_space(spec, dimensions, trust=trust)
    folder = resolve_model(name, pooling=pooling, on_long=on_long, precision=precision, trust=trust, keep=True)
    return folder.space(dimensions)


def cut_space(full: SpaceSpec, dimensions: int, *, trust: Trust = _NO_TRUST) -> SpaceSpec:
    """The space of the vectors of ``full`` cut to ``dimensions``. The model's files are not needed.

    Raises InvalidInput unless the model's name or the operator says that its vectors may be cut.
    """
    sizes = known_sizes(full.model, full.dimensions)
    trusted = _is_in(full.model, trust.matryoshka)
    return replace(full, dimensions=check_dimensions(full.model, full.dimensions, dimensions, sizes, trusted=trusted))


def _label(name: str) -> str:
    return DEFAULT_MODEL if name in DEFAULT_NAMES else name


def _is_in(label: str, names: Set[str]) -> bool:
    return label in {_label(name) for name in names}
