"""The dashboard and the alert rules speak of metrics that there are, and lead to entries that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from chunkmill.telemetry.metrics import METRICS
from tests.support.waiting import PATIENCE

ROOT = Path(__file__).parents[3]
DASHBOARD = json.loads((ROOT / "deploy/grafana-dashboard.json").read_text())
ALERTS = yaml.safe_load((ROOT / "deploy/alerts.yml").read_text())
RULES = ALERTS["groups"][0]["rules"]
TABLE = {metric.name: metric for metric in METRICS}
OF_THE_PROCESS = {"process_resident_memory_bytes", "process_cpu_seconds_total"}
OF_PROMETHEUS = {"job", "instance"}
PROMTOOL = shutil.which("promtool")

SELECTOR = re.compile(r"\b((?:chunkmill|process)_[a-z0-9_]+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r"(\w+)\s*(=~|!~|!=|=)\s*([\"`'])(.*?)\3")
GROUPING = re.compile(r"\b(?:by|on)\s*\(([\w\s,]*)\)")


def problems_of(expression: str) -> list[str]:
    """What in a PromQL expression the table does not have: metrics, labels, values."""
    problems = []
    labels_there = set(OF_PROMETHEUS)
    for name, matchers in SELECTOR.findall(expression):
        if name not in TABLE and name not in OF_THE_PROCESS:
            problems.append(f"no metric {name}")
            continue
        labels = {label.name: label.values for label in TABLE[name].labels} if name in TABLE else {}
        labels_there |= labels.keys()
        for label, _, _, value in MATCHER.findall(matchers):
            if label not in labels and label not in OF_PROMETHEUS:
                problems.append(f"{name} has no label {label}")
            elif label in labels:
                problems += [f"{name}: {label} is never {one}" for one in value.split("|") if one not in labels[label]]
    for names in GROUPING.findall(expression):
        problems += [f"no label {name}" for name in re.findall(r"\w+", names) if name not in labels_there]
    return problems


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


@pytest.mark.parametrize("expression", expressions())
def test_a_panel_asks_for_what_there_is(expression: str) -> None:
    assert SELECTOR.search(expression)
    assert problems_of(expression) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_asks_for_what_there_is(rule: dict[str, Any]) -> None:
    assert SELECTOR.search(rule["expr"])
    assert problems_of(rule["expr"]) == []


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("max(chunkmill_nothing)", "no metric chunkmill_nothing"),
        ('chunkmill_store_up{shop="redis"}', "chunkmill_store_up has no label shop"),
        ('chunkmill_store_up{store="mysql"}', "chunkmill_store_up: store is never mysql"),
        ("max by (lame) (chunkmill_ready_chunk_batches)", "no label lame"),
    ],
)
def test_what_there_is_not_is_noticed(expression: str, problem: str) -> None:
    assert problems_of(expression) == [problem]


def headings(page: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    lines = re.findall(r"^#+ (.*)$", page, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.strip().lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_leads_to_an_entry_of_the_runbook(rule: dict[str, Any]) -> None:
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert page == "docs/runbook.md"
    assert anchor in headings((ROOT / page).read_text())
    assert rule["annotations"]["summary"].endswith(".")
    assert rule["labels"]["severity"] in ("critical", "warning")


def test_the_rules_cover_what_must_not_go_unseen() -> None:
    asked = {name for rule in RULES for name, _ in SELECTOR.findall(rule["expr"])}
    assert asked >= {
        "chunkmill_oldest_waiting_seconds",
        "chunkmill_ready_chunk_batches",
        "chunkmill_recent_faults",
        "chunkmill_lane_state",
        "chunkmill_budget_usd",
        "chunkmill_adjusted_usd",
        "chunkmill_store_up",
        "chunkmill_poller_last_round_timestamp_seconds",
        "chunkmill_last_progress_timestamp_seconds",
    }
    assert len({rule["alert"] for rule in RULES}) == len(RULES)


def test_the_dashboard_can_be_imported() -> None:
    """The structure that Grafana wants; its rows are the four questions."""
    assert [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"] == [
        "Is it complete?",
        "Is it fast?",
        "Is it healthy?",
        "What does it cost?",
    ]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
    for panel in panels():
        # A data source of this machine's Grafana, and no other's, can be chosen at the import.
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {"datasource", "job"}
    assert "id" not in DASHBOARD


def promtool(*arguments: str | Path) -> None:
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool (Debian package prometheus) is not on PATH")


@needs_promtool
def test_promtool_takes_the_rules_and_the_configuration() -> None:
    promtool("check", "rules", "--lint-fatal", ROOT / "deploy/alerts.yml")
    promtool("check", "config", ROOT / "deploy/prometheus.yml")


@needs_promtool
def test_the_rules_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", ROOT / "tests/fixtures/alerts_test.yml")


@needs_promtool
def test_promtool_takes_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{n}", "expr": expression.replace("$__rate_interval", "5m").replace("$job", ".*")}
        for n, expression in enumerate(expressions())
    ]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", file)


def test_the_example_of_a_configuration_uses_our_rules() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())
    assert config["rule_files"] == ["alerts.yml"]
    assert [job["job_name"] for job in config["scrape_configs"]] == ["chunkmill-poller", "chunkmill-worker"]
