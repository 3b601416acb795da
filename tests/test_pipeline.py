"""The pipeline as compiled, and as it runs on one machine."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from fabricated import write_outputs

from components.close_run.component import close_run
from components.data_prep.component import data_prep
from components.hw_probe.component import hw_probe
from components.open_run.component import open_run
from components.promote.component import promote
from components.qat_finetune.component import qat_finetune
from components.register.component import register
from components.search.component import search
from components.supernet_train.component import supernet_train
from components.trt_export.component import trt_export
from pipelines.compile import compile_pipeline
from pipelines.local import one_at_a_time
from pipelines.pipeline import yolov8_nas
from yolov8_nas.config import RunConfig
from yolov8_nas.errors import StageError
from yolov8_nas.lifecycle import CONFIG_FILE
from yolov8_nas.lifecycle import close_run as end_run
from yolov8_nas.stages.stage import STAGES, Stage, StageContext, open_store, run_stage, target_labels
from yolov8_nas.store import write_json

ROOT = Path(__file__).parents[1]
COMPONENTS = (
    open_run,
    data_prep,
    supernet_train,
    hw_probe,
    search,
    qat_finetune,
    trt_export,
    register,
    promote,
    close_run,
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("pipeline") / "pipeline.yaml"
    compile_pipeline(file)
    content: dict[str, Any] = next(yaml.safe_load_all(file.read_text()))
    return content


def test_every_stage_is_a_component_of_the_pipeline(compiled: dict[str, Any]) -> None:
    names = {re.sub(r"^exec-|-2$", "", name) for name in compiled["deploymentSpec"]["executors"]}
    assert names == {*STAGES, "open-run", "promote", "close-run"}


def test_kubeflow_caches_nothing(compiled: dict[str, Any]) -> None:
    for component in [compiled["root"], *compiled["components"].values()]:
        for task in component.get("dag", {}).get("tasks", {}).values():
            assert not task.get("cachingOptions", {}).get("enableCache"), task["taskInfo"]["name"]


def test_nothing_is_installed_at_run_time(compiled: dict[str, Any]) -> None:
    for executor in compiled["deploymentSpec"]["executors"].values():
        assert "pip install" not in json.dumps(executor)


def test_no_output_parameter_enters_a_loop(compiled: dict[str, Any]) -> None:
    """kfp.local 2.17 puts the loop's item in its place without a word."""
    for component in compiled["components"].values():
        for task in component.get("dag", {}).get("tasks", {}).values():
            if "parameterIterator" in task:
                assert "taskOutputParameter" not in json.dumps(task["inputs"]["parameters"])


def test_on_one_machine_targets_follow_each_other_and_training_waits_for_the_probes() -> None:
    spec = type(yolov8_nas.pipeline_spec)()
    spec.CopyFrom(yolov8_nas.pipeline_spec)
    one_at_a_time(spec)
    loops = [
        (name, task, component.dag.tasks)
        for component in spec.components.values()
        for name, task in component.dag.tasks.items()
        if task.WhichOneof("iterator")
    ]
    assert [task.iterator_policy.parallelism_limit for _, task, _ in loops] == [1, 1]
    probes = next(name for name, task, _ in loops if task.task_info.name == "probes")
    assert probes in loops[0][2]["supernet-train"].dependent_tasks


def test_a_target_that_fails_does_not_stop_the_other(tmp_path: Path) -> None:
    """What the stages do is played here, and what goes on between them is real."""
    limits = {"precision": "best", "constraints": ["latency<=80%stock"]}
    targets = [{"hardware": "cpu-1t", **limits}, {"hardware": "cpu-2t", **limits}]
    config = RunConfig.parse({"space": "tiny", "imgsz": 64, "targets": targets}, "test")
    made = {**write_outputs(tmp_path / "made"), "register": tmp_path / "made" / "register"}
    write_json(made["register"] / "registry.json", {"model": "weld-seams", "version": 3, "aliases": []})
    labels = lost, kept = target_labels(config)
    tars: dict[tuple[str, str | None], Path] = {}

    def play(name: str, label: str | None) -> None:
        def body(ctx: StageContext) -> None:
            if (name, label) == ("hw-probe", lost):
                raise StageError("nothing keeps the limit")
            shutil.copytree(made[name], ctx.out, dirs_exist_ok=True)

        tars[name, label] = tmp_path / f"{label}.{name}.tar"
        run_stage(
            Stage(name, 1, lambda config, target: {"hardware": target and target.hardware}, body),
            config=config,
            target=label,
            inputs={stage: tar for (stage, of), tar in tars.items() if stage != name and of in (None, label)},
            output=tars[name, label],
            store=tmp_path / "store",
            run_id="run",
        )

    play("data-prep", None)
    for label in labels:
        play("hw-probe", label)
    play("supernet-train", None)  # one target is left to train it for
    for label in labels:
        for stage in ("search", "qat-finetune", "trt-export", "register"):
            play(stage, label)
    open_store(str(tmp_path / "store")).record("run", CONFIG_FILE, config.model_dump(mode="json"))  # as open-run does
    summary = end_run(
        store=str(tmp_path / "store"),
        run_id="run",
        workdir=tmp_path / "work",
        summary_file=tmp_path / "summary.json",
        report_file=tmp_path / "report.html",
        pipeline_error=None,
    )
    assert summary["run"]["status"] == "failed"
    first, second = summary["targets"]
    assert (first["status"], first["error"]) == ("failed", "hw-probe: nothing keeps the limit")
    assert first["model"] is None and first["registry"] is None
    assert (second["status"], second["error"], second["registry"]["version"]) == ("met", None, 3)
    assert all((tmp_path / "work" / file).is_file() for file in second["model"]["files"].values())
    passed_on = [row["error"] for row in summary["stages"] if row["target"] == lost][1:]
    assert passed_on == ["not run, because hw-probe failed"] * 4
    assert {row["status"] for row in summary["stages"] if row["target"] in (None, kept)} == {"done"}
    report = (tmp_path / "report.html").read_text()
    assert "hw-probe: nothing keeps the limit" in report and "weld-seams, version 3" in report


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.name)
def test_readmes_match_the_components(component: Any) -> None:
    text = (ROOT / "components" / component.name.replace("-", "_") / "README.md").read_text()
    sections = text.split("## ")
    spec = component.component_spec
    for title, things in (("Inputs", spec.inputs), ("Outputs", spec.outputs)):
        section = next(section for section in sections if section.startswith(title))
        assert re.findall(r"^\| `(\w+)`", section, re.MULTILINE) == list(things or {}), title
    assert any(section.startswith("Resources") for section in sections)


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda file: file.stem)
def test_examples_are_run_configurations(file: Path) -> None:
    assert RunConfig.load(file).targets
