"""Settings from the environment, frozen; built at the roots (CLI, worker, ``Client.from_env``) only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import NoDecode, SettingsConfigDict

from app.domain.spaces import Pooling, Precision
from app.domain.trust import Trust
from app.errors import InvalidSetting
from app.provider_settings import ProviderSettings


def _psycopg_url(url: str) -> str:
    """SQLAlchemy's form: any ``postgres://`` or ``postgresql://`` URL is driven by psycopg 3."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("postgres", "postgresql", "postgresql+psycopg"):
        raise ValueError("it must be a URL such as postgresql://user@host:5432/chunkmill")
    return f"postgresql+psycopg://{rest}"


def _redis_url(url: str) -> str:
    if url.partition("://")[0] not in ("redis", "rediss", "unix"):
        raise ValueError("it must be a URL such as redis://host:6379/0, rediss://… or unix:///path?db=0")
    return url


def _http_url(url: str) -> str:
    problem = "it must be a URL such as http://127.0.0.1:8080, of no more than host, port and path"
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises where it is none
    except ValueError:
        raise ValueError(problem) from None
    if parts.scheme != "http" or not parts.hostname or "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(problem)
    return url.rstrip("/")


def _precision(given: object) -> object:
    """The user's words; pydantic would list the values, which name a recipe."""
    try:
        return Precision(given)  # type: ignore[arg-type]
    except ValueError:
        raise ValueError(f"it must be one of: {', '.join(map(str, Precision))}") from None


def _lower(given: object) -> object:
    return given.lower() if isinstance(given, str) else given


_EVERYTHING = frozenset({"1", "all", "on", "true", "yes"})


def _names(given: object) -> object:
    """Model names between commas. A word that means "all of them" is refused: trust is given by name."""
    if not isinstance(given, str):
        return given
    names = frozenset(name.strip() for name in given.split(",")) - {""}
    if blanket := sorted(name for name in names if "*" in name or name.lower() in _EVERYTHING):
        raise ValueError(f"{blanket[0]!r} names no model: write each model's own name, with commas between")
    return names


ModelNames = Annotated[frozenset[str] | None, NoDecode, BeforeValidator(_names)]


class Settings(ProviderSettings):
    """Each field's upper-case name is its environment variable; the README's table is made from here."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    database_url: Annotated[str, AfterValidator(_psycopg_url)] | None = Field(
        None, repr=False, description="Postgres with pgvector. Unset, with REDIS_URL: the embedded stack."
    )
    redis_url: Annotated[str, AfterValidator(_redis_url)] | None = Field(
        None, repr=False, description="Redis or Valkey 6.2 or later; `rediss://` verifies certificates."
    )
    chunkmill_home: Path | None = Field(
        None, description="Folder of the embedded stack's data and of profiles. Default: the user's data directory."
    )
    embedding_model: str = Field(
        "all-MiniLM-L6-v2", description="The bundled model's name, a local folder, or `org/name@revision`."
    )
    embedding_pooling: Pooling | None = Field(
        None, description="Pooling of a plain transformers folder, which does not state its own."
    )
    embedding_dimensions: int | None = Field(
        None, ge=1, description="Cut EMBEDDING_MODEL's vectors to so many dimensions, where it was trained for that."
    )
    embedding_precision: Annotated[Precision, BeforeValidator(_precision)] = Field(
        Precision.FLOAT, description="`float`, or `int8`: faster on a CPU, less exact, and a space of its own."
    )
    embedding_matryoshka: ModelNames = Field(
        None, description="Models that you know were trained to be cut, where neither folder nor name says so."
    )
    embedding_trust_pickle: ModelNames = Field(
        None, description="Models whose weights may be read from a pickle (`pytorch_model.bin`). Names, with commas."
    )
    embedding_trust_remote_code: ModelNames = Field(
        None, description="Models whose own Python files may be run. Names, with commas."
    )
    embedding_device: str = Field("auto", description="`auto`, `cpu` or `cuda`.")
    embedding_dtype: str = Field(
        "auto", description="`auto`, `fp32`, `bf16` or `fp16`. Auto takes half precision where it is native."
    )
    embedding_backend: Literal["auto", "native", "transformers", "onnx", "openvino"] = Field(
        "auto",
        description="`native`, `transformers`, `onnx` or `openvino`. Auto: the profile's, else our own forward pass.",
    )
    embedding_batch_tokens: int = Field(
        0, ge=0, description="Token budget of one forward pass. 0: the profile's, else the device's measured default."
    )
    embedding_threads: int = Field(
        0,
        ge=0,
        description="Threads that compute on a CPU. 0: OMP_NUM_THREADS, else the profile's, else all physical cores.",
    )
    embedding_profile: str = Field(
        "auto", description="What `chunkmill tune` chose: `auto` for this machine's and model's, `off`, or a file."
    )
    embedding_parallel_batches: int = Field(
        2,
        ge=1,
        le=64,
        description="ChunkBatches a worker holds at a time: one computes, one reads or writes. Profiles may raise it.",
    )
    embedding_engines: int = Field(2, ge=1, description="Models one worker keeps loaded, when jobs name several.")
    embedding_share_gpu: bool = Field(
        False, description="Let several workers share one GPU instead of refusing the second."
    )
    vector_storage: str = Field(
        "vector",
        pattern="^(vector|halfvec)$",
        description="Column type of new spaces: `vector` or `halfvec`.",
    )
    chunk_batch_size: int = Field(
        512, ge=1, le=16384, description="Most contents in one ChunkBatch, the unit a worker leases."
    )
    enqueue_window: int = Field(5000, ge=1, le=100_000, description="Chunks that one enqueue transaction commits.")
    doorbell_window: int = Field(256, ge=1, description="Most doorbells in Redis at a time.")
    lease_seconds: float = Field(
        30.0,
        gt=0,
        description="A worker silent for this long loses its ChunkBatch. Renewed three times as often.",
    )
    step_deadline_seconds: float = Field(
        120.0,
        gt=0,
        description="A forward pass or a call of the tokenizer that takes longer hangs: the worker ends (70), for "
        "another to start.",
    )
    load_deadline_seconds: float = Field(
        1800.0, gt=0, description="The same for the load of a model that a job names, its download included."
    )
    stall_seconds: float = Field(
        120.0, gt=0, description="An idle worker that no doorbell reaches for so long, while some wait, ends (70)."
    )
    max_attempts: int = Field(5, ge=1, description="Attempts before a ChunkBatch is discarded.")
    poll_interval: float = Field(0.5, gt=0, description="Seconds between two rounds of the poller.")
    doorbell_repair_seconds: float = Field(
        10.0, gt=0, description="Age at which a doorbell that Redis does not hold counts as lost."
    )
    preemption_notice: Literal["auto", "gcp", "aws", "azure", "off"] = Field(
        "auto",
        description="Cloud that says when this machine is taken: `auto` (asks all), `gcp`, `aws`, `azure` or `off`.",
    )
    preemption_metadata_url: Annotated[str, AfterValidator(_http_url)] | None = Field(
        None, description="Address of the metadata service, where it is not http://169.254.169.254."
    )
    preemption_drain_on_rebalance: bool = Field(
        False, description="AWS: drain at a rebalance recommendation already, which often comes to nothing."
    )
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Workers and pollers serve /metrics here, or at the next free port; 0: none."
    )
    metrics_address: str = Field("127.0.0.1", description="Where they serve it. There is no password: no open network.")

    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = Field(
        "info", description="`debug`, `info`, `warning` or `error`. Celery's `--loglevel` goes before it."
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="`json`, `text`, or `auto`: text on a terminal, one JSON object a line elsewhere."
    )

    @property
    def trust(self) -> Trust:
        """What the operator vouches for, by model name."""
        nothing = frozenset[str]()
        return Trust(
            pickle=self.embedding_trust_pickle or nothing,
            remote_code=self.embedding_trust_remote_code or nothing,
            matryoshka=self.embedding_matryoshka or nothing,
        )

    @classmethod
    def from_env(cls, **overrides: Any) -> Settings:
        """Read the environment. Raises :class:`InvalidSetting` that names each wrong variable."""
        try:
            return cls(**overrides)
        except ValidationError as error:
            # pydantic's own message would print the value, which may hold a password.
            problems = "; ".join(f"{str(e['loc'][0]).upper()}: {e['msg']}" for e in error.errors())
            raise InvalidSetting(f"{problems}. Mend the environment; the README lists every setting.") from None

    def require_database_url(self) -> str:
        if self.database_url is None:
            raise InvalidSetting("DATABASE_URL is not set. Set it, or run `chunkmill up` for the embedded stack.")
        return self.database_url

    def require_redis_url(self) -> str:
        if self.redis_url is None:
            raise InvalidSetting("REDIS_URL is not set. Set it, or run `chunkmill up` for the embedded stack.")
        return self.redis_url
