"""Results of an evaluation as text: one line, or a table of classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table


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
