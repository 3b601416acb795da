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
from kfp import dsl
from kfp import local as kfp_local
from kfp.local import subprocess_task_handler
from plain_settings import Plain

from components.build_ahead.component import build_ahead
from components.close_run.component import close_run
from components.data_prep.component import data_prep
from components.hw_probe.component import hw_probe
from components.look_up.component import look_up
from components.open_run.component import open_run
from components.promote.component import promote
from components.qat_finetune.component import qat_finetune
from components.register.component import register
from components.search.component import search
from components.supernet_train.component import supernet_train
from components.trt_export.component import trt_export
from components.verdict.component import verdict
from pipelines.compile import compile_pipeline
from pipelines.local import one_at_a_time, with_this_interpreter
from pipelines.pipeline import yolov8_nas
from yolov8_nas.config import RunConfig
from yolov8_nas.errors import InputError, NoRoomError, StageError
from yolov8_nas.files import append_line
from yolov8_nas.report.step import tell_run
from yolov8_nas.run.lifecycle import CONFIG_FILE, telling
from yolov8_nas.run.lifecycle import close_run as end_run
from yolov8_nas.run.lifecycle import verdict as say
from yolov8_nas.run.local import _last_words
from yolov8_nas.run.summary import summarise
from yolov8_nas.runner.results import RegisterResult
from yolov8_nas.runner.results.summary import Summary
from yolov8_nas.runner.settings import StageSettings
from yolov8_nas.runner.stage import STAGES, Stage, StageContext, open_store, run_stage, target_labels

ROOT = Path(__file__).parents[1]
COMPONENTS = (
    open_run,
    data_prep,
    supernet_train,
    hw_probe,
    look_up,
    search,
    qat_finetune,
    build_ahead,
    trt_export,
    register,
    promote,
    close_run,
    verdict,
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("pipeline") / "pipeline.yaml"
    compile_pipeline(file)
    content: dict[str, Any] = next(yaml.safe_load_all(file.read_text()))
    return content


def test_every_stage_is_a_component_of_the_pipeline(compiled: dict[str, Any]) -> None:
    names = {name.removeprefix("exec-") for name in compiled["deploymentSpec"]["executors"]}
    assert names == {*STAGES, "open-run", "look-up", "build-ahead", "promote", "close-run", "verdict"}


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


def test_the_step_that_may_fail_comes_before_the_report_and_hands_nothing_on(compiled: dict[str, Any]) -> None:
    """Kubeflow uploads nothing of a failed step, and Argo forgets a failure where a task comes after an exit task."""
    assert set(compiled["root"]["dag"]["tasks"]) == {"close-run", "exit-handler-1"}
    assert compiled["root"]["dag"]["tasks"]["close-run"]["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    group = compiled["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert group["verdict"]["dependentTasks"] == ["if-anything-is-new"]
    assert "outputDefinitions" not in compiled["components"]["comp-verdict"]
    source = compiled["deploymentSpec"]["executors"]["exec-close-run"]["container"]["command"][-1]
    assert "SystemExit" not in source


def test_arguments_of_a_step_are_not_rewritten() -> None:
    """kfp.local 2.17 writes the interpreter's path wherever python3 stands."""
    container = yolov8_nas.pipeline_spec.deployment_spec["executors"]["exec-data-prep"]["container"]
    command = [*container["command"], "--executor_input", '{"store": "/opt/python3/store"}', "--x", "python3"]
    given = with_this_interpreter(command, "/venv/bin/python")
    assert "/venv/bin/python -m kfp.dsl.executor_main" in given[2] and "python3" not in given[2]
    assert given[3:] == command[3:]
    with pytest.MonkeyPatch.context() as changed:  # where kfp looks for it
        changed.setattr(subprocess_task_handler, "replace_python_executable", with_this_interpreter)
        ran: list[list[str]] = []
        changed.setattr(
            subprocess_task_handler,
            "run_local_subprocess",
            lambda full_command, env_vars: ran.append(full_command) or 0,
        )
        runner = kfp_local.SubprocessRunner(use_venv=False)
        subprocess_task_handler.SubprocessTaskHandler("python", command, "root", runner).run()
    assert ran[0][3:] == command[3:]


def test_engines_are_built_on_a_cpu_node_before_the_device_is_asked(compiled: dict[str, Any]) -> None:
    tasks = compiled["components"]["comp-target-branch"]["dag"]["tasks"]
    assert "build-ahead" in tasks["trt-export"]["dependentTasks"]
    for stage in ("look-up", "qat-finetune"):
        assert stage in tasks["build-ahead"]["dependentTasks"]
    resources = {name: compiled["deploymentSpec"]["executors"][f"exec-{name}"]["container"]["resources"]
                 for name in ("build-ahead", "trt-export")}  # fmt: skip
    assert "accelerator" in resources["trt-export"] and "accelerator" not in resources["build-ahead"]


def test_where_a_runtime_needs_the_device_nothing_is_built_ahead(tmp_path: Path) -> None:
    config = RunConfig.parse({"targets": [{"hardware": "cpu-1t", "constraints": ["latency<=9ms"]}]}, "test")
    outputs = {name: dsl.Artifact(uri=str(tmp_path / name)) for name in ("built", "metrics", "report")}
    nothing = dsl.Artifact(uri=str(tmp_path / "nothing"))
    build_ahead.python_func(
        config=config.to_json(), target=target_labels(config)[0], store=str(tmp_path / "store"), run_id="run",
        probe=nothing, tuned=nothing, **outputs,
    )  # fmt: skip
    assert (tmp_path / "report").read_text() == "Nothing is built ahead of time for runtime onnxruntime.\n"
    assert not (tmp_path / "store").exists()


def test_on_one_machine_targets_follow_each_other_and_training_waits_for_the_probes() -> None:
    spec = type(yolov8_nas.pipeline_spec)()
    spec.CopyFrom(yolov8_nas.pipeline_spec)
    one_at_a_time(spec)
    tasks = [task for component in spec.components.values() for task in component.dag.tasks.values()]
    loops = [task for task in tasks if task.WhichOneof("iterator")]
    assert [task.iterator_policy.parallelism_limit for task in loops] == [1, 1]
    order = spec.components["comp-all-targets"].dag.tasks
    assert "data-prep" in order["probe-all-targets"].dependent_tasks
    assert "probe-all-targets" in order["supernet-train"].dependent_tasks


def test_a_target_that_fails_does_not_stop_the_other(tmp_path: Path) -> None:
    """What the stages do is played here, and what goes on between them is real."""
    limits = {"precision": "best", "constraints": ["latency<=80%stock"]}
    targets = [{"hardware": "cpu-1t", **limits}, {"hardware": "cpu-2t", **limits}]
    config = RunConfig.parse({"space": "tiny", "imgsz": 64, "targets": targets}, "test")
    made = {**write_outputs(tmp_path / "made"), "register": tmp_path / "made" / "register"}
    made["register"].mkdir()
    RegisterResult(model="weld-seams", tracking_uri="", reason="", version=3, aliases=()).write(made["register"])
    labels = lost, kept = target_labels(config)
    tars: dict[tuple[str, str | None], Path] = {}

    def play(name: str, label: str | None) -> None:
        def body(ctx: StageContext) -> None:
            if (name, label) == ("hw-probe", lost):
                raise StageError("nothing keeps the limit")
            shutil.copytree(made[name], ctx.out, dirs_exist_ok=True)

        tars[name, label] = tmp_path / f"{label}.{name}.tar"
        run_stage(
            Stage(name, 1, lambda config, target: Plain(hardware=target and target.hardware), body),
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
    )
    assert summary.run.status == "failed"
    first, second = summary.targets
    assert (first.status, first.error) == ("failed", "hw-probe: nothing keeps the limit")
    assert first.model is None and first.registry is None
    assert (second.status, second.error, second.registry.version) == ("met", None, 3)
    assert all((tmp_path / "work" / file).is_file() for file in second.model.files.values())
    passed_on = [row.error for row in summary.stages if row.target == lost][1:]
    assert passed_on == ["not run, because hw-probe failed"] * 4
    assert {row.status for row in summary.stages if row.target in (None, kept)} == {"done"}
    report = (tmp_path / "report.html").read_text()
    assert "hw-probe: nothing keeps the limit" in report and "weld-seams, version 3" in report


def _open(tmp_path: Path, labels: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    config = {"name": "x", "space": "tiny", "imgsz": 64, "targets": [{"constraints": ["latency<=9ms"]}], **changes}
    store = str(tmp_path / "store")
    arguments: dict[str, Any] = {"config": yaml.safe_dump(config), "store": store, "run_id": "run", "job_id": ""}
    nothing: dict[str, Any] = {"data": "", "targets": [], "constraints": [], "precision": "", "budget": 1.0}
    nothing |= {"target_pools": {}, "tolerations": [], "training_nodes": "1", "training_gpus": "0"}
    nothing |= {"training_cpu": "1", "training_memory": "1Gi", "training_labels": labels or {}}
    output = dsl.Artifact(uri=str(tmp_path / "run.json"))
    with pytest.raises(InputError):
        open_run.python_func(**arguments, **nothing, run=output)
    return end_run(
        store=store,
        run_id="run",
        workdir=tmp_path / "work",
        summary_file=tmp_path / "summary.json",
        report_file=tmp_path / "report.html",
    )


def test_why_a_run_could_not_be_opened_stands_where_people_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YOLOV8_NAS_LOGS", str(tmp_path / "logs"))
    summary = _open(tmp_path, tracking={"uri": "http://127.0.0.1:9"})
    assert summary.run.status == "failed"
    for told in (
        summary.run.error,
        summary.targets[0].error,
        (tmp_path / "report.html").read_text(),
        tell_run(summary).markdown,
        (tmp_path / "logs" / "failures.jsonl").read_text(),
    ):
        assert "open-run" in told and "http://127.0.0.1:9: no MLflow server answers there" in told
    with pytest.raises(StageError, match=r"no target has a model: auto-fp32: .*no MLflow server answers"):
        say(store=str(tmp_path / "store"), run_id="run")


def test_a_run_whose_configuration_is_none_has_a_report_that_says_so(tmp_path: Path) -> None:
    summary = _open(tmp_path, epoch=3)
    assert "open-run: config: unknown key epoch" in summary.run.error
    assert "unknown key epoch" in (tmp_path / "report.html").read_text()
    assert Summary.read(tmp_path) == summary
    assert "unknown key epoch" in tell_run(summary).markdown


def test_open_run_refuses_what_submit_refuses(tmp_path: Path) -> None:
    assert "more than one slash" in _open(tmp_path, labels={"a/b/c": "x"}).run.error
    assert "give an https:// address" in _open(tmp_path, data="http://server/data.tar").run.error


def test_a_reason_is_forgotten_when_a_later_try_goes_well(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with pytest.raises(NoRoomError), telling("open-run", store=str(tmp_path), run_id="run"):
        raise OSError(28, "No space left on device", str(tmp_path / "x"))
    file = store.run_folder("run") / "failure.all.open-run.json"
    assert "x: no room on the disk for what was to be written" in json.loads(file.read_text())["error"]
    with telling("open-run", store=str(tmp_path), run_id="run"):
        pass
    assert json.loads(file.read_text())["error"] is None


def test_a_stage_that_was_killed_is_named(tmp_path: Path) -> None:
    config = RunConfig.parse(
        {"space": "tiny", "targets": [{"hardware": "cpu-1t", "constraints": ["latency<=9ms"]}]}, ""
    )
    store = open_store(str(tmp_path / "store"))
    (label,) = target_labels(config)

    class Killed(BaseException):
        pass

    def die(ctx: StageContext) -> None:
        raise Killed

    stage = Stage("hw-probe", 1, lambda config, target: StageSettings(), die)
    tar = {"inputs": {}, "output": tmp_path / "out.tar", "store": tmp_path / "store", "run_id": "run"}
    with pytest.raises(Killed):
        run_stage(stage, config=config, target=label, **tar)
    summary = summarise(store, "run", tmp_path / "work", config)
    assert summary.run.status == "failed"
    assert f"hw-probe of {label}: ended from outside" in summary.run.error
    assert "hw-probe" in summary.targets[0].error and "out of memory" in summary.targets[0].error
    run_stage(
        Stage("hw-probe", 1, lambda config, target: StageSettings(), lambda ctx: None),
        config=config,
        target=label,
        **tar,
    )
    assert summarise(store, "run", tmp_path / "work", config).run.error is None


def test_a_pipeline_that_ends_without_a_summary_says_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "pipeline.log").write_text("Traceback\nModuleNotFoundError: no kfp\n\n")
    assert _last_words(tmp_path) == "ModuleNotFoundError: no kfp"
    append_line(tmp_path / "failures.jsonl", {"task": "open-run", "error": "the store is full"})
    assert _last_words(tmp_path) == "open-run: the store is full"


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
