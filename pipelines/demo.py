"""The demo: rooms -> cached features -> a segmenter without and with them, over several seeds, side by side.

Everything is done by the two commands, as a user would call them; this file only calls them in order, and puts their
JSON into a table and `report.html`.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import click
from commands import VFM, ask, call, console, planned, train_all
from demo_report import write_report
from rich.table import Table

from ditr_train.tracking import read_metrics

ARMS = {"plain": "points alone", "inject": f"with {VFM} injected"}


@click.command()
@click.option(
    "--out", default="demo", show_default=True, type=click.Path(path_type=Path), help="Folder for everything."
)
@click.option("--scenes", default=24, show_default=True, help="Rooms; a third of them validates.")
@click.option("--seeds", default=3, show_default=True, help="Trainings of each kind.")
@click.option("--set", "overrides", multiple=True, help="Passed on to every `ditr-train run`.")
def demo(out: Path, scenes: int, seeds: int, overrides: tuple[str, ...]) -> None:
    """Make rooms, cache features, train without and with them, compare."""
    rooms, cache, runs = out / "rooms", out / "cache", out / "runs"
    seconds: dict[str, float] = {}
    with stage("synthesize rooms", seconds):
        call("ditr-cache", "synthesize", rooms, "--scenes", scenes, "--seed", 0)
    with stage("extract features", seconds):
        extraction = ["--dataset", "rooms", "--root", rooms, "--out", cache, "--vfm", VFM, "--codec", "int8"]
        call("ditr-cache", "extract", *extraction, "--workers", os.cpu_count() or 1)
        info = ask("ditr-cache", "info", cache, "--json")
    with stage("train", seconds):
        settings = dict(override.split("=", 1) for override in overrides)
        plan = [
            planned(f"{arm}-{seed}", f"demo/{arm}", {"cache": cache, **settings, "seed": seed})
            for seed in range(seeds)
            for arm in ARMS
        ]
        train_all("demo", plan, runs)
    results = {arm: [final_scores(runs / f"{arm}-{seed}") for seed in range(seeds)] for arm in ARMS}
    with stage("draw", seconds):
        report = write_report(out, rooms, cache, runs, ARMS, results)
    print_results(info, results, seconds)
    console.print(f"pictures and per-class IoU: {report}")


class stage:  # noqa: N801, a context manager that reads like a statement
    """Announce and time one step of the demo."""

    def __init__(self, title: str, seconds: dict[str, float]) -> None:
        self.title, self.seconds = title, seconds

    def __enter__(self) -> None:
        console.rule(self.title)
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.title] = time.perf_counter() - self.started


def final_scores(run: Path) -> dict[str, Any]:
    """What a run's last evaluation gave: all points of all validation rooms, last weights."""
    return [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "val"][-1]


def print_results(info: dict[str, Any], results: dict[str, list[dict[str, Any]]], seconds: dict[str, float]) -> None:
    """The table: mIoU of both arms, what the cache holds, and where the time went."""
    table = Table(title="mIoU over the validation rooms: every point, last weights")
    table.add_column("network")
    for seed in range(len(results["plain"])):
        table.add_column(f"seed {seed}", justify="right")
    table.add_column("mean +- std", justify="right")
    for arm, title in ARMS.items():
        scores = [100 * r["mIoU"] for r in results[arm]]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        table.add_row(title, *(f"{s:.1f}" for s in scores), f"{statistics.mean(scores):.1f} +- {spread:.1f}")
    console.print(table)
    vfm = info["vfms"][0]
    console.print(
        f"coverage {vfm['coverage']:.1%}, features {vfm['bytes'] / info['points']:.0f} bytes per point, "
        f"geometry {info['geometry_bytes'] / info['points']:.0f} bytes per point"
    )
    console.print(
        "seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items()) + f", all {sum(seconds.values()):.0f}"
    )


if __name__ == "__main__":
    demo()
