"""Objects in S3, or in what speaks its protocol.

Credentials, region and endpoint (`AWS_ENDPOINT_URL`) come from boto3's standard chain; for datasets and weights there
may be keys of their own (`credentials.DATA_KEYS`), so that whoever reads them need not be able to write results. What
passes by itself is retried by boto3. What is left becomes one of two errors: `InputError` where somebody has to do
something about bucket, key or credentials, `ConnectionError` where trying again later can help.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import boto3
from boto3.exceptions import RetriesExceededError, S3UploadFailedError
from botocore import exceptions
from botocore.config import Config

from yolov8_nas.credentials import DATA_KEYS, revealed
from yolov8_nas.errors import InputError

ATTEMPTS: Final = 5
"""How often boto3 tries a request, with growing pauses in between."""

CONNECTIONS: Final = 8
"""How many requests are under way at once."""

_REFUSED: Final = (401, 403)
_LATER: Final = (408, 429)
_UNANSWERED: Final = (
    exceptions.ConnectionError,
    exceptions.HTTPClientError,
    exceptions.IncompleteReadError,
    exceptions.FlexibleChecksumError,
)


def split(address: str) -> tuple[str, str]:
    """Bucket and key of `s3://bucket/key`.

    Raises:
        InputError: It names no bucket.
    """
    authority, _, key = revealed(address).removeprefix("s3://").partition("/")
    bucket = authority.rpartition("@")[2]  # keys come from boto3's chain, never from an address
    if not address.startswith("s3://") or not bucket:
        raise InputError(f"{address}: names no bucket; write s3://BUCKET/KEY")
    return bucket, key


def connect(address: str, attempts: int = ATTEMPTS, within: float = 10.0, data: bool = False) -> Any:
    """boto3's client for what lies at an address.

    Args:
        address: What is to be reached, for messages.
        attempts: How often a request is tried.
        within: Seconds in which the server has to be reached.
        data: Whether a dataset or weights are read, for which `DATA_KEYS` are taken where they are set.

    Raises:
        InputError: What the environment says of endpoint, profile, region or keys cannot be used.
    """
    settings = Config(
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=within,
        read_timeout=60,
        max_pool_connections=CONNECTIONS,
    )
    with foreseen(address):
        try:
            access, secret = _data_keys(address) if data else (None, None)
            # boto3's own session remembers old credentials
            return boto3.Session(access, secret).client("s3", config=settings)
        except ValueError as error:  # an endpoint that is no URL
            raise InputError(f"{address}: {error}; check AWS_ENDPOINT_URL") from None


def _data_keys(address: str) -> tuple[str | None, str | None]:
    """The keys for data, where there are any."""
    access, secret = (os.environ.get(name) or None for name in DATA_KEYS)
    if bool(access) != bool(secret):
        raise InputError(f"{address}: {' and '.join(DATA_KEYS)} go together; set both, or none of them")
    return access, secret


@contextmanager
def foreseen(address: str) -> Iterator[None]:
    """Tell in one line what S3, or the way there, has against a request.

    Raises:
        InputError: Somebody has to do something about it; the message says what.
        ConnectionError: It may pass: nothing answered, the answer broke off, or the server is in trouble.
    """
    try:
        try:
            yield
        except S3UploadFailedError as error:  # says no more than what it came from
            raise error.__context__ or error from None
    except (S3UploadFailedError, RetriesExceededError) as error:
        raise ConnectionError(f"{address}: broke off ({' '.join(str(error).split())}); try again later") from None
    except exceptions.ClientError as error:
        told = error.response.get("Error", {})
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        said = f"{told.get('Code', status)}: {told.get('Message', 'no message')}"
        if status >= 500 or status in _LATER:
            raise ConnectionError(f"{address}: the server is in trouble ({said}); try again later") from None
        if told.get("Code") == "NoSuchBucket":
            raise InputError(
                f"{address}: there is no bucket {split(address)[0]!r}; correct the name, make the bucket, "
                "or check AWS_ENDPOINT_URL"
            ) from None
        if status in _REFUSED:
            raise InputError(
                f"{address}: access refused ({said}); check the AWS credentials and their rights"
            ) from None
        if status == 404:
            raise InputError(f"{address}: there is no such object; correct the key") from None
        raise InputError(f"{address}: refused ({said}); check the address") from None
    except _UNANSWERED as error:
        # Some of these messages go over several lines.
        raise ConnectionError(
            f"{address}: no whole answer ({' '.join(str(error).split())}); check AWS_ENDPOINT_URL and the network"
        ) from None
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise InputError(
            f"{address}: no AWS credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, "
            "or give the machine a role"
        ) from None
    except exceptions.BotoCoreError as error:
        said = " ".join(str(error).split())
        raise InputError(f"{address}: {said}; check the address and the AWS settings") from None
