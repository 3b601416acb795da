"""What one branch of a run has to tell the registry: its evidence, and the detector that it ships."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from yolov8_nas.registry.register import Deployable, Registration, register
from yolov8_nas.registry.tracking import experiment_id, target_run, upload

if TYPE_CHECKING:
    from mlflow import MlflowClient

SUPERNET: Final = "supernet"
"""Folder of the supernet among the parent run's artifacts."""


@dataclass(frozen=True)
class Submission:
    """Everything that is sent for one target; sending it twice changes nothing.

    Attributes:
        experiment: Experiment in MLflow.
        parent: MLflow's id of the run that the branch belongs to.
        run_id: Id of the pipeline run.
        label: Label of the target.
        deployable: The detector.
        evidence: Files by the path that they get among the run's artifacts.
        shared_files: The same of what all branches share; they go to the parent run.
    """

    experiment: str
    parent: str
    run_id: str
    label: str
    deployable: Deployable
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
    where = experiment_id(client, submission.experiment)
    run = target_run(client, where, submission.parent, submission.run_id, submission.label)
    for name, file in submission.evidence.items():
        upload(partial(client.log_artifact, run, str(file), name.rpartition("/")[0]))
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
        upload(partial(client.log_artifact, run, str(file), folder))
