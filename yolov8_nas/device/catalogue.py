"""The catalogue of target devices: what their makers specify, and the names that lead there.

The data, with the source of each entry, is `catalogue.yaml`. A name may mean several devices: `NVIDIA_A100` is any
A100, `a100-80gb` one of two. GPU feature discovery rewrites the product of a GPU that is cut up or shared: a slice of a
Multi-Instance GPU ends with `-MIG-1g.5gb`, and one that time slicing or MPS hands to several pods with `-SHARED`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from yolov8_nas.errors import InputError

FILE: Final = Path(__file__).with_name("catalogue.yaml")

TENSOR_CORE_TYPES: Final[Mapping[str, tuple[str, ...]]] = {
    "7.0": ("fp16",),
    "7.2": ("fp16", "int8"),
    "7.5": ("fp16", "int8"),
    "8.0": ("fp16", "bf16", "tf32", "int8", "fp64"),
    "8.6": ("fp16", "bf16", "tf32", "int8"),
    "8.7": ("fp16", "bf16", "tf32", "int8"),
    "8.9": ("fp16", "bf16", "tf32", "int8", "fp8"),
    "9.0": ("fp16", "bf16", "tf32", "int8", "fp8", "fp64"),
    "10.0": ("fp16", "bf16", "tf32", "int8", "fp8", "fp6", "fp4", "fp64"),
    "11.0": ("fp16", "bf16", "tf32", "int8", "fp8", "fp6", "fp4"),
    "12.0": ("fp16", "bf16", "tf32", "int8", "fp8", "fp6", "fp4"),
}
"""Data types of the tensor cores by compute capability, without those below 8 bits of integers, which no detector uses.
CUDA C++ Programming Guide, chapter Compute Capabilities, table of tensor core input data types."""

_NO_PART_OF_A_NAME: Final = frozenset(
    [
        "nvidia",
        "tesla",
        "geforce",
        "gpu",
        "graphics",
        "card",
        "rtx",
        "developer",
        "kit",
        "module",
        "series",
        "engineering",
        "reference",
    ]
)
_SIMILAR: Final = 0.5
_MEMORY_TOLERANCE: Final = 0.2
"""Share by which the memory that a driver tells may differ from that which is sold: ECC, firmware, and GB for GiB."""


@dataclass(frozen=True, eq=False)
class Specification:
    """A device as its maker specifies it; nothing where the source does not say. There is one object of each.

    Attributes:
        key: Its name in the catalogue, for example `a100-sxm4-40gb`.
        compute_capability: For example `8.0`.
        sms: Streaming multiprocessors.
        memory_gb: Memory as sold.
        memory_type: For example `GDDR6`.
        bandwidth_gbs: Memory bandwidth in 10^9 bytes per second.
        tops: Dense 10^12 operations per second by data type; see `catalogue.yaml`.
        boost_mhz: Clock at which `tops` holds.
        l2_mb: L2 cache in MiB.
        power_w: Default power limit.
        products: Names that the driver gives it.
        source: Where the figures are from.
        words: Words of all its names.
        model: The one of these that its family is known by.
    """

    key: str
    compute_capability: str
    sms: int
    memory_gb: float
    memory_type: str
    bandwidth_gbs: float
    tops: Mapping[str, float]
    boost_mhz: int | None
    l2_mb: float | None
    power_w: float | None
    products: tuple[str, ...]
    source: str
    words: frozenset[str]
    model: str

    @property
    def labels(self) -> tuple[str, ...]:
        """Values of the node label `nvidia.com/gpu.product` where it is whole and for one pod alone."""
        return tuple(product.replace(" ", "-") for product in self.products)

    @property
    def tensor_core_types(self) -> tuple[str, ...]:
        """Data types of its tensor cores."""
        return tensor_core_types(self.compute_capability)


@dataclass(frozen=True)
class Named:
    """What a name means.

    Attributes:
        asked: The name.
        specifications: The devices that it covers, at least one.
        mig: Profile of the Multi-Instance GPU slice that it names, for example `1g.5gb`; nothing for a whole GPU.
        shared: Whether it names a GPU that several pods share in time.
    """

    asked: str
    specifications: tuple[Specification, ...]
    mig: str | None
    shared: bool


@cache
def catalogue() -> Mapping[str, Specification]:
    """All devices by their key."""
    return {key: _specification(key, entry) for key, entry in yaml.safe_load(FILE.read_text()).items()}


def _specification(key: str, entry: Mapping[str, Any]) -> Specification:
    memory = entry["memory"]
    names = [key, entry["model"], *entry["products"], *entry.get("also", ())]
    return Specification(
        key=key,
        compute_capability=entry["compute_capability"],
        sms=entry["sms"],
        memory_gb=memory["gb"],
        memory_type=memory["type"],
        bandwidth_gbs=memory["gbs"],
        tops=entry.get("tops", {}),
        boost_mhz=entry.get("boost_mhz"),
        l2_mb=entry.get("l2_mb"),
        power_w=entry.get("power_w"),
        products=tuple(entry["products"]),
        source=entry["source"],
        words=frozenset().union(*map(_words, names)),
        model=entry["model"],
    )


def find(name: str) -> Named | None:
    """What a name of people, drivers, clouds or node labels means; nothing where the catalogue has no such device."""
    whole, mig, shared = _taken_apart(name)
    words = _words(whole)
    entries = catalogue().values()
    exact = [entry for entry in entries if any(words == _words(own) for own in (entry.key, *entry.products))]
    covered = [entry for entry in entries if entry.model in words and words <= entry.words]
    found = exact or covered
    return Named(name, tuple(found), mig, shared) if found else None


def named(name: str) -> Named:
    """What a name means.

    Raises:
        InputError: The catalogue has no such device; names that look like it are told.
    """
    found = find(name)
    if found is None:
        near = similar(name)
        meant = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(catalogue())}"
        raise InputError(f"hardware {name!r} is unknown; {meant}")
    return found


def similar(name: str) -> list[str]:
    """Keys of devices whose names look like `name`, the likest first, three at most."""
    asked = "".join(re.findall(r"[a-z0-9]+", _taken_apart(name)[0].lower().replace("nvidia", "")))
    spelled: dict[str, str] = {}
    for entry in catalogue().values():
        for own in (entry.model, entry.key.replace("-", ""), f"rtx{entry.model}" if entry.model.isdigit() else ""):
            spelled.setdefault(own, entry.key)
    near = difflib.get_close_matches(asked, list(filter(None, spelled)), n=6, cutoff=_SIMILAR)
    return list(dict.fromkeys(spelled[one] for one in near))[:3]


def identify(product: str, memory_gb: float | None = None) -> Specification | None:
    """The entry of a device that is here.

    Args:
        product: Its name as the driver (of a Jetson, the device tree) gives it; a slice's leads to the whole GPU.
        memory_gb: Memory of the whole device, in 10^9 bytes; it tells entries of one name apart.
    """
    found = find(product)
    if found is None:
        return None
    fitting = [
        entry
        for entry in found.specifications
        if memory_gb is None or abs(memory_gb / entry.memory_gb - 1) <= _MEMORY_TOLERANCE
    ]
    return fitting[0] if len(fitting) == 1 else None


def tensor_core_types(compute_capability: str) -> tuple[str, ...]:
    """Data types of the tensor cores of a compute capability; of one not listed, those of the last before it in its
    generation."""
    major, minor = (int(part) for part in compute_capability.split("."))
    known = [other for other in range(minor, -1, -1) if f"{major}.{other}" in TENSOR_CORE_TYPES]
    return TENSOR_CORE_TYPES[f"{major}.{known[0]}"] if known else ()


def _taken_apart(name: str) -> tuple[str, str | None, bool]:
    """A name without its suffixes, the MIG profile in it, and whether it says shared."""
    shared = re.search(r"[-_ ]shared$", name, re.IGNORECASE)
    if shared:
        name = name[: shared.start()]
    mig = re.search(r"[-_ ]mig[-_ ](\d+g\.\d+gb(?:\+\w+(?:\.\w+)?)?)$", name, re.IGNORECASE)
    return (name[: mig.start()], mig[1].lower(), bool(shared)) if mig else (name, None, bool(shared))


def _words(name: str) -> frozenset[str]:
    """The words of a name that tell devices apart, in one spelling."""
    text = re.sub(r"\b(\d+)\s*g(?:i?b)?\b", r"\1gb", name.lower().replace("_", " "))
    text = re.sub(r"\brtx(?=[a\d])", "rtx ", text)
    text = re.sub(r"\bsxm\d\b", "sxm", text)
    return frozenset(re.findall(r"[a-z0-9]+", text)) - _NO_PART_OF_A_NAME
