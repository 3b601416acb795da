"""Run the pipeline on this machine: `python -m pipelines.local ARGUMENTS.json`.

The same components and the same pipeline as in a cluster, through `kfp.local`, in a process of its own: kfp.local
redirects `print` and the root logger of the process that it runs in.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from kfp import local
from kfp.local import subprocess_task_handler
from kfp.pipeline_spec.pipeline_spec_pb2 import ComponentSpec, PipelineSpec

from pipelines.pipeline import PROBES, VERDICT, yolov8_nas
from yolov8_nas.runner.stage import die_with_parent


def run_locally(arguments: dict[str, Any], pipeline_root: Path) -> None:
    """Run the pipeline in subprocesses of this environment.

    Args:
        arguments: Arguments of the pipeline.
        pipeline_root: Folder for artifacts on their way; removed at the end, since the store keeps what matters.

    Raises:
        RuntimeError: A task failed; kfp.local's message names it.
    """
    subprocess_task_handler.replace_python_executable = with_this_interpreter
    one_at_a_time(yolov8_nas.pipeline_spec)
    without_verdict(yolov8_nas.pipeline_spec)
    without_pods(yolov8_nas.pipeline_spec)
    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=str(pipeline_root),
        workspace_root=str(pipeline_root / "workspace"),
    )
    try:
        yolov8_nas(**arguments, training_gpus="0")
    finally:
        shutil.rmtree(pipeline_root, ignore_errors=True)


def one_at_a_time(spec: PipelineSpec) -> None:
    """Take the concurrency out of a compiled pipeline, because one machine cannot measure and compute at once.

    Targets follow each other, the probes wait for the dataset, and the training for the probes: what fails soonest
    comes first.
    """
    components: list[ComponentSpec] = [spec.root, *spec.components.values()]
    for component in components:
        tasks = component.dag.tasks
        for name in tasks:
            if tasks[name].WhichOneof("iterator"):
                tasks[name].iterator_policy.parallelism_limit = 1
            if tasks[name].task_info.name == PROBES:
                tasks[name].dependent_tasks.append("data-prep")
                tasks["supernet-train"].dependent_tasks.append(name)


def with_this_interpreter(command: list[str], interpreter: str) -> list[str]:
    """A step's command with this interpreter for its `python3`, and its arguments as they are.

    kfp.local 2.17 puts the interpreter's path in place of the word wherever it stands, also in paths and names that the
    step is given; it has no setting for that. This function takes the place of its own, in this process alone.

    Args:
        command: The shell, its option, the program for it, the step's source, and then the arguments.
        interpreter: Path of the interpreter.
    """
    program = next(i for i, part in enumerate(command) if '"$0"' in part or '"$@"' in part)
    return [part.replace("python3", interpreter) if i <= program else part for i, part in enumerate(command)]


def without_verdict(spec: PipelineSpec) -> None:
    """Take the step out of a compiled pipeline that fails where no target has a model: here the summary is read."""
    for component in spec.components.values():
        for name in [name for name, task in component.dag.tasks.items() if task.task_info.name == VERDICT]:
            del component.dag.tasks[name]


def without_pods(spec: PipelineSpec) -> None:
    """Take out of a compiled pipeline what only a cluster can heed, and kfp.local would warn of at each step.

    Nothing is tried again either: a stage does that by itself, and what still fails here fails again. The image is not
    used, but one without "python" in its name is warned of.
    """
    for component in [spec.root, *spec.components.values()]:
        for name, task in component.dag.tasks.items():
            task.task_info.name = name
            task.ClearField("retry_policy")
    for executor in spec.deployment_spec["executors"].values():
        executor["container"].fields.pop("resources", None)
        executor["container"]["image"] = "python"


if __name__ == "__main__":
    die_with_parent()
    request = json.loads(Path(sys.argv[1]).read_text())
    run_locally(request["arguments"], Path(request["pipeline_root"]))
