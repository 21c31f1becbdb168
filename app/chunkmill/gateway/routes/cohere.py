"""``POST /v2/embed`` in the form of Cohere's API."""

from __future__ import annotations

import secrets
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from chunkmill.gateway.caller import Caller, Scope
from chunkmill.gateway.embedding import (
    KINDS,
    TRUNCATION_SIDES,
    EmbeddingCall,
    TruncationSide,
    dimensions_field,
    embed,
    read_asked,
    seconds_field,
)
from chunkmill.gateway.endpoint import Endpoint
from chunkmill.gateway.fields import given, invalid, word_field
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.inputs import MAX_INPUTS, read_texts
from chunkmill.gateway.rendering import base64_rows, float_rows, written
from chunkmill.gateway.routes.openai import read_model

TYPES = ("float", "base64")


async def embed_by_type(gateway: Gateway, request: Request, caller: Caller) -> Response:
    asked = await read_asked(request, read_body)
    answered = await embed(gateway, caller, asked)
    rest = {
        "id": secrets.token_hex(16),
        "response_type": "embeddings_by_type",
        "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": answered.tokens}},
    }
    kind = b"base64" if asked.base64 else b"float"
    return written(
        answered.vectors,
        base64_rows if asked.base64 else float_rows,
        base64=asked.base64,
        head=b'{"embeddings":{"%b":[' % kind,
        tail=b"]}," + orjson.dumps(rest)[1:],
        headers=answered.headers,
    )


def read_body(body: dict[str, Any]) -> EmbeddingCall:
    """What a body asks for. Raises :class:`Refusal`."""
    if given(body, "images")[1] is not None:
        raise invalid("images", "cannot be embedded here. Send texts.")
    texts, param = body.get("texts"), "texts"
    if texts is None and body.get("inputs") is not None:
        texts, param = _texts_of(body["inputs"]), "inputs"
    return EmbeddingCall(
        read_texts(texts, param),
        param,
        read_model(body),
        word_field(body, "input_type", meanings=KINDS) or "document",
        dimensions_field(body, "output_dimension"),
        word_field(body, "truncate", meanings=TRUNCATION_SIDES) or TruncationSide.END,
        seconds=seconds_field(body),
        base64=_is_base64(body),
    )


def _is_base64(body: dict[str, Any]) -> bool:
    types = given(body, "embedding_types")[1]
    if types is None or types == []:
        return False
    if not isinstance(types, list) or len(types) != 1 or types[0] not in TYPES:
        raise invalid("embedding_types", f"must be a list with one of: {', '.join(TYPES)}.")
    return bool(types[0] == "base64")


def _texts_of(inputs: Any) -> list[Any]:
    """The texts of Cohere's mixed inputs: ``[{"content": [{"type": "text", "text": "…"}]}]``."""
    if not isinstance(inputs, list):
        raise invalid("inputs", "must be a list.")
    texts = []
    for i, one in enumerate(inputs):
        content = one.get("content") if isinstance(one, dict) else None
        if not isinstance(content, list) or len(content) != 1 or not isinstance(content[0], dict):
            raise invalid(f"inputs[{i}]", "must have a content with one part of type text.")
        if content[0].get("type") != "text":
            raise invalid(f"inputs[{i}]", "is not a text, and only texts can be embedded here.")
        texts.append(content[0].get("text"))
    return texts


_VECTORS = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}
REQUEST = {
    "type": "object",
    "required": ["texts"],
    "properties": {
        "texts": {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": {"type": "string"}},
        "model": {"type": ["string", "null"]},
        "input_type": {"enum": [*KINDS, None]},
        "embedding_types": {"type": ["array", "null"], "maxItems": 1, "items": {"enum": list(TYPES)}},
        "output_dimension": {"type": ["integer", "null"], "minimum": 1},
        "truncate": {"type": ["string", "null"], "description": "NONE or END."},
    },
}
ANSWER = {
    "type": "object",
    "required": ["id", "embeddings", "meta"],
    "properties": {
        "id": {"type": "string"},
        "response_type": {"const": "embeddings_by_type"},
        "embeddings": {
            "type": "object",
            "properties": {"float": _VECTORS, "base64": {"type": "array", "items": {"type": "string"}}},
        },
        "meta": {"type": "object"},
    },
}

ENDPOINTS = [
    Endpoint("POST", "/v2/embed", embed_by_type, Scope.EMBED, "Vectors, as Cohere's clients ask.", REQUEST, ANSWER)
]
