"""The work that the faults strike: one large job, and smaller ones behind it so that it never runs out too early."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from random import Random

from chunkmill import Chunk, Client
from chunkmill.cli.start.corpus import stdlib_docstrings
from chunkmill.errors import ChunkmillError
from tests.support.waiting import PATIENCE

COLLECTION = "chaos"
ENQUEUE_SECONDS = PATIENCE

WORDS = ("lease", "ledger", "attempt", "doorbell", "vector", "chunk", "worker", "poller", "commit", "token", "job")


def made_up_texts(seed: int) -> Iterator[str]:
    """Short texts without end; every fiftieth comes twice, as texts do."""
    random = Random(f"texts of {seed}")
    for number in itertools.count():
        text = f"{number}: {' '.join(random.choices(WORDS, k=12))}"
        yield text
        if number % 50 == 49:
            yield text


def docstrings(seed: int) -> Iterator[str]:
    """Docstrings of the standard library from a place that the seed chooses, again and again with a number before."""
    texts = [chunk.text for chunk in stdlib_docstrings()]
    first = Random(seed).randrange(len(texts))
    for number in itertools.count():
        round_, text = number // len(texts), texts[(first + number) % len(texts)]
        yield f"({round_}) {text}" if round_ else text


class Work:
    """Enqueues, and remembers what must be there in the end."""

    def __init__(self, client: Client, texts: Iterator[str], *, reserve: int, refill: int, name: str) -> None:
        self.expected: dict[str, str] = {}
        """Chunk id → text."""
        self.contents: set[str] = set()
        self.jobs: list[int] = []
        self.enqueues_repeated = 0
        self._client = client
        self._texts = texts
        self._reserve = reserve
        self._refill = refill
        self._name = name

    def add(self, chunks: int) -> None:
        """One job more. An enqueue that a fault cuts off is made again under its key, as a producer would."""
        texts = list(itertools.islice(self._texts, chunks))
        first = len(self.expected)
        made = [Chunk(f"c{first + i}", text) for i, text in enumerate(texts)]
        key = f"{self._name}-{len(self.jobs)}"
        deadline = time.monotonic() + ENQUEUE_SECONDS
        while True:
            try:
                job = self._client.enqueue(made, collection=COLLECTION, idempotency_key=key)
                break
            except ChunkmillError as error:
                if not error.retryable or time.monotonic() > deadline:
                    raise
                self.enqueues_repeated += 1
                time.sleep(0.2)
        self.jobs.append(job.id)
        self.expected |= {chunk.id: chunk.text for chunk in made}
        self.contents |= set(texts)

    def left(self, vectors: int) -> int:
        return len(self.contents) - vectors

    def is_low(self, vectors: int) -> bool:
        return self.left(vectors) < self._reserve

    def refill(self) -> None:
        self.add(self._refill)


class Feeder(threading.Thread):
    """Adds a job when it is asked to and little is left. A thread of its own: with a server away, enqueueing waits."""

    def __init__(self, work: Work, vectors: Callable[[], int]) -> None:
        super().__init__(name="feeder", daemon=True)
        self.problem: str | None = None
        self._work = work
        self._vectors = vectors
        self._asked = threading.Event()
        self._ended = False

    def ask(self) -> None:
        self._asked.set()

    def wait(self, timeout: float) -> None:
        """Until enough is left, or not: a strike need not wait for a server that is away."""
        deadline = time.monotonic() + timeout
        self.ask()
        while self._work.is_low(self._vectors()) and time.monotonic() < deadline:
            time.sleep(0.02)

    def end(self) -> None:
        self._ended = True
        self.ask()
        self.join(PATIENCE)

    def run(self) -> None:
        while not self._ended:
            self._asked.wait()
            self._asked.clear()
            if not self._ended and self._work.is_low(self._vectors()):
                try:
                    self._work.refill()
                except Exception as error:  # noqa: BLE001 - the run ends with it as a broken promise
                    self.problem = f"enqueueing failed: {type(error).__name__}: {error}"
                    return
