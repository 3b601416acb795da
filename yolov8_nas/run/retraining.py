"""Retraining of a registered model: whether there is anything new, what to start from, whether the new one is better.

A run whose configuration has the section `retrain` asks the registry before it begins. Where every target has a version
from this very state of the dataset, it ends there. Otherwise it becomes a shorter run that starts from the supernet of
the champion's run, which the registry keeps; latency tables are found in the stage store, since they depend on the
number of classes and not on images. At the end of a branch its new version stands before the promotion gate.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from yolov8_nas.config import RunConfig
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import canonical_digest, file_sha256, tree_files
from yolov8_nas.names import digest
from yolov8_nas.run.summary import gate_file
from yolov8_nas.runner import process
from yolov8_nas.runner.results import DatasetResult, RegisterResult, SupernetNetwork
from yolov8_nas.runner.results.summary import Gate
from yolov8_nas.runner.stage import STATUS_FILE, TOLD, open_store, require_gpus, run_stage, target_labels
from yolov8_nas.space import SearchSpace
from yolov8_nas.stages import find_stage
from yolov8_nas.stages.supernet_train.settings import KEPT, kept_at
from yolov8_nas.store.archive import extract
from yolov8_nas.store.store import Manifest, Store

if TYPE_CHECKING:
    from yolov8_nas.registry.query import RegisteredVersion

WEIGHTS: Final = "supernet.safetensors"
DETAILS: Final = "supernet.json"

_FROM_THE_START = "run it without the section retrain"
_RESTORE = f"restore the artifact store, or {_FROM_THE_START}"


@dataclass(frozen=True)
class Origin:
    """What a retraining starts from.

    Attributes:
        version: The champion, as `NAME/VERSION`.
        run: MLflow's id of the run that has its supernet.
        sha256: Digest of the supernet's weights, as the champion was registered with it.
        details_sha256: The same of the file that says what the weights are of; nothing where the champion was
            registered without it.
    """

    version: str
    run: str
    sha256: str
    details_sha256: str | None = None


def check(config: RunConfig, tracking_uri: str, classes: Sequence[str]) -> Origin:
    """Look whether a retraining has something to start from.

    Args:
        config: The run configuration.
        tracking_uri: As `tracking.resolve_uri` gave it.
        classes: Class names of the dataset, as far as they are known yet.

    Raises:
        InputError: There is no such model, none of its versions is a champion for the run's targets, the champion's
            run has no supernet, or that is one of another space or of other classes.
    """
    return _origin(config, _versions(config, tracking_uri), tracking_uri, classes)


def prepare(
    config: RunConfig, *, store: str, run_id: str, tracking_uri: str, classes: Sequence[str]
) -> tuple[RunConfig, dict[str, Any]]:
    """Find out what a retraining has to do.

    The dataset is prepared for it, by the stage that does this in every run: its digest is what versions are
    registered with.

    Args:
        config: The run configuration.
        store: The stage store.
        run_id: Name of the run.
        tracking_uri: As `tracking.resolve_uri` gave it.
        classes: Class names of the dataset.

    Returns:
        The configuration of the run that it comes to, and plain values: `new`, whether there is anything to do;
        `says`, that in words; `origin`, the version to start from; `tolerance` of the gate.

    Raises:
        InputError: As `check`.
        StageError: The supernet in the registry is not the one that was registered.
    """
    assert config.retrain is not None
    versions = _versions(config, tracking_uri)
    origin = _origin(config, versions, tracking_uri, classes)
    seen = _made_from(config, versions, _dataset_digest(config, store, run_id))
    if None not in seen:
        says = f"Nothing new: {' and '.join(dict.fromkeys(map(str, seen)))} came from this state of the dataset."
        return config, {"new": False, "says": says, "origin": origin.version}
    _keep(open_store(store), origin, tracking_uri)
    shorter = config.retrained_from(kept_at(origin.sha256))
    lacking = [label for label, version in zip(target_labels(config), seen, strict=True) if version is None]
    epochs = shorter.supernet.epochs
    says = (
        f"No version for {' and '.join(lacking)} came from this state of the dataset yet: {epochs} "
        f"epoch{'s' * (epochs > 1)} from the supernet of {origin.version} instead of {config.supernet.epochs} from the "
        "start."
    )
    return shorter, {"new": True, "says": says, "origin": origin.version, "tolerance": config.retrain.tolerance}


def challenge(
    *,
    store: str,
    run_id: str,
    label: str,
    gpus: int,
    tracking_uri: str,
    tolerance: float,
    registered: Path,
    dataset: Path,
) -> Gate:
    """Put what a branch has registered before the promotion gate, and record what it says.

    A challenger that does not pass is no failure of the run; nor is a gate that cannot decide, which can be asked
    again with `yolov8-nas models promote`.

    Args:
        store: The stage store.
        run_id: Name of the run.
        label: Label of the target.
        gpus: GPUs that this process was promised.
        tracking_uri: As `tracking.resolve_uri` gave it.
        tolerance: By how much mAP50-95 of the challenger may be below the champion's.
        registered: Tar of register.
        dataset: Tar of data-prep, on whose val split both are scored.

    Returns:
        What the gate says, with all that `promote.promote` told.
    """
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        extract(registered, work / "registered")
        if (work / "registered" / STATUS_FILE).is_file():
            verdict = _undecided("nothing was registered, because a stage before it failed")
        else:
            entry = RegisterResult.read(work / "registered")
            extract(dataset, work / "dataset")
            verdict = _asked(entry, work, gpus, tracking_uri, tolerance, run_id)
    open_store(store).record(run_id, gate_file(label), verdict.plain())
    return verdict


def _asked(entry: RegisterResult, work: Path, gpus: int, tracking_uri: str, tolerance: float, run_id: str) -> Gate:
    if entry.version is None:
        return _undecided(f"{entry.reason}; then put it before the gate with: yolov8-nas models promote")
    log = work / "gate.log"
    try:
        require_gpus(gpus)
        said: dict[str, Any] = process.call(
            "yolov8_nas.registry.promote:promote",
            log=log,
            tracking_uri=tracking_uri,
            reference=f"{entry.model}/{entry.version}",
            data=str(work / "dataset"),
            tolerance=tolerance,
            because=f"retraining, run {run_id}",
        )
    except (InputError, StageError) as error:
        said = _undecided(f"the gate could not decide: {error}").plain()
    print(log.read_text() if log.is_file() else "", flush=True)
    return Gate.model_validate({**said, "version": f"{entry.model}/{entry.version}"})


def _undecided(reason: str) -> Gate:
    return Gate(promoted=False, reasons=(reason,))


def _versions(config: RunConfig, tracking_uri: str) -> list[RegisteredVersion]:
    """The versions of the model, newest first."""
    from yolov8_nas.registry.query import list_models
    from yolov8_nas.registry.tracking import UnavailableError

    try:
        return list_models(tracking_uri, config.name)
    except UnavailableError:
        raise
    except InputError as error:
        raise InputError(f"retrain: {error}; {_FROM_THE_START} first") from None


def _origin(
    config: RunConfig, versions: Sequence[RegisteredVersion], tracking_uri: str, classes: Sequence[str]
) -> Origin:
    from yolov8_nas.registry.champions import CHAMPION, alias
    from yolov8_nas.registry.places import check as check_place
    from yolov8_nas.registry.submission import SUPERNET
    from yolov8_nas.registry.tracking import opened

    labels = target_labels(config)
    champions = [
        version
        for version in versions
        if version.tags.get("target") in labels and any(a.startswith(alias(CHAMPION, "")) for a in version.aliases)
    ]
    if not champions:
        raise InputError(
            f"retrain: {config.name} has no champion for target {' or '.join(labels)} (its versions are "
            f"{', '.join(map(str, versions))}); {_FROM_THE_START} first"
        )
    champion = champions[0].trusted()  # the newest
    with opened(tracking_uri) as client, tempfile.TemporaryDirectory() as folder:
        run = client.get_run(champion.run_id).data.tags.get("mlflow.parentRunId")
        if run:
            check_place(client.get_run(run).info.artifact_uri, f"the run of {champion}")
        there = {artifact.path for artifact in client.list_artifacts(run, SUPERNET)} if run else set()
        if not {f"{SUPERNET}/{WEIGHTS}", f"{SUPERNET}/{DETAILS}"} <= there:
            raise InputError(
                f"retrain: no supernet is kept with the run of {champion}, which is of an earlier release or came from "
                f"another registry; {_FROM_THE_START} once, or name one in supernet.weights"
            )
        sha256 = digest(champion.tag("supernet"), f"{champion}: supernet")
        details_sha256 = champion.tags.get("supernet_details")
        downloaded = Path(client.download_artifacts(run, f"{SUPERNET}/{DETAILS}", folder))
        _require(champion, DETAILS, downloaded, details_sha256)
        details = _details(champion, downloaded)
    space = SearchSpace.load(config.space)
    if details.space != space:
        raise InputError(
            f"retrain: {champion} is of another space ({details.space.name!r}) than {config.space!r}; set space "
            f"back, or {_FROM_THE_START}"
        )
    if classes and tuple(classes) != details.names:
        raise InputError(
            f"retrain: {champion} knows the classes {', '.join(details.names)}, the dataset has "
            f"{', '.join(classes)}; a model of other classes needs another name: change name, and {_FROM_THE_START}"
        )
    return Origin(str(champion), run, sha256, details_sha256)


def _details(champion: RegisteredVersion, file: Path) -> SupernetNetwork:
    """What `supernet.json` says of the supernet.

    Raises:
        StageError: It is of another form.
    """
    try:
        return SupernetNetwork.read(file.parent)
    except ValueError as error:
        raise StageError(f"{champion}: its {DETAILS} is no description of a supernet ({error}); {_RESTORE}") from None


def _require(version: object, name: str, file: Path, expected: str | None) -> None:
    """Hold a downloaded file of a supernet against the digest that it was registered with, where there is one.

    Raises:
        StageError: It is another file.
    """
    if expected is None:
        print(f"{version}: registered without the SHA-256 of {name}, by an earlier release", flush=True)
    elif (found := file_sha256(file)) != expected:
        raise StageError(
            f"{version}: its supernet's {name} has SHA-256 {found}, and was registered with {expected}; it was changed "
            f"or damaged since, so it is refused: {_RESTORE}"
        )


def _dataset_digest(config: RunConfig, store: str, run_id: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder) / "data-prep.tar"
        outcome = run_stage(
            find_stage("data-prep"), config=config, target=None, inputs={}, output=tar, store=store, run_id=run_id
        )
    prepared = open_store(store).result("data-prep", outcome.key, TOLD["data-prep"])
    return DatasetResult.read(prepared.outputs).digest


def _made_from(
    config: RunConfig, versions: Sequence[RegisteredVersion], dataset: str
) -> list[RegisteredVersion | None]:
    """For each target the newest version, champion or not, that a run for its limits made from a state of the data."""

    def fits(version: RegisteredVersion, label: str, constraints: Sequence[str]) -> bool:
        asked = {"target": label, "constraints": ", ".join(constraints), "dataset": dataset}
        return asked.items() <= version.tags.items() and version.seal_fault() is None

    return [
        next((version for version in versions if fits(version, label, target.constraints)), None)
        for label, target in zip(target_labels(config), config.targets, strict=True)
    ]


def _keep(store: Store, origin: Origin, tracking_uri: str) -> None:
    """Bring a supernet from the registry to the store, where every machine of the run finds it.

    Raises:
        StageError: It is not the one that was registered.
    """
    from yolov8_nas.registry.places import check as check_place
    from yolov8_nas.registry.submission import SUPERNET
    from yolov8_nas.registry.tracking import opened

    entry = store.entry(KEPT, origin.sha256)
    with entry.lock(lambda: print(f"another run fetches the supernet of {origin.version}; waiting for it", flush=True)):
        if (manifest := entry.manifest) and entry.damage(manifest) is None:
            return
        entry.clear(partial=True)
        entry.outputs.mkdir(parents=True)
        with opened(tracking_uri) as client, tempfile.TemporaryDirectory() as folder:
            check_place(client.get_run(origin.run).info.artifact_uri, f"the run of {origin.version}")
            for name in (WEIGHTS, DETAILS):
                shutil.move(client.download_artifacts(origin.run, f"{SUPERNET}/{name}", folder), entry.outputs / name)
        try:
            _require(origin.version, WEIGHTS, entry.outputs / WEIGHTS, origin.sha256)
            _require(origin.version, DETAILS, entry.outputs / DETAILS, origin.details_sha256)
        except StageError:
            entry.clear(partial=True)
            raise
        outputs = {name: file_sha256(path) for name, path in tree_files(entry.outputs).items()}
        entry.commit(
            Manifest(
                stage=KEPT,
                version=1,
                key=origin.sha256,
                settings={"version": origin.version},
                inputs={},
                outputs=outputs,
                digest=canonical_digest(outputs),
                seconds=0.0,
            )
        )
