"""The form of results: models that are the content of JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Final, Self

from pydantic import BaseModel, ConfigDict, JsonValue, PlainSerializer, PlainValidator, TypeAdapter, ValidationError

from yolov8_nas.errors import InputError
from yolov8_nas.files import atomic_write, read_json, write_json
from yolov8_nas.reading import parse_json
from yolov8_nas.space import Architecture

LINES: Final = ".jsonl"
"""Suffix of files with one JSON value in each line."""


def _architecture(given: Architecture | Mapping[str, JsonValue]) -> Architecture:
    return given if isinstance(given, Architecture) else Architecture.from_dict(given)


Network = Annotated[Architecture, PlainValidator(_architecture), PlainSerializer(Architecture.to_dict)]
"""An architecture as a field of a result; in JSON its plain description."""


class Result(BaseModel):
    """A part of a stage's result."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def plain(self) -> dict[str, JsonValue]:
        """The result as plain JSON values."""
        return self.model_dump(mode="json", by_alias=True)


class ResultFile(Result):
    """The content of a JSON file of a stage's result.

    Attributes:
        FILE: Name of the file.
    """

    FILE: ClassVar[str]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read it from the folder of a stage's result.

        Raises:
            InputError: It is not of this form.
        """
        path = folder / cls.FILE
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            raise _unfit(error, path) from None

    def write(self, folder: Path) -> None:
        """Write it to the folder of a stage's result."""
        write_json(folder / self.FILE, self.plain())


class ResultRow(Result):
    """One of the rows that a file of a stage's result lists: a JSON list, or JSON lines where it ends with `LINES`.

    Attributes:
        FILE: Name of the file.
    """

    FILE: ClassVar[str]

    @classmethod
    def read_all(cls, folder: Path) -> tuple[Self, ...]:
        """Read all rows from the folder of a stage's result.

        Raises:
            InputError: They are not of this form.
        """
        path = folder / cls.FILE
        if path.suffix == LINES:
            content = [parse_json(line, str(path)) for line in path.read_text().splitlines()]
        else:
            content = read_json(path)
        try:
            return TypeAdapter(tuple[cls, ...]).validate_python(content)  # type: ignore[valid-type]
        except ValidationError as error:
            raise _unfit(error, path) from None

    @classmethod
    def write_all(cls, folder: Path, rows: Iterable[Self]) -> None:
        """Write rows to the folder of a stage's result."""
        path, plain = folder / cls.FILE, [row.plain() for row in rows]
        if path.suffix == LINES:
            atomic_write(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in plain))
        else:
            write_json(path, plain)


class Latency(Result):
    """Percentiles of latency in ms."""

    p50: float
    p90: float
    p99: float


def _unfit(error: ValidationError, path: Path) -> InputError:
    """The first fault of a file, with its place."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(map(str, fault["loc"]))
    return InputError(f"{path}: {where}: {fault['msg']}; run the stage that wrote it again")
