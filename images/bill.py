"""The bill of materials of the Python package: `make sbom` writes build/yolov8-nas.cdx.json, in CycloneDX's form.

It holds what the lock pins, each with the SHA-256 of the files that may be installed. Those of the images are read off
what was installed (`build.py`), Debian's packages among it.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
LOCK: Final = "requirements/runtime.txt"
BILL: Final = ROOT / "build" / "yolov8-nas.cdx.json"

_ENTRY: Final = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^ ;\\\n]+)(?P<rest>(?:.*\\\n)*.*)$", re.MULTILINE)
_DIGEST: Final = re.compile(r"--hash=sha256:([0-9a-f]{64})")


def component(kind: str, name: str, version: str) -> dict[str, Any]:
    """A package of Python, as the bill names it."""
    purl = f"pkg:pypi/{re.sub('[-_.]+', '-', name).lower()}@{version}"
    return {"type": kind, "bom-ref": purl, "name": name, "version": version, "purl": purl}


def packages(lock: str) -> list[dict[str, Any]]:
    """The packages of a lock, each with its digests.

    Raises:
        ValueError: A package has none, or a line is not understood.
    """
    found = []
    for entry in _ENTRY.finditer(lock):
        hashes = _DIGEST.findall(entry["rest"])
        if not hashes:
            raise ValueError(f"{entry['name']}: pinned without a SHA-256; write the lock anew")
        files = [
            {"type": "distribution", "url": f"urn:sha256:{digest}", "hashes": [{"alg": "SHA-256", "content": digest}]}
            for digest in hashes
        ]
        found.append({**component("library", entry["name"], entry["version"]), "externalReferences": files})
    pinned = sum(1 for line in lock.splitlines() if re.match("[A-Za-z0-9]", line))
    if len(found) != pinned:
        raise ValueError(f"{pinned} packages in the lock, and {len(found)} are understood")
    return found


def bill(project: dict[str, Any], lock: str) -> dict[str, Any]:
    """The bill of a project: the same lock gives the same bill.

    Args:
        project: The table `project` of pyproject.toml.
        lock: The lock's text.
    """
    itself = component("application", project["name"], project["version"])
    itself["licenses"] = [{"license": {"id": project["license"]}}]
    content = packages(lock)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([itself, content]))}",
        "version": 1,
        "metadata": {"component": itself},
        "components": content,
    }


def main(arguments: Sequence[str]) -> None:
    """Write the bill, to a file that may be named."""
    target = Path(arguments[0]) if arguments else BILL
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    content = bill(project, (ROOT / LOCK).read_text())
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=2) + "\n")
    print(f"{target}: {len(content['components'])} packages of {LOCK}")


if __name__ == "__main__":
    main(sys.argv[1:])
