from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ditr_cache.errors import DataError, UsageError
from ditr_train.data.voxelize import voxelize

COORD = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 60), st.just(3)), elements=st.floats(-20, 20, width=32, allow_nan=False)
)


def oracle(coord: np.ndarray, grid_size: float) -> dict[tuple[int, ...], list[int]]:
    cells = [tuple(int(np.floor(float(c) / grid_size)) for c in p) for p in coord]
    low = [min(c[a] for c in cells) for a in range(3)]
    voxels: dict[tuple[int, ...], list[int]] = {}
    for i, cell in enumerate(cells):
        voxels.setdefault(tuple(c - m for c, m in zip(cell, low, strict=True)), []).append(i)
    return voxels


@settings(max_examples=80, deadline=None)
@given(coord=COORD, grid_size=st.sampled_from([0.02, 0.05, 0.3, 7.0]))
def test_test_mode_equals_the_oracle(coord: np.ndarray, grid_size: float) -> None:
    voxels, expected = voxelize(coord, grid_size), oracle(coord, grid_size)
    keys = [tuple(c) for c in voxels.grid_coord.tolist()]
    assert keys == sorted(expected)  # unique, ordered
    assert voxels.grid_coord.dtype == np.int32 and (voxels.grid_coord.min(axis=0) == 0).all()
    assert voxels.pick.tolist() == [expected[k][0] for k in keys]  # first point
    assert all(i in expected[keys[v]] for i, v in enumerate(voxels.inverse))


@settings(max_examples=40, deadline=None)
@given(coord=COORD, seed=st.integers(0, 10))
def test_train_mode_picks_a_point_of_each_voxel(coord: np.ndarray, seed: int) -> None:
    voxels = voxelize(coord, 5.0, np.random.default_rng(seed))
    assert (voxels.inverse[voxels.pick] == np.arange(len(voxels.pick))).all()
    again = voxelize(coord, 5.0, np.random.default_rng(seed))
    assert (again.pick == voxels.pick).all() and (again.grid_coord == voxels.grid_coord).all()


def test_train_mode_draws_uniformly() -> None:
    coord = np.zeros((4, 3), dtype=np.float32)
    rng = np.random.default_rng(0)
    counts = np.bincount([int(voxelize(coord, 1.0, rng).pick[0]) for _ in range(4000)], minlength=4)
    assert (np.abs(counts - 1000) < 120).all()


def test_every_point_gets_its_own_voxel_back() -> None:
    coord = np.random.default_rng(0).uniform(0, 3, (5000, 3)).astype(np.float32)
    voxels = voxelize(coord, 0.1)
    own = np.floor(coord.astype(np.float64) / 0.1).astype(int)
    own -= own.min(axis=0)
    assert (voxels.grid_coord[voxels.inverse] == own).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e7])
def test_outliers_are_named(value: float) -> None:
    coord = np.zeros((3, 3), dtype=np.float32)
    coord[1, 2] = value
    with np.errstate(invalid="ignore"), pytest.raises(DataError, match=r"data\.grid_size"):
        voxelize(coord, 0.02)


def test_wrong_use() -> None:
    with pytest.raises(UsageError, match="grid size"):
        voxelize(np.zeros((1, 3)), 0.0)
    with pytest.raises(DataError, match="at least one point"):
        voxelize(np.zeros((0, 3)), 0.1)
