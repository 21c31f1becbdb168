"""`make release`: what a worker machine installs, as a CycloneDX list of parts (SBOM) and as a list of their licences.

The parts come from requirements.lock, with the digests of their files. The licences come from the metadata of what is
installed here; a part that is not installed here is named without one.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

from chunkmill.system.locked import TORCH, read_lock

ROOT = Path(__file__).parents[2]
NOT_INSTALLED = {"dev", "bench", "gpu", "build", "testing"}
"""Extras that no machine in production has."""


def licence(name: str) -> str:
    """The licence of an installed package, as its metadata states it; empty if it is not installed or states none."""
    try:
        about = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return ""
    stated = about.get("License-Expression") or about.get("License") or ""
    classified = [
        line.rsplit(" :: ", 1)[-1] for line in about.get_all("Classifier") or [] if line.startswith("License")
    ]
    return " ".join((stated if 0 < len(stated) < 80 else ", ".join(classified)).split())


def parts(lock: str) -> list[dict[str, Any]]:
    """One CycloneDX component for each package that some machine in production installs."""
    parts = []
    for extras, lines in read_lock(lock):
        builds = {extra.partition(":")[2] for extra in extras} - {""}
        if {extra.partition(":")[0] for extra in extras} <= NOT_INSTALLED or builds - set(TORCH):
            continue
        name, version = re.match(r"([\w.-]+)==([^ ;]+)", lines).groups()  # type: ignore[union-attr]
        component: dict[str, Any] = {
            "type": "library",
            "bom-ref": f"{name}@{version}",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{name}@{version.replace('+', '%2B')}",
            "hashes": [{"alg": "SHA-256", "content": digest} for digest in re.findall(r"sha256:([0-9a-f]{64})", lines)],
            "properties": [{"name": "chunkmill:extras", "value": " ".join(sorted(extras))}],
        }
        if stated := licence(name):
            component["licenses"] = [{"license": {"name": stated}}]
        parts.append(component)
    return parts


def bill(lock: str) -> dict[str, Any]:
    """The whole document, CycloneDX 1.5. It is the same for the same lock."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, lock)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": "chunkmill",
                "name": "chunkmill",
                "version": version,
                "licenses": [{"license": {"id": "Apache-2.0"}}],
            }
        },
        "components": parts(lock),
    }


def main(folder: Path) -> None:
    document = bill((ROOT / "requirements.lock").read_text())
    version = document["metadata"]["component"]["version"]
    (folder / f"chunkmill-{version}.cdx.json").write_text(json.dumps(document, indent=1) + "\n")
    lines = []
    for part in document["components"]:
        stated = part["licenses"][0]["license"]["name"] if "licenses" in part else "not stated"
        lines.append(f"{part['name']} {part['version']}: {stated}")
    (folder / f"chunkmill-{version}-licences.txt").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
