"""Embeddings and models in the form of OpenAI's API."""

from __future__ import annotations

from functools import partial
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from chunkmill.gateway.caller import Caller, Scope
from chunkmill.gateway.embedding import (
    KINDS,
    MAX_DIMENSIONS,
    MAX_SECONDS,
    EmbeddingAnswer,
    EmbeddingCall,
    TruncationSide,
    dimensions_field,
    embed,
    read_asked,
    seconds_field,
)
from chunkmill.gateway.endpoint import Endpoint
from chunkmill.gateway.fields import flag_field, given, invalid, text_field, word_field
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.inputs import MAX_INPUTS, TokenIds, read_input
from chunkmill.gateway.models import ServedModel
from chunkmill.gateway.rendering import base64_items, float_items, written
from chunkmill.gateway.replies import Reply


async def embeddings(gateway: Gateway, request: Request, caller: Caller) -> Response:
    asked = await read_asked(request, partial(read_body, token_ids=gateway.settings.gateway_token_ids))
    answered = await embed(gateway, caller, asked)
    return written(
        answered.vectors,
        base64_items if asked.base64 else float_items,
        base64=asked.base64,
        head=b'{"object":"list","data":[',
        tail=_tail(answered, return_tokens=asked.return_tokens),
        headers=answered.headers,
    )


def read_body(body: dict[str, Any], token_ids: TokenIds) -> EmbeddingCall:
    """What a body asks for. The words of Voyage and of vLLM are understood too. Raises :class:`Refusal`."""
    is_base64 = word_field(body, "encoding_format", meanings={"float": False, "base64": True})
    if (dtype := given(body, "output_dtype")[1]) is not None and dtype != "float":
        raise invalid("output_dtype", "must be float. For compact answers, set encoding_format to base64.")
    text_field(body, "user")
    if "input" not in body:
        raise invalid("input", "is missing.")
    return EmbeddingCall(
        read_input(body["input"], token_ids),
        "input",
        read_model(body),
        word_field(body, "kind", "input_type", meanings=KINDS) or "document",
        dimensions_field(body, "dimensions", "output_dimension"),
        TruncationSide.NOTHING if flag_field(body, "truncate", "truncation") is False else TruncationSide.END,
        flag_field(body, "normalize") is True,
        seconds_field(body),
        base64=is_base64 is True,
        return_tokens=flag_field(body, "return_tokens") is True,
    )


def read_model(body: dict[str, Any]) -> str | None:
    model = text_field(body, "model")
    if model == "":
        raise invalid("model", "is empty. GET /v1/models lists the models.")
    return model


def _tail(answered: EmbeddingAnswer, *, return_tokens: bool) -> bytes:
    usage = {"prompt_tokens": answered.tokens, "total_tokens": answered.tokens}
    rest: dict[str, object] = {"model": answered.model.name, "usage": usage}
    if answered.truncated:
        rest["truncated"] = answered.truncated
    if return_tokens:
        rest["tokens"] = answered.tokens_of_each.tolist()
    return b"]," + orjson.dumps(rest)[1:]


async def models(gateway: Gateway, request: Request, caller: Caller) -> Response:
    return Reply({"object": "list", "data": [_described(model) for model in await gateway.models.all(caller)]})


async def model(gateway: Gateway, request: Request, caller: Caller) -> Response:
    return Reply(_described(await gateway.models.find(request.path_params["model"], caller)))


def _described(model: ServedModel) -> dict[str, object]:
    described: dict[str, object] = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "chunkmill" if model.spec.provider == "local" else model.spec.provider,
        "dimensions": model.spec.dimensions,
        "max_tokens": model.spec.max_tokens,
        "fingerprint": model.spec.fingerprint,
    }
    return described | {"alias_of": model.target} if model.is_alias else described


_OPTIONAL_TEXT = {"type": ["string", "null"]}
_OPTIONAL_FLAG = {"type": ["boolean", "null"]}
_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
REQUEST = {
    "type": "object",
    "required": ["input"],
    "properties": {
        "input": {
            "description": "A text, a list of texts, or either of them as token ids of OpenAI's vocabulary cl100k.",
            "oneOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": {"type": "string"}},
                _IDS,
                {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": _IDS},
            ],
        },
        "model": _OPTIONAL_TEXT | {"description": "A name that GET /v1/models lists. The default is the first one."},
        "encoding_format": {"enum": ["float", "base64", None], "default": "float"},
        "dimensions": {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_DIMENSIONS},
        "user": _OPTIONAL_TEXT | {"description": "Ignored."},
        "input_type": {"enum": [*KINDS, None], "default": "document"},
        "truncate": _OPTIONAL_FLAG | {"description": "Whether long texts are cut, or refused. The default is true."},
        "normalize": _OPTIONAL_FLAG | {"description": "Whether vectors get length 1 also if the model's have another."},
        "return_tokens": _OPTIONAL_FLAG | {"description": "Whether the answer has `tokens`."},
        "timeout_ms": {"type": ["integer", "null"], "minimum": 1, "maximum": int(MAX_SECONDS * 1000)},
    },
}
"""The schema of a body. Fields that are not listed are ignored."""
ANSWER = {
    "type": "object",
    "required": ["object", "data", "model", "usage"],
    "properties": {
        "object": {"const": "list"},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["object", "index", "embedding"],
                "properties": {
                    "object": {"const": "embedding"},
                    "index": {"type": "integer"},
                    "embedding": {
                        "description": "The numbers, or their little-endian float32 as base64.",
                        "oneOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}],
                    },
                },
            },
        },
        "model": {"type": "string"},
        "usage": {
            "type": "object",
            "properties": {"prompt_tokens": {"type": "integer"}, "total_tokens": {"type": "integer"}},
        },
        "truncated": {
            "description": "The positions of the texts that were cut, if any was.",
            "type": "array",
            "items": {"type": "integer"},
        },
        "tokens": {
            "description": "How many tokens the model read of each text.",
            "type": "array",
            "items": {"type": "integer"},
        },
    },
}
MODEL = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by", "dimensions", "max_tokens", "fingerprint"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "dimensions": {"type": "integer"},
        "max_tokens": {"type": "integer"},
        "fingerprint": {"type": "string"},
        "alias_of": {"type": "string"},
    },
}
MODELS = {
    "type": "object",
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": MODEL}},
}

ENDPOINTS = [
    Endpoint("POST", "/v1/embeddings", embeddings, Scope.EMBED, "Vectors of texts.", REQUEST, ANSWER),
    Endpoint("POST", "/embeddings", embeddings, Scope.EMBED, "As /v1/embeddings.", REQUEST, ANSWER),
    Endpoint("GET", "/v1/models", models, Scope.EMBED, "The models that this key may use.", None, MODELS),
    Endpoint("GET", "/v1/models/{model:path}", model, Scope.EMBED, "One model.", None, MODEL),
]
