"""Words that came from outside steer no terminal, and no address shows its password: every command is run on one."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.settings import Settings
from tests.conftest import FIRST_IDS
from tests.support.checkout import CHECKOUT, PYTHONPATH
from tests.support.every_command import END, OWN_PROCESS, commands
from tests.support.waiting import PATIENCE

EVIL = (
    "x\x1b[31m\x1b]52;c;QUFB\x07\x1b]8;;http://evil\x1b\\\x9b2J\u202e\u2066[bold]y[/bold]\x08\x7f"
    "\nFORGED  completed\r\nFORGED\u2028FORGED\x85FORGED"
)
"""Colours, clipboard, link, clearing in C1, bidi, markup, backspace, and line breaks of four kinds."""
STYLE = re.compile(r"\x1b\[(?:[\d;]*m|\?25[hl]|2K|1A)")
"""What rich writes itself: colours, and around a bar the cursor, which is hidden, and its line, which is cleared."""
FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
VALUES = {
    "sources": EVIL,
    "collection": EVIL,
    "query": EVIL,
    "job_id": str(FIRST_IDS["jobs"]),
    "dead_id": str(FIRST_IDS["dead_chunks"]),
}


def on_terminal(arguments: Sequence[str], env: dict[str, str], cwd: Path = CHECKOUT) -> str:
    """What a program writes on a terminal of its own."""
    mine, its = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-P", *arguments], stdin=subprocess.DEVNULL, stdout=its, stderr=its, cwd=cwd,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "400", "PYTHONPATH": PYTHONPATH} | env,
    )  # fmt: skip
    os.close(its)
    ends = threading.Timer(PATIENCE, child.kill)
    ends.start()
    written = b""
    try:
        while part := os.read(mine, 65_536):
            written += part
    except OSError:  # on Linux the end of a terminal is an error
        pass
    finally:
        ends.cancel()
        os.close(mine)
        child.wait()
    return written.decode("utf-8", "surrogateescape").replace("\r\n", "\n")


@pytest.fixture
def env(settings: Settings, client: Client, db: sa.Engine) -> Iterator[dict[str, str]]:
    """A database in which every name and every message is hostile."""
    chunks = [(EVIL, "A text.\n" + EVIL, {EVIL: EVIL}), (EVIL + "2", ""), ("3", "More.", {"k": EVIL})]
    job = client.enqueue(chunks, collection=EVIL, on_invalid="skip", route="local", idempotency_key=EVIL)
    assert job.id == FIRST_IDS["jobs"]
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE dead_chunks SET reason = :evil"), {"evil": EVIL})
        conn.execute(sa.text("UPDATE jobs SET error = :evil"), {"evil": EVIL})
    yield {"DATABASE_URL": settings.require_database_url(), "REDIS_URL": settings.require_redis_url()}


@pytest.mark.parametrize("option", [[], ["--json"]], ids=["table", "json"])
def test_no_command_prints_what_steers_a_terminal(env: dict[str, str], option: list[str]) -> None:
    given = [[*option, *arguments] for path, arguments in commands(VALUES) if path not in OWN_PROCESS]
    given += [[*option, *more] for more in (
        ["job", VALUES["job_id"], "--dead", "--explain", "--attempts"], ["dead", "show", VALUES["dead_id"], "--text"],
        ["chunks", "get", "--", EVIL, EVIL], ["chunks", "get", "--", EVIL, EVIL + "3"],
        ["export", "--", EVIL, f"/nothing/{EVIL}.jsonl"],
        ["jobs", EVIL], [EVIL], ["enqueue", EVIL, "-c", EVIL], ["models", "--" + EVIL],
    )]  # fmt: skip
    # The chunks are deleted last, so that the others have something to show.
    given.sort(key=lambda arguments: bool({"delete", "drop", "prune", "evict", "retry", "cancel"} & {*arguments}))
    written = on_terminal(["-m", "tests.support.every_command", json.dumps(given)], env)
    assert written.count(END) == len(given)
    assert written.count("FORGED") > 5, "nothing of what is hostile was shown, so nothing was tested"
    bare = STYLE.sub("", written)
    assert FORBIDDEN.findall(bare) == []
    assert "[bold]y[/bold]" in bare
    forged = [line for line in bare.splitlines() if line.lstrip().startswith("FORGED")]
    assert forged == [], "a name drew a line of its own"
