"""A comparison of runs as tables, and its numbers as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from typing import Any

from ditr_train.compare import LAST, Comparison, RunSummary
from ditr_train.report import percent
from ditr_train.text_table import Table

SHOWN_VALUE = 60
"""Characters of a recipe value in a table; JSON and the run folders have all of them."""


def tables(comparison: Comparison) -> list[Table]:
    """All tables that a comparison gives; what would be empty is left out."""
    made = [_results(comparison), _seeds(comparison), _costs(comparison), _differences(comparison)]
    return [*(table for table in made if table is not None), *_classes(comparison)]


def as_csv(comparison: Comparison) -> str:
    """One row per run with every number: fractions, seconds and bytes; empty where there is none.

    A score's column is `<measurement>: <metric>`, that of a class `<measurement>: IoU <class>`, that of a group of
    classes `<measurement>: mIoU <group>`.
    """
    rows = []
    for run in comparison.runs:
        row: dict[str, Any] = {
            "run": str(run.path), "state": run.state, "method": run.method, "vfm": run.vfm, "task": run.recipe.task,
            "dataset": run.dataset, "cache": ", ".join(cache.path for cache in run.info.caches),
            "seed": run.recipe.seed, "steps": run.step,
        }  # fmt: skip
        for name in ("samples_per_second", "points_per_second", "seconds_per_step", "data_wait"):
            row[name] = run.median(name)
        row["memory_bytes"] = run.peak_memory
        for label in comparison.labels:
            results = run.scores.get(label, {})
            for name in ("mIoU", "mAcc", "allAcc", "cosine"):
                if results.get(name) is not None:
                    row[f"{label}: {name}"] = results[name]
            row.update({f"{label}: mIoU {name}": value for name, value in results.get("groups", {}).items()})
            row.update({f"{label}: IoU {name}": value for name, value in results.get("IoU", {}).items()})
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _results(comparison: Comparison) -> Table:
    scores = [(m, label) for m in comparison.metrics for label in comparison.labels if _any(comparison, label, m)]
    rest = [(m, LAST) for m in ("mAcc", "allAcc") if _any(comparison, LAST, m)]
    columns = [f"{m} ({label})" for m, label in (*scores, *rest)]
    rows = [
        (
            run.name,
            run.method,
            run.vfm,
            run.recipe.task,
            str(run.recipe.seed),
            str(run.step),
            run.state,
            *(_score(run, label, m) for m, label in (*scores, *rest)),
        )
        for run in comparison.runs
    ]
    heads = ("run", "recipe", "VFM", "task", "seed", "steps", "state")
    return Table(title="Results in percent, cosines as they are", columns=(*heads, *columns), rows=tuple(rows))


def _seeds(comparison: Comparison) -> Table | None:
    if all(len(group.runs) == 1 for group in comparison.groups):
        return None
    scores = [(m, label) for m in comparison.metrics for label in comparison.labels if _any(comparison, label, m)]
    rows = []
    for group in comparison.groups:
        n, left_out = len(group.finished), len(group.runs) - len(group.finished)
        cells = [group.name, ", ".join(str(run.recipe.seed) for run in group.finished) or "-"]
        cells.append(f"{n} (+{left_out} unfinished)" if left_out else str(n))
        for m, label in scores:
            found = group.mean_std(label, m) if m.startswith(group.runs[0].metric) else None
            if found is None:
                cells.append("-")
                continue
            mean, std, count = found
            text = _shown(m, mean) + ("" if std is None else f" ± {_shown(m, std)}")
            cells.append(text if count == n else f"{text} (n={count})")
        rows.append(tuple(cells))
    columns = ("runs", "seeds", "n", *(f"{m} ({label})" for m, label in scores))
    return Table(title="Mean ± sample standard deviation over seeds, finished runs", columns=columns, rows=tuple(rows))


def _costs(comparison: Comparison) -> Table:
    shown: dict[str, Callable[[RunSummary], float | None]] = {
        "samples/s": lambda run: run.median("samples_per_second"),
        "points/s": lambda run: run.median("points_per_second"),
        "s/step": lambda run: run.median("seconds_per_step"),
        "peak memory GiB": lambda run: None if run.peak_memory is None else run.peak_memory / 2**30,
        "data wait %": lambda run: None if (wait := run.median("data_wait")) is None else 100 * wait,
    }
    rows = []
    for run in comparison.runs:
        numbers = [value(run) for value in shown.values()]
        caches = "; ".join(f"{c.dataset} {c.path} {c.vfm_key or ''}".rstrip() for c in run.info.caches)
        rows.append(
            (run.name, *("-" if n is None else f"{n:.3g}" if n < 1000 else f"{n:.0f}" for n in numbers), caches)
        )
    return Table(title="Cost (medians over the training)", columns=("run", *shown, "cache"), rows=tuple(rows))


def _differences(comparison: Comparison) -> Table | None:
    if not comparison.differing:
        return None
    rows = [(key, *map(_value, values)) for key, values in comparison.differing.items()]
    names = tuple(run.name for run in comparison.runs)
    return Table(title="Recipe keys that differ", columns=("key", *names), rows=tuple(rows))


def _classes(comparison: Comparison) -> list[Table]:
    """IoU per class: one table for each measurement and each list of classes, so that no two are mixed."""
    found = []
    lists = comparison.class_lists()
    for runs in lists:
        for label in comparison.labels:
            scored = [run for run in runs if run.scores.get(label, {}).get("IoU")]
            if label == LAST or not scored:  # of the two in training, the one whose weights best.pt holds
                continue
            rows: list[tuple[str, ...]] = []
            best: set[tuple[int, int]] = set()
            for name in scored[0].info.class_names:
                values = [run.scores[label]["IoU"].get(name) for run in scored]
                top = max((v for v in values if v is not None), default=None)
                if len(scored) > 1 and top:
                    best.update((len(rows), i + 1) for i, v in enumerate(values) if v == top)
                rows.append((name, *map(percent, values)))
            title = f"IoU per class in percent, {label}" + (f", {runs[0].dataset}" if len(lists) > 1 else "")
            columns = ("class", *(run.name for run in scored))
            found.append(Table(title=title, columns=columns, rows=tuple(rows), best=frozenset(best)))
    return found


def _any(comparison: Comparison, label: str, metric: str) -> bool:
    return any(run.score(label, metric) is not None for run in comparison.runs)


def _score(run: RunSummary, label: str, metric: str) -> str:
    return _shown(metric, run.score(label, metric))


def _shown(metric: str, value: float | None) -> str:
    return percent(value) if metric != "cosine" or value is None else f"{value:.4f}"


def _value(value: Any) -> str:
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN_VALUE else text[: SHOWN_VALUE - 3] + "..."
