"""Progress of work over the samples of a split: a bar with rate and time left, or plain lines."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class SampleProgress:
    """Progress bar on a terminal; a plain line now and then elsewhere, so that short work says nothing.

    Args:
        label: what is being done, say `evaluating val`.
        total: number of samples.
        enabled: show anything at all.
        console: where to.
        every: seconds between plain lines.
    """

    def __init__(
        self, label: str, total: int, *, enabled: bool = True, console: Console | None = None, every: float = 10.0
    ) -> None:
        self.console = console or Console(stderr=True)
        self.label, self.total, self.every, self.enabled = label, total, every, enabled
        self.done = 0
        self._begun = self._spoken = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if enabled and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[rate]}"), console=self.console,
            )  # fmt: skip
            self._task = self._bar.add_task(label, total=total, rate="")

    def __enter__(self) -> Self:
        self._begun = self._spoken = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        """Show that one more sample is done."""
        self.done += 1
        now = time.monotonic()
        seconds = max(now - self._begun, 1e-9)
        rate = f"{self.done / seconds:.2f} samples/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, rate=rate)
        elif self.enabled and now - self._spoken >= self.every:
            self._spoken = now
            left = (self.total - self.done) * seconds / self.done
            text = f"{self.label}  {self.done}/{self.total}  {rate}  {left:.0f} s left"
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
