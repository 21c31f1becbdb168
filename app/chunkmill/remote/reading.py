"""From JSON to the results of ``chunkmill.domain``, by the types of their fields. Nothing is believed unread."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from datetime import date, datetime
from decimal import Decimal, InvalidOperation
from enum import Enum
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


class UnreadableAnswer(ValueError):
    """An answer that is not what it should be. The message names the place and quotes nothing."""


def parse(body: bytes) -> Any:
    """The value of a JSON document. Raises :class:`UnreadableAnswer`."""
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise UnreadableAnswer("the answer is not JSON") from None


def parse_object(body: bytes) -> dict[str, Any]:
    value = parse(body)
    if not isinstance(value, dict):
        raise UnreadableAnswer("the answer is not a JSON object")
    return value


def read(kind: type[T], value: Any, place: str = "") -> T:
    """``value`` as an instance of ``kind``: a dataclass or a type that its fields may have.

    Fields that this release does not know are passed over, because the gateway may be of a newer one. Raises
    :class:`UnreadableAnswer`.
    """
    made: T = _read(kind, value, place or getattr(kind, "__name__", "the answer"))
    return made


def read_list(kind: type[T], value: Any, place: str) -> list[T]:
    if not isinstance(value, list):
        raise UnreadableAnswer(f"{place} is not a list")
    return [read(kind, item, f"{place}[{i}]") for i, item in enumerate(value)]


def read_vector(value: Any, place: str, dimensions: int | None = None) -> NDArray[np.float32]:
    """``(d,)`` float32 from the base64 of little-endian float32, or from a list of numbers."""
    if isinstance(value, str):
        try:
            vector = np.frombuffer(base64.b64decode(value, validate=True), "<f4").astype(np.float32, copy=False)
        except (binascii.Error, ValueError):
            raise UnreadableAnswer(f"{place} is not the base64 of float32 numbers") from None
    else:
        try:
            with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused below
                vector = np.asarray(value, np.float32)
        except (TypeError, ValueError, OverflowError):
            raise UnreadableAnswer(f"{place} is not a vector") from None
    if vector.ndim != 1 or not vector.size or not np.isfinite(vector).all():
        raise UnreadableAnswer(f"{place} is not a vector of finite numbers")
    if dimensions is not None and len(vector) != dimensions:
        raise UnreadableAnswer(f"{place} has {len(vector):,} dimensions, and the others have {dimensions:,}")
    return vector


@functools.cache
def _fields(kind: type) -> tuple[tuple[str, Any, bool], ...]:
    """Name, type and whether it must be there, of each field of a dataclass."""
    hints = typing.get_type_hints(kind)
    return tuple(
        (
            field.name,
            hints[field.name],
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
        )
        for field in dataclasses.fields(kind)
    )


def _read(kind: Any, value: Any, place: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        kinds = typing.get_args(kind)
        if value is None and types.NoneType in kinds:
            return None
        (only,) = (one for one in kinds if one is not types.NoneType)
        return _read(only, value, place)
    if origin is tuple:
        item, _ = typing.get_args(kind)
        return tuple(read_list(item, value, place))
    if origin is np.ndarray:
        return read_vector(value, place)
    if kind is Any:
        return value
    if isinstance(origin, type) and issubclass(origin, Mapping):
        keys, values = typing.get_args(kind)
        return {_key(keys, name, place): _read(values, one, place) for name, one in _object(value, place).items()}
    if dataclasses.is_dataclass(kind):
        given = _object(value, place)
        arguments = {}
        for name, hint, is_needed in _fields(typing.cast(type, kind)):
            if name in given:
                arguments[name] = _read(hint, given[name], f"{place}.{name}")
            elif is_needed:
                raise UnreadableAnswer(f"{place} has no {name}")
        return typing.cast(type, kind)(**arguments)
    return _scalar(kind, value, place)


def _key(kind: Any, name: str, place: str) -> Any:
    """A key of a mapping, which JSON has as a text also if it is a number."""
    if kind is not float:
        return _read(kind, name, place)
    try:
        return _scalar(float, float(name), place)
    except ValueError:
        raise UnreadableAnswer(f"{place} has a key that is not a number") from None


def _scalar(kind: Any, value: Any, place: str) -> Any:
    try:
        if issubclass(kind, Enum):
            return kind(value)
        if kind is datetime:
            return datetime.fromisoformat(value)
        if kind is date:
            return date.fromisoformat(value)
        if kind is Decimal:
            return Decimal(value)
    except (TypeError, ValueError, InvalidOperation):
        raise UnreadableAnswer(f"{place} is not a {kind.__name__} that this release knows") from None
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise UnreadableAnswer(f"{place} is not a {kind.__name__}")


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UnreadableAnswer(f"{place} is not an object")
    return value


def _refuse_constant(_: str) -> Any:
    raise ValueError
