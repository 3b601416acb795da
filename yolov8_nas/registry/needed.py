"""Which runs of a stage store a registry still stands on."""

from __future__ import annotations

from collections.abc import Iterable

from mlflow.exceptions import MlflowException

from yolov8_nas.files import read_json
from yolov8_nas.registry import tracking
from yolov8_nas.runner.results import RegisterResult
from yolov8_nas.store.housekeeping import named
from yolov8_nas.store.store import Store


def standing(store: Store, runs: Iterable[str]) -> dict[str, str]:
    """The runs of which a version is registered, be it champion or not, or waits to be; each with the reason.

    Args:
        store: A store in a folder.
        runs: Names of runs.

    Raises:
        InputError: A tracking server does not answer, or refuses: nobody knows then what it still needs.
    """
    found = {}
    for run in runs:
        places = [store.place(stage, key) / "outputs" for stage, key in named(store, run) if stage == "register"]
        for folder in places:
            whole = (folder / RegisterResult.FILE).is_file()
            if whole and (why := _needs(store, run, RegisterResult.read(folder))):
                found[run] = why
    return found


def _needs(store: Store, run: str, registered: RegisterResult) -> str | None:
    """Why the registry needs the run of versions; nothing where all of it are gone."""
    if registered.version is None:
        return f"a version of {registered.model} waits to be registered"
    opened = store.root / "runs" / run / "run.json"
    uri = str(read_json(opened)["tracking_uri"]) if opened.is_file() else registered.tracking_uri
    tracking.check_server(uri)
    with tracking.foreseen(uri):
        client = tracking.connect(uri)
        for version in (registered.version, *(choice.version for choice in registered.choices)):
            try:
                client.get_model_version(registered.model, str(version))
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                return f"{registered.model} version {version} is registered"
    return None
