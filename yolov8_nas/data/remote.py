"""Datasets at an address: an archive or a folder in S3, or an archive on a web server.

What lies there is identified by what the server says of it without sending it: names, sizes and ETags. So a scheduled
run that finds the data unchanged downloads nothing, and data that was replaced under the same address is other data.
A download goes on where it was cut off, by parts of a fixed size.
"""

from __future__ import annotations

import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path, PurePosixPath
from typing import IO, Final, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from yolov8_nas import credentials
from yolov8_nas.data import web
from yolov8_nas.errors import InputError
from yolov8_nas.files import canonical_digest
from yolov8_nas.store import archive

PART: Final = 64 * 2**20
"""Bytes that are fetched as one; what is whole of a download that was cut off is kept."""

_AT_ONCE: Final = 8
_PAUSES: Final = (1.0, 2.0, 4.0, 8.0)  # seconds before a part is tried again
_TIMEOUT: Final = 30.0  # seconds
_SLOWEST: Final = 10_000  # bytes per second
_CHUNK: Final = 2**20

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """A file at an address.

    Attributes:
        name: Its POSIX path in the dataset's folder, or the archive's name.
        size: In bytes.
        version: The server's name for its content: an ETag, or when it was last changed where there is none.
    """

    name: str
    size: int
    version: str


@dataclass(frozen=True)
class Listing:
    """What lies at an address.

    Attributes:
        address: Where it lies.
        name: Name of the archive or of the folder.
        is_folder: Whether it is a folder of files, not an archive.
        files: The files, in the order of their names.
        ranges: Whether the server sends parts of a file.
    """

    address: str
    name: str
    is_folder: bool
    files: tuple[RemoteFile, ...]
    ranges: bool = True

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """SHA-256 of names, sizes and versions: other content has another one."""
        return canonical_digest([[file.name, file.size, file.version] for file in self.files])


def is_address(source: str | Path | None) -> bool:
    """Whether a dataset is not on this machine."""
    return "://" in str(source)


def look(address: str, *, patient: bool = True) -> Listing:
    """Ask what lies at an address.

    Args:
        address: `s3://bucket/key` of an archive, `s3://bucket/prefix/` of a folder, or `https://` of an archive.
        patient: Whether to ask again and again where nothing answers.

    Raises:
        InputError: There is nothing, it is too large, the server refuses, or addresses of this kind are not read.
        ConnectionError: Nothing answers, or the server is in trouble.
    """
    return _look(address, _place(address, patient), patient)


def _look(address: str, place: _Place, patient: bool) -> Listing:
    listing = _again_and_again(place.look) if patient else place.look()
    if len(listing.files) > archive.MAX_FILES:
        raise InputError(f"{address}: more than {archive.MAX_FILES:,} files; pack them into an archive or split them")
    if listing.size > archive.MAX_BYTES:
        raise InputError(f"{address}: {listing.size:,} bytes, more than {archive.MAX_BYTES:,}; split the dataset")
    return listing


def fetch(
    address: str, into: Path, *, expected: str | None = None, progress: Callable[[str, int, int], None] | None = None
) -> Path:
    """Download what lies at an address, or the rest of it.

    Args:
        address: As for `look`.
        into: Folder for it. What an earlier call that was cut off left there of the same content is used.
        expected: Digest of the listing that is meant.
        progress: Is told what is being done, and how many MiB of how many are there.

    Returns:
        The archive, or the folder.

    Raises:
        InputError: As for `look`; or the content was replaced meanwhile; or there is not enough space.
        ConnectionError: As for `look`. What has arrived is kept.
    """
    place = _place(address)
    listing = _look(address, place, patient=True)
    if expected not in (None, listing.digest):
        raise InputError(f"{address}: was replaced since this run began; start the run again, with the new data")
    return _Download(place, listing, into / listing.digest[:16]).run(progress)


@dataclass(frozen=True)
class _Part:
    """A part of a file; `path` is where it lies once it is whole."""

    file: RemoteFile
    start: int
    size: int
    path: Path


class _Download:
    """A download, in a folder that is named after the content."""

    def __init__(self, place: _Place, listing: Listing, folder: Path) -> None:
        self.place = place
        self.listing = listing
        self.result = folder / listing.name
        self.parts = folder / ".parts"

    def run(self, progress: Callable[[str, int, int], None] | None) -> Path:
        """Fetch what is missing and put it together."""
        files = [
            self._split(index, file)
            for index, file in enumerate(self.listing.files)
            if _size(self._target(file)) != file.size
        ]
        missing = [part for parts in files for part in parts if not _is_there(part, parts[0])]
        total = sum(part.size for part in missing)
        self.parts.mkdir(parents=True, exist_ok=True)
        if total > (free := shutil.disk_usage(self.parts).free):
            raise InputError(
                f"{self.listing.address}: {total / 2**30:.1f} GiB to download, but {self.result.parent} has room for "
                f"{free / 2**30:.1f} GiB; free some space"
            )
        done = self.listing.size - total
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            coming = {pool.submit(_again_and_again, partial(self._fetch, part)): part for part in missing}
            try:
                for future in as_completed(coming):
                    future.result()
                    done += coming[future].size
                    if progress:
                        progress("downloading, MiB", done // 2**20, self.listing.size // 2**20)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        for parts in files:
            self._join(parts)
        return self.result

    def _target(self, file: RemoteFile) -> Path:
        return self.result / file.name if self.listing.is_folder else self.result

    def _split(self, index: int, file: RemoteFile) -> list[_Part]:
        step = PART if self.listing.ranges else max(file.size, 1)
        return [
            _Part(file, start, min(step, file.size - start), self.parts / f"{index}-{start}")
            for start in range(0, max(file.size, 1), step)
        ]

    def _fetch(self, part: _Part) -> None:
        span = None if part.size == part.file.size else (part.start, part.start + part.size)
        arriving = part.path.with_suffix(".arriving")
        with self.place.open(part.file, span) as (version, stream), arriving.open("wb") as file:
            if version != part.file.version:
                raise InputError(
                    f"{self.listing.address}: {part.file.name} was replaced meanwhile; start the run again"
                )
            self._take(part, stream, file)
        if (size := arriving.stat().st_size) != part.size:
            raise ConnectionError(f"{self.listing.address}: {size:,} of {part.size:,} bytes of {part.file.name} came")
        arriving.replace(part.path)

    def _take(self, part: _Part, stream: IO[bytes], file: IO[bytes]) -> None:
        """Write what arrives of a part: no more than was announced, and no slower than anybody waits for."""
        left, until = part.size, time.monotonic() + _TIMEOUT + part.size / _SLOWEST
        while chunk := stream.read(min(_CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                raise InputError(
                    f"{self.listing.address}: more than the {part.size:,} bytes of {part.file.name} came that were "
                    "announced; download the dataset and give its path"
                )
            if time.monotonic() > until:
                raise ConnectionError(f"{self.listing.address}: comes slower than {_SLOWEST:,} bytes/s; try later")
            file.write(chunk)

    def _join(self, parts: Sequence[_Part]) -> None:
        """Append the parts to the first; one that is gone was appended by a call that was cut off."""
        with parts[0].path.open("r+b") as file:
            for part in parts[1:]:
                if part.path.exists():
                    file.seek(part.start)
                    with part.path.open("rb") as source:
                        shutil.copyfileobj(source, file)
                    file.flush()
                    part.path.unlink()
        target = self._target(parts[0].file)
        target.parent.mkdir(parents=True, exist_ok=True)
        parts[0].path.replace(target)


def _is_there(part: _Part, first: _Part) -> bool:
    """Whether a part has arrived: in its own file, or as an appended piece of the first."""
    return _size(part.path) == part.size or (_size(first.path) or 0) >= part.start + part.size > 0


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _again_and_again(work: Callable[[], T]) -> T:
    """Try again what may pass."""
    for pause in _PAUSES:
        try:
            return work()
        except ConnectionError:
            time.sleep(pause)
    return work()


class _Place(Protocol):
    """Where files are."""

    def look(self) -> Listing:
        """What lies there."""
        ...

    def open(self, file: RemoteFile, span: tuple[int, int] | None) -> AbstractContextManager[tuple[str, IO[bytes]]]:
        """The version and the bytes of a file, or those from the first position up to the second."""
        ...


def check_address(address: str) -> None:
    """Check that a dataset is at an address of a kind that is read, without asking there.

    Raises:
        InputError: It is not.
    """
    scheme = address.partition("://")[0]
    if scheme == "http":
        raise InputError(f"{address}: what comes over http:// may be changed on its way; give an https:// address")
    if scheme not in ("s3", "https"):
        raise InputError(f"{address}: addresses of this kind are not read; give one of s3:// or https://, or a path")
    if not urlsplit(address).netloc:
        raise InputError(f"{address}: names no {'bucket' if scheme == 's3' else 'server'}; write the whole address")


def _place(address: str, patient: bool = True) -> _Place:
    """Where an address leads to, which may be a bare one (`credentials`)."""
    check_address(address)
    return _S3(address, patient) if address.startswith("s3://") else _Web(address)


def _named(address: str, name: str) -> str:
    """The name of what is at an address, checked: a file of this machine is to have it."""
    if name in ("", ".", ".."):
        raise InputError(f"{address}: does not name a dataset; give that of an archive, or s3://BUCKET/FOLDER/")
    if name.endswith((".yaml", ".yml")):
        raise InputError(f"{address}: one file of a dataset; give the address of its folder, with a slash at the end")
    return name


class _S3:
    """An archive in a bucket, or a folder: a common beginning of keys that ends with a slash."""

    def __init__(self, address: str, patient: bool) -> None:
        from yolov8_nas.store import s3  # here, since most datasets are local and boto3 takes its time

        self.s3 = s3
        self.address = credentials.hidden(address)
        self.bucket, self.key = s3.split(self.address)
        self.prefix = self.key[: self.key.rfind("/") + 1]
        self.client = s3.connect(address, s3.ATTEMPTS if patient else 2, data=True)

    def look(self) -> Listing:
        with self.s3.foreseen(self.address):
            if self.key.endswith("/") or not self.key:
                name = _named(self.address, PurePosixPath(self.key).name or self.bucket)
                return Listing(self.address, name, True, tuple(self._folder()))
            name = _named(self.address, self.key.removeprefix(self.prefix))
            try:
                found = self.client.head_object(Bucket=self.bucket, Key=self.key)
            except self.client.exceptions.ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                    self._explain()
                raise
            return Listing(self.address, name, False, (RemoteFile(name, found["ContentLength"], found["ETag"]),))

    def open(self, file: RemoteFile, span: tuple[int, int] | None) -> AbstractContextManager[tuple[str, IO[bytes]]]:
        return self._opened(file, {"Range": f"bytes={span[0]}-{span[1] - 1}"} if span else {})

    @contextmanager
    def _opened(self, file: RemoteFile, asked: Mapping[str, str]) -> Iterator[tuple[str, IO[bytes]]]:
        key = self.prefix + file.name
        with self.s3.foreseen(f"s3://{self.bucket}/{key}"):
            answer = self.client.get_object(Bucket=self.bucket, Key=key, **asked)
            with closing(answer["Body"]) as stream:
                yield answer["ETag"], stream

    def _folder(self) -> Iterator[RemoteFile]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
        found = []
        for page in pages:
            found += [entry for entry in page.get("Contents", []) if not entry["Key"].endswith("/")]
            if len(found) > archive.MAX_FILES:  # before the rest of a list that may have no end is read
                break
        if not found:
            raise InputError(f"{self.address}: there is nothing; correct the address")
        names = {entry["Key"].removeprefix(self.prefix) for entry in found}
        for entry in sorted(found, key=lambda entry: str(entry["Key"])):
            name = entry["Key"].removeprefix(self.prefix)
            path = PurePosixPath(name)
            if ".." in path.parts or path.is_absolute() or "\\" in name or str(path) != name:
                raise InputError(f"{self.address}: object {name!r} cannot be a file of a folder; rename it")
            if clash := next((str(parent) for parent in path.parents if str(parent) in names), None):
                raise InputError(f"{self.address}: {clash!r} is both an object and a folder; rename one")
            yield RemoteFile(name, entry["Size"], entry["ETag"])

    def _explain(self) -> None:
        """Say more than that there is no such object, where more can be said: servers answer HEAD without words."""
        below = self.client.list_objects_v2(Bucket=self.bucket, Prefix=f"{self.key}/", MaxKeys=1)
        if below.get("KeyCount"):
            raise InputError(f"{self.address}: not an object but a folder; write {self.address}/")


class _Web:
    """An archive on a web server."""

    def __init__(self, address: str) -> None:
        try:
            self.address = credentials.hidden(address)  # what is shown and recorded
        except ValueError as error:
            raise InputError(f"data: {error}") from None
        self.whole = credentials.revealed(address)
        self.opener = web.opener(self.whole)
        if urlsplit(self.whole).username is not None:
            raise InputError(
                f"{self.address}: user and password in an address are not sent to a web server; download the dataset "
                "and give its path, or give a signed address"
            )

    def look(self) -> Listing:
        name = _named(self.address, PurePosixPath(unquote(urlsplit(self.address).path)).name)
        # Not HEAD, which servers may answer otherwise, or which a signed address does not cover.
        with self._answer({"Range": "bytes=0-0"}) as answer:
            ranges = answer.status == 206
            size = answer.headers["Content-Range"].rpartition("/")[2] if ranges else answer.headers["Content-Length"]
            version = _version(answer)
        if not version or not size or not re.fullmatch("[0-9]{1,18}", size):
            raise InputError(
                f"{self.address}: the server tells {'no size' if version else 'neither an ETag nor a time'} of it, so "
                "a change could go unnoticed; download the dataset and give its path"
            )
        return Listing(self.address, name, False, (RemoteFile(name, int(size), version),), ranges)

    def open(self, file: RemoteFile, span: tuple[int, int] | None) -> AbstractContextManager[tuple[str, IO[bytes]]]:
        return self._opened(span)

    @contextmanager
    def _opened(self, span: tuple[int, int] | None) -> Iterator[tuple[str, IO[bytes]]]:
        with self._answer({"Range": f"bytes={span[0]}-{span[1] - 1}"} if span else {}) as answer:
            if span and not (answer.headers["Content-Range"] or "").startswith(f"bytes {span[0]}-"):
                raise ConnectionError(f"{self.address}: another part came than was asked for; try again later")
            yield _version(answer), answer

    @contextmanager
    def _answer(self, asked: Mapping[str, str]) -> Iterator[HTTPResponse]:
        try:
            with self.opener.open(urllib.request.Request(self.whole, headers=dict(asked)), timeout=_TIMEOUT) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            if error.code >= 500 or error.code in (408, 429):
                raise ConnectionError(f"{self.address}: the server is in trouble ({error}); try again later") from None
            raise InputError(f"{self.address}: refused ({error}); check the address") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise InputError(
                    f"{self.address}: {error.reason}; name the authority's certificates in SSL_CERT_FILE"
                ) from None
            raise ConnectionError(f"{self.address}: no answer ({error.reason}); check address and network") from None
        except InvalidURL as error:
            raise InputError(f"{self.address}: no address ({error}); correct it") from None
        except (HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
            raise ConnectionError(f"{self.address}: no whole answer ({error}); try again later") from None


def _version(answer: HTTPResponse) -> str:
    return answer.headers["ETag"] or answer.headers["Last-Modified"] or ""
