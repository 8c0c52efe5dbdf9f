"""Farthest point sampling and nearest neighbours in the samples of a batch.

Both are exact. On the CPU they use scipy's k-d tree, elsewhere plain torch, with the same results up to points at equal
distances. No distances between all points and all others are held at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

# Farthest points that are considered at a time: of a few hundred to thousands, the quickest for 24k and 100k points.
_CANDIDATES = 2048
# Distances held at a time.
_PORTION_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


@torch.no_grad()
def farthest_points(coord: Tensor, sizes: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Farthest point sampling: from the first point of a sample on, always the point farthest from those chosen.

    Args:
        coord: [N, 3] float32, finite; the samples of a batch one after the other.
        sizes: points of each sample.
        counts: points to choose of each sample, at most its size, and at least 1 of one that is not empty.

    Returns:
        [sum of counts] int64 rows of `coord`, sample by sample and in the order of choice; no row twice. Of points
        equally far away it takes the first.
    """
    if coord.device.type != "cpu":
        return _farthest_side_by_side(coord, sizes, counts)
    starts = np.cumsum([0, *sizes[:-1]])
    samples = zip(coord.split(list(sizes)), counts, starts, strict=True)
    rows = [_farthest(sample.numpy(), count) + start for sample, count, start in samples if count]
    return torch.from_numpy(np.concatenate(rows))


def _farthest(coord: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Farthest point sampling of one sample, many points a round.

    Distances to the chosen points only shrink. As long as one of a round's candidates is no nearer than they all were
    at its begin, no other point can be the farthest. The points outside are told of the round's choices at its end,
    through a tree: a choice changes only points within the largest distance there was.
    """
    tree = cKDTree(coord)
    distance = _squared(coord, coord[0])  # to the nearest chosen point; -1 of a chosen one
    distance[0] = -1
    chosen = np.zeros(count, np.int64)
    done = 1
    while done < count:
        farthest = distance.max()
        # Choices at least half the search radius apart: few of them are near any point, whatever the outliers.
        floor = max(farthest / 4, np.partition(distance, max(0, len(coord) - _CANDIDATES))[-_CANDIDATES:][0])
        candidates = np.flatnonzero(distance >= floor)
        begin, done = done, _choose(coord[candidates], distance[candidates], floor, candidates, chosen, done)
        new = chosen[begin:done]
        # A little more than the radius, for what rounding makes of equal distances.
        pairs = cKDTree(coord[new]).sparse_distance_matrix(tree, 1.001 * math.sqrt(farthest), output_type="ndarray")
        np.minimum.at(distance, pairs["j"], _squared(coord[pairs["j"]], coord[new[pairs["i"]]]))
        distance[new] = -1
    return chosen


def _choose(
    coord: NDArray[np.float32],
    distance: NDArray[np.float32],
    floor: float,
    rows: NDArray[np.int64],
    chosen: NDArray[np.int64],
    done: int,
) -> int:
    """Writes the rows of the farthest candidates to `chosen[done:]` until none is as far as `floor`; the new `done`."""
    axes = np.ascontiguousarray(coord.T)
    square, total = np.empty_like(distance), np.empty_like(distance)
    while done < len(chosen):
        farthest = distance.argmax()
        if distance[farthest] < floor:
            break
        chosen[done] = rows[farthest]
        done += 1
        # Into buffers, in the order of `_squared`: this loop is most of the time.
        for axis, values in enumerate(axes):
            np.subtract(values, values[farthest], out=square)
            np.multiply(square, square, out=square if axis else total)
            if axis:
                np.add(total, square, out=total)
        np.minimum(distance, total, out=distance)
        distance[farthest] = -1
    return done


def _squared(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    square = (a - b) ** 2
    total: NDArray[np.float32] = square[:, 0] + square[:, 1] + square[:, 2]
    return total


def _farthest_side_by_side(coord: Tensor, sizes: Sequence[int], counts: Sequence[int]) -> Tensor:
    """One choice of every sample per step: on a GPU a step takes as long for all samples as for one."""
    starts = torch.tensor([0, *sizes[:-1]], device=coord.device).cumsum(0)
    places = torch.arange(max(sizes), device=coord.device)
    inside = places < torch.tensor(sizes, device=coord.device)[:, None]
    axes = coord[(starts[:, None] + places).clamp(max=len(coord) - 1)].permute(2, 0, 1).contiguous()
    distance = torch.where(inside, torch.inf, -1.0)
    chosen = torch.zeros(len(sizes), max(counts), dtype=torch.int64, device=coord.device)
    for step in range(max(counts)):
        if step:
            chosen[:, step] = distance.argmax(dim=1)
        last = chosen[:, step, None]
        square = (axes - axes.gather(2, last.expand(3, -1, -1))).square_()
        distance = torch.minimum(distance, square.sum(dim=0)).scatter_(1, last, -1.0)
    wanted = torch.arange(max(counts), device=coord.device) < torch.tensor(counts, device=coord.device)[:, None]
    return (chosen + starts[:, None])[wanted]


@torch.no_grad()
def nearest(
    support: Tensor,
    support_sizes: Sequence[int],
    queries: Tensor,
    query_sizes: Sequence[int],
    k: int,
    radius: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """The nearest points of the same sample around each query, at most `k` of them, nearer than `radius`.

    Args:
        support: [N, 3] float32, finite; the samples of a batch one after the other.
        support_sizes: points of each sample.
        queries: [M, 3] float32 of the same samples.
        query_sizes: queries of each sample.
        k: number of neighbours.
        radius: each query must have a point nearer than this.

    Returns:
        [M, k] int64 rows of `support`, the nearest first, and [M, k] float32 their distances. Where there are fewer
        than `k`, the nearest is repeated with an infinite distance.
    """
    search = _nearest_by_tree if support.device.type == "cpu" else _nearest_in_portions
    indices, distances = [], []
    start = 0
    for points, wanted in zip(support.split(list(support_sizes)), queries.split(list(query_sizes)), strict=True):
        if len(wanted):
            index, distance = search(points, wanted, k, radius)
            index = torch.where(distance.isinf(), index[:, :1], index)
            indices.append(index + start)
            distances.append(distance)
        start += len(points)
    return torch.cat(indices), torch.cat(distances)


def _nearest_by_tree(support: Tensor, queries: Tensor, k: int, radius: float) -> tuple[Tensor, Tensor]:
    """Nearest points of one sample; where there are too few, any index at an infinite distance."""
    distance, index = cKDTree(support.numpy()).query(
        queries.numpy(), k=range(1, k + 1), distance_upper_bound=radius, workers=torch.get_num_threads()
    )
    return torch.from_numpy(index), torch.from_numpy(distance).float()


def _nearest_in_portions(support: Tensor, queries: Tensor, k: int, radius: float) -> tuple[Tensor, Tensor]:
    """As `_nearest_by_tree`, from the distances of a portion of the queries to all points."""
    shape = len(queries), k
    index = torch.zeros(shape, dtype=torch.int64, device=support.device)
    distance = torch.full(shape, torch.inf, device=support.device)
    found = min(k, len(support))
    portion = max(1, _PORTION_ELEMENTS[support.device.type] // len(support))
    for first in range(0, len(queries), portion):
        rows = slice(first, first + portion)
        squared = torch.zeros(1, device=support.device)
        for axis in range(3):  # not by a product of matrices, which loses the small distances
            squared = squared + (queries[rows, axis, None] - support[:, axis]).square_()
        near, index[rows, :found] = squared.topk(found, dim=1, largest=False)
        near = near.sqrt_()
        distance[rows, :found] = near.masked_fill(near >= radius, torch.inf)
    return index, distance
