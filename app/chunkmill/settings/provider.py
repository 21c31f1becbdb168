"""The settings of the paid routes: key, server, limits, intervals and budget."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import BaseSettings, NoDecode

from chunkmill.domain.providers import OPENAI_MODELS, ProviderModel, read_models
from chunkmill.settings.addresses import one_line

DEFAULT_BASE_URL = "https://api.openai.com/v1"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def _base_url(url: str) -> str:
    """The URL, if it is https or on loopback: a key must not cross a network unencrypted."""
    problem = "it must be a URL such as https://api.openai.com/v1; http is allowed only on loopback"
    url = one_line(url)
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises if it is not a port
    except ValueError:
        raise ValueError(problem) from None
    if not parts.hostname or "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(problem)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        raise ValueError(problem)
    return url.rstrip("/")


def _key(key: SecretStr) -> SecretStr:
    """The key without blanks around it, if it can be sent in a header."""
    text = one_line(key.get_secret_value())
    if not text:
        raise ValueError("it is empty")
    return SecretStr(text)


def _models(given: object) -> object:
    if not isinstance(given, str):
        return given
    try:
        parsed = json.loads(given)
    except (ValueError, RecursionError):
        raise ValueError("it must be a JSON object that maps model names to fields") from None
    if not isinstance(parsed, dict):
        raise ValueError("it must be a JSON object that maps model names to fields")  # noqa: TRY004 - pydantic expects it
    return read_models(parsed)


class ProviderSettings(BaseSettings):
    """Every limit and interval is a setting, because quotas differ. The defaults are what OpenAI documents."""

    embedding_provider: Literal["auto", "local", "openai"] = Field(
        "auto",
        description="Provider that serves models: `auto` decides by the model's name, `local` and `openai` take every "
        "name as theirs.",
    )
    openai_api_key: Annotated[SecretStr, AfterValidator(_key)] | None = Field(
        None, repr=False, description="Key for the paid routes. Only workers on queue `openai` need it."
    )
    openai_base_url: Annotated[str, AfterValidator(_base_url)] | None = Field(
        None, description="Address of a server that speaks OpenAI's API. If unset, it is OpenAI's own."
    )
    openai_batches: bool = Field(True, description="Whether the server has a Batch API. Azure has none for embeddings.")
    openai_models: Annotated[dict[str, ProviderModel] | None, NoDecode, BeforeValidator(_models)] = Field(
        None, description="Models besides OpenAI's, or other prices for OpenAI's, as a JSON object: docs/openai.md."
    )
    openai_batch_max_inputs: int = Field(
        50_000, ge=1, le=50_000, description="Maximum number of inputs in one ProviderBatch."
    )
    openai_batch_max_bytes: int = Field(
        200_000_000, ge=1_000_000, le=200_000_000, description="Maximum size in bytes of the file of one ProviderBatch."
    )
    openai_request_inputs: int = Field(
        128,
        ge=1,
        le=2048,
        description="Maximum number of inputs in one request. The provider refuses a whole request if one of its "
        "inputs is bad.",
    )
    openai_request_tokens: int = Field(
        300_000, ge=8192, le=300_000, description="Maximum number of tokens in one request."
    )
    openai_max_enqueued_tokens: int = Field(
        2_700_000,
        ge=10_000,
        description="Maximum number of tokens at the provider at a time. Set it to 90 % of what your account allows.",
    )
    openai_max_enqueued_requests: int = Field(
        900_000,
        ge=1,
        description="Maximum number of requests at the provider at a time. Set it to 90 % of what your account allows.",
    )
    openai_max_batches_per_hour: int = Field(
        1_800, ge=1, description="Maximum number of ProviderBatches that are created in an hour."
    )
    openai_gather_seconds: float = Field(
        10.0,
        ge=0,
        description="How many seconds to wait for more work before a partly filled ProviderBatch is submitted.",
    )
    openai_poll_seconds: float = Field(
        60.0, gt=0, description="Maximum number of seconds between two requests for the status of a ProviderBatch."
    )
    openai_adopt_seconds: float = Field(
        60.0,
        ge=0,
        description="How many seconds to search the provider's list for a ProviderBatch whose creation got no answer, "
        "before it is created again.",
    )
    openai_timeout_seconds: float = Field(
        120.0, gt=0, description="How many seconds to wait for an answer of the provider."
    )
    openai_sync_requests_per_minute: int = Field(
        0,
        ge=0,
        description="Maximum number of plain requests that all workers together send in a minute. With 0, Chunkmill "
        "sets no limit of its own.",
    )
    openai_sync_tokens_per_minute: int = Field(
        0,
        ge=0,
        description="Maximum number of tokens that all workers together send in plain requests in a minute. With 0, "
        "Chunkmill sets no limit of its own.",
    )
    openai_parallel_requests: int = Field(
        4, ge=1, le=64, description="Number of tasks that a worker on queue `openai` runs at a time."
    )
    openai_monthly_budget_usd: Decimal | None = Field(
        None,
        ge=0,
        description="Maximum number of US dollars that a calendar month (UTC) may cost. When it is reached, new paid "
        "work is held. If unset, there is no limit.",
    )
    openai_budget_warn_percent: int = Field(
        80, ge=1, le=100, description="Percentage of the budget at which a warning is given."
    )
    budget_webhook_url: Annotated[str, AfterValidator(_base_url)] | None = Field(
        None,
        repr=False,
        description="Address to which the budget's warnings are sent as POST requests. It may contain a secret.",
    )
    gpu_hour_usd: Decimal | None = Field(
        None,
        ge=0,
        description="Price in US dollars of one hour of a local worker's machine. It is used to compare the routes.",
    )

    @property
    def provider_models(self) -> dict[str, ProviderModel]:
        """OpenAI's models and those of ``OPENAI_MODELS``, by name."""
        return {**OPENAI_MODELS, **(self.openai_models or {})}
