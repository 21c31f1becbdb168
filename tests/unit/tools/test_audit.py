"""What `make audit` makes of pip-audit's answers."""

from __future__ import annotations

import sys
from typing import Any

from tests.support.audit import ask, judge

CLEAN: dict[str, Any] = {"name": "celery", "version": "5.7.0", "vulns": []}
UNKNOWN = {"name": "own", "skip_reason": "not found"}
BROKEN = {"name": "old", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}]}
UNMENDED = {"name": "odd", "version": "2", "vulns": [{"id": "PYSEC-2", "fix_versions": []}]}


def test_a_vulnerability_is_named_with_its_fixed_release() -> None:
    said, vulnerable = judge([CLEAN, BROKEN, UNMENDED], "")
    assert vulnerable
    assert said == ["old 1.0: PYSEC-1, fixed in 1.1", "odd 2: PYSEC-2, fixed in no release yet"]


def test_what_could_not_be_audited_is_said_and_fails_nothing() -> None:
    assert judge([CLEAN, UNKNOWN], "") == (
        [
            "warning: 1 of 2 packages are unknown to the index and were not audited",
            "no known vulnerability in 1 packages",
        ],
        False,
    )
    assert judge([], "ConnectionError: no network") == (
        ["warning: nothing was audited: ConnectionError: no network"],
        False,
    )
    assert not judge([UNKNOWN], "")[1]


def test_an_audit_that_breaks_or_hangs_is_no_finding() -> None:
    broken = [
        sys.executable,
        "-c",
        "import sys; print('a\\nConnectionError: no network', file=sys.stderr); sys.exit(1)",
    ]
    assert ask(broken, 60) == ([], "ConnectionError: no network")
    assert ask([sys.executable, "-c", "import time; time.sleep(60)"], 0.1) == ([], "no answer within 0.1 s")
    tool = [sys.executable, "-c", "print('{\"dependencies\": [1]}'); raise SystemExit(1)"]
    assert ask(tool, 60) == ([1], "")
