from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ditr_cache.errors import DataError, MismatchError, UsageError
from ditr_train.data.sample import FeatureRows, PointBatch
from ditr_train.models.build import build_segmentor
from ditr_train.models.config import InjectionConfig, ModelConfig
from ditr_train.models.segmentor import Segmentor
from ditr_train.models.sparse_unet_config import SparseUNetConfig

DIM = 6
BACKBONE = SparseUNetConfig(
    stem_channels=4, channels=(4, 6, 8, 8, 8, 6, 6, 5), layers=(1,) * 8, norm_momentum=0.1, stem_kernel_size=3
)


def make_batch(seed: int = 0, samples: int = 2, count: int = 120, edge: int = 14) -> PointBatch:
    generator = torch.Generator().manual_seed(seed)
    grids = []
    for _ in range(samples):
        grid = torch.randint(0, edge, (count, 3), generator=generator).unique(dim=0)
        grids.append(grid[torch.randperm(len(grid), generator=generator)])
    grid_coord = torch.cat(grids).int()
    num_points = len(grid_coord)
    index = torch.randint(0, 40, (num_points,), generator=generator)
    index[torch.rand(num_points, generator=generator) < 0.3] = -1
    return PointBatch(
        coord=grid_coord * 0.02,
        grid_coord=grid_coord,
        feat=torch.randn(num_points, 3, generator=generator),
        offset=torch.tensor([len(grid) for grid in grids]).cumsum(0),
        segment=torch.randint(0, 4, (num_points,), generator=generator),
        features=FeatureRows(
            table=torch.randint(-127, 128, (40, DIM), generator=generator, dtype=torch.int8),
            scale=torch.rand(40, generator=generator) * 0.05,
            index=index,
        ),
        names=tuple(f"scene{i}" for i in range(samples)),
    )


def take(batch: PointBatch, index: Tensor, counts: list[int]) -> PointBatch:
    assert batch.segment is not None and batch.features is not None
    return replace(
        batch,
        coord=batch.coord[index],
        grid_coord=batch.grid_coord[index],
        feat=batch.feat[index],
        segment=batch.segment[index],
        features=replace(batch.features, index=batch.features.index[index]),
        offset=torch.tensor(counts).cumsum(0),
        names=tuple(str(i) for i in range(len(counts))),
    )


INJECT = InjectionConfig()


def make(injection: InjectionConfig | None = INJECT, seed: int = 0) -> Segmentor:
    torch.manual_seed(seed)
    model = build_segmentor(
        ModelConfig(backbone=BACKBONE, injection=injection), in_channels=3, num_classes=4, feature_dim=DIM
    )
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


CONFIGS = {
    "plain": None,
    "mean": INJECT,
    "max": InjectionConfig(pool="max"),
    "embedding": InjectionConfig(missing_embedding=True),
    "everywhere": InjectionConfig(encoder=(0, 2, 4), input=True, pool="zero_max", visibility_flag=True),
    "input": InjectionConfig(decoder=(), input=True, visibility_flag=True, missing_embedding=True),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@each_config
def test_points_move_their_scores_with_them(config: InjectionConfig | None) -> None:
    batch, model = make_batch(), make(config).eval()
    first = int(batch.offset[0])
    order = torch.cat([torch.randperm(first), first + torch.randperm(len(batch.coord) - first)])
    scores = model(batch)
    assert scores.shape == (len(batch.coord), 4) and scores.dtype == torch.float32 and scores.std() > 1e-2
    permuted = model(take(batch, order, torch.diff(batch.offset, prepend=torch.tensor([0])).tolist()))
    torch.testing.assert_close(permuted, scores[order], atol=1e-4, rtol=1e-4)


@each_config
def test_samples_of_a_batch_do_not_see_each_other(config: InjectionConfig | None) -> None:
    batch, model = make_batch(), make(config).eval()
    first, total = batch.offset.tolist()
    alone = [model(take(batch, torch.arange(a, b), [b - a])) for a, b in ((0, first), (first, total))]
    torch.testing.assert_close(torch.cat(alone), model(batch), atol=1e-4, rtol=1e-4)


@each_config
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_hardly_any_points(config: InjectionConfig | None, train: bool, count: int) -> None:
    batch, model = make_batch(), make(config).train(train)
    scores = model(take(batch, torch.arange(count), [count]))
    assert scores.shape == (count, 4) and bool(torch.isfinite(scores).all())
    scores.sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_a_sample_without_points_in_a_batch() -> None:
    batch, model = make_batch(), make().eval()
    first, total = batch.offset.tolist()
    gap = replace(batch, offset=torch.tensor([first, first, total]), names=("a", "b", "c"))
    torch.testing.assert_close(model(gap), model(batch), atol=1e-5, rtol=1e-5)


def test_features_teach_what_points_cannot_tell() -> None:
    def with_labels(seed: int) -> tuple[PointBatch, Tensor]:
        batch = make_batch(seed)
        assert batch.features is not None
        index = torch.randint(0, 40, (len(batch.coord),), generator=torch.Generator().manual_seed(seed))
        labels = (batch.features.table[index][:, 0] > 0).long()
        return replace(batch, feat=torch.ones_like(batch.feat), features=replace(batch.features, index=index)), labels

    (seen, seen_labels), (unseen, unseen_labels) = with_labels(0), with_labels(1)
    accuracy = {}
    for name in ("plain", "mean"):
        torch.manual_seed(0)
        model = build_segmentor(
            ModelConfig(backbone=BACKBONE, injection=CONFIGS[name]), in_channels=3, num_classes=2, feature_dim=DIM
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(model(seen), seen_labels).backward()
            optimizer.step()
        accuracy[name] = (model.eval()(unseen).argmax(dim=1) == unseen_labels).float().mean().item()
    assert accuracy["plain"] < 0.6 < 0.75 < accuracy["mean"]


def test_same_seed_same_weights_and_a_checkpoint_restores_them(tmp_path: Path) -> None:
    batch, model = make_batch(), make()
    model.train()(batch)
    model.eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = make(seed=1).eval()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other(batch), model(batch))
    assert all(torch.equal(a, b) for a, b in zip(make().parameters(), make().parameters(), strict=True))


def test_autocast_on_the_cpu_runs_and_stays_close() -> None:
    batch, model = make_batch(), make()
    expected = copy.deepcopy(model)(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model(batch)
    scores.sum().backward()
    assert scores.dtype == torch.float32
    assert ((scores - expected).norm() / expected.norm()).item() < 0.05


def test_synchronised_batch_norm_can_replace_the_norms() -> None:
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(make())
    assert torch.equal(model.eval()(make_batch()), make().eval()(make_batch()))


def test_injection_without_features_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"scene0, scene1 has none; choose a VFM"):
        make()(replace(make_batch(), features=None))
    plain = make(None).eval()
    assert torch.equal(plain(replace(make_batch(), features=None)), plain(make_batch()))


def test_input_of_another_width_is_refused() -> None:
    batch = make_batch()
    with pytest.raises(MismatchError, match=r"3 channels, the batch has 2"):
        make()(replace(batch, feat=batch.feat[:, :2]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0, "num_classes": 2, "feature_dim": 3}, "in_channels"),
        ({"in_channels": 3, "num_classes": 0, "feature_dim": 3}, "num_classes"),
        ({"in_channels": 3, "num_classes": 2, "feature_dim": None}, "choose a VFM"),
        ({"in_channels": 3, "num_classes": 2, "feature_dim": 0}, "choose a VFM"),
    ],
)
def test_impossible_sizes_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_segmentor(ModelConfig(backbone=BACKBONE, injection=InjectionConfig()), **arguments)
