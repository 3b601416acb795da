"""Forms that Kubernetes wants: labels, tolerations, quantities and names of objects.

A server refuses what is not of its form when the pod is to be made, which is hours later and for the steps at the end
alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from yolov8_nas.errors import InputError

CORES: Final = (re.compile(r"(\d+(\.\d{1,3})?|\d+m)"), "3 or 3500m")
BYTES: Final = (re.compile(r"\d+(\.\d+)?(Ki|Mi|Gi|Ti|k|M|G|T)?"), "12Gi")

_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_DOMAIN: Final = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_LONGEST_DOMAIN: Final = 253
_EFFECTS: Final = ("NoSchedule", "PreferNoSchedule", "NoExecute")
_OPERATORS: Final = ("Exists", "Equal")
_KEYS: Final = ("key", "operator", "value", "effect", "tolerationSeconds")


def label_key(key: Any, source: str) -> str:
    """The key of a label or a taint: a name, or `DOMAIN/NAME`.

    Raises:
        InputError: It is none.
    """
    domain, slash, name = str(key).rpartition("/")
    fault = None
    if not isinstance(key, str):
        fault = "is no text; put it in quotes"
    elif slash and (not _DOMAIN.fullmatch(domain) or len(domain) > _LONGEST_DOMAIN):
        fault = "has more than one slash" if "/" in domain else "has no domain of small letters before its slash"
    elif not _NAME.fullmatch(name):
        fault = "is no name of up to 63 letters, digits, '-', '_' and '.'"
    if fault:
        raise InputError(f"{source}: the label {key!r} {fault}; write for example pool or nvidia.com/gpu.product")
    return str(key)


def label_value(key: str, value: Any, source: str) -> str:
    """The value of a label or a taint.

    Raises:
        InputError: It is none.
    """
    if not isinstance(value, str):
        raise InputError(f"{source}: the value of the label {key} is {value!r}, no text; put it in quotes")
    if value and not _NAME.fullmatch(value):
        why = f"has {len(value)} letters" if len(value) > 63 else "has other letters, or begins or ends with one"
        raise InputError(
            f"{source}: {value!r}, the value of the label {key}, {why}; a value is up to 63 letters, digits, '-', '_' "
            "and '.', the first and the last a letter or a digit"
        )
    return value


def labels(asked: Any, source: str) -> dict[str, list[str]]:
    """Labels of nodes: by key, the values of which a node has one.

    Raises:
        InputError: They are none.
    """
    if not isinstance(asked, Mapping):
        raise InputError(f"{source} = {asked!r}: give a mapping, for example {{pool: t4}}")
    found = {}
    for key, value in asked.items():
        values = list(value) if isinstance(value, list | tuple) else [value]
        if not values:
            raise InputError(f"{source}: the label {key} has no values; give one, or leave the label out")
        found[label_key(key, source)] = [label_value(key, one, source) for one in values]
    return found


def tolerations(asked: Any, source: str) -> list[Mapping[str, Any]]:
    """Tolerations, as Kubernetes writes them.

    Raises:
        InputError: One of them is none.
    """
    if not isinstance(asked, Sequence) or isinstance(asked, str):
        raise InputError(f"{source} = {asked!r}: give a list, for example [{{key: nvidia.com/gpu, operator: Exists}}]")
    for one in asked:
        _check_toleration(one, source)
    return list(asked)


def _check_toleration(one: Any, source: str) -> None:
    if not isinstance(one, Mapping) or one.keys() - set(_KEYS):
        raise InputError(f"{source}: {one!r}: give a mapping with some of {', '.join(_KEYS)}")
    operator, effect = one.get("operator", "Equal"), one.get("effect", "")
    if operator not in _OPERATORS:
        raise InputError(f"{source}: operator {operator!r}: use {' or '.join(_OPERATORS)}")
    if effect not in ("", *_EFFECTS):
        raise InputError(f"{source}: effect {effect!r}: use one of {', '.join(_EFFECTS)}, or none for all")
    if one.get("key"):
        label_key(one["key"], source)
    elif operator != "Exists":
        raise InputError(f"{source}: {dict(one)!r}: has no key, which only operator Exists may lack")
    if operator == "Exists" and one.get("value"):
        raise InputError(f"{source}: {dict(one)!r}: operator Exists takes no value; leave it out, or use Equal")
    label_value(str(one.get("key", "")), one.get("value", ""), source)
    if "tolerationSeconds" in one and effect != "NoExecute":
        raise InputError(f"{source}: {dict(one)!r}: tolerationSeconds goes with effect NoExecute alone")


def quantity(value: Any, form: tuple[re.Pattern[str], str], source: str) -> str:
    """A quantity of cores (`CORES`) or memory (`BYTES`), as text.

    Raises:
        InputError: It is none, or nothing.
    """
    pattern, example = form
    text = str(value)
    if isinstance(value, bool) or not pattern.fullmatch(text) or not re.search(r"[1-9]", text):
        raise InputError(f"{source} = {value!r} is no quantity of Kubernetes; write for example {example}")
    return text


def object_name(name: str, source: str) -> str:
    """The name of a service account, a namespace or another object.

    Raises:
        InputError: It is none.
    """
    if not _DOMAIN.fullmatch(name) or len(name) > _LONGEST_DOMAIN:
        raise InputError(f"{source} {name!r}: no name in Kubernetes; use small letters, digits, '-' and '.'")
    return name
