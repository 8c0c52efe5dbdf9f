"""Curves of runs, and everything about a comparison in one HTML page. Needs matplotlib (extra `plot`)."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ditr_cache
from ditr_cache.errors import StorageError, UsageError
from ditr_train.compare import Comparison, number
from ditr_train.compare_tables import as_csv, tables
from ditr_train.text_table import as_html, as_markdown

CURVE_POINTS = 400
"""Points drawn of one curve; longer ones are averaged over equal stretches."""

FORMATS = (".html", ".png", ".csv", ".md")
"""Endings that `write_comparison` knows."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px/1.45 system-ui, sans-serif; margin: 2em; color: #1b1f24; background: #fff }}
h1 {{ font-size: 1.4em }} h2 {{ font-size: 1.1em; margin-top: 2em }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .25em .8em; border-bottom: 1px solid #d8dee4; text-align: right; white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left }} th {{ border-bottom: 2px solid #8c959f }}
td.best {{ font-weight: 700; background: #dafbe1 }} svg {{ max-width: 100%; height: auto }}
</style></head><body><h1>{title}</h1>
{curves}
{tables}<p>ditr {version}. In the tables of classes, the best run of each is marked.</p>
</body></html>
"""


def check_output(path: str | Path) -> None:
    """Raise `UsageError` where `write_comparison` could not write such a file: its ending, or a missing package."""
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        raise UsageError(
            f"-o {str(path)!r}: expected a file that ends in {', '.join(FORMATS)}, got {ending or 'none'!r}"
        )
    if ending in (".html", ".png"):
        _figure_class()


def write_comparison(comparison: Comparison, path: str | Path) -> None:
    """Write a comparison in the format that the file's ending names.

    `.html` is a page of its own with curves and all tables, `.png` the curves, `.csv` every number of every run, `.md`
    the tables.

    Raises:
        UsageError: another ending, or matplotlib is missing.
        StorageError: the file cannot be written.
    """
    check_output(path)
    target, content = Path(path), b""
    match target.suffix.lower():
        case ".png":
            content = curves(comparison, "png")
        case ".csv":
            content = as_csv(comparison).encode()
        case ".md":
            content = as_markdown(tables(comparison)).encode()
        case ".html":
            content = page(comparison).encode()
    try:
        target.write_bytes(content)
    except OSError as error:
        raise StorageError(f"cannot write {str(target)!r}: {error.strerror or error}") from error


def page(comparison: Comparison) -> str:
    """One HTML page that needs no other file."""
    svg = curves(comparison, "svg").decode()
    title = f"{len(comparison.runs)} runs: " + ", ".join(group.name for group in comparison.groups)
    return _PAGE.format(
        title=html.escape(title),
        curves=svg[svg.index("<svg") :],
        tables=as_html(tables(comparison)),
        version=ditr_cache.__version__,
    )


def curves(comparison: Comparison, kind: str) -> bytes:
    """Loss, mIoU and cosine over steps as a picture.

    Runs that are the same but for the seed share a colour. Losses of different tasks are never in one panel.

    Args:
        comparison: of the runs.
        kind: `png` or `svg`.
    """
    import matplotlib

    tasks = list(dict.fromkeys(run.recipe.task for run in comparison.runs))
    metrics = list(dict.fromkeys(run.metric for run in comparison.runs))
    panels = [("train", "loss", t, f"training loss ({t})") for t in tasks]
    panels += [
        ("val", m, t, "mIoU % (fast)" if m == "mIoU" else "cosine (fast)") for m, t in zip(metrics, tasks, strict=True)
    ]
    colors = matplotlib.colormaps["tab10" if len(comparison.groups) <= 10 else "turbo"]
    figure = _figure_class()(figsize=(5.6 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axis, (kind_of_line, name, task, title) in zip(axes, panels, strict=True):
        for i, group in enumerate(comparison.groups):
            color = colors(i if len(comparison.groups) <= 10 else i / len(comparison.groups))
            for run in group.runs:
                lines = run.train if kind_of_line == "train" else run.val
                steps, values = _curve(lines, name, 100 if name == "mIoU" else 1)
                if run.recipe.task != task or not steps:
                    continue
                marker = "o" if kind_of_line == "val" else None
                (handles[group.name],) = axis.plot(
                    steps, values, color=color, linewidth=1.3, alpha=0.85, marker=marker, markersize=3.5
                )
        axis.set(title=title, xlabel="optimiser step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    # A pair of dollars would be set as mathematics.
    labels = {
        group.name: group.name.replace("$", r"\$") + (f" ({len(group.runs)} runs)" if len(group.runs) > 1 else "")
        for group in comparison.groups
    }
    if handles:
        figure.legend(
            list(handles.values()), [labels[name] for name in handles],
            loc="outside lower center", ncols=min(4, len(handles)), frameon=False,
        )  # fmt: skip
    stream = io.BytesIO()
    # No date and no random ids: the same runs give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "ditr", "svg.fonttype": "none"}):
        figure.savefig(stream, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return stream.getvalue()


def _curve(lines: Sequence[Mapping[str, Any]], name: str, factor: float) -> tuple[list[float], list[float]]:
    points = [(float(line["step"]), value * factor) for line in lines if (value := number(line.get(name))) is not None]
    stretch = -(-len(points) // CURVE_POINTS) or 1
    parts = [points[i : i + stretch] for i in range(0, len(points), stretch)]
    return [part[-1][0] for part in parts], [sum(v for _, v in part) / len(part) for part in parts]


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure  # without pyplot: no display, no state
    except ImportError as error:
        raise UsageError(
            "curves need matplotlib, which is not installed; run `pip install 'ditr[plot]'`, or write .csv or .md"
        ) from error
    return Figure
