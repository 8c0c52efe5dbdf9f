"""Progress display of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ditr_train.sweep import log_file
from ditr_train.sweep_plan import SweepRun


class SweepProgress:
    """A bar with what works, is done and failed, and the time that is left; lines alone where there is no terminal.

    Args:
        folder: of the sweep.
        total: runs that are to be trained now.
        jobs: runs at a time.
        console: where to.
    """

    def __init__(self, folder: Path, total: int, jobs: int, *, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.folder, self.total, self.jobs = folder, total, jobs
        self._working = self._done = self._failed = 0
        self._seconds = 0.0
        self._bar: Progress | None = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("sweep"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[info]}"),
                console=self.console,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=total, info=self._info())

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def started(self, run: SweepRun) -> None:
        """See `SweepWatcher`."""
        self._working += 1
        self._say(f"started {run.name}")

    def ended(self, run: SweepRun, exit_code: int, seconds: float) -> None:
        """See `SweepWatcher`."""
        self._working -= 1
        if exit_code == 0:
            self._done += 1
            self._seconds += seconds
            self._say(f"done    {run.name} in {_duration(seconds)}")
        else:
            self._failed += 1
            self._say(f"failed  {run.name} (exit code {exit_code}), see {log_file(self.folder, run.name)}")

    def _info(self) -> str:
        left = self.total - self._done - self._failed
        eta = "?" if not self._done else _duration(self._seconds / self._done * left / self.jobs)
        return f"{self._working} running, {self._done} done, {self._failed} failed, {eta} left"

    def _say(self, text: str) -> None:
        if self._bar is None:
            text = f"{text}  [{self._info()}]"
        else:
            self._bar.update(self._task, completed=self._done + self._failed, info=self._info())
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
