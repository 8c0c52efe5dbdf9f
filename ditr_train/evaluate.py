"""Full-resolution evaluation and prediction: every point gets a class through `inverse`, none is left out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ditr_cache.store import open_cache
from ditr_train.data.dataset import CachedDataset
from ditr_train.data.loader import BatchLoader, EvalBatches, collate
from ditr_train.data.sample import PointBatch
from ditr_train.distributed import Processes, autocast
from ditr_train.metrics import ConfusionMatrix
from ditr_train.trained import TrainedRun, load_run


class Evaluator:
    """Scores a network on all points of a split, as often as asked; its loading processes stay.

    Args:
        dataset: of the split.
        processes: samples are shared among them.
        amp: as in the recipe.
        workers: loading processes per process.
    """

    def __init__(self, dataset: CachedDataset, processes: Processes, *, amp: str = "off", workers: int = 0) -> None:
        self.dataset, self.processes, self.amp = dataset, processes, amp
        share = list(range(processes.rank, len(dataset), processes.world))
        self._loader = BatchLoader(
            EvalBatches(dataset), share, workers=min(workers, len(share)), pin_memory=processes.device.type == "cuda"
        )

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """mIoU, mAcc, allAcc and IoU per class (None for a class that occurs nowhere), over the whole split.

        Raises:
            CacheError: as `CachedDataset.eval_sample`.
        """
        started = time.perf_counter()
        confusion = ConfusionMatrix(len(self.dataset.class_names), ignore_index=-1)
        for batch, prediction in self._predictions(model):
            assert batch.full_segment is not None
            confusion.update(prediction, batch.full_segment)
        if self.processes.world > 1:
            confusion.all_reduce()
        return {**confusion.results(self.dataset.class_names), "seconds": time.perf_counter() - started}

    def _predictions(self, model: nn.Module) -> Iterator[tuple[PointBatch, torch.Tensor]]:
        device = self.processes.device
        for batch in self._loader:
            batch = batch.to(device, non_blocking=True)
            yield batch, predict(model, batch, self.amp)


def predict(model: nn.Module, batch: PointBatch, amp: str = "off") -> torch.Tensor:
    """[M] int64 class of every full-resolution point of an evaluation batch. Leaves the model's mode as it was."""
    assert batch.inverse is not None
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(batch.coord.device, amp):
            return model(batch).argmax(dim=1)[batch.inverse]
    finally:
        model.train(training)


def evaluate(
    run_dir: str | Path,
    split: str | None = None,
    *,
    device: str = "auto",
    checkpoint: str = "best",
    cache: str | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Score of a run over all points of a split (its validation split where None).

    Returns:
        `run`, `split`, `checkpoint`, `step`, `samples`, `mIoU`, `mAcc`, `allAcc`, per-class values, `seconds`.

    Raises:
        CacheError: as `load_run` and `CachedDataset`.
    """
    run = load_run(run_dir, device=device, checkpoint=checkpoint, cache=cache)
    split = run.recipe.splits.val if split is None else split
    dataset = run.dataset(split)
    evaluator = Evaluator(
        dataset,
        Processes(0, 1, run.device),
        amp=run.recipe.training.amp,
        workers=run.recipe.data.workers if workers is None else workers,
    )
    return {
        "run": str(run_dir),
        "split": split,
        "checkpoint": checkpoint,
        "step": run.step,
        "samples": len(dataset),
        **evaluator(run.model),
    }


def predict_sample(run: TrainedRun, sample_id: str) -> NDArray[np.int64]:
    """[M] int64 class of every point of a sample, in the dataset's own order.

    Raises:
        UnknownNameError: no such sample in the cache.
        CacheError: as `TrainedRun.dataset`.
    """
    cache = open_cache(run.recipe.require_cache())
    dataset = run.dataset(cache.sample_info(sample_id).split, labelled=False)
    sample = dataset.eval_sample(dataset.ids.index(sample_id))
    assert sample.source_index is not None
    source = sample.source_index
    batch = collate([sample]).to(run.device)
    prediction = predict(run.model, batch, run.recipe.training.amp).cpu().numpy()
    result = np.full(int(source.max()) + 1, -1, dtype=np.int64)
    result[source] = prediction
    return result
