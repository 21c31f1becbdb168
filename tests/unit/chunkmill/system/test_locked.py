"""The lock: every package that is installed is in it, by digest, and nothing else is chosen."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from chunkmill.system.locked import choose, read_lock
from tests.support.parts import bill

ROOT = Path(__file__).parents[4]
LOCK = (ROOT / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def versions(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([^ ;\n]+)", text, re.MULTILINE))


def everything(extras: set[str]) -> str:
    return choose(LOCK, extras | {"producer"}, {}) + choose(LOCK, extras, {}, torch="cuda")


def test_each_package_has_the_digest_of_at_least_one_file_and_the_version_of_the_constraints() -> None:
    blocks = read_lock(LOCK)
    assert len(blocks) > 150
    for _, lines in blocks:
        assert re.fullmatch(r"[\w.-]+==[^\n]+(?: \\\n    --hash=sha256:[0-9a-f]{64})+\n", lines), lines
    locked = {name: version for _, lines in blocks for name, version in versions(lines).items()}
    constraints = versions((ROOT / "constraints.txt").read_text())
    pinned = {canonicalize_name(name): version for name, version in constraints.items()}
    known = {name: version for name, version in pinned.items() if name in locked}
    assert len(known) > 150
    assert {name: locked[name].removesuffix("+cpu") for name in known} == known


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_has_all_that_its_packages_need_on_this_machine(extra: str) -> None:
    """Walked from pyproject.toml through the metadata of what is installed, because pip resolves nothing."""
    locked = versions(everything({extra}))
    asked = [Requirement(line) for line in [*PROJECT["dependencies"], *EXTRAS[extra]]]
    seen: set[str] = set()
    while asked:
        requirement = asked.pop()
        name = canonicalize_name(requirement.name)
        if name == "chunkmill":
            asked += [Requirement(line) for own in requirement.extras for line in EXTRAS[own]]
            continue
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        if (name, *sorted(requirement.extras)) in seen or name == "pip":
            continue
        seen.add((name, *sorted(requirement.extras)))  # type: ignore[arg-type]
        assert name in locked, f"{extra} needs {name}"
        assert requirement.specifier.contains(locked[name], prereleases=True), f"{extra}: {name} {locked[name]}"
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for line in needs:
            need = Requirement(line)
            if need.marker is None or any(need.marker.evaluate({"extra": own}) for own in ("", *requirement.extras)):
                need.marker = None
                asked.append(need)


def test_torch_is_in_one_of_two_builds_and_its_libraries_come_with_the_build_for_cuda_alone() -> None:
    assert versions(choose(LOCK, {"worker"}, {}, torch="cpu")).keys() == {"torch"}
    assert versions(choose(LOCK, {"worker"}, {}, torch="cpu"))["torch"].endswith("+cpu")
    cuda = versions(choose(LOCK, {"worker"}, {}, torch="cuda"))
    assert {"torch", "triton", "nvidia-cublas"} <= cuda.keys()
    assert not [
        name for name in versions(choose(LOCK, {"worker", "dev"}, {})) if re.match("torch$|nvidia|cuda|triton", name)
    ]
    assert choose(LOCK, {"flower"}, {}, torch="cuda") == ""
    light = versions(everything({"documents", "flower", "openai", "metrics", "tracing"}))
    assert not {"torch", "transformers", "scipy"} & light.keys()
    other = choose(LOCK, {"worker"}, {"TORCH_SHA256": "f" * 64}, torch="cpu")
    assert other.endswith(f" \\\n    --hash=sha256:{'f' * 64}\n")


def test_it_runs_as_a_file_without_chunkmill_and_refuses_what_it_does_not_know() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        script = [sys.executable, "-I", str(ROOT / "app/chunkmill/system/locked.py")]
        return subprocess.run([*script, *arguments], capture_output=True, text=True, cwd="/")

    assert versions(run("flower").stdout)["flower"]
    unknown = run("flowers")
    assert (unknown.returncode, unknown.stdout, "no extra 'flowers'" in unknown.stderr) == (2, "", True)
    for wrong in ((), ("--torch", "rocm", "worker"), ("a", "b")):
        assert (run(*wrong).returncode, run(*wrong).stdout) == (2, "")


def test_pip_is_given_nothing_without_a_digest_and_builds_nothing() -> None:
    """In the Makefile, the scripts and the images; the floors are the one exception, which no user runs."""
    makefile = (ROOT / "Makefile").read_text().partition("\nfloors:")[0]
    for line in re.findall(r"\$\((?:PIP|BY_DIGEST)\).*", makefile):
        assert "--require-hashes" in line or line.startswith("$(BY_DIGEST)") or "--no-deps --no-build-isolation" in line
    for name in ("plain.sh", "spot-aws.sh", "spot-gcp.sh"):
        text = (ROOT / "deploy" / name).read_text()
        assert "--require-hashes --no-deps --only-binary :all:" in text
        assert 'install --quiet --no-deps "$wheel"' in text


def test_the_parts_of_a_release_are_listed_with_digests_and_licences() -> None:
    document = bill(LOCK)
    assert json.dumps(document) == json.dumps(bill(LOCK))
    names = {part["name"] for part in document["components"]}
    assert {"celery", "torch", "openai", "nvidia-cublas"} <= names
    assert not names & {"pytest", "ruff", "pip-audit", "ctranslate2"}, "nobody installs these in production"
    assert all(part["hashes"] for part in document["components"])
    stated = [(part["name"], part["licenses"]) for part in document["components"] if "licenses" in part]
    licences = {name: entry[0]["license"]["name"] for name, entry in stated}
    assert "LGPL" in licences["psycopg"]
    assert "BSD" in licences["celery"]
    forbidden = [name for name, text in licences.items() if re.search(r"\bA?GPL|SSPL|Affero", text)]
    assert forbidden == []
