"""The form of what comes back from a device elsewhere, which anybody may have written.

Its figures are taken as they come, so they have to be figures: finite, above zero, in an order that times can have, of
networks that the bundle named. What does not fit is told with its place before anything is computed with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator

from yolov8_nas import names
from yolov8_nas.device.profile import Profile
from yolov8_nas.errors import InputError
from yolov8_nas.measure.benchmark import Failed, Measurement

_LONGEST_MS: Final = 1e7
_MOST: Final = 1e9
_KEY: Final = ("id", "model", "threads", "instructions", "caches", "runtime", "gpu")

_Ms = Annotated[float, Field(gt=0, le=_LONGEST_MS)]
_Amount = Annotated[float, Field(ge=0, le=_MOST)]
_Count = Annotated[int, Field(ge=1, le=10**9)]
_Word = Annotated[str, Field(min_length=1, max_length=300)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True)


class _Percentiles(_Part):
    model_config = ConfigDict(extra="forbid")

    p50: _Ms
    p90: _Ms
    p99: _Ms


class _Measured(_Part):
    """A row as `Measurement.to_dict` writes it."""

    latency_ms: _Percentiles
    interval_ms: Annotated[list[_Ms], Field(min_length=2, max_length=2)]
    memory_mb: _Amount
    rounds: Annotated[list[_Ms], Field(min_length=1, max_length=10_000)]
    repetitions: _Count
    disturbed: StrictBool
    energy_mj: _Amount | None
    power_w: _Amount | None
    gpu_ms: _Ms | None = None
    reference_ms: _Ms | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        low, high = self.interval_ms
        if not (self.latency_ms.p50 <= self.latency_ms.p90 <= self.latency_ms.p99 and low <= high):
            raise ValueError("percentiles, or the ends of an interval, that do not rise")
        return self


class _Failed(_Part):
    model_config = ConfigDict(extra="forbid")

    failed: Annotated[str, Field(max_length=100_000)]


class _Profile(_Part):
    """A device as `Profile.to_dict` writes it."""

    model_config = ConfigDict(extra="forbid")

    name: _Word
    id: Annotated[str, Field(pattern="^[a-z0-9-]{1,200}$")]
    kind: Annotated[str, Field(pattern="^(cpu|gpu)$")]
    model: _Word
    cores: _Count
    threads: _Count
    instructions: Annotated[list[_Word], Field(max_length=1000)]
    caches: Annotated[dict[_Word, Annotated[int, Field(ge=0)]], Field(max_length=100)]
    memory_gb: _Amount
    runtime: Annotated[dict[_Word, _Word], Field(max_length=100)]
    system: Annotated[str, Field(max_length=300)]
    gpu: Annotated[dict[_Word, str | int | float | bool | None], Field(max_length=100)] | None = None

    @model_validator(mode="after")
    def _runs_something(self) -> Self:
        if not {"name", "version"} <= self.runtime.keys():
            raise ValueError("a runtime without name and version")
        return self


class _Regime(_Part):
    before: dict[str, Any]
    after: dict[str, Any]


class _Order(_Part):
    """What was to be measured, as the bundle said."""

    purpose: Annotated[str, Field(pattern="^[a-z-]{1,50}$")]
    runtime: _Word
    precision: _Word
    batch: _Count
    recipe: dict[str, Any]
    networks: Annotated[dict[str, str], Field(min_length=1)]


class _Results(_Part):
    bundle: _Order
    profile: _Profile
    key: dict[str, Any]
    counter: _Word | None
    no_counter: _Word | None
    regime: _Regime
    networks: dict[str, str]
    measured: dict[str, _Measured | _Failed]


class _TableRecipe(_Part):
    """What the networks of a table were made by, beside the recipe of the run that takes them in."""

    num_classes: Annotated[int, Field(ge=1, le=10_000)]
    failed: dict[str, str]


@dataclass(frozen=True)
class Returned:
    """Results of a device elsewhere that `check_form` has checked, and those of a table `check_table` as well.

    Attributes:
        content: The results, as they stand under their seal.
    """

    content: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Digest of all of it."""
        return str(self.content["digest"])

    @property
    def bundle(self) -> str:
        """Digest of the bundle that was measured."""
        return str(self.content["bundle"]["digest"])

    @property
    def purpose(self) -> str:
        """The purpose of the measurements: `bundle.TABLE` or the name of a stage."""
        return str(self.content["bundle"]["purpose"])

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Plain values on which the measured networks depend."""
        recipe: Mapping[str, Any] = self.content["bundle"]["recipe"]
        return recipe

    @property
    def num_classes(self) -> int:
        """Classes of the networks of a table."""
        return int(self.recipe["num_classes"])

    @property
    def failed(self) -> Mapping[str, str]:
        """Why networks of a table could not be built, by their digest."""
        failed: Mapping[str, str] = self.recipe["failed"]
        return failed

    @property
    def profile(self) -> Profile:
        """The device."""
        return Profile.of(self.content["profile"], "results of a device elsewhere")

    @property
    def key(self) -> Mapping[str, Any]:
        """The key by which measurements of the device are shared; see `device.profile.Profile.key`."""
        key: Mapping[str, Any] = self.content["key"]
        return key

    @property
    def counter(self) -> str | None:
        """The energy counter; nothing where there is none."""
        counter: str | None = self.content["counter"]
        return counter

    @property
    def no_counter(self) -> str | None:
        """Why there is no energy counter."""
        why: str | None = self.content["no_counter"]
        return why

    @property
    def regime(self) -> Mapping[str, Mapping[str, Any]]:
        """How the device was run `before` and `after`."""
        regime: Mapping[str, Mapping[str, Any]] = self.content["regime"]
        return regime

    @property
    def measured(self) -> dict[str, Measurement | Failed]:
        """The measurements, by the names of the files without their suffix."""
        return {
            Path(name).stem: Failed(one["failed"]) if "failed" in one else Measurement.from_dict(one)
            for name, one in self.content["measured"].items()
        }


def check_form(results: Mapping[str, Any], source: Path) -> None:
    """See that results have the form that the measuring program gives them.

    Raises:
        InputError: They have not; the place and what is wrong with it are named.
    """
    _fitting(_Results, results, source)
    names.files(results["networks"], str(source))
    for name in results["networks"]:
        names.part(name, str(source))


def check_key(results: Mapping[str, Any], source: Path) -> None:
    """See that what measurements are shared by is the device that they tell of.

    Raises:
        InputError: It is another one.
    """
    profile = results["profile"]
    if results["key"] != {name: profile[name] for name in _KEY if name in profile}:
        raise InputError(f"{source}: key: another device than profile tells; measure the bundle again")


def check_table(results: Returned, source: Path) -> None:
    """See that results that a latency model is to be fitted to say what their networks were made by.

    Raises:
        InputError: They do not.
    """
    _fitting(_TableRecipe, results.recipe, source, "bundle.recipe.")


def _fitting(form: type[_Part], content: Mapping[str, Any], source: Path, place: str = "") -> None:
    try:
        form.model_validate(content)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        where = place + ".".join(str(step) for step in fault["loc"] if "_Measured" not in str(step))
        raise InputError(
            f"{source}: {where}: {fault['msg']}; measure the bundle again, and import what it writes"
        ) from None
