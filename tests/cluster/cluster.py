"""A cluster as the tests see it: through kubectl, and through the commands that people use."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from components.placement import is_gpu, pool_name
from pipelines.client import Access, Server
from pipelines.pods import STORE
from pipelines.watch import ENDED, Step, steps
from yolov8_nas.config import RunConfig
from yolov8_nas.runner.stage import target_labels

ROOT: Final = Path(__file__).parents[2]
MINIATURE: Final = Path(__file__).with_name("miniature.yaml")
POLL: Final = 5.0
"""Seconds between two looks."""

RUN_WITHIN: Final = 3600.0
"""Seconds for a run of the miniature."""

CPU_VARIABLE: Final = "YOLOV8_NAS_TEST_CPU"
"""Environment variable with the cores of a step that trains or measures, such as 500m, for several tests at once."""


@dataclass
class Run:
    """A run that a test submitted.

    Attributes:
        id: Kubeflow's name of it.
        process: `submit --watch`, which follows it.
        config: What it runs.
        output: What the command has said, once it has ended.
    """

    id: str
    process: subprocess.Popen[str]
    config: RunConfig
    output: str = ""


@dataclass
class Cluster:
    """A cluster, and what a test has made in it.

    Attributes:
        host: Address of Kubeflow Pipelines.
        namespace: The namespace that the overlay was applied to.
        token_file: File with a token of whoever submits; none where the server asks for none.
        folder: Folder for configurations.
        runs: Runs that are to be ended after the test.
    """

    host: str
    namespace: str
    token_file: Path | None
    folder: Path
    runs: list[Run] = field(default_factory=list)

    @property
    def server(self) -> Server:
        """A connection; a token file is read anew."""
        return Server(Access(self.host, self.namespace, self.token_file))

    def kubectl(self, *arguments: str, content: str | None = None, fails: bool = False) -> str:
        """What kubectl says, in the namespace; its errors, where it is to fail."""
        command = ["kubectl", "--namespace", self.namespace, *arguments]
        done = subprocess.run(command, input=content, capture_output=True, text=True)
        assert fails or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stderr if fails and done.returncode else done.stdout

    def rights(self, account: str, asked: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
        """Which of these a service account may do in the namespace.

        Asked by SubjectAccessReview, as Kubeflow does: `kubectl auth can-i` knows no resource of Kubeflow's, since
        there is none in Kubernetes, and says no.

        Args:
            account: Name of the service account.
            asked: Verbs and resources, as `("get", "runs.pipelines.kubeflow.org")`.
        """
        asked = list(asked)
        reviews = []
        for verb, resource in asked:
            name, _, group = resource.partition(".")
            what = {"namespace": self.namespace, "verb": verb, "resource": name, "group": group}
            who = {
                "user": f"system:serviceaccount:{self.namespace}:{account}",
                "groups": [
                    "system:serviceaccounts",
                    f"system:serviceaccounts:{self.namespace}",
                    "system:authenticated",
                ],
            }
            review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview"}
            reviews.append(review | {"metadata": {}, "spec": who | {"resourceAttributes": what}})
        content = json.dumps({"apiVersion": "v1", "kind": "List", "items": reviews})
        line = '{.status.allowed}{"\\n"}'
        answers = self.kubectl("create", "-f", "-", "-o", f"jsonpath={line}", content=content).splitlines()
        return {one for one, allowed in zip(asked, answers, strict=True) if allowed == "true"}

    def submit(self, *options: str, **changes: Any) -> Run:
        """Start the miniature, under a model name of its own, so that nothing of it lies in the store.

        Args:
            options: Further options of `submit`.
            changes: Keys laid over its configuration.
        """
        return self.submit_file(self.configuration(**changes), *options)

    def configuration(self, **changes: Any) -> Path:
        """A file with the miniature, under a name of its own, and keys laid over it."""
        unique = uuid.uuid4()
        settings = {"name": f"cluster-test-{unique.hex[:8]}", "seed": unique.int % 2**31}
        settings |= yaml.safe_load(MINIATURE.read_text()) | changes
        file = self.folder / f"{unique.hex}.yaml"
        file.write_text(yaml.safe_dump(settings))
        return file

    def command(self, *arguments: str) -> str:
        """What a command of `yolov8-nas` that speaks of the cluster says."""
        done = subprocess.run(self._command(*arguments), capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _command(self, *arguments: str) -> list[str]:
        access = ["--host", self.host, "--namespace", self.namespace]
        access += ["--token-file", str(self.token_file)] if self.token_file else []
        return [sys.executable, "-m", "pipelines.cli", *arguments, *access]

    def submit_file(self, file: Path, *options: str) -> Run:
        """Start what a file says, and follow it."""
        if cpu := os.environ.get(CPU_VARIABLE):
            pools = {
                pool_name(target): {"cpu": cpu} for target in RunConfig.load(file, ()).targets if not is_gpu(target)
            }
            room = ["--param", f"training_cpu={cpu}", "--param", f"target_pools={json.dumps(pools)}"]
            options = (*room, *options)  # what a test asks for comes after, and counts
        process = subprocess.Popen(
            self._command("submit", str(file), "--watch", "--poll", str(POLL), *options),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if found := re.search(r"/runs/details/(\S+)", line):
                self.runs.append(Run(found[1], process, RunConfig.load(file, ()), said))
                return self.runs[-1]
        raise AssertionError(f"nothing was submitted: {said}")

    def end(self, run: Run, within: float = RUN_WITHIN) -> int:
        """Wait for a run to end.

        Returns:
            The exit status of `submit --watch`; what it said is then the run's `output`.
        """
        said, _ = run.process.communicate(timeout=within)
        run.output += said
        return run.process.returncode

    def workflow(self, run: Run) -> Mapping[str, Any]:
        """Argo's workflow of a run, as far as the server knows it."""
        return self.server.workflow(run.id) or {}

    def steps(self, run: Run) -> dict[str, Step]:
        """The steps of a run by name; of two with one name, the one that began later."""
        return {step.name: step for step in steps(self.workflow(run), target_labels(run.config))}

    def wait_for(self, run: Run, name: str, state: str, within: float = RUN_WITHIN) -> Step:
        """Wait until a step of a run is in a state."""

        def look() -> Step | None:
            found = self.steps(run).get(name)
            return found if found and found.state == state else None

        step: Step = until(look, within, f"{name}: {state}")
        return step

    def cancel(self, run: Run) -> None:
        """End a run as the button of Kubeflow's UI does."""
        self.server.client.terminate_run(run.id)

    def pods(self, run: Run) -> dict[str, str]:
        """Phases of a run's pods, by name."""
        found = json.loads(self.kubectl("get", "pods", "-l", f"pipeline/runid={run.id}", "-o", "json"))["items"]
        return {pod["metadata"]["name"]: pod["status"]["phase"] for pod in found}

    def pod(self, run: Run, step: str, within: float = RUN_WITHIN) -> str:
        """The pod of a step, by the step's name in the pipeline, as soon as it runs."""

        def running() -> str:
            found = json.loads(self.kubectl("get", "pods", "-l", f"pipeline/runid={run.id}", "-o", "json"))["items"]
            for pod in found:
                node = pod["metadata"].get("annotations", {}).get("workflows.argoproj.io/node-name", "")
                inside = f".{step}." in node or f".{step}(" in node
                if inside and "-driver" not in node and pod["status"]["phase"] == "Running":
                    return str(pod["metadata"]["name"])
            return ""

        name: str = until(running, within, f"a pod of {step} runs", poll=1.0)
        return name

    def record(self, run: Run, name: str, store: str = STORE) -> Any:
        """A record of a run in a stage store on the volume, read by a pod that mounts it."""
        return json.loads(self.in_pod(f"cat {store}/runs/{run.id}/{name}"))

    def in_pod(self, script: str, labels: Mapping[str, str] | None = None) -> str:
        """What a shell script says in a pod like a step's: its image, account, volume and security."""
        from components.images import CPU
        from pipelines.pods import PULL_SECRET, STORE_CLAIM, STORE_PATH, UID

        name = f"cluster-test-{uuid.uuid4().hex[:8]}"
        confined = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        container = {
            "name": "main",
            "image": CPU,
            "command": ["sh", "-c", script],
            "securityContext": confined,
            "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"cpu": "500m", "memory": "512Mi"}},
            "volumeMounts": [{"name": "store", "mountPath": STORE_PATH}],
        }
        seccomp = {"type": "RuntimeDefault"}
        spec = {
            "serviceAccountName": "yolov8-nas-runner",
            "restartPolicy": "Never",
            "imagePullSecrets": [{"name": PULL_SECRET}],
            "securityContext": {"runAsUser": UID, "runAsGroup": UID, "runAsNonRoot": True, "seccompProfile": seccomp},
            "containers": [container],
            "volumes": [{"name": "store", "persistentVolumeClaim": {"claimName": STORE_CLAIM}}],
        }
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": dict(labels or {})},
            "spec": spec,
        }
        self.kubectl("apply", "-f", "-", content=json.dumps(pod))
        try:
            asked = ("get", "pod", name, "-o", "jsonpath={.status.phase}")
            phase = until(
                lambda: (it := self.kubectl(*asked)) in ("Succeeded", "Failed") and it, 300.0, f"pod {name} ends"
            )
            said = self.kubectl("logs", name)
            assert phase == "Succeeded", said
            return said
        finally:
            self.kubectl("delete", "pod", name, "--wait=false")

    def clean_up(self) -> None:
        """End what still runs."""
        for run in self.runs:
            run.process.terminate()
            if self.server.client.get_run(run.id).state not in (*ENDED, "CANCELING"):  # also one that was given up
                self.cancel(run)
            self.server.client.archive_run(run.id)
        self.runs.clear()


def until(look: Callable[[], Any], within: float, what: str, poll: float = POLL) -> Any:
    """Look until there is something.

    Raises:
        AssertionError: There was nothing in time.
    """
    end = time.monotonic() + within
    while not (found := look()):
        assert time.monotonic() < end, f"not within {within:g} s: {what}"
        time.sleep(poll)
    return found


@contextmanager
def cleaning(cluster: Cluster) -> Iterator[Cluster]:
    """A cluster in which nothing of the context is left to run."""
    try:
        yield cluster
    finally:
        cluster.clean_up()
