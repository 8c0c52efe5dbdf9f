"""A linear probe in closed form: ridge regression on one-hot labels, and the IoU of what it predicts. Pure arrays.

Where `ditr-train probe` fits a logistic regression in torch to judge a VFM, this one needs numpy alone, has one exact
solution, and sees its points one block after the other: what is kept is [C, C + K], however many there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RIDGE = 1e-3
"""Weight of the squared coefficients of standardised channels, beside the mean squared error."""

BALANCE = 0.5
"""A point of a class with n of N points weighs (N / n)^0.5.

Least squares neglects rare classes where all points weigh the same (0), and favours them where all classes do (1):
efficientnet-lite0 on 12 generated rooms has an mIoU of 0.620 for 0, 0.715 for 0.5 and 0.667 for 1.
"""

_BLOCK = 1 << 14


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearProbe:
    """Features [n, C] @ `weight` [C, K] + `bias` [K] are scores of K classes; float64."""

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]

    def predict(self, features: NDArray[np.floating]) -> NDArray[np.int64]:
        """[n] int64, the class of the highest score of each row [n, C]; never one that no training point had."""
        parts = (features[i : i + _BLOCK] for i in range(0, max(1, len(features)), _BLOCK))
        return np.concatenate([(part @ self.weight + self.bias).argmax(axis=1) for part in parts])


class NormalEquations:
    """Sums over training points that decide a `LinearProbe`, in float64.

    Args:
        dim: channels C.
        counts: [K] integer number of the points of each class that will be added.
        balance: see `BALANCE`.
    """

    def __init__(self, dim: int, counts: NDArray[np.integer], *, balance: float = BALANCE) -> None:
        share = counts / max(1, int(counts.sum()))
        self._of_class = np.power(share, -balance, out=np.zeros(len(counts)), where=counts > 0)
        self._shift: NDArray[np.float64] | None = None
        self._first = np.zeros(dim)
        self._second = np.zeros((dim, dim))
        self._joint = np.zeros((dim, len(counts)))
        self._weights = np.zeros(len(counts))

    def add(self, features: NDArray[np.floating], labels: NDArray[np.integer]) -> None:
        """Count points: features [n, C], labels [n] of 0 to K - 1."""
        for i in range(0, len(labels), _BLOCK):
            x = features[i : i + _BLOCK].astype(np.float64)
            if self._shift is None:  # sums of squares of what lies far from zero would cancel
                self._shift = x.mean(axis=0)
            x -= self._shift
            weighted = np.zeros((len(x), len(self._weights)))
            weighted[np.arange(len(x)), labels[i : i + _BLOCK]] = self._of_class[labels[i : i + _BLOCK]]
            each = weighted.sum(axis=1)
            self._first += each @ x
            self._second += (x * each[:, None]).T @ x
            self._joint += x.T @ weighted
            self._weights += weighted.sum(axis=0)

    def solve(self, ridge: float = RIDGE) -> LinearProbe:
        """The probe of least weighted squared error plus `ridge` times the squared coefficients, channels standardised.

        What standardises them is folded into the result. At least one point has been added.
        """
        assert self._shift is not None
        total = self._weights.sum()
        mean, share = self._first / total, self._weights / total
        covariance = self._second / total - np.outer(mean, mean)
        std = np.sqrt(np.maximum(np.diag(covariance), 0))
        std[std <= 1e-6 * (np.abs(mean + self._shift) + 1e-12)] = 1  # a constant tells nothing
        gram = covariance / np.outer(std, std) + ridge * np.eye(len(mean))
        weight = np.linalg.solve(gram, (self._joint / total - np.outer(mean, share)) / std[:, None]) / std[:, None]
        return LinearProbe(weight=weight, bias=share - (mean + self._shift) @ weight)


def count_pairs(predicted: NDArray[np.integer], labels: NDArray[np.integer], classes: int) -> NDArray[np.int64]:
    """[K, K] int64 number of points by true class (row) and predicted class (column)."""
    return np.bincount(labels.astype(np.int64) * classes + predicted, minlength=classes**2).reshape(classes, classes)


def class_iou(counts: NDArray[np.integer]) -> list[float | None]:
    """IoU of each class of such a matrix [K, K]; None for a class without a labelled point, which no mean counts."""
    hits, truths = np.diag(counts), counts.sum(axis=1)
    union = truths + counts.sum(axis=0) - hits
    return [float(h / u) if t else None for h, u, t in zip(hits, union, truths, strict=True)]


def mean_iou(counts: NDArray[np.integer]) -> float | None:
    """Mean IoU over the classes that have a labelled point; None where there is none."""
    present = [iou for iou in class_iou(counts) if iou is not None]
    return float(np.mean(present)) if present else None
