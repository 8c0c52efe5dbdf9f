"""Measures how fast feature rows are read for training, beside `np.load` and `torch.load` of the same rows.

    OMP_NUM_THREADS=1 python pipelines/bench_reading.py [--scenes 12] [--dim 384 --dim 1024] [--page BENCHMARKS.md]

Each scene has 60 000 points of a room in Morton order, every one with a row of its own (layout fused). A row is a mix
of 64 directions that changes slowly from point to point, plus noise: next to no row repeats, so compression finds as
little as it can. All contenders hold the same rows: `.npy` files of float16; files as OpenScene has them (`feat`, half,
and `mask_full`); the cache in float16 and in int8. They take turns in one to four processes, and every figure is a
ratio within one run, of the least of several turns, so that other work on the machine counts little. Cold means that
the pages of all files were dropped from memory first, which `posix_fadvise` does without privileges; what came from the
disk is counted. Processor time is that of all threads together, in the system as well.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
import zarr
from bench_links import room
from benchmarks_page import machine, table_lines, write_section
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ditr_cache import open_cache
from ditr_cache.cached import StoredFeatures
from ditr_cache.codecs import make_codec
from ditr_cache.schema import CacheMetadata, LinkSettings, SampleInfo, VFMSpec, ViewInfo
from ditr_cache.store import CacheReader, CacheWriter
from ditr_train.data.dataset import CachedDataset, used_rows
from ditr_train.data.spatial import SphereCrop

GOAL = 1.0
VIEWS, TOKENS_PER_VIEW, SEEN = 24, 30 * 40, 0.35
CROP = 0.2
SMALL = 8_000
"""Points of the scenes that are read again and again."""


@dataclass(frozen=True)
class Contender:
    """One way to read the rows of a scene."""

    name: str
    files: tuple[Path, ...]
    read: Callable[[int], object]


def spec_of(dim: int, codec: str, layout: str = "fused") -> VFMSpec:
    """Of a VFM that never ran."""
    return VFMSpec(
        name=f"rows-{codec}-{layout}", architecture="none", weights_sha256="0" * 64, tap="norm", norm=True,
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", image_size=(420, 560), grid=(30, 40),
        dim=dim, layout=layout, fuse="mean" if layout == "fused" else "none", codec=codec,
    )  # fmt: skip


def features(count: int, dim: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """[T, C] rows of 64 directions of falling weight, alike from one row to the next, and of noise."""
    directions = rng.normal(size=(64, dim)).astype(np.float32) / np.sqrt(np.arange(1, 65, dtype=np.float32))[:, None]
    knots = rng.normal(size=(count // 16 + 2, 64)).astype(np.float32)
    knot, part = np.divmod(np.arange(count, dtype=np.float32) / 16, 1)
    at, along = knot.astype(int), part[:, None]
    rows = (knots[at] * (1 - along) + knots[at + 1] * along) @ directions
    return rows + rng.normal(size=rows.shape).astype(np.float32) * np.float32(0.3 * rows.std())


def links_of(points: int, rng: np.random.Generator) -> tuple[list[NDArray[np.uint32]], list[NDArray[np.int64]]]:
    """Of each view the points that it sees, runs of neighbours, and the token of each."""
    seen, tokens = [], []
    for _ in range(VIEWS):
        start = rng.integers(0, points)
        point = np.sort((start + np.arange(int(SEEN * points))) % points).astype(np.uint32)
        seen.append(point)
        tokens.append(np.arange(len(point)) * TOKENS_PER_VIEW // len(point))
    return seen, tokens


def write_scenes(folder: Path, scenes: int, points: int, dim: int, *, beside: bool = True) -> None:
    """A cache with features of every codec and layout, and `beside` it the files of the others."""
    metadata = CacheMetadata(dataset="bench", class_names=("a",), class_colors=((0, 0, 0),), links=LinkSettings())
    writer = CacheWriter.create(folder / "cache", metadata)
    specs = [spec_of(dim, "float16"), spec_of(dim, "int8"), spec_of(dim, "int8", "views")]
    for number in range(scenes):
        rng = np.random.default_rng(number)
        name, coord = f"scene-{number:04d}", room(points)
        seen, tokens = links_of(points, rng)
        views = tuple(ViewInfo(id=f"v{i}", links=len(s)) for i, s in enumerate(seen))
        info = SampleInfo(id=name, split="train", points=points, linked_points=points, views=views)
        link_point = np.concatenate(seen)
        arrays = {
            "coord": coord,
            "color": rng.integers(0, 256, (points, 3), dtype=np.uint8),
            "segment": np.zeros(points, np.int16),
            "source_index": rng.permutation(points).astype(np.uint32),
            "offset": np.array([points], np.int64),
            "link_point": link_point,
            "link_uv": rng.integers(0, 65536, (len(link_point), 2)).astype(np.uint16),
            "link_depth": rng.uniform(0.5, 5, len(link_point)).astype(np.float16),
        }
        record = writer.commit_geometry(name, [info], arrays)
        rows, every = features(points, dim, rng), np.arange(points, dtype=np.int32)
        for spec in specs:
            encoder, table, index = make_codec(spec.codec, dim), rows, every
            if spec.layout == "views":
                table = features(VIEWS * TOKENS_PER_VIEW, dim, rng)
                index = np.concatenate([t + i * TOKENS_PER_VIEW for i, t in enumerate(tokens)]).astype(np.int32)
            writer.commit_features(spec, record, encoder.encode(table), index, images=VIEWS)
        if beside:
            half = rows.astype(np.float16)
            np.save(folder / f"{name}.npy", half)
            feat = {"feat": torch.from_numpy(half), "mask_full": torch.ones(points, dtype=torch.bool)}
            torch.save(feat, folder / f"{name}.pt")
    os.sync()


def contenders(folder: Path, reader: CacheReader) -> list[Contender]:
    """The ways to read all rows of a scene; `np.load` is the first."""
    npy, pt = sorted(folder.glob("*.npy")), sorted(folder.glob("*.pt"))
    found = [
        Contender("np.load, float16", tuple(npy), lambda i: np.load(npy[i])),
        Contender("torch.load, float16", tuple(pt), lambda i: torch.load(pt[i], weights_only=True)["feat"]),
    ]
    for codec in ("float16", "int8"):
        stored = [stored_of(reader, sample, codec) for sample in reader.samples]
        found.append(
            Contender(
                f"cache, {codec}",
                tuple(p for i in range(len(stored)) for p in shards(reader, i, codec)),
                lambda i, stored=stored: stored[i].take(np.arange(stored[i].rows)),  # type: ignore[misc]
            )
        )
    return found


def stored_of(reader: CacheReader, sample: str, codec: str, layout: str = "fused") -> StoredFeatures:
    """The features of a scene, of which no row was read yet."""
    view = "random" if layout == "views" else None
    rng = np.random.default_rng(0) if view else None
    found = reader.read_stored(sample, f"rows-{codec}-{layout}", view=view, rng=rng).features
    assert found is not None
    return found


def shards(reader: CacheReader, scene: int, codec: str, layout: str = "fused") -> list[Path]:
    """The files of the rows of a scene."""
    spec = reader.resolve_vfm(f"rows-{codec}-{layout}")
    folder = reader.paths.arrays(reader.paths.features(spec.key), reader.samples[scene])
    assert isinstance(folder, Path)
    return sorted(p for name in ("table", "scale") for p in (folder / name / "c").rglob("*") if p.is_file())


# --- taking turns ---------------------------------------------------------------------------------------------------

_reads: dict[str, Callable[[int], object]] = {}  # of this process and its forks


def _read_one(task: tuple[str, int]) -> int:
    """Bytes that one read took from the disk."""
    before = io_of("read_bytes")
    _reads[task[0]](task[1])
    return io_of("read_bytes") - before


def io_of(name: str) -> int:
    """A counter of this process: `rchar`, bytes read from files, `read_bytes`, bytes read from disks."""
    found = re.search(rf"^{name}: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def drop(files: Sequence[Path]) -> None:
    """Drop the pages of files from memory."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def turns(
    ways: Sequence[Contender], scenes: int, processes: int, rounds: int, *, cold: bool
) -> dict[str, tuple[float, int]]:
    """Least seconds to read all scenes, and bytes that came from the disk, of each way."""
    _reads.update({way.name: way.read for way in ways})
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    disk = dict.fromkeys(seconds, 0)
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for turn in range(rounds + 1):
            for way in ways:
                if cold:
                    drop(way.files)
                started = time.perf_counter()
                got = pool.map(_read_one, [(way.name, i) for i in range(scenes)], chunksize=1)
                if turn:  # the first warms up
                    seconds[way.name].append(time.perf_counter() - started)
                    disk[way.name] = sum(got)
    return {name: (min(values), disk[name]) for name, values in seconds.items()}


def processor_times(ways: Sequence[Contender], scenes: int, rounds: int) -> dict[str, float]:
    """Least processor time, all threads together, to read all scenes in this process."""
    spent: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            started = processor_time()
            for i in range(scenes):
                way.read(i)
            spent[way.name].append(processor_time() - started)
    return {name: min(values) for name, values in spent.items()}


def processor_time() -> float:
    """Seconds that this process has computed."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# --- tables ---------------------------------------------------------------------------------------------------------

WHOLE = ("rows", "read by", "memory, 1", "2", "4 processes", "disk, 1", "2", "4 processes", "processor time", "bytes")
PARTS = ("rows", "layout", "read", "bytes read / of the table", "processor time / of all rows")


def whole_tables(
    folder: Path, reader: CacheReader, dim: int, scenes: int, rounds: int
) -> tuple[list[tuple[str, ...]], bool]:
    """Rows a second of each way relative to `np.load`, and whether int8 met the goal."""
    ways = contenders(folder, reader)
    speed: dict[str, list[float]] = {way.name: [] for way in ways}
    for cold in (False, True):
        for processes in (1, 2, 4):
            took = turns(ways, scenes, processes, rounds, cold=cold)
            for way in ways:
                speed[way.name].append(took[ways[0].name][0] / took[way.name][0])
                size = sum(p.stat().st_size for p in way.files)
                if cold and took[way.name][1] < 0.9 * size:
                    raise SystemExit(f"{way.name}: {took[way.name][1]} of {size} bytes came from the disk: not cold")
    cpu = processor_times(ways, scenes, rounds)
    size = {way.name: sum(p.stat().st_size for p in way.files) for way in ways}
    base = ways[0].name
    rows = [
        (
            f"{dim}", name, *(f"{s:.2f}" for s in ratios), f"{cpu[base] / cpu[name]:.2f}",
            f"{size[name] / size[base]:.2f}",
        )
        for name, ratios in speed.items()
    ]  # fmt: skip
    return rows, min(speed["cache, int8"]) >= GOAL


def other_pipelines(reader: CacheReader, scenes: int, rounds: int) -> list[tuple[str, float]]:
    """Processor time of zarr itself, and with `zarrs` where installed, on the int8 tables, over that of the reader."""
    spec = reader.resolve_vfm("rows-int8-fused")
    folder = reader.paths.features(spec.key)
    tables = [str(reader.paths.arrays(folder, sample) / "table") for sample in reader.samples]
    stored = [stored_of(reader, sample, "int8") for sample in reader.samples]
    ways = [Contender("cache", (), lambda i: stored[i].take(np.arange(stored[i].rows)))]
    pipelines = {"zarr": "zarr.core.codec_pipeline.BatchedCodecPipeline"}
    if importlib.util.find_spec("zarrs"):
        pipelines["zarr with zarrs"] = "zarrs.ZarrsCodecPipeline"
    for name, path in pipelines.items():
        with zarr.config.set({"codec_pipeline.path": path}):
            opened = [zarr.open_array(table, mode="r") for table in tables]
        ways.append(Contender(name, (), lambda i, opened=opened: opened[i][...]))  # type: ignore[misc]
    spent = processor_times(ways, scenes, rounds)
    return [(name, spent[name] / spent["cache"]) for name in pipelines]


def parts_table(reader: CacheReader, dim: int, scenes: int, rounds: int) -> list[tuple[str, ...]]:
    """What crops, and views drawn at random, read of a table."""
    rows = []
    coord = reader.read_stored(reader.samples[0], None).coord
    keep = SphereCrop(rate=CROP).keep(coord, np.random.default_rng(1))
    assert keep is not None
    sphere = np.zeros(len(coord), dtype=bool)
    sphere[keep] = True
    for layout in ("fused", "views"):
        stored = [stored_of(reader, sample, "int8", layout) for sample in reader.samples]
        size = sum(p.stat().st_size for i in range(scenes) for p in shards(reader, i, "int8", layout))
        for what, points in (("all points", np.ones_like(sphere)), (f"sphere of {CROP:.0%} of the points", sphere)):
            used = [used_rows(s.index[points].astype(np.int64), s.rows)[0] for s in stored]
            spent = processor_times(
                [
                    Contender("all", (), lambda i, s=stored: s[i].take(np.arange(s[i].rows))),  # type: ignore[misc]
                    Contender("part", (), lambda i, s=stored, u=used: s[i].take(u[i])),  # type: ignore[misc]
                ],
                scenes,
                rounds,
            )
            before = io_of("rchar")
            for s, wanted in zip(stored, used, strict=True):
                s.take(wanted)
            share = (io_of("rchar") - before) / size
            drawn = sum(map(len, used)) / sum(s.rows for s in stored)
            rows.append(
                (
                    f"{dim}",
                    layout,
                    f"{what}: {drawn:.0%} of the rows",
                    f"{share:.2f}",
                    f"{spent['part'] / spent['all']:.2f}",
                )
            )
    return rows


def sample_lines(reader: CacheReader, dim: int, scenes: int, rounds: int) -> list[str]:
    """What share of making a training sample is reading."""
    lines = []
    for title, crop in (("whole scenes", None), (f"crops of {CROP:.0%}", CROP)):
        times = {}
        for vfm in ("rows-int8-fused", None):
            data = CachedDataset(
                reader, "train", grid_size=0.02, feat=("coord", "color"), vfm=vfm, crop_rate=crop, centred=True
            )
            way = Contender("made", (), lambda i, data=data: data.train_sample(i, np.random.default_rng(i)))  # type: ignore[misc]
            times[vfm] = processor_times([way], scenes, rounds)["made"]
        share = 1 - times[None] / times["rows-int8-fused"]
        lines.append(
            f"- Rows of {dim} channels in int8, {title}: {share:.0%} of the processor time of "
            "`CachedDataset.train_sample` (no augmentation) is for features."
        )
    return lines


@contextmanager
def growth(reads: int, lines: list[str]) -> Iterator[None]:
    """Memory and open files after what is done here, beside those before."""

    def state() -> tuple[int, int]:
        found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) // 1024, len(list(Path("/proc/self/fd").iterdir()))

    before = state()
    yield
    after = state()
    lines.append(
        f"- {reads:,} reads of a scene of {SMALL:,} points, after 500 to warm up: memory {before[0]} MiB before, "
        f"{after[0]} MiB after; open files {before[1]} before, {after[1]} after."
    )


@click.command()
@click.option("--scenes", type=click.IntRange(1), default=12, show_default=True)
@click.option("--points", type=click.IntRange(1000), default=60_000, show_default=True, help="Of a scene.")
@click.option("--dim", "dims", type=click.IntRange(1), multiple=True, default=(384, 1024), show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Turns of each contender.")
@click.option("--reads", type=click.IntRange(0), default=10_000, show_default=True, help="To look for growth.")
@click.option("--tmp", type=click.Path(path_type=Path), default=None, help="Where the files are made.")
@click.option("--page", type=click.Path(path_type=Path), default=None, help="Keep the figures in this page.")
def bench(
    scenes: int, points: int, dims: tuple[int, ...], rounds: int, reads: int, tmp: Path | None, page: Path | None
) -> None:
    """Read rows in every way; exit 1 where int8 is slower than `np.load` of float16."""
    torch.set_num_threads(1)
    whole, parts, lines, met = [], [], [], True
    for dim in dims:
        with tempfile.TemporaryDirectory(prefix="ditr-bench-reading-", dir=tmp) as folder:
            write_scenes(Path(folder), scenes, points, dim)
            reader = open_cache(Path(folder) / "cache")
            rows, good = whole_tables(Path(folder), reader, dim, scenes, rounds)
            whole += rows
            met &= good
            parts += parts_table(reader, dim, scenes, rounds)
            lines += sample_lines(reader, dim, scenes, rounds)
            for name, ratio in other_pipelines(reader, scenes, rounds):
                lines.append(
                    f"- The int8 tables of {dim} channels by {name}: {ratio:.1f} x the reader's processor time."
                )
    if reads:
        with tempfile.TemporaryDirectory(prefix="ditr-bench-reading-", dir=tmp) as folder:
            write_scenes(Path(folder), 4, SMALL, 384, beside=False)
            reader = open_cache(Path(folder) / "cache")

            def read(count: int) -> None:
                for i in range(count):
                    stored = reader.read_stored(reader.samples[i % 4], "rows-int8-fused").features
                    assert stored is not None and stored.table.shape == (SMALL, 384)

            read(500)
            with growth(reads, lines):
                read(reads)
    for heads, found in ((WHOLE, whole), (PARTS, parts)):
        table = Table(*heads)
        for row in found:
            table.add_row(*row)
        Console(width=150).print(table)
    print("\n".join(lines))
    if page is not None:
        write_page(page, scenes, points, rounds, whole, parts, lines)
    if not met:
        raise SystemExit(1)


def write_page(
    page: Path,
    scenes: int,
    points: int,
    rounds: int,
    whole: Sequence[tuple[str, ...]],
    parts: Sequence[tuple[str, ...]],
    lines: Sequence[str],
) -> None:
    """Keep the figures."""
    text = [
        "## Reading features",
        "",
        f"Written by `OMP_NUM_THREADS=1 python pipelines/bench_reading.py --scenes {scenes} --page {page}`: {scenes} "
        f"scenes of {points:,} points, each "
        "with a row of its own, made of 64 directions and noise, so that hardly any row repeats; rows of real scenes "
        f"repeat more. Rows a second relative to `np.load` of float16 files (goal for int8: {GOAL:.1f}), the best of "
        f"{rounds} turns, read from memory and from the disk, whose pages were dropped first. Processor time in one "
        "process, likewise; bytes on disk relative to the `.npy` files.",
        "",
        f"Machine: {machine()}.",
        "",
        *table_lines(WHOLE, whole),
        "",
        "Parts of a table, and what a training sample spends on features:",
        "",
        *table_lines(PARTS, parts),
        "",
        *lines,
    ]
    write_section(page, "bench_reading", "\n".join(text))


if __name__ == "__main__":
    bench()
