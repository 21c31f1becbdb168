"""Checks the fields of the models in ``OPENAI_MODELS``: strictly, and all of them before anything is refused. Pure."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from datetime import date
from decimal import Decimal
from typing import Any, Final

from chunkmill.domain.prices import Price

MAX_DIMENSIONS: Final = 16_000
"""The most dimensions that a column of pgvector holds."""
LEAST_TOKENS: Final = 16
"""The smallest ``max_tokens``, so that a truncated text is never empty: one character has only a few tokens."""
_ALWAYS: Final = date(1970, 1, 1)


class WrongModels(ValueError):
    """``names`` are the models that ``OPENAI_MODELS`` describes, rightly or not."""

    def __init__(self, message: str, names: frozenset[str] = frozenset()) -> None:
        self.names = names
        super().__init__(message)


def check_fields(fields: Mapping[str, object]) -> tuple[dict[str, Any], list[str]]:
    """``(values, problems)`` of one model: the values of the fields that are right, and what is wrong with the others.

    ``usd``, ``batch_usd`` and ``prices`` become one value, ``prices``. A field that is null counts as left out.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    values: dict[str, Any] = {}
    problems = []
    for name, value in given.items():
        check = _CHECKS.get(name)
        if check is None:
            problems.append(_unknown(name, _CHECKS))
            continue
        try:
            values[name] = check(value)
        except ValueError as error:
            problems.append(f"{name} {error}")
    usd, batch_usd = values.pop("usd", None), values.pop("batch_usd", None)
    if "prices" in given and {"usd", "batch_usd"} & given.keys():
        problems.append("prices stands beside usd or batch_usd; give either the list or the two numbers")
    elif "batch_usd" in given and "usd" not in given:
        problems.append("batch_usd is given without usd; give usd, the price of plain requests, too")
    elif usd is not None:
        values["prices"] = (_price(_ALWAYS, usd, batch_usd),)
    return values, problems


def _price(since: date, usd: Decimal, batch_usd: Decimal | None) -> Price:
    return Price(since, usd, usd / 2 if batch_usd is None else batch_usd)


def _unknown(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    advice = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(known)}"
    return f"{name[:40]!r} is not a field; {advice}"


def _is(value: object, must_be: str) -> ValueError:
    """What to raise for a value of the wrong kind. A text in its place probably has quotes too many."""
    quotes = ", without quotes" if isinstance(value, str) and "text" not in must_be else ""
    shown = "a list" if isinstance(value, list) else "an object" if isinstance(value, Mapping) else _short(value)
    return ValueError(f"is {shown}; it must be {must_be}{quotes}")


def _short(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _whole(least: int, most: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise _is(value, f"a whole number from {least:,} to {most:,}")
        return value

    return check


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise _is(value, "true or false")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise _is(value, "a text of one line")
    return value


def _word(*words: str) -> Callable[[object], str]:
    def check(value: object) -> str:
        if not isinstance(value, str) or value not in words:
            raise _is(value, f"one of the texts {', '.join(json.dumps(word) for word in words)}")
        return value

    return check


def _number(most: int) -> Callable[[object], Decimal]:
    def check(value: object) -> Decimal:
        number = Decimal(str(value)) if isinstance(value, int | float) and not isinstance(value, bool) else None
        if number is None or not number.is_finite() or not 0 <= number <= most:
            raise _is(value, f"a number from 0 to {most:,}")
        return number

    return check


def _day(value: object) -> date:
    if type(value) is date:  # as TOML has it
        return value
    try:
        if isinstance(value, str) and len(value) == len("2026-01-31"):
            return date.fromisoformat(value)
    except ValueError:
        pass
    raise _is(value, "a day as a text such as 2026-01-31")


_usd = _number(1_000_000)
_PRICE_CHECKS: Final[Mapping[str, Callable[[object], Any]]] = {"from": _day, "usd": _usd, "batch_usd": _usd}


def _prices(value: object) -> tuple[Price, ...]:
    """The prices of a list, each in force from its day on."""
    if not isinstance(value, list) or not value:
        raise _is(value, 'a list such as [{"from": "2026-01-31", "usd": 0.02, "batch_usd": 0.01}]')
    prices: dict[date, Price] = {}
    problems = []
    for number, item in enumerate(value, 1):
        try:
            price = _price_from(item)
        except ValueError as error:
            problems.append(f"entry {number} {error}")
            continue
        if price.since in prices:
            problems.append(f"entry {number} begins on {price.since}, as an entry before it does; keep one of the two")
        prices[price.since] = price
    if problems:
        raise ValueError(f"has {len(problems)} wrong: {', and '.join(problems)}")
    return tuple(prices[since] for since in sorted(prices))


def _price_from(item: object) -> Price:
    if not isinstance(item, Mapping):
        raise _is(item, "an object with from, usd and, if you like, batch_usd")
    if unknown := [name for name in item if name not in _PRICE_CHECKS]:
        raise ValueError(f"says {_unknown(str(unknown[0]), _PRICE_CHECKS)}")
    if missing := [name for name in ("from", "usd") if item.get(name) is None]:
        raise ValueError(f"does not say {missing[0]}")
    values = {}
    for name, given in item.items():
        if given is not None:
            try:
                values[name] = _PRICE_CHECKS[name](given)
            except ValueError as error:
                raise ValueError(f"says that {name} {error}") from None
    return _price(values["from"], values["usd"], values.get("batch_usd"))


_CHECKS: Final[Mapping[str, Callable[[object], Any]]] = {
    "dimensions": _whole(1, MAX_DIMENSIONS),
    "max_tokens": _whole(LEAST_TOKENS, 10_000_000),
    "can_cut": _truth,
    "tokenizer": _text,
    "same_as": _text,
    "usd": _usd,
    "batch_usd": _usd,
    "prices": _prices,
    "encoding": _word("base64", "float"),
    "request_inputs": _whole(1, 2_048),
    "request_bytes": _whole(10_000, 200_000_000),
    "tokens_factor": _number(1_000),
}
