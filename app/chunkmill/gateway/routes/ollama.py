"""``POST /api/embed``, and ``POST /api/embeddings`` of older clients, in the form of Ollama's API."""

from __future__ import annotations

import time
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from chunkmill.gateway.caller import Caller, Scope
from chunkmill.gateway.embedding import (
    EmbeddingCall,
    TruncationSide,
    dimensions_field,
    embed,
    read_asked,
    seconds_field,
)
from chunkmill.gateway.endpoint import Endpoint
from chunkmill.gateway.fields import flag_field, invalid
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.inputs import MAX_INPUTS, read_texts
from chunkmill.gateway.rendering import float_rows, written
from chunkmill.gateway.routes.openai import read_model


async def embed_input(gateway: Gateway, request: Request, caller: Caller) -> Response:
    began = time.perf_counter_ns()
    asked = await read_asked(request, read_body)
    answered = await embed(gateway, caller, asked)
    rest = {
        "model": answered.model.name,
        "total_duration": time.perf_counter_ns() - began,
        "load_duration": 0,
        "prompt_eval_count": answered.tokens,
    }
    return written(
        answered.vectors,
        float_rows,
        base64=False,
        head=b'{"embeddings":[',
        tail=b"]," + orjson.dumps(rest)[1:],
        headers=answered.headers,
    )


async def embed_prompt(gateway: Gateway, request: Request, caller: Caller) -> Response:
    asked = await read_asked(request, read_prompt)
    answered = await embed(gateway, caller, asked)
    return written(
        answered.vectors, float_rows, base64=False, head=b'{"embedding":', tail=b"}", headers=answered.headers
    )


def read_body(body: dict[str, Any]) -> EmbeddingCall:
    """What a body asks for. Raises :class:`Refusal`."""
    return EmbeddingCall(
        read_texts(body.get("input"), "input"),
        "input",
        read_model(body),
        dimensions=dimensions_field(body, "dimensions"),
        truncation=TruncationSide.NOTHING if flag_field(body, "truncate") is False else TruncationSide.END,
        to_unit_length=True,
        seconds=seconds_field(body),
    )


def read_prompt(body: dict[str, Any]) -> EmbeddingCall:
    """What a body with one ``prompt`` asks for. Raises :class:`Refusal`."""
    prompt = body.get("prompt")
    if not isinstance(prompt, str):
        raise invalid("prompt", "is missing." if prompt is None else "must be a string.")
    return EmbeddingCall(read_texts(prompt, "prompt"), "prompt", read_model(body))


REQUEST = {
    "type": "object",
    "required": ["input"],
    "properties": {
        "model": {"type": ["string", "null"]},
        "input": {
            "oneOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": {"type": "string"}},
            ]
        },
        "truncate": {"type": ["boolean", "null"], "default": True},
        "dimensions": {"type": ["integer", "null"], "minimum": 1},
    },
}
ANSWER = {
    "type": "object",
    "required": ["model", "embeddings", "prompt_eval_count"],
    "properties": {
        "model": {"type": "string"},
        "embeddings": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
        "total_duration": {"type": "integer", "description": "In nanoseconds."},
        "load_duration": {"type": "integer"},
        "prompt_eval_count": {"type": "integer"},
    },
}
PROMPT = {
    "type": "object",
    "required": ["prompt"],
    "properties": {"model": {"type": ["string", "null"]}, "prompt": {"type": "string"}},
}
EMBEDDING = {
    "type": "object",
    "required": ["embedding"],
    "properties": {"embedding": {"type": "array", "items": {"type": "number"}}},
}

ENDPOINTS = [
    Endpoint("POST", "/api/embed", embed_input, Scope.EMBED, "Vectors, as Ollama's clients ask.", REQUEST, ANSWER),
    Endpoint("POST", "/api/embeddings", embed_prompt, Scope.EMBED, "One vector, as before.", PROMPT, EMBEDDING),
]
