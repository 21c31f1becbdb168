"""This side of a peer's process: start it, give it commands, stop it."""

from __future__ import annotations

import contextlib
import json
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from chunkmill_workers.benchmarks.peers import Peer, Setting
from chunkmill_workers.benchmarks.peers.environments import EXTRA, INSTALL, python_of, variables
from chunkmill_workers.benchmarks.peers.model import Model

ANSWER_SECONDS = 1_800
"""A peer that gives no answer for this long counts as hung. The slowest pass of a full run takes about a minute."""
STOP_SECONDS = 10
TAIL_LINES = 15

# Runs chunkmill_workers.benchmarks.peers.serve from this package's folder alone: with its parent on the path, an
# installed package would lend its site-packages to an environment that has its own.
_BOOTSTRAP = """
import importlib.util, runpy, sys
folder = sys.argv.pop(1)
file = folder + "/__init__.py"
spec = importlib.util.spec_from_file_location("chunkmill_workers", file, submodule_search_locations=[folder])
sys.modules["chunkmill_workers"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["chunkmill_workers"])
runpy.run_module("chunkmill_workers.benchmarks.peers.serve", run_name="__main__", alter_sys=True)
"""


class PeerError(Exception):
    """A peer broke, or, if ``unavailable``, cannot run on this machine.

    ``install`` is the command that may install what it needs, and ``log`` the end of the peer's output. The reason goes
    into the results, so it has names of files without their folders.
    """

    def __init__(
        self, reason: str, *, install: str | None = None, unavailable: bool = False, log: Sequence[str] = ()
    ) -> None:
        super().__init__(re.sub(r"""(?<![\w./])/(?:[^\s/:,()'"]+/)+""", ".../", reason))
        self.install = install
        self.unavailable = unavailable
        self.log = log


class PeerProcess:
    """A peer's process, loaded with one setting, after its first vector; its log is beside the others in ``logs``."""

    def __init__(self, peer: Peer, model: Model, setting: Setting, *, threads: int, device: str, logs: Path) -> None:
        self.peer = peer
        self._log = logs / f"{peer.name.replace(' ', '-')}.log"
        python = str(python_of(peer.environment)) if peer.environment else sys.executable
        began = time.perf_counter()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [python, "-P", "-c", _BOOTSTRAP, str(Path(__file__).parents[2])],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8",
                env=variables(threads, own=peer.environment is not None), start_new_session=True,
            )  # fmt: skip
        try:
            self._send(
                {
                    "adapter": peer.adapter, "options": dict(peer.options), "packages": peer.packages,
                    "model": asdict(model), "setting": dict(setting), "threads": threads, "device": device,
                }
            )  # fmt: skip
            self._receive()
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.perf_counter() - began
        """From the start of the process to its first vector."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def ask(self, do: str, **command: Any) -> dict[str, Any]:
        """One command of :class:`chunkmill_workers.benchmarks.peers.serve.Server`; Raises PeerError."""
        self._send({"do": do, **command})
        return self._receive()

    def stop(self) -> None:
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # the end of its commands ends it
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def tail(self) -> list[str]:
        """The end of its log."""
        return self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]

    def _send(self, command: dict[str, Any]) -> None:
        assert self._process.stdin
        try:
            print(json.dumps(command), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._ended() from None

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_SECONDS)
        if not ready:
            self._process.kill()
            raise PeerError(f"it said nothing for {ANSWER_SECONDS} s", log=self.tail())
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "unavailable" in answer:
            missing = answer["unavailable"].startswith("No module named")
            install = INSTALL if self.peer.environment else EXTRA
            raise PeerError(answer["unavailable"], install=install if missing else None, unavailable=True)
        if "error" in answer:
            raise PeerError(answer["error"], log=self.tail())
        return answer

    def _ended(self) -> PeerError:
        return PeerError(f"its process ended with exit code {self._process.wait()}", log=self.tail())
