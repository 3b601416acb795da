"""The pods that steps run in: resources, store, settings by reference, security, time limits, further tries.

What Kubeflow Pipelines cannot set is left to the cluster: a read-only root file system (steps write to /tmp, /dev/shm
and /store only), fsGroup, the priority class, for which a step names Kueue's instead, and for which reasons a step is
tried again: Argo's policy comes from its controller's settings (docs/kubeflow-runs.md, Lost pods).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any, Final

from kfp import dsl, kubernetes
from kfp.dsl import pipeline_task

from components.placement import KEYS_PATH, TRAINJOBS_ACCOUNT, TRAINJOBS_PATH
from yolov8_nas import credentials, signing
from yolov8_nas.device import host

STORE_CLAIM: Final = "yolov8-nas-store"
STORE_PATH: Final = "/store"
STORE: Final = f"{STORE_PATH}/stages"
"""The stage store, unless another one is named; MLflow's files lie beside it where no server is configured."""

UID: Final = 10001
SECRET: Final = "yolov8-nas-s3"
"""Secret with the keys of the stage store's bucket."""
SECRET_KEYS: Final = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
DATA_SECRET: Final = "yolov8-nas-s3-data"
"""Secret of the same form for the buckets with datasets and weights; without it, the store's keys are taken."""
TRACKING_SECRET: Final = "mlflow-client"
TRACKING_KEYS: Final = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
CA: Final = "yolov8-nas-ca"
"""ConfigMap with the certificate of the CA that MLflow's is signed by, where it is one of the cluster's own."""
CA_PATH: Final = "/var/run/yolov8-nas/ca"
CREDENTIALS_SECRET: Final = "yolov8-nas-credentials"
CREDENTIALS: Final = credentials.VARIABLE
"""Key and environment variable with addresses that hold user, password or query; a run's parameters are no place."""
CONFIG_MAP: Final = "yolov8-nas-config"
CONFIG_KEYS: Final = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "MLFLOW_S3_ENDPOINT_URL",
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
)
PULL_SECRET: Final = "yolov8-nas-pull"
GPU: Final = "nvidia.com/gpu"
GPU_TOLERATION: Final = {"key": GPU, "operator": "Exists", "effect": "NoSchedule"}
"""What a pod has to say to come to a node whose GPUs are kept for those that ask for them."""

QUEUE_VARIABLE: Final = "YOLOV8_NAS_QUEUE"
"""Environment variable with the Kueue queue that pods of stages wait in, when the pipeline is compiled."""

SIGNING_VARIABLE: Final = "YOLOV8_NAS_SIGNING_SECRET"
"""Environment variable with the secret that holds the keys of signatures, when the pipeline is compiled: `signing.key`,
and a public key in each `<id>.pub`. Pods that do not find it do not start."""

LOCKS_PATH: Final = f"{STORE_PATH}/.hosts"
"""Folder on the volume of every pod with a lock for each node: pods of one node measure alone (`host`)."""

TRIES_AGAIN: Final = 5
"""How often a step whose pod was lost is tried again."""

_HOUR: Final = 3600
_FIRST_WAIT: Final = 60  # seconds before the second try; each further one waits twice as long


class _Callers:
    """Takes the place of `inspect` in KFP's tasks.

    At each setting of a task, kfp 2.17 asks for the whole stack with its sources, for the name of one method in an
    error that it rarely raises. With 5,000 modules imported this takes 0.7 s, and the pipeline has 62 such settings.
    """

    @staticmethod
    def stack() -> list[tuple[Any, ...]]:
        """Who asks, and whose method it is; of the fields of a frame only its function is filled in."""
        frames = (sys._getframe(1), sys._getframe(2))
        return [(frame, frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name) for frame in frames]


pipeline_task.inspect = _Callers


@dataclass(frozen=True)
class Light:
    """Resources of a step that needs no device."""

    cpu: str
    memory: str
    hours: int
    cpu_request: str = "250m"
    memory_request: str = "1Gi"


@dataclass(frozen=True)
class Placed:
    """Where a step runs whose nodes are chosen when the pipeline is run: each a parameter of the pipeline around it.

    Attributes:
        gpus: GPUs, as text.
        cpu: Cores, request and limit.
        memory: Memory, request and limit.
        tolerations: Taints of nodes that it tolerates.
        node_labels: Labels that its nodes have; or nothing, where there is an affinity.
        node_affinity: Node affinity of Kubernetes; or nothing, where there are labels.
    """

    gpus: Any
    cpu: Any
    memory: Any
    tolerations: Any
    node_labels: Any = None
    node_affinity: Any = None


def light(task: dsl.PipelineTask, name: str, needs: Light) -> dsl.PipelineTask:
    """Give a step its pod, on any node.

    Args:
        task: The step.
        name: What people read.
        needs: Its resources.
    """
    task.set_cpu_request(needs.cpu_request).set_cpu_limit(needs.cpu)
    task.set_memory_request(needs.memory_request).set_memory_limit(needs.memory)
    return _pod(task, name, needs.hours, shm="256Mi", scratch="50Gi")


def placed(task: dsl.PipelineTask, name: str, where: Placed, *, hours: int, priority: str) -> dsl.PipelineTask:
    """Give a step its pod, on nodes that are chosen when the pipeline is run.

    The step must stand directly in a pipeline of its own whose parameters `where` holds. kfp 2.17 refers to them by
    their plain names; in a loop they are called otherwise, and the backend would not find them.

    Args:
        task: The step.
        name: What people read.
        where: Its nodes and its share of them.
        hours: When it is stopped.
        priority: Name of Kueue's priority class.
    """
    task.set_cpu_request(where.cpu).set_cpu_limit(where.cpu)
    task.set_memory_request(where.memory).set_memory_limit(where.memory)
    task.set_accelerator_type(GPU).set_accelerator_limit(where.gpus)
    if where.node_labels is not None:
        kubernetes.add_node_selector_json(task, where.node_labels)
    if where.node_affinity is not None:
        kubernetes.add_node_affinity_json(task, where.node_affinity)
    kubernetes.add_toleration_json(task, where.tolerations)
    if queue := os.environ.get(QUEUE_VARIABLE):
        kubernetes.add_pod_label(task, "kueue.x-k8s.io/queue-name", queue)
        kubernetes.add_pod_label(task, "kueue.x-k8s.io/priority-class", priority)
    return _pod(task, name, hours, shm="8Gi", scratch="200Gi")


def reads_data(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Give a step the keys with which datasets and weights are read; no other step has them."""
    keys = dict(zip(SECRET_KEYS, credentials.DATA_KEYS, strict=True))
    return kubernetes.use_secret_as_env(task, DATA_SECRET, keys, optional=True)


def makes_train_jobs(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Give a step the token of the account that may make TrainJobs, where there is one; no other step has it."""
    return kubernetes.use_secret_as_volume(task, TRAINJOBS_ACCOUNT, TRAINJOBS_PATH, optional=True)


def _pod(task: dsl.PipelineTask, name: str, hours: int, *, shm: str, scratch: str) -> dsl.PipelineTask:
    # State lives in the stage store; a second cache beside it would only be another thing that can be stale.
    task.set_caching_options(False).set_display_name(name)
    kubernetes.mount_pvc(task, pvc_name=STORE_CLAIM, mount_path=STORE_PATH)
    # A container has 64 MB of /dev/shm otherwise, which PyTorch's data loaders fill.
    kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=shm)
    kubernetes.empty_dir_mount(task, "tmp", "/tmp", size_limit=scratch)
    kubernetes.use_secret_as_env(task, SECRET, {key: key for key in SECRET_KEYS}, optional=True)
    kubernetes.use_secret_as_env(task, CREDENTIALS_SECRET, {CREDENTIALS: CREDENTIALS}, optional=True)
    kubernetes.use_secret_as_env(task, TRACKING_SECRET, {key: key for key in TRACKING_KEYS}, optional=True)
    kubernetes.use_config_map_as_volume(task, CA, CA_PATH, optional=True)
    kubernetes.use_config_map_as_env(task, CONFIG_MAP, {key: key for key in CONFIG_KEYS}, optional=True)
    if secret := os.environ.get(SIGNING_VARIABLE):
        kubernetes.use_secret_as_volume(task, secret, KEYS_PATH)
        task.set_env_variable(signing.KEY_VARIABLE, f"{KEYS_PATH}/{signing.PRIVATE_FILE}")
        task.set_env_variable(signing.TRUSTED_VARIABLE, KEYS_PATH)
    kubernetes.set_image_pull_secrets(task, [PULL_SECRET])
    kubernetes.set_image_pull_policy(task, "IfNotPresent")
    kubernetes.set_security_context(task, run_as_user=UID, run_as_group=UID, run_as_non_root=True)
    kubernetes.use_field_path_as_env(task, host.NODE_VARIABLE, "spec.nodeName")
    task.set_env_variable(host.FOLDER_VARIABLE, LOCKS_PATH)
    kubernetes.set_timeout(task, hours * _HOUR)
    waits = sum(_FIRST_WAIT * 2**number for number in range(TRIES_AGAIN))
    # Argo counts the longest duration from the beginning of the first try, and ends a later one at that moment.
    longest = (TRIES_AGAIN + 1) * hours * _HOUR + waits
    task.set_retry(
        TRIES_AGAIN, backoff_duration=f"{_FIRST_WAIT}s", backoff_factor=2, backoff_max_duration=f"{longest}s"
    )
    return task
