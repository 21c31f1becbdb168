"""A folder is data: whatever lies in the folder in which a command is started, none of it is run.

The folder has a file for every module of Python, of our dependencies and of ours, which writes down who imported it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from chunkmill.embedded import StackStatus
from chunkmill.models.locate import bundled_folder
from tests.acceptance.conftest import Processes
from tests.conftest import fresh_settings
from tests.support.checkout import CHECKOUT, PYTHONPATH
from tests.support.embedded_homes import folder_for_homes
from tests.support.every_command import END, OWN_PROCESS, Words, commands
from tests.support.waiting import PATIENCE, until

OURS = ("app", "benchmarks", "chunkmill", "workers")
SETTINGS = ("celeryconfig", "flowerconfig", "gunicorn.conf", "sitecustomize", "usercustomize")
TRAP = """
with open({mark!r}, "a") as file:
    file.write("{name}\\n")
raise SystemExit("hijacked by {name}")
"""

SLOW = [("bench",), ("demo",), ("models", "export"), ("tune",)]

VALUES = {"sources": ".", "model": "."}


@dataclass
class Scene:
    """A folder with traps, which is also a model's folder and one of documents, and servers to use it with."""

    folder: Path
    mark: Path
    env: dict[str, str]

    def run(self, arguments: Sequence[str], ready: str | None = None) -> tuple[int | None, str]:
        """The exit code and the output of a command that is started in the folder. It is ended once it is ``ready``."""
        self.mark.write_text("")
        log = self.mark.with_name("log")
        with log.open("wb") as output:
            child = subprocess.Popen(
                [sys.executable, "-P", *arguments], cwd=self.folder, env=self.env,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        try:
            until(lambda: child.poll() is not None or (ready is not None and ready in log.read_text()), log.read_text)
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(PATIENCE)
                child.kill()
                child.wait()
        assert self.mark.read_text().split() == []
        assert "hijacked" not in log.read_text()
        return child.returncode, log.read_text()


@pytest.fixture(scope="module")
def scene(stack: StackStatus, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    bundled = bundled_folder()
    assert bundled is not None
    beside = tmp_path_factory.mktemp("beside")
    folder = beside / "folder"
    folder.mkdir()
    for entry in bundled.iterdir():
        (folder / entry.name).symlink_to(entry)
    (folder / "a.md").write_text("A text.")
    (folder / "texts.jsonl").write_text('{"id": "a", "text": "A text."}\n{"id": "b", "text": "Another text."}\n')
    mark = beside / "mark"
    lay_traps(folder, mark)
    with fresh_settings(stack) as settings, folder_for_homes() as homes:
        env = Processes(settings, beside).env | {
            "EMBEDDING_MODEL": ".",
            "PYTHONPATH": PYTHONPATH,
            "CHUNKMILL_HOME": str(homes / "home"),
            "XDG_CACHE_HOME": str(beside / "cache"),
        }
        yield Scene(folder, mark, env)


@pytest.fixture
def with_our_package(scene: Scene) -> Iterator[None]:
    """A trap in place of `chunkmill_workers` too, which ``celery -A chunkmill_workers`` would fall into."""
    trap = scene.folder / "chunkmill_workers"
    trap.mkdir()
    (trap / "__init__.py").write_text(TRAP.format(mark=str(scene.mark), name="chunkmill_workers"))
    yield
    shutil.rmtree(trap)


def lay_traps(folder: Path, mark: Path) -> None:
    names = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions(), *OURS, *SETTINGS}
    names -= {"chunkmill_workers"}
    for number, name in enumerate(sorted(name for name in names if "/" not in name)):
        file = folder / f"{name}.py"
        if number % 2 and name not in SETTINGS:
            (folder / name).mkdir(exist_ok=True)
            file = folder / name / "__init__.py"
        file.write_text(TRAP.format(mark=str(mark), name=name))


def test_no_command_imports_from_the_folder_in_which_it_is_started(scene: Scene, with_our_package: None) -> None:
    others = [arguments for path, arguments in commands(VALUES) if path not in OWN_PROCESS]
    _, output = scene.run(["-m", "tests.support.every_command", json.dumps(others)])
    codes = re.findall(rf"^{END} (.*): (\w+)$", output, re.MULTILINE)
    assert len(codes) == len(others) > 20
    assert [what for what, code in codes if code == "2"] == [], "they did nothing: give their arguments in GIVEN"


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        pytest.param(path, arguments, id=" ".join(path), marks=[pytest.mark.slow] if path in SLOW else [])
        for path, arguments in commands(VALUES)
        if path in OWN_PROCESS
    ],
)
def test_no_process_of_a_command_imports_from_the_folder(
    scene: Scene, with_our_package: None, path: Words, arguments: list[str]
) -> None:
    code, output = scene.run(["-m", "chunkmill.cli", *arguments], OWN_PROCESS[path])
    assert code in (0, -signal.SIGTERM), output


def test_a_worker_that_celery_finds_imports_nothing_else_from_the_folder(scene: Scene) -> None:
    """Celery's own command looks for `chunkmill_workers` in the current folder first, and that is before our code."""
    celery = ["-m", "celery", "-A", "chunkmill_workers"]
    code, output = scene.run([*celery, "report"])
    assert code == 0, output
    code, output = scene.run([*celery, "worker", "-Q", "gpu"], "ready.")
    assert code == 0, output
    code, output = scene.run([*celery, "flower", "--port=0"], "Connected to")
    assert code == 0, output


def test_alembic_imports_nothing_from_the_folder(scene: Scene, with_our_package: None) -> None:
    code, output = scene.run(["-m", "alembic.config", "-c", str(CHECKOUT / "pyproject.toml"), "current"])
    assert code == 0, output
