"""The result of register: where the detector stands in the registry."""

from __future__ import annotations

from pydantic import JsonValue

from yolov8_nas.runner.results.form import Result, ResultFile


class RegisteredChoice(Result):
    """A version to choose from beside the one that ships.

    Attributes:
        version: The version.
        candidate: Index of the candidate in the search's `candidates.json`.
        precision: Precision of its file.
        aliases: Aliases that point at the version.
    """

    version: int
    candidate: int
    precision: str
    aliases: tuple[str, ...]


class RegisterResult(ResultFile):
    """A version of the registry, or why there is none yet; see `registry.register.Registration`.

    Attributes:
        model: Name of the registered model.
        tracking_uri: The tracking server, without credentials.
        reason: Why the version has its role, or why it is not registered yet.
        version: The version; nothing where the server could not be reached.
        model_id: MLflow's id of the logged model.
        aliases: Aliases that point at the version.
        created: Whether the stage completed it; false where it was complete before.
        role: `champion`, `challenger`, or nothing where another version has taken both since.
        run_id: MLflow's id of the run that it was registered from.
        spooled: Where it is kept to be sent later; nothing where it is registered.
        choices: The versions to choose from beside it.
    """

    FILE = "registry.json"

    model: str
    tracking_uri: str
    reason: str
    version: int | None = None
    model_id: str | None = None
    aliases: tuple[str, ...] = ()
    created: bool = False
    role: str | None = None
    run_id: str | None = None
    spooled: str | None = None
    choices: tuple[RegisteredChoice, ...] = ()

    def plain(self) -> dict[str, JsonValue]:
        """As plain JSON values: of a version that is not registered only why, and where it is kept."""
        return self.model_dump(mode="json", exclude_unset=True)
