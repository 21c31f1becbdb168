"""Where the embedded servers put their sockets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chunkmill.embedded.paths import socket_folder

ROOM = 103
"""Bytes for the path of a socket on macOS, which has less of it than Linux."""


@pytest.mark.parametrize("character", ["x", "é"])
def test_a_socket_stands_beside_its_server_as_long_as_its_path_has_room(character: str) -> None:
    around = len(os.fsencode("/" + "/redis.sock"))
    letters = (ROOM - around) // len(character.encode())
    fill = "y" * ((ROOM - around) % len(character.encode()))
    longest = Path("/" + character * letters + fill)
    assert len(os.fsencode(longest / "redis.sock")) == ROOM
    assert socket_folder(longest, "redis.sock") == longest
    too_long = longest.with_name(longest.name + "y")
    short = socket_folder(too_long, "redis.sock")
    assert short.parent == Path("/tmp")  # noqa: S108 - that folder
    assert short == socket_folder(too_long, "redis.sock")
    assert short != socket_folder(too_long.with_name(too_long.name + "y"), "redis.sock")


def test_a_comma_is_the_end_of_a_host_for_libpq() -> None:
    assert socket_folder(Path("/a,b"), "x").parent == Path("/tmp")  # noqa: S108 - that folder
