"""Survey, tiles and the temporary file: points reach the tiles that read them, and no tile grows with the cloud."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditr_cache.errors import DataError, StorageError, UsageError
from ditr_cache.pointcloud.cloud import Chunk, PointCloud
from ditr_cache.pointcloud.normals import estimate_normals
from ditr_train.pointcloud import spill as spill_module
from ditr_train.pointcloud import survey as survey_module
from ditr_train.pointcloud.spill import Spill
from ditr_train.pointcloud.survey import survey
from ditr_train.pointcloud.tiles import TilePlan, Tiling, plan_tiles

TOLERANCE = 1.02
"""A voxel on the border of two cells is counted in one of them."""


class ArrayCloud(PointCloud):
    FORMAT = "array"

    def __init__(self, coord: np.ndarray, color: np.ndarray | None = None) -> None:
        channels = ("coord",) if color is None else ("coord", "color")
        super().__init__(Path("cloud"), len(coord), channels, coord.dtype.type)
        self.coord, self.color = coord, color

    def _chunks(self, size: int) -> Iterator[Chunk]:
        for i in range(0, self.count, size):
            yield Chunk(coord=self.coord[i : i + size], color=None if self.color is None else self.color[i : i + size])


def nothing(points: int) -> None:
    pass


def flat(side: float, points: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.random((points, 2)) * side, np.zeros(points)])


@pytest.mark.parametrize("chunk", [10, 10_000])
def test_survey_counts_points_and_voxels(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey_module, "CHUNK", chunk)
    coord = flat(10, 1000)
    coord[7] = np.nan
    coord[9, 2] = np.inf
    color = np.full((1000, 3), 100, np.uint16)
    color[50, 1] = 300
    told: list[int] = []
    found = survey(ArrayCloud(coord, color), 1.0, 0.5, told.append)
    good = np.delete(coord, [7, 9], axis=0)
    assert found.finite == found.cells.points.sum() == 998 and sum(told) == 1000
    assert (found.low == good.min(axis=0)).all() and (found.high == good.max(axis=0)).all()
    assert found.color_factor == pytest.approx(255 / 65535)
    voxels = len(np.unique(np.floor(good / 0.5), axis=0))
    assert found.cells.voxels.sum() == voxels
    row = found.cells.find(good)
    np.testing.assert_array_equal(np.bincount(row), found.cells.points)
    lower = found.cells.anchor + found.cells.index[row]
    assert ((good[:, :2] >= lower) & (good[:, :2] < lower + 1)).all()


def test_survey_keeps_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey_module, "MAX_CELLS", 100)
    monkeypatch.setattr(survey_module, "MAX_SAMPLED", 4000)
    coord = flat(1000, 60_000)
    found = survey(ArrayCloud(coord), 1.0, 2.0, nothing)
    assert len(found.cells.index) <= 100 and found.cells.size == 128
    np.testing.assert_array_equal(np.bincount(found.cells.find(coord)), found.cells.points)
    exact = len(np.unique(np.floor(coord / 2), axis=0))
    assert found.cells.voxels.sum() == pytest.approx(exact, rel=0.05)
    half = found.cells.index[:, 0] >= np.median(found.cells.index[:, 0])
    share = found.cells.points[half].sum() / 60_000
    assert found.cells.voxels[half].sum() / found.cells.voxels.sum() == pytest.approx(share, rel=0.05)


def test_points_that_cannot_be_surveyed() -> None:
    with pytest.raises(DataError, match="none of its 3 points has finite coordinates"):
        survey(ArrayCloud(np.full((3, 3), np.nan)), 1.0, 0.5, nothing)
    for outlier in ([0, 1e12, 0], [-1e300, 0, 0], [0, 0, 3e6]):
        with pytest.raises(DataError, match="remove outliers"):
            survey(ArrayCloud(np.array([[0.0, 0, 0], outlier])), 1.0, 0.5, nothing)


@given(
    seed=st.integers(0, 1000),
    side=st.sampled_from([3.0, 20.0, 100.0]),
    edge=st.sampled_from([None, 4.0, 13.0]),
    overlap=st.sampled_from([None, 0.0, 1.0, 3.3]),
    max_voxels=st.sampled_from([20, 200, 10_000]),
)
def test_tiles_hold_every_point_once_and_all_that_lies_around(
    seed: int, side: float, edge: float | None, overlap: float | None, max_voxels: int
) -> None:
    coord = flat(side, 400, seed)
    tiling = Tiling(grid_size=0.25, stride=4, edge=edge, overlap=overlap, max_voxels=max_voxels)
    plan = plan_tiles(survey(ArrayCloud(coord), tiling.cell_size, 0.25, nothing).cells, tiling)
    tile, point, core = plan.assign(coord)
    assert sorted(point[core]) == list(range(400))
    assert (np.diff(tile) >= 0).all()
    for t, of in enumerate(plan.tiles):
        mine, held = point[tile == t], point[(tile == t) & core]
        assert (np.diff(mine) > 0).all() and len(mine) == of.points and len(held) == of.core > 0
        distance = np.abs(coord[held][:, None, :2] - coord[None, :, :2]).max(axis=2).min(axis=0)
        assert set(np.flatnonzero(distance < tiling.margin)) <= set(mine.tolist())
        size = np.abs(coord[held, :2] - of.center).max() * 2
        assert edge is None or size <= edge * (1 + 1e-6)
        voxels = len(np.unique(np.floor(coord[mine] / 0.25), axis=0))
        assert voxels <= max_voxels * TOLERANCE + 20 or size <= tiling.smallest * (1 + 1e-6)


def tiles_of(coord: np.ndarray, max_voxels: int = 3000) -> tuple[TilePlan, int]:
    tiling = Tiling(grid_size=0.5, stride=2, max_voxels=max_voxels)
    plan = plan_tiles(survey(ArrayCloud(coord), tiling.cell_size, 0.5, nothing).cells, tiling)
    tile, point, _ = plan.assign(coord)
    largest = max(len(np.unique(np.floor(coord[point[tile == t]] / 0.5), axis=0)) for t in range(len(plan.tiles)))
    return plan, largest


def test_largest_tile_does_not_grow_with_the_cloud() -> None:
    small, large = (tiles_of(flat(side, points)) for side, points in ((60, 15_000), (200, 160_000)))
    assert len(small[0].tiles) > 1 and len(large[0].tiles) > 10 * len(small[0].tiles)
    assert small[1] <= 3000 * TOLERANCE and large[1] <= 3000 * TOLERANCE


def test_dense_spot_is_cut_finer() -> None:
    coord = np.concatenate([flat(200, 2000), flat(30, 100_000)])
    plan, largest = tiles_of(coord, 1500)
    tile = plan.core[plan.cells.find(coord)]
    dense, sparse = (np.ptp(coord[tile == tile[i], :2], axis=0).max() for i in (-1, coord[:2000].sum(axis=1).argmax()))
    assert largest <= 1500 * TOLERANCE and dense <= 16 and sparse > 32


def test_one_tile_where_all_fits() -> None:
    plan, _ = tiles_of(flat(10, 500))
    assert len(plan.tiles) == 1 and plan.tiles[0].core == plan.tiles[0].points == 500


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"edge": 0.5}, "at least 1 metres"),
        ({"edge": float("nan")}, "got nan"),
        ({"overlap": -1.0}, "0 or more"),
        ({"edge": 2.0, "overlap": 9.0}, "at most 4 times"),
    ],
)
def test_tilings_that_make_no_sense(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Tiling(grid_size=0.25, stride=4, **wrong)  # type: ignore[arg-type]


def test_temporary_file_gives_back_what_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill_module, "CHUNK", 64)
    coord = flat(20, 1000) + np.array([500_000, 5_600_000, 100])
    coord[5] = np.nan
    color = np.random.default_rng(0).integers(0, 256, (1000, 3), dtype=np.uint8)
    cloud, tiling = ArrayCloud(coord, color), Tiling(grid_size=0.25, stride=2, edge=4.0)
    found = survey(cloud, tiling.cell_size, 0.25, nothing)
    plan = plan_tiles(found.cells, tiling)
    origin = np.array([[*tile.center, 100.0] for tile in plan.tiles])
    with Spill(plan, ("coord", "color"), origin, tmp_path) as spill:
        spill.fill(cloud, found, nothing)
        assert list(tmp_path.iterdir()) == []  # it has no name
        seen = []
        for t in range(len(plan.tiles)):
            parts = list(spill.read(t))
            assert all(len(p.position) <= 128 for p in parts) and sum(len(p.position) for p in parts) == (
                plan.tiles[t].points
            )
            for part in parts:
                core = part.position >= 0
                at = part.position[core]
                seen += at.tolist()
                np.testing.assert_allclose(part.points.coord[core] + origin[t], coord[at], atol=1e-5)
                np.testing.assert_array_equal(part.points.color[core], color[at])
                assert part.points.coord.dtype == part.points.color.dtype == np.float32
                assert np.abs(part.points.coord[:, :2]).max() <= 2 + 2 + 1
    assert sorted(seen) == [i for i in range(1000) if i != 5]
    with pytest.raises(StorageError, match="--tmp"):
        Spill(plan, ("coord",), origin, tmp_path / "none")


def test_normals_of_a_sphere_and_a_plane() -> None:
    rng = np.random.default_rng(0)
    sphere = rng.normal(size=(4000, 3))
    sphere = (sphere / np.linalg.norm(sphere, axis=1, keepdims=True)).astype(np.float32)
    for viewpoint, sign in (((0, 0, 0), -1), (None, None)):
        normal = estimate_normals(sphere, viewpoint)
        cosine = (normal * sphere).sum(axis=1)
        assert normal.dtype == np.float32 and np.abs(cosine).min() > 0.97
        assert (normal[:, 2] >= 0).all() if sign is None else (np.sign(cosine) == sign).all()
    plane = flat(3, 50).astype(np.float32)
    np.testing.assert_allclose(estimate_normals(plane), np.tile([0, 0, 1], (50, 1)), atol=1e-6)
    assert (estimate_normals(plane[:2]) == 0).all()
    assert estimate_normals(plane[:3]).shape == (3, 3)
