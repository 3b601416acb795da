"""What the measurements of a device and the limits on it depend on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.errors import InputError
from yolov8_nas.measure import protocol
from yolov8_nas.measure.protocol import Protocol
from yolov8_nas.runner.settings import Space, StageSettings
from yolov8_nas.space import SearchSpace
from yolov8_nas.space.limits import COUNTED

TABLES: Final = "tables"
"""Folder of the store with the measurements that runs share."""

TABLE_VERSION: Final = 3
"""Raised when the same settings would be measured in another way."""


class RuntimeKey(StageSettings):
    """What runs the networks.

    Attributes:
        name: Name of a runtime of `measure.runtime`.
        version: Version of its software.
    """

    name: str
    version: str


class DeviceKey(StageSettings):
    """A device as far as latency depends on it; see `device.profile.Profile`."""

    id: str
    model: str
    threads: int
    instructions: tuple[str, ...]
    caches: Mapping[str, int]
    runtime: RuntimeKey
    gpu: Mapping[str, str | int | float | bool | None] | None = None


class Recipe(StageSettings):
    """What is measured, apart from where and of how many classes.

    Attributes:
        protocol: How networks are timed.
        space: The space that they are of.
        imgsz: Side of the square network input in pixels.
        batch: Images per inference.
        precision: Precision of the networks; targets that ask for `best` are searched in FP32.
        networks: Networks to which the latency model is fitted.
        holdout: Further ones on which its error is told.
        seed: Seed of everything random.
        keep_float: Parts that stay in floating point where networks are quantized.
        nms_free: Whether networks have the head that needs no non-maximum suppression.
    """

    protocol: Protocol
    space: Space
    imgsz: int
    batch: int
    precision: str
    networks: int
    holdout: int
    seed: int
    keep_float: tuple[str, ...]
    nms_free: bool


class Seen(StageSettings):
    """A device as a probe has seen it.

    Attributes:
        device: The device, by what latency depends on.
        kind: `cpu` or `gpu`.
        name: The device's name, for example `cpu-2t`.
        counter: What counts its energy; nothing where nothing does.
        measured: Digest of what was measured of it, where it is elsewhere.
    """

    device: DeviceKey
    kind: str
    name: str
    counter: str | None
    measured: str | None


class _Device(Recipe, Seen):
    """What is measured, and where.

    Attributes:
        max_mape: Largest error of the latency model with which the search may go on.
    """

    max_mape: float


class TableSettings(_Device):
    """All that the measurements depend on; runs that have these alike share them.

    Attributes:
        num_classes: Classes of the dataset.
    """

    num_classes: int


class Asked(_Device):
    """What the configuration tells of the probe.

    Attributes:
        constraints: Hard limits, as they were asked for.
        elsewhere: The target, where its device is elsewhere.
    """

    constraints: tuple[str, ...]
    elsewhere: TargetConfig | None


class ProbeSettings(Asked):
    """Settings of the probe.

    Attributes:
        num_classes: Classes of the dataset.
    """

    num_classes: int

    @property
    def table(self) -> TableSettings:
        """The part on which the measurements depend."""
        return TableSettings.model_validate({name: getattr(self, name) for name in TableSettings.model_fields})


def settings(config: RunConfig, target: TargetConfig | None) -> Asked:
    """What the measurements and the limits depend on; the number of classes comes as a parameter.

    Raises:
        InputError: The target cannot be used here, a limit cannot be measured, or the space has too few networks.
    """
    from yolov8_nas.device.counters import NoCounterError, open_counter
    from yolov8_nas.measure.target import resolve

    assert target is not None
    if target.far is not None:
        return _settings_elsewhere(config, target)
    device = resolve(target.hardware, target.runtime, target.precision)
    _require_one_precision(target, device.kind)
    try:
        counter, no_counter = open_counter(device.kind).name, None
    except NoCounterError as error:
        counter, no_counter = None, str(error)
    _require_counter(target, no_counter)
    key = DeviceKey.model_validate(device.profile.key)
    return asked_of(
        config, target, Seen(device=key, kind=device.kind, name=device.name, counter=counter, measured=None)
    )


def asked_of(config: RunConfig, target: TargetConfig, seen: Seen) -> Asked:
    """The settings of a probe of a device that was seen.

    Raises:
        InputError: The space has too few networks.
    """
    return Asked(
        **dict(recipe(config, target)),
        **dict(seen),
        max_mape=config.probe.max_mape,
        constraints=tuple(str(limit) for limit in target.limits),
        elsewhere=target if target.far is not None else None,
    )


def recipe(config: RunConfig, target: TargetConfig) -> Recipe:
    """What is measured, apart from where and of how many classes.

    Raises:
        InputError: The space has too few networks.
    """
    space = SearchSpace.load(config.space)
    if space.size < 2 * (config.probe.networks + config.probe.holdout):
        raise InputError(
            f"space {space.name}: {space.size} networks are too few to measure {config.probe.networks} of them and "
            f"{config.probe.holdout} more to check the latency model; give it more options or lower probe.networks"
        )
    return Recipe(
        protocol=protocol.PROBE,
        space=space,
        imgsz=config.imgsz,
        batch=target.batch,
        # `best` searches in FP32; what ships is decided by measuring both.
        precision="fp32" if target.precision == "best" else target.precision,
        networks=config.probe.networks,
        holdout=config.probe.holdout,
        seed=config.seed,
        keep_float=config.quantization.floats(int8=target.precision == "int8"),
        nms_free=config.finetune.nms_free,
    )


def _settings_elsewhere(config: RunConfig, target: TargetConfig) -> Asked:
    """The settings of a device elsewhere.

    Raises:
        InputError: Nothing was measured there yet, or by another recipe; or a limit cannot be measured there.
    """
    from yolov8_nas.measure.bundle import differences, place, read_kept

    if any(limit.scope == "with_nms" for limit in target.limits):
        raise InputError(
            f"target {target.hardware} elsewhere: non-maximum suppression is not measured there; "
            "limit the network alone (latency<=...), with room for it"
        )
    _require_one_precision(target, place(target).kind)
    table = read_kept(target).table
    if differing := differences(table.recipe, recipe(config, target).plain()):
        raise InputError(
            f"{target.far}: measured with another {' and '.join(differing)} than the configuration has; measure anew "
            "(yolov8-nas probe CONFIG --bundle FILE.tar), or set the configuration back"
        )
    _require_counter(target, None if table.counter else table.no_counter or "it counts none")
    return asked_of(
        config,
        target,
        Seen(
            device=DeviceKey.model_validate(table.key),
            kind=table.profile.kind,
            name=table.profile.name,
            counter=table.counter,
            measured=table.digest,
        ),
    )


def _require_one_precision(target: TargetConfig, kind: str) -> None:
    """`best` compares with FP32, which nobody would ship on a GPU."""
    if kind == "gpu" and target.precision == "best":
        raise InputError(f"precision 'best' on {target.hardware}, a GPU: name one; use fp16 or int8")


def _require_counter(target: TargetConfig, no_counter: str | None) -> None:
    for limit in target.limits:
        if no_counter and limit.metric in COUNTED:
            raise InputError(
                f"constraint {str(limit)!r} on {target.hardware}: {limit.metric} cannot be measured here, because "
                f"{no_counter}; or leave this limit out"
            )
