"""Flower beside real workers and real jobs: who may see it, and what it shows them.

``SCREENSHOTS=docs/images pytest tests/acceptance/test_flower.py`` takes the pictures of docs/flower.md again.
"""

from __future__ import annotations

import base64
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis

from chunkmill import Chunk
from chunkmill.broker import ADVANCE_TASK, EMBED_TASK
from chunkmill.embedded import StackStatus
from chunkmill.messages.door import LARGEST_REPLY
from chunkmill.settings import Settings
from tests.acceptance.conftest import Process, Processes
from tests.conftest import client_for, fresh_settings
from tests.openai_server import OpenAIServer
from tests.support.hostile import MARK, event, hostile_commands, hostile_events
from tests.support.waiting import PATIENCE, until

LOGIN = "operator:not-for-strangers"
WORD = "zanzibarquokka"
"""In every text, and nowhere else."""
CPU_WORKERS = 2 if "SCREENSHOTS" in os.environ else 1
"""A second one is for the picture: each loads torch, and the names of two on a host are tested elsewhere."""
MODEL = "text-embedding-3-small"
PAGES = ("/", "/workers", "/workers?json=1", "/tasks", "/broker", "/metrics")
API = ("/api/workers", "/api/tasks", "/api/task/types", "/api/queues/length")
DATATABLE = "/tasks/datatable?draw=1&start=0&length=100&order[0][column]=0&columns[0][data]=name&order[0][dir]=asc"


@dataclass
class Scene:
    """A worker on the CPU and one of the paid routes, a completed job on each, and a Flower that saw all of it."""

    processes: Processes
    flower: Process
    port: int
    workers: dict[str, Process]
    """By the name that Flower should show."""
    key: str

    def ask(self, path: str, login: str | None = LOGIN, **post: Any) -> tuple[int, str]:
        return ask(self.port, path, login, **post)

    def tasks(self, name: str) -> list[dict[str, Any]]:
        tasks = json.loads(self.ask("/api/tasks")[1]).values()
        return sorted((task for task in tasks if task["name"] == name), key=lambda task: task["args"])


def ask(port: int, path: str, login: str | None, **post: Any) -> tuple[int, str]:
    """Return the status and the body of an answer."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=json.dumps(post).encode() if post else None)
    if login is not None:
        request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:  # noqa: S310
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def is_up(port: int) -> bool:
    try:
        return ask(port, "/healthcheck", None) == (200, "OK")
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def scene(stack: StackStatus, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    # The batch is in progress when it is looked at for the first time, so that a second look has a doorbell of its own.
    with fresh_settings(stack) as settings, OpenAIServer(in_progress_seconds=3.0) as server:
        processes = Processes(settings, tmp_path_factory.mktemp("flower"))
        paid = {"EMBEDDING_MODEL": MODEL, "EMBEDDING_DIMENSIONS": "8", "OPENAI_BASE_URL": server.url}
        processes.env |= {"OPENAI_GATHER_SECONDS": "0", "OPENAI_POLL_SECONDS": "6", "EMBEDDING_DEVICE": "cpu"}
        try:
            port = free_port()
            flower = processes.start(
                "chunkmill.cli", "flower", f"--port={port}", FLOWER_BASIC_AUTH=LOGIN, DATABASE_URL=""
            )
            local = [processes.worker(ready=False) for _ in range(CPU_WORKERS)]
            provider = processes.start(
                "celery", "-A", "chunkmill_workers", "worker", "-Q", "openai", OPENAI_API_KEY=server.key, **paid
            )
            processes.start("chunkmill.cli", "poller", **paid)
            host = socket.gethostname()
            workers = {f"cpu-{worker.popen.pid}@{host}": worker for worker in local} | {f"openai@{host}": provider}
            until(lambda: is_up(port) or flower.popen.poll() is not None, flower.output)
            for process in workers.values():
                process.wait_for("ready.")
            scene = Scene(processes, flower, port, workers, server.key)
            until(lambda: online(scene) == set(workers), lambda: f"{online(scene)}\n{flower.output()}")
            embed(settings, "handbook", 300, chunk_batch_size=64)
            embed(settings, "archive", 100, embedding_model=MODEL, embedding_dimensions=8, openai_base_url=server.url)
            until(lambda: all_succeeded(scene), lambda: scene.ask("/api/tasks")[1])
            yield scene
        finally:
            processes.stop_all()


def embed(settings: Settings, collection: str, n: int, **changes: Any) -> None:
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    mine = Settings.from_env(**{**given, **changes})
    with client_for(mine) as client:
        texts = (Chunk(f"{collection}-{i}", f"{WORD} {i} of the {collection}", {"about": WORD}) for i in range(n))
        route = "openai" if "embedding_model" in changes else "local"
        job = client.wait(client.enqueue(texts, collection=collection, route=route).id, timeout=PATIENCE)
        assert job.embedded == n


def online(scene: Scene) -> set[str]:
    rows = json.loads(scene.ask("/workers?json=1")[1])["data"]
    return {row["hostname"] for row in rows if row["status"]}


def all_succeeded(scene: Scene) -> bool:
    """Return whether Flower has seen both kinds of task and heard the end of each task."""
    tasks = scene.tasks(EMBED_TASK), scene.tasks(ADVANCE_TASK)
    return all(tasks) and all(task["state"] == "SUCCESS" for kind in tasks for task in kind)


def test_strangers_see_nothing(scene: Scene) -> None:
    (task, *_) = scene.tasks(EMBED_TASK)
    for login in (None, "operator:wrong", "operator:", ":", "chunkmill:not-for-strangers"):
        for path in (*PAGES, *API, DATATABLE, f"/task/{task['uuid']}", f"/api/task/info/{task['uuid']}"):
            status, page = scene.ask(path, login)
            assert (status, "handbook" in page) == (401, False), (path, login)
    assert scene.ask("/healthcheck", None) == (200, "OK")
    assert scene.ask(f"/api/worker/shutdown/{next(iter(scene.workers))}", None, x=1)[0] == 401


def test_those_let_in_may_look_and_not_touch(scene: Scene) -> None:
    for path in (*PAGES, *API):
        assert scene.ask(path)[0] == 200, path
    name = next(iter(scene.workers))
    for path in (f"/api/worker/shutdown/{name}", f"/api/task/apply/{EMBED_TASK}", f"/api/worker/pool/grow/{name}"):
        assert scene.ask(path, x=1)[0] == 403, path
    assert scene.workers[name].popen.poll() is None


def test_the_password_is_in_no_list_of_processes_and_no_log(scene: Scene) -> None:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes()
        except OSError:
            continue
        assert LOGIN.partition(":")[2].encode() not in arguments
    assert LOGIN.partition(":")[2] not in scene.flower.output()


def test_each_worker_has_its_row(scene: Scene) -> None:
    assert online(scene) == set(scene.workers)
    assert len(scene.workers) == CPU_WORKERS + 1


def test_a_task_says_what_it_is_about(scene: Scene) -> None:
    """Flower's own search finds the tasks of a job."""
    local, steps = scene.tasks(EMBED_TASK), scene.tasks(ADVANCE_TASK)
    numbers = sorted(int(re.fullmatch(r"ChunkBatch (\d+)", task["args"])[1]) for task in local)  # type: ignore[index]
    assert len(set(numbers)) == 5
    about = {task["args"]: task["kwargs"] for task in local}.values()
    assert sorted(about) == sorted(
        str({"job": 301, "collection": "handbook", "contents": n}) for n in (64, 64, 64, 64, 44)
    )
    assert {task["args"] for task in steps} == {"ProviderBatch 401"}
    states = {task["kwargs"] for task in steps}
    assert str({"state": "gathering", "space": 2, "model": MODEL}) in states
    assert str({"state": "submitted", "space": 2, "model": MODEL}) in states
    of_the_job, bells, paid = (
        [task["uuid"] for task in kind]
        for kind in (local, [task for task in local if task["args"] == "ChunkBatch 3"], steps)
    )
    for search, wanted in {
        "kwargs:job=301": of_the_job,
        "kwargs:collection=handbook": of_the_job,
        'args:"ChunkBatch 3"': bells,
        "worker:openai": paid,
    }.items():
        listed = json.loads(scene.ask(f"{DATATABLE}&search[value]={quote(search)}")[1])["data"]
        assert sorted(task["uuid"] for task in listed) == sorted(wanted), search


def test_no_text_and_no_key_is_on_any_page(scene: Scene) -> None:
    paths = [*PAGES, *API, DATATABLE, "/api/workers?refresh=1"]
    paths += [f"/worker/{name}" for name in scene.workers]
    for task in (*scene.tasks(EMBED_TASK), *scene.tasks(ADVANCE_TASK)):
        paths += [f"/task/{task['uuid']}", f"/api/task/info/{task['uuid']}"]
    pages = {path: scene.ask(path) for path in paths}
    assert {status for status, _ in pages.values()} == {200}
    for path, (_, page) in pages.items():
        for secret in (WORD, scene.key, LOGIN.partition(":")[2]):
            assert secret not in page, path
    assert "handbook" in pages[DATATABLE][1]  # a text would be in the same place


def test_without_a_password_one_is_made_and_shown_on_the_terminal_once(scene: Scene) -> None:
    port = free_port()
    terminal, inside = pty.openpty()
    flower = subprocess.Popen(
        [sys.executable, "-m", "chunkmill.cli", "flower", f"--port={port}"],
        env=scene.processes.env, stdin=subprocess.DEVNULL, stdout=inside, stderr=inside,
    )  # fmt: skip
    os.close(inside)
    said = ""
    try:
        while not re.search(r"password (\S+) ", said):
            assert select.select([terminal], [], [], PATIENCE)[0], said
            said += os.read(terminal, 4096).decode()  # raises if Flower has ended without printing it
        password = re.search(r"password (\S+) ", said)[1]  # type: ignore[index]
        assert f"http://127.0.0.1:{port}/" in said
        until(lambda: is_up(port) or flower.poll() is not None)
        assert ask(port, "/api/task/types", None)[0] == ask(port, "/", None)[0] == ask(port, "/metrics", None)[0] == 401
        assert ask(port, "/api/task/types", f"chunkmill:{password}")[0] == 200
        assert password.encode() not in Path(f"/proc/{flower.pid}/cmdline").read_bytes()
    finally:
        flower.send_signal(signal.SIGTERM)
        try:
            code = flower.wait(PATIENCE)
        finally:
            flower.kill()
            os.close(terminal)
    assert code == 0


def test_it_does_not_open_to_other_machines_without_a_password(scene: Scene) -> None:
    """``tests/unit/chunkmill/cli/processes/test_flower.py`` tests the other ways to name an address."""
    refused = scene.processes.start("chunkmill.cli", "flower", "--no-auth", FLOWER_ADDRESS="::")
    assert refused.popen.wait(PATIENCE) == 1
    assert "on ::, which other machines may reach" in refused.output()
    assert "set FLOWER_BASIC_AUTH=user:password" in refused.output()
    assert "Traceback" not in refused.output()


# --- in a browser ------------------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Chromium and its driver; on Debian: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--no-sandbox",  # Chromium has no sandbox for root, and the only pages are Flower's
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-first-run",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(argument)
    driven = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield driven
    driven.quit()


def test_what_a_person_sees(scene: Scene, browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    def shown() -> str:
        return str(browser.find_element(By.TAG_NAME, "body").text)

    def rows(table: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0] + ' tbody tr')].map(row => row.innerText)"
        return list(browser.execute_script(script, f"#{table}"))

    pictures = Path(os.environ.get("SCREENSHOTS", tmp_path))
    browser.set_window_size(1280, 790)
    browser.get(f"http://127.0.0.1:{scene.port}/workers")
    assert not any(name in browser.page_source for name in scene.workers)

    # The browser answers Flower's question for the password with what is in the address.
    browser.get(f"http://{LOGIN}@127.0.0.1:{scene.port}/workers")
    browser.get(f"http://127.0.0.1:{scene.port}/workers")
    until(lambda: all(name in shown() for name in scene.workers), shown)
    assert len(rows("workers-table")) == len(scene.workers)
    until(lambda: all("Online" in row for row in rows("workers-table")), lambda: str(rows("workers-table")))
    pages = [browser.page_source]
    browser.save_screenshot(str(pictures / "flower-workers.png"))

    browser.set_window_size(1286, 930)
    browser.get(f"http://127.0.0.1:{scene.port}/tasks")
    until(lambda: "ChunkBatch" in shown(), shown)
    tasks = rows("tasks-table")
    for row in tasks:
        assert re.search(
            r"ChunkBatch \d+\s+\{'job': 301, 'collection': 'handbook', 'contents': (64|44)\}"
            r"|ProviderBatch 401\s+\{'state': '\w+', 'space': 2, 'model': 'text-embedding-3-small'\}",
            row,
        ), row
        assert "SUCCESS" in row
        assert any(name in row for name in scene.workers)
    pages.append(browser.page_source)
    browser.save_screenshot(str(pictures / "flower-tasks.png"))

    browser.find_element(By.CSS_SELECTOR, "#tasks-table a.task-uuid, #tasks-table a[href*='/task/']").click()
    until(lambda: "Keyword arguments" in shown() or "Arguments" in shown(), shown)
    pages.append(browser.page_source)
    browser.get(f"http://127.0.0.1:{scene.port}/broker")
    until(lambda: "gpu" in shown(), shown)
    pages.append(browser.page_source)
    assert not any(WORD in page for page in pages)


# --- somebody else writes to Redis; these come last, because Flower keeps what it saw -------------------------


def publish(scene: Scene, exchange: str, messages: Iterable[bytes]) -> None:
    url = scene.processes.env["REDIS_URL"]
    with redis.Redis.from_url(url) as client:
        number = client.connection_pool.connection_kwargs.get("db", 0)
        for message in messages:
            if len(message) <= LARGEST_REPLY:  # over a larger one the connection is made anew, and what follows is lost
                assert client.publish(f"/{number}.{exchange}", message) >= 1


@pytest.mark.slow
def test_forged_events_and_replies_break_no_page(scene: Scene) -> None:
    """A heartbeat with a text in the place of a number would break the list of workers until the next start."""
    forged = "forged@nowhere"
    odd = (
        event(hostname=forged, heartbeats="x", alive="x", event="x", update=1, __class__="x"),
        event(hostname="last@x"),
    )
    publish(
        scene,
        "celeryev/worker.heartbeat",
        [*hostile_events().values(), *hostile_commands().values(), *(json.dumps(one).encode() for one in odd)],
    )
    publish(scene, "celery.pidbox", hostile_commands().values())
    until(lambda: "last@x" in scene.ask("/workers?json=1")[1], lambda: scene.ask("/workers?json=1")[1])
    rows = {row["hostname"]: row for row in json.loads(scene.ask("/workers?json=1")[1])["data"]}
    assert rows[forged]["heartbeats"] != "x"
    assert online(scene) >= set(scene.workers)
    for path in (*PAGES, *API, *(f"/worker/{name}" for name in scene.workers)):
        assert scene.ask(path)[0] == 200, path
    assert MARK not in scene.flower.output()
    assert "Traceback" not in scene.flower.output()
    for worker in scene.workers.values():
        assert worker.popen.poll() is None
        assert MARK not in worker.output()


@pytest.mark.slow
def test_a_flower_that_may_control_cannot_steer_a_worker(scene: Scene) -> None:
    """Workers do not have the commands. Flower reads what they are, and that is all."""
    port = free_port()
    flower = scene.processes.start(
        "chunkmill.cli",
        "flower",
        f"--port={port}",
        "--read_only=False",
        "--inspect_timeout=500",
        FLOWER_BASIC_AUTH=LOGIN,
    )
    until(lambda: is_up(port) or flower.popen.poll() is not None, flower.output)
    name = next(iter(scene.workers))
    until(lambda: name in ask(port, "/workers?json=1", LOGIN)[1], flower.output)
    until(lambda: ask(port, f"/api/worker/shutdown/{name}", LOGIN, x=1)[0] == 200, flower.output)  # it was sent
    assert scene.ask(f"/api/workers?refresh=1&workername={name}")[0] == 200  # the worker answers what came after it
    assert scene.workers[name].popen.poll() is None
    assert flower.terminate() == 0
