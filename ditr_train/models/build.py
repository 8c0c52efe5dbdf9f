"""Networks with fresh weights, from their settings; the one place that knows every backbone."""

from __future__ import annotations

from typing import Any

from ditr_cache.errors import UsageError
from ditr_train.models.backbone import Backbone
from ditr_train.models.config import BackboneConfig, ModelConfig
from ditr_train.models.distillation import Distiller
from ditr_train.models.injection import Injection
from ditr_train.models.pointnext_config import PointNeXtConfig
from ditr_train.models.ptv3_config import PTv3Config
from ditr_train.models.segmentor import Segmentor


def build_backbone(config: BackboneConfig, in_channels: int) -> Backbone[Any]:
    """A backbone with fresh weights.

    Args:
        config: which one, and its shape.
        in_channels: channels of the points.
    """
    # Imported here: not every backbone needs spconv.
    if isinstance(config, PointNeXtConfig):
        from ditr_train.models.pointnext import PointNeXt

        return PointNeXt(config, in_channels)
    if isinstance(config, PTv3Config):
        from ditr_train.models.ptv3 import PointTransformerV3

        return PointTransformerV3(config, in_channels)
    from ditr_train.models.sparse_unet import SparseUNet

    return SparseUNet(config, in_channels)


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
        return Segmentor(build_backbone(model.backbone, in_channels), num_classes)
    if feature_dim is None or feature_dim < 1:
        raise UsageError(
            f"injection needs the number of channels of the VFM features, got {feature_dim}; choose a VFM of the "
            "cache in the recipe, or remove `injection` from the model"
        )
    backbone = build_backbone(model.backbone, in_channels + model.injection.appended_channels)
    injection = Injection(
        model.injection,
        feature_dim,
        model.backbone.decoder_terms,
        model.backbone.encoder_terms,
        norm_eps=model.backbone.norm_eps,
        norm_momentum=model.backbone.norm_momentum,
    )
    return Segmentor(backbone, num_classes, injection)


def build_distiller(model: ModelConfig, *, in_channels: int, feature_dim: int) -> Distiller:
    """A distiller with fresh weights.

    Args:
        model: backbone, without injection.
        in_channels: channels of `PointBatch.feat`.
        feature_dim: channels of the cached VFM features.

    Raises:
        UsageError: sizes below 1, or a model with injection.
    """
    if in_channels < 1 or feature_dim < 1:
        raise UsageError(f"in_channels and feature_dim must be positive, got {in_channels} and {feature_dim}")
    if model.injection is not None:
        raise UsageError("a network that is given the features cannot learn to predict them; set model.injection=null")
    return Distiller(build_backbone(model.backbone, in_channels), feature_dim)


def build_network(
    task: str, model: ModelConfig, *, in_channels: int, num_classes: int, feature_dim: int | None
) -> Segmentor | Distiller:
    """The network that a recipe's `task` and `model` describe.

    Args:
        task: `segment` or `distill`.
        model: backbone and injection.
        in_channels: channels of `PointBatch.feat`.
        num_classes: number of classes; of no use to distillation.
        feature_dim: channels of the cached VFM features; None where none are read.

    Raises:
        UsageError: sizes or settings that do not fit the task.
    """
    if task == "segment":
        return build_segmentor(model, in_channels=in_channels, num_classes=num_classes, feature_dim=feature_dim)
    if feature_dim is None:
        raise UsageError("distillation needs the number of channels of the VFM features; name a VFM of the cache")
    return build_distiller(model, in_channels=in_channels, feature_dim=feature_dim)
