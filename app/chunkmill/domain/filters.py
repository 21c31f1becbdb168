"""The language of metadata filters, which searches and all else that chooses chunks by their metadata share. Pure.

A filter is a JSON object. A plain key asks that the metadata contain its value, as ``@>`` of jsonb does. A key that
begins with ``$`` is an operator: ``$and``, ``$or`` and ``$not`` stand around filters, and the others compare one field.
docs/search.md describes the language with examples, and decision 67 says why it is so.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chunkmill.domain.reasons import printable
from chunkmill.errors import InvalidInput

MAX_DEPTH = 50
"""How many objects and lists of a filter may stand inside one another. Postgres parses JSON with its stack."""
MAX_TERMS = 500
"""How many conditions a filter may have. All of them may be evaluated for every chunk of a collection."""
MAX_VALUES = 10_000
"""How many values the lists of ``$in`` and ``$nin`` may have in all. Postgres hashes them, so that they cost little."""
MAX_BYTES = 1 << 20
"""The most bytes of a filter as JSON."""
MAX_INDEXED_VALUES = 100
"""A list of more values is not looked up in the index of the metadata, which would be read once for each of them."""
MAX_SHOWN_KEY = 60
"""How many characters of a key an error shows."""

_COMPARISONS = {"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}
_FIELD_OPERATORS = ("$eq", "$ne", *_COMPARISONS, "$in", "$nin", "$exists")
_FILTER_OPERATORS = ("$and", "$or", "$not")
_SIMPLE_KEY = re.compile(r"[\w$-]+")


@dataclass(frozen=True, slots=True)
class Filter:
    """A condition on a chunk's metadata, which :func:`parse` makes. It is false if there is nothing to filter."""

    _term: _Term | None = None

    def __bool__(self) -> bool:
        return self._term is not None

    def sql(self, column: str) -> tuple[str, dict[str, object]]:
        """A condition on the jsonb ``column``, such as ``c.metadata``, with its parameters ``f_0``, ``f_1`` and so on.

        The condition is true or false and never NULL, and it raises no error, whatever the metadata hold. Keys and
        values are parameters. What can be decided by containment is written so that an index of ``jsonb_path_ops``
        serves it. Without a filter the condition is ``true``.
        """
        if self._term is None:
            return "true", {}
        parameters = _Parameters()
        return self._term.sql(column, parameters), parameters.values


@dataclass(slots=True)
class _Parameters:
    values: dict[str, object] = field(default_factory=dict)

    def add(self, value: object) -> str:
        name = f"f_{len(self.values)}"
        self.values[name] = value
        return f":{name}"

    def value_at(self, column: str, path: Sequence[str]) -> str:
        """The value at ``path``, which goes through objects only: ``#>`` would also take "0" for a list's first."""
        return column + "".join(f" -> CAST({self.add(key)} AS text)" for key in path)


class _Term:
    """A node of the filter."""

    __slots__ = ()

    def sql(self, column: str, parameters: _Parameters) -> str:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class _Containment(_Term):
    value: str
    """JSON of an object."""

    def sql(self, column: str, parameters: _Parameters) -> str:
        return f"{column} @> CAST({parameters.add(self.value)} AS jsonb)"


@dataclass(frozen=True, slots=True)
class _Membership(_Term):
    path: tuple[str, ...]
    values: tuple[Any, ...]

    def sql(self, column: str, parameters: _Parameters) -> str:
        if not self.values:
            return "false"
        value = parameters.value_at(column, self.path)
        listed = parameters.add([_json(value) for value in self.values])
        is_one = f"COALESCE(({value}) = ANY(CAST({listed} AS jsonb[])), false)"
        if len(self.values) > MAX_INDEXED_VALUES:
            return is_one
        # It follows from the equality, and the index can answer it.
        containing = parameters.add([_json(_nested(self.path, value)) for value in self.values])
        return f"({column} @> ANY(CAST({containing} AS jsonb[])) AND {is_one})"


@dataclass(frozen=True, slots=True)
class _Comparison(_Term):
    path: tuple[str, ...]
    operator: str
    """``>``, ``>=``, ``<`` or ``<=``."""
    value: str | int | float

    def sql(self, column: str, parameters: _Parameters) -> str:
        value = parameters.value_at(column, self.path)
        # No value is cast to a number, because Postgres may evaluate the cast before it looks at the type.
        if isinstance(self.value, str):
            compared = f"({value} #>> '{{}}') COLLATE \"C\" {self.operator} CAST({parameters.add(self.value)} AS text)"
            return f"COALESCE(jsonb_typeof({value}) = 'string' AND {compared}, false)"
        compared = f"({value}) {self.operator} CAST({parameters.add(_json(self.value))} AS jsonb)"
        return f"COALESCE(jsonb_typeof({value}) = 'number' AND {compared}, false)"


@dataclass(frozen=True, slots=True)
class _Existence(_Term):
    path: tuple[str, ...]

    def sql(self, column: str, parameters: _Parameters) -> str:
        return f"({parameters.value_at(column, self.path)}) IS NOT NULL"


@dataclass(frozen=True, slots=True)
class _Negation(_Term):
    term: _Term

    def sql(self, column: str, parameters: _Parameters) -> str:
        return f"NOT ({self.term.sql(column, parameters)})"


@dataclass(frozen=True, slots=True)
class _All(_Term):
    """True if all terms are. There may be none."""

    terms: tuple[_Term, ...]

    def sql(self, column: str, parameters: _Parameters) -> str:
        return " AND ".join(f"({term.sql(column, parameters)})" for term in self.terms) or "true"


@dataclass(frozen=True, slots=True)
class _Any(_Term):
    terms: tuple[_Term, ...]

    def sql(self, column: str, parameters: _Parameters) -> str:
        # In brackets, because the condition stands behind an AND.
        return "(" + " OR ".join(f"({term.sql(column, parameters)})" for term in self.terms) + ")"


def named_filter(
    given: Mapping[str, Any] | None, metadata: Mapping[str, Any] | None
) -> tuple[Mapping[str, Any] | None, str]:
    """The filter of a search and the name under which it was given: ``filter``, or ``metadata`` as it was called first.

    Raises :class:`InvalidInput` if both were given.
    """
    if metadata is None:
        return given, "filter"
    if given is not None:
        raise InvalidInput("filter and metadata are two names of one argument; give filter alone.")
    return metadata, "metadata"


def parse(given: Mapping[str, Any] | None, argument: str = "metadata") -> Filter:
    """The filter that ``given`` means; None and ``{}`` filter nothing.

    Raises :class:`InvalidInput`, which says what is wrong and where in the filter. ``argument`` is its name in the
    message.
    """
    if given is None:
        return Filter()
    if not isinstance(given, Mapping):
        raise InvalidInput(f"{argument} is of type {type(given).__name__}; it must be a dict.")
    parser = _Parser(argument)
    plain = parser.plain(given, ())
    if (size := len(_json(plain).encode())) > MAX_BYTES:
        raise InvalidInput(f"{argument} has {size:,} bytes as JSON; the limit is {MAX_BYTES:,}.")
    return Filter(parser.filter(plain, ())) if plain else Filter()


class _Parser:
    """It counts what the filter has, and knows the name of the argument for its errors."""

    def __init__(self, argument: str) -> None:
        self._argument = argument
        self._terms = 0
        self._values = 0

    def plain(self, given: object, where: tuple[str | int, ...]) -> Any:
        """A copy of what was given as json.loads would make it, if jsonb can hold it."""
        if len(where) > MAX_DEPTH:
            raise self._refusal(
                where[:3], f"it is nested more than {MAX_DEPTH} levels deep", "make the filter flatter."
            )
        if given is None or isinstance(given, bool):
            return given
        if isinstance(given, str):
            return self._text(given, where)
        if isinstance(given, int):
            try:
                return int(json.dumps(given))
            except ValueError:
                raise self._refusal(where, "the number has too many digits", "give a smaller one.") from None
        if isinstance(given, float):
            if not math.isfinite(given):
                raise self._refusal(where, "it is NaN or infinite", "give a finite number, because JSON has no other.")
            return float(given)
        if isinstance(given, list | tuple):
            return [self.plain(item, (*where, i)) for i, item in enumerate(given)]
        if isinstance(given, Mapping):
            copy = {}
            for key, value in given.items():
                if not isinstance(key, str):
                    raise self._refusal(where, f"a key is of type {type(key).__name__}", "give a string.")
                copy[self._text(key, where)] = self.plain(value, (*where, key))
            return copy
        raise self._refusal(
            where, f"it is of type {type(given).__name__}", "give what JSON has: a number, a string, true, false, "
            "null, a list or an object.",
        )  # fmt: skip

    def filter(self, given: dict[str, Any], where: tuple[str | int, ...]) -> _Term:
        """The term of a whole filter: all of its keys are required."""
        terms: list[_Term] = []
        fields = {}
        for key, value in given.items():
            if key in _FILTER_OPERATORS:
                terms.append(self._around(key, value, (*where, key)))
            else:
                fields[key] = value
        contained, compared = self._fields(fields, (), where)
        if contained:
            terms.insert(0, self._counted(_Containment(_json(contained)), where))
        terms += compared
        return terms[0] if len(terms) == 1 else _All(tuple(terms))

    def _around(self, operator: str, value: Any, where: tuple[str | int, ...]) -> _Term:
        if operator == "$not":
            if not isinstance(value, dict):
                raise self._refusal(where, f"it is {_kind(value)}", "give a filter, which is an object.")
            return self._counted(_Negation(self.filter(value, where)), where)
        if not isinstance(value, list) or not value:
            raise self._refusal(where, f"it is {_kind(value)}", "give a list with one filter or more.")
        terms = []
        for i, item in enumerate(value):
            if not isinstance(item, dict):
                raise self._refusal((*where, i), f"it is {_kind(item)}", "give a filter, which is an object.")
            terms.append(self.filter(item, (*where, i)))
        return self._counted((_All if operator == "$and" else _Any)(tuple(terms)), where)

    def _fields(
        self, given: dict[str, Any], path: tuple[str, ...], where: tuple[str | int, ...]
    ) -> tuple[dict[str, Any], list[_Term]]:
        """What the metadata must contain at ``path``, and the other conditions on the fields there."""
        contained: dict[str, Any] = {}
        terms: list[_Term] = []
        for key, value in given.items():
            here = (*where, key)
            if _is_operator(key):
                raise self._refusal(here, *self._no_operator_here(key, path))
            inner = (*path, _name(key))
            if not isinstance(value, dict) or not value:
                contained[_name(key)] = self._literal(value, here)
            elif operators := [name for name in value if _is_operator(name)]:
                if len(operators) < len(value):
                    raise self._refusal(
                        here,
                        f"{operators[0]} stands beside a plain key",
                        "give either operators or the keys of a nested object. A key that begins with $ is written $$.",
                    )
                for operator, operand in value.items():
                    terms.append(self._counted(self._on_field(operator, operand, inner, (*here, operator)), here))
            else:
                nested, more = self._fields(value, inner, here)
                terms += more
                if nested:
                    contained[_name(key)] = nested
        return contained, terms

    def _on_field(self, operator: str, operand: Any, path: tuple[str, ...], where: tuple[str | int, ...]) -> _Term:
        if operator in ("$eq", "$ne"):
            equal = _Membership(path, (operand,))
            return equal if operator == "$eq" else _Negation(equal)
        if operator in ("$in", "$nin"):
            if not isinstance(operand, list):
                raise self._refusal(where, f"it is {_kind(operand)}", "give a list of values.")
            self._values += len(operand)
            if self._values > MAX_VALUES:
                raise self._refusal(where, f"the lists have more than {MAX_VALUES:,} values in all", "give fewer.")
            one_of = _Membership(path, tuple(operand))
            return one_of if operator == "$in" else _Negation(one_of)
        if operator == "$exists":
            if not isinstance(operand, bool):
                raise self._refusal(where, f"it is {_kind(operand)}", "give true or false.")
            return _Existence(path) if operand else _Negation(_Existence(path))
        if operator in _COMPARISONS:
            if isinstance(operand, bool) or not isinstance(operand, int | float | str):
                raise self._refusal(where, f"it is {_kind(operand)}", "give a number or a string.")
            return _Comparison(path, _COMPARISONS[operator], operand)
        raise self._refusal(where, *self._no_operator_here(operator, path))

    def _no_operator_here(self, key: str, path: tuple[str, ...]) -> tuple[str, str]:
        literal = f"A key that begins with $ is written ${_shown(key)}."
        if key in _FILTER_OPERATORS:
            return f"{key} stands inside a field", f"write it around a filter: {{{key!r}: ...}}.".replace("'", '"')
        if key in _FIELD_OPERATORS:
            return f"{key} stands outside a field", f'write it below a field, as in {{"year": {{"{key}": ...}}}}.'
        known = ", ".join(_FIELD_OPERATORS if path else (*_FILTER_OPERATORS, *_FIELD_OPERATORS))
        return "there is no such operator", f"the operators are {known}. {literal}"

    def _literal(self, value: Any, where: tuple[str | int, ...]) -> Any:
        """A value for containment. A key in a list means itself, so an operator there would silently match nothing."""
        if isinstance(value, list):
            return [self._literal(item, (*where, i)) for i, item in enumerate(value)]
        if isinstance(value, dict):
            for key in value:
                if _is_operator(key):
                    raise self._refusal(
                        (*where, key),
                        "an operator cannot stand inside a list",
                        f"a key that begins with $ is written ${_shown(key)}.",
                    )
            return {_name(key): self._literal(item, (*where, key)) for key, item in value.items()}
        return value

    def _text(self, given: str, where: tuple[str | int, ...]) -> str:
        if "\x00" in given:
            raise self._refusal(where, "it contains a NUL character", "Postgres stores none, so delete it.")
        try:
            given.encode()
        except UnicodeEncodeError:
            raise self._refusal(where, "it contains a lone surrogate", "give valid Unicode.") from None
        return str.__str__(given)  # an enum of strings becomes its value

    def _counted(self, term: _Term, where: tuple[str | int, ...]) -> _Term:
        self._terms += 1
        if self._terms > MAX_TERMS:
            raise self._refusal(
                where, f"the filter has more than {MAX_TERMS} conditions", "use $in for many values of one field."
            )
        return term

    def _refusal(self, where: tuple[str | int, ...], problem: str, remedy: str) -> InvalidInput:
        """An error that names the place by its keys, and no value: a value may be secret."""
        steps = "".join(f"[{step}]" if isinstance(step, int) else f".{_shown(step)}" for step in where)
        place = f" at {steps.lstrip('.')}" if steps else ""
        return InvalidInput(f"{self._argument}{place}: {problem}; {remedy}")


def _is_operator(key: str) -> bool:
    return key.startswith("$") and not key.startswith("$$")


def _name(key: str) -> str:
    """The key of the metadata that a plain key means: ``$$x`` means ``$x``."""
    return key[1:] if key.startswith("$$") else key


def _nested(path: tuple[str, ...], value: Any) -> Any:
    for key in reversed(path):
        value = {key: value}
    return value


def _kind(value: object) -> str:
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    kinds = {dict: "an object", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")


def _shown(key: str) -> str:
    """A key as an error shows it: in quotes if it has a dot or odd characters, and never very long."""
    cut = key if len(key) <= MAX_SHOWN_KEY else key[:MAX_SHOWN_KEY] + "..."
    return cut if _SIMPLE_KEY.fullmatch(cut) and cut.isascii() else printable(json.dumps(cut))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
