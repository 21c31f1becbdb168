"""The paid routes against a server that others wrote: aimock, with its outcomes and its chaos.

``make aimock`` installs it and runs these. Its batches answer every request with the vector [0, 0, 0], which we take
for no vector at all (first test). So that a batch can end well, `Mocked` reads other numbers in their place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from chunkmill.db.connect import create_db
from chunkmill.domain.results import Job
from chunkmill.domain.states import JobState
from chunkmill.openai.http import Provider
from chunkmill.openai.wire.answers import LengthLimits
from chunkmill.openai.wire.status import RemoteBatch
from chunkmill.settings import Settings
from chunkmill_workers.provider.context import ProviderContext
from tests.support.corridor import QUICK, Corridor
from tests.support.waiting import PATIENCE, until

AIMOCK = Path(__file__).parents[2] / ".aimock/node_modules/@copilotkit/aimock/dist/cli.js"
NODE = shutil.which("node")
KEY = "sk-aimock-0123456789abcdef"
ZERO, OTHER = b'"embedding":[0,0,0]', b'"embedding":[0,3,4]'

pytestmark = [
    pytest.mark.aimock,
    pytest.mark.skipif(NODE is None or not AIMOCK.exists(), reason="no Node or no aimock: make aimock"),
]


class Aimock:
    """A process of it, with chaos as its command line gives it."""

    key = KEY

    def __init__(self, folder: Path, **chaos: float) -> None:
        fixtures = folder / "fixtures.json"
        fixtures.write_text(json.dumps({"fixtures": []}))
        assert NODE
        flags = [word for name, rate in chaos.items() for word in (f"--chaos-{name}", str(rate))]
        log = folder / "aimock.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [NODE, str(AIMOCK), "--port", "0", "--fixtures", str(fixtures), "--log-level", "info", *flags],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        until(lambda: "listening on" in log.read_text() or self._process.poll() is not None, log.read_text)
        match = re.search(r"listening on (http://\S+)", log.read_text())
        assert match, log.read_text()
        self.url = f"{match[1]}/v1"

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)


class Mocked(Provider):
    """Ours, told how its next batches are to end, and reading numbers where aimock has zeros."""

    def __init__(self, settings: Settings, outcomes: list[str], *, zeros: bool) -> None:
        super().__init__(settings)
        self._plain = self._client
        self._outcomes = outcomes
        self._zeros = zeros

    def create(self, input_file_id: str, token: str) -> RemoteBatch:
        outcome = self._outcomes[0] if self._outcomes else "completed"
        self._client = self._plain.with_options(default_headers={"X-AIMock-Batch-Outcome": outcome})
        try:
            made = super().create(input_file_id, token)
        finally:
            self._client = self._plain
        del self._outcomes[:1]
        return made

    @contextmanager
    def lines(self, file_id: str, longest: LengthLimits) -> Iterator[Iterator[bytes]]:
        with super().lines(file_id, longest) as lines:
            yield lines if self._zeros else (line.replace(ZERO, OTHER) for line in lines)


class Mill(Corridor):
    """In which no time passes: whatever waits, for a backoff or a pause, is due at each turn."""

    def __init__(self, settings: Settings, server: Aimock, outcomes: list[str], *, zeros: bool) -> None:
        self._outcomes, self._zeros = outcomes, zeros
        super().__init__(settings, server)  # type: ignore[arg-type]

    def worker(self) -> ProviderContext:
        url = self.settings.require_database_url()
        provider = Mocked(self.settings, self._outcomes, zeros=self._zeros)
        context = ProviderContext(self.settings, create_db(url, role="w"), provider)
        context.leases.start()
        context.steps.start()
        return context

    def turn(self) -> None:
        with self.db.begin() as conn:
            for table, column in (
                ("provider_batches", "not_before"),
                ("chunk_batches", "not_before"),
                ("provider_lanes", "paused_until"),
            ):
                conn.exec_driver_sql(f"UPDATE {table} SET {column} = now() WHERE {column} > now()")
        super().turn()


Start = Callable[..., Mill]


@pytest.fixture
def start(settings: Settings, tmp_path: Path) -> Iterator[Start]:
    """``start(outcomes=[...], drop=0.2, ...)``: aimock and our corridor to it."""
    with contextlib.ExitStack() as stack:

        def made(outcomes: Sequence[str] = (), *, zeros: bool = False, request_inputs: int = 1, **chaos: float) -> Mill:
            server = Aimock(tmp_path, **chaos)
            stack.callback(server.stop)
            given = {name: getattr(settings, name) for name in settings.model_fields_set}
            own = {
                "embedding_dimensions": 3,
                "openai_request_inputs": request_inputs,
                "openai_adopt_seconds": 0.2,
                "openai_api_key": server.key,
                "openai_base_url": server.url,
                "chunk_batch_size": 20,
            }
            mill = Mill(Settings.from_env(**{**given, **QUICK, **own}), server, list(outcomes), zeros=zeros)
            stack.callback(mill.close)
            return mill

        yield made


@pytest.fixture(autouse=True)
def no_traceback(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever the server does, it is expected: no log has a traceback, and none has the key."""
    caplog.set_level(logging.INFO)
    yield
    assert [record for record in caplog.get_records("call") if record.exc_info] == []
    assert KEY not in caplog.text


def complete(mill: Mill, job: Job, n: int) -> None:
    """Every chunk has a vector, every content a charge, and nothing is left in flight or open."""
    assert (job.state, job.embedded, job.dead) == (JobState.COMPLETED, n, 0)
    assert mill.client.audit("docs").complete
    assert len(mill.client.vectors("docs")) == n
    assert mill.rows("SELECT * FROM provider_inputs") == []
    assert mill.one("SELECT sum(contents) FROM charges") == n


def test_its_zero_vector_is_no_vector(start: Start) -> None:
    mill = start(zeros=True)
    job = mill.enqueue(30)
    (job,) = mill.finish(job)
    assert (job.embedded, job.dead) == (0, 30)
    assert mill.one("SELECT count(*) FROM vectors_1") == 0
    assert {row["code"] for row in mill.rows("SELECT DISTINCT code FROM dead_chunks")} == {"bad_vector"}


def test_a_job(start: Start) -> None:
    mill = start()
    job = mill.enqueue(120)
    (job,) = mill.finish(job)
    complete(mill, job, 120)
    for vector in mill.client.vectors("docs").values():
        np.testing.assert_allclose(vector, [0, 0.6, 0.8], atol=1e-6)


@pytest.mark.parametrize("outcome", ["expired", "failed", "cancelled"])
def test_an_ending_that_is_none(start: Start, outcome: str) -> None:
    """The first batch ends so, and brings nothing; the work is sent again, and the job is complete."""
    mill = start([outcome])
    job = mill.enqueue(50)
    (job,) = mill.finish(job)
    complete(mill, job, 50)
    assert [batch["provider_status"] for batch in mill.batches()] == [outcome, "completed"]


@pytest.mark.parametrize(
    "chaos",
    [{"drop": 0.3}, {"malformed": 0.3}, {"disconnect": 0.3}, {"ratelimit": 0.3},
     {"drop": 0.1, "malformed": 0.1, "disconnect": 0.1, "ratelimit": 0.1}],
    ids="+".join,
)  # fmt: skip
def test_chaos(start: Start, chaos: dict[str, float]) -> None:
    """A share of all answers is a 500, no JSON, a cut connection or a 429: the job is complete, and paid once."""
    mill = start(["expired"], **chaos)
    job = mill.enqueue(60)
    (job,) = mill.finish(job)
    complete(mill, job, 60)


@pytest.mark.parametrize("chaos", [{}, {"drop": 0.2, "disconnect": 0.2, "ratelimit": 0.2, "malformed": 0.2}], ids=str)
def test_plain_requests(start: Start, chaos: dict[str, float]) -> None:
    """aimock's own vectors of each text, which it makes of the text's SHA-256."""
    mill = start(request_inputs=128, **chaos)
    job = mill.enqueue(60, route="openai-sync")
    (job,) = mill.finish(job)
    complete(mill, job, 60)
    for chunk_id, vector in mill.client.vectors("docs").items():
        digest = hashlib.sha256(chunk_id.replace("chunk-", "text ").encode()).digest()
        made = np.frombuffer(digest[:3], np.uint8) / 127.5 - 1
        np.testing.assert_allclose(vector, made / np.linalg.norm(made), atol=1e-6)
