"""Asks the registry: which models there are, what one of them is, which is the best on a device within a limit.

A version is named `NAME/VERSION`, `NAME@ALIAS` or, for the newest, `NAME`: as in MLflow's addresses after `models:/`.
Only complete versions exist here: one whose registration was cut short is not shown until a later try has completed it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from yolov8_nas.errors import InputError, StageError
from yolov8_nas.reading import parse_json
from yolov8_nas.registry.champions import alias_holders
from yolov8_nas.registry.register import COMPLETE, HASH, LIMITS, MODEL_ID, PURPOSE, STATE
from yolov8_nas.registry.seal import CHANGING, SIGNATURE, Sealed
from yolov8_nas.registry.tracking import opened

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

_PAGE: Final = 100
_OFFERED: Final = 5  # where nothing is fast and accurate enough

_REFERENCE: Final = re.compile(r"(?P<name>[^/@'\"]+)(/(?P<version>\d{1,9})|@(?P<alias>[\w-]+))?")


@dataclass(frozen=True)
class RegisteredVersion:
    """One deployable detector.

    Attributes:
        model: Name of the registered model.
        version: Its version.
        aliases: Aliases that point at it.
        created: When it was registered.
        description: One sentence about it.
        model_uri: What MLflow loads it by: `models:/<id>`.
        artifacts: Where its files lie, as MLflow addresses it.
        run_id: MLflow's id of the run that made it.
        tags: Hardware, runtime, precision, constraints, digests.
        params: What the detector is.
        metrics: What was measured on the device: `map50_95`, `latency_p50_ms`, `memory_mb` and so on.
    """

    model: str
    version: int
    aliases: tuple[str, ...]
    created: datetime
    description: str
    model_uri: str
    artifacts: str
    run_id: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]

    def __str__(self) -> str:
        return f"{self.model}/{self.version}"

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of each of its files, by name."""
        return {key.removeprefix(HASH): value for key, value in self.tags.items() if key.startswith(HASH)}

    @property
    def limits(self) -> list[dict[str, Any]]:
        """The limits that it was registered for, as absolute ones.

        Raises:
            InputError: They are not recorded.
        """
        try:
            limits: list[dict[str, Any]] = parse_json(self.tag(LIMITS), LIMITS)
        except ValueError as error:
            raise InputError(f"{self}: its tag {LIMITS!r} is not JSON ({error}); register it again") from None
        return limits

    @property
    def purpose(self) -> str:
        """What it is champion or challenger for: hardware, precision and limits.

        Raises:
            InputError: It is not recorded.
        """
        return self.tag(PURPOSE)

    def seal_fault(self) -> str | None:
        """Why a signature does not vouch for it; nothing where one does, or where nobody asks for signatures."""
        return self._sealed().fault(self.tags.get(SIGNATURE))

    def trusted(self) -> RegisteredVersion:
        """The version with what is signed of it and no more; as it is where nobody asks for signatures.

        Raises:
            StageError: It is not signed with a trusted key, or was altered since.
        """
        why, covered = self._sealed().checked(self.tags.get(SIGNATURE))
        if why:
            raise StageError(
                f"{self}: {why}, so it is refused: have it signed by whoever may (yolov8-nas models sign), or register "
                "the model again"
            )
        changing = {key: value for key, value in self.tags.items() if key.startswith(CHANGING)}
        return replace(self, tags={**covered.tags, **changing}, params=covered.params, metrics=covered.metrics)

    def _sealed(self) -> Sealed:
        return Sealed.of(self.model, self.tags, self.params, self.metrics)

    def tag(self, key: str) -> str:
        """A tag that registering sets.

        Raises:
            InputError: The version has none.
        """
        if key not in self.tags:
            raise InputError(f"{self}: registered without the tag {key!r}, by an earlier release; register it again")
        return self.tags[key]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "aliases": list(self.aliases), "created": self.created.isoformat()}


def list_models(tracking_uri: str, name: str | None = None) -> list[RegisteredVersion]:
    """Every complete version, by model and newest first.

    Args:
        tracking_uri: As `tracking.resolve_uri` gave it.
        name: Only this registered model.

    Raises:
        InputError: There is no registry, or no model of that name.
    """
    with opened(tracking_uri) as client:
        found = _versions(client)
        if name is not None and name not in found:
            raise InputError(f"no registered model {name!r} at {tracking_uri}; there is {_these(found)}")
        where = _experiments(client)
        logged = {model.model_id: model for model in _complete(client, where, [])}
        return [
            _described(version, logged[version.tags[MODEL_ID]], holders)
            for model, versions in found.items()
            if name in (None, model)
            for holders in [alias_holders(client, model)]
            for version in versions
            if version.tags[MODEL_ID] in logged  # unless somebody deleted that alone
        ]


def find(tracking_uri: str, reference: str) -> RegisteredVersion:
    """One version of a registered model.

    Args:
        tracking_uri: As `tracking.resolve_uri` gave it.
        reference: `NAME/VERSION`, `NAME@ALIAS`, or `NAME` for the newest.

    Raises:
        InputError: It is not of that form, or there is no such complete version; what there is, is named.
    """
    with opened(tracking_uri) as client:
        return find_version(client, reference)


def find_version(client: MlflowClient, reference: str) -> RegisteredVersion:
    """As `find`, with a client at hand."""
    match = _REFERENCE.fullmatch(reference.strip())
    if not match:
        raise InputError(f"model {reference!r}: write NAME/VERSION, NAME@ALIAS, or NAME for its newest version")
    name, asked = match["name"], match["version"] or match["alias"]
    versions = _versions(client, name).get(name, [])
    if not versions:
        raise InputError(f"no registered model {name!r} at {client.tracking_uri}; there is {_these(_versions(client))}")
    holders = alias_holders(client, name)  # a version that was searched for does not carry its aliases
    number = holders.get(asked, asked) if match["alias"] else asked
    for version in versions:
        if asked is None or str(version.version) == str(number):
            return _described(version, client.get_logged_model(version.tags[MODEL_ID]), holders)
    numbers = sorted(int(version.version) for version in versions)
    aliases = [alias for alias, holder in holders.items() if holder in numbers]
    raise InputError(f"{name} has no version or alias {asked!r}; there is {_these([*map(str, numbers), *aliases])}")


def best(
    tracking_uri: str,
    hardware: str,
    max_latency_ms: float,
    min_map: float | None = None,
    precision: str | None = None,
    name: str | None = None,
) -> RegisteredVersion:
    """The most accurate detector that was measured on a device to be fast enough.

    Args:
        tracking_uri: As `tracking.resolve_uri` gave it.
        hardware: Id, model or configured name (`cpu-2t`) of the device.
        max_latency_ms: Longest median latency in ms.
        min_map: Least mAP50-95, between 0 and 1.
        precision: Only this one: `fp32`, `fp16` or `int8`.
        name: Only versions of this registered model; scores on different datasets don't compare.

    Raises:
        InputError: Nothing was verified on that device, the name fits several, or nothing there is fast and accurate
            enough; the message names what there is. Or a limit is no limit.
    """
    if not 0 < max_latency_ms < float("inf"):
        raise InputError(f"max-latency = {max_latency_ms}: give a positive number of milliseconds")
    if min_map is not None and not 0 <= min_map <= 1:
        raise InputError(f"min-map = {min_map}: give an mAP50-95 from 0 to 1")
    if precision not in (None, "fp32", "fp16", "int8"):
        raise InputError(f"precision {precision!r} is unknown; use fp32, fp16 or int8")
    with opened(tracking_uri) as client:
        where = _experiments(client)
        asked = [f"tags.hardware_id = '{_device(client, where, hardware)}'"]
        if name is not None:
            found = _versions(client, name)
            if name not in found:
                raise InputError(
                    f"no registered model {name!r} at {tracking_uri}; there is {_these(_versions(client))}"
                )
            asked.append(f"tags.registered_model = '{name}'")
        if precision is not None:
            asked.append(f"tags.precision = '{precision}'")
        bounds = [f"metrics.latency_p50_ms <= {max_latency_ms!r}"]
        if min_map is not None:
            bounds.append(f"metrics.map50_95 >= {min_map!r}")
        for model in _complete(client, where, asked + bounds, page=1):
            version = _registered(client, model)
            if version is not None:
                return _described(version, model, alias_holders(client, version.name))
        fastest = _complete(client, where, asked, page=_OFFERED, order="latency_p50_ms", ascending=True)
        near = list(islice(((model, _metrics(model)) for model in fastest if _registered(client, model)), _OFFERED))
    offers = [
        f"{model.tags['registered_model']}/{model.tags['registered_version']} ({model.tags['precision']}): "
        f"mAP50-95 {values['map50_95']:.3f} at {values['latency_p50_ms']:.3g} ms"
        for model, values in near
    ]
    wish = f"latency <= {max_latency_ms:g} ms" + (f" and mAP50-95 >= {min_map:g}" if min_map is not None else "")
    kind = "".join(f" {word}" for word in (precision, name) if word)
    raise InputError(f"no{kind} model on {hardware} has {wish}; there is {_these(offers)}")


def _device(client: MlflowClient, where: Sequence[str], hardware: str) -> str:
    """The id of the one device that a name fits, among those on which a model was verified."""
    keys = ("hardware_id", "hardware_model", "hardware")
    for key in keys if "'" not in hardware else ():
        fits = f"tags.{key} = '{hardware}'"
        first = next(_complete(client, where, [fits], page=1), None)
        if first is None or "hardware_id" not in first.tags:
            continue
        device: str = first.tags["hardware_id"]
        if (
            key == "hardware_id"
            or next(_complete(client, where, [fits, f"tags.hardware_id != '{device}'"], page=1), None) is None
        ):
            return device
        devices = {model.tags.get("hardware_id", "one of no identity") for model in _complete(client, where, [fits])}
        raise InputError(f"{hardware!r} is more than one device; give one of {', '.join(sorted(devices))}")
    # What does not say where it was measured (somebody took tags away) is on no device.
    known = [model for model in _complete(client, where, []) if set(keys) <= set(model.tags)]
    names = {model.tags[key].lower(): model.tags[key] for model in known for key in reversed(keys)}
    near = difflib.get_close_matches(hardware.lower(), names, n=1, cutoff=0)
    there = {f"{model.tags['hardware_id']} ({model.tags['hardware_model']})" for model in known}
    nearest = f"the nearest is {names[near[0]]}; " if near else ""
    raise InputError(f"no model was verified on hardware {hardware!r}; {nearest}there is {_these(sorted(there))}")


def _these(things: Iterable[str]) -> str:
    return ", ".join(things) or "nothing yet"


def _versions(client: MlflowClient, name: str | None = None) -> dict[str, list[ModelVersion]]:
    """Complete versions by model, newest first; of all models unless one is named."""
    if name is not None and "'" in name:  # which a filter cannot hold, and no name of ours has
        return {}
    filters = [f"tags.{STATE} = '{COMPLETE}'", *([f"name = '{name}'"] if name else [])]
    found: dict[str, list[ModelVersion]] = {}
    token = None
    while True:
        page = client.search_model_versions(" AND ".join(filters), max_results=_PAGE, page_token=token)
        for version in page:
            if MODEL_ID not in version.tags:  # somebody tagged a version complete that is none of ours
                continue
            found.setdefault(version.name, []).append(version)
        token = page.token
        if not token:
            break
    return {
        name: sorted(versions, key=lambda version: -int(version.version)) for name, versions in sorted(found.items())
    }


def _experiments(client: MlflowClient) -> list[str]:
    """Ids of the experiments, without which MLflow searches for no logged model."""
    return [experiment.experiment_id for experiment in client.search_experiments()]


def _complete(
    client: MlflowClient,
    where: Sequence[str],
    filters: Sequence[str],
    page: int = _PAGE,
    order: str = "map50_95",
    ascending: bool = False,
) -> Iterator[LoggedModel]:
    """Complete logged models that pass the filters in the order of a metric, the most accurate first unless told.

    They are asked for by pages, as each comes with all that is recorded of it: who needs one should ask for one.
    """
    token = None
    while True:
        found = client.search_logged_models(
            list(where),
            filter_string=" AND ".join([f"tags.{STATE} = '{COMPLETE}'", *filters]),
            order_by=[{"field_name": f"metrics.{order}", "ascending": ascending}],
            max_results=page,
            page_token=token,
        )
        yield from found
        token = found.token
        if not token:
            return


def _registered(client: MlflowClient, model: LoggedModel) -> ModelVersion | None:
    """The complete version that stands on a logged model; nothing where it was deleted since."""
    from mlflow.exceptions import MlflowException

    try:
        version = client.get_model_version(model.tags["registered_model"], model.tags["registered_version"])
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return version if version.tags.get(STATE) == COMPLETE else None


def _metrics(model: LoggedModel) -> dict[str, float]:
    return {metric.key: float(metric.value) for metric in model.metrics or ()}


def _described(version: ModelVersion, model: LoggedModel, holders: Mapping[str, int]) -> RegisteredVersion:
    return RegisteredVersion(
        model=version.name,
        version=int(version.version),
        aliases=tuple(sorted(alias for alias, holder in holders.items() if holder == int(version.version))),
        created=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
        description=version.description or "",
        model_uri=f"models:/{version.tags[MODEL_ID]}",
        artifacts=model.artifact_location,
        run_id=version.run_id or "",
        tags=dict(version.tags),
        params=dict(model.params or {}),
        metrics=_metrics(model),
    )
