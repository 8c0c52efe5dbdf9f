"""Metrics of semantic segmentation, from one confusion matrix over a whole split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditr_cache.errors import DataError, UsageError


class ConfusionMatrix:
    """Counts of (true class, predicted class) over labelled points.

    A class without a single labelled point in the split is excluded from mIoU and mAcc, whether or not it was
    predicted somewhere: it has no accuracy, and an IoU of 0 for it would say nothing about the network. Points that
    were wrongly given to it still count as misses of their true class.

    Args:
        num_classes: K.
        ignore_index: label of points that take no part.

    Raises:
        UsageError: fewer than one class.
    """

    def __init__(self, num_classes: int, ignore_index: int = -1) -> None:
        if num_classes < 1:
            raise UsageError(f"a confusion matrix needs at least one class, got {num_classes}")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        """[K, K] int64 on the CPU, rows the true and columns the predicted class."""

    def update(self, pred: Tensor | NDArray[np.integer], target: Tensor | NDArray[np.integer]) -> None:
        """Counts more points.

        Args:
            pred: [N] integer predicted classes.
            target: [N] integer true classes, `ignore_index` where unlabelled.

        Raises:
            DataError: different shapes, or a class outside of [0, K) at a labelled point.
        """
        pred, target = torch.as_tensor(pred), torch.as_tensor(target)
        if pred.ndim != 1 or pred.shape != target.shape:
            raise DataError(
                f"predictions and labels must be two arrays [N], got {list(pred.shape)} and {list(target.shape)}"
            )
        target = target.to(pred.device)
        labelled = target != self.ignore_index
        pred, target = pred[labelled].long(), target[labelled].long()
        if len(target) == 0:
            return
        for name, classes in (("predictions", pred), ("labels", target)):
            low, high = (int(bound) for bound in classes.aminmax())
            if low < 0 or high >= self.num_classes:
                raise DataError(
                    f"{name} must be in [0, {self.num_classes}), got {low} to {high}; check the number of classes "
                    f"and the ignore index ({self.ignore_index})"
                )
        pairs = torch.bincount(target * self.num_classes + pred, minlength=self.num_classes**2)
        self.counts += pairs.reshape_as(self.counts).cpu()

    def merge(self, other: ConfusionMatrix) -> None:
        """Adds another matrix's counts.

        Raises:
            DataError: a matrix of another number of classes.
        """
        if other.num_classes != self.num_classes:
            raise DataError(f"cannot merge counts of {other.num_classes} into those of {self.num_classes} classes")
        self.counts += other.counts

    def all_reduce(self) -> None:
        """Sums the counts of all processes; does nothing outside of `torch.distributed`."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # NCCL reduces what lies on a GPU only.
            device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            counts = self.counts.to(device)
            torch.distributed.all_reduce(counts)
            self.counts = counts.cpu()

    def results(self, class_names: Sequence[str], class_groups: Sequence[str] = ()) -> dict[str, Any]:
        """`{"mIoU", "mAcc", "allAcc", "IoU": {name: IoU}, "Acc": {name: accuracy}}`, fractions in [0, 1].

        None stands for what no labelled point defines: an absent class, or everything for an empty split. Where classes
        have groups, `"groups": {group: mIoU}` is the mean over the classes of each that are not absent.

        Args:
            class_names: K names.
            class_groups: K names of groups, "" for a class that is in none; empty: there are no groups.

        Raises:
            DataError: another number of names or groups than classes, or a name twice.
        """
        if len(class_names) != self.num_classes or len(set(class_names)) != self.num_classes:
            raise DataError(f"{self.num_classes} different class names needed, got {list(class_names)}")
        if len(class_groups) not in (0, self.num_classes):
            raise DataError(f"{self.num_classes} groups of classes needed, got {len(class_groups)}")
        counts = self.counts.double().cpu()
        hits, truths, predictions = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
        present = truths > 0
        iou = hits / (truths + predictions - hits)
        accuracy = hits / truths

        def mean(values: Tensor, of: Tensor = present) -> float | None:
            return float(values[of].mean()) if bool(of.any()) else None

        def by_class(values: Tensor) -> dict[str, float | None]:
            pairs = zip(class_names, values.tolist(), present.tolist(), strict=True)
            return {name: value if there else None for name, value, there in pairs}

        groups = {
            group: mean(iou, present & torch.tensor([of == group for of in class_groups]))
            for group in dict.fromkeys(filter(None, class_groups))
        }
        return {
            "mIoU": mean(iou),
            **({"groups": groups} if groups else {}),
            "mAcc": mean(accuracy),
            "allAcc": float(hits.sum() / truths.sum()) if bool(present.any()) else None,
            "IoU": by_class(iou),
            "Acc": by_class(accuracy),
        }
