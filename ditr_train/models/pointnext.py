"""`PointNeXt`: a PointNet++ with residual blocks, after Qian et al. 2022 (arXiv 2206.04670).

Resolution 0 has the points themselves. A set abstraction keeps one of `stride` points, chosen by farthest point
sampling, and gives each the maximum over its neighbourhood of a shared MLP of (relative place, features); inverted
residual blocks do the same among the points kept. Feature propagation interpolates back from the three nearest points
and joins the features of the encoder at that resolution.

As published, but for two things that the order of the points would decide there: a neighbourhood of more than
`num_neighbors` points keeps the nearest, not those first in memory, and one of fewer repeats the nearest. What remains
of the order is the first point of each sample, where sampling begins. The published networks end in an MLP of their
own; here the head is the one of every backbone.

Weights begin as published: torch's uniform distribution for linear maps.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditr_train.data.sample import PointBatch
from ditr_train.models.backbone import Backbone, Terms
from ditr_train.models.pointnext_config import PointNeXtConfig
from ditr_train.models.pointnext_geometry import Neighbourhoods, PreparedPoints, PreparedStage, prepare_points
from ditr_train.models.row_norm import RowNorm


class PointNeXt(Backbone[PreparedPoints]):
    """Set abstraction and feature propagation over points.

    Terms of the encoder are added to the output of the stem or of the set abstraction, before its blocks; those of the
    decoder to the features of the encoder that a feature propagation reads.

    Args:
        config: shape of the network.
        in_channels: channels of the input points.
    """

    def __init__(self, config: PointNeXtConfig, in_channels: int) -> None:
        super().__init__(in_channels, config.out_channels)
        self.config = config
        channels = config.channels
        self.stem = nn.Linear(in_channels, channels[0])
        self.abstractions = nn.ModuleList(_SetAbstraction(*pair, config) for pair in pairwise(channels))
        self.blocks = nn.ModuleList(
            nn.ModuleList(_InvertedResidual(width, config) for _ in range(count))
            for width, count in zip(channels[1:], config.stage_blocks, strict=True)
        )
        self.propagations = nn.ModuleList(_FeaturePropagation(*pair, config) for pair in pairwise(channels))

    def prepare(self, batch: PointBatch) -> PreparedPoints:
        """See `Backbone`."""
        return prepare_points(batch, self.config)

    def forward(self, prepared: PreparedPoints, feat: Tensor, terms: Terms) -> Tensor:
        """See `Backbone`."""
        coords, stages = prepared.coords, prepared.stages
        levels = [_plus(self.stem(feat), terms.encoder(0, coords[0]))]
        for level, (stage, abstraction, blocks) in enumerate(
            zip(stages, self.abstractions, self.blocks, strict=True), start=1
        ):
            feat = _plus(abstraction(levels[-1], stage), terms.encoder(level, coords[level]))
            for block in blocks:  # type: ignore[attr-defined]
                feat = block(feat, stage.around)
            levels.append(feat)
        feat = levels[-1]
        for level in reversed(range(len(stages))):
            skip = _plus(levels[level], terms.decoder(level, coords[level]))
            feat = self.propagations[level](skip, feat, stages[level])
        return feat


def _plus(feat: Tensor, term: Tensor | None) -> Tensor:
    return feat if term is None else feat + term.to(feat.dtype)


class _MaxOverNeighbours(nn.Module):
    """An MLP of each neighbour's relative place and features, and the maximum over the neighbours.

    The first layer is linear, so that its part of the features is computed once per point and not once per
    neighbourhood that the point is in. There is no activation after the last.

    Args:
        channels: of the features, then of each layer.
        config: of the batch norms.
    """

    def __init__(self, channels: list[int], config: PointNeXtConfig) -> None:
        super().__init__()
        self.linears = nn.ModuleList()
        self.norms = nn.ModuleList()
        for layer, (width, out) in enumerate(pairwise(channels)):
            self.linears.append(nn.Linear(width if layer else 3 + width, out, bias=False))
            self.norms.append(_norm(out, config))

    def forward(self, feat: Tensor, neighbours: Neighbourhoods) -> Tensor:
        """[N, C] of all points -> [M, C_out] of those that have neighbourhoods."""
        index, offset = neighbours.index, neighbours.offset
        of_offset, of_feat = self.linears[0].get_parameter("weight").tensor_split([3], dim=1)
        # An embedding is a gather whose gradient sums in the same order every time, on a GPU too.
        rows = F.embedding(index.flatten(), F.linear(feat, of_feat))
        rows = self.norms[0](torch.addmm(rows, offset.flatten(0, 1), of_offset.T))
        for linear, norm in zip(self.linears[1:], self.norms[1:], strict=True):
            rows = norm(linear(F.relu(rows)))
        return rows.unflatten(0, index.shape).max(dim=1).values


class _SetAbstraction(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, config: PointNeXtConfig) -> None:
        super().__init__()
        hidden = [out_channels // 2] * (config.layers_of_abstraction - 1)
        self.layers = _MaxOverNeighbours([in_channels, *hidden, out_channels], config)
        self.shortcut = nn.Linear(in_channels, out_channels) if config.residual_of_abstraction else None

    def forward(self, feat: Tensor, stage: PreparedStage) -> Tensor:
        out: Tensor = self.layers(feat, stage.down)
        if self.shortcut is not None:
            out = out + self.shortcut(feat.index_select(0, stage.kept))
        return F.relu(out)


class _InvertedResidual(nn.Module):
    def __init__(self, channels: int, config: PointNeXtConfig) -> None:
        super().__init__()
        hidden = channels * config.expansion
        self.neighbours = _MaxOverNeighbours([channels, channels], config)
        self.expand = nn.Linear(channels, hidden, bias=False)
        self.expand_norm = _norm(hidden, config)
        self.contract = nn.Linear(hidden, channels, bias=False)
        self.contract_norm = _norm(channels, config)

    def forward(self, feat: Tensor, around: Neighbourhoods) -> Tensor:
        out = F.relu(self.neighbours(feat, around))
        out = F.relu(self.expand_norm(self.expand(out)))
        return F.relu(self.contract_norm(self.contract(out)) + feat)


class _FeaturePropagation(nn.Module):
    def __init__(self, channels: int, coarse_channels: int, config: PointNeXtConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(channels + coarse_channels, channels, bias=False)
        self.norm1 = _norm(channels, config)
        self.linear2 = nn.Linear(channels, channels, bias=False)
        self.norm2 = _norm(channels, config)

    def forward(self, skip: Tensor, coarse: Tensor, stage: PreparedStage) -> Tensor:
        # A bag is the weighted sum of its rows, without the rows in between.
        finer = F.embedding_bag(
            stage.up_index, coarse.to(stage.up_weight.dtype), per_sample_weights=stage.up_weight, mode="sum"
        )
        feat = F.relu(self.norm1(self.linear1(torch.cat([skip, finer.to(skip.dtype)], dim=1))))
        return F.relu(self.norm2(self.linear2(feat)))


def _norm(channels: int, config: PointNeXtConfig) -> RowNorm:
    return RowNorm(channels, eps=config.norm_eps, momentum=config.norm_momentum)
