"""Arguments of a request: of its query and of its JSON body."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from datetime import date, datetime
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from chunkmill.gateway.bodies import NotJson, exact_json, read_body
from chunkmill.gateway.errors import Refusal

LARGE_BYTES = 64 * 1024
"""A body of more bytes is parsed in a thread: 1 MiB takes some milliseconds."""
FLAGS = {"true": True, "1": True, "yes": True, "": True, "false": False, "0": False, "no": False}


class Query:
    """The query of a request. A parameter that the endpoint does not know is refused, because it may be a typing error
    in one that matters."""

    def __init__(self, request: Request, known: Collection[str]) -> None:
        self._given = request.query_params
        for name in self._given:
            if name not in known:
                wanted = ", ".join(sorted(known)) or "none"
                raise Refusal(
                    400,
                    "unknown_parameter",
                    f"there is no such query parameter. Known ones: {wanted}.",
                    param=name[:60],
                )

    def text(self, name: str) -> str | None:
        return self._given.get(name)

    def texts(self, name: str) -> list[str] | None:
        return self._given.getlist(name) if name in self._given else None

    def required(self, name: str) -> str:
        value = self._given.get(name)
        if not value:
            raise wrong(name, "it is required")
        return value

    def number(self, name: str, default: int | None = None, *, least: int = 0, most: int = 2**63 - 1) -> int | None:
        given = self._given.get(name)
        if given is None:
            return default
        try:
            number = int(given) if len(given) < 25 else most + 1
        except ValueError:
            raise wrong(name, "it must be a whole number") from None
        if not least <= number <= most:
            raise wrong(name, f"it must be a whole number from {least} to {most}")
        return number

    def flag(self, name: str, *, default: bool = False) -> bool:
        given = self._given.get(name)
        if given is None:
            return default
        if given.lower() not in FLAGS:
            raise wrong(name, "it must be true or false")
        return FLAGS[given.lower()]

    def object(self, name: str) -> dict[str, Any] | None:
        """A JSON object, such as a filter."""
        given = self._given.get(name)
        if given is None:
            return None
        try:
            return object_in(given.encode())
        except Refusal as refusal:
            raise wrong(name, f"it must be a JSON object: {refusal.message.removesuffix('.')}") from None

    def day(self, name: str) -> date | None:
        given = self._given.get(name)
        if given is None:
            return None
        try:
            return date.fromisoformat(given)
        except ValueError:
            raise wrong(name, "it must be a day such as 2026-01-31") from None

    def deadline(self, name: str) -> datetime | float | None:
        """A number of seconds from now, or a moment with its time zone."""
        given = self._given.get(name)
        if given is None:
            return None
        try:
            seconds = float(given)
        except ValueError:
            try:
                return datetime.fromisoformat(given)
            except ValueError:
                raise wrong(name, "it must be a number of seconds, or a moment such as 2026-01-31T12:00:00Z") from None
        if not math.isfinite(seconds):
            raise wrong(name, "it must be a number of seconds")
        return seconds


async def read_exact(request: Request, most: int) -> dict[str, Any]:
    """The body, a JSON object of at most ``most`` bytes. Whole numbers of any size stay exact."""
    body = await read_body(request, most)
    return await run_in_threadpool(object_in, body) if len(body) > LARGE_BYTES else object_in(body)


async def read_optional(request: Request, most: int, known: Collection[str]) -> dict[str, Any]:
    """The body, a JSON object with ``known`` fields alone; empty if there is none. The query must be empty."""
    Query(request, ())
    body = await read_body(request, most)
    fields = object_in(body) if body else {}
    require_known(fields, known)
    return fields


def object_in(body: bytes) -> dict[str, Any]:
    """The JSON object that the bytes are. Raises :class:`Refusal`, which does not quote them."""
    try:
        value = exact_json(body)
    except NotJson as error:
        raise Refusal(400, "invalid_json", f"the body cannot be read, because {error}.") from None
    if not isinstance(value, dict):
        raise Refusal(400, "invalid_json", "the body must be a JSON object.")
    return value


def require_known(body: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise :class:`Refusal` if the body has a field that the endpoint does not know."""
    for name in body:
        if name not in known:
            raise Refusal(
                400,
                "unknown_parameter",
                f"there is no such field. Known ones: {', '.join(sorted(known))}.",
                param=name[:60],
            )


def wrong(param: str, problem: str) -> Refusal:
    return Refusal(400, "invalid_input", f"{param}: {problem}.", param=param)
