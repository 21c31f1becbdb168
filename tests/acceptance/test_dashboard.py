"""Each panel of the dashboard shows something in a real Prometheus whose targets are a real worker and a poller."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from chunkmill import Client, JobState
from chunkmill.settings import Settings
from tests.acceptance.conftest import Processes
from tests.support.waiting import PATIENCE, until

DASHBOARD = json.loads((Path(__file__).parents[2] / "deploy/grafana-dashboard.json").read_text())
PORT = "22564"
PROMETHEUS = shutil.which("prometheus")
NOT_HERE = re.compile(r"chunkmill_gpu_|chunkmill_provider_")
"""What only a worker with a GPU or a worker of the paid lanes has."""


def expressions() -> list[str]:
    """What the panels ask, with the variables as Grafana fills them in."""
    asked = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    return [
        expr.replace("$__rate_interval", "15s").replace("$job", ".*") for expr in asked if not NOT_HERE.search(expr)
    ]


@pytest.mark.slow
@pytest.mark.skipif(PROMETHEUS is None, reason="needs prometheus; on Debian: apt-get install prometheus")
def test_each_panel_has_something_to_show(
    processes: Processes, client: Client, settings: Settings, tmp_path: Path, free_tcp_port: int
) -> None:
    worker = processes.worker(METRICS_PORT=PORT)
    poller = processes.start("chunkmill.cli", "poller", METRICS_PORT=PORT, OPENAI_MONTHLY_BUDGET_USD="5")
    pages = []
    for process in (worker, poller):
        process.wait_for("/metrics")
        pages += re.findall(r"metrics are served at http://([\d.:]+)/metrics", process.output())
    assert len(pages) == 2
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "chunkmill", "static_configs": [{"targets": pages}]}],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    assert PROMETHEUS is not None
    server = subprocess.Popen(
        [
            PROMETHEUS, f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{free_tcp_port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def ask(expression: str) -> list[Any]:
        query = urllib.parse.urlencode({"query": f"max_over_time(({expression})[10m:1s])"})
        with urllib.request.urlopen(f"http://127.0.0.1:{free_tcp_port}/api/v1/query?{query}") as answer:
            result: list[Any] = json.load(answer)["data"]["result"]
            return result

    def empty() -> list[str]:
        try:
            return [expression for expression in expressions() if not ask(expression)]
        except OSError:  # it has not begun to listen
            return ["Prometheus"]

    try:
        for name in ("other", "docs"):
            job = client.enqueue([(f"{name}-{i}", f"text {i} of {name}") for i in range(200)], collection=name)
            assert client.wait(job.id, timeout=PATIENCE).state is JobState.COMPLETED
        until(lambda: empty() == [], lambda: str(empty()), pause=1.0)
    finally:
        server.terminate()
        server.wait(PATIENCE)
