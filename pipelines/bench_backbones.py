"""Measures the backbones at published size: speed, peak memory, and what injection of ViT-L-wide features costs.

    python pipelines/bench_backbones.py [--points 20000] [--library DIR] [--page BENCHMARKS.md]

A step is forward, backward and optimiser on one room. Steps with and without injection alternate, and so do those of
several libraries of sparse convolutions; memory is that of a process of its own. On a GPU it also measures mixed
precision. Another build of the library is compared when it lies in a folder:

    pip install --no-deps --target DIR spconv-cu126 cumm-cu126
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import click
import torch
from benchmarks_page import machine, table_lines, write_section
from rich.console import Console
from rich.table import Table

from ditr_train.data.sample import FeatureRows, PointBatch
from ditr_train.losses import segmentation_loss
from ditr_train.models.build import build_segmentor
from ditr_train.models.config import (
    BackboneConfig,
    InjectionConfig,
    ModelConfig,
    PointNeXtConfig,
    PTv3Config,
    SparseUNetConfig,
)
from ditr_train.optim import OptimizerConfig, build_optimizer

BACKBONES: dict[str, BackboneConfig] = {
    "SparseUNet": SparseUNetConfig(),
    "PTv3": PTv3Config(),
    "PointNeXt-S": PointNeXtConfig(size="S"),
    "PointNeXt-L": PointNeXtConfig(size="L"),
}
VIT_L = 1024
GRID_SIZE = 0.04
CLASSES = 20
HEADS = (
    "backbone", "M parameters", "samples/s", "seconds per step", "injected / plain", "peak memory, MiB",
    "with injection, MiB",
)  # fmt: skip
OVERHEAD_GOAL = 1.05

Step = Callable[[], float]


def room(points: int, device: str) -> PointBatch:
    """Floor, walls and a table of one room as voxels, of which nine in ten have a feature of its own (int8)."""
    generator = torch.Generator().manual_seed(0)
    edge = round((points / 4.2) ** 0.5)  # floor 1, walls 4 x 0.75, table 0.2
    height = round(0.75 * edge)
    a, h = torch.arange(edge), torch.arange(1, height)
    plane, wall = torch.cartesian_prod(a, a), torch.cartesian_prod(a, h)
    low, high = torch.zeros(len(wall), 1).long(), torch.full((len(wall), 1), edge - 1)
    inner = plane[((plane > 0.3 * edge) & (plane < 0.75 * edge)).all(dim=1)]
    surfaces = [
        torch.cat([plane, torch.zeros(len(plane), 1).long()], dim=1),
        *(torch.cat([side, wall], dim=1) for side in (low, high)),
        *(torch.cat([wall[:, :1], side, wall[:, 1:]], dim=1) for side in (low, high)),
        torch.cat([inner, torch.full((len(inner), 1), height // 3)], dim=1),
    ]
    grid = torch.cat(surfaces).unique(dim=0)
    grid = grid[torch.randperm(len(grid), generator=generator)]
    seen = torch.rand(len(grid), generator=generator) < 0.9
    index = torch.full((len(grid),), -1).masked_scatter_(seen, torch.arange(int(seen.sum())))
    table = torch.randint(-127, 128, (int(seen.sum()), VIT_L), dtype=torch.int8, generator=generator)
    return PointBatch(
        coord=grid.float() * GRID_SIZE,
        grid_coord=grid.int(),
        feat=torch.rand(len(grid), 6, generator=generator),
        offset=torch.tensor([len(grid)]),
        segment=torch.randint(0, CLASSES, (len(grid),), generator=generator),
        features=FeatureRows(table=table, scale=torch.rand(len(table), generator=generator) / 50, index=index),
        names=("room",),
    ).to(device)


def step_of(backbone: str, batch: PointBatch, *, injected: bool, amp: torch.dtype | None = None) -> Step:
    """A function that does one optimiser step and says how many seconds it took."""
    torch.manual_seed(0)
    config = ModelConfig(backbone=BACKBONES[backbone], injection=InjectionConfig() if injected else None)
    model = build_segmentor(config, in_channels=6, num_classes=CLASSES, feature_dim=VIT_L).to(batch.coord.device)
    optimizer = build_optimizer(model, OptimizerConfig())
    kind = batch.coord.device.type

    def step() -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        with nullcontext() if amp is None else torch.autocast(kind, dtype=amp):
            scores = model(batch)
        segmentation_loss(scores, batch.segment).backward()
        optimizer.step()
        if kind == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return step


def alternately(steps: Sequence[Step], rounds: int) -> list[list[float]]:
    """Seconds of each, round by round; two rounds before that build memory pools and choose kernels."""
    return [[step() for step in steps] for _ in range(rounds + 2)][2:]


def peak_memory(backbone: str, points: int, injected: bool) -> int:
    """MiB that two steps of a fresh process take beyond its start, the batch included."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        step = step_of(backbone, room(points, "cuda"), injected=injected)
        step(), step()
        return torch.cuda.max_memory_allocated() >> 20
    child = [sys.executable, __file__, "--points", str(points), "--memory-of", backbone]
    done = subprocess.run([*child, *["--injected"] * injected], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def print_peak_memory(backbone: str, points: int, injected: bool) -> None:
    """What `peak_memory` reads of its child."""
    before = _highest_memory()
    step = step_of(backbone, room(points, "cpu"), injected=injected)
    step(), step()
    print((_highest_memory() - before) // 1024)


def _highest_memory() -> int:
    """KiB; getrusage would hand on the peak of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def measure(backbone: str, points: int, rounds: int) -> tuple[tuple[str, ...], float]:
    """A row of the table, and the ratio of a step with injection to one without."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = room(points, device)
    steps = [step_of(backbone, batch, injected=injected) for injected in (False, True)]
    seconds = alternately(steps, rounds)
    plain = statistics.median(s[0] for s in seconds)
    ratio = statistics.median(s[1] / s[0] for s in seconds)
    config = ModelConfig(backbone=BACKBONES[backbone])
    size = sum(p.numel() for p in build_segmentor(config, in_channels=6, num_classes=CLASSES).parameters())
    memory = [f"{peak_memory(backbone, points, injected):,}" for injected in (False, True)]
    return (backbone, f"{size / 1e6:.1f}", f"{1 / plain:.2f}", f"{plain:.2f}", f"{ratio:.3f}", *memory), ratio


def precisions(points: int, rounds: int) -> list[tuple[str, ...]]:
    """Seconds per step of mixed precision over those of float32, of the sparse backbones on a GPU."""
    batch, kinds = room(points, "cuda"), (None, torch.float16, torch.bfloat16)
    rows = []
    for backbone in BACKBONES:
        seconds = alternately([step_of(backbone, batch, injected=True, amp=amp) for amp in kinds], rounds)
        ratios = [statistics.median(s[i] / s[0] for s in seconds) for i in (1, 2)]
        rows.append((backbone, *(f"{ratio:.3f}" for ratio in ratios)))
    return rows


def libraries(folders: Sequence[str], points: int, rounds: int) -> list[tuple[str, ...]]:
    """Median seconds of a SparseUNet step by the library that is installed and by those in folders, in turns."""
    found: dict[str, list[float]] = {}
    for _ in range(3):
        for folder in ("", *folders):
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
            child = [sys.executable, __file__, "--points", str(points), "--rounds", str(rounds), "--library-child"]
            done = subprocess.run(child, env=environment, capture_output=True, text=True, check=True)
            name, seconds = json.loads(done.stdout.splitlines()[-1])
            found.setdefault(name, []).append(seconds)
    first = next(iter(found.values()))
    return [
        (name, f"{statistics.median(times):.2f}", f"{statistics.median(times) / statistics.median(first):.3f}")
        for name, times in found.items()
    ]


def print_library_step(points: int, rounds: int) -> None:
    """What `libraries` reads of its children: the library's name and its seconds per step."""
    from importlib.metadata import distributions

    from ditr_train.models.sparse_backend import BACKEND, spconv

    folder = str(Path(spconv.__file__).parents[2])
    name = next(
        f"{found.name} {found.version}"
        for found in distributions(path=[folder])
        if found.name.replace("-", "_").startswith(BACKEND)
    )
    seconds = alternately([step_of("SparseUNet", room(points, "cpu"), injected=False)], rounds)
    print(json.dumps([name, statistics.median(s[0] for s in seconds)]))


@click.command()
@click.option("--points", default=20_000, show_default=True, help="Voxels of the room.")
@click.option("--rounds", default=5, show_default=True, help="Measured steps of each kind.")
@click.option("--library", multiple=True, help="Folder with another build of spconv; may be repeated.")
@click.option("--page", type=click.Path(path_type=Path), default=None, help="Keep the figures in this page.")
@click.option("--memory-of", hidden=True, type=click.Choice(list(BACKBONES)))
@click.option("--injected", hidden=True, is_flag=True)
@click.option("--library-child", hidden=True, is_flag=True)
def bench(
    points: int,
    rounds: int,
    library: tuple[str, ...],
    page: Path | None,
    memory_of: str | None,
    injected: bool,
    library_child: bool,
) -> None:
    """Measure every backbone; exit 1 where injection costs more than the goal."""
    if memory_of is not None:
        return print_peak_memory(memory_of, points, injected)
    if library_child:
        return print_library_step(points, rounds)
    console, worst = Console(width=120), 0.0
    table, rows = Table(*HEADS), []
    for backbone in BACKBONES:
        row, ratio = measure(backbone, points, rounds)
        table.add_row(*row)
        rows.append(row)
        worst = max(worst, ratio)
    console.print(table)
    size = len(room(points, "cpu").coord)
    lines = [
        "## Backbones",
        "",
        f"Written by `{' '.join(['python pipelines/bench_backbones.py', *sys.argv[1:]])}`: networks of published size "
        f"on one room of {size:,} voxels, forward, backward and optimiser, float32; injection of {VIT_L}-channel int8 "
        f"rows at the decoder (goal: at most {OVERHEAD_GOAL} of a step without).",
        "",
        f"Machine: {machine()}.",
        "",
        *table_lines(HEADS, rows),
    ]
    if torch.cuda.is_available():
        lines += ["", *table_lines(("step / float32", "fp16", "bf16"), precisions(points, rounds))]
    if library:
        compared = libraries(library, points, rounds)
        lines += ["", *table_lines(("library", "seconds per SparseUNet step", "of the first"), compared)]
        console.print(compared)
    if page is not None:
        write_section(page, "bench_backbones", "\n".join(lines))
    return sys.exit(1) if worst > OVERHEAD_GOAL else None


if __name__ == "__main__":
    bench()
