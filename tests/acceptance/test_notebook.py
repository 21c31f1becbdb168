"""The bar of a wait in the kernel of a real notebook: one display, which is updated in place."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import pytest
import sqlalchemy as sa

from chunkmill import Client
from chunkmill.settings import Settings
from tests.integration.hands import Hands
from tests.support.waiting import PATIENCE, until

CELL = """
from pathlib import Path
from chunkmill import Client
client = Client.from_env()
looks = 0
def look(job):
    global looks
    looks += 1
    if looks == 2:
        Path("looked").touch()
print(client.wait(302, progress=True, on_progress=look).state, looks > 2)
"""


@pytest.mark.slow  # tests/unit/chunkmill/telemetry/test_progress.py has one without a kernel
def test_a_notebook_shows_one_bar_that_ends_with_the_job(
    client: Client, settings: Settings, db: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ipykernel", reason="needs ipykernel and nbclient, which are in the extra `dev`")
    monkeypatch.setenv("DATABASE_URL", settings.require_database_url())
    monkeypatch.setenv("REDIS_URL", settings.require_redis_url())
    for name in ("other", "docs"):
        client.enqueue([(name, f"a text of {name}")], collection=name)

    hands = Hands(db)

    def work() -> None:
        until((tmp_path / "looked").exists)
        hands.embed(hands.claim(2), {})

    worker = threading.Thread(target=work)
    worker.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Jupyter's own parts
        import nbformat
        from nbclient import NotebookClient

        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
        NotebookClient(
            notebook, timeout=PATIENCE, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
        ).execute()
    worker.join()
    outputs = notebook.cells[0].outputs
    (shown,) = [output for output in outputs if output.output_type == "display_data"]
    assert '<progress max="1" value="1.0000"' in shown.data["text/html"]
    assert "1 of 1 text, completed after" in shown.data["text/html"]
    assert shown.data["text/plain"].startswith("job 302 ━")
    said = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert said.strip() == "completed True"
    # Nobody is connected that could embed, which is said below the bar and not in the log while the job is open.
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]
