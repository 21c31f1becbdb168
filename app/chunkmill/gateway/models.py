"""The models that a gateway serves, and the names that they have here.

These are the default model, the models of the spaces that are registered, and the aliases of the settings. No other
name is looked up: a caller could name a folder of this machine, or a paid model that nobody here has used yet.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import sqlalchemy as sa

from chunkmill.client.base import store_errors
from chunkmill.domain.spaces import OnLong, SpaceSpec
from chunkmill.errors import InvalidInput, UnknownModel
from chunkmill.gateway.caller import Caller
from chunkmill.gateway.errors import Refusal
from chunkmill.models.locate import DEFAULT_MODEL, DEFAULT_NAMES
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill.spaces.requested import requested_spec

KEEP_SECONDS = 5.0
"""How long the list of models is kept. A space that is registered meanwhile is found at once, because a name that is
not in the list has it read again."""
AGAIN_SECONDS = 0.5
"""How long it is kept at least, however many unknown names are asked for."""
TAG = ":latest"
"""What Ollama's clients may add to a name."""
SHOWN = 10
"""How many names a refusal lists."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """``name`` is a name that callers use, and ``target`` the one that workers know the model by."""

    name: str
    target: str
    spec: SpaceSpec
    """The space of its vectors when nobody asks for fewer dimensions."""
    created: int
    """When its first space was registered, as Unix time; 0 if none is yet."""

    @property
    def is_alias(self) -> bool:
        return _canonical(self.name) != _canonical(self.target)


@dataclass(frozen=True, slots=True)
class _Listing:
    read_at: float
    models: Mapping[str, ServedModel]
    problems: Mapping[str, str]
    """Why a name that should be served is not."""
    registered: tuple[SpaceSpec, ...]
    dimensions: dict[tuple[str, int], int] = field(default_factory=dict)
    """(target, wanted) → the dimensions to ask workers for."""


class Models:
    """Reads the list in a thread, once for all that ask at a time."""

    def __init__(self, db: sa.Engine, settings: Settings) -> None:
        self._db = db
        self._settings = settings
        self._listing: _Listing | None = None
        self._reading: asyncio.Task[_Listing] | None = None

    async def all(self, caller: Caller) -> list[ServedModel]:
        """The models that ``caller`` may use: the default model, then the others by name."""
        listing = await self._current(KEEP_SECONDS)
        return [model for model in listing.models.values() if _may_use(caller, model)]

    async def default_spec(self) -> SpaceSpec | None:
        """The space of the default model; None if it cannot be served."""
        model = _look_up(await self._current(KEEP_SECONDS), self._settings.embedding_model)
        return None if model is None else model.spec

    async def find(self, name: str | None, caller: Caller) -> ServedModel:
        """The model of this name; without one, the default model. Raises :class:`Refusal` with 404 or 403."""
        wanted = self._settings.embedding_model if name is None else name
        listing = await self._current(KEEP_SECONDS)
        model = _look_up(listing, wanted)
        if model is None:
            listing = await self._current(AGAIN_SECONDS)
            model = _look_up(listing, wanted)
        if model is None:
            raise _not_found(wanted, listing, caller)
        model = replace(model, name=wanted)
        if not _may_use(caller, model):
            raise Refusal(403, "model_not_allowed", f"this API key may not use model {_shown(wanted)}.", param="model")
        return model

    async def require_usable(self, name: object, caller: Caller) -> None:
        """Raise :class:`Refusal` if this is the name of a model, and of none that the caller may use."""
        if isinstance(name, str) and not caller.may_use(name):
            await self.find(name, caller)  # it may be another name of one that the caller may use

    async def dimensions_to_ask(self, model: ServedModel, wanted: int | None) -> int | None:
        """How many dimensions to ask workers for, so that vectors of ``wanted`` can be cut from them here.

        None is the size of ``model.spec``. Vectors are cut here and not in a space of their own, because each space is
        a table, and callers could make hundreds. Raises :class:`Refusal` if the vectors may not be cut so.
        """
        if wanted is None or wanted == model.spec.dimensions:
            return None
        listing = await self._current(KEEP_SECONDS)
        key = (model.target, wanted)
        if key not in listing.dimensions:
            listing.dimensions[key] = await asyncio.to_thread(self._check, model.target, wanted, listing.registered)
        size = listing.dimensions[key]
        return None if size == model.spec.dimensions else size

    def _check(self, target: str, wanted: int, registered: Iterable[SpaceSpec]) -> int:
        """The size to ask for: the usual one of the model, or if that is smaller than ``wanted``, its full one."""
        try:
            self._spec(target, registered, dimensions=wanted)  # raises unless vectors may have this size
        except UnknownModel as error:
            raise Refusal(404, "model_not_found", str(error), param="model") from None
        except InvalidInput as error:
            raise Refusal(400, "invalid_dimensions", str(error), param="dimensions") from None
        usual = self._spec(target, registered).dimensions
        if wanted <= usual:
            return usual
        full = self._settings.model_copy(update={"embedding_dimensions": None})
        return self._spec(target, registered, settings=full).dimensions

    async def _current(self, most_age: float) -> _Listing:
        if self._listing is not None and time.monotonic() - self._listing.read_at <= most_age:
            return self._listing
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(asyncio.to_thread(self._read))
            self._reading.add_done_callback(lambda task: task.cancelled() or task.exception())  # it may be nobody's
        # Whoever goes away must not stop what others wait for.
        self._listing = await asyncio.shield(self._reading)
        return self._listing

    def _read(self) -> _Listing:
        read_at = time.monotonic()
        with store_errors(self._db), self._db.begin() as conn:
            spaces = registry.all_spaces(conn)
            created = {
                row.id: int(row.created)
                for row in conn.execute(
                    sa.text("SELECT id, extract(epoch FROM created_at)::bigint AS created FROM spaces")
                )
            }
        specs = tuple(space.spec for space in spaces)
        since: dict[str, int] = {}
        for space in spaces:
            since.setdefault(space.spec.model, created.get(space.id, 0))
        default = self._settings.embedding_model
        targets = {_canonical(default): default} | {name: name for name in sorted(since) if name != _canonical(default)}
        targets |= self._settings.gateway_model_aliases or {}
        models, problems = {}, {}
        for name, target in targets.items():
            try:
                spec = self._spec(target, specs)
            except InvalidInput as error:  # such as a model whose files are gone, of which there are two revisions
                problems[name] = str(error)
            else:
                models[name] = ServedModel(name, target, spec, since.get(spec.model, 0))
        return _Listing(read_at, models, problems, specs)

    def _spec(
        self,
        target: str,
        registered: Iterable[SpaceSpec],
        *,
        dimensions: int | None = None,
        settings: Settings | None = None,
    ) -> SpaceSpec:
        return requested_spec(
            settings or self._settings,
            target,
            on_long=OnLong.TRUNCATE,
            dimensions=dimensions,
            precision=None,
            registered=lambda: registered,
        )


def _look_up(listing: _Listing, name: str) -> ServedModel | None:
    """The model of this name, or the only one that has it without a revision: ``org/name`` for ``org/name@a1b2``."""
    for known in (name, name.removesuffix(TAG)):
        # An alias may have one of the default model's own names.
        if (model := listing.models.get(known) or listing.models.get(_canonical(known))) is not None:
            return model
    of_revisions = [model for other, model in listing.models.items() if other.partition("@")[0] == name]
    return of_revisions[0] if len(of_revisions) == 1 else None


def _may_use(caller: Caller, model: ServedModel) -> bool:
    """A key that is for certain models is for them under all their names."""
    return any(caller.may_use(name) for name in {model.name, model.target, model.spec.model})


def _not_found(name: str, listing: _Listing, caller: Caller) -> Refusal:
    names = [model.name for model in listing.models.values() if _may_use(caller, model)]
    if (problem := listing.problems.get(_canonical(name))) is not None:
        message = f"model {_shown(name)} cannot be served: {problem}"
    elif names:
        more = f" and {len(names) - SHOWN:,} more, which GET /v1/models lists" if len(names) > SHOWN else ""
        message = f"there is no model {_shown(name)}. This gateway serves {', '.join(names[:SHOWN])}{more}."
    else:
        message = f"there is no model {_shown(name)}, and this API key may use no other."
    return Refusal(404, "model_not_found", message, param="model")


def _canonical(name: str) -> str:
    return DEFAULT_MODEL if name in DEFAULT_NAMES else name


def _shown(name: str) -> str:
    return repr(name if len(name) <= 100 else f"{name[:100]} and so on")
