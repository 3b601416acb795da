"""Reading YAML that came from outside, within bounds.

YAML can say a thing again and again by naming it (`*name`), so that a line stands for gigabytes, and can lay a thing
into itself. The events of the text are counted before anything is built of them.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any, Final

import yaml

from yolov8_nas.errors import InputError
from yolov8_nas.paths import decoded
from yolov8_nas.reading import DEEPEST, LONGEST_INTEGER, read_bytes

MOST_BYTES: Final = 4 * 2**20
MOST_NODES: Final = 100_000
MOST_REPEATED: Final = 16 * 2**20
"""Characters, and 32 for each value, of what comes out when every named thing is written where it is named."""


class _Loader(yaml.CSafeLoader):
    """PyYAML's safe loader, with integers of 64 bits, and with each key once: YAML takes the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice in a mapping; remove one", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        # The text first: its digits, in bases 2, 8, 16 and 60, too, take time that grows with their square.
        if len(node.value) <= 3 * LONGEST_INTEGER + 9:
            value: int = super().construct_yaml_int(node)
            if -(2**63) <= value < 2**63:
                return value
        raise yaml.constructor.ConstructorError(None, None, "an integer of more than 64 bits", node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse_yaml(text: str, source: str, *, most_bytes: int = MOST_BYTES, as_written: bool = False) -> Any:
    """The content of YAML, which JSON is, too.

    Args:
        text: The YAML.
        source: What it is, for messages.
        most_bytes: Characters that it may have.
        as_written: Whether values stay text: `on`, `null` and `1.0` may be names.

    Raises:
        InputError: It is no YAML or breaks a bound.
    """
    if len(text) > most_bytes:
        raise InputError(f"{source}: {len(text):,} characters of YAML, more than {most_bytes:,}; make it smaller")
    try:
        _check(text, source)
        return yaml.load(text, Loader=yaml.CBaseLoader if as_written else _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{source}: not YAML: {' '.join(str(error).split())}") from None
    except InputError:
        raise
    except (ValueError, OverflowError, RecursionError) as error:  # a date that is none, a binary that is none
        raise InputError(f"{source}: a value cannot be read ({error}); correct it, or quote it as text") from None


def read_yaml(path: Path, what: str) -> Any:
    """The content of a YAML file.

    Args:
        path: The file.
        what: What it should be, for people.

    Raises:
        InputError: It cannot be read, is no YAML, or breaks a bound.
    """
    return parse_yaml(decoded(read_bytes(path, MOST_BYTES, what), str(path)), str(path))


def _check(text: str, source: str) -> None:
    nodes = 0
    named: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = []  # names of what is not whole yet, with what it holds so far
    whole = 0

    def add(size: int) -> None:
        nonlocal whole
        if open_:
            anchor, held = open_.pop()
            open_.append((anchor, held + size))
            whole = held + size
        else:
            whole = size
        if whole > MOST_REPEATED:
            raise InputError(f"{source}: what is named (&, *) grows beyond bounds where it is repeated; write it out")

    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        match event:
            case yaml.ScalarEvent():
                nodes += 1
                size = 32 + len(event.value)
                if event.anchor:
                    named[event.anchor] = size
                add(size)
            case yaml.AliasEvent():
                nodes += 1
                if event.anchor in (anchor for anchor, _ in open_):
                    raise InputError(f"{source}: {event.anchor!r} holds itself (&, *); write it out")
                add(named.get(event.anchor or "", 32))
            case yaml.CollectionStartEvent():
                nodes += 1
                open_.append((event.anchor, 32))
                if len(open_) > DEEPEST:
                    raise InputError(f"{source}: lists and mappings are nested deeper than {DEEPEST} times; flatten it")
            case yaml.CollectionEndEvent():
                anchor, held = open_.pop()
                if anchor:
                    named[anchor] = held
                add(held)
        if nodes > MOST_NODES:
            raise InputError(f"{source}: more than {MOST_NODES:,} values; name folders instead of listing files")
