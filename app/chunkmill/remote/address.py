"""Where a gateway is, and the key that it is asked with. Both are checked before anything is sent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from chunkmill.domain.hosts import is_loopback, read_http_hosts
from chunkmill.errors import InvalidSetting


class Key:
    """An API key, which no ``repr`` and no message shows."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Key(…)"


@dataclass(frozen=True, slots=True)
class Address:
    """``url`` has no path beyond that of a proxy's prefix, no user, no query and no slash at its end."""

    url: str
    is_https: bool


def read_key(name: str, given: object) -> Key:
    """The key. Raises :class:`InvalidSetting`, which names ``name`` and does not show the key."""
    if not isinstance(given, str) or not given.strip():
        raise InvalidSetting(f"{name} is missing. `chunkmill keys create NAME` makes one on the server.")
    key = given.strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InvalidSetting(f"{name} has a character that no key has, such as a blank or a line break inside.")
    return Key(key)


def read_address(name: str, given: object, http_hosts: Iterable[str] = ()) -> Address:
    """The address of a gateway. http is taken on loopback and for the hosts in ``http_hosts`` only.

    Raises :class:`InvalidSetting`, which names ``name``.
    """
    problem = (
        f"{name} must be a URL such as https://embed.example.com, with no user and no query; http is allowed only on "
        "loopback, and to hosts that http_hosts (CHUNKMILL_HTTP_HOSTS) names"
    )
    hosts = read_hosts(http_hosts)
    if not isinstance(given, str):
        raise InvalidSetting(f"{problem}.")
    url = given.strip()
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises if it is not a port
    except ValueError:
        raise InvalidSetting(f"{problem}.") from None
    host = (parts.hostname or "").lower()
    is_bare = not parts.query and "@" not in parts.netloc and "#" not in url and url.isprintable() and " " not in url
    if not host or not is_bare or parts.scheme not in ("http", "https"):
        raise InvalidSetting(f"{problem}.")
    if parts.scheme == "http" and not is_loopback(host) and host not in hosts:
        raise InvalidSetting(f"{problem}. Texts and the key would cross the network to {host} unencrypted.")
    return Address(urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", "")), parts.scheme == "https")


def read_hosts(given: object) -> frozenset[str]:
    """Names of single hosts that may have http. An address of the public internet is refused.

    Raises :class:`InvalidSetting`.
    """
    if isinstance(given, str):
        given = given.split(",")
    if not isinstance(given, Iterable):
        raise InvalidSetting(f"http_hosts is of type {type(given).__name__}; give the names of hosts in a list.")
    try:
        return read_http_hosts(given, example="gateway")
    except ValueError as error:
        raise InvalidSetting(f"http_hosts (CHUNKMILL_HTTP_HOSTS): {error}.") from None
