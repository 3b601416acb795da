"""What is applied to a cluster: restricted pods, pinned images, services, policies and secrets that fit together."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "manifests"))  # scripts, not packages
sys.path.insert(0, str(Path(__file__).parents[1] / "images"))

import build
import render
import servers
from render import ManifestError, Object

from components import placement
from pipelines import pods

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(render.kubectl() is None, reason="kubectl, which renders them, is not installed")

DIGEST = "sha256:" + "0123456789abcdef" * 4
CLUSTER_SCOPED = {
    "Namespace",
    "PriorityClass",
    "ClusterQueue",
    "ResourceFlavor",
    "WorkloadPriorityClass",
}
STEP = {"pipelines.kubeflow.org/v2_component": "true"}
"""What Kubeflow Pipelines puts on the pod of each step."""
TRAINING = {"jobset.sigs.k8s.io/jobset-name": "supernet"}
"""What JobSet puts on the pods of a TrainJob."""


@cache
def rendered(overlay: str) -> list[Object]:
    """The objects of an overlay."""
    return render.objects(render.kustomize(render.HERE / "overlays" / overlay))


def of_kind(overlay: str, kind: str) -> dict[str, Object]:
    """Objects of a kind, by name."""
    return {found["metadata"]["name"]: found for found in rendered(overlay) if found["kind"] == kind}


def pod_templates(overlay: str) -> Iterator[tuple[str, Object]]:
    """Name and pod template of everything that makes pods."""
    for found in rendered(overlay):
        spec = found.get("spec", {})
        if template := spec.get("jobTemplate", {}).get("spec", spec).get("template"):
            yield f"{found['kind']} {found['metadata']['name']}", template


@pytest.fixture(params=render.OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    """Each overlay in turn."""
    name: str = request.param
    return name


def test_objects_fit_the_schemas_of_kubernetes(overlay: str) -> None:
    unchecked = {line.split()[0] for line in render.check(rendered(overlay), {})}
    kueue = {"ClusterQueue", "LocalQueue", "ResourceFlavor", "WorkloadPriorityClass"}
    prometheus = {"PrometheusRule", "ServiceMonitor"}
    assert unchecked == (kueue | prometheus if overlay == "gpu-cluster" else set())
    assert list(render.check(rendered(overlay), render.crd_schemas(render.DEFINITIONS))) == []


def test_a_field_that_does_not_exist_is_named() -> None:
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"port": 1}}
    with pytest.raises(ManifestError, match=r"Service a: spec: .*'port' was unexpected"):
        list(render.check([service], {}))


def test_custom_resources_are_held_against_their_own_definitions(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"spec": {"type": "object", "properties": {"size": {"type": "integer"}}}}}
    definition = {
        "spec": {
            "group": "example.com",
            "names": {"kind": "Thing"},
            "versions": [{"name": "v1", "schema": {"openAPIV3Schema": _with_metadata(schema)}}],
        }
    }
    (tmp_path / "crds.yaml").write_text(json.dumps({"kind": "List", "items": [definition]}))
    schemas = render.crd_schemas(tmp_path)
    thing = {"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "a"}, "spec": {"size": 1}}
    assert list(render.check([thing], schemas)) == []
    with pytest.raises(ManifestError, match=r"Thing a: spec: .*'sise' was unexpected"):
        list(render.check([{**thing, "spec": {"sise": 1}}], schemas))


def _with_metadata(schema: Object) -> Object:
    known = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}
    return {**schema, "properties": {**schema["properties"], **known}}


def test_every_object_names_its_namespace(overlay: str) -> None:
    for found in rendered(overlay):
        namespace = found["metadata"].get("namespace")
        if found["kind"] in CLUSTER_SCOPED:
            assert namespace is None, found["metadata"]
        else:
            assert namespace in ("yolov8-nas", "gpu-operator"), found["metadata"]


def test_the_namespace_enforces_the_restricted_profile(overlay: str) -> None:
    labels = of_kind(overlay, "Namespace")["yolov8-nas"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_every_pod_keeps_the_restricted_profile(overlay: str) -> None:
    templates = list(pod_templates(overlay))
    of_all = {"Deployment mlflow", "Job yolov8-nas-store-owner", "StatefulSet postgres"}
    of_clusters = {"CronJob postgres-backup", "Job mlflow-accounts"}
    assert {name for name, _ in templates} == of_all | (of_clusters if overlay == "gpu-cluster" else set())
    for name, template in templates:
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] > 0, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["automountServiceAccountToken"] is False, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        for volume in pod.get("volumes", []):
            assert volume.keys() & {"emptyDir", "persistentVolumeClaim", "configMap", "secret"}, name
        for container in pod["containers"] + pod.get("initContainers", []):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert "/tmp" in mounted, f"{name}: nothing can be written to /tmp"


def test_every_container_has_requests_and_limits(overlay: str) -> None:
    for name, template in pod_templates(overlay):
        for container in template["spec"]["containers"] + template["spec"].get("initContainers", []):
            for bound in ("requests", "limits"):
                assert container["resources"][bound].keys() == {"cpu", "memory"}, name


def test_no_image_floats(overlay: str) -> None:
    text = render.kustomize(render.HERE / "overlays" / overlay)
    images = {container["image"] for _, pod in pod_templates(overlay) for container in pod["spec"]["containers"]}
    assert images == {"yolov8-nas.invalid/mlflow:unset", "yolov8-nas.invalid/postgres:unset"}
    known = {"mlflow": f"registry.example.com/mlflow@{DIGEST}", "postgres": "postgres:17"}
    filled, unset = render.fill(text, known)
    assert unset == ["postgres"], "a tag is no pin"
    assert known["mlflow"] in filled and "postgres:17" not in filled
    filled, unset = render.fill(text, {**known, "postgres": f"postgres:17@{DIGEST}"})
    assert not unset and ".invalid/" not in filled


def test_what_is_pinned_for_the_manifests_is_built_or_pulled() -> None:
    needed = set(render.PLACEHOLDER.findall(render.kustomize(render.HERE / "overlays" / "gpu-cluster")))
    assert needed <= set(build.DOCKERFILES) | set(json.loads(build.PINS.read_text()))
    assert set(build.DOCKERFILES) > {"cpu", "training", "target"}


def test_services_find_pods_and_ports(overlay: str) -> None:
    templates = [template for _, template in pod_templates(overlay)]
    services = of_kind(overlay, "Service")
    assert services
    for name, service in services.items():
        selector = service["spec"]["selector"]
        chosen = [template for template in templates if selector.items() <= template["metadata"]["labels"].items()]
        assert len(chosen) == 1, f"service {name} selects {len(chosen)} workloads"
        named = {port["name"] for container in chosen[0]["spec"]["containers"] for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= named, name


def test_workloads_select_their_own_pods(overlay: str) -> None:
    for found in rendered(overlay):
        if found["kind"] in ("Deployment", "StatefulSet"):
            wanted = found["spec"]["selector"]["matchLabels"]
            assert wanted.items() <= found["spec"]["template"]["metadata"]["labels"].items()


def test_probes_ask_ports_that_are_there(overlay: str) -> None:
    mlflow = of_kind(overlay, "Deployment")["mlflow"]["spec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in mlflow["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert mlflow[probe]["httpGet"]["port"] in ports
    assert f"--port={ports['http']}" in mlflow["args"]


def test_the_tracking_uri_is_a_name_that_mlflow_answers_to(overlay: str) -> None:
    uri = of_kind(overlay, "ConfigMap")["yolov8-nas-config"]["data"]["MLFLOW_TRACKING_URI"]
    host = re.fullmatch(r"https://(.*)" if overlay == "gpu-cluster" else r"http://(.*)", uri)
    assert host
    mlflow = of_kind(overlay, "Deployment")["mlflow"]["spec"]["template"]["spec"]["containers"][0]
    (allowed,) = (each for each in mlflow["args"] if each.startswith("--allowed-hosts="))
    assert host[1] in allowed.partition("=")[2].split(",")
    name, port = host[1].split(":")
    service = of_kind(overlay, "Service")["mlflow"]
    assert name == f"mlflow.{service['metadata']['namespace']}.svc"
    assert int(port) in {each["port"] for each in service["spec"]["ports"]}


def test_the_database_is_where_mlflow_looks_for_it(overlay: str) -> None:
    mlflow = of_kind(overlay, "Deployment")["mlflow"]["spec"]["template"]["spec"]["containers"][0]
    environment = {each["name"]: each.get("value") for each in mlflow["env"]}
    service = of_kind(overlay, "Service")["postgres"]
    host = f"postgres.{service['metadata']['namespace']}.svc:{service['spec']['ports'][0]['port']}"
    assert environment["MLFLOW_BACKEND_STORE_URI"] == f"postgresql+psycopg2://mlflow@{host}/mlflow"
    assert re.search(r"^psycopg2-binary==", (ROOT / "images" / "mlflow.txt").read_text(), re.M)


def _allows(rules: list[Object], direction: str, labels: dict[str, str], port: int, protocol: str = "TCP") -> bool:
    """Whether rules of a policy let pods of these labels in the same namespace through on a port."""
    for rule in rules:
        ports = rule.get("ports")
        if ports and not any(each["port"] == port and each.get("protocol", "TCP") == protocol for each in ports):
            continue
        for peer in rule.get(direction, [{}]):
            if peer.keys() == {"podSelector"} and _selects(peer["podSelector"], labels):
                return True
    return False


def _selects(selector: Object, labels: dict[str, str]) -> bool:
    required = selector.get("matchLabels", {}).items() <= labels.items()
    return required and all(each["key"] in labels for each in selector.get("matchExpressions", []))


def _lets(overlay: str, client: dict[str, str], server: dict[str, str], port: int) -> bool:
    """Whether the policies of both sides let a client talk to a server in the namespace."""
    policies = [policy["spec"] for policy in of_kind(overlay, "NetworkPolicy").values()]
    out = [rule for each in policies if _selects(each["podSelector"], client) for rule in each.get("egress", [])]
    into = [rule for each in policies if _selects(each["podSelector"], server) for rule in each.get("ingress", [])]
    return _allows(out, "to", server, port) and _allows(into, "from", client, port)


def test_policies_let_through_what_is_needed_and_nothing_else(overlay: str) -> None:
    mlflow, postgres = ({"app.kubernetes.io/name": name} for name in ("mlflow", "postgres"))
    assert _lets(overlay, STEP, mlflow, 5000)
    assert _lets(overlay, mlflow, postgres, 5432)
    assert not _lets(overlay, STEP, postgres, 5432)
    assert not _lets(overlay, {"app": "stranger"}, mlflow, 5000)
    assert not _lets(overlay, mlflow, STEP, 8080)
    cluster = overlay == "gpu-cluster"
    assert _lets(overlay, TRAINING, TRAINING, 29500) == cluster
    backup, accounts = ({"app.kubernetes.io/name": name} for name in ("postgres-backup", "mlflow-accounts"))
    assert _lets(overlay, backup, postgres, 5432) == cluster and not _lets(overlay, backup, mlflow, 5000)
    assert _lets(overlay, accounts, mlflow, 5000) == cluster and not _lets(overlay, accounts, postgres, 5432)


def _leads_to(overlay: str, client: dict[str, str]) -> set[tuple[str, int]]:
    """Where the policies let a client go to beside pods of its own namespace: a network or a namespace, and a port."""
    found = set()
    for policy in of_kind(overlay, "NetworkPolicy").values():
        if not _selects(policy["spec"]["podSelector"], client):
            continue
        for rule in policy["spec"].get("egress", []):
            for peer in rule.get("to", []):
                selector = peer.get("namespaceSelector", {}).get("matchLabels", {})
                place = peer.get("ipBlock", {}).get("cidr") or selector.get("kubernetes.io/metadata.name")
                if place:
                    assert rule.get("ports"), f"{policy['metadata']['name']}: every port of {place}"
                    found.update((place, port["port"]) for port in rule["ports"])
    return found


def test_a_cluster_leads_out_to_named_destinations_alone() -> None:
    named = {policy["metadata"]["name"] for policy in of_kind("gpu-cluster", "NetworkPolicy").values()}
    for client, ways in (
        (STEP, {"steps-to-kubernetes-api", "steps-to-data", "steps-to-store"}),
        (TRAINING, {"training-to-store"}),
        ({"app.kubernetes.io/name": "mlflow"}, {"mlflow-to-artifacts"}),
    ):
        assert ways <= named
        networks = {place for place, _ in _leads_to("gpu-cluster", client) if "/" in place}
        assert len(networks) == len(ways) and not any(network.endswith("/0") for network in networks)
        assert ("0.0.0.0/0", 443) in _leads_to("single-node", client) or client == TRAINING
    for stranger in ("postgres", "postgres-backup", "mlflow-accounts"):
        assert {place for place, _ in _leads_to("gpu-cluster", {"app.kubernetes.io/name": stranger})} == {"kube-system"}


def test_pods_of_a_train_job_reach_the_store_wherever_steps_reach_it() -> None:
    """Of steps and of a job's pods alike: S3 in Kubeflow's namespace, and the store's bucket outside."""
    ports = {port for place, port in _leads_to("gpu-cluster", TRAINING) if place == "kubeflow"}
    assert ports == {8333, 9000}
    assert {("kubeflow", port) for port in ports} <= _leads_to("gpu-cluster", STEP)
    outside = {way for way in _leads_to("gpu-cluster", TRAINING) if "/" in way[0]}
    assert outside and outside <= _leads_to("gpu-cluster", STEP)


def test_an_overlay_is_not_written_before_its_destinations_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["render.py", "--out", str(tmp_path)])
    monkeypatch.setattr(render, "OVERLAYS", ("gpu-cluster",))
    monkeypatch.setattr(render, "check", lambda rendered, schemas: iter(()))
    monkeypatch.setattr(render, "pinned_images", lambda: dict.fromkeys(("mlflow", "postgres"), f"x@{DIGEST}"))
    text = render.kustomize(render.HERE / "overlays" / "gpu-cluster")
    monkeypatch.setattr(render, "kustomize", lambda folder: text)
    assert render.main() == 0
    told = capsys.readouterr().out
    assert "not written: mlflow-to-artifacts, steps-to-data, steps-to-kubernetes-api" in told
    assert "destinations.yaml" in told and not list(tmp_path.iterdir())
    text = text.replace("192.0.2.", "198.18.0.")
    assert render.main() == 0 and (tmp_path / "gpu-cluster.yaml").is_file()


def test_nothing_passes_without_a_policy(overlay: str) -> None:
    deny = of_kind(overlay, "NetworkPolicy")["default-deny"]["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_policies_select_pods_that_are_there(overlay: str) -> None:
    labels = [template["metadata"]["labels"] for _, template in pod_templates(overlay)]
    labels += [STEP, TRAINING]
    for name, policy in of_kind(overlay, "NetworkPolicy").items():
        assert any(_selects(policy["spec"]["podSelector"], each) for each in labels), name


def test_roles_are_bound_to_accounts_that_exist_and_ask_for_no_more_than_they_name(overlay: str) -> None:
    accounts, roles = of_kind(overlay, "ServiceAccount"), of_kind(overlay, "Role")
    for binding in of_kind(overlay, "RoleBinding").values():
        assert binding["roleRef"]["name"] in roles
        assert all(subject["name"] in accounts for subject in binding["subjects"])
    for name, role in roles.items():
        for rule in role["rules"]:
            assert "*" not in rule["apiGroups"] + rule["resources"] + rule["verbs"], name
            if "secrets" in rule["resources"]:
                assert rule["resourceNames"] and rule["verbs"] == ["get"], name
    makers = {
        subject["name"]
        for binding in of_kind(overlay, "RoleBinding").values()
        for subject in binding["subjects"]
        if any("trainjobs" in rule["resources"] for rule in roles[binding["roleRef"]["name"]]["rules"])
    }
    assert makers == ({placement.TRAINJOBS_ACCOUNT} if overlay == "gpu-cluster" else set()), (
        "no account that runs steps"
    )
    for bound in of_kind(overlay, "RoleBinding").values():
        assert placement.NODE_ACCOUNT not in {subject["name"] for subject in bound["subjects"]}
    assert not {"ClusterRole", "ClusterRoleBinding"} & {found["kind"] for found in rendered(overlay)}


def test_pods_fit_into_quota_and_limits(overlay: str) -> None:
    hard = of_kind(overlay, "ResourceQuota")["yolov8-nas"]["spec"]["hard"]
    assert {"requests.cpu", "requests.memory", "limits.cpu", "limits.memory", "requests.nvidia.com/gpu"} <= hard.keys()
    assert "requests.ephemeral-storage" in hard
    (limits,) = of_kind(overlay, "LimitRange")["yolov8-nas"]["spec"]["limits"]
    for key in ("default", "defaultRequest"):  # or the quota would refuse Kubeflow's own containers
        assert limits[key].keys() == {"cpu", "memory", "ephemeral-storage"}


def test_the_pipeline_finds_what_it_names(overlay: str) -> None:
    assert pods.STORE_CLAIM in of_kind(overlay, "PersistentVolumeClaim")
    settings = of_kind(overlay, "ConfigMap")[pods.CONFIG_MAP]["data"]
    others = {"MLFLOW_ARTIFACTS_DESTINATION", "PGSSLMODE"}  # MLflow's own
    assert settings.keys() - others <= set(pods.CONFIG_KEYS)
    if certificate := settings.get("MLFLOW_TRACKING_SERVER_CERT_PATH"):
        assert Path(certificate) == Path(pods.CA_PATH) / "ca.crt"
    runner = of_kind(overlay, "ServiceAccount")["yolov8-nas-runner"]
    assert runner["imagePullSecrets"] == [{"name": pods.PULL_SECRET}]
    owner = of_kind(overlay, "Job")["yolov8-nas-store-owner"]["spec"]["template"]["spec"]
    assert owner["securityContext"]["fsGroup"] == pods.UID
    assert f"useradd --uid {pods.UID} --gid {pods.UID}" in (ROOT / "images" / "Dockerfile").read_text()
    names = set(of_kind(overlay, "PriorityClass"))
    assert names == {"yolov8-nas-training", "yolov8-nas-target"}


def _asked_by_default(limits: dict[str, Any]) -> set[str]:
    """What a LimitRange lets each container ask for that says nothing of it."""
    return {
        key for row in limits["spec"]["limits"] for key in {**row.get("defaultRequest", {}), **row.get("default", {})}
    }


def test_queues_lead_to_flavors_of_gpus_that_the_catalogue_knows() -> None:
    from yolov8_nas.device import catalogue

    queues, flavors = of_kind("gpu-cluster", "ClusterQueue"), of_kind("gpu-cluster", "ResourceFlavor")
    asked = {key for limit in of_kind("gpu-cluster", "LimitRange").values() for key in _asked_by_default(limit)}
    assert "ephemeral-storage" in asked
    for queue in of_kind("gpu-cluster", "LocalQueue").values():
        (group,) = queues[queue["spec"]["clusterQueue"]]["spec"]["resourceGroups"]
        assert asked | {"cpu", "memory", "nvidia.com/gpu"} <= set(group["coveredResources"]), "Kueue would admit no pod"
        assert {flavor["name"] for flavor in group["flavors"]} == flavors.keys()
        for flavor in group["flavors"]:
            assert [resource["name"] for resource in flavor["resources"]] == group["coveredResources"]
    for name, gpu in (("t4", "NVIDIA_T4"), ("a10", "NVIDIA_A10"), ("a100", "NVIDIA_A100")):
        known = catalogue.find(gpu)
        assert known is not None
        product = flavors[f"yolov8-nas-{name}"]["spec"]["nodeLabels"]["nvidia.com/gpu.product"]
        assert product in {label for one in known.specifications for label in one.labels}
    assert set(of_kind("gpu-cluster", "WorkloadPriorityClass")) == set(of_kind("gpu-cluster", "PriorityClass"))


def test_alerts_read_metrics_that_are_collected() -> None:
    groups = of_kind("gpu-cluster", "PrometheusRule")["yolov8-nas"]["spec"]["groups"]
    used = {name for group in groups for rule in group["rules"] for name in re.findall(r"DCGM_FI_\w+", rule["expr"])}
    config = of_kind("gpu-cluster", "ConfigMap")["yolov8-nas-dcgm-metrics"]["data"]["dcgm-metrics.csv"]
    collected = {line.partition(",")[0] for line in config.splitlines() if not line.startswith("#")}
    assert used and used <= collected


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, which knows PromQL, is not installed")
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    rules = of_kind("gpu-cluster", "PrometheusRule")["yolov8-nas"]["spec"]
    (tmp_path / "rules.yaml").write_text(json.dumps(rules))
    shutil.copy(render.HERE / "components" / "monitoring" / "alerts.test.yaml", tmp_path)
    done = subprocess.run(
        ["promtool", "test", "rules", "alerts.test.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_secrets_are_made_of_files_that_are_not_committed(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    shutil.copytree(render.HERE / "secrets", folder, ignore=shutil.ignore_patterns("*.env", "*.json"))
    with pytest.raises(ManifestError, match=r"mlflow-database\.env"):
        render.kustomize(folder)
    for example in folder.glob("**/*.example"):
        assert not re.search(r'[=:] *"?[^\s"{]{1,}"?$', example.read_text(), re.M), f"{example.name} holds a value"
        example.rename(example.with_suffix(""))
    secrets = {found["metadata"]["name"]: found for found in render.objects(render.kustomize(folder))}
    buckets = {pods.SECRET, pods.DATA_SECRET, "yolov8-nas-s3-artifacts"}
    assert secrets.keys() == {"mlflow-database", *buckets, pods.PULL_SECRET, pods.CREDENTIALS_SECRET}
    assert all(secrets[name]["data"].keys() == set(pods.SECRET_KEYS) for name in buckets)
    assert secrets[pods.PULL_SECRET]["type"] == "kubernetes.io/dockerconfigjson"
    subprocess.run(["sh", folder / "secured" / "certificates.sh"], check=True, stdout=subprocess.DEVNULL)
    secured = {found["metadata"]["name"]: found for found in render.objects(render.kustomize(folder / "secured"))}
    assert secured[pods.TRACKING_SECRET]["data"].keys() == set(pods.TRACKING_KEYS)
    assert secured[pods.CA]["kind"] == "ConfigMap" and "PRIVATE" not in json.dumps(secured[pods.CA])
    for overlay in render.OVERLAYS:
        for secret in of_kind(overlay, "Secret").values():
            assert not {"data", "stringData"} & secret.keys(), "secrets do not lie among what is committed"
        known = secrets | (secured if overlay == "gpu-cluster" else {})
        maps = of_kind(overlay, "ConfigMap").keys() | (known.keys() & {pods.CA})
        for name, template in pod_templates(overlay):
            for variable in (each for container in template["spec"]["containers"] for each in container.get("env", [])):
                if wanted := variable.get("valueFrom", {}).get("secretKeyRef"):
                    assert wanted["key"] in known[wanted["name"]]["data"], name
            for volume in template["spec"]["volumes"]:
                if "secret" in volume:
                    assert known[volume["secret"]["secretName"]]["type"] == "kubernetes.io/tls", name
                if "configMap" in volume:
                    assert volume["configMap"].get("optional") or volume["configMap"]["name"] in maps, name


def test_an_overlay_is_written_only_with_all_images_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["render.py", "--out", str(tmp_path)])
    monkeypatch.setattr(render, "OVERLAYS", ("single-node",))
    monkeypatch.setattr(render, "check", lambda rendered, schemas: iter(()))  # slow, and tested above
    pinned: dict[str, Any] = {"mlflow": f"registry.example.com/mlflow@{DIGEST}"}
    monkeypatch.setattr(render, "pinned_images", lambda: pinned)
    assert render.main() == 0
    assert "no digest of postgres yet" in capsys.readouterr().out and not list(tmp_path.iterdir())
    pinned["postgres"] = f"postgres:17@{DIGEST}"
    assert render.main() == 0
    images = re.findall(r"image: (.*)", (tmp_path / "single-node.yaml").read_text())
    assert len(images) == 4 and all(image.endswith(DIGEST) for image in images)


def _certificates(folder: Path) -> Path:
    """Certificates as docs have them made, in a folder of their own."""
    shutil.copy(render.HERE / "secrets" / "secured" / "certificates.sh", folder)
    subprocess.run(["sh", folder / "certificates.sh"], check=True, stdout=subprocess.DEVNULL)
    return folder


def test_certificates_are_of_the_names_that_clients_call(tmp_path: Path) -> None:
    _certificates(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "ca.crt", "certificates.sh", "mlflow.crt", "mlflow.key", "postgres.crt", "postgres.key",
    ]  # fmt: skip
    address = of_kind("gpu-cluster", "ConfigMap")["yolov8-nas-config"]["data"]["MLFLOW_TRACKING_URI"]
    mlflow = of_kind("gpu-cluster", "Deployment")["mlflow"]["spec"]["template"]["spec"]["containers"][0]
    database = next(row["value"] for row in mlflow["env"] if row["name"] == "MLFLOW_BACKEND_STORE_URI")
    for name, called in (("mlflow", address), ("postgres", database)):
        host = urlsplit(called.replace("postgresql+psycopg2", "postgresql")).hostname
        assert host == f"{name}.yolov8-nas.svc"
        verify = ["openssl", "verify", "-CAfile", "ca.crt", "-verify_hostname", host, "-purpose", "sslserver"]
        subprocess.run([*verify, f"{name}.crt"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
        assert (tmp_path / f"{name}.key").stat().st_mode & 0o077 == 0


def test_the_database_takes_no_password_in_the_clear_and_its_dumps_can_be_restored(tmp_path: Path) -> None:
    """The server's settings and the script of the backup, on a PostgreSQL of this machine."""
    certificates = tmp_path / "certificates"
    certificates.mkdir()
    _certificates(certificates)
    args = of_kind("gpu-cluster", "StatefulSet")["postgres"]["spec"]["template"]["spec"]["containers"][0]["args"]
    rules = of_kind("gpu-cluster", "ConfigMap")["postgres-hba"]["data"]["pg_hba.conf"]
    with servers.postgres_with_tls(args, rules, certificates) as (psql, environment):
        sure = {**environment, "PGSSLMODE": "verify-full", "PGSSLROOTCERT": str(certificates / "ca.crt")}
        clear = psql("SELECT 1", {**environment, "PGSSLMODE": "disable"})
        assert clear.returncode != 0 and "no encryption" in clear.stderr
        stranger = psql("SELECT 1", {**sure, "PGPASSWORD": "guessed"})
        assert stranger.returncode != 0 and "password authentication failed" in stranger.stderr
        made = psql("CREATE TABLE models (name text); INSERT INTO models VALUES ('line-3'), ('line-4')", sure)
        assert made.returncode == 0, made.stderr
        script = of_kind("gpu-cluster", "ConfigMap")["postgres-backup"]["data"]["backup.sh"]
        (tmp_path / "backup.sh").write_text(script)
        dumps = tmp_path / "dumps"
        dumps.mkdir()
        for day in range(3):
            (dumps / f"{sure['PGDATABASE']}-2020010{day}T000000Z.dump").write_text("old")
        (dumps / "torn.part").write_text("torn")
        run = ["sh", tmp_path / "backup.sh", dumps, "2"]
        done = subprocess.run(run, env=sure, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        kept = sorted(file.name for file in dumps.iterdir())
        assert len(kept) == 2 and "20200102T" in kept[0] and "20200102T" not in kept[1]
        assert psql("DROP TABLE models", sure).returncode == 0
        restore = ["pg_restore", "--clean", "--if-exists", "--exit-on-error", f"--dbname={sure['PGDATABASE']}"]
        subprocess.run([*restore, dumps / kept[1]], env=sure, check=True)
        assert psql("SELECT count(*) FROM models", sure).stdout.strip() == "2"
        failed = subprocess.run(run, env={**sure, "PGPASSWORD": "changed"}, capture_output=True, text=True)
        assert failed.returncode != 0 and len(list(dumps.glob("*.dump"))) == 2, "what there is stays"


def test_where_no_kubectl_is_installed_it_is_unpacked_from_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, package, site = io.BytesIO(), tmp_path / "site" / "aws_cdk", tmp_path / "site"
    with zipfile.ZipFile(layer, "w") as packed:
        packed.writestr("kubectl/kubectl", "#!/bin/sh\necho rendered $2\n")
    package.mkdir(parents=True)
    with tarfile.open(package / "layer@1.jsii.tgz", "w:gz") as tar:
        info = tarfile.TarInfo("package/lib/layer.zip")
        info.size = len(layer.getvalue())
        tar.addfile(info, io.BytesIO(layer.getvalue()))
    about = site / f"{render.WHEEL.replace('-', '_')}-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {render.WHEEL}\nVersion: 1\n")
    (about / "RECORD").write_text("aws_cdk/layer@1.jsii.tgz,,\n")
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    found = render.kubectl.__wrapped__
    if importlib.util.find_spec("aws_cdk") is None:  # else this machine has the package itself
        assert found() is None
    monkeypatch.syspath_prepend(site)
    assert found() == str(tmp_path / "bin" / "kubectl")
    assert found() == str(tmp_path / "bin" / "kubectl"), "unpacked once"
    done = subprocess.run([tmp_path / "bin" / "kubectl", "kustomize", "x"], capture_output=True, text=True)
    assert done.stdout == "rendered x\n"
