"""Values as JSON has them, for metadata that come from programs, tables and databases. Pure.

JSON has no dates, no bytes and no NaN. What has one plain form there takes it; anything else is refused
by the name of its field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from os import PathLike, fspath
from typing import Any
from uuid import UUID

MAX_SHOWN = 100
"""How many characters of a field's name an error shows."""


class NotJson(TypeError):
    """A value that JSON does not have. The message names the field, and never holds the value."""


def json_value(value: Any, field: str = "") -> Any:
    """``value`` as JSON has it. ``field`` is where it stands.

    A date, a time, a Decimal, a UUID and a path become text, a time span becomes seconds, and bytes become the text
    that they are in UTF-8. A set becomes a list in order, and an array or a scalar of NumPy becomes its numbers. What
    says that there is no value becomes null: NaN, an infinity, NaT, and the NA of pandas.

    Raises :class:`NotJson`.
    """
    if value is None or (isinstance(value, bool | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, Enum):
        return json_value(value.value, field)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_key(name, field): json_value(inner, _inside(field, name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(inner, field) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted((json_value(inner, field) for inner in value), key=lambda inner: (str(type(inner)), str(inner)))
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            raise NotJson(f"the field {_shown(field)} holds bytes that are not text in UTF-8") from None
    return _of_other_kind(value, field)


def _of_other_kind(value: Any, field: str) -> Any:
    kind = type(value).__name__
    if kind in ("NaTType", "NAType"):  # of pandas, whose NaT is a datetime
        return None
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value) if value.is_finite() else None
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, PathLike):
        return json_value(fspath(value), field)
    if type(value).__module__ == "numpy" and kind in ("datetime64", "timedelta64"):
        # Its own text, because Python's datetime has no nanoseconds.
        return None if str(value) == "NaT" else str(value) if kind == "datetime64" else _seconds(value)
    if hasattr(value, "dtype") and callable(getattr(value, "tolist", None)):
        plain = value.tolist()
        if not hasattr(plain, "dtype"):
            return json_value(plain, field)
    raise NotJson(f"the field {_shown(field)} is of type {kind}, which JSON does not have")


def _seconds(value: Any) -> float:
    return float(value / type(value)(1, "s"))


def _key(name: Any, field: str) -> str:
    if hasattr(name, "dtype") and callable(getattr(name, "item", None)):
        name = name.item()
    if isinstance(name, str) and not isinstance(name, Enum):
        return name
    if isinstance(name, Enum):
        return _key(name.value, field)
    if name is None or isinstance(name, bool):
        return {None: "null", True: "true", False: "false"}[name]  # as the module json writes them
    if isinstance(name, int):
        return str(int(name))
    if isinstance(name, float) and math.isfinite(name):
        return repr(float(name))
    if isinstance(name, date | time | UUID | Decimal):
        return str(name) if isinstance(name, UUID | Decimal) else name.isoformat()
    place = f"in {_shown(field)} " if field else ""
    raise NotJson(f"a key {place}is of type {type(name).__name__}; keys of JSON are text")


def _inside(field: str, name: object) -> str:
    return f"{field}.{name}" if field else str(name)


def _shown(field: str) -> str:
    return repr(field[:MAX_SHOWN])
