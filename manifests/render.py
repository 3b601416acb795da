"""Render the overlays, check every object, and write what can be applied.

    python manifests/render.py [--crds PATH] [--out build/manifests]

Each object is held against the JSON schemas of Kubernetes (of the oldest release that is supported and of the newest
that is known), custom resources against the schemas in their own definitions: those in `third_party/`, or those of a
cluster, which `--crds` gives (a file or a folder, such as what `kubectl get crd -o yaml` prints). Objects that use an
image which has no digest yet are checked all the same, but the overlay is not written: nothing is applied with a
floating image.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
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
_BY_DIGEST: Final = re.compile(r"@sha256:[0-9a-f]{64}$")

Object = dict[str, Any]


class ManifestError(Exception):
    """What a person has to mend, in one line."""


def kustomize(folder: Path) -> str:
    """What `kubectl kustomize` makes of a folder.

    Raises:
        ManifestError: There is no kubectl, or it refused.
    """
    if shutil.which("kubectl") is None:
        raise ManifestError("kubectl is not installed; 1.27 or later renders the manifests, without a cluster")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise ManifestError(f"{folder}: {done.stderr.strip()}")
    return done.stdout


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
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text)
            print(f"  written to {out}")
    except ManifestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
