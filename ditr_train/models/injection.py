"""Injection of VFM features into the decoder (DITR, arXiv 2503.18944), onto the skips of all its resolutions.

A site of resolution l pools the features of the points inside it. Only points that have a feature take part: a mean
divides by their number, a maximum is not clamped by zeros that stand for "unseen". The pooled rows pass
`Linear -> BatchNorm -> GELU` to the channels of the skip.

What a site without any feature contributes: nothing, exactly zero, and it takes no part in the batch norm's statistics,
so that coverage does not shift what covered sites receive. With `missing_embedding` it holds a learned VFM feature
instead, which passes the same layers and does take part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ditr_cache.errors import DataError, MismatchError
from ditr_train.data.sample import FeatureRows
from ditr_train.models.config import InjectionConfig
from ditr_train.models.segment_pool import segment_max, segment_sum
from ditr_train.models.sparse_unet import RowNorm

_AXIS_BITS = 16
_MAX_SAMPLES = 1 << (63 - 3 * _AXIS_BITS)
# Steps that move the bits of a 16-bit number three places apart: bytes, then nibbles, pairs and single bits.
_SPREAD = ((16, 0xFF0000FF), (8, 0xF00F00F00F), (4, 0xC30C30C30C3), (2, 0x249249249249))

_PORTION_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}

Reduce = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class _OccupiedVoxels:
    """Sites that hold at least one feature: V_l at resolution l, in Morton order.

    Args:
        rows: [V_0] rows of the feature table.
        positions: for each resolution [V_l], their places among its sites.
        parents: for each resolution [V_l], their places among the occupied sites of the next.
    """

    rows: Tensor
    positions: list[Tensor]
    parents: list[Tensor]


class Injection(nn.Module):
    """Terms that are added to the skips of a U-Net.

    Args:
        config: pooling and the handling of missing features.
        feature_dim: C, channels of the VFM.
        skip_channels: channels of the skips at resolutions 0, 1, ...
        norm_eps, norm_momentum: of the batch norms.
    """

    def __init__(
        self,
        config: InjectionConfig,
        feature_dim: int,
        skip_channels: Sequence[int],
        *,
        norm_eps: float = 1e-3,
        norm_momentum: float = 0.01,
    ) -> None:
        super().__init__()
        self.config = config
        self.feature_dim = feature_dim
        # No bias: the batch norm would subtract it.
        self.linears = nn.ModuleList(nn.Linear(feature_dim, channels, bias=False) for channels in skip_channels)
        self.norms = nn.ModuleList(
            RowNorm(channels, eps=norm_eps, momentum=norm_momentum) for channels in skip_channels
        )
        for linear in self.linears:
            nn.init.trunc_normal_(linear.get_parameter("weight"), std=0.02)
        self.missing = nn.Parameter(torch.empty(feature_dim)) if config.missing_embedding else None
        if self.missing is not None:
            nn.init.trunc_normal_(self.missing, std=0.02)

    def forward(self, features: FeatureRows, sites: Sequence[Tensor]) -> list[Tensor]:
        """One term [M_l, skip_channels[l]] per resolution.

        Args:
            features: rows as stored, on the device of the sites; `index` has one entry per site of resolution 0.
            sites: for each resolution [M_l, 4] int32 (batch, and three coordinates in voxels of 2^l cells), in the
                backbone's order.

        Raises:
            MismatchError: rows of another VFM dimension than the network was built for.
            DataError: `index` does not fit the points, or coordinates too large for the voxel keys.
        """
        self._check(features, sites)
        # Features keep their precision: the projections are a small part of the network's work.
        with torch.autocast(features.table.device.type, enabled=False):
            voxels = self._occupied(features, sites)
            mean = self.config.pool == "mean"
            reduce = segment_sum if mean else segment_max
            projected, values = _ProjectAndPool.apply(self.linears[0].weight, features, voxels, reduce)
            terms = [self._term(0, projected, voxels.positions[0], len(sites[0]))]
            counts = torch.ones(len(voxels.rows), 1, device=values.device)
            for level in range(1, len(sites)):
                parent, size = voxels.parents[level - 1], len(voxels.positions[level])
                values = values if level == 1 else reduce(values, parent, size)
                projected = self.linears[level](values)
                if mean:  # of sums so far: dividing their projections instead is the same and less work
                    counts = segment_sum(counts, parent, size)
                    projected = projected / counts
                terms.append(self._term(level, projected, voxels.positions[level], len(sites[level])))
            return terms

    def _term(self, level: int, projected: Tensor, positions: Tensor, num_sites: int) -> Tensor:
        if self.missing is None:
            term = F.gelu(self.norms[level](projected))
            return term.new_zeros(num_sites, term.shape[1]).index_copy(0, positions, term)
        everywhere = self.linears[level](self.missing[None]).expand(num_sites, -1)
        return F.gelu(self.norms[level](everywhere.index_copy(0, positions, projected)))

    def _check(self, features: FeatureRows, sites: Sequence[Tensor]) -> None:
        if features.table.shape[1] != self.feature_dim:
            raise MismatchError(
                f"the network injects VFM features of {self.feature_dim} channels, the batch holds rows of "
                f"{features.table.shape[1]}; use the cache and the VFM that the network was trained with"
            )
        if len(features.index) != len(sites[0]):
            raise DataError(f"{len(sites[0])} points but {len(features.index)} feature indices; give one per point")

    @torch.no_grad()
    def _occupied(self, features: FeatureRows, sites: Sequence[Tensor]) -> _OccupiedVoxels:
        # Morton keys are sorted once: the key of a coarser site is the finer one's without its last three bits, so
        # that the children of a site stay neighbours at every resolution.
        seen = features.index >= 0
        if self.training and self.config.feature_drop > 0:
            seen &= torch.rand(len(seen), device=seen.device) >= self.config.feature_drop
        points = seen.nonzero().squeeze(1)
        keys, order = morton_keys(sites[0][points]).sort()
        positions, parents = [points[order]], []
        for level in range(1, len(sites) + 1):
            keys, parent = torch.unique_consecutive(keys >> 3, return_inverse=True)
            parents.append(parent)
            if level < len(sites):
                site_keys, order = morton_keys(sites[level], level).sort()
                positions.append(order[torch.searchsorted(site_keys, keys)])
        return _OccupiedVoxels(features.index[positions[0]], positions, parents)


def dequantize(features: FeatureRows, rows: Tensor) -> Tensor:
    """Rows of a stored table as they were before storing.

    Args:
        features: the table, int8 with a scale per row or float16.
        rows: [V] int64 rows of the table.

    Returns:
        [V, C] float32, on the table's device.
    """
    values = features.table.index_select(0, rows).float()
    if features.scale is not None:
        values *= features.scale.index_select(0, rows)[:, None]
    return values


class _ProjectAndPool(torch.autograd.Function):
    """Projects the rows of resolution 0 and pools them to resolution 1, in one pass and in portions.

    All rows of a batch as float32 would be gigabytes; the backward pass reads the stored rows again instead.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, features: FeatureRows, voxels: _OccupiedVoxels, reduce: Reduce
    ) -> tuple[Tensor, Tensor]:
        ctx.features, ctx.rows = features, voxels.rows
        parent = voxels.parents[0]
        size = int(parent[-1]) + 1 if len(parent) else 0
        projected = weight.new_empty(len(voxels.rows), weight.shape[0])
        pooled = weight.new_empty(size, weight.shape[1])
        segments = list(_portions(size, features.table, rows_each=4))  # 1 to 8; about 3 on surfaces
        edges = torch.tensor([0, *(stop for _, stop in segments)], device=parent.device)
        bounds = torch.searchsorted(parent, edges).tolist()
        for (start, stop), first, last in zip(segments, bounds[:-1], bounds[1:], strict=True):
            values = dequantize(features, voxels.rows[first:last])
            torch.mm(values, weight.T, out=projected[first:last])
            pooled[start:stop] = reduce(values, parent[first:last] - start, stop - start)
        ctx.mark_non_differentiable(pooled)
        return projected, pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grads[0]
        grad_weight = grad.new_zeros(grad.shape[1], ctx.features.table.shape[1])
        for first, last in _portions(len(ctx.rows), ctx.features.table):
            grad_weight.addmm_(grad[first:last].T, dequantize(ctx.features, ctx.rows[first:last]))
        return grad_weight, None, None, None


def _portions(count: int, table: Tensor, rows_each: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges over `count` items: of cache size on a CPU, large enough to hide kernel launches on a GPU."""
    step = max(1, _PORTION_ELEMENTS[table.device.type] // (rows_each * table.shape[1]))
    return ((start, min(start + step, count)) for start in range(0, count, step))


def morton_keys(sites: Tensor, level: int = 0) -> Tensor:
    """Sort keys of voxels: samples one after the other, and within one along the Z curve.

    Args:
        sites: [M, 4] integer (batch, and three coordinates in [0, 2^16)).
        level: resolution of the sites.

    Returns:
        [M] int64, unique for unique sites of one level; `key >> 3` is the key of the enclosing site of the next level.

    Raises:
        DataError: coordinates or batches beyond the keys' range (seen on the CPU only).
    """
    if sites.device.type == "cpu" and len(sites):
        high = sites.amax(dim=0).tolist()
        if int(sites.amin()) < 0 or high[0] >= _MAX_SAMPLES or max(high[1:]) >= 1 << _AXIS_BITS:
            raise DataError(
                f"voxel coordinates must be in [0, {1 << _AXIS_BITS}) and batches in [0, {_MAX_SAMPLES}), got up to "
                f"{high}; use a larger grid size or crop the samples"
            )
    axes = sites[:, 1:].long()
    for shift, mask in _SPREAD:
        axes = (axes | (axes << shift)) & mask
    batch = sites[:, 0].long() << (3 * (_AXIS_BITS - level))
    return batch | axes[:, 0] | (axes[:, 1] << 1) | (axes[:, 2] << 2)
