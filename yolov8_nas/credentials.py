"""Addresses with user, password or query, which must reach the code that connects and must not be recorded.

Where an address comes in, `hidden` takes away what it must not show and keeps the whole in the environment of this
process, which its children inherit and nobody writes down. `revealed` gives the whole back to the code that connects.
Everything between the two, settings, records, messages, knows the bare address only. In a cluster, the variable comes
from a Secret (`docs/kubeflow.md`).
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote, quote_plus, unquote, unquote_plus

VARIABLE: Final = "YOLOV8_NAS_CREDENTIALS"
"""Environment variable with a JSON object: a bare address to the whole one."""

DATA_KEYS: Final = ("YOLOV8_NAS_DATA_ACCESS_KEY_ID", "YOLOV8_NAS_DATA_SECRET_ACCESS_KEY")
"""Environment variables with the access key and the secret key of S3 for datasets and weights."""

SECRET_VARIABLES: Final = (
    DATA_KEYS[1],
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
"""Environment variables with secrets, which libraries of others put into headers and, some of them, into errors."""

TRACKING_VARIABLE: Final = "MLFLOW_TRACKING_URI"
"""MLflow's own environment variable with an address that may hold a password."""

_ADDRESS: Final = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
# Lengths are bounded, so that a search takes time in proportion to the text, whatever somebody makes of it.
_USER: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,31}://)[^\s/?#\"<>]*@")
_QUERY: Final = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]{0,31}://[^\s?\"'<>]{0,2048})\?[^\s\"'<>]*?(?=[;,:.)\]}]*(?:[\s\"'<>]|$))", re.ASCII
)
_STANDS_FOR: Final = "***"
_LEAST: Final = 6
"""Characters from which a value of a query, or a password, is looked for in texts: what is shorter is in every text."""

_LEAST_ALONE: Final = 8
"""The same for the values of `SECRET_VARIABLES`."""

_LONG_USER: Final = 16
"""Characters from which a user with a password is taken for a token: shorter names stand in many texts."""

_SAFE: Final = "!#$%&'()*+,/:;=?@[]~"
"""What `requests` leaves as it is."""

_ENCODED: Final = re.compile("%[0-9A-Fa-f]{2}")

_taken: set[str] = set()


def hidden(address: str) -> str:
    """An address without user, password and query; the whole is kept for `revealed`.

    Args:
        address: The address. Any other text comes back with the addresses in it bare.

    Raises:
        ValueError: User or password cannot be told from the rest; the message shows nothing of them.
    """
    bare = without(address)
    if bare != address and _ADDRESS.fullmatch(address):
        _keep(bare, address)
    return bare


def hide_all(data: Any) -> Any:
    """Plain data with every address in it `hidden`.

    Raises:
        ValueError: As `hidden` does; or two addresses become the same one, so that one of them would be lost.
    """
    wholes: dict[str, str] = {}

    def walk(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {key: walk(value) for key, value in part.items()}
        if isinstance(part, list | tuple):
            return [walk(value) for value in part]
        if not isinstance(part, str) or "://" not in part:
            return part
        bare = hidden(part)
        if bare != part and wholes.setdefault(bare, part) != part:
            raise ValueError(f"two addresses differ from {bare} in user, password or query alone: give them once")
        return bare

    return walk(data)


def revealed(address: str) -> str:
    """The whole address that a bare one stands for; itself where no more is known."""
    known = _known()
    if address in known:
        return known[address]
    named = os.environ.get(TRACKING_VARIABLE, "")
    try:
        return named if named and without(named) == address else address
    except ValueError:
        return address


def taken(data: Any) -> list[str]:
    """The bare addresses in plain data of which this process was given the whole, not its environment."""
    return sorted(_taken.intersection(_strings(data)))


def without(address: str) -> str:
    """An address without user, password and query, or a text with such addresses.

    Raises:
        ValueError: User or password cannot be told from the rest; the message shows nothing of them.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None:
        return redacted(address)
    base = found["rest"].partition("?")[0]
    authority, slash, path = base.partition("/")
    host = authority.rpartition("@")[2]
    port = re.sub(r"^\[[^\]]*\]", "", host).partition(":")[2]
    if port and not re.fullmatch("[0-9]{1,5}", port):
        raise ValueError(
            f"an address of {found['scheme']}:// whose port is no number: write special characters of user and "
            "password as %XX"
        )
    return f"{found['scheme']}://{host}{slash}{path}"


def redacted(text: str) -> str:
    """A text in which no address shows user, password or query, and nothing shows one that this process knows."""
    for whole, bare in _spellings():
        text = text.replace(whole, bare)
    if "://" in text:
        text = _QUERY.sub(r"\1", _USER.sub(r"\1", text))
    return text


def guard_logs() -> None:
    """See that what libraries of this process log shows no secret either."""
    make = logging.getLogRecordFactory()
    if getattr(make, "guarded", False):
        return

    def bare(*parts: Any, **named: Any) -> logging.LogRecord:
        record = make(*parts, **named)
        with contextlib.suppress(TypeError, ValueError):  # a message that does not fit its arguments
            record.msg, record.args = redacted(record.getMessage()), ()
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = redacted(logging.Formatter().formatException(record.exc_info))
        return record

    bare.guarded = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(bare)


def _keep(bare: str, whole: str) -> None:
    known = _known()
    _taken.add(bare)
    if known.get(bare) != whole:
        os.environ[VARIABLE] = json.dumps({**known, bare: whole}, sort_keys=True)


def _known() -> dict[str, str]:
    written = os.environ.get(VARIABLE)
    if not written:
        return {}
    try:
        known = json.loads(written)
    except ValueError:
        known = None
    if not isinstance(known, dict) or not all(isinstance(whole, str) for whole in known.values()):
        raise ValueError(
            f"environment variable {VARIABLE}: no JSON object of a bare address to a whole one; correct it"
        )
    return known


def _spellings() -> Iterator[tuple[str, str]]:
    """What must not be seen, the longest first, with what stands for it."""
    try:
        wholes = dict(_known())
    except ValueError:
        return
    named = os.environ.get(TRACKING_VARIABLE, "")
    if _ADDRESS.fullmatch(named):  # a path such as ./mlruns hides nothing
        try:
            wholes.setdefault(without(named), named)
        except ValueError:
            wholes.setdefault(_STANDS_FOR, named)
    spellings: dict[str, str] = {}
    for bare, whole in wholes.items():
        spellings[whole] = bare
        spellings |= {secret: _STANDS_FOR for secret in _secrets(whole) if len(secret) >= _LEAST}
    for variable in SECRET_VARIABLES:
        parts = os.environ.get(variable, "").split()  # what reads it from a file leaves an end of line in it
        spellings |= {secret: _STANDS_FOR for secret in parts if len(secret) >= _LEAST_ALONE}
    yield from sorted(spellings.items(), key=lambda pair: -len(pair[0]))


def _secrets(whole: str) -> Iterator[str]:
    """What an address hides, in each of the forms in which libraries write it again."""
    base, _, query = whole.partition("://")[2].partition("?")
    named, at, _ = base.partition("/")[0].rpartition("@")
    user, _, password = named.partition(":")
    values = [query, password, *(part.partition("=")[2] for part in query.split("&"))]
    if at and (not password or len(user) >= _LONG_USER):  # a token in the place of a user
        values.append(user)
    for value in filter(None, values):
        plain = unquote(value)
        yield from (plain, unquote_plus(value), repr(plain)[1:-1], json.dumps(plain)[1:-1])
        for encoded in (value, quote_plus(plain), *(quote(plain, safe) for safe in ("", "/", _SAFE))):
            yield encoded
            for case in (str.lower, str.upper):
                yield _ENCODED.sub(lambda found, case=case: case(found[0]), encoded)  # type: ignore[misc]
    if at:
        for pair in (f"{user}:{password}", f"{unquote(user)}:{unquote(password)}"):
            yield base64.b64encode(pair.encode()).decode()  # as HTTP sends it


def _strings(data: Any) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from _strings(value)
    elif isinstance(data, Sequence):
        for value in data:
            yield from _strings(value)
