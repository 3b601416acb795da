"""Reads what the stages left, part by part: a run that failed half-way still has a report, which tells the gaps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from yolov8_nas.reading import parse_json
from yolov8_nas.runner.results import ResultFile, ResultRow
from yolov8_nas.runner.results.form import LINES

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

    def result(self, form: type[File], folder: str = "") -> File | None:
        """A file of the stage's result as its model, or nothing where it is absent or not of that form.

        Args:
            form: The model.
            folder: The folder in the stage's result where the file lies.
        """
        content = self.json(f"{folder}/{form.FILE}" if folder else form.FILE)
        try:
            return None if content is None else form.model_validate(content)
        except ValidationError:
            return None

    def rows(self, form: type[Row]) -> list[Row]:
        """The rows of a file of the stage's result as their models; none where it is absent or not of that form.

        Of JSON lines, one that is not of that form is left out: a crash may have cut it off.
        """
        if form.FILE.endswith(LINES):
            return [row for line in (self._text(form.FILE) or "").splitlines() if (row := _row(form, line))]
        content = self.json(form.FILE)
        try:
            return [form.model_validate(row) for row in content] if isinstance(content, list) else []
        except ValidationError:
            return []

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


def _row(form: type[Row], line: str) -> Row | None:
    try:
        return form.model_validate(parse_json(line, form.FILE, finite=False))
    except ValueError:
        return None
