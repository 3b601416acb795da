"""The content of a `.pt` file, as data.

A `.pt` file is a pickle beside raw tensors in a zip archive, and a pickle is a program: it names functions and calls
them. Here it is carried out by an interpreter of its own that calls none of them. Each name that a file may refer to is
listed below with what becomes of it: a container, a tensor, a plain value, or a `Record`, which is the name of a class
and the values that the file gives its attributes. Everything else is refused. What is built is bounded by the file's
size: tensors lie within the bytes that the file has for them, and objects are counted.

`modules.py` makes networks of records.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

LARGEST_FILE: Final = 8 << 30
LARGEST_PICKLE: Final = 16 << 20
"""Bytes of a pickle: that of an unstripped YOLOv8l has less than a megabyte."""
MOST_OBJECTS: Final = 1_000_000
"""Containers and values that a pickle may build."""
MOST_ENTRIES: Final = 50_000
"""Files in the archive."""
DEEPEST: Final = 64
"""Containers within each other."""
_LONGEST_NUMBER: Final = 32
"""Bytes of an integer: states of random generators have up to 16."""


class Refused(ValueError):
    """Why a file is refused; whoever knows the path and the remedy makes an `InputError` of it.

    Attributes:
        name: The name that it refers to and must not, if that is why.
    """

    def __init__(self, why: str, name: str | None = None) -> None:
        super().__init__(why)
        self.name = name


@dataclass(eq=False)
class Name:
    """A function or class that a pickle refers to: its name, and nothing behind it."""

    text: str


@dataclass(eq=False)
class Record:
    """An object of a class, as it stands in the file.

    Attributes:
        name: Full name of the class, as the file has it.
        state: Its attributes.
    """

    name: str
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        path: The file.
        sha256: Of its bytes.
        value: Containers, numbers, text, tensors, `Record` and `Name`.
    """

    path: Path
    sha256: str
    value: Any


# Names ----------------------------------------------------------------------------------------------------------------

_STORAGES: Final[Mapping[str, torch.dtype]] = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Double": torch.float64,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}

_VALUES: Final[Mapping[str, Any]] = {str(dtype): dtype for dtype in _STORAGES.values()}
"""Names that stand for a value."""


@dataclass(eq=False)
class _Storage:
    """The bytes of one or more tensors."""

    tensor: Tensor


@dataclass(eq=False)
class _Dtype:
    """A NumPy type, by its code."""

    code: str


def _tensor(machine: _Machine, arguments: tuple[Any, ...]) -> Tensor:
    """`_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])`."""
    if len(arguments) not in (6, 7) or not isinstance(arguments[0], _Storage):
        raise Refused("a tensor without a storage")
    storage, offset, size, stride = arguments[0].tensor, *arguments[1:4]
    if arguments[5] or arguments[6:] not in ((), (None,)):
        raise Refused("a tensor with hooks or metadata")
    if not (_is_shape(size) and _is_shape(stride) and len(size) == len(stride) <= 8 and _is_shape((offset,))):
        raise Refused("a tensor whose shape is no tuple of small numbers")
    elements = int(np.prod(size, dtype=object)) if size else 1
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if elements else 0
    if elements > storage.numel() or last >= max(storage.numel(), 1):
        raise Refused(f"a tensor of shape {list(size)} on a storage of {storage.numel()} numbers")
    machine.count_bytes(elements * storage.element_size())
    return storage.as_strided(size, stride, offset) if elements else storage.new_empty(size)


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple) and all(type(n) is int and 0 <= n < 1 << 40 for n in value)


def _parameter(_: _Machine, arguments: tuple[Any, ...]) -> Tensor:
    """`_rebuild_parameter(data, requires_grad, hooks)`."""
    if len(arguments) != 3 or not isinstance(arguments[0], Tensor) or arguments[2]:
        raise Refused("a parameter that is no tensor, or has hooks")
    data, wanted = arguments[0], bool(arguments[1])
    return nn.Parameter(data, requires_grad=wanted and data.is_floating_point())


def _pairs(machine: _Machine, arguments: tuple[Any, ...]) -> Any:
    """`OrderedDict(pairs)`."""
    if len(arguments) > 1 or (arguments and not isinstance(arguments[0], list)):
        raise Refused("an OrderedDict of something else than pairs")
    result: OrderedDict[Any, Any] = OrderedDict()
    machine.count_objects(len(arguments[0]) if arguments else 0)
    for pair in arguments[0] if arguments else []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Refused("an OrderedDict of something else than pairs")
        result[machine.key(pair[0])] = pair[1]
    return result


def _defaults(_: _Machine, arguments: tuple[Any, ...]) -> Any:
    """`defaultdict(kind)`."""
    if len(arguments) > 1 or not all(isinstance(kind, Name) for kind in arguments):
        raise Refused("a defaultdict of something else than a class")
    return {}


def _set(machine: _Machine, arguments: tuple[Any, ...]) -> Any:
    if len(arguments) > 1 or (arguments and not isinstance(arguments[0], list | tuple)):
        raise Refused("a set of something else than values")
    machine.count_objects(len(arguments[0]) if arguments else 0)
    return {machine.key(value) for value in (arguments[0] if arguments else [])}


def _text(machine: _Machine, arguments: tuple[Any, ...]) -> str:
    """A path, as text: `PosixPath(part, part)`."""
    if not all(isinstance(part, str) for part in arguments) or len(arguments) > 256:
        raise Refused("a path that is no text")
    machine.count_objects(sum(map(len, arguments)))
    return "/".join(arguments)


def _device(_: _Machine, arguments: tuple[Any, ...]) -> str:
    if not arguments or not isinstance(arguments[0], str):
        raise Refused("a device without a name")
    return arguments[0]


def _size(_: _Machine, arguments: tuple[Any, ...]) -> Any:
    if len(arguments) != 1 or not _is_shape(arguments[0]):
        raise Refused("a size that is no tuple of small numbers")
    return arguments[0]


def _dtype(_: _Machine, arguments: tuple[Any, ...]) -> _Dtype:
    if not arguments or arguments[0] not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
        raise Refused("a NumPy type that is no number")
    return _Dtype(arguments[0])


def _encode(machine: _Machine, arguments: tuple[Any, ...]) -> bytes:
    """`codecs.encode(text, "latin1")`, the form that protocol 2 has for bytes."""
    if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[1] != "latin1":
        raise Refused("bytes in another form than Latin 1")
    machine.count_objects(len(arguments[0]))
    try:
        return arguments[0].encode("latin1")
    except UnicodeEncodeError:
        raise Refused("bytes that are none") from None


def _scalar(_: _Machine, arguments: tuple[Any, ...]) -> float | int | bool:
    """`numpy.core.multiarray.scalar(dtype, bytes)`."""
    if len(arguments) != 2 or not isinstance(arguments[0], _Dtype) or not isinstance(arguments[1], bytes):
        raise Refused("a NumPy number that is none")
    kind = np.dtype(arguments[0].code)
    if len(arguments[1]) != kind.itemsize:
        raise Refused("a NumPy number of the wrong length")
    value: float | int | bool = np.frombuffer(arguments[1], kind)[0].item()
    return value


def _method(_: _Machine, arguments: tuple[Any, ...]) -> Name:
    """`getattr(module, "forward_fuse")`, by which a folded module says that it is folded: nothing is looked up."""
    if len(arguments) != 2 or not isinstance(arguments[0], Record) or arguments[1] not in METHODS:
        raise Refused("it looks up an attribute")
    return Name(arguments[1])


METHODS: Final = ("forward_fuse", "forward_split")
"""Methods that a folded module puts in place of another."""

_Call = Callable[["_Machine", tuple[Any, ...]], Any]

_CALLS: Final[Mapping[str, _Call]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": _pairs,
    **dict.fromkeys(("__builtin__.set", "builtins.set", "__builtin__.frozenset", "builtins.frozenset"), _set),
    **{f"pathlib.{kind}Path": _text for kind in ("", "Posix", "Windows", "PurePosix", "PureWindows")},
    **{f"pathlib._local.{kind}Path": _text for kind in ("", "Posix", "Windows", "PurePosix", "PureWindows")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    "numpy.dtype": _dtype,
    "collections.defaultdict": _defaults,
    **dict.fromkeys(("__builtin__.getattr", "builtins.getattr"), _method),
    "_codecs.encode": _encode,
}
"""Names that a pickle may call, and what is done instead."""

_KINDS: Final = ("dict", "list", "tuple", "str", "int", "float", "bool")

PASSED_OVER: Final = frozenset(
    {
        *(f"{place}.IterableSimpleNamespace" for place in ("ultralytics.utils", "ultralytics.yolo.utils")),
        *(
            f"{place}.{name}"
            for place in ("ultralytics.utils.loss", "ultralytics.yolo.utils.loss", "ultralytics.yolo.v8.detect.train")
            for name in ("v8DetectionLoss", "BboxLoss", "DFLoss", "Loss", "E2EDetectLoss", "E2ELoss")
        ),
        *(f"{place}.tal.TaskAlignedAssigner" for place in ("ultralytics.utils", "ultralytics.yolo.utils")),
        "torch.nn.modules.loss.BCEWithLogitsLoss",
        "torch.nn.modules.loss.CrossEntropyLoss",
        "types.SimpleNamespace",
        *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.nodes.AnyNode"),
        *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "typing.Any"),  # settings of 8.0.0 to 8.0.6
        *(f"{place}.{kind}" for place in ("__builtin__", "builtins") for kind in _KINDS),
    }
)
"""Classes of what lies beside a network in the middle of a training: they become records, and are used nowhere."""


# The pickle -----------------------------------------------------------------------------------------------------------

_MARK: Final = object()


class _Machine:
    """Carries out a pickle of protocols 2 to 5.

    Args:
        program: The pickle.
        classes: Names of classes that become records.
        passed_over: Names of further ones, whose records may be made by a call without arguments.
        storage: The storage of a number of elements by its key.
        most_bytes: How many bytes all tensors may have together.
    """

    def __init__(
        self,
        program: bytes,
        classes: frozenset[str],
        passed_over: frozenset[str],
        storage: Callable[[str, torch.dtype, int], Tensor],
        most_bytes: int,
    ) -> None:
        self.program = program
        self.classes = classes | passed_over
        self.passed_over = passed_over
        self.storage = storage
        self.bytes_left = most_bytes
        self.objects_left = MOST_OBJECTS
        self.at = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    # Bounds

    def count_bytes(self, number: int) -> None:
        """A tensor of so many bytes is built."""
        self.bytes_left -= number
        if self.bytes_left < 0:
            raise Refused("its tensors have more numbers together than the file has room for")

    def count_objects(self, number: int) -> None:
        """So many instructions are carried out, or values copied."""
        self.objects_left -= number
        if self.objects_left < 0:
            raise Refused(f"its pickle builds more than {MOST_OBJECTS} objects")

    def key(self, value: Any) -> Any:
        """What may be a key: hashing nested tuples can take forever, and so can a table of large integers.

        Python's hash of an integer is its remainder by 2^61 - 1: multiples of it all have the same one.
        """
        if type(value) is int and not -(1 << 63) <= value < 1 << 63:
            raise Refused("a key of a dictionary is an integer of more than 64 bits")
        if value is None or type(value) in (str, int, float, bool, bytes):
            return value
        raise Refused(f"a key of a dictionary is a {type(value).__name__}")

    # Reading

    def _take(self, number: int) -> bytes:
        end = self.at + number
        if end > len(self.program):
            raise Refused("its pickle ends early")
        piece = self.program[self.at : end]
        self.at = end
        return piece

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        end = self.program.find(b"\n", self.at, self.at + 1024)
        if end < 0:
            raise Refused("a name without an end")
        return self._decoded(self._take(end + 1 - self.at)[:-1])

    def _decoded(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise Refused("text that is not UTF-8") from None

    def _pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise Refused("its pickle takes from an empty stack")
        return self.stack.pop()

    def _top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise Refused("its pickle reads an empty stack")
        return self.stack[-1]

    def _to_mark(self) -> list[Any]:
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                items = self.stack[place + 1 :]
                del self.stack[place:]
                return items
        raise Refused("its pickle has no mark")

    # Running

    def run(self) -> Any:
        """The value that the pickle describes."""
        if self.program[:1] != b"\x80":
            raise Refused("its pickle is of protocol 0 or 1, which no checkpoint of PyTorch has")
        while True:
            code = self._take(1)
            if code == b".":
                value = self._pop()
                if self.stack or self.at != len(self.program):
                    raise Refused("its pickle goes on after its end")
                return value
            action = _ACTIONS.get(code)
            if action is None:
                raise Refused(f"its pickle has the instruction 0x{code.hex()}, which no checkpoint has")
            self.count_objects(1)
            action(self)

    def put(self, place: int) -> None:
        self.memo[place] = self._top()

    def get(self, place: int) -> None:
        if place not in self.memo:
            raise Refused("its pickle takes what it never put")
        self.stack.append(self.memo[place])

    def named(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if full in _VALUES:
            self.stack.append(_VALUES[full])
        elif full in _CALLS or full in _STORAGES or full in self.classes:
            self.stack.append(Name(full))
        else:
            raise Refused(f"it refers to {shown(full)}", full)

    def reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise Refused("it calls something that is no function")
        call = _CALLS.get(function.text)
        if function.text in self.passed_over and not arguments:  # how a SimpleNamespace is stored
            self.stack.append(Record(function.text))
            return
        if call is None:
            raise Refused(f"it calls {shown(function.text)}")
        self.stack.append(call(self, arguments))

    def new(self) -> None:
        arguments, kind = self._pop(), self._pop()
        if not isinstance(kind, Name) or not isinstance(arguments, tuple):
            raise Refused("it makes an object of something that is no class")
        if kind.text in _CALLS:  # sets, paths and OrderedDicts in later protocols
            self.stack.append(_CALLS[kind.text](self, arguments))
        elif arguments or kind.text in _STORAGES:
            raise Refused(f"it gives arguments to {shown(kind.text)}")
        else:
            self.stack.append(Record(kind.text))

    def build(self) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, OrderedDict) and isinstance(state, dict):
            return  # `_metadata` of a state: the versions of modules
        if isinstance(target, _Dtype) and isinstance(state, tuple):
            if state[1:2] not in (("<",), ("|",), ("=",)):
                raise Refused("NumPy numbers of another byte order")
            return
        if not isinstance(target, Record) or not isinstance(state, dict) or target.state:
            raise Refused("it sets attributes of something that has none")
        if not all(type(name) is str for name in state):
            raise Refused("it sets attributes whose names are no text")
        target.state = state

    def persistent(self) -> None:
        what = self._pop()
        if not (isinstance(what, tuple) and len(what) == 5 and what[0] == "storage" and isinstance(what[1], Name)):
            raise Refused("a storage of an unknown form")
        _, kind, key, _, elements = what
        if kind.text not in _STORAGES or not isinstance(key, str) or type(elements) is not int:
            raise Refused("a storage of an unknown form")
        dtype = _STORAGES[kind.text]
        known = self.storages.get(key)
        if known is None:
            known = self.storages[key] = _Storage(self.storage(key, dtype, elements))
        if known.tensor.dtype != dtype or known.tensor.numel() != elements:
            raise Refused(f"the storage {shown(key)} has two types or sizes")
        self.stack.append(known)

    def set_items(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(items) % 2:
            raise Refused("it sets items of something that has none")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self.key(key)] = value

    def append(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise Refused("it appends to something that is no list")
        target.extend(items)

    def add(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, set):
            raise Refused("it adds to something that is no set")
        target.update(self.key(item) for item in items)

    def text(self, length: int) -> None:
        self.stack.append(self._decoded(self._take(length)))

    def blob(self, length: int) -> None:
        self.stack.append(self._take(length))

    def integer(self, length: int) -> None:
        if length > _LONGEST_NUMBER:
            raise Refused("an integer of hundreds of digits")
        self.stack.append(int.from_bytes(self._take(length), "little", signed=True))

    def protocol(self) -> None:
        if not 2 <= self._number("B") <= 5:
            raise Refused("a pickle of an unknown protocol")

    def frame(self) -> None:
        """How far to read ahead, which is of no use with all of it in memory."""
        self._take(8)

    def pair(self, number: int) -> None:
        self.stack.append(tuple([self._pop() for _ in range(number)][::-1]))

    def stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise Refused("it refers to a name that is no text")
        self.named(module, name)

    def set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self.set_items([key, value])

    def append_one(self) -> None:
        item = self._pop()
        self.append([item])


_ACTIONS: Final[Mapping[bytes, Callable[[_Machine], None]]] = {
    b"\x80": _Machine.protocol,
    b"\x95": _Machine.frame,
    b"}": lambda m: m.stack.append({}),
    b"]": lambda m: m.stack.append([]),
    b")": lambda m: m.stack.append(()),
    b"\x8f": lambda m: m.stack.append(set()),
    b"(": lambda m: m.stack.append(_MARK),
    b"N": lambda m: m.stack.append(None),
    b"\x88": lambda m: m.stack.append(True),
    b"\x89": lambda m: m.stack.append(False),
    b"J": lambda m: m.stack.append(m._number("<i")),
    b"K": lambda m: m.stack.append(m._number("B")),
    b"M": lambda m: m.stack.append(m._number("<H")),
    b"G": lambda m: m.stack.append(m._number(">d")),
    b"\x8a": lambda m: m.integer(m._number("B")),
    b"X": lambda m: m.text(m._number("<I")),
    b"\x8c": lambda m: m.text(m._number("B")),
    b"\x8d": lambda m: m.text(m._number("<Q")),
    b"B": lambda m: m.blob(m._number("<I")),
    b"C": lambda m: m.blob(m._number("B")),
    b"\x8e": lambda m: m.blob(m._number("<Q")),
    b"q": lambda m: m.put(m._number("B")),
    b"r": lambda m: m.put(m._number("<I")),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"h": lambda m: m.get(m._number("B")),
    b"j": lambda m: m.get(m._number("<I")),
    b"t": lambda m: m.stack.append(tuple(m._to_mark())),
    b"\x85": lambda m: m.pair(1),
    b"\x86": lambda m: m.pair(2),
    b"\x87": lambda m: m.pair(3),
    b"u": lambda m: m.set_items(m._to_mark()),
    b"s": _Machine.set_item,
    b"e": lambda m: m.append(m._to_mark()),
    b"a": _Machine.append_one,
    b"\x90": lambda m: m.add(m._to_mark()),
    b"c": lambda m: m.named(m._line(), m._line()),
    b"\x93": _Machine.stack_global,
    b"R": _Machine.reduce,
    b"\x81": _Machine.new,
    b"b": _Machine.build,
    b"Q": _Machine.persistent,
}
"""The instructions that checkpoints consist of. Those of protocol 0 are missing, and those that call by other ways."""


# The archive ----------------------------------------------------------------------------------------------------------


def read_plain(path: Path, device: torch.device | None = None) -> dict[str, Any]:
    """The state of a training, as this package keeps it: containers, numbers, text and tensors, and no objects.

    Args:
        path: The file.
        device: Where its tensors go; the CPU unless given.

    Raises:
        Refused: It can't be read, or has something else in it.
    """
    moved: dict[int, tuple[Any, Any]] = {}  # what a file has once is there once; the first keeps its number alive

    begun: set[int] = set()

    def move(value: Any, depth: int) -> Any:
        if depth > DEEPEST:
            raise Refused(f"its containers lie more than {DEEPEST} deep in each other")
        if isinstance(value, Name | Record | _Storage | _Dtype):
            raise Refused("it has something in it that is no plain data")
        if not isinstance(value, Tensor | dict | list | tuple):
            return value
        if id(value) in moved:
            return moved[id(value)][1]
        if id(value) in begun:
            raise Refused("a container of it lies in itself")
        begun.add(id(value))
        result: Any = value
        if isinstance(value, dict | list):
            for key in range(len(value)) if isinstance(value, list) else list(value):
                value[key] = move(value[key], depth + 1)
        elif isinstance(value, tuple):
            result = tuple(move(item, depth + 1) for item in value)
        elif device is not None:
            result = value.to(device)
        moved[id(value)] = value, result
        return result

    found = move(read(path, frozenset(), passed_over=frozenset()).value, 0)
    if not isinstance(found, dict):
        raise Refused("it is no state of a training")
    return found


def read(path: Path, classes: frozenset[str], passed_over: frozenset[str] = PASSED_OVER) -> Content:
    """What a `.pt` file holds. Nothing of it is run, and no more is built than it has bytes for.

    Args:
        path: The file.
        classes: Full names of classes whose objects become records.
        passed_over: The same, of classes that nothing is made of.

    Raises:
        Refused: It can't be read, is none, or holds something else.
    """
    data = _bytes(path)
    try:
        files = _files(data)
        program = bytes(files["data.pkl"])
        if len(program) > LARGEST_PICKLE:
            raise Refused(f"its pickle has more than {LARGEST_PICKLE} bytes")
        machine = _Machine(program, classes, passed_over, lambda *asked: _storage(files, *asked), most_bytes=len(data))
        return Content(path, hashlib.sha256(data).hexdigest(), machine.run())
    except (struct.error, zipfile.BadZipFile, zlib.error, EOFError, OverflowError, IndexError) as error:
        raise Refused(f"it is damaged ({shown(str(error))})") from None


def _bytes(path: Path) -> bytearray:
    """The file's bytes; one that can't be read, is none or has no end is refused."""
    try:
        # Non-blocking: a pipe without a writer would be waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise Refused("it is a folder" if stat.S_ISDIR(found.st_mode) else "it is no file")
        with os.fdopen(descriptor, "rb") as file:
            if found.st_size > LARGEST_FILE:
                raise Refused(f"it has more than {LARGEST_FILE >> 30} GiB")
            data = bytearray(found.st_size)
            if file.readinto(data) != found.st_size:
                raise Refused("it changed while it was read")
    except FileNotFoundError:
        raise Refused("it is a link that leads nowhere" if path.is_symlink() else "there is no such file") from None
    except OSError as error:
        raise Refused(f"it can't be read ({error.strerror})") from None
    return data


class _View:
    """Bytes as a file, without a copy."""

    def __init__(self, data: bytearray) -> None:
        self._data = memoryview(data)
        self._at = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        start = {0: 0, 1: self._at, 2: len(self._data)}[whence]
        if start + offset < 0:
            raise OSError("before the beginning")
        self._at = start + offset
        return self._at

    def read(self, number: int = -1) -> bytes:
        end = len(self._data) if number < 0 else self._at + number
        piece = bytes(self._data[self._at : end])
        self._at += len(piece)
        return piece


def _files(data: bytearray) -> dict[str, memoryview]:
    """The files of the archive by their path below its one folder."""
    if data[:4] != b"PK\3\4":
        raise Refused(_what_else(bytes(data[:64])))
    if data.count(b"PK\1\2") > MOST_ENTRIES:
        raise Refused(f"its archive has more than {MOST_ENTRIES} files")
    try:
        with zipfile.ZipFile(_View(data)) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        raise Refused("its archive has no end: it is torn, or damaged") from None
    if any(entry.filename.partition("/")[2].startswith(("constants.pkl", "code/")) for entry in entries):
        raise Refused("it is a TorchScript file")
    files: dict[str, memoryview] = {}
    total = 0
    for entry in entries:
        _, _, name = entry.filename.partition("/")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise Refused("its archive is compressed or encrypted, which PyTorch's never are")
        total += entry.file_size
        if entry.file_size != entry.compress_size or total > len(data):
            raise Refused("the sizes in its archive are not those of its bytes")
        if name in files:
            raise Refused(f"its archive has {shown(name)} twice")
        files[name] = _piece(data, entry)
    if "data.pkl" not in files:
        raise Refused("it is a zip archive without a network of PyTorch")
    if bytes(files.get("byteorder", memoryview(b"little"))) != b"little":
        raise Refused("its numbers are in another byte order")
    return files


def _piece(data: bytearray, entry: zipfile.ZipInfo) -> memoryview:
    """The bytes of a file in the archive, held against their checksum."""
    header = data[entry.header_offset : entry.header_offset + 30]
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise Refused("its archive is damaged")
    names, extra = struct.unpack_from("<HH", header, 26)
    start = entry.header_offset + 30 + names + extra
    piece = memoryview(data)[start : start + entry.file_size]
    if len(piece) != entry.file_size or zlib.crc32(piece) != entry.CRC:
        raise Refused(f"it is damaged: {shown(entry.filename)} has not the bytes that were written")
    return piece


def _what_else(head: bytes) -> str:
    """What a file that is no zip archive is."""
    if not head:
        return "it is empty"
    if head[:2] == b"\x80\x02":
        return "it is a bare pickle, as PyTorch wrote before 1.6"
    if head[:2] == b"\x08\x0a" or b"pytorch" in head[:32] or b"onnx" in head[:64]:
        return "it is an ONNX file"
    if head[:2] == b"\x1f\x8b":
        return "it is compressed with gzip"
    if head[1:8] == b"HDF\r\n\x1a\n":
        return "it is an HDF5 file"
    return "it is no archive of PyTorch"


def _storage(files: Mapping[str, memoryview], key: str, dtype: torch.dtype, elements: int) -> Tensor:
    """A storage of the archive."""
    piece = files.get(f"data/{key}")
    if piece is None:
        raise Refused(f"the storage {shown(key)} is missing")
    if not 0 <= elements * dtype.itemsize == len(piece):
        raise Refused(f"the storage {shown(key)} has {len(piece)} bytes instead of {elements} {dtype}")
    return torch.frombuffer(piece, dtype=dtype) if elements else torch.empty(0, dtype=dtype)


def shown(text: str) -> str:
    """Text of the file's in a message: one line, of printable characters, not too long."""
    safe = "".join(c if c.isprintable() else "?" for c in text)
    return safe if len(safe) <= 120 else f"{safe[:120]}..."
