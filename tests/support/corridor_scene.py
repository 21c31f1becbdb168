"""One test's texts on the paid routes, and what must be true when the test is over.

The tests of a module share one server, whose books only grow. A scene therefore compares what was added since it began.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.domain.results import Job
from chunkmill.ledger.provider import provider_work
from chunkmill.poller import paid
from chunkmill.settings import Settings
from tests.openai_server import OpenAIServer, text_hash
from tests.openai_server.config import Config
from tests.support.corridor import Corridor, corridor


class Scene:
    """What one test did on the server. ``hurry`` makes everything that the ledger waits for due at once."""

    def __init__(self, corridor: Corridor, name: str) -> None:
        self.corridor = corridor
        self.server = corridor.server
        self.name = name
        state = self.server.state()
        self._files = {file["id"] for file in state["files"]}
        self._batches = len(state["batches"])
        self._charges = len(self.server.charges())
        self._asked = Counter({request: sum(n.values()) for request, n in state["requests"].items()})

    def text(self, i: int) -> str:
        return f"{self.name} text {i}"

    def texts(self, n: int, *, first: int = 0) -> dict[str, str]:
        return {f"c{i}": self.text(i) for i in range(first, first + n)}

    def enqueue(self, texts: dict[str, str], **more: Any) -> Job:
        given = {"collection": "docs", "route": "openai", **more}
        return self.corridor.client.enqueue(texts.items(), **given)

    def run_until(self, done: Callable[[], object], *, hurry: bool = True) -> None:
        def looked() -> object:
            if hurry:
                self.hurry()
            return done()

        self.corridor.run_until(looked)

    def hurry(self) -> None:
        with self.corridor.db.begin() as conn:
            for table in ("provider_batches", "chunk_batches"):
                conn.execute(sa.text(f"UPDATE {table} SET not_before = now() WHERE not_before > now()"))

    def end_pauses(self) -> None:
        with self.corridor.db.begin() as conn:
            conn.execute(sa.text("UPDATE provider_lanes SET paused_until = now() - interval '1 s'"))

    def finish(self, *jobs: Job, hurry: bool = True) -> list[Job]:
        def ended() -> bool:
            open_left = self.corridor.rows("SELECT FROM provider_batches WHERE state <> 'closed' LIMIT 1")
            return not open_left and all(self.corridor.client.job(job.id).state.is_final for job in jobs)

        self.run_until(ended, hurry=hurry)
        return [self.corridor.client.job(job.id) for job in jobs]

    # The server's books since the scene began

    def batches(self) -> list[dict[str, Any]]:
        batches: list[dict[str, Any]] = self.server.state()["batches"][self._batches :]
        return batches

    def charges(self) -> list[dict[str, Any]]:
        return self.server.charges()[self._charges :]

    def asked(self, endpoint: str) -> int:
        """Return how many requests reached the endpoint, answered or not."""
        return sum(self.server.state()["requests"].get(endpoint, {}).values()) - self._asked[endpoint]

    def bill(self, texts: dict[str, str]) -> dict[str, int]:
        """Return how often the text of each chunk id was charged, without those that were never charged."""
        bill = self.server.bill()
        return {name: bill[text_hash(text)] for name, text in texts.items() if text_hash(text) in bill}

    def check_books(self, *, unanswered_contents: int = 0, unanswered_tokens: int = 0) -> None:
        """Assert that we booked what was charged, except for lost answers, and that nothing is left behind."""
        booked = self.corridor.rows(
            "SELECT coalesce(sum(contents), 0)::int AS contents, coalesce(sum(tokens), 0)::int AS tokens FROM charges"
        )[0]
        charged = self.charges()
        assert booked == {
            "contents": sum(charge["inputs"] for charge in charged) - unanswered_contents,
            "tokens": sum(charge["tokens"] for charge in charged) - unanswered_tokens,
        }
        used = self.corridor.one("SELECT coalesce(sum(tokens), 0)::int FROM usage")
        # Searches and probes belong to no job, and so to no attempt.
        assert used == self.corridor.one("SELECT coalesce(sum(tokens), 0)::int FROM charges WHERE job_id <> 0")
        assert self.corridor.rows("SELECT * FROM provider_inputs") == []
        assert self.corridor.rows("SELECT * FROM provider_questions") == []
        left = [file for file in self.server.state()["files"] if file["id"] not in self._files]
        assert left == []

    def check_done(self, job: Job, texts: dict[str, str], **books: int) -> None:
        """Assert that the job is complete, each content was charged once, and the books agree."""
        assert (job.state, job.error, job.dead) == ("completed", None, 0)
        audit = self.corridor.client.audit("docs")
        assert (audit.missing, audit.pending, audit.dead) == (0, 0, 0)
        self.corridor.check_vectors(texts)
        if not books:
            assert self.bill(texts) == dict.fromkeys(texts, 1)
        self.check_books(**books)

    def attempts(self) -> list[tuple[int, str | None]]:
        """Return how many attempts at all ChunkBatches were charged, and the outcome of each attempt."""
        return [(row["charged"], row["state"]) for row in self.corridor.rows(_CHARGED, most=self._most)]

    @property
    def _most(self) -> int:
        return self.corridor.settings.max_attempts

    def charged_attempts(self) -> int:
        """Return the largest number of attempts that one ChunkBatch was charged.

        A release that costs nothing raises the limit of attempts instead of lowering their number.
        """
        return max(charged for charged, _ in self.attempts())

    def oddities(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for batch in self.corridor.batches():
            counts.update(batch["oddities"])
        return counts


_CHARGED = "SELECT state, attempt - (max_attempts - :most) AS charged FROM chunk_batches ORDER BY id"


@contextmanager
def scene(settings: Settings, server: OpenAIServer, request: pytest.FixtureRequest, **changes: Any) -> Iterator[Scene]:
    """Yield a scene on a server that is as new, except for its books. A request has four inputs at most."""
    server.calm()
    server.settle()
    server.control(**Config().as_json())
    patch = pytest.MonkeyPatch()
    patch.setattr(paid, "SELDOM_SECONDS", 0.0)
    patch.setattr(provider_work, "AGAIN_SECONDS", 0.1)
    try:
        with corridor(settings, server, **{"openai_request_inputs": 4, **changes}) as made:
            yield Scene(made, request.node.name)
    finally:
        patch.undo()
