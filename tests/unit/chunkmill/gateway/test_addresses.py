"""Where a gateway listens: the address decides, and not how it is written."""

from __future__ import annotations

import socket

import pytest

from chunkmill.errors import InvalidInput
from chunkmill.gateway.addresses import is_loopback, listen


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"])
def test_loopback(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "10.0.0.1", "::ffff:10.0.0.1", "fe80::1%lo", "128.0.0.1"])  # noqa: S104
def test_not_loopback(address: str) -> None:
    assert not is_loopback(address)


@pytest.mark.parametrize("host", ["0.0.0.0", "0", "::", "00.0.0.0", "*"])  # noqa: S104
def test_all_addresses_are_not_loopback_however_they_are_written(host: str) -> None:
    try:
        listeners = listen(host, 0)
    except InvalidInput:
        pytest.skip(f"this machine knows no {host}")
    listeners.close()
    assert not listeners.is_loopback


@pytest.mark.parametrize("host", ["localhost", "127.1", "::ffff:127.0.0.1"])
def test_a_name_of_loopback_is_loopback_and_all_its_addresses_have_one_port(host: str) -> None:
    try:
        listeners = listen(host, 0)
    except InvalidInput:
        pytest.skip(f"this machine knows no {host}")
    try:
        assert listeners.is_loopback
        assert {one.getsockname()[1] for one in listeners.sockets} == {listeners.port}
    finally:
        listeners.close()


def test_a_name_that_means_loopback_and_another_address_is_not_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]
    looked_up += [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: looked_up)
    listeners = listen("two.example", 0)
    if len(listeners.sockets) < 2:
        listeners.close()
        pytest.skip("this machine has no IPv6")
    listeners.close()
    assert not listeners.is_loopback


@pytest.mark.parametrize("host", ["", "no-such-host.invalid", "192.0.2.1", "a" * 300])
def test_what_is_no_address_of_this_machine_is_refused_by_its_name(host: str) -> None:
    with pytest.raises(InvalidInput, match="--host"):
        listen(host, 0)


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InvalidInput, match="in use"):
        listen("127.0.0.1", taken.getsockname()[1])
