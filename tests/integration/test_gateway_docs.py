"""docs/gateway.md: its command starts a gateway, and its examples get vectors from one."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import sqlalchemy as sa

from chunkmill.gateway.embedding import MAX_BODY, MAX_SECONDS, SECONDS, SECONDS_PER_TEXT
from chunkmill.gateway.inputs import MAX_INPUTS, MAX_TOKENS
from chunkmill.gateway.large_json import MAX_VALUE
from chunkmill.gateway.routes import cohere, embed, health, ollama, openai
from chunkmill.monitor.reports import SILENT_SECONDS
from chunkmill.settings import Settings
from tests.support.gateways import KEY, RunningGateway, running_gateway, stand_in_worker
from tests.support.waiting import PATIENCE, until

PAGE = (Path(__file__).parents[2] / "docs" / "gateway.md").read_text()
ADDRESS = "http://127.0.0.1:8080"


def example(language: str, words: str) -> str:
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (block,) = (block for block in blocks if words in block)
    return str(block)


@pytest.fixture
def gateway(settings: Settings, db: sa.Engine) -> Iterator[RunningGateway]:
    with running_gateway(settings) as running, stand_in_worker(db):
        yield running


def run(gateway: RunningGateway, *command: str) -> str:
    environment = os.environ | {"CHUNKMILL_KEY": KEY, "NO_PROXY": "127.0.0.1"}
    filled = [part.replace(ADDRESS, gateway.url) for part in command]
    return subprocess.run(filled, env=environment, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout


def test_the_example_with_curl_gets_vectors(gateway: RunningGateway) -> None:
    answer = json.loads(run(gateway, "bash", "-c", example("sh", "curl http://127.0.0.1:8080/v1/embeddings")))
    assert [len(item["embedding"]) for item in answer["data"]] == [384, 384]


def test_the_example_with_openais_package_gets_vectors(gateway: RunningGateway) -> None:
    assert run(gateway, sys.executable, "-c", example("py", "embeddings.create")).split() == ["384", "10"]


def test_the_command_serves_until_it_is_told_to_end(settings: Settings, tmp_path: Path) -> None:
    assert "chunkmill gateway --port 8080" in PAGE
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {
        "DATABASE_URL": settings.require_database_url(),
        "REDIS_URL": settings.require_redis_url(),
        "CHUNKMILL_HOME": str(tmp_path),
    }
    command = [sys.executable, "-m", "chunkmill.cli", "gateway", "--port", str(port)]
    process = subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )

    def answers() -> bool:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        try:
            return httpx2.get(f"http://127.0.0.1:{port}/live", trust_env=False).status_code == 200
        except httpx2.ConnectError:
            return False

    try:
        until(answers)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    assert process.returncode in (0, -signal.SIGTERM)


def test_the_page_has_every_route_and_code_of_the_embeddings() -> None:
    for module in (cohere, embed, health, ollama, openai):
        for endpoint in module.ENDPOINTS:
            path = endpoint.path.replace("{model:path}", "{id}")
            assert re.search(rf"`({endpoint.method} )?{re.escape(path)}`", PAGE), endpoint.path
    folder = Path(openai.__file__).parents[1]
    code = re.compile(r'(?:Refusal\(\s*\d+,\s*|, )"([a-z]+_[a-z_]+)"')
    for source in ("embedding.py", "inputs.py", "fields.py", "large_json.py", "models.py", "bodies.py"):
        for word in code.findall((folder / source).read_text()):
            assert f"`{word}`" in PAGE or word == "caller_gone", f"{word} of {source}"


def test_the_limits_of_the_page_are_those_of_the_code() -> None:
    for words in (
        f"inputs in a request | {MAX_INPUTS:,} ",
        f"| {MAX_TOKENS:,} in cl100k",
        f"| {MAX_BODY >> 20} MiB (HTTP 413)",
        f"one text in it {MAX_VALUE >> 20} MiB",
        f"| {SECONDS:g} s, and {SECONDS_PER_TEXT:g} s more for each text",
        f"at most {MAX_SECONDS / 60:g} minutes",
        f"in the last {SILENT_SECONDS:g} s",
    ):
        assert words in PAGE
