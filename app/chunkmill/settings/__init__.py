"""Settings from the environment. They are frozen, and read only by the CLI, the workers and ``Client.from_env``."""

from __future__ import annotations

import contextlib
import difflib
import ipaddress
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from chunkmill.domain.model_fields import WrongModels
from chunkmill.domain.spaces import Pooling, Precision
from chunkmill.domain.trust import Trust
from chunkmill.errors import InvalidSetting
from chunkmill.settings.addresses import one_line, read_postgres_url, read_redis_url
from chunkmill.settings.gateway import GatewaySettings
from chunkmill.settings.provider import ProviderSettings

OF_THE_PROVIDER = frozenset(ProviderSettings.model_fields) - {"embedding_provider", "gpu_hour_usd"}
"""The settings that only the paid routes need. The first of the others says what a model's name means everywhere."""


def _schema_name(name: str) -> str:
    if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", name) or name.startswith("pg_") or name == "information_schema":
        raise ValueError("it must be the name of a schema: lower-case letters, digits and _, such as chunkmill")
    return name


def _http_url(url: str) -> str:
    problem = "it must be a URL such as http://127.0.0.1:8080, with host, port and path only"
    url = one_line(url)
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises if it is not a port
    except ValueError:
        raise ValueError(problem) from None
    if parts.scheme != "http" or not parts.hostname or "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(problem)
    return url.rstrip("/")


def _worker_socket(given: str) -> str:
    given = given.strip()
    if given in ("auto", "off"):
        return given
    kind, _, rest = given.partition(":")
    if kind == "unix" and rest.startswith("/"):
        return given
    if kind == "tcp":
        host, _, port = rest.rpartition(":")
        with contextlib.suppress(ValueError):
            if ipaddress.ip_address(host.strip("[]")).is_loopback and 0 <= int(port) <= 65_535:
                return given
        raise ValueError("tcp: must be followed by a loopback address and a port, as in tcp:127.0.0.1:0")
    raise ValueError("it must be auto, off, unix:/folder or tcp:127.0.0.1:0")


def _precision(given: object) -> object:
    """The precision that a user named. pydantic's own message would list internal values."""
    try:
        return Precision(given)  # type: ignore[arg-type]
    except ValueError:
        raise ValueError(f"it must be one of: {', '.join(map(str, Precision))}") from None


def _lower(given: object) -> object:
    return given.lower() if isinstance(given, str) else given


_EVERYTHING = frozenset({"1", "all", "on", "true", "yes"})


def _names(given: object) -> object:
    """The names in a list with commas. A word that means "all models" is refused: trust is given by name."""
    if not isinstance(given, str):
        return given
    names = frozenset(name.strip() for name in given.split(",")) - {""}
    if blanket := sorted(name for name in names if "*" in name or name.lower() in _EVERYTHING):
        raise ValueError(
            f"{blanket[0]!r} is not the name of a model: write the name of each model, separated by commas"
        )
    return names


def _names_of(error: Any) -> frozenset[str]:
    """The models that OPENAI_MODELS describes, from pydantic's report of what is wrong with it."""
    wrong = error.get("ctx", {}).get("error")
    return wrong.names if isinstance(wrong, WrongModels) else frozenset()


def _aliases(given: object) -> object:
    """The pairs of a list such as ``text-embedding-3-small=all-MiniLM-L6-v2,other=/models/mine``."""
    if not isinstance(given, str):
        return given
    pairs: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in given.split(","))):
        alias, equals, model = (word.strip() for word in part.partition("="))
        if not (alias and equals and model):
            raise ValueError(f"{part!r} is not of the form alias=model: write such pairs, separated by commas")
        if pairs.setdefault(alias, model) != model:
            raise ValueError(f"{alias!r} is given twice, for different models")
    if chained := sorted(alias for alias, model in pairs.items() if model in pairs):
        raise ValueError(f"{chained[0]!r} stands for another alias: name the model itself")
    return pairs


ModelNames = Annotated[frozenset[str] | None, NoDecode, BeforeValidator(_names)]
Aliases = Annotated[dict[str, str] | None, NoDecode, BeforeValidator(_aliases)]


def require_settings(names: Iterable[str], known: Collection[str]) -> None:
    """Raise :class:`InvalidSetting` for a name that no setting has."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name.lower(), known, n=1)
            meant = f"Did you mean {close[0]}? " if close else ""
            raise InvalidSetting(f"there is no setting {name[:100]!r}. {meant}docs/settings.md lists every setting.")


class Settings(ProviderSettings, GatewaySettings):
    """All settings. The environment variable of a field is its name in capitals; docs/settings.md lists them."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="ignore",
        env_ignore_empty=True,
        hide_input_in_errors=True,  # the input may be a password
    )

    database_url: Annotated[str, AfterValidator(read_postgres_url)] | None = Field(
        None,
        repr=False,
        description="URL of a Postgres database with pgvector, or of several hosts of which one is the primary: "
        "`postgresql://user:password@h1:5432,h2:5432/chunkmill?target_session_attrs=read-write`. In the password, "
        "write `/ ? # @ %` as `%2F %3F %23 %40 %25`. If this and REDIS_URL are both unset, Chunkmill uses the embedded "
        "stack, which `chunkmill up` starts.",
    )
    database_schema: Annotated[str, AfterValidator(_schema_name)] = Field(
        "chunkmill",
        description="Schema of the database that holds Chunkmill's tables. `chunkmill migrate` creates it. With the "
        "default, tables that an earlier release created in another schema stay there.",
    )
    redis_url: Annotated[str, AfterValidator(read_redis_url)] | None = Field(
        None,
        repr=False,
        description="URL of one Redis or Valkey, version 6.2 or later: `redis://`, `rediss://` (then the server's "
        "certificate is verified) or `unix:///path?db=0`. The password is written as in DATABASE_URL. Options are "
        "`db`, and with `rediss://` also `ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile`, `ssl_cert_reqs` and "
        "`ssl_check_hostname`.",
    )
    chunkmill_home: Path | None = Field(
        None,
        description="Folder for the embedded stack's data and for profiles. If unset, it is Chunkmill's folder in the "
        "user's data directory, and for root `/var/lib/chunkmill-stack`, which all of root's shells share.",
    )
    embedding_model: str = Field(
        "all-MiniLM-L6-v2",
        description="Default model, for jobs that name none and for workers when they start: the bundled model's "
        "name, a local folder, or `org/name@revision`. Prompts, an adapter and a model for queries may stand behind "
        "it: `org/name@revision?prompts=e5`.",
    )
    embedding_pooling: Pooling | None = Field(
        None,
        description="Pooling method of a plain transformers folder, which does not state one: `mean`, `cls`, "
        "`last_token`, `max`, `mean_sqrt_len` or `weighted_mean`.",
    )
    embedding_dimensions: int | None = Field(
        None,
        ge=1,
        description="Number of dimensions to which EMBEDDING_MODEL's vectors are cut. The model must have been "
        "trained for that (Matryoshka). If unset, vectors keep all their dimensions.",
    )
    embedding_precision: Annotated[Precision, BeforeValidator(_precision)] = Field(
        Precision.FLOAT,
        description="Precision class of the vectors: `float`, or `int8`, which is faster on a CPU and less exact. "
        "Each class is a space of its own.",
    )
    embedding_matryoshka: ModelNames = Field(
        None,
        description="Names of models, separated by commas, that you know were trained for fewer dimensions although "
        "neither their files nor their names say so.",
    )
    embedding_trust_pickle: ModelNames = Field(
        None,
        description="Names of models, separated by commas, whose weights may be read from a pickle "
        "(`pytorch_model.bin`).",
    )
    embedding_trust_remote_code: ModelNames = Field(
        None, description="Names of models, separated by commas, whose own Python files may be run."
    )
    embedding_device: str = Field(
        "auto",
        description="Device that a worker computes on: `auto`, `cpu` or `cuda`. `auto` takes a GPU if there is one.",
    )
    embedding_dtype: str = Field(
        "auto",
        description="Number format of the forward pass: `auto`, `fp32`, `bf16` or `fp16`. `auto` takes half precision "
        "if the device supports it natively.",
    )
    embedding_backend: Literal["auto", "native", "transformers", "onnx", "openvino"] = Field(
        "auto",
        description="Library that runs the model: `auto`, `native`, `transformers`, `onnx` or `openvino`. `auto` "
        "follows the profile; without a profile it is our own forward pass.",
    )
    embedding_batch_tokens: int = Field(
        0,
        ge=0,
        description="Maximum number of tokens in one forward pass. With 0 it is the profile's number; without a "
        "profile it is the device's measured default.",
    )
    embedding_threads: int = Field(
        0,
        ge=0,
        description="Number of threads that compute on a CPU. With 0 it is OMP_NUM_THREADS, else the profile's "
        "number, else the number of physical cores.",
    )
    embedding_profile: str = Field(
        "auto",
        description="Profile from `chunkmill tune` that a worker follows: `auto` (the one of this machine and model), "
        "`off`, or the path of a profile.",
    )
    embedding_parallel_batches: int = Field(
        2,
        ge=1,
        le=64,
        description="Number of ChunkBatches that a worker holds at a time. With 2, one is computed while the other is "
        "read or written. A profile may raise it.",
    )
    embedding_engines: int = Field(
        2, ge=1, description="Number of models that one worker keeps loaded if jobs name several."
    )
    embedding_share_gpu: bool = Field(
        False,
        description="Whether several workers may share one GPU. If `false`, the second worker exits with code 75.",
    )
    vector_storage: str = Field(
        "vector",
        pattern="^(vector|halfvec)$",
        description="Column type of the vectors in new spaces: `vector` (4 bytes for each dimension) or `halfvec` (2 "
        "bytes).",
    )
    chunk_batch_size: int = Field(
        512, ge=1, le=16384, description="Maximum number of contents in one ChunkBatch, the unit that a worker leases."
    )
    enqueue_window: int = Field(
        5000, ge=1, le=100_000, description="Number of chunks that one transaction of `enqueue` commits."
    )
    doorbell_window: int = Field(
        256, ge=1, description="Maximum number of doorbells of one priority in Redis at a time."
    )
    lease_seconds: float = Field(
        30.0,
        gt=0,
        description="How many seconds a worker may be silent before it loses its ChunkBatches. A worker renews its "
        "leases three times in this period.",
    )
    step_deadline_seconds: float = Field(
        120.0,
        gt=0,
        description="How many seconds a forward pass or a tokenizer call may take. A longer one counts as hung: the "
        "worker exits with code 70 and the supervisor starts a new one.",
    )
    load_deadline_seconds: float = Field(
        1800.0,
        gt=0,
        description="How many seconds the load of a model that a job names may take, including its download. After "
        "that the worker exits with code 70 and the supervisor starts a new one.",
    )
    stall_seconds: float = Field(
        120.0,
        gt=0,
        description="How many seconds an idle worker may receive no doorbell while doorbells are queued. After that "
        "it exits with code 70.",
    )
    max_attempts: int = Field(5, ge=1, description="How many attempts a ChunkBatch gets before it is discarded.")
    poll_interval: float = Field(0.5, gt=0, description="How many seconds pass between two rounds of the poller.")
    index_compact: bool = Field(
        False,
        description="Whether graphs of serving indexes that are built from now on hold one bit a dimension. They take "
        "a fifth of the memory and of the disk, and a search of them reads some hundred vectors more. It has no effect "
        "below 256 dimensions.",
    )
    index_memory_mb: int = Field(
        512,
        ge=16,
        description="How many MiB of memory Postgres may use to build the graph of a serving index. A graph that needs "
        "more (about 1.5 kB for each row of 384 dimensions) is built several times more slowly.",
    )
    index_seconds: float = Field(
        10.0,
        ge=0,
        description="How many seconds pass between two checks by the poller for serving indexes that need a segment. "
        "With 0, only `chunkmill index COLLECTION` builds them.",
    )
    doorbell_repair_seconds: float = Field(
        10.0,
        gt=0,
        description="How many seconds after it was rung a doorbell that is missing from Redis counts as lost. The "
        "poller then rings again.",
    )
    query_cache_mb: int = Field(
        16,
        ge=0,
        description="How many MiB of memory a client may use for the vectors of its last queries, which then need no "
        "worker. 16 MiB are about 7,800 vectors of 384 dimensions. With 0, none are kept.",
    )
    query_cache_seconds: float = Field(
        3600.0, gt=0, description="How many seconds a client keeps the vector of a query."
    )
    query_cache_documents: bool = Field(
        False,
        description="Whether a client also keeps the vectors of documents that it embeds for a caller who waits. A "
        "document that was enqueued does not need this, because its vector is in the database.",
    )
    worker_socket: Annotated[str, AfterValidator(_worker_socket)] = Field(
        "auto",
        description="Where a worker on queue `gpu` listens for clients and gateways on the same machine, which then "
        "ask it without rows in Postgres: `auto` (a Unix socket in a folder of this user alone), `unix:/folder` (for "
        "other users of the machine who may use that folder), `tcp:127.0.0.1:0` (a free port, or the given one; "
        "loopback only) or `off`. With `off`, clients use no socket either. Clients that reach none ask through "
        "Postgres.",
    )
    preemption_notice: Literal["auto", "gcp", "aws", "azure", "off"] = Field(
        "auto",
        description="Cloud whose metadata service says that this machine will be taken away: `auto` (all three are "
        "asked), `gcp`, `aws`, `azure` or `off`.",
    )
    preemption_metadata_url: Annotated[str, AfterValidator(_http_url)] | None = Field(
        None, description="Address of the metadata service. If unset, it is http://169.254.169.254."
    )
    preemption_drain_on_rebalance: bool = Field(
        False,
        description="Whether a worker on AWS drains at a rebalance recommendation, which often is not followed by an "
        "interruption.",
    )
    metrics_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="TCP port at which workers and pollers serve /metrics. A process that finds it taken uses the "
        "next free port. With 0, metrics are off.",
    )
    metrics_address: str = Field(
        "127.0.0.1",
        description="IP address at which /metrics is served. It asks for no password, so do not use an address of an "
        "open network.",
    )

    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = Field(
        "info",
        description="Lowest level that is logged: `debug`, `info`, `warning` or `error`. Celery's option `--loglevel` "
        "overrides it.",
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto",
        description="Format of the log: `json` (one object per line), `text`, or `auto`, which is text on a terminal "
        "and JSON elsewhere.",
    )
    gateway_model_aliases: Aliases = Field(
        None,
        description="Further names of models in a gateway, such as `text-embedding-3-small=all-MiniLM-L6-v2`, "
        "separated by commas, for programs that ask for OpenAI's names. An alias comes before a model of that name.",
    )
    gateway_token_ids: Literal["cl100k", "reject"] = Field(
        "cl100k",
        description="Meaning of token ids that a gateway gets instead of texts: `cl100k`, OpenAI's vocabulary, which "
        "OpenAI's and LangChain's clients use for every model; or `reject`, if none are taken.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the arguments and the environment alone. Looking for the other two takes as long, and finds nothing."""
        return init_settings, env_settings

    @property
    def trust(self) -> Trust:
        """What the operator trusts, by model name."""
        nothing = frozenset[str]()
        return Trust(
            pickle=self.embedding_trust_pickle or nothing,
            remote_code=self.embedding_trust_remote_code or nothing,
            matryoshka=self.embedding_matryoshka or nothing,
        )

    @classmethod
    def from_env(cls, **overrides: Any) -> Settings:
        """Read the environment. Raises an :class:`InvalidSetting` that names each wrong variable.

        ``overrides`` are settings by their names, which come before the environment. If one of them is wrong, or no
        setting has its name, the error names it as it was given, beside its variable, by which the docs list it.

        If only settings of the paid routes are wrong, it raises nothing: those routes are off then, and everything else
        goes on. ``provider_problem`` says what is wrong.
        """
        require_settings(overrides, cls.model_fields)
        given, problem, described = dict(overrides), None, frozenset[str]()
        while True:
            try:
                settings = cls(**given)
            except ValidationError as error:
                wrong = {str(e["loc"][0]): e for e in error.errors()}
                # pydantic's own message would print the value, which may hold a password.
                named = {name: f"{name} ({name.upper()})" if name in overrides else name.upper() for name in wrong}
                problems = "; ".join(
                    f"{named[name]}: {e['msg'].removeprefix('Value error, ')}" for name, e in wrong.items()
                )
                if not wrong.keys() <= OF_THE_PROVIDER - given.keys():
                    where = "the argument" if wrong.keys() <= overrides.keys() else "the environment"
                    raise InvalidSetting(f"{problems}. Fix {where}; docs/settings.md lists every setting.") from None
                problem = problem or problems
                described = next((names for e in wrong.values() if (names := _names_of(e))), described)
                given |= {name: cls.model_fields[name].default for name in wrong}
            else:
                break
        if problem is not None:
            settings._provider_problem = (
                f"the paid routes are off in this process, because their settings are wrong: {problem}. Fix the "
                "environment and start the process again; docs/settings.md lists every setting."
            )
            settings._described = described
        return settings

    def require_database_url(self) -> str:
        """The URL for ``chunkmill.db.connect.create_db``: with ``schema=…`` if DATABASE_SCHEMA is not the default."""
        if self.database_url is None:
            raise InvalidSetting("DATABASE_URL is not set. Set it, or run `chunkmill up` for the embedded stack.")
        if self.database_schema == "chunkmill":
            return self.database_url
        separator = "&" if "?" in self.database_url else "?"
        return f"{self.database_url}{separator}schema={self.database_schema}"

    def require_redis_url(self) -> str:
        if self.redis_url is None:
            raise InvalidSetting("REDIS_URL is not set. Set it, or run `chunkmill up` for the embedded stack.")
        return self.redis_url
