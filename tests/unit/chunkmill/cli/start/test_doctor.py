"""The doctor's judgement, on facts made up for it."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from chunkmill.cli.start import doctor
from chunkmill.cli.start.doctor import (
    SKEW_FAIL,
    SKEW_WARN,
    clock_check,
    database_checks,
    gpu_check,
    provider_checks,
    redis_checks,
    session_check,
    tls_checks,
)
from chunkmill.db.connect import Connections
from chunkmill.monitor.present import Presence
from chunkmill.monitor.servers import Database, RedisServer
from chunkmill.settings import Settings

WELL = Database(
    version="16.14",
    encoding="UTF8",
    pgvector="0.8.0",
    pgvector_available="0.8.0",
    migration="0002",
    head="0002",
    is_newer=False,
    present=Presence(Connections(workers=4, provider_workers=0, pollers=1)),
    clock_ahead=0.01,
)


def states(database: Database) -> dict[str, str]:
    return {check.name: check.state for check in database_checks(database)}


def test_a_database_in_order() -> None:
    assert set(states(WELL).values()) == {"ok"}


@pytest.mark.parametrize(
    ("change", "name", "state"),
    [
        ({"version": "14.11"}, "Postgres", "fail"),
        ({"version": "16.13"}, "Postgres", "warn"),
        ({"version": "18.3"}, "Postgres", "warn"),
        ({"version": "18.4"}, "Postgres", "ok"),
        ({"version": "19.0"}, "Postgres", "ok"),
        ({"altered_roles": ("gpu_7: search_path=evil",)}, "roles", "warn"),
        ({"encoding": "SQL_ASCII"}, "encoding", "fail"),
        ({"pgvector": "0.7.4"}, "pgvector", "fail"),
        ({"pgvector": "0.10.0"}, "pgvector", "ok"),
        ({"pgvector": None}, "pgvector", "warn"),
        ({"pgvector": None, "pgvector_available": None}, "pgvector", "fail"),
        ({"pgvector": None, "pgvector_available": "0.6.2"}, "pgvector", "fail"),
        ({"migration": "0001"}, "migration", "fail"),
        ({"migration": None}, "migration", "fail"),
        ({"migration": "9000", "is_newer": True}, "migration", "warn"),
        ({"present": Presence(Connections(0, 0, 1))}, "worker", "warn"),
        ({"present": Presence(Connections(4, 0, 0))}, "poller", "warn"),
        ({"clock_ahead": -5.0}, "Postgres clock", "warn"),
    ],
)
def test_a_database_with_one_thing_wrong(change: dict[str, object], name: str, state: str) -> None:
    checks = list(database_checks(replace(WELL, **change)))  # type: ignore[arg-type]
    assert [(c.name, c.state) for c in checks if c.state != "ok" or c.name == name] == [(name, state)]
    assert all(bool(c.advice) == (c.state != "ok") for c in checks)


@pytest.mark.parametrize(
    ("server", "wrong"),
    [
        (RedisServer("7.2.11", "noeviction", "yes", 0.0), {}),
        (RedisServer("6.2.14", "noeviction", "yes", 0.0), {"Redis": "warn"}),
        (RedisServer("6.2.20", "noeviction", "yes", 0.0), {}),
        (RedisServer("7.0.15", "noeviction", "yes", 0.0), {"Redis": "warn"}),
        (RedisServer("8.2.1", "noeviction", "yes", 0.0), {"Redis": "warn"}),
        (RedisServer("8.10.0", "noeviction", "yes", 0.0), {}),
        (RedisServer("8.1.3", "noeviction", "yes", 0.0, "valkey"), {"Valkey": "warn"}),
        (RedisServer("8.1.4", "noeviction", "yes", 0.0, "valkey"), {}),
        (RedisServer("9.0.0", "noeviction", "yes", 0.0, "valkey"), {}),
        (RedisServer("6.0.16", "noeviction", "yes", 0.0), {"Redis": "fail"}),
        (RedisServer("8.0.4", "allkeys-lru", "no", 0.0), {"Redis eviction": "fail", "Redis AOF": "warn"}),
        (RedisServer("8.10.0", "noeviction", "yes", 0.0, refused_channels="no"), {"Redis channels": "fail"}),
        (RedisServer("7.4.6", None, None, 100.0), {"Redis eviction": "warn", "Redis clock": "fail"}),
    ],
)
def test_redis(server: RedisServer, wrong: dict[str, str]) -> None:
    assert {check.name: check.state for check in redis_checks(server) if check.state != "ok"} == wrong


def test_clocks_are_judged_in_both_directions() -> None:
    assert clock_check("clock", -SKEW_WARN).state == "ok"
    assert clock_check("clock", -SKEW_WARN - 0.1).state == "warn"
    assert clock_check("clock", SKEW_FAIL + 1).state == "fail"
    assert "behind" in clock_check("clock", -1.0).found


def test_a_gpu_that_torch_cannot_use_fails_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch of this environment is asked, in a process of its own; nvidia-smi is replaced."""
    monkeypatch.delenv("EMBEDDING_DEVICE", raising=False)
    monkeypatch.setattr(doctor, "nvidia_smi", lambda *_: ["NVIDIA L4, 23034 MiB, 535.104.05"])

    check = gpu_check("2.13.0")

    assert (check.name, check.found) == ("GPU", "NVIDIA L4, 23034 MiB, 535.104.05")
    if check.state == "fail":  # without a GPU for torch
        assert "torch" in check.advice
        monkeypatch.setenv("EMBEDDING_DEVICE", "cpu")
        assert gpu_check("2.13.0").state == "ok"
    assert gpu_check(None).state == "ok"


def test_a_torch_that_does_not_answer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMBEDDING_DEVICE", raising=False)
    monkeypatch.setattr(doctor, "nvidia_smi", lambda *_: ["NVIDIA L4, 23034 MiB, 535.104.05"])
    monkeypatch.setattr(doctor, "CUDA_SECONDS", 0.001)

    check = gpu_check("2.13.0")

    assert check.state == "fail"
    assert "did not answer" in check.advice


def test_shared_sessions_fail_with_what_to_do() -> None:
    assert session_check(shared=False).state == "ok"
    failed = session_check(shared=True)
    assert failed.state == "fail"
    assert "pool_mode = session" in failed.advice


# The paid routes


def test_the_server_of_the_paid_routes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    [check] = provider_checks()
    assert (check.state, check.found) == ("ok", "api.openai.com; 0 models in OPENAI_MODELS")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://name.openai.azure.com/openai/v1")
    monkeypatch.setenv("OPENAI_MODELS", '{"a": {"dimensions": 8}}')
    [check] = provider_checks()
    assert (check.state, check.found) == ("ok", "name.openai.azure.com; 1 model in OPENAI_MODELS")


def test_wrong_settings_of_the_paid_routes_are_a_failure_and_missing_tokenizers_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = {name: {"dimensions": 8, "tokenizer": f"/nowhere/{name}.json"} for name in ("a", "b")}
    monkeypatch.setenv("OPENAI_MODELS", json.dumps(models))
    [check] = provider_checks()
    assert check.state == "warn"
    assert all(f"{name}: the tokenizer /nowhere/{name}.json cannot be read" in check.advice for name in models)
    monkeypatch.setenv("OPENAI_MODELS", '{"a": {}}')
    [check] = provider_checks()
    assert (check.state, check.found) == ("fail", "off")
    assert "model 'a': dimensions is missing" in check.advice
    monkeypatch.setenv("LEASE_SECONDS", "-1")  # which the check of the servers says
    assert list(provider_checks()) == []


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR", "ALL_PROXY"])
def test_proxies_and_certificates_that_cannot_be_used_fail_where_a_key_says_that_they_will_be(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)  # it counts more than SSL_CERT_DIR
    monkeypatch.setenv(name, "socks5://127.0.0.1:1" if name == "ALL_PROXY" else "/nowhere/at/all")
    monkeypatch.setenv("OPENAI_MODELS", '{"a": {"dimensions": 8, "tokenizer": "/nowhere/a.json"}}')
    [check] = provider_checks()
    assert check.state == "warn"  # without a key, nothing is sent to a provider from here
    monkeypatch.setenv("OPENAI_API_KEY", "sk-quagga")
    [check] = provider_checks()
    assert (check.state, check.found) == ("fail", "api.openai.com")
    assert name in check.advice
    assert "a: the tokenizer /nowhere/a.json cannot be read" in check.advice  # what else is wrong is said too
    assert "quagga" not in check.advice
    monkeypatch.delenv(name)
    monkeypatch.delenv("OPENAI_MODELS")
    [check] = provider_checks()
    assert check.state == "ok"


@pytest.mark.parametrize(
    ("database", "redis", "environ", "wrong"),
    [
        ("postgresql://me@/chunkmill?host=/run/postgresql", "unix:///run/redis.sock?db=0", {}, set()),
        ("postgresql://me@127.0.0.1/chunkmill", "redis://localhost:6379/0", {}, set()),
        ("postgresql://me@[::1]/chunkmill", "redis://[::1]:6379/0", {}, set()),
        ("postgresql://me@db.example/chunkmill", "redis://redis.example/0", {}, {"Postgres TLS", "Redis TLS"}),
        ("postgresql://me@db.example/chunkmill?sslmode=require", "rediss://redis.example/0", {}, {"Postgres TLS"}),
        ("postgresql://me@db.example/chunkmill?sslmode=verify-full", "rediss://redis.example/0", {}, set()),
        ("postgresql://me@db.example/chunkmill", "rediss://redis.example/0", {"PGSSLMODE": "verify-full"}, set()),
        ("postgresql://me@127.0.0.1,10.0.0.7/chunkmill", "redis://127.0.0.1/0", {}, {"Postgres TLS"}),
        ("postgresql://me@localhost/x", "rediss://redis.example/0?ssl_cert_reqs=none", {}, {"Redis TLS"}),
        ("postgresql://me@localhost/x", "rediss://redis.example/0?ssl_check_hostname=false", {}, {"Redis TLS"}),
        ("postgresql://me@localhost.example/x", "redis://127.0.0.1.example/0", {}, {"Postgres TLS", "Redis TLS"}),
    ],
)
def test_a_password_that_crosses_a_network_without_verified_tls_is_warned_of(
    database: str, redis: str, environ: dict[str, str], wrong: set[str]
) -> None:
    settings = Settings.from_env(database_url=database, redis_url=redis)
    checks = list(tls_checks(settings, environ))
    assert len(checks) == 2
    assert {check.name for check in checks if check.state == "warn"} == wrong
    assert all(bool(check.advice) == (check.state != "ok") for check in checks)


def test_doctor_knows_every_extra_that_users_install() -> None:
    project = tomllib.loads((Path(__file__).parents[5] / "pyproject.toml").read_text())["project"]
    extras = {name: names_of(needed) for name, needed in project["optional-dependencies"].items()}
    for ours in ("bench", "dev", "gpu"):
        del extras[ours]
    assert doctor.EXTRAS.keys() == extras.keys()
    for name, packages in doctor.EXTRAS.items():
        assert set(packages) <= extras[name], name


def names_of(needed: list[str]) -> set[str]:
    return {match[0] for line in needed if (match := re.match(r"[\w.-]+", line))}
