"""Datasets at an address, on a real server that speaks S3, and over https."""

from __future__ import annotations

import datetime
import io
import os
import re
import ssl
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import numpy as np
import object_store
import pytest
from PIL import Image
from typer.testing import CliRunner

from yolov8_nas import local, preflight
from yolov8_nas.cli import app
from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.data import remote
from yolov8_nas.data.check import check_source, source_digest
from yolov8_nas.errors import InputError
from yolov8_nas.stages import data_prep
from yolov8_nas.stages.stage import Outcome, open_store, run_stage

pytestmark = pytest.mark.slow

TARGET = TargetConfig(hardware="cpu-1t", constraints=("params<=9M",))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with object_store.running(tmp_path_factory.mktemp("swift")) as environment:
        yield environment


@dataclass
class Bucket:
    """A bucket and what is asked of it."""

    client: Any
    name: str
    folder: Path

    def put(self, key: str, content: bytes) -> str:
        self.client.put_object(Bucket=self.name, Key=key, Body=content)
        return f"s3://{self.name}/{key}"

    def put_folder(self, key: str, folder: Path) -> str:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.put(f"{key}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"s3://{self.name}/{key}/"

    def prepare(self, source: str, store: str = "store") -> Outcome:
        return run_stage(
            "data-prep",
            config=RunConfig(data=source, targets=(TARGET,)),
            target=None,
            inputs={},
            output=self.folder / "data.tar",
            store=self.folder / store,
            run_id="r",
        )


@pytest.fixture
def bucket(server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    with object_store.bucket() as (client, name):
        yield Bucket(client, name, tmp_path)


def write_dataset(root: Path, seed: int = 0) -> Path:
    """A small sound dataset in YOLO's layout."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", 10), ("val", 4)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / split / f"{split}{i}.png")
            (root / "labels" / split / f"{split}{i}.txt").write_text(f"{i % 2} 0.5 0.5 0.25 0.25\n")
    (root / "data.yaml").write_text("{train: images/train, val: images/val, names: [dent, hole]}")
    return root


def packed(folder: Path) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        tar.add(folder, "top")
    return stream.getvalue()


def test_a_dataset_in_s3_is_the_one_that_was_put_there(bucket: Bucket) -> None:
    folder = write_dataset(bucket.folder / "line3")
    digests = {
        bucket.prepare(str(folder)).digest,
        bucket.prepare(bucket.put("deep/line3.tar.gz", packed(folder))).digest,
        bucket.prepare(bucket.put_folder("deep/line3", folder)).digest,
    }
    assert len(digests) == 1
    assert not list((bucket.folder / "store").rglob("fetched")), "downloads go away with the other checkpoints"


def test_the_key_follows_the_content_and_costs_no_download(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_dataset(bucket.folder / "first")
    address = bucket.put("line3.tar.gz", packed(first))
    made = bucket.prepare(address)

    with monkeypatch.context() as offline:
        offline.setattr(remote, "fetch", lambda *_, **__: pytest.fail("downloaded again"))
        assert (bucket.prepare(address).status, bucket.prepare(address).key) == ("cached", made.key)
        config = RunConfig(data=address, targets=(TARGET,))
        assert data_prep.find_classes(config, open_store(bucket.folder / "store")) == ("dent", "hole")

    bucket.put("line3.tar.gz", packed(write_dataset(bucket.folder / "second", seed=1)))
    replaced = bucket.prepare(address)
    assert replaced.status == "done" and replaced.key != made.key and replaced.digest != made.digest

    directory = bucket.put_folder("parts", first)
    before = source_digest(directory)
    bucket.put("parts/labels/val/val0.txt", b"1 0.5 0.5 0.25 0.25\n")
    assert source_digest(directory) != before


def test_a_download_goes_on_where_it_was_cut_off(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    content = np.random.default_rng(0).bytes(10_000)
    address = bucket.put("a/line3.tar", content)
    monkeypatch.setattr(remote, "PART", 1024)
    monkeypatch.setattr(remote, "_AT_ONCE", 1)
    sent: list[str] = []
    opened = remote._S3._opened

    def cut_off_after(count: int) -> Callable[..., Any]:
        def answer(place: Any, file: Any, span: Any) -> Any:
            if len(sent) == count:
                raise KeyboardInterrupt
            sent.append(span["Range"])
            return opened(place, file, span)

        return answer

    for count in (4, 7):
        monkeypatch.setattr(remote._S3, "_opened", cut_off_after(count))
        with pytest.raises(KeyboardInterrupt):
            remote.fetch(address, bucket.folder / "fetched")
    # It may also be cut off while parts are appended to the first.
    parts = bucket.folder / "fetched" / remote.look(address).digest[:16] / ".parts"
    first, second = parts / "0-0", parts / "0-1024"
    first.write_bytes(first.read_bytes() + second.read_bytes() + b"torn")
    second.unlink()
    monkeypatch.setattr(remote._S3, "_opened", cut_off_after(100))
    path = remote.fetch(address, bucket.folder / "fetched")
    assert (path.name, path.read_bytes()) == ("line3.tar", content)
    assert len(sent) == len(set(sent)) == 10, "each part once"
    assert remote.fetch(address, bucket.folder / "fetched") == path and len(sent) == 10


def test_a_dataset_replaced_meanwhile_is_refused(bucket: Bucket) -> None:
    address = bucket.put("line3.tar", b"one")
    expected = source_digest(address)
    bucket.put("line3.tar", b"two")
    with pytest.raises(InputError, match=r"line3\.tar: was replaced since this run began; start the run again"):
        remote.fetch(address, bucket.folder / "fetched", expected=expected)


def test_what_cannot_be_files_of_a_folder_is_refused(bucket: Bucket) -> None:
    bucket.put("clash/a", b"x")
    bucket.put("clash/a/b", b"x")
    with pytest.raises(InputError, match="'a' is both an object and a folder"):
        remote.look(f"s3://{bucket.name}/clash/")
    bucket.put("out/x/../../evil", b"x")
    with pytest.raises(InputError, match=r"'x/../../evil' cannot be a file of a folder"):
        remote.look(f"s3://{bucket.name}/out/")


def test_too_large_a_dataset_is_refused(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    address = bucket.put("line3.tar", bytes(1000))
    monkeypatch.setattr(remote.store, "MAX_BYTES", 999)
    with pytest.raises(InputError, match=r"line3\.tar: 1,000 bytes, more than 999"):
        remote.look(address)


@dataclass
class Run:
    """A run from the command line whose data is at an address."""

    folder: Path
    result: Any = field(default=None)

    def __call__(self, address: str) -> str:
        config = self.folder / "config.yaml"
        config.write_text(
            f"{{name: x, data: {address}, space: tiny, imgsz: 64, "
            "targets: [{hardware: cpu-1t, constraints: ['params<=9M']}]}"
        )
        self.result = CliRunner().invoke(app, ["run", str(config), "--workdir", str(self.folder / "work")])
        assert "Traceback" not in self.result.output
        return str(self.result.stderr)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(local, "run_pipeline", lambda *_: pytest.fail("the run was started"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return Run(tmp_path)


def test_bad_addresses_are_told_at_the_start(bucket: Bucket, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put("line3/data.yaml", b"x")

    def told(address: str, *parts: str) -> None:
        error = run(address)
        assert run.result.exit_code == 2, run.result.output
        assert error.startswith(f"error: {address}") and error.count("\n") == 1, error
        assert not [part for part in parts if part not in error], error

    told("s3://no-such-bucket-of-ours/line3.tar", "no bucket 'no-such-bucket-of-ours'", "AWS_ENDPOINT_URL")
    told(f"s3://{bucket.name}/line4.tar", "no such object", "correct the key")
    told(f"s3://{bucket.name}/line3", "folder", f"s3://{bucket.name}/line3/")
    told(f"s3://{bucket.name}/line4/", "there is nothing")
    told(f"s3://{bucket.name}/line3/data.yaml", "its folder")
    told("ftp://host/line3.tar", "s3:// or https://")
    address = f"s3://{bucket.name}/line3/"
    with monkeypatch.context() as wrong:
        wrong.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        told(address, "access refused", "credentials")
    with monkeypatch.context() as unreachable:
        unreachable.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        told(address, "127.0.0.1:9", "check AWS_ENDPOINT_URL")
        unreachable.setenv("AWS_ENDPOINT_URL", "no url")
        told(address, "no url", "check AWS_ENDPOINT_URL")
    with monkeypatch.context() as nobody:
        nobody.delenv("AWS_ACCESS_KEY_ID")
        nobody.delenv("AWS_SECRET_ACCESS_KEY")
        told(address, "no AWS credentials", "AWS_ACCESS_KEY_ID")


def test_a_look_at_the_start_downloads_nothing(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    address = bucket.put("line3.tar.gz", packed(write_dataset(bucket.folder / "data")))
    config = RunConfig(data=address, space="tiny", imgsz=64, targets=(TARGET,))
    store = bucket.folder / "store"
    with monkeypatch.context() as offline:
        offline.setattr(remote, "fetch", lambda *_, **__: pytest.fail("downloaded"))
        assert preflight.check(config, bucket.folder / "work", str(store)).names == ()
    assert not store.exists()
    assert data_prep.find_classes(config, open_store(store)) == ("dent", "hole")
    monkeypatch.setattr(remote._S3, "_opened", lambda *_: pytest.fail("open-run has downloaded it already"))
    bucket.prepare(address)
    assert preflight.check(config, bucket.folder / "work", str(store)).names == ("dent", "hole")


class Files(BaseHTTPRequestHandler):
    """Sends files with an ETag, and parts of them where `ranges` is set."""

    content: dict[str, bytes] = {}  # noqa: RUF012 - of the server, not of a request
    ranges = True
    headers_of: dict[str, str] = {"ETag": '"1"'}  # noqa: RUF012

    def do_GET(self) -> None:
        content = self.content.get(self.path)
        if content is None:
            return self.send_error(404)
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(span[1]), int(span[2]) + 1) if span and self.ranges else (0, len(content))
        self.send_response(206 if span and self.ranges else 200)
        if span and self.ranges:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        for name, value in self.headers_of.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content[start:end])))
        self.end_headers()
        return self.wfile.write(content[start:end]) and None

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def https(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a web server whose certificate this process trusts."""
    certificate = tmp_path / "certificate.pem"
    certificate.write_bytes(_certificate())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield f"https://127.0.0.1:{server.server_port}"
    server.shutdown()


def _certificate() -> bytes:
    """A key and a certificate for 127.0.0.1 that it has signed itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, raw = serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL
    return key.private_bytes(pem, raw, serialization.NoEncryption()) + certificate.public_bytes(pem)


@pytest.mark.parametrize("ranges", [True, False], ids=["by parts", "as a whole"])
def test_an_archive_over_https(https: str, ranges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Files, "ranges", ranges)
    monkeypatch.setattr(remote, "PART", 4096)
    monkeypatch.setitem(Files.content, "/a/line3.tar.gz", packed(write_dataset(tmp_path / "data")))
    address = f"{https}/a/line3.tar.gz"
    found = check_source(address)
    assert (found.source, found.names, sum(found.images.values())) == ("line3", ("dent", "hole"), 14)
    before = source_digest(address)
    monkeypatch.setitem(Files.headers_of, "ETag", '"2"')
    assert source_digest(address) != before


def test_what_https_cannot_give(https: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Files.content, "/line3.tar", b"x" * 100)
    for address, told in (
        (f"{https}/line4.tar", "404"),
        (https.replace("//", "//user:secret@") + "/line3.tar", "user and password"),
        (f"{https}/", "does not name a dataset"),
    ):
        with pytest.raises(InputError, match=told) as error:
            remote.look(address)
        assert "secret" not in str(error.value)
    monkeypatch.setattr(Files, "headers_of", {})
    with pytest.raises(InputError, match="neither an ETag nor a time"):
        remote.look(f"{https}/line3.tar")
    monkeypatch.setenv("SSL_CERT_FILE", os.devnull)
    with pytest.raises(InputError, match="SSL_CERT_FILE"):
        remote.look(f"{https}/line3.tar")
