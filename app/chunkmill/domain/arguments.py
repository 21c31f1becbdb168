"""Checks of arguments that several methods of the client share."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from pathlib import Path
from typing import Literal, TypeGuard, TypeVar

from chunkmill.domain.reasons import printable
from chunkmill.domain.states import Route
from chunkmill.errors import InvalidInput, UnknownRoute
from chunkmill.system.numbers import NDArray, np

Word = TypeVar("Word", bound=StrEnum)


def as_word(words: type[Word], given: Word | str, argument: str) -> Word:
    """The member of ``words`` that ``given`` names.

    Raises :class:`InvalidInput`, or :class:`UnknownRoute` for a route. The message names ``argument``.
    """
    try:
        return words(given)
    except ValueError:
        kind = UnknownRoute if words is Route else InvalidInput
        raise kind(f"{argument} is {_shown(given)}; it must be one of: {', '.join(map(str, words))}.") from None


def as_deadline(given: object, now: datetime) -> datetime:
    """The deadline that ``given`` means: a datetime with a time zone, or a timedelta or seconds from ``now`` on.

    Raises :class:`InvalidInput` if it is none of these, or is in the past.
    """
    if isinstance(given, datetime):
        if given.tzinfo is None:
            raise InvalidInput(
                f"deadline is {given.isoformat(sep=' ')} without a time zone; give it one, such as tzinfo=UTC."
            )
        deadline = given
    elif isinstance(given, timedelta | int | float) and not isinstance(given, bool):
        try:
            deadline = now + (given if isinstance(given, timedelta) else timedelta(seconds=given))
        except (OverflowError, ValueError):
            raise InvalidInput(f"deadline is {_shown(given)}; it must be a moment that a datetime can hold.") from None
    else:
        raise InvalidInput(
            f"deadline is {_shown(given)}; it must be a datetime with a time zone, a timedelta, or a number of seconds."
        )
    if deadline <= now:
        shown = deadline.isoformat(sep=" ", timespec="seconds")
        raise InvalidInput(f"deadline {shown} is in the past; give a later one.")
    return deadline


def require_name(argument: str, name: object) -> None:
    """Raise :class:`InvalidInput` unless ``name`` is a text of 1 to 200 characters that Postgres can store."""
    if not isinstance(name, str) or not name.strip() or "\x00" in name or len(name) > 200:
        raise InvalidInput(f"{argument} is {_shown(name)}; it must be a text of 1 to 200 characters without NUL.")
    as_text(argument, name)


LARGEST = 2**63 - 1
"""The largest whole number of Postgres' bigint."""


def as_number(argument: str, given: object, *, least: int = -LARGEST - 1, most: int = LARGEST) -> int:
    """A whole number from ``least`` to ``most``. Raises :class:`InvalidInput`, which names ``argument``."""
    if not _is_number(given) or not isinstance(given, int | numbers.Integral):
        raise InvalidInput(f"{argument} is {_shown(given)}; it must be a whole number.")
    number = int(given)
    if not least <= number <= most:
        bound = f"at least {least}" if number < least else f"at most {most}"
        raise InvalidInput(f"{argument} is {_shown(given)}; it must be {bound}.")
    return number


def _is_number(given: object) -> TypeGuard[float]:
    """Whether it is a number, of Python or of NumPy, which registers its own. A bool is not."""
    return isinstance(given, numbers.Real) and not isinstance(given, bool)


def as_on_invalid(given: object) -> Literal["raise", "skip"]:
    """What to do with a bad chunk. Raises :class:`InvalidInput`."""
    if isinstance(given, str) and given in ("raise", "skip"):
        return "raise" if given == "raise" else "skip"
    raise InvalidInput("on_invalid must be 'raise' or 'skip'.")


def as_most_refused(given: object, *, skips: bool) -> int | float | None:
    """How many chunks of an enqueue may be refused: a whole number, or a share from 0 up to 1 as a float; None if it
    does not matter. Raises :class:`InvalidInput`, also if bad chunks are not skipped.
    """
    if given is None:
        return None
    if not skips:
        raise InvalidInput("max_refused needs on_invalid='skip'; otherwise the first bad chunk is an error.")
    if not isinstance(given, int | numbers.Integral) and _is_number(given):
        if not 0 <= given < 1:
            raise InvalidInput(
                f"max_refused is {_shown(given)}; as a float it must be a share from 0.0 up to, but not 1.0."
            )
        return float(given)
    return as_number("max_refused", given, least=0)


def as_usd(argument: str, given: object) -> Decimal:
    """An amount of US dollars that is not 0, exactly as it is given. Raises :class:`InvalidInput`.

    A float is refused, because 0.1 is not a tenth.
    """
    if isinstance(given, bool) or not isinstance(given, int | str | Decimal):
        raise InvalidInput(f"{argument} is {_shown(given)}; it must be a Decimal, or a text such as '-1.25'.")
    if isinstance(given, Decimal):
        given = str(given)  # as whoever typed it knows it
    try:
        usd = Decimal(given)
    except InvalidOperation:
        raise InvalidInput(f"{argument} is {_shown(given)}; it must be an amount such as -1.25.") from None
    if not usd.is_finite() or not usd or abs(usd) > MOST_USD or usd.as_tuple().exponent < -USD_DIGITS:  # type: ignore[operator]
        raise InvalidInput(
            f"{argument} is {_shown(given)}; it must be an amount other than 0, at most {MOST_USD:,}, with at most "
            f"{USD_DIGITS} places."
        )
    return usd


MOST_USD = 1_000_000_000
USD_DIGITS = 18


def as_seconds(argument: str, given: object) -> float:
    """A number of seconds that is not negative; it may be infinite. Raises :class:`InvalidInput`."""
    if not _is_number(given):
        raise InvalidInput(f"{argument} is {_shown(given)}; it must be a number of seconds.")
    try:
        seconds = float(given)
    except OverflowError:
        seconds = math.inf
    if not seconds >= 0:
        raise InvalidInput(f"{argument} is {seconds}; it must be a number of seconds that is not negative.")
    return seconds


def as_text(argument: str, given: object) -> str:
    """A text that Postgres can store, without NUL and lone surrogates. Raises :class:`InvalidInput`."""
    if not isinstance(given, str):
        raise InvalidInput(f"{argument} is of type {type(given).__name__}; it must be a str.")
    if "\x00" in given:
        raise InvalidInput(f"{argument} contains a NUL character, which Postgres cannot store; remove it.")
    try:
        given.encode()
    except UnicodeEncodeError:
        raise InvalidInput(f"{argument} contains a lone surrogate, which is not valid Unicode.") from None
    return given


def as_path(argument: str, given: object) -> Path:
    """The path of a file. Raises :class:`InvalidInput`."""
    if not isinstance(given, str | os.PathLike):
        raise InvalidInput(f"{argument} is of type {type(given).__name__}; it must be a path.")
    path = as_text(argument, os.fspath(given))
    if not Path(path).name:
        raise InvalidInput(f"{argument} is {_shown(path)}; it must name a file.")
    return Path(path)


Item = TypeVar("Item")


def as_items(argument: str, given: Iterable[Item]) -> Iterable[Item]:
    """Any iterable except a single text, whose letters are not meant. Raises :class:`InvalidInput`."""
    if isinstance(given, str | bytes):
        raise InvalidInput(f"{argument} is a {type(given).__name__}; give a list.")
    try:
        iter(given)
    except TypeError:
        raise InvalidInput(f"{argument} is of type {type(given).__name__}; give a list or another iterable.") from None
    return given


def as_hybrid(argument: str, given: object) -> bool | float | Literal["rrf"] | None:
    """A way to mix vectors and keywords: None, True, False, ``"rrf"`` or a weight. Raises :class:`InvalidInput`."""
    if given is None or isinstance(given, bool):
        return given
    if isinstance(given, str) and given == "rrf":
        return "rrf"
    if _is_number(given) and 0 <= given <= 1:
        return float(given)
    raise InvalidInput(f"{argument} is {_shown(given)}; it must be True, False, 'rrf' or a number from 0 to 1.")


def as_ids(argument: str, given: Iterable[str]) -> list[str]:
    """The chunk ids of any iterable except a single text. Raises :class:`InvalidInput`."""
    return [as_text(f"an id in {argument}", chunk_id) for chunk_id in as_items(argument, given)]


def as_flag(argument: str, given: object) -> bool:
    """Whether ``given`` is true. Raises :class:`InvalidInput` if it is neither, as an array is."""
    try:
        return bool(given)
    except ValueError:
        raise InvalidInput(f"{argument} is of type {type(given).__name__}; it must be True or False.") from None


def as_function(argument: str, given: Callable[..., object] | None) -> None:
    """Raise :class:`InvalidInput` unless ``given`` can be called, or is None."""
    if given is not None and not callable(given):
        raise InvalidInput(f"{argument} is of type {type(given).__name__}; it must be a function.")


def as_score(argument: str, given: object) -> float | None:
    """A cosine from -1 to 1, or None. Raises :class:`InvalidInput`, which names ``argument``."""
    if given is None:
        return None
    if not _is_number(given) or not -1 <= given <= 1:
        raise InvalidInput(f"{argument} is {_shown(given)}; it must be a cosine, a number from -1 to 1.")
    return float(given)


def as_session(given: object) -> str | None:
    """The name of whoever searches, or None. Raises :class:`InvalidInput`."""
    if given is not None:
        require_name("session", given)
    return given  # type: ignore[return-value]


def as_fallback(given: object) -> bool:
    """Whether a search that no worker serves may go to the previous space. Raises :class:`InvalidInput`."""
    if given is None:
        return False
    if isinstance(given, str) and given == "previous":
        return True
    raise InvalidInput(f"on_unserved is {_shown(given)}; it must be 'previous' or None.")


def as_queries(given: object) -> tuple[list[str] | NDArray[np.float64], bool]:
    """The queries as texts or as an array ``(n, d)``, and whether ``given`` is a single one.

    A text and a ``(d,)`` vector are single queries; a list of texts and an ``(n, d)`` array are several, and an empty
    list is none. Raises :class:`InvalidInput`.
    """
    if isinstance(given, str):
        return [as_text("query", given)], True
    if isinstance(given, list | tuple) and all(isinstance(text, str) for text in given):
        return [as_text(f"query[{i}]", text) for i, text in enumerate(given)], False
    try:
        vectors = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InvalidInput(
            f"query is of type {type(given).__name__}; it must be a text, a vector, a list of texts or an array of "
            "vectors."
        ) from None
    if vectors.ndim not in (1, 2):
        raise InvalidInput(
            f"query has shape {vectors.shape}; a vector has one dimension, and several vectors have two."
        )
    return np.atleast_2d(vectors), vectors.ndim == 1


def as_query_vector(given: object, dimensions: int) -> NDArray[np.float32]:
    """``(dimensions,)`` float32 of length 1 in the direction of ``given``: only the direction counts for the cosine.

    Raises :class:`InvalidInput`, also for a vector of zeros, which has no direction.
    """
    vector = np.asarray(given, dtype=np.float64)
    if vector.shape != (dimensions,) or not np.isfinite(vector).all():
        raise InvalidInput(
            f"the query vector has shape {vector.shape}; the collection takes a finite vector of shape ({dimensions},)."
        )
    largest = np.abs(vector).max()
    if largest == 0:
        raise InvalidInput("the query vector is zero, so no direction is nearer to it than another.")
    scaled = vector / largest  # else the squares of very large or small numbers are lost
    unit: NDArray[np.float32] = (scaled / np.linalg.norm(scaled)).astype(np.float32)
    return unit


def _shown(given: object) -> str:
    """The beginning of ``repr(given)``. It can be printed whatever it is."""
    try:
        return printable(repr(given))[:100]
    except ValueError:  # an int of more digits than Python writes
        return f"a {type(given).__name__}"
