"""`gateway`."""

from __future__ import annotations

import ipaddress

import click

from chunkmill.broker import Broker
from chunkmill.cli.output import Screen, json_option
from chunkmill.cli.processes.processes import require_extra
from chunkmill.client import Client
from chunkmill.db.connect import create_db, require_migrated
from chunkmill.embedded.environment import Environment
from chunkmill.errors import InvalidInput
from chunkmill.telemetry.logging import configure


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="IP address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="TCP port to listen at.")
@json_option
@click.pass_obj
def gateway(screen: Screen, host: str, port: int) -> None:
    """Serve embeddings, searches, jobs and a Batch API over HTTP."""
    require_extra("gateway", "starlette", "the gateway")
    from chunkmill.gateway.gateway import Gateway
    from chunkmill.gateway.keys import OneKey
    from chunkmill.gateway.server import serve

    if not ipaddress.ip_address(host).is_loopback:
        raise InvalidInput(f"--host {host}: a gateway without keys listens at 127.0.0.1 or ::1 only.")
    settings = Environment.load().settings
    configure(settings.log_level, settings.log_format)
    db = create_db(settings.require_database_url(), role="client")
    require_migrated(db)
    key = OneKey()
    screen.hint(f"http://{host}:{port} takes this key until it ends: {key.key}")
    serve(
        Gateway.over(Client(db, Broker.connect(settings), settings), db, settings, key),
        host=host,
        port=port,
    )
