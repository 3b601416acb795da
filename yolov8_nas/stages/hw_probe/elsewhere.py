"""A device elsewhere: its networks are packed, and what was measured of them is taken in."""

from __future__ import annotations

import tempfile
from pathlib import Path

from yolov8_nas.config import RunConfig
from yolov8_nas.device.host import HostLock
from yolov8_nas.errors import InputError
from yolov8_nas.measure import bundle, protocol, returned
from yolov8_nas.measure.sampling import sample
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.stage import StageContext, find_target, open_store
from yolov8_nas.stages.hw_probe import STAGE
from yolov8_nas.stages.hw_probe.bench import Bench
from yolov8_nas.stages.hw_probe.run import measure_table
from yolov8_nas.stages.hw_probe.settings import TABLE_VERSION, TABLES, recipe


def write_bundle(config: RunConfig, label: str, num_classes: int, path: Path, work: Path) -> None:
    """Pack the networks that a device elsewhere is to be measured with.

    Args:
        config: The run's configuration.
        label: The target's label.
        num_classes: Classes of the dataset.
        path: The tar to write.
        work: Folder for what is made on the way.

    Raises:
        InputError: The target is no device elsewhere, or cannot be measured through a bundle.
        StageError: Stock cannot be built.
    """
    target = find_target(config, label)
    runtime, asked = bundle.runtime_there(target), recipe(config, target)
    threads = bundle.place(target).threads or 1  # nothing is measured here
    bench = Bench(asked, num_classes, runtime, threads, work, Progress.from_environment("hw-probe", label))
    with HostLock().computing():
        found, failed = bench.export_all(sample(asked.space, asked.networks, asked.holdout, asked.seed))
        files = [*found.values(), bench.export_as_c2f()]
    bundle.write_bundle(
        path,
        files,
        target=target,
        purpose=bundle.TABLE,
        protocol=protocol.PROBE,
        reference=bench.export(asked.space.stock),
        recipe={
            **asked.plain(),
            "num_classes": num_classes,
            "failed": {architecture.digest: reason for architecture, reason in failed.items()},
        },
    )


def import_results(config: RunConfig, label: str, results: Path, store: str) -> None:
    """Take in what was measured on a device elsewhere, and fit its latency model.

    Args:
        config: The run's configuration.
        label: The target's label.
        results: What the measuring program wrote.
        store: The stage store.

    Raises:
        InputError: The results are damaged, incomplete or not the target's.
        StageError: Too much failed there, or latency is predicted too badly.
    """
    target = find_target(config, label)
    read = returned.Returned(bundle.read_results(results, target))
    if read.purpose != bundle.TABLE:
        bundle.keep(read.content, target)
        return
    if differing := bundle.differences(read.recipe, recipe(config, target).plain()):
        raise InputError(
            f"{results}: measured with another {' and '.join(differing)} than the configuration has; pack a bundle "
            "with this configuration and measure that (yolov8-nas probe CONFIG --bundle FILE.tar)"
        )
    returned.check_table(read, results)
    bundle.keep(read.content, target)
    table = STAGE.whole(config, target, {"num_classes": read.num_classes}).table
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        progress = Progress.from_environment("hw-probe", label)
        ctx = StageContext(table, {}, folder, folder, progress, HostLock(), open_store(store))
        ctx.share(TABLES, TABLE_VERSION, table, lambda part: measure_table(part, read))
