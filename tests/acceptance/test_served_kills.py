"""Gateways, workers, pollers and Postgres are killed while files come and go: no half file is listed, and no batch is
lost or doubled."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import numpy as np
import openai
import pytest
import sqlalchemy as sa

from chunkmill.db.connect import create_db, migrate
from chunkmill.embedded import Stack
from chunkmill.settings import Settings
from tests.support import served_process
from tests.support.embedded_homes import folder_for_homes
from tests.support.gateways import KEY, vector_of
from tests.support.served import ended, jsonl, line
from tests.support.waiting import PATIENCE, until

SEEDS = range(20)
QUICK = {"chunk_batch_size": 32, "enqueue_window": 64, "poll_interval": 0.05, "lease_seconds": 3.0}

T = TypeVar("T")


class World:
    """A gateway, a worker and a poller as processes, each of which can be killed and comes back."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._given = {"database_url": settings.require_database_url(), "redis_url": settings.require_redis_url()}
        self._log = folder / "log"
        self.db = create_db(settings.require_database_url(), role="test")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.running: dict[str, BaseProcess] = {}
        for what in ("gateway", "worker", "poller"):
            self.start(what)
        self.api = openai.OpenAI(
            api_key=KEY, base_url=f"http://127.0.0.1:{self.port}/v1", max_retries=0, timeout=PATIENCE
        )
        self.wait()

    def start(self, what: str) -> None:
        self.running[what] = served_process.start(what, self._given | QUICK, self.port, self._log)

    def stop(self, what: str) -> None:
        """SIGKILL."""
        self.running[what].kill()
        self.running[what].join(PATIENCE)

    def kill(self, what: str) -> None:
        """SIGKILL, and start another."""
        self.stop(what)
        self.start(what)

    def output(self) -> str:
        return self._log.read_text()[-5000:]

    def use_usual_gateway(self) -> None:
        """Replace the gateway by one whose steps are of the usual size."""
        self.stop("gateway")
        self.running["gateway"] = served_process.start("usual gateway", self._given, self.port, self._log)
        self.wait()

    def wait(self) -> None:
        def answers() -> bool:
            assert self.running["gateway"].is_alive(), self.output()
            try:
                return httpx2.get(f"http://127.0.0.1:{self.port}/live", trust_env=False).status_code == 200
            except httpx2.TransportError:
                return False

        until(answers, self.output)

    def rows(self, query: str) -> list[Any]:
        with self.db.begin() as conn:
            return list(conn.execute(sa.text(query)).all())

    def patiently(self, call: Callable[[], T]) -> T:
        """What the call returns once nothing is away."""
        given: list[T] = []

        def try_it() -> bool:
            try:
                given.append(call())
            except (openai.APIConnectionError, openai.InternalServerError, httpx2.TransportError):
                time.sleep(0.02)
                return False
            return True

        until(try_it, self.output)
        return given[0]

    def upload(self, content: bytes) -> str:
        return self.patiently(lambda: self.api.files.create(file=("a.jsonl", content), purpose="batch")).id

    def create(self, file_id: str, key: str) -> str:
        """Create a batch under a key, so that a request whose answer was lost may be sent again."""
        return self.patiently(
            lambda: self.api.batches.create(
                input_file_id=file_id,
                endpoint="/v1/embeddings",
                completion_window="24h",
                extra_headers={"idempotency-key": key},
            )
        ).id

    def check(self, batch: Any, texts: dict[str, str]) -> None:
        """The batch is complete, and its output has each line once, with the vector of its text."""
        n = len(texts)
        assert batch.status == "completed", batch
        assert batch.request_counts.to_dict() == {"total": n, "completed": n, "failed": 0}
        content = self.patiently(lambda: self.api.files.content(batch.output_file_id).content)
        read = [json.loads(text) for text in content.splitlines()]
        assert sorted(line["custom_id"] for line in read) == sorted(texts)
        for result in read:
            vector = result["response"]["body"]["data"][0]["embedding"]
            np.testing.assert_allclose(vector, vector_of(texts[result["custom_id"]], "document", 384), atol=1e-6)

    def check_ledger(self, *, n_batches: int, uploaded: set[bytes]) -> None:
        """No batch is lost or doubled, and each listed file is one that was uploaded, to the last byte."""
        assert self.rows("SELECT count(*) FROM served_batches") == [(n_batches,)]
        assert self.rows("SELECT count(*), count(DISTINCT idempotency_key) FROM jobs") == [(n_batches, n_batches)]
        assert self.rows(
            "SELECT kind, count(*) FROM served_files WHERE kind <> 'input' GROUP BY kind ORDER BY kind"
        ) == [("error", n_batches), ("output", n_batches)]
        listed = list(self.api.files.list(purpose="batch"))
        for file in listed:
            content = self.api.files.content(file.id).content
            assert (content in uploaded, len(content)) == (True, file.bytes)

    def close(self) -> None:
        self.api.close()
        for what in self.running:
            self.stop(what)
        self.db.dispose()


@pytest.fixture
def world(settings: Settings, tmp_path: Path) -> Iterator[World]:
    made = World(settings, tmp_path)
    yield made
    made.close()


def input_of(name: str, n: int) -> tuple[dict[str, str], bytes]:
    texts = {f"{name}-{i}": f"text {i} of {name} " + "word " * 12 for i in range(n)}
    return texts, b"".join(jsonl(line(custom_id, text)) for custom_id, text in texts.items())


def test_a_gateway_killed_in_an_upload_a_validation_an_end_and_a_download_loses_and_doubles_nothing(
    world: World,
) -> None:
    texts, content = input_of("a", 400)
    # In an upload: two pieces are there, and the file is not listed, now or later.
    head = (
        f"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        "content-type: multipart/form-data; boundary=b\r\ncontent-length: 900000\r\n\r\n"
        '--b\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    )
    with socket.create_connection(("127.0.0.1", world.port), timeout=PATIENCE) as connection:
        connection.sendall(head.encode() + content[:40_000])
        until(lambda: world.rows("SELECT count(*) FROM served_file_pieces") == [(2,)])
        world.kill("gateway")
    world.wait()
    assert list(world.api.files.list()) == []
    # In a validation, after some of the lines were written.
    file_id = world.upload(content)
    made = world.create(file_id, "the key")
    until(lambda: world.rows("SELECT FROM served_batch_lines WHERE line = 50"))
    world.kill("gateway")
    assert world.create(file_id, "the key") == made
    # In its enqueue, after some of the windows.
    until(lambda: world.rows("SELECT FROM jobs WHERE n_chunks >= 100"))
    world.kill("gateway")
    # While it judges the lines.
    until(lambda: world.rows("SELECT FROM served_batch_lines WHERE status = 200"), pause=0.005)
    world.kill("gateway")
    batch = world.patiently(lambda: ended(world.api, made))
    # In a download: what came is not all, and the client notices.
    address = f"http://127.0.0.1:{world.port}/v1/files/{batch.output_file_id}/content"
    with (
        httpx2.stream("GET", address, headers={"authorization": f"Bearer {KEY}"}, trust_env=False) as answer,
        pytest.raises(httpx2.TransportError),
    ):
        for _ in answer.iter_raw():
            world.stop("gateway")
    world.start("gateway")
    world.wait()
    world.check(batch, texts)
    world.check_ledger(n_batches=1, uploaded={content})


def test_a_batch_whose_worker_is_killed_completes_although_no_poller_runs(world: World) -> None:
    world.stop("poller")
    world.stop("worker")
    texts, content = input_of("a", 100)
    made = world.create(world.upload(content), "the key")
    world.running["worker"] = served_process.start("stuck worker", world._given | QUICK, world.port, world._log)
    until(lambda: world.rows("SELECT FROM chunk_batches WHERE state = 'running'"), world.output)
    world.kill("worker")
    world.check(world.patiently(lambda: ended(world.api, made)), texts)
    assert world.rows("SELECT max(deaths) FROM chunk_batches") == [(1,)]


@pytest.fixture
def own(settings: Settings, tmp_path: Path) -> Iterator[tuple[World, Stack]]:
    """A world with servers of its own, which may be killed too."""
    with folder_for_homes("cm-") as home:
        stack = Stack(home, fsync=False)
        status = stack.up()
        migrate(status.database_url)
        made = World(
            Settings.from_env(
                database_url=sa.make_url(status.database_url).render_as_string(hide_password=False),
                redis_url=status.redis_url,
            ),
            tmp_path,
        )
        yield made, stack
        made.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_is_killed_no_batch_is_lost_or_doubled_and_no_half_file_is_listed(
    own: tuple[World, Stack], seed: int
) -> None:
    world, stack = own
    chance = random.Random(seed)
    inputs = [input_of(f"s{seed}-{n}", chance.randint(50, 400)) for n in range(6)]
    batches: dict[int, str] = {}
    over = threading.Event()

    def submit(n: int) -> None:
        batches[n] = world.create(world.upload(inputs[n][1]), f"key {n}")

    def ruin() -> None:
        while not over.wait(chance.uniform(0.2, 2.0)):
            what = chance.choice(("gateway", "gateway", "gateway", "worker", "poller", "postgres"))
            if what == "postgres":
                pid = int((stack.home / "postgres" / "data" / "postmaster.pid").read_text().split()[0])
                os.kill(pid, signal.SIGQUIT)
                until(lambda: not stack.status().postgres.running)
                stack.up()
            else:
                world.kill(what)

    ruins = threading.Thread(target=ruin)
    ruins.start()
    try:
        callers = [threading.Thread(target=submit, args=(n,)) for n in range(len(inputs))]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(PATIENCE)
        assert len(batches) == len(inputs)
        time.sleep(chance.uniform(0.0, 3.0))
    finally:
        over.set()
        ruins.join(PATIENCE)
    world.patiently(lambda: world.api.batches.list())
    for n, batch_id in batches.items():
        world.check(world.patiently(lambda batch_id=batch_id: ended(world.api, batch_id)), inputs[n][0])  # type: ignore[misc]
    world.check_ledger(n_batches=len(inputs), uploaded={content for _, content in inputs})


def most_memory(process: BaseProcess) -> int:
    """The most megabytes that a process has ever had in memory (Linux only)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


LARGE_LINES = 50_000


def large_file(folder: Path) -> Path:
    """As large a file as a gateway takes."""
    path, filler = folder / "large.jsonl", "word " * 750
    with path.open("wb") as file:
        for n in range(LARGE_LINES):
            file.write(jsonl(line(f"line {n}", f"text {n} {filler}")))
    assert 190_000_000 < path.stat().st_size < 200_000_000
    return path


@pytest.mark.slow
def test_a_file_of_200_megabytes_goes_in_and_out_of_a_gateway_in_constant_memory(world: World, tmp_path: Path) -> None:
    world.use_usual_gateway()
    path = large_file(tmp_path)
    size = path.stat().st_size
    before = most_memory(world.running["gateway"])
    with path.open("rb") as file:
        uploaded = world.api.files.create(file=file, purpose="batch")
    with world.api.files.with_streaming_response.content(uploaded.id) as answer:
        n_bytes = sum(map(len, answer.iter_bytes()))
    assert (uploaded.bytes, n_bytes) == (size, size)
    assert most_memory(world.running["gateway"]) - before < 64


@pytest.mark.slow
def test_a_batch_of_50_000_lines_and_200_megabytes_goes_to_its_end_in_constant_memory(
    world: World, tmp_path: Path
) -> None:
    world.use_usual_gateway()
    path = large_file(tmp_path)
    before = most_memory(world.running["gateway"])
    with path.open("rb") as file:
        uploaded = world.api.files.create(file=file, purpose="batch")
    batch = ended(world.api, world.create(uploaded.id, "the key"))
    assert batch.status == "completed"
    assert batch.request_counts.to_dict() == {"total": LARGE_LINES, "completed": LARGE_LINES, "failed": 0}
    n_bytes, names = 0, []
    address = f"http://127.0.0.1:{world.port}/v1/files/{batch.output_file_id}/content"
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx2.stream("GET", address, headers=headers, trust_env=False, timeout=PATIENCE) as answer:
        for text in answer.iter_lines():
            n_bytes += len(text) + 1
            names.append(text[: text.index('"response"')].partition('"custom_id"')[2].split('"')[1])
    assert names == [f"line {n}" for n in range(LARGE_LINES)]
    assert n_bytes == world.api.files.retrieve(batch.output_file_id).bytes
    grown = most_memory(world.running["gateway"]) - before
    print(f"the gateway grew by {grown} MB; the output has {n_bytes:,} bytes")
    assert grown < 128
