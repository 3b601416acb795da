"""Reads what the stages left, part by part: a run that failed half-way still has a report, which tells the gaps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from yolov8_nas.errors import InputError
from yolov8_nas.reading import parse_json
from yolov8_nas.runner.results import ResultFile, ResultRow

File = TypeVar("File", bound=ResultFile)
Row = TypeVar("Row", bound=ResultRow)


@dataclass(frozen=True)
class Outputs:
    """The files that one stage left.

    Attributes:
        stage: Name of the stage.
        folder: Its output folder, or nothing where the stage left none.
        status: `done`, `cached`, `failed`, or nothing where the stage never ran.
    """

    stage: str
    folder: Path | None
    status: str | None

    @property
    def present(self) -> bool:
        """Whether the stage left anything."""
        return self.folder is not None and self.folder.is_dir()

    def json(self, name: str) -> Any:
        """Content of a JSON file, or nothing where it is absent or broken."""
        text = self._text(name)
        try:
            return None if text is None else parse_json(text, name, finite=False)
        except ValueError:
            return None

    def result(self, form: type[File]) -> File | None:
        """A file of the stage's result as its model, or nothing where it is absent or not of that form."""
        content = self.json(form.FILE)
        try:
            return None if content is None else form.model_validate(content)
        except (InputError, ValidationError):
            return None

    def rows(self, form: type[Row]) -> list[Row]:
        """The rows of a file of the stage's result as their models; none where it is absent or not of that form."""
        try:
            return [form.model_validate(row) for row in records(self.json(form.FILE))]
        except (InputError, ValidationError):
            return []

    def lines(self, name: str) -> list[Any]:
        """Content of a JSON-lines file; a line that was cut off by a crash is left out."""
        records = []
        for line in (self._text(name) or "").splitlines():
            try:
                records.append(parse_json(line, name, finite=False))
            except ValueError:
                continue
        return records

    def why_missing(self, name: str) -> str:
        """Why there is nothing to show, for the place where `name` would have been shown."""
        match self.status:
            case "failed":
                return f"The stage {self.stage} failed, so there is no {name}."
            case None:
                return f"The stage {self.stage} did not run, so there is no {name}."
        return f"The stage {self.stage} left no readable {name}."

    def _text(self, name: str) -> str | None:
        if self.folder is None:
            return None
        try:
            return (self.folder / name).read_text()
        except (OSError, UnicodeDecodeError):
            return None


def pick(data: Any, *keys: str | int) -> Any:
    """The value under nested keys, or nothing where one of them is absent."""
    for key in keys:
        known = key in data if isinstance(data, Mapping) else isinstance(data, list) and key in range(len(data))
        if not known:
            return None
        data = data[key]
    return data


def mapping(data: Any) -> Mapping[str, Any]:
    """`data` where it is a mapping, else an empty one."""
    return data if isinstance(data, Mapping) else {}


def records(data: Any) -> list[Mapping[str, Any]]:
    """The mappings of a list; anything else is left out."""
    return [item for item in data if isinstance(item, Mapping)] if isinstance(data, list) else []
