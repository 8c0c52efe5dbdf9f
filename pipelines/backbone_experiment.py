"""Injection into each backbone: the demo's small networks on generated rooms, with and without the cached features.

    python pipelines/backbone_experiment.py [--out experiments] [--page BENCHMARKS.md]

Within a backbone the two arms differ in the injection alone (`demo/plain*`, `demo/inject*`). Rooms and cache are those
of `experiments.py`, and are used again where they are there already.
"""

from __future__ import annotations

import itertools
import os
import statistics
from pathlib import Path

import click
from benchmarks_page import machine, table_lines, write_section
from commands import VFM, call, console, planned, train_all
from experiments import class_mean, last, spread
from rich.table import Table

from ditr_cache import open_cache

BACKBONES = {"SparseUNet": "", "Point Transformer V3": "-ptv3", "PointNeXt-S": "-pointnext"}
ARMS = ("plain", "inject")
HEADS = ("backbone", "classes", "points alone", "features injected", "gain", "of every seed")


@click.command()
@click.option("--out", default="experiments", show_default=True, type=click.Path(path_type=Path))
@click.option("--scenes", default=60, show_default=True, help="Rooms; a third of them validates.")
@click.option("--seeds", default=3, show_default=True, help="Trainings of each kind.")
@click.option("--steps", default=300, show_default=True, help="Optimiser steps of each training.")
@click.option("--page", default="BENCHMARKS.md", show_default=True, type=click.Path(path_type=Path))
def experiment(out: Path, scenes: int, seeds: int, steps: int, page: Path) -> None:
    """Train every backbone with and without features and write the table."""
    rooms, cache = out / "rooms", out / "cache"
    call("ditr-cache", "synthesize", rooms, "--scenes", scenes, "--seed", 0)
    extraction = ["--dataset", "rooms", "--root", rooms, "--out", cache, "--vfm", VFM, "--codec", "int8"]
    call("ditr-cache", "extract", *extraction, "--workers", os.cpu_count() or 1)
    settings = {
        "cache": cache, "training.epochs": "null", "training.steps": steps, "training.evaluate_every": 10**6,
        "training.checkpoint_every": 10**6,
    }  # fmt: skip
    runs = {
        (backbone, arm, seed): planned(f"{arm}{suffix}_seed={seed}", f"demo/{arm}{suffix}", {**settings, "seed": seed})
        for seed, (backbone, suffix), arm in itertools.product(range(seeds), BACKBONES.items(), ARMS)
    }
    train_all("demo", list(runs.values()), out / "backbones")

    rows = []
    for backbone, (title, shapes) in itertools.product(BACKBONES, {"all 13": None, "6 with a shape": True}.items()):
        scores = {}
        for arm in ARMS:
            results = [last(out / "backbones" / runs[backbone, arm, seed].name) for seed in range(seeds)]
            scores[arm] = [100 * (r["mIoU"] if shapes is None else class_mean(r, shapes=True)) for r in results]
        gains = [inject - plain for plain, inject in zip(scores["plain"], scores["inject"], strict=True)]
        each = ", ".join(f"{gain:+.1f}" for gain in gains)
        rows.append((backbone, title, *map(spread, scores.values()), f"{statistics.mean(gains):+.1f}", each))
    table = Table(*HEADS, title="mean IoU")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    cut = open_cache(cache)
    lines = [
        "## Injection into three backbones",
        "",
        f"Written by `python pipelines/backbone_experiment.py`. Generated rooms ({len(cut.split_ids('train'))} train, "
        f"{len(cut.split_ids('val'))} validate), the small networks of `demo/*`, {VFM}, {steps} steps; mean IoU of "
        f"every point, protocol fast, last weights; mean ± standard deviation of {seeds} seeds. Within a backbone only "
        "the injection differs; learning rates were set per backbone, for both arms alike.",
        "",
        f"Machine: {machine()}.",
        "",
        *table_lines(HEADS, rows),
    ]
    write_section(page, "backbone_experiment", "\n".join(lines))


if __name__ == "__main__":
    experiment()
