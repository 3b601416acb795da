"""Asks the registry: which models there are, what one of them is, which is the best on a device within a limit.

Only complete versions exist here: one whose registration was cut short is not shown until a later try has completed it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from yolov8_nas.errors import InputError
from yolov8_nas.registry.register import COMPLETE, MODEL_ID, STATE, alias_holders
from yolov8_nas.registry.tracking import connect, database

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

_PAGE: Final = 100


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
    run_id: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]

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
    client = _open(tracking_uri)
    found = _versions(client)
    if name is not None and name not in found:
        raise InputError(f"no registered model {name!r} at {tracking_uri}; there is {_these(found)}")
    names = sorted(found) if name is None else [name]
    return [_describe(client, model, version) for model in names for version in found[model]]


def show(tracking_uri: str, name: str, version: str | None = None) -> RegisteredVersion:
    """One version of a registered model.

    Args:
        tracking_uri: As `tracking.resolve_uri` gave it.
        name: The registered model.
        version: Its number or an alias; nothing for the newest.

    Raises:
        InputError: There is no such model, or no such complete version of it; what there is, is named.
    """
    client = _open(tracking_uri)
    found = _versions(client)
    if name not in found:
        raise InputError(f"no registered model {name!r} at {tracking_uri}; there is {_these(found)}")
    versions = found[name]
    if version is None:
        return _describe(client, name, versions[0])
    holders = alias_holders(client, name)
    number = holders.get(version, version)
    for candidate in versions:
        if str(candidate.version) == str(number):
            return _describe(client, name, candidate)
    numbers = {int(candidate.version) for candidate in versions}
    aliases = [alias for alias, holder in holders.items() if holder in numbers]
    raise InputError(
        f"{name} has no version or alias {version!r}; there is {_these([*map(str, sorted(numbers)), *aliases])}"
    )


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
            enough; the message names what there is.
    """
    client = _open(tracking_uri)
    known = list(_complete(client, []))
    there = {f"{model.tags['hardware_id']} ({model.tags['hardware_model']})" for model in known}
    devices = {model.tags["hardware_id"] for model in known if hardware in _names(model)}
    if not devices:
        raise InputError(f"no model was verified on hardware {hardware!r}; there is {_these(sorted(there))}")
    if len(devices) > 1:
        raise InputError(f"{hardware!r} is more than one device; give one of {', '.join(sorted(devices))}")
    asked = [f"tags.hardware_id = '{devices.pop()}'"]
    if name is not None:
        names = {model.tags["registered_model"] for model in known}
        if name not in names:
            raise InputError(f"no registered model {name!r} at {tracking_uri}; there is {_these(sorted(names))}")
        asked.append(f"tags.registered_model = '{name}'")
    if precision is not None:
        asked.append(f"tags.precision = '{precision}'")
    bounds = [f"metrics.latency_p50_ms <= {max_latency_ms!r}"]
    if min_map is not None:
        bounds.append(f"metrics.map50_95 >= {min_map!r}")
    for model in _complete(client, asked + bounds):
        version = _registered(client, model)
        if version is not None:
            return _describe(client, version.name, version)
    near = sorted(
        ((model, _metrics(model)) for model in _complete(client, asked) if _registered(client, model)),
        key=lambda pair: pair[1]["latency_p50_ms"],
    )
    offers = [
        f"{model.tags['registered_model']} version {model.tags['registered_version']} ({model.tags['precision']}): "
        f"mAP50-95 {values['map50_95']:.3f} at {values['latency_p50_ms']:.3g} ms"
        for model, values in near[:5]
    ]
    wish = f"latency <= {max_latency_ms:g} ms" + (f" and mAP50-95 >= {min_map:g}" if min_map is not None else "")
    kind = "".join(f" {word}" for word in (precision, name) if word)
    raise InputError(f"no{kind} model on {hardware} has {wish}; there is {_these(offers)}")


def _open(uri: str) -> MlflowClient:
    file = database(uri)
    if file is not None and not file.is_file():
        raise InputError(f"{file}: no registry there; run yolov8-nas first, or name the work folder or tracking URI")
    return connect(uri)


def _names(model: LoggedModel) -> set[str]:
    return {model.tags[key] for key in ("hardware_id", "hardware_model", "hardware")}


def _these(things: Iterable[str]) -> str:
    return ", ".join(things) or "nothing yet"


def _versions(client: MlflowClient) -> dict[str, list[ModelVersion]]:
    """Complete versions by model, newest first."""
    found: dict[str, list[ModelVersion]] = {}
    token = None
    while True:
        page = client.search_model_versions(f"tags.{STATE} = '{COMPLETE}'", max_results=_PAGE, page_token=token)
        for version in page:
            found.setdefault(version.name, []).append(version)
        token = page.token
        if not token:
            break
    return {
        name: sorted(versions, key=lambda version: -int(version.version)) for name, versions in sorted(found.items())
    }


def _complete(client: MlflowClient, filters: Sequence[str]) -> Iterator[LoggedModel]:
    """Complete logged models that pass the filters, most accurate first."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    token = None
    while True:
        page = client.search_logged_models(
            experiments,
            filter_string=" AND ".join([f"tags.{STATE} = '{COMPLETE}'", *filters]),
            order_by=[{"field_name": "metrics.map50_95", "ascending": False}],
            max_results=_PAGE,
            page_token=token,
        )
        yield from page
        token = page.token
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


def _describe(client: MlflowClient, name: str, version: ModelVersion) -> RegisteredVersion:
    model = client.get_logged_model(version.tags[MODEL_ID])
    holders = alias_holders(client, name)  # a searched version does not carry its aliases
    return RegisteredVersion(
        model=name,
        version=int(version.version),
        aliases=tuple(sorted(alias for alias, holder in holders.items() if holder == int(version.version))),
        created=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
        description=version.description or "",
        model_uri=f"models:/{version.tags[MODEL_ID]}",
        run_id=version.run_id or "",
        tags=dict(version.tags),
        params=dict(model.params or {}),
        metrics=_metrics(model),
    )
