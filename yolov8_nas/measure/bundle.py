"""Bundles: what has to be measured on a device where this package cannot run, and what comes back.

A bundle is one tar with networks as ONNX files, the protocol, and a program of one file that holds the modules of this
package by which networks are timed everywhere. On the device it needs NumPy and ONNX Runtime. What comes back is one
file of results. A target's results are kept together in the file that its configuration names (`far`): those of the
networks that the latency model is fitted to, and those of single files that stages asked for later, by their SHA-256.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from yolov8_nas.config import TargetConfig
from yolov8_nas.device import catalogue
from yolov8_nas.errors import InputError, StageError, WaitingError
from yolov8_nas.files import copy_file, file_sha256, write_json
from yolov8_nas.measure.benchmark import Measurement
from yolov8_nas.measure.far import FORMAT, MANIFEST, check_seal, sealed, unsealed
from yolov8_nas.measure.protocol import Protocol
from yolov8_nas.measure.returned import Returned, check_form, check_key
from yolov8_nas.measure.runtime import OnnxRuntime, Runtime, find
from yolov8_nas.paths import expanded
from yolov8_nas.store.archive import pack

PROGRAM: Final = "measure.pyz"

TABLE: Final = "table"
"""Purpose of a bundle whose results the latency model is fitted to; other purposes are names of stages."""

MODULES: Final = (
    "__init__", "credentials", "errors", "files", "foreign", "home", "names", "quiet", "reading", "device/__init__",
    "device/counters", "device/host", "device/profile", "measure/__init__", "measure/benchmark", "measure/far",
    "measure/memory", "measure/open_network", "measure/protocol",
    "measure/runtime",
)  # fmt: skip
"""The modules of this package that a bundle carries: they import the standard library, NumPy and ONNX Runtime only."""

_MAIN: Final = """\
import sys

if sys.version_info < (3, 10):
    sys.exit("measure.pyz needs Python 3.10 or later, this is %d.%d" % sys.version_info[:2])
try:
    from yolov8_nas.measure.far import main
except ImportError as error:
    sys.exit("measure.pyz needs NumPy and ONNX Runtime (%s): python -m pip install numpy onnxruntime" % error)
sys.exit(main())
"""

_README: Final = """\
Networks to be measured on {hardware} with {runtime}, {precision}.

    python -m pip install numpy onnxruntime     # on a GPU: onnxruntime-gpu, on a Jetson NVIDIA's build of it
    python measure.pyz

Let nothing else run on the device meanwhile, with its clocks and its power mode as they are in use. A measurement that
was stopped goes on where it was. Take results.json back and give it to: yolov8-nas probe CONFIG --import results.json
"""


@dataclass(frozen=True)
class Place:
    """What kind of device a configuration's name means, wherever it is.

    Attributes:
        kind: `cpu` or `gpu`.
        threads: Threads that a network runs on; nothing for all cores of the device.
    """

    kind: str
    threads: int | None


def place(target: TargetConfig) -> Place:
    """The kind of device that a target elsewhere is.

    Raises:
        InputError: Its name is unknown.
    """
    name = target.hardware.strip().lower()
    if name == "cpu":
        return Place("cpu", None)
    if name.startswith("cpu-") and name[4:-1].isdigit() and name.endswith("t") and int(name[4:-1]):
        return Place("cpu", int(name[4:-1]))
    if catalogue.find(target.hardware) is None:
        near = ", ".join(catalogue.similar(target.hardware)) or "none"
        raise InputError(
            f"hardware {target.hardware!r} of a target elsewhere: use cpu, cpu-<n>t or a name of the catalogue "
            f"(similar: {near})"
        )
    return Place("gpu", 1)


def runtime_there(target: TargetConfig) -> Runtime:
    """What runs the networks on the device.

    Raises:
        InputError: It needs more there than NumPy and ONNX Runtime, or does not compute so.
    """
    runtime = find(target.runtime, place(target).kind, "fp32" if target.precision == "best" else target.precision)
    if not isinstance(runtime, OnnxRuntime):
        raise InputError(
            f"runtime {target.runtime!r} on {target.hardware}, a device elsewhere: bundles are measured with ONNX "
            "Runtime only; use runtime: onnxruntime or onnxruntime-tensorrt"
        )
    return runtime


def write_bundle(
    path: Path,
    files: Sequence[Path],
    *,
    target: TargetConfig,
    purpose: str,
    protocol: Protocol,
    reference: Path,
    recipe: Mapping[str, Any],
) -> dict[str, Any]:
    """Pack networks for a device.

    Args:
        path: The tar to write.
        files: ONNX files under different names.
        target: The device.
        purpose: `TABLE` or the name of a stage.
        protocol: How they are measured.
        reference: The reference network, one of `files`.
        recipe: Plain values on which the networks depend; results are taken where they are the same.

    Returns:
        The bundle's manifest.
    """
    where, runtime = place(target), runtime_there(target)
    manifest = sealed(
        {
            "format": FORMAT,
            "purpose": purpose,
            "hardware": target.hardware,
            "kind": where.kind,
            "threads": where.threads,
            "runtime": runtime.name,
            "precision": runtime.precision,
            "batch": target.batch,
            "protocol": asdict(protocol),
            "recipe": dict(recipe),
            "reference": reference.name,
            "networks": {file.name: file_sha256(file) for file in files},
        }
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_json(folder / MANIFEST, manifest)
        (folder / "README.txt").write_text(_README.format(**manifest))
        write_program(folder / PROGRAM)
        (folder / "networks").mkdir()
        for file in files:
            copy_file(file, folder / "networks" / file.name)
        pack(folder, path)
    return manifest


def write_program(path: Path) -> None:
    """Write the measuring program: a zip that Python runs. The same modules give the same bytes."""
    root = Path(__file__).parents[1]
    sources = {"__main__.py": _MAIN}
    sources |= {f"yolov8_nas/{module}.py": (root / f"{module}.py").read_text() for module in MODULES}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in sources.items():
            archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)


def read_results(path: Path, target: TargetConfig) -> dict[str, Any]:
    """Results as they came from a device, checked.

    Raises:
        InputError: They are damaged, incomplete or not of the form that the measuring program gives them, of networks
            that have changed, of another device or of another runtime, precision or batch than the target's.
    """
    return check_results(unsealed(path), target, path)


def check_results(results: dict[str, Any], target: TargetConfig, source: Path) -> dict[str, Any]:
    """The results, if they are whole and of the target.

    Raises:
        InputError: See `read_results`.
    """
    again = "pack a bundle, measure it there and import that"
    if "bundle" not in results or "measured" not in results:
        raise InputError(f"{source}: holds no measurements; give the {PROGRAM}'s results.json")
    order = check_seal(results["bundle"], source)
    check_form(results, source)
    if results["networks"] != order["networks"]:
        raise InputError(f"{source}: other networks were measured than were packed; {again}")
    if set(results["measured"]) != set(order["networks"]):
        missing = sorted(set(order["networks"]) - set(results["measured"]))
        raise InputError(f"{source}: {len(missing)} networks were not measured; let {PROGRAM} run to its end")
    runtime, profile = runtime_there(target), results["profile"]
    asked = {"runtime": runtime.name, "precision": runtime.precision, "batch": target.batch}
    for name, wanted in asked.items():
        if order[name] != wanted:
            raise InputError(f"{source}: measured with {name} {order[name]}, the target has {wanted}; {again}")
    if why := _another_device(target, profile):
        raise InputError(
            f"{source}: measured on {profile['model']} with {profile['threads']} threads, and the target is "
            f"{target.hardware}: {why}; give the target's results, or name that device"
        )
    check_key(results, source)
    return results


def _another_device(target: TargetConfig, profile: Mapping[str, Any]) -> str | None:
    """Why a device is not the target's; nothing where it is."""
    where = place(target)
    if profile["kind"] != where.kind:
        return f"a {profile['kind']} is no {where.kind}"
    if where.kind == "cpu":
        return "other threads" if where.threads not in (None, profile["threads"]) else None
    asked, found = catalogue.find(target.hardware), catalogue.find(profile["model"])
    if asked and found and set(asked.specifications) & set(found.specifications):
        return None
    return "it is another GPU"


@dataclass(frozen=True)
class Kept:
    """What is known of a device elsewhere.

    Attributes:
        table: Results that the latency model is fitted to.
        single: Results that stages asked for later.
    """

    table: Returned
    single: tuple[Mapping[str, Any], ...] = ()

    def measured(self, purpose: str) -> dict[str, Any]:
        """What was measured for a stage: measurements by the SHA-256 of the network's file."""
        return {
            digest: results["measured"][name]
            for results in self.single
            if results["bundle"]["purpose"] == purpose
            for name, digest in results["networks"].items()
        }


def read_kept(target: TargetConfig) -> Kept:
    """What the file of a target elsewhere holds.

    Raises:
        InputError: There is no such file yet, or it is damaged or of another device.
    """
    assert target.far is not None
    path = expanded(target.far)
    if not path.is_file():
        raise InputError(
            f"target {target.hardware} elsewhere: there are no results in {path} yet. Pack a bundle (yolov8-nas probe "
            f"CONFIG --bundle FILE.tar), run {PROGRAM} on the device, and import what it writes (yolov8-nas probe "
            "CONFIG --import results.json)"
        )
    results = unsealed(path).get("results")
    if not isinstance(results, list) or not results:
        raise InputError(
            f"{path}: holds no results; import those of {PROGRAM} again (yolov8-nas probe CONFIG --import)"
        )
    table, *single = (check_results(check_seal(r, path), target, path) for r in results)
    return Kept(Returned(table), tuple(single))


def keep(results: Mapping[str, Any], target: TargetConfig) -> None:
    """Add results to the file of a target elsewhere.

    Those that a latency model is fitted to begin a new file: what was measured before them may be of another driver or
    runtime.

    Raises:
        InputError: They are of single networks, and the device or its software is not what the file is of.
    """
    assert target.far is not None
    path = expanded(target.far)
    if results["bundle"]["purpose"] == TABLE:
        everything = [results]
    else:
        kept = read_kept(target)
        differing = [key for key, value in kept.table.key.items() if results["key"].get(key) != value]
        if differing:
            raise InputError(
                f"these results are of a device or software with another {' and '.join(differing)} than the table in "
                f"{path}: measure the table anew (yolov8-nas probe CONFIG --bundle FILE.tar)"
            )
        everything = [kept.table.content, *kept.single, results]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, sealed({"format": FORMAT, "results": everything}))


def measured_there(
    files: Sequence[Path], *, target: TargetConfig, stage: str, protocol: Protocol, reference: Path, bundle: Path
) -> list[Measurement]:
    """What was measured elsewhere of files; what was not is packed, and the stage has to wait for it.

    Args:
        files: Networks.
        target: The device.
        stage: The stage that asks.
        protocol: How to measure.
        reference: The reference network.
        bundle: Where a bundle is written.

    Raises:
        StageError: A network could not be measured there.
        WaitingError: Something has to be measured there first; the message names the bundle.
    """
    known = read_kept(target).measured(stage)
    found = [known.get(file_sha256(file)) for file in files]
    if failed := [one["failed"] for one in found if one and "failed" in one]:
        raise StageError(f"a network could not be measured on {target.hardware}: {failed[0]}")
    if not all(found):
        everything = list({file.name: file for file in (*files, reference)}.values())
        write_bundle(
            bundle, everything, target=target, purpose=stage, protocol=protocol, reference=reference, recipe={}
        )
        raise WaitingError(
            f"{len(files)} networks have to be measured on {target.hardware} first: they are packed in {bundle}. "
            f"Unpack it there, run {PROGRAM}, import its results.json (yolov8-nas probe CONFIG --import results.json), "
            "and give this command again"
        )
    return [Measurement.from_dict(one) for one in found if one]


def differences(packed: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """Names of what networks were packed with otherwise than a recipe has it."""
    found = json.loads(json.dumps(dict(recipe)))
    return [name for name, value in found.items() if packed.get(name) != value]
