"""Which version is champion: aliases in MLflow, and who set them, when, why, from what to what.

For each purpose (hardware, precision and limits, see `register.purpose`) a registered model has at most one champion
and one challenger. MLflow's aliases say which they are now and remember nothing. So each change of a champion is a tag
of the registered model too, written before the alias is set: a change that was cut short can be told from one that
took place, because the alias says who holds the title.
"""

from __future__ import annotations

import getpass
import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from yolov8_nas.errors import InputError
from yolov8_nas.reading import parse_json
from yolov8_nas.registry.tracking import repeated_on_conflict

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION: Final = "champion"
CHALLENGER: Final = "challenger"

ROLLED_BACK: Final = "rolled back"

_CHANGE: Final = "champion-change."


@dataclass(frozen=True)
class Change:
    """One change of a champion.

    Attributes:
        purpose: What follows `champion-` in the alias.
        action: `registered`, `promoted` or `rolled back`.
        version: The new champion.
        before: The champion until then, if there was one.
        by: Who.
        at: When, in UTC.
        because: Why.
    """

    purpose: str
    action: str
    version: int
    before: int | None
    by: str
    at: str
    because: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def alias(role: str, purpose: str) -> str:
    """`champion-<purpose>` or `challenger-<purpose>`."""
    return f"{role}-{purpose}"


def alias_holders(client: MlflowClient, name: str) -> dict[str, int]:
    """The version that each alias of a registered model points at. (A database gives MLflow numbers, a server text.)"""
    return {alias: int(version) for alias, version in client.get_registered_model(name).aliases.items()}


@repeated_on_conflict
def crown(
    client: MlflowClient,
    name: str,
    purpose: str,
    version: int,
    holders: Mapping[str, int],
    *,
    action: str,
    because: str,
    by: str | None = None,
) -> Change:
    """Make a version the champion and keep who, when, why, from what to what. Doing it twice does no harm.

    Args:
        client: As `tracking.connect` gave it.
        name: Name of the registered model.
        purpose: What follows `champion-` in the alias.
        version: The new champion.
        holders: What the model's aliases point at until now, as `alias_holders` told.
        action: `registered`, `promoted` or `rolled back`.
        because: Why.
        by: Who; this user on this machine unless given.
    """
    now = datetime.now(UTC)
    change = Change(
        purpose=purpose,
        action=action,
        version=version,
        before=holders.get(alias(CHAMPION, purpose)),
        by=by or _somebody(),
        at=now.isoformat(timespec="seconds"),
        because=because,
    )
    client.set_registered_model_tag(name, f"{_CHANGE}{now:%Y%m%dT%H%M%S.%f}", json.dumps(change.to_dict()))
    client.set_model_version_tag(name, str(version), f"{CHAMPION}_because", because)
    client.set_registered_model_alias(name, alias(CHAMPION, purpose), str(version))
    if holders.get(alias(CHALLENGER, purpose)) == version:
        client.delete_registered_model_alias(name, alias(CHALLENGER, purpose))
    return change


def challenge(client: MlflowClient, name: str, purpose: str, version: int, because: str) -> None:
    """Make a version the challenger."""
    client.set_model_version_tag(name, str(version), f"{CHALLENGER}_because", because)
    client.set_registered_model_alias(name, alias(CHALLENGER, purpose), str(version))


def history(client: MlflowClient, name: str) -> list[Change]:
    """Every change of a champion of a registered model, the oldest first.

    Raises:
        InputError: A record of one is not of its form.
    """
    tags: Mapping[str, str] = client.get_registered_model(name).tags
    changes = []
    for key in sorted(tags):
        if key.startswith(_CHANGE):
            try:
                changes.append(Change(**parse_json(tags[key], key)))
            except (ValueError, TypeError):
                raise InputError(
                    f"{name}: its tag {key!r} is no record of a change of champion; remove the tag in MLflow"
                ) from None
    return changes


def predecessors(changes: Sequence[Change], holder: int) -> list[int]:
    """The versions that held the title before the one that holds it now, the last of them first.

    What was rolled back is not among them, so that rolling back twice goes back twice; nor is a change that was cut
    short before the alias was set.

    Args:
        changes: Those of one purpose, the oldest first.
        holder: The version that the alias points at.
    """
    reign: list[int] = []
    for change in changes:
        if change.action == ROLLED_BACK and change.version in reign:
            while reign[-1] != change.version:
                reign.pop()
        elif not reign or reign[-1] != change.version:
            reign.append(change.version)
    if holder in reign:
        while reign.pop() != holder:
            pass
    return [version for version in reversed(reign) if version != holder]


def _somebody() -> str:
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):  # a container's user need not have a name
        return socket.gethostname()
