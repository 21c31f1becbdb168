"""The deployment files: Compose's own schema, then the promises that no schema knows.

Each file has one function that lists what is wrong with it. The file as it stands gives an empty list, and
each rule has a broken copy of the file in which that rule, and no other, speaks up.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from chunkmill.settings import Settings

ROOT = Path(__file__).parents[3]
COMPOSE = (ROOT / "docker-compose.yml").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
ENV_EXAMPLE = (ROOT / "deploy/env.example").read_text()
WORKER_UNIT = (ROOT / "deploy/chunkmill-worker@.service").read_text()
MACHINE_UNIT = (ROOT / "deploy/chunkmill-worker.service").read_text()
POLLER_UNIT = (ROOT / "deploy/chunkmill-poller.service").read_text()
GATEWAY_UNIT = (ROOT / "deploy/chunkmill-gateway.service").read_text()
OPENAI_UNIT = (ROOT / "deploy/chunkmill-openai.service").read_text()
SCHEMA = json.loads((ROOT / "tests/fixtures/compose-spec.json").read_text())

ONE_SHOT = {"migrate", "cli", "keys", "reader", "roles", "rights"}
PSQL = {"roles", "rights"}
"""One-shots of Postgres' own image."""
WORKERS = {"worker", "worker-cpu", "worker-openai"}
STORES = {"postgres", "redis"}
# Signals and settings that end Celery's threads pool in a traceback instead of a drain.
NOT_A_DRAIN = re.compile(r"SIGQUIT|REMAP_SIGTERM|SOFT_SHUTDOWN", re.IGNORECASE)


def seconds(duration: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(s|m)", duration).groups()  # type: ignore[union-attr]
    return int(number) * {"s": 1, "m": 60}[unit]


# --- docker-compose.yml -------------------------------------------------------------------------------------


def compose_problems(compose: dict[str, Any]) -> list[str]:
    services = compose["services"]
    networks = compose["networks"]
    problems: list[str] = []

    for name, service in services.items():
        if service.get("ports") and name in STORES:
            problems.append(f"{name} publishes a port")
        problems += [
            f"{name} publishes {port} beyond the loopback"
            for port in service.get("ports", [])
            if not port.startswith("127.0.0.1:")
        ]
        if not re.search(r":[^:]*\d", service["image"]) and "build" not in service:
            problems.append(f"{name}: the image has no version")
        if "ALL" not in service.get("cap_drop", []) or service.get("cap_add") or service.get("privileged"):
            problems.append(f"{name} has capabilities")
        if "no-new-privileges:true" not in service.get("security_opt", []):
            problems.append(f"{name} may gain privileges")
        if not service.get("read_only"):
            problems.append(f"{name} may write to its root file system")
        if "mem_limit" not in service:
            problems.append(f"{name} may use all memory")
        if "max-size" not in service.get("logging", {}).get("options", {}):
            problems.append(f"{name} logs without a limit")
        if not service.get("init"):
            problems.append(f"{name} has no init")
        if name in ONE_SHOT:
            if service["restart"] != "no":
                problems.append(f"{name} is started again after it ended")
            continue
        if service["restart"] != "unless-stopped":
            problems.append(f"{name} is not restarted")
        if "test" not in service.get("healthcheck", {}):
            problems.append(f"{name} has no health check")
        # After its timeout Docker kills only the shell, and what the shell started goes on.
        check = service.get("healthcheck", {})
        kind, *words = check.get("test", ["none"])
        limits = re.findall(r"timeout -s KILL (\d+) (?:celery|redis-cli) ", str(words))
        programs = re.findall(r"(?:celery|redis-cli) -", str(words))
        if kind == "CMD-SHELL" and (
            len(limits) != len(programs) or any(int(limit) >= seconds(check["timeout"]) for limit in limits)
        ):
            problems.append(f"{name}'s health check may outlive its timeout")
        if "celery" in str(words) and seconds(check.get("start_interval", "5s")) < seconds(check["interval"]):
            problems.append(f"{name} is asked every few seconds while it starts")
        if "stop_grace_period" not in service:
            problems.append(f"{name} has no time to stop in")
        if name not in {*STORES, "flower"} and service["depends_on"].get("migrate") != {
            "condition": "service_completed_successfully"
        }:
            problems.append(f"{name} may start on an old schema")

    for name in STORES:
        if [n for n in services[name]["networks"] if not (networks[n] or {}).get("internal")]:
            problems.append(f"{name} is on a network that is not internal")
        if not services[name].get("volumes"):
            problems.append(f"{name} keeps nothing")
    if any("/data" in v for v in services["postgres"].get("volumes", [])):
        problems.append("postgres: PostgreSQL 18's image refuses a volume at .../data")
    if seconds(services["postgres"].get("stop_grace_period", "0s")) < 60:
        problems.append("postgres has no time for its checkpoint")

    redis = " ".join(services["redis"]["command"])
    options = ("--appendonly yes", "--appendfsync everysec", "--maxmemory-policy noeviction")
    problems += [f"redis: {option} is missing" for option in options if option not in redis]

    for name in WORKERS:
        worker = services[name]
        if NOT_A_DRAIN.search(json.dumps(worker)) or worker.get("stop_signal") != "SIGTERM":
            problems.append(f"{name} is stopped by something else than SIGTERM")
        if seconds(worker.get("stop_grace_period", "0s")) < (130 if name == "worker-openai" else 30):
            problems.append(f"{name} has no time to drain")
        node = worker["command"][worker["command"].index("-n") + 1] if "-n" in worker["command"] else "celery@%h"
        if f"--destination {node.replace('%h', '$$HOSTNAME')} " not in str(worker["healthcheck"].get("test")):
            problems.append(f"{name}'s health check asks another worker")
        if not worker.get("profiles"):
            problems.append(f"{name} has no profile")
    devices = services["worker"].get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    if not any(d.get("driver") == "nvidia" and "gpu" in d["capabilities"] for d in devices):
        problems.append("worker reserves no GPU")

    command = services["poller"]["command"]
    heartbeat = command[command.index("--heartbeat") + 1] if "--heartbeat" in command else "none"
    if f"find {heartbeat} -mmin " not in str(
        services["poller"].get("healthcheck", {"test": f"find {heartbeat} -mmin "})
    ):
        problems.append("poller's health check does not ask this poller")

    for name, service in services.items():
        values = " ".join(map(str, service["environment"].values()))
        users = re.findall(r"://(\w*):[^@]*@(?:postgres|redis):", values)
        expected = {
            "migrate": ["chunkmill_migrator", "chunkmill"],
            "flower": ["flower"],
            **{store: [] for store in STORES | PSQL},
            "keys": ["chunkmill_key_maker", "chunkmill"],
            "cli": ["chunkmill_producer", "chunkmill"],
        }
        purpose = "worker" if name.startswith("worker") else name
        if sorted(users) != sorted(expected.get(name, [f"chunkmill_{purpose}", "chunkmill"])):
            problems.append(f"{name} has the rights of {users}")
    if [
        name
        for name, service in services.items()
        if "${POSTGRES_PASSWORD" in str(service) and name not in PSQL | STORES
    ]:
        problems.append("a service of ours knows the superuser's password")
    if "migrate" in services["cli"]["depends_on"]:
        problems.append("a command that only looks would migrate")
    if services["migrate"]["depends_on"].keys() != {"roles"} or "rights" not in services["poller"]["depends_on"]:
        problems.append("the roles are not made in time")
    if "--include /tmp/users.conf" not in redis:
        problems.append("redis has no users")

    flower = " ".join(services["flower"]["command"])
    if "--read_only=True" not in flower:
        problems.append("flower can stop workers")
    if "--basic_auth" in flower or "FLOWER_BASIC_AUTH" not in services["flower"]["environment"]:
        problems.append("flower's password is missing, or in the process list")
    return problems


def variable_problems(compose: str, env_example: str) -> list[str]:
    """A variable is documented; a secret is required, or passed on under its own name with no default."""
    problems: list[str] = []
    documented = set(re.findall(r"^#?([A-Z][A-Z0-9_]*)=", env_example, re.MULTILINE))
    secret = re.compile(r"PASSWORD|AUTH|KEY|TOKEN$|SECRET")
    interpolated = re.findall(r"\$\{([A-Z0-9_]+)([^}]*)\}", compose)
    passed_on = re.findall(r"^ +([A-Z][A-Z0-9_]*):$", compose, re.MULTILINE)
    for name, modifier in interpolated:
        if secret.search(name) and not modifier.startswith(":?"):
            problems.append(f"{name} is a secret that is not required")
    problems += [f"{name} is not in env.example" for name, _ in interpolated if name not in documented]
    problems += [f"{name} is not in env.example" for name in passed_on if name not in documented]
    for name, value in re.findall(r"^#?([A-Z][A-Z0-9_]*)=(.+)$", env_example, re.MULTILINE):
        if secret.search(name):
            problems.append(f"env.example gives {name} the value {value}")
    for name in re.findall(r"^ +([A-Z0-9_]*(?:PASSWORD|AUTH|_KEY|SECRET)): +[^$ ]", compose, re.MULTILINE):
        problems.append(f"docker-compose.yml gives {name} a value")
    return problems


def schema_problems(compose: dict[str, Any]) -> list[str]:
    return [e.message for e in jsonschema.Draft202012Validator(SCHEMA).iter_errors(compose)]


def test_the_compose_file_is_valid_and_keeps_every_rule() -> None:
    compose = yaml.safe_load(COMPOSE)
    assert schema_problems(compose) == []
    assert compose_problems(compose) == []
    assert variable_problems(COMPOSE, ENV_EXAMPLE) == []


@pytest.mark.parametrize(
    ("service", "change"),
    [
        ("redis", {"comand": ["redis-server"]}),
        ("redis", {"restart": True}),
        ("redis", {"healthcheck": {"test": ["CMD", "true"], "every": "5s"}}),
        ("poller", {"depends_on": {"migrate": {"condition": "service_finished"}}}),
        ("worker", {"deploy": {"resources": {"reservations": {"devices": [{"driver": "nvidia"}]}}}}),
    ],
)
def test_the_schema_refuses(service: str, change: dict[str, Any]) -> None:
    compose = yaml.safe_load(COMPOSE)
    compose["services"][service].update(change)
    assert schema_problems(compose)


BROKEN_COMPOSE: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("postgres publishes a port", lambda s: s["postgres"].update(ports=["127.0.0.1:5432:5432"])),
    ("redis publishes a port", lambda s: s["redis"].update(ports=["127.0.0.1:6379:6379"])),
    ("flower publishes 5555:5555 beyond the loopback", lambda s: s["flower"].update(ports=["5555:5555"])),
    ("redis: the image has no version", lambda s: s["redis"].update(image="redis:alpine")),
    ("redis has capabilities", lambda s: s["redis"].pop("cap_drop")),
    ("postgres has capabilities", lambda s: s["postgres"].update(cap_add=["SYS_ADMIN"])),
    ("poller may gain privileges", lambda s: s["poller"].pop("security_opt")),
    ("worker may write to its root file system", lambda s: s["worker"].update(read_only=False)),
    ("flower logs without a limit", lambda s: s["flower"].pop("logging")),
    ("worker-cpu has no init", lambda s: s["worker-cpu"].pop("init")),
    ("migrate is started again after it ended", lambda s: s["migrate"].update(restart="always")),
    ("poller is not restarted", lambda s: s["poller"].update(restart="no")),
    ("poller has no health check", lambda s: s["poller"].pop("healthcheck")),
    ("flower has no health check", lambda s: s["flower"]["healthcheck"].pop("test")),
    ("flower has no time to stop in", lambda s: s["flower"].pop("stop_grace_period")),
    ("postgres may use all memory", lambda s: s["postgres"].pop("mem_limit")),
    ("worker may start on an old schema", lambda s: s["worker"]["depends_on"].pop("migrate")),
    ("postgres is on a network that is not internal", lambda s: s["postgres"]["networks"].append("outside")),
    ("redis keeps nothing", lambda s: s["redis"].pop("volumes")),
    (
        "postgres: PostgreSQL 18's image refuses a volume at .../data",
        lambda s: s["postgres"].update(volumes=["postgres:/var/lib/postgresql/data"]),
    ),
    ("postgres has no time for its checkpoint", lambda s: s["postgres"].update(stop_grace_period="10s")),
    ("redis: --appendonly yes is missing", lambda s: s["redis"]["command"].remove("yes")),
    ("redis: --appendfsync everysec is missing", lambda s: s["redis"]["command"].remove("everysec")),
    (
        "redis: --maxmemory-policy noeviction is missing",
        lambda s: s["redis"]["command"].__setitem__(-1, "allkeys-lru"),
    ),
    (
        "worker is stopped by something else than SIGTERM",
        lambda s: s["worker"].update(stop_signal="SIGQUIT"),
    ),
    (
        "worker-cpu is stopped by something else than SIGTERM",
        lambda s: s["worker-cpu"]["environment"].update(REMAP_SIGTERM="SIGQUIT"),
    ),
    ("worker has no time to drain", lambda s: s["worker"].update(stop_grace_period="10s")),
    # Its requests are paid for, so it waits for their answers.
    ("worker-openai has no time to drain", lambda s: s["worker-openai"].update(stop_grace_period="120s")),
    ("worker's health check asks another worker", lambda s: s["worker"]["command"].remove("-n")),
    (
        "worker-openai's health check asks another worker",
        lambda s: s["worker-openai"]["healthcheck"].update(s["worker"]["healthcheck"]),
    ),
    (
        "worker-cpu's health check asks another worker",
        lambda s: s["worker-cpu"]["healthcheck"].update(test=["CMD", "true"]),
    ),
    *[
        (
            f"{name}'s health check may outlive its timeout",
            lambda s, name=name, old=old, new=new: s[name]["healthcheck"].update(
                test=["CMD-SHELL", s[name]["healthcheck"]["test"][1].replace(old, new)]
            ),
        )
        for name in ("worker-cpu", "worker-openai", "redis")
        for old, new in (("timeout -s KILL ", "nice -n "), ("KILL ", "KILL 1"))
    ],
    (
        "worker-cpu is asked every few seconds while it starts",
        lambda s: s["worker-cpu"]["healthcheck"].pop("start_interval"),
    ),
    (
        "worker-openai is asked every few seconds while it starts",
        lambda s: s["worker-openai"]["healthcheck"].update(start_interval="5s"),
    ),
    (
        "poller's health check does not ask this poller",
        lambda s: s["poller"]["healthcheck"].update(test=["CMD", "chunkmill", "poller", "--check"]),
    ),
    ("poller's health check does not ask this poller", lambda s: s["poller"]["command"].remove("--heartbeat")),
    (
        "poller has the rights of ['chunkmill', 'chunkmill']",
        lambda s: s["poller"]["environment"].update(DATABASE_URL="postgresql://chunkmill:${X}@postgres:5432/chunkmill"),
    ),
    (
        "flower has the rights of ['']",
        lambda s: s["flower"]["environment"].update(REDIS_URL="redis://:${X}@redis:6379/0"),
    ),
    (
        "a service of ours knows the superuser's password",
        lambda s: s["worker"]["environment"].update(PGPASSWORD="${POSTGRES_PASSWORD:?}"),
    ),
    (
        "a command that only looks would migrate",
        lambda s: s["cli"]["depends_on"].update(migrate={"condition": "service_completed_successfully"}),
    ),
    ("the roles are not made in time", lambda s: s["poller"]["depends_on"].pop("rights")),
    ("redis has no users", lambda s: s["redis"].update(command=["redis-server", *s["redis"]["command"][4:]])),
    ("worker-cpu has no profile", lambda s: s["worker-cpu"].pop("profiles")),
    ("worker reserves no GPU", lambda s: s["worker"].pop("deploy")),
    ("flower can stop workers", lambda s: s["flower"]["command"].remove("--read_only=True")),
    (
        "flower's password is missing, or in the process list",
        lambda s: s["flower"]["environment"].pop("FLOWER_BASIC_AUTH"),
    ),
    (
        "flower's password is missing, or in the process list",
        lambda s: s["flower"]["command"].append("--basic_auth=me:secret"),
    ),
]


@pytest.mark.parametrize(("problem", "breaks"), BROKEN_COMPOSE)
def test_a_broken_compose_file_is_noticed(problem: str, breaks: Callable[[dict[str, Any]], object]) -> None:
    # YAML anchors come out as shared objects; the copy through JSON makes a change stay in its service.
    compose = json.loads(json.dumps(yaml.safe_load(COMPOSE)))
    breaks(compose["services"])
    assert compose_problems(compose) == [problem]


def test_an_open_backend_network_is_noticed() -> None:
    compose = copy.deepcopy(yaml.safe_load(COMPOSE))
    compose["networks"]["backend"]["internal"] = False
    assert compose_problems(compose) == [f"{name} is on a network that is not internal" for name in STORES]


@pytest.mark.parametrize(
    ("problem", "compose", "env_example"),
    [
        (
            "POSTGRES_PASSWORD is a secret that is not required",
            COMPOSE + "x-bad: ${POSTGRES_PASSWORD:-postgres}",
            ENV_EXAMPLE,
        ),
        ("NEW_ONE is not in env.example", COMPOSE + "x-bad: ${NEW_ONE:-1}", ENV_EXAMPLE),
        ("EMBEDDING_SHARE_GPU is not in env.example", COMPOSE, ENV_EXAMPLE.replace("#EMBEDDING_SHARE_GPU=false", "")),
        (
            "env.example gives POSTGRES_PASSWORD the value changeme",
            COMPOSE,
            ENV_EXAMPLE.replace("POSTGRES_PASSWORD=", "POSTGRES_PASSWORD=changeme"),
        ),
        (
            "docker-compose.yml gives POSTGRES_PASSWORD a value",
            COMPOSE + "x-bad:\n  POSTGRES_PASSWORD: postgres\n",
            ENV_EXAMPLE,
        ),
    ],
)
def test_a_careless_variable_is_noticed(problem: str, compose: str, env_example: str) -> None:
    assert variable_problems(compose, env_example) == [problem]


def test_every_setting_reaches_the_containers_and_env_example_shows_its_default() -> None:
    given = {"database_url", "redis_url", "embedding_device", "chunkmill_home"}  # the compose file states these itself
    services = yaml.safe_load(COMPOSE)["services"]
    assert [name for name, service in services.items() if "OPENAI_API_KEY" in (service.get("environment") or {})] == [
        "worker-openai"
    ]
    passed = {**yaml.safe_load(COMPOSE)["x-settings"], "OPENAI_API_KEY": None}
    for name, field in Settings.model_fields.items():
        if name in given:
            continue
        assert name.upper() in passed, f"docker-compose.yml does not pass {name.upper()} on"
        default = "" if field.default is None else str(field.default).removesuffix(".0")
        shown = default.lower() if isinstance(field.default, bool) else default
        assert f"#{name.upper()}={shown}\n" in ENV_EXAMPLE, f"env.example: #{name.upper()}={shown}"


# --- Dockerfile ---------------------------------------------------------------------------------------------


def dockerfile_stages(text: str) -> dict[str, list[str]]:
    """Each stage's instructions, its parent's first."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    stages: dict[str, list[str]] = {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            parent, name = match.groups()
            stages[name] = [*stages.get(parent, []), line]
        elif line.strip():
            stages[name].append(line)
    return stages


def dockerfile_problems(text: str) -> list[str]:
    stages = dockerfile_stages(text)
    problems: list[str] = []
    base = stages["base"][0].split()[1]
    if not re.search(r":\d+\.\d+-\w+-\w+$", base):
        problems.append("the base image names no minor version and Debian release")
    for target in ("app", "worker"):
        users = [line.split()[1] for line in stages[target] if line.startswith("USER ")]
        if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
            problems.append(f"{target} runs as root")
        if [line for line in stages[target] if line.startswith("STOPSIGNAL ")][-1:] != ["STOPSIGNAL SIGTERM"]:
            problems.append(f"{target} is not stopped by SIGTERM")
        if [line for line in stages[target] if "apt-get" in line or "build-essential" in line]:
            problems.append(f"{target} installs system packages")
        copied = f"COPY --from={target}-deps /opt/venv /opt/venv"
        if copied not in stages[target]:
            problems.append(f"{target} does not take its own dependencies")
        installs = [line for line in stages[f"{target}-deps"] if "pip install" in line]
        by_digest = re.compile(r"pip install --require-hashes --no-deps --only-binary :all: -r \w+\.txt(?: |$)")
        if not installs or any(line.count("pip install") != len(by_digest.findall(line)) for line in installs):
            problems.append(f"{target} installs what has no digest")
        extras = set(re.findall(r"locked\.py ([\w,]+) > requirements\.txt", " ".join(installs)))
        if extras != {
            {"app": "documents,embedded,flower,gateway,metrics,openai,tracing", "worker": "worker,tracing"}[target]
        }:
            problems.append(f"{target} installs {sorted(extras)}")
    if re.search(r"^(ARG|ENV) .*(PASSWORD|SECRET|API_KEY|TOKEN)|\.env\b", text, re.MULTILINE):
        problems.append("a secret is in a layer")
    return problems


def test_the_dockerfile_keeps_every_rule() -> None:
    assert dockerfile_problems(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("problem", "old", "new"),
    [
        ("the base image names no minor version and Debian release", "python:3.12-slim-trixie", "python:3"),
        ("app runs as root", 'USER 10001:10001\nCMD ["chunkmill"', 'CMD ["chunkmill"'),
        ("worker runs as root", 'USER 10001:10001\nCMD ["celery"', 'USER root\nCMD ["celery"'),
        ("worker is not stopped by SIGTERM", 'CMD ["celery"', 'STOPSIGNAL SIGQUIT\nCMD ["celery"'),
        (
            "app installs system packages",
            "FROM runtime AS app\n",
            "FROM runtime AS app\nRUN apt-get install gcc\n",
        ),
        ("app does not take its own dependencies", "--from=app-deps", "--from=worker-deps"),
        ("worker installs what has no digest", "--require-hashes --no-deps --only-binary :all: -r torch.txt", "torch"),
        (
            "app installs ['flower,worker']",
            "locked.py documents,embedded,flower,gateway,metrics,openai,tracing",
            "locked.py flower,worker",
        ),
        ("a secret is in a layer", "ARG PIP_EXTRA_INDEX_URL=", "ARG OPENAI_API_KEY="),
        ("a secret is in a layer", "COPY app app", "COPY .env ./"),
    ],
)
def test_a_broken_dockerfile_is_noticed(problem: str, old: str, new: str) -> None:
    assert old in DOCKERFILE
    assert dockerfile_problems(DOCKERFILE.replace(old, new)) == [problem]


def test_compose_builds_the_targets_that_the_dockerfile_has() -> None:
    services = yaml.safe_load(COMPOSE)["services"]
    targets = {name: service["build"]["target"] for name, service in services.items() if "build" in service}
    assert set(targets) == set(services) - STORES - PSQL
    assert {name for name, target in targets.items() if target == "worker"} == WORKERS - {"worker-openai"}
    assert set(targets.values()) <= set(dockerfile_stages(DOCKERFILE))


def test_every_profile_is_named_where_profiles_are_chosen() -> None:
    """All but the one of the services for single commands, which ``docker compose run`` starts by their names."""
    compose = yaml.safe_load(COMPOSE)
    profiles = {p for service in compose["services"].values() for p in service.get("profiles", [])} - {"cli"}
    running = (ROOT / "docs/running.md").read_text().partition("## With Compose\n")[2].partition("\n| ")[0]
    example = ENV_EXAMPLE.partition("COMPOSE_PROFILES=")[0].rpartition("\n\n")[2]
    assert len(profiles) > 3
    for text in (compose["x-profiles"], running, example):
        assert profiles - set(re.findall(r"\w+", text)) == set(), text


def test_the_build_context_holds_what_the_dockerfile_copies_and_no_more() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] not in ("", "#")]
    assert lines[0] == "*"
    copied = {
        source
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY ") and "--from=" not in line
        for source in line.split()[1:-1]
    }
    assert {line[1:] for line in lines if line.startswith("!")} == copied - {
        "app/chunkmill/system/locked.py"
    }  # app has it


# --- Redis --------------------------------------------------------------------------------------------------


def test_nobody_is_the_default_user_of_redis_and_the_append_only_file_is_read_as_it() -> None:
    """The second half is seen only with Redis 7 or later: test_least_privilege restarts the Redis that is here."""
    users = dict(re.findall(r"^user (\w+) (.*)$", (ROOT / "deploy/redis-acl.conf").read_text(), re.MULTILINE))
    assert users.pop("default").split() == ["off", "resetpass", "~*", "&*", "+@all"]
    assert users
    assert all(rule.startswith("on >SET-") for rule in users.values())


# --- systemd ------------------------------------------------------------------------------------------------


SANDBOX = {
    "CapabilityBoundingSet": "",
    "LimitCORE": "0",
    "LockPersonality": "yes",
    "NoNewPrivileges": "yes",
    "PrivateTmp": "yes",
    "ProtectControlGroups": "yes",
    "ProtectHome": "yes",
    "ProtectHostname": "yes",
    "ProtectKernelLogs": "yes",
    "ProtectKernelModules": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectProc": "invisible",
    "ProtectSystem": "strict",
    "RemoveIPC": "yes",
    "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6 AF_NETLINK",
    "RestrictNamespaces": "yes",
    "RestrictRealtime": "yes",
    "RestrictSUIDSGID": "yes",
    "SystemCallArchitectures": "native",
    "SystemCallErrorNumber": "EPERM",
    "SystemCallFilter": "@system-service",
    "UMask": "0077",
}
"""What every unit says about what its process may reach."""
ALONE = ("PrivateDevices", "PrivateUsers", "ProtectClock")
"""What a unit without a GPU says too."""
EXPOSURE = {"worker": 2.5, "other": 2.0}
"""The most that `systemd-analyze security` may say, of 10."""


def unit_problems(text: str) -> list[str]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    values: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition("=")
        values[key] = f"{values[key]} {value}" if key in values else value
    command = values["ExecStart"]
    paid = " -Q openai " in command
    worker = not command.endswith((" poller", " gateway")) and not paid
    # A worker's 0 is a drain, and the machine is going; what lives on a machine that stays has no such reason to end.
    expected = {
        "KillSignal": "SIGTERM",
        "KillMode": "mixed",
        "Restart": "on-failure" if worker else "always",
        "StartLimitIntervalSec": "0",
        "User": "chunkmill",
    }
    problems = [f"{key} is not {value}" for key, value in expected.items() if values.get(key) != value]
    stop = int(values.get("TimeoutStopSec", "0"))
    if stop < (130 if paid else 18):
        problems.append("the service has no time to drain")
    if stop > (25 if worker else 150 if paid else 30):
        problems.append("the service may outlast its machine")
    if "RestartPreventExitStatus" in values or "RestartForceExitStatus" in values:
        problems.append("an exit code has a rule of its own")
    if NOT_A_DRAIN.search("\n".join(lines)):
        problems.append("a signal or setting that is not a drain")
    if re.search(r"PASSWORD|API_KEY|://", "\n".join(lines)):
        problems.append("a secret or an address is in the unit")
    if "network-online.target" not in values.get("After", "").split():
        problems.append("the network may be gone before the drain is over")
    problems += [f"{key} is not {value}" for key, value in SANDBOX.items() if values.get(key) != value]
    problems += [f"{key} is not yes" for key in ALONE if values.get(key) != "yes" and not worker]
    if worker:
        # A start after exit 78 costs a model's load; seconds apart, such starts would keep the CPU busy for nothing.
        if int(values.get("RestartSec", "0")) < 15:
            problems.append("a wrong configuration is tried again at once")
        if "/run/lock" not in values.get("ReadWritePaths", ""):
            problems.append("the locks on GPUs are private")
        # ProtectClock allows one device, and with that no other.
        if {"yes"} & {values.get(key) for key in ("PrivateDevices", "MemoryDenyWriteExecute", "ProtectClock")}:
            problems.append("the sandbox hides the GPU or forbids its kernels")
    if command.endswith("chunkmill worker") and values.get("OOMPolicy") != "continue":
        problems.append("one worker that runs out of memory ends all")
    if paid and "/etc/chunkmill/openai.env" not in values["EnvironmentFile"].split():
        problems.append("the key is not in a file of its own")
    if " celery " in f" {command.replace('/', ' ')} ":
        if not paid and "CUDA_VISIBLE_DEVICES=%i" not in values["Environment"].split():
            problems.append("the worker sees every GPU")
        if "@%%h" not in command:
            problems.append("the node's name holds systemd's %h")
    return problems


def test_the_units_keep_every_rule() -> None:
    assert unit_problems(WORKER_UNIT) == []
    assert unit_problems(MACHINE_UNIT) == []
    assert unit_problems(POLLER_UNIT) == []
    assert unit_problems(GATEWAY_UNIT) == []
    assert unit_problems(OPENAI_UNIT) == []


@pytest.mark.parametrize(
    ("problem", "old", "new"),
    [
        ("KillSignal is not SIGTERM", "KillSignal=SIGTERM", "KillSignal=SIGINT"),
        ("KillMode is not mixed", "KillMode=mixed\n", ""),
        ("Restart is not on-failure", "Restart=on-failure", "Restart=always"),
        ("User is not chunkmill", "User=chunkmill", "User=root"),
        ("StartLimitIntervalSec is not 0", "StartLimitIntervalSec=0\n", ""),
        ("the service has no time to drain", "TimeoutStopSec=20", "TimeoutStopSec=15"),
        ("the service may outlast its machine", "TimeoutStopSec=20", "TimeoutStopSec=30"),
        ("an exit code has a rule of its own", "[Service]\n", "[Service]\nRestartPreventExitStatus=78\n"),
        ("a signal or setting that is not a drain", "[Service]\n", "[Service]\nEnvironment=REMAP_SIGTERM=SIGQUIT\n"),
        ("a secret or an address is in the unit", "[Service]\n", "[Service]\nEnvironment=OPENAI_API_KEY=sk\n"),
        ("the network may be gone before the drain is over", "After=network-online.target", "After="),
        ("the locks on GPUs are private", "-/run/lock", "/srv"),
        ("LimitCORE is not 0", "LimitCORE=0\n", ""),
        ("PrivateTmp is not yes", "PrivateTmp=yes\n", ""),
        ("ProtectProc is not invisible", "ProtectProc=invisible\n", ""),
        ("SystemCallFilter is not @system-service", "SystemCallFilter=@system-service\n", ""),
        ("the sandbox hides the GPU or forbids its kernels", "[Service]\n", "[Service]\nProtectClock=yes\n"),
        ("the sandbox hides the GPU or forbids its kernels", "[Service]\n", "[Service]\nPrivateDevices=yes\n"),
    ],
)
def test_a_broken_worker_unit_is_noticed(problem: str, old: str, new: str) -> None:
    for unit in (WORKER_UNIT, MACHINE_UNIT):
        assert old in unit
        assert unit_problems(unit.replace(old, new)) == [problem]


@pytest.mark.parametrize(
    ("problem", "unit", "old", "new"),
    [
        ("the worker sees every GPU", WORKER_UNIT, "CUDA_VISIBLE_DEVICES=%i", "CUDA_VISIBLE_DEVICES=0"),
        ("the node's name holds systemd's %h", WORKER_UNIT, "@%%h", "@%h"),
        ("a wrong configuration is tried again at once", WORKER_UNIT, "RestartSec=15", "RestartSec=1"),
        ("a wrong configuration is tried again at once", MACHINE_UNIT, "RestartSec=60\n", ""),
        ("one worker that runs out of memory ends all", MACHINE_UNIT, "OOMPolicy=continue\n", ""),
        ("Restart is not always", POLLER_UNIT, "Restart=always", "Restart=on-failure"),
        ("the service may outlast its machine", POLLER_UNIT, "TimeoutStopSec=30", "TimeoutStopSec=90"),
        ("Restart is not always", GATEWAY_UNIT, "Restart=always", "Restart=on-failure"),
        ("the service has no time to drain", GATEWAY_UNIT, "TimeoutStopSec=30", "TimeoutStopSec=10"),
        ("PrivateDevices is not yes", POLLER_UNIT, "PrivateDevices=yes\n", ""),
        ("PrivateUsers is not yes", OPENAI_UNIT, "PrivateUsers=yes\n", ""),
        ("Restart is not always", OPENAI_UNIT, "Restart=always", "Restart=on-failure"),
        ("the node's name holds systemd's %h", OPENAI_UNIT, "@%%h", "@%h"),
        ("the key is not in a file of its own", OPENAI_UNIT, "chunkmill/openai.env\nEnv", "chunkmill/all.env\nEnv"),
    ],
)
def test_what_is_special_of_one_unit_is_noticed(problem: str, unit: str, old: str, new: str) -> None:
    assert old in unit
    assert unit_problems(unit.replace(old, new)) == [problem]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize(
    "name",
    [
        "chunkmill-worker.service",
        "chunkmill-worker@.service",
        "chunkmill-poller.service",
        "chunkmill-gateway.service",
        "chunkmill-openai.service",
    ],
)
def test_systemd_understands_the_unit(name: str, tmp_path: Path) -> None:
    # Under another root: `verify` would look for the command and for everything that a unit refers to.
    command = tmp_path / "opt/chunkmill/bin"
    command.mkdir(parents=True)
    for program in ("chunkmill", "celery"):
        (command / program).write_text("#!/bin/sh\n")
        (command / program).chmod(0o755)
    unit = tmp_path / name.replace("@.", "@0.")
    unit.write_text((ROOT / "deploy" / name).read_text().replace("/opt/chunkmill", f"{tmp_path}/opt/chunkmill"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    security = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(unit)], capture_output=True, text=True
    )
    if "unrecognized option" in security.stderr:
        pytest.skip("this systemd-analyze cannot judge a file")
    exposure = float(security.stdout.rsplit("Overall exposure level", 1)[1].split(":", 1)[1].split()[0])
    assert exposure <= EXPOSURE["worker" if "worker" in name else "other"]
