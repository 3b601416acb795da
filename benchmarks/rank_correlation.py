"""Whether the supernet ranks networks as training each of them alone does.

    python benchmarks/rank_correlation.py --workdir runs/rank_correlation

Networks of the space, spread evenly over the costs that random ones have, are trained alone from scratch for a fixed
number of epochs, and scored on a validation set that training never saw. The same networks are scored on the same
images with the weights of the trained supernet. Some are trained again with another seed: how well two trainings agree
with each other is the ceiling of what any score can reach. MAC count is ranked beside the supernet, as the score that
costs nothing, and so is the sum of both, each in its standard deviations. Unless it is asked to train from scratch, a
run goes on from the supernet's weights. So the score is compared with that, too, where it was made.

Every training has a file of its own in the work folder, and the command may be killed and given again at any time. It
carries out the stages in turn, or one of them:

    --stage train       trains the networks alone
    --stage supernet    trains a supernet and scores the networks with it; `--label` tells several recipes apart
    --stage tune        fine-tunes the networks from that supernet's weights, as what a search finds ships
    --stage latency     measures the networks' latency, on a machine that does nothing else; bands are of MACs without
    --stage report      prints the tables; writes report.md, report.json and scatter.html

Kendall's tau-b and Spearman's rho come with the percentile interval of a bootstrap over networks.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import plotly.graph_objects as go
import torch
from numpy.typing import NDArray
from scipy.stats import zscore
from setting import inspection_pictures, machine
from ultralytics.nn.tasks import DetectionModel

from yolov8_nas.checkpoint.archive import read_plain
from yolov8_nas.data import dataset
from yolov8_nas.data.check import checked
from yolov8_nas.device.host import HostLock
from yolov8_nas.errors import InputError
from yolov8_nas.evaluation import Evaluator
from yolov8_nas.export.onnx import export_onnx
from yolov8_nas.files import atomic_write, read_json, write_json
from yolov8_nas.measure.benchmark import measure
from yolov8_nas.measure.protocol import PROBE
from yolov8_nas.runner.progress import Progress
from yolov8_nas.search.objective import Scorer
from yolov8_nas.space import Architecture, SearchSpace
from yolov8_nas.space.cost import cost
from yolov8_nas.supernet import training
from yolov8_nas.supernet.batchnorm import calibration_batches, recalibrate
from yolov8_nas.supernet.derive import build, derive
from yolov8_nas.supernet.supernet import Supernet
from yolov8_nas.supernet.training import CALIBRATION_IMAGES
from yolov8_nas.train import finetune

Floats: TypeAlias = NDArray[np.float64]

EVALUATION_BATCH = 16
RESAMPLES = 2000
BAND = 10
"""Networks in a band of similar cost, at least."""


@dataclass(frozen=True)
class Setting:
    """What all records of a work folder have in common.

    Attributes:
        space: Name of the search space.
        imgsz: Side of the square network input in pixels.
        train: Training pictures, the search split included.
        val: Validation pictures.
        networks: Networks trained alone.
        epochs: Epochs of each training alone.
        batch: Pictures per step of it.
        lr: Peak learning rate of it.
    """

    space: str
    imgsz: int
    train: int
    val: int
    networks: int
    epochs: int
    batch: int
    lr: float


@dataclass(frozen=True)
class Correlation:
    """How two rankings of the same networks agree.

    Attributes:
        networks: How many they are.
        tau: Kendall's tau-b.
        tau_interval: Its 95% interval.
        rho: Spearman's rho.
        rho_interval: Its 95% interval.
    """

    networks: int
    tau: float
    tau_interval: tuple[float, float]
    rho: float
    rho_interval: tuple[float, float]


Rows: TypeAlias = list[tuple[str, str, Correlation]]
"""What networks are ranked by, which networks, and how well that agrees with their trainings alone."""


def main() -> None:
    """Parse arguments, carry out the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/rank_correlation"))
    parser.add_argument("--stage", choices=["all", "train", "supernet", "tune", "latency", "report"], default="all")
    parser.add_argument("--space", default="tiny")
    parser.add_argument("--imgsz", type=int, default=96)
    parser.add_argument("--train", type=int, default=500, help="training pictures, a fifth of them the search split")
    parser.add_argument("--val", type=int, default=1000, help="validation pictures")
    parser.add_argument("--networks", type=int, default=30, help="networks trained alone")
    parser.add_argument("--epochs", type=int, default=32, help="epochs of each training alone")
    parser.add_argument("--batch", type=int, default=8, help="pictures per step of each training alone")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of each training alone")
    parser.add_argument("--repeats", type=int, default=10, help="networks trained again with each further seed")
    parser.add_argument("--seeds", type=int, default=2, help="seeds, the first one included")
    parser.add_argument("--threads", type=int, default=1)
    supernet = parser.add_argument_group("the supernet")
    supernet.add_argument("--label", default="default", help="name of this supernet in the work folder")
    supernet.add_argument("--supernet-epochs", type=int, default=40)
    supernet.add_argument("--supernet-batch", type=int, default=8)
    supernet.add_argument("--supernet-lr", type=float, default=2e-3)
    supernet.add_argument("--random-networks", type=int, default=1)
    supernet.add_argument("--largest-first", type=float, default=training.Recipe.largest_first)
    supernet.add_argument("--bn-images", type=int, default=256)
    supernet.add_argument("--tune-epochs", type=int, default=16, help="epochs of fine-tuning from its weights")
    arguments = parser.parse_args()
    logging.getLogger("ultralytics").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)

    setting = Setting(**{name: getattr(arguments, name) for name in Setting.__dataclass_fields__})
    study = Study(arguments.workdir, setting)
    recipe = training.Recipe(
        imgsz=setting.imgsz,
        epochs=arguments.supernet_epochs,
        batch=arguments.supernet_batch,
        lr=arguments.supernet_lr,
        random_networks=arguments.random_networks,
        largest_first=arguments.largest_first,
        seed=0,
    )
    # The first seed first, then the supernet: from then on there is something to report.
    with HostLock().computing():
        if arguments.stage in ("all", "train"):
            study.train_alone(0, study.networks)
        if arguments.stage in ("all", "supernet"):
            study.score_with_supernet(arguments.label, recipe, arguments.bn_images)
        if arguments.stage in ("all", "tune"):
            study.tune(arguments.label, arguments.tune_epochs)
        if arguments.stage in ("all", "train"):
            again = evenly(study.networks, arguments.repeats)
            for seed in range(1, arguments.seeds):
                study.train_alone(seed, again)
    if arguments.stage == "latency":
        study.measure_latency(arguments.threads)
    if arguments.stage in ("all", "report"):
        study.report()


class Study:
    """The work folder and what is in it.

    Args:
        workdir: The folder; it is made, with the pictures, where it is missing.
        setting: What its records have in common.

    Raises:
        InputError: The folder holds records of another setting.
    """

    def __init__(self, workdir: Path, setting: Setting) -> None:
        self.workdir, self.setting = workdir, setting
        told = workdir / "setting.json"
        if told.exists() and read_json(told) != asdict(setting):
            raise InputError(f"{workdir}: made with {read_json(told)}, asked for {asdict(setting)}; name another one")
        self.data = workdir / "data"
        if not (self.data / "dataset.json").exists():
            pictures = inspection_pictures(workdir / "pictures", train=setting.train, val=setting.val)
            with checked(pictures) as source:
                dataset.write(source, self.data)
        write_json(told, asdict(setting))
        self.classes = dataset.load(self.data).classes
        self.space = SearchSpace.load(setting.space)
        self.networks = spread(self.space, setting.networks, self.gmacs, np.random.default_rng(0))

    def gmacs(self, network: Architecture) -> float:
        """Multiply-accumulates for one image, in thousand millions."""
        return cost(network, len(self.classes), self.setting.imgsz).macs / 1e9

    def train_alone(self, seed: int, networks: Sequence[Architecture]) -> None:
        """Train networks from scratch, those excepted that have a record already."""
        missing = [network for network in networks if not self.record(network, seed).exists()]
        # Not from small to large: were this cut short, what is there should still be spread over all costs.
        order = np.random.default_rng(0).permutation(len(missing))
        if not missing:
            return
        validation = self.evaluator()
        for number, network in enumerate((missing[i] for i in order), 1):
            torch.manual_seed(seed)
            model = build(network, len(self.classes), self.classes)
            row = self.train_one(network, model, self.setting.epochs, seed, self.record(network, seed), validation)
            print(
                f"seed {seed}, network {number} of {len(missing)}: {self.gmacs(network):.3f} GMACs, "
                f"mAP50-95 {row['map50_95']:.4f}, {row['seconds']:.0f} s",
                flush=True,
            )

    def train_one(
        self, network: Architecture, model: DetectionModel, epochs: int, seed: int, record: Path, validation: Evaluator
    ) -> dict[str, Any]:
        """Train one network and write its record.

        The weights are the average of the last epoch. The learning rate has come down by then, so they are as good as
        those of any epoch, and choosing the best on a hundred images would add nothing but chance.
        """
        start = time.monotonic()
        recipe = finetune.Recipe(
            epochs=epochs, batch=self.setting.batch, lr=self.setting.lr, imgsz=self.setting.imgsz, seed=seed
        )
        work = self.workdir / "partial" / f"{record.parent.name}-{record.stem}"
        searched = dataset.data_yaml(self.data, self.workdir / "views", validate_on="search")
        trained = finetune.train(model, searched, recipe, work=work)
        last = read_plain(work / finetune.CHECKPOINT)["ema"]
        model.load_state_dict(last)
        score = validation.evaluate(model.eval().fuse(verbose=False))
        row = {
            "architecture": network.to_dict(),
            "genes": list(self.space.encode(network)),
            "seed": seed,
            "map50_95": score.map50_95,
            "map50": score.map50,
            "per_class": score.per_class,
            "recipe": asdict(recipe),
            "curve": [point["map50_95"] for point in trained.curves],
            "seconds": round(time.monotonic() - start, 1),
            "machine": machine(torch.get_num_threads()),
        }
        write_json(record, row)
        shutil.rmtree(work)
        return row

    def tune(self, label: str, epochs: int) -> None:
        """Fine-tune the networks from a supernet's weights, those excepted that have a record already.

        Raises:
            InputError: There is no such supernet yet.
        """
        folder = self.workdir / "supernets" / label
        if not (folder / "supernet.json").exists():
            raise InputError(f"{folder}: no trained supernet; run --stage supernet --label {label} first")
        supernet, validation = Supernet.load(folder), self.evaluator()
        searched = dataset.data_yaml(self.data, self.workdir / "views", validate_on="search")
        images = calibration_batches(searched, self.setting.imgsz, CALIBRATION_IMAGES, EVALUATION_BATCH, 0)
        for number in np.random.default_rng(0).permutation(len(self.networks)):
            network = self.networks[number]
            record = folder / "tuned" / f"{network.digest}.json"
            if record.exists():
                continue
            torch.manual_seed(0)
            model = derive(supernet, network)
            recalibrate(model, images)
            row = self.train_one(network, model, epochs, 0, record, validation)
            print(
                f"supernet {label}, tuned: {self.gmacs(network):.3f} GMACs, mAP50-95 {row['map50_95']:.4f}, "
                f"{row['seconds']:.0f} s",
                flush=True,
            )

    def score_with_supernet(self, label: str, recipe: training.Recipe, bn_images: int) -> None:
        """Train a supernet on the same images, and score the networks with its weights on the same validation set.

        Raises:
            InputError: The label stands for another recipe.
        """
        folder = self.workdir / "supernets" / label
        described = {"recipe": asdict(recipe), "bn_images": bn_images}
        told = folder / "recipe.json"
        if told.exists() and read_json(told) != described:
            raise InputError(f"{folder}: made with {read_json(told)}, asked for {described}; give another --label")
        write_json(told, described)
        if not (folder / "supernet.json").exists():
            searched = dataset.data_yaml(self.data, self.workdir / "views", validate_on="search")
            torch.manual_seed(recipe.seed)
            supernet = Supernet(self.space, len(self.classes), self.classes)
            average, curves = training.train(supernet, searched, recipe, folder / "partial", Progress("supernet"))
            write_json(folder / "curves.json", curves)
            average.save(folder, {"imgsz": recipe.imgsz, "epochs": recipe.epochs})
            shutil.rmtree(folder / "partial")
        scorer = Scorer(
            Supernet.load(folder),
            dataset.data_yaml(self.data, self.workdir / "views", validate_on="val"),
            imgsz=recipe.imgsz,
            batch=EVALUATION_BATCH,
            bn_images=bn_images,
            seed=0,
            work=self.workdir / "work",
        )
        for number, network in enumerate(self.networks, 1):
            file = folder / "scores" / f"{network.digest}.json"
            if not file.exists():
                write_json(file, {"architecture": network.to_dict(), "map50_95": scorer(network)})
                print(f"supernet {label}: scored network {number} of {len(self.networks)}", flush=True)

    def measure_latency(self, threads: int) -> None:
        """Measure the networks as they would ship in floating point."""
        files = []
        for network in self.networks:
            file = self.workdir / "networks" / f"{network.digest}.onnx"
            if not file.exists():
                export_onnx(build(network, len(self.classes), self.classes), file, imgsz=self.setting.imgsz)
            files.append(file)
        with HostLock().measuring():
            measured = measure(files, threads=threads, protocol=PROBE)
        rows = {n.digest: m.latency_ms.p50 for n, m in zip(self.networks, measured, strict=True)}
        write_json(self.workdir / "latency.json", {"machine": machine(threads), "p50_ms": rows})

    def report(self) -> None:
        """Print how the rankings agree, and write it."""
        alone = self.scores_alone()
        trained = [network for network in self.networks if (network, 0) in alone]
        if len(trained) < 3:
            raise InputError(f"{self.workdir}: {len(trained)} networks are trained alone; run --stage train first")
        seeds = sorted({seed for _, seed in alone})
        truth = np.array([np.mean([alone[n, s] for s in seeds if (n, s) in alone]) for n in trained])
        unit, price = self.prices()
        prices = np.array([price(network) for network in trained])
        macs = np.array([self.gmacs(n) for n in trained])
        rows = self.by_band("MAC count", macs, truth, prices, unit)
        residuals: dict[str, list[dict[str, Any]]] = {}
        figure = go.Figure()
        for folder in sorted((self.workdir / "supernets").glob("*")):
            files = [folder / "scores" / f"{network.digest}.json" for network in trained]
            if not all(file.exists() for file in files):
                print(f"supernet {folder.name}: not all networks are scored yet; run --stage supernet")
                continue
            scores = np.array([read_json(file)["map50_95"] for file in files])
            rows += self.by_band(f"supernet {folder.name}", scores, truth, prices, unit)
            both = zscore(scores) + zscore(np.log(macs))
            rows += self.by_band(f"supernet {folder.name} and MAC count", both, truth, prices, unit)
            rows += self.against_tuned(folder, trained, prices, {"MAC count": macs, "trained alone": truth}, scores)
            residuals[folder.name] = misjudged(self.space, trained, scores, truth)
            figure.add_scatter(
                x=100 * scores,
                y=100 * truth,
                mode="markers",
                name=folder.name,
                text=[f"{p:.3f} {unit}" for p in prices],
                marker={"color": prices, "colorscale": "Viridis", "showscale": True, "colorbar": {"title": unit}},
            )
        for first, second in itertools.combinations(seeds, 2):
            both = [n for n in self.networks if (n, first) in alone and (n, second) in alone]
            if len(both) > 2:
                pair = ([alone[n, seed] for n in both] for seed in (first, second))
                rows.append((f"seed {first} against seed {second}", "all", correlate(*pair)))
        text = self.markdown(rows, residuals, len(alone), truth)
        print(text)
        atomic_write(self.workdir / "report.md", text)
        told = [{"score": score, "of": band, **asdict(found)} for score, band, found in rows]
        write_json(self.workdir / "report.json", {"correlations": told, "residuals": residuals})
        figure.update_layout(
            template="plotly_white",
            xaxis_title="with the supernet's weights, mAP50-95 in %",
            yaxis_title="trained alone, mAP50-95 in %",
        )
        figure.write_html(self.workdir / "scatter.html", include_plotlyjs=True)

    def against_tuned(
        self,
        supernet: Path,
        networks: Sequence[Architecture],
        prices: Floats,
        others: Mapping[str, Floats],
        scores: Floats,
    ) -> Rows:
        """Agreement with the networks fine-tuned from a supernet's weights, of those that are."""
        files = [supernet / "tuned" / f"{network.digest}.json" for network in networks]
        made = np.flatnonzero([file.exists() for file in files])
        if len(made) < 3:
            return []
        tuned = np.array([read_json(files[i])["map50_95"] for i in made])
        rows: Rows = []
        for name, found in {f"supernet {supernet.name}": scores, **others}.items():
            rows.append((name, f"all, against fine-tuned from {supernet.name}", correlate(found[made], tuned)))
            if cut := bands(prices[made]):
                within = correlate_within(found[made], tuned, cut)
                rows.append((name, f"within bands, against fine-tuned from {supernet.name}", within))
        return rows

    def by_band(self, name: str, scores: Floats, truth: Floats, prices: Floats, unit: str) -> Rows:
        """Agreement over all networks, within each band of similar cost, and within bands on average."""
        rows = [(name, "all", correlate(scores, truth))]
        if found := bands(prices):
            rows.append((name, "within bands, on average", correlate_within(scores, truth, found)))
        for band in found:
            where = f"{prices[band].min():.3g} to {prices[band].max():.3g} {unit}"
            rows.append((name, where, correlate(scores[band], truth[band])))
        return rows

    def markdown(
        self,
        rows: Rows,
        residuals: Mapping[str, Sequence[Mapping[str, Any]]],
        trainings: int,
        truth: Floats,
    ) -> str:
        """The report."""
        s = self.setting
        images = dataset.load(self.data).images
        lines = [
            f"{len(truth)} networks of space {s.space}, {s.imgsz} px, trained alone for {s.epochs} epochs on "
            f"{images['train']} pictures ({trainings} trainings; a network's score is the mean of its own); mAP50-95 "
            f"on {images['val']} pictures from {100 * truth.min():.1f} to {100 * truth.max():.1f}%.",
            "",
            "| ranked by | networks | of them | Kendall's tau | 95% interval | Spearman's rho | 95% interval |",
            "|---|---|---|---|---|---|---|",
        ]
        for score, band, c in rows:
            lines.append(
                f"| {score} | {band} | {c.networks} | {c.tau:.2f} | {c.tau_interval[0]:.2f} to {c.tau_interval[1]:.2f} "
                f"| {c.rho:.2f} | {c.rho_interval[0]:.2f} to {c.rho_interval[1]:.2f} |"
            )
        for label, found in residuals.items():
            lines += [
                "",
                f"Options that supernet {label} misjudges most: mAP50-95 trained alone, less what the score leads to "
                "expect, in points.",
                "",
                "| option | networks | residual | standard errors |",
                "|---|---|---|---|",
            ]
            lines += [
                f"| {row['option']} | {row['networks']} | {100 * row['residual']:+.2f} | {row['t']:+.1f} |"
                for row in found[:8]
            ]
        return "\n".join(lines) + "\n"

    def scores_alone(self) -> dict[tuple[Architecture, int], float]:
        """mAP50-95 of the networks trained alone, by network and seed."""
        rows = [read_json(file) for file in sorted((self.workdir / "alone").glob("*.json"))]
        return {(Architecture.from_dict(row["architecture"]), row["seed"]): row["map50_95"] for row in rows}

    def prices(self) -> tuple[str, Callable[[Architecture], float]]:
        """What bands are made of: measured latency, or multiply-accumulates where it was not measured; and the unit."""
        file = self.workdir / "latency.json"
        if not file.exists():
            return "GMACs", self.gmacs
        latency: dict[str, float] = read_json(file)["p50_ms"]
        return "ms", lambda network: latency[network.digest]

    def record(self, network: Architecture, seed: int) -> Path:
        """The file of a training alone."""
        return self.workdir / "alone" / f"{network.digest}-{seed}.json"

    def evaluator(self) -> Evaluator:
        """Scores on the validation set."""
        data = dataset.data_yaml(self.data, self.workdir / "views", validate_on="val")
        return Evaluator(data, imgsz=self.setting.imgsz, batch=EVALUATION_BATCH, work=self.workdir / "work")


def spread(
    space: SearchSpace, count: int, price: Callable[[Architecture], float], rng: np.random.Generator
) -> list[Architecture]:
    """Random networks spread evenly over the costs that random networks have.

    The range from the first to the last hundredth of random networks is cut into steps of equal ratio, and a random
    network is taken from each. So every band of costs has its share, and none is better or worse than chance has it.

    Args:
        space: The search space.
        count: Networks wanted.
        price: Cost of a network.
        rng: Source of chance.

    Returns:
        The networks, from cheap to dear.
    """
    drawn = [space.sample(rng) for _ in range(1000)]
    low, high = np.log(np.quantile([price(network) for network in drawn], [0.01, 0.99]))
    found: dict[int, Architecture] = {}
    while len(found) < count:
        network = space.sample(rng)
        step = int(np.floor(count * (np.log(price(network)) - low) / (high - low)))
        if 0 <= step < count:
            found.setdefault(step, network)
    return [found[step] for step in range(count)]


def evenly(networks: Sequence[Architecture], count: int) -> list[Architecture]:
    """`count` of the networks, at even distances."""
    chosen = np.linspace(0, len(networks) - 1, min(count, len(networks))).round().astype(int)
    return [networks[i] for i in chosen]


def bands(prices: Floats, least: int = BAND) -> list[NDArray[np.intp]]:
    """Networks of similar cost: as many bands of at least `least` as there can be, of nearly equal numbers.

    Returns:
        Indices by band, from cheap to dear; nothing where there is only one band.
    """
    parts = len(prices) // least
    return np.array_split(np.argsort(prices), parts) if parts > 1 else []


def correlate(first: Sequence[float] | Floats, second: Sequence[float] | Floats) -> Correlation:
    """How two rankings agree, with intervals from a bootstrap over networks.

    A network drawn twice is tied with itself in both rankings; tau-b leaves such pairs out of numerator and denominator
    alike, where tau-a would count them as disagreement.

    Raises:
        InputError: One of the rankings has a single value.
    """
    return _correlation(*_draws(np.asarray(first, dtype=float), np.asarray(second, dtype=float), 0), len(first))


def correlate_within(first: Floats, second: Floats, groups: Sequence[NDArray[np.intp]]) -> Correlation:
    """How two rankings agree within groups, on average over these; each group's networks are drawn on their own."""
    drawn = [_draws(first[group], second[group], seed) for seed, group in enumerate(groups)]
    tau, rho = (np.mean(statistics, axis=0) for statistics in zip(*drawn, strict=True))
    return _correlation(tau, rho, sum(len(group) for group in groups))


def _draws(x: Floats, y: Floats, seed: int) -> tuple[Floats, Floats]:
    """Tau and rho of the networks, and then of each draw of them: (1 + `RESAMPLES`,), twice."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        raise InputError(f"{len(x)} networks have all the same score, so there is nothing to rank: train for longer")
    drawn = np.random.default_rng(seed).multinomial(len(x), np.full(len(x), 1 / len(x)), size=RESAMPLES)
    weights = np.concatenate([np.ones((1, len(x)), dtype=drawn.dtype), drawn])
    return kendall(x, y, weights), spearman(x, y, weights)


def _correlation(tau: Floats, rho: Floats, networks: int) -> Correlation:
    return Correlation(networks, float(tau[0]), interval(tau[1:]), float(rho[0]), interval(rho[1:]))


def interval(draws: Floats) -> tuple[float, float]:
    """The middle 95% of a statistic's draws; NaN, of a draw with a single value to rank, does not count."""
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return float(low), float(high)


def kendall(x: Floats, y: Floats, weights: NDArray[np.integer[Any]]) -> Floats:
    """Kendall's tau-b of networks that count as often as their weight says, one result per row of weights.

    Args:
        x: One score of n networks: (n,).
        y: The other: (n,).
        weights: (results, n).
    """
    x_order, y_order = (np.sign(v[:, None] - v[None]) for v in (x, y))

    def pairs(which: Floats) -> Floats:
        total: Floats = ((weights @ which) * weights).sum(axis=1)
        return total

    with np.errstate(invalid="ignore"):
        return pairs(x_order * y_order) / np.sqrt(pairs(x_order**2) * pairs(y_order**2))


def spearman(x: Floats, y: Floats, weights: NDArray[np.integer[Any]]) -> Floats:
    """Spearman's rho of the same; equal scores share their mean rank."""
    ranks = []
    for v in (x, y):
        rank = weights @ ((v[:, None] < v[None]) + 0.5 * (v[:, None] == v[None]))
        ranks.append(rank - (weights * rank).sum(axis=1, keepdims=True) / weights.sum(axis=1, keepdims=True))
    with np.errstate(invalid="ignore"):
        covariance = (weights * ranks[0] * ranks[1]).sum(axis=1)
        rho: Floats = covariance / np.sqrt(np.prod([(weights * r**2).sum(axis=1) for r in ranks], axis=0))
    return rho


def misjudged(
    space: SearchSpace, networks: Sequence[Architecture], scores: Floats, truth: Floats
) -> list[dict[str, Any]]:
    """Which options do better or worse alone than their networks' scores lead to expect.

    Networks trained alone are predicted from their score by a straight line; the residuals of the networks that have an
    option are compared with those of the others (Welch's t). Of some eighty options a few are beyond two standard
    errors by chance alone.

    Returns:
        Rows of `option`, `networks` that have it, `residual` (their mean less that of the others) and `t`; the most
        misjudged option first.
    """
    residuals = truth - np.polyval(np.polyfit(scores, truth, 1), scores)
    genes = np.array([space.encode(network) for network in networks])
    rows = []
    for i, dimension in enumerate(space.dimensions):
        for gene, option in enumerate(dimension.options):
            mine, others = residuals[genes[:, i] == gene], residuals[genes[:, i] != gene]
            if len(mine) < 3 or len(others) < 3:
                continue
            difference = mine.mean() - others.mean()
            error = np.sqrt(mine.var(ddof=1) / len(mine) + others.var(ddof=1) / len(others))
            name = f"{dimension.name} = {option}"
            rows.append({"option": name, "networks": len(mine), "residual": difference, "t": difference / error})
    return sorted(rows, key=lambda row: -abs(row["t"]))


if __name__ == "__main__":
    main()
