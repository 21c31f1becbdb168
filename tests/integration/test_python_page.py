"""The examples of docs/python.md are run, in their order, against a real worker's parts."""

from __future__ import annotations

import contextlib
import io
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from chunkmill import Client
from chunkmill.settings import Settings
from chunkmill_workers.local.responder import EmbedResponder
from tests.integration.conftest import Runner
from tests.support.waiting import running

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def test_the_examples_of_the_page_run_and_find_what_they_look_for(
    settings: Settings, client: Client, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", settings.require_database_url())
    monkeypatch.setenv("REDIS_URL", settings.require_redis_url())
    client.enqueue([("old", "an old page")], collection="others")  # what the page searches, the page has made
    responder, ends = EmbedResponder(runner.context), threading.Event()

    def work() -> None:
        while not ends.wait(0.05):
            runner.run_due()

    names: dict[str, Any] = {"__name__": "page", "Client": Client}
    said = io.StringIO()
    responder.start()
    try:
        with running(work, release=ends.set), contextlib.redirect_stdout(said):
            for example in EXAMPLES:
                exec(compile(example, str(PAGE), "exec", dont_inherit=True), names)  # noqa: S102 - the page is ours
    finally:
        responder.stop()
        responder.join()
        if "client" in names:
            names["client"].close()
    assert len(EXAMPLES) == 6
    shown, english, added, asked, renewed, both = said.getvalue().splitlines()
    assert shown.startswith("Client(database='postgresql+psycopg://") and shown.endswith(" 1")
    assert english == "2"
    assert added == "7 7 9"
    assert asked.startswith("rotate a certificate ['page-0', 'page-1']")
    assert renewed.startswith("renew a licence ['page-1', 'page-0']")
    assert both == "['page-0', 'page-1']"
