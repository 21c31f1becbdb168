"""`chunkmill gateway` as a process: how it starts, who may call it, and how it ends."""

from __future__ import annotations

import json
import re
import signal
import socket
import ssl
from pathlib import Path
from unittest.mock import patch

import httpx2
import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result

from chunkmill.cli.__main__ import cli
from chunkmill.domain.keys import UNLIMITED, Scope
from chunkmill.ledger.access import keys
from chunkmill.settings import Settings
from tests.acceptance.conftest import Process, Processes
from tests.support.gateways import stand_in_worker
from tests.support.raw_http import connect, post, read_answer
from tests.support.tls import make_authority
from tests.support.waiting import PATIENCE, until

BODY = json.dumps({"texts": ["a b"]}).encode()


def a_key(db: sa.Engine, name: str = "mine") -> str:
    with db.begin() as conn:
        return keys.create(conn, name=name, tenant=name, scopes={Scope.EMBED}, limits=UNLIMITED)[1]


def started(process: Process) -> str:
    """The URL of a gateway that has started, with its key as notebooks have it if it made one."""
    pattern = re.compile(r"^(?:Open|The gateway answers at) (https?://\S+)$", re.MULTILINE)
    until(lambda: pattern.search(process.output()) or process.popen.poll() is not None, process.output)
    match = pattern.search(process.output())
    assert match, process.output()
    return match[1]


def refused(settings: Settings, *arguments: str) -> Result:
    """What a gateway says that must not serve. One that does fails at once, and not when nobody waits any more."""
    env = {"DATABASE_URL": settings.require_database_url(), "REDIS_URL": settings.require_redis_url()}
    with patch("chunkmill.gateway.server.serve", side_effect=AssertionError("it serves")):
        result = CliRunner().invoke(cli, ["gateway", "--port", "0", *arguments], env=env)
    assert result.exit_code == 1, result.output
    return result


def is_asked(db: sa.Engine) -> bool:
    with db.begin() as conn:
        return bool(conn.execute(sa.text("SELECT count(*) FROM embed_requests")).scalar_one())


def test_on_loopback_it_makes_a_key_prints_it_once_and_ends_in_order(processes: Processes, db: sa.Engine) -> None:
    process = processes.start("chunkmill.cli", "gateway", "--port", "0", GATEWAY_DRAIN_SECONDS=str(PATIENCE))
    url, _, key = started(process).partition("/?key=")
    assert key.startswith("cmk_")
    assert process.output().count(f": {key}") == 1
    with stand_in_worker(db) as worker, httpx2.Client(base_url=url, timeout=PATIENCE, trust_env=False) as http:
        assert http.post("/embed", content=BODY, headers={"content-type": "application/json"}).status_code == 401
        assert http.get("/ready").status_code == 200
        worker.may.clear()
        with connect(url) as under_way, connect(url) as open_before:
            under_way.sendall(post("/embed", key, BODY))
            until(lambda: is_asked(db))
            process.popen.send_signal(signal.SIGTERM)
            until(lambda: http.get("/ready").status_code == 503)
            open_before.sendall(post("/embed", key, BODY))
            late = read_answer(open_before)
            assert (late.status, late.json()["error"]["code"]) == (503, "draining")
            assert int(late.headers["retry-after"]) >= 1
            worker.may.set()
            assert read_answer(under_way).status == 200
    assert process.popen.wait(PATIENCE) == 0, process.output()
    assert process.output().count(key) == 2, "the key is shown beside its link, and nowhere else"
    with db.begin() as conn:
        assert not keys.any_live(conn), "it was kept in memory alone"


def test_with_keys_it_listens_at_all_addresses_with_tls_and_a_second_signal_ends_it_at_once(
    processes: Processes, db: sa.Engine, tmp_path: Path
) -> None:
    authority = make_authority(tmp_path)
    key = a_key(db)
    files = ["--tls-cert", str(tmp_path / "good.crt"), "--tls-key", str(tmp_path / "good.key")]
    listens = ("--host", "0.0.0.0", "--port", "0")  # noqa: S104
    process = processes.start("chunkmill.cli", "gateway", *listens, *files, GATEWAY_DRAIN_SECONDS=str(PATIENCE))
    url = started(process)
    assert url.startswith("https://")
    assert "key=" not in process.output()
    assert "WARNING" not in process.output()
    port = int(url.rpartition(":")[2])
    trusting = ssl.create_default_context(cafile=str(authority.ca))
    with (
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as plain,
        trusting.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        connection.sendall(post("/embed", key, BODY))
        until(lambda: is_asked(db))
        process.popen.send_signal(signal.SIGTERM)
        process.wait_for("1 requests are under way")
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(PATIENCE) == 128 + signal.SIGTERM


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "0"])  # noqa: S104
def test_without_keys_it_listens_at_no_address_that_others_reach(settings: Settings, host: str) -> None:
    result = refused(settings, "--host", host)
    if "cannot listen" not in result.stderr:  # a machine without IPv6
        assert "there is no key" in result.stderr
        assert "chunkmill keys create" in result.stderr


def test_a_key_that_was_revoked_or_has_expired_opens_no_address(settings: Settings, db: sa.Engine) -> None:
    with db.begin() as conn:
        for name in ("revoked", "expired"):
            keys.create(conn, name=name, tenant=name, scopes={Scope.EMBED}, limits=UNLIMITED)
        conn.execute(sa.text("UPDATE api_keys SET expires_at = now() WHERE name = 'expired'"))
        conn.execute(sa.text("UPDATE api_keys SET revoked_at = now() WHERE name = 'revoked'"))
    assert "there is no key" in refused(settings, "--host", "0.0.0.0").stderr  # noqa: S104


@pytest.mark.parametrize("options", [["--tls-cert", "a.crt"], ["--tls-key", "a.key"]])
def test_a_certificate_without_its_key_is_refused(settings: Settings, options: list[str]) -> None:
    assert "belong together" in refused(settings, *options).stderr
