"""`SparseUNet`: the residual sparse-convolution U-Net (MinkUNet) that the published baselines call SpUNet-v1m1.

Resolution l has one site per occupied voxel of 2^l grid cells. A stem of one large convolution works at resolution 0;
each encoder stage halves the resolution and each decoder stage doubles it again, concatenating the skip of that
resolution. Facts of the topology: Choy et al. 2019 (MinkowskiNet) and the shape published with Pointcept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditr_train.data.sample import PointBatch
from ditr_train.models.backbone import Backbone, Terms
from ditr_train.models.grid_hierarchy import GridHierarchy
from ditr_train.models.row_norm import RowNorm
from ditr_train.models.sparse_conv import SparseConv3d, SparseInverseConv3d, SparseTensor, SubMConv3d, sparse_tensor
from ditr_train.models.sparse_unet_config import SparseUNetConfig


@dataclass(frozen=True)
class PreparedVoxels:
    """Voxels of a batch, before they carry features.

    Args:
        voxels: sparse tensor of resolution 0, with the batch's input as features.
        hierarchy: of the same voxels.
    """

    voxels: SparseTensor
    hierarchy: GridHierarchy


class SparseUNet(Backbone[PreparedVoxels]):
    """Encoder and decoder over sparse voxels.

    Args:
        config: shape of the network.
        in_channels: channels of the input points.
    """

    def __init__(self, config: SparseUNetConfig, in_channels: int) -> None:
        super().__init__(in_channels, config.out_channels)
        stages = config.num_stages
        skips = config.decoder_terms
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

    def prepare(self, batch: PointBatch) -> PreparedVoxels:
        """See `Backbone`."""
        voxels = sparse_tensor(
            batch.feat, batch.grid_coord, batch.batch_index(), batch_size=len(batch.offset), num_halvings=len(self.down)
        )
        return PreparedVoxels(voxels, GridHierarchy(voxels.indices))

    def forward(self, prepared: PreparedVoxels, feat: Tensor, terms: Terms) -> Tensor:
        """See `Backbone`."""
        return self._decode(self._encode(prepared.voxels.replace_feature(feat), terms), terms)

    def _encode(self, voxels: SparseTensor, terms: Terms) -> list[SparseTensor]:
        """Resolutions 0..num_stages, the skips and the bottleneck; terms join before the blocks."""
        levels = [_plus(self.stem(voxels), terms.encoder(0, voxels.indices))]
        for level, (down, blocks) in enumerate(zip(self.down, self.encoder, strict=True), start=1):
            voxels = down(levels[-1])
            levels.append(blocks(_plus(voxels, terms.encoder(level, voxels.indices))))
        return levels

    def _decode(self, levels: Sequence[SparseTensor], terms: Terms) -> Tensor:
        """[N, out_channels] from what `_encode` returned; terms join the skips."""
        voxels = levels[-1]
        for up, blocks, level in zip(self.up, self.decoder, reversed(range(len(self.up))), strict=True):
            skip = _plus(levels[level], terms.decoder(level, levels[level].indices))
            voxels = up(voxels)
            voxels = blocks(voxels.replace_feature(torch.cat([voxels.features, skip.features], dim=1)))
        return voxels.features


def _plus(voxels: Any, term: Tensor | None) -> Any:
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
