"""A commit whose answer was lost is run again, whatever it does: nothing is counted, charged or written twice.

Each story runs once undisturbed and once with lost answers: the first two transactions of each name that it is about
are committed twice. Jobs, vectors, books and charges must come out the same. Which name is to blame is said by the slow
tests, in which only one of them is lost.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.domain.results import Job
from chunkmill.embedded import StackStatus
from chunkmill.ledger.work.usage import Outcome
from chunkmill.settings import Settings
from chunkmill_workers.provider.collect import DOWNLOADS
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.responder import ProviderResponder
from tests.conftest import fresh_settings
from tests.openai_server import OpenAIServer
from tests.support.corridor_scene import Scene, scene
from tests.support.waiting import PATIENCE, Call, until

WORKERS = Path(__file__).parents[2] / "workers" / "chunkmill_workers"
TIMES = 2
"""Transactions of a name that are run again: a later one must find its way, too."""


class Twice:
    """Runs the first transactions of each of these names twice, as if the answer to each commit had been lost."""

    def __init__(self, patch: pytest.MonkeyPatch, context: type[Any], names: Collection[str]) -> None:
        self.times = Counter(dict.fromkeys(names, 0))
        self.seen: set[str] = set()
        transact = context.transact

        def run(context: Any, work: Callable[[sa.Connection], Any], what: str, **more: Any) -> Any:
            self.seen.add(str(what))
            if what in names and self.times[what] < TIMES:
                self.times[what] += 1
                transact(context, work, what, **more)
            return transact(context, work, what, **more)

        patch.setattr(context, "transact", run)


@dataclass(frozen=True)
class Story:
    """What the server does, and the commits that happen in it and in no story before it."""

    commits: tuple[str, ...]
    prepare: Callable[[OpenAIServer], object] = lambda server: None
    route: str = "openai"
    n: int = 10
    act: Callable[[Scene, list[Job]], object] = lambda stage, jobs: None
    trusting: bool = True


def cancel_before_it_is_sent(stage: Scene, jobs: list[Job]) -> None:
    """Their ProviderBatch is gathered and the upload is refused for now, so nothing has been sent."""
    stage.run_until(lambda: stage.asked("files.create"))
    for job in jobs:
        stage.corridor.client.cancel(job.id)


def restore(stage: Scene, jobs: list[Job]) -> None:
    """A backup was made when nothing was uploaded yet, and it is brought back: nobody knows what was sent since."""
    stage.run_until(lambda: stage.asked("files.create"))
    with stage.corridor.db.begin() as conn:
        update = "UPDATE provider_batches SET state = 'creating', creating_since = created_at WHERE state = 'gathered'"
        assert conn.execute(sa.text(update)).rowcount


def look_before_it_ends(stage: Scene, jobs: list[Job]) -> None:
    """Each batch is looked at while it is in progress, and again when it has ended."""
    stage.run_until(lambda: stage.asked("batches.retrieve") >= 2)
    stage.server.control(in_progress_seconds=0.0)


def let_go(stage: Scene, jobs: list[Job]) -> None:
    """The batch is at the provider when a person lets go of it, before any of it ran."""
    stage.run_until(lambda: stage.corridor.rows("SELECT FROM provider_batches WHERE state = 'submitted'"))
    stage.corridor.client.abandon(stage.corridor.batches()[0]["id"])
    stage.run_until(lambda: stage.batches()[0]["status"] == "cancelled")
    stage.server.control(validating_seconds=0.0)


def let_both_run(stage: Scene) -> None:
    stage.run_until(lambda: len(stage.batches()) == 2, hurry=False)
    until(lambda: [batch["status"] for batch in stage.batches()] == ["completed"] * 2)


def ask(stage: Scene, jobs: list[Job]) -> None:
    """Somebody wants vectors while the jobs are open."""
    asked = Call(lambda: stage.corridor.client.embed(["a question", "another question"], timeout=PATIENCE))
    stage.run_until(lambda: stage.corridor.rows("SELECT FROM embed_requests"))
    assert ProviderResponder(stage.corridor.context).answer_next()
    asked.result()


def resume(route: str) -> Callable[[Scene, list[Job]], None]:
    def act(stage: Scene, jobs: list[Job]) -> None:
        client = stage.corridor.client
        stage.run_until(lambda: any(lane.is_stopped and lane.route == route for lane in client.lanes()))
        client.resume_lane(route)

    return act


CREATE, UPLOAD = {"endpoint": "batches.create"}, {"endpoint": "files.create"}
RETRIEVE, EMBED = {"endpoint": "batches.retrieve"}, {"endpoint": "embeddings.create"}
STORIES = {
    "batches": Story(
        ("claim a step", "look at the lane", "gather", "upload", "create", "submitted", "ended", "collect", "account",
         "close", "look again later"),
        lambda server: server.control(in_progress_seconds=3600.0),
        act=look_before_it_ends,
    ),
    "a create without an answer": Story(
        ("create again", "release a step"), lambda server: server.misbehave("cut", where=CREATE)
    ),
    "a restored backup that knows no file": Story(
        ("upload after all",), lambda server: server.misbehave("http_error", status=503, where=UPLOAD), act=restore
    ),
    "a limit on create": Story(
        ("not created", "pause the lane"),
        lambda server: server.misbehave("rate_limited", where=CREATE, retry_after_ms=100),
    ),
    "a used-up quota": Story(
        ("stop the lane",), lambda server: server.misbehave("insufficient_quota", where=CREATE), act=resume("openai")
    ),
    "a refused create": Story(("create refused",), lambda server: server.misbehave("input_vanished")),
    "cancelled before it is sent": Story(
        ("give back",),
        lambda server: server.misbehave("http_error", status=503, where=UPLOAD),
        act=cancel_before_it_is_sent,
    ),
    "a file that is damaged every time": Story(
        ("give up",), lambda server: server.misbehave("fail_validation", times=None, code="empty_file")
    ),
    "a batch that is not found for a while": Story(
        ("not found",), lambda server: server.misbehave("http_error", times=4, status=404, where=RETRIEVE)
    ),
    "a batch that vanished": Story(
        ("vanished",), lambda server: server.misbehave("http_error", times=5, status=404, where=RETRIEVE)
    ),
    "a download that ends early": Story(
        ("release a step",), lambda server: server.misbehave("truncated", times=DOWNLOADS - 1, fraction=0.6)
    ),
    "a line that is missing": Story(
        ("ask for the files again",), lambda server: server.misbehave("missing_line", marker="again text 1 of"), n=8
    ),
    "result files whose ids come late": Story(
        ("no result file yet",), lambda server: server.misbehave("late_file_ids", times=3, where=RETRIEVE)
    ),
    "a quota without room": Story(
        ("no room",), lambda server: server.misbehave("fail_validation", times=2, code="token_limit_exceeded")
    ),
    "a batch that was made twice": Story(
        ("book the second batch",),
        lambda server: [server.misbehave("created_twice"), server.misbehave("cut", where=CREATE, applied=True)],
        act=lambda stage, jobs: let_both_run(stage),
    ),
    "a file that is too large": Story(("too large",), lambda server: server.control(max_file_bytes=600)),
    "a batch that a person lets go": Story(
        ("note its files",), lambda server: server.control(validating_seconds=3600.0), act=let_go
    ),
    "a batch that fails validation": Story(
        ("send again", "halve", "bury"),
        lambda server: server.misbehave("fail_validation", times=None, code="who_knows"),
        n=2,
    ),
    "a batch that is too large": Story(("return",), lambda server: server.control(max_inputs_per_batch=6)),
    "requests that fail": Story(
        ("collect", "account"),
        lambda server: [
            server.misbehave("line_failures", status=500, lines=1),
            server.misbehave("line_failures", status=400, code="invalid_input", marker="text 3 ", times=None),
        ],
    ),
    "plain requests": Story(
        ("claim", "read texts", "put in flight", "take turn", "about to send", "write vectors", "complete"),
        route="openai-sync",
    ),
    "plain requests without answers": Story(
        ("book a request without an answer", "pause a failing lane", "prove the lane"),
        lambda server: server.misbehave("http_error", times=4, after=1, status=503, where=EMBED),
        route="openai-sync",
        act=lambda stage, jobs: stage.corridor.client.cancel(jobs[1].id),  # else chance says who takes what they share
        trusting=False,
    ),
    "a plain answer that cannot be read": Story(
        ("book a request without an answer",),
        lambda server: server.misbehave("deep", where=EMBED),
        route="openai-sync",
    ),
    "a limit on plain requests": Story(
        ("released", "pause the lane"),
        lambda server: server.misbehave("rate_limited", where=EMBED, retry_after_ms=100, after=1),
        route="openai-sync",
    ),
    "a key that is refused": Story(
        ("stop the lane",),
        lambda server: server.misbehave("unauthorized", after=1, where=EMBED),
        route="openai-sync",
        act=resume("openai-sync"),
    ),
    "a question": Story(("book an answer",), route="openai-sync", act=ask),
    "a vector that is none": Story(
        ("failed",), lambda server: server.misbehave("not_finite", after=1), route="openai-sync"
    ),
}  # fmt: skip
ALONE = [
    pytest.param(name, (commit,), marks=pytest.mark.slow, id=f"{name}-{commit}")
    for name, story in STORIES.items()
    for commit in story.commits
    if len(story.commits) > 1
]


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, dict[str, Any]]:
    """Story to its end without any lost answer, filled in as the tests need it."""
    return {}


def tell(
    story: Story, commits: Collection[str], stack: StackStatus, server: OpenAIServer, request: pytest.FixtureRequest
) -> tuple[dict[str, Any], Twice]:
    """Tell a story of two jobs that share texts, in a database of its own: how it ended."""
    with ExitStack() as exits:
        settings: Settings = exits.enter_context(fresh_settings(stack))
        stage = exits.enter_context(scene(settings, server, request, trusting=story.trusting))
        patch = exits.enter_context(pytest.MonkeyPatch.context())
        stage.name = "again"
        texts = {f"c{i}": f"again text {i} of {story.n}" for i in range(story.n)}
        billed = stage.bill(texts)
        story.prepare(server)
        twice = Twice(patch, ProviderContext, commits)
        half = dict(list(texts.items())[story.n // 2 :])
        jobs = [
            stage.enqueue(texts, route=story.route),
            stage.enqueue(half, route=story.route, collection="other"),
        ]
        patch.setattr(stage, "hurry", lambda: hurry(stage))
        story.act(stage, jobs)
        ended = stage.finish(*jobs)
        stage.check_books(**unanswered(stage))
        for collection in ("docs", "other"):
            vectors = stage.corridor.client.vectors(collection)
            stage.corridor.check_vectors({name: texts[name] for name in vectors}, collection)
        return picture(stage, ended) | {
            "billed": {name: times - billed.get(name, 0) for name, times in stage.bill(texts).items()}
        }, twice


def hurry(stage: Scene) -> None:
    """As ever, and what lost the answer to its claim need not wait for the end of its lease: nothing runs here now."""
    Scene.hurry(stage)
    with stage.corridor.db.begin() as conn:
        conn.execute(sa.text("UPDATE provider_lanes SET paused_until = now()"))
        for table in ("provider_batches", "chunk_batches"):
            conn.execute(sa.text(f"UPDATE {table} SET lease_until = now() - interval '1 s' WHERE lease_until > now()"))


def unanswered(stage: Scene) -> dict[str, int]:
    """What was charged and never answered, which is what was booked as lost or maybe charged.

    A plain request that the test server answers with 503 may have been charged, as far as we know, and was not.
    """
    if stage.corridor.rows("SELECT FROM provider_batches WHERE provider_status = 'vanished'"):
        stage.server.vanish(stage.batches()[0]["output_file_id"])  # nobody could know of it
    [booked] = stage.corridor.rows("""
        SELECT coalesce(sum(contents), 0)::int AS contents, coalesce(sum(tokens), 0)::int AS tokens
        FROM adjustments
        WHERE reason NOT LIKE '%was abandoned%' AND NOT (route = 'openai-sync' AND kind = 'maybe_charged')
    """)
    return {"unanswered_contents": booked["contents"], "unanswered_tokens": booked["tokens"]}


PICTURES = {
    "jobs": "SELECT id, state, error FROM jobs ORDER BY id",
    "chunk batches": "SELECT job_id, route, state, attempt - (max_attempts - :most) AS charged, n_contents, n_cached, "
    "n_embedded, n_truncated, error_code FROM chunk_batches ORDER BY id",
    "charges": "SELECT job_id, route, count(*) AS n, sum(contents)::int AS contents, sum(tokens)::int AS tokens, "
    "sum(usd) AS usd FROM charges GROUP BY 1, 2 ORDER BY 1, 2",
    "adjustments": "SELECT job_id, kind, count(*) AS n, sum(contents)::int AS contents, sum(tokens)::int AS tokens, "
    "sum(usd) AS usd FROM adjustments GROUP BY 1, 2 ORDER BY 1, 2",
    "accounts": "SELECT job_id, sum(contents)::int AS contents, sum(recomputed)::int AS recomputed, "
    "sum(tokens)::int AS tokens, count(*) FILTER (WHERE outcome = 'completed') AS completed, "
    "count(*) FILTER (WHERE outcome = 'failed') AS failed FROM usage GROUP BY 1 ORDER BY 1",
    # What comes back is sent again in one ProviderBatch or in two, as it happens to come back; and how much comes back
    # depends on which line fails. What was sent less what came back is the same every time.
    "provider batches": "SELECT sum(resends) AS resends, max(downloads) AS downloads, "
    "sum(n_inputs) - sum(n_returned) AS inputs, sum(n_contents) - sum(n_returned) AS contents, "
    "sum(n_written) AS written, sum(n_dead) AS dead, "
    "array_agg(DISTINCT state) AS states, array_agg(DISTINCT error_code) AS codes FROM provider_batches",
    "oddities": "SELECT o.key, sum(o.value::int) AS n FROM provider_batches, jsonb_each_text(oddities) o GROUP BY 1",
    "dead": "SELECT job_id, chunk_id, code FROM dead_chunks ORDER BY 1, 2",
    "suspects": "SELECT encode(content_hash, 'hex') AS suspect FROM provider_suspects ORDER BY 1",
    "questions": "SELECT tokens, sent_tokens FROM provider_questions",
    "lanes": "SELECT route, stop_code, max_inputs FROM provider_lanes ORDER BY 1",
}


def picture(stage: Scene, jobs: list[Job]) -> dict[str, Any]:
    most = stage.corridor.settings.max_attempts
    return {
        "ended": [(job.state, job.error) for job in jobs],
        "remote": sorted({batch["status"] for batch in stage.batches()}),
        "vectors": sorted(stage.corridor.client.vectors("docs")) + sorted(stage.corridor.client.vectors("other")),
    } | {
        name: stage.corridor.rows(query, **({"most": most} if ":most" in query else {}))
        for name, query in PICTURES.items()
    }


@pytest.mark.parametrize(
    ("story", "commits"), [*(pytest.param(name, story.commits, id=name) for name, story in STORIES.items()), *ALONE]
)
def test_a_commit_of_a_paid_route_that_is_run_again_changes_nothing(
    stack: StackStatus,
    server: OpenAIServer,
    request: pytest.FixtureRequest,
    undisturbed: dict[str, dict[str, Any]],
    story: str,
    commits: tuple[str, ...],
) -> None:
    if story not in undisturbed:
        undisturbed[story], _ = tell(STORIES[story], (), stack, server, request)

    ended, twice = tell(STORIES[story], commits, stack, server, request)

    assert all(twice.times.values()), f"{twice.times}; what happened in the story: {sorted(twice.seen)}"
    assert ended == undisturbed[story]


def test_every_commit_of_the_paid_routes_has_its_story() -> None:
    """A new commit needs one, too: its name is the second argument of ``transact``."""
    names = {
        call.args[1].value
        for path in [*(WORKERS / "provider").glob("*.py"), WORKERS / "process" / "claims.py"]
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "transact"
        and len(call.args) > 1 and isinstance(call.args[1], ast.Constant)
    }  # fmt: skip
    ends = {Outcome.RELEASED, Outcome.FAILED}  # as `chunkmill_workers.process.attempt` names the ends of an attempt
    assert names | ends == {commit for story in STORIES.values() for commit in story.commits}
