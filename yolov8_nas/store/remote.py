"""A stage store in S3: a working folder on this machine, and in the bucket what lasts.

    PREFIX/<stage>/<key>/manifest.json      as in a folder, written last: a key that has one is done
                         partial.json       the newest checkpoints of a key that is not done, SHA-256 by name
                         failed.json        what its last failure left, SHA-256 by name
                         objects/<sha256>   the files of all three
                         lease              who works on the key
    PREFIX/runs/<run>/                      what each run did

Files are named by their content, so none is ever changed, and whoever reads one checks it against its name. The three
lists are written in one request each, after the files in them: what a list names is there, and checkpoints that belong
together are of one moment. Of two writers the first to write the manifest has made the result; the other takes it over.
The lease only saves work: should two processes hold it, both compute, and the manifest decides.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Any, Final

from yolov8_nas import names, signing
from yolov8_nas.device.host import default_path
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import atomic_write, file_sha256, room, tell, tree_files
from yolov8_nas.paths import expanded
from yolov8_nas.reading import parse_json
from yolov8_nas.store import s3
from yolov8_nas.store.store import Entry, Manifest, Store

CACHE_VARIABLE: Final = "YOLOV8_NAS_CACHE"
"""Environment variable with the folder for working folders of remote stores; `~/.cache/yolov8-nas` unless set."""

SAVE_EVERY: Final = 5.0
"""Seconds between two looks for new checkpoints."""

SAVE_AT_LEAST_EVERY: Final = 300.0
"""Seconds after which checkpoints are saved while something is measured, too, which saving could disturb."""

LEASE: Final = 180.0
"""Seconds after which a lease that was not renewed is nobody's."""

RENEW_EVERY: Final = 45.0
"""Seconds between two renewals of a lease."""

_ASK_EVERY: Final = 5.0
_WRITTEN: Final = "writing-is-allowed"  # an object that is written to see whether it can be
_REACHED_WITHIN: Final = 2.0  # seconds, when somebody waits to be told whether it is there
_LONGEST_RECORD: Final = 64 * 2**20  # bytes: a manifest of 500,000 files
_IN_MEMORY: Final = 2**20  # bytes; larger files are sent from a link to them

Files = Mapping[str, str]
"""SHA-256 of files, by name."""


def cache_folder() -> Path:
    """The folder for working folders of remote stores, which need not exist.

    Where nobody knows a home folder, as in a container whose user has none, it lies among the temporary files.
    """
    if named := os.environ.get(CACHE_VARIABLE):
        return expanded(named)
    try:
        return Path.home() / ".cache" / "yolov8-nas"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"yolov8-nas-{os.getuid()}"


class RemoteStore(Store):
    """A stage store in S3.

    Args:
        address: `s3://BUCKET/PREFIX`.

    Raises:
        InputError: The address names no bucket, or boto3 cannot use the environment.
    """

    def __init__(self, address: str) -> None:
        address = address.rstrip("/")
        super().__init__(cache_folder() / "stores" / hashlib.sha256(address.encode()).hexdigest()[:16])
        self.address = address
        self.objects = _Objects(self.address)

    def check(self, *, writing: bool = False) -> None:
        """Look whether the bucket is there and may be read and, if asked, whether it may be written.

        Raises:
            InputError: It is not, or nothing answers.
        """
        objects = _Objects(self.address, attempts=2, within=_REACHED_WITHIN)
        try:
            objects.read("manifest.json")  # which no store has at its root
            if writing:
                objects.write(_WRITTEN, b"0")
                with contextlib.suppress(InputError):  # who may write need not be allowed to remove
                    objects.delete([_WRITTEN])
        except ConnectionError as error:
            raise InputError(str(error)) from None

    def entry(self, stage: str, key: str) -> RemoteEntry:
        """The entry of a key; what is in the bucket comes with its lock."""
        return RemoteEntry(self.place(stage, key), self.objects.below(f"{stage}/{key}"))

    def result(self, stage: str, key: str, only: Sequence[str] = ()) -> Entry:
        """The entry of a key with what it came to brought to this machine."""
        entry = self.entry(stage, key)
        entry.bring_result(only)
        return entry

    def manifest(self, stage: str, key: str) -> Manifest | None:
        """The manifest of a key in the bucket; nothing where there is none, or none that can be used, which is told."""
        return found[1] if (found := self.entry(stage, key).standing()) else None

    def runs(self) -> list[str]:
        """Names of the runs that have records, the one with the newest first."""
        written = self.objects.below("runs").written()
        newest_first = sorted(written, key=written.__getitem__, reverse=True)
        return list(dict.fromkeys(run for name in newest_first if not names.fault(run := name.partition("/")[0])))

    def run_folder(self, run_id: str) -> Path:
        """The folder of a run's records, as they are now."""
        folder, objects = self._records(run_id), self.objects.below(f"runs/{run_id}")
        for name in objects.safe_names():
            if (content := objects.read(name)) is not None:
                atomic_write(folder / name, content)
        return super().run_folder(run_id)

    def record(self, run_id: str, name: str, content: Mapping[str, Any]) -> None:
        """Write one of a run's records."""
        super().record(run_id, name, content)
        file = self._records(run_id) / name
        self.objects.below(f"runs/{run_id}").write(name, file.read_bytes())

    def lay(self, folder: str, last: str) -> None:
        """Send a folder; where that fails, it is not there either."""
        objects, files = self.objects.below(folder), tree_files(self.root / folder)
        try:
            for name in sorted(files, key=lambda name: name == last):
                objects.upload(files[name], name)
        except BaseException:
            shutil.rmtree(self.root / folder)
            raise

    def bring(self, folder: str) -> None:
        """Make a folder what it is in the bucket; names that begin with a dot are of this machine alone."""
        objects = self.objects.below(folder)
        there = {name for name in objects.safe_names() if not _stays_here(name)}
        present = _checkpoints(self.root / folder)
        for name in there - present.keys():
            _make_way(self.root / folder, name)
            objects.download(name, self.root / folder / name)
        for name in present.keys() - there:  # another machine has removed it
            present[name].unlink()

    def lose(self, folder: str) -> None:
        """Set a folder aside on this machine; what the bucket has of it goes, as every machine would bring it again."""
        objects = self.objects.below(folder)
        objects.delete(objects.names())
        super().lose(folder)

    def remove(self, folder: str) -> None:
        """Remove a folder here and from the bucket."""
        objects = self.objects.below(folder)
        objects.delete(objects.names())
        super().remove(folder)


@dataclass(frozen=True)
class _Lists:
    """Signed lists of a key's files in the bucket.

    Attributes:
        objects: The place of the key in the bucket.
        stage: The stage of the key.
        key: The key.
        tell: Is told why a list does not count.
    """

    objects: _Objects
    stage: str
    key: str
    tell: Callable[[str], None]

    def read(self, name: str) -> Files:
        """The files of a list; none where it is not there, or cannot be used, which is told."""
        content = self.objects.read(name)
        if content is None:
            return {}
        source = f"{self.objects.address}/{name}"
        try:
            listed = _plain(content, source)
            files = names.files(listed.get("files") if isinstance(listed, dict) else None, source)
            if why := signing.keys().fault("list", self._statement(name, files), listed.get("signature")):
                raise InputError(f"{source}: {why}")
            return files
        except InputError as error:
            self.tell(f"{error}; it is taken as if there were none")
            return {}

    def write(self, name: str, files: Files) -> None:
        """Write a list."""
        signature = signing.keys().sign("list", self._statement(name, files))
        listed = {"files": dict(files), **({"signature": signature} if signature else {})}
        self.objects.write(name, json.dumps(listed, indent=1).encode())

    def _statement(self, name: str, files: Files) -> list[Any]:
        """What the signature on a list vouches for."""
        return [self.stage, self.key, name, dict(files)]


class RemoteEntry(Entry):
    """A key's working folder, and its place in the bucket."""

    def __init__(self, folder: Path, objects: _Objects) -> None:
        super().__init__(folder)
        self.objects = objects
        self.holder = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._lists = _Lists(objects, self.stage, self.key, self._tell)
        self._changing = threading.RLock()  # what the bucket has of the key
        self._saved: dict[str, tuple[int, int, int]] = {}
        self._saved_at = time.monotonic()
        self._listed: set[str] = set()  # digests of the checkpoints that were saved last
        self._known: set[str] = set()  # digests of files that are in the bucket
        self._told: Manifest | None = None  # of a result that is here in part: on disk it would vouch for the whole

    @property
    def manifest(self) -> Manifest | None:
        """As in a folder; also of a key of whose result only some files were brought."""
        return super().manifest or self._told

    @contextlib.contextmanager
    def lock(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold the key alone, on this machine and by a lease in the bucket; what the bucket has of it is here then.

        A key that is done needs no lease.
        """
        with super().lock(waiting), contextlib.ExitStack() as stack:
            if not self._wait(waiting):
                self._bring_result()
                yield
                return
            stack.callback(self._give_back)
            stack.enter_context(_every(RENEW_EVERY, lambda: self.objects.write("lease", self.holder.encode())))
            self._bring_result()
            self._bring_partial()
            with _every(SAVE_EVERY, self._save):
                yield

    def bring_result(self, only: Sequence[str] = ()) -> None:
        """Bring what a key came to, or the files of it that are named, without working on it.

        Raises:
            StageError: It is not what its manifest says.
        """
        if not only:
            with super().lock(lambda: None):
                self._bring_result()
                self.require_whole()
            return
        if standing := self.standing():
            files, self._told = standing[1].outputs, standing[1]
        else:
            files = self._lists.read("failed.json")
        wanted = {name: digest for name, digest in files.items() if name in only}
        self._bring(wanted, self.outputs)
        if self._told is not None and (lacking := [name for name in wanted if not (self.outputs / name).is_file()]):
            raise StageError(
                f"{self.objects.address}: {lacking[0]} is missing or not what its manifest says, so it is not used; "
                "run the same again, which computes it anew"
            )

    def bring_partial(self) -> None:
        """Bring the checkpoints, without working on the key."""
        with super().lock(lambda: None):
            self._bring_partial()

    def clear(self, *, partial: bool) -> None:
        """Remove what a try left behind, here and in the bucket."""
        with self._changing:
            super().clear(partial=partial)
            self.objects.delete(["manifest.json", "failed.json"])
            if partial:
                stale = self.objects.below("objects").names()
                self.objects.delete(["partial.json", *(f"objects/{name}" for name in stale)])
                self._known, self._listed, self._saved = set(), set(), {}

    def commit(self, manifest: Manifest) -> Manifest:
        """Declare the key done, unless somebody else has: then take that result."""
        self._send({name: self.outputs / name for name in manifest.outputs})
        manifest = manifest.signed()
        content = json.dumps(asdict(manifest), indent=1, allow_nan=False).encode()
        with self._changing:
            if not self.objects.write("manifest.json", content, new=True):
                if self.standing() is None:  # what stands there cannot be used
                    self.objects.write("manifest.json", content)
                self._bring_result()
                manifest = self.manifest or manifest
            super().commit(manifest)
            wanted = {f"objects/{digest}" for digest in manifest.outputs.values()}
            stale = {f"objects/{name}" for name in self.objects.below("objects").names()} - wanted
            self.objects.delete(["partial.json", "failed.json", *sorted(stale)])
        return manifest

    def fail(self, *, partial: bool) -> None:
        """Keep what a failed try wrote as evidence."""
        super().fail(partial=partial)
        try:
            with self._changing:
                files = tree_files(self.outputs)
                self._lists.write("failed.json", dict(zip(files, self._send(files), strict=True)))
                if partial:
                    self.objects.delete(["partial.json"])
                else:
                    self._save(at_once=True)
        except (ConnectionError, InputError) as error:
            print(f"{error}; what the failed try left is on this machine only, in {self.folder}", flush=True)

    # The lease ------------------------------------------------------------------------------------------------------

    def _wait(self, waiting: Callable[[], None]) -> bool:
        """Wait for the lease; false where the key is done and there is nothing to wait for."""
        told = False
        while self.standing() is None:
            if self.objects.write("lease", self.holder.encode(), new=True):
                return True
            if (age := self.objects.age("lease")) is not None and age > LEASE:
                self.objects.delete(["lease"])
                continue
            if not told:
                waiting()
                told = True
            time.sleep(_ASK_EVERY)
        return False

    def _give_back(self) -> None:
        with contextlib.suppress(ConnectionError):
            if self.objects.read("lease") == self.holder.encode():
                self.objects.delete(["lease"])

    # From the bucket ------------------------------------------------------------------------------------------------

    def standing(self) -> tuple[bytes, Manifest] | None:
        """The manifest in the bucket; nothing where there is none, or none that can be used, which is told."""
        source = f"{self.objects.address}/manifest.json"
        if (content := self.objects.read("manifest.json")) is None:
            return None
        try:
            return content, Manifest.parse(_plain(content, source), self.stage, self.key, source)
        except InputError as error:
            self._tell(f"{error}; the result does not count")
            return None

    def _bring_result(self) -> None:
        standing = self.standing()
        if standing and self.manifest_file.is_file() and self.manifest_file.read_bytes() == standing[0]:
            return
        self.manifest_file.unlink(missing_ok=True)
        files = standing[1].outputs if standing else self._lists.read("failed.json")
        self._bring(files, self.outputs, tree_files(self.outputs))
        if standing:
            atomic_write(self.manifest_file, standing[0])

    def _bring_partial(self) -> None:
        files = self._lists.read("partial.json")
        if own := [name for name in files if _stays_here(name)]:
            self._tell(
                f"{self.objects.address}/partial.json: the name {names.shown(own[0])} is of files that each machine "
                "makes for itself and no machine sends; it is taken as if there were none"
            )
            files = {}
        self._bring(files, self.partial, _checkpoints(self.partial))
        if not all(_is(self.partial / name, digest) for name, digest in files.items()):
            print(f"{self.objects.address}: its checkpoints are damaged; beginning anew", flush=True)
            shutil.rmtree(self.partial)
            self.partial.mkdir()
            files = {}
        self._listed = set(files.values())
        self._known |= self._listed
        self._saved = _state(self.partial)

    def _bring(self, files: Files, folder: Path, present: Iterable[str] = ()) -> None:
        """Make a folder hold these files instead of those present; the caller sees whether they are whole."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in set(present) - files.keys():
            (folder / name).unlink()
        for name in files:
            _make_way(folder, name)

        def bring(name: str, digest: str) -> None:
            path = folder / name
            if _is(path, digest):
                return
            path.unlink(missing_ok=True)
            arriving = self.folder / f".arriving-{digest}-{secrets.token_hex(4)}"
            try:
                self.objects.download(f"objects/{digest}", arriving)
                if _is(arriving, digest):
                    arriving.replace(path)
                elif arriving.exists():
                    self._tell(f"{self.objects.address}/objects/{digest}: its content has another SHA-256; not used")
            finally:
                arriving.unlink(missing_ok=True)

        with ThreadPoolExecutor(s3.CONNECTIONS) as pool:
            list(pool.map(bring, files.keys(), files.values()))

    # To the bucket --------------------------------------------------------------------------------------------------

    def _send(self, files: Mapping[str, Path]) -> list[str]:
        """Send files that do not change any more; their digests."""
        with ThreadPoolExecutor(s3.CONNECTIONS) as pool:
            return list(pool.map(self._send_one, files.values()))

    def _send_one(self, path: Path) -> str:
        digest = file_sha256(path)
        if digest not in self._known:
            self.objects.upload(path, f"objects/{digest}")
            self._known.add(digest)
        return digest

    def _save(self, at_once: bool = False) -> None:
        """Save the checkpoints as they are at one moment, if they have changed."""
        state = _state(self.partial)
        if not state or state == self._saved:
            return
        overdue = at_once or time.monotonic() - self._saved_at > SAVE_AT_LEAST_EVERY
        with self._changing, _not_measuring(overdue) as allowed, _snapshot(self.folder, self.partial, state) as files:
            if not allowed or files is None or self.manifest_file.exists():
                return
            before = self._listed
            digests = {name: self._send_copy(path, state[name][1]) for name, path in files.items()}
            if None in digests.values():
                return
            listed = {name: digest for name, digest in digests.items() if digest}
            self._lists.write("partial.json", listed)
            self._listed, self._saved, self._saved_at = set(listed.values()), state, time.monotonic()
            stale = before - self._listed
            self.objects.delete(f"objects/{digest}" for digest in stale)
            self._known -= stale

    def _send_copy(self, path: Path, size: int) -> str | None:
        """Send the first `size` bytes of a file that may grow; nothing where it changes otherwise."""
        if size > _IN_MEMORY:
            digest = self._send_one(path)
            return digest if path.stat().st_size == size else None
        with path.open("rb") as file:
            content = file.read(size)
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self._known:
            self.objects.write(f"objects/{digest}", content)
            self._known.add(digest)
        return digest


@contextlib.contextmanager
def _snapshot(
    folder: Path, partial: Path, state: Mapping[str, tuple[int, int, int]]
) -> Iterator[dict[str, Path] | None]:
    """Links to the checkpoints, all of one moment, or nothing where they are just being written."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="saving-") as saving:
        links = {name: Path(saving) / str(number) for number, name in enumerate(state)}
        try:
            for name, link in links.items():
                link.hardlink_to(partial / name)
        except FileNotFoundError:
            yield None
        else:
            yield links if _state(partial) == state else None


def _plain(content: bytes, source: str) -> Any:
    """What an object says, as plain data.

    Raises:
        InputError: It is not JSON.
    """
    return parse_json(content, source)


def _make_way(folder: Path, name: str) -> None:
    """Make the folders that a file lies in, whatever stood in their place or in its own."""
    path = folder / name
    for parent in reversed(path.parents):
        if parent.is_relative_to(folder) and parent != folder and (parent.is_symlink() or parent.is_file()):
            parent.unlink()
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and file_sha256(path) == digest


def _stays_here(name: str) -> bool:
    """Whether a file is of one machine alone: its name, or that of a folder that it lies in, begins with a dot.

    Such files are of libraries that trust what lies there: Ultralytics reads its cache of labels as a pickle.
    """
    return any(part.startswith(".") for part in name.split("/"))


def _checkpoints(folder: Path) -> dict[str, Path]:
    """Files below a folder by name, but those whose names, or those of their folders, begin with a dot, and links."""
    found: dict[str, Path] = {}
    for root, folders, inside in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(root, name) for name in inside if not name.startswith(".")]
        found |= {path.relative_to(folder).as_posix(): path for path in paths if not path.is_symlink()}
    return dict(sorted(found.items()))


def _state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What tells whether files have changed, by name."""
    state = {}
    for name, path in _checkpoints(folder).items():
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            state[name] = (found.st_mtime_ns, found.st_size, found.st_ino)
    return state


@contextlib.contextmanager
def _not_measuring(overdue: bool) -> Iterator[bool]:
    """Keep measurements from beginning; false where one is under way, unless it has gone on for too long."""
    with default_path().open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            yield overdue
        else:
            yield True


@contextlib.contextmanager
def _every(seconds: float, work: Callable[[], object]) -> Iterator[None]:
    """Do something again and again in a thread; if the bucket can't be reached, the next time has to do."""
    end = threading.Event()

    def repeat() -> None:
        while not end.wait(seconds):
            try:
                work()
            except (OSError, InputError) as error:
                print(f"{error}; what is computed goes on, and is sent later", flush=True)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


class _Objects:
    """The objects below an address."""

    def __init__(self, address: str, attempts: int = s3.ATTEMPTS, client: Any = None, within: float = 10.0) -> None:
        self.address = address
        self.bucket, prefix = s3.split(address)
        self.prefix = f"{prefix}/" if prefix else ""
        self.client = client or s3.connect(address, attempts, within)

    def below(self, path: str) -> _Objects:
        """Those below a path."""
        return _Objects(f"{self.address}/{path}", client=self.client)

    def read(self, name: str) -> bytes | None:
        """The content of an object, if there is one."""
        with s3.foreseen(self.address):
            try:
                answer = self.client.get_object(Bucket=self.bucket, Key=self.prefix + name)
            except self.client.exceptions.NoSuchKey:
                return None
            content: bytes = answer["Body"].read(_LONGEST_RECORD + 1)
            if len(content) > _LONGEST_RECORD:
                raise InputError(
                    f"{self.address}/{name}: more than {_LONGEST_RECORD:,} bytes, which no record of a store has; "
                    "remove the object"
                )
            return content

    def write(self, name: str, content: bytes, *, new: bool = False) -> bool:
        """Write an object; with `new` only where there is none, and false where there is another."""
        with s3.foreseen(self.address):
            try:
                condition = {"IfNoneMatch": "*"} if new else {}
                self.client.put_object(Bucket=self.bucket, Key=self.prefix + name, Body=content, **condition)
            except self.client.exceptions.ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] not in (409, 412):
                    raise
                return self.read(name) == content  # it may be ours, where only the answer was lost
        return True

    def upload(self, path: Path, name: str) -> None:
        """Send a file, a large one by parts."""
        with s3.foreseen(self.address):
            self.client.upload_file(str(path), self.bucket, self.prefix + name)

    def download(self, name: str, path: Path) -> None:
        """Fetch an object, if there is one; the file is there whole or not at all."""
        with s3.foreseen(f"{self.address}/{name}"), room(path):
            try:
                self.client.download_file(self.bucket, self.prefix + name, str(path))
            except self.client.exceptions.ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                    raise

    def delete(self, unwanted: Iterable[str]) -> None:
        """Remove objects, which need not exist."""
        keys = [{"Key": self.prefix + name} for name in unwanted]
        with s3.foreseen(self.address):
            for start in range(0, len(keys), 1000):
                self.client.delete_objects(Bucket=self.bucket, Delete={"Objects": keys[start : start + 1000]})

    def names(self) -> list[str]:
        """Names of all objects."""
        return list(self.written())

    def safe_names(self) -> list[str]:
        """Names of all objects that can be files of a folder; others are told and left alone."""
        safe = []
        there = set(self.names())
        for name in sorted(there):
            why = names.fault(name)
            if any(str(parent) in there for parent in PurePosixPath(name).parents):
                why = why or "its folder is an object, too"
            if why:
                tell(f"{self.address}: the object {names.shown(name)} is left alone: {why}")
            else:
                safe.append(name)
        return safe

    def written(self) -> dict[str, datetime]:
        """When each object was written, by name."""
        with s3.foreseen(self.address):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
            entries = (entry for page in pages for entry in page.get("Contents", []))
            return {entry["Key"].removeprefix(self.prefix): entry["LastModified"] for entry in entries}

    def age(self, name: str) -> float | None:
        """Seconds since an object was written, by the server's clock; nothing where there is none."""
        with s3.foreseen(self.address):
            try:
                found = self.client.head_object(Bucket=self.bucket, Key=self.prefix + name)
            except self.client.exceptions.ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                    return None
                raise
        now = parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"])
        return float((now - found["LastModified"]).total_seconds())
