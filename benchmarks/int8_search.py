"""Whether a search that scores networks as INT8 computes them finds better ones than a search in floating point.

    python benchmarks/int8_search.py --workdir runs/int8_search --data bccd.tar.gz --imgsz 128

For each seed one supernet is trained, and searched twice for the same INT8 target under the same limit: with scores
under calibrated fake quantization (`search.int8_aware`), and with scores in floating point. Both winners are trained
(from the supernet's weights, or with `--from-scratch` as long as stock) and then trained for INT8 by the pipeline's own
stage, and scored on the validation split, once: in floating point, quantized after training, and after
quantization-aware training. Differences come with the 95% interval of a paired bootstrap over images, over all seeds
together of Student's t. Besides, Kendall's tau tells how the two kinds of score rank the networks that
both searches scored.

The work folder keeps everything: the command may be killed and given again at any time, and with more seeds it goes on
from those it has. `--toy` shows in a few minutes that it works.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch
from arena import EVALUATION_BATCH, TOY, Arena, Result, add_arguments, over_seeds, percent, scores_of_draws
from scipy.stats import kendalltau
from setting import machine

from yolov8_nas.config import RunConfig
from yolov8_nas.data import dataset
from yolov8_nas.device.host import HostLock
from yolov8_nas.device.profile import available_cores
from yolov8_nas.evaluation import Evaluator
from yolov8_nas.files import atomic_write, read_json, write_json
from yolov8_nas.space import Architecture
from yolov8_nas.train.quantization import fold, load_network

SCORED = {"int8": "scores under fake quantization", "float": "scores in floating point"}
TRAINED = {"best": "floating point", "ptq": "INT8 after training", "qat": "INT8 after training for it"}
GOAL = 0.005
"""mAP50-95 that INT8 may cost."""


def main() -> None:
    """Parse arguments, search twice for each seed, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/int8_search"))
    parser.add_argument("--qat-epochs", type=int, default=3)
    parser.add_argument("--from-scratch", action="store_true", help="train winners as long as stock")
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.toy:
        for name, value in {**TOY, "qat_epochs": 1}.items():
            setattr(arguments, name, value)
    logging.getLogger("ultralytics").setLevel(logging.ERROR)
    arena = Int8Arena(arguments)
    for number in range(arguments.seeds):
        arena.hold(number)
    report(arguments.workdir, arena)


class Int8Arena(Arena):
    """The data, the device probed in INT8, and the two searches of each seed."""

    aware = True

    def config(self, number: int) -> RunConfig:
        """The run configuration of a seed, for the search whose turn it is."""
        return self.configured(
            number,
            search={"candidates": 1, "int8_aware": self.aware},
            finetune={
                "candidates": 1,
                "baseline": "none",
                "qat_epochs": self.arguments.qat_epochs,
                "start": "scratch" if self.arguments.from_scratch else "supernet",
            },
            precision="int8",
        )

    def hold(self, number: int) -> None:
        """Search twice with one supernet, tune and score both winners, from wherever the seed stands."""
        folder = self.workdir / "seeds" / str(number)
        if (folder / "result.json").exists():
            return
        torch.set_num_threads(available_cores())
        base = {"data-prep": self.prepared.tar}
        base["supernet-train"] = self.stage("supernet-train", number, base).tar
        found, scores = {}, {}
        for scored in SCORED:
            self.aware = scored == "int8"
            search = self.stage("search", number, {**base, "hw-probe": self.probed.tar})
            tuned = self.stage("qat-finetune", number, {**base, "search": search.tar})
            for state in TRAINED:
                self.score(tuned.folder / "candidates" / "0" / f"{state}.pt", folder / f"{scored}-{state}.npz")
            found[scored] = read_json(search.folder / "candidates.json")[0]
            scores[scored] = history(search)
        both = sorted(scores["int8"].keys() & scores["float"].keys())
        tau = kendalltau(*([scores[scored][digest] for digest in both] for scored in SCORED)).statistic
        write_json(
            folder / "result.json",
            {
                "machine": machine(self.threads),
                "architectures": {scored: row["architecture"] for scored, row in found.items()},
                "latency_ms": {scored: row["measured"]["latency_ms"]["p50"] for scored, row in found.items()},
                "scored_by_both": len(both),
                "tau": float(tau),
            },
        )

    def score(self, checkpoint: Path, into: Path) -> None:
        """Score a network on the validation split, once."""
        if into.exists():
            return
        data = dataset.data_yaml(self.prepared.folder, into.parent / "views", validate_on="val")
        evaluator = Evaluator(data, imgsz=self.arguments.imgsz, batch=EVALUATION_BATCH, work=into.parent / "work")
        with HostLock().computing():
            evaluator.evaluate(fold(load_network(checkpoint))).save(into)


def history(search: Result) -> dict[str, float]:
    """Scores of a search by the network's digest."""
    rows = [json.loads(line) for line in (search.folder / "history.jsonl").read_text().splitlines()]
    return {Architecture.from_dict(row["architecture"]).digest: row["map50_95"] for row in rows}


def report(workdir: Path, arena: Arena) -> None:
    """Print the table, and write it with everything behind it."""
    folders = sorted((file.parent for file in workdir.glob("seeds/*/result.json")), key=lambda f: int(f.name))
    results = [read_json(folder / "result.json") for folder in folders]
    trained = {
        state: {scored: scores_of_draws([folder / f"{scored}-{state}.npz" for folder in folders]) for scored in SCORED}
        for state in TRAINED
    }
    scores = trained["qat"]
    differences = scores["int8"] - scores["float"]
    rows: list[dict[str, Any]] = []
    for folder, result, row in zip(folders, results, differences, strict=True):
        same = result["architectures"]["int8"] == result["architectures"]["float"]
        rows.append({"seed": folder.name, "same": same, **vars(over_seeds(row[None])), **result})
    total = over_seeds(differences)
    a, images = arena.arguments, arena.images
    lines = [
        f"{images['train']} training images, {images['search']} for the search, {images['val']} for validation, "
        f"{a.imgsz} px; space {a.space}, {a.limit}, INT8; {len(rows)} seeds; {results[0]['machine']}. After "
        f"quantization-aware training: mAP50-95 {percent(scores['int8'][:, 0].tolist())}% with "
        f"{SCORED['int8']}, {percent(scores['float'][:, 0].tolist())}% with {SCORED['float']}; "
        f"{100 * total.difference:+.2f} points ({100 * total.low:+.2f} to {100 * total.high:+.2f}): **{total.word}**.",
        "",
        "| seed | the same network | Kendall's tau of the scores | networks | difference, points | 95% interval "
        "| fake quantization is | latency, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['seed']} | {'yes' if row['same'] else 'no'} | {row['tau']:.2f} | {row['scored_by_both']} "
        f"| {100 * row['difference']:+.2f} | {100 * row['low']:+.2f} to {100 * row['high']:+.2f} | {row['word']} "
        f"| {row['latency_ms']['int8']:.2f} and {row['latency_ms']['float']:.2f} |"
        for row in rows
    ]
    both = {state: (found["int8"] + found["float"]) / 2 for state, found in trained.items()}
    lines += ["", "| the winners of both searches | mAP50-95, % | against floating point, points | within 0.5 |"]
    lines += ["|---|---|---|---|"]
    for state, what in TRAINED.items():
        row = f"| {what} | {percent(both[state][:, 0].tolist())} |"
        if state != "best":
            lost = over_seeds(both[state] - both["best"])
            word = "kept" if lost.low >= -GOAL else "missed" if lost.high < -GOAL else "undecided"
            row += f" {100 * lost.difference:+.2f} ({100 * lost.low:+.2f} to {100 * lost.high:+.2f}) | {word} |"
        else:
            row += " | |"
        lines.append(row)
    text = "\n".join(lines) + "\n"
    print(text)
    atomic_write(workdir / "report.md", text)
    write_json(workdir / "report.json", {"arguments": vars(a) | {"workdir": str(workdir)}, "rows": rows})


if __name__ == "__main__":
    main()
