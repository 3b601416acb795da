"""The pipeline as a cluster gets it, and what its steps show."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fabricated
import pytest
import torch
import yaml
from google.protobuf import json_format
from kfp import compiler, dsl
from typer.testing import CliRunner

import components
from components.close_run.component import close_run
from components.placement import Training, branches, training
from components.verdict.component import verdict
from pipelines import plan
from pipelines.cli import app
from pipelines.compile import version_of
from pipelines.local import without_pods
from pipelines.pipeline import yolov8_nas
from yolov8_nas.config import RunConfig, lay_over
from yolov8_nas.errors import InputError, WaitingError
from yolov8_nas.files import read_json, write_json
from yolov8_nas.report.step import Told, tell, tell_run
from yolov8_nas.run import lifecycle
from yolov8_nas.runner.results import RegisterResult
from yolov8_nas.runner.results.summary import Summary
from yolov8_nas.runner.settings import StageSettings
from yolov8_nas.runner.stage import Outcome, Stage, require_gpus, run_stage
from yolov8_nas.space import SearchSpace
from yolov8_nas.store.archive import pack

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
NAMES = sorted(path.parent.name for path in Path(components.__path__[0]).glob("*/component.py"))

TARGETS: list[dict[str, Any]] = [
    {"hardware": "NVIDIA_T4", "runtime": "tensorrt", "precision": "int8", "constraints": ["latency<=2.5ms"]},
    {"hardware": "cpu-2t", "constraints": ["latency<=80%stock"]},
]
CONFIG = RunConfig.parse({"name": "two", "space": "tiny", "imgsz": 64, "targets": TARGETS}, "test")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    subprocess.run([sys.executable, GOLDEN / "renew.py", out], check=True, cwd=ROOT)
    return out.read_text()


@pytest.fixture(scope="module")
def compiled(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    spec, platform = yaml.safe_load_all(text)
    return spec, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def _steps(spec: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
    """Every task that is a pod: the pipeline around it, itself, and its executor."""
    for component in [spec["root"], *spec["components"].values()]:
        for task in component.get("dag", {}).get("tasks", {}).values():
            if label := spec["components"][task["componentRef"]["name"]].get("executorLabel"):
                yield component, task, label


def _outputs_in(content: Any, key: str) -> Iterator[dict[str, Any]]:
    """What stands under a key in nested content."""
    for name, value in content.items() if isinstance(content, dict) else enumerate(content):
        if name == key:
            yield value
        elif isinstance(value, dict | list):
            yield from _outputs_in(value, key)


def test_a_setting_that_a_task_cannot_have_is_named() -> None:
    def imported():  # kfp reads annotations
        dsl.importer("s3://bucket/data.tar", dsl.Dataset).set_cpu_limit("1")

    with pytest.raises(ValueError, match="set_cpu_limit can only be used on single-step components"):
        dsl.pipeline(name="imported")(imported)


def test_the_compiled_pipeline_is_the_golden_file(compiled: tuple[dict[str, Any], dict[str, Any]]) -> None:
    spec, platform = yaml.safe_load_all((GOLDEN / "yolov8-nas.yaml").read_text())  # the order in its comments is chance
    renewed = "see what changed: python tests/golden/renew.py, git diff"
    assert (spec, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]) == compiled, renewed


def test_a_version_is_named_by_content_not_by_order(tmp_path: Path) -> None:
    names = set()
    for number, written in enumerate(("a: 1\nb: 2\n", "# b, a\nb: 2\na: 1\n", "a: 1\nb: 3\n")):
        (tmp_path / f"{number}.yaml").write_text(written)
        names.add(version_of(tmp_path / f"{number}.yaml"))
    assert len(names) == 2


def test_on_one_machine_nothing_is_left_that_only_a_cluster_can_heed() -> None:
    spec = type(yolov8_nas.pipeline_spec)()
    spec.CopyFrom(yolov8_nas.pipeline_spec)
    without_pods(spec)
    assert "resources" not in json.dumps(json_format.MessageToDict(spec.deployment_spec))
    assert {executor["container"]["image"] for executor in spec.deployment_spec["executors"].values()} == {"python"}
    tasks = spec.components["comp-all-targets"].dag.tasks
    assert tasks["supernet-train"].task_info.name == "supernet-train"
    assert not tasks["supernet-train"].HasField("retry_policy")


def test_every_image_is_named_by_digest(compiled: tuple[dict[str, Any], dict[str, Any]]) -> None:
    images = {executor["container"]["image"] for executor in compiled[0]["deploymentSpec"]["executors"].values()}
    assert len(images) == 3
    assert all(re.fullmatch(r"[^@]+@sha256:[0-9a-f]{64}", image) for image in images)


def test_secrets_are_references(text: str, compiled: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for executor in compiled[0]["deploymentSpec"]["executors"].values():
        names = {row["name"] for row in executor["container"]["env"]}
        assert names == {"YOLOV8_NAS_HOST_LOCKS"}, "a value would stand in the pipeline for everybody to read"
    for pod in compiled[1].values():
        assert all(row["optional"] and row["secretName"] for row in pod["secretAsEnv"])
    text = text.replace("MLFLOW_TRACKING_PASSWORD", "")  # the name of a variable, and of a key in a secret
    assert not re.search(r"(?i)password|AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|token:|bearer", text)


def test_every_step_is_limited_and_confined(compiled: tuple[dict[str, Any], dict[str, Any]]) -> None:
    spec, pods = compiled
    names = set()
    for _, task, label in _steps(spec):
        resources, pod = spec["deploymentSpec"]["executors"][label]["container"]["resources"], pods[label]
        for key in ("resourceCpuRequest", "resourceCpuLimit", "resourceMemoryRequest", "resourceMemoryLimit"):
            assert resources[key], (label, key)
        assert int(pod["activeDeadlineSeconds"]) > 0
        assert pod["securityContext"] == {"runAsUser": "10001", "runAsGroup": "10001", "runAsNonRoot": True}
        volumes = {row["mountPath"]: row for row in pod["emptyDirMounts"]}
        assert volumes["/dev/shm"]["medium"] == "Memory" and set(volumes) == {"/dev/shm", "/tmp"}
        assert pod["pvcMount"][0]["mountPath"] == "/store"
        assert not task["cachingOptions"].get("enableCache")
        names.add(task["taskInfo"]["name"])
    assert all(" " in name for name in names), f"names that people read: {names}"


def test_gpus_go_to_training_and_target_steps_by_what_is_filled_in(
    compiled: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    spec, _ = compiled
    promised = {}
    for _, task, label in _steps(spec):
        accelerator = spec["deploymentSpec"]["executors"][label]["container"]["resources"].get("accelerator")
        told = task["inputs"]["parameters"].get("gpus", {})
        if accelerator is None:
            assert told == {} or label == "exec-look-up"
            continue
        output = told.get("taskOutputParameter", {})
        parameter = told.get("componentInputParameter") or f"{output['producerTask']}-{output['outputParameterKey']}"
        assert accelerator["resourceType"] == "nvidia.com/gpu"
        assert f"['pipelinechannel--{parameter}']" in accelerator["resourceCount"], (
            "what the step is told is what it gets"
        )
        promised[label.removeprefix("exec-")] = parameter
    assert promised == {
        "hw-probe": "target_gpus",
        "supernet-train": "data-prep-supernet_gpus",
        "search": "look-up-search_gpus",
        "qat-finetune": "look-up-tuning_gpus",
        "trt-export": "look-up-export_gpus",
        "promote": "target_gpus",
    }


def test_what_is_chosen_at_run_time_is_an_input_of_the_pipeline_around_the_step(
    compiled: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    """Or an output of a step beside it; kfp compiles references into loops that no backend can resolve."""
    spec, pods = compiled
    chosen = 0
    for around, task, label in _steps(spec):
        inputs = around.get("inputDefinitions", {}).get("parameters", {})
        for name in re.findall(r'"componentInputParameter": "([^"]+)"', json.dumps([pods[label], task["inputs"]])):
            assert name in inputs, (label, name)
            chosen += name.startswith(("target_", "training_", "supernet_"))
        for output in _outputs_in([pods[label], task["inputs"]], "taskOutputParameter"):
            beside = around["dag"]["tasks"][output["producerTask"]]
            outputs = spec["components"][beside["componentRef"]["name"]]["outputDefinitions"]["parameters"]
            assert output["outputParameterKey"] in outputs, (label, output)
            assert output["producerTask"] in task["dependentTasks"], (label, output)
        resources = json.dumps(spec["deploymentSpec"]["executors"][label]["container"]["resources"])
        for channel in re.findall(r"parameters\['([^']+)'\]", resources):
            assert channel in task["inputs"]["parameters"], (label, channel)
    assert chosen > 20


def test_no_two_steps_have_one_name(compiled: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """kfp mixes up their pods when it merges pipelines that have a step of one name."""
    labels = [label for _, _, label in _steps(compiled[0])]
    assert len(labels) == len(set(labels)) == len(compiled[1])


def test_the_name_of_the_run_is_filled_in_where_kubeflow_does_it(
    compiled: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    """As the default of a pipeline's parameter it would stay a placeholder."""
    spec, _ = compiled
    assert "{{$" not in json.dumps(spec["root"]["inputDefinitions"])
    filled = [
        task["inputs"]["parameters"]["job_id"]["runtimeValue"]["constant"]
        for _, task, _ in _steps(spec)
        if "job_id" in task["inputs"]["parameters"]
    ]
    assert filled == [dsl.PIPELINE_JOB_ID_PLACEHOLDER] * 3


def test_every_parameter_has_a_default_and_a_description(compiled: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for name, parameter in compiled[0]["root"]["inputDefinitions"]["parameters"].items():
        assert "defaultValue" in parameter and parameter["description"], name


@pytest.mark.parametrize("name", NAMES)
def test_every_component_compiles_alone(name: str, tmp_path: Path) -> None:
    component = getattr(__import__(f"components.{name}.component", fromlist=[name]), name)
    compiler.Compiler().compile(component, str(tmp_path / "component.yaml"))
    assert yaml.safe_load((tmp_path / "component.yaml").read_text())["root"]


def test_pods_wait_in_a_queue_where_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLOV8_NAS_QUEUE", "vision")
    code = "from pathlib import Path; from pipelines.compile import compile_pipeline; compile_pipeline(Path('x.yaml'))"
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=tmp_path, env={**_environment(), "YOLOV8_NAS_QUEUE": "vision"}
    )
    _, platform = yaml.safe_load_all((tmp_path / "x.yaml").read_text())
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    labels = {name: pod.get("podMetadata", {}).get("labels", {}) for name, pod in pods.items()}
    assert labels["exec-search"]["kueue.x-k8s.io/queue-name"] == "vision"
    assert labels["exec-supernet-train"]["kueue.x-k8s.io/priority-class"] == "yolov8-nas-training"
    assert labels["exec-open-run"] == {}


def test_pods_find_the_keys_of_signatures_in_a_secret(tmp_path: Path) -> None:
    code = "from pathlib import Path; from pipelines.compile import compile_pipeline; compile_pipeline(Path('x.yaml'))"
    environment = {**_environment(), "YOLOV8_NAS_SIGNING_SECRET": "our-keys"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    pipeline, platform = yaml.safe_load_all((tmp_path / "x.yaml").read_text())
    place = "/var/run/yolov8-nas/keys"
    for name, pod in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].items():
        volume = next(row for row in pod["secretAsVolume"] if row["mountPath"] == place)
        assert (volume["secretName"], volume["mountPath"]) == ("our-keys", place), name
        assert volume.get("optional") is not True, "a pod without its keys would do without signatures"
    for name, executor in pipeline["deploymentSpec"]["executors"].items():
        told = {row["name"]: row["value"] for row in executor["container"]["env"]}
        assert told["YOLOV8_NAS_SIGNING_KEY"] == f"{place}/signing.key", name
        assert told["YOLOV8_NAS_TRUSTED_KEYS"] == place, name
    assert "PRIVATE KEY" not in (tmp_path / "x.yaml").read_text()


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_manifests_are_a_pipeline_and_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = CliRunner().invoke(
        app, ["compile", "-o", str(tmp_path / "x.yaml"), "--kubernetes-manifests", str(tmp_path)]
    )
    assert refused.exit_code == 2 and "not named by digest" in refused.output
    from components import images

    for kind in images.IMAGES:
        monkeypatch.setitem(images.IMAGES, kind, f"registry.example.com/x@sha256:{'1' * 64}")
    command = [
        "compile",
        "-o",
        str(tmp_path / "x.yaml"),
        "--kubernetes-manifests",
        str(tmp_path / "m"),
        "--namespace",
        "team",
    ]
    assert CliRunner().invoke(app, command).exit_code == 0
    (file,) = (tmp_path / "m").iterdir()
    pipeline, version = yaml.safe_load_all(file.read_text())
    assert (pipeline["kind"], version["kind"]) == ("Pipeline", "PipelineVersion")
    assert version["metadata"]["namespace"] == "team"
    assert version["metadata"]["name"].startswith("yolov8-nas-") and "." not in version["metadata"]["name"]


def test_a_gpu_of_the_catalogue_is_found_by_its_label_and_a_cpu_gets_none() -> None:
    toleration = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    gpu, cpu = branches(CONFIG, {}, [toleration])
    assert (gpu.label, gpu.pool, gpu.gpus, gpu.tolerations) == ("nvidia-t4-int8", "nvidia-t4", "1", [toleration])
    terms = gpu.nodes["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert terms[0]["matchExpressions"][0]["values"] == ["Tesla-T4", "NVIDIA-T4"]
    assert (cpu.gpus, cpu.nodes, cpu.tolerations) == ("0", {}, [])
    pools = {"nvidia-t4": {"node_labels": {"pool": "t4"}, "cpu": 4}, "cpu-2t": {"gpus": 0, "memory": "4Gi"}}
    gpu, cpu = branches(CONFIG, pools, [])
    assert gpu.cpu == "4" and '"values": ["t4"]' in json.dumps(gpu.nodes)
    assert cpu.memory == "4Gi"


def test_the_demo_fits_on_a_node_of_two_cores_and_asks_for_no_gpu(
    compiled: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    """Requests as Kubernetes counts them; beside a step run Kubeflow's own containers, and others of the node."""
    demo = lifecycle.requested("")
    (target,), trains = branches(demo, {}, []), training(demo, "1")
    assert (target.gpus, trains.gpus, trains.supernet_gpus) == ("0", "0", "0")
    light = compiled[0]["deploymentSpec"]["executors"]["exec-data-prep"]["container"]["resources"]
    requests = [light["resourceCpuRequest"], target.cpu, trains.cpu]
    assert max(_cores(text) for text in requests) <= 1.0
    assert all(memory in ("2Gi", "4Gi") for memory in (light["resourceMemoryRequest"], target.memory, trains.memory))


def _cores(text: str) -> float:
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def test_where_a_target_is_a_gpu_a_training_has_one_unless_it_is_asked_for_otherwise() -> None:
    assert training(CONFIG, "1") == Training(1, "1", "7", "28Gi")
    assert training(CONFIG, "2", "8", cpu="32").supernet_gpus == "0"
    assert training(CONFIG, "1", "0") == Training(1, "0", "1", "4Gi")
    assert training(CONFIG, "1", "4", "16", "64Gi") == Training(1, "4", "16", "64Gi")


def test_a_step_whose_pod_was_lost_is_tried_again_as_long_as_its_tries_may_take(
    compiled: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    """Argo counts the longest duration from the first try's beginning, and kfp fills an hour in where none is given."""
    spec, pods = compiled
    for _, task, label in _steps(spec):
        retry = task["retryPolicy"]
        wait, tries, longest = (float(str(retry[key]).rstrip("s")) for key in (
            "backoffDuration", "maxRetryCount", "backoffMaxDuration",
        ))  # fmt: skip
        assert tries >= 3, label
        assert float(retry["backoffFactor"]).is_integer(), "Argo reads no other factor"
        waits = sum(wait * retry["backoffFactor"] ** number for number in range(int(tries)))
        assert longest >= (tries + 1) * float(pods[label]["activeDeadlineSeconds"]) + waits, label


def test_each_step_has_the_keys_that_it_needs_and_no_others(compiled: tuple[dict[str, Any], dict[str, Any]]) -> None:
    with_data = {"exec-open-run", "exec-data-prep", "exec-supernet-train"}
    for label, pod in compiled[1].items():
        secrets = {row["secretName"] for row in pod["secretAsEnv"]}
        assert ("yolov8-nas-s3-data" in secrets) == (label in with_data), label
        mounted = {row["secretName"] for row in pod.get("secretAsVolume", ())}
        assert mounted == ({"yolov8-nas-trainjobs"} if label == "exec-supernet-train" else set()), label
        assert "yolov8-nas-s3-artifacts" not in secrets, "artifacts go through MLflow"


def test_pods_of_one_node_share_a_lock(compiled: tuple[dict[str, Any], dict[str, Any]]) -> None:
    spec, pods = compiled
    for _, _, label in _steps(spec):
        (field,) = pods[label]["fieldPathAsEnv"]
        assert field == {"name": "YOLOV8_NAS_NODE", "fieldPath": "spec.nodeName"}
        told = {row["name"]: row["value"] for row in spec["deploymentSpec"]["executors"][label]["container"]["env"]}
        assert told["YOLOV8_NAS_HOST_LOCKS"].startswith(f"{pods[label]['pvcMount'][0]['mountPath']}/")


def test_what_a_person_fills_in_is_laid_over_the_configuration() -> None:
    settings = CONFIG.model_dump(mode="json")
    assert RunConfig.parse(lay_over(settings), "test") == CONFIG
    changed = RunConfig.parse(
        lay_over(
            settings, data="s3://x", targets=["cpu", "cpu-1t"], constraints=["params<=1M"], precision="fp32", budget=0.1
        ),
        "test",
    )
    assert changed.data == "s3://x"
    assert [(target.hardware, target.precision) for target in changed.targets] == [("cpu", "fp32"), ("cpu-1t", "fp32")]
    assert changed.targets[0].runtime == "tensorrt", "as the first target has it"
    assert (changed.supernet.epochs, changed.search.generations, changed.finetune.qat_epochs) == (30, 4, 1)
    assert lifecycle.requested("").name == "inspection-demo"
    with pytest.raises(InputError, match="expected a mapping"):
        lifecycle.requested("yolov8n")


def test_a_step_without_the_gpu_it_was_promised_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    begun = []
    stage = Stage("data-prep", 1, lambda config, target: StageSettings(), lambda ctx: begun.append(ctx))
    common: dict[str, Any] = {
        "config": CONFIG,
        "inputs": {},
        "store": tmp_path / "store",
        "output": tmp_path / "out.tar",
    }
    require_gpus(0)
    with pytest.raises(WaitingError, match=r"1 GPU promised, 0 here .*limits name nvidia.com/gpu"):
        run_stage(stage, target=None, run_id="one", gpus=1, **common)
    carried = run_stage(stage, target="cpu-2t-fp32", run_id="other", gpus=2, **common)
    assert carried.status == "failed" and "2 GPUs promised" in str(carried.error)
    assert begun == []
    run_stage(stage, target=None, run_id="two", **common)
    assert run_stage(stage, target=None, run_id="three", gpus=1, **common).status == "cached", "it needs none"
    assert len(begun) == 1


def test_a_failed_step_that_kubeflow_tries_again_fails_again(tmp_path: Path) -> None:
    def fail(ctx: Any) -> None:
        raise InputError("no images")

    stage = Stage("data-prep", 1, lambda config, target: StageSettings(), fail)
    for _ in range(2):
        with pytest.raises(Exception, match="no images"):
            run_stage(
                stage, config=CONFIG, target=None, inputs={}, store=tmp_path, output=tmp_path / "out.tar", run_id="one"
            )


def test_a_step_shows_its_figures_or_why_it_failed(tmp_path: Path) -> None:
    pack(fabricated.write_outputs(tmp_path / "made", p50=1.5)["trt-export"], tmp_path / "done.tar")
    told = tell("trt-export", "cpu", Outcome("done", "", "abc", 75.0), tmp_path / "done.tar")
    assert told.figures == {
        "map50_95": 0.41, "map50": pytest.approx(0.61), "memory_mb": 61.0, "file_mb": 9.0, "params": 2_300_000.0,
        "latency_p50_ms": 1.5, "latency_p90_ms": 1.7, "latency_p99_ms": 2.5, "seconds": 75.0,
        "difference_to_baseline_map50_95": 0.03,
    }  # fmt: skip
    assert "| latency_p50_ms | 1.5 |" in told.markdown and "trt-export/abc" in told.markdown
    assert (
        "had this result already"
        in tell("trt-export", "cpu", Outcome("cached", "", "abc", 1), tmp_path / "done.tar").markdown
    )
    write_json(tmp_path / "failed" / "status.json", {"stage": "search"})
    pack(tmp_path / "failed", tmp_path / "failed.tar")
    told = tell(
        "trt-export", "cpu", Outcome("failed", "", "", 1.0, "no network keeps latency<=1ms"), tmp_path / "failed.tar"
    )
    assert "**Failed**" in told.markdown and "no network keeps latency<=1ms" in told.markdown
    assert set(told.figures) == {"seconds"}


def _summary(*met: bool, **changes: Any) -> Summary:
    """A summary of targets that have a model or none; `changes` are those of the first target."""
    model = {**fabricated.figures(2.0, map50_95=0.5), "files": {}}
    registry = {"model": "two", "version": 3, "aliases": []}
    targets = [
        fabricated.target(
            id=f"target-{number}",
            status="met" if good else "failed",
            error=None if good else "search: no network\nkeeps a | b",
            precision_shipped="int8",
            **{
                "model": model if good else None,
                "registry": registry if good else None,
                **(changes if not number else {}),
            },
        )
        for number, good in enumerate(met)
    ]
    return fabricated.summary(*targets, name="two")


def test_the_verdict_names_every_target() -> None:
    told = tell_run(_summary(True, False))
    assert told.figures["targets_with_a_model"] == 1
    assert "# 1 of 2 targets of two have a model" in told.markdown
    assert "| target-0 | 0.500 | 2 | int8 | two version 3 |" in told.markdown
    assert "**none**: search: no network keeps a \\| b |" in told.markdown


def test_no_figure_that_is_no_number_leaves_a_step(tmp_path: Path) -> None:
    """kfp writes bare NaN, which is no JSON, and the launcher then fails a step that is done."""
    assert Told({"a": 1.0, "b": math.nan, "c": math.inf, "d": -math.inf}, "").figures == {"a": 1.0}
    curves = [{"epoch": 0, "box": 1.5, "cls": float("nan")}]
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "curves.json").write_text(json.dumps(curves))
    fabricated.supernet(SearchSpace.load("tiny")).write(tmp_path / "done")
    pack(tmp_path / "done", tmp_path / "done.tar")
    told = tell("supernet-train", None, Outcome("done", "", "abc", 1.0), tmp_path / "done.tar")
    assert "last_loss_cls" not in told.figures and told.figures["last_loss_box"] == 1.5
    summary = _summary(True, model={**fabricated.figures(2.0, map50_95=math.nan), "files": {}})
    json.dumps(dict(tell_run(summary).figures), allow_nan=False)


def test_a_model_that_waits_for_its_registry_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    RegisterResult(model="two", tracking_uri="", reason="away", spooled="spool/0123").write(tmp_path / "kept")
    pack(tmp_path / "kept", tmp_path / "kept.tar")
    told = tell("register", "cpu", Outcome("done", "", "abc", 1.0), tmp_path / "kept.tar")
    assert set(told.figures) == {"seconds"}
    told = tell_run(_summary(True, registry=None))
    assert told.figures["targets_with_a_model"] == 1
    assert "| target-0 | 0.500 | 2 | int8 | not registered yet |" in told.markdown


@pytest.mark.parametrize(("met", "fails"), [((True, False), False), ((False, False), True), ((), False)])
def test_the_run_fails_where_no_target_has_a_model_and_its_report_is_kept(
    met: tuple[bool, ...], fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = _summary(*met)
    store = str(tmp_path / "store")

    (tmp_path / "store" / "runs" / "r").mkdir(parents=True)
    monkeypatch.setattr(lifecycle, "close_run", lambda **_: summary)
    monkeypatch.setattr(lifecycle, "_recorded", lambda folder: None)
    monkeypatch.setattr("yolov8_nas.run.summary.summarise", lambda *_: summary)
    artifacts = {name: dsl.Artifact(uri=str(tmp_path / name)) for name in ("summary", "report", "verdict")}
    arguments = {"store": store, "run_id": "r", "job_id": "j", "workdir": "", **artifacts}
    metrics = dsl.Metrics(uri=str(tmp_path / "metrics"))
    close_run.python_func(**arguments, metrics=metrics)  # it ends green in any case
    assert (tmp_path / "verdict").read_text().startswith(f"# {sum(met)} of {len(met)}")
    assert metrics.metadata["targets"] == len(met)
    if fails:
        with pytest.raises(SystemExit, match="no target has a model: target-0: search: no network"):
            verdict.python_func(store=store, run_id="r", job_id="j")
    else:
        verdict.python_func(store=store, run_id="r", job_id="j")


def test_a_plan_knows_what_a_store_or_a_file_tells_and_nothing_else(tmp_path: Path) -> None:
    file, rates = tmp_path / "two.yaml", tmp_path / "rates.yaml"
    file.write_text(yaml.safe_dump({"name": "two", "space": "tiny", "imgsz": 64, "targets": TARGETS}))
    rates.write_text(yaml.safe_dump({"supernet-train": 3.0, "search": {"nvidia-t4": 1.0}}))
    command = ["plan", str(file), "--no-measure", "--rates", str(rates)]
    command += ["--param", "training_gpus=2", "--price", "training=10"]
    shown = CliRunner().invoke(app, [*command, "--json"])
    assert shown.exit_code == 0, shown.output
    content = json.loads(shown.output)
    hours = {(step["stage"], step["target"]): step["hours"] for step in content["steps"]}
    assert hours["supernet-train", None] == pytest.approx(1200 * 3 / 3600)
    assert hours["search", "nvidia-t4-int8"] == pytest.approx(2560 / 3600)
    assert hours["search", "cpu-2t-fp32"] is None
    training = next(pool for pool in content["pools"] if pool["name"] == "training")
    assert training["gpu_hours"] == pytest.approx(2.0) and training["cost"] == pytest.approx(10.0)
    assert training["complete"] is False
    assert "in all at least 10.00 EUR" in CliRunner().invoke(app, command).output
    for faulty in (["--price", "t5=1"], ["--price", "training=x"], ["--rates", str(file)], ["--store", "missing"]):
        assert CliRunner().invoke(app, ["plan", str(file), "--no-measure", *faulty]).exit_code == 2


def test_rates_come_from_the_runs_of_a_store(tmp_path: Path) -> None:
    target = CONFIG.targets[1]
    stage = Stage("search", 1, lambda config, target: StageSettings(), lambda ctx: None)
    run_stage(
        stage, config=CONFIG, target="cpu-2t-fp32", inputs={}, store=tmp_path, output=tmp_path / "x.tar", run_id="old"
    )
    write_json(tmp_path / "runs" / "old" / "run.json", {"config": CONFIG.model_dump(mode="json")})
    rates = plan.Rates.load(None, str(tmp_path))
    rate, source = rates.find("search", CONFIG, target)
    assert rate is not None and source == "run old"
    record = tmp_path / "runs" / "old" / "cpu-2t-fp32.search.json"
    write_json(record, {**read_json(record), "seconds_spared": 1e6})
    longer, _ = rates.find("search", CONFIG, target)
    assert longer is not None and longer > 100 * rate, "what this run found in the store, another has to compute"
    assert rates.find("search", CONFIG, CONFIG.targets[0]) == (None, "unknown"), "other hardware"
    assert rates.find("search", CONFIG.model_copy(update={"imgsz": 96}), target)[0] is None
    assert rates.find("trt-export", CONFIG, target)[0] is None
