"""Exponential moving average of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class MovingAverage:
    """A second copy of a network that follows it slowly; it is evaluated and used, never trained.

    After t updates the decay is min(`decay`, (1 + t) / (10 + t)), so that the average of a short run is not mostly its
    fresh weights. The running statistics of norms are averaged as the weights are, counters are copied.

    Args:
        model: the network as it is now; the average starts from it.
        decay: share of the average that one update keeps, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step towards `model`, whose state has the names and shapes of the average's."""
        self.updates += 1
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        ours, theirs = self.model.state_dict(), model.state_dict()
        moving = [name for name, tensor in ours.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([ours[n] for n in moving], [theirs[n] for n in moving], 1 - keep)
        for name in ours.keys() - moving:
            ours[name].copy_(theirs[name])
