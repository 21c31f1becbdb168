"""The examples of docs/search.md are run, as a reader would type them, with a worker beside them."""

from __future__ import annotations

import doctest
import re
import shlex
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from chunkmill.cli.__main__ import cli
from chunkmill.settings import Settings
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.responder import EmbedResponder
from tests.integration.conftest import Runner
from tests.support.waiting import Call

PAGE = Path(__file__).parents[2] / "docs/search.md"


def test_the_examples_of_the_page_are_true(
    settings: Settings, runner: Runner, context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", settings.require_database_url())
    monkeypatch.setenv("REDIS_URL", settings.require_redis_url())
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.05):
            runner.run_due()

    responder = EmbedResponder(context)
    responder.start()
    worker = Call(work)
    try:
        names: dict[str, object] = {}
        examples = doctest.DocTestParser().get_doctest(PAGE.read_text(), names, PAGE.name, str(PAGE), 0)
        assert len(examples.examples) > 20
        said: list[str] = []
        failed, _ = doctest.DocTestRunner(verbose=False).run(examples, out=said.append, clear_globs=False)
        assert not failed, "".join(said)
        examples.globs["client"].close()
        commands = re.findall(r"^chunkmill (search .*)$", PAGE.read_text(), re.MULTILINE)
        assert len(commands) == 2
        for command in commands:
            done = CliRunner().invoke(cli, shlex.split(command))
            assert done.exit_code == 0, done.output
            assert "coffee" in done.stdout
    finally:
        stop.set()
        worker.result()
        responder.stop()
