"""Networks of a search, measured on its device as they would ship."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from yolov8_nas.config import TargetConfig
from yolov8_nas.hardware import benchmark, bundle
from yolov8_nas.hardware.benchmark import Measurement, Protocol, UnlikeLevelError
from yolov8_nas.hardware.runtime import Runtime
from yolov8_nas.host import HostLock
from yolov8_nas.space import Architecture
from yolov8_nas.store import read_json, write_json

SESSIONS: Final = 3
"""Times that networks are measured at most until the device is about as fast as when it was probed."""


@dataclass(frozen=True)
class Bench:
    """Measures networks in the same rounds, with stock YOLOv8 as the reference network, and keeps what it found.

    Limits and latency model are of the hour in which the device was probed. So measurements are brought to the level at
    which stock was then; where that is too far off, the device is not itself, and they are made again.

    Attributes:
        folder: Where measurements are kept, so that an interrupted search does not ask for them again.
        export: Writes a network's file, where it is missing.
        reference: Stock.
        runtime: What runs the networks.
        threads: Threads of each on a CPU.
        batch: Images per run.
        probed_ms: What the reference took when the device was probed, if that was noted.
        elsewhere: The target, where its device is not this machine's.
        host: The lock that is held for measuring.
        note: Told what goes on.
    """

    folder: Path
    export: Callable[[Architecture], Path]
    reference: Architecture
    runtime: Runtime
    threads: int
    batch: int
    probed_ms: float | None
    elsewhere: TargetConfig | None
    host: HostLock
    note: Callable[[str], None]

    def measure(
        self,
        architectures: Sequence[Architecture],
        protocol: Protocol,
        name: str,
        progress: Callable[[float, float], None],
    ) -> list[Measurement]:
        """Measure networks, or read what was measured of them.

        Args:
            architectures: The networks.
            protocol: How to measure.
            name: Of the measurement, under which it is kept.
            progress: Called with the share done and 1.0; rounds that prove to be needed stretch the last part.

        Raises:
            UnlikeLevelError: The device is not as fast as it was, whenever it is asked.
            WaitingError: The networks have to be measured elsewhere first.
        """
        kept = self.folder / "measured" / f"{name}.json"
        if kept.exists():
            return [Measurement.from_dict(row) for row in read_json(kept)]
        self.note(f"measuring {len(architectures)} networks on the device ({name})")
        files = [self.export(architecture) for architecture in architectures]
        legs = kept.with_suffix(".legs.jsonl")
        for again in reversed(range(1 if self.elsewhere else SESSIONS)):
            found = self._measure(files, protocol, progress, legs)
            try:
                levelled = [one.at_level(self.probed_ms) for one in found]
            except UnlikeLevelError as error:
                legs.unlink(missing_ok=True)
                if not again:
                    raise
                self.note(f"{error.told}; measuring again")
            else:
                break
        write_json(kept, [one.to_dict() for one in levelled])
        return levelled

    def _measure(
        self, files: Sequence[Path], protocol: Protocol, progress: Callable[[float, float], None], legs: Path
    ) -> list[Measurement]:
        reference = self.export(self.reference)
        if self.elsewhere:
            return bundle.measured_there(
                files,
                target=self.elsewhere,
                stage="search",
                protocol=protocol,
                reference=reference,
                bundle=self.folder / "bundle.tar",
            )
        with self.host.measuring():
            return benchmark.measure(
                files,
                threads=self.threads,
                runtime=self.runtime,
                batch=self.batch,
                protocol=protocol,
                reference=reference,
                progress=progress,
                checkpoint=legs,
            )
