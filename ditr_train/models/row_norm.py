"""`RowNorm`: batch norm over rows."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class RowNorm(nn.BatchNorm1d):
    """Batch norm over rows [N, C] that also takes fewer than two of them, on which it uses its running statistics.

    The coarsest resolution of a small crop may be a single site, of which no variance can be had.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[N, C] -> [N, C]."""
        if self.training and len(input) < 2:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        return super().forward(input)
