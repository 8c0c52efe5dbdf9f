from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditr_cache.errors import UsageError
from ditr_train.models.backbone import NoTerms
from ditr_train.models.row_norm import RowNorm
from ditr_train.models.sparse_conv import sparse_tensor
from ditr_train.models.sparse_unet import SparseUNet
from ditr_train.models.sparse_unet_config import SparseUNetConfig
from unets import unet_rows

SMALL = SparseUNetConfig(stem_channels=4, channels=(4, 6, 8, 8, 8, 6, 6, 5), layers=(1, 2, 1, 1, 1, 1, 1, 2))


def random_voxels(seed: int, batch: int = 2, count: int = 200, edge: int = 21) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sites = torch.randint(0, edge, (batch * count, 3), generator=generator)
    samples = torch.arange(batch).repeat_interleave(count)
    sites = torch.cat([samples[:, None], sites], dim=1).unique(dim=0)
    sites = sites[torch.randperm(len(sites), generator=generator)]
    return sites[:, 0], sites[:, 1:]


class DenseTwin:
    """The same network on dense grids: every convolution is torch's, masked by the active voxels of its level."""

    def __init__(self, net: SparseUNet, batch: Tensor, grid: Tensor, edge: int) -> None:
        self.net = net
        self.sites = torch.cat([batch[:, None], grid], dim=1)
        self.masks = []
        for level in range(len(net.down) + 1):
            mask = torch.zeros(int(batch.max()) + 1, *[edge >> level] * 3, dtype=torch.bool)
            mask[tuple(torch.cat([batch[:, None], grid >> level], dim=1).T)] = True
            self.masks.append(mask)

    def rows(self, dense: Tensor, level: int, function: nn.Module) -> Tensor:
        mask = self.masks[level]
        last = dense.permute(0, 2, 3, 4, 1)
        active = function(last[mask])
        out = active.new_zeros(*mask.shape, active.shape[1])
        return out.index_put(mask.nonzero(as_tuple=True), active).permute(0, 4, 1, 2, 3)

    @staticmethod
    def submanifold(dense: Tensor, conv: nn.Module) -> Tensor:
        return F.conv3d(dense, conv.weight.permute(0, 4, 1, 2, 3), padding="same")

    def stage(self, dense: Tensor, blocks: nn.Module, level: int) -> Tensor:
        for block in blocks:
            shortcut = self.rows(dense, level, block.shortcut)
            dense = self.rows(self.submanifold(dense, block.conv1), level, block.norm1).relu()
            dense = self.rows(self.submanifold(dense, block.conv2), level, block.norm2)
            dense = (dense + shortcut).relu()
        return dense

    def __call__(self, feat: Tensor) -> Tensor:
        net = self.net
        dense = feat.new_zeros(*self.masks[0].shape, feat.shape[1])
        dense = dense.index_put(tuple(self.sites.T), feat).permute(0, 4, 1, 2, 3)
        dense = self.rows(self.submanifold(dense, net.stem.conv), 0, net.stem.norm).relu()
        skips = [dense]
        for level, (down, blocks) in enumerate(zip(net.down, net.encoder, strict=True), start=1):
            dense = F.conv3d(dense, down.conv.weight.permute(0, 4, 1, 2, 3), stride=2)
            dense = self.stage(self.rows(dense, level, down.norm).relu(), blocks, level)
            skips.append(dense)
        for up, blocks, level in zip(net.up, net.decoder, reversed(range(len(net.up))), strict=True):
            dense = F.conv_transpose3d(dense, up.conv.weight.permute(4, 0, 1, 2, 3), stride=2)
            dense = self.rows(dense, level, up.norm).relu()
            dense = self.stage(torch.cat([dense, skips[level]], dim=1), blocks, level)
        return dense.permute(0, 2, 3, 4, 1)[tuple(self.sites.T)]


def distinct_weights(net: nn.Module) -> None:
    """Weights and statistics far from their initial values, at a scale at which every layer matters."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, RowNorm):
                for value in (module.weight, module.running_var):
                    value.uniform_(0.5, 1.5, generator=generator)
                for value in (module.bias, module.running_mean):
                    value.uniform_(-0.3, 0.3, generator=generator)
            elif isinstance(getattr(module, "weight", None), nn.Parameter):
                fan_in = module.weight[0].numel()
                module.weight.normal_(std=fan_in**-0.5, generator=generator)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_a_dense_network_with_the_same_weights(train: bool, seed: int) -> None:
    batch, grid = random_voxels(seed)
    net = SparseUNet(SMALL, in_channels=3)
    distinct_weights(net)
    net.train(train)
    feat = torch.randn(len(grid), 3, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    twin = copy.deepcopy(net)
    out = unet_rows(net, sparse_tensor(feat, grid, batch, 2, 4))
    expected = DenseTwin(twin, batch, grid, 32)(feat)
    assert out.std() > 0.1
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)

    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)) / len(out)
    ours = torch.autograd.grad((out * weights).sum(), [feat, *net.parameters()])
    theirs = torch.autograd.grad((expected * weights).sum(), [feat, *twin.parameters()])
    for a, b in zip(ours, theirs, strict=True):
        # A ReLU whose input is zero to rounding may fall on either side of it, so the measure is the whole gradient.
        assert float((a - b).norm()) <= 1e-3 * float(b.norm()) + 1e-6


def test_published_shape() -> None:
    net = SparseUNet(SparseUNetConfig(), in_channels=6)
    head = 96 * 20 + 20
    assert sum(p.numel() for p in net.parameters()) + head == pytest.approx(39.2e6, rel=2e-3)
    norms = [module for module in net.modules() if isinstance(module, RowNorm)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}
    assert SparseUNetConfig().decoder_terms == (32, 32, 64, 128)
    assert any("block" in name for name, _ in net.named_parameters())


@pytest.mark.parametrize("place", ["encoder", "decoder"])
def test_terms_are_added_to_the_output_of_the_convolutions_or_to_the_skips(place: str) -> None:
    batch, grid = random_voxels(0)
    net = SparseUNet(SMALL, in_channels=3).eval()
    distinct_weights(net)
    voxels = sparse_tensor(torch.randn(len(grid), 3), grid, batch, 2, 4)

    class Random(NoTerms):
        def __init__(self) -> None:
            self.given: dict[int, torch.Tensor] = {}
            self.sites: dict[int, torch.Tensor] = {}

        def term(self, level: int, sites: torch.Tensor) -> torch.Tensor | None:
            assert level not in self.given
            channels = (SMALL.encoder_terms if place == "encoder" else SMALL.decoder_terms)[level]
            self.given[level] = torch.randn(len(sites), channels, generator=torch.Generator().manual_seed(level))
            self.sites[level] = sites
            return None if level == 1 else self.given[level]

    terms = Random()
    setattr(terms, place, terms.term)
    rows = unet_rows(net, voxels, terms)
    assert list(terms.given) == ([0, 1, 2, 3, 4] if place == "encoder" else [3, 2, 1, 0])

    def plus(x: Any, level: int, here: str) -> Any:
        if here == place:
            assert torch.equal(terms.sites[level], x.indices)
        return x.replace_feature(x.features + terms.given[level]) if here == place and level != 1 else x

    levels = [plus(net.stem(voxels), 0, "encoder")]
    for level, (down, blocks) in enumerate(zip(net.down, net.encoder, strict=True), start=1):
        levels.append(blocks(plus(down(levels[-1]), level, "encoder")))
    x = levels.pop()
    for up, blocks, level in zip(net.up, net.decoder, [3, 2, 1, 0], strict=True):
        skip = plus(levels[level], level, "decoder")
        up_x = up(x)
        x = blocks(up_x.replace_feature(torch.cat([up_x.features, skip.features], dim=1)))
    torch.testing.assert_close(rows, x.features)
    assert not torch.allclose(rows, unet_rows(net, voxels), atol=1e-2)


def test_other_depths() -> None:
    batch, grid = random_voxels(0)
    config = SparseUNetConfig(stem_channels=4, stem_kernel_size=3, channels=(5, 6), layers=(1, 1))
    voxels = sparse_tensor(torch.randn(len(grid), 3), grid, batch, 2, 1)
    assert unet_rows(SparseUNet(config, 3), voxels).shape == (len(grid), 6)


def test_row_norm_takes_one_row_and_none() -> None:
    norm = RowNorm(3).train()
    norm.running_mean.fill_(1.0)
    row = torch.tensor([[1.0, 2.0, 3.0]])
    torch.testing.assert_close(norm(row), row - 1.0, atol=1e-4, rtol=1e-4)
    assert norm(row[:0]).shape == (0, 3)
    assert torch.equal(norm.running_mean, torch.ones(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": (8, 8, 8)}, "even number"),
        ({"layers": (1, 1)}, "layers"),
        ({"channels": (8, 0), "layers": (1, 1)}, "positive"),
        ({"channels": (8, 8), "layers": (1, 0)}, "at least 1"),
        ({"stem_kernel_size": 4}, "odd"),
        ({"norm_momentum": 0.0}, "norm_momentum"),
        ({"norm_eps": float("nan")}, "norm_eps"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SparseUNetConfig(**settings)
