"""Runs and schedules on a server that speaks Kubeflow Pipelines' API, through kfp's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp_server import Cluster, serving
from typer.testing import CliRunner

from components import images
from pipelines import nodes
from pipelines.cli import app
from pipelines.client import Access, Server
from pipelines.submit import cron
from pipelines.watch import watch
from yolov8_nas.errors import InputError

T4 = {"hardware": "NVIDIA_T4", "runtime": "tensorrt", "precision": "int8", "constraints": ["latency<=2.5ms"]}
LIMITS = [f"latency_p{p}{scope}<=12345.678us" for p in (50, 90, 99) for scope in ("", "(with_nms)")]
LIMITS += ["throughput>=3.125fps", "throughput(with_nms)>=2.125fps", "memory<=90GiB", "params<=99.125M"]
LIMITS += ["power<=900W", "energy<=9000J", "flops<=99.125G"]
SETTINGS: dict[str, Any] = {"name": "line-3", "data": "s3://vision/line3.tar", "space": "yolov8n", "targets": [T4]}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "line-3.yaml"
    file.write_text(yaml.safe_dump(SETTINGS))
    return file


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cluster]:
    for kind in images.IMAGES:
        monkeypatch.setitem(images.IMAGES, kind, f"registry.example.com/{kind}@sha256:{'1' * 64}")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "no-kubeconfig"))
    for name in ("KF_PIPELINES_ENDPOINT", "KF_PIPELINES_SA_TOKEN_PATH", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    with serving(Cluster()) as running:
        yield running


def _invoke(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, f"{result.output}\n{result.exception!r}"
    return result.output


def test_what_somebody_else_makes_at_the_same_moment_is_taken(config: Path, cluster: Cluster) -> None:
    """Seen on Kubeflow Pipelines 2.17.0: of two submissions at once, the server answers one with 409."""
    _invoke("submit", config, "--host", cluster.host)
    cluster.unseen = {"pipelines", "versions", "experiments"}
    _invoke("submit", config, "--host", cluster.host)
    one, other = cluster.runs
    assert one["pipeline_version_reference"] == other["pipeline_version_reference"]
    assert one["experiment_id"] == other["experiment_id"]


def test_what_is_submitted_twice_is_uploaded_once(config: Path, cluster: Cluster) -> None:
    first = _invoke("submit", config, "--host", cluster.host, "--param", "training_gpus=4")
    second = _invoke("submit", config, "--host", cluster.host, "--set", "seed=7")
    assert len(cluster.pipelines) == len(cluster.versions) == len(cluster.uploads) == len(cluster.experiments) == 1
    assert "uploaded" in first and "was there" in second
    one, other = cluster.runs
    assert one["pipeline_version_reference"] == other["pipeline_version_reference"]
    assert one["pipeline_version_reference"]["pipeline_version_id"] == cluster.versions[0]["pipeline_version_id"]
    assert one["service_account"] == "yolov8-nas-runner"
    parameters = one["runtime_config"]["parameters"]
    assert parameters["training_gpus"] == "4" and parameters["store"] == "/store/stages"
    assert json.loads(parameters["config"])["targets"][0]["hardware"] == "NVIDIA_T4"
    assert f"{cluster.host}/#/runs/details/{one['run_id']}" in first
    assert b"schemaVersion" in cluster.uploads[0]
    tags = cluster.versions[0]["tags"]
    assert "-".join((tags["release"], tags["content"])) == cluster.versions[0]["display_name"]
    assert tags["image-target"] == "1" * 12
    assert all("." not in key and len(key) < 64 and len(value) < 64 for key, value in tags.items())


@pytest.mark.parametrize(("end", "status"), [("SUCCEEDED", 0), ("FAILED", 1)])
def test_watch_tells_each_step_once_and_ends_as_the_run(config: Path, cluster: Cluster, end: str, status: int) -> None:
    cluster.states = [
        ("PENDING", {}),
        ("RUNNING", {"open-run": "RUNNING", "root-driver": "SUCCEEDED"}),
        ("RUNNING", {"open-run": "RUNNING"}),
        (end, {"open-run": "SUCCEEDED", "close-run": end}),
    ]
    told = _invoke("submit", config, "--host", cluster.host, "--watch", "--poll", "0.05", status=status)
    assert told.count("Check and open the run: running") == 1
    assert told.count("Check and open the run: succeeded") == 1
    assert "driver" not in told
    assert f"run {end.lower()}" in told


class Workflow:
    """Argo's nodes for a run of two targets, as Argo v4.0 makes them under Kubeflow's settings.

    Names are paths, and each template may be tried again, so that a node of type Retry stands above its tries.
    """

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        root = self.add("", "run-x", "DAG")
        inner = self.task(root, "root")
        self.step(inner, "open-run")
        self.run = self.task(self.task(inner, "exit-handler-1"), "all-targets")
        self.step(self.run, "data-prep")
        self.branches = []
        for loop, name in (("for-loop-1", "probe-target"), ("for-loop-2", "target-branch")):
            above = self.task(self.run, loop)
            self.add(f"{above}.", "iteration-iterations", "TaskGroup")
            for number in range(2):
                item = self.add(f"{above}.", f"iteration-iterations({number}:{number})", "Retry")
                inside = self.task(self.task(self.add(item, "(0)", "DAG"), "iteration-item"), name)
                self.step(inside, "hw-probe")
                self.branches.append(inside)

    def add(self, above: str, name: str, kind: str, phase: str = "Running", message: str = "") -> str:
        whole = f"{above}{name}"
        display = whole.rpartition(".")[2]
        row = {"id": f"run-x-{len(self.nodes)}", "name": whole, "displayName": display, "type": kind, "phase": phase}
        started = f"2030-01-01T00:{len(self.nodes) // 60:02}:{len(self.nodes) % 60:02}Z"
        self.nodes.append({**row, "message": message, "startedAt": started, "templateName": "system-container-impl"})
        return whole

    def task(self, above: str, name: str, phase: str = "Running") -> str:
        """A pipeline in a pipeline, which its driver comes before."""
        self.driver(above, name)
        return self.add(self.add(f"{above}.", name, "Retry", phase), "(0)", "DAG", phase)

    def driver(self, above: str, name: str, phase: str = "Succeeded", message: str = "") -> None:
        self.add(self.add(f"{above}.", f"{name}-driver", "Retry", phase, message), "(0)", "Pod", phase, message)

    def step(self, above: str, name: str, *tries: tuple[str, str], phase: str = "Running") -> None:
        """A step, with the phase and the message of each of its pods."""
        self.driver(above, name)
        inner = self.add(
            self.add(self.add(f"{above}.", name, "Retry", phase), "(0)", "DAG", phase), ".executor", "Retry"
        )
        for number, (state, message) in enumerate(tries or (("Running", ""),)):
            self.add(inner, f"({number})", "Pod", state, message)


def _told(config: Path, cluster: Cluster, *looks: Workflow, end: str = "SUCCEEDED") -> list[str]:
    two = [T4, {"hardware": "cpu-2t", "constraints": ["latency<=9ms"]}]
    config.write_text(yaml.safe_dump({**SETTINGS, "targets": two}))
    cluster.states = [("RUNNING", look.nodes) for look in looks]
    cluster.states[-1] = (end, looks[-1].nodes)
    command = ("submit", config, "--host", cluster.host, "--watch", "--poll", "0.05")
    return _invoke(*command, status=int(end != "SUCCEEDED")).splitlines()


@pytest.mark.parametrize("packed", [False, True])
def test_watch_tells_steps_alone_and_which_targets_they_are(config: Path, cluster: Cluster, packed: bool) -> None:
    cluster.packed = packed
    told = [line for line in _told(config, cluster, Workflow(), Workflow()) if ": running" in line]
    assert sorted(told) == sorted(
        [
            "Check and open the run: running",
            "Prepare the dataset: running",
            *[f"Measure the device, {target}: running" for target in ("nvidia-t4-int8", "cpu-2t-fp32")] * 2,
        ]
    )


def test_watch_tells_what_the_scheduler_says_and_what_was_lost(config: Path, cluster: Cluster) -> None:
    why = "Unschedulable: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    waits, pulls, starts, runs, lost, again, failed = (Workflow() for _ in range(7))
    waits.step(waits.branches[2], "search", ("Pending", why))
    pulls.step(pulls.branches[2], "search", ("Pending", "ImagePullBackOff"))
    starts.step(starts.branches[2], "search", ("Pending", "PodInitializing"))
    runs.step(runs.branches[2], "search")
    lost.step(lost.branches[2], "search", ("Error", "pod deleted"), ("Pending", ""))
    again.step(again.branches[2], "search", ("Error", "pod deleted"), ("Running", ""))
    failed.step(
        failed.branches[2],
        "search",
        ("Error", "pod deleted"),
        ("Failed", "main: OOMKilled (exit code 137)"),
        phase="Failed",
    )
    failed.driver(failed.branches[3], "search", "Failed", "main: Error (exit code 1)")
    failed.driver(failed.run, "for-loop-3", "Failed", "main: Error (exit code 1)")
    looks = (waits, waits, pulls, waits, starts, runs, lost, again, failed)
    told = _told(config, cluster, *looks, end="FAILED")
    search = [line for line in told if line.startswith("Search networks, nvidia-t4-int8")]
    assert search[0] == f"Search networks, nvidia-t4-int8: waits ({why})"
    assert search[1].endswith(
        "waits (ImagePullBackOff; see that the registry has this digest, and the pull secret yolov8-nas-pull)"
    )
    assert search[2].endswith(": pending") and search[3].endswith(": running")
    assert "try 2; the one before was lost: pod deleted" in search[4]
    assert "failed (main: OOMKilled (exit code 137), after 2 tries; give it more memory" in search[5]
    assert "log: kubectl -n team logs run-x-system-container-impl-" in search[5] and len(search) == 6
    of_step, of_loop = [line for line in told if "Kubeflow's driver failed" in line]
    assert of_step.startswith("Search networks, cpu-2t-fp32: not begun") and "logs run-x-" in of_step
    assert of_loop.startswith("for-loop-3: not begun")


def test_watch_explains_what_comes_of_pipelines_that_argo_tries_again(config: Path, cluster: Cluster) -> None:
    workflow = Workflow()
    workflow.add(workflow.branches[2].removesuffix("(0)"), "(1)", "DAG")
    workflow.driver(workflow.branches[2], "search", "Failed", "main: Error (exit code 1)")
    told = _told(config, cluster, workflow, end="FAILED")
    assert any("lost more often than it is tried again" in line and "submit the run again" in line for line in told)


@pytest.mark.parametrize(
    "why",
    [
        "Unschedulable: 0/3 nodes are available: 3 Insufficient cpu.",
        'pods "x-1" is forbidden: exceeded quota: yolov8-nas, requested: requests.cpu=4000',
    ],
)
def test_watch_does_not_wait_for_ever_for_a_node(why: str, config: Path, cluster: Cluster) -> None:
    workflow = Workflow()
    workflow.step(workflow.branches[3], "search", ("Pending", why))
    cluster.states = [("RUNNING", workflow.nodes)]
    cluster.runs.append({"run_id": "run"})
    said: list[str] = []
    with pytest.raises(InputError, match=r"Search networks, cpu: no place for it in 0 hours \(") as told:
        watch(Server(Access(cluster.host)), "run", ["t4", "cpu"], said.append, 0.01, unschedulable=0.0)
    assert why in str(told.value)
    queued = Workflow()
    queued.step(queued.branches[3], "search", ("Pending", ""))  # as under Kueue, whose word Argo does not pass on
    cluster.states = [("RUNNING", queued.nodes)] * 3 + [("SUCCEEDED", queued.nodes)]
    assert watch(Server(Access(cluster.host)), "run", [], said.append, 0.01, unschedulable=0.0) == "SUCCEEDED"


def test_watch_does_not_wait_for_ever_for_a_run_that_kubeflow_has_lost(config: Path, cluster: Cluster) -> None:
    workflow = Workflow()
    workflow.step(f"{workflow.run}.exit-handler-1.onExit(0)", "close-run", phase="Succeeded")
    cluster.states = [("RUNNING", workflow.nodes)]
    cluster.runs.append({"run_id": "run"})
    with pytest.raises(InputError, match=r"the last step of run run has ended, .* its workflow controller has lost it"):
        watch(Server(Access(cluster.host)), "run", [], lambda _: None, 0.01, patience=0.0)


def test_watch_goes_on_when_the_server_comes_back(config: Path, cluster: Cluster) -> None:
    cluster.states = [("RUNNING", {"open-run": "RUNNING"}), ("SUCCEEDED", {"open-run": "SUCCEEDED"})]
    cluster.fails["/runs/"] = [(503, "restarting"), (0, ""), (401, "expired"), (502, "bad gateway")]

    told = _invoke("submit", config, "--host", cluster.host, "--watch", "--poll", "0.05")
    assert told.count("the run goes on, and is asked for again") == 1
    assert "Check and open the run: succeeded" in told and "run succeeded" in told
    assert cluster.fails["/runs/"] == []


def test_watch_gives_up_where_a_server_stays_away_or_has_no_such_run(config: Path, cluster: Cluster) -> None:
    server = Server(Access(cluster.host))
    cluster.fails["/runs/"] = [(503, "away")] * 9
    with pytest.raises(InputError, match="503"):
        watch(server, "run", [], lambda _: None, 0.01, patience=0.0)
    cluster.fails["/runs/"] = [(404, "gone")] * 2
    said: list[str] = []
    with pytest.raises(InputError, match="not found"):
        watch(server, "run", [], said.append, 0.01)
    assert said == []


def test_dry_run_shows_everything_and_sends_nothing(config: Path, cluster: Cluster) -> None:
    shown = yaml.safe_load(_invoke("submit", config, "--host", cluster.host, "--dry-run", "--param", "budget=0.1"))
    assert cluster.log == []
    assert shown["parameters"]["config"]["data"] == SETTINGS["data"]
    assert shown["parameters"]["budget"] == 0.1
    (target,) = shown["targets"]
    assert target["gpus"] == "1"
    assert "Tesla-T4" in json.dumps(target["node_affinity"])
    assert shown["version"].startswith("0.")


def test_a_schedule_is_created_once_and_replaced_when_something_changes(config: Path, cluster: Cluster) -> None:
    command = ("schedule", config, "--host", cluster.host, "--cron")
    assert "created, 0 0 3 * * 1" in _invoke(*command, "0 3 * * 1")
    assert "unchanged" in _invoke(*command, "0 3 * * 1")
    (only,) = cluster.recurring
    assert only["trigger"]["cron_schedule"]["cron"] == "0 0 3 * * 1"
    assert only["no_catchup"] is True and str(only["max_concurrency"]) == "1"
    assert "replaced" in _invoke(*command, "30 2 * * *")
    assert "replaced" in _invoke(*command, "30 2 * * *", "--set", "seed=3")
    assert "created" in _invoke(*command, "30 2 * * *", "--name", "another")
    assert [row["display_name"] for row in cluster.recurring] == ["line-3", "another"]
    assert only["recurring_run_id"] not in [row["recurring_run_id"] for row in cluster.recurring]


def test_a_server_for_several_users(config: Path, cluster: Cluster, tmp_path: Path) -> None:
    cluster.multi_user, cluster.token = True, "secret-token"
    token = tmp_path / "token"
    token.write_text("secret-token\n")
    command = ("submit", config, "--host", cluster.host, "--token-file", token)
    assert "name your namespace" in _invoke(*command, status=2)
    assert "not allowed" in _invoke(*command, "--namespace", "others", status=2)
    shown = _invoke(*command, "--namespace", "team")
    assert cluster.experiments[0]["namespace"] == cluster.pipelines[0]["namespace"] == "team"
    assert "secret-token" not in shown


def test_a_token_that_is_not_taken(config: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.token = "right"
    command = ("submit", config, "--host", cluster.host)
    assert "not authenticated" in _invoke(*command, status=2)
    monkeypatch.setenv("KFP_TOKEN", "right")
    _invoke(*command, "--token-env", "KFP_TOKEN")
    assert "empty" in _invoke(*command, "--token-env", "NO_SUCH_TOKEN", status=2)
    assert "no such file" in _invoke(*command, "--ca", "missing.pem", status=2)


def test_a_token_mounted_in_a_pod_is_used(
    config: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cluster.token = "mounted"
    (tmp_path / "token").write_text("mounted")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", cluster.host)
    _invoke("submit", config)


def test_an_experiment_that_is_named_must_be_there(config: Path, cluster: Cluster) -> None:
    command = ("submit", config, "--host", cluster.host, "--experiment", "typo")
    assert "no experiment 'typo'" in _invoke(*command, status=2)
    assert cluster.runs == cluster.versions == []
    _invoke(*command, "--create-experiment")
    assert cluster.runs[0]["experiment_id"] == cluster.experiments[0]["experiment_id"]


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("http://127.0.0.1:9", "not reachable"),
        ("localhost:8080", "write the whole address"),
        ("https:{address}", "TLS"),
        ("http:{address}/elsewhere", "no Kubeflow Pipelines at this address"),
        (None, "no Kubeflow server is named"),
    ],
)
def test_hosts_that_are_none(config: Path, cluster: Cluster, host: str | None, told: str) -> None:
    address = cluster.host.removeprefix("http:")
    output = _invoke("submit", config, *(("--host", host.format(address=address)) if host else ()), status=2)
    assert told in output
    assert len(output.strip().splitlines()) == 1


def test_a_server_that_breaks_is_told_in_one_line(config: Path, cluster: Cluster) -> None:
    cluster.refuse["/runs"] = (500, "database is locked")
    output = _invoke("submit", config, "--host", cluster.host, status=2)
    assert "cannot start a run: the server answered 500" in output and "database is locked" in output
    assert len(output.strip().splitlines()[-1:]) == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"data": "datasets/line3"}, "data = 'datasets/line3' is a path of this machine"),
        ({"store": "/home/me/store"}, "store = '/home/me/store' is a path of this machine"),
        ({"tracking": {"uri": "sqlite:////home/me/mlflow.db"}}, "tracking.uri"),
        ({"supernet": {"weights": "yolov8n.pt"}}, "supernet.weights"),
        ({"targets": [{**T4, "hardware": "NVIDIA_T5"}]}, "so its nodes are unknown"),
        ({"store": "gs://bucket/store"}, "gs://bucket/store: no place for a stage store"),
        ({"store": "s3://"}, "names no bucket"),
        ({"data": "gs://bucket/data.tar"}, "gs://bucket/data.tar: addresses of this kind are not read"),
        ({"data": "http://server/data.tar"}, "give an https:// address"),
        ({"data": "https:///data.tar"}, "names no server"),
        ({"tracking": {"uri": "file:///srv/mlruns"}}, "can't be kept at file://"),
        ({"tracking": {"uri": "mlruns"}}, "tracking.uri = mlruns: give the address"),
        ({"targets": [{**T4, "constraints": LIMITS}]}, "make an alias of up to"),
    ],
)
def test_what_a_cluster_cannot_run(config: Path, cluster: Cluster, change: dict[str, Any], told: str) -> None:
    config.write_text(yaml.safe_dump({**SETTINGS, **change}))
    assert told in _invoke("submit", config, "--host", cluster.host, status=2)
    assert cluster.log == []


@pytest.mark.parametrize(
    ("parameter", "told"),
    [
        ("gpus=4", "write NAME=VALUE with one of budget, constraints"),
        ("config=x", "write NAME=VALUE"),
        ("targets=NVIDIA_T4", "targets is a list"),
        ("target_pools={nvidia-a10: {cpu: 3}}", "no target runs in 'nvidia-a10'"),
        ("target_pools={nvidia-t4: {cpus: 3}}", "give a mapping with some of"),
        ("target_pools={nvidia-t4: {memory: 12 GB}}", "no quantity of Kubernetes"),
        ("budget=0", "give a positive number"),
        ("precision=int4", "precision"),
        ("training_labels={pool: a/b}", "'a/b', the value of the label pool, has other letters"),
        ("training_labels={a/b/c: x}", "the label 'a/b/c' has more than one slash"),
        ("training_labels={-pool: x}", "the label '-pool' is no name"),
        ("training_labels={Nvidia.com/gpu: x}", "no domain of small letters"),
        ("training_labels={pool: true}", "the label pool is True, no text; put it in quotes"),
        ("training_labels={pool: " + "x" * 64 + "}", "has 64 letters"),
        ("training_labels={" + "x" * 64 + ": y}", "up to 63 letters"),
        ("training_labels={pool: [a, b]}", "pool has 2 values; give one"),
        ("target_pools={nvidia-t4: {node_labels: {pool: [a, b/c]}}}", "'b/c', the value of the label pool"),
        ("target_pools={nvidia-t4: {node_labels: {a/b/c: x}}}", "more than one slash"),
        ("target_pools={nvidia-t4: {node_labels: pool}}", "node_labels = 'pool': give a mapping"),
        ("target_pools={nvidia-t4: {gpus: one}}", "gpus = 'one'"),
        ("target_pools={nvidia-t4: {cpu: 0}}", "no quantity"),
        ("target_pools={nvidia-t4: {tolerations: [{key: a/b/c}]}}", "more than one slash"),
        ("tolerations=[{key: gpu, operator: Is}]", "operator 'Is': use Exists or Equal"),
        ("tolerations=[{key: gpu, effect: NoRun}]", "effect 'NoRun'"),
        ("tolerations=[{key: gpu, operator: Exists, value: x}]", "takes no value"),
        ("tolerations=[{operator: Equal}]", "has no key"),
        ("tolerations=[gpu]", "give a mapping with some of key"),
        ("training_cpu=seven", "training_cpu = 'seven' is no quantity"),
        ("training_memory=28 GB", "training_memory = '28 GB' is no quantity"),
        ("training_nodes=0", "training_nodes"),
        ("store=gs://bucket/x", "no place for a stage store"),
    ],
)
def test_parameters_that_are_none(config: Path, cluster: Cluster, parameter: str, told: str) -> None:
    output = _invoke("submit", config, "--host", cluster.host, "--param", parameter, status=2)
    assert told in output and len(output.splitlines()) == 1
    assert cluster.log == []


@pytest.mark.parametrize(
    ("option", "value"), [("--service-account", "Runner 1"), ("--namespace", "a/b"), ("--namespace", "x" * 300)]
)
def test_names_that_kubernetes_refuses(config: Path, cluster: Cluster, option: str, value: str) -> None:
    output = _invoke("submit", config, "--host", cluster.host, option, value, status=2)
    assert option in output and "no name in Kubernetes" in output
    assert cluster.log == []


def test_images_by_tag_are_refused(config: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(images.IMAGES, "target", "registry.example.com/target:latest")
    assert "image target: not named by digest" in _invoke("submit", config, "--host", cluster.host, status=2)
    assert cluster.versions == []


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("0 3 * *", "4 fields"),
        ("0 25 * * *", "hour '25': is out of range"),
        ("0 3 * FOO *", "month 'FOO': is unknown"),
        ("0 3 9-2 * *", "day '9-2': ends before it begins"),
        ("*/0 3 * * *", "minute '*/0': steps by nothing"),
        ("0 3 * * mon-", "does not parse"),
        ("0 3 31 2 *", "never comes"),
        ("0 3 30,31 FEB *", "never comes"),
        ("0 0 3 31 4,6,9,11 ?", "never comes"),
        ("0 3 30/1 2 *", "never comes"),
    ],
)
def test_cron_that_does_not_parse(expression: str, told: str) -> None:
    with pytest.raises(InputError) as error:
        cron(expression)
    assert told in str(error.value)


@pytest.mark.parametrize("expression", ["0 3 29 2 *", "0 3 31 2 1", "0 3 31 2,3 *", "0 3 */31 2 *"])
def test_cron_that_comes_seldom(expression: str) -> None:
    assert cron(expression).startswith("0 0 3")


@pytest.mark.parametrize("expression", ["0 3 * * 1", "*/15 8-17 1,15 JAN-MAR mon-fri", "0 0 3 ? * 2-6", "30 0 0 * * *"])
def test_cron_that_parses(expression: str) -> None:
    assert len(cron(expression).split()) == 6


def test_node_labels_are_compared_where_the_cluster_lists_its_nodes(
    config: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kubernetes

    class Core:
        def list_node(self, **_: Any) -> Any:
            labels = {"nvidia.com/gpu.product": "NVIDIA-A10"}
            node = kubernetes.client.V1Node(metadata=kubernetes.client.V1ObjectMeta(labels=labels))
            return kubernetes.client.V1NodeList(items=[node])

    monkeypatch.setattr(kubernetes.config, "load_kube_config", lambda: None)
    monkeypatch.setattr(kubernetes.client, "CoreV1Api", Core)
    output = _invoke("submit", config, "--host", cluster.host, status=2)
    assert "none of the 1 nodes has nvidia.com/gpu.product" in output
    assert "there is nvidia.com/gpu.product = NVIDIA-A10" in output
    command = ("submit", config, "--host", cluster.host, "--param", "training_labels={zone: a}")
    assert "training_labels" in _invoke(*command, status=2)
    assert nodes.check((), {"nvidia.com/gpu.product": "NVIDIA-A10"}) is None
