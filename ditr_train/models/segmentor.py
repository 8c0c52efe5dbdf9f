"""`Segmentor`: backbone, optional injection of VFM features, and a linear head that gives a score per class."""

from __future__ import annotations

from torch import Tensor

from ditr_train.data.sample import PointBatch
from ditr_train.models.point_network import PointNetwork


class Segmentor(PointNetwork):
    """Points of a batch -> class scores; the head's channels are the classes."""

    def forward(self, batch: PointBatch) -> Tensor:
        """Scores [N, K] float32 of the batch's points, before the softmax. Raises as `PointNetwork.point_features`."""
        return self.head(self.point_features(batch)).float()
