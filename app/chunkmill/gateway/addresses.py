"""Where a gateway listens. The addresses decide whether it is on loopback, and not how somebody wrote them."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from chunkmill.errors import InvalidInput

BACKLOG = 2048
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass(frozen=True, slots=True)
class Listeners:
    """Sockets that listen. ``is_loopback`` is true if none of them can be reached from another machine."""

    sockets: Sequence[socket.socket]
    is_loopback: bool
    url_host: str
    port: int

    def close(self) -> None:
        for one in self.sockets:
            one.close()


def is_loopback(address: str) -> bool:
    """Whether an IP address is on loopback, also an IPv4 address that is written as IPv6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


def listen(host: str, port: int) -> Listeners:
    """Listen at every address that ``host`` means: an IP address, or a name such as ``localhost``.

    The name is looked up once, and what it meant then is what is listened at. With port 0 all get the port that the
    first one got. Raises :class:`InvalidInput`.
    """
    if not host:
        raise InvalidInput("--host is empty. Give an IP address; 0.0.0.0 means all addresses of IPv4.")
    try:
        looked_up = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a name"
        raise InvalidInput(f"--host {host}: {reason}. Give an IP address of this machine.") from None
    addresses = dict.fromkeys((family, str(address[0])) for family, _, _, _, address in looked_up)
    opened: list[socket.socket] = []
    problems: list[str] = []
    for family, address in addresses:
        try:
            one = _open(family, address, port)
        except OSError as error:
            problems.append(f"{address}: {error.strerror or error}")
            # localhost means ::1 too, also on machines without IPv6. A port that is taken is an error.
            continue
        opened.append(one)
        port = one.getsockname()[1]
    if not opened or any("in use" in problem for problem in problems):
        for one in opened:
            one.close()
        raise InvalidInput(
            f"cannot listen at --host {host} --port {port} ({'; '.join(problems)}). Give another address or port."
        )
    bound = [str(one.getsockname()[0]) for one in opened]
    shown = bound[0] if ":" not in bound[0] else f"[{bound[0]}]"
    return Listeners(opened, all(map(is_loopback, bound)), shown, port)


def _open(family: int, address: str, port: int) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # Or :: would be all addresses of IPv4 too, which nobody asked for.
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if _is_mapped(address) else 1)
        one.bind((address, port))
        one.listen(BACKLOG)
        one.setblocking(False)
    except OSError:
        one.close()
        raise
    return one


def _is_mapped(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    return isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None
