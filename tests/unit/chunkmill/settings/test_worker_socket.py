"""Where a worker may listen for callers."""

from __future__ import annotations

import pytest

from chunkmill.errors import InvalidSetting
from chunkmill.settings import Settings


@pytest.mark.parametrize(
    "where", ["auto", "off", "unix:/run/chunkmill", "tcp:127.0.0.1:0", "tcp:127.9.8.7:8123", "tcp:[::1]:8123"]
)
def test_a_worker_listens_on_this_machine(where: str) -> None:
    assert Settings.from_env(worker_socket=where).worker_socket == where


@pytest.mark.parametrize(
    "where",
    ["on", "unix:", "unix:run", "tcp:0.0.0.0:1", "tcp:[::]:1", "tcp:10.0.0.1:1", "tcp:localhost:1", "tcp:127.0.0.1",
     "tcp:127.0.0.1:70000", "tcp:127.0.0.1:-1", "http://127.0.0.1:1"],
)  # fmt: skip
def test_a_worker_listens_nowhere_else(where: str) -> None:
    with pytest.raises(InvalidSetting, match="WORKER_SOCKET"):
        Settings.from_env(worker_socket=where)
