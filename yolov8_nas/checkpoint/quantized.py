"""Fake quantization of a checkpoint, restored from what a file says of it.

ModelOpt sets whatever attributes a stored state names, and allocates whatever shapes it states. So it gets a state that
is written here: the recipe is this package's, and of a file's only the quantizers that are on, their axes, and the
ranges that they were calibrated to are taken over.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Final

import torch
from torch import Tensor, nn

from yolov8_nas.checkpoint.archive import Refused, shown

_MOST: Final = 100_000
_AXES: Final = (None, 0)
_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    "_num_bits": (8,),
    "_disabled": (True, False),
    "_unsigned": (True, False),
    "_narrow_range": (True, False),
    "_if_quant": (True, False),
    "_if_calib": (False,),
    "_fake_quant": (True,),
    "_dynamic": (False,),
    "_learn_amax": (False,),
    "_axis": _AXES,
}
"""What a quantizer may be set to."""


def recipe() -> dict[str, Any]:
    """INT8 for weights and activations, and behind BatchNorm, where it is folded at export."""
    import modelopt.torch.quantization as mtq

    config: dict[str, Any] = deepcopy(mtq.INT8_DEFAULT_CFG)
    config["quant_cfg"].append(
        {"quantizer_name": "*output_quantizer", "parent_class": "nn.BatchNorm2d", "cfg": {"num_bits": 8, "axis": None}}
    )
    return config


def restore(network: nn.Module, found: Any) -> None:
    """Give a network the fake quantization that a file states.

    Args:
        network: Changed in place.
        found: `modelopt` of a checkpoint.

    Raises:
        Refused: It states something else than 8-bit quantization with calibrated ranges.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import TensorQuantizer

    ranges = _ranges(found)
    settings = _settings(found)
    with torch.no_grad():
        mtq.quantize(network, recipe(), None)
    known = {name: module for name, module in network.named_modules() if isinstance(module, TensorQuantizer)}
    if set(settings) != set(known):
        other = sorted(set(settings) ^ set(known))[0]
        raise Refused(f"its quantizers are not those of its network: {shown(other)}")
    for name, module in known.items():
        for key, value in settings[name].items():
            setattr(module, key, value)
        amax = ranges.pop(f"{name}._amax", None)
        if hasattr(module, "_amax"):
            delattr(module, "_amax")
        if amax is not None:
            module.register_buffer("_amax", amax)
    if ranges:
        raise Refused(f"it has ranges of quantizers that its network has not: {shown(next(iter(ranges)))}")


def _ranges(found: Any) -> dict[str, Tensor]:
    ranges = found.get("ranges") if isinstance(found, dict) else None
    if not isinstance(ranges, dict) or len(ranges) > _MOST:
        raise Refused("its quantization has no ranges")
    result: dict[str, Tensor] = {}
    for name, tensor in ranges.items():
        if type(name) is not str or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise Refused("a range of its quantization is no tensor")
        if not name.endswith("._amax") or tensor.ndim > 4 or not bool((tensor.isfinite() & (tensor >= 0)).all()):
            raise Refused(f"the range {shown(name)} of its quantization is none")
        result[name] = tensor.detach().float().clone()
    return result


def _settings(found: Any) -> dict[str, dict[str, Any]]:
    """Of each quantizer what it is set to, as the last step of its conversion left it."""
    inner = found.get("modelopt")
    modes = inner.get("modelopt_state_dict") if isinstance(inner, dict) else None
    if not isinstance(modes, list) or not 1 <= len(modes) <= 8:
        raise Refused("its quantization has no state")
    quantizers: Any = None
    for mode in modes:
        if not isinstance(mode, tuple | list) or len(mode) != 2 or not isinstance(mode[1], dict):
            raise Refused("its quantization has no state")
        if mode[0] not in ("quantize", "max_calibrate"):
            raise Refused(f"its network is converted by {shown(str(mode[0]))}, and only 8-bit quantization is read")
        metadata = mode[1].get("metadata")
        quantizers = metadata.get("quantizer_state") if isinstance(metadata, dict) else None
    if not isinstance(quantizers, dict) or len(quantizers) > _MOST:
        raise Refused("its quantization has no quantizers")
    result: dict[str, dict[str, Any]] = {}
    for name, state in quantizers.items():
        if type(name) is not str or not isinstance(state, dict):
            raise Refused("a quantizer that is none")
        result[name] = {}
        for key, values in _VALUES.items():
            if key not in state:
                continue
            value = state[key]
            if not any(type(value) is type(one) and value == one for one in values):
                raise Refused(f"a quantizer with {key} = {shown(repr(value)[:40])}")
            result[name][key] = value
    return result
