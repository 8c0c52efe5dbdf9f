"""Progress of a task over things that are already in a cache: a bar on a terminal, else plain lines on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ditr_cache.progress import PLAIN_INTERVAL, human_bytes


class TaskProgress:
    """Shows how much of a task is done, at what rate, and how long the rest will take.

    Args:
        task: say `copy`.
        total: bytes, or number of things, of all that is asked for.
        unit: of the total: `bytes`, or the plural of what is counted.
        quiet: show nothing.
    """

    def __init__(self, task: str, total: int, *, unit: str = "bytes", quiet: bool = False) -> None:
        self._task, self._total, self._unit, self._quiet = task, total, unit, quiet
        self._done = self._worked = 0
        self._started = self._last_line = time.perf_counter()
        self._console = Console(stderr=True)
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._quiet:
            self._bar = Progress(
                TextColumn(self._task),
                BarColumn(),
                TextColumn("{task.fields[state]}"),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._bar.start()
            self._bar_task = self._bar.add_task(self._task, total=max(1, self._total), state="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, amount: int, *, worked: bool = True) -> None:
        """Count what is done; `worked` is False for what was there already, which tells nothing of the rate."""
        self._done += amount
        self._worked += amount if worked else 0
        if self._bar is not None:
            self._bar.update(self._bar_task, completed=self._done, state=self.line())
        elif not self._quiet and (self._done >= self._total or time.perf_counter() - self._last_line >= PLAIN_INTERVAL):
            self._last_line = time.perf_counter()
            sys.stderr.write(f"{self._task}: {self.line()}\n")
            sys.stderr.flush()

    def failed(self, entry: str, error: str) -> None:
        """Tell at once what is left out, and why."""
        if not self._quiet:
            self._console.print(
                f"skipped {entry}: {error}", style="yellow", markup=False, highlight=False, soft_wrap=True
            )

    def line(self) -> str:
        """One line that says where the task stands."""
        rate = self._worked / max(time.perf_counter() - self._started, 1e-9)
        rest = max(0, self._total - self._done)
        left = f"ETA {rest / rate if rest else 0:.0f} s" if rate or not rest else "ETA unknown"
        if self._unit == "bytes":
            return f"{human_bytes(self._done)} of {human_bytes(self._total)}  {human_bytes(rate)}/s  {left}"
        return f"{self._done}/{self._total} {self._unit}  {rate:.1f}/s  {left}"
