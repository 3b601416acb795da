"""Hardware rules: what they take out of a space, why, and what a latency table says of it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from yolov8_nas.config import RulesConfig, RunConfig
from yolov8_nas.device.catalogue import catalogue
from yolov8_nas.device.profile import Profile, cpu_profile
from yolov8_nas.errors import InputError
from yolov8_nas.search.rules import RULES, Applied, Device, consider, narrowed, with_evidence
from yolov8_nas.space import BLOCKS, Architecture, SearchSpace
from yolov8_nas.space.cost import cost

N = SearchSpace.load("yolov8n-mixed")


def specified(key: str) -> Device:
    """A device as the catalogue has it."""
    entry = catalogue()[key]
    return Device(entry.key, "gpu", entry.tensor_core_types, entry.bandwidth_gbs, entry.l2_mb)


T4, V100, L4 = map(specified, ("t4", "v100-pcie-16gb", "l4"))


def switched(**rules: bool) -> dict[str, bool]:
    return RulesConfig(**rules).model_dump()


def applied(device: Device, precision: str, imgsz: int = 640, batch: int = 1, **rules: bool) -> dict[str, Applied]:
    found = consider(N, device, precision, imgsz=imgsz, batch=batch, switched=switched(**rules))
    return {rule.rule: rule for rule in found}


def test_int8_tensor_cores_want_multiples_of_32_channels() -> None:
    rules = applied(T4, "int8")
    space = narrowed(N, list(rules.values()))
    options = {dimension.name: dimension.options for dimension in space.dimensions}
    assert options["down_p3"] == (32, 64) and options["backbone_p3.width"] == (32, 64)
    assert options["stem"] == (16,)  # stock's own
    assert options["backbone_p3.expansion"] == (0.5,) and options["backbone_p4.expansion"] == (0.25, 0.375, 0.5)
    assert space.stock in space and space.size < N.size
    assert space.name == "yolov8n-mixed (narrowed by hardware rules)"
    assert "takes out 61 options" in str(rules["tensor_core_channels"])
    for network in (space.sample(np.random.default_rng(seed)) for seed in range(20)):
        assert network in N
        for name in BLOCKS:
            assert network.block(name).width % 32 == 0 or network.block(name).width == N.stock.block(name).width


def test_fp16_finds_every_width_of_a_space_right() -> None:
    assert narrowed(N, list(applied(T4, "fp16").values())) == N


def test_tensor_cores_are_not_counted_on_where_the_chip_has_none() -> None:
    rules = applied(V100, "int8")
    assert "no tensor cores for INT8, only for FP16" in rules["tensor_core_types"].reason
    assert narrowed(N, list(rules.values())) == N
    assumed = applied(V100, "int8", tensor_core_types=False)
    assert not assumed["tensor_core_types"].on and assumed["tensor_core_channels"].removed
    assert "no tensor cores for TF32" in applied(T4, "fp32")["tensor_core_types"].reason
    assert applied(L4, "fp32")["tensor_core_types"].reason == "l4 has tensor cores for TF32"
    unknown = applied(Device("new", "gpu"), "int8")
    assert unknown["tensor_core_types"].reason == "new is not known to have tensor cores"
    assert not unknown["tensor_core_channels"].removed


def test_attention_goes_where_its_scores_go_through_slow_memory() -> None:
    def removed(device: Device, **how: Any) -> Any:
        return applied(device, "fp16", **how)["large_kernels_not_attention"].removed

    assert removed(T4, imgsz=1280, batch=4) == {"attention": (1,)}
    assert removed(T4) == {}  # they stay in its L2
    assert removed(L4, imgsz=1280) == {}  # and so with larger images in a larger one
    assert removed(V100, imgsz=1280, batch=4) == {}
    unknown = applied(Device("new", "gpu", ("fp16",)), "fp16")["large_kernels_not_attention"]
    assert "measurement has to decide" in unknown.reason and not unknown.removed


def test_a_rule_that_is_off_tells_what_it_would_do_and_does_nothing() -> None:
    rules = applied(T4, "int8", tensor_core_channels=False)
    assert narrowed(N, list(rules.values())) == N
    assert str(rules["tensor_core_channels"]).startswith("tensor_core_channels (switched off): ")
    assert "would take out 61 options" in str(rules["tensor_core_channels"])


def test_each_rule_has_a_switch_in_the_configuration() -> None:
    def parsed(**rules: Any) -> RunConfig:
        content = {"search": {"rules": rules}, "targets": [{"constraints": ["latency<=5ms"]}]}
        return RunConfig.parse(content, "run.yaml")

    assert parsed().search.rules.model_dump() == dict.fromkeys(RULES, True)
    assert not parsed(tensor_core_channels=False).search.rules.tensor_core_channels
    names = ", ".join(RULES)
    with pytest.raises(InputError, match=rf"run.yaml: unknown key search.rules.tensor_cores \(known: {names}\)"):
        parsed(tensor_cores=False)


@pytest.mark.parametrize("scale", ["tiny", "yolov8n", "yolov8s", "yolov8m", "yolov8l"])
@pytest.mark.parametrize("key", ["t4", "a100-sxm4-40gb", "jetson-agx-orin-64gb"])
def test_stock_and_some_choice_are_left_in_every_space(scale: str, key: str) -> None:
    space = SearchSpace.load(scale)
    for precision in ("fp32", "fp16", "int8"):
        rules = consider(space, specified(key), precision, imgsz=1280, batch=16, switched=switched())
        assert [rule.rule for rule in rules] == list(RULES)
        left = narrowed(space, rules)
        assert left.stock in left and left.size > 1000


def test_cpus_have_no_rules() -> None:
    device = Device.of_profile(cpu_profile("cpu-1t", 1))
    assert consider(N, device, "int8", imgsz=640, batch=1, switched=switched()) == []


def test_a_device_is_read_from_the_probes_profile() -> None:
    gpu = {"compute_capability": "7.5", "memory_bus_bits": 256, "memory_clock_mhz": 5001, "mig": None}
    profile = Profile("tesla-t4", "tesla-t4", "gpu", "Tesla T4", 4, 1, (), {"L2": 4096}, 15.0, {}, "Linux", gpu)
    device = Device.of_profile(Profile.of(json.loads(json.dumps(profile.to_dict())), "profile.json"))
    assert device == Device("Tesla T4", "gpu", ("fp16", "int8"), pytest.approx(320.064), 4.0)


@pytest.mark.parametrize(("extra", "verdict"), [(0.02, "supports"), (0.0, "undecided"), (-0.02, "contradicts")])
def test_a_table_supports_or_contradicts_a_rule(extra: float, verdict: str) -> None:
    rng = np.random.default_rng(1)
    rule = applied(T4, "int8")["tensor_core_channels"]
    measured: dict[Architecture, float] = {}
    for network in [N.stock, *(N.sample(rng) for _ in range(80))]:
        chosen = {d.name: d.options[g] for d, g in zip(N.dimensions, N.encode(network), strict=True)}
        count = sum(chosen[name] in options for name, options in rule.removed.items())
        noise = np.exp(0.02 * rng.normal())
        measured[network] = 1e-9 * cost(network, 3, 320).macs ** 0.9 * (1 + extra) ** count * noise
    (told,) = with_evidence([rule], N, measured, num_classes=3, imgsz=320)
    assert told.evidence is not None
    assert told.evidence.networks == 81
    assert told.evidence.verdict == verdict
    low, high = told.evidence.interval
    assert low <= extra <= high
    row = told.to_result()
    assert row.evidence and row.evidence.verdict == verdict
    assert row.says == RULES["tensor_core_channels"]


def test_a_table_that_cannot_tell_is_no_evidence() -> None:
    rule = applied(T4, "int8")["tensor_core_channels"]
    assert with_evidence([rule], N, {N.stock: 1.0}, num_classes=3, imgsz=320)[0].evidence is None
