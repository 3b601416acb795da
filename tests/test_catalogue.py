"""The catalogue of target devices: its figures agree with each other, and the names that people use lead there."""

from __future__ import annotations

from pathlib import Path

import pytest

from yolov8_nas.device import catalogue, gpu
from yolov8_nas.device.catalogue import Specification, find, identify, named, tensor_core_types
from yolov8_nas.errors import InputError
from yolov8_nas.measure import target

ENTRIES = list(catalogue.catalogue().values())

TENSOR_CORE_RATES = {
    "7.0": {"fp16": 1024},
    "7.5": {"fp16": 1024, "int8": 2048},
    "8.0": {"tf32": 1024, "fp16": 2048, "bf16": 2048, "int8": 4096},
    "8.6": {"tf32": 512, "fp16": 1024, "bf16": 1024, "int8": 2048},
    "8.7": {"int8": 4096},
    "8.9": {"tf32": 512, "fp16": 1024, "bf16": 1024, "int8": 2048},
    "9.0": {"tf32": 2048, "fp16": 4096, "bf16": 4096, "int8": 8192},
    "12.0": {"tf32": 512, "fp16": 1024, "bf16": 1024, "int8": 2048},
}
"""Dense operations per clock and multiprocessor, by the architecture whitepapers. GeForce boards do half of it where
they accumulate in FP32, the L40 for all types."""

FP32_RATES = {"7.0": 128, "7.5": 128, "8.0": 128, "9.0": 256}


def halved(entry: Specification, precision: str) -> bool:
    return entry.key == "l40" or (precision != "int8" and any("GeForce" in product for product in entry.products))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.key)
def test_throughput_is_what_multiprocessors_and_clock_come_to(entry: Specification) -> None:
    for precision, tops in entry.tops.items():
        if precision == "fp32":
            rate = FP32_RATES.get(entry.compute_capability, 256)
        else:
            assert precision in entry.tensor_core_types, f"{entry.key} has no tensor cores for {precision}"
            rate = TENSOR_CORE_RATES.get(entry.compute_capability, {}).get(precision, 0)
            if halved(entry, precision):
                rate //= 2
        if precision == "fp32" and entry.compute_capability == "9.0":
            continue  # at a higher clock than that of the tensor cores
        if rate and entry.boost_mhz:
            expected = entry.sms * rate * entry.boost_mhz * 1e6 / 1e12
            assert tops == pytest.approx(expected, rel=0.03), precision


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.key)
def test_an_entry_is_plausible_and_says_where_it_is_from(entry: Specification) -> None:
    low, high = {
        "HBM2": (900, 1600), "HBM2e": (1900, 2050), "HBM3": (3300, 4100), "HBM3e": (4500, 8000), "GDDR6": (200, 900),
        "GDDR6X": (500, 1100), "GDDR7": (400, 1800), "LPDDR5": (30, 210),
    }[entry.memory_type]  # fmt: skip
    assert low <= entry.bandwidth_gbs <= high
    assert entry.source and entry.tensor_core_types
    assert entry.model in entry.words
    assert entry.products or "jetson" in entry.words


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.key)
def test_every_name_of_an_entry_leads_to_it(entry: Specification) -> None:
    assert named(entry.key).specifications == (entry,)
    for product, label in zip(entry.products, entry.labels, strict=True):
        assert named(product).specifications == named(label).specifications == (entry,)
        assert identify(product, entry.memory_gb * 1.07) == entry
        assert " " not in label


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("NVIDIA_A100", ["a100-pcie-40gb", "a100-pcie-80gb", "a100-sxm4-40gb", "a100-sxm4-80gb"]),
        ("a100-80GB", ["a100-pcie-80gb", "a100-sxm4-80gb"]),
        ("A100 80 GB PCIe", ["a100-pcie-80gb"]),
        ("NVIDIA_T4", ["t4"]),
        ("Tesla-T4", ["t4"]),
        ("NVIDIA_RTX4090", ["rtx4090"]),
        ("GeForce RTX 3090", ["rtx3090"]),
        ("H100-SXM", ["h100-sxm5"]),
        ("h100", ["h100-pcie", "h100-sxm5", "h100-nvl"]),
        ("V100 SXM2 32GB", ["v100-sxm2-32gb"]),
        ("NVIDIA Jetson Orin Nano Developer Kit", ["jetson-orin-nano-4gb", "jetson-orin-nano-8gb"]),
        ("jetson_agx_orin", ["jetson-agx-orin-32gb", "jetson-agx-orin-64gb"]),
        ("L4", ["l4"]),
        ("l40s", ["l40s"]),
    ],
)
def test_names_that_people_use(name: str, keys: list[str]) -> None:
    assert [entry.key for entry in named(name).specifications] == keys


@pytest.mark.parametrize("name", ["RTX 4070 Ti", "A1000", "80GB", "PCIe", "NVIDIA", "a100-160gb", ""])
def test_another_chip_is_not_taken_for_one_that_is_known(name: str) -> None:
    assert find(name) is None


@pytest.mark.parametrize(("name", "near"), [("NVIDIA_T5", "t4"), ("l40x", "l40s"), ("jetsonorinnano", "jetson-orin")])
def test_unknown_names_are_answered_with_similar_ones(name: str, near: str) -> None:
    with pytest.raises(InputError, match=f"{name!r} is unknown; did you mean .*{near}"):
        named(name)


def test_slices_and_shared_gpus_are_told_from_whole_ones() -> None:
    whole, cut, both = (named(f"A100-SXM4-40GB{end}") for end in ("", "-MIG-1g.5gb", "-MIG-1g.5gb-SHARED"))
    assert (whole.mig, whole.shared) == (None, False)
    assert (cut.mig, cut.shared) == ("1g.5gb", False)
    assert (both.mig, both.shared) == ("1g.5gb", True)
    assert named("Tesla-T4-SHARED").shared
    assert named("NVIDIA A100-SXM4-40GB MIG 2g.10gb+me").mig == "2g.10gb+me"


def test_memory_tells_boards_of_one_name_apart() -> None:
    name = "NVIDIA Jetson AGX Orin Developer Kit"
    found = [identify(name, memory) for memory in (31.9, 64.3)]
    assert [entry and entry.key for entry in found] == ["jetson-agx-orin-32gb", "jetson-agx-orin-64gb"]
    assert identify(name) is None and identify(name, 8.0) is None


def test_tensor_cores_by_compute_capability() -> None:
    assert "int8" not in tensor_core_types("7.0")
    assert {"tf32", "bf16"}.isdisjoint(tensor_core_types("7.5"))
    assert "fp8" not in tensor_core_types("8.6") and "fp8" in tensor_core_types("8.9")
    assert tensor_core_types("10.3") == tensor_core_types("10.0")
    assert tensor_core_types("6.1") == ()


# What is here --------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The GPUs of this machine, to be filled."""
    names: list[str] = []
    monkeypatch.setattr(gpu, "gpu_names", lambda: names)
    monkeypatch.delenv(gpu.LABEL_VARIABLE, raising=False)
    return names


@pytest.mark.parametrize(
    ("asked", "present"),
    [
        ("NVIDIA_T4", "Tesla T4"),
        ("a100", "NVIDIA A100-SXM4-80GB"),
        ("NVIDIA-A100-SXM4-80GB", "NVIDIA A100-SXM4-80GB"),
        ("NVIDIA-A100-SXM4-40GB-MIG-1g.5gb", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"),
        ("nvidia_geforce_rtx_2080_ti", "NVIDIA GeForce RTX 2080 Ti"),
        ("jetson-orin-nano", "NVIDIA Jetson Orin Nano Developer Kit"),
    ],
)
def test_a_gpu_that_is_here_is_found_by_its_names(here: list[str], asked: str, present: str) -> None:
    here += ["NVIDIA L4", present]
    assert target.find_gpu(asked) == present


@pytest.mark.parametrize(
    ("asked", "present", "words"),
    [
        ("T4", [], "this machine has none \\(it has no NVIDIA GPU\\); run there"),
        ("a100-80gb", ["NVIDIA A100-SXM4-40GB"], "has none \\(its GPU is NVIDIA A100-SXM4-40GB\\)"),
        ("rtx-2080-super", ["NVIDIA L4"], "is unknown"),
        ("a100", ["NVIDIA A100-SXM4-40GB MIG 1g.5gb"], "MIG 1g.5gb, which is not the same part"),
        ("A100-SXM4-40GB-MIG-1g.5gb", ["NVIDIA A100-SXM4-40GB"], "not the same part"),
        ("Tesla-T4-SHARED", ["Tesla T4"], "several pods, so its latency depends on what they do"),
    ],
)
def test_another_device_than_the_one_named_is_refused(
    here: list[str], asked: str, present: list[str], words: str
) -> None:
    here += present
    with pytest.raises(InputError, match=words):
        target.resolve(asked)


def test_a_gpu_that_the_scheduler_shares_is_refused(here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    here.append("Tesla T4")
    monkeypatch.setenv(gpu.LABEL_VARIABLE, "Tesla-T4-SHARED")
    with pytest.raises(InputError, match="product label is Tesla-T4-SHARED"):
        target.find_gpu("t4")


def test_the_catalogue_is_shipped_with_the_package() -> None:
    patterns = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '"device/*.yaml"' in patterns and catalogue.FILE.is_file()
