from __future__ import annotations

import numpy as np
import pytest

from ditr_cache.errors import UnknownNameError, UsageError
from ditr_train.data.sample import PointSample
from ditr_train.data.transforms import TRANSFORMS, ElasticDistortion, apply, build_transform

N = 400


def sample(n: int = N, seed: int = 0) -> PointSample:
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=(n, 3))
    return PointSample(
        name="s",
        coord=rng.uniform(-1, 2, (n, 3)).astype(np.float32),
        color=rng.integers(10, 200, (n, 3)).astype(np.float32),
        normal=(normal / np.linalg.norm(normal, axis=1, keepdims=True)).astype(np.float32),
        strength=rng.random(n).astype(np.float32),
        segment=rng.integers(-1, 5, n),
        row=np.arange(n),
    )


def run(name: str, points: PointSample | None = None, seed: int = 0, **args: object) -> PointSample:
    return build_transform(name, args)(points or sample(), np.random.default_rng(seed))


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
@pytest.mark.parametrize("seed", range(4))
def test_points_keep_what_belongs_to_them(name: str, seed: int) -> None:
    args = {"point_max": 150} if name == "SphereCrop" else {}
    before = sample()
    copy = {k: None if v is None else np.array(v) for k, v in vars(before).items()}
    after = build_transform(name, args)(before, np.random.default_rng(seed))
    for key, value in copy.items():  # the input is never written into
        assert np.array_equal(getattr(before, key), value)
    row = after.row
    assert (np.diff(row) > 0).all()
    # Labels and strength never change; they show that every array was gathered alike.
    assert np.array_equal(after.segment, before.segment[row]) and np.array_equal(after.strength, before.strength[row])
    assert len(after.coord) == len(after.color) == len(after.normal) == len(row)
    for array, dtype in ((after.coord, np.float32), (after.color, np.float32), (after.normal, np.float32)):
        assert array.dtype == dtype and np.isfinite(array).all()
    if name.startswith("Chromatic"):
        assert np.array_equal(after.coord, before.coord[row])
        assert after.color.min() >= 0 and after.color.max() <= 255.001
    else:
        assert np.array_equal(after.color, before.color[row])
    again = build_transform(name, args)(before, np.random.default_rng(seed))
    assert np.array_equal(again.coord, after.coord) and np.array_equal(again.color, after.color)


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_optional_channels_may_be_absent(name: str) -> None:
    args = {"point_max": 10} if name == "SphereCrop" else {}
    bare = PointSample(name="s", coord=sample().coord)
    after = build_transform(name, args)(bare, np.random.default_rng(1))
    assert after.color is None and after.normal is None and after.row is None


@pytest.mark.parametrize("axis", ["x", "y", "z"])
def test_rotation_is_rigid_about_its_axis(axis: str) -> None:
    before, after = sample(), run("RandomRotate", axis=axis, degrees=90, p=1)
    k = "xyz".index(axis)
    assert np.allclose(after.coord[:, k], before.coord[:, k], atol=1e-6)
    assert np.allclose(np.linalg.norm(after.coord, axis=1), np.linalg.norm(before.coord, axis=1), atol=1e-5)
    # Normals turn with the points: angles between them and the positions stay.
    assert np.allclose((after.coord * after.normal).sum(1), (before.coord * before.normal).sum(1), atol=1e-5)
    # Right-handed: the sine of the angle has the same sign for all points.
    i, j = (k + 1) % 3, (k + 2) % 3
    turn = before.coord[:, i] * after.coord[:, j] - before.coord[:, j] * after.coord[:, i]
    assert (turn > 0).all() or (turn < 0).all()


def test_flip_mirrors_points_and_normals() -> None:
    before, after = sample(), run("RandomFlip", p=1)
    sign = np.array([-1, -1, 1])
    assert np.array_equal(after.coord, before.coord * sign) and np.array_equal(after.normal, before.normal * sign)


def test_scale_jitter_and_dropout_stay_in_their_bounds() -> None:
    before = sample()
    ratio = run("RandomScale").coord / before.coord
    assert np.allclose(ratio, ratio[0, 0], rtol=1e-4) and 0.9 <= ratio[0, 0] <= 1.1
    moved = run("RandomJitter", sigma=0.05, clip=0.02).coord - before.coord
    assert 0.019 < np.abs(moved).max() <= 0.0201
    assert len(run("RandomDropout", ratio=0.2, p=1)) == int(N * 0.8)
    assert len(run("RandomDropout", points=sample(1), ratio=1.0, p=1)) == 1
    assert run("RandomDropout", p=0).row.tolist() == list(range(N))


def test_center_shift() -> None:
    after = run("CenterShift").coord
    assert np.allclose(after.min(0)[:2] + after.max(0)[:2], 0, atol=1e-6) and after[:, 2].min() == 0
    flat = run("CenterShift", apply_z=False).coord
    assert np.array_equal(flat[:, 2], sample().coord[:, 2])


def test_sphere_crop_keeps_the_nearest() -> None:
    before = sample()
    after = run("SphereCrop", point_max=120)
    assert len(after) == 120
    gone = np.setdiff1d(np.arange(N), after.row)
    # One of the points that stay is the centre: farther from every dropped point than from any kept one.
    assert any(
        np.linalg.norm(after.coord - c, axis=1).max() <= np.linalg.norm(before.coord[gone] - c, axis=1).min() + 1e-6
        for c in after.coord
    )
    assert len(run("SphereCrop", point_max=N)) == N
    assert len(run("SphereCrop", rate=0.6)) == int(N * 0.6)


def test_auto_contrast_stretches() -> None:
    points = sample()
    after = run("ChromaticAutoContrast", p=1, seed=3)
    assert np.ptp(after.color, axis=0).min() > np.ptp(points.color, axis=0).max()
    flat = PointSample(name="s", coord=points.coord, color=np.full((N, 3), 7, np.float32))
    assert np.isfinite(run("ChromaticAutoContrast", points=flat, p=1).color).all()


def test_elastic_distortion_equals_the_definition() -> None:
    points = sample(30)
    after = ElasticDistortion(levels=((0.5, 0.4),), p=1)(points, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    rng.random()  # whether to apply
    low = points.coord.min(0)
    shape = ((points.coord.max(0) - low) // 0.5).astype(int) + 3
    noise = rng.standard_normal((*shape, 3), dtype=np.float32)
    for _ in range(2):  # box blur over three nodes, once along each axis; nodes outside are 0
        for step in np.eye(3, dtype=int):
            blurred = np.zeros_like(noise)
            for node in np.ndindex(*shape):
                near = [np.array(node) + k * step for k in (-1, 0, 1)]
                inside = [n for n in near if (n >= 0).all() and (n < shape).all()]
                blurred[node] = np.sum([noise[tuple(n)] for n in inside], axis=0) / 3
            noise = blurred
    for before, moved in zip(points.coord, after.coord, strict=True):
        position = (before - (low - 0.5)) / 0.5  # the first node lies one granularity below the lowest point
        base, expected = np.floor(position).astype(int), np.zeros(3)
        for corner in np.ndindex(2, 2, 2):
            weight = np.prod(1 - np.abs(position - base - corner))
            expected += weight * noise[tuple(base + corner)]
        assert np.allclose(moved - before, 0.4 * expected, atol=1e-5)


def test_bad_settings_name_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'RandomRotate'"):
        build_transform("RandomRotat", {})
    with pytest.raises(UnknownNameError, match="did you mean 'degrees'"):
        build_transform("RandomRotate", {"degree": 3})
    with pytest.raises(UsageError, match=r"RandomRotate\.axis.*'w'"):
        build_transform("RandomRotate", {"axis": "w"})
    with pytest.raises(UsageError, match=r"RandomFlip.*p in 0\.\.1"):
        build_transform("RandomFlip", {"p": 1.5})
    with pytest.raises(UsageError, match="point_max or rate"):
        build_transform("SphereCrop", {})
    with pytest.raises(UsageError, match="granularities"):
        build_transform("ElasticDistortion", {"levels": [[0, 1]]})


def test_a_list_is_applied_in_order() -> None:
    steps = [build_transform("RandomScale", {"low": 2, "high": 2}), build_transform("CenterShift", {})]
    assert np.ptp(apply(steps, sample(), np.random.default_rng(0)).coord[:, 0]) == pytest.approx(
        2 * np.ptp(sample().coord[:, 0]), rel=1e-5
    )
