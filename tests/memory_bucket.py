"""A bucket in memory, with the requests of boto3 that this project makes: for what a writer could put there."""

from __future__ import annotations

import io
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError


class _NoSuchKeyError(ClientError):
    pass


class _Exceptions:
    ClientError = ClientError
    NoSuchKey = _NoSuchKeyError


class MemoryBucket:
    """Objects by key; whoever holds it may write whatever they like."""

    exceptions = _Exceptions()

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def _found(self, key: str) -> bytes:
        if key not in self.objects:
            answer = {"Error": {"Code": "NoSuchKey"}, "ResponseMetadata": {"HTTPStatusCode": 404}}
            raise _NoSuchKeyError(answer, "GetObject")
        return self.objects[key]

    def get_object(self, *, Bucket: str, Key: str) -> dict[str, Any]:
        return {"Body": io.BytesIO(self._found(Key))}

    def head_object(self, *, Bucket: str, Key: str) -> dict[str, Any]:
        now = datetime.now(UTC)
        headers = {"date": now.strftime("%a, %d %b %Y %H:%M:%S GMT")}
        return {
            "LastModified": now,
            "ContentLength": len(self._found(Key)),
            "ResponseMetadata": {"HTTPHeaders": headers},
        }

    def put_object(self, *, Bucket: str, Key: str, Body: bytes, IfNoneMatch: str | None = None) -> None:
        if IfNoneMatch and Key in self.objects:
            raise ClientError({"Error": {"Code": "x"}, "ResponseMetadata": {"HTTPStatusCode": 412}}, "PutObject")
        self.objects[Key] = bytes(Body)

    def upload_file(self, file: str, bucket: str, key: str) -> None:
        self.objects[key] = Path(file).read_bytes()

    def download_file(self, bucket: str, key: str, file: str) -> None:
        Path(file).write_bytes(self._found(key))

    def delete_objects(self, *, Bucket: str, Delete: dict[str, Any]) -> None:
        for entry in Delete["Objects"]:
            self.objects.pop(entry["Key"], None)

    def get_paginator(self, _: str) -> MemoryBucket:
        return self

    def paginate(self, *, Bucket: str, Prefix: str) -> Iterator[dict[str, Any]]:
        now = datetime.now(UTC)
        yield {
            "Contents": [{"Key": key, "LastModified": now} for key in sorted(self.objects) if key.startswith(Prefix)]
        }
