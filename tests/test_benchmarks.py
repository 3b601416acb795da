"""The benchmarks' statistics say what they are named after, and what was killed goes on where it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import detection
import numpy as np
import pytest
from scipy import stats
from test_evaluation import made_up

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # scripts, not a package

import arena
import rank_correlation
import search_quality
import search_speed
import shapes
import stock_arm
import verdicts
from arena import over_seeds, scores_of_draws
from rank_correlation import (
    Setting,
    Study,
    bands,
    correlate,
    correlate_within,
    evenly,
    kendall,
    misjudged,
    spearman,
    spread,
)

from yolov8_nas.errors import InputError
from yolov8_nas.evaluation import TYPICAL_SPREAD, Evaluation, compare
from yolov8_nas.files import read_json, write_json
from yolov8_nas.space import Architecture, SearchSpace, stock_architecture
from yolov8_nas.space.cost import cost
from yolov8_nas.space.limits import Constraint

SPACE = SearchSpace.load("tiny")
SETTING = Setting(space="tiny", imgsz=64, train=0, val=0, networks=4, epochs=1, batch=8, lr=1e-3)


def macs(network: Architecture) -> float:
    return float(cost(network, 2, 64).macs)


SPREADS = {"sd_training": 0.0075, "sd_images": 0.01}

# Rank correlation ----------------------------------------------------------------------------------------------------


def test_equal_rankings_agree_and_reversed_ones_disagree() -> None:
    scores = list(range(12))
    same, reverse = correlate(scores, [s**3 for s in scores]), correlate(scores, scores[::-1])
    told = [same.tau, same.rho, *same.tau_interval, *same.rho_interval]
    assert told == pytest.approx([1] * 6)
    assert [reverse.tau, reverse.rho] == pytest.approx([-1, -1])


def test_within_bands_what_differs_between_them_does_not_count() -> None:
    rng = np.random.default_rng(2)
    level = np.repeat([0.0, 10.0, 20.0], 12)
    first, second = level + rng.normal(size=(2, 36))
    groups = np.split(np.arange(36), 3)
    inside = correlate_within(first, second, groups)
    assert correlate(first, second).tau > 0.6
    assert inside.tau == pytest.approx(np.mean([correlate(first[g], second[g]).tau for g in groups]))
    assert inside.tau_interval[0] < 0 < inside.tau_interval[1]


@pytest.mark.parametrize("seed", range(5))
def test_statistics_are_those_of_the_networks_drawn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 8, (2, 15)).astype(float)  # with ties
    weights = rng.multinomial(15, np.full(15, 1 / 15), size=3)
    for row, tau, rho in zip(weights, kendall(x, y, weights), spearman(x, y, weights), strict=True):
        drawn = np.repeat(np.arange(15), row)
        assert tau == pytest.approx(stats.kendalltau(x[drawn], y[drawn]).statistic)
        assert rho == pytest.approx(stats.spearmanr(x[drawn], y[drawn]).statistic)


def test_the_interval_of_unrelated_rankings_holds_zero_and_narrows_with_more_networks() -> None:
    rng = np.random.default_rng(3)
    few, many = (correlate(*rng.normal(size=(2, n))) for n in (12, 100))
    widths = []
    for found in (few, many):
        low, high = found.tau_interval
        assert low < 0 < high
        assert low < found.tau < high
        widths.append(high - low)
    assert widths[0] > 2 * widths[1]


def test_a_single_score_is_no_ranking() -> None:
    with pytest.raises(InputError, match="nothing to rank"):
        correlate([0.0, 0.0, 0.0], [1.0, 2.0, 3.0])


def test_networks_are_spread_evenly_over_costs() -> None:
    found = spread(SPACE, 20, macs, np.random.default_rng(0))
    assert found == spread(SPACE, 20, macs, np.random.default_rng(0))
    logs = np.log([macs(network) for network in found])
    assert (np.diff(logs) > 0).all()
    counts, _ = np.histogram(logs, bins=4)
    assert counts.min() >= 4
    assert evenly(found, 2) == [found[0], found[-1]]
    assert evenly(found, 99) == found


def test_bands_are_as_narrow_as_their_least_number_allows() -> None:
    prices = np.random.default_rng(0).permutation(33).astype(float)
    found = [sorted(prices[band]) for band in bands(prices)]
    assert [len(band) for band in found] == [11, 11, 11]
    assert found[0][-1] < found[1][0] < found[1][-1] < found[2][0]
    assert bands(prices[:19]) == []


def test_the_misjudged_option_is_named() -> None:
    rng = np.random.default_rng(1)
    networks = [SPACE.sample(rng) for _ in range(40)]
    scores = rng.uniform(0.3, 0.5, 40)
    better = np.array([network.block("backbone_p4").operator == "conv5" for network in networks])
    truth = 1.2 * scores + 0.05 * better + rng.normal(0, 0.005, 40)
    worst = misjudged(SPACE, networks, scores, truth)[0]
    assert worst["option"] == "backbone_p4.operator = conv5"
    assert worst["networks"] == better.sum()
    assert worst["residual"] == pytest.approx(0.05, abs=0.015)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    detection.make_dataset(tmp_path / "data", train=8, search=2, val=4)
    return Study(tmp_path, SETTING)


def train_in_a_blink(study: Study, monkeypatch: pytest.MonkeyPatch, *, last: int | None = None) -> list[Any]:
    """Let networks be as good as they are large; training stops for good at the `last`."""
    trained: list[Any] = []

    def train_one(
        network: Architecture, model: Any, epochs: int, seed: int, record: Path, validation: Any
    ) -> dict[str, Any]:
        if len(trained) == last:
            raise KeyboardInterrupt
        trained.append((network, seed))
        row = {"architecture": network.to_dict(), "seed": seed, "map50_95": macs(network) / 1e9, "seconds": 1.0}
        write_json(record, row)
        return row

    monkeypatch.setattr(study, "train_one", train_one)
    return trained


def test_only_what_is_missing_is_trained(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    before = train_in_a_blink(study, monkeypatch, last=2)
    with pytest.raises(KeyboardInterrupt):
        study.train_alone(0, study.networks)
    after = train_in_a_blink(study, monkeypatch)
    study.train_alone(0, study.networks)
    study.train_alone(1, study.networks[:1])
    assert len(before) == 2
    assert {*before, *after} == {*((network, 0) for network in study.networks), (study.networks[0], 1)}
    assert len(after) == 3
    study.train_alone(0, study.networks)
    assert len(after) == 3


def test_records_of_another_setting_are_not_mixed_in(study: Study) -> None:
    Study(study.workdir, SETTING)
    with pytest.raises(InputError, match="name another one"):
        Study(study.workdir, Setting(**{**vars(SETTING), "epochs": 2}))


def test_the_report_says_how_the_supernet_ranks(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="--stage train"):
        study.report()
    train_in_a_blink(study, monkeypatch)
    study.train_alone(0, study.networks)
    study.train_alone(1, study.networks)
    for i, network in enumerate(study.networks):
        file = study.workdir / "supernets" / "turned" / "scores" / f"{network.digest}.json"
        write_json(file, {"architecture": network.to_dict(), "map50_95": -i})
        write_json(file.parents[1] / "tuned" / file.name, {"map50_95": -i})
        right = study.workdir / "supernets" / "right" / "scores" / file.name
        write_json(right, {"architecture": network.to_dict(), "map50_95": i})
    study.report()
    rows = read_json(study.workdir / "report.json")["correlations"]
    told = {row["score"]: row["tau"] for row in rows if row["of"] == "all"}
    assert -1 < told.pop("supernet turned and MAC count") < 1
    ends = {"MAC count": 1, "supernet turned": -1, "seed 0 against seed 1": 1}
    assert told == pytest.approx({**ends, "supernet right": 1, "supernet right and MAC count": 1})
    tuned = {row["score"]: row["tau"] for row in rows if row["of"] == "all, against fine-tuned from turned"}
    assert tuned == pytest.approx({"supernet turned": 1, "MAC count": -1, "trained alone": -1})
    assert "| supernet turned | all | 4 | -1.00 |" in capsys.readouterr().out
    assert (study.workdir / "scatter.html").exists()


@pytest.mark.slow
def test_networks_are_trained_alone_and_scored_by_a_supernet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detection.make_dataset(tmp_path / "data", train=32, search=8, val=8)
    arguments = "--imgsz 64 --train 0 --val 0 --networks 2 --epochs 2 --repeats 1 --supernet-epochs 2 --bn-images 16"
    arguments += " --tune-epochs 1"
    for stage in ("train", "supernet", "tune"):
        told = ["rank_correlation", "--workdir", str(tmp_path), "--stage", stage, *arguments.split()]
        monkeypatch.setattr(sys, "argv", told)
        rank_correlation.main()
    rows = [read_json(file) for file in (tmp_path / "alone").glob("*.json")]
    assert sorted(row["seed"] for row in rows) == [0, 0, 1]
    assert all(len(row["curve"]) == 2 and 0 <= row["map50_95"] <= 1 for row in rows)
    assert not list((tmp_path / "partial").iterdir())
    scores = {read_json(file)["map50_95"] for file in (tmp_path / "supernets" / "default" / "scores").iterdir()}
    assert all(0 <= score <= 1 for score in scores)
    tuned = [read_json(file) for file in (tmp_path / "supernets" / "default" / "tuned").iterdir()]
    assert [len(row["curve"]) for row in tuned] == [1, 1]


# Search quality ------------------------------------------------------------------------------------------------------


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "RESAMPLES", 100)


def saved(tmp_path: Path, *evaluations: Evaluation) -> list[Path]:
    files = [tmp_path / f"{i}.npz" for i in range(len(evaluations))]
    for file, evaluation in zip(files, evaluations, strict=True):
        evaluation.save(file)
    return files


def test_one_seed_is_compared_as_images_are(tmp_path: Path, few_draws: None) -> None:
    first, second = made_up(1, 10, skill=0.3), made_up(2, 10, skill=0.2)
    scores, plain = scores_of_draws(saved(tmp_path, first, second)), compare(first, second, resamples=100)
    assert over_seeds(scores[:1] - scores[1:]) == plain


def test_seeds_that_disagree_widen_the_interval() -> None:
    images = np.random.default_rng(0).normal(0, 0.01, 1001)
    images[0] = 0
    steady, torn = (over_seeds(np.array(seeds)[:, None] + images) for seeds in ([0.05] * 3, [0.05, -0.05, 0.05]))
    assert (steady.word, torn.word) == ("ahead", "undecided")
    assert torn.high - torn.low > 2 * (steady.high - steady.low)
    assert over_seeds(np.zeros((3, 11))).word == "undecided"


def test_the_interval_over_seeds_is_students() -> None:
    seeds = np.array([0.01, 0.04, -0.02, 0.03, 0.0])
    found = over_seeds(np.tile(seeds[:, None], (1, 401)))
    assert found.difference == pytest.approx(seeds.mean())
    assert found.high - found.low == pytest.approx(2 * 2.776 * seeds.std(ddof=1) / np.sqrt(5), rel=1e-3)
    images = np.concatenate([[0.0], np.random.default_rng(0).normal(0, 0.01, 400)])
    assert over_seeds(seeds[:, None] + images).high > found.high  # another set of images is another difference


def test_intervals_cover_what_they_say_and_words_are_seldom_wrong() -> None:
    rows = verdicts.coverage(400, **SPREADS)
    told = {(row["interval"].split(",")[0], row["seeds"]): row for row in rows}
    assert told["images alone", 1]["false"] > 0.12  # what an allowance for training is good for
    for row in rows:
        if "spread of trainings" in row["interval"] or (row["interval"].startswith("t ") and row["seeds"] == 5):
            assert row["covers"] >= 0.925, row  # 0.95, as far as 400 runs tell


def test_two_trainings_of_one_network_are_not_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings that differ by more than the images can explain: the case in which images alone mislead."""
    monkeypatch.setattr(verdicts, "RESAMPLES", 60)
    equal = [made_up(i, 40, skill=skill) for i, skill in enumerate((0.3, 0.4, 0.5))]
    spread = TYPICAL_SPREAD.updated([[e.map50_95 for e in equal]], "these")
    alone, allowed = (verdicts.false_verdicts(equal, 80, 2, s) for s in (None, spread))
    assert alone > 0.8 and allowed < 0.2


def test_seeds_on_different_images_are_not_compared(tmp_path: Path, few_draws: None) -> None:
    with pytest.raises(ValueError, match="other images"):
        scores_of_draws(saved(tmp_path, made_up(0, 5), made_up(0, 6)))


def test_the_table_gives_latency_difference_interval_and_word(
    tmp_path: Path, few_draws: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "searches" / "0"
    for seed in range(5):
        for i, arm in enumerate(search_quality.ARMS):
            base = tmp_path / "stock" if arm == "stock" else folder / "arms" / arm
            (base / str(seed)).mkdir(parents=True)
            evaluation = made_up(10 * seed + i, 12, skill=0.1 if arm == "random" else 0.5)
            evaluation.save(base / str(seed) / "val.npz")
    write_json(folder / "latency.json", {"searched": 1.5, "rescaled": 1.6, "random": 1.5, "stock": 2.5})
    assert set(search_quality.scored(tmp_path, folder)) == set(search_quality.ARMS)
    search_quality.report(SimpleNamespace(workdir=tmp_path), folder)  # type: ignore[arg-type]
    told = capsys.readouterr().out
    assert "searched   0.600 of stock's time" in told and "compute    0.640 of stock's time" in told
    (random,) = (line for line in told.splitlines() if "against random" in line)
    assert "ahead, 5 seeds" in random
    (rescaled,) = (line for line in told.splitlines() if "against rescaled" in line)
    assert "undecided" in rescaled


# Our stock arm -------------------------------------------------------------------------------------------------------


def test_what_our_stock_arm_lacks_is_told_over_seeds(
    tmp_path: Path, few_draws: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = SimpleNamespace(epochs=1, imgsz=64, scale="n", weights=None)
    recipes = {"ours": {"lr": 1e-3}, "yolo": {"lr": 1.25e-3, "optimizer": "MuSGD"}}
    for seed in range(3):
        folder = tmp_path / "seeds" / str(seed)
        folder.mkdir(parents=True)
        for arm, skill in (("ours", 0.2), ("yolo", 0.5)):
            made_up(10 * seed + len(arm), 12, skill=skill).save(folder / f"{arm}.npz")
            row = {"recipe": recipes[arm], "seconds": 2.0, "machine": "a machine"}
            write_json(folder / f"{arm}.json", row)
    (tmp_path / "seeds" / "3").mkdir()
    write_json(tmp_path / "seeds" / "3" / "yolo.json", {})  # of this one only one arm is finished
    stock_arm.report(tmp_path, asked)
    told = capsys.readouterr().out
    assert "3 seeds, a machine" in told and "| `yolo train`, its defaults | MuSGD, 0.00125 |" in told
    assert "**behind**" in told and read_json(tmp_path / "report.json")["comparison"]["word"] == "behind"
    evaluated: list[str] = []
    bench = SimpleNamespace(workdir=tmp_path, evaluator=SimpleNamespace(evaluate=evaluated.append))
    stock_arm.Bench.train(bench, "ours", 0)  # it has a record
    assert not evaluated


# Search speed --------------------------------------------------------------------------------------------------------


def test_a_runs_costs_are_those_of_what_made_its_results(tmp_path: Path) -> None:
    store = tmp_path / "store"
    write_json(tmp_path / "run.json", {"run_id": "now"})
    stages = {"all.supernet-train": ("supernet-train", None, 30.0), "cpu.search": ("search", "cpu", 10.0)}
    for name, (stage, target, seconds) in stages.items():
        # Both were in the store already: the records of this run say nothing of what they cost.
        record = {"stage": stage, "target": target, "key": "k", "status": "cached", "seconds": 0.1}
        write_json(store / "runs" / "now" / f"{name}.json", record)
        described = {"stage": stage, "version": 1, "key": "k", "settings": {}, "inputs": {}, "outputs": {}}
        write_json(store / stage / "k" / "manifest.json", {**described, "digest": "", "seconds": seconds})
    history = store / "search" / "k" / "outputs" / "history.jsonl"
    history.parent.mkdir()
    history.write_text(json.dumps({}) + "\n" + json.dumps({}) + "\n")
    told = search_speed.costs_of_run(tmp_path)
    assert "| supernet-train | all | 30 | 75% |" in told
    assert "| search | cpu | 10 | 25% |" in told
    assert "scored 2 networks, 12 a minute" in told
    with pytest.raises(InputError, match="finished run"):
        search_speed.costs_of_run(tmp_path / "elsewhere")


@pytest.mark.parametrize("family", shapes.FAMILIES)
def test_a_family_is_brought_to_the_limit(family: str) -> None:
    stock = stock_architecture("s")

    class Work:
        def predict(self, networks: list[Architecture]) -> tuple[Any, None]:
            return np.array([float(cost(network, 3, 96).macs) for network in networks]), None

    model: Any = Work()
    limit = Constraint.parse("latency<=60%stock")
    network = shapes.at_the_limit(shapes.FAMILIES[family], stock, model, limit)
    share = cost(network, 3, 96).macs / cost(stock, 3, 96).macs
    assert 0.56 < share <= 0.6
    with pytest.raises(SystemExit, match="no factor"):
        shapes.at_the_limit(shapes.FAMILIES[family], stock, model, Constraint.parse("latency<=1%stock"))
    with pytest.raises(SystemExit, match="share of stock"):
        shapes.at_the_limit(shapes.FAMILIES[family], stock, model, Constraint.parse("latency<=5ms"))
