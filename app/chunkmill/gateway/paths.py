"""Paths as they were sent: a name in one may have a slash or a percent sign."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

from starlette.routing import Match, Route
from starlette.types import Scope


class RawRoute(Route):
    """A route that knows ``/`` from ``%2F``. Starlette matches the decoded path, in which both look alike.

    ``/v1/collections/a%2Fb/search`` is the search of ``a/b``, and the handler finds ``a/b`` in ``path_params``.
    """

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        raw = scope.get("raw_path")
        if raw is None or b"%" not in raw:
            return super().matches(scope)
        # The other characters are decoded, because "%61" and "a" are the same path.
        segments = (unquote(segment.decode("latin-1")) for segment in raw.split(b"?", 1)[0].split(b"/"))
        kept = "/".join(segment.replace("%", "%25").replace("/", "%2F") for segment in segments)
        match, child = super().matches({**scope, "path": kept})
        if "path_params" in child:
            child["path_params"] = {name: _whole(value) for name, value in child["path_params"].items()}
        return match, child


def _whole(value: Any) -> Any:
    return value.replace("%2F", "/").replace("%25", "%") if isinstance(value, str) else value


def path_to(template: str, names: Mapping[str, object]) -> str:
    """The path of an endpoint such as ``/v1/jobs/{id}``, with these names in it."""
    path = template
    for name, value in names.items():
        path = path.replace("{" + name + "}", quote(str(value), safe=""))
    return path
