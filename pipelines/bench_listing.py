"""Measures how long it takes to open and list datasets of 40 000 scans, and the peak memory of that.

    python pipelines/bench_listing.py [nuscenes] [semantickitti] [--part 1.0] [--tmp DIR] [--page BENCHMARKS.md]

nuScenes: tables of v1.0-trainval and v1.0-test as large as the real ones (3.1 million rows of `sample_data` and as many
of `ego_pose`, 2.2 GB), without the files that they name. SemanticKITTI: its tree, of empty files. A process of its own
opens each, lists its partitions, and then describes one sample. All was written just before, so no disk is waited for.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
from benchmarks_page import machine, table_lines, write_section
from rich.console import Console
from rich.table import Table

from ditr_cache.datasets.nuscenes.release import TEST, TRAINVAL, scene_list
from ditr_cache.datasets.nuscenes.tables import CAMERAS, LIDAR
from ditr_cache.datasets.semantickitti.dataset import SCANS

HEADS = ("dataset", "scans", "partitions", "listed in, s", "first sample, s more", "peak memory, MiB", "met")
GOAL_SECONDS, GOAL_MEMORY = 10, 1024

# The files that the sample names are not there: that is found after all that costs time.
LIST = """
import json, re, sys, time
from pathlib import Path
from ditr_cache.datasets import open_dataset
from ditr_cache.datasets.base import partitions
from ditr_cache.errors import CacheError
started = time.perf_counter()
dataset = open_dataset(*sys.argv[1:])
found = partitions(dataset)
listed = time.perf_counter()
try:
    dataset.read(found[0].sample_ids[0])
except CacheError:
    pass
described = time.perf_counter()
# Not ru_maxrss, which begins with the memory of the process that started this one.
memory = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
scans = sum(len(partition.sample_ids) for partition in found)
print(json.dumps([scans, len(found), listed - started, described - listed, memory]))
"""

CHANNELS = {**dict.fromkeys(CAMERAS, 6.0), LIDAR: 10.0, **dict.fromkeys([f"RADAR_{i}" for i in range(5)], 6.3)}
"""Channel -> frames from one sample to the next."""

SAMPLES = {TRAINVAL: 34_149 / 850, TEST: 6_008 / 150}
"""Of a scene, on average."""

Row = dict[str, object]


def write_nuscenes(root: Path, part: float) -> None:
    """The tables that are read, of a part of the scenes."""
    for version, scenes in ((TRAINVAL, [*scene_list("train"), *scene_list("val")]), (TEST, scene_list("test"))):
        (root / version).mkdir(parents=True)
        write_tables(root / version, scenes[: max(1, round(len(scenes) * part))], SAMPLES[version])


def write_tables(folder: Path, scenes: Sequence[str], samples_of_scene: float) -> None:
    """The tables of one release; frames and poses are written scene by scene, within one in no order of time."""
    sensors: list[Row] = [{"token": token(channel), "channel": channel, "modality": ""} for channel in CHANNELS]
    tables: dict[str, list[Row]] = {name: [] for name in ("scene", "calibrated_sensor", "sample", "lidarseg")}
    tables["sensor"] = sensors
    tables["category"] = [{"token": token("car"), "name": "vehicle.car", "description": "", "index": 17}]
    with (folder / "sample_data.json").open("w") as data, (folder / "ego_pose.json").open("w") as poses:
        lead = "[\n"
        for number, scene in enumerate(scenes):
            count = round(samples_of_scene * (number + 1)) - round(samples_of_scene * number)
            samples = [token(scene, k) for k in range(count)]
            tables["scene"].append({"token": token(scene), "name": scene, "nbr_samples": count})
            tables["sample"] += [{"token": s, "timestamp": 0, "scene_token": token(scene)} for s in samples]
            tables["calibrated_sensor"] += [calibration(scene, channel) for channel in CHANNELS]
            frames = [frame for channel in CHANNELS for frame in frames_of(scene, channel, samples)]
            random.Random(number).shuffle(frames)
            for own, row, pose in frames:
                data.write(lead + row)
                poses.write(lead + pose)
                lead = ",\n"
                if f'"samples/{LIDAR}/' in row:
                    tables["lidarseg"].append(
                        {"token": own, "sample_data_token": own, "filename": f"lidarseg/{own}.bin"}
                    )
        data.write("\n]")
        poses.write("\n]")
    for name, rows in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=0))


def calibration(scene: str, channel: str) -> Row:
    """A row of `calibrated_sensor`."""
    intrinsic = [[1266.4, 0.0, 816.3], [0.0, 1266.4, 491.5], [0.0, 0.0, 1.0]] if channel in CAMERAS else []
    return {
        "token": token(scene, channel),
        "sensor_token": token(channel),
        "translation": [1.7007912397384644, 0.01594563201069832, 1.5109575986862183],
        "rotation": [1.0, 0.0, 0.0, 0.0],
        "camera_intrinsic": intrinsic,
    }


def frames_of(scene: str, channel: str, samples: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Token, row of `sample_data` and row of `ego_pose` of every frame of a sensor, as the release formats them."""
    start = 1_530_400_000_000_000 + 40_000_000 * int(scene[-4:])
    step = 500_000 / CHANNELS[channel]
    camera = channel in CAMERAS
    for k in range(round((len(samples) - 1) * CHANNELS[channel]) + 1):
        own, time = token(scene, channel, k), start + round(k * step)
        sample = -(-k // CHANNELS[channel])  # of a sweep: the one that follows
        key = k == round(sample * CHANNELS[channel])
        where = f"{'samples' if key else 'sweeps'}/{channel}/n015-2018-07-24-11-22-45+0800__{channel}__{time}"
        row = {
            "token": own,
            "sample_token": samples[min(int(sample), len(samples) - 1)],
            "ego_pose_token": own,
            "calibrated_sensor_token": token(scene, channel),
            "timestamp": time,
            "fileformat": "jpg" if camera else "pcd",
            "is_key_frame": key,
            "height": 900 * camera,
            "width": 1600 * camera,
            "filename": f"{where}.{'jpg' if camera else 'pcd.bin'}",
            "prev": own,
            "next": own,
        }
        pose = {
            "token": own,
            "timestamp": time,
            "rotation": [0.5720063475748449, -0.0021434842496863434, 0.011564094807842484, -0.8201648709379306],
            "translation": [411.41997584800345 + k, 1181.197177405937, 0.0],
        }
        yield own, json.dumps(row, indent=0), json.dumps(pose, indent=0)


def token(*parts: object) -> str:
    """32 hexadecimal digits."""
    return hashlib.md5("|".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


def write_semantickitti(root: Path, part: float) -> None:
    """All files of the tree, empty, of the first scans of every sequence."""
    for sequence, scans in SCANS.items():
        folder = root / "dataset" / "sequences" / sequence
        kinds = {"velodyne": "bin", "image_2": "png"} | ({"labels": "label"} if sequence <= "10" else {})
        for kind, suffix in kinds.items():
            (folder / kind).mkdir(parents=True)
            for scan in range(max(1, round(scans * part))):
                (folder / kind / f"{scan:06d}.{suffix}").touch()


DATASETS: dict[str, Callable[[Path, float], None]] = {"nuscenes": write_nuscenes, "semantickitti": write_semantickitti}


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(DATASETS)))
@click.option("--part", type=click.FloatRange(0, 1), default=1.0, show_default=True, help="Of the real size.")
@click.option("--tmp", type=click.Path(path_type=Path), default=None, help="Where the trees are made; 2.3 GB.")
@click.option("--page", type=click.Path(path_type=Path), default=None, help="Keep the figures in this page.")
def bench(names: tuple[str, ...], part: float, tmp: Path | None, page: Path | None) -> None:
    """List large datasets; exit 1 where a goal is missed."""
    rows, missed = [], False
    for name in names or DATASETS:
        with tempfile.TemporaryDirectory(prefix="ditr-bench-listing-", dir=tmp) as folder:
            DATASETS[name](Path(folder), part)
            done = subprocess.run(
                [sys.executable, "-c", LIST, name, folder], capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(done.stderr)
        scans, count, listed, described, memory = json.loads(done.stdout)
        met = listed < GOAL_SECONDS and memory < GOAL_MEMORY
        missed |= not met
        figures = (f"{scans:,}", f"{count:,}", f"{listed:.1f}", f"{described:.1f}", f"{memory:,}")
        rows.append((name, *figures, "yes" if met else "**no**"))
    table = Table(*HEADS, title="listing")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
    if page is not None:
        lines = [
            "## Listing large datasets",
            "",
            f"Written by `python pipelines/bench_listing.py --page {page}`: generated trees of the releases' size, "
            "read from memory and not from disk. "
            f"Goals: {GOAL_SECONDS} s, {GOAL_MEMORY} MiB. A worker opens its dataset once.",
            "",
            f"Machine: {machine()}.",
            "",
            *table_lines(HEADS, rows),
        ]
        write_section(page, "bench_listing", "\n".join(lines))
    if missed:
        sys.exit(1)


if __name__ == "__main__":
    bench()
