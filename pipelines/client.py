"""A Kubeflow Pipelines server: how it is reached, and what its errors mean."""

from __future__ import annotations

import contextlib
import io
import json
import os
import ssl
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import kfp_server_api
import urllib3
from kfp.client import Client
from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials

from yolov8_nas.errors import InputError
from yolov8_nas.reading import parse_json

IN_CLUSTER_TOKEN: Final = Path("/var/run/secrets/kubeflow/pipelines/token")
IN_CLUSTER_TOKEN_VARIABLE: Final = "KF_PIPELINES_SA_TOKEN_PATH"
IN_CLUSTER_HOST: Final = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"

LARGEST_WORKFLOW: Final = 64 * 2**20
"""Bytes of a workflow; etcd takes 1.5 MiB of one, compressed."""

_ANSWER_WITHIN: Final = 10.0  # seconds
_PASSING: Final = (401, 408, 429)  # statuses below 500 that time, or a token that is renewed, can mend
_NOT_SERVED: Final = (404, 405, 501)  # by a server without version 1 of the API, or a gateway that does not pass it on
_CONFLICT: Final = 409
_EQUALS: Final = 1  # operation of a filter


@dataclass(frozen=True)
class Access:
    """How a server is reached.

    Attributes:
        host: Its address; nothing for the one that `KF_PIPELINES_ENDPOINT` names or, in a cluster, its own.
        namespace: The user's namespace, on a server for several users.
        token_file: File with a bearer token, read anew whenever it is sent.
        token_variable: Environment variable with a bearer token.
        ca: Certificates to trust, for a server with one of its own.
    """

    host: str | None = None
    namespace: str | None = None
    token_file: Path | None = None
    token_variable: str | None = None
    ca: Path | None = None


class PassingError(InputError):
    """A server that does not answer, is in trouble or does not take the token: later it may."""


class Server:
    """A server that answered.

    Attributes:
        host: Its address.
        client: kfp's client.
        namespace: The namespace, on a server for several users; nothing on one for a single user.
    """

    def __init__(self, access: Access) -> None:
        """Connect.

        Raises:
            InputError: The server is not there, is no Kubeflow Pipelines, or does not take the token; or it has users
                and no namespace is named.
        """
        self.host = _host(access)
        for file in (access.token_file, access.ca):
            if file is not None and not file.is_file():
                raise InputError(f"{file}: no such file; give the path of one")
        credentials, token = _credentials(access)
        with self.told("connect"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", ResourceWarning)
            configuration = kfp_server_api.Configuration(host=self.host)
            configuration.retries = False
            configuration.ssl_ca_cert = str(access.ca) if access.ca else None
            configuration.api_key_prefix["authorization"] = "Bearer"
            if credentials is not None:
                credentials.refresh_api_key_hook(configuration)
            elif token is not None:
                configuration.api_key["authorization"] = token
            health = kfp_server_api.HealthzServiceApi(kfp_server_api.ApiClient(configuration))
            several = bool(health.healthz_service_get_healthz(_request_timeout=_ANSWER_WITHIN).multi_user)
            if several and not access.namespace:
                raise InputError(f"{self.host} serves several users: name your namespace with --namespace")
            self.namespace = access.namespace if several else None
            self.client = Client(
                host=self.host,
                namespace=self.namespace or "kubeflow",
                existing_token=token,
                credentials=credentials,
                ssl_ca_cert=configuration.ssl_ca_cert,
            )

    @contextlib.contextmanager
    def told(self, doing: str) -> Iterator[None]:
        """Turn what a server answers, or that it does not, into one message with a remedy; kfp's own words are dropped.

        Raises:
            PassingError: It may pass by itself.
            InputError: The server refused.
        """
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        except AttributeError as error:
            # A failure of TLS has no body, which kfp's client tries to decode.
            if not isinstance(error.__context__, kfp_server_api.ApiException):
                raise
            raise PassingError(f"{self.host}: {_unreached(error.__context__)}") from None
        except kfp_server_api.ApiException as error:
            kind = PassingError if (error.status or 500) >= 500 or error.status in _PASSING else InputError
            raise kind(f"{self.host}: {_refused(error, doing, getattr(self, 'namespace', None))}") from None
        except (urllib3.exceptions.HTTPError, ssl.SSLError, OSError) as error:
            raise PassingError(f"{self.host}: {_unreached(error)}") from None

    def workflow(self, run_id: str) -> dict[str, Any] | None:
        """Argo's workflow of a run as the server last saw it, empty at first; nothing where it doesn't hand it out."""
        try:
            answer = self.client._run_api.api_client.call_api(
                "/apis/v1beta1/runs/{run_id}",
                "GET",
                path_params={"run_id": run_id},
                response_type="object",
                auth_settings=["Bearer"],
                _return_http_data_only=True,
            )
        except kfp_server_api.ApiException as error:
            if error.status in _NOT_SERVED:
                return None
            raise
        runtime = answer.get("pipeline_runtime") if isinstance(answer, dict) else None
        manifest = runtime.get("workflow_manifest") if isinstance(runtime, dict) else None
        try:
            workflow = parse_json(str(manifest or "{}"), f"{self.host}: a workflow", most_bytes=LARGEST_WORKFLOW)
        except ValueError:
            return None
        return workflow if isinstance(workflow, dict) else None

    def pipeline(self, name: str) -> Any | None:
        """The pipeline of a name."""
        answer = self.client.list_pipelines(page_size=2, namespace=self.namespace, filter=_named(name))
        return answer.pipelines[0] if answer.pipelines else None

    def version(self, pipeline_id: str, name: str) -> Any | None:
        """The version of a pipeline."""
        answer = self.client.list_pipeline_versions(pipeline_id, page_size=2, filter=_named(name))
        return answer.pipeline_versions[0] if answer.pipeline_versions else None

    def experiment(self, name: str, create: bool) -> Any:
        """An experiment.

        Raises:
            InputError: It is not there and is not to be made.
        """

        def find() -> Any | None:
            answer = self.client.list_experiments(page_size=2, namespace=self.namespace, filter=_named(name))
            return answer.experiments[0] if answer.experiments else None

        if (found := find()) is not None:
            return found
        if not create:
            raise InputError(
                f"{self.host}: no experiment {name!r}; correct --experiment, or make it: --create-experiment"
            )
        return made_or_found(lambda: self.client.create_experiment(name, namespace=self.namespace), find)


def made_or_found(make: Callable[[], Any], find: Callable[[], Any | None]) -> Any:
    """What is made on a server; where somebody else has made it a moment before, that.

    Args:
        make: Makes it.
        find: Looks for it, and finds nothing where it is not there.
    """
    try:
        return make()
    except kfp_server_api.ApiException as error:
        if error.status != _CONFLICT or (found := find()) is None:
            raise
        return found


def _named(name: str) -> str:
    return json.dumps({"predicates": [{"operation": _EQUALS, "key": "display_name", "stringValue": name}]})


def _host(access: Access) -> str:
    host = access.host or os.environ.get("KF_PIPELINES_ENDPOINT")
    if not host and "KUBERNETES_SERVICE_HOST" in os.environ:
        host = IN_CLUSTER_HOST
    if not host:
        raise InputError(
            "no Kubeflow server is named: give --host URL, for example --host http://localhost:8080 beside "
            "`kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80`"
        )
    if urlsplit(host).scheme not in ("http", "https") or not urlsplit(host).netloc:
        raise InputError(f"--host {host!r}: write the whole address, for example https://kubeflow.example.com")
    return host.rstrip("/")


def _credentials(access: Access) -> tuple[ServiceAccountTokenVolumeCredentials | None, str | None]:
    """A file with a token, or a token; neither where the server asks for none."""
    if access.token_file is not None and access.token_variable is not None:
        raise InputError("--token-file and --token-env: give one of them")
    if access.token_variable is not None:
        token = os.environ.get(access.token_variable, "").strip()
        if not token:
            raise InputError(f"--token-env {access.token_variable}: this variable is empty; put the token into it")
        return None, token
    mounted = Path(os.environ.get(IN_CLUSTER_TOKEN_VARIABLE) or IN_CLUSTER_TOKEN)
    file = access.token_file or (mounted if mounted.is_file() else None)
    return (ServiceAccountTokenVolumeCredentials(str(file)), None) if file else (None, None)


def _refused(error: kfp_server_api.ApiException, doing: str, namespace: str | None) -> str:
    said = " ".join(str(error.body or error.reason).split())[:300]
    match error.status:
        case 401:
            return "not authenticated: give a token that is valid now, with --token-file or --token-env"
        case 403:
            where = f" in namespace {namespace!r}" if namespace else ""
            return f"not allowed to {doing}{where}: ask for the role, or give another --namespace or token ({said})"
        case 404 if doing == "connect":
            return "no Kubeflow Pipelines at this address; give that of its API or UI (--host)"
        case 404:
            return f"cannot {doing}: not found; see that --namespace and --experiment are right ({said})"
        case 400:
            return f"cannot {doing}: {said}; see that --namespace is right"
        case _:
            return f"cannot {doing}: the server answered {error.status} ({said}); try again, or see its log"


def _unreached(error: Exception) -> str:
    reason = str(getattr(error, "reason", None) or error)
    if "CERTIFICATE_VERIFY" in reason:
        return "its certificate is signed by nobody that is trusted here; give the signer's certificate with --ca"
    if "WRONG_VERSION_NUMBER" in reason or "SSL" in reason:
        return (
            f"does not speak TLS as asked ({reason.rpartition(': ')[2]}); see whether --host begins with http or https"
        )
    return f"not reachable ({reason.rpartition(': ')[2]}); see that the address is right and the port-forward runs"
