"""The start-up scripts: what no shell checks, and then real runs below a folder, with a cloud played by this process.

As in ``test_deploy``: one function lists what is wrong with a script, and each rule has a broken copy.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.support.waiting import running

ROOT = Path(__file__).parents[3]
SCRIPTS = {name: (ROOT / "deploy" / name).read_text() for name in ("plain.sh", "spot-gcp.sh", "spot-aws.sh")}
UNIT = (ROOT / "deploy/chunkmill-worker.service").read_text()
POLLER_UNIT = (ROOT / "deploy/chunkmill-poller.service").read_text()
SHELL = [*sorted((ROOT / "deploy").glob("*.sh")), ROOT / ".ci/run"]
SHARED = re.compile(r"^# --- The same lines.*?^# --- End of the lines.*?$", re.DOTALL | re.MULTILINE)

USER_DATA_BYTES = 16 * 1024
"""What EC2 takes, before base64; some of it is for the settings above the script."""
CREATES = {
    "plain.sh": (),
    "spot-gcp.sh": (
        "--provisioning-model=SPOT",
        "--instance-termination-action=DELETE",
        "--preemption-notice-duration=120s",
        "--machine-type=g2-standard-8",
        "--machine-type=a2-highgpu-1g",
        "instance-groups managed create",
    ),
    "spot-aws.sh": (
        "MarketType=spot",
        "HttpTokens=required",
        "HttpPutResponseHopLimit=1",
        "create-auto-scaling-group",
    ),
}


# --- What is wrong with a script ----------------------------------------------------------------------------


def significant(unit: str) -> list[str]:
    return [line for line in unit.splitlines() if line and not line.startswith("#")]


def shared_lines(text: str) -> str:
    match = SHARED.search(text)
    return match.group() if match else ""


def script_problems(name: str, text: str) -> list[str]:
    header, _, body = text.partition("\nset -euo pipefail\n")
    commands = [line.strip() for line in body.splitlines() if not line.lstrip().startswith("#")]
    problems: list[str] = []
    if not text.startswith("#!/usr/bin/env bash\n") or not body:
        problems.append("it goes on after a command that failed")
    if "[--dry-run | --help]" not in header or not all(line[:1] in ("", "#") for line in header.splitlines()):
        problems.append("it does not begin with its usage")
    problems += [f"{option} is in no command that makes machines" for option in CREATES[name] if option not in header]
    if re.search(r"set -[a-z]*x|bash -x|set -o xtrace", text):
        problems.append("it shows the commands it runs")
    if re.search(r"://[^/\s]+:[^/\s]+@|(?:PASSWORD|API_KEY|TOKEN)=[^\s$\"']|AKIA[A-Z0-9]{8}|-----BEGIN", text):
        problems.append("a secret is in its text")
    if [line for line in commands if "curl" in line and "Authorization" in line]:
        problems.append("a token is an argument of a command")
    changing = re.compile(r"\b(systemctl|useradd|apt-get|-m venv|-m pip)\b")
    if [line for line in commands if changing.search(line) and not re.search(r"\brun |command -v", line)]:
        problems.append("--dry-run would change something")
    if not (unit := re.search(r"<< 'UNIT'\n(.*?)^UNIT$", text, re.DOTALL | re.MULTILINE)):
        problems.append("it installs no unit")
    elif significant(unit.group(1)) != significant(UNIT):
        problems.append("its unit is not chunkmill-worker.service")
    if name == "plain.sh":
        poller = re.search(r"<< 'POLLER'\n(.*?)^POLLER$", text, re.DOTALL | re.MULTILINE)
        if poller is None or significant(poller.group(1)) != significant(POLLER_UNIT):
            problems.append("its unit is not chunkmill-poller.service")
    if shared_lines(text) != shared_lines(SCRIPTS["plain.sh"]) or not shared_lines(text):
        problems.append("the lines that all scripts share differ")
    if name == "spot-aws.sh" and len(text.encode()) > USER_DATA_BYTES - 1024:
        problems.append("it is too long for user data")
    return problems


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_keep_every_rule(name: str) -> None:
    assert script_problems(name, SCRIPTS[name]) == []


@pytest.mark.parametrize(
    ("problem", "name", "old", "new"),
    [
        ("it goes on after a command that failed", "plain.sh", "#!/usr/bin/env bash", "#!/bin/sh"),
        ("it does not begin with its usage", "plain.sh", "[--dry-run | --help]", "[--help]"),
        ("HttpTokens=required is in no command that makes machines", "spot-aws.sh", ",HttpTokens=required", ""),
        (
            "--provisioning-model=SPOT is in no command that makes machines",
            "spot-gcp.sh",
            " --provisioning-model=SPOT",
            "",
        ),
        ("it shows the commands it runs", "spot-aws.sh", "\n\nfetch_object", "\nset -x\nfetch_object"),
        ("a secret is in its text", "spot-gcp.sh", "\n\nfetch_object", "\nDB=redis://me:hunter2@db/0\nfetch_object"),
        ("a secret is in its text", "spot-aws.sh", "\n\nfetch_object", "\nexport HF_TOKEN=hf_abc\nfetch_object"),
        (
            "a token is an argument of a command",
            "spot-gcp.sh",
            "\n\nfetch_object",
            '\ncurl -H "Authorization: Bearer $token" "$url"\nfetch_object',
        ),
        ("its unit is not chunkmill-poller.service", "plain.sh", "RestartSec=5\n", "RestartSec=50\n"),
        ("--dry-run would change something", "plain.sh", "\n\nfetch_object", "\nsystemctl mask x\nfetch_object"),
        ("it is too long for user data", "spot-aws.sh", "\n\nfetch_object", "\n# " + "x" * 8000 + "\nfetch_object"),
    ],
)
def test_a_broken_script_is_noticed(problem: str, name: str, old: str, new: str) -> None:
    assert old in SCRIPTS[name]
    assert script_problems(name, SCRIPTS[name].replace(old, new, 1)) == [problem]


def test_a_unit_that_went_its_own_way_is_noticed() -> None:
    problems = script_problems("spot-gcp.sh", SCRIPTS["spot-gcp.sh"].replace("KillMode=mixed", "KillMode=process"))
    assert problems == ["its unit is not chunkmill-worker.service", "the lines that all scripts share differ"]


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_the_shell_can_read_it(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck (Debian package shellcheck)")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(["shellcheck", *map(str, SHELL)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


# --- Real runs ----------------------------------------------------------------------------------------------

SECRET = "hunter2-of-the-database"
TOKEN = "ya29.token-of-the-service-account"
ENVIRONMENT = f"DATABASE_URL=postgresql://me:{SECRET}@db/chunkmill\nREDIS_URL=redis://redis/0"
"""Without an end of the last line, as secret stores hand it out."""
WHEEL = "chunkmill-0.1.0-py3-none-any.whl"
STUB = """#!/usr/bin/env bash
printf '%s\\n' "${0##*/} $*" >> "$LOG"
"""
# A Python that makes no virtual environment and installs nothing, which takes seconds; for all else it is one.
PYTHON_STUB = f"""{STUB}
case "$1 $2" in
    "-m venv") mkdir -p "${{!#}}/bin"; cp "$0" "${{!#}}/bin/python" ;;
    "-m zipfile") mkdir -p "${{!#}}/chunkmill/system"; echo "$LOCKED" > "${{!#}}/chunkmill/system/locked.py" ;;
    "-m pip")
        [[ -z ${{PIP_FAILS-}} ]] || {{ echo 'No matching distribution found' >&2; exit 1; }}
        while [[ $1 != download && $1 != install ]]; do shift; done
        if [[ $1 == download ]]; then
            while [[ $1 != --dest ]]; do shift; done
            if [[ -f $3 ]]; then cp "$3" "$2"; else echo "$3" > "$2/{WHEEL}"; fi
            exit
        fi
        echo "pip's constraints: ${{PIP_CONSTRAINT-}}" >> "$LOG"
        wheel=${{!#}}
        cat "${{wheel%\\[*]}}" >> "$LOG"
        printf '#!/bin/sh\\nexit %s\\n' "${{PROGRAM_FAILS:-0}}" > "${{0%/*}}/chunkmill"
        chmod +x "${{0%/*}}/chunkmill" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""
AWS_STUB = f"""{STUB}
case "$1 $2" in
    "ssm get-parameter") cat "$STORE/parameter" ;;
    "secretsmanager get-secret-value") cat "$STORE/secret" ;;
    "s3 cp") echo WHEEL > "${{!#}}" ;;
    *) exit 3 ;;
esac
"""


@dataclass
class Machine:
    """A folder that a script takes for a machine, and stubs for what would reach beyond it, which keep a log."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("root", "stubs", "tmp", "home"):
            (self.folder / name).mkdir()
        for name in ("systemctl", "useradd", "apt-get"):
            self.stub(name, STUB)
        self.stub("getent", f"{STUB}\nexit 2\n")  # no such user
        self.stub("nvidia-smi", f"{STUB}\nprintf '580.65.06\\n580.65.06\\n'\n")
        self.stub("python3", PYTHON_STUB)
        self.environment = {
            "PATH": f"{self.folder}/stubs:/usr/bin:/bin",
            "DESTDIR": str(self.root),
            "TMPDIR": str(self.folder / "tmp"),
            "HOME": str(self.folder / "home"),
            "LOG": str(self.folder / "log"),
            "LOCKED": "import sys; print(sys.argv[1:])",
            "STORE": str(self.folder),
            "PYTHON": str(self.folder / "stubs/python3"),
            "DRIVER_WAIT": "0",
        }

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @property
    def env_file(self) -> Path:
        return self.root / "etc/chunkmill/chunkmill.env"

    def stub(self, name: str, text: str) -> None:
        path = self.folder / "stubs" / name
        path.write_text(text)
        path.chmod(0o755)

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "log").write_text("")
        done = subprocess.run(
            ["bash", str(ROOT / "deploy" / script), *arguments],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        for text in (done.stdout, done.stderr, *self.commands):
            assert SECRET not in text, "others can read it, in a log or in the process list"
            assert TOKEN not in text
        assert list((self.folder / "tmp").iterdir()) == [], "what it needed on the way stays behind"
        return done

    @property
    def commands(self) -> list[str]:
        return (self.folder / "log").read_text().splitlines()

    def called(self, name: str) -> list[str]:
        return [line.removeprefix(f"{name} ") for line in self.commands if line.startswith(f"{name} ")]

    @property
    def installed(self) -> list[str]:
        return [line for line in self.commands if re.match(r"python -m pip .*\binstall ", line)]

    @property
    def releases(self) -> set[str]:
        folder = self.root / "opt/chunkmill-releases"
        return {path.name for path in folder.iterdir() if path.name != ".lock"} if folder.exists() else set()

    @property
    def runs(self) -> Path:
        """The folder that the services run from."""
        assert (self.root / "opt/chunkmill").is_symlink()
        return (self.root / "opt/chunkmill").resolve(strict=True)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def systemctl(services: str, *, restart: bool) -> list[str]:
    again = ["--no-block try-restart chunkmill-*.service"] if restart else []
    return ["daemon-reload", f"enable {services}", *again, f"--no-block start {services}"]


BOTH = "chunkmill-worker.service chunkmill-poller.service"
START, RESTART = systemctl(BOTH, restart=False), systemctl(BOTH, restart=True)
SPOT_START, SPOT_RESTART = (systemctl("chunkmill-worker.service", restart=restart) for restart in (False, True))


def digest(content: str) -> dict[str, str]:
    """The digest of a wheel, as the operator gives it. The stubs write other things than wheels."""
    return {"CHUNKMILL_WHEEL_SHA256": sha256(content.encode()).hexdigest()}


def version(number: str) -> dict[str, str]:
    index = {"CHUNKMILL_VERSION": number, "PIP_INDEX_URL": "https://pypi.example/simple"}
    return index | digest(f"chunkmill=={number}\n")


FIRST, SECOND = version("0.1.0"), version("0.2.0")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_dry_run_says_everything_and_changes_nothing(machine: Machine, name: str) -> None:
    for done in (machine.run(name, "--dry-run", **FIRST), machine.run(name, DRY_RUN="1", **FIRST)):
        assert (done.returncode, done.stderr) == (0, "")
        assert [line for line in machine.commands if not line.startswith(("python3 -c ", "getent "))] == []
        assert list(machine.root.iterdir()) == []
        for step in (
            "would check: nvidia-smi",
            f"-m venv {machine.root}/opt/chunkmill-releases/",
            "download --quiet --no-deps --only-binary :all:",
            "would run: check_digest ",
            "would run: install_locked worker",
            f"would run: mv -fT {machine.root}/opt/chunkmill.new {machine.root}/opt/chunkmill",
            "would read: ",
            f"would write: {machine.env_file}, mode 0600",
            f"would write: {machine.root}/etc/systemd/system/chunkmill-worker.service, mode 0644",
            "would run: systemctl enable chunkmill-worker.service",
            "would run: systemctl --no-block start chunkmill-worker.service",
            *(["/etc/systemd/system/chunkmill-poller.service, mode 0644"] if name == "plain.sh" else []),
        ):
            assert step in done.stdout, step


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_the_usage_and_an_unknown_option_is_refused(machine: Machine, name: str) -> None:
    usage = machine.run(name, "--help")
    assert usage.returncode == 0
    assert f"{name} [--dry-run | --help]" in usage.stdout
    refused = machine.run(name, "--force")
    assert (refused.returncode, refused.stdout, refused.stderr) == (2, "", usage.stdout)
    assert list(machine.root.iterdir()) == []


def write_wheel(path: Path) -> Path:
    """The least that pip takes for `chunkmill[worker]`."""
    info = "chunkmill-0.1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        name = "Name: chunkmill\nVersion: 0.1.0\nProvides-Extra: worker\n"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\n{name}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: me\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/entry_points.txt", "[console_scripts]\nchunkmill = gc:enable\n")
        wheel.writestr("chunkmill/system/locked.py", (ROOT / "app/chunkmill/system/locked.py").read_text())
        wheel.writestr("chunkmill/requirements.lock", "# for: producer worker\n# nothing\n")
        files = [f"{info}/{file}" for file in ("METADATA", "WHEEL", "entry_points.txt", "RECORD")]
        files += ["chunkmill/system/locked.py", "chunkmill/requirements.lock"]
        wheel.writestr(
            f"{info}/RECORD",
            "".join(f"{file},,\n" for file in (*files, "chunkmill/system/locked.py", "chunkmill/requirements.lock")),
        )
    return path


def test_a_machine_of_ones_own_really_installed(machine: Machine, tmp_path: Path) -> None:
    given = tmp_path / "mine.env"
    given.write_text(ENVIRONMENT)
    wheel = write_wheel(tmp_path / WHEEL)

    done = machine.run(
        "plain.sh", CHUNKMILL_ENV=str(given), CHUNKMILL_WHEEL=str(wheel), PYTHON=sys.executable, PIP_NO_INDEX="1",
        CHUNKMILL_WHEEL_SHA256=sha256(wheel.read_bytes()).hexdigest(),
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert (machine.root / "opt/chunkmill/bin/chunkmill").stat().st_mode & 0o005 == 0o005, "the service's user runs it"
    for folder in (machine.root / "opt/chunkmill-releases", machine.runs):
        assert folder.stat().st_mode & 0o005 == 0o005, "the service's user enters it"
    assert not (machine.root / "opt/chunkmill").readlink().is_absolute()
    units = machine.root / "etc/systemd/system"
    assert significant((units / "chunkmill-worker.service").read_text()) == significant(UNIT)
    assert significant((units / "chunkmill-poller.service").read_text()) == significant(POLLER_UNIT)
    assert stat.S_IMODE(machine.env_file.stat().st_mode) == 0o600
    assert machine.env_file.read_text() == f"{ENVIRONMENT}\nEMBEDDING_DEVICE=cuda\n"
    assert given.read_text() == ENVIRONMENT
    assert machine.called("systemctl") == RESTART
    assert "--no-create-home" in machine.called("useradd")[0]


@pytest.fixture
def ready(machine: Machine) -> Machine:
    """A machine that has its environment file."""
    machine.env_file.parent.mkdir(parents=True)
    machine.env_file.write_text(ENVIRONMENT)
    machine.env_file.chmod(0o644)
    return machine


def test_a_second_run_changes_only_what_is_not_as_it_should_be(ready: Machine) -> None:
    assert ready.run("plain.sh", **FIRST).returncode == 0
    assert ready.called("systemctl") == RESTART
    assert "chunkmill==0.1.0" in ready.commands, "pip got another wheel"
    by_digest = "--require-hashes --no-deps --only-binary :all: --requirement "
    assert [by_digest in command for command in ready.installed] == [True, True, False]
    assert {"['worker']", "['--torch', 'cuda', 'worker']"} <= set(ready.commands)
    assert "--no-deps" in ready.installed[-1]
    assert stat.S_IMODE(ready.env_file.stat().st_mode) == 0o600

    assert ready.run("plain.sh", **FIRST).returncode == 0
    assert ready.called("systemctl") == START
    assert ready.installed == []

    with ready.env_file.open("a") as file:
        file.write("EMBEDDING_DTYPE=fp16\n")
    (ready.root / "etc/systemd/system/chunkmill-worker.service").write_text("[Service]\n")
    assert ready.run("plain.sh", **FIRST).returncode == 0
    assert ready.called("systemctl") == RESTART
    assert ready.installed == []


def test_an_upgrade_switches_at_the_end_and_the_way_back_needs_no_installation(ready: Machine) -> None:
    runs = []
    for number in ("0.1.0", "0.2.0", "0.3.0"):
        assert ready.run("plain.sh", **version(number)).returncode == 0
        assert ready.called("systemctl") == RESTART, "nothing stops before there is something to start"
        assert len(ready.installed) == 3
        runs.append(ready.runs)
    assert len(set(runs)) == 3
    assert ready.releases == {runs[1].name, runs[2].name}, "the one before stays, older ones do not fill the disk"

    for expected in (runs[1], runs[2]):
        number = {runs[1]: "0.2.0", runs[2]: "0.3.0"}[expected]
        assert ready.run("plain.sh", **version(number)).returncode == 0
        assert (ready.runs, ready.installed, ready.called("systemctl")) == (expected, [], RESTART)
        assert ready.releases == {runs[1].name, runs[2].name}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("fault", [{"PIP_FAILS": "1"}, {"PROGRAM_FAILS": "3"}], ids=["no-wheel", "does-not-run"])
def test_an_upgrade_that_fails_leaves_the_running_services_alone(
    ready: Machine, google: type[Google], script: str, fault: dict[str, str]
) -> None:
    ready.stub("aws", AWS_STUB)
    (ready.folder / "parameter").write_text(ENVIRONMENT)
    assert ready.run(script, **FIRST).returncode == 0
    before, releases, environment = ready.runs, ready.releases, ready.env_file.read_text()

    for _ in range(2):
        failed = ready.run(script, **SECOND, **fault)
        assert failed.returncode != 0
        assert ready.called("systemctl") == [], "no service was touched"
        assert (ready.runs, ready.releases, ready.env_file.read_text()) == (before, releases, environment)
        assert (before / "bin/chunkmill").exists()

    assert ready.run(script, **SECOND).returncode == 0
    assert ready.runs != before
    assert ready.releases == {before.name, ready.runs.name}


def test_an_upgrade_whose_settings_are_refused_leaves_the_running_services_alone(ready: Machine) -> None:
    assert ready.run("plain.sh", **FIRST).returncode == 0
    before = ready.runs
    ready.env_file.write_text("REDIS_URL=redis://redis/0\n")
    failed = ready.run("plain.sh", **SECOND)
    assert (failed.returncode, "the environment has no DATABASE_URL" in failed.stderr) == (1, True)
    assert (ready.runs, ready.called("systemctl")) == (before, [])

    ready.env_file.write_text(ENVIRONMENT)
    assert ready.run("plain.sh", **SECOND).returncode == 0
    assert (ready.runs != before, ready.installed) == (True, []), "what was installed is used"


def test_a_release_that_stopped_working_is_installed_again(ready: Machine) -> None:
    assert ready.run("plain.sh", **FIRST).returncode == 0
    before = ready.runs
    (before / "bin/chunkmill").write_text("#!/nowhere/python3.11\n")  # as after an upgrade of the system's Python
    assert ready.run("plain.sh", **FIRST).returncode == 0
    assert len(ready.installed) == 3
    assert ready.runs != before


def test_what_a_killed_run_left_is_deleted_and_two_runs_are_not_mixed(ready: Machine) -> None:
    half = ready.root / "opt/chunkmill-releases/half"
    half.mkdir(parents=True)
    with (half.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = ready.run("plain.sh", **FIRST)
        assert (refused.returncode, "already running" in refused.stderr, half.exists()) == (1, True, True)
    assert ready.run("plain.sh", **FIRST).returncode == 0
    assert ready.releases == {ready.runs.name}


def test_a_machine_of_an_earlier_version_of_the_script_is_taken_over(ready: Machine) -> None:
    old = ready.root / "opt/chunkmill/bin/chunkmill"
    old.parent.mkdir(parents=True)
    old.write_text("old")
    assert ready.run("plain.sh", **FIRST, PIP_FAILS="1").returncode == 1
    assert old.read_text() == "old"
    assert ready.run("plain.sh", **FIRST).returncode == 0
    assert ready.releases == {"first", ready.runs.name}
    assert (ready.root / "opt/chunkmill-releases/first/bin/chunkmill").read_text() == "old"


def test_a_wheel_that_was_built_again_under_its_name_is_installed(ready: Machine, tmp_path: Path) -> None:
    wheel = tmp_path / WHEEL
    for text, installations in (("one", 3), ("one", 0), ("two", 3)):
        wheel.write_text(text)
        assert ready.run("plain.sh", CHUNKMILL_WHEEL=str(wheel), **digest(text)).returncode == 0
        assert len(ready.installed) == installations


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wheel_with_another_digest_is_not_installed(
    ready: Machine, google: type[Google], script: str, tmp_path: Path
) -> None:
    wheel = tmp_path / WHEEL
    wheel.write_text("one")
    done = ready.run(script, CHUNKMILL_WHEEL=str(wheel), **digest("two"))
    assert (done.returncode, "has another digest than CHUNKMILL_WHEEL_SHA256" in done.stderr) == (1, True), done.stderr
    assert sha256(b"one").hexdigest() in done.stderr
    assert (ready.installed, ready.releases, ready.called("systemctl")) == ([], set(), [])


def test_a_machine_without_a_gpu_tries_a_torch_for_the_cpu_first(ready: Machine) -> None:
    assert ready.run("plain.sh", **FIRST, CHUNKMILL_DEVICE="cpu").returncode == 0
    assert "['--torch', 'cpu', 'worker']" in ready.commands
    assert "['--torch', 'cuda', 'worker']" not in ready.commands


def test_a_machine_for_a_poller_alone_needs_no_gpu_and_no_torch(ready: Machine) -> None:
    ready.stub("nvidia-smi", f"{STUB}\nexit 9\n")
    assert ready.run("plain.sh", **FIRST, CHUNKMILL_SERVICES="poller").returncode == 0
    assert ready.called("systemctl") == systemctl("chunkmill-poller.service", restart=True)
    assert ready.called("nvidia-smi") == []
    assert "['metrics']" in ready.commands
    refused = ready.run("plain.sh", **FIRST, CHUNKMILL_SERVICES="pollers")
    assert (refused.returncode, "pollers is neither worker nor poller" in refused.stderr) == (1, True)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "set CHUNKMILL_WHEEL and CHUNKMILL_WHEEL_SHA256; `make wheel`"),
        ({"CHUNKMILL_WHEEL": "https://wheels.example/chunkmill.whl"}, "set CHUNKMILL_WHEEL_SHA256 to the digest"),
        ({"CHUNKMILL_WHEEL": "/x.whl", "CHUNKMILL_WHEEL_SHA256": "abc"}, "set CHUNKMILL_WHEEL_SHA256 to the digest"),
        (FIRST | {"CHUNKMILL_WHEEL_SHA256": ""}, "set CHUNKMILL_WHEEL_SHA256 to the digest"),
        ({"CHUNKMILL_VERSION": "0.1.0"}, "CHUNKMILL_VERSION needs PIP_INDEX_URL"),
    ],
)
def test_nothing_is_taken_from_a_public_index_by_its_name(
    ready: Machine, google: type[Google], script: str, environment: dict[str, str], message: str
) -> None:
    done = ready.run(script, **environment)
    assert (done.returncode, message in done.stderr) == (1, True), done.stderr
    assert ready.releases == set()
    assert ready.called("systemctl") == []


@pytest.mark.parametrize(
    ("nvidia_smi", "message"),
    [
        ("exit 9", "nvidia-smi finds no GPU"),
        ("exit 0", "nvidia-smi finds no GPU"),
        ("echo 570.124.06", "the driver is 570.124.06"),
    ],
)
def test_a_gpu_that_cannot_be_used_stops_it(machine: Machine, nvidia_smi: str, message: str) -> None:
    machine.env_file.parent.mkdir(parents=True)
    machine.env_file.write_text(ENVIRONMENT)
    machine.stub("nvidia-smi", f"{STUB}\n{nvidia_smi}\n")

    done = machine.run("plain.sh", **FIRST)

    assert done.returncode == 1
    assert message in done.stderr
    assert machine.called("systemctl") == []

    assert machine.run("plain.sh", CHUNKMILL_DEVICE="cpu", **FIRST).returncode == 0
    assert machine.called("nvidia-smi") == []
    assert machine.env_file.read_text().endswith("\nEMBEDDING_DEVICE=cpu\n")


@pytest.mark.parametrize("address", ["", "rediss://chunkmill:PASSWORD@redis.internal:6379/0"])
def test_an_environment_that_lacks_an_address_is_refused(machine: Machine, tmp_path: Path, address: str) -> None:
    given = tmp_path / "mine.env"
    given.write_text(ENVIRONMENT.replace("REDIS_URL=redis://redis/0", f"REDIS_URL={address}"))
    done = machine.run("plain.sh", CHUNKMILL_ENV=str(given), **FIRST)
    assert (done.returncode, "the environment has no REDIS_URL" in done.stderr) == (1, True)
    assert not machine.env_file.exists()
    assert machine.called("systemctl") == []

    done = machine.run("plain.sh", CHUNKMILL_ENV=str(tmp_path / "none.env"))
    assert (done.returncode, "none.env is not there" in done.stderr) == (1, True)


# --- GCP ----------------------------------------------------------------------------------------------------


class Google(BaseHTTPRequestHandler):
    """The metadata service, Secret Manager and Cloud Storage, as far as the script asks them."""

    attributes: dict[str, str]
    secret: str | None

    def do_GET(self) -> None:
        where, _, query = self.path.partition("?")
        if where.startswith("/computeMetadata/v1/"):
            allowed = self.headers["Metadata-Flavor"] == "Google"
            answer = self.metadata(where.removeprefix("/computeMetadata/v1/"))
        else:
            allowed = self.headers["Authorization"] == f"Bearer {TOKEN}"
            answer = self.api(unquote(where), query)
        body = b"" if answer is None else answer.encode()
        self.send_response(403 if not allowed else 404 if answer is None else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def metadata(self, path: str) -> str | None:
        if path.startswith("instance/attributes/"):
            return self.attributes.get(path.rpartition("/")[2])
        known = {
            "project/project-id": "mine",
            "instance/service-accounts/default/token": json.dumps({"access_token": TOKEN, "expires_in": 3599}),
        }
        return known.get(path)

    def api(self, path: str, query: str) -> str | None:
        if path == "/v1/projects/mine/secrets/chunkmill-env/versions/latest:access" and self.secret is not None:
            return json.dumps({"payload": {"data": b64encode(self.secret.encode()).decode()}}, indent=2)
        return "WHEEL\n" if (path, query) == (f"/storage/v1/b/bucket/o/wheels/{WHEEL}", "alt=media") else None

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def google(machine: Machine) -> Iterator[type[Google]]:
    handler = type("Handler", (Google,), {"attributes": {}, "secret": ENVIRONMENT})
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        running(lambda: server.serve_forever(0.05), release=server.shutdown),
    ):
        at = f"http://127.0.0.1:{server.server_address[1]}"
        machine.environment |= {
            "METADATA_URL": f"{at}/computeMetadata/v1",
            "SECRET_MANAGER_URL": f"{at}/v1",
            "STORAGE_URL": f"{at}/storage/v1",
        }
        yield handler


def test_a_gcp_machine_takes_settings_from_metadata_and_secrets_from_secret_manager(
    machine: Machine, google: type[Google]
) -> None:
    google.attributes = {
        "chunkmill-wheel": f"gs://bucket/wheels/{WHEEL}",
        "chunkmill-wheel-sha256": digest("WHEEL\n")["CHUNKMILL_WHEEL_SHA256"],
        "pip-constraint": "/etc/constraints.txt",
    }

    done = machine.run("spot-gcp.sh")

    assert done.returncode == 0, done.stderr
    assert machine.env_file.read_text() == f"{ENVIRONMENT}\nEMBEDDING_DEVICE=cuda\n"
    assert stat.S_IMODE(machine.env_file.stat().st_mode) == 0o600
    assert machine.installed[0].endswith(f"/{WHEEL}[worker]")
    assert "WHEEL" in machine.commands, "pip got another file"
    assert "pip's constraints: /etc/constraints.txt" in machine.commands
    assert machine.called("systemctl") == SPOT_RESTART

    google.secret = ENVIRONMENT + "\nHF_TOKEN=hf_1\n"
    assert machine.run("spot-gcp.sh").returncode == 0
    assert machine.installed == []
    assert machine.called("systemctl") == SPOT_RESTART

    assert machine.run("spot-gcp.sh").returncode == 0
    assert machine.called("systemctl") == SPOT_START


def test_a_gcp_secret_that_may_not_be_read_stops_it(machine: Machine, google: type[Google]) -> None:
    google.secret = None
    done = machine.run("spot-gcp.sh", **FIRST)
    assert done.returncode == 1
    assert "secret chunkmill-env cannot be read: HTTP Error 404" in done.stderr
    assert not machine.env_file.exists()
    assert machine.called("systemctl") == []


# --- AWS ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("secret", "store"), [("/chunkmill/env", "parameter"), ("chunkmill-env", "secret")])
def test_an_aws_machine_takes_secrets_with_its_role(machine: Machine, secret: str, store: str) -> None:
    machine.stub("aws", AWS_STUB)
    (machine.folder / store).write_text(f"{ENVIRONMENT}\n")

    done = machine.run(
        "spot-aws.sh", CHUNKMILL_SECRET=secret, CHUNKMILL_WHEEL=f"s3://bucket/{WHEEL}", **digest("WHEEL\n")
    )

    assert done.returncode == 0, done.stderr
    assert machine.env_file.read_text() == f"{ENVIRONMENT}\n\nEMBEDDING_DEVICE=cuda\n"
    assert machine.installed[-1].endswith(f"/{WHEEL}")
    assert "WHEEL" in machine.commands
    assert machine.called("systemctl") == SPOT_RESTART


def test_an_aws_secret_that_may_not_be_read_stops_it(machine: Machine) -> None:
    machine.stub("aws", f"{STUB}\necho 'AccessDeniedException' >&2\nexit 254\n")
    done = machine.run("spot-aws.sh", **FIRST)
    assert (done.returncode, done.stderr) == (254, "AccessDeniedException\n")
    assert not machine.env_file.exists()
    assert machine.called("systemctl") == []


def test_nobody_installs_without_being_root() -> None:
    if os.geteuid() == 0:
        pytest.skip("this test would really install: it is for users other than root")
    command = ["bash", str(ROOT / "deploy/plain.sh")]
    done = subprocess.run(command, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False)
    assert (done.returncode, "it must be root" in done.stderr) == (1, True)
