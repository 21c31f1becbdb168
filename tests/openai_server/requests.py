"""What one embeddings request must look like, the same for the plain endpoint and for a batch's lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.openai_server.config import Config
from tests.openai_server.errors import ApiError, bad
from tests.openai_server.tokens import TokenCounter, text_of

BODY_KEYS = {"model", "input", "dimensions", "encoding_format", "user"}


@dataclass(frozen=True)
class EmbeddingRequest:
    model: str
    texts: list[str]
    dimensions: int
    encoding_format: str


def read_request(body: Any, config: Config) -> EmbeddingRequest:
    """ApiError where OpenAI would refuse. Tokens are ``count_tokens``'s affair."""
    if not isinstance(body, dict):
        raise bad("The request's body must be a JSON object.")
    if unknown := sorted(set(body) - BODY_KEYS):
        raise bad(f"Unrecognized request argument supplied: {unknown[0]}", param=unknown[0])
    for name in ("model", "input"):
        if name not in body:
            raise bad(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    model = body["model"]
    if not isinstance(model, str) or model not in config.models:
        message = f"The model `{model}` does not exist or you do not have access to it."
        raise ApiError(404, message, code="model_not_found")
    encoding_format = body.get("encoding_format", "float")
    if encoding_format not in ("float", "base64"):
        raise bad(f"Invalid value: '{encoding_format}'. Supported values are: 'float' and 'base64'.", "encoding_format")
    if encoding_format == "base64" and not config.base64:
        raise bad("base64 encoding is not currently supported", "encoding_format")
    if not isinstance(body.get("user", ""), str):
        raise bad("Invalid type for 'user': expected a string.", param="user", code="invalid_type")
    return EmbeddingRequest(model, _texts(body["input"], config), _dimensions(body, model, config), encoding_format)


def _dimensions(body: dict[str, Any], model: str, config: Config) -> int:
    full = config.models[model]
    if "dimensions" not in body:
        return full
    if "ada" in model:
        raise bad("This model does not support specifying dimensions.", param="dimensions")
    wanted = body["dimensions"]
    if type(wanted) is not int or not 1 <= wanted <= full:
        raise bad(f"Invalid value for 'dimensions': {wanted}. It must be from 1 to {full}.", param="dimensions")
    return wanted


def _texts(given: Any, config: Config) -> list[str]:
    """Each of the four shapes as texts: a string, strings, token ids, arrays of token ids."""
    if isinstance(given, list) and given and all(type(token) is int for token in given):
        given = [given]
    inputs = [given] if isinstance(given, str) else given
    if not isinstance(inputs, list) or not inputs:
        raise bad("'$.input' is invalid. Please check the API reference.", param="input")
    if len(inputs) > config.max_inputs_per_request:
        raise bad(f"Invalid 'input': array too long. Maximum length {config.max_inputs_per_request}.", "input")
    return [_text(text, number) for number, text in enumerate(inputs)]


def _text(given: Any, number: int) -> str:
    param = f"input[{number}]"
    if isinstance(given, list) and given and all(type(token) is int for token in given):
        try:
            given = text_of(given)
        except ValueError:
            raise bad(f"Invalid '{param}': unknown token ids.", param=param) from None
    if not isinstance(given, str):
        raise bad(f"Invalid type for '{param}': expected a string or token ids.", param=param, code="invalid_type")
    if given == "":
        raise bad(f"Invalid '{param}': input cannot be an empty string.", param=param)
    try:
        given.encode()
    except UnicodeEncodeError:
        raise bad(f"Invalid '{param}': not valid Unicode.", param=param) from None
    return given


def count_tokens(request: EmbeddingRequest, config: Config, count: TokenCounter) -> int:
    """Of the whole request. ApiError: an input, or all of them together, have too many."""
    total = 0
    for number, text in enumerate(request.texts):
        tokens = count(text)
        if tokens > config.max_tokens_per_input:
            raise bad(
                f"This model's maximum context length is {config.max_tokens_per_input} tokens, however you requested "
                f"{tokens} tokens. Please reduce your prompt.",
                param=f"input[{number}]",
                code="context_length_exceeded",
            )
        total += tokens
    if total > config.max_tokens_per_request:
        raise bad(
            f"Requested {total} tokens, max {config.max_tokens_per_request} tokens per request",
            code="max_tokens_per_request",
        )
    return total


def reported_tokens(request: EmbeddingRequest, config: Config, tokens: int) -> int:
    """What the answer says of tokens."""
    return sum(map(len, request.texts)) if config.counts_characters else tokens
