"""A request as the endpoints see it, and what they answer."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.openai_server.errors import bad


@dataclass
class Request:
    endpoint: str
    """Its name in ``routes.ROUTES``."""
    id: str
    """Of the file or the batch in the address, or empty."""
    query: dict[str, str]
    headers: dict[str, str]
    """Names in lower case."""
    body: Path
    """The bytes as they came, spooled."""
    number: str
    """Its ``x-request-id``."""

    def json(self) -> dict[str, Any]:
        try:
            read = json.loads(self.body.read_bytes())
        except ValueError:
            read = None
        if not isinstance(read, dict):
            raise bad("We could not parse the JSON body of your request.")
        return read

    def number_in_query(self, name: str, default: int, most: int) -> int:
        text = self.query.get(name, str(default))
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise bad(f"Invalid '{name}': must be an integer from 1 to {most}.", param=name)
        return int(text)


@dataclass
class Answer:
    body: dict[str, Any] | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    file: Path | None = None
    """In place of ``body``: streamed, ``length`` bytes announced."""
    length: int = 0
    cut_at: int | None = None
    """The connection is cut after so many bytes of the file."""


def page(items: list[dict[str, Any]], request: Request, default: int, most: int) -> Answer:
    """One page of a list that is in its order already."""
    limit = request.number_in_query("limit", default, most)
    after = request.query.get("after")
    if after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise bad(f"Invalid 'after': nothing here has the id '{after}'.", param="after")
        items = items[places[0] + 1 :]
    shown = items[:limit]
    return Answer(
        {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": len(items) > limit,
        }
    )


def expiry(anchor: Any, seconds: Any, param: str) -> int:
    """The seconds of an ``expires_after``, in OpenAI's bounds."""
    if anchor != "created_at":
        raise bad(f"Invalid '{param}.anchor': only 'created_at' is supported.", param=f"{param}.anchor")
    if type(seconds) is not int or not 3_600 <= seconds <= 2_592_000:
        raise bad(f"Invalid '{param}.seconds': must be from 3600 to 2592000.", param=f"{param}.seconds")
    return int(seconds)
