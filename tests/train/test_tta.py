from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditr_cache.errors import UnknownNameError, UsageError
from ditr_train.data.sample import PointSample
from ditr_train.recipe import parse_recipe
from ditr_train.recipe_files import load_recipe
from ditr_train.tta import TTA_SETS, Augmentation, tta_set

BASE = {"data": {"grid_size": 0.1, "feat": ["color"], "batch_size": 2}, "training": {"epochs": 1}}


def cloud(n: int = 50) -> PointSample:
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(n, 3)).astype(np.float32)
    return PointSample(
        name="a",
        coord=rng.uniform(-2, 2, (n, 3)).astype(np.float32),
        color=rng.uniform(0, 255, (n, 3)).astype(np.float32),
        normal=normal / np.linalg.norm(normal, axis=1, keepdims=True),
        segment=np.arange(n),
        row=np.arange(n),
    )


@settings(max_examples=60, deadline=None)
@given(
    rotate=st.one_of(st.sampled_from([0.0, 90.0, 180.0, 270.0, -90.0, 450.0]), st.floats(-400, 400)),
    scale=st.floats(0.5, 2),
    flip=st.sampled_from(["none", "x", "y", "xy"]),
)
def test_every_point_goes_where_the_formula_says(rotate: float, scale: float, flip: str) -> None:
    before = cloud()
    after = Augmentation(rotate=rotate, scale=scale, flip=flip)(before)  # type: ignore[arg-type]
    assert before.normal is not None and after.normal is not None
    c, s = math.cos(math.radians(rotate)), math.sin(math.radians(rotate))
    for old, new, factor in ((before.coord, after.coord, scale), (before.normal, after.normal, 1.0)):
        assert new.dtype == np.float32 and new.flags.c_contiguous
        for (x, y, z), moved in zip(old.tolist(), new.tolist(), strict=True):
            turned = [c * x - s * y, s * x + c * y, z]
            turned[0] *= -1 if "x" in flip else 1
            turned[1] *= -1 if "y" in flip else 1
            assert moved == pytest.approx([factor * v for v in turned], abs=1e-5)
    assert after.color is before.color and after.row is before.row and after.segment is before.segment


def test_quarter_turns_are_exact() -> None:
    points = cloud()
    x, y, z = points.coord.T
    assert (Augmentation(rotate=90)(points).coord == np.stack([-y, x, z], axis=1)).all()
    assert (Augmentation(rotate=180)(points).coord == Augmentation(flip="xy")(points).coord).all()
    assert (Augmentation(rotate=-90)(points).coord == Augmentation(rotate=270)(points).coord).all()
    assert (Augmentation()(points).coord == points.coord).all()


def test_the_published_sets() -> None:
    assert {name: len(augmentations) for name, augmentations in TTA_SETS.items()} == {
        "none": 1, "scannet": 13, "scannet200": 13, "scannet200-spunet": 4, "s3dis": 10, "nuscenes": 10,
        "semantickitti": 4, "waymo": 4,
    }  # fmt: skip
    assert all(len(set(augmentations)) == len(augmentations) for augmentations in TTA_SETS.values())
    assert {(a.rotate, a.scale) for a in TTA_SETS["scannet"] if a.flip == "none"} == {
        (angle, scale) for angle in (0, 90, 180, 270) for scale in (1, 0.95, 1.05)
    }
    assert {(a.scale, a.flip) for a in TTA_SETS["nuscenes"]} == {
        (scale, flip) for scale in (0.9, 0.95, 1, 1.05, 1.1) for flip in ("none", "xy")
    }
    assert tta_set("waymo") == tuple(Augmentation(rotate=angle) for angle in (0, 90, 180, 270))


def test_recipes_name_a_set_or_list_augmentations() -> None:
    assert parse_recipe(BASE).evaluation.tta == "none"
    assert load_recipe("demo/plain", ["evaluation.tta=scannet"]).evaluation.tta == "scannet"
    listed = parse_recipe({**BASE, "evaluation": {"tta": [{"rotate": 45}, {"flip": "y", "scale": 1.1}]}})
    assert listed.evaluation.tta == (Augmentation(rotate=45), Augmentation(flip="y", scale=1.1))


@pytest.mark.parametrize(
    ("evaluation", "error", "message"),
    [
        ({"tta": "scanet"}, UnknownNameError, "did you mean 'scannet'"),
        ({"tta": []}, UsageError, "evaluation.tta: .*at least one"),
        ({"tta": [{"rotat": 90}]}, UnknownNameError, r"evaluation\.tta\.0\.rotat.*did you mean 'rotate'"),
        ({"tta": [{}, {"scale": 0}]}, UsageError, r"evaluation\.tta.*1.*positive scale"),
        ({"tta": [{"rotate": float("inf")}]}, UsageError, "finite rotate"),
        ({"tta": [{"flip": "z"}]}, UsageError, "'xy'.*got 'z'"),
        ({"tta": 4}, UsageError, r"evaluation\.tta"),
        ({"pre_grid_size": 0}, UsageError, r"evaluation\.pre_grid_size.*greater than 0"),
        ({"protocol": "full"}, UnknownNameError, "'protocol'"),
    ],
)
def test_wrong_settings_are_refused_with_the_recipe(
    evaluation: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        parse_recipe({**BASE, "evaluation": evaluation})
