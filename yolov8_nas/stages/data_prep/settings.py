"""What the dataset of a run depends on, and the names of its classes."""

from __future__ import annotations

from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.runner.settings import StageSettings


class DataSettings(StageSettings):
    """Settings of data-prep.

    Attributes:
        source: Path or address of the dataset; nothing for the demo's.
        source_digest: Digest of what is there; nothing for the demo's.
    """

    source: str | None = None
    source_digest: str | None = None


def settings(config: RunConfig, target: TargetConfig | None) -> DataSettings:
    """The source and its content.

    The run's seed is not among them: which image is in which split depends on the image alone, and runs with
    different seeds are comparable because they see the same data.

    Raises:
        InputError: The source is missing or its labels are at fault.
    """
    if config.data is None:
        return DataSettings()
    from yolov8_nas.data.check import source_digest
    from yolov8_nas.data.remote import is_address
    from yolov8_nas.data.source import local_path

    source = config.data if is_address(config.data) else str(local_path(config.data))
    return DataSettings(source=source, source_digest=source_digest(source))
