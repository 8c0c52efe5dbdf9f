"""The network of a task, with fresh weights."""

from __future__ import annotations

from ditr_cache.errors import UsageError
from ditr_train.models.config import ModelConfig
from ditr_train.models.distillation import Distiller, build_distiller
from ditr_train.models.segmentor import Segmentor, build_segmentor


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
