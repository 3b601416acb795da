"""Hold the locks against an index of advisories: `python images/audit.py`, a part of `make lint`.

It asks OSV for every pinned package of every lock. Where no index of advisories is reachable it says so, with the date,
and ends well: what was not audited is told, and does not stop whoever works offline. A found advisory ends it with 1.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
LOCKS: Final = (
    "requirements/runtime.txt",
    "requirements/dev.txt",
    "requirements/rtx.txt",
    "images/mlflow.txt",
    "images/sbom.txt",
)

ACCEPTED: Final[dict[str, str]] = {}
"""Advisories that do not apply, by id, with the reason and the date of the decision."""

INDEX_VARIABLE: Final = "YOLOV8_NAS_ADVISORIES"
"""Environment variable with the address of another index that speaks OSV's protocol, such as a mirror."""

_INDEX: Final = "https://api.osv.dev/v1/querybatch"
_PIN: Final = re.compile(r"^([A-Za-z0-9._-]+)==([^ ;\\]+)", re.MULTILINE)
_AT_ONCE: Final = 500
_LONGEST: Final = 64 * 2**20

Ask = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


def pins(locks: Iterable[Path]) -> list[tuple[str, str]]:
    """Every package and version that a lock names, once."""
    return sorted({(name.lower(), version) for lock in locks for name, version in _PIN.findall(lock.read_text())})


def audit(packages: list[tuple[str, str]], ask: Ask) -> dict[tuple[str, str], list[str]]:
    """The advisories of each package that has any which is not accepted.

    Args:
        packages: Names and versions.
        ask: Asks the index: queries to results, in the same order.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for start in range(0, len(packages), _AT_ONCE):
        part = packages[start : start + _AT_ONCE]
        queries = [{"package": {"ecosystem": "PyPI", "name": name}, "version": version} for name, version in part]
        for package, result in zip(part, ask(queries), strict=True):
            ids = sorted(one["id"] for one in result.get("vulns", ()) if one["id"] not in ACCEPTED)
            if ids:
                found[package] = ids
    return found


def _ask(queries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        os.environ.get(INDEX_VARIABLE, _INDEX),
        data=json.dumps({"queries": queries}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        results: list[dict[str, Any]] = json.loads(answer.read(_LONGEST))["results"]
    return results


def main(ask: Ask = _ask) -> int:
    """Audit all locks, and tell."""
    packages = pins(ROOT / lock for lock in LOCKS)
    today = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    try:
        found = audit(packages, ask)
    except (OSError, ValueError, KeyError) as error:
        print(f"{today}: {len(packages)} pinned packages NOT audited: no index of advisories is reachable ({error})")
        return 0
    for (name, version), ids in found.items():
        print(f"{name} {version}: {', '.join(ids)}", file=sys.stderr)
    print(f"{today}: {len(packages)} pinned packages audited, {len(found)} with advisories")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
