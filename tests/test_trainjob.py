"""Training on several nodes: the TrainJob that a step makes, follows and takes away, with the real client."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fabricated
import kubernetes
import object_store
import pytest
from kube_server import JOBS, PODS, KubernetesApi, serving

from components.placement import over_nodes, training
from components.supernet_train import node, trainjob
from yolov8_nas.config import RunConfig
from yolov8_nas.device.host import HostLock
from yolov8_nas.errors import InputError, WaitingError
from yolov8_nas.files import file_sha256, read_json, write_json
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.stage import StageContext, open_store
from yolov8_nas.stages.supernet_train import STAGE
from yolov8_nas.stages.supernet_train.run import Failure
from yolov8_nas.stages.supernet_train.settings import SupernetSettings
from yolov8_nas.store import remote as remote_store
from yolov8_nas.store.store import Manifest

OWN: dict[str, Any] = {
    "metadata": {
        "name": "run-abc-step",
        "uid": "0123",
        "labels": {"kueue.x-k8s.io/queue-name": "vision", "pipelines.kubeflow.org/v2_component": "true"},
    },
    "spec": {
        "serviceAccountName": "yolov8-nas-runner",
        "nodeSelector": {"pool": "a100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
        "imagePullSecrets": [{"name": "yolov8-nas-pull"}],
        "volumes": [
            {"name": "store", "persistentVolumeClaim": {"claimName": "yolov8-nas-store"}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
            {"name": "token", "projected": {"sources": []}},
        ],
        "containers": [
            {"name": "wait", "image": "argo"},
            {
                "name": "main",
                "image": "registry.example.com/training@sha256:" + "1" * 64,
                "env": [
                    {"name": "AWS_SECRET_ACCESS_KEY", "valueFrom": {"secretKeyRef": {"name": "s3", "key": "secret"}}},
                    {"name": "KFP_POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                    {"name": "YOLOV8_NAS_NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
                    {"name": "PLAIN", "value": "x"},
                ],
                "resources": {
                    "requests": {"cpu": "7", "memory": "28Gi"},
                    "limits": {"cpu": "7", "memory": "28Gi", "nvidia.com/gpu": "1"},
                },
                "securityContext": {"runAsUser": 10001, "runAsNonRoot": True, "allowPrivilegeEscalation": False},
                "volumeMounts": [
                    {"name": "store", "mountPath": "/store"},
                    {"name": "shm", "mountPath": "/dev/shm"},
                    {"name": "token", "mountPath": "/var/run/secrets/kubeflow"},
                ],
            },
        ],
    },
}


def _pod(node: int, state: dict[str, Any] | None) -> dict[str, Any]:
    waiting = {"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes: no GPU is free"}]}
    running = {"containerStatuses": [{**_STATUS, "state": state}]}
    labels = {"batch.kubernetes.io/job-completion-index": str(node)}
    return {"metadata": {"name": f"node-{node}", "labels": labels}, "status": running if state else waiting}


_STATUS = {"name": "node", "image": "i", "imageID": "i", "ready": True, "restartCount": 0}
RUNS = {"running": {}}


def _look(*lines: str, ended: str | None = None) -> dict[str, Any]:
    rows = [{"type": ended, "status": "True", "reason": "R", "message": "a pod ended with 1"}] if ended else []
    log = "".join(f"{line}\n" for line in lines)
    other = "2030-01-01T00:00:00Z rank 4\n"
    return {"conditions": rows, "pods": [_pod(0, RUNS), _pod(1, RUNS)], "logs": {"node-0": log, "node-1": other}}


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[KubernetesApi]:
    with serving(KubernetesApi(OWN)) as server:
        configuration = kubernetes.client.Configuration()
        configuration.host, configuration.retries = server.host, False
        in_cluster = lambda: kubernetes.client.Configuration.set_default(configuration)  # noqa: E731
        monkeypatch.setattr(kubernetes.config, "load_incluster_config", in_cluster)
        (tmp_path / "namespace").write_text("team\n")
        monkeypatch.setattr(trainjob, "NAMESPACE_FILE", tmp_path / "namespace")
        monkeypatch.setattr(trainjob, "POLL", 0.02)
        monkeypatch.setenv("KFP_POD_NAME", "run-abc-step")
        yield server
        kubernetes.client.Configuration.set_default(None)


def _carry_out() -> int:
    return trainjob.TrainJob("supernet-1").carry_out(["python", "-m", "x"], nodes=2, gpus=4)


def test_nodes_are_like_the_step_and_its_log_is_passed_on_once(
    api: KubernetesApi, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = "2030-01-01T00:00:00.1Z epoch 1", "2030-01-01T00:00:00.12Z epoch 2"
    waiting = {"conditions": [], "pods": [_pod(0, None)], "logs": {}}
    api.looks = [waiting, waiting, waiting, _look(first), _look(first, second), _look(first, second, ended="Complete")]
    api.refuse[f"GET {PODS}"] = (500, "etcd is busy")
    assert _carry_out() == 0
    assert api.job is None, "it is taken away"
    (made,) = api.made
    assert made["metadata"]["ownerReferences"][0]["uid"] == "0123"
    assert made["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "vision"}
    trainer = made["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 4)
    assert trainer["image"].endswith("1" * 64)
    assert trainer["resourcesPerNode"]["limits"] == {"cpu": "7", "memory": "28Gi", "nvidia.com/gpu": "4"}
    assert "AWS_SECRET_ACCESS_KEY" in json.dumps(trainer["env"])
    assert "PLAIN" not in json.dumps(trainer["env"]) and "KFP_POD_NAME" not in json.dumps(trainer["env"])
    (patch,) = made["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"pool": "a100"} and pod["tolerations"] == OWN["spec"]["tolerations"]
    assert [volume["name"] for volume in pod["volumes"]] == ["store", "shm"]
    assert pod["containers"][0]["securityContext"]["runAsNonRoot"]
    told = capsys.readouterr().out
    assert told.count("[node 0] epoch 1") == told.count("[node 0] epoch 2") == told.count("[node 1] rank 4") == 1
    assert told.index("waits for a node: 0/3 nodes: no GPU is free") < told.index("epoch 1")
    assert "the cluster does not answer (500" in told


def test_nodes_have_the_keys_of_signatures_by_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    place = "/var/run/yolov8-nas/keys"
    pod = json.loads(json.dumps(OWN))
    pod["spec"]["volumes"].append({"name": "keys", "secret": {"secretName": "our-keys"}})
    pod["spec"]["containers"][1]["volumeMounts"].append({"name": "keys", "mountPath": place, "readOnly": True})
    monkeypatch.setenv("YOLOV8_NAS_SIGNING_KEY", f"{place}/signing.key")
    made = trainjob.manifest("x", pod, ["python"], nodes=2, gpus=1)
    (patch,) = made["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    spec = node["template"]["spec"]["template"]["spec"]
    assert {"name": "keys", "secret": {"secretName": "our-keys"}} in spec["volumes"]
    assert place in [row["mountPath"] for row in spec["containers"][0]["volumeMounts"]]
    assert {"name": "YOLOV8_NAS_SIGNING_KEY", "value": f"{place}/signing.key"} in made["spec"]["trainer"]["env"]


def test_a_job_that_fails_is_told_and_taken_away(api: KubernetesApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.looks = [_look(), _look(ended="Failed")]
    assert _carry_out() == 1
    assert api.job is None
    assert "TrainJob supernet-1 failed: R: a pod ended with 1" in capsys.readouterr().out


def test_what_a_killed_step_has_left_is_made_anew(api: KubernetesApi) -> None:
    api.job, api.lingers = {"metadata": {"name": "supernet-1"}}, 2
    api.looks = [_look(), _look(ended="Complete")]
    assert _carry_out() == 0
    assert [call for call in api.log if call.startswith(("POST", "DELETE"))] == [
        f"POST {JOBS}",
        f"DELETE {JOBS}/supernet-1",
        f"POST {JOBS}",
        f"DELETE {JOBS}/supernet-1",
    ]


def test_sigterm_takes_the_job_away(api: KubernetesApi) -> None:
    api.looks = [_look()]

    def stop() -> None:
        while f"GET {PODS}/node-0/log" not in api.log:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        _carry_out()
    assert ended.value.code == 143
    assert api.job is None and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("call", "status", "told"),
    [
        (f"POST {JOBS}", 404, "has no TrainJob of trainer.kubeflow.org/v1alpha1: install Kubeflow Trainer 2.2"),
        (f"POST {JOBS}", 403, "apply the overlay gpu-cluster, with its Secret yolov8-nas-trainjobs"),
        (f"POST {JOBS}", 422, "no runtime of that name.*see that the runtime torch-distributed"),
        (f"GET {PODS}/run-abc-step", 403, "cannot read the pod run-abc-step in team"),
        (f"GET {PODS}", 403, "cannot follow the TrainJob"),
    ],
)
def test_what_the_cluster_refuses_is_one_line_with_the_remedy(
    api: KubernetesApi, call: str, status: int, told: str
) -> None:
    api.looks = [_look()]
    api.refuse[call] = (status, "no runtime of that name")
    with pytest.raises(WaitingError, match=f"several nodes: .*{told}.*or set training_nodes to 1") as refused:
        _carry_out()
    assert "\n" not in str(refused.value)
    assert api.job is None


def test_a_job_that_somebody_deletes(api: KubernetesApi) -> None:
    api.looks = [_look()]
    api.refuse[f"GET {JOBS}/supernet-1"] = (404, "not found")
    with pytest.raises(WaitingError, match="was deleted by somebody"):
        _carry_out()


def test_the_stage_hands_its_processes_over_and_takes_what_they_fail_of(
    api: KubernetesApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig.parse({"space": "tiny", "targets": [{"constraints": ["params<=1M"]}]}, "test")
    over = RunConfig.parse(json.loads(over_nodes(config.to_json(), 2, 4)), "test")
    assert over.supernet.processes == 8
    with pytest.raises(InputError, match="multiple of 8"):
        STAGE.settings(over.model_copy(update={"supernet": over.supernet.model_copy(update={"batch": 12})}), None)
    key = tmp_path / "0123456789abcdef0123"
    folders = {"out": key / "outputs", "partial": key / "partial"}
    for folder in folders.values():
        folder.mkdir(parents=True)
    settings = STAGE.settings(over, None)
    inputs = {"data-prep": tmp_path / "data"}
    ctx = StageContext(settings, inputs, progress=Progress.silent(), host=HostLock(tmp_path / "lock"), **folders)
    api.looks = [_look(), _look(ended="Failed")]

    def diverge(*arguments: Any) -> None:  # as the first process does, before the job fails
        Failure(kind="InputError", error="diverged").write(key / "partial")
        return follow(*arguments)

    follow = trainjob.TrainJob._follow
    monkeypatch.setattr(trainjob.TrainJob, "_follow", diverge)
    with pytest.raises(InputError, match="diverged"):
        trainjob.run_on_nodes(ctx, nodes=2, gpus=4, run_id="r")
    (made,) = api.made
    assert made["metadata"]["name"] == "yolov8-nas-0123456789abcdef"
    command = made["spec"]["trainer"]["command"]
    assert command[1:5] == ["-m", "torch.distributed.run", "-m", "yolov8_nas.stages.supernet_train"]
    request = read_json(Path(command[5]))
    assert request["settings"]["processes"] == 8 and request["partial"] == str(key / "partial")


class Machines:
    """A step and two nodes, each with a disk of its own and a store in the same bucket; what trains is made up."""

    def __init__(self, bucket: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.address, self.folder, self.patch = f"s3://{bucket}/store", folder, monkeypatch
        self.commands: list[list[str]] = []
        self.found: list[str] = []
        self.ends: dict[str, str] = {}
        write_json(folder / "ultralytics" / node.ULTRALYTICS, {"sync": False})
        monkeypatch.setattr(trainjob.TrainJob, "carry_out", self._on_nodes)
        monkeypatch.setattr(node, "_torchrun", self._train)
        monkeypatch.setattr(remote_store, "SAVE_EVERY", 0.05)

    def be(self, name: str) -> None:
        self.patch.setenv(remote_store.CACHE_VARIABLE, str(self.folder / name))

    def step(self, name: str) -> StageContext[SupernetSettings]:
        """Carry the step out on a new machine."""
        self.be(name)
        self.patch.setenv("YOLO_CONFIG_DIR", str(self.folder / "ultralytics"))
        store = open_store(self.address)
        key = store.root / "supernet-train" / "0123456789abcdef0123"
        folders = {"out": key / "outputs", "partial": key / "partial"}
        for place in folders.values():
            place.mkdir(parents=True)
        config = RunConfig.parse({"space": "tiny", "targets": [{"constraints": ["params<=1M"]}]}, "test")
        settings = STAGE.settings(RunConfig.parse(json.loads(over_nodes(config.to_json(), 2, 1)), "test"), None)
        host = HostLock(self.folder / "lock")
        ctx = StageContext(settings, {}, progress=Progress.silent(), host=host, store=store, **folders)
        trainjob.run_on_nodes(ctx, nodes=2, gpus=1, run_id="r")
        return ctx

    def _on_nodes(self, command: list[str], *, nodes: int, gpus: int) -> int:
        self.commands.append(command)
        status = 0
        for rank in ("1", "0"):
            self.be(f"node-{len(self.commands)}-{rank}")
            self.patch.setenv(node.RANK_VARIABLE, rank)
            status |= node.main(*command[3:])
        return status

    def _train(self, file: Path) -> int:
        """What torchrun's processes do on a node."""
        request, rank = read_json(file), os.environ[node.RANK_VARIABLE]
        assert (Path(request["inputs"]["data-prep"]) / "dataset.json").read_text() == "{}"
        assert read_json(Path(os.environ["YOLO_CONFIG_DIR"]) / node.ULTRALYTICS) == {"sync": False}
        checkpoint = Path(request["partial"]) / "checkpoint.pt"
        self.found.append(checkpoint.read_text() if checkpoint.is_file() else "nothing")
        end = self.ends.get(rank, "done")
        if end == "refused":
            Failure(kind="InputError", error="diverged").write(Path(request["partial"]))
        elif rank == "0":
            checkpoint.write_text("epoch 1")
            saved = open_store(self.address).objects.below(f"{node.ENTRIES}/{file.parent.name}")  # type: ignore[attr-defined]
            while saved.read("partial.json") is None:
                time.sleep(0.02)
            if end == "done":
                (Path(request["out"]) / "supernet.safetensors").write_text("trained")
        return int(end != "done")


@pytest.mark.slow
def test_nodes_without_a_disk_in_common_go_by_the_bucket(
    api: KubernetesApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "swift").mkdir()
    with object_store.running(tmp_path / "swift") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with object_store.bucket() as (_, bucket):
            machines = Machines(bucket, tmp_path, monkeypatch)
            machines.be("data")
            store = open_store(machines.address)
            with (dataset := store.entry("data-prep", "d")).lock(lambda: None):
                (dataset.outputs / "dataset.json").write_text("{}")
                outputs = {"dataset.json": file_sha256(dataset.outputs / "dataset.json")}
                dataset.commit(Manifest("data-prep", 1, "d", {}, {}, outputs, "", 0.0))
            store.record("r", "all.data-prep.json", fabricated.stage_record("data-prep", key="d"))

            machines.ends = {"1": "refused", "0": "lost"}
            with pytest.raises(InputError, match="diverged"):
                machines.step("first")
            machines.ends = {"1": "lost", "0": "lost"}
            with pytest.raises(RuntimeError, match="ended unexpectedly"):
                machines.step("second")
            assert machines.found == ["nothing"] * 4, "checkpoints of a training that cannot be are not gone on from"
            machines.ends = {}
            ctx = machines.step("third")
            assert machines.found[4:] == ["epoch 1"] * 2
            assert (ctx.out / "supernet.safetensors").read_text() == "trained"

            again = machines.step("fourth")
            assert (again.out / "supernet.safetensors").read_text() == "trained"
            assert len(machines.commands) == 3, "a step that was killed at its very end trains nothing anew"
            assert machines.commands[0][1:4] == ["-m", "components.supernet_train.node", machines.address]
            left = open_store(machines.address).objects.names()  # type: ignore[attr-defined]
            assert not [name for name in left if "/job/" in name or "partial" in name or "lease" in name]


def test_a_job_is_made_by_an_account_of_its_own_where_its_token_is_mounted(
    api: KubernetesApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    api.looks = [_look(ended="Complete")]
    monkeypatch.setattr(trainjob, "TRAINJOBS_PATH", str(tmp_path / "account"))
    assert _carry_out() == 0
    assert api.tokens == {""}, "the pod's own"
    (tmp_path / "account").mkdir()
    (tmp_path / "account" / "token").write_text("of-the-account\n")
    api.looks, api.tokens = [_look(ended="Complete")], set()
    assert _carry_out() == 0
    assert api.tokens == {"Bearer of-the-account"}
    pods = api.made[-1]["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    assert pods["template"]["spec"]["template"]["spec"]["serviceAccountName"] == "yolov8-nas-training-node"


@pytest.mark.parametrize(
    ("nodes", "gpus", "told"),
    [
        ("none", "1", "training_nodes = 'none': give a whole number from 1"),
        ("0", "1", "training_nodes = '0'"),
        ("2", "two", "training_gpus = 'two': give a whole number from 0"),
    ],
)
def test_nodes_that_cannot_be(nodes: str, gpus: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        training(RunConfig.parse({"targets": [{"constraints": ["latency<=9ms"]}]}, "test"), nodes, gpus)
