"""Where long work stands: a bar with a line beside it on a terminal, else the line now and then on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_INTERVAL = 5.0
"""Seconds between plain lines, where there is no terminal."""


class StatusDisplay:
    """Shows a line that changes; used as a context.

    Args:
        task: what is being done, say `copy`.
        total: of all that is to be done, in any unit.
        quiet: show nothing.
    """

    def __init__(self, task: str, total: int, *, quiet: bool = False) -> None:
        self.total = total
        self._task, self._quiet = task, quiet
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._last_line = time.perf_counter()

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._quiet:
            columns = (BarColumn(), TextColumn("{task.fields[line]}"), TimeElapsedColumn())
            self._bar = Progress(TextColumn(self._task), *columns, console=self._console)
            self._bar.start()
            self._bar_task = self._bar.add_task(self._task, total=max(1, self.total), line="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: int, line: str) -> None:
        """Tell that so much of the total is done."""
        if self._bar is not None:
            self._bar.update(self._bar_task, completed=done, line=line)
        elif not self._quiet and (done >= self.total or time.perf_counter() - self._last_line >= PLAIN_INTERVAL):
            self._last_line = time.perf_counter()
            sys.stderr.write(f"{self._task}: {line}\n")
            sys.stderr.flush()

    def skipped(self, what: str, error: str) -> None:
        """Tell at once what is left out, and why."""
        if not self._quiet:
            self._console.print(
                f"skipped {what}: {error}", style="yellow", markup=False, highlight=False, soft_wrap=True
            )
