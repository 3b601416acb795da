"""What is wrong with a dataset, gathered instead of stopping at the first fault, so that one message names it all."""

from __future__ import annotations

from yolov8_nas import foreign
from yolov8_nas.errors import InputError

_SHOWN = 10


class Faults:
    """What is wrong with a dataset: the first faults in full, and how many there are."""

    def __init__(self) -> None:
        self.count = 0
        self._shown: list[str] = []

    def add(self, where: str, what: str, remedy: str) -> None:
        """Note a fault: file (and line), value, and what to do about it."""
        self.count += 1
        if self.count <= _SHOWN:
            self._shown.append("{}: {}; {}".format(*map(foreign.plain, (where, what, remedy))))

    def take(self, other: Faults) -> None:
        """Note what was noted elsewhere."""
        self.count += other.count
        self._shown = [*self._shown, *other._shown][:_SHOWN]

    def raise_any(self, source: str) -> None:
        """Raise what was noted.

        Raises:
            InputError: There was at least one fault.
        """
        if self.count == 1:
            raise InputError(f"{source}: {self._shown[0]}")
        if self.count:
            more = [f"... and {self.count - _SHOWN} more"] if self.count > _SHOWN else []
            raise InputError("\n  ".join([f"{source}: {self.count} faults", *self._shown, *more]))
