"""The threat model names tests that exist, and the pages that belong to it are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/threat-model.md").read_text()
PROMISE = re.compile(r"^\| P(\d+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)


def test_each_promise_names_tests_that_exist() -> None:
    code = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    tests = set(re.findall(r"^ *def (test_\w+)\(", code, re.MULTILINE))
    promises = PROMISE.findall(PAGE)
    assert [int(number) for number, _, _ in promises] == list(range(1, len(promises) + 1))
    assert len(promises) >= 16
    for number, promise, named in promises:
        names = re.findall(r"`(\w+)`", named)
        assert names, f"P{number} names no test: {promise}"
        assert set(names) <= tests, f"P{number} names tests that do not exist: {set(names) - tests}"


def test_whoever_finds_a_fault_or_loses_a_machine_learns_what_to_do() -> None:
    report = (ROOT / "SECURITY.md").read_text()
    assert "docs/threat-model.md" in report
    assert "90 days" in report
    runbook = (ROOT / "docs/runbook.md").read_text()
    for title in ("A stolen machine", "A stolen key", "A poisoned queue", "A false charge"):
        assert f"\n## {title}\n" in runbook
        assert f"](#{title.lower().replace(' ', '-')})" in runbook
