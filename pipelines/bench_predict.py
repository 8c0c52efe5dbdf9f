"""Measures `ditr-train predict` on synthetic landscapes of 2 and of 20 million points: speed, and peak memory.

    python pipelines/bench_predict.py [--points 2000000 --points 20000000] [--tmp DIR] [--page BENCHMARKS.md]

Both clouds have the same density; the network is the demo's, with fresh weights, as its speed does not depend on them.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import laspy
import numpy as np
import torch
from benchmarks_page import machine, table_lines, write_section
from rich.console import Console
from rich.table import Table

from ditr_train.checkpoint import save_checkpoint
from ditr_train.models.build import build_segmentor
from ditr_train.recipe_files import load_recipe
from ditr_train.run_folder import RunFolder, RunInfo

DENSITY = 25.0  # points per square metre, as of an airborne scan
GRID_SIZE = 0.5
CLASSES = ("ground", "building", "tree")
STEP = 1_000_000
HEADS = ("points", "tiles", "seconds", "points/s", "peak memory, MiB")

# The peak of a process of its own, in MiB, on the last line of stderr.
PEAK_MEMORY = (
    "import resource, sys\n"
    "from ditr_train.cli import main\n"
    "try: main(sys.argv[1:])\n"
    "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)\n"
)


def write_landscape(path: Path, points: int) -> None:
    """Hills with houses on a grid of 40 m, as LAS with UTM coordinates; written strip by strip."""
    side = math.sqrt(points / DENSITY)
    header = laspy.LasHeader(point_format=7, version="1.4")
    header.offsets, header.scales = np.array([500_000.0, 5_600_000.0, 0.0]), np.full(3, 0.001)
    with laspy.open(path, mode="w", header=header) as writer:
        for first in range(0, points, STEP):
            rng = np.random.default_rng([0, first])
            n = min(STEP, points - first)
            x = rng.random(n) * side
            y = (first + rng.random(n) * n) / points * side
            ground = 4 * np.sin(x / 60) + 3 * np.cos(y / 45)
            house = (x % 40 < 14) & (y % 40 < 12)
            some = laspy.ScaleAwarePointRecord.zeros(n, header=header)
            some.x, some.y = 500_000 + x, 5_600_000 + y
            some.z = ground + 7 * house * rng.random(n) ** 0.2 + rng.normal(0, 0.03, n)
            some.red, some.green, some.blue = (rng.integers(0, 65536, n, dtype=np.uint16) for _ in range(3))
            writer.write_points(some)


def write_run(folder: Path) -> None:
    """A run folder with the demo's network and fresh weights."""
    recipe = load_recipe("demo/plain", [f"data.grid_size={GRID_SIZE}", "data.feat=[coord,color]"])
    torch.manual_seed(0)
    model = build_segmentor(recipe.model, in_channels=6, num_classes=len(CLASSES))
    colors = ((120, 90, 60), (200, 60, 60), (40, 140, 60))
    RunFolder(folder).create(
        recipe,
        RunInfo(
            caches=(), class_names=CLASSES, class_colors=colors, in_channels=6, vfm=None, init=None, versions={},
            device="cpu", command="", git_commit=None,
        ),
    )  # fmt: skip
    save_checkpoint(RunFolder(folder).best, {"model": model.state_dict(), "step": 0})


@click.command()
@click.option("--points", type=int, multiple=True, default=(2_000_000, 20_000_000), show_default=True)
@click.option("--tmp", type=click.Path(path_type=Path), default=None, help="Where the clouds are made; ~5 GB.")
@click.option("--page", type=click.Path(path_type=Path), default=None, help="Keep the figures in this page.")
def bench(points: tuple[int, ...], tmp: Path | None, page: Path | None) -> None:
    """Predict clouds of several sizes and compare speed and memory."""
    rows, peaks = [], []
    for count in points:
        with tempfile.TemporaryDirectory(prefix="ditr-bench-predict-", dir=tmp) as name:
            folder = Path(name)
            write_run(folder / "run")
            write_landscape(folder / "cloud.las", count)
            arguments = ["predict", folder / "run", folder / "cloud.las", "-o", folder / "out", "--json"]
            done = subprocess.run(
                [sys.executable, "-c", PEAK_MEMORY, *map(str, arguments)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(done.stderr)
            summary = json.loads(done.stdout)["inputs"][0]
            labels = np.load(folder / "out" / "cloud.labels.npy", mmap_mode="r")
            assert labels.shape == (count,) and labels.min() >= 0
            peaks.append(int(done.stderr.split()[-1]))
        speed = f"{summary['points_per_second']:,.0f}"
        rows.append((f"{count:,}", str(summary["tiles"]), f"{summary['seconds']:.1f}", speed, f"{peaks[-1]:,}"))
    table = Table(*HEADS, title="ditr-train predict")
    for row in rows:
        table.add_row(*row)
    ratio = f"peak memory of the last / the first: {peaks[-1] / peaks[0]:.2f}"
    console = Console(width=100)
    console.print(table)
    console.print(ratio)
    if page is not None:
        lines = [
            "## Prediction of large clouds",
            "",
            f"Written by `python pipelines/bench_predict.py --page {page}`: LAS, {DENSITY:.0f} points per square "
            f"metre, grid {GRID_SIZE} m, the demo's network with fresh weights; {ratio}.",
            "",
            f"Machine: {machine()}.",
            "",
            *table_lines(HEADS, rows),
        ]
        write_section(page, "bench_predict", "\n".join(lines))


if __name__ == "__main__":
    bench()
