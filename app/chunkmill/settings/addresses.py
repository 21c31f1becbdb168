"""The addresses of both servers, read once into one form that all libraries read alike.

SQLAlchemy, libpq, redis-py and kombu each split a URL in another way, and each quotes what it cannot read. So a URL is
split here, and what is left ambiguous is refused. No message quotes any part of a URL, because it may be a password.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

POSTGRES_SCHEMES = ("postgres", "postgresql", "postgresql+psycopg")
REDIS_SCHEMES = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss", "unix": "unix"}

POSTGRES_FORM = "it must be a URL such as postgresql://user:password@host:5432/chunkmill"
REDIS_FORM = "it must be a URL such as redis://host:6379/0, rediss://user:password@host:6379/0 or unix:///path?db=0"
ENCODE = "in the user and the password write / as %2F, ? as %3F, # as %23, @ as %40 and % as %25"
ONE_REDIS = "it must name one server, because Chunkmill supports neither Redis Sentinel nor Redis Cluster"

_CERTIFICATE = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}
_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_TLS = ("ssl_cert_reqs", "ssl_check_hostname", *_TLS_FILES)


@dataclass(frozen=True, slots=True)
class _Parts:
    scheme: str
    login: str
    """``user:password@`` with each reserved character percent-encoded, or empty."""
    hosts: tuple[tuple[str, int | None], ...]
    """Each host, an IPv6 address without its brackets, and its port."""
    path: str
    query: list[tuple[str, str]]


def one_line(text: str) -> str:
    """The text without blanks around it. Raises a ValueError that does not quote it if it cannot be part of a header
    or a URL: a blank, a line break, or a character outside ASCII, such as a pasted dash."""
    text = text.strip()
    if not all("!" <= character <= "~" for character in text):
        raise ValueError(
            "it contains a blank, a line break or a character outside ASCII; check that it was copied whole"
        )
    return text


def read_postgres_url(url: str) -> str:
    """The URL in the form that makes SQLAlchemy use psycopg 3. Several hosts become ``?host=h1,h2&port=5432,5433``,
    and so does the folder of a socket, which libpq takes for a host."""
    parts = _split(url, POSTGRES_FORM)
    if parts.scheme not in POSTGRES_SCHEMES:
        raise ValueError(POSTGRES_FORM)
    query = parts.query
    if query:
        _check_postgres_options([name for name, _ in query])
    if len(parts.hosts) > 1 or any(host.startswith("/") for host, _ in parts.hosts):
        hosts = ",".join(host for host, _ in parts.hosts)
        ports = ",".join(str(port or 5432) for _, port in parts.hosts)
        return _joined("postgresql+psycopg", parts.login, "", parts.path, [("host", hosts), ("port", ports), *query])
    return _joined("postgresql+psycopg", parts.login, _netloc(parts.hosts), parts.path, query)


def read_redis_url(url: str) -> str:
    """The URL with its database, login and TLS options in the one place where both redis-py and :func:`redis_tls` look.

    Timeouts and retries are not options, because the promises of workers and pollers rest on ours.
    """
    parts = _split(url, REDIS_FORM)
    if "sentinel" in parts.scheme or "cluster" in parts.scheme or len(parts.hosts) > 1:
        raise ValueError(ONE_REDIS)
    scheme = REDIS_SCHEMES.get(parts.scheme)
    is_socket = scheme == "unix"
    if scheme is None or is_socket == bool(parts.hosts) or any(host.startswith("/") for host, _ in parts.hosts):
        raise ValueError(REDIS_FORM)
    if is_socket and not parts.path:
        raise ValueError(REDIS_FORM)
    options = dict(parts.query)
    login = parts.login
    if "password" in options or "username" in options:
        login = _login(options.pop("username", ""), options.pop("password", None))
    database = options.pop("db", "") or ("" if is_socket else parts.path.strip("/")) or "0"
    if not (database.isascii() and database.isdigit()):
        raise ValueError(f"its database must be a number from 0 on; {ENCODE}")
    allowed = _TLS if scheme == "rediss" else ()
    if refused := sorted(options.keys() - set(allowed)):
        raise ValueError(
            f"{refused[0][:40]!r} is not an option of this address; "
            f"the options are db{''.join(f', {name}' for name in _TLS)}, those for TLS only with rediss://"
        )
    _tls(options)
    if is_socket:
        return _joined(scheme, login, "", parts.path, [("db", database)])
    return _joined(scheme, login, _netloc(parts.hosts), f"/{database}", list(options.items()))


def redis_tls(url: str) -> dict[str, Any]:
    """The keyword arguments of redis-py for the TLS of ``url``; empty without TLS.

    Both clients get them, because the defaults differ: kombu's is CERT_NONE, and that of redis-py before version 6 is
    to ignore the host name.
    """
    parts = urlsplit(url)
    return _tls(dict(parse_qsl(parts.query))) if parts.scheme == "rediss" else {}


def _tls(options: dict[str, str]) -> dict[str, Any]:
    certificate = options.get("ssl_cert_reqs", "required").lower().removeprefix("cert_")
    checked = options.get("ssl_check_hostname", "true").lower()
    if certificate not in _CERTIFICATE:
        raise ValueError("ssl_cert_reqs must be required, optional or none")
    if checked not in ("true", "false"):
        raise ValueError("ssl_check_hostname must be true or false")
    return {
        "ssl_cert_reqs": _CERTIFICATE[certificate],
        "ssl_check_hostname": checked == "true" and certificate != "none",
        **{name: options[name] for name in _TLS_FILES if name in options},
    }


def _split(url: str, form: str) -> _Parts:
    """The parts of ``scheme://user:password@host:port,host:port/path?name=value``.

    An ``@`` behind the hosts, or a ``#`` anywhere, means that a password ended the hosts too early.
    """
    scheme, separator, rest = url.strip().partition("://")
    if not separator or any(character.isspace() or not character.isprintable() for character in rest):
        raise ValueError(f"{form}, without blanks and line breaks")
    end = min((rest.find(character) for character in "/?" if character in rest), default=len(rest))
    authority, tail = rest[:end], rest[end:]
    if "#" in rest or "@" in tail:
        raise ValueError(f"{form}; {ENCODE}")
    login, at, netloc = authority.rpartition("@")
    path, _, query = tail.partition("?")
    try:
        options = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
        hosts = tuple(_host(host) for host in netloc.split(",")) if netloc else ()
    except ValueError:
        raise ValueError(f"{form}; {ENCODE}") from None
    user, colon, password = login.partition(":")
    return _Parts(
        scheme.lower(), _login(unquote(user), unquote(password) if colon else None) if at else "", hosts, path, options
    )


def _host(text: str) -> tuple[str, int | None]:
    if text.lower().startswith("%2f"):
        return unquote(text), None
    parts = urlsplit(f"//{text}")  # raises ValueError for half a bracket
    if not parts.hostname or parts.username is not None:
        raise ValueError
    return parts.hostname, parts.port  # raises ValueError if it is not a port


def _netloc(hosts: tuple[tuple[str, int | None], ...]) -> str:
    return ",".join((f"[{host}]" if ":" in host else host) + (f":{port}" if port else "") for host, port in hosts)


def _login(user: str, password: str | None) -> str:
    # Nothing is safe, because kombu takes a semicolon for the end of the URL.
    return quote(user, safe="") + ("" if password is None else f":{quote(password, safe='')}") + "@"


def _joined(scheme: str, login: str, netloc: str, path: str, query: list[tuple[str, str]]) -> str:
    return f"{scheme}://{login}{netloc}{path}" + (f"?{urlencode(query, quote_via=quote)}" if query else "")


def _check_postgres_options(names: list[str]) -> None:
    from psycopg import pq

    known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
    if unknown := sorted(set(names) - known):
        raise ValueError(f"{unknown[0][:40]!r} is not an option of a connection to Postgres; {ENCODE}")
