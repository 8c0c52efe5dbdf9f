"""Tiles: squares of the ground plane with a margin of context, none with more voxels than fit.

Each point is predicted once: by the tile whose core holds it. The points of the margin are context only, so that the
network sees past the border of the core, and a border leaves no seam where the margin is wide enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import UsageError
from ditr_train.pointcloud.survey import Cells

MAX_TILE_VOXELS = 250_000
"""Voxels of a tile with its margin, above which it is split: what the network's memory grows with."""

LONGEST_EDGE = 2**17
"""Longest edge of a tile in voxels: positions in it are then exact to 1/64 voxel in float32."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a cloud is cut.

    Args:
        grid_size: edge of a voxel in metres.
        stride: voxels of one site at the network's coarsest resolution.
        edge: longest edge of a tile in metres; None lets the number of voxels decide alone.
        overlap: width of the margin in metres; None: `4 * stride` voxels.
        max_voxels: of a tile with its margin. A tile that cannot get smaller may have more (see `smallest`).

    Raises:
        UsageError: an edge or overlap that cannot be used.
    """

    grid_size: float
    stride: int
    edge: float | None = None
    overlap: float | None = None
    max_voxels: int = MAX_TILE_VOXELS

    def __post_init__(self) -> None:
        if self.overlap is not None and not 0 <= self.overlap < math.inf:
            raise UsageError(f"overlap: expected 0 or more metres, got {self.overlap:g}")
        if self.edge is not None and not self.stride * self.grid_size <= self.edge < math.inf:
            raise UsageError(
                f"tile: expected at least {self.stride * self.grid_size:g} metres (one site of the network's coarsest "
                f"resolution), got {self.edge:g}"
            )
        if self.edge is not None and self.margin > 4 * self.edge:
            raise UsageError(
                f"overlap: expected at most 4 times the tile ({4 * self.edge:g} metres), got {self.margin:g}: nearly "
                "all work would be on context; enlarge --tile"
            )

    @property
    def margin(self) -> float:
        """Width of the margin in metres."""
        return 4 * self.stride * self.grid_size if self.overlap is None else self.overlap

    @property
    def smallest(self) -> float:
        """Edge in metres that is not split further: twice the margin, so that most of a tile is not context."""
        smallest = 2 * max(self.margin, self.stride * self.grid_size)
        return smallest if self.edge is None else min(smallest, self.edge)

    @property
    def cell_size(self) -> float:
        """Edge in metres of the cells in which points are counted: halves of tiles end at a cell's border."""
        wanted = self.smallest / 4
        return wanted if self.edge is None else self.edge / 2 ** math.ceil(math.log2(self.edge / wanted))


@dataclass(frozen=True)
class Tile:
    """One square.

    Args:
        center: x and y of its middle in metres.
        core: points that it predicts.
        points: points that it reads: core and margin.
    """

    center: tuple[float, float]
    core: int
    points: int


@dataclass(frozen=True, kw_only=True, eq=False)
class TilePlan:
    """All tiles of a cloud, and which of them read which cell.

    Args:
        tiles: those whose core holds points.
        cells: the cells.
        core: [M] int64, the tile that predicts the points of each cell.
        starts: [M + 1] int64, where the entries of each cell begin in `readers`.
        readers: [R] int64, the tiles that read each cell.
    """

    tiles: tuple[Tile, ...]
    cells: Cells
    core: NDArray[np.int64]
    starts: NDArray[np.int64]
    readers: NDArray[np.int64]

    def assign(self, coord: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Which tiles read some points [N, 3], sorted by tile and, within one, in the order of the points.

        Returns:
            `tile` [R], `point` [R] positions, and whether the point lies in the tile's core [R].
        """
        cell = self.cells.find(coord)
        count = self.starts[cell + 1] - self.starts[cell]
        point = np.repeat(np.arange(len(cell)), count)
        first = np.repeat(np.cumsum(count) - count, count)
        tile = self.readers[self.starts[cell[point]] + np.arange(len(point)) - first]
        order = np.argsort(tile, kind="stable")
        tile, point = tile[order], point[order]
        return tile, point, self.core[cell[point]] == tile


def plan_tiles(cells: Cells, tiling: Tiling) -> TilePlan:
    """The quad-tree whose leaves are the tiles: a square is split while it is too large or reads too many voxels."""
    corner = cells.index.min(axis=0)
    extent = int((cells.index.max(axis=0) - corner).max()) + 1
    margin = math.ceil(round(tiling.margin / cells.size, 6))
    smallest = max(1, round(tiling.smallest / cells.size))
    longest = tiling.grid_size * LONGEST_EDGE
    longest = longest if tiling.edge is None else min(longest, tiling.edge)
    # Squares of --tile metres begin at the corner of the cloud.
    edge = 1 << (extent - 1).bit_length()
    tiles: list[Tile] = []
    read: list[NDArray[np.int64]] = []
    core = np.zeros(len(cells.index), np.int64)
    everything = np.arange(len(cells.index))
    for low, side, inside in _leaves(cells, corner, edge, everything, margin, smallest, longest, tiling.max_voxels):
        held = _within(cells.index, inside, low, side, 0)
        core[held] = len(tiles)
        middle = cells.anchor + (low + side / 2) * cells.size
        tiles.append(
            Tile(
                center=(float(middle[0]), float(middle[1])),
                core=int(cells.points[held].sum()),
                points=int(cells.points[inside].sum()),
            )
        )
        read.append(inside)
    cell = np.concatenate(read)
    order = np.argsort(cell, kind="stable")
    readers = np.repeat(np.arange(len(tiles)), [len(r) for r in read])[order]
    starts = np.searchsorted(cell[order], np.arange(len(cells.index) + 1))
    return TilePlan(tiles=tuple(tiles), cells=cells, core=core, starts=starts, readers=readers)


def _leaves(
    cells: Cells,
    low: NDArray[np.int64],
    side: int,
    inside: NDArray[np.int64],
    margin: int,
    smallest: int,
    longest: float,
    max_voxels: int,
) -> Iterator[tuple[NDArray[np.int64], int, NDArray[np.int64]]]:
    """Corner and edge (in cells) of the leaves below a square, and the cells that each reads."""
    if not len(_within(cells.index, inside, low, side, 0)):
        return
    many = side > smallest and cells.voxels[inside].sum() > max_voxels
    if side == 1 or not (many or side * cells.size > longest * (1 + 1e-9)):
        yield low, side, inside
        return
    half = side // 2
    for dx in (0, half):
        for dy in (0, half):
            corner = low + np.array([dx, dy])
            below = _within(cells.index, inside, corner, half, margin)
            yield from _leaves(cells, corner, half, below, margin, smallest, longest, max_voxels)


def _within(
    index: NDArray[np.int64], some: NDArray[np.int64], low: NDArray[np.int64], side: int, margin: int
) -> NDArray[np.int64]:
    """Those of `some` cells that lie in a square widened by `margin` cells."""
    at = index[some]
    return some[((at >= low - margin) & (at < low + side + margin)).all(axis=1)]
