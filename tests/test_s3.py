"""Datasets and stage stores on a real server that speaks S3, and datasets over https."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import object_store
import pytest
from PIL import Image
from plain_settings import Plain
from typer.testing import CliRunner
from web_files import Files

from pipelines import plan
from yolov8_nas.commands.main import app
from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.credentials import DATA_KEYS
from yolov8_nas.data import remote
from yolov8_nas.data.check import check_source, source_digest
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.run import local, preflight
from yolov8_nas.run.summary import RUN_FILE
from yolov8_nas.runner.settings import StageSettings
from yolov8_nas.runner.stage import Outcome, Stage, StageContext, open_store, run_stage
from yolov8_nas.stages import find_stage
from yolov8_nas.stages.data_prep import classes as data_prep
from yolov8_nas.store import remote as remote_store
from yolov8_nas.store import s3

pytestmark = pytest.mark.slow

TARGET = TargetConfig(hardware="cpu-1t", constraints=("params<=9M",))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with object_store.running(tmp_path_factory.mktemp("swift")) as environment:
        yield environment


def test_data_may_have_keys_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "store")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-store")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")

    def key(data: bool) -> str:
        return str(s3.connect("s3://bucket/key", data=data)._request_signer._credentials.access_key)

    assert (key(data=True), key(data=False)) == ("store", "store")
    monkeypatch.setenv(DATA_KEYS[0], "data")
    with pytest.raises(InputError, match="go together"):
        key(data=True)
    monkeypatch.setenv(DATA_KEYS[1], "secret-of-data")
    assert (key(data=True), key(data=False)) == ("data", "store")
    assert remote._S3("s3://bucket/key", True).client._request_signer._credentials.access_key == "data"


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
            find_stage("data-prep"),
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
    monkeypatch.setattr(remote.archive, "MAX_BYTES", 999)
    with pytest.raises(InputError, match=r"line3\.tar: 1,000 bytes, more than 999"):
        remote.look(address)


@dataclass
class Run:
    """A run from the command line whose data is at an address."""

    folder: Path
    result: Any = field(default=None)

    def __call__(self, address: str | None, store: str | None = None) -> str:
        config = self.folder / "config.yaml"
        config.write_text(
            f"{{name: x, data: {address or 'null'}, store: {store or 'null'}, space: tiny, imgsz: 64, "
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
    for store, part in (
        ("s3://no-such-bucket-of-ours/store", "no bucket"),
        ("s3://", "names no bucket"),
        ("gs://bucket/store", "s3://BUCKET/PREFIX"),
    ):
        assert part in run(None, store) and run.result.exit_code == 2
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


def machine(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be another machine: one that has nothing yet of what is in the store."""
    monkeypatch.setenv(remote_store.CACHE_VARIABLE, str(folder / name))


class Bench:
    """A stage store in a bucket, and a stage that is run in it."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.store = f"s3://{bucket.name}/team/store"
        self.calls = 0

    def run(self, body: Callable[[StageContext], None], run_id: str = "r", store: str | None = None) -> Outcome:
        def count(ctx: StageContext) -> None:
            self.calls += 1
            body(ctx)

        return run_stage(
            Stage("search", 1, lambda config, target: Plain(seed=config.seed), count),
            config=RunConfig(targets=(TARGET,)),
            target="cpu-1t-fp32",
            inputs={},
            output=self.bucket.folder / "out.tar",
            store=store or self.store,
            run_id=run_id,
        )

    def sent(self) -> str:
        with tarfile.open(self.bucket.folder / "out.tar") as tar:
            return "".join(file.read().decode() for name in tar.getnames() if (file := tar.extractfile(name)))

    def names(self, outcome: Outcome) -> dict[str, bytes]:
        """The objects of a key by name."""
        objects = remote_store._Objects(f"{self.store}/search/{outcome.key}")
        return {name: objects.read(name) or b"" for name in objects.names()}


@pytest.fixture
def bench(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bench:
    machine(bucket.folder, "first", monkeypatch)
    return Bench(bucket)


def write(text: str) -> Callable[[StageContext], None]:
    return lambda ctx: (ctx.out / "result.txt").write_text(text) and None


def test_a_result_is_there_for_every_machine(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def body(ctx: StageContext) -> None:
        (ctx.partial / "checkpoint").write_text("of no use any more")
        write("made once")(ctx)

    first = bench.run(body)
    assert bench.run(body, store=str(bench.bucket.folder / "store")).digest == first.digest, "as in a folder"
    machine(bench.bucket.folder, "second", monkeypatch)
    again = bench.run(body, "r2")
    assert (again.status, again.key, again.digest, bench.calls) == ("cached", first.key, first.digest, 2)
    names = bench.names(first)
    assert len(names) == 2 and json.loads(names["manifest.json"])["digest"] == first.digest

    machine(bench.bucket.folder, "third", monkeypatch)
    store = open_store(bench.store)
    assert (store.result("search", first.key).outputs / "result.txt").read_text() == "made once"
    records = {run: {file.name for file in store.run_folder(run).iterdir()} for run in ("r", "r2")}
    told = {"cpu-1t-fp32.search.json"}
    assert records == {"r": told | {"begun.cpu-1t-fp32.search.json"}, "r2": told}, "a cached stage computes nothing"


def test_a_few_files_of_a_result_come_with_what_is_known_of_the_whole(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(ctx: StageContext) -> None:
        write("small")(ctx)
        (ctx.out / "dataset.txt").write_text("large")

    made = bench.run(body)
    machine(bench.bucket.folder, "second", monkeypatch)
    told = open_store(bench.store).result("search", made.key, ("result.txt",))
    assert [file.name for file in told.outputs.iterdir()] == ["result.txt"]
    assert told.manifest and (told.manifest.digest, set(told.manifest.outputs)) == (
        made.digest,
        {"result.txt", "dataset.txt"},
    )
    assert (bench.run(body, "r2").status, bench.sent(), bench.calls) == ("cached", "largesmall", 1)


def test_rates_of_a_plan_come_from_runs_in_a_bucket(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(targets=(TARGET,))
    for run_id in ("first", "again"):
        open_store(bench.store).record(run_id, RUN_FILE, {"config": config.model_dump(mode="json")})
        bench.run(write("made once"), run_id)
    machine(bench.bucket.folder, "second", monkeypatch)
    assert set(open_store(bench.store).runs()) == {"first", "again"}
    rate, source = plan.Rates.load(None, bench.store).find("search", config, TARGET)
    assert rate is not None and source == "run first", "the other one has computed nothing"
    with pytest.raises(InputError, match="no-such-bucket-of-ours"):
        plan.Rates.load(None, "s3://no-such-bucket-of-ours/store")


def test_a_tampered_result_is_not_used(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = bench.run(write("sound"))
    (name,) = (name for name in bench.names(outcome) if name.startswith("objects/"))
    for tamper in (
        lambda key: bench.bucket.put(key, b"evil"),
        lambda key: bench.bucket.client.delete_object(Bucket=bench.bucket.name, Key=key),
    ):
        tamper(f"team/store/search/{outcome.key}/{name}")
        machine(bench.bucket.folder, f"machine {bench.calls}", monkeypatch)
        assert bench.run(write("sound")).status == "done"
        assert (bench.sent(), bench.names(outcome)[name]) == ("sound", b"sound")
    assert bench.calls == 3


def test_of_two_writers_the_first_has_made_the_result(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    inner: list[Outcome] = []

    def slow(ctx: StageContext) -> None:
        with monkeypatch.context() as other:  # that takes this one for dead
            machine(bench.bucket.folder, "second", other)
            other.setattr(remote_store, "LEASE", -1)
            inner.append(bench.run(write("of the second")))
        write("of the first")(ctx)

    outcome = bench.run(slow)
    assert [inner[0].status, outcome.status] == ["done", "done"]
    assert (outcome.digest, bench.sent()) == (inner[0].digest, "of the second")
    assert len(bench.names(outcome)) == 2
    assert bench.run(slow).digest == outcome.digest and len(inner) == 1


def test_another_machine_waits_for_the_lease(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_store, "_ASK_EVERY", 0.2)
    begun, go_on = threading.Event(), threading.Event()

    def slow(ctx: StageContext) -> None:
        begun.set()
        go_on.wait()
        write("made once")(ctx)

    worker = threading.Thread(target=bench.run, args=(slow,), daemon=True)
    worker.start()
    assert begun.wait(100)
    machine(bench.bucket.folder, "second", monkeypatch)
    (key,) = (path.name for path in (open_store(bench.store).root.parents[2] / "first").glob("stores/*/search/*"))
    entry = open_store(bench.store).entry("search", key)
    with entry.lock(go_on.set):
        assert (entry.outputs / "result.txt").read_text() == "made once"
    worker.join()


def test_a_failure_is_known_to_other_machines(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(ctx: StageContext) -> None:
        (ctx.partial / "checkpoint").write_text("of no use")
        (ctx.out / "table.txt").write_text("what was tried")
        raise StageError("a poor fit")

    outcome = bench.run(fail)
    machine(bench.bucket.folder, "second", monkeypatch)
    assert bench.run(fail).error == "a poor fit" and bench.calls == 1, "not tried again in the same run"
    folder = open_store(bench.store).result("search", outcome.key).outputs
    assert sorted(path.name for path in folder.iterdir()) == ["status.json", "table.txt"]
    assert "partial.json" not in bench.names(outcome)
    machine(bench.bucket.folder, "third", monkeypatch)
    assert bench.run(write("better"), "r2").status == "done"
    assert (bench.sent(), len(bench.names(outcome))) == ("better", 2)


def test_a_shared_part_is_made_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def make(ctx: StageContext) -> None:
        made.append(1)
        (ctx.out / "table.txt").write_text("rows")

    for number, name in enumerate(("first", "second")):
        machine(bench.bucket.folder, name, monkeypatch)
        run = Stage(
            "search", number, lambda c, t: StageSettings(), lambda ctx: ctx.share("tables", 1, Plain(device="a"), make)
        )
        config = RunConfig(targets=(TARGET,))
        given = {"target": "cpu-1t-fp32", "inputs": {}, "output": bench.bucket.folder / "out.tar"}
        run_stage(run, config=config, store=bench.store, run_id="r", **given)
        assert bench.sent() == "rows"
    assert made == [1]


WORKER = """
    import os, signal, sys, time
    from pathlib import Path
    from yolov8_nas.store import remote as remote_store
    from yolov8_nas.config import RunConfig, TargetConfig
    from yolov8_nas.files import atomic_write, file_sha256
    from yolov8_nas.runner.settings import StageSettings
    from yolov8_nas.runner.stage import Stage, run_stage

    folder, store, kill = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "kill"
    remote_store.SAVE_EVERY, remote_store.LEASE, remote_store._ASK_EVERY = 0.1, 1.0, 0.5

    def run(ctx):
        file = ctx.partial / "deep" / "epochs"
        done = len(file.read_text()) if file.exists() else 0
        (ctx.partial / ".here").write_text("stays on this machine")
        if not kill:
            assert not (ctx.partial / "link").exists()
        for epoch in range(done, 4):
            with (folder / "trained").open("a") as log:
                log.write(f"{epoch}\\n")
            atomic_write(file, "x" * (epoch + 1))
            if kill and epoch == 1:
                (ctx.partial / "link").symlink_to(file)
                (ctx.out / "half").write_text("x")
                objects = ctx.store.objects.below(f"supernet-train/{ctx.partial.parent.name}")
                while file_sha256(file).encode() not in (objects.read("partial.json") or b""):
                    time.sleep(0.1)
                assert b".here" not in objects.read("partial.json")
                os.kill(os.getpid(), signal.SIGKILL)
        (ctx.out / "weights").write_text("trained")

    target = TargetConfig(hardware="cpu", constraints=("latency<=8ms",))
    stage = Stage("supernet-train", 1, lambda c, t: StageSettings(), run)
    outcome = run_stage(stage, config=RunConfig(targets=(target,)), target=None, inputs={}, output=folder / "out.tar",
                        store=store, run_id="r")
    print(outcome.status)
"""


def test_a_killed_stage_goes_on_elsewhere(bench: Bench) -> None:
    folder = bench.bucket.folder

    def work(name: str, what: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", textwrap.dedent(WORKER), str(folder), bench.store, what]
        environment = {**os.environ, remote_store.CACHE_VARIABLE: str(folder / name)}
        return subprocess.run(command, env=environment, check=False, capture_output=True, text=True)

    killed = work("first", "kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = work("second", "go on")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == "done"
    assert (folder / "trained").read_text().split() == ["0", "1", "2", "3"]
    with tarfile.open(folder / "out.tar") as tar:
        assert tar.getnames() == ["weights"]


def test_checkpoints_that_are_just_being_written_wait(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []

    def body(ctx: StageContext) -> None:
        assert isinstance(ctx.store, remote_store.RemoteStore)
        entry = ctx.store.entry("search", ctx.partial.parent.name)
        (ctx.partial / "one").write_text("1")
        (ctx.partial / "two").write_text("1")
        states = iter([remote_store._state(ctx.partial), {}])
        with monkeypatch.context() as changing:
            changing.setattr(remote_store, "_state", lambda _: next(states))
            entry._save()
        saved.append(entry.objects.read("partial.json"))
        entry._save()
        saved.append(entry.objects.read("partial.json"))
        write("x")(ctx)

    monkeypatch.setattr(remote_store, "SAVE_EVERY", 1000.0)
    assert bench.run(body).error is None
    assert saved[0] is None and sorted(json.loads(saved[1])["files"]) == ["one", "two"]


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
        (https.replace("//", "//user:secret@") + "/line5.tar", "user and password"),  # a bare line3.tar stays bare
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
