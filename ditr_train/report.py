"""Results of an evaluation as text: one line, or a table of classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from ditr_train.recipe_sections import PublishedConfig


def percent(value: float | None) -> str:
    """`0.1234` -> `12.34`, and `-` for a value that does not exist (a class that occurs nowhere)."""
    return "-" if value is None else f"{100 * value:.2f}"


def headline(results: Mapping[str, Any]) -> str:
    """The one number of an evaluation: mIoU in percent, or the cosine of a distillation."""
    if "cosine" in results:
        return f"cosine {'-' if results['cosine'] is None else format(results['cosine'], '.4f')}"
    return f"mIoU {percent(results['mIoU'])}"


def protocol_name(results: Mapping[str, Any]) -> str:
    """`fast protocol`, or `full protocol, TTA scannet`; empty for results that do not say."""
    if "protocol" not in results:
        return ""
    name = f"{results['protocol']} protocol"
    if "tta" not in results:
        return name
    return f"{name}, TTA {results['tta'] if isinstance(results['tta'], str) else 'of the recipe'}"


def summary(results: Mapping[str, Any]) -> str:
    """One line: mIoU (and that of every group of classes), mAcc and allAcc in percent and the protocol behind them.

    Of a distillation, the cosine.
    """
    if "cosine" in results:
        return headline(results)
    groups = ", ".join(f"{group} {percent(value)}" for group, value in results.get("groups", {}).items())
    rest = "  ".join(f"{name} {percent(results[name])}" for name in ("mAcc", "allAcc"))
    scores = f"mIoU {percent(results['mIoU'])}{groups and f' ({groups})'}  {rest}"
    return f"{scores}  ({protocol_name(results)})" if protocol_name(results) else scores


def published_score(published: PublishedConfig | None) -> str:
    """`80.5 val`, the mIoU that a recipe was published with and where; `-` where no number was published."""
    return "-" if published is None or published.miou is None else f"{published.miou:.1f} {published.split}"


def published_line(published: PublishedConfig | None) -> str:
    """One line for the end of a run, to compare its full-protocol score with; empty where no number was published."""
    if published is None or published.miou is None:
        return ""
    note = "" if published.note is None else f"; {published.note}"
    score = published_score(published)
    return f"published  mIoU {score} (full protocol, the recipe as it ships; {published.source}{note})"


def prediction(done: Mapping[str, Any]) -> str:
    """What was predicted for one input, from what `predict_inputs` returns: points, speed, and the share per class."""
    points = f"{done['points']:,} points in {done['tiles']} tile{'s' * (done['tiles'] != 1)}, {done['seconds']:.1f} s"
    lines = [f"{done['input']}: {points}, {done['points_per_second'] / 1000:,.0f} k points/s"]
    if done["unlabelled"]:
        lines.append(f"  {done['unlabelled']:,} points without finite coordinates have label -1")
    shares = sorted(done["share"].items(), key=lambda item: -item[1])
    lines.append("  " + ", ".join(f"{name} {percent(share)} %" for name, share in shares if share))
    return "\n".join([*lines, *(f"  {path}" for path in done["files"])])


def class_table(results: Mapping[str, Any]) -> Table:
    """IoU of every class and, below, of all and of every group, in percent, from what `evaluate` returns."""
    title = ", ".join(filter(None, (f"{results['split']} of {results['run']}", protocol_name(results))))
    table = Table("class", title=title, show_footer=True)
    means = {"mIoU": results["mIoU"], **{f"  {group}": value for group, value in results.get("groups", {}).items()}}
    table.columns[0].footer = "\n".join(means)
    table.add_column("IoU %", justify="right", footer="\n".join(map(percent, means.values())))
    for name, iou in results["IoU"].items():
        table.add_row(name, percent(iou))
    return table
