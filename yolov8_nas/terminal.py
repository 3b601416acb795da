"""The terminal: everything that is shown there passes `foreign.plain`, and no text is taken for markup."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.status import Status
from rich.text import Text

from yolov8_nas import foreign


def write_anything() -> None:
    """Let the standard streams write what their encoding has no letters for, as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: object, *, error: bool = False) -> None:
    """Print text of ours that may hold text of others.

    Args:
        text: The text; its lines stay lines.
        error: Whether it goes to standard error.
    """
    print(foreign.lines(text), file=sys.stderr if error else sys.stdout, flush=True)


def say_json(content: Any) -> None:
    """Print the result of a command for programs: JSON on standard output, and nothing else there.

    Args:
        content: Plain values. A number that is not finite becomes null, as JSON has no word for it.
    """
    print(json.dumps(_finite(content), indent=1, allow_nan=False), flush=True)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


class _Waiting(Status):
    """A spinner whose words are text."""

    def update(self, status: RenderableType | None = None, **style: Any) -> None:
        super().update(_as_text(status) if status is not None else None, **style)


class Terminal(Console):
    """Rich's console, where a string is what it says: no markup, no escapes, and long lines are cut off."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "highlight": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(foreign.lines(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As Rich does; what comes as its `Text`, and not as a string, passes here."""
        for segment in super().render(renderable, options):
            if segment.control or not segment.text.strip("\n").isprintable():
                yield segment if segment.control else Segment(foreign.lines(segment.text), segment.style)
            else:
                yield segment

    def status(self, status: RenderableType, **options: Any) -> Status:
        return _Waiting(_as_text(status), console=self, **options)


def _as_text(status: RenderableType) -> RenderableType:
    return Text(foreign.plain(status)) if isinstance(status, str) else status
