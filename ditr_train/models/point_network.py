"""`PointNetwork`: what every network here shares, a backbone, an optional injection of VFM features, a linear head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ditr_cache.errors import DataError, MismatchError
from ditr_train.data.sample import PointBatch
from ditr_train.models.backbone import Backbone, NoTerms
from ditr_train.models.injection import Injection


class PointNetwork(nn.Module):
    """Points of a batch -> one feature each, and a head that a subclass applies to them.

    Args:
        backbone: the network over points.
        out_channels: of the head.
        injection: adds VFM features to the backbone's features; None for a network that reads points only.
    """

    def __init__(self, backbone: Backbone[Any], out_channels: int, injection: Injection | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.injection = injection
        self.head = nn.Linear(backbone.out_channels, out_channels)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def point_features(self, batch: PointBatch) -> Tensor:
        """[N, D] features of the batch's points, from the backbone's last decoder stage.

        Raises:
            DataError: injection without features in the batch, or inputs that do not fit each other.
            MismatchError: points or VFM rows of another number of channels than the network was built for.
        """
        in_channels = self.backbone.in_channels
        if self.injection is not None:
            in_channels -= self.injection.config.appended_channels
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
            return batch.feat.new_zeros(0, self.head.in_features) + 0.0 * unused

        prepared = self.backbone.prepare(batch)
        if self.injection is None or batch.features is None:
            return self.backbone(prepared, batch.feat, NoTerms())
        injected = self.injection(batch.features, prepared.hierarchy)
        return self.backbone(prepared, injected.input(batch.feat), injected)
