"""How well a distilled network predicts the features of points it was not trained on."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from ditr_train.data.joint import JointDataset
from ditr_train.data.loader import eval_loader
from ditr_train.distributed import Processes, autocast


class CosineEvaluator:
    """Mean cosine between predicted and cached features over the voxels of a split that have one.

    Args:
        dataset: of the split.
        processes: samples are shared among them.
        amp: as in the recipe.
        workers: loading processes per process.
    """

    def __init__(self, dataset: JointDataset, processes: Processes, *, amp: str = "off", workers: int = 0) -> None:
        self.processes, self.amp = processes, amp
        share = range(processes.rank, len(dataset), processes.world)
        self._loader = eval_loader(dataset, share, workers=workers, pin_memory=processes.device.type == "cuda")

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """`cosine` in [-1, 1] (None where no voxel has a feature), `voxels` it was taken over, `seconds`.

        Raises:
            CacheError: as `CachedDataset.eval_sample`.
        """
        started = time.perf_counter()
        total, count = 0.0, 0
        training = model.training
        model.eval()
        try:
            with torch.inference_mode(), autocast(self.processes.device, self.amp):
                for batch in self._loader:
                    cosine = model(batch.to(self.processes.device, non_blocking=True))
                    total, count = total + cosine.double().sum().item(), count + len(cosine)
        finally:
            model.train(training)
        total, count = self.processes.sum(total), int(self.processes.sum(count))
        return {
            "cosine": total / count if count else None,
            "voxels": count,
            "seconds": time.perf_counter() - started,
        }
