"""Attacks on what reads: a few bytes that are meant to become gigabytes, hours, a traceback, or a request elsewhere.

Each attack runs in a process of its own. It must end in an error that is foreseen, which names what is wrong, before
the process has grown by 200 MiB.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import pickle
import signal
import socket
import struct
import tarfile
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
import web_server
import yaml
from onnx import TensorProto, helper
from PIL import Image

from pipelines.plan import Rates
from yolov8_nas.analysis.model import read as read_detector
from yolov8_nas.config import RunConfig
from yolov8_nas.data import remote, web
from yolov8_nas.data.check import check_source
from yolov8_nas.errors import InputError
from yolov8_nas.evaluation import Evaluation, ImageStats
from yolov8_nas.export.onnx_file import read_metadata
from yolov8_nas.measure.engine_file import split_header
from yolov8_nas.measure.far import unsealed
from yolov8_nas.reading import read_json
from yolov8_nas.run.lifecycle import requested
from yolov8_nas.space import SearchSpace, SpaceError
from yolov8_nas.store import archive
from yolov8_nas.store.archive import ArchiveError, extract

GROWTH: Final = 200 * 2**20
PATIENCE: Final = 120
"""Seconds after which a process that still reads is killed; not a measure of how long reading takes."""

MIB: Final = 2**20


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        name: What it is.
        attempt: Makes it in a folder of its own.
        told: What must stand in the error.
    """

    name: str
    attempt: Callable[[Path], object]
    told: str


def hold(attack: Attack, folder: Path) -> str:
    """Try an attack, and see what must hold of each; what was said of it."""
    ear, mouth = os.pipe()
    child = os.fork()
    if not child:
        os.close(ear)
        signal.alarm(PATIENCE)
        ready()
        said: dict[str, Any] = {}
        try:
            attack.attempt(folder)
        except (InputError, SpaceError, ArchiveError, ConnectionError) as error:
            said["told"] = str(error)
        except BaseException:
            said["escaped"] = traceback.format_exc()
        said["grew"] = _memory("VmHWM") - _before
        with os.fdopen(mouth, "w") as file:
            json.dump(said, file)
        os._exit(0)
    os.close(mouth)
    with os.fdopen(ear) as file:
        answer = file.read()
    os.waitpid(child, 0)
    assert answer, f"{attack.name}: the process was killed"
    said = json.loads(answer)
    assert "told" in said, said.get("escaped", "nothing was refused")
    assert attack.told in said["told"], said["told"]
    assert len(said["told"]) < 5000
    assert said["grew"] < GROWTH, f"{attack.name}: {said['grew'] / MIB:.0f} MiB"
    return str(said["told"])


def ready() -> None:
    """From here on, what a process takes is the reader's; before, it was what made the attack."""
    global _before
    Path("/proc/self/clear_refs").write_text("5")  # the peak, too
    _before = _memory("VmRSS")


_before = 0


def _memory(what: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


# YAML ----------------------------------------------------------------------------------------------------------------


def _doubling(one: str, many: str) -> str:
    """Twelve lines, each of which is ten of the one before."""
    lines = [f"a0: &a0 {one}"]
    lines += [f"a{i}: &a{i} " + many.format(", ".join([f"*a{i - 1}"] * 10)) for i in range(1, 12)]
    return "\n".join(lines) + "\n"


YAML: Final = {
    "aliases of aliases": (_doubling("[x, x, x]", "[{}]"), "grows beyond bounds"),
    "merge keys of merge keys": (_doubling("{k: 1}", "{{<<: [{}]}}"), "grows beyond bounds"),
    "a long text repeated": (f'a: &a "{"x" * MIB}"\nb: [{", ".join(["*a"] * 1000)}]\n', "grows beyond bounds"),
    "a list in itself": ("a: &a [*a]\n", "holds itself"),
    "a mapping merged into itself": ("a: &a {<<: *a}\n", "holds itself"),
    "lists without end": ("[" * 100_000, "nested deeper"),
    "mappings without end": ("{a: " * 50_000, "nested deeper"),
    "dashes without end": ("- " * 50_000 + "a", "nested deeper"),
    "an integer of 100,000 digits": ("seed: " + "9" * 100_000, "64 bits"),
    "a hexadecimal integer of 100,000 digits": ("seed: 0x" + "f" * 100_000, "64 bits"),
    "a binary integer of 100,000 digits": ("seed: 0b" + "1" * 100_000, "64 bits"),
    "an integer of base 60": ("seed: 1" + ":59" * 30_000, "64 bits"),
    "an integer of 65 bits": ("seed: 18446744073709551616", "64 bits"),
    "a time that is none": ("name: 2026-13-01 25:00:00", "cannot be read"),
    "a binary that is none": ("name: !!binary a", "base64"),
    "an object of Python": ("name: !!python/object/apply:os.system [touch ran]", "python/object"),
    "more values than anybody writes": ("[" + "a, " * 300_000 + "]", "more than 100,000 values"),
    "two documents": ("a: 1\n---\na: 2\n", "not YAML"),
    "an alias of nothing": ("a: *b\n", "not YAML"),
    "a list as a key": ("? [a, b]\n: 1\n", "not YAML"),
}


def _config(text: str) -> Callable[[Path], object]:
    def attempt(folder: Path) -> object:
        file = folder / "config.yaml"
        file.write_text(text)
        return RunConfig.load(file)

    return attempt


def _space(text: str) -> Callable[[Path], object]:
    def attempt(folder: Path) -> object:
        (folder / "space.yaml").write_text(text)
        return SearchSpace.load(folder / "space.yaml")

    return attempt


def _sparse(file: Path, size: int, start: bytes = b"") -> Path:
    """A file of a size that takes no room on the disk."""
    with file.open("wb") as opened:
        opened.write(start)
        opened.truncate(size)
    return file


CONFIGURATION: Final = [
    *(Attack(f"configuration: {name}", _config(text), told) for name, (text, told) in YAML.items()),
    Attack("configuration: a file without end", lambda _: RunConfig.load(Path("/dev/zero")), "more than"),
    Attack("configuration: a file of 8 GiB", lambda f: RunConfig.load(_sparse(f / "c", 2**33)), "more than"),
    Attack(
        "configuration: an override that nests",
        lambda f: (_config("targets: []")(f), RunConfig.load(f / "config.yaml", ["name=" + "[" * 9999])),
        "",
    ),
    Attack("parameter: aliases", lambda _: requested(YAML["aliases of aliases"][0]), "grows beyond bounds"),
    Attack("parameter: nesting", lambda _: requested("[" * 10**5), "nested deeper"),
    Attack("space: aliases", _space(YAML["aliases of aliases"][0]), "grows beyond bounds"),
    Attack("space: nesting", _space("[" * 10**5), "nested deeper"),
    Attack("space: an integer", _space("name: 0x" + "f" * 10**5), "64 bits"),
    Attack(
        "rates: merge keys",
        lambda f: ((f / "r").write_text(YAML["merge keys of merge keys"][0]), Rates.load(f / "r", None)),
        "grows beyond bounds",
    ),
]

# JSON ----------------------------------------------------------------------------------------------------------------

JSON: Final = {
    "lists without end": ("[" * 10**6, "nested deeper"),
    "objects without end": ('{"a":' * 10**5, "nested deeper"),
    "two million empty lists": ("[" + "[]," * 2_000_000 + "[]]", "hold nothing"),
    "two million empty objects": ("[" + "{}," * 2_000_000 + "{}]", "hold nothing"),
    "an integer of 100,000 digits": ('{"a": ' + "9" * 100_000 + "}", "an integer of 100,000 digits"),
    "an integer of 20 digits": ("[12345678901234567890]", "an integer of 20 digits"),
    "half a text": ('{"a": "b', "not JSON"),
    "no UTF-8": ('{"a": "\udcff"}', "not JSON"),
}


def _json(text: str, read: Callable[[Path], object] = read_json) -> Callable[[Path], object]:
    def attempt(folder: Path) -> object:
        file = folder / "file.json"
        file.write_bytes(text.encode(errors="surrogateescape"))
        return read(file)

    return attempt


def _engine(folder: Path) -> object:
    header = ("[" * 10**5).encode()
    (folder / "e.engine").write_bytes(struct.pack("<I", len(header)) + header + b"plan")
    return split_header(folder / "e.engine")


RECORDS: Final = [
    *(Attack(f"JSON: {name}", _json(text), told) for name, (text, told) in JSON.items()),
    Attack("JSON: a file of 8 GiB", lambda f: read_json(_sparse(f / "j", 2**33, b"[")), "bytes of JSON"),
    Attack("JSON: a file without end", lambda _: read_json(Path("/dev/zero")), "a pipe or a device"),
    Attack(
        "JSON: a pipe that nobody writes to", lambda f: (os.mkfifo(f / "j"), read_json(f / "j")), "a pipe or a device"
    ),
    Attack("results of a device: nesting", _json("[" * 10**5, unsealed), "nested deeper"),
    Attack("engine: nesting in its header", _engine, "no engine of ours"),
]

# Metadata of ONNX files --------------------------------------------------------------------------------------------


def _onnx_with(key: str, text: str) -> Callable[[Path], object]:
    """An ONNX file whose metadata say this, read as `serve` and `engine` read it, and as `analyze` does."""

    def attempt(folder: Path) -> object:
        sides = helper.make_tensor_value_info("images", TensorProto.FLOAT, (1, 3, "height", "width"))
        boxes = helper.make_tensor_value_info("output0", TensorProto.FLOAT, (1, 3, "height"))
        node = helper.make_node("ReduceMax", ["images", "axes"], ["output0"], keepdims=0)
        axes = helper.make_tensor("axes", TensorProto.INT64, [1], [3])
        graph = helper.make_graph([node], "reduced", [sides], [boxes], [axes])
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        plain = {"task": "detect", "stride": "32", "names": "{0: 'dent'}", "imgsz": "[64, 64]", key: text}
        helper.set_model_props(made, plain)
        onnx.save(made, folder / "model.onnx")
        if key in ("names", "imgsz"):
            with pytest.raises(InputError, match=f"metadata have {key} = "):
                read_detector(folder / "model.onnx")
        return read_metadata(folder / "model.onnx", made)

    return attempt


ONNX_METADATA: Final = {
    "names that nest": ("names", "[" * 10**5),
    "signs without end": ("names", "-" * 10**5 + "1"),
    "sums without end": ("names", "1" + "+1j" * 50_000),
    "a number of a million digits": ("names", "9" * 10**6),
    "a list as a key": ("names", "{[]: 1}"),
    "a zero byte": ("names", "{0: '\0'"),
    "names that are one text": ("names", "'dent'"),
    "names that are lists": ("names", "{0: ['dent']}"),
    "numbers that are text": ("names", "{'\u00b2': 'dent'}"),
    "a negative number": ("names", "{-1: 'dent'}"),
    "no names": ("names", "{}"),
    "a call": ("names", "__import__('os').system('touch ran')"),
    "a text of two megabytes": ("names", "{0: '" + "a" * 2**21 + "'}"),
    "a stride that is text": ("stride", "'32'"),
    "a stride of nothing": ("stride", "0"),
    "a stride that is true": ("stride", "True"),
    "sides that are one number": ("imgsz", "64"),
    "sides that are text": ("imgsz", "['64', '64']"),
    "sides of less than nothing": ("imgsz", "[-64, -64]"),
    "three sides": ("imgsz", "[64, 64, 64]"),
    "arguments that are a list": ("args", "[]"),
    "a task that is a list": ("task", "[]"),
}


@pytest.mark.parametrize("row", ONNX_METADATA)
def test_metadata_of_another_form(row: str, tmp_path: Path) -> None:
    key, text = ONNX_METADATA[row]
    hold(Attack(row, _onnx_with(key, text), f"its metadata have {key} = "), tmp_path)
    assert not (tmp_path / "ran").exists()


# Scores of detectors, as a registry keeps them -----------------------------------------------------------------------


def _scores(**changes: Any) -> Callable[[Path], object]:
    """A file of scores in which these arrays are others, or missing, read again."""

    def attempt(folder: Path) -> object:
        stats = ImageStats("a", np.ones((1, 10), bool), np.ones(1, np.float32), np.zeros(1), np.zeros(1))
        Evaluation(0.5, 0.5, {"dent": 0.5}, (stats,)).save(folder / "scores.npz")
        with np.load(folder / "scores.npz") as file:
            arrays = {name: changes.get(name, array) for name, array in file.items()}
        np.savez_compressed(folder / "scores.npz", **{name: a for name, a in arrays.items() if a is not None})
        return Evaluation.load(folder / "scores.npz")

    return attempt


def _bytes_of_scores(content: bytes) -> Callable[[Path], object]:
    return lambda folder: ((folder / "s.npz").write_bytes(content), Evaluation.load(folder / "s.npz"))


def _announced(folder: Path) -> object:
    """An array whose header says that it has eight terabytes."""
    with zipfile.ZipFile(folder / "scores.npz", "w") as archive:
        raw = io.BytesIO()
        np.save(raw, np.zeros(2))
        header = raw.getvalue().replace(b"(2,), }", b"(1000000000000,), }").replace(b" " * 12 + b"\n", b"\n")
        archive.writestr("scores.npy", header)
    return Evaluation.load(folder / "scores.npz")


SCORES: Final = [
    Attack("scores: a bomb", _scores(tp=np.zeros((60_000_000, 10), bool)), "bytes unpacked"),
    Attack("scores: an array of eight terabytes", _announced, "not the scores"),
    Attack("scores: objects", _scores(names=np.array([{}, []], dtype=object)), "not the scores"),
    Attack("scores: a part is missing", _scores(conf=None), "not the scores"),
    Attack("scores: text for numbers", _scores(conf=np.array(["a"])), "conf is an array"),
    Attack("scores: more boxes than there are", _scores(boxes=np.array([2**40])), "target_cls has the shape"),
    Attack("scores: fewer boxes than none", _scores(detections=np.array([-1])), "below zero"),
    Attack("scores: two dimensions", _scores(names=np.array([["a"]])), "2 dimensions"),
    Attack("scores: no mAP", _scores(scores=np.array([])), "scores has the shape"),
    Attack("scores: no archive", _bytes_of_scores(b"PK\3\4" + bytes(100)), "not the scores"),
    Attack("scores: a pickle", _bytes_of_scores(pickle.dumps({"a": 1})), "not the scores"),
    Attack("scores: nothing", _bytes_of_scores(b""), "not the scores"),
]


@pytest.mark.parametrize("attack", SCORES, ids=lambda attack: attack.name)
def test_scores_that_are_none(attack: Attack, tmp_path: Path) -> None:
    hold(attack, tmp_path)


# Datasets ------------------------------------------------------------------------------------------------------------


def _dataset(folder: Path) -> Path:
    """A dataset of a few small images in YOLO's layout."""
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for i in range(3):
            Image.new("RGB", (32, 32), (i * 40, 9, 9 if split == "train" else 90)).save(
                folder / "images" / split / f"{i}.png"
            )
            (folder / "labels" / split / f"{i}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (folder / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [dent]\n")
    return folder


def _changed(name: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    def attempt(folder: Path) -> object:
        change(_dataset(folder) / name)
        ready()
        return check_source(folder)

    return attempt


def _described(text: str) -> Callable[[Path], object]:
    return _changed("data.yaml", lambda file: file.write_text(f"train: images/train\nval: images/val\n{text}\n"))


def _coco(text: str, **size: object) -> Callable[[Path], object]:
    def attempt(folder: Path) -> object:
        (folder / "annotations").mkdir()
        good = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "dent"}]}
        (folder / "annotations" / "instances_val.json").write_text(json.dumps(good))
        (folder / "annotations" / "instances_train.json").write_text(text)
        ready()
        return check_source(folder)

    return attempt


def _png(width: int, height: int) -> bytes:
    """A PNG of one colour: some KB, and as many pixels as wanted."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + width)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _claimed(kind: str) -> Callable[[Path], object]:
    """An image file whose header claims 60,000 x 60,000 pixels."""

    def change(file: Path) -> None:
        buffer = io.BytesIO()
        Image.new("L", (32, 32)).save(buffer, kind)
        data = bytearray(buffer.getvalue())
        if kind == "BMP":
            data[18:26] = struct.pack("<ii", 60_000, 60_000)
        else:  # PNG
            data[16:24] = struct.pack(">II", 60_000, 60_000)
            data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
        file.write_bytes(data)

    return _changed("images/train/0.png", change)


DATASETS: Final = [
    *(
        Attack(f"data.yaml: {name}", _described(f"names: [a]\nx:\n{_indented(text)}"), told)
        for name, (text, told) in YAML.items()
        if name in ("aliases of aliases", "lists without end", "a mapping merged into itself")
        for _indented in [lambda text: "".join(f"  {line}\n" for line in text.splitlines())]
    ),
    Attack("data.yaml: a billion classes", _described("nc: 1000000000"), "names"),
    Attack("data.yaml: 20,000 classes", _described(yaml.safe_dump({"names": ["x"] * 20_000})), "20,000 classes"),
    Attack("data.yaml: of 8 GiB", _changed("data.yaml", lambda f: _sparse(f, 2**33)), "more than"),
    Attack("labels: of 8 GiB", _changed("labels/train/0.txt", lambda f: _sparse(f, 2**33)), "more than"),
    Attack(
        "a list of images: of 8 GiB",
        _changed(
            "data.yaml",
            lambda f: (_sparse(f.parent / "l.txt", 2**33), f.write_text("train: l.txt\nval: images/val\nnames: [a]")),
        ),
        "more than",
    ),
    *(
        Attack(f"COCO: {name}", _coco(JSON[name][0]), told)
        for name, told in (
            ("lists without end", "nested deeper"),
            ("two million empty lists", "hold nothing"),
            ("an integer of 100,000 digits", "an integer of 100,000 digits"),
        )
    ),
    Attack("COCO: two million numbers", _coco('{"images": [' + "0," * 2_000_000 + "0]}"), "more than"),
    Attack("COCO: a text of 20 MB", _coco(json.dumps({"info": "x" * 20_000_000})), "more than"),
    Attack(
        "COCO: an image of 10^18 pixels a side",
        _coco('{"images": [{"id": 1, "file_name": "a.png", "width": 1' + "0" * 30 + "}]}"),
        "an integer of 31 digits",
    ),
    Attack(
        "image: 12,000 x 12,000 pixels in some KB",
        _changed("images/train/0.png", lambda f: f.write_bytes(_png(12_000, 12_000))),
        "pixels",
    ),
    Attack("image: a PNG that claims too much", _claimed("PNG"), "pixels"),
    Attack("image: a BMP that claims too much", _claimed("BMP"), "pixels"),
    Attack("image: of 8 GiB", _changed("images/train/0.png", lambda f: _sparse(f, 2**33)), "more than"),
]

# Archives ------------------------------------------------------------------------------------------------------------


def _header(name: str, kind: bytes, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.USTAR_FORMAT)


def _tar(*parts: bytes) -> bytes:
    return b"".join(part + bytes(-len(part) % 512) for part in parts) + bytes(1024)


def _record(key: str, value: str) -> bytes:
    """A PAX record, which begins with its own length."""
    length = len(key) + len(value) + 3
    while length != len(key) + len(value) + 3 + len(str(length)):
        length = len(key) + len(value) + 3 + len(str(length))
    return f"{length} {key}={value}\n".encode()


def _zip(change: Callable[[zipfile.ZipFile], object]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        change(file)
    return buffer.getvalue()


def _zip_link(file: zipfile.ZipFile) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr, link.compress_type = 0o120777 << 16, zipfile.ZIP_DEFLATED
    with file.open(link, "w") as target:
        for _ in range(160):
            target.write(bytes(MIB))


def _overlapping() -> bytes:
    """A zip whose members all have the same bytes: each comes out, though it is there once."""
    content = bytes(40 * MIB)
    data = bytearray(_zip(lambda file: file.writestr("a", content)))
    start = data.index(b"PK\x01\x02")
    end = data.index(b"PK\x05\x06")
    entry = bytes(data[start:end])
    directory = entry * 20
    tail = bytearray(data[end:])
    tail[8:12] = struct.pack("<HH", 20, 20)
    tail[12:16] = struct.pack("<I", len(directory))
    return bytes(data[:start]) + directory + bytes(tail)


def _lying() -> bytes:
    """A zip that says of a member of 160 MiB that it has 10 bytes."""
    data = _zip(lambda file: file.writestr("a", bytes(160 * MIB)))
    return data.replace(struct.pack("<I", 160 * MIB), struct.pack("<I", 10))


def _unknown() -> bytes:
    """A zip whose member is packed in a way that is none."""
    data = _zip(lambda file: file.writestr("a", b"x" * 100))
    for before in (b"PK\x03\x04", b"PK\x01\x02"):
        place = data.index(before) + (8 if before == b"PK\x03\x04" else 10)
        data = data[:place] + struct.pack("<H", 99) + data[place + 2 :]
    return data


def _sizeless() -> bytes:
    header = _header("a", b"0", 5)
    return _tar(header[:124] + b"\xff" * 12 + header[136:])


def _unpacked(content: Callable[[], bytes]) -> Callable[[Path], object]:
    def attempt(folder: Path) -> object:
        (folder / "archive").write_bytes(content())
        ready()
        try:
            return extract(folder / "archive", folder / "out")
        finally:
            assert not (folder / "out").exists(), "something was left behind"

    return attempt


def _large(kind: bytes) -> Callable[[], bytes]:
    return lambda: gzip.compress(_header("x", kind, 160 * MIB)) + _nothing()


def _nothing() -> bytes:
    """160 MiB of zeros that gzip has packed, with the end of a tar."""
    return gzip.compress(bytes(MIB)) * 160 + gzip.compress(bytes(1024))


def _damaged_bz2() -> bytes:
    data = bytearray(bz2.compress(_tar(_header("a", b"0", 10**6), os.urandom(10**6))))
    data[len(data) * 97 // 100] ^= 255
    return bytes(data)


ARCHIVES: Final = [
    Attack("tar: a PAX header of 160 MiB", _unpacked(_large(b"x")), "a record of 167,772,160 bytes"),
    Attack("tar: PAX records for all of 160 MiB", _unpacked(_large(b"g")), "a record of 167,772,160 bytes"),
    Attack("tar: a name of 160 MiB", _unpacked(_large(b"L")), "a name or a record of 167,772,160 bytes"),
    Attack("tar: a link's name of 160 MiB", _unpacked(_large(b"K")), "a name or a record of 167,772,160 bytes"),
    Attack(
        "tar: PAX records for all, again and again",
        _unpacked(
            lambda: gzip.compress(
                _tar(
                    *(
                        part
                        for i in range(60)
                        for record in [_record(f"k{i}", "v" * 60_000)]
                        for part in (_header("g", b"g", len(record)), record)
                    )
                ),
                1,
            )
        ),
        "of records",
    ),
    Attack("tar: names of names", _unpacked(lambda: _tar(*[_header("l", b"L", 5), b"name\0"] * 5000)), "damaged"),
    Attack("tar: a size that is none", _unpacked(_sizeless), "tar"),
    Attack(
        "tar: cut off",
        _unpacked(lambda: gzip.compress(_tar(_header("a", b"0", 10**6), os.urandom(10**6)))[:-5000]),
        "damaged",
    ),
    Attack("tar: bz2 that is damaged", _unpacked(_damaged_bz2), "damaged"),
    Attack(
        "tar: 160 MiB of nothing",
        _unpacked(lambda: gzip.compress(_header("a", b"0", 160 * MIB)) + _nothing()),
        "decompression bomb",
    ),
    Attack("zip: a link of 160 MiB", _unpacked(lambda: _zip(_zip_link)), "a link to no path"),
    Attack(
        "zip: 160 MiB of nothing",
        _unpacked(lambda: _zip(lambda f: f.writestr("a", bytes(160 * MIB)))),
        "decompression bomb",
    ),
    Attack("zip: members on top of each other", _unpacked(_overlapping), "archive"),
    Attack("zip: a member larger than it says", _unpacked(_lying), "damaged"),
    Attack("zip: a way of packing that nobody knows", _unpacked(_unknown), "damaged"),
]


def _many_members(folder: Path) -> object:
    members = b"".join(_header(str(i), b"0", 0) for i in range(4_000)) + bytes(1024)
    (folder / "archive").write_bytes(gzip.compress(members, 9))
    return extract(folder / "archive", folder / "out")


@pytest.mark.parametrize("attack", [*CONFIGURATION, *RECORDS, *DATASETS, *ARCHIVES], ids=lambda attack: attack.name)
def test_a_file_that_is_meant_to_grow(attack: Attack, tmp_path: Path) -> None:
    hold(attack, tmp_path)


def test_members_count_though_they_are_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "RATIO_FROM", 4 * MIB)  # so that few members are enough for a test
    hold(Attack("many members", _many_members, "decompression bomb"), tmp_path)
    assert not (tmp_path / "out").exists()


# The web -------------------------------------------------------------------------------------------------------------

TAGGED: Final = {"ETag": '"1"', "Content-Type": "application/octet-stream"}

METADATA: Final = "link-local address 169.254.169.254"

LEADS: Final = {
    "to plain http": ("http://127.0.0.1/a.tar", "leads to"),
    "to plain http in capitals": ("HTTP://127.0.0.1/a.tar", "leads to"),
    "to ftp": ("ftp://127.0.0.1/a.tar", "leads to"),
    "to a file": ("file:///etc/passwd", "not allowed"),
    "to data": ("data:text/plain,a", "not allowed"),
    "to the metadata of a cloud": ("https://169.254.169.254/latest/meta-data/a.tar", METADATA),
    "to it as one number": ("https://2852039166/a.tar", METADATA),
    "to it in hexadecimal": ("https://0xa9fea9fe/a.tar", METADATA),
    "to it as IPv6": ("https://[::ffff:169.254.169.254]/a.tar", "link-local address"),
    "to it behind NAT64": ("https://[64:ff9b::a9fe:a9fe]/a.tar", "link-local address"),
    "to AWS's of IPv6": ("https://[fd00:ec2::254]/a.tar", "link-local address"),
    "to Azure's": ("https://168.63.129.16/a.tar", "link-local address"),
    "to a private network": ("https://10.0.0.1/a.tar", "private address 10.0.0.1"),
    "to another private network": ("https://192.168.1.1:8443/a.tar", "private address 192.168.1.1"),
    "to a carrier's network": ("https://100.64.0.1/a.tar", "private address 100.64.0.1"),
    "to a unique local address": ("https://[fd12::1]/a.tar", "private address fd12::1"),
    "to another port of this machine": ("https://127.0.0.1:1/a.tar", "loopback address 127.0.0.1"),
    "to this machine by another name": ("https://127.9.9.9/a.tar", "loopback address 127.9.9.9"),
    "to this machine as IPv6": ("https://[::1]/a.tar", "loopback address ::1"),
    "to nowhere": ("https://0.0.0.0/a.tar", "unspecified address 0.0.0.0"),
    "to everybody": ("https://224.0.0.1/a.tar", "private address 224.0.0.1"),
    "to a name that leads to the metadata": ("https://named.example/a.tar", METADATA),
    "to a name with a private address beside a public one": ("https://both.example/a.tar", "private address 10.0.0.7"),
    "to a name that changes its mind": ("https://rebound.example/a.tar", METADATA),
    "round in a circle": ("/lead", "redirect"),
}

NAMES: Final = {
    "named.example": [["169.254.169.254"]],
    "both.example": [["93.184.216.34", "10.0.0.7"]],
    "rebound.example": [["93.184.216.34"], ["169.254.169.254"]],
}
"""What names lead to, look by look."""


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, web_server.Answer]]]:
    """The address of a web server, and its answers."""
    answers: dict[str, web_server.Answer] = {}
    known = socket.getaddrinfo
    looked: dict[str, int] = {}

    def look_up(host: str, port: int, *asked: Any, **how: Any) -> Any:
        if host not in NAMES:
            return known(host, port, *asked, **how)
        answer = NAMES[host][min(looked.get(host, 0), len(NAMES[host]) - 1)]
        looked[host] = looked.get(host, 0) + 1
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answer]

    def nowhere(self: socket.socket, address: tuple[str, int]) -> None:
        if address[0] != "127.0.0.1":
            raise AssertionError(f"{address} was asked")
        plain(self, address)

    plain = socket.socket.connect
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket.socket, "connect", nowhere)
    monkeypatch.setattr(remote, "_PAUSES", ())
    for variable in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with web_server.serving(answers, tmp_path) as (address, certificate):
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        yield address, answers


@pytest.mark.parametrize("lead", LEADS)
def test_a_server_that_leads_elsewhere(
    lead: str, hostile: tuple[str, dict[str, web_server.Answer]], tmp_path: Path
) -> None:
    address, answers = hostile
    to, told = LEADS[lead]
    answers["/lead"] = web_server.redirect(to, 307 if "private" in lead else 302)
    hold(Attack(lead, lambda _: remote.look(f"{address}/lead"), told), tmp_path)


def _fetched(address: str) -> Callable[[Path], object]:
    return lambda folder: remote.fetch(address, folder / "fetched")


SENT: Final[dict[str, tuple[dict[str, web_server.Answer], str]]] = {
    "more than it announced": (
        {
            "/a.tar": lambda request: (
                web_server.headed({**TAGGED, "Content-Range": "bytes 0-0/1000", "Content-Length": "1"}, b"x", 206)(
                    request
                )
                if request.headers["Range"] == "bytes=0-0"
                else web_server.endless(TAGGED)(request)
            )
        },
        "more than the 1,000 bytes",
    ),
    "a page without end beside a redirect": (
        {"/a.tar": web_server.endless({"Location": "https://10.0.0.1/a.tar"}, 302)},
        "private address",
    ),
    "a fault without end": ({"/a.tar": web_server.endless({}, 404)}, "404"),
    "a size of 400 digits": ({"/a.tar": web_server.headed({**TAGGED, "Content-Length": "9" * 400})}, "no size"),
    "a size in superscript": (
        {"/a.tar": web_server.headed({**TAGGED, "Content-Range": "bytes 0-0/\xb2"}, b"", 206)},
        "no size",
    ),
    "a size beyond all disks": (
        {
            "/a.tar": web_server.headed(
                {**TAGGED, "Content-Range": "bytes 0-0/99999999999999999", "Content-Length": "0"}, b"", 206
            )
        },
        "split the dataset",
    ),
    "a header of 1 MB": ({"/a.tar": web_server.headed({"ETag": "x" * MIB})}, "no whole answer"),
    "10,000 headers": ({"/a.tar": web_server.headed({f"X-{i}": "1" for i in range(10_000)})}, "no whole answer"),
    "another part than was asked for": (
        {
            "/a.tar": lambda request: web_server.headed(
                {**TAGGED, "Content-Range": "bytes 0-0/200000000", "Content-Length": "1"}, b"x", 206
            )(request)
        },
        "came",
    ),
}


@pytest.mark.parametrize("sent", SENT)
def test_a_server_that_sends_what_it_should_not(
    sent: str, hostile: tuple[str, dict[str, web_server.Answer]], tmp_path: Path
) -> None:
    address, answers = hostile
    found, told = SENT[sent]
    answers.update(found)
    hold(Attack(sent, _fetched(f"{address}/a.tar"), told), tmp_path)


NOT_ASKED: Final = {
    "https://169.254.169.254/a.tar": "link-local",
    "https://[fe80::1]/a.tar": "link-local",
    "https://0.0.0.0/a.tar": "unspecified",
    "http://127.0.0.1/a.tar": "https",
    "file:///etc/passwd": "addresses of this kind are not read",
    "https://127.0.0.1:99999/a.tar": "cannot be read",
    "https://user:pass/word@127.0.0.1/a.tar": "port is no number",
}


@pytest.mark.parametrize(("address", "told"), NOT_ASKED.items())
def test_an_address_that_is_not_asked(
    address: str, told: str, hostile: tuple[str, dict[str, web_server.Answer]], tmp_path: Path
) -> None:
    said = hold(Attack(address, lambda _: remote.look(address), told), tmp_path)
    assert "pass" not in said.replace("password", "").replace("/etc/passwd", "")


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "8.8.8.8"])
def test_public_addresses_are_asked(address: str) -> None:
    assert web.inner(address) is None


def test_security_md_tells_how_many_attacks_there_are() -> None:
    tables = (ONNX_METADATA, SCORES, CONFIGURATION, RECORDS, DATASETS, ARCHIVES, LEADS, SENT, NOT_ASKED)
    rows = sum(map(len, tables)) + 1  # and the archive of many members
    lines = (Path(__file__).parents[1] / "SECURITY.md").read_text().splitlines()
    (line,) = (line for line in lines if f"`tests/{Path(__file__).name}`" in line)
    assert line.endswith(f"| {rows} | {rows} |"), rows
