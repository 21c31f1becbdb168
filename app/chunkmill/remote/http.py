"""HTTP as the clients speak it: what a server may make us do, wait for, and keep in memory.

No redirect is followed, no compressed answer is read, certificates are verified, and neither proxies nor passwords are
taken from the environment unless the caller asks for it.
"""

from __future__ import annotations

import functools
import ssl
from pathlib import Path
from typing import Any

from chunkmill.errors import InvalidInput, InvalidSetting, install_command
from chunkmill.openai.wire.redaction import clean
from chunkmill.remote.servers import Server
from chunkmill.remote.steps import OpenAnswer, Request, Unanswered
from chunkmill.system.certificates import require_certificate_folder
from chunkmill.telemetry import tracing

try:
    import httpx2
except ImportError:
    raise InvalidSetting(f"chunkmill.remote needs the package httpx2. Run: {install_command('remote')}") from None

CONNECT_SECONDS = 10.0
IN_FLIGHT = 8
"""How many requests of one call run side by side."""
CONNECTIONS = 100
KEEP_ALIVE_S = 4.0
"""How many seconds a connection without a request is kept: less than servers keep theirs (most do for 5 s or more)."""
LONGEST_ERROR = 64 * 1024
"""Bytes that are read of a refusal. The rest is left unread, because its beginning says why."""
LONGEST_IN_ADDRESS = 32_000
"""Characters of one parameter of an address. Servers take headers of 64 kB, and httpx2 no more in an address."""
PIECE_BYTES = 64 * 1024
_NOT_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.ProxyError)

TRANSPORT_ERRORS = (httpx2.HTTPError, httpx2.StreamError, OSError)


def context_of(verify: bool | str | Path | ssl.SSLContext, *, is_needed: bool) -> ssl.SSLContext:
    """What certificates are verified with. Raises :class:`InvalidSetting`.

    ``verify`` is True, a context, or the path of a file or folder with the certificates of a private CA, which then is
    the only one that is trusted.
    """
    if isinstance(verify, ssl.SSLContext):
        return verify
    if verify is True and not is_needed:
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # which trusts nobody
    if verify is True:
        try:
            return _default_context()
        except (OSError, ssl.SSLError) as error:
            raise InvalidSetting(
                f"the certificates of this machine cannot be read ({type(error).__name__}): check that the files of "
                "SSL_CERT_FILE and SSL_CERT_DIR exist."
            ) from None
    if not isinstance(verify, str | Path) or not str(verify).strip():
        raise InvalidSetting(
            "verify must be True, the path of a CA's certificates, or an ssl.SSLContext: certificates are always "
            "verified, because the key would be sent to whoever answers."
        )
    path = Path(verify)
    try:
        if path.is_dir():
            return ssl.create_default_context(capath=path)
        return ssl.create_default_context(cafile=path)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise InvalidSetting(
            f"verify names {str(path)!r}, whose certificates cannot be read: {type(error).__name__}."
        ) from None


@functools.cache
def _default_context() -> ssl.SSLContext:
    """Trusts what httpx2 trusts. Reading the certificates takes a tenth of a second, so it is done once."""
    require_certificate_folder()
    return httpx2.create_ssl_context()


def client_options(server: Server, verify: ssl.SSLContext, *, trust_env: bool) -> dict[str, Any]:
    """The arguments of ``httpx2.Client`` and of ``httpx2.AsyncClient``."""
    return {
        "base_url": server.address.url,
        "verify": verify,
        "follow_redirects": False,
        # A proxy would read what goes by http, with the key.
        "trust_env": trust_env and server.address.is_https,
        "headers": {
            "authorization": f"Bearer {server.key.reveal()}",
            "accept-encoding": "identity",
            "user-agent": "chunkmill-remote",
        },
        "limits": httpx2.Limits(
            max_connections=CONNECTIONS, max_keepalive_connections=IN_FLIGHT, keepalive_expiry=KEEP_ALIVE_S
        ),
    }


def request_options(request: Request) -> dict[str, Any]:
    """The arguments of ``build_request``, without its content.

    Raises :class:`InvalidInput` for a text that no address can hold.
    """
    for name, value in request.query.items():
        if len(value) > LONGEST_IN_ADDRESS:
            raise InvalidInput(
                f"{name} has {len(value):,} characters; it is sent in an address, which holds {LONGEST_IN_ADDRESS:,} "
                "at most."
            )
    seconds = max(0.001, request.seconds)
    # The spans of the gateway and of its workers are then below the span in which the caller asks, if there is one.
    trace = tracing.traceparent()
    return {
        "method": request.method,
        "url": request.path,
        "params": dict(request.query) or None,
        "headers": {**request.headers, **({} if trace is None else {"traceparent": trace})},
        "timeout": httpx2.Timeout(
            seconds, connect=min(seconds, CONNECT_SECONDS), read=min(seconds, request.silence or seconds)
        ),
    }


def names_of(response: httpx2.Response) -> dict[str, str]:
    return {name.lower(): value for name, value in response.headers.items()}


def most_bytes(response: httpx2.Response, request: Request) -> int:
    """How much of the body is read. Raises :class:`Unanswered` if none of it should be."""
    is_error = not 200 <= response.status_code < 300
    encodings = {word.strip().lower() for word in response.headers.get("content-encoding", "").split(",")}
    if odd := sorted(encodings - {"", "identity"}):
        if is_error:
            return 0
        raise Unanswered(
            f"compressed its answer ({clean(odd[0])[:20]}), and identity was asked for. Turn compression off on the "
            "server, or on the proxy in front of it.",
            for_good=True,
        )
    return min(LONGEST_ERROR, request.longest) if is_error else request.longest


class BodyBuffer:
    """The pieces of a body, up to a bound."""

    def __init__(self, status: int, most: int) -> None:
        self._is_error = not 200 <= status < 300
        self._most = most
        self._pieces: list[bytes] = []
        self._left = most

    def take(self, piece: bytes) -> bool:
        """Whether more is wanted. Raises :class:`Unanswered` if the body is too long."""
        if len(piece) > self._left:
            if not self._is_error:
                raise Unanswered(
                    f"sent more than {self._most:,} bytes, which no answer to this request needs.", for_good=True
                )
            self._pieces.append(piece[: self._left])
            return False
        self._left -= len(piece)
        self._pieces.append(piece)
        return True

    def body(self) -> bytes:
        return b"".join(self._pieces)


def unanswered(error: BaseException) -> Unanswered:
    """Why there was no answer, in words that quote nothing. The library's messages may quote addresses of proxies."""
    name = type(error).__name__
    if isinstance(error, httpx2.TimeoutException | TimeoutError):
        if isinstance(error, _NOT_SENT):
            return Unanswered("could not be reached in time.", was_sent=False, timed_out=True)
        return Unanswered("did not answer in time.", timed_out=True)
    if isinstance(error, _NOT_SENT):
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return Unanswered(
                    f"has a certificate that cannot be verified ({clean(cause.verify_message)[:100]}). If a private CA "
                    "signed it, give its certificate as verify=.",
                    was_sent=False,
                    for_good=True,
                )
            cause = cause.__cause__ or cause.__context__
        return Unanswered(f"could not be reached ({name}).", was_sent=False)
    return Unanswered(f"hung up before its answer was complete ({name}).")


def opened(response: httpx2.Response, pieces: Any) -> OpenAnswer:
    return OpenAnswer(response.status_code, names_of(response), (response, pieces))
