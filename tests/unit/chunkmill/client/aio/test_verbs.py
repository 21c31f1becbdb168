"""AsyncClient has every method of Client, with its arguments and its words."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import AsyncGenerator, AsyncIterable, Iterator

import pytest

from chunkmill import AsyncBatcher, AsyncClient, AsyncGoldenQueries, Batcher, Client, GoldenQueries
from docs.async_verbs import Method, imports_of

OWN = ("from_env", "close", "batcher", "golden")
"""What AsyncClient has in its own way. The first two have no other form, and the others return a class of its own."""
METHODS = [name for name, member in inspect.getmembers(Client, callable) if not name.startswith("_")]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_there_as_a_coroutine_with_the_same_arguments(name: str) -> None:
    """One that hands out items is an asynchronous iterator."""
    ours, theirs = getattr(AsyncClient, name), inspect.unwrap(getattr(Client, name))
    hands_out = name not in OWN and is_iterator(typing.get_type_hints(theirs)["return"])
    assert inspect.iscoroutinefunction(ours) == (not hands_out and name != "batcher")
    assert [(p.name, p.kind, p.default) for p in inspect.signature(ours).parameters.values()] == [
        (p.name, p.kind, p.default) for p in inspect.signature(theirs).parameters.values()
    ]
    if name not in OWN:
        assert inspect.getdoc(ours) == inspect.getdoc(theirs)
        hints = typing.get_type_hints(ours)  # every name in them can be found
        returned = typing.get_type_hints(theirs)["return"]
        if hands_out:
            (item,) = typing.get_args(returned)
            returned = AsyncGenerator[item, None]  # type: ignore[valid-type]
        assert hints["return"] == returned
        for argument, hint in typing.get_type_hints(theirs).items():
            if argument != "return" and not argument.startswith("on_"):
                new = kinds_of(hints[argument]) - kinds_of(hint)
                assert all(typing.get_origin(kind) is AsyncIterable for kind in new), argument


@pytest.mark.parametrize(("ours", "theirs"), [(AsyncBatcher, Batcher), (AsyncGoldenQueries, GoldenQueries)])
def test_what_an_async_client_makes_has_every_method_of_what_a_client_makes(ours: type, theirs: type) -> None:
    is_sync = {"rest", "added", "enqueued", "jobs"}  # they read what is in memory
    names = {name for name in vars(theirs) if not name.startswith("_")} | ({"__call__"} & vars(theirs).keys())
    assert names
    for name in names:
        own, other = inspect.getattr_static(ours, name), inspect.getattr_static(theirs, name)
        assert inspect.iscoroutinefunction(own) == (name not in is_sync), name
        if not isinstance(other, property):
            other = inspect.unwrap(other)
            assert inspect.signature(own).parameters.keys() == inspect.signature(other).parameters.keys(), name
            assert typing.get_type_hints(own)["return"] == typing.get_type_hints(other)["return"], name


def is_iterator(hint: typing.Any) -> bool:
    return typing.get_origin(hint) is Iterator


def kinds_of(hint: typing.Any) -> set[typing.Any]:
    """The members of a union; anything else alone."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return set(typing.get_args(hint)) if is_union else {hint}


def test_a_client_has_methods() -> None:
    assert {"search", "enqueue", "wait", "embed", "job", "audit", "close", "from_env"} <= set(METHODS)


def handed_out(self: Client, collection: str, *, batch: int = 1024) -> Iterator[tuple[str, bytes]]:
    """Hand out what is there."""
    raise NotImplementedError


def test_a_method_that_hands_out_items_becomes_an_asynchronous_iterator() -> None:
    made = Method("handed_out", handed_out).source()  # type: ignore[arg-type]
    assert "def handed_out(self: Client, collection: str, *, batch: int=1024) -> AsyncGenerator[" in made
    assert "AsyncGenerator[tuple[str, bytes], None]:" in made
    assert "return self._items(self._client.handed_out, collection, batch=batch)" in made


def test_imports_are_those_of_the_module_that_has_the_method() -> None:
    module = inspect.getmodule(inspect.unwrap(Client.search))
    assert module is not None
    known = imports_of(module)
    assert known["np"] == "from chunkmill.system.numbers import np"
    assert known["Hits"] == "from chunkmill.domain.results import Hits"
