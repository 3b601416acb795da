"""What one branch of a run has to tell the registry: its evidence, and the detector that it ships."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from yolov8_nas.registry.register import Deployable, Registration, register
from yolov8_nas.registry.tracking import BRANCH_TAG, find_or_create_run

if TYPE_CHECKING:
    from mlflow import MlflowClient

Curves = Sequence[Mapping[str, Any]]
"""Figures by epoch, or of moments: those have a `time` in ms since 1970, too, and a number in place of the epoch."""

SUPERNET: Final = "supernet"
"""Folder of the supernet among the parent run's artifacts."""

_METRICS_AT_ONCE: Final = 1000  # MLflow takes no more


@dataclass(frozen=True)
class Submission:
    """Everything that is sent for one target; sending it twice changes nothing.

    Attributes:
        experiment: Experiment in MLflow.
        parent: MLflow's id of the run that the branch belongs to.
        branch: What identifies the branch: the pipeline run's id, a slash and the target's label.
        label: Label of the target.
        deployable: The detector.
        curves: Figures by epoch, by the name of what was trained; they go to the branch's own run.
        shared_curves: The same of what all branches share; they go to the parent run.
        evidence: Files by the path that they get among the run's artifacts.
        shared_files: The same of what all branches share; they go to the parent run.
    """

    experiment: str
    parent: str
    branch: str
    label: str
    deployable: Deployable
    curves: Mapping[str, Curves] = field(default_factory=dict)
    shared_curves: Mapping[str, Curves] = field(default_factory=dict)
    evidence: Mapping[str, Path] = field(default_factory=dict)
    shared_files: Mapping[str, Path] = field(default_factory=dict)

    def files(self) -> dict[str, Path]:
        """Every file of it, by a name that is its own."""
        model = {f"model/{name}": path for name, path in self.deployable.files.items()}
        scores = {"scores.npz": self.deployable.scores} if self.deployable.scores else {}
        evidence = {f"evidence/{name}": path for name, path in self.evidence.items()}
        return {**model, **scores, **evidence, **{f"shared/{name}": path for name, path in self.shared_files.items()}}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the files."""
        values = {
            one.name: getattr(self, one.name)
            for one in fields(self)
            if one.name not in ("deployable", "evidence", "shared_files")
        }
        detector = {
            one.name: getattr(self.deployable, one.name)
            for one in fields(Deployable)
            if one.name not in ("files", "scores")
        }
        return {**values, "deployable": detector}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], files: Mapping[str, Path]) -> Submission:
        """The submission that `to_dict` and `files` described."""

        def below(folder: str) -> dict[str, Path]:
            return {name.removeprefix(folder): path for name, path in files.items() if name.startswith(folder)}

        detector = dict(values["deployable"])
        detector["limits"] = tuple(detector["limits"])
        deployable = Deployable(**detector, files=below("model/"), scores=files.get("scores.npz"))
        return cls(**{**values, "deployable": deployable}, evidence=below("evidence/"), shared_files=below("shared/"))


def submit(client: MlflowClient, submission: Submission) -> tuple[str, Registration]:
    """Log the evidence to a run of the branch's own and register the detector.

    Returns:
        MLflow's id of that run, and where the detector stands.
    """
    run = find_or_create_run(
        client,
        submission.experiment,
        BRANCH_TAG,
        submission.branch,
        name=submission.label,
        tags={"mlflow.parentRunId": submission.parent},
    )
    for owner, curves in ((submission.parent, submission.shared_curves), (run, submission.curves)):
        for name, rows in curves.items():
            _log_curves(client, owner, name, rows)
    for name, file in submission.evidence.items():
        client.log_artifact(run, str(file), name.rpartition("/")[0])
    for name, file in submission.shared_files.items():
        _log_once(client, submission.parent, name, file)
    registration = register(client, run, submission.deployable)
    client.set_terminated(run, "FINISHED")
    return run, registration


def _log_once(client: MlflowClient, run: str, name: str, file: Path) -> None:
    """Log a file unless it is there: another branch of the run may have brought it, and it can be large."""
    folder = name.rpartition("/")[0]
    there = {artifact.path: artifact.file_size for artifact in client.list_artifacts(run, folder)}
    if there.get(name) != file.stat().st_size:
        client.log_artifact(run, str(file), folder)


def _log_curves(client: MlflowClient, run: str, name: str, curves: Iterable[Mapping[str, Any]]) -> None:
    """Log each figure of each row; the time is the row's or the run's start, so that a repeated call adds nothing."""
    from mlflow.entities import Metric

    start = client.get_run(run).info.start_time
    metrics = [
        Metric(f"{name}/{key}", float(value), row.get("time", start), int(row["epoch"]))
        for row in curves
        for key, value in row.items()
        if key not in ("epoch", "time") and isinstance(value, int | float)
    ]
    for first in range(0, len(metrics), _METRICS_AT_ONCE):
        client.log_batch(run, metrics=metrics[first : first + _METRICS_AT_ONCE])
