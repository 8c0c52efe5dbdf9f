"""`Segmentor`: backbone, optional injection of VFM features, and a linear head that gives a score per class."""

from __future__ import annotations

from torch import Tensor

from ditr_cache.errors import UsageError
from ditr_train.data.sample import PointBatch
from ditr_train.models.config import ModelConfig
from ditr_train.models.injection import Injection
from ditr_train.models.point_network import PointNetwork
from ditr_train.models.sparse_unet import SparseUNet


class Segmentor(PointNetwork):
    """Points of a batch -> class scores.

    Args:
        backbone: the network over points.
        num_classes: K.
        injection: adds VFM features to the backbone's features; None for a network that reads points only.
    """

    def __init__(self, backbone: SparseUNet, num_classes: int, injection: Injection | None = None) -> None:
        super().__init__(backbone, num_classes, injection)

    def forward(self, batch: PointBatch) -> Tensor:
        """Scores [N, K] float32 of the batch's points, before the softmax. Raises as `PointNetwork.point_features`."""
        return self.head(self.point_features(batch)).float()


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
    if model.injection is None:
        return Segmentor(SparseUNet(model.backbone, in_channels), num_classes)
    if feature_dim is None or feature_dim < 1:
        raise UsageError(
            f"injection needs the number of channels of the VFM features, got {feature_dim}; choose a VFM of the "
            "cache in the recipe, or remove `injection` from the model"
        )
    backbone = SparseUNet(model.backbone, in_channels + model.injection.appended_channels)
    injection = Injection(
        model.injection,
        feature_dim,
        model.backbone.skip_channels,
        model.backbone.encoder_channels,
        norm_eps=model.backbone.norm_eps,
        norm_momentum=model.backbone.norm_momentum,
    )
    return Segmentor(backbone, num_classes, injection)
