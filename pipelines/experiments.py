"""The paper's comparison in small: no image, distillation + fine-tuning, injection, with few and with many labels.

Everything is trained by the recipes that ship (`demo/*`), on generated rooms, with the same number of steps. The arms
differ in what they are given, and in nothing else:

- plain: points and labels of a share of the training rooms;
- finetune: the same, from weights that first learned to predict the cached features of all training rooms, without
  any label (D-DITR); fine-tuning and test read points alone;
- inject: the same points and labels with the cached features injected, in training and in the test (DITR).

The rooms of a share are drawn by the seed, the same ones for all arms.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from benchmarks_page import machine, write_section
from commands import call, console, planned, train_all
from demo import VFM
from rich.table import Table

from ditr_cache import open_cache
from ditr_train.tracking import read_metrics

ARMS = {"plain": "points alone", "finetune": "distilled, then fine-tuned, points alone", "inject": "features injected"}
FRACTIONS = (0.05, 0.25, 1.0)

Scores = Mapping[tuple[str, float], Sequence[float]]
"""(arm, share of the labelled rooms) -> mIoU in percent, one per seed."""


@click.command()
@click.option("--out", default="experiments", show_default=True, type=click.Path(path_type=Path))
@click.option("--scenes", default=60, show_default=True, help="Rooms; a third of them validates.")
@click.option("--seeds", default=3, show_default=True, help="Trainings of each kind.")
@click.option("--steps", default=400, show_default=True, help="Optimiser steps with labels, in every arm.")
@click.option("--distill-steps", default=800, show_default=True, help="Optimiser steps of a distillation.")
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
    runs = []
    for seed in range(seeds):
        for fraction in FRACTIONS:
            for arm in ARMS:
                settings = {
                    **common, "training.steps": steps, "seed": seed, "data.fraction": fraction,
                    "data.fraction_seed": seed,
                }  # fmt: skip
                if arm == "finetune":
                    settings["init"] = (out / "distill" / f"seed={seed}").resolve()
                runs.append(planned(f"{arm}_{fraction}_seed={seed}", f"demo/{arm}", settings))
    train_all("demo", runs, out / "runs")
    scores = {
        (arm, fraction): [100 * last(out / "runs" / f"{arm}_{fraction}_seed={s}")["mIoU"] for s in range(seeds)]
        for arm in ARMS
        for fraction in FRACTIONS
    }
    cosines = [last(out / "distill" / f"seed={seed}")["cosine"] for seed in range(seeds)]
    print_scores(scores, train_rooms)
    draw(scores, train_rooms, plot)
    text = section(scores, cosines, train_rooms, scenes - train_rooms, steps, distill_steps, plot)
    write_section(page, "make experiments", text)
    call("ditr-train", "compare", *[out / "runs" / run.name for run in runs], "-o", out / "compare.html")


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


def print_scores(scores: Scores, rooms: int) -> None:
    """The table on the terminal."""
    table = Table("mIoU", *(share(f, rooms) for f in FRACTIONS), title="by share of the labelled rooms")
    for arm, title in ARMS.items():
        table.add_row(title, *(spread(scores[arm, fraction]) for fraction in FRACTIONS))
    console.print(table)


def draw(scores: Scores, rooms: int, path: Path) -> None:
    """One line per arm over the shares, every seed a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    for (arm, title), color in zip(ARMS.items(), ("#57606a", "#0969da", "#bc4c00"), strict=True):
        means = [statistics.mean(scores[arm, fraction]) for fraction in FRACTIONS]
        axes.plot(range(len(FRACTIONS)), means, color=color, label=title)
        for position, fraction in enumerate(FRACTIONS):
            axes.scatter([position] * len(scores[arm, fraction]), scores[arm, fraction], s=14, color=color)
    axes.set_xticks(range(len(FRACTIONS)), [share(fraction, rooms) for fraction in FRACTIONS])
    axes.set(xlabel="labelled training rooms", ylabel="mIoU (%)", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def section(
    scores: Scores, cosines: Sequence[float], rooms: int, val_rooms: int, steps: int, distill_steps: int, plot: Path
) -> str:
    """The section of BENCHMARKS.md."""
    seeds = len(cosines)
    lines = [
        "## Injection, distillation, and how many labels there are",
        "",
        f"Written by `make experiments`: generated rooms, the small SparseUNet of `demo/*`, {VFM}; {steps} steps with "
        f"labels in every arm, distillation {distill_steps} steps on all {rooms} training rooms without labels. mIoU "
        f"over {val_rooms} validation rooms, every point, protocol fast, last weights; mean ± standard deviation of "
        f"{seeds} seeds, each with labelled rooms of its own. Cosine of the distilled networks on the "
        f"validation rooms: {', '.join(f'{c:.3f}' for c in cosines)}.",
        "",
        f"Machine: {machine()}.",
        "",
        f"| | {' | '.join(share(f, rooms) for f in FRACTIONS)} |",
        f"|---|{'---|' * len(FRACTIONS)}",
    ]
    lines += [f"| {title} | {' | '.join(spread(scores[arm, f]) for f in FRACTIONS)} |" for arm, title in ARMS.items()]
    for arm in ("finetune", "inject"):
        gains = [statistics.mean(scores[arm, f]) - statistics.mean(scores["plain", f]) for f in FRACTIONS]
        lines.append(f"| gain of {arm} over plain | {' | '.join(f'{gain:+.1f}' for gain in gains)} |")
    return "\n".join([*lines, "", f"![mIoU over the share of labelled rooms]({plot.as_posix()})", ""])


if __name__ == "__main__":
    experiments()
