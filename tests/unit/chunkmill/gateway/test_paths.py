"""Names in paths: any name, and one meaning for each path."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from chunkmill.gateway.paths import RawRoute, path_to


async def nothing(_: Request) -> Response:
    return Response()


ROUTE = RawRoute("/v1/collections/{name}/search", nothing, methods=["POST"])


def named(raw: str) -> str | None:
    from urllib.parse import unquote

    scope = {"type": "http", "method": "POST", "path": unquote(raw), "raw_path": raw.encode(), "root_path": ""}
    match, child = ROUTE.matches(scope)
    return child["path_params"]["name"] if match is Match.FULL else None


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30))
def test_every_name_comes_back_from_its_path(name: str) -> None:
    assert named(path_to("/v1/collections/{name}/search", {"name": name})) == name


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("/v1/collections/a%2Fb/search", "a/b"),
        ("/v1/collections/a%252Fb/search", "a%2Fb"),
        ("/v1/collections/a/b/search", None),
        ("/v1/collections%2Fa/search", None),
        ("/v1/collections/x%2Fsearch/search", "x/search"),
        ("/v1/%63ollections/%61/search", "a"),
        ("/v1/collections/%zz/search", "%zz"),
    ],
)
def test_only_an_escaped_slash_is_part_of_a_name(raw: str, name: str | None) -> None:
    assert named(raw) == name
