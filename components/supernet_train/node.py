"""supernet-train on several nodes that have no disk in common, because the stage store is in S3.

    python -m components.supernet_train.node STORE KEY

is what each node of the TrainJob runs, with torchrun in it. It brings the dataset to its own disk. The training has an
entry of its own in the store, `supernet-nodes/<key>`, since the step holds that of the stage: node 0 goes on from its
checkpoints, saves new ones, and leaves the result there, which the step takes over.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from yolov8_nas import quiet
from yolov8_nas.errors import StageError
from yolov8_nas.files import canonical_digest, file_sha256, read_json, tree_files, write_json
from yolov8_nas.runner.stage import PARENT_VARIABLE, StageContext, open_store, read_record
from yolov8_nas.stages.supernet_train import STAGE
from yolov8_nas.stages.supernet_train.run import Failure
from yolov8_nas.stages.supernet_train.settings import KEPT, SupernetSettings
from yolov8_nas.store.remote import RemoteEntry
from yolov8_nas.store.store import Entry, Manifest, Store

ENTRIES: Final = "supernet-nodes"
REQUEST: Final = "request.json"
ULTRALYTICS: Final = "Ultralytics/settings.json"
RANK_VARIABLE: Final = "PET_NODE_RANK"
"""Environment variable with the number of the node, from Kubeflow Trainer."""


def carry_out(ctx: StageContext[SupernetSettings], run_id: str, on_nodes: Callable[[Sequence[str]], int]) -> int:
    """Do the step's part: tell the nodes what to do, and take the result over.

    Args:
        ctx: The stage's context.
        run_id: Name of the run, whose records say where the dataset is.
        on_nodes: Runs a command on each node.

    Returns:
        0 where the training has ended well; else a reason may lie in `ctx.partial`, as from processes of this machine.

    Raises:
        ConnectionError: The result did not arrive as it was sent.
    """
    assert ctx.store is not None
    store, key = ctx.store, ctx.partial.parent.name
    done = _finished(store, key)
    if done is None:
        job = f"{ENTRIES}/{key}/job"
        (store.root / job).mkdir(parents=True, exist_ok=True)
        store.remove(job)  # what a step that was killed has left
        prepared = read_record(store.run_folder(run_id), "data-prep", None)
        assert prepared is not None, "the step before this one has recorded it"
        request = {
            "settings": ctx.settings.plain(),
            "dataset": prepared.key,
            "ultralytics": read_json(Path(os.environ["YOLO_CONFIG_DIR"]) / ULTRALYTICS),
        }
        write_json(store.root / job / REQUEST, request)
        store.lay(job, REQUEST)
        status = on_nodes([sys.executable, "-m", "components.supernet_train.node", store.address, key])
        store.bring(job)
        if (failure := store.root / job / Failure.FILE).is_file():
            shutil.copyfile(failure, ctx.partial / Failure.FILE)
            store.entry(ENTRIES, key).clear(partial=True)  # from its checkpoints it could only fail again
        store.remove(job)
        if status:
            return status
        done = store.result(ENTRIES, key)
    if fault := done.damage(done.manifest) if done.manifest else "there is no manifest":
        raise ConnectionError(f"{store.address}/{ENTRIES}/{key}: the nodes' result is not whole: {fault}")
    shutil.copytree(done.outputs, ctx.out, dirs_exist_ok=True)
    return 0


def _finished(store: Store, key: str) -> Entry | None:
    """The result of nodes that have ended well, if there is one that is whole."""
    try:
        done = store.result(ENTRIES, key)
    except StageError as damaged:
        print(f"{damaged}; training it again", flush=True)
        return None
    return done if done.manifest else None


def main(address: str, key: str) -> int:
    """Be a node of a training that `carry_out` has begun.

    Args:
        address: The stage store.
        key: Key of the stage's result.

    Returns:
        torchrun's exit status.
    """
    store = open_store(address)
    entry = store.entry(ENTRIES, key)
    assert isinstance(entry, RemoteEntry)
    folder = f"{ENTRIES}/{key}/job"
    store.bring(folder)
    job = store.root / folder
    request = read_json(job / REQUEST)
    settings = SupernetSettings.model_validate(request["settings"])
    os.environ.update(quiet.ultralytics(entry.scratch))
    inputs = {"data-prep": str(store.result("data-prep", request["dataset"]).outputs)}
    if (weights := settings.weights) and weights.kept:
        here = weights.model_copy(update={"path": str(store.result(KEPT, weights.sha256).outputs)})
        settings = settings.model_copy(update={"weights": here})

    first = os.environ[RANK_VARIABLE] == "0"
    with sigterm_as_exit(), entry.lock(_waits) if first else contextlib.nullcontext():
        if not first:
            entry.bring_partial()
        elif (manifest := entry.manifest) is not None and entry.damage(manifest) is None:
            return 0
        else:
            entry.clear(partial=False)
        for place in (entry.outputs, entry.partial):
            place.mkdir(parents=True, exist_ok=True)
        write_json(entry.scratch / ULTRALYTICS, request["ultralytics"])
        start = time.monotonic()
        failure = entry.partial / Failure.FILE
        failure.unlink(missing_ok=True)
        folders = {"out": str(entry.outputs), "partial": str(entry.partial)}
        write_json(entry.folder / REQUEST, {"settings": settings.plain(), "inputs": inputs, **folders})
        status = _torchrun(entry.folder / REQUEST)
        if failure.is_file():
            shutil.copyfile(failure, job / Failure.FILE)
            store.lay(folder, Failure.FILE)
        if first and status == 0:
            outputs = {name: file_sha256(path) for name, path in tree_files(entry.outputs).items()}
            entry.commit(
                Manifest(
                    stage=ENTRIES,
                    version=STAGE.version,
                    key=key,
                    settings=settings.plain(),
                    inputs={"data-prep": request["dataset"]},
                    outputs=outputs,
                    digest=canonical_digest(outputs),
                    seconds=time.monotonic() - start,
                    seed=settings.seed,
                )
            )
    return status


def _torchrun(request: Path) -> int:
    command = [sys.executable, "-m", "torch.distributed.run", "-m", "yolov8_nas.stages.supernet_train", str(request)]
    with subprocess.Popen(command, env={**os.environ, PARENT_VARIABLE: str(os.getpid())}) as process:
        try:
            return process.wait()
        finally:
            process.terminate()  # without effect where it has ended


def _waits() -> None:
    print("another node still holds the training; waiting for it to end", flush=True)


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM end this process as an exception does, so that it tidies up; its default action does not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
