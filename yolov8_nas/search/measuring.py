"""Networks of a search, measured on its device as they would ship."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from yolov8_nas.config import TargetConfig
from yolov8_nas.device.host import HostLock
from yolov8_nas.files import read_json, read_kept, write_json
from yolov8_nas.measure import benchmark, bundle
from yolov8_nas.measure.benchmark import Measurement
from yolov8_nas.measure.protocol import Protocol
from yolov8_nas.measure.runtime import Runtime
from yolov8_nas.space import Architecture

AGAIN: Final = 2
"""Times that networks are measured again at most where the device is slower than when it was probed."""


@dataclass(frozen=True)
class Bench:
    """Measures networks in the same rounds, with stock YOLOv8 as the reference network, and keeps what it found.

    Where stock is slower by more than a disturbance than it was when the device was probed, something else computes on
    the device: the networks are measured again, and what was found the last time counts.

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
            WaitingError: The networks have to be measured elsewhere first.
        """
        kept = self.folder / "measured" / f"{name}.json"
        before = read_kept(kept, lambda file: [Measurement.from_dict(row) for row in read_json(file)])
        if before is not None:
            return before
        self.note(f"measuring {len(architectures)} networks on the device ({name})")
        files = [self.export(architecture) for architecture in architectures]
        legs = kept.with_suffix(".legs.jsonl")
        for left in reversed(range(1 if self.elsewhere else 1 + AGAIN)):
            found = self._measure(files, protocol, progress, legs)
            slow = self._slow(found, protocol)
            if not slow:
                break
            if left:
                self.note(f"{slow}: something else computes on it; measuring again")
                legs.unlink(missing_ok=True)
            else:
                self.note(f"{slow}; if it is to stay so, the limits and the latency model are of another device")
        write_json(kept, [one.to_dict() for one in found])
        return found

    def _slow(self, found: Sequence[Measurement], protocol: Protocol) -> str | None:
        """That the device is not as fast as it was when it was probed, in words; nothing where it is."""
        now_ms = found[0].reference_ms
        if not now_ms or not self.probed_ms or now_ms <= (1 + protocol.disturbance) * self.probed_ms:
            return None
        return (
            f"the device is {now_ms / self.probed_ms:.3g} times as slow as when it was probed (stock takes "
            f"{now_ms:.4g} instead of {self.probed_ms:.4g} ms)"
        )

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
