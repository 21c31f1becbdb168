"""`make audit`: lists the known vulnerabilities of the installed packages, with pip-audit.

If it cannot find out, it warns and does not fail.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

LIMIT_S = 120
WARN_LIMIT_S = 30
"""How long `make test` waits, whose other checks need no network."""
COMMAND = [sys.executable, "-m", "pip_audit", "--format=json", "--progress-spinner=off", "--skip-editable"]


def ask(command: Sequence[str], limit_s: float) -> tuple[list[dict[str, Any]], str]:
    """Return the audited packages, and the reason if there are none.

    pip-audit exits with code 1 both if it finds a vulnerability and if it fails, so its output is read instead.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return [], f"no answer within {limit_s:g} s"
    try:
        return json.loads(done.stdout)["dependencies"], ""
    except (ValueError, KeyError):
        lines = done.stderr.strip().splitlines()
        return [], lines[-1] if lines else f"exit code {done.returncode}, and nothing said"


def judge(packages: Sequence[dict[str, Any]], problem: str) -> tuple[list[str], bool]:
    """Return the lines to print, and whether a vulnerability is known."""
    known = [(package, vulnerability) for package in packages for vulnerability in package.get("vulns", ())]
    said = [
        f"{package['name']} {package['version']}: {vulnerability['id']}, "
        f"fixed in {', '.join(vulnerability['fix_versions']) or 'no release yet'}"
        for package, vulnerability in known
    ]
    unknown = sum("skip_reason" in package for package in packages)
    if problem or not packages:
        said.append(f"warning: nothing was audited: {problem or 'no package was named'}")
    elif unknown:
        said.append(f"warning: {unknown} of {len(packages)} packages are unknown to the index and were not audited")
    if not known and unknown < len(packages):
        said.append(f"no known vulnerability in {len(packages) - unknown} packages")
    return said, bool(known)


def main(arguments: Sequence[str]) -> int:
    """Print what the audit says. With ``--warn`` the exit code is always 0."""
    warn = "--warn" in arguments
    said, vulnerable = judge(*ask(COMMAND, WARN_LIMIT_S if warn else LIMIT_S))
    print("\n".join(said))
    return int(vulnerable and not warn)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
