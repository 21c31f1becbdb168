"""`gateway`."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import click

from chunkmill.cli.late import (
    Broker,
    Client,
    Environment,
    MetricsServer,
    Process,
    Settings,
    create_db,
    keys,
    require_at_least,
    require_migrated,
    sa,
)
from chunkmill.cli.output import Screen, json_option
from chunkmill.cli.processes.processes import require_extra
from chunkmill.errors import InvalidInput
from chunkmill.telemetry import tracing
from chunkmill.telemetry.logging import configure
from chunkmill.telemetry.metrics import Role

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="IP address or name to listen at. For an address that other machines reach, a key must have been created.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="TCP port to listen at.")
@click.option("--tls-cert", type=FILE, help="Certificate in PEM form, the server's own first.")
@click.option("--tls-key", type=FILE, help="Key of the certificate in PEM form, without a password.")
@json_option
@click.pass_obj
def gateway(screen: Screen, host: str, port: int, tls_cert: Path | None, tls_key: Path | None) -> None:
    """Serve embeddings, searches, jobs and a Batch API over HTTP.

    Callers need a key, which `chunkmill keys create` makes. While there is none, a gateway on loopback makes one for
    itself and prints it once.
    """
    require_extra("gateway", "starlette", "the gateway")
    from chunkmill.gateway.addresses import listen
    from chunkmill.gateway.gateway import Gateway
    from chunkmill.gateway.keys import OneKey, StoredKeys
    from chunkmill.gateway.server import serve
    from chunkmill.gateway.tls import server_context

    if (tls_cert is None) != (tls_key is None):
        raise InvalidInput("--tls-cert and --tls-key belong together: give both, or neither.")
    tls = None if tls_cert is None or tls_key is None else server_context(tls_cert, tls_key)
    settings = Environment.load().settings
    db = create_db(settings.require_database_url(), role="gateway")
    listeners = None
    try:
        require_migrated(db)
        has_keys = _has_keys(db)
        listeners = listen(host, port)
        if not has_keys and not listeners.is_loopback:
            raise InvalidInput(
                f"--host {host} can be reached from other machines, and there is no key, so nobody may call this "
                "gateway. Create one: chunkmill keys create NAME. Or listen at 127.0.0.1."
            )
        configure(settings.log_level, settings.log_format)
        tracing.configure("chunkmill-gateway")
        own = None if has_keys else OneKey()
        url = f"{'https' if tls else 'http'}://{listeners.url_host}:{listeners.port}"
        # This is the only time that the key is shown, so it is printed with --json too, and not in the log.
        if screen.json:
            screen.line({"url": url, "key": None if own is None else own.key})
        elif own is not None:
            screen.hint(f"There is no valid key, so this one counts until the gateway ends: {own.key}")
            screen.hint(f"Open {url}/?key={own.key}")
        else:
            screen.hint(f"The gateway answers at {url}")
        if not listeners.is_loopback and tls is None and not settings.gateway_behind_tls:
            screen.hint(
                "WARNING: keys and texts travel unencrypted to this gateway. Give --tls-cert and --tls-key, or set "
                "GATEWAY_BEHIND_TLS=true if a proxy in front of it speaks TLS and nobody else reaches it."
            )
        with _metrics(settings):
            client = Client(db, Broker.connect(settings), settings)
            serve(Gateway.over(client, db, settings, StoredKeys(db, own)), listeners, tls)
    finally:
        if listeners is not None:
            listeners.close()
        db.dispose()


@contextlib.contextmanager
def _metrics(settings: Settings) -> Iterator[None]:
    """Serve the metrics of this gateway meanwhile, if METRICS_PORT is set."""
    process = Process(frozenset({Role.GATEWAY}), f"{socket.gethostname()}:{os.getpid()}", "gateway")
    server = MetricsServer.start(settings, process)
    try:
        yield
    finally:
        if server is not None:
            server.stop()


def _has_keys(db: sa.Engine) -> bool:
    with db.begin() as conn:
        require_at_least(conn, "0019")
        may = "SELECT has_table_privilege('api_keys', 'SELECT')"
        if not conn.execute(sa.text(may)).scalar_one():
            raise InvalidInput(
                "the login in DATABASE_URL may not read the keys that a gateway checks. Put it into the group "
                "chunkmill_gateways (deploy/postgres-role.sql)."
            )
        return keys.any_live(conn)
