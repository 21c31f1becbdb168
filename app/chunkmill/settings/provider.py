"""The settings of the paid routes: key, server, limits, intervals and budget."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, SecretStr, ValidationInfo
from pydantic_settings import BaseSettings, NoDecode

from chunkmill.domain.hosts import is_loopback, read_http_hosts
from chunkmill.domain.providers import OPENAI_MODELS, ProviderModel
from chunkmill.errors import InvalidSetting
from chunkmill.settings.addresses import one_line
from chunkmill.settings.models_file import described_models

DEFAULT_BASE_URL = "https://api.openai.com/v1"
_API_VERSION = re.compile(r"api-version=[\w.-]+", re.ASCII)


def _base_url(url: str) -> str:
    """The URL, if it is https or on loopback: a secret must not cross a network unencrypted."""
    return _checked_url(
        url, frozenset(), "it must be a URL such as https://example.com/hook; http is allowed only on loopback"
    )


def _provider_url(url: str, info: ValidationInfo) -> str:
    """The URL, if it is https, on loopback, or of a host in OPENAI_HTTP_HOSTS. Its query may be an api-version."""
    problem = (
        "it must be a URL such as https://api.openai.com/v1, with no query but ?api-version=; http is allowed only on "
        "loopback, and to the hosts that OPENAI_HTTP_HOSTS names"
    )
    # If the hosts themselves are wrong, they are missing here. That is said of OPENAI_HTTP_HOSTS and not of this URL.
    hosts = info.data["openai_http_hosts"] or frozenset() if "openai_http_hosts" in info.data else None
    return _checked_url(url, hosts, problem, query=_API_VERSION)


def _checked_url(
    url: str, http_hosts: frozenset[str] | None, problem: str, *, query: re.Pattern[str] | None = None
) -> str:
    """``http_hosts`` may have http; None if it is not known which hosts may."""
    url = one_line(url)
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises if it is not a port
    except ValueError:
        raise ValueError(problem) from None
    host = parts.hostname or ""
    is_safe = parts.scheme == "https" or is_loopback(host) or http_hosts is None or host in http_hosts
    if not host or "@" in parts.netloc or "#" in url or parts.scheme not in ("http", "https") or not is_safe:
        raise ValueError(problem)
    if parts.query and not (query and query.fullmatch(parts.query)):
        raise ValueError(problem)
    return urlunsplit((*parts[:2], parts.path.rstrip("/"), parts.query, ""))


def _http_hosts(given: object) -> object:
    """The host names in a list with commas. Only names of single hosts are taken, and no address of the internet."""
    if not isinstance(given, str):
        return given
    return read_http_hosts(given.split(","), example="tei")


def _key(key: SecretStr) -> SecretStr:
    """The key without blanks around it, if it can be sent in a header."""
    text = one_line(key.get_secret_value())
    if not text:
        raise ValueError("it is empty")
    return SecretStr(text)


def _models(given: object) -> object:
    return described_models(given) if isinstance(given, str) else given


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
    openai_http_hosts: Annotated[frozenset[str] | None, NoDecode, BeforeValidator(_http_hosts)] = Field(
        None,
        description="Names or IP addresses, separated by commas, of hosts on a private network to which "
        "OPENAI_BASE_URL may use http, such as `tei,10.0.0.7`. The key and the texts cross that network unencrypted.",
    )
    openai_base_url: Annotated[str, AfterValidator(_provider_url)] | None = Field(
        None,
        description="Address of a server that speaks OpenAI's API. If unset, it is OpenAI's own. An `?api-version=` of "
        "Azure's is sent with each request.",
    )
    openai_batches: bool = Field(True, description="Whether the server has a Batch API. Azure has none for embeddings.")
    openai_models: Annotated[dict[str, ProviderModel] | None, NoDecode, BeforeValidator(_models)] = Field(
        None,
        description="Models besides OpenAI's, or other prices for OpenAI's: a JSON object, or the path of a `.json` or "
        "`.toml` file. docs/openai.md has the fields.",
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
    openai_batch_hours: float = Field(
        48.0,
        ge=24,
        le=168,
        description="How many hours a ProviderBatch may take if the provider does not say when it expires. An hour "
        "later it is cancelled, and six hours after that it is given up.",
    )
    openai_timeout_seconds: float = Field(
        120.0,
        gt=0,
        description="How many seconds a whole request to the provider may take. A file gets one more for each 100 kB.",
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

    _provider_problem: str | None = PrivateAttr(None)
    _described: frozenset[str] = PrivateAttr(frozenset())

    @property
    def provider_problem(self) -> str | None:
        """What is wrong with the settings of the paid routes, which are off in this process then; None if nothing."""
        return self._provider_problem

    def require_provider(self) -> None:
        """Raise :class:`InvalidSetting` if the settings of the paid routes are wrong."""
        if self._provider_problem is not None:
            raise InvalidSetting(self._provider_problem)

    def may_be_described(self, name: str) -> bool:
        """Whether a model may be the provider's, if OPENAI_MODELS is wrong."""
        return name in OPENAI_MODELS or name in self._described
