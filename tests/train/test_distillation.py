"""The distillation network and its loss, against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ditr_cache.errors import DataError, MismatchError, UsageError
from ditr_train.data.sample import FeatureRows, PointBatch
from ditr_train.losses import distillation_loss
from ditr_train.models import distillation
from ditr_train.models.build import build_distiller
from ditr_train.models.config import InjectionConfig, ModelConfig
from ditr_train.models.distillation import Distiller
from ditr_train.models.sparse_unet_config import SparseUNetConfig

SMALL = SparseUNetConfig(stem_channels=8, stem_kernel_size=3, channels=(8, 16, 16, 8), layers=(1, 1, 1, 1))
DIM = 24


def batch(seed: int = 0, points: int = 120, *, int8: bool = True, seen: float = 0.6) -> PointBatch:
    generator = torch.Generator().manual_seed(seed)
    grid = torch.unique(torch.randint(0, 12, (points, 3), generator=generator), dim=0).int()
    n = len(grid)
    rows = torch.randn(30, DIM, generator=generator)
    scale = rows.abs().amax(dim=1) / 127 if int8 else None
    table = (rows / scale[:, None]).round().to(torch.int8) if scale is not None else rows.half()
    index = torch.randint(0, 30, (n,), generator=generator)
    index[torch.rand(n, generator=generator) >= seen] = -1
    return PointBatch(
        coord=grid.float(),
        grid_coord=grid,
        feat=torch.randn(n, 4, generator=generator),
        offset=torch.tensor([n]),
        segment=None,
        features=FeatureRows(table=table, scale=scale, index=index),
        names=("room",),
    )


def network(seed: int = 0) -> Distiller:
    torch.manual_seed(seed)
    model = build_distiller(ModelConfig(backbone=SMALL), in_channels=4, feature_dim=DIM)
    torch.nn.init.normal_(model.head.bias)
    return model


def plain_cosine(model: Distiller, of: PointBatch) -> Tensor:
    assert of.features is not None
    values = of.features.table.float()
    if of.features.scale is not None:
        values = values * of.features.scale[:, None]
    seen = of.features.index >= 0
    predicted = model.head(model.point_features(of))
    return F.cosine_similarity(predicted[seen], values[of.features.index[seen]], dim=1)


@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("portion", [1 << 20, 5 * DIM])
def test_cosine_and_gradients_are_those_of_plain_torch(
    int8: bool, portion: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(distillation._PORTION_ELEMENTS, "cpu", portion)
    of, ours, plain = batch(int8=int8), network(), network()
    distillation_loss(ours(of)).backward()
    cosine = plain_cosine(plain, of)
    (1 - cosine).mean().backward()
    with torch.no_grad():
        torch.testing.assert_close(network()(of), cosine)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_gradients_hold_against_finite_differences() -> None:
    of = batch(points=12)
    assert of.features is not None
    seen = of.features.index >= 0
    generator = torch.Generator().manual_seed(1)
    points, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((int(seen.sum()), 5), (DIM, 5), (DIM,))
    )
    rows = of.features.index[seen]
    exact = FeatureRows(table=of.features.table, scale=of.features.scale, index=of.features.index)
    assert torch.autograd.gradcheck(
        lambda *t: distillation._CosineToRows.apply(*t, exact, rows), (points, weight, bias)
    )


def test_points_without_a_feature_take_no_part() -> None:
    of, model = batch(), network()
    assert of.features is not None
    seen = int((of.features.index >= 0).sum())
    assert 0 < seen < len(of.coord) and model(of).shape == (seen,)


@pytest.mark.parametrize("points", [0, 120])
def test_a_batch_without_any_feature_gives_zero_gradients_to_every_parameter(points: int) -> None:
    of, model = batch(points=120), network()
    assert of.features is not None
    of.features.index.fill_(-1)
    if points == 0:
        of.coord, of.grid_coord, of.feat = of.coord[:0], of.grid_coord[:0], of.feat[:0]
        of.features.index, of.offset = of.features.index[:0], torch.tensor([0])
    loss = distillation_loss(model(of))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_directions_of_no_length_give_no_gradient_without_bound() -> None:
    """All features of a point may be 0 behind a ReLU, and the bias of the head begins at 0."""
    of, model = batch(), network()
    torch.nn.init.zeros_(model.head.bias)
    torch.nn.init.zeros_(model.head.weight)
    distillation_loss(model(of)).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert of.features is not None and of.features.scale is not None
    of.features.scale.zero_()
    assert not network()(of).any()


def test_bad_input_is_named() -> None:
    of, model = batch(), network()
    assert of.features is not None
    of.features.table = of.features.table[:, :-1]
    with pytest.raises(MismatchError, match=f"of {DIM} channels, the batch holds rows of {DIM - 1}"):
        model(of)
    of.features = None
    with pytest.raises(DataError, match="the batch of room has none"):
        model(of)
    with pytest.raises(UsageError, match="must be positive"):
        build_distiller(ModelConfig(backbone=SMALL), in_channels=4, feature_dim=0)
    with pytest.raises(UsageError, match="cannot learn to predict them"):
        build_distiller(ModelConfig(backbone=SMALL, injection=InjectionConfig()), in_channels=4, feature_dim=8)
