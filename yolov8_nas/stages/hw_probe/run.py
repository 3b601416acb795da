"""hw-probe: what the target device is, how fast networks of the space run on it, and what the limits mean there.

The measurements are a part of their own in the store, found again by every run on the same device, space, runtime and
recipe, whatever its limits are. Holding limits against them is what is left to each run, and measures only where no
network of the table keeps a limit.

A device elsewhere is measured through a bundle (`measure.bundle`): the same networks, packed by
`elsewhere.write_bundle`, whose results `elsewhere.import_results` takes in. The digest of what came back is part of the
settings, so nothing is measured when the stage runs.
"""

from __future__ import annotations

from yolov8_nas.errors import InputError
from yolov8_nas.measure import bundle
from yolov8_nas.measure.returned import Returned
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.stages.hw_probe.limits import Limits
from yolov8_nas.stages.hw_probe.settings import TABLE_VERSION, TABLES, ProbeSettings, TableSettings
from yolov8_nas.stages.hw_probe.table import Table


def run(ctx: StageContext[ProbeSettings]) -> None:
    """Write the table's files (see `measure_table`) and `constraints.json`, the limits as absolute ones.

    A relative limit keeps its share of stock (`share`): whoever measures networks later measures stock beside them, and
    holds them against that.

    Raises:
        StageError: No network of the space keeps the limits, or latency is predicted too badly.
    """
    results = _elsewhere(ctx.settings)
    ctx.share(TABLES, TABLE_VERSION, ctx.settings.table, lambda part: measure_table(part, results))
    Limits(ctx).run()


def measure_table(ctx: StageContext[TableSettings], results: Returned | None = None) -> None:
    """Write `profile.json`, `latency_table.json`, `latency_model.json`, `stock.json` and `nms.json`.

    Args:
        ctx: The context of the shared part.
        results: What was measured of a device elsewhere; nothing for one that is here.

    Raises:
        StageError: Latency is predicted too badly.
    """
    Table(ctx, results).run()


def _elsewhere(settings: ProbeSettings) -> Returned | None:
    """What was measured of a device elsewhere.

    Raises:
        InputError: It is not what the settings are of.
    """
    target = settings.elsewhere
    if target is None:
        return None
    table = bundle.read_kept(target).table
    if table.digest != settings.measured:
        raise InputError(f"{target.far}: other results were imported since the stage began; start the run again")
    return table
