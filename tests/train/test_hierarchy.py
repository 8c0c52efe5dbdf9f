from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditr_cache.errors import DataError
from ditr_train.models.grid_hierarchy import GridHierarchy
from ditr_train.models.hierarchy import LinkedHierarchy, OccupiedSites


def nested_voxels(sites: Tensor, levels: int) -> tuple[list[Tensor], list[Tensor]]:
    """Sites of every resolution, and the parent of each."""
    found, parents = [sites], []
    for _ in range(1, levels):
        coarse = torch.cat([found[-1][:, :1], found[-1][:, 1:] >> 1], dim=1)
        unique, parent = coarse.unique(dim=0, return_inverse=True)
        found.append(unique)
        parents.append(parent)
    return found, parents


def by_site(occupied: OccupiedSites, level: int, sites: Tensor) -> dict[int, tuple[list[int], float]]:
    """Site -> its seen points and the share of its points that is seen."""
    own = torch.arange(occupied.sizes[0])
    for parent in occupied.parents[:level]:
        own = parent[own]
    assert occupied.shares is not None
    places, shares = occupied.places(level, sites), occupied.shares[level][:, 0]
    return {
        int(place): (sorted(occupied.points[own == i].tolist()), float(shares[i])) for i, place in enumerate(places)
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), *[st.integers(0, 9)] * 3, st.booleans()),
        min_size=1, max_size=60, unique_by=lambda x: x[:4],
    ),
    st.integers(1, 4),
)  # fmt: skip
def test_both_hierarchies_find_what_loops_find(points: list[tuple[int, ...]], levels: int) -> None:
    finest = torch.tensor([point[:4] for point in points])
    seen = torch.tensor([point[4] for point in points]).bool()
    sites, parents = nested_voxels(finest, levels)
    linked = LinkedHierarchy(parents, [len(s) for s in sites])
    for hierarchy in (linked, GridHierarchy(finest)):
        assert hierarchy.num_points == len(points)
        assert hierarchy.occupied(seen, levels).shares is None
        occupied = hierarchy.occupied(seen, levels, shares=True)
        if occupied.parents:  # points of one site of resolution 1 follow one another
            assert torch.equal(occupied.parents[0], occupied.parents[0].sort().values)
        own = torch.arange(len(points))
        for level in range(levels):
            expected = {}
            for site in own[seen].unique().tolist():
                inside = own == site
                expected[site] = ((inside & seen).nonzero()[:, 0].tolist(), float((inside & seen).sum() / inside.sum()))
            assert by_site(occupied, level, sites[level]) == expected
            assert occupied.sizes[level] == len(expected)
            own = parents[level][own] if level + 1 < levels else own


def test_lists_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match=r"one parent per site: \[3, 1\] sites, \[2\] parents"):
        LinkedHierarchy([torch.zeros(2, dtype=torch.int64)], [3, 1])
