"""One way to run a stage, on a workstation and in a cluster.

A stage is a function of files to files. `run_stage` owns everything around it: the key in the store, the lock, the
checkpoints' place, skipping what is done, retrying what is transient, recording what failed, and the one tar that
travels on.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import select
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Generic, Literal, TypeVar, cast

from yolov8_nas import paths, quiet, signing
from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.device.host import HostLock
from yolov8_nas.errors import InputError, NoRoomError, StageError, WaitingError, told
from yolov8_nas.files import canonical_digest, file_sha256, no_room, read_json, read_kept, tree_files, write_json
from yolov8_nas.reading import parse_json
from yolov8_nas.runner.progress import Progress, duration
from yolov8_nas.runner.results.record import StageRecord
from yolov8_nas.runner.settings import StageSettings
from yolov8_nas.store.archive import extract, pack
from yolov8_nas.store.store import Entry, Manifest, Store

STAGES: Final = ("data-prep", "supernet-train", "hw-probe", "search", "qat-finetune", "trt-export", "register")
"""The stages, in the order of the pipeline; `stages.find_stage` has the stage of a name."""

LOGS_VARIABLE: Final = "YOLOV8_NAS_LOGS"
"""Environment variable with the folder of log files, one a stage; where it is not set, a stage logs to its output."""

PARENT_VARIABLE: Final = "YOLOV8_NAS_PARENT"
"""Environment variable with the process id that a stage must not outlive."""

RETRY_DELAYS: Final = (2.0, 10.0, 30.0)
"""Seconds to wait before each new try after a transient error."""

STATUS_FILE: Final = "status.json"
_FAILURE: Final = ("stage", "kind", "error", "run_id")

TOLD: Final = {"data-prep": ("dataset.json",)}
"""What a summary reads of the result of a stage, where the whole would be too much to bring from a remote store."""

_TOOLS: Final = ("yolov8-nas", "torch", "ultralytics", "onnx", "onnxruntime", "nvidia-modelopt", "mlflow", "numpy")

T = TypeVar("T")
S = TypeVar("S", bound=StageSettings)
P = TypeVar("P", bound=StageSettings)
Status = Literal["done", "cached", "failed"]


@dataclass(frozen=True)
class StageContext(Generic[S]):
    """What a running stage has.

    Attributes:
        settings: All that the result depends on beside the inputs.
        inputs: The folder of each input, by the name of the stage that made it.
        out: Empty folder; what is written here is the result.
        partial: Folder for checkpoints, written atomically; a later try finds it as this one left it.
        progress: How far the stage has come.
        host: The host's lock, for `computing()` and `measuring()`.
        store: The stage store, for what is shared with other keys.
        spared: Seconds that it once took to make the shared parts that were found in the store, less the wait for them.
    """

    settings: S
    inputs: Mapping[str, Path]
    out: Path
    partial: Path
    progress: Progress
    host: HostLock
    store: Store | None = None
    spared: dict[str, float] = field(default_factory=dict)

    def share(self, part: str, version: int, settings: P, make: Callable[[StageContext[P]], None]) -> None:
        """Lay a part of the result into `out` that does not depend on all of the stage's settings.

        The part has a key of its own in the store, like a stage without inputs: whatever other setting of the stage
        changes, it is made once and found again. Where `make` fails, what it had written lies in `out` as evidence,
        and the next try makes it again; after an interruption it goes on from its own `partial`. Without a store the
        part is made in place.

        Args:
            part: Name of the folder in the store.
            version: Raised when the same settings would give another result.
            settings: All that the part depends on.
            make: Makes it, given a context with these settings and folders of its own.
        """
        if self.store is None:
            make(self._for(settings, self.inputs, self.out, self.partial))
            return
        asked = time.monotonic()
        entry = self.store.entry(part, canonical_digest([part, version, settings.plain()]))
        with entry.lock(lambda: self.progress.note(f"another run makes the same {part}; waiting for it")):
            manifest = entry.manifest
            if manifest is None or entry.damage(manifest):
                self._make(entry, part, version, settings, make)
            else:
                self.progress.note(f"{part} of an earlier run with the same settings: used again")
                self.spared[part] = manifest.seconds - (time.monotonic() - asked)
            shutil.copytree(entry.outputs, self.out, dirs_exist_ok=True)

    def _for(self, settings: P, inputs: Mapping[str, Path], out: Path, partial: Path) -> StageContext[P]:
        return StageContext(settings, inputs, out, partial, self.progress, self.host, self.store, self.spared)

    def _make(
        self, entry: Entry, part: str, version: int, settings: P, make: Callable[[StageContext[P]], None]
    ) -> None:
        start = time.monotonic()
        entry.clear(partial=False)
        for folder in (entry.outputs, entry.partial):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            make(self._for(settings, {}, entry.outputs, entry.partial))
        except (InputError, StageError):
            shutil.copytree(entry.outputs, self.out, dirs_exist_ok=True)
            entry.clear(partial=True)
            raise
        outputs = {name: file_sha256(path) for name, path in tree_files(entry.outputs).items()}
        entry.commit(
            Manifest(
                stage=part,
                version=version,
                key=entry.folder.name,
                settings=settings.plain(),
                inputs={},
                outputs=outputs,
                digest=canonical_digest(outputs),
                seconds=time.monotonic() - start,
                tools=_tools(),
                seed=getattr(settings, "seed", None),
            )
        )


@dataclass(frozen=True)
class Stage(Generic[S]):
    """One stage.

    Attributes:
        name: One of `STAGES`.
        version: Raised when the same settings and inputs would give another result.
        settings: What the configuration tells of the settings; they go into the key.
        run: The stage itself: a function of `settings` and `inputs` to files in `out`.
        complete: The whole settings, where a part of them is known to earlier tasks only; nothing where
            `settings` tells all.
        always_run: Never skipped: its effects lie outside the store, and doing them twice does no harm.
        watched: What the machine does meanwhile is recorded with the result, see `device.usage`.
    """

    name: str
    version: int
    settings: Callable[[RunConfig, TargetConfig | None], StageSettings]
    run: Callable[[StageContext[S]], None]
    complete: type[S] | None = None
    always_run: bool = False
    watched: bool = False

    def whole(self, config: RunConfig, target: TargetConfig | None, parameters: Mapping[str, object]) -> S:
        """The stage's settings, with what only earlier tasks know.

        Raises:
            InputError: As `settings` does.
        """
        asked = self.settings(config, target)
        if self.complete is None:
            assert not parameters, f"{self.name} takes no parameters"
            return cast(S, asked)
        return self.complete.model_validate({**dict(asked), **parameters})


@dataclass(frozen=True)
class Outcome:
    """How a stage ended.

    Attributes:
        status: `cached` where the result was there already.
        digest: SHA-256 of the tar that travels on.
        key: Key in the store; empty where an earlier failure was passed on.
        seconds: How long this call took.
        error: What went wrong, where the stage failed.
    """

    status: Status
    digest: str
    key: str
    seconds: float
    error: str | None = None


def begun_file(stage: str, target: str | None) -> str:
    """Name of the record of a run that a stage has begun to compute."""
    return f"begun.{target or 'all'}.{stage}.json"


def record_file(stage: str, target: str | None) -> str:
    """Name of the record of a run that tells what a stage came to."""
    return f"{target or 'all'}.{stage}.json"


def read_record(records: Path, stage: str, target: str | None) -> StageRecord | None:
    """What a stage came to in a run; nothing where it has not ended.

    Args:
        records: Folder of the run's records.
        stage: The stage.
        target: Label of the target, or nothing for a stage that serves all of them.
    """
    file = records / record_file(stage, target)
    return StageRecord.model_validate(read_json(file)) if file.is_file() else None


def target_labels(config: RunConfig) -> list[str]:
    """A short distinct name for each target of a run, for example `cpu-2t-int8`; numbered where two are alike."""
    plain = [f"{target.hardware}-{target.precision}".lower().replace("_", "-") for target in config.targets]
    return [
        label if plain.count(label) == 1 else f"{label}-{plain[: index + 1].count(label)}"
        for index, label in enumerate(plain)
    ]


def find_target(config: RunConfig, label: str) -> TargetConfig:
    """The target of a label made by `target_labels`.

    Raises:
        InputError: The run has no such target.
    """
    labels = target_labels(config)
    if label not in labels:
        raise InputError(f"{config.name}: no target {label!r}; its targets are {', '.join(labels)}")
    return config.targets[labels.index(label)]


def check_store(store: str | Path) -> None:
    """Check that a stage store is at an address of a kind that there is, without asking there.

    Raises:
        InputError: It is not.
    """
    if str(store).startswith("s3://"):
        if not re.match(r"s3://[^/]+", str(store)):
            raise InputError(f"store {store}: names no bucket; write s3://BUCKET/PREFIX")
    elif "://" in str(store):
        raise InputError(f"store {store}: no place for a stage store; give a path or s3://BUCKET/PREFIX")


def open_store(store: str | Path) -> Store:
    """The stage store at a path or in S3.

    Raises:
        InputError: It is at an address of another kind, or boto3 cannot use the environment.
    """
    check_store(store)
    if str(store).startswith("s3://"):
        from yolov8_nas.store.remote import RemoteStore  # here, since boto3 takes its time

        return RemoteStore(str(store))
    return Store(Path(store))


def key_of(stage: Stage[S], settings: StageSettings, inputs: Mapping[str, str]) -> str:
    """The key of a stage's result: a digest of all that it depends on.

    Args:
        stage: The stage.
        settings: Its settings.
        inputs: SHA-256 of the tar of each input, by the name of the stage that made it.
    """
    return canonical_digest([stage.name, stage.version, settings.plain(), inputs])


def run_stage(
    stage: Stage[S],
    *,
    config: RunConfig | str,
    target: str | None,
    inputs: Mapping[str, Path],
    output: Path,
    store: str | Path,
    run_id: str,
    parameters: Mapping[str, object] | None = None,
    digests: Mapping[str, str] | None = None,
    gpus: int = 0,
    found: str = "",
) -> Outcome:
    """Bring a stage to its end and pack its result.

    A finished result of the store is verified and used again. A stage that serves one target never raises for its own
    failure: the failure is recorded and travels on as `status.json` in the tar, later stages of that target pass it
    on, and the other targets are not disturbed. A stage that serves all targets raises.

    Args:
        stage: The stage.
        config: The run's configuration, or its JSON.
        target: Label of the target, or nothing for a stage that serves all targets.
        inputs: The tar of each input, by the name of the stage that made it.
        output: Where the tar of the result goes.
        store: The stage store.
        run_id: Name of the run in whose records the outcome is written.
        parameters: Further settings that only earlier tasks know; they go into the key.
        digests: What the SHA-256 of the inputs must be, where it is known.
        gpus: GPUs that this process was promised. A stage that has something to compute and finds fewer does not begin;
            one whose result is in the store needs none.
        found: Key of the result, where it was found in the store before (`run.found`): then it is read, and where it
            has gone meanwhile nothing is computed, since this process was given room to read.

    Raises:
        InputError: The input cannot be used (stages that serve all targets).
        StageError: The stage failed deterministically (stages that serve all targets).
    """
    if isinstance(config, str):
        config = RunConfig.parse(json.loads(config), "run configuration")
    die_with_parent()
    if config.signing is not None:
        signing.adopt(config.signing.key, config.signing.trusted)
    with _log_file(stage.name, target):
        run = _Run(stage, config, target, inputs, output, open_store(store), run_id, gpus, found)
        return run.carry_out(parameters or {}, digests or {})


class _Run(Generic[S]):
    """One call of `run_stage`."""

    def __init__(
        self,
        stage: Stage[S],
        config: RunConfig,
        target: str | None,
        inputs: Mapping[str, Path],
        output: Path,
        store: Store,
        run_id: str,
        gpus: int,
        found: str,
    ) -> None:
        self.stage = stage
        self.config = config
        self.target = target
        self.inputs = inputs
        self.output = output
        self.store = store
        self.run_id = run_id
        self.gpus = gpus
        self.found = found
        self.settings: Mapping[str, Any] = {}
        self.spared: dict[str, float] = {}
        self.progress = Progress.from_environment(stage.name, target)
        self.start = time.monotonic()

    def carry_out(self, parameters: Mapping[str, object], expected: Mapping[str, str]) -> Outcome:
        """Skip, run or pass on; whatever happens is recorded."""
        self.progress.started()
        try:
            signing.require_signer()
            digests = {name: _arrived(name, path, expected.get(name)) for name, path in sorted(self.inputs.items())}
            for name, path in self.inputs.items():
                if failure := _read_status(path):
                    return self._pass_on(name, failure)
            if self.found:
                return self._read(digests)
            target = None if self.target is None else find_target(self.config, self.target)
            settings = self.stage.whole(self.config, target, parameters)
            self.settings = settings.plain()
            key = key_of(self.stage, settings, digests)
        except Exception as error:
            return self._failed(error, "", None)
        entry = self.store.entry(self.stage.name, key)
        with contextlib.ExitStack() as stack:
            try:
                self._patiently(lambda: stack.enter_context(entry.lock(self._waits)))
            except Exception as error:  # a store in S3 that cannot be reached
                return self._failed(error, "", None)
            try:
                if outcome := self._already(entry, key):
                    return outcome
                self._require_a_target()
                require_gpus(self.gpus)
                return self._compute(entry, key, settings, digests)
            except Exception as error:
                return self._failed(error, key, entry)

    def _read(self, digests: Mapping[str, str]) -> Outcome:
        """The outcome of a result that was found.

        Raises:
            WaitingError: It is no longer there, or not of these inputs.
        """
        entry = self.store.entry(self.stage.name, self.found)
        with contextlib.ExitStack() as stack:
            self._patiently(lambda: stack.enter_context(entry.lock(self._waits)))
            manifest = entry.manifest
            if manifest and (manifest.version, manifest.inputs) == (self.stage.version, digests):
                self.settings = manifest.settings
                if (outcome := self._already(entry, self.found)) and outcome.status == "cached":
                    return outcome
        raise WaitingError(
            f"{self.stage.name}: its result {self.found[:12]} was in the store when this step was given room to read "
            "it, and is no longer there, or damaged; start the run again, which computes it"
        )

    def _waits(self) -> None:
        self.progress.note("another run works on the same result; waiting for it")

    def _patiently(self, work: Callable[[], T]) -> T:
        """Do something, and try again after a transient error."""
        for number, delay in enumerate(RETRY_DELAYS, 1):
            try:
                return work()
            except Exception as error:
                if not _is_transient(error):
                    raise
                again = f"trying again in {duration(delay)} ({number} of {len(RETRY_DELAYS)})"
                self.progress.note(f"{_unexpected(error)}; {again}")
                time.sleep(delay)
        return work()

    def _already(self, entry: Entry, key: str) -> Outcome | None:
        """The outcome where there is nothing left to do."""
        manifest = None if self.stage.always_run else entry.manifest
        if manifest is not None:
            # The tar's digest is the last word: between a look at the files and packing them somebody may write.
            if (damage := entry.damage(manifest)) is None and pack(entry.outputs, self.output) != manifest.digest:
                damage = "packed, it has another SHA-256"
            if damage is None:
                return self._end("cached", manifest.digest, key)
            self.progress.note(f"the result in {entry.folder} is damaged ({damage}); computing it again")
            entry.clear(partial=True)
        # A stage can stand twice in a pipeline. Its failure is not tried again in the same run, only in a new one.
        # A disk that was full may have room.
        failure = read_kept(entry.outputs / STATUS_FILE, _read_failure, self.progress.note)
        if failure and failure["run_id"] == self.run_id and failure["kind"] != NoRoomError.__name__:
            if self.target is None:  # Kubeflow tries a task again that failed
                raise StageError(failure["error"])
            return self._end("failed", pack(entry.outputs, self.output), key, failure["error"])
        return None

    def _require_a_target(self) -> None:
        """Do nothing for all targets when each of them is lost, for example because nothing can keep its limits.

        Raises:
            StageError: Every target of the run has failed.
        """
        if self.target is not None:
            return
        lost, folder = [], self.store.run_folder(self.run_id)
        for label in target_labels(self.config):
            records = (read_record(folder, stage, label) for stage in STAGES)
            failed = next((record.stage for record in records if record and record.status == "failed"), None)
            if failed is None:
                return
            lost.append(f"{label} in {failed}")
        raise StageError(f"not run, because every target has failed already: {', '.join(lost)}")

    def _compute(self, entry: Entry, key: str, settings: S, digests: Mapping[str, str]) -> Outcome:
        print(f"settings: {json.dumps(settings.plain(), sort_keys=True)}", flush=True)
        self._patiently(lambda: self.store.record(self.run_id, begun_file(self.stage.name, self.target), self._begun()))
        self._patiently(lambda: self._try(entry, settings))
        digest = pack(entry.outputs, self.output)
        own, child = _peak_rss_mib()
        manifest = Manifest(
            stage=self.stage.name,
            version=self.stage.version,
            key=key,
            settings=settings.plain(),
            inputs=digests,
            outputs={name: file_sha256(path) for name, path in tree_files(entry.outputs).items()},
            digest=digest,
            seconds=time.monotonic() - self.start,
            tools=_tools(),
            seed=getattr(settings, "seed", None),
            peak_rss_mib=own,
            peak_rss_child_mib=child,
        )
        if self._patiently(lambda: entry.commit(manifest)).digest != digest:
            self.progress.note("another machine was faster with the same result, which is used")
            digest = pack(entry.outputs, self.output)
        return self._end("done", digest, key)

    def _try(self, entry: Entry, settings: S) -> None:
        entry.clear(partial=False)
        for folder in (entry.outputs, entry.partial, entry.scratch):
            folder.mkdir(parents=True, exist_ok=True)
        _tame_ultralytics(entry.scratch)
        folders = {}
        for name, path in self.inputs.items():
            folders[name] = entry.scratch / name
            extract(path, folders[name])
        host = HostLock(note=self.progress.note)
        ctx = StageContext(
            settings, folders, entry.outputs, entry.partial, self.progress, host, self.store, self.spared
        )
        if not self.stage.watched:
            self.stage.run(ctx)
            return
        from yolov8_nas.device import usage

        with usage.recorded(ctx.out, ctx.partial):
            self.stage.run(ctx)

    def _begun(self) -> dict[str, Any]:
        """What a stage leaves that is ended from outside, and so can say nothing."""
        return {"begun": self.stage.name, "target": self.target, "at": round(time.time(), 3)}

    def _pass_on(self, name: str, failure: Mapping[str, Any]) -> Outcome:
        with tempfile.TemporaryDirectory() as folder:
            write_json(Path(folder) / STATUS_FILE, failure)
            digest = pack(Path(folder), self.output)
        return self._end("failed", digest, "", f"not run, because {failure.get('stage', name)} failed")

    def _failed(self, error: Exception, key: str, entry: Entry | None) -> Outcome:
        error = no_room(error, entry.folder if entry else None) or error
        deterministic = isinstance(error, InputError | StageError)
        if not deterministic and type(error) is not ConnectionError:  # whose message is a line of ours
            print(told("".join(traceback.format_exception(error))), file=sys.stderr, flush=True)
        failure = {
            "status": "failed",
            "stage": self.stage.name,
            "target": self.target,
            "kind": type(error).__name__,
            "error": str(error) if deterministic else _unexpected(error),
            "run_id": self.run_id,
        }
        try:
            with contextlib.ExitStack() as stack:
                # Beside the status travels what the stage had written: the table of what was tried, the fit's figures.
                folder = entry.outputs if entry else Path(stack.enter_context(tempfile.TemporaryDirectory()))
                if entry and isinstance(error, NoRoomError):
                    # But not where there is no room: what was half written makes room for the word that it was.
                    shutil.rmtree(folder, ignore_errors=True)
                    shutil.rmtree(entry.scratch, ignore_errors=True)
                write_json(folder / STATUS_FILE, failure)
                digest = pack(folder, self.output)
            if entry:
                # Going on from checkpoints after a deterministic failure could only fail again: a new run begins anew.
                entry.fail(partial=deterministic and not isinstance(error, WaitingError))
            outcome = self._end("failed", digest, key, failure["error"])
        except NoRoomError as full:  # not even for that
            print(f"{error if isinstance(error, NoRoomError) else full}", file=sys.stderr, flush=True)
            raise (error if isinstance(error, NoRoomError) else full) from None
        if self.target is None:
            raise error
        return outcome

    def _end(self, status: Status, digest: str, key: str, error: str | None = None) -> Outcome:
        seconds = time.monotonic() - self.start
        self.progress.finished(status, seconds, error)
        own, child = _peak_rss_mib()
        record = StageRecord(
            stage=self.stage.name,
            target=self.target,
            key=key,
            status=status,
            seconds=round(seconds, 3),
            seconds_spared=round(sum(self.spared.values()), 3),
            error=error,
            peak_rss_mib=own,
            peak_rss_child_mib=child,
            ended=round(time.time(), 3),
            digest=digest,
            settings=self.settings,
        )
        name = record_file(self.stage.name, self.target)
        # Where a stage stands twice in a pipeline, the record is that of the call that did the work.
        if status != "cached" or not (self.store.run_folder(self.run_id) / name).exists():
            self._patiently(lambda: self.store.record(self.run_id, name, record.plain()))
        return Outcome(status, digest, key, seconds, error)


def require_gpus(promised: int) -> None:
    """Check that this process has the GPUs that it was promised.

    In a cluster a GPU can be missing without a word, and the work would go on a hundred times slower, or measure a CPU.

    Raises:
        WaitingError: It has fewer. What the stage has done so far is kept.
    """
    if promised < 1:
        return
    import torch  # here, so that a stage that has nothing to do starts in a blink

    found = torch.cuda.device_count()
    if found < promised:
        from yolov8_nas.device.gpu import get_gpu_info

        raise WaitingError(
            f"{promised} GPU{'s' * (promised > 1)} promised, {found} here ({get_gpu_info()}): see that the pod's "
            "limits name nvidia.com/gpu, its node has the NVIDIA device plugin and container runtime, and the image "
            "does not hide them (NVIDIA_VISIBLE_DEVICES, CUDA_VISIBLE_DEVICES); then start the run again"
        )


def die_with_parent() -> None:
    """Let this process and its children end with the process that `YOLOV8_NAS_PARENT` names, however that one ends.

    A signal on the parent's death (prctl) would not do: between the two stands a shell, started from a thread.
    """
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None:
        return
    try:
        handle = os.pidfd_open(int(parent))
    except ProcessLookupError:
        os._exit(1)

    def watch() -> None:
        select.select([handle], [], [])
        import psutil  # here, so that a stage that has nothing to do starts in a blink

        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="die-with-parent", daemon=True).start()


@contextlib.contextmanager
def _log_file(stage: str, target: str | None) -> Iterator[None]:
    """Send everything this process writes to the stage's log file, where `YOLOV8_NAS_LOGS` asks for it."""
    folder = os.environ.get(LOGS_VARIABLE)
    if folder is None:
        yield
        return
    path = Path(folder) / (f"{target}.{stage}.log" if target else f"{stage}.log")
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    try:
        # File descriptors, not sys.stdout: libraries in C++ and child processes write there too.
        with path.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, number)
            os.close(copy)


def _arrived(name: str, path: Path, expected: str | None) -> str:
    """The digest of an input that came as it was sent."""
    digest = file_sha256(path)
    if expected is not None and digest != expected:
        raise ConnectionError(f"{path}: the result of {name} arrived with SHA-256 {digest}, sent was {expected}")
    return digest


def _read_failure(file: Path) -> dict[str, str]:
    """What a stage said of its failure; of a key that is not done, whoever may write to the store may have written it.

    Raises:
        InputError: It is of another form.
    """
    content = read_json(file)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), str) for key in _FAILURE):
        raise InputError("not what a stage says of its failure")
    return content


def _read_status(path: Path) -> dict[str, Any] | None:
    """The failure that an input carries, if it is one."""
    with tarfile.open(path, "r:") as tar:
        try:
            member = tar.extractfile(STATUS_FILE)
        except KeyError:
            return None
        status = parse_json(member.read(), STATUS_FILE) if member else None
        if not isinstance(status, dict):
            raise InputError(f"{path}: its {STATUS_FILE} is none; run the stage before it again")
        return status


def _is_transient(error: Exception) -> bool:
    """Whether trying again can help: the network, a server's 5xx."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if any(base.__name__ in ("ConnectionError", "Timeout", "EndpointConnectionError") for base in type(error).__mro__):
        return True  # of requests and botocore, which need not be imported to be told
    status = getattr(error, "get_http_status_code", None)  # of MlflowException
    return callable(status) and status() >= 500


def _unexpected(error: Exception) -> str:
    if isinstance(error, OSError) and (of_a_path := paths.told(error)) is not None:
        return str(of_a_path)
    return told(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def _tame_ultralytics(folder: Path) -> None:
    """Give this process Ultralytics settings of its own: no integrations, no telemetry, no installing."""
    os.environ.update(quiet.ultralytics(folder))


def _peak_rss_mib() -> tuple[float, float]:
    """Peak resident memory of this process and of its largest child, in MiB."""
    # Not ru_maxrss for the process itself: it is inherited from whatever process started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    own = next((float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)
    return round(own, 1), round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, 1)


def _tools() -> dict[str, str]:
    tools = {"python": platform.python_version()}
    for name in _TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            tools[name] = importlib.metadata.version(name)
    return tools
