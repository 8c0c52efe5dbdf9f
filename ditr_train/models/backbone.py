"""`Backbone`: what every network over points offers, whatever it computes with.

A backbone works at resolutions l = 0, 1, ..., num_stages: 0 has one site per point of the batch, the coarsest is the
bottleneck. `prepare` finds the sites of all resolutions from the points' places alone; `forward` computes features on
them. Between the two, the injection of VFM features pools each feature to the sites that its point belongs to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

from torch import Tensor, nn

from ditr_train.data.sample import PointBatch
from ditr_train.models.hierarchy import Hierarchy


class Prepared(Protocol):
    """The sites of one batch at every resolution; each backbone has a kind of its own."""

    @property
    def hierarchy(self) -> Hierarchy:
        """Which site of a coarser resolution each point belongs to."""


class Terms(Protocol):
    """What is added to a backbone's features; asked once for each resolution."""

    def encoder(self, level: int, sites: Tensor) -> Tensor | None:
        """[M_l, channels] float32 to add at the begin of encoder stage l, or None for nothing.

        Args:
            level: l.
            sites: [M_l, ...] the sites of resolution l, in the order of the features.
        """

    def decoder(self, level: int, sites: Tensor) -> Tensor | None:
        """The same for the decoder's stage that ends at resolution l."""


class NoTerms:
    """`Terms` of a network without injection."""

    def encoder(self, level: int, sites: Tensor) -> Tensor | None:
        """None."""
        return None

    def decoder(self, level: int, sites: Tensor) -> Tensor | None:
        """None."""
        return None


PreparedT = TypeVar("PreparedT", bound=Prepared)


class Backbone(nn.Module, ABC, Generic[PreparedT]):
    """A network over points.

    Args:
        in_channels: channels of the points.
        out_channels: channels of what it says about each point.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels

    @abstractmethod
    def prepare(self, batch: PointBatch) -> PreparedT:
        """The sites of a batch of at least one point. Raises `DataError` for points that the backbone cannot hold."""

    @abstractmethod
    def forward(self, prepared: PreparedT, feat: Tensor, terms: Terms) -> Tensor:
        """Features of the points.

        Args:
            prepared: of the batch.
            feat: [N, in_channels] float32, in the batch's order.
            terms: added to the features of the encoder and the decoder.

        Returns:
            [N, out_channels], in the batch's order.
        """
