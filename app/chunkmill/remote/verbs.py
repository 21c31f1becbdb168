"""Turns verbs, which are generators of steps, into methods that run them."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping, Sequence
from decimal import Decimal
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, cast, overload

import numpy as np

from chunkmill.domain.gates import Gates
from chunkmill.domain.reembedding import KEEP_DAYS, RAMP, STEP_HOURS, Quote, Reembedding
from chunkmill.domain.results import Hits
from chunkmill.domain.spaces import OnLong, Precision
from chunkmill.domain.states import Priority, Route
from chunkmill.remote.steps import Items, Steps

P = ParamSpec("P")
T = TypeVar("T")

OneQuery = str | np.ndarray[tuple[int], np.dtype[np.float32]]
Queries = list[str] | tuple[str, ...] | np.ndarray[tuple[int, int], np.dtype[np.float32]]


def in_thread(verb: Callable[Concatenate[Any, P], Steps[T]]) -> Callable[Concatenate[Any, P], T]:
    """A method of ``RemoteClient``, which has the verb's arguments and its docstring."""

    @functools.wraps(verb)
    def method(self: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        result: T = self._runner.run(verb(self._verbs, *args, **kwargs))
        return result

    made: Callable[Concatenate[Any, P], T] = cast(Any, method)
    return made


def in_loop(verb: Callable[Concatenate[Any, P], Steps[T]]) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """A coroutine method of ``AsyncRemoteClient``."""

    @functools.wraps(verb)
    async def method(self: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        result: T = await self._runner.run(verb(self._verbs, *args, **kwargs))
        return result

    made: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]] = cast(Any, method)
    return made


def items_in_thread(
    verb: Callable[Concatenate[Any, P], Items[T]],
) -> Callable[Concatenate[Any, P], Generator[T, None, None]]:
    """A method of ``RemoteClient`` that hands items out."""

    @functools.wraps(verb)
    def method(self: Any, *args: P.args, **kwargs: P.kwargs) -> Generator[T, None, None]:
        items: Generator[T, None, None] = self._runner.items(verb(self._verbs, *args, **kwargs).steps)
        return items

    made: Callable[Concatenate[Any, P], Generator[T, None, None]] = cast(Any, method)
    return made


def items_in_loop(
    verb: Callable[Concatenate[Any, P], Items[T]],
) -> Callable[Concatenate[Any, P], AsyncGenerator[T, None]]:
    """A method of ``AsyncRemoteClient`` that hands items out."""

    @functools.wraps(verb)
    def method(self: Any, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[T, None]:
        items: AsyncGenerator[T, None] = self._runner.items(verb(self._verbs, *args, **kwargs).steps)
        return items

    made: Callable[Concatenate[Any, P], AsyncGenerator[T, None]] = cast(Any, method)
    return made


class Search(Protocol):
    """What ``search`` returns follows from what it is asked: one query has one list of hits."""

    @overload
    def __call__(
        self,
        query: OneQuery | None = None,
        *,
        collection: str,
        k: int = 10,
        filter: Mapping[str, Any] | None = None,
        exact: bool = False,
        timeout: float = 30.0,
        like: str | None = None,
        min_score: float | None = None,
        offset: int | None = None,
        explain: bool = False,
        hybrid: bool | float | Literal["rrf"] | None = None,
        session: str | None = None,
        space: str | None = None,
        on_unserved: Literal["previous"] | None = None,
        bridge: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Hits: ...

    @overload
    def __call__(
        self,
        query: Queries,
        *,
        collection: str,
        k: int = 10,
        filter: Mapping[str, Any] | None = None,
        exact: bool = False,
        timeout: float = 30.0,
        min_score: float | None = None,
        offset: int | None = None,
        explain: bool = False,
        hybrid: bool | float | Literal["rrf"] | None = None,
        session: str | None = None,
        space: str | None = None,
        on_unserved: Literal["previous"] | None = None,
        bridge: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> list[Hits]: ...


class AsyncSearch(Protocol):
    """:class:`Search` as a coroutine."""

    @overload
    def __call__(
        self,
        query: OneQuery | None = None,
        *,
        collection: str,
        k: int = 10,
        filter: Mapping[str, Any] | None = None,
        exact: bool = False,
        timeout: float = 30.0,
        like: str | None = None,
        min_score: float | None = None,
        offset: int | None = None,
        explain: bool = False,
        hybrid: bool | float | Literal["rrf"] | None = None,
        session: str | None = None,
        space: str | None = None,
        on_unserved: Literal["previous"] | None = None,
        bridge: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Coroutine[Any, Any, Hits]: ...

    @overload
    def __call__(
        self,
        query: Queries,
        *,
        collection: str,
        k: int = 10,
        filter: Mapping[str, Any] | None = None,
        exact: bool = False,
        timeout: float = 30.0,
        min_score: float | None = None,
        offset: int | None = None,
        explain: bool = False,
        hybrid: bool | float | Literal["rrf"] | None = None,
        session: str | None = None,
        space: str | None = None,
        on_unserved: Literal["previous"] | None = None,
        bridge: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Coroutine[Any, Any, list[Hits]]: ...


class Reembed(Protocol):
    """What ``reembed`` returns follows from ``dry_run``."""

    @overload
    def __call__(
        self,
        collection: str,
        *,
        to: str,
        dry_run: Literal[True],
        on_long: OnLong | str = OnLong.TRUNCATE,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        gates: Gates | None = None,
        ramp: Sequence[int] = RAMP,
        step_hours: float = STEP_HOURS,
        keep_days: float = KEEP_DAYS,
        priority: Priority | str = Priority.LOW,
        route: Route | str = Route.AUTO,
        max_usd: Decimal | int | str | None = None,
    ) -> Quote: ...

    @overload
    def __call__(
        self,
        collection: str,
        *,
        to: str,
        dry_run: Literal[False] = False,
        on_long: OnLong | str = OnLong.TRUNCATE,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        gates: Gates | None = None,
        ramp: Sequence[int] = RAMP,
        step_hours: float = STEP_HOURS,
        keep_days: float = KEEP_DAYS,
        priority: Priority | str = Priority.LOW,
        route: Route | str = Route.AUTO,
        max_usd: Decimal | int | str | None = None,
    ) -> Reembedding: ...


class AsyncReembed(Protocol):
    """:class:`Reembed` as a coroutine."""

    @overload
    def __call__(
        self,
        collection: str,
        *,
        to: str,
        dry_run: Literal[True],
        on_long: OnLong | str = OnLong.TRUNCATE,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        gates: Gates | None = None,
        ramp: Sequence[int] = RAMP,
        step_hours: float = STEP_HOURS,
        keep_days: float = KEEP_DAYS,
        priority: Priority | str = Priority.LOW,
        route: Route | str = Route.AUTO,
        max_usd: Decimal | int | str | None = None,
    ) -> Coroutine[Any, Any, Quote]: ...

    @overload
    def __call__(
        self,
        collection: str,
        *,
        to: str,
        dry_run: Literal[False] = False,
        on_long: OnLong | str = OnLong.TRUNCATE,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        gates: Gates | None = None,
        ramp: Sequence[int] = RAMP,
        step_hours: float = STEP_HOURS,
        keep_days: float = KEEP_DAYS,
        priority: Priority | str = Priority.LOW,
        route: Route | str = Route.AUTO,
        max_usd: Decimal | int | str | None = None,
    ) -> Coroutine[Any, Any, Reembedding]: ...
