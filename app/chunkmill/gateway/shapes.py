"""Results of the client as JSON, and the schemas of that JSON. Both come from the dataclasses themselves.

A dataclass is an object with its fields and its public properties, under their own names. A datetime is text in UTC
that ends in ``Z``, a Decimal is text, because JSON's numbers are read as floats, and an enum is its value.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import re
import textwrap
import types
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import orjson
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from chunkmill.gateway.endpoint import Schema
from chunkmill.system.python import parsed

MANY = 200
"""More results than these are written in a thread: each takes about 10 µs, and the loop shall not stand still."""
SCHEMAS = "#/components/schemas/"


def plain(value: Any) -> Any:
    """``value`` as dicts, lists, texts and numbers."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: plain(getattr(value, name)) for name in _names(type(value))}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Decimal):
        digits = f"{value:f}"
        return digits.rstrip("0").rstrip(".") if "." in digits else digits
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no JSON form")


def dumped(value: Any) -> bytes:
    """JSON in UTF-8. Metadata may have larger numbers and deeper objects than orjson writes."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError:
        # A lone surrogate cannot come from Postgres, and all else that is stored was JSON.
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=np.ndarray.tolist).encode()


def answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """``value`` as a JSON answer. It is for small ones; :func:`large_answer` is for the others."""
    return Response(dumped(plain(value)), status, headers, "application/json")


async def large_answer(value: Any, n: int) -> Response:
    """``value``, which has ``n`` results in it, as a JSON answer."""
    return await run_in_threadpool(answer, value) if n > MANY else answer(value)


def schema_of(annotation: Any) -> Schema:
    """The JSON schema of what :func:`plain` makes of a value of this type. Dataclasses become references."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return {"anyOf": [dict(schema_of(one)) for one in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is np.ndarray or annotation is np.ndarray:
        return {"type": "array", "items": {"type": "number"}}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": dict(schema_of(arguments[1]))}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return {"type": "array", "items": dict(schema_of(arguments[0]))}
    if annotation is Any:
        return {}
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        _known[annotation.__name__] = annotation
        return {"$ref": SCHEMAS + annotation.__name__}
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return {"type": "string", "enum": [member.value for member in annotation]}
    raise TypeError(f"{annotation!r} has no JSON schema")


def object_of(**properties: Schema) -> Schema:
    """The schema of an object that has all of these properties."""
    return {
        "type": "object",
        "properties": {name: dict(schema) for name, schema in properties.items()},
        "required": list(properties),
    }


def list_of(item: Any) -> Schema:
    return {"type": "array", "items": dict(schema_of(item))}


def components() -> dict[str, Schema]:
    """Name → schema of every dataclass that a schema of this process refers to."""
    made: dict[str, Schema] = {}
    while missing := _known.keys() - made.keys():
        for name in missing:
            made[name] = _object(_known[name])
    return dict(sorted(made.items()))


_known: dict[str, type] = {}
_PLAIN: dict[Any, Schema] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    types.NoneType: {"type": "null"},
    datetime: {"type": "string", "format": "date-time"},
    date: {"type": "string", "format": "date"},
    Decimal: {"type": "string", "pattern": r"^-?\d+(\.\d+)?$"},
}


@functools.cache
def _names(cls: type) -> tuple[str, ...]:
    """The fields of a dataclass and its public properties."""
    fields = [field.name for field in dataclasses.fields(cls)]
    return (*fields, *_properties(cls))


def _properties(cls: type) -> list[str]:
    return [name for name, member in vars(cls).items() if isinstance(member, property) and not name.startswith("_")]


def _object(cls: type) -> Schema:
    hints, said = get_type_hints(cls), _documented(cls)
    for name in _properties(cls):
        getter = vars(cls)[name].fget
        hints[name] = get_type_hints(getter)["return"]
        said[name] = _one_line(inspect.getdoc(getter))
    properties = {}
    for name in _names(cls):
        schema = dict(schema_of(hints[name]))
        properties[name] = {**schema, "description": said[name]} if said.get(name) else schema
    return {
        "type": "object",
        "description": _one_line(inspect.getdoc(cls)),
        "properties": properties,
        "required": list(properties),
    }


def _documented(cls: type) -> dict[str, str]:
    """Field → the text below it in the source of the class."""
    try:
        (body,) = parsed(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, SyntaxError):
        return {}
    said = {}
    statements = body.body if isinstance(body, ast.ClassDef) else []
    for pair in itertools.pairwise(statements):
        match pair:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                said[name] = _one_line(text)
    return said


_IN_JSON = (("None", "null"), ("True", "true"), ("False", "false"))


def _one_line(text: str | None) -> str:
    words = " ".join((text or "").split())
    for role in (":class:", ":meth:", ":attr:", ":func:"):
        words = words.replace(role, "")
    for word, in_json in _IN_JSON:
        words = re.sub(rf"\b{word}\b", in_json, words)
    return words.replace("``", "`")
