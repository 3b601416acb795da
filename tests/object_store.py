"""A real server that speaks S3: the one that YOLOV8_NAS_TEST_S3 names, or OpenStack Swift on this machine."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final

import boto3
import pytest

ENDPOINT_VARIABLE: Final = "YOLOV8_NAS_TEST_S3"
"""Environment variable with the endpoint of another server; the AWS_ variables then hold credentials for it."""

KEYS: Final = {
    "AWS_ACCESS_KEY_ID": "test:tester",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """Environment variables with which boto3 reaches the server.

    Args:
        folder: An empty folder for Swift's disk.
    """
    if endpoint := os.environ.get(ENDPOINT_VARIABLE):
        yield {"AWS_ENDPOINT_URL": endpoint}
        return
    if importlib.util.find_spec("swift") is None:
        pytest.skip(f"no S3 server: {ENDPOINT_VARIABLE} is not set, and swift is not installed (it is for Linux only)")
    address, log = folder / "address", folder / "log"
    command = [sys.executable, Path(__file__).with_name("swift_server.py"), folder]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()
                if address.exists():
                    break
                time.sleep(0.5)
            yield {"AWS_ENDPOINT_URL": address.read_text(), **KEYS}
        finally:
            process.kill()


@cache
def _client(endpoint: str) -> Any:
    """A client, which takes a while to make."""
    return boto3.Session().client("s3", endpoint_url=endpoint)


@contextmanager
def bucket() -> Iterator[tuple[Any, str]]:
    """boto3's client, as the environment has it, and the name of a new bucket, which goes away again."""
    client, name = _client(os.environ["AWS_ENDPOINT_URL"]), f"yolov8-nas-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=name)
    try:
        yield client, name
    finally:
        if ENDPOINT_VARIABLE in os.environ:  # Swift goes away as a whole
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
                for entry in page.get("Contents", []):
                    client.delete_object(Bucket=name, Key=entry["Key"])
            client.delete_bucket(Bucket=name)
