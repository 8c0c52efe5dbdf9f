"""Results as plain tables: of one evaluation, and of several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ditr_train.run_folder import RunFolder
from ditr_train.tracking import read_metrics


def percent(value: float | None) -> str:
    """`0.1234` -> `12.34`, and `-` for a value that does not exist (a class that occurs nowhere)."""
    return "-" if value is None else f"{100 * value:.2f}"


def summary(results: Mapping[str, Any]) -> str:
    """One line: mIoU, mAcc and allAcc in percent."""
    return "  ".join(f"{name} {percent(results[name])}" for name in ("mIoU", "mAcc", "allAcc"))


def class_table(results: Mapping[str, Any]) -> Table:
    """IoU of every class and, below, of all, in percent, from what `evaluate` returns."""
    table = Table("class", title=f"{results['split']} of {results['run']}", show_footer=True)
    table.columns[0].footer = "mIoU"
    table.add_column("IoU %", justify="right", footer=percent(results["mIoU"]))
    for name, iou in results["IoU"].items():
        table.add_row(name, percent(iou))
    return table


def runs_table(runs: Sequence[str | Path]) -> Table:
    """One row per run folder: steps, last and best mIoU in percent, data wait, seconds per step."""
    table = Table("run")
    for heading in ("steps", "last mIoU %", "best mIoU %", "data wait %", "s/step"):
        table.add_column(heading, justify="right")
    for run in runs:
        lines = read_metrics(RunFolder(Path(run)).metrics)
        scores = [line["mIoU"] for line in lines if line["kind"] == "val"]
        steps = [line for line in lines if line["kind"] == "train"]
        known = [s for s in scores if s is not None]
        table.add_row(
            str(run),
            str(max((line["step"] for line in lines), default=0)),
            percent(scores[-1] if scores else None),
            percent(max(known, default=None)),
            percent(_mean([line["data_wait"] for line in steps])),
            "-" if not steps else f"{_mean([line['seconds_per_step'] for line in steps]):.3f}",
        )
    return table


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
