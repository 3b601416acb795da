"""Bad input, through the command line: status 2, one message with file, value and remedy, and nothing written."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fabricated
import numpy as np
import pytest
import yaml
from botocore.exceptions import ClientError
from memory_bucket import MemoryBucket
from PIL import Image
from typer.testing import CliRunner

from yolov8_nas import paths, space
from yolov8_nas.commands.main import app
from yolov8_nas.config import RunConfig
from yolov8_nas.device import counters
from yolov8_nas.errors import InputError
from yolov8_nas.export.packaging import side_of
from yolov8_nas.run import local, preflight
from yolov8_nas.store import archive, s3
from yolov8_nas.store import remote as remote_store

SETTINGS: dict[str, Any] = {
    "name": "x",
    "space": "tiny",
    "imgsz": 64,
    "targets": [{"hardware": "cpu-1t", "constraints": ["latency<=80%stock"]}],
}


@dataclass
class Case:
    """A sound run that a test spoils."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    def configure(self, **changes: Any) -> None:
        self.config.write_text(yaml.safe_dump({**SETTINGS, "data": str(self.data), **changes}))

    def encode(self, encoding: str) -> None:
        """The configuration in another encoding than UTF-8, with a letter that shows it."""
        self.config.write_bytes(f"# Müller\n{self.config.read_text()}".encode(encoding))

    def target(self, **changes: Any) -> None:
        self.configure(targets=[{**SETTINGS["targets"][0], **changes}])

    def first(self, split: str) -> tuple[Path, Path]:
        """An image of a split that has a box, and its label file."""
        for label in sorted((self.data / "labels" / split).glob("*.txt")):
            if label.read_text().strip():
                (image,) = (self.data / "images" / split).glob(f"{label.stem}.*")
                return image, label
        raise AssertionError(f"no label in {split}")

    def archive(self, *members: tarfile.TarInfo | tuple[str, bytes], mode: str = "w:gz") -> None:
        path = self.folder / "data.tar.gz"
        with tarfile.open(path, mode) as tar:
            tar.add(self.data, "data")
            for member in members:
                if isinstance(member, tarfile.TarInfo):
                    tar.addfile(member)
                else:
                    info = tarfile.TarInfo(member[0])
                    info.size = len(member[1])
                    tar.addfile(info, io.BytesIO(member[1]))
        self.configure(data=str(path))

    def run(self, *more: object) -> Any:
        arguments = ["run", str(self.config), "--workdir", str(self.work), *map(str, more)]
        return CliRunner().invoke(app, arguments)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset in YOLO's layout."""
    data = tmp_path_factory.mktemp("sound") / "data"
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4)):
        (data / "images" / split).mkdir(parents=True)
        (data / "labels" / split).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data / "images" / split / f"{split}{i}.png")
            (data / "labels" / split / f"{split}{i}.txt").write_text(f"{i % 2} 0.5 0.5 0.2 0.2\n")
    names = {"train": "images/train", "val": "images/val", "names": {0: "dent", 1: "hole"}}
    (data / "data.yaml").write_text(yaml.safe_dump(names))
    return data


@pytest.fixture
def case(tmp_path: Path, sound: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    made = Case(tmp_path)
    shutil.copytree(sound, made.data)
    made.configure()

    def never(*_: object) -> None:
        pytest.fail("the run was started")

    monkeypatch.setattr(local, "run_pipeline", never)
    return made


def _link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def _label(text: str) -> Callable[[Case], object]:
    return lambda c: c.first("train")[1].write_text(text)


def _space(c: Case) -> None:
    text = (Path(space.__file__).parent / "spaces" / "tiny.yaml").read_text()
    (c.folder / "space.yaml").write_text(text.replace("conv5", "conv7"))
    c.configure(space=str(c.folder / "space.yaml"))


def _bomb(c: Case) -> None:
    c.archive(("data/zeros", bytes(64 * 2**20)))


LIMITS = [f"latency_p{p}{scope}<=12345.678us" for p in (50, 90, 99) for scope in ("", "(with_nms)")]
LIMITS += [
    "throughput>=3.125fps",
    "throughput(with_nms)>=2.125fps",
    "memory<=90GiB",
    "params<=99.125M",
    "flops<=99.125G",
]
LIMITS += ["power<=900W", "energy<=9000J"]

BAD: dict[str, tuple[Callable[[Case], object], tuple[str, ...]]] = {
    # dataset
    "no data.yaml": (lambda c: (c.data / "data.yaml").unlink(), ("data.yaml", "data")),
    "no such dataset": (lambda c: shutil.rmtree(c.data), ("data", "no such")),
    "no images": (lambda c: shutil.rmtree(c.data / "images" / "train"), ("train", "images")),
    "unreadable image": (lambda c: c.first("train")[0].write_bytes(b"no picture"), ("train0.png",)),
    "class out of range": (_label("7 0.5 0.5 0.1 0.1\n"), ("train0.txt", "7")),
    "box outside the image": (_label("0 1.5 0.5 0.2 0.2\n"), ("train0.txt", "1.5")),
    "NaN": (_label("0 nan 0.5 0.2 0.2\n"), ("train0.txt", "nan")),
    "empty validation": (lambda c: [f.unlink() for f in (c.data / "images" / "val").iterdir()], ("val",)),
    # configuration
    "no configuration": (lambda c: c.config.unlink(), ("config.yaml", "cannot be read")),
    "not YAML": (lambda c: c.config.write_text("a: [1"), ("config.yaml", "not YAML")),
    "unknown key": (lambda c: c.configure(epoch=3), ("config.yaml", "unknown key epoch", "imgsz")),
    "unknown key inside": (lambda c: c.configure(supernet={"epoch": 3}), ("supernet.epoch", "epochs")),
    "in UTF-16": (lambda c: c.encode("utf-16"), ("config.yaml", "UTF-16", "save it as UTF-8")),
    "in UTF-16 without a mark": (lambda c: c.encode("utf-16-le"), ("config.yaml", "UTF-16", "UTF-8")),
    "in Latin-1": (lambda c: c.encode("latin-1"), ("config.yaml", "line 1", "Latin-1", "save the file as UTF-8")),
    "nested without end": (lambda c: c.config.write_text("[" * 5000), ("config.yaml", "nested deeper")),
    "a day that is none": (lambda c: c.config.write_text("name: 2026-02-31"), ("config.yaml", "quote it")),
    "a key twice": (lambda c: c.config.write_text("seed: 1\nseed: 2\n"), ("config.yaml", "'seed' stands twice")),
    "a key that is a number": (lambda c: c.config.write_text("3: x"), ("config.yaml", "3", "not a name")),
    "a zero byte": (lambda c: c.configure(data="data\0x"), ("config.yaml", "data", "remove it")),
    "data of an empty variable": (lambda c: c.configure(data=""), ("config.yaml", "data", "at least 1 character")),
    "store of an empty variable": (lambda c: c.configure(store=""), ("config.yaml", "store", "at least 1 character")),
    "a batch that no memory holds": (lambda c: c.target(batch=10**9), ("batch", "1000000000", "1024")),
    "an infinite rate": (lambda c: c.configure(supernet={"lr": float("inf")}), ("supernet.lr", "finite")),
    "a folder": (lambda c: (c.config.unlink(), c.config.mkdir()), ("config.yaml", "cannot be read", "directory")),
    "a link to itself": (lambda c: (c.config.unlink(), c.config.symlink_to(c.config)), ("config.yaml", "links")),
    "a name of 300 letters": (lambda c: c.configure(name="n" * 300), ("name", "nnn")),
    "data of 300 letters": (lambda c: c.configure(data="d" * 300), ("ddd",)),
    "a store of 300 letters": (lambda c: c.configure(store="s" * 300), ("store", "too long")),
    "weights of 300 letters": (lambda c: c.configure(supernet={"weights": "w" * 300}), ("www",)),
    "space of 300 letters": (lambda c: c.configure(space="s" * 300 + ".yaml"), ("sss", "too long")),
    "limits without end": (lambda c: c.target(constraints=LIMITS), ("13 limits", "alias", "255")),
    "MLflow's folder": (lambda c: c.configure(tracking={"uri": "./mlruns"}), ("tracking.uri = ./mlruns", "sqlite:///")),
    "MLflow's folder by address": (
        lambda c: c.configure(tracking={"uri": "file:///srv/mlruns"}), ("file://", "sqlite:///"),
    ),
    "a tracking server that is not there": (
        lambda c: c.configure(tracking={"uri": "http://127.0.0.1:9"}), ("http://127.0.0.1:9", "refused", "start it"),
    ),
    "a tracking server without a name": (lambda c: c.configure(tracking={"uri": "http://"}), ("names no server",)),
    "a tracking database that is none": (
        lambda c: ((c.folder / "x.db").write_text("text"), c.configure(tracking={"uri": f"sqlite:///{c.folder}/x.db"})),
        ("x.db", "no SQLite database"),
    ),
    "a tracking database below a file": (
        lambda c: c.configure(tracking={"uri": f"sqlite:///{c.config}/mlflow.db"}), ("config.yaml is a file",),
    ),
    "a tracking database without a driver": (
        lambda c: c.configure(tracking={"uri": "mysql+pymysql://u:geheim@db/x"}), ("pymysql", "install it"),
    ),
    "a store that is a file": (lambda c: c.configure(store=str(c.config)), ("store", "is a file")),
    "a store below a file": (lambda c: c.configure(store=str(c.config / "store")), ("store", "is a file")),
    "a store that may not be written": (lambda c: c.configure(store="/proc/self/store"), ("/proc", "writable")),
    "a store that is a link to nothing": (
        lambda c: ((c.folder / "s").symlink_to("nowhere"), c.configure(store=str(c.folder / "s"))),
        ("leads nowhere",),
    ),
    "far of 300 letters": (lambda c: c.target(far="f" * 300), ("fff",)),
    "no such user": (lambda c: c.configure(data="~nobody-of-this-name/data"), ("~nobody", "HOME")),
    "no targets": (lambda c: c.configure(targets=[]), ("targets",)),
    "input size": (lambda c: c.configure(imgsz=100), ("imgsz", "100", "32")),
    "name": (lambda c: c.configure(name="a b/c"), ("name", "a b/c")),
    "unknown store": (lambda c: c.configure(store="gs://bucket/store"), ("gs://bucket/store", "path")),
    # space
    "unknown space": (lambda c: c.configure(space="huge"), ("huge", "tiny", "yolov8n")),
    "unknown operator": (_space, ("space.yaml", "conv7", "conv5")),
    # target
    "unknown hardware": (lambda c: c.target(hardware="toaster"), ("toaster", "cpu")),
    "absent hardware": (lambda c: c.target(hardware="NVIDIA_T4"), ("NVIDIA_T4", "cpu")),
    "absent runtime": (lambda c: c.target(runtime="tensorrt"), ("tensorrt", "onnxruntime")),
    "unknown precision": (lambda c: c.target(precision="int4"), ("precision", "int4")),
    "impossible precision": (lambda c: c.target(precision="fp16"), ("fp16", "int8")),
    # limits
    "limit without a number": (lambda c: c.target(constraints=["latency<=fast"]), ("latency<=fast", "latency<=8ms")),
    "negative limit": (lambda c: c.target(constraints=["latency<=-1ms"]), ("latency<=-1ms", "positive")),
    "unknown metric": (lambda c: c.target(constraints=["speed<=8ms"]), ("speed", "latency")),
    "unknown unit": (lambda c: c.target(constraints=["latency<=8parsec"]), ("parsec", "ms")),
    "wrong way round": (lambda c: c.target(constraints=["latency>=8ms"]), ("latency<=",)),
    "limit of zero": (lambda c: c.target(constraints=["energy<=0mJ"]), ("energy<=0mJ", "positive")),
    "scope of memory": (lambda c: c.target(constraints=["memory(with_nms)<=1GiB"]), ("with_nms", "has no scope")),
    "energy that nothing counts": (
        lambda c: c.target(constraints=["latency<=9ms", "energy<=5mJ"]),
        ("energy<=5mJ", "cannot be measured here", "RAPL", "leave this limit out"),
    ),
    # archives
    "archive with ..": (lambda c: c.archive(("../evil", b"x")), ("data.tar.gz", "../evil")),
    "archive with an absolute path": (lambda c: c.archive(("/tmp/evil-member", b"x")), ("data.tar.gz", "absolute")),
    "archive with a link out": (lambda c: c.archive(_link("data/l", "../../evil")), ("data.tar.gz", "link")),
    "archive that is a bomb": (_bomb, ("data.tar.gz", "decompression bomb")),
    # folders
    "work folder below a file": (lambda c: c.work.write_text("a file"), ("work", "is a file")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_before_anything_is_done(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "RATIO_FROM", 4 * 2**20)  # so that a bomb is small enough for a test
    monkeypatch.setattr(counters, "RAPL", case.folder / "no counter")
    spoil, told = BAD[name]
    spoil(case)
    before = sorted(path for path in case.folder.rglob("*") if not path.name.endswith(".pyc"))
    start = time.monotonic()
    result = case.run()
    assert time.monotonic() - start < 20
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("error: ") == 1 and len(result.stderr.splitlines()) == 1
    assert "geheim" not in result.output
    assert "Traceback" not in result.output
    for part in told:
        assert part in result.stderr, result.stderr
    assert sorted(case.folder.rglob("*")) == before, "something was written"


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--constraint", "latency<=-3ms", "positive"),
        ("--hardware", "toaster", "toaster"),
        ("--precision", "fp17", "fp17"),
        ("--data", "", "--data is empty"),
        ("--precision", " ", "--precision is empty"),
        ("--set", "supernet.epochs", "KEY=VALUE"),
        ("--set", "supernet.epochs=none", "supernet.epochs"),
        ("--set", "supernet.epochs=[1", "not YAML"),
        ("--set", "name.of.all=1", "has no keys of its own"),
        ("--constraint", "map>=0.5", "is no limit"),
        ("--data", "/no/such/data", "/no/such/data"),
    ],
)
def test_bad_options(case: Case, option: str, value: str, told: str) -> None:
    result = case.run(option, value)
    assert result.exit_code == 2
    assert told in result.stderr
    assert not case.work.exists()


def test_the_same_image_in_train_and_val_is_a_warning_that_names_it(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, label = case.first("train")
    shutil.copy(image, case.data / "images" / "val" / "copy.png")
    shutil.copy(label, case.data / "labels" / "val" / "copy.txt")
    monkeypatch.setattr(preflight, "check_limits_apart", lambda *_: [])
    monkeypatch.setattr(local, "run_pipeline", lambda *_: fabricated.summary())
    result = case.run()
    assert result.exit_code == 0, result.output
    assert "warning:" in result.output
    assert image.name in result.output


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_work_folder_that_is_not_writable(case: Case) -> None:
    case.work.mkdir()
    case.work.chmod(stat.S_IRUSR | stat.S_IXUSR)
    result = case.run()
    assert result.exit_code == 2
    assert "not writable" in result.stderr


@pytest.mark.parametrize(
    ("workdir", "told"),
    [("w" * 300, "too long"), ("missing/" + "w" * 300, "too long"), ("/dev/null/work", "is a file"), ("d/" * 2000, "")],
)
def test_a_work_folder_that_cannot_be(case: Case, workdir: str, told: str) -> None:
    result = case.run("--workdir", workdir)
    assert result.exit_code == 2, result.output
    assert told in result.stderr and "--workdir" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and len(result.stderr) < 600


def test_mlflows_variable_with_a_folder(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    result = case.run()
    assert result.exit_code == 2
    assert "error: MLFLOW_TRACKING_URI = ./mlruns: give the address" in result.stderr


def test_another_run_in_the_folder_is_told_before_anything_is_measured(case: Case) -> None:
    with local.held(case.work):
        result = case.run()
    assert result.exit_code == 2
    assert "another run is in it" in result.stderr


def test_a_home_that_nobody_knows_is_no_fault(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv(remote_store.CACHE_VARIABLE, raising=False)
    assert remote_store.cache_folder().is_relative_to(tempfile.gettempdir())
    monkeypatch.setattr(preflight, "check_limits_apart", lambda *_: [])
    monkeypatch.setattr(local, "run_pipeline", lambda *_: fabricated.summary())
    assert case.run().exit_code == 0


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare (util-linux)")
def test_a_user_without_name_and_home_can_work(tmp_path: Path) -> None:
    """As in a container under a number: MLflow and Ultralytics fail at import where there is no home folder."""
    here = {name: value for name, value in os.environ.items() if name not in ("HOME", "USER", "LOGNAME")}
    program = "import getpass, yolov8_nas, pathlib; home = pathlib.Path.home(); print(home, oct(home.stat().st_mode))"
    program += "; getpass.getuser()"
    command = ["unshare", "--user", "--map-user=12345", "--map-group=12345", sys.executable, "-c", program]
    environment = {**here, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "unshare" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "yolov8-nas-home-uid-12345"), "0o40700"]


@pytest.mark.parametrize(
    ("trained", "asked", "told"),
    [
        ([480, 640], None, "was trained at [480, 640]"),
        (100, None, "--imgsz 128"),
        ([100, 100], None, "--imgsz 128"),
        ("big", None, "--imgsz 640"),
        (float("nan"), None, "--imgsz 640"),
        ([], None, "--imgsz 640"),
        (640, 100, "imgsz = 100"),
        (640, 0, "imgsz = 0"),
    ],
)
def test_the_size_that_a_checkpoint_was_trained_at(trained: Any, asked: int | None, told: str) -> None:
    with pytest.raises(InputError) as error:
        side_of(trained, Path("best.pt"), asked)
    assert told in str(error.value) and "best.pt" in str(error.value)


@pytest.mark.parametrize(
    ("trained", "asked", "side"),
    [(None, None, 640), (320, None, 320), ([320, 320], None, 320), ([320], None, 320), ([480, 640], 640, 640)],
)
def test_a_size_that_is_a_square_is_taken(trained: Any, asked: int | None, side: int) -> None:
    assert side_of(trained, Path("best.pt"), asked) == side


def test_what_a_path_has_against_it_is_told_by_every_command(case: Case) -> None:
    (case.folder / "best.pt").write_bytes(b"x")
    for command in (
        ["data", "check", ""],
        ["data", "check", "d" * 300],
        ["run", "c" * 300],
        ["export", str(case.folder / "best.pt"), "-o", str(case.folder / ("o" * 300))],
        ["data", "make-demo", str(case.config / "demo")],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2, (command, result.output, result.exception)
        assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.ENOSPC, errno.EIO, errno.ELOOP]
)
def test_errors_of_the_system_name_path_and_remedy(number: int) -> None:
    told = paths.told(OSError(number, os.strerror(number), "/some/where"))
    assert told is not None and str(told).startswith("/some/where: ") and ";" in str(told)


def test_other_errors_stay_what_they_are() -> None:
    assert paths.told(OSError(errno.EPIPE, "Broken pipe")) is None
    assert paths.told(OSError("something of ours")) is None
    assert paths.told(ConnectionRefusedError(errno.ECONNREFUSED, "refused")) is None


class _Refusing(MemoryBucket):
    def put_object(self, **_: Any) -> None:
        refused = {"Error": {"Code": "AccessDenied", "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
        raise ClientError(refused, "PutObject")


@pytest.mark.parametrize(("bucket", "told"), [(_Refusing(), "access refused"), (MemoryBucket(), None)])
def test_a_bucket_is_written_before_anything_else(
    case: Case, bucket: MemoryBucket, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "connect", lambda *_: bucket)
    monkeypatch.setenv(remote_store.CACHE_VARIABLE, str(case.folder / "cache"))
    case.configure(store="s3://bucket/store", tracking={"uri": f"sqlite:///{case.folder}/mlflow.db"})
    config = RunConfig.load(case.config)
    if told is None:
        preflight.check_places(config, "s3://bucket/store")
    else:
        with pytest.raises(InputError, match=told):
            preflight.check_places(config, "s3://bucket/store")
    assert bucket.objects == {}


def test_a_byte_order_mark_is_no_fault(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.config.write_bytes(b"\xef\xbb\xbf" + case.config.read_bytes())
    assert RunConfig.load(case.config).name == "x"


def test_a_work_folder_on_a_read_only_file_system(case: Case) -> None:
    result = case.run("--workdir", "/proc/self/work")
    assert result.exit_code == 2
    assert "/proc" in result.stderr


@pytest.mark.slow
def test_a_limit_that_nothing_can_keep_names_the_fastest(case: Case) -> None:
    case.target(constraints=["latency<=1us"])
    result = case.run()
    assert result.exit_code == 2, result.output
    assert "latency_p50<=0.001ms" in result.stderr
    assert re.search(r"even the smallest network of space tiny at 64 px has latency [\d.]+ ms; ", result.stderr)
    assert not case.work.exists()


def test_weights_are_read_before_a_run_whatever_its_limits_are(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = case.folder / "weights.pt"
    weights.write_bytes(b"no checkpoint")
    case.target(constraints=["params<=4M"])  # nothing that takes a measurement
    settings = yaml.safe_load(case.config.read_text())
    case.config.write_text(yaml.safe_dump({**settings, "supernet": {"weights": str(weights)}}))
    monkeypatch.setattr(local, "run_pipeline", lambda *_: pytest.fail("the run began"))
    result = case.run()
    assert result.exit_code == 2, result.output
    assert "weights.pt" in result.stderr
