"""The exit codes of the commands that wait: a script goes on only if what it waited for is complete."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from chunkmill import Client, Job, JobCancelled, JobFailed, JobState
from chunkmill.cli.__main__ import cli
from chunkmill.domain.chunks import content_hash
from chunkmill.settings import Settings
from tests.integration.hands import Hands
from tests.integration.test_reembedder import Scene
from tests.support.waiting import PATIENCE, running, until


def work(hands: Hands, job_id: int, *dead: str) -> None:
    """Embed what is due of one job."""
    for one in set(hands.due()) & set(hands.of_job(job_id)):
        hands.embed(hands.claim(one), {content_hash(text): "not_finite" for text in dead})


ENDS: dict[str, Callable[[Client, Hands, int], object]] = {
    "completed": lambda _, hands, job_id: work(hands, job_id),
    "failed": lambda _, hands, job_id: work(hands, job_id, "text b"),
    "cancelled": lambda client, _, job_id: client.cancel(job_id),
}
CODES = {"completed": 0, "failed": 4, "cancelled": 4}
OTHER = [("o", "another text")]


def never_ends(client: Client, hands: Hands) -> str:
    """A job of another collection stays open all the time: its state must not be taken for that of the first."""
    return str(client.enqueue(OTHER, collection="other").id)


def enqueued(client: Client, hands: Hands) -> str:
    never_ends(client, hands)
    return str(client.enqueue([("a", "text a"), ("b", "text b")], collection="docs").id)


def failed_once(client: Client, hands: Hands) -> str:
    job_id = enqueued(client, hands)
    work(hands, int(job_id), "text a", "text b")
    assert client.job(int(job_id)).state is JobState.FAILED
    return job_id


WAITING: dict[str, tuple[Callable[[Client, Hands], str], list[str]]] = {
    "enqueue": (never_ends, ["enqueue", "FILE", "-c", "docs", "--wait"]),
    "job": (enqueued, ["job", "JOB", "--wait"]),
    "retry": (failed_once, ["retry", "JOB", "--wait"]),
    "dead retry": (failed_once, ["dead", "retry", "--job", "JOB", "--wait"]),
}
"""What is there before, and the command. FILE and JOB stand for the two chunks and for their job."""


@pytest.fixture
def call(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("DATABASE_URL", settings.require_database_url())
    monkeypatch.setenv("REDIS_URL", settings.require_redis_url())
    return lambda *arguments: CliRunner().invoke(cli, list(arguments))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "docs.jsonl"
    path.write_text('{"id": "a", "text": "text a"}\n{"id": "b", "text": "text b"}\n')
    return path


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("command", WAITING)
def test_a_command_that_waited_exits_with_0_only_if_the_job_is_complete(
    command: str, end: str, client: Client, hands: Hands, call: Callable[..., Result], file: Path
) -> None:
    before, arguments = WAITING[command]
    given = before(client, hands)

    def of_docs() -> list[Job]:
        return [job for job in client.jobs() if job.collection == "docs"]

    def meanwhile() -> None:
        until(lambda: [job.state for job in of_docs()] == [JobState.RUNNING])
        ENDS[end](client, hands, of_docs()[0].id)

    with running(meanwhile):
        done = call(*[{"FILE": str(file), "JOB": given}.get(word, word) for word in arguments])
    (job,) = of_docs()
    assert (job.state, done.exit_code) == (end, CODES[end]), done.output
    sentence = {
        "completed": "",
        "failed": f"error: job {job.id} failed: ",
        "cancelled": f"error: job {job.id} was cancelled, so it is not complete: it left 2 of 2 texts",
    }[end]
    assert sentence in " ".join(done.stderr.split())
    assert ("error" in done.stderr) is bool(sentence)

    # And one who only comes afterwards is told the same.
    for again in (["job", str(job.id)], ["job", str(job.id), "--wait"]):
        afterwards = call(*again, "--json")
        assert (afterwards.exit_code, json.loads(afterwards.stdout)["state"]) == (CODES[end], end)
        assert not sentence or json.loads(afterwards.stderr)["error"] == f"job_{end}"
    assert call("cancel", str(job.id)).exit_code == 0  # it does what it was asked to do


@pytest.mark.parametrize("end", ENDS)
def test_wait_of_the_client_returns_a_complete_job_and_no_other(end: str, client: Client, hands: Hands) -> None:
    job_id = int(enqueued(client, hands))
    ENDS[end](client, hands, job_id)
    if end == "completed":
        assert client.wait(job_id, timeout=PATIENCE).state is JobState.COMPLETED
        return
    with pytest.raises(JobFailed) as raised:
        client.wait(job_id, timeout=PATIENCE)
    assert (type(raised.value) is JobCancelled, raised.value.job_id) == (end == "cancelled", job_id)


@pytest.mark.parametrize("end", ["cancel", "rollback", "flip"])
def test_a_wait_for_another_space_exits_with_0_only_if_that_space_is_the_active_one(
    end: str, client: Client, hands: Hands, settings: Settings, call: Callable[..., Result]
) -> None:
    scene = Scene(client, hands, settings.model_copy(update={"chunk_batch_size": 2, "index_seconds": 0.0}))
    begun = scene.begin(ramp=(50,))

    def meanwhile() -> None:
        if end == "cancel":
            client.cancel_reembedding(begun.id)
            return
        while client.reembedding(begun.id).share != 50:
            scene.round()
        client.flip(begun.id)
        if end == "rollback":
            client.rollback(begun.id)

    if end == "cancel":
        with running(meanwhile):
            done = call("reembed", "show", str(begun.id), "--wait", "--json")
    else:
        meanwhile()
        done = call("reembed", "show", str(begun.id), "--wait", "--json")
    state = {"cancel": "cancelled", "rollback": "rolled_back", "flip": "flipped"}[end]
    assert (json.loads(done.stdout)["state"], done.exit_code) == (state, 0 if end == "flip" else 3), done.output
