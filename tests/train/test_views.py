"""Training from a cache in the layout `views`: which view gives a point its feature, and when it is drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ditr_cache.errors import MismatchError, UnknownNameError, UsageError
from ditr_cache.store import open_cache
from ditr_train.data.dataset import CachedDataset
from ditr_train.data.loader import BatchLoader, TrainBatches, TrainPlan
from ditr_train.data.transforms import build_transform
from ditr_train.models.build import build_segmentor
from ditr_train.models.config import InjectionConfig, ModelConfig
from ditr_train.models.sparse_unet_config import SparseUNetConfig
from ditr_train.recipe import parse_recipe
from plain_rows import decode

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def views_cache(make_cache: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("views") / "cache", layout="views", numbered=True)


def dataset(cache: Path, split: str = "train", **settings: Any) -> CachedDataset:
    return CachedDataset(open_cache(cache), split, **{"grid_size": 0.1, "feat": ("color",), "vfm": "fake", **settings})


def test_training_draws_views_and_evaluation_takes_the_last(views_cache: Path) -> None:
    data, last = dataset(views_cache), dataset(views_cache, view="last")
    expected = last.eval_sample(0)
    assert expected.row is not None and 0 < (expected.row >= 0).sum() < len(expected.row)
    for chosen in (data, dataset(views_cache, view="random")):
        sample = chosen.eval_sample(0)
        assert np.array_equal(sample.table, expected.table) and np.array_equal(sample.row, expected.row)
    draws = [data.train_sample(0, np.random.default_rng(seed)) for seed in range(6)]
    fixed = [last.train_sample(0, np.random.default_rng(seed)) for seed in range(6)]
    assert any(not np.array_equal(a.table, b.table) for a, b in zip(draws, fixed, strict=True))
    for a, b in zip(draws, fixed, strict=True):
        # Which view is drawn changes nothing else: voxels, their points and what has a feature are the same.
        assert np.array_equal(a.feat, b.feat) and np.array_equal(a.coord, b.coord)
        assert a.row is not None and b.row is not None and np.array_equal(a.row >= 0, b.row >= 0)
        assert a.table is not None and len(a.table) == len(np.unique(a.row[a.row >= 0])), "only rows that are used"


def test_nearest_is_nearest_in_both(views_cache: Path) -> None:
    """Depth falls from view to view here, so that the last is the nearest."""
    nearest, last = dataset(views_cache, view="nearest"), dataset(views_cache, view="last")
    for a, b in (
        (nearest.eval_sample(1), last.eval_sample(1)),
        (nearest.train_sample(1, np.random.default_rng(4)), last.train_sample(1, np.random.default_rng(4))),
    ):
        assert np.array_equal(a.table, b.table) and np.array_equal(a.row, b.row)


def test_rows_stay_with_their_points(make_cache: Make, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", layout="views", numbered=True, points=100, train=1, val=0)
    data = dataset(cache, transforms=[build_transform("RandomRotate", {"p": 1})], grid_size=0.02)
    stored = data.cache.read_stored("room00", None)
    assert stored.color is not None
    views = set()
    for seed in range(8):
        sample = data.train_sample(0, np.random.default_rng(seed))
        assert sample.table is not None and sample.row is not None
        rows = decode(sample.table, sample.scale)
        for voxel in np.flatnonzero(sample.row >= 0):
            point, view = rows[sample.row[voxel], 1:3]  # both below 100: an int8 step is less than one
            assert np.array_equal(sample.feat[voxel], stored.color[round(float(point))] / np.float32(255))
            views.add(round(float(view)))
    assert views == {0, 1, 2}


def test_draws_are_decided_by_seed_epoch_and_position(views_cache: Path) -> None:
    data = dataset(views_cache, transforms=[build_transform("RandomDropout", {"p": 1})])
    plan = TrainPlan(sizes=(len(data),), batch_size=2, seed=7)
    steps = 2 * plan.steps_per_epoch

    def tables(start: int, stop: int = steps, workers: int = 0, seed: int = 7) -> list[torch.Tensor]:
        loader = BatchLoader(TrainBatches(data, seed=seed), plan.batches(start, stop), workers=workers)
        found = []
        for batch in loader:
            assert batch.features is not None
            found.append(torch.cat([batch.features.table.flatten().long(), batch.features.index]))
        return found

    whole = tables(0)
    for same in (tables(0, workers=2), [*tables(0, 1), *tables(1)]):
        assert all(torch.equal(a, b) for a, b in zip(whole, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(whole, tables(0, seed=8), strict=True))

    for index in range(len(data)):
        first, second = (data.train_sample(index, np.random.default_rng([7, 1, epoch, index])) for epoch in (0, 1))
        assert not np.array_equal(first.table, second.table), "another draw in each epoch"


def test_a_choice_that_the_cache_does_not_leave(views_cache: Path, tiny_cache: Path) -> None:
    for view in ("random", "last", "nearest"):
        with pytest.raises(MismatchError, match=r"holds one feature per point.*--layout views"):
            dataset(tiny_cache, view=view)
        assert len(dataset(tiny_cache, view=view, vfm=None)) == 4, "nothing is read, nothing is chosen"
    with pytest.raises(UnknownNameError, match="did you mean 'random'"):
        dataset(views_cache, view="randm")


def test_the_recipe_names_it() -> None:
    values: dict[str, Any] = {
        "data": {"grid_size": 0.1, "feat": ["color"], "batch_size": 2}, "training": {"epochs": 1},
    }  # fmt: skip
    assert parse_recipe(values).data.view is None
    for view in ("random", "last", "nearest"):
        values["data"]["view"] = view
        assert parse_recipe(values).data.view == view
    values["data"]["view"] = "first"
    with pytest.raises(UsageError, match=r"data\.view"):
        parse_recipe(json.loads(json.dumps(values)))


def test_two_steps_with_injection(views_cache: Path) -> None:
    data = dataset(views_cache)
    assert data.vfm is not None and data.vfm.layout == "views"
    backbone = SparseUNetConfig(stem_channels=8, stem_kernel_size=3, channels=(8, 8, 8, 8), layers=(1, 1, 1, 1))
    torch.manual_seed(0)
    model = build_segmentor(
        ModelConfig(backbone=backbone, injection=InjectionConfig()),
        in_channels=data.in_channels,
        num_classes=3,
        feature_dim=data.vfm.dim,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    plan = TrainPlan(sizes=(len(data),), batch_size=2, seed=0)
    for batch in BatchLoader(TrainBatches(data, seed=0), plan.batches(0, 2)):
        assert batch.segment is not None
        loss = torch.nn.functional.cross_entropy(model(batch), batch.segment, ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        projections = [p.grad for name, p in model.named_parameters() if "inject" in name and p.grad is not None]
        assert torch.isfinite(loss) and projections and all(torch.isfinite(g).all() for g in projections)
        assert any(g.abs().max() > 0 for g in projections)
        optimizer.step()
