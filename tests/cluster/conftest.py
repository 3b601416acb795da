"""The cluster that tests ask, and what they leave behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, cleaning

TOKEN_VARIABLE = "YOLOV8_NAS_TEST_TOKEN_FILE"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--host", help="Address of Kubeflow Pipelines; without it these tests are skipped.")
    parser.addoption("--namespace", default="yolov8-nas", help="Namespace that the overlay was applied to.")


@pytest.fixture
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    """The cluster; runs of a test end with it."""
    host = request.config.getoption("--host", default=None)
    if not host:
        pytest.skip("no cluster: make test-cluster HOST=... (tests/cluster/README.md)")
    token = os.environ.get(TOKEN_VARIABLE)
    namespace = request.config.getoption("--namespace")
    with cleaning(Cluster(host, namespace, Path(token) if token else None, tmp_path)) as made:
        yield made
