from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditr_train.models import neighbors
from ditr_train.models.neighbors import farthest_points, nearest


def surfaces(seed: int, count: int) -> Tensor:
    """Points on the walls of a room, as crowded and as empty in places as scans are."""
    generator = np.random.default_rng(seed)
    coord = generator.uniform(0, 5, (count, 3))
    coord[np.arange(count), generator.integers(0, 3, count)] = generator.integers(0, 2, count) * 4.0
    return torch.from_numpy(coord.astype(np.float32))


def lattice(seed: int, count: int, edge: int) -> Tensor:
    """Points at whole coordinates, some at the same: equal distances everywhere."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, edge, (count, 3)).astype(np.float32))


def farthest_by_loop(coord: Tensor, count: int) -> list[int]:
    """The definition: the first of the points with the largest distance to the nearest chosen one."""
    chosen = [0]
    squared = ((coord[:, None] - coord) ** 2).numpy()
    squared = squared[..., 0] + squared[..., 1] + squared[..., 2]
    while len(chosen) < count:
        distance = squared[chosen].min(axis=0)
        distance[chosen] = -1
        chosen.append(int(distance.argmax()))
    return chosen


def neighbours_by_loop(support: Tensor, query: Tensor, k: int, radius: float) -> list[float]:
    """Distances of the nearest in float64, infinite where there are too few."""
    distances = sorted(math.dist(point, query.tolist()) for point in support.tolist())
    return [d if d < radius else math.inf for d in (distances + [math.inf] * k)[:k]]


both_samplers = pytest.mark.parametrize("sample", [farthest_points, neighbors._farthest_side_by_side])
both_searches = pytest.mark.parametrize("search", [neighbors._nearest_by_tree, neighbors._nearest_in_portions])


@both_samplers
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_samples_the_farthest_of_every_sample(sample, data):
    sizes = data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=4).filter(any))
    counts = [data.draw(st.integers(min(1, size), size)) for size in sizes]
    seed = data.draw(st.integers(0, 1000))
    make = data.draw(st.sampled_from([surfaces, lambda s, n: lattice(s, n, 3)]))
    samples = [make(seed + i, size) for i, size in enumerate(sizes)]
    starts = np.cumsum([0, *sizes[:-1]])
    expected = [
        row + start
        for coord, count, start in zip(samples, counts, starts, strict=True)
        for row in (farthest_by_loop(coord, count) if count else [])
    ]
    assert sample(torch.cat(samples), sizes, counts).tolist() == expected


@pytest.mark.parametrize("candidates", [1, 7, 100])
@pytest.mark.parametrize("coord", [surfaces(1, 600), lattice(2, 600, 7)], ids=["surfaces", "lattice"])
def test_rounds_of_any_size_choose_the_same(candidates, coord, monkeypatch):
    monkeypatch.setattr(neighbors, "_CANDIDATES", candidates)
    assert farthest_points(coord, [600], [300]).tolist() == farthest_by_loop(coord, 300)


def test_points_far_from_most_take_no_memory(monkeypatch):
    """However far the farthest points are, few pairs of them and others are looked at in a round."""
    coord = torch.cat([0.002 * surfaces(3, 5_000), 1e3 + surfaces(4, 500)])
    pairs = []
    squared = neighbors._squared
    monkeypatch.setattr(neighbors, "_squared", lambda a, b: pairs.append(len(a)) or squared(a, b))
    chosen = farthest_points(coord, [5_500], [1_000])
    assert max(pairs) < 40 * 5_500
    assert torch.equal(chosen, neighbors._farthest_side_by_side(coord, [5_500], [1_000]))


@both_searches
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    points=st.integers(1, 40),
    k=st.integers(1, 50),
    radius=st.sampled_from([0.9, 2.5, math.inf]),
    portion=st.sampled_from([1, 64, 1 << 20]),
)
def test_finds_the_nearest(search, seed, points, k, radius, portion):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(neighbors._PORTION_ELEMENTS, "cpu", portion)
        support = surfaces(seed, points)
        queries = torch.cat([support[::3], support[::4] + 0.1])
        index, distance = search(support, queries, k, radius)
    assert index.shape == distance.shape == (len(queries), k) and distance.dtype == torch.float32
    for row, query in enumerate(queries):
        expected = torch.tensor(neighbours_by_loop(support, query, k, radius))
        torch.testing.assert_close(distance[row], expected, rtol=0, atol=2e-6)
        found = distance[row].isfinite()
        torch.testing.assert_close(
            (support[index[row, found]] - query).norm(dim=1), distance[row, found], rtol=0, atol=2e-6
        )
        assert len(index[row, found].unique()) == found.sum()


@pytest.mark.parametrize("search", ["_nearest_by_tree", "_nearest_in_portions"])
def test_searches_each_sample_alone(search, monkeypatch):
    monkeypatch.setattr(neighbors, "_nearest_by_tree", getattr(neighbors, search))
    sizes, query_sizes = [30, 0, 2, 50], [9, 0, 2, 5]
    support = torch.cat([surfaces(i, size) for i, size in enumerate(sizes)])
    starts = np.cumsum([0, *sizes])
    queries = torch.cat([support[s : s + n] for s, n in zip(starts[:-1], query_sizes, strict=True)])
    index, distance = nearest(support, sizes, queries, query_sizes, 4)
    row = 0
    for start, stop, count in zip(starts[:-1], starts[1:], query_sizes, strict=True):
        for _ in range(count):
            assert start <= index[row].min() and index[row].max() < stop
            expected = torch.tensor(neighbours_by_loop(support[start:stop], queries[row], 4, math.inf))
            torch.testing.assert_close(distance[row], expected, rtol=0, atol=2e-6)
            row += 1
    assert row == len(index)


def test_too_few_neighbours_repeat_the_nearest():
    support = torch.tensor([[0.0, 0, 0], [1, 0, 0], [5, 0, 0]])
    index, distance = nearest(support, [2, 1], support, [2, 1], 3, radius=2.0)
    assert index.tolist() == [[0, 1, 0], [1, 0, 1], [2, 2, 2]]
    assert distance.tolist() == [[0, 1, math.inf], [0, 1, math.inf], [0, math.inf, math.inf]]


def test_the_radius_itself_is_outside():
    support = torch.tensor([[0.0, 0, 0], [0.5, 0, 0]])
    for search in (neighbors._nearest_by_tree, neighbors._nearest_in_portions):
        assert search(support, support[:1], 2, 0.5)[1].isinf().tolist() == [[False, True]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_same():
    coord, sizes, counts = surfaces(5, 3000), [2000, 1000], [500, 250]
    chosen = farthest_points(coord, sizes, counts)
    assert torch.equal(farthest_points(coord.cuda(), sizes, counts).cpu(), chosen)
    index, distance = nearest(coord, sizes, coord[chosen], counts, 16, 0.4)
    index_gpu, distance_gpu = nearest(coord.cuda(), sizes, coord[chosen].cuda(), counts, 16, 0.4)
    torch.testing.assert_close(distance_gpu.cpu(), distance, rtol=0, atol=2e-6)
    assert (index_gpu.cpu() == index).float().mean() > 0.999
