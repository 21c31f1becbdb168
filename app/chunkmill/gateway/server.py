"""Runs a gateway: uvicorn, with the limits of the settings."""

from __future__ import annotations

import uvicorn

from chunkmill.gateway.app import build
from chunkmill.gateway.gateway import Gateway


def serve(gateway: Gateway, *, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT. What is under way then may end."""
    config = uvicorn.Config(
        build(gateway),
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=10,
        h11_max_incomplete_event_size=16 * 1024,
    )
    uvicorn.Server(config).run()
