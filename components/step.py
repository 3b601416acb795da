"""What every step around a stage does: run it, and show in Kubeflow what it came to."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NoReturn

from kfp import dsl

from yolov8_nas.advice import words
from yolov8_nas.config import RunConfig
from yolov8_nas.errors import StageError, told
from yolov8_nas.foreign import markdown
from yolov8_nas.reading import parse_json
from yolov8_nas.report.step import Told, tell
from yolov8_nas.run.lifecycle import IN_CLUSTER, tell_failure
from yolov8_nas.runner import guarded, process
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.stage import LOGS_VARIABLE, Outcome, Stage, StageContext, run_stage
from yolov8_nas.stages import find_stage

PROBE: Final = "hw-probe"
"""The stage after which a target is advised on."""


def opened(run: dsl.Artifact) -> dict[str, Any]:
    """What open-run found out, as it found it: the file lies where others may write, its digest in Kubeflow's database.

    Raises:
        StageError: It is another file than open-run wrote.
    """
    content = Path(run.path).read_bytes()
    if hashlib.sha256(content).hexdigest() != run.metadata.get("sha256"):
        raise StageError(
            f"{run.path}: what open-run wrote was changed on its way, and names the server that gets this machine's "
            "credentials, so it is not used; submit the run again"
        )
    found: dict[str, Any] = parse_json(content, run.path)
    return found


def run_step(
    stage: str | Stage[Any],
    *,
    config: str,
    target: str | None,
    store: str,
    run_id: str,
    output: dsl.Artifact,
    metrics: dsl.Metrics,
    report: dsl.Markdown,
    inputs: Mapping[str, dsl.Artifact] | None = None,
    parameters: Mapping[str, Any] | None = None,
    gpus: str = "0",
    found: str = "",
    run: Callable[[StageContext[Any]], None] | None = None,
) -> None:
    """Bring a stage to its end, as `run_stage` does, and write its figures and its report.

    Args:
        stage: Name of the stage, or one that is none of the seven.
        config: Run configuration as JSON.
        target: Label of the target, or nothing for a stage that serves all of them.
        store: The stage store.
        run_id: Name of the run.
        output: Gets the tar of the result, and its SHA-256 as metadata.
        metrics: Gets the figures.
        report: Gets a page on the result.
        inputs: Tars of earlier stages, by name.
        parameters: Further settings, which only earlier tasks know.
        gpus: GPUs that the step was promised.
        found: Key of the result, where the step has room to read it only.
        run: Carries the stage out instead of its own function, to the same result.
    """
    work = find_stage(stage) if isinstance(stage, str) else stage
    work = replace(work, run=run or work.run)

    def carry_out(it: Stage[Any]) -> Outcome:
        return run_stage(
            it,
            config=config,
            target=target,
            inputs={name: Path(artifact.path) for name, artifact in (inputs or {}).items()},
            digests={name: artifact.metadata["sha256"] for name, artifact in (inputs or {}).items()},
            parameters=parameters,
            output=Path(output.path),
            store=store,
            run_id=run_id,
            gpus=int(gpus),
            found=found,
        )

    try:
        outcome = carry_out(work) if target is None else _survived(work, carry_out)
    except Exception as error:
        raise tell_failure(error, work.name, store=store, run_id=run_id, target=target) from None
    output.metadata["sha256"] = outcome.digest
    _show(tell(work.name, target, outcome, Path(output.path)), metrics, report)
    if work.name == PROBE and target and outcome.status != "failed":
        _advise(target, report, config=config, store=store, run_id=run_id, key=outcome.key, may_measure=not found)


def _show(told: Told, metrics: dsl.Metrics, report: dsl.Markdown) -> None:
    for name, value in told.figures.items():
        metrics.log_metric(name, value)
    Path(report.path).write_text(told.markdown)


def _advise(target: str, report: dsl.Markdown, *, config: str, may_measure: bool, **asked: Any) -> None:
    """Add the advice on a target that was just probed to its step's page; it is told on the screen and recorded, too.

    A run does not fail for want of it. A step in a cluster that has room to read a result only gives none, and neither
    does a run whose configuration asks for none.

    Args:
        target: Label of the target.
        report: The page.
        config: Run configuration as JSON.
        may_measure: Whether there is room to measure what is not known.
        asked: What else `run.advising.advise_in_run` is told.
    """
    wanted = RunConfig.parse(parse_json(config, "run configuration"), "run configuration").advice
    if not wanted or (os.environ.get(IN_CLUSTER) and not may_measure):
        return
    folder = os.environ.get(LOGS_VARIABLE)
    try:
        with process.log_file("advice") as log:
            given = process.call(
                "yolov8_nas.run.advising:advise_in_run",
                log=Path(folder) / "advice.log" if folder else log,
                config=config,
                label=target,
                may_measure=may_measure,
                **asked,
            )
    except Exception as error:
        print(f"no advice on {target}: {told(error)}", flush=True)
        return
    lines = [*words.lines(given)]
    Progress.from_environment(PROBE, target).tell(lines)
    with Path(report.path).open("a") as page:
        page.write("\n## Advice\n\n" + "".join(f"- {markdown(line)}\n" for line in lines))


def _survived(stage: Stage[Any], carry_out: Callable[[Stage[Any]], Outcome]) -> Outcome:
    """Carry a target's stage out in a fork.

    Where that is killed or crashes, the target is lost and its step ends green, like one whose stage failed, so that
    other targets go on.
    """
    try:
        return guarded.call(lambda: carry_out(stage))
    except guarded.EndedError as ended:
        lost = ended

    def fail(ctx: StageContext[Any]) -> NoReturn:
        raise lost

    return carry_out(replace(stage, run=fail, watched=False))
