"""Which shapes use a trained checkpoint best: stock made faster in ways that people would try by hand, at one latency.

    python benchmarks/shapes.py --weights yolov8s.pt --data bccd.tar.gz --imgsz 160 --limit "latency<=60%stock"

Every family below has one factor on those widths that it leaves open. The widest network of a family that the latency
model predicts to keep the limit is sliced from the weights and trained like an arm of `search_quality.py`, once for
each seed, and scored on the validation split. `--teacher` trains stock first and lets every network learn from it.

    uniform             one factor on all widths
    p3 half             the neck's P3, which the whole head reads, at half its width
    neck half           the whole neck at half its width
    backbone half       the whole backbone at half its width
    p5 quarter          both P5 levels at a quarter
    neck shallow        no bottlenecks in the neck, and its P3 at half
    backbone shallow    one bottleneck less in every block of the backbone, and P3 of the neck at half
    expansion 0.25      half as many hidden channels in every block
    light head          a depthwise-separable class branch
    light head and neck the same, and the neck's factor is three quarters of the backbone's

The work folder is one of `search_quality.py` and keeps everything: the command may be killed and given again, with more
seeds or families.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
import search_quality
import torch
from search_quality import BATCH, Study

from yolov8_nas.data.dataset import data_yaml
from yolov8_nas.evaluation import Evaluation, Evaluator
from yolov8_nas.measure.latency_model import LatencyModel
from yolov8_nas.runner.results import LatencyFit
from yolov8_nas.space import BLOCKS, CONVS, Architecture, Head, is_backbone
from yolov8_nas.space.limits import Constraint
from yolov8_nas.train.quantization import load_network

FACTORS: Final = np.linspace(0.3, 1.0, 141)
"""Factors that are tried on the widths that a family leaves open."""

LIGHT: Final = Head(classes="dwsep3")

NECK: Final = ("neck_down_p4", "neck_down_p5", *(name for name in BLOCKS if not is_backbone(name)))
P3: Final = ("neck_down_p4", "topdown_p3")
P5: Final = ("down_p5", "backbone_p5", "bottomup_p5")
BACKBONE: Final = tuple(name for name in (*CONVS, *BLOCKS) if name not in NECK)

Family = Callable[[Architecture, float], Architecture]
"""A network, from stock and the factor on the widths that are left open."""


def main() -> None:
    """Parse arguments, bring every family to the limit, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    search_quality.add_arguments(parser)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--teacher", action="store_true", help="let every network learn from trained stock")
    arguments = search_quality.parsed(parser)
    arguments.distill = arguments.teacher
    logging.getLogger("ultralytics").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    study = Study(arguments)
    model = LatencyModel.of(LatencyFit.read(study.probed))
    limit = Constraint.parse(arguments.limit)
    stock = study.space.stock
    evaluator = Evaluator(
        data_yaml(study.prepared, study.folder("views"), validate_on="val"),
        imgsz=arguments.imgsz,
        batch=BATCH,
        work=study.folder("evaluation"),
        device="cpu",
    )
    learning = "taught" if arguments.teacher else "plain"
    chosen = {name: at_the_limit(FAMILIES[name], stock, model, limit) for name in arguments.families}
    for seed in range(search_quality.FRESH, search_quality.FRESH + arguments.seeds):
        for name, network in {"stock": stock, **chosen}.items():
            folder = study.folder("shapes", "plain" if name == "stock" else learning, network.digest, str(seed))
            teacher = None if name == "stock" else study.teacher
            trained = study.trained(
                network, folder, epochs=arguments.epochs, seed=seed, start_seed=seed, teacher=teacher
            )
            if not (folder / "val.npz").exists():
                evaluator.evaluate(load_network(Path(trained["file"]))).save(folder / "val.npz")
    (stock_ms,), _ = model.predict([stock])
    for name, network in {"stock": stock, **chosen}.items():
        base = study.folder("shapes", "plain" if name == "stock" else learning, network.digest)
        scores = [100 * Evaluation.load(file).map50_95 for file in sorted(base.glob("*/val.npz"))]
        share, macs = model.predict([network])[0][0] / stock_ms, study.macs(network) / study.macs(stock)
        each = ", ".join(f"{score:.1f}" for score in scores)
        print(f"{name:20} {share:.3f} of stock's time  {macs:.3f} of its work  mean {np.mean(scores):.1f} ({each})")


def at_the_limit(family: Family, stock: Architecture, model: LatencyModel, limit: Constraint) -> Architecture:
    """The network of a family that comes closest to a limit relative to stock's latency, as predicted, and keeps it.

    Raises:
        SystemExit: The limit is not a share of stock's latency, or no factor keeps it.
    """
    if limit.metric != "latency" or not limit.relative:
        raise SystemExit(f"--limit {limit}: give a share of stock's latency, such as latency<=60%stock")
    networks = list(dict.fromkeys(family(stock, float(factor)) for factor in FACTORS))
    latency_ms, _ = model.predict([stock, *networks])
    share = latency_ms[1:] / latency_ms[0]
    within = np.flatnonzero(share <= limit.limit)
    if not within.size:
        raise SystemExit(
            f"no factor brings this family to {limit}; its fastest takes {share.min():.2f} of stock's time"
        )
    return networks[int(within[share[within].argmax()])]


def widths(
    stock: Architecture, factor: float, own: Mapping[str, float] = MappingProxyType({}), *, head: Head | None = None
) -> Architecture:
    """Stock with one factor on all widths but those that have their own; channels are multiples of 8.

    SPPF goes with the P5 of the backbone.
    """

    def channels(name: str, width: int) -> int:
        return max(8, 8 * round(width * own.get(name, factor) / 8))

    return replace(
        stock,
        convs=tuple(channels(name, width) for name, width in zip(CONVS, stock.convs, strict=True)),
        blocks=tuple(
            replace(block, width=channels(name, block.width)) for name, block in zip(BLOCKS, stock.blocks, strict=True)
        ),
        sppf_width=channels("backbone_p5", stock.sppf_width),
        head=head or stock.head,
    )


def blocks(network: Architecture, depth: Mapping[str, int], expansion: float | None = None) -> Architecture:
    """A network with other depths of some blocks, and another expansion of all."""
    return replace(
        network,
        blocks=tuple(
            replace(block, depth=depth.get(name, block.depth), expansion=expansion or block.expansion)
            for name, block in zip(BLOCKS, network.blocks, strict=True)
        ),
    )


def shallower(stock: Architecture) -> dict[str, int]:
    """The backbone's depths with one bottleneck less in each block."""
    return {name: stock.block(name).depth - 1 for name in BLOCKS if is_backbone(name)}


HALF: Final = {"p3": dict.fromkeys(P3, 0.5), "neck": dict.fromkeys(NECK, 0.5), "backbone": dict.fromkeys(BACKBONE, 0.5)}

FAMILIES: Final[Mapping[str, Family]] = {
    "uniform": widths,
    "p3 half": lambda stock, factor: widths(stock, factor, HALF["p3"]),
    "neck half": lambda stock, factor: widths(stock, factor, HALF["neck"]),
    "backbone half": lambda stock, factor: widths(stock, factor, HALF["backbone"]),
    "p5 quarter": lambda stock, factor: widths(stock, factor, dict.fromkeys(P5, 0.25)),
    "neck shallow": lambda stock, factor: blocks(
        widths(stock, factor, HALF["p3"]), {name: 0 for name in BLOCKS if not is_backbone(name)}
    ),
    "backbone shallow": lambda stock, factor: blocks(widths(stock, factor, HALF["p3"]), shallower(stock)),
    "expansion 0.25": lambda stock, factor: blocks(widths(stock, factor), {}, 0.25),
    "light head": lambda stock, factor: widths(stock, factor, head=LIGHT),
    "light head and neck": lambda stock, factor: widths(stock, factor, dict.fromkeys(NECK, 0.75 * factor), head=LIGHT),
}

if __name__ == "__main__":
    main()
