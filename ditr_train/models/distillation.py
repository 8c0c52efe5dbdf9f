"""`Distiller`: a point network that learns to predict VFM features (D-DITR, arXiv 2503.18944): one linear head to the
VFM's width on the backbone's last features, compared by cosine on the points that have a feature."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ditr_cache.errors import DataError, MismatchError
from ditr_train.data.sample import FeatureRows, PointBatch
from ditr_train.models.point_network import PointNetwork

_PORTION_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
_SHORTEST = 1e-6  # length below which a vector has no direction; its cosine is 0


class Distiller(PointNetwork):
    """Points of a batch -> how well their features predict those of the VFM, the teacher; the backbone is the student,
    the head's channels are the VFM's."""

    def forward(self, batch: PointBatch) -> Tensor:
        """[V] float32 cosine between predicted and cached feature of the V points that have one.

        Raises:
            DataError: a batch without features.
            MismatchError: points or VFM rows of another number of channels than the network was built for.
        """
        if batch.features is None:
            raise DataError(
                f"distillation needs VFM features, but the batch of {', '.join(batch.names)} has none; name a VFM of "
                "the cache in the recipe"
            )
        if batch.features.dim != self.head.out_features:
            raise MismatchError(
                f"the head predicts VFM features of {self.head.out_features} channels, the batch holds rows of "
                f"{batch.features.dim}; use the cache and the VFM that the network was trained with"
            )
        points = self.point_features(batch).float()
        seen = (batch.features.index >= 0).nonzero().squeeze(1)
        rows = batch.features.index[seen]
        with torch.autocast(points.device.type, enabled=False):
            cosine: Tensor = _CosineToRows.apply(points[seen], self.head.weight, self.head.bias, batch.features, rows)
        return cosine


class _CosineToRows(torch.autograd.Function):
    """Cosine between `points @ weight.T + bias` and rows of a stored table, in portions.

    Predictions and rows of a batch as float32 would be gigabytes for wide VFMs; the backward pass computes them again.
    """

    @staticmethod
    def forward(ctx: Any, points: Tensor, weight: Tensor, bias: Tensor, features: FeatureRows, rows: Tensor) -> Tensor:
        ctx.save_for_backward(points, weight, bias)
        ctx.features, ctx.rows = features, rows
        cosine = points.new_empty(len(points))
        for part in _portions(len(points), weight):
            predicted, target = _directions(points[part], weight, bias, features, rows[part])[:2]
            cosine[part] = (predicted * target).sum(dim=1)
        return cosine

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        points, weight, bias = ctx.saved_tensors
        grad_points, grad_weight, grad_bias = (torch.zeros_like(tensor) for tensor in (points, weight, bias))
        for part in _portions(len(points), weight):
            predicted, target, length = _directions(points[part], weight, bias, ctx.features, ctx.rows[part])
            cosine = (predicted * target).sum(dim=1, keepdim=True)
            # Where a prediction has no length, as before the first step, its gradient would have no bound.
            per_length = torch.where(length > _SHORTEST, grads[0][part, None] / length, 0.0)
            grad = (target - cosine * predicted) * per_length
            grad_points[part] = grad @ weight
            grad_weight.addmm_(grad.T, points[part])
            grad_bias += grad.sum(dim=0)
        return grad_points, grad_weight, grad_bias, None, None


def _directions(
    points: Tensor, weight: Tensor, bias: Tensor, features: FeatureRows, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of predictions and rows [P, C], and the length [P, 1] of the predictions."""
    predicted = torch.addmm(bias, points, weight.T)
    target = features.decode(rows)
    length = predicted.norm(dim=1, keepdim=True).clamp_min(_SHORTEST)
    return predicted / length, target / target.norm(dim=1, keepdim=True).clamp_min(_SHORTEST), length


def _portions(count: int, weight: Tensor) -> Iterator[slice]:
    """Ranges over `count` points: of cache size on a CPU, large enough to hide kernel launches on a GPU."""
    step = max(1, _PORTION_ELEMENTS[weight.device.type] // weight.shape[0])
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
