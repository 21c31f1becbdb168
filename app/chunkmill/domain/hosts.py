"""Where a key may go over plain http: to this machine, and to single hosts that an operator names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import ip_address

_HOST = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", re.ASCII)
_EVERYTHING = frozenset({"1", "all", "any", "false", "no", "none", "off", "on", "true", "yes"})


def is_loopback(host: str) -> bool:
    """Whether it is ``localhost``, or an address in 127.0.0.0/8 or ::1, which no network carries. No name is looked
    up."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def read_http_hosts(given: Iterable[str], *, example: str) -> frozenset[str]:
    """The hosts that are named, in lower case. Only names of single hosts are taken, and no address of the internet.

    Raises ValueError, whose message has ``example`` as the name of a host.
    """
    hosts = frozenset(str(host).strip().lower().removeprefix("[").removesuffix("]") for host in given) - {""}
    for host in sorted(hosts):
        try:
            address = ip_address(host)
        except ValueError:
            if host in _EVERYTHING or not _HOST.fullmatch(host):
                raise ValueError(
                    "each entry must be the name or the IP address of one host, without http://, port and path, such "
                    f"as {example} or 10.0.0.7; there is no word for all hosts"
                ) from None
            continue
        if address.is_global or address.is_unspecified or address.is_multicast:
            raise ValueError(
                f"{host} is not the address of a host on a private network, so the key would cross the internet "
                "unencrypted: use https"
            )
    return hosts
