from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ditr_cache.errors import DataError, MismatchError, MissingDataError, UnknownNameError, UsageError
from ditr_cache.schema import VFMSpec
from ditr_cache.store import open_cache
from ditr_train.data.dataset import CachedDataset, used_rows
from ditr_train.data.transforms import build_transform
from ditr_train.protocol import FullSamples
from plain_rows import decode

GRID = 0.1
Make = Callable[..., Path]


def dataset(cache: Path, split: str = "train", **settings: object) -> CachedDataset:
    defaults: dict[str, object] = {"grid_size": GRID, "feat": ("color", "normal"), "vfm": "fake"}
    return CachedDataset(open_cache(cache), split, **{**defaults, **settings})  # type: ignore[arg-type]


def test_feature_rows_stay_with_their_points(tmp_path: Path, make_cache: Make) -> None:
    cache = make_cache(tmp_path / "c", train=2, val=0, numbered=True)
    augment = [build_transform("RandomDropout", {"p": 1}), build_transform("RandomRotate", {"p": 1})]
    data = dataset(cache, transforms=augment, point_max=120)
    for index in range(len(data)):
        stored = data.cache.read(data.ids[index], vfm="fake")
        sample = data.train_sample(index, np.random.default_rng(index))
        assert sample.table is not None and sample.scale is not None and sample.row is not None
        assert sample.table.dtype == np.int8 and len(sample.table) == len(np.unique(sample.row[sample.row >= 0]))
        assert len(sample.coord) <= 120 and 0 < (sample.row < 0).sum() < len(sample.row)
        rows = decode(sample.table, sample.scale)
        seen = np.flatnonzero(sample.row >= 0)
        # Channel 1 holds the point's position in the cache: the colour there must be the voxel's colour.
        point = np.rint(rows[sample.row[seen], 1]).astype(int)
        scale = sample.scale[sample.row[seen]]
        for voxel, near, tolerance in zip(seen, point, scale, strict=True):
            around = slice(max(0, near - int(tolerance) - 1), near + int(tolerance) + 2)
            match = (stored.color[around] / np.float32(255) == sample.feat[voxel, :3]).all(axis=1)
            assert (match & stored.valid[around]).any()


def test_input_channels(tiny_cache: Path) -> None:
    data = dataset(tiny_cache, feat=("coord", "normal", "color"), vfm=None)
    sample = data.eval_sample(0)
    assert data.in_channels == 9 and sample.feat.shape[1] == 9 and sample.feat.dtype == np.float32
    assert np.array_equal(sample.feat[:, :3], sample.coord) and sample.table is None and sample.row is None
    assert np.allclose(np.linalg.norm(sample.feat[:, 3:6], axis=1), 1)
    assert sample.feat[:, 6:].min() >= 0 and sample.feat[:, 6:].max() <= 1
    assert np.allclose(sample.coord[:, :2].min(0) + sample.coord[:, :2].max(0), 0, atol=1e-6)
    assert sample.coord[:, 2].min() == 0


def test_evaluation_reaches_every_point(tiny_cache: Path) -> None:
    data = dataset(tiny_cache, "val")
    stored = data.cache.read(data.ids[0])
    sample = data.eval_sample(0)
    assert sample.inverse is not None and len(sample.inverse) == len(stored.coord) > len(sample.coord)
    assert np.array_equal(sample.full_segment, stored.segment) and np.array_equal(
        sample.source_index, stored.source_index
    )
    voxel = sample.grid_coord[sample.inverse] * GRID
    spread = (stored.coord - stored.coord.min(axis=0)) - voxel
    assert spread.min() > -GRID and spread.max() < 2 * GRID
    again = data.eval_sample(0)
    assert np.array_equal(again.feat, sample.feat) and np.array_equal(again.inverse, sample.inverse)


def test_training_samples_depend_on_the_generator_alone(tiny_cache: Path) -> None:
    data = dataset(tiny_cache, transforms=[build_transform("RandomJitter", {})])
    copy = pickle.loads(pickle.dumps(data))
    a, b = (d.train_sample(1, np.random.default_rng([1, 2])) for d in (data, copy))
    c = data.train_sample(1, np.random.default_rng([1, 3]))
    assert np.array_equal(a.coord, b.coord) and np.array_equal(a.row, b.row)
    assert a.coord.shape != c.coord.shape or not np.array_equal(a.coord, c.coord)
    assert len(np.unique(a.grid_coord, axis=0)) == len(a.grid_coord)


def test_crop_starts_at_zero(tiny_cache: Path) -> None:
    sample = dataset(tiny_cache, point_max=50).train_sample(0, np.random.default_rng(0))
    assert len(sample.coord) == 50 and (sample.grid_coord.min(axis=0) == 0).all()


def test_missing_features_are_counted_before_the_start(tmp_path: Path, make_cache: Make) -> None:
    cache = make_cache(tmp_path / "c", points=50, featureless=("room01", "room02"))
    with pytest.raises(MissingDataError, match=r"2 of 4 samples have no features.*room01, room02.*ditr-cache extract"):
        dataset(cache)
    assert len(dataset(cache, "val")) == 2
    assert len(dataset(cache, vfm=None)) == 4


def test_missing_channels_and_labels(tmp_path: Path, make_cache: Make) -> None:
    cache = make_cache(tmp_path / "c", points=50, without=("normal", "segment"))
    with pytest.raises(MissingDataError, match=r"'train': 4 of 4 samples have no 'normal'.*data\.feat"):
        dataset(cache)
    with pytest.raises(MissingDataError, match="no 'segment'"):
        dataset(cache, feat=("color",))
    sample = dataset(cache, feat=("color",), labelled=False).eval_sample(0)
    assert sample.segment is None and sample.full_segment is None


def test_wrong_names(tiny_cache: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'train'"):
        dataset(tiny_cache, "trian")
    with pytest.raises(UnknownNameError, match=r"data\.feat.*'color'"):
        dataset(tiny_cache, feat=("colour",))
    with pytest.raises(UnknownNameError, match="did you mean 'fake'"):
        dataset(tiny_cache, vfm="fakee")
    with pytest.raises(UsageError, match=r"data\.feat"):
        dataset(tiny_cache, feat=())


def test_classes_must_be_the_caches(tmp_path: Path, tiny_cache: Path, make_cache: Make) -> None:
    assert len(dataset(tiny_cache, class_names=("floor", "wall", "picture"))) == 4
    with pytest.raises(MismatchError, match="class 1 is expected to be 'door', the cache says 'wall'"):
        dataset(tiny_cache, class_names=("floor", "door", "picture"))
    with pytest.raises(MismatchError, match="expected 2 classes, the cache has 3"):
        dataset(tiny_cache, class_names=("floor", "wall"))
    with pytest.raises(DataError, match="no classes"):
        dataset(make_cache(tmp_path / "c", points=20, classes=(), without=("segment",)))


def test_several_vfms_of_one_name(tmp_path: Path, make_cache: Make, make_spec: Callable[..., VFMSpec]) -> None:
    specs = (make_spec(), make_spec(codec="float16"))
    cache = make_cache(tmp_path / "c", points=50, specs=specs)
    with pytest.raises(UsageError, match="several"):
        dataset(cache)
    sample = dataset(cache, vfm=specs[1].key).eval_sample(0)
    assert sample.table is not None and sample.table.dtype == np.float16 and sample.scale is None


def test_used_rows() -> None:
    rows, position = used_rows(np.array([4, -1, 2, 4]), 6)
    assert rows.tolist() == [2, 4] and position.tolist() == [1, -1, 0, 1]
    rows, position = used_rows(np.array([-1, -1]), 0)
    assert rows.tolist() == [] and position.tolist() == [-1, -1]


def test_lidar_keeps_the_frame_of_its_sensor(tiny_cache: Path) -> None:
    data = dataset(tiny_cache, feat=("coord",), vfm=None, centred=False)
    stored = data.cache.read(data.ids[0])
    for sample in (data.eval_sample(0), data.train_sample(0, np.random.default_rng(0))):
        assert np.isin(sample.coord, stored.coord).all() and np.array_equal(sample.feat, sample.coord)
        assert (sample.grid_coord.min(axis=0) == 0).all()
    assert data.eval_sample(0).coord.min() > 4  # conftest's rooms stand 5 m and more from the origin


@pytest.mark.parametrize("crops", [{}, {"crop_rate": 0.5}, {"crop_rate": 0.8, "point_max": 40}])
def test_training_samples_know_where_their_voxels_are(tiny_cache: Path, crops: dict[str, object]) -> None:
    sample = dataset(tiny_cache, vfm=None, centred=False, **crops).train_sample(1, np.random.default_rng(1))
    assert sample.origin is not None and (sample.origin > 40).all()
    np.testing.assert_array_equal(sample.grid_coord + sample.origin, np.floor(sample.coord.astype(np.float64) / GRID))
    # Centred ones are in frames of their own.
    assert dataset(tiny_cache, vfm=None, **crops).train_sample(1, np.random.default_rng(1)).origin is None


def test_what_is_evaluated_is_transformed_at_test_alone(tiny_cache: Path) -> None:
    low, high = [9.2, 9.2, 9.1], [10.0, 10.5, 9.4]
    clip = build_transform("PointClip", {"low": low, "high": high})
    data = dataset(tiny_cache, "val", feat=("coord",), vfm=None, centred=False, at_test=[clip])
    stored = data.cache.read(data.ids[0]).coord
    sample = data.eval_sample(0)
    assert sample.inverse is not None
    # Every point's voxel is that of the clamped point; all points are still reached.
    expected = np.clip(stored, np.array(low, np.float32), np.array(high, np.float32))
    assert len(sample.inverse) == len(stored) and np.abs(sample.coord[sample.inverse] - expected).max() <= GRID + 1e-5
    assert (sample.coord >= np.array(low, np.float32)).all() and (sample.coord <= np.array(high, np.float32)).all()
    full = FullSamples(data)[0].points.coord
    assert np.array_equal(full, expected)
    trained = data.train_sample(0, np.random.default_rng(0)).coord
    assert (trained < np.array(low, np.float32)).any()
    # Centred samples are centred first.
    assert dataset(tiny_cache, "val", at_test=[clip]).eval_sample(0).coord.min() >= -1


def test_crops_by_rate_then_by_count(tiny_cache: Path) -> None:
    def count(**settings: object) -> int:
        return len(dataset(tiny_cache, **settings).train_sample(0, np.random.default_rng(0)).coord)

    whole = count()
    assert count(crop_rate=0.6) == int(0.6 * whole) == count(crop_rate=0.6, point_max=whole)
    assert count(crop_rate=0.6, point_max=50) == 50
    sample = dataset(tiny_cache, crop_rate=0.2, point_max=60).train_sample(1, np.random.default_rng(1))
    assert (sample.grid_coord.min(axis=0) == 0).all()
    # What is left is one ball: farther points of the room are gone.
    assert np.ptp(sample.coord, axis=0).max() < 1.5


def test_height_needs_no_array(tiny_cache: Path) -> None:
    data = dataset(tiny_cache, feat=("color", "height"), vfm=None)
    sample = data.eval_sample(0)
    assert data.in_channels == 4 and np.array_equal(sample.feat[:, 3], sample.coord[:, 2])


def test_instances_are_asked_for_where_they_are_needed(tiny_cache: Path) -> None:
    shift = build_transform("InstanceShift", {})
    with pytest.raises(MissingDataError, match=r"'instance'.*remove the instance transforms from data\.augment"):
        dataset(tiny_cache, transforms=[shift])
    assert dataset(tiny_cache).read(0)[1].instance is None
