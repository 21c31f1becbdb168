"""A wrong setting of a provider stops that provider and nothing else, in real processes."""

from __future__ import annotations

import json
import subprocess

import pytest

from chunkmill.client import Client
from chunkmill.domain.states import JobState
from chunkmill.errors import InvalidSetting
from chunkmill.settings import Settings
from tests.acceptance.conftest import Processes
from tests.conftest import client_for
from tests.openai_server import OpenAIServer
from tests.support import forks
from tests.support.corridor import settings_for
from tests.support.waiting import PATIENCE

WRONG = {
    "OPENAI_API_KEY": "sk-0123456789abcdefghij",
    "OPENAI_MODELS": '{"remote": {"dimension": 384}, "other": {"dimensions": 8, "can_cut": "no"}}',
    "OPENAI_BASE_URL": "http://tei:8080/v1",
}
SAID = ["model 'remote': 'dimension' is not a field; did you mean dimensions?", "can_cut is", "OPENAI_HTTP_HOSTS"]
WORKER = ("celery", "-A", "chunkmill_workers", "worker", "-Q")


@pytest.mark.slow
def test_a_wrong_description_of_models_stops_the_paid_routes_alone(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes.env |= WRONG
    paid = processes.start(*WORKER, "openai")
    both = processes.worker("-Q", "gpu,openai", ready=False)
    poller = processes.poller()
    both.wait_for("ready.")
    assert paid.popen.wait(PATIENCE) == 78
    assert "queue openai is left to other workers" in both.output()
    for name, value in {**processes.env, **WRONG}.items():
        monkeypatch.setenv(name, value)
    with Client.from_env() as client:
        job = client.enqueue([(f"c{i}", f"text {i}") for i in range(20)], collection="docs", route="auto")
        assert client.wait(job.id, timeout=PATIENCE).state is JobState.COMPLETED
        assert client.search("text 7", collection="docs", k=1)[0].chunk_id == "c7"
        for model, route in (("remote", "auto"), ("text-embedding-3-small", "auto"), (None, "openai")):
            with pytest.raises(InvalidSetting, match="the paid routes are off in this process"):
                client.enqueue([("c", "a text")], collection="more", model=model, route=route)
    # Whoever says it says all of it, and says no key.
    for output in (paid.output(), both.output(), poller.output()):
        assert all(word in output for word in SAID), output
        assert WRONG["OPENAI_API_KEY"] not in output
    status = json.loads(command(processes, "status", "--json").stdout)
    assert status
    doctor = command(processes, "doctor", "--json", code=1)
    checks = {check["name"]: check for check in json.loads(doctor.stdout)["checks"]}
    assert [name for name, check in checks.items() if check["state"] == "fail"] == ["paid routes"]
    assert all(word in checks["paid routes"]["advice"] for word in SAID)
    assert (both.terminate(), poller.terminate()) == (0, 0)


def command(processes: Processes, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = forks.run(["chunkmill.cli", *words], env=processes.env)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_a_poller_with_wrong_settings_hinders_no_provider(processes: Processes, settings: Settings) -> None:
    """Its own settings are wrong, and the paid worker's are not: doorbells are rung for the paid routes too."""
    with OpenAIServer() as server:
        mine = settings_for(settings, server)
        right = {"OPENAI_API_KEY": server.key, "OPENAI_BASE_URL": server.url, "OPENAI_GATHER_SECONDS": "0"}
        worker = processes.start(*WORKER, "openai", OPENAI_POLL_SECONDS="0.2", **right)
        processes.start("chunkmill.cli", "poller", **WRONG)
        worker.wait_for("ready.")
        with client_for(mine) as client:
            for route in ("openai", "openai-sync"):
                chunks = [(f"c{i}", f"{route} {i}") for i in range(20)]
                job = client.enqueue(chunks, collection=route, route=route)
                assert client.wait(job.id, timeout=PATIENCE).state is JobState.COMPLETED
        assert set(server.bill().values()) == {1}
