"""Makes a challenger champion, if it may be; takes that back; carries a version to another registry.

The gate asks again what the registry says: both versions are scored on the same images, and measured in the same rounds
where this machine is the device they are for. The challenger becomes champion if it keeps its limits and scores no less
than the champion minus a stated tolerance.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from yolov8_nas import signing
from yolov8_nas.errors import InputError
from yolov8_nas.registry import trial
from yolov8_nas.registry.champions import (
    CHAMPION,
    ROLLED_BACK,
    Change,
    alias,
    alias_holders,
    crown,
    history,
    predecessors,
)
from yolov8_nas.registry.pull import fetch, fetch_scores, fetch_unsigned
from yolov8_nas.registry.query import RegisteredVersion, find_version
from yolov8_nas.registry.register import (
    CONTENT,
    HASH,
    LIMITS,
    MODEL_ID,
    PURPOSE,
    SCORES,
    STATE,
    Deployable,
    Registration,
    register,
)
from yolov8_nas.registry.seal import CHANGING, SIGNATURE, Sealed
from yolov8_nas.registry.tracking import experiment_id, find_or_create_run, opened, without_credentials
from yolov8_nas.space.limits import Constraint

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from yolov8_nas.evaluation import Evaluation

TOLERANCE: Final = 0.005
"""By how much mAP50-95 a challenger may be below the champion, unless said otherwise."""

EXPERIMENT: Final = "yolov8-nas"
"""Where the run of a version that came from another registry stands, unless said otherwise."""

_COPY_TAG: Final = "yolov8_nas.copy_of"
_OWN_TAGS: Final = (
    STATE,
    CONTENT,
    MODEL_ID,
    PURPOSE,
    LIMITS,
    SCORES,
    "hardware_id",
    "precision",
    "constraints",
    "scale",
)
"""Tags that registering sets itself."""


@dataclass(frozen=True)
class Finding:
    """What the gate found of one version.

    Attributes:
        version: The version.
        map50_95: Its score on the gate's images; nothing where none were asked for.
        limits: Its limits, each with what was `measured` and whether it is `met`.
        measured: What was measured here; nothing where this machine is not its device.
    """

    version: RegisteredVersion
    map50_95: float | None
    limits: Sequence[Mapping[str, Any]]
    measured: trial.Measured | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "model": self.version.model,
            "version": self.version.version,
            "map50_95": self.map50_95,
            "limits": [dict(limit) for limit in self.limits],
            "measured": asdict(self.measured) if self.measured else None,
        }


@dataclass(frozen=True)
class Verdict:
    """What the gate decided.

    Attributes:
        promoted: Whether the challenger may be champion.
        reasons: Why, or why not: one sentence each.
    """

    promoted: bool
    reasons: tuple[str, ...]


def promote(
    tracking_uri: str,
    reference: str,
    *,
    data: str | None = None,
    tolerance: float = TOLERANCE,
    by: str | None = None,
    because: str | None = None,
) -> dict[str, Any]:
    """Make a version champion of its purpose, if the gate lets it pass.

    Args:
        tracking_uri: As `tracking.resolve_uri` gave it.
        reference: The challenger, as for `query.find`.
        data: The dataset on whose val split both are scored; needed where there is a champion.
        tolerance: By how much mAP50-95 the challenger may be below the champion.
        by: Who promotes; this user on this machine unless given.
        because: Why, beside what the gate found.

    Returns:
        Plain values: `promoted`, `reasons`, `alias`, what was found of `challenger` and `champion`, `scored_on`,
        `comparison` (mAP50-95 as `compare.with_interval` gives it) and `change` (`champions.Change`), each as far as
        there is one. Where the version is champion already, nothing is done.

    Raises:
        InputError: There is no such version, or the dataset is missing or cannot be used.
        StageError: A file of either is not the one that was registered.
    """
    if not 0 <= tolerance < 1:
        raise InputError(f"tolerance = {tolerance}: give a difference in mAP50-95, from 0 to below 1")
    with opened(tracking_uri) as client, tempfile.TemporaryDirectory() as folder:
        challenger = find_version(client, reference).trusted()
        title = alias(CHAMPION, challenger.purpose)
        if title in challenger.aliases:
            return {"promoted": True, "reasons": [f"{challenger} is {title} already"], "alias": title, "change": None}
        champion = _champion(client, challenger, title)
        if champion is not None and data is None:
            raise InputError(
                f"{champion} is {title}: give --data with the dataset on whose val split {challenger} and it are scored"
            )
        result = _try(challenger, champion, data, Path(folder))
        verdict = decide(result["findings"], tolerance)
        change = None
        if verdict.promoted:
            why = "; ".join([*([because] if because else []), *verdict.reasons])
            purpose, holders = challenger.purpose, alias_holders(client, challenger.model)
            change = crown(
                client, challenger.model, purpose, challenger.version, holders, action="promoted", because=why, by=by
            ).to_dict()
    findings = [finding.to_dict() for finding in result.pop("findings")]
    return {
        "promoted": verdict.promoted,
        "reasons": list(verdict.reasons),
        "alias": title,
        "challenger": findings[0],
        "champion": findings[1] if len(findings) > 1 else None,
        "tolerance": tolerance,
        **result,
        "change": change,
    }


def decide(findings: Sequence[Finding], tolerance: float) -> Verdict:
    """The gate.

    Args:
        findings: Of the challenger, and of the champion where there is one.
        tolerance: By how much mAP50-95 the challenger may be below the champion.
    """
    challenger, champion = findings[0], findings[1] if len(findings) > 1 else None
    where = f"measured here with {challenger.measured.runtime}" if challenger.measured else "as registered"
    passed: list[str] = []
    failed: list[str] = []
    for limit in challenger.limits:
        name = Constraint.from_row(limit).quantity
        if limit["met"] is None:
            remedy = ": give --data, for images" if limit["scope"] == "with_nms" else ""
            failed.append(f"{name} could not be measured{remedy}")
            continue
        figures = f"{name} {limit['measured']:.4g} {limit['unit']}, limit {limit['limit']:.4g}, {where}"
        (passed if limit["met"] else failed).append(f"{'keeps' if limit['met'] else 'misses'} {figures}")
    if champion is None:
        passed.append("there is no champion")
    elif challenger.map50_95 is not None and champion.map50_95 is not None:
        least = champion.map50_95 - tolerance
        scores = (
            f"mAP50-95 {challenger.map50_95:.4f}, champion {champion.version} {champion.map50_95:.4f}, "
            f"tolerance {tolerance:g}"
        )
        enough = challenger.map50_95 >= least
        (passed if enough else failed).append(scores if enough else f"not accurate enough: {scores}")
    return Verdict(not failed, tuple(failed or passed))


def rollback(
    tracking_uri: str, reference: str, *, by: str | None = None, because: str | None = None
) -> tuple[RegisteredVersion, Change]:
    """Restore the former champion of a purpose.

    Args:
        tracking_uri: As `tracking.resolve_uri` gave it.
        reference: The champion that has to go, as for `query.find`: `NAME@champion-...`, say.
        by: Who takes it back; this user on this machine unless given.
        because: Why.

    Returns:
        The champion from now on, and the change.

    Raises:
        InputError: The version is no champion, or had no predecessor that is still there.
        StageError: A file of the predecessor is not the one that was registered.
    """
    with opened(tracking_uri) as client, tempfile.TemporaryDirectory() as folder:
        version = find_version(client, reference)
        title = alias(CHAMPION, "")
        named = reference.partition("@")[2]
        held = [named] if named else version.aliases
        purposes = [name.removeprefix(title) for name in held if name.startswith(title)]
        if len(purposes) != 1:
            raise InputError(
                f"{version} is champion of {len(purposes)} purposes ({', '.join(purposes) or 'none'}); "
                f"name the champion that has to go by its alias: {version.model}@champion-..."
            )
        changes = [change for change in history(client, version.model) if change.purpose == purposes[0]]
        for number in predecessors(changes, version.version):
            try:
                former = find_version(client, f"{version.model}/{number}").trusted()
            except InputError:  # somebody deleted it
                continue
            fetch(former, Path(folder) / str(number))
            why = because or f"{version} rolled back"
            holders = alias_holders(client, version.model)
            change = crown(client, version.model, purposes[0], number, holders, action=ROLLED_BACK, because=why, by=by)
            return find_version(client, str(former)), change
    raise InputError(f"{version} has no predecessor as {alias(CHAMPION, purposes[0])}; promote another version instead")


def copy(
    source_uri: str, reference: str, target_uri: str, experiment: str = EXPERIMENT
) -> tuple[RegisteredVersion, Registration]:
    """Register a version in another registry: its files, verified, and all that is recorded of it.

    Done twice, it changes nothing. There it becomes champion or challenger like any version that is registered.

    Args:
        source_uri: The registry that has it, as `tracking.resolve_uri` gave it.
        reference: The version, as for `query.find`.
        target_uri: The registry that gets it.
        experiment: Experiment there, for the run that the version stands in.

    Returns:
        The version here, and where it stands there.

    Raises:
        InputError: There is no such version, or one of the registries does not answer.
        StageError: A file is not the one that was registered.
    """
    with tempfile.TemporaryDirectory() as folder:
        with opened(source_uri) as client:
            version = find_version(client, reference).trusted()
            files = fetch(version, Path(folder) / "files")
            scores = fetch_scores(version, Path(folder) / "scores")
        tags = {
            key: value
            for key, value in version.tags.items()
            if key not in _OWN_TAGS and not key.startswith((HASH, *CHANGING))
        }
        deployable = Deployable(
            name=version.model,
            files=files,
            hardware_id=version.tag("hardware_id"),
            precision=version.tag("precision"),
            limits=tuple(version.tag("constraints").split(", ")),
            scale=version.tag("scale"),
            resolved=version.limits,
            metrics=version.metrics,
            params=version.params,
            tags=tags,
            description=version.description,
            scores=scores,
            signature=version.tags.get(SIGNATURE),
        )
        origin = f"{without_credentials(source_uri)} {version}"
        with opened(target_uri) as client:
            where = experiment_id(client, experiment)
            run = find_or_create_run(client, where, _COPY_TAG, origin, name=str(version))
            registered = register(client, run, deployable)
            client.set_terminated(run, "FINISHED")
    return version, registered


def sign(tracking_uri: str, reference: str) -> tuple[RegisteredVersion, str]:
    """Sign a version that is registered already: with a new key, or one from before there was any.

    Its files are held against its hashes first. That they, its figures and its tags are what they should be is for
    whoever signs to know.

    Args:
        tracking_uri: As `tracking.resolve_uri` gave it.
        reference: The version, as for `query.find`.

    Returns:
        The version, and the id of the key.

    Raises:
        InputError: There is no such version, or no key to sign with.
        StageError: A file is not the one that was registered.
    """
    if (key := signing.keys().signing) is None:
        raise InputError(f"no key to sign with: set {signing.KEY_VARIABLE} to the file of the private key")
    with opened(tracking_uri) as client, tempfile.TemporaryDirectory() as folder:
        version = find_version(client, reference)
        fetch_unsigned(version, Path(folder))
        tag = Sealed.of(version.model, version.tags, version.params, version.metrics).sign()
        client.set_model_version_tag(version.model, str(version.version), SIGNATURE, tag)
        return find_version(client, str(version)).trusted(), key.id


def carry(source: str, model: str, target: str) -> dict[str, str]:
    """`copy`, and what it came to in plain values.

    Returns:
        `reference`: the version there, as for `query.find`; `said`: a sentence.
    """
    version, there = copy(source, model, target)
    what = "registered as" if there.created else "there already as"
    standing = f", {there.role}: {there.reason}" if there.role else ""
    reference = f"{there.model}/{there.version}"
    return {"reference": reference, "said": f"{version}: {what} {reference} at {without_credentials(target)}{standing}"}


def _champion(client: MlflowClient, challenger: RegisteredVersion, title: str) -> RegisteredVersion | None:
    try:
        champion = find_version(client, f"{challenger.model}@{title}")
    except InputError:
        return None
    return champion.trusted()


def _try(
    challenger: RegisteredVersion, champion: RegisteredVersion | None, data: str | None, folder: Path
) -> dict[str, Any]:
    """Score and measure what can be scored and measured here; the files of both are verified in any case."""
    from yolov8_nas.registry.compare import with_interval

    versions = [challenger, *([champion] if champion else [])]
    entrants = [trial.entrant(version, folder) for version in versions]
    images = trial.val_split(data, folder) if data is not None else None
    scores: list[Evaluation] = trial.score(entrants, images, folder) if images else []
    measured: list[trial.Measured] = []
    try:
        trial.device_of(challenger)
        not_measured = None
    except InputError as elsewhere:
        not_measured = f"not measured again: {elsewhere}"
    else:
        measured = trial.measure(entrants, images, folder)
    return {
        "findings": [
            Finding(
                version=version,
                map50_95=scores[index].map50_95 if scores else None,
                limits=measured[index].limits if measured else trial.as_registered(version),
                measured=measured[index] if measured else None,
            )
            for index, version in enumerate(versions)
        ],
        "scored_on": f"{len(images.files)} images of val of {images.source}, sha256 {images.digest}"
        if images
        else None,
        "not_measured": not_measured,
        "comparison": with_interval(*scores)[0] if len(scores) > 1 else None,
    }
