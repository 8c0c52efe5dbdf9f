"""`Segmentor`: backbone, optional injection of VFM features, and a linear head that gives a score per class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditr_cache.errors import DataError, MismatchError, UsageError
from ditr_train.data.sample import PointBatch
from ditr_train.models.config import ModelConfig
from ditr_train.models.injection import Injection
from ditr_train.models.sparse_conv import sparse_tensor
from ditr_train.models.sparse_unet import SparseUNet


class Segmentor(nn.Module):
    """Points of a batch -> class scores.

    Args:
        backbone: the network over points.
        num_classes: K.
        injection: adds VFM features to the backbone's skips; None for a network that reads points only.
    """

    def __init__(self, backbone: SparseUNet, num_classes: int, injection: Injection | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.injection = injection
        self.head = nn.Linear(backbone.config.out_channels, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: PointBatch) -> Tensor:
        """Scores [N, K] float32 of the batch's points, before the softmax.

        Raises:
            DataError: injection without features in the batch, or inputs that do not fit each other.
            MismatchError: points or VFM rows of another number of channels than the network was built for.
        """
        in_channels = self.backbone.in_channels
        if batch.feat.shape[1] != in_channels:
            raise MismatchError(
                f"the network reads points of {in_channels} channels, the batch has {batch.feat.shape[1]}; "
                "use the input channels that the network was trained with"
            )
        if self.injection is not None and batch.features is None:
            raise DataError(
                f"the network injects VFM features, but the batch of {', '.join(batch.names)} has none; choose a VFM "
                "of the cache in the recipe, or remove `injection` from the model"
            )
        if len(batch.feat) == 0:
            # No convolution runs on nothing. All parameters stay in the graph, as distributed training expects.
            unused = torch.stack([parameter.sum() for parameter in self.parameters()]).sum()
            return batch.feat.new_zeros(0, self.head.out_features) + 0.0 * unused

        levels = self.backbone.encode(
            sparse_tensor(
                batch.feat,
                batch.grid_coord,
                batch.batch_index(),
                batch_size=len(batch.offset),
                num_halvings=self.backbone.config.num_stages,
            )
        )
        terms = None
        if self.injection is not None and batch.features is not None:
            terms = self.injection(batch.features, [level.indices for level in levels[:-1]])
        return self.head(self.backbone.decode(levels, terms)).float()


def build_segmentor(
    model: ModelConfig, *, in_channels: int, num_classes: int, feature_dim: int | None = None
) -> Segmentor:
    """A segmentor with fresh weights.

    Args:
        model: backbone and injection.
        in_channels: channels of `PointBatch.feat`.
        num_classes: number of classes.
        feature_dim: channels of the cached VFM features; needed with injection, ignored without.

    Raises:
        UsageError: sizes below 1, or injection without a `feature_dim`.
    """
    if in_channels < 1 or num_classes < 1:
        raise UsageError(f"in_channels and num_classes must be positive, got {in_channels} and {num_classes}")
    backbone = SparseUNet(model.backbone, in_channels)
    if model.injection is None:
        return Segmentor(backbone, num_classes)
    if feature_dim is None or feature_dim < 1:
        raise UsageError(
            f"injection needs the number of channels of the VFM features, got {feature_dim}; choose a VFM of the "
            "cache in the recipe, or remove `injection` from the model"
        )
    injection = Injection(
        model.injection,
        feature_dim,
        model.backbone.skip_channels,
        norm_eps=model.backbone.norm_eps,
        norm_momentum=model.backbone.norm_momentum,
    )
    return Segmentor(backbone, num_classes, injection)
