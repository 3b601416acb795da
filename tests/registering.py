"""Registering what a made-up branch ships, as the stage does it."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from fabricated import CONFIG, write_outputs

from yolov8_nas.device.host import HostLock
from yolov8_nas.evaluation import Evaluation, ImageStats
from yolov8_nas.files import read_json, write_json
from yolov8_nas.registry import query, tracking
from yolov8_nas.registry.pull import pull
from yolov8_nas.registry.register import Deployable, register
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.stages.register import STAGE
from yolov8_nas.store.store import Store


class Branch:
    """Runs the stage on fabricated outputs, in a run of its own each time."""

    def __init__(self, uri: str, model: str, folder: Path) -> None:
        self.uri, self.folder = uri, folder
        self.config = CONFIG.model_copy(update={"name": model})
        self.tries = count()
        self.store = Store(folder / "store")

    def register(
        self, run_id: str | None = None, *, dataset: str | None = None, scores: Evaluation | None = None, **outputs: Any
    ) -> dict[str, Any]:
        """What `registry.json` says.

        Args:
            run_id: The run; a new one unless given.
            dataset: Digest of the dataset, unless it is the one of `fabricated`.
            scores: What was found on each image.
            outputs: Given to `fabricated.write_outputs`.
        """
        number = next(self.tries)
        run_id = run_id or f"run-{self.config.name}-{number}"
        # The same figures give the same files, as a stage that is cached does.
        inputs = write_outputs(self.folder / str(number), **outputs)
        if dataset is not None:
            described = inputs["data-prep"] / "dataset.json"
            write_json(described, {**read_json(described), "digest": dataset})
        if scores is not None:
            scores.save(inputs["trt-export"] / "evaluation" / "candidate-0-fp32.npz")
        out = self.folder / f"out-{number}"
        out.mkdir()
        target = self.config.targets[0]
        parameters = {
            "run_id": run_id,
            "tracking_uri": self.uri,
            "mlflow_run": tracking.open_run(self.config, run_id, self.uri),
            "label": "cpu-2t-best",
        }
        settings = STAGE.whole(self.config, target, parameters)
        STAGE.run(StageContext(settings, inputs, out, out, Progress.silent(), HostLock(), self.store))
        result = read_json(out / "registry.json")
        assert isinstance(result, dict)
        return result


def detector(name: str, files: Iterable[Path], limit_ms: float = 3.2) -> Deployable:
    """A made-up detector of these files; a limit of its own makes a version of its own."""
    return Deployable(
        name=name,
        files={file.name: file for file in files},
        hardware_id=f"cpu-{name}",
        precision="fp32",
        limits=("latency<=3.2ms",),
        scale="n",
        resolved=[{"metric": "latency", "statistic": "p50", "scope": "engine", "limit": limit_ms, "unit": "ms"}],
        metrics={"map50_95": 0.4, "latency_p50_ms": 3.0},
        params={"imgsz": "64"},
        tags={"hardware": "cpu", "hardware_model": f"CPU of {name}", "dataset": "d" * 64, "dataset_name": name},
        description="made up",
    )


def eight_at_once(uri: str, folder: Path) -> None:
    """Register one detector from eight threads at once, and hold that it has become one version."""
    files = write_outputs(folder)["trt-export"] / "model"
    deployable = detector("crowd", files.iterdir())
    client = tracking.connect(uri)
    runs = [tracking.open_run(CONFIG, f"crowd-{number}", uri) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda run: register(client, run, deployable), runs))
    (left,) = client.search_model_versions("name = 'crowd'")
    assert {result.version for result in done} == {int(left.version)}
    assert query.best(uri, "CPU of crowd", 5).version == int(left.version)
    models = client.search_logged_models(
        [client.get_run(runs[0]).info.experiment_id], filter_string="tags.hardware_id = 'cpu-crowd'"
    )
    assert [model.model_id for model in models] == [left.tags["model_id"]]
    pull(uri, "crowd", folder / "pulled")


def made_up_scores(right: float, images: int = 12, seed: int = 0) -> Evaluation:
    """An evaluation of two classes, one box of each in every image, of which a share is found."""
    rng = np.random.default_rng(seed)
    stats = []
    for number in range(images):
        found = rng.random(2) < right
        stats.append(
            ImageStats(
                name=f"{number}.png",
                tp=np.repeat(found[:, None], 10, axis=1),
                conf=rng.random(2).astype(np.float32),
                pred_cls=np.array([0, 1], np.int32),
                target_cls=np.array([0, 1], np.int32),
            )
        )
    return Evaluation(right, right, {"scratch": right, "dent": right}, tuple(stats))
