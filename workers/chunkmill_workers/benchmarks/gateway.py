"""Short requests over HTTP, beside Infinity's server in the same minutes: one worker, one gateway, the load of wrk.

Both embed with the same precision and prove it first. The load, the gateway, the worker, Postgres and Infinity share
the machine, and whoever is not measured is idle.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
from numpy.typing import NDArray

from chunkmill import Chunk, Client
from chunkmill.cli.start.children import Child
from chunkmill.errors import InvalidInput
from chunkmill.models import resolve_model
from chunkmill.system.python import module_command
from chunkmill_workers.benchmarks.peers import environments
from chunkmill_workers.benchmarks.pipeline import process
from chunkmill_workers.benchmarks.report import Say, document
from chunkmill_workers.benchmarks.servers import Servers, temporary_stack
from chunkmill_workers.benchmarks.stats import PEER, Measurement, Target, add_ratios, cosines, in_turns, promise
from chunkmill_workers.benchmarks.texts import docstrings

US, PEER_NAME = "chunkmill gateway", "infinity"
CALLERS = (1, 8, 32)
LARGE = 256
"""Texts of one request of the caller beside whom a short request is measured."""
JOB_QUERIES_S = 10
"""Queries a second beside a running job."""
START_S = 300.0
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")

_WRK = """
-- Every request has another text, so that no cache answers it.
local words = {"market", "river", "engine", "paper", "light", "winter", "signal", "garden", "vector", "number"}
math.randomseed(%SEED%)
request = function()
  local text = ""
  for i = 1, 8 do text = text .. words[math.random(#words)] .. " " end
  text = text .. math.random(1000000000)
  return wrk.format("POST", nil, nil, '{"model": "%MODEL%", "input": "' .. text .. '"}')
end
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer %KEY%"
done = function(summary, latency)
  io.write(string.format("RESULT %d %d %d %f %f\\n", summary.requests, summary.duration,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status
      + summary.errors.timeout, latency:percentile(50), latency:percentile(99)))
end
"""


@dataclass(slots=True)
class Server:
    """A server that answers ``POST /v1/embeddings`` or ``/embeddings`` at ``url``."""

    name: str
    url: str
    model: str
    key: str = ""
    pids: Sequence[int] = field(default_factory=list)

    def embed(self, texts: Sequence[str], timeout: float = 120.0) -> NDArray[np.float32]:
        body = json.dumps({"model": self.model, "input": list(texts)}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        with urlopen(Request(self.url, body, headers), timeout=timeout) as answer:  # noqa: S310 - http on loopback
            data = json.load(answer)["data"]
        return np.array([item["embedding"] for item in data], np.float32)

    def load(self, callers: int, seconds: float, folder: Path) -> Load:
        """Requests of one short text each, as fast as ``callers`` get answers."""
        script = folder / f"{self.name.split()[0]}.lua"
        filled = _WRK.replace("%MODEL%", self.model).replace("%KEY%", self.key)
        script.write_text(filled.replace("%SEED%", str(random.randrange(10**9))), encoding="utf-8")
        argv = ["wrk", "-t1", f"-c{callers}", f"-d{seconds:.0f}s", "--timeout", "60s", "-s", str(script), self.url]
        said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        result = re.search(r"RESULT (\d+) (\d+) (\d+) ([\d.]+) ([\d.]+)", said)
        if result is None:
            raise InvalidInput(f"wrk said nothing that can be read: {said[-500:]}")
        requests, microseconds, errors = (int(result[i]) for i in (1, 2, 3))
        return Load(requests / (microseconds / 1e6), float(result[4]) / 1e3, float(result[5]) / 1e3, errors, requests)


@dataclass(frozen=True, slots=True)
class Load:
    """What one burst of requests showed. Latencies are in milliseconds."""

    requests_s: float
    p50: float
    p99: float
    errors: int
    requests: int


def run(*, rounds: int, quick: bool, say: Say, model: str) -> dict[str, Any]:
    """The result. Infinity takes part if ``chunkmill bench --install-peers`` made its environment."""
    if shutil.which("wrk") is None:
        raise InvalidInput("the benchmark needs wrk on the PATH. On Debian: apt-get install wrk")
    seconds = 2.0 if quick else 6.0
    with temporary_stack() as servers, servers.client() as client, contextlib.ExitStack() as running:
        running.enter_context(process(servers, "poller", module_command("chunkmill.cli", "poller"), {}))
        one_thread = {"OMP_NUM_THREADS": "1", "EMBEDDING_DTYPE": "fp32"}
        worker_command = module_command("chunkmill_workers", "worker", "-Q", "gpu")
        worker = running.enter_context(process(servers, "worker", worker_command, {"EMBEDDING_DTYPE": "fp32"}))
        say("starting a gateway and its worker")
        ours, gateway = running.enter_context(_gateway(servers, model))
        client.embed(["a first text"], timeout=START_S)
        rivals = [ours]
        if environments.installed("infinity"):
            say("starting Infinity")
            rivals.append(running.enter_context(_infinity(servers, model, one_thread)))
        refused = _gate(rivals)
        measurements = _races(rivals, rounds, seconds, servers.folder, refused, say)
        measurements += _cpu(ours, gateway, seconds, servers.folder)
        measurements += _beside_large(rivals, seconds, refused, say)
        measurements += _beside_job(client, ours, worker, 400 if quick else 2_000, say)
        versions = servers.versions
    return document(
        "gateway",
        measurements,
        settings={
            "model": model,
            "dtype": "float32",
            "load": "wrk with one thread; every request has one text of about 20 tokens that was never asked before",
            "seconds_of_a_burst": seconds,
            "infinity": "engine torch, OMP_NUM_THREADS=1, without BetterTransformer: its fastest setting here",
        },
        versions=versions,
    )


def _gate(rivals: Sequence[Server]) -> dict[str, str | None]:
    """Why a rival's speed does not count; None if its vectors are those of the first."""
    texts = docstrings(16)
    reference = rivals[0].embed(texts)
    refusals = {}
    for rival in rivals:
        similarities = cosines(rival.embed(texts), reference)
        refusals[rival.name] = PEER.refusal(float(similarities.min()), float(similarities.mean()))
    return refusals


def _races(
    rivals: Sequence[Server], rounds: int, seconds: float, folder: Path, refused: Mapping[str, str | None], say: Say
) -> list[Measurement]:
    measurements = []
    for callers in CALLERS:
        loads: dict[str, list[Load]] = {rival.name: [] for rival in rivals}

        def measure(rival: Server, callers: int = callers, loads: dict[str, list[Load]] = loads) -> float:
            burst = rival.load(callers, seconds, folder)
            if burst.errors:
                raise InvalidInput(f"{rival.name} failed {burst.errors} of {burst.requests} requests.")
            loads[rival.name].append(burst)
            return burst.requests_s

        for rival in rivals:
            rival.load(callers, 1, folder)
        rates = in_turns({rival.name: (lambda rival=rival: measure(rival)) for rival in rivals}, rounds, say)
        group = f"{callers} {'caller' if callers == 1 else 'callers'}, one short text a request"
        rows = [
            Measurement(group, rival.name, "requests/s", rates[rival.name], refused=refused[rival.name])
            for rival in rivals
        ]
        add_ratios(rows, PEER_NAME, targets={US: Target(2.0)} if callers > 1 else None)
        measurements += rows
        for word, target in (("p50", 12.0), ("p99", 20.0)):
            rows = [
                Measurement(
                    f"{group}: {word}",
                    rival.name,
                    "ms",
                    [getattr(burst, word) for burst in loads[rival.name]],
                    refused=refused[rival.name],
                    target=Target(target, at_most=True) if callers == 1 and rival.name == US else None,
                )
                for rival in rivals
            ]
            add_ratios(rows, PEER_NAME, targets={US: Target(1.0, at_most=True)})
            measurements += rows
    return measurements


def _cpu(ours: Server, gateway: Child, seconds: float, folder: Path) -> list[Measurement]:
    """The gateway's own processor time for a request: HTTP, key, JSON and the way to the worker."""
    before = _cpu_seconds(gateway.pid)
    burst = ours.load(32, seconds, folder)
    spent = 1e3 * (_cpu_seconds(gateway.pid) - before) / burst.requests
    group = "32 callers: processor time of a request"
    return [Measurement(group, "the gateway's process", "ms", [spent], target=Target(0.3, at_most=True))]


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def _beside_large(
    rivals: Sequence[Server], seconds: float, refused: Mapping[str, str | None], say: Say
) -> list[Measurement]:
    """One short text at a time, while another caller sends requests of many texts."""
    measurements = []
    for rival in rivals:
        say(f"a short request beside one of {LARGE} texts: {rival.name}")
        stop, sent = threading.Event(), [0]

        def send(rival: Server = rival, stop: threading.Event = stop, sent: list[int] = sent) -> None:
            number = 0
            while not stop.is_set():
                number += 1
                rival.embed([f"{number} {text}" for text in docstrings(LARGE)], timeout=600)
                sent[0] += 1

        thread = threading.Thread(target=send)
        thread.start()
        try:
            time.sleep(1)
            latencies = _ask_for(rival, 3 * seconds, pause=0.05)
        finally:
            stop.set()
            thread.join()
        measurements.append(
            Measurement(
                f"a short request beside a caller with {LARGE} texts: p99",
                rival.name,
                "ms",
                [float(np.quantile(latencies, 0.99))],
                refused=refused[rival.name],
                target=Target(250, at_most=True) if rival.name == US else None,
                details={"p50": float(np.median(latencies)), "requests": len(latencies), "large_requests": sent[0]},
            )
        )
    return measurements


def _ask_for(server: Server, seconds: float, *, pause: float) -> list[float]:
    """Milliseconds of each of the requests of a caller who asks one short text after the other."""
    end, taken = time.monotonic() + seconds, []
    while time.monotonic() < end:
        began = time.perf_counter()
        server.embed([f"what is the answer to question {random.randrange(10**9)}"])
        taken.append(1e3 * (time.perf_counter() - began))
        time.sleep(pause)
    return taken


def _beside_job(client: Client, ours: Server, worker: Child, count: int, say: Say) -> list[Measurement]:
    """Queries beside a running job, and what they cost the job: alone, with queries, alone."""
    rates, latencies = {"alone": [], "with queries": []}, []  # type: ignore[var-annotated]
    for number, way in enumerate(("alone", "with queries", "alone", "with queries")):
        say(f"a job {way}")
        chunks = [Chunk(str(i), f"{number} {text}") for i, text in enumerate(docstrings(count))]
        began = time.perf_counter()
        job = client.enqueue(chunks, collection=f"beside {number}")
        stop = threading.Event()

        def ask(way: str = way, stop: threading.Event = stop) -> None:
            while way == "with queries" and not stop.is_set():
                began = time.perf_counter()
                ours.embed([f"what is the answer to question {random.randrange(10**9)}"])
                took = time.perf_counter() - began
                latencies.append(1e3 * took)
                stop.wait(max(0.0, 1 / JOB_QUERIES_S - took))

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            client.wait(job.id, timeout=3600, on_progress=lambda _: worker.require_alive())
            rates[way].append(len(chunks) / (time.perf_counter() - began))
        finally:
            stop.set()
            thread.join()
    ratio = [queried / alone for queried, alone in zip(rates["with queries"], rates["alone"], strict=True)]
    kept = Measurement("a job beside ten queries a second", "alone", "chunks/s", rates["alone"])
    beside = Measurement("a job beside ten queries a second", "with queries", "chunks/s", rates["with queries"])
    beside.ratios["to alone"] = {
        "median": float(np.median(ratio)),
        "min": min(ratio),
        "max": max(ratio),
        "rounds": ratio,
        **promise(Target(0.9), float(np.median(ratio))),
    }
    p99 = Measurement(
        "a query beside a running job: p99",
        US,
        "ms",
        [float(np.quantile(latencies, 0.99))],
        target=Target(200, at_most=True),
        details={"p50": float(np.median(latencies)), "queries": len(latencies)},
    )
    return [kept, beside, p99]


@contextlib.contextmanager
def _gateway(servers: Servers, model: str) -> Iterator[tuple[Server, Child]]:
    port = _free_port()
    env = os.environ | servers.env
    made = subprocess.run(
        module_command("chunkmill.cli", "keys", "create", "benchmark", "--scope", "embed", "--json"),
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    key = json.loads(made)["key"]
    command = module_command("chunkmill.cli", "gateway", "--port", str(port))
    with process(servers, "gateway", command, {}) as child:
        server = Server(US, f"http://127.0.0.1:{port}/v1/embeddings", model, key)
        _await_port(port, child)
        yield server, child


@contextlib.contextmanager
def _infinity(servers: Servers, model: str, env: Mapping[str, str]) -> Iterator[Server]:
    port, folder = _free_port(), resolve_model(model).path
    argv = [
        str(environments.python_of("infinity").with_name("infinity_emb")), "v2", "--model-id", str(folder),
        "--served-model-name", model, "--engine", "torch", "--device", "cpu", "--dtype", "float32",
        "--no-bettertransformer", "--no-model-warmup", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    with process(servers, "infinity", argv, environments.variables(1, own=True) | dict(env)) as child:
        _await_port(port, child)
        yield Server(PEER_NAME, f"http://127.0.0.1:{port}/embeddings", model)


def _await_port(port: int, child: Child) -> None:
    end = time.monotonic() + START_S
    while True:
        child.require_alive()
        try:
            with urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (URLError, OSError):
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
