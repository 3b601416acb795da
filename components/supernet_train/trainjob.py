"""supernet-train on several nodes: a TrainJob of Kubeflow Trainer, made by the step, followed to its end, taken away.

Every node is a pod like the step's own: the same image, volumes, secrets, node selector and security, and as many GPUs
as were asked for. Trainer's runtime `torch-distributed` adds torchrun's rendezvous, as environment variables that
torchrun reads (`PET_*`). The processes find request, dataset and checkpoints in the store: in its folder, where all
nodes mount it, or by way of S3 (`node`).

The job does not outlive the step: it is deleted however the step ends, on SIGTERM too. What a step that was killed has
left is deleted by the next try, and by Kubernetes together with the step's pod, which owns it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import kubernetes
import urllib3

from components.placement import KEYS_PATH, NODE_ACCOUNT, TRAINJOBS_ACCOUNT, TRAINJOBS_PATH
from components.supernet_train import node
from yolov8_nas.device.host import FOLDER_VARIABLE, NODE_VARIABLE
from yolov8_nas.errors import WaitingError
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.signing import KEY_VARIABLE, TRUSTED_VARIABLE
from yolov8_nas.stages.supernet_train.run import run
from yolov8_nas.stages.supernet_train.settings import SupernetSettings
from yolov8_nas.store.remote import RemoteStore

GROUP: Final = "trainer.kubeflow.org"
VERSION: Final = "v1alpha1"
RUNTIME: Final = "torch-distributed"
"""The ClusterTrainingRuntime; its container and its replicated job are both called `node`."""

POLL: Final = 10.0
"""Seconds between two looks at the job."""

NAMESPACE_FILE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

_ANSWER_WITHIN: Final = 30.0  # seconds
_NODE: Final = "node"
_SCRATCH: Final = ("/dev/shm", "/tmp", KEYS_PATH)
_QUEUE: Final = ("kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class")
_PASSED_ON: Final = ("YOLO_CONFIG_DIR", "YOLO_AUTOINSTALL", KEY_VARIABLE, TRUSTED_VARIABLE, FOLDER_VARIABLE)
_ADVICE: Final = "or set training_nodes to 1"

Object = dict[str, Any]


def run_on_nodes(ctx: StageContext[SupernetSettings], *, nodes: int, gpus: int, run_id: str) -> None:
    """Carry the stage out on several nodes, as `supernet_train.run` does on one.

    Args:
        ctx: The stage's context.
        nodes: Number of nodes.
        gpus: GPUs of each; with none, a process computes on its CPU.
        run_id: Name of the run.
    """

    def launch(processes: int, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
        # The key of the stage's result names the job: a step that is tried again finds what is left of it.
        job = TrainJob(f"yolov8-nas-{ctx.partial.parent.name[:16]}")
        on_nodes = partial(job.carry_out, nodes=nodes, gpus=gpus)
        if isinstance(ctx.store, RemoteStore):
            return node.carry_out(ctx, run_id, on_nodes)
        return on_nodes([sys.executable, "-m", "torch.distributed.run", "-m", module, *arguments])

    run(ctx, launch)


class TrainJob:
    """One TrainJob, from a pod's point of view.

    Args:
        name: Its name.

    Raises:
        WaitingError: This process is in no pod of a cluster.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            kubernetes.config.load_incluster_config()
            self.namespace = NAMESPACE_FILE.read_text().strip()
        except (kubernetes.config.ConfigException, OSError) as error:
            raise WaitingError(f"several nodes: this is no pod of a cluster ({error}); {_ADVICE[3:]}") from None
        _log_in(Path(TRAINJOBS_PATH) / "token")
        self.pods = kubernetes.client.CoreV1Api()
        self.jobs = kubernetes.client.CustomObjectsApi()
        self._place = {"group": GROUP, "version": VERSION, "namespace": self.namespace, "plural": "trainjobs"}
        self._said: dict[str, str] = {}  # of each pod: when it said its last line
        self._looked = 0.0
        self._waiting: dict[str, str] = {}

    def carry_out(self, command: Sequence[str], *, nodes: int, gpus: int) -> int:
        """Make the job, follow it to its end, and delete it, however that comes.

        Returns:
            0 where it completed.

        Raises:
            WaitingError: The cluster has no Trainer, does not let this pod do what it has to, or refuses the job.
        """
        with node.sigterm_as_exit():
            try:
                self._create(command, nodes, gpus)
                return self._follow()
            finally:
                self._delete()

    def _create(self, command: Sequence[str], nodes: int, gpus: int) -> None:
        name = os.environ.get("KFP_POD_NAME") or socket.gethostname()
        with self._told(f"read the pod {name}"):
            pod = self.pods.read_namespaced_pod(name, self.namespace, _request_timeout=_ANSWER_WITHIN)
        own = self.pods.api_client.sanitize_for_serialization(pod)
        job = manifest(self.name, own, command, nodes=nodes, gpus=gpus)
        with self._told("make a TrainJob"):
            try:
                self.jobs.create_namespaced_custom_object(**self._place, body=job, _request_timeout=_ANSWER_WITHIN)
            except kubernetes.client.ApiException as error:
                if error.status != 409:
                    raise
                print(f"TrainJob {self.name} is left from a step that was killed; making it anew", flush=True)
                self._delete()
                while self._get() is not None:
                    time.sleep(POLL)
                self.jobs.create_namespaced_custom_object(**self._place, body=job, _request_timeout=_ANSWER_WITHIN)
        print(f"TrainJob {self.name}: {nodes} nodes with {gpus} GPUs each", flush=True)

    def _follow(self) -> int:
        while True:
            try:
                with self._told("follow the TrainJob"):
                    job = self._get()
                    self._pass_on()
            except (kubernetes.client.ApiException, urllib3.exceptions.HTTPError) as error:
                print(f"the cluster does not answer ({_brief(error)}); looking again", flush=True)
                time.sleep(POLL)
                continue
            if job is None:
                raise WaitingError(f"TrainJob {self.name} was deleted by somebody; start the run again to go on")
            rows = job.get("status", {}).get("conditions", ())
            conditions = {row["type"]: row for row in rows if row["status"] == "True"}
            if "Complete" in conditions:
                return 0
            if failed := conditions.get("Failed"):
                print(f"TrainJob {self.name} failed: {failed.get('reason')}: {failed.get('message')}", flush=True)
                return 1
            time.sleep(POLL)

    def _get(self) -> Object | None:
        try:
            job: Object = self.jobs.get_namespaced_custom_object(
                **self._place, name=self.name, _request_timeout=_ANSWER_WITHIN
            )
        except kubernetes.client.ApiException as error:
            if error.status != 404:
                raise
            return None
        return job

    def _pass_on(self) -> None:
        """Print what the job's pods have said since the last look, or what they wait for."""
        now = time.monotonic()
        since = int(now - self._looked) + 5 if self._looked else None
        found = self.pods.list_namespaced_pod(
            self.namespace,
            label_selector=f"jobset.sigs.k8s.io/jobset-name={self.name}",
            _request_timeout=_ANSWER_WITHIN,
        )
        for pod in found.items:
            node = pod.metadata.labels.get("batch.kubernetes.io/job-completion-index", "?")
            waiting = _waits_for(pod)
            if waiting != self._waiting.get(pod.metadata.name):
                print(f"[node {node}] {waiting or 'runs'}", flush=True)
                self._waiting[pod.metadata.name] = waiting
            if not waiting:
                first = pod.metadata.name not in self._said
                self._pass_on_log(pod.metadata.name, node, None if first else since)
        self._looked = now

    def _pass_on_log(self, pod: str, node: str, since: int | None) -> None:
        window = {} if since is None else {"since_seconds": since}
        log = self.pods.read_namespaced_pod_log(
            pod, self.namespace, container=_NODE, timestamps=True, _request_timeout=_ANSWER_WITHIN, **window
        )
        last = self._said.setdefault(pod, "")
        for line in log.splitlines():
            when, _, said = line.partition(" ")
            if (moment := _sortable(when)) > last:
                print(f"[node {node}] {said}", flush=True)
                self._said[pod] = moment

    def _delete(self) -> None:
        try:
            self.jobs.delete_namespaced_custom_object(**self._place, name=self.name, _request_timeout=_ANSWER_WITHIN)
        except (kubernetes.client.ApiException, urllib3.exceptions.HTTPError) as error:
            if getattr(error, "status", None) not in (403, 404):
                print(f"TrainJob {self.name} is not deleted ({_brief(error)}): it goes with this pod", flush=True)

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Turn a refusal that only people can mend into one line; what may pass goes through.

        Raises:
            WaitingError: For such a refusal.
        """
        try:
            yield
        except kubernetes.client.ApiException as error:
            if error.status is not None and (error.status >= 500 or error.status == 429 or error.status == 0):
                raise
            remedy = {
                401: "its token is not taken: see that the pod's service account mounts one",
                403: f"not allowed: apply the overlay gpu-cluster, with its Secret {TRAINJOBS_ACCOUNT}",
                404: f"this cluster has no TrainJob of {GROUP}/{VERSION}: install Kubeflow Trainer 2.2 or later",
            }.get(error.status, f"{_brief(error)}: see that the runtime {RUNTIME} and Kubeflow Trainer 2.2 are there")
            raise WaitingError(f"several nodes: cannot {what} in {self.namespace}: {remedy}, {_ADVICE}") from None


def _log_in(token: Path) -> None:
    """Ask the API as the account that may make TrainJobs; the pod's own is left where there is no such token.

    Raises:
        WaitingError: The token cannot be read.
    """
    try:
        written = token.read_text().strip()
    except FileNotFoundError:
        return
    except OSError as error:
        raise WaitingError(f"several nodes: {token} cannot be read ({error.strerror}); {_ADVICE[3:]}") from None
    configuration = kubernetes.client.Configuration.get_default_copy()
    configuration.api_key = {"authorization": f"Bearer {written}"}
    configuration.refresh_api_key_hook = None  # it would put the pod's own in its place
    kubernetes.client.Configuration.set_default(configuration)


def manifest(name: str, pod: Object, command: Sequence[str], *, nodes: int, gpus: int) -> Object:
    """A TrainJob whose pods are like another one.

    Args:
        name: Its name.
        pod: The pod that makes it, as Kubernetes has it; the container `main` is the one to be like.
        command: What each node runs.
        nodes: Number of nodes.
        gpus: GPUs of each.
    """
    spec, labels = pod["spec"], pod["metadata"].get("labels", {})
    main = next(container for container in spec["containers"] if container["name"] == "main")
    claims = {volume["name"] for volume in spec.get("volumes", ()) if "persistentVolumeClaim" in volume}
    mounts = [row for row in main.get("volumeMounts", ()) if row["name"] in claims or row["mountPath"] in _SCRATCH]
    mounted = {row["name"] for row in mounts}
    like = {key: spec[key] for key in ("nodeSelector", "affinity", "tolerations", "imagePullSecrets") if spec.get(key)}
    pod_spec = {
        **like,
        "serviceAccountName": NODE_ACCOUNT,
        "securityContext": spec.get("securityContext", {}),
        "volumes": [volume for volume in spec.get("volumes", ()) if volume["name"] in mounted],
        "containers": [
            {"name": _NODE, "volumeMounts": mounts, "securityContext": main.get("securityContext", {})},
        ],
    }
    owner = {"apiVersion": "v1", "kind": "Pod", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {
            "name": name,
            "labels": {key: labels[key] for key in _QUEUE if key in labels},
            "ownerReferences": [owner],
        },
        "spec": {
            "runtimeRef": {"apiGroup": GROUP, "kind": "ClusterTrainingRuntime", "name": RUNTIME},
            "trainer": {
                "image": main["image"],
                "command": list(command),
                "env": _environment(main),
                "numNodes": nodes,
                "numProcPerNode": max(1, gpus),
                "resourcesPerNode": _resources(main, gpus),
            },
            "runtimePatches": [
                {
                    "manager": "yolov8-nas/supernet-train",
                    "trainingRuntimeSpec": {
                        "template": {
                            "spec": {
                                "replicatedJobs": [
                                    {"name": _NODE, "template": {"spec": {"template": {"spec": pod_spec}}}}
                                ]
                            }
                        }
                    },
                }
            ],
        },
    }


def _resources(main: Object, gpus: int) -> Object:
    """What a container asks for, with other GPUs."""
    return {
        kind: {**{key: value for key, value in main["resources"].get(kind, {}).items() if key != "nvidia.com/gpu"}}
        | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
        for kind in ("requests", "limits")
    }


def _environment(main: Object) -> list[Object]:
    """What a node gets of a container's environment.

    References alone: a value would stand in the job for everybody to read, and Kubeflow's own say nothing here. Nodes
    compute, and log in nowhere but to the store.
    """
    references = [
        row
        for row in main.get("env", ())
        if {"secretKeyRef", "configMapKeyRef"} & row.get("valueFrom", {}).keys() or row["name"] == NODE_VARIABLE
        if not row["name"].startswith("MLFLOW_TRACKING_")
    ]
    own = [{"name": key, "value": os.environ[key]} for key in _PASSED_ON if key in os.environ]
    return [*references, *own]


def _waits_for(pod: Any) -> str:
    """What a pod waits for, in words; nothing where its container runs or has run."""
    status = pod.status
    for container in status.container_statuses or ():
        if container.name == _NODE and container.state and not container.state.waiting:
            return ""
        if container.name == _NODE and container.state and container.state.waiting:
            return f"waits: {container.state.waiting.reason}: {container.state.waiting.message or ''}".rstrip(": ")
    for condition in status.conditions or ():
        if condition.type == "PodScheduled" and condition.status == "False":
            return f"waits for a node: {condition.message}"
    return "waits"


def _sortable(when: str) -> str:
    """A time of a log, in UTC, with nine digits of a second: Kubernetes leaves out zeros at their end."""
    seconds, _, fraction = when.removesuffix("Z").partition(".")
    return f"{seconds}.{fraction.ljust(9, '0')}"


def _brief(error: Exception) -> str:
    body = getattr(error, "body", None)
    return " ".join(f"{getattr(error, 'status', '') or type(error).__name__} {body or error}".split())[:300]
