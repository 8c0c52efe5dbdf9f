"""What `probe` returns as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditr_train.report import percent
from ditr_train.text_table import Table


def probe_tables(results: Mapping[str, Any]) -> list[Table]:
    """Scores of every input on points with a feature and on all points, then IoU per class on points with a feature."""
    groups = tuple(results["probes"][0]["seen"].get("groups", ()))
    metrics = ("mIoU", *groups, "mAcc", "allAcc")
    rows = [
        (
            found["input"],
            *(percent((found[p]["groups"] if m in groups else found[p])[m]) for p in ("seen", "all") for m in metrics),
            f"{found['seconds']:.1f}",
        )
        for found in results["probes"]
    ]
    names = [f"mIoU {m}" if m in groups else m for m in metrics]
    columns = ("input", *names, *(f"{name} (all points)" for name in names), "fit s")
    scores = Table(
        title=f"Linear probes on {results['vfm']}, {results['val_split']}: percent, points with a feature and all",
        columns=columns,
        rows=tuple(rows),
    )
    classes: list[tuple[str, ...]] = []
    best: set[tuple[int, int]] = set()
    for name in results["probes"][0]["seen"]["IoU"]:
        values = [found["seen"]["IoU"][name] for found in results["probes"]]
        top = max((value for value in values if value is not None), default=None)
        if top:
            best.update((len(classes), i + 1) for i, value in enumerate(values) if value == top)
        classes.append((name, *map(percent, values)))
    per_class = Table(
        title="IoU per class in percent, points with a feature",
        columns=("class", *(found["input"] for found in results["probes"])),
        rows=tuple(classes),
        best=frozenset(best),
    )
    return [scores, per_class]
