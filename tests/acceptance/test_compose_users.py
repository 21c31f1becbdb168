"""The users that docker-compose.yml makes, with its own commands run as processes. No Docker Engine is needed."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
import sqlalchemy as sa
import yaml

from chunkmill.embedded import StackStatus
from chunkmill.embedded.redis import find_program
from tests.acceptance.test_least_privilege import acl_file
from tests.conftest import admin, url_of
from tests.support.waiting import PATIENCE, until

ROOT = Path(__file__).parents[2]
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
REQUIRED = re.findall(r"^([A-Z_]+)=", (ROOT / "deploy/env.example").read_text(), re.MULTILINE)


def make_env(file: Path) -> dict[str, str]:
    done = subprocess.run([ROOT / "deploy/make-env.sh", file], capture_output=True, text=True, check=True)
    values = dict(line.split("=", 1) for line in file.read_text().splitlines() if re.match(r"[A-Z]", line))
    assert not [name for name, value in values.items() if "PASSWORD" in name and value in done.stdout]
    return values


@pytest.fixture
def values(tmp_path: Path) -> dict[str, str]:
    return make_env(tmp_path / ".env")


def environment(service: str, values: dict[str, str]) -> dict[str, str]:
    """The service's environment, with the variables of .env put in."""
    given = SERVICES[service]["environment"]
    return {
        name: re.sub(r"\$\{(\w+)[^}]*\}", lambda match: values[match[1]], value or values.get(name, ""))
        for name, value in given.items()
    }


def test_env_has_a_password_of_its_own_for_each_user_and_keeps_it(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    first = make_env(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert set(first) == set(REQUIRED)
    assert first.pop("COMPOSE_PROFILES")
    assert len(set(first.values())) == len(first)
    assert all(re.fullmatch(r"(chunkmill:)?[0-9a-f]{48}", value) for value in first.values())
    assert list(tmp_path.iterdir()) == [file]

    # As after an upgrade: a file of an earlier version, whose last line has no end.
    file.write_text("POSTGRES_PASSWORD=mine\nFLOWER_BASIC_AUTH=me:mine\n#X=1\nLOG_LEVEL=debug")
    later = make_env(file)
    assert set(later) == {*REQUIRED, "LOG_LEVEL"}
    assert (later["POSTGRES_PASSWORD"], later["FLOWER_BASIC_AUTH"], later["LOG_LEVEL"]) == ("mine", "me:mine", "debug")
    assert later["REDIS_PASSWORD"] != first["REDIS_PASSWORD"]
    assert make_env(file) == later


@pytest.fixture
def server(tmp_path: Path, values: dict[str, str]) -> Iterator[Path]:
    """The socket of a Redis that was started by the service's command."""
    bin_, tmp, data = tmp_path / "bin", tmp_path / "tmp", tmp_path / "data"
    for folder in (bin_, tmp, data):
        folder.mkdir()
    entrypoint = bin_ / "docker-entrypoint.sh"
    entrypoint.write_text(f'#!/bin/sh\nshift\nexec {find_program()} "$@" --dir {data} --port 0 --unixsocket {tmp}/s\n')
    entrypoint.chmod(0o755)
    here = {
        "/tmp/": f"{tmp}/",  # noqa: S108
        "/etc/chunkmill/redis-acl.conf": str(acl_file()),
        "$$": "$",
        "${REDIS_MAXMEMORY:-256mb}": "9mb",
    }
    command = SERVICES["redis"]["command"]
    for old, new in here.items():
        command = [word.replace(old, new) for word in command]
    path = f"{bin_}:{os.environ['PATH']}"
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={"PATH": path, **environment("redis", values)}, stdout=output, stderr=output
        )
    try:
        until(lambda: (tmp / "s").exists() or process.poll() is not None, log.read_text)
        assert process.poll() is None, log.read_text()
        yield tmp / "s"
    finally:
        process.terminate()
        process.wait(PATIENCE)


def test_redis_starts_with_the_users_of_env_and_its_health_check_passes(server: Path, values: dict[str, str]) -> None:
    for user, name in (("admin", "ADMIN_"), ("chunkmill", ""), ("flower", "FLOWER_")):
        with redis.Redis(unix_socket_path=str(server), username=user, password=values[f"REDIS_{name}PASSWORD"]) as mine:
            until(mine.ping)
            if user == "admin":
                assert mine.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
                assert mine.config_get("appendonly") == {"appendonly": "yes"}
    for login in ({}, {"username": "chunkmill", "password": "SET-CHUNKMILL-PASSWORD"}, {"password": "x"}):
        with (
            redis.Redis(unix_socket_path=str(server), **login) as stranger,
            pytest.raises(redis.AuthenticationError),
        ):
            stranger.ping()

    kind, check = SERVICES["redis"]["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    client = shutil.which("redis-cli", path=f"{os.environ['PATH']}:{Path(sys.executable).parent}")
    check = check.replace("$$", "$").replace("redis-cli", f"{client} -s {server}")
    for password, expected in ((values["REDIS_PASSWORD"], 0), ("wrong", 1)):
        done = subprocess.run(["/bin/sh", "-c", check], env={"REDIS_PASSWORD": password, "PATH": "/usr/bin:/bin"})
        assert done.returncode == expected


@pytest.mark.skipif(shutil.which("psql") is None, reason="needs psql 15 or later")
def test_the_roles_get_the_passwords_of_env_and_again_without_harm(stack: StackStatus, values: dict[str, str]) -> None:
    admin(stack, "CREATE DATABASE compose_roles")
    url = sa.make_url(url_of(stack, "compose_roles"))
    where = {"PGDATABASE": "compose_roles", "PGHOST": str(url.query.get("host", url.host)), "PGUSER": str(url.username)}
    try:
        for service in ("roles", "rights"):
            env = environment(service, values) | where | {"PATH": os.environ["PATH"]}
            command = [word.replace("/etc/chunkmill/", f"{ROOT}/deploy/") for word in SERVICES[service]["command"]]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE)
            assert done.returncode == 0, done.stderr
            assert values["POSTGRES_WORKER_PASSWORD"] not in done.stdout + done.stderr
        with psycopg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False)) as conn:
            rows = conn.execute(
                """
                SELECT rolname, rolsuper, rolpassword LIKE 'SCRAM-SHA-256$%'
                FROM pg_authid
                WHERE rolname LIKE 'chunkmill\\_%' AND rolcanlogin AND rolname <> 'chunkmill_runtime'
                ORDER BY 1
                """
            ).fetchall()
            groups = conn.execute(
                """
                SELECT m.member::regrole::text, m.roleid::regrole::text
                FROM pg_auth_members m
                WHERE m.member::regrole::text ~ '^chunkmill_(gateway|key_maker|producer|worker|poller|reader)$'
                ORDER BY 1
                """
            ).fetchall()
        purposes = ["gateway", "key_maker", "poller", "producer", "reader", "worker"]
        assert rows == [(f"chunkmill_{name}", False, True) for name in sorted(["migrator", *purposes])]
        assert groups == [(f"chunkmill_{name}", f"chunkmill_{name}s") for name in purposes]
    finally:
        admin(stack, "DROP DATABASE compose_roles WITH (FORCE)")


def has_compose() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0


@pytest.mark.skipif(not has_compose(), reason="needs docker compose; no engine has to run")
def test_compose_reads_the_file_and_knows_which_services_the_profiles_mean(tmp_path: Path) -> None:
    make_env(tmp_path / ".env")
    base = {"postgres", "redis", "roles", "migrate", "rights", "poller"}

    def config(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            "docker",
            "compose",
            "--file",
            str(ROOT / "docker-compose.yml"),
            "--env-file",
            str(tmp_path / ".env"),
        ]
        return subprocess.run([*command, "config", *arguments], capture_output=True, text=True, cwd=tmp_path)

    assert set(config("--services").stdout.split()) == base | {"worker-cpu", "flower"}
    text = (tmp_path / ".env").read_text()
    (tmp_path / ".env").write_text(text.replace("=cpu,flower\n", "=gpu,openai\n"))
    assert set(config("--services").stdout.split()) == base | {"worker", "worker-openai"}
    for name in (name for name in REQUIRED if name != "FLOWER_BASIC_AUTH"):
        (tmp_path / ".env").write_text(re.sub(rf"^{name}=.*$", f"{name}=", text, flags=re.MULTILINE))
        refused = config("--quiet")
        assert (refused.returncode != 0, name in refused.stderr) == (True, True)
