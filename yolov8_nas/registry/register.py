"""Registers a verified detector: a version of an MLflow registered model, with its files, figures and tags.

The same content registered twice, or by two processes at once, converges to one version: a version carries a digest of
its content, is looked for by it before one is made, and of two that were made at once the lower number stays. Files,
figures and alias follow, each of them repeatable, and the tag `state=complete` comes last. Readers (`query`) see only
complete versions, so a registration that was killed half-way is invisible until the next try has finished it.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from yolov8_nas import signing
from yolov8_nas.config import RunConfig
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import canonical_digest, file_sha256, write_json
from yolov8_nas.registry import tracking
from yolov8_nas.registry.champions import CHALLENGER, CHAMPION, alias, alias_holders, challenge, crown
from yolov8_nas.registry.seal import SIGNATURE, Sealed
from yolov8_nas.registry.tracking import repeated_on_conflict
from yolov8_nas.space import SearchSpace
from yolov8_nas.space.limits import Constraint

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

STATE: Final = "state"
COMPLETE: Final = "complete"
CONTENT: Final = "content"
MODEL_ID: Final = "model_id"
PURPOSE: Final = "purpose"
LIMITS: Final = "limits"
CHOICE: Final = "choice"
"""Tag of a version that is to be chosen from beside the one that ships: eight digits of its architecture's digest."""
HASH: Final = "sha256."
SCORES: Final = "sha256_of_scores"
EXAMPLE_FILE: Final = "input_example.json"
SCORES_FILE: Final = "evaluation.npz"
"""What is known of each image, as `evaluation.Evaluation` keeps it: beside the files of a version, not one of them."""

_SHORT: Final = {
    "latency": "lat",
    "throughput": "thr",
    "memory": "mem",
    "power": "pow",
    "energy": "en",
    "params": "params",
    "flops": "flops",
}
_SMALL_UNITS: Final = {
    "latency": ("us", 1e3),
    "throughput": ("ips", 1.0),
    "memory": ("mib", 1.0),
    "power": ("mw", 1e3),
    "energy": ("uj", 1e3),
    "params": ("k", 1e3),
    "flops": ("m", 1e3),
}


@dataclass(frozen=True)
class Deployable:
    """A verified detector, ready to be registered.

    Attributes:
        name: Name of the registered model.
        files: Files by the name they get; `model.onnx` is among them.
        hardware_id: The device it was verified on.
        precision: Precision of `model.onnx`.
        limits: The limits it was asked to keep, as people wrote them.
        scale: Size of the stock YOLOv8 that relative limits are shares of.
        resolved: The limits as absolute ones with what was measured: `constraints` of the verdict.
        metrics: Figures of `model.onnx`, all as measured on the device; `map50_95` among them.
        params: What the detector is.
        tags: What it was made from and for; `dataset`, the digest of the images it was scored on, among them.
        description: One sentence for people.
        scores: What was found on each image (`evaluation.Evaluation`), where that was kept.
        signature: Of a version that comes from another registry, as it stood there.
    """

    name: str
    files: Mapping[str, Path]
    hardware_id: str
    precision: str
    limits: tuple[str, ...]
    scale: str
    resolved: Sequence[Mapping[str, Any]]
    metrics: Mapping[str, float]
    params: Mapping[str, str]
    tags: Mapping[str, str]
    description: str
    scores: Path | None = None
    signature: str | None = None

    def digests(self) -> dict[str, str]:
        """SHA-256 of each file."""
        return {name: file_sha256(path) for name, path in sorted(self.files.items())}

    @property
    def purpose(self) -> str:
        """What it is champion or challenger for; one to choose from has a purpose of its own network."""
        ours = purpose(self.hardware_id, self.precision, self.limits, self.scale)
        return f"{ours}{_CHOSEN}{_slug(self.tags[CHOICE])[:_CHOICE_LETTERS]}" if CHOICE in self.tags else ours


@dataclass(frozen=True)
class Registration:
    """Where a detector stands in the registry.

    Attributes:
        model: Name of the registered model.
        version: Its version.
        model_id: MLflow's id of the logged model, which holds files and figures.
        aliases: Aliases that point at the version now.
        created: Whether this call completed it; false where it was complete before, and nothing was changed.
        role: `champion`, `challenger`, or nothing where another version has taken both since.
        reason: Why it has that role.
    """

    model: str
    version: int
    model_id: str
    aliases: tuple[str, ...]
    created: bool
    role: str | None
    reason: str


def limit_slug(text: str, scale: str) -> str:
    """A limit as it stands in an alias: `lat-p50-3000us`, `lat-p99-nms-4000us`, `mem-1024mib`, `lat-p50-80pct-yolov8n`.

    A relative limit keeps its share: its absolute value is measured anew by every run, and an alias must not change
    with it.
    """
    limit = Constraint.parse(text)
    parts = [_SHORT[limit.metric]]
    if limit.metric == "latency":
        parts.append(limit.statistic)
    if limit.scope == "with_nms":
        parts.append("nms")
    if limit.relative:
        parts += [f"{_plain(100 * limit.limit)}pct", f"yolov8{scale}"]
    else:
        unit, factor = _SMALL_UNITS[limit.metric]
        parts.append(f"{_plain(limit.limit * factor)}{unit}")
    return _slug("-".join(parts))


def purpose(hardware_id: str, precision: str, limits: Sequence[str], scale: str) -> str:
    """What follows `champion-` in an alias: hardware, precision and limits, in letters, digits, `_` and `-`."""
    if len(hardware_id) > _HARDWARE_LETTERS:
        told_apart = hashlib.sha256(hardware_id.encode()).hexdigest()[:8]
        hardware_id = f"{hardware_id[: _HARDWARE_LETTERS - 9]}-{told_apart}"
    return _slug("-".join([hardware_id, precision, *sorted(limit_slug(text, scale) for text in limits)]))


def check_aliases(config: RunConfig) -> None:
    """Check that the alias of each target's models is one that MLflow takes, whatever its device is called.

    Raises:
        InputError: The names of its limits come to too much.
    """
    scale = SearchSpace.load(config.space).scale
    for target in config.targets:
        ours = len(alias(CHALLENGER, purpose("x" * _HARDWARE_LETTERS, "int8", target.constraints, scale)))
        ours += len(_CHOSEN) + _CHOICE_LETTERS
        if ours > ALIAS_LETTERS:
            count = len(target.constraints)
            raise InputError(
                f"target {target.hardware}: its {count} limits make an alias of up to {ours} letters in the registry, "
                f"which takes {ALIAS_LETTERS}; leave out those that others imply"
            )


@repeated_on_conflict
def register(client: MlflowClient, run: str, deployable: Deployable) -> Registration:
    """Register a detector, or find it where the same content is registered already.

    Args:
        client: As `tracking.connect` gave it.
        run: MLflow's id of the run that made the detector.
        deployable: The detector.

    Returns:
        The version that holds this content, now complete.

    Raises:
        StageError: A version of this content is there, and not signed with a trusted key where signatures are asked
            for; its tags are not those of this detector, so that it is not signed by the way.
    """
    digests = deployable.digests()
    limits = [{key: limit[key] for key in _LIMIT if key in limit} for limit in deployable.resolved]
    content = content_digest(digests, deployable.hardware_id, limits, deployable.tags.get(CHOICE))
    tags = {
        **deployable.tags,
        "hardware_id": deployable.hardware_id,
        "precision": deployable.precision,
        "constraints": ", ".join(deployable.limits),
        "scale": deployable.scale,
        LIMITS: json.dumps(limits),
        PURPOSE: deployable.purpose,
        **{f"{HASH}{name}": digest for name, digest in digests.items()},
        CONTENT: content,
    }
    source = client.get_run(run)
    manifest = {"content": content, "files": digests, "tags": tags}
    with ThreadPoolExecutor() as meanwhile:
        version, upload = _converge(
            client, source, deployable, tags, partial(_begin_upload, client, meanwhile, deployable, manifest)
        )
        number, model_id = str(version.version), version.tags[MODEL_ID]
        if upload:
            for key, value in tags.items():  # of a version that was begun by another run, or by somebody else
                if version.tags.get(key) != value:
                    client.set_model_version_tag(deployable.name, number, key, value)
        else:
            _require_trusted(client, version)
        _link(client, source, model_id)
        _log_metrics(client, source, deployable, model_id if upload else None)
    given, created = None, upload is not None
    if upload:
        _require_arrival(client, model_id, deployable.name, upload)
        if deployable.scores:
            tags[SCORES] = file_sha256(deployable.scores)
            client.set_model_version_tag(deployable.name, number, SCORES, tags[SCORES])
        sealed = Sealed.of(deployable.name, tags, deployable.params, deployable.metrics)
        if signature := sealed.sign() or deployable.signature:
            client.set_model_version_tag(deployable.name, number, SIGNATURE, signature)
        client.finalize_logged_model(model_id, "READY")
        given = _give_alias(client, deployable, int(number))
        _complete(client, deployable.name, number, model_id)
    if given is None:
        return _standing(client, deployable, int(number), model_id, created)
    aliases = (alias(given[0], deployable.purpose),)
    return Registration(deployable.name, int(number), model_id, aliases, created, *given)


def _complete(client: MlflowClient, name: str, number: str, model_id: str) -> None:
    """Say of a version, and of its logged model, that all of it is there; the version is the last to say so."""
    made = [{"name": name, "version": int(number)}]  # as MLflow's own fluent API notes it
    client.set_logged_model_tags(
        model_id,
        {
            "registered_model": name,
            "registered_version": number,
            "mlflow.modelVersions": json.dumps(made),
            STATE: COMPLETE,
        },
    )
    client.set_model_version_tag(name, number, STATE, COMPLETE)


def content_digest(
    files: Mapping[str, str], hardware_id: str, limits: Sequence[Mapping[str, Any]], choice: str | None = None
) -> str:
    """What tells one deployable from another: the SHA-256 of its files, its device, its limits and its purpose.

    A limit that is a share of stock is that share: what it comes to in an hour's milliseconds is no part of it, so that
    the same files registered again are the same version.
    """
    asked = [
        {key: value for key, value in limit.items() if not ("share" in limit and key in ("limit", "stock"))}
        for limit in limits
    ]
    chosen = {CHOICE: choice} if choice else {}
    return canonical_digest({"files": dict(files), "hardware": hardware_id, "constraints": asked, **chosen})


ALIAS_LETTERS: Final = 255
"""Letters of an alias in MLflow."""

_HARDWARE_LETTERS: Final = 64  # of an alias
_CHOSEN: Final = "-net-"
_CHOICE_LETTERS: Final = 8

_LARGEST_EXAMPLE: Final = 4_000_000  # bytes: an image of 640 pixels takes 2.5 million

_LIMIT: Final = ("metric", "statistic", "scope", "limit", "unit", "share", "stock")


def _plain(number: float) -> str:
    return f"{number:.3f}".rstrip("0").rstrip(".")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _converge(
    client: MlflowClient,
    run: Run,
    deployable: Deployable,
    tags: Mapping[str, str],
    upload: Callable[[str], _Upload],
) -> tuple[ModelVersion, _Upload | None]:
    """The one version with this content; two processes that make it at once both end with the lower number.

    Args:
        upload: Begins to upload the files to a logged model.

    Returns:
        The version, and what uploads its files; nothing where it is complete.
    """
    from mlflow.exceptions import MlflowException

    def lowest() -> ModelVersion | None:
        found = client.search_model_versions(f"name = '{deployable.name}' AND tags.{CONTENT} = '{tags[CONTENT]}'")
        return min(found, key=lambda version: int(version.version), default=None)

    def resumed(version: ModelVersion) -> tuple[ModelVersion, _Upload | None]:
        complete = version.tags[STATE] == COMPLETE
        return version, None if complete else upload(version.tags[MODEL_ID])

    present = lowest()
    if present is not None:
        return resumed(present)
    model = client.create_logged_model(
        run.info.experiment_id,
        name=deployable.name,
        source_run_id=run.info.run_id,
        tags=dict(tags),
        params=dict(deployable.params),
        model_type="detector",
    )
    uploading = upload(model.model_id)
    try:
        client.create_registered_model(deployable.name, tags={"made_by": "yolov8-nas"})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = client.create_model_version(
        deployable.name,
        source=f"models:/{model.model_id}",
        run_id=run.info.run_id,
        model_id=model.model_id,
        tags={**tags, STATE: "incomplete", MODEL_ID: model.model_id},
        description=deployable.description,
    )
    kept = lowest() or made
    if int(kept.version) != int(made.version):
        client.delete_model_version(deployable.name, str(made.version))
        if kept.tags[MODEL_ID] != model.model_id:
            # The same where an answer was lost on its way, and MLflow asked for the version a second time.
            wait(uploading)
            client.delete_logged_model(model.model_id)
            return resumed(kept)
    return kept, uploading


def _link(client: MlflowClient, run: Run, model_id: str) -> None:
    """Note the detector as an output of the run, once."""
    from mlflow.entities import LoggedModelOutput

    outputs = run.outputs.model_outputs if run.outputs else ()
    if not any(output.model_id == model_id for output in outputs):
        client.log_outputs(run.info.run_id, [LoggedModelOutput(model_id, 0)])


def _log_metrics(client: MlflowClient, run: Run, deployable: Deployable, model_id: str | None) -> None:
    """Log the figures to the run, and with `model_id` to the logged model too, each linked to the dataset.

    MLflow drops a metric that equals an earlier one in value, step and time, so a fixed time makes this repeatable.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric

    name, digest = deployable.tags["dataset_name"], deployable.tags["dataset"][:36]  # MLflow keeps 36 characters
    source = json.dumps({"sha256": deployable.tags["dataset"]})
    dataset = Dataset(name=name, digest=digest, source_type="code", source=source)
    context = [InputTag("mlflow.data.context", "validation")]
    client.log_inputs(run.info.run_id, datasets=[DatasetInput(dataset, context)])
    when, link = run.info.start_time, {"model_id": model_id, "dataset_name": name, "dataset_digest": digest}
    metrics = [Metric(key, value, when, 0, **link) for key, value in deployable.metrics.items()]
    client.log_batch(run.info.run_id, metrics=metrics)


_Upload: TypeAlias = Sequence[Future[dict[str, int]]]
"""What uploads files: bytes of each, by name."""


def _begin_upload(
    client: MlflowClient,
    pool: ThreadPoolExecutor,
    deployable: Deployable,
    manifest: Mapping[str, Any],
    model_id: str,
) -> _Upload:
    """Begin to upload an MLflow model of the ONNX flavour to a logged model: the files, and what describes them."""

    def send(write: Callable[[Path], None]) -> dict[str, int]:
        with tempfile.TemporaryDirectory(prefix="yolov8-nas-") as temporary:
            folder = Path(temporary) / "files"
            write(folder)
            tracking.upload(lambda: client.log_model_artifacts(model_id, str(folder)))
            return {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}

    def carry(folder: Path) -> None:
        folder.mkdir()
        for name, path in deployable.files.items():
            _stand_in(folder / name, path)

    def describe(folder: Path) -> None:
        _save_onnx_flavour(deployable.files["model.onnx"], folder)
        if deployable.scores:
            _stand_in(folder / SCORES_FILE, deployable.scores)
        write_json(folder / "manifest.json", manifest)

    return [pool.submit(send, carry), pool.submit(send, describe)]


def _require_arrival(client: MlflowClient, model_id: str, name: str, upload: _Upload) -> None:
    """See that all files of an upload have arrived.

    Raises:
        ConnectionError: They have not, or in part.
    """
    sent = {file: size for part in upload for file, size in part.result().items()}
    arrived = {file.path: file.file_size for file in client.list_logged_model_artifacts(model_id)}
    for file, size in sent.items():
        if arrived.get(file) != size:
            raise ConnectionError(
                f"{name}: {arrived.get(file, 0)} of {size} bytes of {file} have arrived in the artifact store; "
                "register it again"
            )


def _stand_in(link: Path, file: Path) -> None:
    """Give a file another name without a copy, which takes as long as a good part of the upload."""
    link.symlink_to(file.resolve())


def _save_onnx_flavour(file: Path, folder: Path) -> None:
    """Write what lets `mlflow.pyfunc.load_model` run the network: with signature and, unless it is large, an example.

    All but the ONNX file: MLflow writes that anew, and the measured one is to be had, byte by byte.
    """
    import mlflow.onnx
    import onnx
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    from yolov8_nas.export.onnx_file import read_graph

    model = read_graph(file)

    def schema(values: Sequence[onnx.ValueInfoProto]) -> Schema:
        specs = []
        for value in values:
            tensor = value.type.tensor_type
            shape = tuple(side.dim_value if side.HasField("dim_value") else -1 for side in tensor.shape.dim)
            specs.append(TensorSpec(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type), shape, value.name))
        return Schema(specs)

    inputs = schema(model.graph.input)
    example = _example(inputs)
    del model.graph.initializer[:]
    mlflow.onnx.save_model(
        model,
        str(folder),
        mlflow_model=Model(saved_input_example_info=example and {"artifact_path": EXAMPLE_FILE, "type": "ndarray"}),
        signature=ModelSignature(inputs, schema(model.graph.output)),
        pip_requirements=[f"{name}=={installed(name)}" for name in ("onnx", "onnxruntime", "numpy")],
        onnx_execution_providers=["CPUExecutionProvider"],
        save_as_external_data=False,
    )
    (folder / "model.onnx").unlink()
    if example:
        (folder / EXAMPLE_FILE).write_text(example)


def _example(inputs: Any) -> str | None:
    """Input that the network takes, as MLflow keeps it: a white square on black, so that each figure is one digit.

    A photograph of 640 pixels would be 27 MB of text.
    """
    import numpy as np

    images = {}
    for spec in inputs.inputs:
        image = np.zeros(spec.shape, np.uint8)
        height, width = spec.shape[2:]
        image[:, :, height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = 1
        images[spec.name] = image.tolist()
    text = json.dumps(images, separators=(",", ":"))
    return text if len(text) <= _LARGEST_EXAMPLE else None


def _give_alias(client: MlflowClient, deployable: Deployable, version: int) -> tuple[str, str] | None:
    """Point `champion-...` or `challenger-...` at a version that has just been registered; which one, and why.

    A version becomes champion where there is none yet, or where it scores at least as well as the champion on the same
    images; that it keeps the limits is why it is registered at all. Scores on different images say nothing about each
    other, so there the champion stays.
    """
    holders = alias_holders(client, deployable.name)
    holder = holders.get(alias(CHAMPION, deployable.purpose))
    if holder == version:
        return None  # an earlier try came this far
    role, reason = CHAMPION, "the first that keeps these limits on this device"
    if holder is not None:
        champion = client.get_model_version(deployable.name, str(holder))
        if champion.tags.get(STATE) == COMPLETE:
            role, reason = _against(client, deployable, champion)
    if role == CHAMPION:
        crown(client, deployable.name, deployable.purpose, version, holders, action="registered", because=reason)
    else:
        challenge(client, deployable.name, deployable.purpose, version, reason)
    return role, reason


def _against(client: MlflowClient, deployable: Deployable, champion: ModelVersion) -> tuple[str, str]:
    """The role of a detector where there is a champion, and the reason."""
    if champion.tags.get("dataset") != deployable.tags["dataset"]:
        return CHALLENGER, (
            f"the champion, version {champion.version}, was scored on another state of the dataset; "
            "score both on the same images before promoting"
        )
    model = client.get_logged_model(champion.tags[MODEL_ID])
    if why := _seal_fault(client, champion):
        return CHALLENGER, f"the champion, version {champion.version}, is not to be compared with: {why}"
    theirs = next(metric.value for metric in model.metrics if metric.key == "map50_95")
    ours = deployable.metrics["map50_95"]
    word = "at least" if ours >= theirs else "below"
    return CHAMPION if ours >= theirs else CHALLENGER, (
        f"keeps the limits with mAP50-95 {ours:.4f}, {word} the {theirs:.4f} of champion version {champion.version}"
    )


def _seal_fault(client: MlflowClient, version: ModelVersion) -> str | None:
    """Why no signature vouches for a version; nothing where one does, or where nobody asks for signatures."""
    if not signing.keys():
        return None
    model = client.get_logged_model(version.tags[MODEL_ID])
    metrics = {metric.key: float(metric.value) for metric in model.metrics or ()}
    sealed = Sealed.of(version.name, version.tags, model.params or {}, metrics)
    return sealed.fault(version.tags.get(SIGNATURE))


def _require_trusted(client: MlflowClient, version: ModelVersion) -> None:
    if why := _seal_fault(client, version):
        raise StageError(
            f"{version.name}/{version.version}: has the same files, device and limits, and {why}; look at it, and sign "
            f"it (yolov8-nas models sign {version.name}/{version.version}) or delete it"
        )


def _standing(client: MlflowClient, deployable: Deployable, version: int, model_id: str, created: bool) -> Registration:
    holders = alias_holders(client, deployable.name)
    aliases = tuple(sorted(name for name, holder in holders.items() if holder == version))
    role = next((role for role in (CHAMPION, CHALLENGER) if alias(role, deployable.purpose) in aliases), None)
    tags = client.get_model_version(deployable.name, str(version)).tags
    reason = tags.get(f"{role}_because") or (
        f"set in the registry by somebody since version {version} was registered"
        if role
        else "another version has taken its place since"
    )
    return Registration(deployable.name, version, model_id, aliases, created, role, reason)
