"""What users import from `chunkmill`: all that the client's methods take, return and raise, and nothing else."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
import types
import typing
from collections.abc import Generator, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

import chunkmill
from chunkmill import AsyncClient, ChunkmillError, Client, errors, remote
from chunkmill.broker import Broker
from chunkmill.db.connect import create_db
from chunkmill.remote import AsyncRemoteClient, RemoteClient
from chunkmill.remote.steps import Items
from chunkmill.settings import Settings

METHODS = [
    member
    for kind in (Client, AsyncClient, RemoteClient, AsyncRemoteClient)
    for name in dir(kind)
    if not name.startswith("_") and callable(member := inspect.getattr_static(kind, name, None) or getattr(kind, name))
]


def test_every_public_name_is_there_and_no_other() -> None:
    assert sorted(chunkmill.__all__) == chunkmill.__all__ == dir(chunkmill)
    for name in chunkmill.__all__:
        assert getattr(chunkmill, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'chunkmill' has no attribute 'Klient'"):
        chunkmill.Klient  # type: ignore[attr-defined]  # noqa: B018


PUBLIC = {*chunkmill.__all__, *remote.__all__}
LATE = {"np": np, "NDArray": NDArray}
"""These names are imported only when they are needed."""


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__qualname__)
def test_every_type_that_a_method_takes_or_returns_is_public(method: typing.Any) -> None:
    names = {kind.__name__ for kind in types_of(typing.get_type_hints(method).values(), set())}
    assert names <= PUBLIC


@pytest.mark.parametrize(
    "method", [*METHODS, Client, AsyncClient, RemoteClient, AsyncRemoteClient], ids=lambda method: method.__qualname__
)
def test_every_error_that_a_docstring_names_is_public(method: typing.Any) -> None:
    named = set(re.findall(r":class:`(\w+)`", inspect.getdoc(method) or ""))
    assert named <= PUBLIC


def test_every_error_of_the_tree_is_public_and_says_what_it_means() -> None:
    """The reference lists them all, under a heading that says that they are imported from `chunkmill`."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ChunkmillError)]
    assert len(kinds) > 30
    assert {kind.__name__ for kind in kinds} <= set(chunkmill.__all__)
    assert [kind.__name__ for kind in kinds if not vars(kind).get("__doc__")] == []


def test_every_method_and_property_of_a_public_class_is_in_the_reference() -> None:
    """The reference leaves out what has no docstring."""
    kinds = [getattr(home, name) for home in (chunkmill, remote) for name in home.__all__]
    members = [
        (f"{kind.__name__}.{name}", member.fget if isinstance(member, property) else member)
        for kind in kinds
        if isinstance(kind, type)
        for base in kind.__mro__
        if base.__module__.startswith("chunkmill.")
        for name, member in vars(base).items()
        if not name.startswith("_")
    ]
    assert sum(isinstance(member, types.FunctionType) for _, member in members) > 300
    assert [name for name, member in members if inspect.isfunction(member) and not inspect.getdoc(member)] == []


def types_of(hints: typing.Iterable[object], seen: set[type]) -> Iterator[type]:
    """Our own classes in type hints, those of their fields included."""
    for hint in hints:
        origin = typing.get_origin(hint)
        if origin is Generator:  # the steps of a remote method, which end in its result
            yield from types_of(typing.get_args(hint)[2:], seen)
            continue
        yield from types_of(typing.get_args(hint), seen)
        hint = origin or hint
        if (
            isinstance(hint, type)
            and hint is not Items
            and hint.__module__.startswith("chunkmill.")
            and hint not in seen
        ):
            seen.add(hint)
            yield hint
            if dataclasses.is_dataclass(hint):
                yield from types_of(typing.get_type_hints(hint, localns=LATE).values(), seen)


def test_a_client_and_a_job_are_shown_on_one_line_without_passwords() -> None:
    settings = Settings.from_env(
        database_url="postgresql://me:SECRET@db/chunks", redis_url="redis://:SECRET@redis:6379/0"
    )
    with Client(
        create_db(settings.require_database_url(), role="client"), Broker.connect(settings), settings
    ) as client:
        assert (
            repr(client)
            == "Client(database='postgresql+psycopg://me:***@db/chunks', redis='redis://:***@redis:6379/0')"
        )
    nothing = dict.fromkeys((field.name for field in dataclasses.fields(chunkmill.Job)), 0)
    job = chunkmill.Job(**nothing | {"id": 7, "state": chunkmill.JobState.RUNNING, "collection": "docs", "chunks": 12})
    assert repr(job) == "Job(id=7, state='running', collection='docs', chunks=12, remaining=0, dead=0)"


def test_importing_the_package_alone_brings_nothing_along() -> None:
    script = "import sys, chunkmill; assert not {'sqlalchemy', 'celery', 'numpy', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_client_brings_no_torch() -> None:
    script = "import sys; from chunkmill import Client; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True)
