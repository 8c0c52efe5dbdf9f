"""`PointTransformerV3`: attention among voxels that are near one another along space-filling curves, in a U-Net.

Resolution l has one site per occupied voxel of 2^l grid cells. Every stage of blocks works at one resolution; pooling
by maximum leads to the next coarser one, and the decoder adds the way back to the encoder's features. Sources: Wu et
al. 2024 (arXiv 2312.10035) and, for the variant "sonata", Wu et al. 2025 (arXiv 2503.16429). With the same weights both
compute what the code published with them computes. Where ours differs on purpose: orders are shuffled in training only,
so that evaluation is deterministic, and no sample changes the patches or the curves of another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditr_train.data.sample import PointBatch
from ditr_train.models.backbone import Backbone, Terms
from ditr_train.models.patch_attention import PatchAttention, Patches
from ditr_train.models.ptv3_config import PTv3Config
from ditr_train.models.ptv3_geometry import PreparedPatches, Resolution, prepare_patches
from ditr_train.models.row_norm import RowNorm
from ditr_train.models.segment_pool import segment_max
from ditr_train.models.sparse_conv import SubMConv3d


class PointTransformerV3(Backbone[PreparedPatches]):
    """Encoder and decoder over voxels; weights are initialised as the published code of the variant does.

    "sonata": truncated normal of deviation 0.02, biases zero. Otherwise the defaults of torch and spconv.

    Args:
        config: shape of the network.
        in_channels: channels of the input points.
    """

    def __init__(self, config: PTv3Config, in_channels: int) -> None:
        super().__init__(in_channels, config.out_channels)
        self.config = config
        channels = config.encoder_channels
        self.embedding = _Embedding(in_channels, channels[0], config)
        # Keyed by resolution.
        self.down, self.encoder = nn.ModuleDict(), nn.ModuleDict()
        rates = _by_stage(config.drop_path, config.encoder_depths)
        for level, width in enumerate(channels):
            if level > 0:
                self.down[f"{level}"] = _Pooling(channels[level - 1], width, config)
            self.encoder[f"{level}"] = _Stage(width, config.encoder_heads[level], rates[level], config)

        self.up, self.decoder = nn.ModuleDict(), nn.ModuleDict()
        rates = _by_stage(config.drop_path, config.decoder_depths)
        coarse = channels[-1]
        for level in reversed(range(len(config.decoder_channels))):
            width = config.decoder_channels[level]
            self.up[f"{level}"] = _Unpooling(coarse, channels[level], width, config)
            self.decoder[f"{level}"] = _Stage(width, config.decoder_heads[level], rates[level][::-1], config)
            coarse = width
        if config.variant == "sonata":
            self.apply(_initialise)

    def prepare(self, batch: PointBatch) -> PreparedPatches:
        """See `Backbone`. In training mode, draws the orders of the curves from torch's global generator."""
        sites = torch.cat([batch.batch_index()[:, None].int(), batch.grid_coord.int()], dim=1)
        orders, curves = self.config.orders, []
        for level, encoder_depth in enumerate(self.config.encoder_depths):
            depth = max((encoder_depth, *self.config.decoder_depths[level : level + 1]))
            drawn = torch.randperm(len(orders)).tolist() if self.training and self.config.shuffle_orders else None
            shuffled = orders if drawn is None else [orders[i] for i in drawn]
            curves.append(shuffled[:depth])
        return prepare_patches(
            sites,
            len(batch.offset),
            curves=curves,
            patch_size=self.config.patch_size,
            variant=self.config.variant,
        )

    def forward(self, prepared: PreparedPatches, feat: Tensor, terms: Terms) -> Tensor:
        """See `Backbone`."""
        resolutions = prepared.resolutions
        feat = _plus(self.embedding(feat, resolutions[0]), terms.encoder(0, resolutions[0].sites))
        skips = [self.encoder["0"](feat, resolutions[0], feat)]
        for level, resolution in enumerate(resolutions[1:], start=1):
            feat = self.down[f"{level}"](skips[-1], resolutions[level - 1], len(resolution.sites))
            feat = _plus(feat, terms.encoder(level, resolution.sites))
            skips.append(self.encoder[f"{level}"](feat, resolution, feat))

        feat = skips[-1]
        for level in reversed(range(self.config.num_stages)):
            resolution = resolutions[level]
            if not self.decoder:
                feat = torch.cat([skips[level], _spread(feat, resolution)], dim=1)
                continue
            skip, coarse = self.up[f"{level}"](skips[level], feat)
            feat = _plus(skip + _spread(coarse, resolution), terms.decoder(level, resolution.sites))
            # In the published ptv3 the first convolution does not see what was added to the skip.
            feat = self.decoder[f"{level}"](feat, resolution, feat if self.config.variant == "sonata" else skip)
        return feat


class _Embedding(nn.Module):
    def __init__(self, in_channels: int, channels: int, config: PTv3Config) -> None:
        super().__init__()
        self.conv: SubMConv3d | None = None
        if config.variant == "sonata":
            self.linear = nn.Linear(in_channels, channels)
        else:
            self.conv = SubMConv3d(in_channels, channels, 5, bias=False, indice_key="stem")
        self.norm = _norm(channels, config)

    def forward(self, feat: Tensor, resolution: Resolution) -> Tensor:
        feat = self.linear(feat) if self.conv is None else _convolve(self.conv, feat, resolution)
        return F.gelu(self.norm(feat))


class _Pooling(nn.Module):
    def __init__(self, in_channels: int, channels: int, config: PTv3Config) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, channels)
        self.norm = _norm(channels, config)

    def forward(self, feat: Tensor, finer: Resolution, size: int) -> Tensor:
        assert finer.parent is not None
        return F.gelu(self.norm(segment_max(self.linear(feat), finer.parent, size)))


class _Unpooling(nn.Module):
    def __init__(self, coarse_channels: int, skip_channels: int, channels: int, config: PTv3Config) -> None:
        super().__init__()
        self.skip = _LinearNormGELU(skip_channels, channels, config)
        self.coarse = _LinearNormGELU(coarse_channels, channels, config)

    def forward(self, skip: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        return self.skip(skip), self.coarse(coarse)


class _LinearNormGELU(nn.Module):
    def __init__(self, in_channels: int, channels: int, config: PTv3Config) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, channels)
        self.norm = _norm(channels, config)

    def forward(self, feat: Tensor) -> Tensor:
        return F.gelu(self.norm(self.linear(feat)))


class _Stage(nn.Module):
    def __init__(self, channels: int, heads: int, drop_rates: Sequence[float], config: PTv3Config) -> None:
        super().__init__()
        # Named for the parameter groups: the recipes give a lower learning rate to names that contain "block".
        for i, rate in enumerate(drop_rates):
            self.add_module(f"block{i}", _Block(channels, heads, rate, config))

        self.sees_branch = config.variant == "ptv3-v1.5.1"

    def forward(self, feat: Tensor, resolution: Resolution, seen: Tensor) -> Tensor:
        """[M, C] -> [M, C]; the first block's convolution reads `seen` [M, C]."""
        for i, block in enumerate(self.children()):
            feat, branch = block(feat, seen, resolution, resolution.patches[i % len(resolution.patches)])
            seen = branch if self.sees_branch else feat
        return feat


class _Block(nn.Module):
    def __init__(self, channels: int, heads: int, drop_rate: float, config: PTv3Config) -> None:
        super().__init__()
        hidden = int(channels * config.mlp_ratio)
        self.drop_rate = drop_rate
        self.cpe = _PositionalEncoding(channels)
        self.norm1 = nn.LayerNorm(channels)
        self.attention = PatchAttention(channels, heads, config.patch_size if config.rpe else None)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(channels, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, channels))
        )

    def forward(self, feat: Tensor, seen: Tensor, resolution: Resolution, patches: Patches) -> tuple[Tensor, Tensor]:
        """Features [M, C], and what the last branch added to them."""
        feat = feat + self.cpe(seen, resolution)
        feat = feat + self._drop(self.attention(self.norm1(feat), patches, resolution.sites[:, 1:]))
        branch = self._drop(self.mlp(self.norm2(feat)))
        return feat + branch, branch

    def _drop(self, branch: Tensor) -> Tensor:
        """DropPath, as published of every row by itself."""
        if not self.training or self.drop_rate == 0:
            return branch
        keep = 1 - self.drop_rate
        return branch * branch.new_empty(len(branch), 1).bernoulli_(keep).div_(keep)


class _PositionalEncoding(nn.Module):
    """What a voxel's neighbours tell about its place (the paper's xCPE)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = SubMConv3d(channels, channels, 3, bias=False, indice_key="cpe")
        # spconv adds a bias on a GPU only.
        self.bias = nn.Parameter(torch.empty(channels))
        nn.init.uniform_(self.bias, -((27 * channels) ** -0.5), (27 * channels) ** -0.5)
        self.linear = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, feat: Tensor, resolution: Resolution) -> Tensor:
        return self.norm(self.linear(_convolve(self.conv, feat, resolution) + self.bias))


def _convolve(conv: SubMConv3d, feat: Tensor, resolution: Resolution) -> Tensor:
    return conv(resolution.voxels.replace_feature(feat)).features


def _plus(feat: Tensor, term: Tensor | None) -> Tensor:
    return feat if term is None else feat + term


def _spread(coarse: Tensor, finer: Resolution) -> Tensor:
    """[M_l, C] from the features of the enclosing voxels."""
    assert finer.parent is not None
    return coarse.index_select(0, finer.parent)


def _by_stage(highest: float, depths: Sequence[int]) -> list[list[float]]:
    """Drop rates of the blocks of each stage, from 0 for the first block of all to `highest` for the last."""
    rates = iter(torch.linspace(0, highest, sum(depths)).tolist())
    return [[next(rates) for _ in range(depth)] for depth in depths]


def _norm(channels: int, config: PTv3Config) -> nn.Module:
    if config.variant == "sonata":
        return nn.LayerNorm(channels)
    return RowNorm(channels, eps=config.norm_eps, momentum=config.norm_momentum)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, SubMConv3d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, _PositionalEncoding | nn.Linear):
        nn.init.zeros_(module.bias)
