"""What a cluster is asked to run: a configuration and parameters of the pipeline, checked before they are sent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kfp.pipeline_spec.pipeline_spec_pb2 import ParameterType

from components import asked
from components.placement import Branch, Training
from pipelines.pipeline import yolov8_nas
from pipelines.pods import CREDENTIALS, CREDENTIALS_SECRET, GPU_TOLERATION, SIGNING_VARIABLE, STORE, STORE_PATH
from yolov8_nas import credentials
from yolov8_nas.config import RunConfig
from yolov8_nas.data.weights import is_stock_name
from yolov8_nas.errors import InputError
from yolov8_nas.run.lifecycle import requested
from yolov8_nas.yaml_text import parse_yaml

_ASKED: Final = ("data", "targets", "constraints", "precision", "budget")
_OURS: Final = ("config", "run_id", "workdir")
_FORMS: Final = {
    ParameterType.STRING: str,
    ParameterType.NUMBER_DOUBLE: float,
    ParameterType.LIST: list,
    ParameterType.STRUCT: dict,
}


@dataclass(frozen=True)
class Request:
    """A run to be.

    Attributes:
        config: What comes out when the parameters are laid over the configuration.
        branches: Where its targets' steps run.
        training: Where it trains.
        parameters: Parameters of the pipeline.
    """

    config: RunConfig
    branches: tuple[Branch, ...]
    training: Training
    parameters: dict[str, Any]


def make(file: Path, overrides: Sequence[str], parameters: Sequence[str]) -> Request:
    """Read what a cluster is asked to run.

    Args:
        file: The run configuration.
        overrides: `KEY=VALUE` laid over it.
        parameters: `NAME=VALUE` of the pipeline's parameters; values are YAML.

    Raises:
        InputError: Something of it cannot be run in a cluster.
    """
    config = RunConfig.load(file, overrides)
    given = dict(_parameter(text) for text in parameters)
    try:
        given = credentials.hide_all(given)
    except ValueError as error:
        raise InputError(f"--param: {error}") from None
    values = {"config": config.to_json(), "store": config.store or STORE, **given}
    if config.signing is not None:
        raise InputError(
            f"{file}: signing names files of this machine; in a cluster keys come from a secret: leave signing out, "
            f"and set {SIGNING_VARIABLE} to the secret's name"
        )
    whole = requested(values["config"], **{name: given[name] for name in _ASKED if name in given})
    _check_addresses([whole.model_dump(mode="json"), given], str(file))
    _check_paths(whole, values["store"], str(file))
    places = asked.check(
        whole,
        store=values["store"],
        target_pools=given.get("target_pools", {}),
        tolerations=given.get("tolerations", [GPU_TOLERATION]),
        nodes=given.get("training_nodes", "1"),
        gpus=given.get("training_gpus", ""),
        cpu=given.get("training_cpu", ""),
        memory=given.get("training_memory", ""),
        labels=given.get("training_labels", {}),
    )
    return Request(whole, tuple(places.branches), places.training, values)


def _parameter(text: str) -> tuple[str, Any]:
    name, equals, written = text.partition("=")
    known = yolov8_nas.pipeline_spec.root.input_definitions.parameters
    if not equals or name not in known or name in _OURS:
        names = ", ".join(sorted(set(known) - set(_OURS)))
        raise InputError(f"--param {text!r}: write NAME=VALUE with one of {names}")
    try:
        value = parse_yaml(written, f"--param {name}")
    except InputError:
        raise InputError(f"--param {text!r}: the value is no YAML; quote it for the shell") from None
    form = _FORMS[known[name].parameter_type]
    if form is str:
        return name, written
    if form is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, form):
        what = {float: "a number", list: "a list, for example [a, b]", dict: "a mapping, for example {a: b}"}[form]
        raise InputError(f"--param {text!r}: {name} is {what}")
    return name, value


def _check_addresses(asked: Any, source: str) -> None:
    """Refuse what Kubeflow would show to everybody who may see the run."""
    if bare := credentials.taken(asked):
        raise InputError(
            f"{source}: {', '.join(bare)}: user, password or query of an address would stand in Kubeflow's record of "
            f"the run; give the bare address, and in the Secret {CREDENTIALS_SECRET} {CREDENTIALS}, a JSON object of "
            "the bare address to the whole one"
        )


def _check_paths(config: RunConfig, store: str, source: str) -> None:
    """Refuse paths that only this machine has."""
    named = {"store": store, "data": config.data, "tracking.uri": _database(config.tracking.uri)}
    weights = config.supernet.weights
    if not (weights and is_stock_name(weights) and config.supernet.download):  # which the step downloads
        named["supernet.weights"] = weights
    named["space"] = config.space if config.space.endswith((".yaml", ".yml")) else None
    for number, target in enumerate(config.targets):
        named[f"targets.{number}.far"] = target.far
    for key, path in named.items():
        if path and "://" not in path and not path.startswith(f"{STORE_PATH}/"):
            raise InputError(
                f"{source}: {key} = {path!r} is a path of this machine, which a cluster has not; put it on the "
                f"cluster's volume and give its path below {STORE_PATH}/, or an s3:// address"
            )


def _database(uri: str | None) -> str | None:
    return uri.removeprefix("sqlite:///") if uri and uri.startswith("sqlite:///") else None


def described(request: Request) -> dict[str, Any]:
    """The parameters as people read them: the configuration as a mapping, not as text in text."""
    return {**request.parameters, "config": json.loads(request.parameters["config"])}
