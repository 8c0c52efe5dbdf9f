"""Measures dask where one machine ends: the scheduler's memory over 100 000 partitions, and how workers share the work.

    python pipelines/bench_dask.py [flat] [workers] [--partitions 100000] [--page BENCHMARKS.md]

Scheduler and workers are processes of their own, started with the stock commands `dask scheduler` and `dask worker
ADDRESS --nthreads 1 --resources GPU=1`, one torch thread each. `flat` distributes partitions that do nothing to two
workers, and looks at the scheduler and at the client (this process) after 1 %, 10 % and all of them. `workers` extracts
the same generated rooms with one worker and with two, alternately. What the two workers cost is also given in CPU
seconds, which tell the same where other programs want the cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Self

import click
import distributed
import psutil
import torch
from benchmarks_page import machine, table_lines, write_section
from rich.console import Console
from rich.table import Table

from ditr_cache.datasets.base import Partition
from ditr_cache.executors import IN_FLIGHT_PER_WORKER, distribute
from ditr_cache.extract import ExtractRequest, extract
from ditr_cache.partition import ExtractSettings
from ditr_cache.progress import PartitionSummary, RunTotals
from ditr_cache.synthesize import RoomsSettings, synthesize
from ditr_cache.torchvision_compat import declare_missing_operators
from ditr_cache.vfm import VFMRequest

MOST_BYTES, LEAST_SPEEDUP = 1000, 1.8
FLAT_HEADS = ("partitions", "ms per partition", "tasks known to the scheduler", "scheduler, MiB", "client, MiB", "met")
WORKERS_HEADS = ("workers", "seconds", "speed-up", "CPU seconds of the workers", "ratio", "met")
REPEATS = 2
ROOMS = RoomsSettings(frames=6, color_size=(320, 240), depth_size=(160, 120), point_spacing=0.1)
MODEL, IMAGE_SIZE = "vit_small_patch14_reg4_dinov2", (280, 392)

Rows = list[tuple[str, ...]]


class Cluster:
    """A scheduler and workers, each started by its command, in a folder of their own."""

    def __init__(self, folder: Path, workers: int) -> None:
        self._folder = folder
        folder.mkdir()
        file = folder / "scheduler.json"
        here = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        self.scheduler = self._start("scheduler", *here, "--scheduler-file", str(file))
        while not file.exists():
            time.sleep(0.05)
        self.address: str = json.loads(file.read_text())["address"]
        started = [
            self._start("worker", self.address, "--nthreads", "1", "--resources", "GPU=1", "--no-dashboard")
            for _ in range(workers)
        ]
        self._processes = [*started, self.scheduler]
        self._workers = workers

    def __enter__(self) -> Self:
        with distributed.Client(self.address) as client:
            client.wait_for_workers(self._workers)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait()

    def cpu_seconds(self) -> float:
        """Used by the workers until now."""
        workers = [child for p in self._processes[:-1] for child in psutil.Process(p.pid).children(recursive=True)]
        return sum(sum(worker.cpu_times()[:2]) for worker in workers)

    def _start(self, command: str, *arguments: str) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "dask", command, *arguments]
        quiet = subprocess.DEVNULL
        return subprocess.Popen(line, stdout=quiet, stderr=quiet, cwd=self._folder)


def nothing(partition: Partition) -> PartitionSummary:
    """What a partition costs that needs no work."""
    return PartitionSummary(partition=partition.id, status="done", geometry="computed", images=1, points=1, bytes=1)


def tasks_of(dask_scheduler: Any) -> int:
    """Tasks, kinds of task and groups of tasks that the scheduler keeps."""
    return len(dask_scheduler.tasks) + len(dask_scheduler.task_prefixes) + len(dask_scheduler.task_groups)


def bench_flat(folder: Path, count: int) -> tuple[str, Rows, bool]:
    """Memory of the scheduler and of the client while partitions that do nothing pass through."""
    partitions = (Partition(f"scene{i:06d}_00", (f"scene{i:06d}_00",)) for i in range(count))
    marks = {count // 100, count // 10, count}
    figures: list[tuple[int, float, int, int, int]] = []
    totals = RunTotals()
    with Cluster(folder / "flat", workers=2) as cluster, distributed.Client(cluster.address) as client:
        scheduler, own = psutil.Process(cluster.scheduler.pid), psutil.Process()
        started = time.perf_counter()
        for summary in distribute(client, nothing, partitions, resources={"GPU": 1}):
            totals.add(summary)
            if totals.finished in marks:
                each = 1000 * (time.perf_counter() - started) / totals.finished
                memory = scheduler.memory_info().rss >> 20, own.memory_info().rss >> 20
                figures.append((totals.finished, each, client.run_on_scheduler(tasks_of), *memory))
    early, last = figures[-2], figures[-1]
    growth = [(last[i] - early[i]) * 2**20 / (last[0] - early[0]) for i in (3, 4)]
    # Three more: the kind, the group, and the task that keeps the group.
    good = last[2] <= 2 * IN_FLIGHT_PER_WORKER + 3 and max(growth) <= MOST_BYTES
    rows = [(f"{n:,}", f"{ms:.1f}", str(tasks), f"{s:,}", f"{c:,}", "") for n, ms, tasks, s, c in figures]
    rows[-1] = (*rows[-1][:-1], verdict(good))
    text = (
        f"Partitions that do nothing, distributed to 2 workers. Goals: at most {2 * IN_FLIGHT_PER_WORKER} tasks, and "
        f"3 entries beside them, known at a time; less than {MOST_BYTES} bytes a partition, which is what dask's cache "
        "of names takes (`dask.utils.key_split`, the last 100 000 of all keys), and nothing after it is full."
    )
    return text, rows, good


def bench_workers(folder: Path, rooms: int) -> tuple[str, Rows, bool]:
    """The same extraction with one worker and with two, alternately, into new caches."""
    synthesize(folder / "rooms", scenes=rooms, settings=ROOMS)
    vfm = VFMRequest(name=MODEL, checkpoint=str(random_weights(folder)), image_size=IMAGE_SIZE, device="cpu")
    seconds: dict[int, list[float]] = {1: [], 2: []}
    cpu: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(2 * REPEATS):
        workers = turn % 2 + 1
        settings = ExtractSettings(
            dataset="rooms", root=str(folder / "rooms"), cache=str(folder / f"cache-{turn}"), vfm=vfm
        )
        first = replace(settings, cache=str(folder / f"first-{turn}"))
        with Cluster(folder / f"cluster-{turn}", workers) as cluster:
            # Imports torch on every worker, which takes long beside a few rooms.
            extract(ExtractRequest(settings=first, limit=1, scheduler=cluster.address), quiet=True)
            before, started = cluster.cpu_seconds(), time.perf_counter()
            totals = extract(ExtractRequest(settings=settings, scheduler=cluster.address), quiet=True)
            seconds[workers].append(time.perf_counter() - started)
            cpu[workers].append(cluster.cpu_seconds() - before)
        if totals.partitions["done"] != rooms:
            sys.exit(f"extraction failed: {totals.to_dict()}")
    speedup = median(seconds[1]) / median(seconds[2])
    dearer = median(cpu[2]) / median(cpu[1])
    good = speedup >= LEAST_SPEEDUP
    text = (
        f"{rooms} generated rooms of {ROOMS.frames} images, {MODEL} at {IMAGE_SIZE[0]}x{IMAGE_SIZE[1]}; medians of "
        f"{REPEATS} runs each, alternately, all of `extract` from its call to its end, torch imported before. Goal: "
        f"{LEAST_SPEEDUP} times as quick with 2 workers on 2 free cores."
    )
    rows = [
        ("1", f"{median(seconds[1]):.1f}", "1.00", f"{median(cpu[1]):.1f}", "1.00", ""),
        ("2", f"{median(seconds[2]):.1f}", f"{speedup:.2f}", f"{median(cpu[2]):.1f}", f"{dearer:.2f}", verdict(good)),
    ]
    return text, rows, good


def verdict(good: bool) -> str:
    """As the page shows it."""
    return "yes" if good else "**no**"


def random_weights(folder: Path) -> Path:
    """Of the model, without download."""
    declare_missing_operators()
    import timm

    torch.manual_seed(0)
    torch.save(timm.create_model(MODEL).state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(["flat", "workers"]))
@click.option("--partitions", default=100_000, show_default=True, type=click.IntRange(min=100), help="That do nothing.")
@click.option("--rooms", default=32, show_default=True, type=click.IntRange(min=2), help="That are extracted.")
@click.option("--page", type=click.Path(path_type=Path), default=None, help="Keep the figures in this page.")
def bench(names: tuple[str, ...], partitions: int, rooms: int, page: Path | None) -> None:
    """Measure; exit 1 where a goal is missed."""
    missed = False
    for name in names or ("flat", "workers"):
        with tempfile.TemporaryDirectory(prefix="ditr-bench-dask-") as folder:
            if name == "flat":
                title, heads = "Dask: a scheduler that stays flat", FLAT_HEADS
                text, rows, good = bench_flat(Path(folder), partitions)
            else:
                title, heads = "Dask: more workers", WORKERS_HEADS
                text, rows, good = bench_workers(Path(folder), rooms)
        missed |= not good
        table = Table(*heads, title=title)
        for row in rows:
            table.add_row(*row)
        Console(width=120).print(table)
        if page is not None:
            written = f"Written by `python pipelines/bench_dask.py {name} --page {page}`."
            lines = [
                f"## {title}",
                "",
                f"{written} {text}",
                "",
                f"Machine: {machine()}.",
                "",
                *table_lines(heads, rows),
            ]
            write_section(page, f"bench_dask {name}", "\n".join(lines))
    if missed:
        sys.exit(1)


if __name__ == "__main__":
    bench()
