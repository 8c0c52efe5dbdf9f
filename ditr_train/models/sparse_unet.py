"""`SparseUNet`: the residual sparse-convolution U-Net (MinkUNet) that the published baselines call SpUNet-v1m1.

Resolution l has one site per occupied voxel of 2^l grid cells. A stem of one large convolution works at resolution 0;
each encoder stage halves the resolution and each decoder stage doubles it again, concatenating the skip of that
resolution. Facts of the topology: Choy et al. 2019 (MinkowskiNet) and the shape published with Pointcept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditr_train.models.config import SparseUNetConfig
from ditr_train.models.sparse_conv import SparseConv3d, SparseInverseConv3d, SubMConv3d

Terms = Callable[[int, Tensor], Tensor | None]
"""What is added to the features of a resolution: (its number l, its sites [M_l, 4] int32 in the features' order: batch
and three coordinates in voxels of 2^l grid cells) -> [M_l, channels] float32, or None for nothing."""


class RowNorm(nn.BatchNorm1d):
    """Batch norm over rows [N, C] that also takes fewer than two of them, on which it uses its running statistics.

    The coarsest resolution of a small crop may be a single site, of which no variance can be had.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[N, C] -> [N, C]."""
        if self.training and len(input) < 2:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        return super().forward(input)


class SparseUNet(nn.Module):
    """Encoder and decoder over sparse voxels.

    Args:
        config: shape of the network.
        in_channels: channels of the input points.
    """

    def __init__(self, config: SparseUNetConfig, in_channels: int) -> None:
        super().__init__()
        self.config = config
        self.in_channels = in_channels
        stages = config.num_stages
        skips = config.skip_channels
        self.stem = _ConvNormReLU(
            SubMConv3d(in_channels, config.stem_channels, config.stem_kernel_size, bias=False, indice_key="stem"),
            config,
        )
        self.down, self.encoder = nn.ModuleList(), nn.ModuleList()
        for level, (channels, layers) in enumerate(
            zip(config.channels[:stages], config.layers[:stages], strict=True), start=1
        ):
            strided = SparseConv3d(skips[level - 1], channels, 2, stride=2, bias=False, indice_key=f"down{level}")
            self.down.append(_ConvNormReLU(strided, config))
            self.encoder.append(_stage(channels, channels, layers, level, config))

        self.up, self.decoder = nn.ModuleList(), nn.ModuleList()
        coarse = config.channels[stages - 1]
        for stage, (channels, layers) in enumerate(
            zip(config.channels[stages:], config.layers[stages:], strict=True), start=1
        ):
            level = stages - stage
            inverse = SparseInverseConv3d(coarse, channels, 2, bias=False, indice_key=f"down{level + 1}")
            self.up.append(_ConvNormReLU(inverse, config))
            self.decoder.append(_stage(channels + skips[level], channels, layers, level, config))
            coarse = channels
        self.apply(_initialise)

    def encode(self, voxels: Any, terms: Terms | None = None) -> list[Any]:
        """Sparse tensors of resolutions 0..num_stages, the skips and the bottleneck.

        Args:
            voxels: sparse tensor of the input.
            terms: asked once for each of the resolutions; added to the output of the stem or of the strided
                convolution, before the blocks.
        """
        levels = [_plus(self.stem(voxels), 0, terms)]
        for level, (down, blocks) in enumerate(zip(self.down, self.encoder, strict=True), start=1):
            levels.append(blocks(_plus(down(levels[-1]), level, terms)))
        return levels

    def decode(self, levels: Sequence[Any], terms: Terms | None = None) -> Tensor:
        """Features [N, out_channels] of the input voxels, in their order.

        Args:
            levels: what `encode` returned.
            terms: asked once for each of the resolutions num_stages-1..0; added to its skip.
        """
        voxels = levels[-1]
        for up, blocks, level in zip(self.up, self.decoder, reversed(range(len(self.up))), strict=True):
            skip = _plus(levels[level], level, terms)
            voxels = up(voxels)
            voxels = blocks(voxels.replace_feature(torch.cat([voxels.features, skip.features], dim=1)))
        return voxels.features

    def forward(self, voxels: Any) -> Tensor:
        """Sparse tensor of N input voxels -> [N, out_channels]."""
        return self.decode(self.encode(voxels))


def _plus(voxels: Any, level: int, terms: Terms | None) -> Any:
    term = None if terms is None else terms(level, voxels.indices)
    return voxels if term is None else voxels.replace_feature(voxels.features + term)


class _ConvNormReLU(nn.Module):
    def __init__(self, conv: nn.Module, config: SparseUNetConfig) -> None:
        super().__init__()
        self.conv = conv
        self.norm = _norm(conv.out_channels, config)  # type: ignore[arg-type]

    def forward(self, voxels: Any) -> Any:
        voxels = self.conv(voxels)
        return voxels.replace_feature(F.relu(self.norm(voxels.features)))


class _ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, level: int, config: SparseUNetConfig) -> None:
        super().__init__()
        key = f"subm{level}"
        self.conv1 = SubMConv3d(in_channels, out_channels, 3, bias=False, indice_key=key)
        self.norm1 = _norm(out_channels, config)
        self.conv2 = SubMConv3d(out_channels, out_channels, 3, bias=False, indice_key=key)
        self.norm2 = _norm(out_channels, config)
        # A 1x1x1 convolution touches no neighbour: it is a linear map of the rows.
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Sequential(nn.Linear(in_channels, out_channels, bias=False), _norm(out_channels, config))
        )

    def forward(self, voxels: Any) -> Any:
        shortcut = self.shortcut(voxels.features)
        voxels = self.conv1(voxels)
        voxels = self.conv2(voxels.replace_feature(F.relu(self.norm1(voxels.features))))
        return voxels.replace_feature(F.relu(self.norm2(voxels.features) + shortcut))


def _stage(in_channels: int, channels: int, layers: int, level: int, config: SparseUNetConfig) -> nn.Sequential:
    # Named for the parameter groups: the recipes give a lower learning rate to names that contain "block".
    stage = nn.Sequential()
    for i in range(layers):
        stage.add_module(f"block{i}", _ResidualBlock(in_channels if i == 0 else channels, channels, level, config))
    return stage


def _norm(channels: int, config: SparseUNetConfig) -> RowNorm:
    return RowNorm(channels, eps=config.norm_eps, momentum=config.norm_momentum)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, SubMConv3d | SparseConv3d | SparseInverseConv3d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
