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
        deployable: The detector that ships.
        choices: Detectors to choose from beside it.
        evidence: Files by the path that they get among the run's artifacts.
        shared_files: The same of what all branches share; they go to the parent run.
    """

    experiment: str
    parent: str
    run_id: str
    label: str
    deployable: Deployable
    choices: tuple[Deployable, ...] = ()
    evidence: Mapping[str, Path] = field(default_factory=dict)
    shared_files: Mapping[str, Path] = field(default_factory=dict)

    def files(self) -> dict[str, Path]:
        """Every file of it, by a name that is its own."""
        found: dict[str, Path] = {}
        for folder, detector in (("", self.deployable), *((f"choice-{i}/", one) for i, one in enumerate(self.choices))):
            found |= {f"{folder}model/{name}": path for name, path in detector.files.items()}
            if detector.scores:
                found[f"{folder}scores.npz"] = detector.scores
        evidence = {f"evidence/{name}": path for name, path in self.evidence.items()}
        return {**found, **evidence, **{f"shared/{name}": path for name, path in self.shared_files.items()}}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the files."""
        values = {
            one.name: getattr(self, one.name)
            for one in fields(self)
            if one.name not in ("deployable", "choices", "evidence", "shared_files")
        }
        choices = {"choices": [_plain(one) for one in self.choices]} if self.choices else {}
        return {**values, "deployable": _plain(self.deployable), **choices}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], files: Mapping[str, Path]) -> Submission:
        """The submission that `to_dict` and `files` described."""

        def below(folder: str) -> dict[str, Path]:
            return {name.removeprefix(folder): path for name, path in files.items() if name.startswith(folder)}

        def detector(told: Mapping[str, Any], folder: str = "") -> Deployable:
            limits, scores = tuple(told["limits"]), files.get(f"{folder}scores.npz")
            return Deployable(**{**told, "limits": limits}, files=below(f"{folder}model/"), scores=scores)

        choices = tuple(detector(one, f"choice-{i}/") for i, one in enumerate(values.get("choices", ())))
        known = {**values, "deployable": detector(values["deployable"]), "choices": choices}
        return cls(**known, evidence=below("evidence/"), shared_files=below("shared/"))


def _plain(detector: Deployable) -> dict[str, Any]:
    return {one.name: getattr(detector, one.name) for one in fields(Deployable) if one.name not in ("files", "scores")}


@dataclass(frozen=True)
class Submitted:
    """What came of a submission.

    Attributes:
        run: MLflow's id of the branch's run.
        shipped: Where the detector that ships stands.
        choices: Where those to choose from stand, in their order.
    """

    run: str
    shipped: Registration
    choices: tuple[Registration, ...]


def submit(client: MlflowClient, submission: Submission) -> Submitted:
    """Log the evidence to a run of the branch's own and register the detectors, the one that ships last.

    The newest version of the model is the one that ships then. Each of the others has a run of its own: a run has one
    figure of a name.
    """
    where = experiment_id(client, submission.experiment)
    run = target_run(client, where, submission.parent, submission.run_id, submission.label)
    for name, file in submission.evidence.items():
        upload(partial(client.log_artifact, run, str(file), name.rpartition("/")[0]))
    for name, file in submission.shared_files.items():
        _log_once(client, submission.parent, name, file)
    choices = []
    for number, choice in enumerate(submission.choices):
        own = target_run(client, where, submission.parent, submission.run_id, f"{submission.label}-choice-{number}")
        choices.append(register(client, own, choice))
        client.set_terminated(own, "FINISHED")
    shipped = register(client, run, submission.deployable)
    client.set_terminated(run, "FINISHED")
    return Submitted(run, shipped, tuple(choices))


def _log_once(client: MlflowClient, run: str, name: str, file: Path) -> None:
    """Log a file unless it is there: another branch of the run may have brought it, and it can be large."""
    folder = name.rpartition("/")[0]
    there = {artifact.path: artifact.file_size for artifact in client.list_artifacts(run, folder)}
    if there.get(name) != file.stat().st_size:
        upload(partial(client.log_artifact, run, str(file), folder))
