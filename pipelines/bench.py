"""Benchmarks: ratios measured in one run on one machine, printed as a table and kept in BENCHMARKS.md.

`make bench` runs all; `python pipelines/bench.py extraction memory training codec` runs those that are named. What is
compared is measured alternately, because machines drift. Works on a GPU, too, where there is one.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import torch
from benchmarks_page import machine, write_section
from rich.console import Console
from rich.table import Table

from ditr_cache import open_cache
from ditr_cache.extract import ExtractRequest, extract, resolve
from ditr_cache.in_process import run_here
from ditr_cache.link import select_views
from ditr_cache.partition import ExtractSettings, PartitionWorker
from ditr_cache.progress import PartitionSummary
from ditr_cache.schema import LinkSettings
from ditr_cache.store import CacheWriter
from ditr_cache.synthesize import RoomsSettings, synthesize
from ditr_cache.timeline import STAGES
from ditr_cache.torchvision_compat import declare_missing_operators
from ditr_cache.vfm import FrozenVFM, VFMRequest

REALDATA = Path(os.environ.get("DITR_REALDATA", Path(__file__).parents[2] / "shared" / "realdata"))
PEAK_MEMORY = """
import resource, sys
from ditr_cache.cli import main
sys.argv = ["ditr-cache", *sys.argv[1:]]
try:
    main()
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)
"""


@dataclass(frozen=True)
class Figure:
    """One row of the table."""

    what: str
    value: str
    goal: str
    met: bool

    @property
    def verdict(self) -> str:
        """Whether the goal is met, where there is one."""
        return "" if self.goal == "-" else "yes" if self.met else "**no**"


def bench_extraction(folder: Path) -> Iterator[Figure]:
    """A whole extraction against the bare forward passes of the same images, alternately, ViT at 420x560."""
    on_gpu = torch.cuda.is_available()
    name = "vit_large_patch14_reg4_dinov2" if on_gpu else "vit_small_patch14_reg4_dinov2"
    scenes = 36 if on_gpu else 6
    synthesize(folder / "rooms", scenes=scenes, workers=os.cpu_count() or 1)
    settings = ExtractSettings(
        dataset="rooms",
        root=str(folder / "rooms"),
        cache=str(folder / "cache"),
        vfm=replace(_random_weights(name, folder), compile=on_gpu),
    )
    dataset, wanted, metadata = resolve(ExtractRequest(settings=settings))
    CacheWriter.create(settings.cache, metadata)
    started = time.perf_counter()
    vfm = FrozenVFM(settings.vfm)
    load = time.perf_counter() - started
    batch = PartitionWorker(settings, vfm, dataset=dataset).batch_size
    ratios, bare_seconds, whole_seconds, images = [], 0.0, 0.0, 0
    stages = dict.fromkeys(STAGES, 0.0)
    for first in range(0, scenes, scenes // 3):
        group = wanted[first : first + scenes // 3]
        views = [view for p in group for view in select_views(dataset.read(p.id), LinkSettings())]
        prepared = [vfm.prepare(view.load_image()) for view in views]
        prepared += prepared[: -len(prepared) % batch]  # whole batches: torch.compile compiles for their size
        vfm.embed(prepared[:batch])
        bare = _timed(
            lambda p=prepared: [vfm.embed(p[i : i + batch]).sum().item() for i in range(0, len(p), batch)]
        ) * (len(views) / len(prepared))
        worker = PartitionWorker(settings, vfm, dataset=dataset)
        summaries: list[PartitionSummary] = []
        whole = _timed(lambda w=worker, g=group, s=summaries: s.extend(run_here(w, g)))
        ratios.append(whole / bare)
        bare_seconds, whole_seconds, images = bare_seconds + bare, whole_seconds + whole, images + len(views)
        for stage in STAGES:
            stages[stage] += sum(summary.stages[stage] for summary in summaries)
    ratio = whole_seconds / bare_seconds
    goal = 1 / 0.95 if on_gpu else 1.10
    yield Figure(
        f"whole extraction / bare forward, {name} 420x560, {images} images at {bare_seconds / images:.3f} s"
        + (", bf16, torch.compile" if on_gpu else ""),
        f"{ratio:.3f} (parts {min(ratios):.3f} to {max(ratios):.3f})",
        f"<= {goal:.2f}",
        ratio <= goal,
    )
    yield Figure(f"the same, with loading the model ({load:.1f} s)", f"{ratio + load / bare_seconds:.3f}", "-", True)
    yield Figure(
        f"seconds per stage, beside each other, of {whole_seconds:.1f} s",
        ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in stages.items()),
        "-",
        True,
    )
    second = ExtractRequest(
        settings=ExtractSettings(
            dataset="rooms", root=settings.root, cache=settings.cache, vfm=VFMRequest(name="efficientnet-lite0")
        ),
        workers=0,
    )
    totals = extract(second, quiet=True)
    yield Figure(
        "second VFM: geometry partitions computed",
        str(totals.geometry["computed"]),
        "0",
        not totals.geometry["computed"],
    )


def bench_memory(folder: Path) -> Iterator[Figure]:
    """Peak memory of extraction over 10 and over 100 rooms."""
    small = RoomsSettings(frames=4, color_size=(160, 120), depth_size=(80, 60), point_spacing=0.1)
    synthesize(folder / "rooms", scenes=100, settings=small, workers=os.cpu_count() or 1)
    peaks = {}
    for scenes in (10, 100):
        arguments = ["extract", "--dataset", "rooms", "--root", folder / "rooms", "--out", folder / f"cache-{scenes}"]
        arguments += [
            "--vfm",
            "efficientnet-lite0",
            "--workers",
            0,
            "--limit",
            scenes,
            "--image-size",
            "240x320",
            "--json",
        ]
        done = subprocess.run(
            [sys.executable, "-c", PEAK_MEMORY, *map(str, arguments)], capture_output=True, text=True, check=True
        )
        peaks[scenes] = int(done.stderr.split()[-1])
    ratio = peaks[100] / peaks[10]
    yield Figure(
        "peak memory of extraction, 100 rooms / 10 rooms",
        f"{ratio:.3f} ({peaks[100]} MiB / {peaks[10]} MiB)",
        "<= 1.10",
        ratio <= 1.1,
    )


def bench_training(folder: Path) -> Iterator[Figure]:
    """A training step with cached features against one without, same network, same points; time waiting for data."""
    from ditr_train.recipe_files import load_recipe
    from ditr_train.trainer import train

    synthesize(folder / "rooms", scenes=12, workers=os.cpu_count() or 1)
    cache = folder / "cache"
    settings = ExtractSettings(
        dataset="rooms",
        root=str(folder / "rooms"),
        cache=str(cache),
        vfm=VFMRequest(name="efficientnet-lite0"),
        codec="int8",
    )
    extract(ExtractRequest(settings=settings, workers=0), quiet=True)
    ratio, seconds = _step_ratio(cache)
    yield Figure(
        f"training step, with cached features / without, same points, alternately ({seconds:.2f} s without)",
        f"{ratio:.3f}",
        "<= 1.15",
        ratio <= 1.15,
    )
    common = [f"cache={cache}", "training.epochs=10", "training.evaluate_every=10", "training.log_every=1"]
    steps: dict[str, list[float]] = {"plain": [], "inject": []}
    waits = []
    for turn in range(2):
        for arm in steps:
            out = folder / f"{arm}-{turn}"
            done = train(load_recipe(f"demo/{arm}", [*common, "data.workers=1"]), out, quiet=True)
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            # The first step builds memory pools, threads and worker processes.
            steps[arm] += [x["seconds_per_step"] for x in lines if x["kind"] == "train"][1:]
            if arm == "inject":
                waits.append(done["data_wait"])
    plain, inject = (statistics.median(steps[arm]) for arm in ("plain", "inject"))
    yield Figure(
        f"the same in whole runs, beside 1 loader worker on the same cores ({inject:.2f} s / {plain:.2f} s)",
        f"{inject / plain:.3f}",
        "-",
        True,
    )
    wait = statistics.median(waits)
    yield Figure("data wait with 1 loader worker, injection, SparseUNet", f"{wait:.1%}", "< 5 %", wait < 0.05)
    for backbone, suffix in (("Point Transformer V3", "ptv3"), ("PointNeXt-S", "pointnext")):
        recipe = load_recipe(f"demo/inject-{suffix}", [*common, "training.epochs=3", "data.workers=1"])
        wait = train(recipe, folder / suffix, quiet=True)["data_wait"]
        yield Figure(f"the same, {backbone}", f"{wait:.1%}", "< 5 %", wait < 0.05)


def _step_ratio(cache: Path) -> tuple[float, float]:
    """Median ratio of a step with features to one without, on the points of one room, and the seconds without."""
    from ditr_train.data.dataset import CachedDataset
    from ditr_train.data.loader import collate
    from ditr_train.losses import segmentation_loss
    from ditr_train.models.build import build_segmentor
    from ditr_train.optim import build_optimizer
    from ditr_train.recipe_files import load_recipe

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps: dict[str, Callable[[], object]] = {}
    for arm in ("plain", "inject"):
        recipe = load_recipe(f"demo/{arm}", [f"cache={cache}"])
        data = CachedDataset(
            open_cache(cache), "train", grid_size=recipe.data.grid_size, feat=recipe.data.feat, vfm=recipe.vfm
        )
        batch = collate([data.train_sample(0, np.random.default_rng(0))]).to(device)
        model = build_segmentor(
            recipe.model,
            in_channels=data.in_channels,
            num_classes=len(data.class_names),
            feature_dim=data.vfm.dim if data.vfm else None,
        ).to(device)
        optimizer = build_optimizer(model, recipe.optimizer)

        def step(model=model, batch=batch, optimizer=optimizer) -> float:
            optimizer.zero_grad()
            loss = segmentation_loss(model(batch), batch.segment)
            loss.backward()
            optimizer.step()
            return loss.item()

        steps[arm] = step
    seconds = [{arm: _timed(step) for arm, step in steps.items()} for _ in range(33)][3:]
    ratio = statistics.median(s["inject"] / s["plain"] for s in seconds)
    return ratio, statistics.median(s["plain"] for s in seconds)


def bench_codec(folder: Path) -> Iterator[Figure]:
    """int8 against float16 rows, and layout views against fused, of efficientnet-lite0 on the real 7-Scenes capture."""
    root = REALDATA / "7scenes" / "room"
    if not root.is_dir():
        yield Figure(
            f"int8 against float16: skipped, {root.name} capture not there (set DITR_REALDATA)", "-", "-", True
        )
        return
    for codec, layout in (("float16", "fused"), ("int8", "fused"), ("int8", "views")):
        settings = ExtractSettings(
            dataset="rgbd",
            root=str(root),
            cache=str(folder / "cache"),
            vfm=VFMRequest(name="efficientnet-lite0"),
            codec=codec,
            layout=layout,
        )
        extract(ExtractRequest(settings=settings, workers=0), quiet=True)
    cache = open_cache(folder / "cache")
    by_codec = {spec.codec: spec.key for spec in cache.vfms.values() if spec.layout == "fused"}
    (views,) = (spec.key for spec in cache.vfms.values() if spec.layout == "views")
    sample = cache.samples[0]
    exact, coded = (cache.read(sample, by_codec[c]) for c in ("float16", "int8"))
    assert exact.feature is not None and coded.feature is not None
    a, b = exact.feature[exact.valid], coded.feature[coded.valid]
    cosine = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    size = {c: _stored_bytes(cache.paths.features(key)) for c, key in by_codec.items()}
    ratio = size["int8"] / size["float16"]
    yield Figure(
        f"int8: mean cosine to float16 rows, 7-Scenes, {len(a)} points (1st percentile {np.percentile(cosine, 1):.5f})",
        f"{cosine.mean():.5f}",
        ">= 0.999",
        float(cosine.mean()) >= 0.999,
    )
    yield Figure("int8: bytes on disk / float16", f"{ratio:.3f}", "<= 0.55", ratio <= 0.55)
    points = sum(sample.points for record in cache.geometry.values() for sample in record.samples)
    per_point = [_stored_bytes(cache.paths.features(key)) / points for key in (views, by_codec["int8"])]
    yield Figure("layout views: bytes per point, int8 (fused)", f"{per_point[0]:.1f} ({per_point[1]:.1f})", "-", True)


BENCHMARKS: dict[str, Callable[[Path], Iterator[Figure]]] = {
    "extraction": bench_extraction,
    "memory": bench_memory,
    "training": bench_training,
    "codec": bench_codec,
}


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(BENCHMARKS)))
@click.option("--out", default="BENCHMARKS.md", type=click.Path(path_type=Path), help="Where the table is kept.")
def bench(names: tuple[str, ...], out: Path) -> None:
    """Run the benchmarks; exit 1 where a goal is missed."""
    figures: list[Figure] = []
    for name in names or BENCHMARKS:
        with tempfile.TemporaryDirectory(prefix=f"ditr-bench-{name}-") as folder:
            figures.extend(BENCHMARKS[name](Path(folder)))
    table = Table("what", "measured", "goal", "met")
    for figure in figures:
        table.add_row(figure.what, figure.value, figure.goal, figure.verdict)
    Console(width=140).print(table)
    if not names:
        write_section(out, "make bench", _section(figures))
    if not all(f.met for f in figures):
        sys.exit(1)


def _section(figures: list[Figure]) -> str:
    rows = "\n".join(f"| {f.what} | {f.value} | {f.goal} | {f.verdict} |" for f in figures)
    return (
        "## Speed, memory and size\n\nWritten by `make bench`. Each figure is a ratio of two things measured "
        f"alternately in one run; absolute times are this machine's.\n\nMachine: {machine()}.\n\n"
        f"| what | measured | goal | met |\n|---|---|---|---|\n{rows}\n"
    )


def _random_weights(architecture: str, folder: Path) -> VFMRequest:
    declare_missing_operators()
    import timm

    path = folder / f"{architecture}.pt"
    torch.manual_seed(0)
    torch.save(timm.create_model(architecture).state_dict(), path)
    return VFMRequest(name=architecture, checkpoint=str(path))


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _stored_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


if __name__ == "__main__":
    bench()
