"""Following a run: which of its steps wait, run, were lost and end, and why.

Version 2 of Kubeflow's API tells a state for each of Argo's nodes, drivers, loops and pipelines among them, and nothing
of which is in which, nor of reasons: its converter leaves the pod's name out, to which the rows refer (2.17.0,
`api_converter.go`, `toApiPipelineTaskDetail`). The workflow itself has all of that, the scheduler's own words for a pod
that waits included. Version 1 of the API, which 2.17 serves beside it under the same right (`get` on `runs`), hands the
workflow out as the persistence agent last saw it. Without it, steps are told by name alone.
"""

from __future__ import annotations

import base64
import binascii
import functools
import re
import shlex
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pipelines.client import LARGEST_WORKFLOW, PassingError, Server
from pipelines.pipeline import REPORT, yolov8_nas
from yolov8_nas.errors import InputError
from yolov8_nas.reading import parse_json

ENDED: Final = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
"""States of a run that is over."""

_ITERATION: Final = re.compile(r"\.iteration-iterations\(([0-9]{1,6}):")  # how Argo names what a loop repeats
_TRY: Final = re.compile(r"\(([0-9]{1,6})\)$")
_UNSCHEDULABLE: Final = "Unschedulable"  # how Argo begins the scheduler's message
_OVER_QUOTA: Final = "exceeded quota"  # what Kubernetes says of a pod that the namespace has no room for
_STARTS: Final = ("PodInitializing", "ContainerCreating")  # what a pod waits for that has found its node
_LOST: Final = ("Failed", "Error")
_NOT_RUN: Final = ("Skipped", "Omitted")
_HOUR: Final = 3600.0
_NAMES: Final = ("id", "name", "displayName")
_TEXTS: Final = ("phase", "message", "type", "templateName", "startedAt")
_GZIP: Final = 16  # added to a size of zlib's window: the stream has gzip's header

_ADVICE: Final = (
    ("OOMKilled", "give it more memory: target_pools or training_memory"),
    ("DeadlineExceeded", "it took longer than its step may; submit the run again, and it goes on from there"),
    ("ImagePullBackOff", "see that the registry has this digest, and the pull secret yolov8-nas-pull"),
    ("ErrImagePull", "see that the registry has this digest, and the pull secret yolov8-nas-pull"),
    ("low on resource", "its node ran full: see its volumes' limits; submit the run again, and it goes on from there"),
)
"""What to do, by what stands in Argo's message."""


@dataclass(frozen=True)
class Step:
    """A step of a run as it is at the moment.

    Attributes:
        id: What tells it from all others.
        name: What people call it, with its target.
        state: One word.
        why: The reason, in the words of whoever knows it; empty where there is none.
    """

    id: str
    name: str
    state: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.state}" + (f" ({self.why})" if self.why else "")

    @property
    def homeless(self) -> bool:
        """Whether no node has been found for it, or its namespace has no room."""
        return self.state == "waits" and (self.why.startswith(_UNSCHEDULABLE) or _OVER_QUOTA in self.why)


def watch(
    server: Server,
    run_id: str,
    labels: Sequence[str],
    tell: Callable[[str], None],
    every: float,
    patience: float = 900.0,
    unschedulable: float = 24.0,
) -> str:
    """Follow a run to its end.

    Args:
        server: The server.
        run_id: The run.
        labels: Labels of its targets, in the order of the loops over them.
        tell: Told of every step that begins, waits, is tried again or ends.
        every: Seconds between two looks.
        patience: Seconds for which the server may fail to answer before this gives up, and for which a run whose last
            step has ended may not be called ended; the run goes on without it.
        unschedulable: Hours for which there may be no node or no quota for a step before this gives up.

    Returns:
        The state it ended in.

    Raises:
        InputError: The server refused, or did not answer for too long, or a step has found no place for too long, or
            Kubeflow does not see that the run is over.
    """
    known: dict[str, list[str]] = {}
    homeless: dict[str, float] = {}
    silent_since: float | None = None
    done_since: float | None = None
    while True:
        now = time.monotonic()
        try:
            with server.told("follow the run"):
                run = server.client.get_run(run_id)
                workflow = server.workflow(run_id)
        except PassingError as error:
            if silent_since is None:
                silent_since = now
                tell(f"{error}; the run goes on, and is asked for again")
            if now - silent_since > patience:
                raise
            time.sleep(every)
            continue
        silent_since = None
        if workflow is None:
            found = [*_named((run.run_details and run.run_details.task_details) or [])]
        else:
            found = [*steps(workflow, labels)]
        for step in found:
            _tell_news(step, known.setdefault(step.id, []), tell)
            since = homeless.setdefault(step.id, now) if step.homeless else now
            if not step.homeless:
                homeless.pop(step.id, None)
            if now - since > unschedulable * _HOUR:
                raise InputError(
                    f"{step.name}: no place for it in {unschedulable:g} hours ({step.why}); it goes on waiting: make "
                    "room or such a node, or end the run and submit it with other labels, tolerations or resources"
                )
        if run.state in ENDED:
            if run.error and run.error.message:
                tell(" ".join(run.error.message.split()))
            return str(run.state)
        last = [step.state for step in found if step.name == REPORT][-1:]
        done_since = (done_since or now) if last == ["succeeded"] else None
        if done_since is not None and now - done_since > patience:
            raise InputError(
                f"the last step of run {run_id} has ended, and its results are there, but for {patience / 60:.0f} "
                "minutes Kubeflow has called it running: its workflow controller has lost it; end the run"
            )
        time.sleep(every)


def _tell_news(step: Step, told: list[str], tell: Callable[[str], None]) -> None:
    """Tell of a step what was not told yet: what a pod waits for comes and goes (ErrImagePull, ImagePullBackOff)."""
    if step.state != "waits" and told[-1:] != [str(step)]:
        told.clear()
    if str(step) not in told:
        told.append(str(step))
        tell(str(step))


def steps(workflow: Mapping[str, Any], labels: Sequence[str]) -> Iterator[Step]:
    """The steps that people know among the nodes of Argo's workflow, in the order in which they began.

    A step of the pipeline has a node of its name, whose path tells in which iteration of a loop, and so for which
    target, it runs. Below it are its pods, one for each try. Drivers are told where they fail.

    Args:
        workflow: The workflow, as Kubernetes has it.
        labels: Labels of the targets, in the order of the loops over them.
    """
    titles, pipelines, in_loops = _titles()
    nodes = sorted(_nodes(workflow), key=lambda node: (str(node.get("startedAt") or "9"), str(node["name"])))
    pods = [node for node in nodes if node.get("type") == "Pod"]
    repeated = [node for node in nodes if node.get("type") == "DAG" and _number(node["name"]) and _is_pipeline(node)]
    for node in nodes:
        driven = node["displayName"].removesuffix("-driver")
        is_driver = driven != node["displayName"]
        title = titles.get(driven) or (pipelines.get(driven, driven) if is_driver else None)
        if title is None or node.get("phase") in _NOT_RUN:
            continue
        if driven in in_loops and (found := _ITERATION.findall(node["name"])) and int(found[-1]) < len(labels):
            title = f"{title}, {labels[int(found[-1])]}"
        own = [
            pod
            for pod in pods
            if pod["name"] == node["name"] or pod["name"].startswith((f"{node['name']}.", f"{node['name']}("))
        ]
        if not is_driver:
            yield _step(workflow, node, title, own)
        elif node.get("phase") in _LOST:
            why = _failure(workflow, node, own)
            if repeated:
                why += (
                    "; a step was lost more often than it is tried again, so Argo began the pipeline around it anew, "
                    "which Kubeflow's drivers cannot: submit the run again, and it goes on from the store"
                )
            yield Step(node["name"], title, "not begun: Kubeflow's driver failed", why)


def _step(workflow: Mapping[str, Any], node: Mapping[str, Any], title: str, pods: Sequence[Mapping[str, Any]]) -> Step:
    phase = node.get("phase") or "Pending"
    if phase in _LOST:
        return Step(node["name"], title, "failed", _failure(workflow, node, pods))
    if phase == "Succeeded" or not pods:
        return Step(node["name"], title, phase.lower())
    last, message = pods[-1], _one_line(pods[-1].get("message"))
    if last.get("phase") == "Pending" and message and message not in _STARTS:
        return Step(node["name"], title, "waits", message + _advice(message))
    lost = [pod for pod in pods[:-1] if pod.get("phase") in _LOST]
    if not lost:
        return Step(node["name"], title, (last.get("phase") or phase).lower())
    before = f"try {len(pods)}; the one before was lost: {_one_line(lost[-1].get('message')) or 'no reason given'}"
    return Step(node["name"], title, "running again", before)


def _failure(workflow: Mapping[str, Any], node: Mapping[str, Any], pods: Sequence[Mapping[str, Any]]) -> str:
    """Why a node failed, what to do, and where its log is."""
    lost = next((pod for pod in reversed(pods) if pod.get("phase") in _LOST), None)
    message = _one_line((lost or node).get("message")) or "no reason given"
    if len(pods) > 1:
        message = f"{message}, after {len(pods)} tries"
    if lost is None:
        return message
    place = _part(workflow, "metadata").get("namespace")
    command = ["kubectl", *(["-n", str(place)] if place else []), "logs", _pod_name(workflow, lost), "-c", "main"]
    log = shlex.join(command)  # which people paste into a shell
    return f"{message}{_advice(message)}; log: {log}"


def _advice(message: str) -> str:
    return next((f"; {advice}" for sign, advice in _ADVICE if sign in message), "")


def _one_line(message: Any) -> str:
    return " ".join(str(message or "").split())


def _number(name: str) -> int:
    """Which try a node is; 0 for the first, or for one that is none."""
    found = _TRY.search(name)
    return int(found[1]) if found else 0


def _is_pipeline(node: Mapping[str, Any]) -> bool:
    """Whether a node is a pipeline within the pipeline, and not what Kubeflow puts around the pod of a step."""
    return _TRY.sub("", node["displayName"]) not in _titles()[0]


def _pod_name(workflow: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    """The name that Argo gives a node's pod (its pod names of version 2)."""
    name = _part(workflow, "metadata").get("name")
    return f"{name}-{node.get('templateName')}-{node['id'].rpartition('-')[2]}"


def _part(workflow: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = workflow.get(name)
    return part if isinstance(part, dict) else {}


def _nodes(workflow: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    status = _part(workflow, "status")
    found = status.get("nodes")
    if not found and (packed := status.get("compressedNodes")):  # of a large workflow
        found = _unpacked(packed)
    rows = found.values() if isinstance(found, dict) else ()
    return [row for row in rows if isinstance(row, dict) and _is_node(row)]


def _is_node(row: Mapping[str, Any]) -> bool:
    named = all(isinstance(row.get(key), str) for key in _NAMES)
    return named and all(isinstance(row.get(key), str | None) for key in _TEXTS)


def _unpacked(packed: object) -> Any:
    """JSON that is compressed with gzip and written in Base64; nothing where it is none, or larger than a workflow."""
    try:
        stream = zlib.decompressobj(zlib.MAX_WBITS | _GZIP)
        content = stream.decompress(base64.b64decode(packed), LARGEST_WORKFLOW)  # type: ignore[arg-type]
        return parse_json(content, "the workflow's nodes", most_bytes=LARGEST_WORKFLOW) if stream.eof else None
    except (TypeError, binascii.Error, zlib.error, ValueError):
        return None


def _named(tasks: Sequence[Any]) -> Iterator[Step]:
    """The steps among what version 2 of the API calls tasks; of two targets they have the same name."""
    titles, _, _ = _titles()
    for task in sorted(tasks, key=lambda task: str(task.create_time)):
        if title := titles.get(task.display_name):
            why = task.error.message if task.error and task.error.message else ""
            yield Step(task.task_id, title, str(task.state or "PENDING").lower(), _one_line(why))


@functools.cache
def _titles() -> tuple[Mapping[str, str], Mapping[str, str], frozenset[str]]:
    """What people call steps, and pipelines in the pipeline, by name; and the names of what runs once a target."""
    spec = yolov8_nas.pipeline_spec
    dags = [component.dag for component in (spec.root, *spec.components.values()) if component.dag.tasks]
    tasks = [task for dag in dags for task in dag.tasks.items()]
    titles, pipelines = {}, {}
    for name, task in tasks:
        is_step = bool(spec.components[task.component_ref.name].executor_label)
        (titles if is_step else pipelines)[name] = task.task_info.name
    within: set[str] = set()

    def enter(component: str) -> None:
        for name, task in spec.components[component].dag.tasks.items():
            within.add(name)
            enter(task.component_ref.name)

    for _, task in tasks:
        if task.WhichOneof("iterator"):
            enter(task.component_ref.name)
    return titles, pipelines, frozenset(within)
