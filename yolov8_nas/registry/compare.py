"""Two versions side by side: accuracy, latency, memory, architecture, data.

The interval of the difference in accuracy is that of `evaluation.compare`. It takes what was found on each image: kept
with the versions since they were scored on the same state of a dataset, or found anew on the images that are given.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from yolov8_nas.errors import InputError
from yolov8_nas.reading import parse_json
from yolov8_nas.registry import trial
from yolov8_nas.registry.pull import fetch_scores
from yolov8_nas.registry.query import RegisteredVersion, find_version
from yolov8_nas.registry.tracking import opened

if TYPE_CHECKING:
    from yolov8_nas.evaluation import Evaluation

_MEASURED: Final = (
    ("latency p50", "ms", "latency_p50_ms"),
    ("latency p90", "ms", "latency_p90_ms"),
    ("latency p99", "ms", "latency_p99_ms"),
    ("latency p50 with NMS", "ms", "latency_with_nms_p50_ms"),
    ("latency p90 with NMS", "ms", "latency_with_nms_p90_ms"),
    ("latency p99 with NMS", "ms", "latency_with_nms_p99_ms"),
    ("peak memory", "MiB", "memory_mb"),
    ("energy per image", "mJ", "energy_mj"),
    ("power", "W", "power_w"),
    ("parameters", "", "params"),
    ("FLOPs", "G", "gflops"),
)

_ORIGIN: Final = (
    ("hardware", "hardware_id"),
    ("runtime", "runtime"),
    ("runtime version", "runtime_version"),
    ("precision", "precision"),
    ("limits", "constraints"),
    ("dataset", "dataset"),
    ("supernet", "supernet"),
    ("run", "run_id"),
)


def compare(tracking_uri: str, first: str, second: str, data: str | None = None) -> dict[str, Any]:
    """Compare two versions.

    Args:
        tracking_uri: As `tracking.resolve_uri` gave it.
        first: The one that is spoken of, as for `query.find`.
        second: The one it is compared with.
        data: A dataset on whose val split both are scored; nothing to take what was kept with them.

    Returns:
        Plain values: `first` and `second` (as `query` describes them), `accuracy` (a row per figure, with difference,
        interval and word where they are known), `scored_on`, and rows of `measured`, `architecture` and `origin`.

    Raises:
        InputError: There is no such version, or the dataset cannot be used.
        StageError: A file is not the one that was registered.
    """
    with opened(tracking_uri) as client, tempfile.TemporaryDirectory() as folder:
        one, other = find_version(client, first), find_version(client, second)
        if data is None:
            scored_on, scores = _kept(one, other, Path(folder))
        else:
            scored_on, scores = _anew(one, other, data, Path(folder))
    return {
        "first": one.to_dict(),
        "second": other.to_dict(),
        "scored_on": scored_on,
        "accuracy": with_interval(*scores) if scores else _as_registered(one, other),
        "measured": [
            {"what": what, "unit": unit, "first": one.metrics.get(key), "second": other.metrics.get(key)}
            for what, unit, key in _MEASURED
            if key in one.metrics or key in other.metrics
        ],
        "architecture": list(_architecture(one, other)),
        "origin": [{"what": what, "first": one.tags.get(key), "second": other.tags.get(key)} for what, key in _ORIGIN],
    }


def with_interval(one: Evaluation, other: Evaluation) -> list[dict[str, Any]]:
    """mAP50-95 of two detectors on the same images, over all classes and of each: with difference, interval and word.

    A class without boxes in the split has no row.
    """
    from yolov8_nas.evaluation import compare as bootstrap

    rows = [
        {"what": "mAP50-95", "first": one.map50_95, "second": other.map50_95, **asdict(bootstrap(one, other))},
        {"what": "mAP50", "first": one.map50, "second": other.map50},
    ]
    labels = sorted({int(label) for image in one.images for label in image.target_cls})
    for label, (name, ap) in zip(labels, one.per_class.items(), strict=True):
        difference = bootstrap(_of_class(one, label), _of_class(other, label))
        rows.append({"what": name, "first": ap, "second": other.per_class[name], **asdict(difference)})
    return rows


def _of_class(evaluation: Evaluation, label: int) -> Evaluation:
    """What was found of one class."""
    images = []
    for image in evaluation.images:
        mine = image.pred_cls == label
        images.append(
            replace(
                image,
                tp=image.tp[mine],
                conf=image.conf[mine],
                pred_cls=image.pred_cls[mine],
                target_cls=image.target_cls[image.target_cls == label],
            )
        )
    return replace(evaluation, images=tuple(images))


def _kept(
    one: RegisteredVersion, other: RegisteredVersion, folder: Path
) -> tuple[str, tuple[Evaluation, Evaluation] | None]:
    """What was kept of each image with both, and the images in words; or why the two cannot be compared by it."""
    from yolov8_nas.evaluation import Evaluation

    advice = "so the figures have no interval; give --data to score both on the same images"
    if one.tags.get("dataset") != other.tags.get("dataset"):
        return f"two states of a dataset: figures as registered, which do not compare; {advice}", None
    files = [fetch_scores(version, folder / str(version).replace("/", "-")) for version in (one, other)]
    if files[0] is None or files[1] is None:
        return f"figures as registered: what was found on each image was not kept; {advice}", None
    scores = Evaluation.load(files[0]), Evaluation.load(files[1])
    for version, found in zip((one, other), scores, strict=True):
        labels = {int(label) for image in found.images for label in image.target_cls}
        if len(labels) != len(found.per_class) or found.per_class.keys() != scores[0].per_class.keys():
            raise InputError(f"{version}: its scores are of other classes than its boxes or {one}; {advice}")
    return f"{len(scores[0].images)} images of val, when they were registered", scores


def _anew(
    one: RegisteredVersion, other: RegisteredVersion, data: str, folder: Path
) -> tuple[str, tuple[Evaluation, Evaluation]]:
    images = trial.val_split(data, folder)
    entrants = [trial.entrant(version, folder) for version in {str(v): v for v in (one, other)}.values()]
    scores = trial.score(entrants, images, folder)
    return f"{len(images.files)} images of val of {data}, now", (scores[0], scores[-1])


def _as_registered(one: RegisteredVersion, other: RegisteredVersion) -> list[dict[str, Any]]:
    return [
        {"what": what, "first": one.metrics.get(key), "second": other.metrics.get(key)}
        for what, key in (("mAP50-95", "map50_95"), ("mAP50", "map50"))
    ]


def _architecture(one: RegisteredVersion, other: RegisteredVersion) -> Iterator[dict[str, Any]]:
    """The parts of the network, and whether each is the same in both."""
    keys = ("space", "imgsz", "batch")
    parts = [{**{key: version.params.get(key) for key in keys}, **_parts(version)} for version in (one, other)]
    for what in {**parts[0], **parts[1]}:
        first, second = parts[0].get(what), parts[1].get(what)
        yield {"what": what, "first": first, "second": second, "same": first == second}


def _parts(version: RegisteredVersion) -> dict[str, str]:
    """The architecture of a version as a line of text per part.

    Raises:
        InputError: It is not recorded, or is none.
    """
    try:
        return _lines(parse_json(version.params["architecture"], "parameter architecture"))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{version}: its parameter architecture is none ({error}); register it again") from None


def _lines(architecture: Mapping[str, Any]) -> dict[str, str]:
    lines = {"widths of down-sampling": ", ".join(f"{name} {width}" for name, width in architecture["convs"].items())}
    for name, block in architecture["blocks"].items():
        lines[name] = ", ".join(f"{key} {value}" for key, value in block.items())
    lines["sppf"] = ", ".join(f"{key} {value}" for key, value in architecture["sppf"].items())
    lines["attention"] = str(architecture.get("attention", False))
    detect = architecture.get("detect", {"classes": "conv3", "reg_max": 16})
    lines["detect"] = ", ".join(f"{key} {value}" for key, value in detect.items())
    return lines
