"""Injection of VFM features into a network over points (DITR, arXiv 2503.18944): at input, encoder or decoder.

A site of resolution l pools the features of the points inside it. With "mean" and "max" only points that have a
feature take part: a mean divides by their number, a maximum is not clamped by zeros that stand for "unseen". The pooled
rows pass `Linear -> BatchNorm -> GELU`, of its own for every place, to the channels of that place.

What a site without any feature contributes: nothing, exactly zero, and it takes no part in the batch norm's statistics,
so that coverage does not shift what covered sites receive. Otherwise with `missing_embedding` (a learned VFM feature),
`visibility_flag` (zeros, flagged as unseen) and "zero_max" (zeros, as published): there it passes the same layers and
does take part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ditr_cache.errors import DataError, MismatchError
from ditr_train.data.sample import FeatureRows
from ditr_train.models.config import InjectionConfig
from ditr_train.models.hierarchy import Hierarchy, OccupiedSites
from ditr_train.models.row_norm import RowNorm
from ditr_train.models.segment_pool import segment_max, segment_sum

_PORTION_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 26}
# Reading a row of the table costs about as much as mapping it to so many channels; measured on a CPU.
_CHANNELS_PER_GATHER = 48

Reduce = Callable[[Tensor, Tensor, int], Tensor]


class Injection(nn.Module):
    """Projections of VFM features to the places where they enter the network.

    Args:
        config: places, pooling and the handling of missing features.
        feature_dim: C, channels of the VFM.
        decoder_channels: channels of the decoder's terms at resolutions 0, 1, ...; of a U-Net, those of its skips.
        encoder_channels: channels of the encoder's terms at resolutions 0, 1, ...
        norm_eps, norm_momentum: of the batch norms.
    """

    def __init__(
        self,
        config: InjectionConfig,
        feature_dim: int,
        decoder_channels: Sequence[int],
        encoder_channels: Sequence[int],
        *,
        norm_eps: float = 1e-3,
        norm_momentum: float = 0.01,
    ) -> None:
        super().__init__()
        self.config = config
        self.feature_dim = feature_dim
        decoder = config.decoder_resolutions(len(decoder_channels))
        places = {f"{level}": (level, decoder_channels[level]) for level in decoder}
        places |= {f"encoder{level}": (level, encoder_channels[level]) for level in config.encoder}
        if config.input:
            places["input"] = (0, config.input_channels)
        self.levels = {place: level for place, (level, _) in places.items()}
        self.linears, self.norms = nn.ModuleDict(), nn.ModuleDict()
        for place, (_, channels) in places.items():
            # No bias: the batch norm would subtract it.
            self.linears[place] = nn.Linear(feature_dim + config.visibility_flag, channels, bias=False)
            self.norms[place] = RowNorm(channels, eps=norm_eps, momentum=norm_momentum)
        for linear in self.linears.values():
            nn.init.trunc_normal_(linear.get_parameter("weight"), std=0.02)
        self.missing = nn.Parameter(torch.empty(feature_dim)) if config.missing_embedding else None
        if self.missing is not None:
            nn.init.trunc_normal_(self.missing, std=0.02)

    def forward(self, features: FeatureRows, hierarchy: Hierarchy) -> InjectedTerms:
        """What the features of one batch contribute at each place.

        Args:
            features: rows as stored, on the device of the points; `index` has one entry per point.
            hierarchy: of the points.

        Raises:
            MismatchError: rows of another VFM dimension than the network was built for.
            DataError: `index` does not fit the points, or the hierarchy cannot hold them.
        """
        self._check(features, hierarchy)
        seen = features.index >= 0
        if self.training and self.config.feature_drop > 0:
            seen &= torch.rand(len(seen), device=seen.device) >= self.config.feature_drop
        zero_max, flag = self.config.pool == "zero_max", self.config.visibility_flag
        occupied = hierarchy.occupied(seen, 1 + max(self.levels.values()), shares=zero_max or flag)
        # Features keep their precision: the projections are a small part of the network's work.
        with torch.autocast(features.table.device.type, enabled=False):
            return InjectedTerms(self, occupied, self._project(features, occupied), len(seen))

    def _project(self, features: FeatureRows, occupied: OccupiedSites) -> dict[str, Tensor]:
        """Place -> [V_l, channels], its linear map of the pooled features."""
        first = self._projects_first(len(features.table), occupied.sizes[0])
        projected = (self._project_then_pool if first else self._pool_then_project)(features, occupied)
        if self.config.visibility_flag and occupied.shares is not None:
            for place, level in self.levels.items():
                of_share = self.linears[place].get_parameter("weight")[:, self.feature_dim]
                projected[place] = projected[place] + occupied.shares[level] * of_share
        return projected

    def _projects_first(self, num_rows: int, num_points: int) -> bool:
        """Whether to map the rows before points gather them: the same mean, and less work where points share rows."""
        if self.config.pool != "mean":
            return False
        channels = {place: linear.get_parameter("weight").shape[0] for place, linear in self.linears.items()}
        at_finest = sum(channels[place] for place in self._places(0))
        return num_rows * sum(channels.values()) < num_points * (at_finest + _CHANNELS_PER_GATHER)

    def _project_then_pool(self, features: FeatureRows, occupied: OccupiedSites) -> dict[str, Tensor]:
        every = torch.arange(len(features.table), device=features.table.device)
        _, *of_rows = _ProjectAndPool.apply(features, every, None, 0, segment_sum, *map(self._weight, self.levels))
        rows = features.index[occupied.points]
        own, projected = torch.arange(len(rows), device=rows.device), {}
        for level, size in enumerate(occupied.sizes):
            own = occupied.parents[level - 1][own] if level else own
            count = torch.bincount(own, minlength=size)[:, None]
            for place, values in zip(self.levels, of_rows, strict=True):
                if self.levels[place] == level:
                    values = values.index_select(0, rows)
                    projected[place] = segment_sum(values, own, size) / count if level else values
        return projected

    def _pool_then_project(self, features: FeatureRows, occupied: OccupiedSites) -> dict[str, Tensor]:
        mean = self.config.pool == "mean"
        reduce = segment_sum if mean else segment_max
        finest = self._places(0)
        rows = features.index[occupied.points]
        parent, size = (occupied.parents[0], occupied.sizes[1]) if occupied.parents else (None, 0)
        values, *at_finest = _ProjectAndPool.apply(features, rows, parent, size, reduce, *map(self._weight, finest))
        projected = dict(zip(finest, at_finest, strict=True))
        counts = torch.ones(len(rows), 1, device=rows.device)
        for level, (parent, size) in enumerate(zip(occupied.parents, occupied.sizes[1:], strict=True), start=1):
            values = values if level == 1 else reduce(values, parent, size)
            if self.config.pool == "zero_max" and occupied.shares is not None:
                values.clamp_(min=torch.where(occupied.shares[level] < 1, 0.0, -torch.inf))
            if mean:
                counts = segment_sum(counts, parent, size)
            for place in self._places(level):
                projected[place] = F.linear(values, self._weight(place))
                if mean:  # of sums so far: dividing their projections instead is the same and less work
                    projected[place] = projected[place] / counts
        return projected

    def term(self, place: str, projected: Tensor, sites: Tensor, num_sites: int) -> Tensor:
        """[num_sites, channels] of a place, from its projected rows and their places among the sites."""
        norm = self.norms[place]
        if self.missing is None and self.config.pool != "zero_max" and not self.config.visibility_flag:
            term = F.gelu(norm(projected))
            return term.new_zeros(num_sites, term.shape[1]).index_copy(0, sites, term)
        unseen = projected.new_zeros(1, projected.shape[1])
        if self.missing is not None:
            unseen = F.linear(self.missing[None], self._weight(place))
        return F.gelu(norm(unseen.expand(num_sites, -1).index_copy(0, sites, projected)))

    def _places(self, level: int) -> list[str]:
        return [place for place, at in self.levels.items() if at == level]

    def _weight(self, place: str) -> Tensor:
        weight = self.linears[place].get_parameter("weight")
        return weight[:, : self.feature_dim] if self.config.visibility_flag else weight

    def _check(self, features: FeatureRows, hierarchy: Hierarchy) -> None:
        if features.dim != self.feature_dim:
            raise MismatchError(
                f"the network injects VFM features of {self.feature_dim} channels, the batch holds rows of "
                f"{features.dim}; use the cache and the VFM that the network was trained with"
            )
        if len(features.index) != hierarchy.num_points:
            raise DataError(
                f"{hierarchy.num_points} points but {len(features.index)} feature indices; give one per point"
            )


class InjectedTerms:
    """What one batch's features contribute; the `Terms` that a backbone asks.

    The last layers of a term wait until the backbone asks, because only it knows the order of its sites.
    """

    def __init__(
        self, injection: Injection, occupied: OccupiedSites, projected: dict[str, Tensor], num_points: int
    ) -> None:
        self._injection = injection
        self._occupied = occupied
        self._projected = projected
        self._num_points = num_points

    def input(self, feat: Tensor) -> Tensor:
        """The network input [N, C_in] with the channels of the "input" place appended, if there is one."""
        if "input" not in self._projected:
            return feat
        return torch.cat([feat, self._term("input", self._occupied.points, self._num_points)], dim=1)

    def encoder(self, level: int, sites: Tensor) -> Tensor | None:
        """Term [M_l, channels] float32 of the encoder at a resolution; None where nothing is injected.

        Args:
            level: l.
            sites: [M_l, ...] in the backbone's order, as its hierarchy tells them apart.
        """
        return self._at(f"encoder{level}", level, sites)

    def decoder(self, level: int, sites: Tensor) -> Tensor | None:
        """Term of the decoder at a resolution; as `encoder`."""
        return self._at(f"{level}", level, sites)

    def _at(self, place: str, level: int, sites: Tensor) -> Tensor | None:
        if place not in self._projected:
            return None
        return self._term(place, self._occupied.places(level, sites), len(sites))

    def _term(self, place: str, sites: Tensor, num_sites: int) -> Tensor:
        projected = self._projected[place]
        with torch.autocast(projected.device.type, enabled=False):
            return self._injection.term(place, projected, sites, num_sites)


class _ProjectAndPool(torch.autograd.Function):
    """Projects rows of resolution 0 and pools them to resolution 1, in one pass and in portions.

    All rows of a batch as float32 would be gigabytes; the backward pass reads the stored rows again instead. Without
    weights, or without `parent`, the ascending place [V] of each row among `size` sites of resolution 1, it leaves out
    the one or the other.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: FeatureRows,
        rows: Tensor,
        parent: Tensor | None,
        size: int,
        reduce: Reduce,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.features, ctx.rows = features, rows
        projected = [weight.new_empty(len(rows), len(weight)) for weight in weights]
        pooled = torch.empty(size, features.dim, device=rows.device)
        firsts = torch.arange(0, len(rows), _portion(features), device=rows.device)
        segments: list[int] = []
        if parent is not None:  # no site of resolution 1 is cut in two
            at_first = parent[firsts].unique_consecutive()
            firsts = torch.searchsorted(parent, at_first)
            segments = [*at_first.tolist(), size]
        portions = list(pairwise([*firsts.tolist(), len(rows)]))
        buffer = _buffer(features, max((last - first for first, last in portions), default=0))
        for i, (first, last) in enumerate(portions):
            values = features.decode(rows[first:last], buffer)
            for weight, out in zip(weights, projected, strict=True):
                torch.mm(values, weight.T, out=out[first:last])
            if parent is not None:
                start, stop = segments[i : i + 2]
                pooled[start:stop] = reduce(values, parent[first:last] - start, stop - start)
        ctx.mark_non_differentiable(pooled)
        return pooled, *projected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        channels, portion = ctx.features.dim, _portion(ctx.features)
        grad_weights = [grad.new_zeros(grad.shape[1], channels) for grad in grads]
        buffer = _buffer(ctx.features, min(portion, len(ctx.rows)))
        for i, rows in enumerate(ctx.rows.split(portion)):
            values = ctx.features.decode(rows, buffer)
            for grad, grad_weight in zip(grads, grad_weights, strict=True):
                grad_weight.addmm_(grad[i * portion :][: len(rows)].T, values)
        return None, None, None, None, None, *grad_weights


def _portion(features: FeatureRows) -> int:
    """Rows at a time: of cache size on a CPU, enough to hide kernel launches on a GPU."""
    return max(1, _PORTION_ELEMENTS[features.table.device.type] // features.dim)


def _buffer(features: FeatureRows, rows: int) -> Tensor:
    return torch.empty(rows, features.dim, device=features.table.device)
