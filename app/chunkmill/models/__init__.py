"""Models: from a name to a folder, and from the folder's files to the embedding space of its vectors.

It uses the standard library only, so a producer can read the space of a model without torch.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from chunkmill.domain.spaces import LongText, OnLong, Pooling, Precision, SpaceSpec, long_text_for
from chunkmill.domain.trust import Trust
from chunkmill.errors import UnknownModel
from chunkmill.models.folder import PROVIDER, ModelFolder, ModelOptions, check_pooling, read_folder
from chunkmill.models.kept import read_or_keep
from chunkmill.models.locate import DEFAULT_MODEL, DEFAULT_NAMES, bundled_folder, cache_advice, locate_folder
from chunkmill.models.matryoshka import check_dimensions, known_sizes
from chunkmill.models.modules import DenseLayer, LayerNormLayer
from chunkmill.models.names import NameOptions, prompt_of, split_name, without_given

__all__ = [
    "DEFAULT_MODEL",
    "DEFAULT_SPEC",
    "DEFAULT_TOKENIZER",
    "DenseLayer",
    "LayerNormLayer",
    "ModelFolder",
    "TokenizerFile",
    "cut_space",
    "resolve_model",
    "resolve_spec",
    "tokenizer_of",
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
DEFAULT_TOKENIZER: Final = Path(__file__).with_name("default_tokenizer.json")
"""The tokenizer.json of the bundled folder (of sentence-transformers/all-MiniLM-L6-v2, Apache License 2.0), byte by
byte. It is here so that a producer counts tokens without the model, whose package needs torch."""
_NO_TRUST: Final = Trust()


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """A tokenizer.json, and how its model uses it."""

    path: Path
    lowercase: bool
    """Texts become lower case before it."""
    static: bool
    """The model does not read the special tokens."""


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

    Behind a question mark the name may state prompts, a task and a model for queries: ``chunkmill.models.names``.
    ``pooling`` is for a plain transformers folder, which does not state its own. ``download`` fetches a Hugging Face
    model that is not on this machine yet; without it the network is not used. ``trust`` names the models whose pickles
    and code may be used. With ``keep``, a folder that this process has read is not read again until a file in it
    changes. Raises UnknownModel, which says what to do.
    """
    base, given = split_name(name)
    label, pooling = _label(base), given.pooling or pooling
    pickle, code = _is_in(label, trust.pickle), _is_in(label, trust.remote_code)
    folder = locate_folder(base, pickle=pickle, remote_code=code, download=download)
    options = ModelOptions(
        pooling,
        on_long,
        Precision(precision),
        pickle,
        code,
        _is_in(label, trust.matryoshka),
        replace(given, query_model=None),
    )
    try:
        try:
            model = (read_or_keep if keep else read_folder)(label + name.removeprefix(base), folder, options)
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, OSError) as error:
            raise UnknownModel(
                f"model {name!r}: a file in {folder} holds what no model's file holds ({type(error).__name__}): "
                "copy the model folder again"
            ) from error
    except UnknownModel as error:
        if (advice := cache_advice(folder)) is None:
            raise
        raise UnknownModel(f"{error}; {advice}") from error
    if given.query_model is None:
        return model
    queries = resolve_model(
        given.query_model, pooling=None, on_long=on_long, precision=precision, trust=trust, download=download, keep=keep
    )
    return _with_queries_of(model, queries.query or queries, given)


def _with_queries_of(model: ModelFolder, queries: ModelFolder, given: NameOptions) -> ModelFolder:
    """``model`` for documents and ``queries`` for queries. Raises UnknownModel if their vectors have other lengths."""
    full = model.spec.dimensions
    if queries.spec.dimensions != full:
        raise UnknownModel(
            f"model {model.name!r}: its vectors have {full} dimensions and those of the query_model "
            f"{queries.name!r} have {queries.spec.dimensions}, so they are not in one space. Name a model that was "
            "trained for the space of the other one"
        )
    # What the query model does with documents and with long texts is not part of this space.
    own = replace(queries.spec, long_text=LongText.TRUNCATE, document_prompt="")
    prompt = prompt_of(model.name, "query", given, {})
    own = own if prompt is None else replace(own, query_prompt=prompt)
    spec = replace(model.spec, query_model=own.fingerprint, query_prompt=own.query_prompt)
    return replace(
        model, spec=spec, query=replace(queries, spec=replace(own, long_text=model.spec.long_text), query=None)
    )


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
    base, given = split_name(name)
    if base in DEFAULT_NAMES and bundled_folder() is None and given == _prompts_of(given):
        check_pooling(name, DEFAULT_SPEC.pooling, pooling)
        spec = replace(
            DEFAULT_SPEC,
            model=_label(base) + name.removeprefix(base),
            long_text=long_text_for(on_long),
            precision=precision,
            document_prompt=prompt_of(name, "document", given, {}) or "",
            query_prompt=prompt_of(name, "query", given, {}) or "",
        )
        return spec if dimensions is None else cut_space(spec, dimensions, trust=trust)
    folder = resolve_model(name, pooling=pooling, on_long=on_long, precision=precision, trust=trust, keep=True)
    return folder.space(dimensions)


def tokenizer_of(name: str, *, pooling: str | None = None, trust: Trust = _NO_TRUST) -> TokenizerFile:
    """The tokenizer of a model. For the default model the worker's packages need not be installed.

    Raises UnknownModel.
    """
    if split_name(name)[0] in DEFAULT_NAMES and bundled_folder() is None:
        return TokenizerFile(DEFAULT_TOKENIZER, lowercase=False, static=False)
    folder = resolve_model(name, pooling=pooling, trust=trust)
    path = folder.transformer / "tokenizer.json"
    if not path.is_file():
        raise UnknownModel(f"{folder.transformer} has no tokenizer.json, so its tokens cannot be counted here.")
    return TokenizerFile(path, folder.lowercase, folder.static)


def cut_space(full: SpaceSpec, dimensions: int, *, trust: Trust = _NO_TRUST) -> SpaceSpec:
    """The space of the vectors of ``full`` cut to ``dimensions``. The model's files are not needed.

    Raises InvalidInput unless the model's name or the operator says that its vectors may be cut.
    """
    sizes = known_sizes(full.model, full.dimensions)
    trusted = _is_in(without_given(full.model), trust.matryoshka)
    return replace(full, dimensions=check_dimensions(full.model, full.dimensions, dimensions, sizes, trusted=trusted))


def _prompts_of(given: NameOptions) -> NameOptions:
    """The part of ``given`` for which the files of the default model need not be read."""
    return replace(given, pooling=None, task=None, query_task=None, query_model=None)


def _label(name: str) -> str:
    return DEFAULT_MODEL if name in DEFAULT_NAMES else name


def _is_in(label: str, names: Set[str]) -> bool:
    return label in {_label(name) for name in names}
