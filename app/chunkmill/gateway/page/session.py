"""Who looks at the page: the key is in a cookie that no script can read and no other site can send."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from chunkmill.gateway.bodies import read_body
from chunkmill.gateway.caller import Caller
from chunkmill.gateway.errors import Refusal
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.keys import key_in
from chunkmill.gateway.page.rendering import HEADERS

LONGEST_FORM = 1 << 16


async def caller_of(gateway: Gateway, request: Request) -> Caller | None:
    """Whose key the cookie has; None if there is none, or if it is no longer valid."""
    key = request.cookies.get(_cookie(request))
    return await gateway.keys.caller(key) if key else None


def key_of(request: Request) -> str:
    """The key that a request came with, in a header or in the cookie of the page."""
    return request.cookies.get(_cookie(request)) or key_in(request.headers)


def log_in(request: Request, key: str) -> Response:
    """Keep the key, which was looked at before, until the browser is closed."""
    response = to("/")
    response.set_cookie(
        _cookie(request), key, path="/", httponly=True, samesite="strict", secure=request.url.scheme == "https"
    )
    return response


def log_out(request: Request) -> Response:
    response = to("/")
    response.delete_cookie(
        _cookie(request), path="/", httponly=True, samesite="strict", secure=request.url.scheme == "https"
    )
    return response


def to(path: str) -> Response:
    """Show another page. A reload of that one sends no form again."""
    return RedirectResponse(path, 303, HEADERS)


async def form(request: Request) -> dict[str, str]:
    """The fields of a form of this page. Raises :class:`Refusal` if another site sent it."""
    require_same_origin(request)
    body = await read_body(request, LONGEST_FORM)
    try:
        fields = parse_qs(body.decode(), keep_blank_values=True, max_num_fields=20)
    except ValueError:
        raise Refusal(400, "invalid_input", "this form was not made by this page. Load the page again.") from None
    return {name: values[-1] for name, values in fields.items()}


def require_same_origin(request: Request) -> None:
    """Raise :class:`Refusal` unless a page of this gateway sent the form. The cookie is not sent by other sites either;
    but a sibling of this host, which may be another program on another port, counts as the same site."""
    origin = request.headers.get("origin")
    if origin is not None:
        is_own = urlsplit(origin).netloc == request.headers.get("host")
    else:
        is_own = request.headers.get("sec-fetch-site") == "same-origin"
    if not is_own:
        raise Refusal(403, "cross_origin", "only forms of this gateway's own page are accepted.")


def is_followed_from_elsewhere(request: Request) -> bool:
    """Whether another site led here, which may want to log somebody in with a key of its own."""
    return request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin")


def _cookie(request: Request) -> str:
    # Cookies are those of a host, and know no ports: two gateways on one host need two names.
    name = f"chunkmill-{request.url.port or 'key'}"
    return f"__Host-{name}" if request.url.scheme == "https" else name
