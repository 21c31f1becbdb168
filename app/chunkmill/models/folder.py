"""Reads from the files of a model folder how its vectors are made.

The rules are those of sentence-transformers 6.2 (``modules.json``, ``sentence_bert_config.json``, prompts), so a folder
gives the same vectors there and here. Everything that would change the vectors in a way that the engine does not
support is refused by its name. Code that comes with a model is run, and a pickle is read, only if the operator trusts
that model by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from chunkmill.domain.spaces import AnyPooling, OnLong, Pooling, Precision, SpaceSpec, long_text_for, pooling_of
from chunkmill.errors import UnknownModel
from chunkmill.models.adapters import Adapter, find_adapter
from chunkmill.models.digest import revision
from chunkmill.models.files import broken, read_object, unsupported
from chunkmill.models.matryoshka import check_dimensions, stated_sizes
from chunkmill.models.modules import WITHOUT_EFFECT, Entry, Module, listed_modules, read_module, read_pooling
from chunkmill.models.names import NOTHING, NameOptions, prompt_of
from chunkmill.models.routers import modules_of, router_files
from chunkmill.models.static import read_static
from chunkmill.models.transformer import hidden_size, max_tokens, read_config, read_sentence_config
from chunkmill.models.weights import check_shapes, weight_files

PROVIDER: Final = "local"

_OURS: Final = tuple(mode for mode in Pooling if mode is not Pooling.PROVIDER)


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """What the caller and the operator say about a model, in addition to its files."""

    pooling: str | None = None
    """The pooling of a plain transformers folder."""
    on_long: OnLong = OnLong.TRUNCATE
    precision: Precision = Precision.FLOAT
    pickle: bool = False
    """Its weights may be read from a pickle."""
    remote_code: bool = False
    """Its Python files may be run."""
    matryoshka: bool = False
    """It was trained for any number of dimensions."""
    given: NameOptions = NOTHING
    """What its name says beside which model it is."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model on this machine: the space of its full vectors, and what else the engine needs to make them."""

    name: str
    path: Path
    spec: SpaceSpec
    transformer: Path
    """The folder of config.json, tokenizer and weights: ``path``, or a folder in it."""
    modules: tuple[Module, ...]
    """The modules after the pooling, in order."""
    include_prompt: bool = True
    """If False, the model reads the prompt's tokens, and the pooling leaves them out."""
    lowercase: bool = False
    """Texts are turned into lower case before the tokenizer's own normaliser."""
    pickle: bool = False
    """The weights are a pickle that the operator trusts, because there is no model.safetensors."""
    remote_code: bool = False
    """The architecture is code in the folder that the operator trusts."""
    default_dimensions: int = 0
    """The number of dimensions that the folder states (``truncate_dim``); 0 for all that the model gives."""
    sizes: Sequence[int] = ()
    """The smaller numbers of dimensions that its vectors may be cut to."""
    matryoshka: bool = False
    """The operator says that the model was trained for any number of dimensions."""
    static: bool = False
    """The model is a table that has a vector for each token (``StaticEmbedding``), and there is no transformer."""
    adapter: Adapter | None = None
    """What is added to the weights of the transformer, for a task."""
    query: ModelFolder | None = None
    """How the vectors of queries are made, if not in the same way. The space is that of this folder: the ``spec`` of
    the other one only tells the engine how to make its vectors."""

    def space(self, dimensions: int | None = None) -> SpaceSpec:
        """The space of vectors with ``dimensions``; None takes the number that the folder states.

        The engine makes full vectors and cuts them for each space. Raises InvalidInput if they may not be cut.
        """
        full = self.spec.dimensions
        if dimensions is None:
            dimensions = self.default_dimensions or full
        checked = check_dimensions(self.name, full, dimensions, self.sizes, trusted=self.matryoshka)
        return replace(self.spec, dimensions=checked)


def read_folder(name: str, path: Path, options: ModelOptions) -> ModelFolder:
    """The model in ``path``: a sentence-transformers folder, which has modules.json, or a plain transformers folder.

    Raises UnknownModel.
    """
    given = options.given
    if (path / "modules.json").is_file():
        listed = listed_modules(name, path)
        document = _read_modules(name, modules_of(name, listed, "document"), options, given.task)
        query = _read_modules(name, modules_of(name, listed, "query"), options, given.query_task or given.task)
        return _assemble(
            name,
            path,
            options,
            document,
            query,
            used=_read_sentence_config(path),
            others=(path / "modules.json", *router_files(listed)),
        )
    if (path / "config.json").is_file() and read_object(path / "config.json").get("model_type") == "model2vec":
        raise unsupported(
            name, "a model2vec folder without modules.json: load it with StaticEmbedding.from_model2vec and save it"
        )
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        raise UnknownModel(f"model {name!r}: {path} has no config.json, so it is not a model folder")
    if options.pooling is None:
        raise UnknownModel(
            f"model {name!r}: {path} is a plain transformers folder, which does not say how token vectors "
            f"become a text vector: set EMBEDDING_POOLING (or pooling=, or ?pooling= behind the name) to one of "
            f"{', '.join(_OURS)}"
        )
    pooling = _stated_pooling(name, options.pooling)
    document, query = (
        _read_transformer(name, path, options, task, pooling=pooling, modules=("normalize",))
        for task in (given.task, given.query_task or given.task)
    )
    return _assemble(name, path, options, document, query)


@dataclass(frozen=True, slots=True)
class _TextSide:
    """How the texts of one side, documents or queries, become vectors, and the files that this depends on."""

    transformer: Path
    pooling: AnyPooling
    modules: tuple[Module, ...]
    dimensions: int
    max_tokens: int
    others: Sequence[Path]
    weights: Sequence[Path]
    config: Mapping[str, Any] = field(default_factory=dict)
    """config.json; empty without a transformer."""
    include_prompt: bool = True
    lowercase: bool = False
    pickle: bool = False
    remote_code: bool = False
    static: bool = False
    adapter: Adapter | None = None


def _read_modules(name: str, chain: Sequence[Entry], options: ModelOptions, task: str | None) -> _TextSide:
    """The way through ``chain``, which has no Router any more. Raises UnknownModel."""
    kinds = [kind for kind, _ in chain]
    static = kinds[:1] == ["StaticEmbedding"]
    if not static and kinds[:2] != ["Transformer", "Pooling"]:
        raise unsupported(
            name,
            f"modules {' → '.join(kinds)}; they must begin with Transformer → Pooling, or with StaticEmbedding",
        )
    rest = [entry for entry in chain[1 if static else 2 :] if entry[0] not in WITHOUT_EFFECT]
    modules = tuple(read_module(name, kind, folder, pickle=options.pickle) for kind, folder in rest)
    if static:
        return _read_static(name, chain[0][1], options, task, modules)
    transformer, pooling_file = chain[0][1], chain[1][1] / "config.json"
    sentence, sentence_file = read_sentence_config(name, transformer)
    mode, include_prompt = read_pooling(name, pooling_file)
    return _read_transformer(
        name,
        transformer,
        options,
        task,
        pooling=check_pooling(name, mode, options.pooling),
        modules=modules,
        sentence=sentence,
        others=(pooling_file, sentence_file),
        include_prompt=include_prompt,
    )


def _read_static(
    name: str, folder: Path, options: ModelOptions, task: str | None, modules: tuple[Module, ...]
) -> _TextSide:
    if task is not None:
        raise UnknownModel(f"model {name!r}: task={task} is an adapter of a transformer, and the model has none")
    if options.precision is not Precision.FLOAT:
        raise unsupported(name, f"StaticEmbedding, which has no matrix products, in precision {options.precision}")
    table = read_static(name, folder)
    return _TextSide(
        folder,
        Pooling.MEAN,
        modules,
        _width(modules, table.dimensions),
        table.max_tokens,
        others=[layer.path / "config.json" for layer in modules if not isinstance(layer, str)],
        weights=[table.weights, *(layer.weights for layer in modules if not isinstance(layer, str))],
        static=True,
    )


def _read_transformer(
    name: str,
    transformer: Path,
    options: ModelOptions,
    task: str | None,
    *,
    pooling: AnyPooling,
    modules: tuple[Module, ...],
    sentence: Mapping[str, Any] | None = None,
    others: Sequence[Path] = (),
    include_prompt: bool = True,
) -> _TextSide:
    """The way through a transformer, from its configuration and weights. Raises UnknownModel."""
    sentence = sentence or {}
    config, code = read_config(name, transformer, remote_code=options.remote_code)
    weights = weight_files(name, transformer, pickle=options.pickle)
    check_shapes(name, weights, config)
    layers = [module for module in modules if not isinstance(module, str)]
    pickle = weights[0].suffix == ".bin"
    index = [transformer / "pytorch_model.bin.index.json"] if pickle else []
    adapter = None if task is None else find_adapter(name, transformer, task)
    added = [] if adapter is None else [adapter]
    return _TextSide(
        transformer,
        pooling,
        modules,
        _width(modules, hidden_size(name, config) * len(pooling.modes)),
        max_tokens(name, transformer, config, sentence),
        others=[
            *others, *(layer.path / "config.json" for layer in layers), *code, *index, *(one.config for one in added)
        ],
        weights=[*weights, *(layer.weights for layer in layers), *(one.weights for one in added)],
        config=config,
        include_prompt=include_prompt,
        lowercase=bool(sentence.get("do_lower_case")),
        pickle=pickle,
        remote_code=bool(code),
        adapter=adapter,
    )  # fmt: skip


def _width(modules: Sequence[Module], pooled: int) -> int:
    """The dimensions after ``modules``, of vectors that have ``pooled`` before. Raises UnknownModel."""
    for layer in modules:
        if isinstance(layer, str):
            continue
        if layer.in_features != pooled:
            raise broken(layer.path / "config.json", f"takes {layer.in_features} dimensions and gets {pooled}")
        pooled = layer.out_features
    return pooled


@dataclass(frozen=True, slots=True)
class _SentenceConfig:
    """The content of config_sentence_transformers.json, which the revision does not cover."""

    prompts: Mapping[str, Any] = field(default_factory=dict)
    """The prompts by their names. ``document`` and ``query`` are used unless the name of the model says otherwise."""
    truncate_dim: int | None = None


def _assemble(
    name: str,
    path: Path,
    options: ModelOptions,
    document: _TextSide,
    query: _TextSide,
    *,
    used: _SentenceConfig | None = None,
    others: Sequence[Path] = (),
) -> ModelFolder:
    """The model of a folder of either kind, from the ways of its documents and of its queries."""
    used, given = used or _SentenceConfig(), options.given
    ways = [document] if query == document else [document, query]
    full = document.dimensions
    if query.dimensions != full:
        raise unsupported(name, f"{full} dimensions for documents and {query.dimensions} for queries")
    default = min(used.truncate_dim or full, full)
    document_prompt = prompt_of(name, "document", given, used.prompts)
    query_prompt = prompt_of(name, "query", given, used.prompts)
    spec = SpaceSpec(
        provider=PROVIDER,
        model=name,
        revision=revision(
            path,
            transformers=[way.transformer for way in ways],
            others=[*others, *(file for way in ways for file in way.others)],
            weights=[file for way in ways for file in way.weights],
        ),
        dimensions=full,
        max_tokens=document.max_tokens,
        pooling=document.pooling,
        normalize=document.modules[-1:] == ("normalize",),
        document_prompt=(used.prompts.get("document") or "") if document_prompt is None else document_prompt,
        query_prompt=(used.prompts.get("query") or "") if query_prompt is None else query_prompt,
        long_text=long_text_for(options.on_long),
        precision=options.precision,
        task=given.task or "",
        query_task="" if given.query_task in (None, given.task) else str(given.query_task),
    )
    folder = _folder(name, path, document, spec)
    sizes = stated_sizes(name, full, document.config, default)
    folder = replace(folder, default_dimensions=default, sizes=sizes, matryoshka=options.matryoshka)
    if query == document:
        return folder
    normalize = query.modules[-1:] == ("normalize",)
    other = replace(spec, pooling=query.pooling, max_tokens=query.max_tokens, normalize=normalize)
    return replace(folder, query=_folder(name, path, query, other))


def _folder(name: str, path: Path, way: _TextSide, spec: SpaceSpec) -> ModelFolder:
    return ModelFolder(
        name,
        path,
        spec,
        way.transformer,
        way.modules,
        include_prompt=way.include_prompt,
        lowercase=way.lowercase,
        pickle=way.pickle,
        remote_code=way.remote_code,
        static=way.static,
        adapter=way.adapter,
    )


def check_pooling(name: str, mode: AnyPooling, asked: str | None) -> AnyPooling:
    """The pooling ``mode`` that a folder states. Raises UnknownModel if the caller asks for another one."""
    if asked is not None and _stated_pooling(name, asked) != mode:
        raise UnknownModel(
            f"model {name!r} states {mode} pooling, but EMBEDDING_POOLING (or pooling=) asks for {asked}: "
            "leave it unset for this model"
        )
    return mode


def _stated_pooling(name: str, word: str) -> AnyPooling:
    try:
        pooling = pooling_of(word)
    except ValueError:
        pooling = Pooling.PROVIDER
    if pooling is Pooling.PROVIDER:
        raise UnknownModel(
            f"model {name!r}: pooling {word!r} does not exist; it is one of {', '.join(_OURS)}, or several joined by +"
        )
    return pooling


def _read_sentence_config(path: Path) -> _SentenceConfig:
    """The prompts, of which ``encode_document`` and ``encode_query`` choose one, and the size that vectors are cut to.

    SentenceTransformer always has prompts named ``document`` and ``query``, which are empty if the file has none. Both
    methods find these first, so ``passage``, ``corpus`` and ``default_prompt_name`` are never used unless the name of
    the model says so.
    """
    file = path / "config_sentence_transformers.json"
    content = read_object(file) if file.is_file() else {}
    prompts = content.get("prompts") or {}
    size = content.get("truncate_dim")
    if not isinstance(prompts, dict) or not (size is None or (isinstance(size, int) and size > 0)):
        raise broken(file, "has prompts or a truncate_dim of an unknown form")
    return _SentenceConfig(prompts, size)
