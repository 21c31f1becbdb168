"""``POST /embed`` and ``POST /`` in the two forms that clients of such services send: ``texts`` and ``inputs``.

``inputs`` is how the clients of text-embeddings-inference and of Hugging Face ask.
"""

from __future__ import annotations

import time
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from chunkmill.gateway.caller import Caller, Scope
from chunkmill.gateway.embedding import (
    KINDS,
    TRUNCATION_SIDES,
    EmbeddingAnswer,
    EmbeddingCall,
    TruncationSide,
    dimensions_field,
    embed,
    read_asked,
    seconds_field,
)
from chunkmill.gateway.endpoint import Endpoint
from chunkmill.gateway.fields import flag_field, invalid, word_field
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.inputs import MAX_INPUTS, read_texts
from chunkmill.gateway.rendering import base64_rows, float_rows, written
from chunkmill.gateway.routes.openai import read_model


async def embed_texts(gateway: Gateway, request: Request, caller: Caller) -> Response:
    began = time.perf_counter()
    asked = await read_asked(request, read_body)
    answered = await embed(gateway, caller, asked)
    if asked.param == "inputs":
        head, tail = b"[", b"]"
    else:
        head, tail = b'{"embeddings":[', _tail(answered, 1000 * (time.perf_counter() - began))
    return written(
        answered.vectors,
        base64_rows if asked.base64 else float_rows,
        base64=asked.base64,
        head=head,
        tail=tail,
        headers=answered.headers,
    )


def read_body(body: dict[str, Any]) -> EmbeddingCall:
    """What a body asks for. Raises :class:`Refusal`."""
    if ("texts" in body) == ("inputs" in body):
        problem = "and inputs are both given. Give one of them." if "texts" in body else "is missing."
        raise invalid("texts", problem)
    param = "texts" if "texts" in body else "inputs"
    normalize = flag_field(body, "normalize")
    side = word_field(body, "truncation_direction", meanings=TRUNCATION_SIDES) or TruncationSide.END
    return EmbeddingCall(
        read_texts(body[param], param),
        param,
        read_model(body),
        word_field(body, "kind", "input_type", "prompt_name", meanings=KINDS) or "document",
        dimensions_field(body, "dimensions"),
        TruncationSide.NOTHING if flag_field(body, "truncate") is False else side,
        normalize is not False,
        seconds_field(body),
        base64=word_field(body, "encoding_format", meanings={"float": False, "base64": True}) is True,
    )


def _tail(answered: EmbeddingAnswer, milliseconds: float) -> bytes:
    count, dimension = answered.vectors.shape
    rest = {
        "dimension": dimension,
        "model": answered.model.name,
        "count": count,
        "processing_time_ms": round(milliseconds, 3),
        "truncated": answered.truncated,
    }
    return b"]," + orjson.dumps(rest)[1:]


_TEXTS = {
    "oneOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": {"type": "string"}},
    ]
}
_OPTIONS = {
    "model": {"type": ["string", "null"]},
    "prompt_name": {"enum": [*KINDS, None]},
    "kind": {"enum": ["document", "query", None]},
    "dimensions": {"type": ["integer", "null"], "minimum": 1},
    "normalize": {"type": ["boolean", "null"], "default": True},
    "truncate": {"type": ["boolean", "null"], "default": True},
    "truncation_direction": {"type": ["string", "null"]},
    "encoding_format": {"enum": ["float", "base64", None]},
    "timeout_ms": {"type": ["integer", "null"], "minimum": 1},
}
_VECTORS = {
    "description": "The numbers of each vector, or their little-endian float32 as base64.",
    "type": "array",
    "items": {"oneOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}]},
}
REQUEST = {
    "oneOf": [
        {"type": "object", "required": ["texts"], "properties": {"texts": _TEXTS} | _OPTIONS},
        {"type": "object", "required": ["inputs"], "properties": {"inputs": _TEXTS} | _OPTIONS},
    ]
}
ANSWER = {
    "description": "An object for texts, and the vectors alone for inputs.",
    "oneOf": [
        {
            "type": "object",
            "required": ["embeddings", "dimension", "model", "count", "processing_time_ms", "truncated"],
            "properties": {
                "embeddings": _VECTORS,
                "dimension": {"type": "integer"},
                "model": {"type": "string"},
                "count": {"type": "integer"},
                "processing_time_ms": {"type": "number"},
                "truncated": {"type": "array", "items": {"type": "integer"}},
            },
        },
        _VECTORS,
    ],
}

ENDPOINTS = [
    Endpoint("POST", "/embed", embed_texts, Scope.EMBED, "Vectors of texts.", REQUEST, ANSWER),
    Endpoint("POST", "/", embed_texts, Scope.EMBED, "As /embed, for Hugging Face's clients.", REQUEST, ANSWER),
]
