"""Whether the gateway lives, whether it can answer, and what it serves."""

from __future__ import annotations

import importlib.metadata
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from chunkmill.gateway.caller import Caller, Scope
from chunkmill.gateway.endpoint import Endpoint
from chunkmill.gateway.errors import Refusal
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.inputs import MAX_INPUTS
from chunkmill.gateway.replies import Reply

BATCH_SIZE: Final = 256
"""How many texts a client may best send at a time, if it wants such a number."""


async def live(gateway: Gateway, request: Request, caller: Caller) -> Response:
    """The process answers. A supervisor restarts it if it does not."""
    return Reply({"status": "alive"})


async def ready(gateway: Gateway, request: Request, caller: Caller) -> Response:
    """Whether a balancer should send requests here: not if the gateway shuts down, or cannot reach Postgres.

    A gateway without a worker stays ready, because another one would have none either, and this one says so.
    """
    if gateway.is_leaving:
        raise Refusal(503, "draining", "this gateway is shutting down; another one answers.", retry_after=1.0)
    health = await gateway.health.look()
    if not health.has_store:
        raise Refusal(503, "store_unavailable", f"{health.problems[0]}.", retry_after=1.0)
    return Reply({"status": "ready"})


async def look(gateway: Gateway, request: Request, caller: Caller) -> Response:
    health = await gateway.health.look()
    described = {
        "status": health.status,
        "model": health.model,
        "device": health.device,
        "embedding_dimension": health.dimensions,
        "workers": health.workers,
        "queue": health.queue,
        "problems": health.problems,
    }
    return Reply(described, 200 if health.is_healthy_enough else 503)


async def info(gateway: Gateway, request: Request, caller: Caller) -> Response:
    model = await gateway.models.find(None, caller)
    health = await gateway.health.look()
    spec = model.spec
    return Reply(
        {
            "model_name": model.name,
            "embedding_dimension": spec.dimensions,
            "max_seq_length": spec.max_tokens,
            "device": health.device,
            "batch_size": BATCH_SIZE,
            "model_id": spec.model,
            "model_sha": spec.revision,
            "model_dtype": str(spec.precision),
            "model_type": {"embedding": {"pooling": str(spec.pooling)}},
            "max_client_batch_size": MAX_INPUTS,
            "max_input_length": spec.max_tokens,
            "auto_truncate": True,
            "version": importlib.metadata.version("chunkmill"),
            "fingerprint": spec.fingerprint,
        }
    )


_STATUS = {"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}}
HEALTH = {
    "type": "object",
    "required": ["status", "model", "device", "embedding_dimension", "workers", "queue", "problems"],
    "properties": {
        "status": {"enum": ["healthy", "degraded", "unhealthy"]},
        "model": {"type": "string"},
        "device": {"type": ["string", "null"]},
        "embedding_dimension": {"type": ["integer", "null"]},
        "workers": {"type": "integer", "description": "Workers that serve the model and have reported lately."},
        "queue": {"type": "integer", "description": "Requests that wait for vectors."},
        "problems": {"type": "array", "items": {"type": "string"}},
    },
}
INFO = {
    "type": "object",
    "properties": {
        "model_name": {"type": "string"},
        "embedding_dimension": {"type": "integer"},
        "max_seq_length": {"type": "integer"},
        "device": {"type": ["string", "null"]},
        "batch_size": {"type": "integer"},
        "model_id": {"type": "string"},
        "model_sha": {"type": "string"},
        "model_dtype": {"type": "string"},
        "model_type": {"type": "object"},
        "max_client_batch_size": {"type": "integer"},
        "max_input_length": {"type": "integer"},
        "auto_truncate": {"type": "boolean"},
        "version": {"type": "string"},
        "fingerprint": {"type": "string"},
    },
}

ENDPOINTS = [
    Endpoint("GET", "/live", live, None, "Whether the process answers.", None, _STATUS),
    Endpoint("GET", "/ready", ready, None, "Whether a balancer should send requests here.", None, _STATUS),
    Endpoint("GET", "/health", look, None, "Whether requests can be answered.", None, HEALTH),
    Endpoint("GET", "/info", info, Scope.EMBED, "The default model and the limits of requests.", None, INFO),
]
