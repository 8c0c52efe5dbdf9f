"""Full-resolution evaluation and prediction: every point gets a class through `inverse`, none is left out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ditr_cache.errors import DataError, MissingDataError
from ditr_cache.store import open_cache
from ditr_train.checkpoint import load_checkpoint
from ditr_train.data.dataset import CachedDataset
from ditr_train.data.loader import BatchLoader, EvalBatches, collate
from ditr_train.data.sample import PointBatch
from ditr_train.distributed import Processes, choose_device
from ditr_train.metrics import ConfusionMatrix
from ditr_train.models.segmentor import Segmentor, build_segmentor
from ditr_train.recipe import Recipe
from ditr_train.run_folder import RunFolder, RunInfo

AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""`training.amp` -> dtype of autocast."""


def autocast(device: torch.device, amp: str) -> AbstractContextManager[Any]:
    """Mixed precision as the recipe says, on a GPU only: a CPU always computes in float32."""
    enabled = amp != "off" and device.type == "cuda"
    return torch.autocast(device.type, dtype=AMP_DTYPES.get(amp), enabled=enabled)


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


@dataclass(frozen=True)
class TrainedRun:
    """A trained network with what it needs to be used.

    Args:
        recipe: of the run, with the cache that it is used on.
        info: what it was made from.
        model: in evaluation mode, on `device`.
        device: where it computes.
        step: of the checkpoint.
    """

    recipe: Recipe
    info: RunInfo
    model: Segmentor
    device: torch.device
    step: int

    def dataset(self, split: str, *, labelled: bool = True) -> CachedDataset:
        """A split of the run's cache, as the network expects it.

        Raises:
            MismatchError: the cache's classes or features are not those of the run.
            CacheError: as `CachedDataset`.
        """
        dataset = CachedDataset(
            open_cache(self.recipe.require_cache()),
            split,
            grid_size=self.recipe.data.grid_size,
            feat=self.recipe.data.feat,
            vfm=self.recipe.vfm,
            class_names=self.info.class_names,
            labelled=labelled,
        )
        self.info.check_vfm(dataset.vfm)
        return dataset


def load_run(
    run_dir: str | Path, *, device: str = "auto", checkpoint: str = "best", cache: str | None = None
) -> TrainedRun:
    """The network of a run folder.

    Args:
        run_dir: made by `ditr-train run`.
        device: auto, cpu or cuda.
        checkpoint: `best` (highest mIoU on the validation split) or `last`.
        cache: use this cache instead of the recipe's, say after it was moved.

    Raises:
        MissingDataError: not a run folder, or no such checkpoint in it yet.
        DataError: a checkpoint that is damaged or of another network.
        DeviceError: CUDA asked for and absent.
    """
    chosen, folder = choose_device(device), RunFolder(Path(run_dir))
    recipe, info = folder.open()
    path = {"best": folder.best, "last": folder.last}[checkpoint]
    if not path.exists():
        raise MissingDataError(
            f"run folder {str(folder.path)!r} has no {path.name} yet; let it train to its first evaluation "
            "(`ditr-train run ... --resume`)"
        )
    state = load_checkpoint(path)
    model = build_segmentor(
        recipe.model,
        in_channels=info.in_channels,
        num_classes=len(info.class_names),
        feature_dim=None if info.vfm is None else info.vfm["dim"],
    )
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise DataError(
            f"checkpoint {str(path)!r} does not fit the network of {folder.recipe.name}: "
            f"{str(error).splitlines()[-1].strip()}; one of the two was replaced"
        ) from error
    if cache is not None:
        recipe = recipe.model_copy(update={"cache": cache})
    return TrainedRun(recipe, info, model.to(chosen).eval(), chosen, int(state["step"]))


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
