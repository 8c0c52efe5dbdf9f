"""Measures how many points a second one core links to a view, beside how fast it copies their coordinates.

    OMP_NUM_THREADS=1 python pipelines/bench_links.py [--points 150000 --points 1000000] [--page BENCHMARKS.md]

A room of 6 x 5 x 2.7 m with points on its walls and on boxes in it, and cameras of 560x420. One kind of view stands in
the room, as those of a capture do, and sees few of its points: the figure is of 8 of them in turn. The other stands far
off and has all points in its image, where nothing can be passed over, and its depth map agrees to all: the worst case.
Time is processor time, of all threads together, the least of several turns, so that other work on the machine counts
little. Blocks of points are made once for all views of a sample and timed by themselves.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import numpy as np
from benchmarks_page import machine, table_lines, write_section
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ditr_cache.blocks import PointBlocks
from ditr_cache.geometry import depth_of, inside, morton_order, point_spacing, project, to_camera
from ditr_cache.link import link_view
from ditr_cache.sample import Camera, View
from ditr_cache.schema import LinkSettings

GOAL = 20.0
HEADS = ("points", "camera, occlusion test", "in the room, M tests/s", "all in view, M tests/s", f"met ({GOAL:.0f})")
SIZE = np.array([6.0, 5.0, 2.7])
LENS = {"width": 560, "height": 420, "fx": 480.0, "fy": 480.0, "cx": 280.0, "cy": 210.0}
DEPTH_CAMERA = Camera(width=640, height=480, fx=577.0, fy=577.0, cx=320.0, cy=240.0)
SETTINGS = LinkSettings()
ALL_AGREE = LinkSettings(occlusion_tolerance=50.0)

CAMERAS = {
    "pinhole": Camera(**LENS),
    "radial_tangential": Camera(**LENS, model="radial_tangential", distortion=(-0.2, 0.05, 0.001, -0.001, 0.0)),
    "fisheye": Camera(**LENS, model="fisheye", distortion=(-0.02, 0.005, 0.001, -0.001)),
}
CASES = (
    ("pinhole", "depth"),
    ("pinhole", "z-buffer"),
    ("radial_tangential", "depth"),
    ("radial_tangential", "z-buffer"),
    ("fisheye", "depth"),
    ("fisheye", "z-buffer"),
)


def room(count: int) -> NDArray[np.float32]:
    """[N, 3] points of one density on the walls, and on the boxes, in Morton order."""
    rng = np.random.default_rng(0)
    low = [np.zeros(3), np.array([1.0, 1.0, 0.0]), np.array([3.5, 2.0, 0.0]), np.array([2.0, 3.8, 0.0])]
    size = [SIZE, np.array([1.6, 0.8, 0.75]), np.array([0.9, 1.8, 0.5]), np.array([2.2, 0.6, 2.0])]
    areas = np.array([[np.prod(s) / s[axis] for axis in range(3)] for s in size])
    box, axis = np.divmod(rng.choice(areas.size, count, p=areas.ravel() / areas.sum()), 3)
    within = rng.random((count, 3))
    within[np.arange(count), axis] = rng.integers(0, 2, count)
    coord = (np.array(low)[box] + within * np.array(size)[box]).astype(np.float32)
    return np.ascontiguousarray(coord[morton_order(coord)])


def looking(eye: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """`camera_from_world` of a camera that looks level-headed from one place to another."""
    forward = (at - eye) / np.linalg.norm(at - eye)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = right, np.cross(forward, right), forward
    pose[:3, 3] = -pose[:3, :3] @ eye
    return pose


def poses() -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]]:
    """Of views that stand in the room, and of one that has all of it in its image."""
    rng = np.random.default_rng(1)
    within = [looking(SIZE * (0.4, 0.5, 0.55), rng.random(3) * (6, 5, 1.2)) for _ in range(8)]
    return within, [looking(np.array([3.0, -12.0, 3.0]), SIZE / 2)]


def depth_map(coord: NDArray[np.float32], pose: NDArray[np.float64]) -> NDArray[np.float32]:
    """What a depth camera sees of the points: the nearest of each patch of 8x8 pixels, 0 where there is none."""
    in_camera = to_camera(coord, pose)
    in_camera = in_camera[in_camera[:, 2] > 0]
    u, v = project(in_camera, DEPTH_CAMERA)
    seen = inside(u, v, DEPTH_CAMERA)
    nearest = np.full((DEPTH_CAMERA.height // 8, DEPTH_CAMERA.width // 8), np.inf)
    index = ((v[seen] / 8).astype(int), (u[seen] / 8).astype(int))
    np.minimum.at(nearest, index, depth_of(in_camera, DEPTH_CAMERA)[seen])
    nearest[np.isinf(nearest)] = 0
    return nearest.repeat(8, axis=0).repeat(8, axis=1).astype(np.float32)


def seconds(work: Callable[[], object], turns: int = 15) -> float:
    """Least processor time, of all threads together, for a turn of some work."""
    best = np.inf
    for _ in range(turns):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return float(best)


def views_of(name: str, test: str, coord: NDArray[np.float32], stands: list[NDArray[np.float64]]) -> list[View]:
    """Views with what their occlusion test takes."""
    depths = [depth_map(coord, pose) if test == "depth" else None for pose in stands]
    return [
        View(
            id=str(i),
            camera=CAMERAS[name],
            camera_from_world=pose,
            load_image=lambda: np.zeros((1, 1, 3), np.uint8),  # linking reads no pixels
            depth_camera=None if depth is None else DEPTH_CAMERA,
            load_depth=None if depth is None else lambda depth=depth: depth,
        )
        for i, (pose, depth) in enumerate(zip(stands, depths, strict=True))
    ]


def link_all(blocks: PointBlocks, views: list[View], settings: LinkSettings, spacing: float) -> int:
    """Number of links of some views."""
    return sum(len(link_view(blocks, view, settings, spacing=spacing).point) for view in views)


@click.command()
@click.option("--points", "counts", type=click.IntRange(1000), multiple=True, default=(150_000, 1_000_000))
@click.option("--page", type=click.Path(path_type=Path), default=None, help="Keep the figures in this page.")
def bench(counts: tuple[int, ...], page: Path | None) -> None:
    """Link a room's points; exit 1 where views in the room miss the goal."""
    rows, notes, missed = [], [], False
    for count in counts:
        coord = room(count)
        blocks, spacing = PointBlocks.of(coord), point_spacing(coord)
        made = count / seconds(lambda c=coord: PointBlocks.of(c)) / 1e6
        target = np.empty_like(coord)
        copied = 2 * coord.nbytes / seconds(lambda c=coord, t=target: np.copyto(t, c), 50) / 1e9
        notes.append(
            f"{count:,} points: their coordinates are copied at {copied:.0f} GB/s (read and written; 150,000 "
            "fit the processor's cache), and made into "
            f"blocks, once for all views, at {made:.0f} M points/s; {GOAL:.0f} M tests/s read "
            f"{GOAL * 1e6 * coord.nbytes / count / 1e9:.2f} GB/s of them: arithmetic is the bound, not memory"
        )
        for name, test in CASES:
            figures = []
            within, far_off = poses()
            for stands, settings in ((within, SETTINGS), (far_off, ALL_AGREE if test == "depth" else SETTINGS)):
                views = views_of(name, test, coord, stands)
                link = partial(link_all, blocks, views, settings, spacing)
                tests = count * len(views)
                figures.append((tests / seconds(link) / 1e6, link() / tests))
            met = figures[0][0] >= GOAL
            missed |= not met
            cells = [f"{rate:.1f} ({share:.0%} linked)" for rate, share in figures]
            worst = "yes" if figures[1][0] >= GOAL else "only in the room"
            rows.append((f"{count:,}", f"{name}, {test}", *cells, worst if met else "**no**"))
    table = Table(*HEADS, title="links, one core")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)
    for note in notes:
        print(note)
    if page is not None:
        lines = [
            "## Linking points to views",
            "",
            f"Written by `OMP_NUM_THREADS=1 python pipelines/bench_links.py --page {page}`: processor time, the least "
            "of several turns; every point of a sample counts as a test, also where its whole block is passed over. "
            "Eight views that stand in a room, as those of a capture do; and one that stands far off and has every "
            "point in its image, where nothing can be passed over, with a depth map that agrees to all. Depth maps are "
            "of a camera of their own, as most captures have them. The goal is that of the views in the room.",
            "",
            f"Machine: {machine()}.",
            "",
            *table_lines(HEADS, rows),
            "",
            *(f"- {note}." for note in notes),
        ]
        write_section(page, "bench_links", "\n".join(lines))
    if missed:
        sys.exit(1)


if __name__ == "__main__":
    bench()
