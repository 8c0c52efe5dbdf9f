"""Progress of a task over things that are already in a cache."""

from __future__ import annotations

import time

from ditr_cache.display import StatusDisplay
from ditr_cache.progress import human_bytes


class TaskProgress(StatusDisplay):
    """Shows how much of a task is done, at what rate, and how long the rest will take.

    Args:
        task: say `copy`.
        total: bytes, or number of things, of all that is asked for.
        unit: of the total: `bytes`, or the plural of what is counted.
        quiet: show nothing.
    """

    def __init__(self, task: str, total: int, *, unit: str = "bytes", quiet: bool = False) -> None:
        super().__init__(task, total, quiet=quiet)
        self._unit = unit
        self._done = self._worked = 0
        self._started = time.perf_counter()

    def advance(self, amount: int, *, worked: bool = True) -> None:
        """Count what is done; `worked` is False for what was there already, which tells nothing of the rate."""
        self._done += amount
        self._worked += amount if worked else 0
        self.show(self._done, self.line())

    def line(self) -> str:
        """One line that says where the task stands."""
        rate = self._worked / max(time.perf_counter() - self._started, 1e-9)
        rest = max(0, self.total - self._done)
        left = f"ETA {rest / rate if rest else 0:.0f} s" if rate or not rest else "ETA unknown"
        if self._unit == "bytes":
            return f"{human_bytes(self._done)} of {human_bytes(self.total)}  {human_bytes(rate)}/s  {left}"
        return f"{self._done}/{self.total} {self._unit}  {rate:.1f}/s  {left}"
