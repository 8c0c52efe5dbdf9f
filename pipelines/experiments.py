"""The paper's comparison in small: no image, distillation + fine-tuning, injection, with few and with many labels.

Everything is trained by the recipes that ship (`demo/*`), on generated rooms, with the same number of steps. The arms
differ in what they are given, and in nothing else:

- plain: points and labels of a share of the training rooms;
- finetune: the same, from weights that first learned to predict the cached features of all training rooms, without
  any label (D-DITR); fine-tuning and test read points alone;
- inject: the same points and labels with the cached features injected, in training and in the test (DITR).

The rooms of a share are drawn by the seed, the same ones for all arms.

Six of the rooms' classes have shapes of their own; seven are flat panels that only their texture tells apart, which
points every 5 cm do not carry. What an image knows of the first six, a network over points can learn from it; what it
knows of the panels has to be injected. The table therefore shows both kinds, too.
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from benchmarks_page import machine, write_section
from commands import VFM, call, console, planned, train_all
from rich.table import Table

from ditr_cache import open_cache
from ditr_train.tracking import read_metrics

ARMS = {"plain": "points alone", "finetune": "distilled, then fine-tuned, points alone", "inject": "features injected"}
FRACTIONS = (0.05, 0.25, 1.0)
SHAPES = ("wall", "floor", "chair", "sofa", "table", "bookshelf")

Scores = Mapping[tuple[str, float], Sequence[float]]
"""(arm, share of the labelled rooms) -> percent, one per seed."""


@click.command()
@click.option("--out", default="experiments", show_default=True, type=click.Path(path_type=Path))
@click.option("--scenes", default=60, show_default=True, help="Rooms; a third of them validates.")
@click.option("--seeds", default=3, show_default=True, help="Trainings of each kind.")
@click.option("--steps", default=300, show_default=True, help="Optimiser steps with labels, in every arm.")
@click.option("--distill-steps", default=600, show_default=True, help="Optimiser steps of a distillation.")
@click.option("--page", default="BENCHMARKS.md", show_default=True, type=click.Path(path_type=Path))
@click.option("--plot", default="docs/experiments.png", show_default=True, type=click.Path(path_type=Path))
def experiments(out: Path, scenes: int, seeds: int, steps: int, distill_steps: int, page: Path, plot: Path) -> None:
    """Train all arms with all shares of the labels and write table and plot."""
    rooms, cache = out / "rooms", out / "cache"
    call("ditr-cache", "synthesize", rooms, "--scenes", scenes, "--seed", 0)
    extraction = ["--dataset", "rooms", "--root", rooms, "--out", cache, "--vfm", VFM, "--codec", "int8"]
    call("ditr-cache", "extract", *extraction, "--workers", os.cpu_count() or 1)
    train_rooms = len(open_cache(cache).split_ids("train"))
    common = {
        "cache": cache, "training.epochs": "null", "training.evaluate_every": 10**6, "training.checkpoint_every": 10**6
    }  # fmt: skip
    distilled = [
        planned(f"seed={seed}", "demo/distill", {**common, "training.steps": distill_steps, "seed": seed})
        for seed in range(seeds)
    ]
    train_all("demo/distill", distilled, out / "distill")
    runs = {}
    for seed, fraction, arm in itertools.product(range(seeds), FRACTIONS, ARMS):
        settings = {
            **common, "training.steps": steps, "seed": seed, "data.fraction": fraction, "data.fraction_seed": seed
        }  # fmt: skip
        if arm == "finetune":
            settings["init"] = (out / "distill" / f"seed={seed}").resolve()
        runs[arm, fraction, seed] = planned(f"{arm}_{fraction}_seed={seed}", f"demo/{arm}", settings)
    train_all("demo", list(runs.values()), out / "runs")

    def scores(of: Callable[[Mapping[str, Any]], float]) -> Scores:
        return {
            (arm, fraction): [100 * of(last(out / "runs" / runs[arm, fraction, seed].name)) for seed in range(seeds)]
            for arm, fraction in itertools.product(ARMS, FRACTIONS)
        }

    tables = {
        "mIoU, all 13 classes": scores(lambda result: result["mIoU"]),
        "mean IoU of the 6 classes with a shape of their own": scores(lambda result: class_mean(result, shapes=True)),
        "mean IoU of the 7 flat panels": scores(lambda result: class_mean(result, shapes=False)),
    }
    cosines = [last(out / "distill" / run.name)["cosine"] for run in distilled]
    for title, values in tables.items():
        print_scores(title, values, train_rooms)
    draw(tables, train_rooms, plot)
    setting = (
        f"Generated rooms, the small SparseUNet of `demo/*`, {VFM}; {steps} steps with labels in every arm, "
        f"distillation {distill_steps} steps on all {train_rooms} training rooms without labels; "
        f"{scenes - train_rooms} validation rooms"
    )
    write_section(page, "make experiments", section(tables, cosines, train_rooms, setting, plot))
    folders = [out / "runs" / run.name for run in runs.values()]
    call("ditr-train", "compare", *folders, "-o", out / "compare.html")


def class_mean(result: Mapping[str, Any], *, shapes: bool) -> float:
    """Mean IoU of the classes with a shape of their own, or of the others."""
    values = [iou for name, iou in result["IoU"].items() if iou is not None and (name in SHAPES) == shapes]
    return statistics.mean(values)


def last(run: Path) -> dict[str, Any]:
    """A run's final evaluation: every point of all validation rooms (protocol fast), last weights."""
    return [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "val"][-1]


def share(fraction: float, rooms: int) -> str:
    """`5 % (2 rooms)`."""
    count = max(1, round(fraction * rooms))
    return f"{fraction:.0%} ({count} room{'s' if count > 1 else ''})".replace("%", " %")


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.1f}"


def print_scores(title: str, scores: Scores, rooms: int) -> None:
    """One table on the terminal."""
    table = Table(title, *(share(f, rooms) for f in FRACTIONS))
    for arm, name in ARMS.items():
        table.add_row(name, *(spread(scores[arm, fraction]) for fraction in FRACTIONS))
    console.print(table)


def draw(tables: Mapping[str, Scores], rooms: int, path: Path) -> None:
    """One panel per table: a line per arm over the shares, every seed a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(tables), figsize=(13, 3.9), layout="constrained", sharey=True)
    for axes, (title, scores) in zip(panels, tables.items(), strict=True):
        for (arm, name), color in zip(ARMS.items(), ("#57606a", "#0969da", "#bc4c00"), strict=True):
            means = [statistics.mean(scores[arm, fraction]) for fraction in FRACTIONS]
            axes.plot(range(len(FRACTIONS)), means, color=color, label=name)
            for position, fraction in enumerate(FRACTIONS):
                axes.scatter([position] * len(scores[arm, fraction]), scores[arm, fraction], s=14, color=color)
        axes.set_xticks(range(len(FRACTIONS)), [share(f, rooms).replace(" (", "\n(") for f in FRACTIONS])
        axes.set(title=title, xlabel="labelled training rooms", ylim=(0, 100))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("IoU (%)")
    panels[-1].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def section(tables: Mapping[str, Scores], cosines: Sequence[float], rooms: int, setting: str, plot: Path) -> str:
    """The section of BENCHMARKS.md."""
    lines = [
        "## Injection, distillation, and how many labels there are",
        "",
        f"Written by `make experiments`. {setting}. Every point, protocol fast, last weights; mean ± standard "
        f"deviation of {len(cosines)} seeds, each with labelled rooms of its own. Cosine of the distilled networks on "
        f"the validation rooms: {', '.join(f'{c:.3f}' for c in cosines)}.",
        "",
        f"Machine: {machine()}.",
    ]
    for title, scores in tables.items():
        lines += ["", f"| {title} | {' | '.join(share(f, rooms) for f in FRACTIONS)} |"]
        lines += [f"|---|{'---|' * len(FRACTIONS)}"]
        lines += [f"| {name} | {' | '.join(spread(scores[arm, f]) for f in FRACTIONS)} |" for arm, name in ARMS.items()]
        for arm in ("finetune", "inject"):
            gains = [statistics.mean(scores[arm, f]) - statistics.mean(scores["plain", f]) for f in FRACTIONS]
            lines.append(f"| gain of {arm} over plain | {' | '.join(f'{gain:+.1f}' for gain in gains)} |")
    return "\n".join([*lines, "", f"![IoU over the share of labelled rooms]({plot.as_posix()})"])


if __name__ == "__main__":
    experiments()
