"""The body of a successful embeddings request, and what can be wrong with it."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np

from tests.openai_server.odd import NUMBERS, drawn
from tests.openai_server.requests import EmbeddingRequest
from tests.openai_server.vectors import Vector, encoded, vector_for

Faults = dict[str, dict[str, Any]]
"""Misbehaviours that strike here: kind to options."""


def embedding_body(request: EmbeddingRequest, tokens: int, faults: Faults) -> dict[str, Any] | str:
    """Right but for what ``faults`` does to it."""
    encoding_format = request.encoding_format
    if "other_encoding" in faults:
        encoding_format = "float" if encoding_format == "base64" else "base64"
    data: list[dict[str, Any]] = [
        {
            "object": "embedding",
            "index": index,
            "embedding": encoded(_vector(request, text, faults), encoding_format),
        }
        for index, text in enumerate(request.texts)
    ]
    if "missing_index" in faults:
        for item in data:
            del item["index"]
    if "odd_index" in faults:
        _number_oddly(data, faults["odd_index"]["how"])
    if "missing_item" in faults:
        data.pop()
    if "shuffled_data" in faults:
        random.Random(len(data)).shuffle(data)
    body: dict[str, Any] = {
        "object": "list",
        "data": data,
        "model": request.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    if "missing_usage" in faults:
        del body["usage"]
    if (wish := faults.get("odd_usage")) is not None:
        factor, first = wish["factor"], request.texts[0]
        said = int(tokens * factor) if factor is not None else drawn(wish["value"], NUMBERS, "usage", first)
        body["usage"] = {"prompt_tokens": said, "total_tokens": said}
    if "other_model" in faults:
        body["model"] = faults["other_model"]["name"]
    return json.dumps(body) if "string_body" in faults else body


def _number_oddly(data: list[dict[str, Any]], how: str) -> None:
    if how == "first":
        del data[0]["index"]
    elif how == "one":
        data[min(1, len(data) - 1)]["index"] = 0
    else:
        for item in data:
            item["index"] = 0


def _vector(request: EmbeddingRequest, text: str, faults: Faults) -> Vector:
    vector = vector_for(text, request.dimensions, request.model)
    if "zero_vector" in faults:
        vector = np.zeros_like(vector)
    if "not_finite" in faults:
        vector[0] = float(faults["not_finite"]["value"])
    if "wrong_dimensions" in faults:
        vector = np.resize(vector, faults["wrong_dimensions"]["dimensions"] or max(1, request.dimensions // 2))
    return vector
