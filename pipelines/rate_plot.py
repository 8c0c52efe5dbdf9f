"""The plots of `rate_curve.py` and `rate_curve_capture.py`: some measure of quality over bytes per point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FAMILIES = {"values": ("float16, fp8, int8", "#57606a"), "pca": ("pca<K>-int8", "#0969da"), "pq": ("pq<M>", "#bc4c00")}
"""Codecs that are drawn as one line -> its name and colour."""

_LABELS = {"values": (0, 6), "least": (-6, 0), "pca": (7, 0), "pq": (-7, 0)}
"""Family -> where its codecs' names stand beside their points; `least`: the smallest of the first family."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One point of a panel.

    Args:
        codec: of the features.
        series: what they are of; the panel's first is drawn solid, the others dashed and hollow.
        bytes_per_point: that they take on disk.
        value, error: and half the length of the error bar, 0 for none.
    """

    codec: str
    series: str
    bytes_per_point: float
    value: float
    error: float = 0.0

    @property
    def family(self) -> str:
        """Key of `FAMILIES`."""
        return next((family for family in ("pca", "pq") if self.codec.startswith(family)), "values")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One of the plots side by side.

    Args:
        title: above it.
        label: of the y axis.
        points: that are drawn.
        logarithmic: the y axis is.
    """

    title: str
    label: str
    points: Sequence[Measured]
    logarithmic: bool = False


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Write the panels side by side; bytes per point on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, every_axes = pyplot.subplots(1, len(panels), figsize=(10, 5), layout="constrained", squeeze=False)
    for axes, panel in zip(every_axes[0], panels, strict=True):
        named: list[Measured] = []
        for number, series in enumerate(dict.fromkeys(point.series for point in panel.points)):
            for family, (name, color) in FAMILIES.items():
                line = [p for p in panel.points if p.series == series and p.family == family]
                line.sort(key=lambda p: p.bytes_per_point)
                axes.errorbar(
                    [p.bytes_per_point for p in line],
                    [p.value for p in line],
                    yerr=[p.error for p in line] if any(p.error for p in line) else None,
                    label=f"{name}: {series}",
                    color=color,
                    linestyle="--" if number else "-",
                    marker="o",
                    markerfacecolor="white" if number else color,
                    markersize=5,
                    capsize=3,
                )
                for place, point in enumerate(line):
                    if any(p.codec == point.codec and _same_size(p, point) for p in named):
                        continue  # the other series' name stands there
                    named.append(point)
                    x, y = _LABELS[family if place or family != "values" else "least"]
                    axes.annotate(
                        point.codec.removesuffix("-int8"),
                        (point.bytes_per_point, point.value),
                        xytext=(x, y),
                        textcoords="offset points",
                        ha="left" if x > 0 else "right" if x < 0 else "center",
                        va="bottom" if y > 0 else "top" if y < 0 else "center",
                        fontsize=9,
                        color=color,
                    )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if panel.logarithmic:
            axes.set_yscale("log")
        axes.margins(x=0.18, y=0.1)
        axes.set_title(panel.title, fontsize=12)
        axes.set_xlabel("bytes per point, features only", fontsize=12)
        axes.set_ylabel(panel.label, fontsize=12)
        axes.tick_params(labelsize=11)
        axes.grid(alpha=0.3)
    figure.legend(
        *every_axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=10
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _same_size(a: Measured, b: Measured) -> bool:
    return abs(a.bytes_per_point / b.bytes_per_point - 1) < 0.05
