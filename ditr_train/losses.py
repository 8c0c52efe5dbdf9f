"""Losses: of semantic segmentation, cross-entropy and Lovász-softmax (Berman et al., CVPR 2018); of distillation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ditr_cache.errors import DataError

_MAX_ELEMENTS = 1 << 25


def segmentation_loss(
    logits: Tensor,
    segment: Tensor,
    *,
    ignore_index: int = -1,
    class_weights: Tensor | None = None,
    lovasz_weight: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy plus `lovasz_weight` times Lovász-softmax, both over the labelled points.

    Args:
        logits: [N, K] scores before the softmax; computed with in float32.
        segment: [N] int64 classes, `ignore_index` where unlabelled.
        ignore_index: label of points that take no part.
        class_weights: [K] weights of the cross-entropy.
        lovasz_weight: 0 leaves cross-entropy alone.
        label_smoothing: of the cross-entropy, in [0, 1).

    Returns:
        A float32 scalar. Without any labelled point it is 0, with a gradient of zeros.

    Raises:
        DataError: shapes that do not fit each other, or a label outside of [0, K).
    """
    if logits.ndim != 2 or segment.shape != logits.shape[:1]:
        raise DataError(
            f"the loss needs scores [N, K] and labels [N], got {list(logits.shape)} and {list(segment.shape)}"
        )
    if class_weights is not None and class_weights.shape != logits.shape[1:]:
        raise DataError(f"{logits.shape[1]} classes but {len(class_weights)} class weights; give one per class")
    labelled = segment != ignore_index
    scores, target = logits[labelled].float(), segment[labelled]
    if len(target) == 0:
        return scores.sum()
    low, high = (int(bound) for bound in target.aminmax())
    if low < 0 or high >= logits.shape[1]:
        raise DataError(
            f"labels must be in [0, {logits.shape[1]}) or {ignore_index} (ignored), got {low} to {high}; "
            "check the number of classes and the ignore index"
        )
    weights = None if class_weights is None else class_weights.to(scores)
    loss = F.cross_entropy(scores, target, weight=weights, label_smoothing=label_smoothing)
    if weights is not None and not bool(weights[target].any()):
        loss = scores.sum() * 0.0  # every labelled point has weight 0: torch divides by their sum
    if lovasz_weight:
        loss = loss + lovasz_weight * lovasz_softmax(scores.softmax(dim=1), target)
    return loss


def distillation_loss(cosine: Tensor) -> Tensor:
    """mean(1 - cos) over the points that have a feature (D-DITR, arXiv 2503.18944).

    Args:
        cosine: [V] between prediction and feature.

    Returns:
        A float32 scalar. Without any point it is 0, with a gradient of zeros.
    """
    return (1.0 - cosine).mean() if len(cosine) else cosine.sum()


def lovasz_softmax(probabilities: Tensor, target: Tensor) -> Tensor:
    """Lovász extension of the Jaccard loss, averaged over the classes present in `target`.

    Args:
        probabilities: [N, K] float32, each row sums to 1; N >= 1.
        target: [N] int64 classes in [0, K), no ignored points.

    Returns:
        A scalar.
    """
    present = torch.bincount(target, minlength=probabilities.shape[1]).nonzero().squeeze(1)
    # In portions of classes: sorting all classes of a large batch at once would take gigabytes.
    portion = max(1, _MAX_ELEMENTS // len(target))
    losses = [_lovasz_of_classes(probabilities, target, classes) for classes in present.split(portion)]
    return torch.cat(losses).mean()


def _lovasz_of_classes(probabilities: Tensor, target: Tensor, classes: Tensor) -> Tensor:
    foreground = (target == classes[:, None]).float()
    errors = (foreground - probabilities[:, classes].T).abs()
    errors, order = errors.sort(dim=1, descending=True)
    foreground = foreground.gather(1, order)
    total = foreground.sum(dim=1, keepdim=True)
    intersection = total - foreground.cumsum(dim=1)
    union = total + (1.0 - foreground).cumsum(dim=1)
    jaccard = 1.0 - intersection / union
    # The weight of the i-th largest error is how much the Jaccard loss grows when it joins the mistakes.
    growth = torch.diff(jaccard, dim=1, prepend=jaccard.new_zeros(len(classes), 1))
    return (errors * growth).sum(dim=1)
