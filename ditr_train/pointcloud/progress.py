"""How far a prediction is: a bar with rate and remaining time, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class PredictProgress:
    """Progress of the phases of each input, on standard error.

    Args:
        enabled: show anything at all.
        console: where to.
        every: seconds between plain lines.
    """

    def __init__(self, *, enabled: bool = True, console: Console | None = None, every: float = 10.0) -> None:
        self.console = console or Console(stderr=True)
        self.enabled, self.every = enabled, every
        self._bar: Progress | None = None
        if enabled and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:.0f} %"),
                TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), console=self.console,
            )  # fmt: skip

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def of(self, name: str) -> Callable[[str, int], Callable[[int], None]]:
        """The phases of one input."""
        return lambda phase, total: self._phase(f"{name}: {phase}", total)

    def _phase(self, description: str, total: int) -> Callable[[int], None]:
        """Begin a phase of `total` points; returns what is told the points that are done since it was told before."""
        bar, started = self._bar, time.monotonic()
        spoken, done = started, 0
        task = None
        if bar is not None:
            for old in bar.task_ids:
                bar.remove_task(old)
            task = bar.add_task(description, total=total, rate="")

        def advance(points: int) -> None:
            nonlocal spoken, done
            done += points
            now = time.monotonic()
            rate = done / max(now - started, 1e-9)
            if bar is not None and task is not None:
                bar.update(task, completed=done, rate=f"{rate / 1000:,.0f} k points/s")
            elif self.enabled and now - spoken >= self.every:
                spoken = now
                left = (total - done) / rate
                text = f"{description}  {done:,}/{total:,} points  {rate / 1000:,.0f} k points/s  {left:.0f} s left"
                self.console.print(text, highlight=False, markup=False, soft_wrap=True)

        return advance
