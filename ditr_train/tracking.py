"""What a run tells: `metrics.jsonl`, TensorBoard, Weights & Biases, and a progress display."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ditr_cache.errors import StorageError
from ditr_train.files import replace_text
from ditr_train.recipe_sections import TrackingConfig
from ditr_train.report import headline, summary
from ditr_train.wandb_run import WandbRun, require_wandb


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, in the order of the steps. No step is ever written twice.

    Args:
        path: the file; made where it is missing.
        step: the step from which the run goes on. Lines of later steps, written by a run that was killed after its
            last checkpoint, are cut off, and so is a line that was cut short.

    Raises:
        StorageError: the file cannot be read or written.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        try:
            kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
            replace_text(path, "".join(kept))
            self._file: IO[str] = path.open("a")
        except OSError as error:
            raise self._failed(error) from error

    def write(self, kind: str, *, step: int, **values: Any) -> None:
        """Append one line at once, so that a killed run loses none. Raises `StorageError`."""
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(
            f"cannot write {str(self.path)!r}: {error.strerror or error}; mend this, then continue with --resume"
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; one that was cut short (by a kill) is left out. Empty where there is no file."""
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


class Tracker:
    """Metrics of the main process: to `metrics.jsonl`, to TensorBoard, and to Weights & Biases.

    Args:
        folder: the run folder.
        step: the step from which the run goes on.
        config: what is written beside `metrics.jsonl`.
        recipe: the resolved recipe, shown by W&B.

    Raises:
        StorageError: the folder cannot be written.
        UsageError: W&B is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path,
        step: int = 0,
        config: TrackingConfig = TrackingConfig(),  # noqa: B008 - frozen
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        if config.wandb is not None:
            require_wandb()
        self.log = MetricsLog(folder / "metrics.jsonl", step)
        self._writer: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only needed here

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        self._wandb = None if config.wandb is None else WandbRun(folder, config.wandb, recipe or {})

    def write(self, kind: str, *, step: int, **values: Any) -> None:
        """Record values of one step; numbers (and numbers in mappings) also go to the others as `kind/name`."""
        self.log.write(kind, step=step, **values)
        numbers = flat(values, f"{kind}/")
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.write(numbers, step)

    def close(self) -> None:
        """Flush and close everything."""
        self.log.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.close()


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of nested mappings, named by their path."""
    result: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result.update(flat(value, f"{prefix}{name}/"))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            result[prefix + name] = float(value)
    return result


class TrainProgress:
    """Progress bar with loss, score and data-wait percentage; plain lines where there is no terminal.

    Args:
        total: steps of the run.
        enabled: show anything at all.
        console: where to.
        every: seconds between plain lines.
    """

    def __init__(
        self, total: int, *, enabled: bool = True, console: Console | None = None, every: float = 10.0
    ) -> None:
        self.console = console or Console(stderr=True)
        self.total, self.every, self.enabled = total, every, enabled
        self._score = ""
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._spoken = time.monotonic()
        if enabled and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[info]}"), console=self.console,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=total, info="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, *, epoch: int, loss: float, data_wait: float) -> None:
        """Show that `step` steps are done; `data_wait` is the fraction of the time spent waiting for data."""
        score = self._score and f"  {self._score}"
        info = f"epoch {epoch}  loss {loss:.3f}{score}  data wait {100 * data_wait:.1f} %"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, info=info)
        elif self.enabled and (time.monotonic() - self._spoken >= self.every or step == self.total):
            self._spoken = time.monotonic()
            self.say(f"step {step}/{self.total}  {info}")

    def begin(self, step: int) -> None:
        """The run goes on after `step` steps."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def evaluated(self, results: Mapping[str, Any]) -> None:
        """Show the results of an evaluation, as a run's metrics hold them."""
        self._score = headline(results)
        self.say(f"epoch {results['epoch']}  {summary(results)}")

    def say(self, text: str) -> None:
        """One line of text, above the bar where there is one."""
        if self.enabled:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
