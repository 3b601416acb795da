"""Advice before a run: stock sizes against limits on a made-up device, what is recommended, and what it will cost."""

from __future__ import annotations

import html
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fabricated
import pytest
import yaml
from detection import make_dataset
from kfp import dsl
from rich.console import Console
from toys import networks
from typer.testing import CliRunner

from components import step
from pipelines.cli import app as cluster
from yolov8_nas.advice import gains, sizes, words
from yolov8_nas.advice.recommending import recommend
from yolov8_nas.commands import advise as command
from yolov8_nas.commands.main import app
from yolov8_nas.config import FinetuneConfig, RunConfig, Start
from yolov8_nas.device import gpu
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import file_sha256, read_json, tree_files, write_json
from yolov8_nas.measure.latency_model import LatencyModel
from yolov8_nas.report import advice as page
from yolov8_nas.report.build import build_report
from yolov8_nas.report.step import Told
from yolov8_nas.run import advising
from yolov8_nas.run.effort import Look, at_peak, by_rates
from yolov8_nas.run.lifecycle import IN_CLUSTER
from yolov8_nas.runner import process
from yolov8_nas.runner.display import Display
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.results import (
    Advice,
    MeasuredSize,
    MeasuredSizes,
    NmsResult,
    Rate,
    StockSize,
    TrainingRates,
    VerdictResult,
)
from yolov8_nas.runner.stage import Outcome, open_store
from yolov8_nas.space import Architecture, SearchSpace, stock_architecture
from yolov8_nas.space.cost import cost
from yolov8_nas.space.limits import Constraint
from yolov8_nas.stages.hw_probe import STAGE
from yolov8_nas.store.store import Manifest
from yolov8_nas.supernet.training import Recipe
from yolov8_nas.train.rates import measure as measure_training

ROOT = Path(__file__).parents[1]
SMALL, TINY = SearchSpace.load("yolov8s"), SearchSpace.load("tiny")


def milliseconds(architecture: Architecture) -> float:
    """Latency on a made-up device."""
    return cost(architecture, 3, 64).macs / 4e7


def probed(*limits: str, space: SearchSpace = SMALL, folder: Path) -> sizes.Probed:
    """What hw-probe tells of the made-up device, read from its files."""
    folder.mkdir(exist_ok=True)
    known = [space.stock, space.largest(), space.smallest(), *networks(space, 40)]
    latency = [milliseconds(architecture) for architecture in known]
    fabricated.fitted(LatencyModel.fit(space, 3, 64, known, latency).to_result()).write(folder)
    rows = [fabricated.probed(a, ms, reference_ms=1.0) for a, ms in zip(known, latency, strict=True)]
    fabricated.table(rows).write(folder)
    NmsResult(latency_ms=None, reason="not asked for").write(folder)
    stock = milliseconds(space.stock)
    fabricated.stock_result(stock, space.stock).write(folder)
    resolved = fabricated.resolved(*(Constraint.parse(limit).resolve(stock) for limit in limits))
    fabricated.ResolvedLimit.write_all(folder, resolved)
    return sizes.Probed.read(folder, 1, "fp32")


def told(found: Sequence[StockSize], scale: str, precision: str = "fp32") -> StockSize:
    return next(size for size in found if (size.scale, size.precision) == (scale, precision))


def beside(scale: str, precision: str, ms: float) -> MeasuredSize:
    return MeasuredSize(**dict(fabricated.measured(ms, reference_ms=1.0)), scale=scale, precision=precision)


def size(scale: str, outcome: Any, used: float | None, precision: str = "fp32") -> StockSize:
    return StockSize(
        scale=scale, precision=precision, latency_ms=1.0, interval_ms=(1.0, 1.0), basis="measured", outcome=outcome,
        used=used, limit="latency_p50<=4ms",
    )  # fmt: skip


def test_the_size_of_the_space_is_measured_and_the_others_follow_from_the_model(tmp_path: Path) -> None:
    found = sizes.stock_sizes(probed("latency<=80%stock", folder=tmp_path))
    assert [one.scale for one in found] == ["n", "s", "m", "l"]
    own = told(found, "s")
    assert (own.basis, own.outcome) == ("measured", "misses")
    assert own.used == pytest.approx(1.25)
    noisy = probed("latency<=80%stock", folder=tmp_path)
    row = noisy.rows[0].model_copy(update={"interval_ms": (0.5 * own.latency_ms, 2 * own.latency_ms)})
    doubtful = replace(noisy, rows=(row, *noisy.rows[1:]))
    assert told(sizes.stock_sizes(doubtful), "s").outcome == "misses", "of its own share stock misses a quarter exactly"
    n = told(found, "n")
    assert n.basis == "predicted" and n.outcome == "keeps" and n.interval_ms is not None
    assert n.latency_ms == pytest.approx(milliseconds(stock_architecture("n")), rel=0.1)
    for larger in ("m", "l"):
        assert told(found, larger).basis == "extrapolated" and told(found, larger).interval_ms is None
        assert told(found, larger).outcome == "misses", "the slowest network that was measured misses the limit"


def test_what_lies_beyond_the_measured_networks_is_not_guessed(tmp_path: Path) -> None:
    loose = 3 * milliseconds(SMALL.stock)
    found = sizes.stock_sizes(probed(f"latency<={loose}ms", folder=tmp_path))
    assert told(found, "s").outcome == "keeps"
    assert told(found, "m").outcome == "not measured"
    assert ("m", "fp32") in sizes.worth_measuring(found, int8=False)
    measured = sizes.stock_sizes(probed(f"latency<={loose}ms", folder=tmp_path), [beside("m", "fp32", 0.9 * loose)])
    assert (told(measured, "m").basis, told(measured, "m").outcome) == ("measured", "keeps")
    assert told(measured, "l").outcome == "not measured"
    missed = sizes.stock_sizes(probed(f"latency<={loose}ms", folder=tmp_path), [beside("m", "fp32", 2 * loose)])
    assert told(missed, "l").outcome == "misses", "m is a part of it"


def test_a_prediction_near_the_limit_is_too_close_to_tell(tmp_path: Path) -> None:
    with_doubt = probed("latency<=1ms", folder=tmp_path)
    expected = float(with_doubt.model.predict([stock_architecture("n")])[0][0])
    limit = f"latency<={expected}ms"
    found = sizes.stock_sizes(probed(limit, folder=tmp_path))
    assert with_doubt.model.margin > 0 and told(found, "n").outcome == "too close to tell"


def test_a_limit_that_nothing_is_known_of_is_not_measured(tmp_path: Path) -> None:
    found = sizes.stock_sizes(probed("latency<=100ms", "energy<=5mJ", folder=tmp_path))
    assert {one.outcome for one in found if one.basis != "extrapolated"} == {"not measured"}


def test_sizes_that_int8_could_bring_within_the_limits_are_measured_in_it(tmp_path: Path) -> None:
    found = sizes.stock_sizes(probed("latency<=80%stock", folder=tmp_path))
    wanted = sizes.worth_measuring(found, int8=True)
    assert ("s", "int8") in wanted and ("n", "int8") not in wanted, "n keeps the limit as it is"
    assert all(told(found, scale).used < sizes.HOPELESS for scale, _ in wanted)  # type: ignore[operator]
    assert not [one for one in sizes.worth_measuring(found, int8=False) if one[1] == "int8"]


@pytest.mark.parametrize(
    ("found", "space", "start", "kind", "taken", "says"),
    [
        ([size("n", "keeps", 0.97), size("s", "misses", 2.2)], SMALL, "weights", "stock", "n", "0.935"),
        ([size("n", "keeps", 0.5), size("s", "misses", 1.2)], SMALL, "weights", "search", None, "not to be counted on"),
        ([size("n", "keeps", 0.5), size("s", "misses", 1.2)], SMALL, "scratch", "search", None, "is to be expected"),
        ([size("n", "misses", 1.2)], TINY, "scratch", "search", None, "misses latency_p50<=4ms by 20%"),
        ([size("s", "keeps", 0.5), size("m", "misses", 1.2)], SMALL, "weights", "stock", "s", "space yolov8m"),
        ([size("n", "keeps", 0.5), size("s", "not measured", None)], TINY, "scratch", "stock", "n", "1.4 times"),
        ([size("l", "keeps", 0.2)], SMALL, "weights", "stock", "l", "no larger size"),
        (
            [size("n", "keeps", 0.6), size("s", "misses", 1.3), size("s", "keeps", 0.9, "int8")],
            SMALL, "weights", "quantize", "s", "nothing larger than stock n",
        ),
        ([size("n", "misses", 1.2), size("n", "keeps", 0.9, "int8")], SMALL, "scratch", "quantize", "n", "INT8"),
        (
            [size("n", "keeps", 0.97), size("s", "misses", 2.2), size("s", "misses", 1.4, "int8")],
            SMALL, "weights", "stock", "n", "0.935",
        ),
        ([size("n", "keeps", 0.97, "int8")], SMALL, "weights", "quantize", "n", "in INT8"),
        ([size("n", "not measured", None)], SMALL, "weights", "search", None, "was not measured"),
    ],
)  # fmt: skip
def test_the_recommendation_is_one_of_three(
    found: list[StockSize], space: SearchSpace, start: Start, kind: str, taken: str | None, says: str
) -> None:
    given = recommend(found, space=space, start=start)
    assert (given.kind, given.size) == (kind, taken)
    assert says in given.sentence
    begins = {"stock": f"Take stock {taken}:", "quantize": f"Quantize {taken}:", "search": "Search:"}
    assert given.sentence.startswith(begins[kind])


@pytest.mark.parametrize("row", gains.RECORDED, ids=lambda row: f"{row.start}-{row.data}-{row.against}")
def test_every_recorded_gain_stands_in_its_page(row: Any) -> None:
    name, _, heading = row.source.partition(", ")
    text = (ROOT / name).read_text()
    assert re.search(rf"^#+ {re.escape(heading)}$", text, re.MULTILINE)
    difference = "0.0" if row.difference == 0 else f"{row.difference:+.1f}"
    assert f"{difference} ({row.low:+.1f} to {row.high:+.1f})" in text, "of this figure"
    assert f"({row.low:+.1f} to {row.high:+.1f}), *{row.word}*" in text.replace("**", ""), "with this word"
    assert f"{row.limit:.0%}" in text and row.data in text


def test_other_figures_of_ours_stand_in_their_page() -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    gained, low, high = gains.INT8_DROP
    assert f"{gained:+.1f} ({low:+.1f} to {high:+.1f}) points" in text
    assert f"{gains.LIMIT_USED:.1%}" in text
    readme = (ROOT / "README.md").read_text()
    assert f"at {gains.WORTH} of its time" in readme, "the share of rescaled stock's time"


def rates(**changes: Any) -> TrainingRates:
    """Rates of a made-up machine."""
    rate = Rate(seconds=0.1, low=0.09, high=0.12, images=4, repetitions=6)
    fields = dict.fromkeys(("supernet", "teacher", "single", "score", "recalibration"), rate)
    return TrainingRates(**{"device": "2 CPU threads", "alone": True, "took": 9.0, **fields, **changes})


CONFIG = RunConfig.parse(
    {
        "space": "tiny", "imgsz": 64, "supernet": {"epochs": 10, "largest_first": 0.4},
        "search": {"generations": 2, "population": 5, "candidates": 2, "bn_images": 50},
        "finetune": {"epochs": 8, "candidates": 2, "rungs": [], "baseline": "stock", "start": "scratch"},
        "targets": [{"hardware": "cpu-1t", "constraints": ["latency<=80%stock"]}],
    },
    "test",
)  # fmt: skip
IMAGES = {"train": 100, "search": 20, "val": 30}


def test_costs_are_counted_in_images() -> None:
    (target,) = CONFIG.targets
    slow = rates(supernet=Rate(seconds=1.0, low=1.0, high=1.0, images=4, repetitions=6))
    supernet = by_rates("supernet-train", CONFIG, None, IMAGES, slow)
    scored = 2 * 3 * (20 + 100)  # two networks, every fourth epoch and the last: 20 scored, 100 for BatchNorm
    assert supernet.seconds == pytest.approx(6 * 100 * 1.0 + (4 * 100 + scored) * 0.1)
    assert supernet.low is not None and supernet.high is not None
    assert supernet.low < supernet.seconds < supernet.high
    search = by_rates("search", CONFIG, target, IMAGES, slow)
    assert search.seconds == pytest.approx(10 * (20 + 50) * 0.1)
    tuning = by_rates("qat-finetune", CONFIG, target, IMAGES, slow)
    assert tuning.seconds == pytest.approx((2 * 18 + 2 * 18) * 120 * 0.1), "stock is trained as often and as long"
    assert by_rates("register", CONFIG, target, IMAGES, slow).seconds is None
    busy = by_rates("search", CONFIG, target, IMAGES, rates(alone=False))
    assert "beside other work" in busy.source


def test_a_maker_s_figure_counts_stock_s_operations() -> None:
    seconds = at_peak("supernet-train", CONFIG, None, IMAGES, 3, tops=1.0)
    assert seconds == pytest.approx(10 * 4 * 100 * 3 * cost(TINY.stock, 3, 64).gflops * 1e-3)
    assert at_peak("trt-export", CONFIG, CONFIG.targets[0], IMAGES, 3, tops=1.0) is None


def advice(tmp_path: Path, *, with_rates: bool = True) -> Advice:
    """Advice on the made-up device."""
    (target,) = CONFIG.targets
    found = sizes.stock_sizes(probed("latency<=80%stock", space=TINY, folder=tmp_path / "probe"))
    given = recommend(found, space=TINY, start="scratch")
    stages = ("supernet-train", "search", "qat-finetune", "trt-export", "register")
    return Advice(
        target="cpu-1t-fp32", precision="fp32", limits=("latency_p50<=3ms",), sizes=found, space="tiny", scale="n",
        gains=gains.recorded("scratch"), costs=tuple(by_rates(s, CONFIG, target, IMAGES, rates(), 2.0) for s in stages),
        rates=rates() if with_rates else None, kind=given.kind, size=given.size, recommendation=given.sentence,
    )  # fmt: skip


def test_advice_reads_as_text_and_survives_its_file(tmp_path: Path) -> None:
    given = advice(tmp_path)
    given.write(tmp_path)
    assert Advice.read(tmp_path) == given
    text = [*words.lines(given)]
    assert text[-1] == given.recommendation
    assert any("they are 80% of what it takes" in line for line in text)
    assert any(line.startswith("YOLOv8n, FP32") and "misses" in line for line in text)
    assert any("register: not measured" in line for line in text)
    assert any(line.startswith("the run from here: at least") for line in text)


def test_the_report_sets_forecasts_beside_what_came_of_them(tmp_path: Path) -> None:
    given = advice(tmp_path)
    fabricated.write_outputs(tmp_path)
    compared = {"difference": 0.021, "low": -0.01, "high": 0.05}
    verdict = VerdictResult.read(tmp_path / "trt-export").model_copy(
        update={
            "comparisons": (
                fabricated.against_stock(**compared),
                fabricated.against_stock(
                    **{**compared, "difference": 0.03}, against="YOLOv8n at 0.80 of its width (FP32)"
                ),
            )
        }
    )
    limit = {"metric": "latency", "statistic": "p50", "scope": "engine", "unit": "ms", "limit": 3.0, "measured": 2.94}
    model = {**fabricated.figures(2.94), "files": {}}
    baselines = [fabricated.stock_file(2.5)]
    target = fabricated.target(advice=given, model=model, constraints=[limit], baselines=baselines)
    stages = [
        {"name": "supernet-train", "seconds": 61.0},
        {"name": "search", "target": given.target, "status": "cached"},
        {"name": "search", "target": "another", "seconds": 99.0},
    ]
    shown = page.view(target, fabricated.summary(stages=stages).stages, verdict)
    rows = {name: (foretold, came) for name, foretold, came in shown["outcomes"]}
    assert rows["latency of stock YOLOv8n, FP32"][1].startswith("2.5")
    assert rows["of the tightest limit is used"] == ("98.5% (docs/results.md)", "98.0%")
    assert rows[f"points of mAP50-95 against {gains.RESCALED}"][1] == "+3.0 (-1.0 to +5.0, undecided)"
    assert rows[f"points of mAP50-95 against {gains.FULL}"][1] == "+2.1 (-1.0 to +5.0, undecided)"
    assert "+2.2 (+0.7 to +3.8, ahead; BCCD at 80%)" in rows[f"points of mAP50-95 against {gains.RESCALED}"][0]
    assert rows["supernet-train takes"][1] == "1\N{NO-BREAK SPACE}min 1\N{NO-BREAK SPACE}s"
    assert rows["search takes"][1] == "found in the store"
    assert rows["register takes"] == ("not measured", "not measured")
    assert page.view(fabricated.target(), [], None)["missing"]


def test_the_page_shows_advice_and_says_where_there_is_none(tmp_path: Path) -> None:
    given = advice(tmp_path)
    summary = fabricated.summary(fabricated.target(advice=given), fabricated.target(id="another"))
    text = build_report(summary, {}, tmp_path / "r.html").read_text()
    assert text.count("Advice before the run, and what came of it") == 2
    assert text.count("No advice was given before this run.") == 1
    for shown in (given.recommendation, words.gap(given), f"points of mAP50-95 against {gains.FULL}"):
        assert html.escape(shown).replace("&#x27;", "&#39;") in text
    assert "YOLOv8n, FP32" in text and "98.5% (docs/results.md)" in text


@pytest.fixture
def file(tmp_path: Path) -> Path:
    targets = [{"hardware": name, "constraints": ["latency<=80%stock"]} for name in ("cpu-1t", "NVIDIA_T4")]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"name": "x", "space": "tiny", "imgsz": 64, "targets": targets}))
    return path


def _advise(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["advise", *map(str, arguments)])


def test_a_target_that_is_not_here_is_not_measured_and_the_others_are(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one(config: RunConfig, workdir: Path, label: str) -> Advice:
        if label != "cpu-1t-fp32":
            raise InputError("this machine has none")
        return advice(tmp_path)

    monkeypatch.setattr(command, "_one", one)
    shown = _advise(file, "--workdir", tmp_path / "work")
    assert shown.exit_code == 0, shown.output
    assert "not measured: this machine has none" in shown.output and "Search:" in shown.output
    content = json.loads(_advise(file, "--workdir", tmp_path / "work", "--json").stdout)
    assert [given["target"] for given in content["targets"]] == ["cpu-1t-fp32"]
    assert content["not_measured"] == {"nvidia-t4-fp32": "this machine has none"}


@pytest.mark.parametrize(("error", "status"), [(InputError("none here"), 2), (StageError("nothing keeps it"), 1)])
def test_no_target_at_all_is_an_error(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def fail(*_: object) -> Advice:
        raise error

    monkeypatch.setattr(command, "_one", fail)
    shown = _advise(file, "--workdir", tmp_path / "work")
    assert shown.exit_code == status
    assert len(shown.stderr.strip().splitlines()) == 1 and str(error) in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("missing.yaml",), "missing.yaml"),
        (("CONFIG", "--set", "search.populatoin=3"), "unknown key search.populatoin"),
        (("CONFIG", "--constraint", "speed<=8ms"), "speed"),
        (("CONFIG", "--data", ""), "--data is empty"),
    ],
)
def test_bad_input_is_one_line(file: Path, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    given = [str(file) if argument == "CONFIG" else argument for argument in arguments]
    shown = _advise(*given, "--workdir", tmp_path / "work")
    assert shown.exit_code == 2
    assert len(shown.stderr.strip().splitlines()) == 1 and says in shown.stderr


def test_training_rates_are_of_real_steps(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", train=6, search=3, val=2)
    recipe = Recipe(imgsz=32, epochs=3, batch="auto", lr=1e-3, random_networks=1, seed=0)
    found = measure_training(dataset, tmp_path / "work", TINY, recipe, 4, budget_s=2.0)
    for rate in (found.supernet, found.teacher, found.single, found.score, found.recalibration):
        assert 0 < rate.low <= rate.seconds <= rate.high
        assert rate.repetitions >= 3
    assert found.supernet.seconds > found.teacher.seconds, "a step has four networks, the teacher's one"
    assert found.single.images <= 4 and found.score.images == 3
    assert not list((dataset / "dataset").rglob("*.cache")), "a stage's result is left as it is"


@pytest.fixture
def run_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """A store in `tmp_path` with a probed target and a dataset; what is measured for advice is made up and counted."""
    counts: dict[str, list[Any]] = {"sizes": [], "rates": []}

    def measure_sizes(ctx: Any) -> None:
        counts["sizes"].append(ctx.settings.sizes)
        rows = tuple(beside(scale, precision, 0.01) for scale, precision in ctx.settings.sizes)
        MeasuredSizes(rows=rows, failed={}).write(ctx.out)

    def measure_rates(ctx: Any, dataset: Path) -> None:
        counts["rates"].append(dataset)
        rates().write(ctx.out)

    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(advising, "measure_sizes", measure_sizes)
    monkeypatch.setattr(advising, "measure_rates", measure_rates)
    store = tmp_path / "store"
    probe, dataset = store / "hw-probe" / "key" / "outputs", store / "data-prep" / "data" / "outputs"
    probe.mkdir(parents=True)
    probed("latency<=80%stock", space=TINY, folder=probe)
    write_json(probe / "profile.json", fabricated.PROFILE)
    outputs = {name: file_sha256(path) for name, path in tree_files(probe).items()}
    settings = STAGE.whole(CONFIG, CONFIG.targets[0], {"num_classes": 3}).plain()
    manifest = Manifest("hw-probe", STAGE.version, "key", settings, {}, outputs, "digest", 1.0)
    write_json(probe.parent / "manifest.json", asdict(manifest))
    make_dataset(dataset, train=6, search=3, val=2)
    open_store(str(store)).record("run", "all.data-prep.json", fabricated.stage_record("data-prep", key="data"))
    return counts


def test_advice_in_a_run_is_kept_and_measured_once(tmp_path: Path, run_folders: dict[str, list[Any]]) -> None:
    store = str(tmp_path / "store")
    asked = {"label": "cpu-1t-fp32", "store": store, "run_id": "run", "key": "key", "may_measure": True}
    first = advising.advise_in_run(CONFIG.to_json(), **asked)
    assert told(first.sizes, "n", "int8").outcome == "keeps" and (first.kind, first.size)[0] == "quantize"
    assert first.costs[0].seconds is not None
    assert Advice.model_validate(read_json(tmp_path / "store" / "runs" / "run" / "advice.cpu-1t-fp32.json")) == first
    assert advising.advise_in_run(CONFIG.to_json(), **asked) == first
    assert [len(run_folders[name]) for name in ("sizes", "rates")] == [1, 1]


def test_where_no_step_can_be_taken_the_rest_is_told_all_the_same(
    tmp_path: Path, run_folders: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(ctx: Any, dataset: Path) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(advising, "measure_rates", out_of_memory)
    given = advising.advise_in_run(
        CONFIG.to_json(), "cpu-1t-fp32", store=str(tmp_path / "store"), run_id="run", key="key", may_measure=True
    )
    assert given.kind == "quantize" and given.rates is None
    assert "no training step could be taken here (out of memory)" in given.costs[0].source


def test_what_a_busy_machine_took_is_not_taken_for_what_it_takes_on_its_own(
    tmp_path: Path, run_folders: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {
        "label": "cpu-1t-fp32",
        "store": str(tmp_path / "store"),
        "run_id": "run",
        "key": "key",
        "may_measure": True,
    }
    advising.advise_in_run(CONFIG.to_json(), **asked)
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    advising.advise_in_run(CONFIG.to_json(), **asked)
    assert len(run_folders["rates"]) == 2


def test_sizes_are_not_measured_where_the_device_is_not(tmp_path: Path, run_folders: dict[str, list[Any]]) -> None:
    asked = {"label": "cpu-1t-fp32", "store": str(tmp_path / "store"), "run_id": "run", "key": "key"}
    given = advising.advise_in_run(CONFIG.to_json(), **asked, may_measure=False)
    assert not run_folders["sizes"] and {one.precision for one in given.sizes} == {"fp32"}
    known = advising.advise_in_run(CONFIG.to_json(), **asked, may_measure=True)
    assert advising.advise_in_run(CONFIG.to_json(), **asked, may_measure=False) == known
    assert len(run_folders["sizes"]) == 1


def test_in_a_cluster_no_training_step_is_taken(
    tmp_path: Path, run_folders: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(IN_CLUSTER, "10.0.0.1")
    given = advising.advise_in_run(
        CONFIG.to_json(), "cpu-1t-fp32", store=str(tmp_path / "store"), run_id="run", key="key", may_measure=True
    )
    assert not run_folders["rates"] and given.rates is None
    assert {cost.source for cost in given.costs} == {"the dataset is not here, or another machine trains"}


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_tells_the_advice_and_does_not_fail_for_want_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(function: str, **asked: Any) -> Advice:
        assert (function, asked["key"]) == ("yolov8_nas.run.advising:advise_in_run", "key")
        if fails:
            raise StageError("no table")
        return advice(tmp_path)

    monkeypatch.setattr(process, "call", call)
    done, told = Outcome("done", "digest", "key", 1.0), "# hw-probe\n"
    monkeypatch.setattr(step, "tell", lambda *what: Told({}, told))

    def shown(stage: str = "hw-probe", outcome: Outcome = done, found: str = "", config: RunConfig = CONFIG) -> str:
        monkeypatch.setattr(step, "_survived", lambda *_: outcome)
        output, report = dsl.Artifact(uri=str(tmp_path / "tar")), dsl.Markdown(uri=str(tmp_path / "report.md"))
        asked = {
            "config": config.to_json(),
            "target": "cpu-1t-fp32",
            "store": str(tmp_path),
            "run_id": "run",
            "found": found,
        }
        step.run_step(stage, **asked, output=output, metrics=dsl.Metrics(), report=report)
        return Path(report.path).read_text()

    page = shown()
    out = capsys.readouterr().out
    assert ("## Advice" in page) is not fails
    assert ("no advice on cpu-1t-fp32: no table" in out) is fails
    assert ("Search: " in out) is not fails
    assert shown("search") == told
    assert shown(config=CONFIG.model_copy(update={"advice": False})) == told, "nobody asked for it"
    monkeypatch.setenv(IN_CLUSTER, "10.0.0.1")
    assert shown(found="key") == told, "a pod that only reads has no room"
    assert shown(outcome=replace(done, status="failed")) == told


def test_a_display_keeps_what_it_is_told(tmp_path: Path) -> None:
    written, screen = tmp_path / "progress.jsonl", io.StringIO()
    lines = ["limits: latency<=8ms", "Take stock n: it [keeps] it"]
    with Display(written, [("hw-probe", "a")], Console(file=screen)):
        Progress("hw-probe", "a", file=written, lines=False).tell(lines)
    assert screen.getvalue().splitlines() == [f"hw-probe (a): {line}" for line in lines]


class TestPlan:
    """Plans of runs of which nothing was ever run."""

    def shown(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[tuple[str, str], Any]:
        targets = [
            {"hardware": "cpu-1t", "constraints": ["latency<=80%stock"]},
            {"hardware": "NVIDIA_T4", "runtime": "tensorrt", "precision": "int8", "constraints": ["latency<=2.5ms"]},
        ]
        file = tmp_path / "two.yaml"
        file.write_text(yaml.safe_dump({"space": "tiny", "imgsz": 64, "targets": targets}))

        def call(function: str, *, config: RunConfig, training: bool, targets: list[str], **_: Any) -> Look:
            assert function == "yolov8_nas.run.advising:look" and targets == ["cpu-1t-fp32"]
            return Look(IMAGES, 3, rates(), {"cpu-1t-fp32": (2.0, 1.5)})

        monkeypatch.setattr(process, "call", call)
        done = CliRunner().invoke(cluster, ["plan", str(file), "--json", *arguments])
        assert done.exit_code == 0, done.output
        self.content = json.loads(done.stdout)
        return {(one["stage"], one["target"]): one for one in self.content["steps"]}

    def test_what_this_machine_can_stand_in_for_is_measured(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = self.shown(tmp_path, monkeypatch, "--param", "training_gpus=0")
        for stage in ("hw-probe", "search", "qat-finetune", "trt-export"):
            assert found[stage, "cpu-1t-fp32"]["hours"] is not None, stage
        assert found["supernet-train", None]["source"].startswith("steps measured here")
        assert found["hw-probe", "cpu-1t-fp32"]["hours"] == pytest.approx(180 * 2.0 / 3600)
        assert found["hw-probe", "nvidia-t4-int8"]["hours"] is None
        assert found["hw-probe", "nvidia-t4-int8"]["source"].startswith("unknown: takes a NVIDIA_T4")
        assert found["search", "nvidia-t4-int8"]["source"].startswith("catalogue: NVIDIA_T4 at its peak of 8.1 TOPS")

    def test_a_gpu_elsewhere_is_taken_from_the_catalogue_and_marked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = self.shown(tmp_path, monkeypatch, "--param", "training_gpus=1")
        assert found["supernet-train", None]["hours"] is None
        assert "name the GPU of its nodes" in found["supernet-train", None]["source"]
        label = "training_labels={nvidia.com/gpu.product: NVIDIA-L4}"
        found = self.shown(tmp_path, monkeypatch, "--param", "training_gpus=1", "--param", label)
        assert found["supernet-train", None]["hours"] > 0
        assert found["supernet-train", None]["source"].startswith("catalogue: NVIDIA-L4 at its peak")
        training = next(pool for pool in self.content["pools"] if pool["name"] == "training")
        assert training["complete"] is False, "a maker's figure is a lower bound"
        monkeypatch.setattr(gpu, "gpu_names", lambda: ["NVIDIA L4"])
        found = self.shown(tmp_path, monkeypatch, "--param", "training_gpus=1", "--param", label)
        assert found["supernet-train", None]["source"].startswith("steps measured here"), "the same product is here"
        found = self.shown(tmp_path, monkeypatch, "--param", "training_gpus=2", "--param", label)
        assert found["supernet-train", None]["source"].startswith("catalogue"), "a rate is of one process"
        assert any("lower bounds" in line for line in self.content["assumptions"])

    def test_advice_that_was_given_is_told_again(
        self, tmp_path: Path, run_folders: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = tmp_path / "store"
        config = CONFIG.model_copy(update={"finetune": FinetuneConfig()})
        dataset = store / "data-prep" / "data" / "outputs"
        given = advising.advise_and_keep(config, "cpu-1t-fp32", store=str(store), key="key", dataset=dataset)
        self.shown(tmp_path, monkeypatch, "--store", str(store))
        assert [one["target"] for one in self.content["advice"]] == ["cpu-1t-fp32"]
        assert self.content["advice"][0]["recommendation"] == given.recommendation
        done = CliRunner().invoke(cluster, ["plan", str(tmp_path / "two.yaml"), "--no-measure", "--store", str(store)])
        assert given.recommendation in done.output
        done = CliRunner().invoke(cluster, ["plan", str(tmp_path / "two.yaml"), "--no-measure"])
        assert "No advice: none of the targets was probed" in done.output

    def test_without_a_dataset_nothing_is_guessed(self, tmp_path: Path) -> None:
        file = tmp_path / "far.yaml"
        targets = [{"hardware": "cpu-1t", "constraints": ["latency<=80%stock"]}]
        file.write_text(yaml.safe_dump({"data": "s3://bucket/x.tar", "space": "tiny", "imgsz": 64, "targets": targets}))
        done = CliRunner().invoke(cluster, ["plan", str(file), "--json"])
        assert done.exit_code == 0, done.output
        content = json.loads(done.stdout)
        assert {one["hours"] for one in content["steps"]} == {None}
        assert "give the path of a copy with --data" in content["assumptions"][-1]
