"""Where clients put their key."""

from __future__ import annotations

from starlette.datastructures import Headers

from chunkmill.gateway.errors import Refusal


def key_in(headers: Headers) -> str:
    """The key of a request, in any of the headers that clients send it in. Raises :class:`Refusal` if there is none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    for name in ("api-key", "x-api-key"):
        if headers.get(name):
            return headers[name]
    raise Refusal(401, "invalid_api_key", "no API key was given. Send it as 'Authorization: Bearer KEY'.")
