from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

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
        instance=rng.integers(-1, 6, n),
        row=np.arange(n),
    )


def run(name: str, points: PointSample | None = None, seed: int = 0, **args: object) -> PointSample:
    return build_transform(name, args)(points or sample(), np.random.default_rng(seed))


ARGS: dict[str, dict[str, object]] = {
    "SphereCrop": {"point_max": 150},
    "ChromaticNormalize": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]},
    "PointClip": {"low": [-0.5, -0.5, 0], "high": [1, 1, 1]},
    "PointClipDistance": {"radius": 1.0, "low": -0.5, "high": 0.5},
}
"""Arguments of the transforms that have no default for them."""


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
@pytest.mark.parametrize("seed", range(4))
def test_points_keep_what_belongs_to_them(name: str, seed: int) -> None:
    args = ARGS.get(name, {})
    before = sample()
    copy = {k: None if v is None else np.array(v) for k, v in vars(before).items()}
    after = build_transform(name, args)(before, np.random.default_rng(seed))
    for key, value in copy.items():  # the input is never written into
        assert np.array_equal(getattr(before, key), value)
    row = after.row
    assert (np.diff(row) > 0).all()
    # Instances and strength never change; they show that every array was gathered alike. A label may go, never change.
    assert np.array_equal(after.instance, before.instance[row]) and np.array_equal(after.strength, before.strength[row])
    kept = after.segment == before.segment[row]
    assert kept.all() or (name == "InstanceLabelDrop" and (after.segment[~kept] == -1).all())
    assert len(after.coord) == len(after.color) == len(after.normal) == len(row)
    for array, dtype in ((after.coord, np.float32), (after.color, np.float32), (after.normal, np.float32)):
        assert array.dtype == dtype and np.isfinite(array).all()
    if name.startswith("Chromatic"):
        assert np.array_equal(after.coord, before.coord[row])
        assert name == "ChromaticNormalize" or (after.color.min() >= 0 and after.color.max() <= 255.001)
    else:
        black = (after.color == 0).all(axis=1) if name == "InstanceColorDrop" else np.zeros(len(row), bool)
        assert np.array_equal(after.color[~black], before.color[row][~black])
    again = build_transform(name, args)(before, np.random.default_rng(seed))
    assert np.array_equal(again.coord, after.coord) and np.array_equal(again.color, after.color)


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_optional_channels_may_be_absent(name: str) -> None:
    args = ARGS.get(name, {})
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
    with pytest.raises(UsageError, match=r"RandomFlip: expected p in 0\.\.1, got 1\.5$"):
        build_transform("RandomFlip", {"p": 1.5})
    for name, args in (
        ("RandomRotate", {"degrees": -5}),
        ("InstanceRotate", {"degrees": -5}),
        ("InstanceShift", {"metres": [0, -1, 0]}),
    ):
        with pytest.raises(UsageError, match=rf"{name}: expected \w+ >= 0, got"):
            build_transform(name, args)
    with pytest.raises(UsageError, match="point_max or rate"):
        build_transform("SphereCrop", {})
    for name, args in (
        ("PointClip", {"low": [0, 0, 0], "high": [1, 1, 0]}), ("PointClipDistance", {"radius": 0, "low": 0, "high": 1}),
        ("ChromaticNormalize", {"mean": [0, 0, 0], "std": [1, 0, 1]}), ("RandomShift", {"metres": [0, -1, 0]}),
        ("InstanceScale", {"low": 0}), ("InstanceFlip", {"flip": 2}), ("InstanceLabelDrop", {"p": -1}),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=f"{name}.*expected"):
            build_transform(name, args)
    with pytest.raises(UsageError, match="granularities"):
        build_transform("ElasticDistortion", {"levels": [[0, 1]]})


def test_a_list_is_applied_in_order() -> None:
    steps = [build_transform("RandomScale", {"low": 2, "high": 2}), build_transform("CenterShift", {})]
    assert np.ptp(apply(steps, sample(), np.random.default_rng(0)).coord[:, 0]) == pytest.approx(
        2 * np.ptp(sample().coord[:, 0]), rel=1e-5
    )


def test_anisotropic_scale_keeps_normals_on_their_surfaces() -> None:
    before = sample()
    assert before.normal is not None
    before.normal[0] = 0  # not known
    after = run("RandomScale", before, anisotropic=True, low=0.5, high=2)
    factor = after.coord / before.coord
    assert np.allclose(factor, factor[0], rtol=1e-4) and len(set(factor[0].round(3))) == 3
    # Two directions within the plane of each normal, scaled, are still at right angles to the new normal.
    for axis in np.eye(3, dtype=np.float32):
        along = np.cross(before.normal, axis) * factor[0]
        assert np.allclose((along * after.normal).sum(axis=1), 0, atol=1e-5)
    assert np.allclose(np.linalg.norm(after.normal[1:], axis=1), 1, atol=1e-5) and not after.normal[0].any()
    alike = run("RandomScale", low=0.5, high=2).coord / sample().coord
    assert np.allclose(alike, alike[0, 0], rtol=1e-4)


def test_shift_moves_all_points_alike_within_its_limits() -> None:
    moves = np.array([(run("RandomShift", seed=s, metres=[0.1, 0.2, 0]).coord - sample().coord) for s in range(20)])
    assert np.allclose(moves, moves[:, :1], atol=1e-6) and np.allclose(moves[..., 2], 0)
    assert (np.abs(moves[:, 0]).max(axis=0) <= [0.1, 0.2, 0]).all() and (
        np.abs(moves[:, 0]).max(axis=0)[:2] > 0.05
    ).all()


def test_flip_of_one_axis() -> None:
    assert np.array_equal(run("RandomFlip", p=1, axes="x").coord, sample().coord * [-1, 1, 1])
    assert np.array_equal(run("RandomFlip", p=1, axes="y").normal, sample().normal * [1, -1, 1])


@given(
    arrays(np.float32, st.tuples(st.integers(1, 20), st.just(3)), elements=st.floats(-200, 200, width=32)),
    st.floats(0.5, 100),
)
def test_clips_equal_their_definitions(coord: NDArray[np.float32], limit: float) -> None:
    points = PointSample(name="s", coord=coord)
    low, high = [-limit, -2 * limit, -4], [limit, 2 * limit, 2]
    boxed = run("PointClip", points, low=low, high=high).coord
    pulled = run("PointClipDistance", points, radius=limit, low=-4, high=2).coord
    assert boxed.dtype == pulled.dtype == np.float32
    for before, in_box, in_ball in zip(coord.astype(np.float64), boxed, pulled, strict=True):
        assert np.allclose(in_box, [min(max(v, a), b) for v, a, b in zip(before, low, high, strict=True)], rtol=1e-5)
        distance = math.sqrt(sum(before**2))
        expected = before * (limit / distance if distance > limit else 1)
        expected[2] = min(max(expected[2], -4), 2)
        assert np.allclose(in_ball, expected, rtol=1e-4, atol=1e-4)


def test_colors_are_dropped_and_normalised() -> None:
    assert not run("ChromaticDrop", p=1).color.any()
    assert np.array_equal(run("ChromaticDrop", p=0).color, sample().color)
    after = run("ChromaticNormalize", mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4])
    expected = (sample().color / 255.0 - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
    assert np.allclose(after.channels(["color"]), expected, atol=1e-5)


def test_height_is_above_the_lowest_point() -> None:
    points = sample()
    fed = points.channels(["height", "strength", "coord"])
    assert fed.shape == (N, 5) and fed.dtype == np.float32
    assert np.array_equal(fed[:, 0], points.coord[:, 2] - points.coord[:, 2].min()) and fed[:, 0].min() == 0


def members(points: PointSample) -> dict[int, NDArray[np.bool_]]:
    return {number: points.instance == number for number in range(6)}


def test_instances_move_as_rigid_bodies() -> None:
    before = sample()
    for name, args in (
        ("InstanceShift", {"metres": [0.3, 0.2, 0.1]}), ("InstanceRotate", {"degrees": 45}),
        ("InstanceFlip", {"flip": 1}), ("InstanceScale", {"low": 1.5, "high": 1.5}),
    ):  # fmt: skip
        after = run(name, p=1, **args)
        assert np.array_equal(after.coord[before.instance < 0], before.coord[before.instance < 0])
        for mask in members(before).values():
            old, new = (c.coord[mask].astype(np.float64) for c in (before, after))
            moved = new.mean(axis=0) - old.mean(axis=0)
            if name == "InstanceShift":
                assert np.allclose(new - old, moved, atol=1e-5) and (np.abs(moved) < [0.3001, 0.2001, 0.1001]).all()
                assert np.abs(moved).max() > 0.001
                continue
            assert np.allclose(moved, 0, atol=1e-5)
            old, new = old - old.mean(axis=0), new - new.mean(axis=0)
            if name == "InstanceScale":
                assert np.allclose(new, 1.5 * old, atol=1e-5)
            elif name == "InstanceFlip":
                assert np.allclose(new, old * [-1, -1, 1], atol=1e-5)
                assert np.array_equal(after.normal[mask], before.normal[mask] * [-1, -1, 1])
            else:
                turn = np.linalg.lstsq(old, new, rcond=None)[0].T
                assert np.allclose(turn @ turn.T, np.eye(3), atol=1e-4) and np.allclose(turn[2], [0, 0, 1], atol=1e-4)
                assert abs(np.degrees(np.arctan2(turn[1, 0], turn[0, 0]))) <= 45.01
                assert np.allclose(after.normal[mask], before.normal[mask] @ turn.T, atol=1e-4)


def test_instances_are_chosen_one_by_one() -> None:
    before, counts = sample(), np.zeros(6)
    for seed in range(200):
        after = run("InstanceShift", seed=seed, p=0.3)
        for number, mask in members(before).items():
            moved = (after.coord[mask] != before.coord[mask]).any(axis=1)
            assert moved.all() or not moved.any()
            counts[number] += moved.any()
    assert (np.abs(counts / 200 - 0.3) < 0.12).all()


def test_instances_without_a_label_are_left_alone() -> None:
    points = sample()
    points.segment[points.instance == 2] = -1
    after = run("InstanceShift", points, p=1)
    moved = (after.coord != points.coord).any(axis=1)
    assert set(points.instance[~moved]) == {-1, 2} and set(points.instance[moved]) == {0, 1, 3, 4, 5}
    # Distillation has no labels at all.
    unlabelled = replace(points, segment=None)
    assert set(points.instance[(run("InstanceShift", unlabelled, p=1).coord == points.coord).all(axis=1)]) == {-1}


def test_instances_swap_places_in_pairs() -> None:
    before, after = sample(), run("InstanceSwap", p=1)
    partner = {}
    for number, mask in members(before).items():
        old, new = before.coord[mask].mean(axis=0), after.coord[mask].mean(axis=0)
        assert np.allclose(after.coord[mask] - before.coord[mask], new - old, atol=1e-5)
        at = [k for k, m in members(before).items() if np.allclose(before.coord[m].mean(axis=0), new, atol=1e-4)]
        assert len(at) == 1
        partner[number] = at[0]
    assert all(partner[partner[n]] == n != partner[n] for n in partner)
    assert np.array_equal(run("InstanceSwap", p=0).coord, before.coord)


def test_labels_and_colors_of_instances_are_dropped() -> None:
    before, after = sample(), run("InstanceLabelDrop", p=1, ratio=0.5)
    for mask in members(before).values():
        gone = (after.segment[mask] == -1) & (before.segment[mask] >= 0)
        chosen = int(mask.sum() * 0.5)  # some of the chosen ones had no label before
        assert 0 < gone.sum() <= chosen <= (after.segment[mask] == -1).sum()
    black = ~run("InstanceColorDrop", p=1).color.any(axis=1)
    assert np.array_equal(black, before.instance >= 0)
