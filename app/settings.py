"""Settings from the environment, frozen; built at the roots (CLI, worker, ``Client.from_env``) only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.domain.spaces import Pooling
from app.errors import InvalidSetting


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


class Settings(BaseSettings):
    """Each field's upper-case name is its environment variable; the README's table is made from here."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    database_url: Annotated[str, AfterValidator(_psycopg_url)] | None = Field(
        None, repr=False, description="Postgres with pgvector. Unset, with REDIS_URL: the embedded stack."
    )
    redis_url: Annotated[str, AfterValidator(_redis_url)] | None = Field(
        None, repr=False, description="Redis or Valkey 6.2 or later; `rediss://` verifies certificates."
    )
    chunkmill_home: Path | None = Field(
        None, description="Data folder of the embedded stack. Default: the user's data directory."
    )
    embedding_model: str = Field(
        "all-MiniLM-L6-v2", description="The bundled model's name, a local folder, or `org/name@revision`."
    )
    embedding_pooling: Pooling | None = Field(
        None, description="Pooling of a plain transformers folder, which does not state its own."
    )
    embedding_device: str = Field("auto", description="`auto`, `cpu` or `cuda`.")
    embedding_dtype: str = Field(
        "auto", description="`auto`, `fp32`, `bf16` or `fp16`. Auto takes half precision where it is native."
    )
    embedding_batch_tokens: int = Field(
        0, ge=0, description="Token budget of one forward pass. 0: measured defaults for the device."
    )
    embedding_parallel_batches: int = Field(
        2,
        ge=1,
        le=64,
        description="ChunkBatches one worker holds at a time: one computes, one reads or writes.",
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
        60.0,
        gt=0,
        description="A worker silent for this long loses its ChunkBatch. Renewed three times as often.",
    )
    max_attempts: int = Field(5, ge=1, description="Attempts before a ChunkBatch is discarded.")
    poll_interval: float = Field(0.5, gt=0, description="Seconds between two rounds of the poller.")
    doorbell_repair_seconds: float = Field(
        10.0, gt=0, description="Age at which a doorbell that Redis does not hold counts as lost."
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
