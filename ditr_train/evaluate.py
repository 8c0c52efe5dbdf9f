"""Scores and predictions of a trained network, by one of two protocols whose numbers are never to be compared.

`fast` is what training logs: every sample is voxelized once, and all points of a voxel get the prediction of the one
that stands for it. `full` is the official protocol of the published tables, see `ditr_train.protocol`. Every result
says which of them it comes from.
"""

from __future__ import annotations

import json
import logging
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ditr_cache.errors import MissingDataError, UnknownNameError, UsageError
from ditr_cache.store import CacheReader, open_cache
from ditr_train.data.dataset import CachedDataset
from ditr_train.data.loader import collate, eval_loader
from ditr_train.data.sample import PointBatch
from ditr_train.distributed import Processes, autocast
from ditr_train.files import replace_text
from ditr_train.metrics import ConfusionMatrix
from ditr_train.progress import SampleProgress
from ditr_train.protocol import FullEvaluator, FullPredictor, FullProtocol, FullSamples, OnSample
from ditr_train.run_folder import CacheInfo
from ditr_train.submission import Submission
from ditr_train.trained import TrainedRun, load_run

log = logging.getLogger(__name__)

PROTOCOLS = ("fast", "full")
"""What `protocol` can be."""


class Evaluator:
    """Scores a network on all points of a split by the fast protocol, as often as asked; its loading processes stay.

    Args:
        dataset: of the split; without labels nothing is scored.
        processes: samples are shared among them.
        amp: as in the recipe.
        workers: loading processes per process.
    """

    def __init__(self, dataset: CachedDataset, processes: Processes, *, amp: str = "off", workers: int = 0) -> None:
        self.dataset, self.processes, self.amp = dataset, processes, amp
        share = range(processes.rank, len(dataset), processes.world)
        self._loader = eval_loader(dataset, share, workers=workers, pin_memory=processes.device.type == "cuda")

    def __call__(self, model: nn.Module, on_sample: OnSample | None = None) -> dict[str, Any]:
        """`protocol`, mIoU, mAcc, allAcc and IoU per class (None for a class that occurs nowhere), over the split.

        Where the cache's classes have groups, `groups` holds the mIoU of each.

        Args:
            model: gives class scores.
            on_sample: called with every sample's prediction.

        Raises:
            CacheError: as `CachedDataset.eval_sample`.
        """
        started = time.perf_counter()
        confusion = ConfusionMatrix(len(self.dataset.class_names), ignore_index=-1)
        for batch, prediction in self._predictions(model):
            if batch.full_segment is not None:
                confusion.update(prediction, batch.full_segment)
            if on_sample is not None:
                on_sample(batch.names[0], prediction.cpu().numpy())
        if self.processes.world > 1:
            confusion.all_reduce()
        return {
            "protocol": "fast",
            **confusion.results(self.dataset.class_names, self.dataset.class_groups),
            "seconds": time.perf_counter() - started,
        }

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
    protocol: str = "fast",
    tta: str | None = None,
    submission: str | Path | None = None,
    device: str = "auto",
    checkpoint: str = "best",
    cache: str | None = None,
    workers: int | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Score of a run over all points of a split (its validation split where None), also written to the run folder.

    Args:
        run_dir: made by `ditr-train run`.
        split: of the cache.
        protocol: `fast` or `full`.
        tta: named set of test-time augmentations of the full protocol; None takes the recipe's.
        submission: folder to write the predictions to in the format of the dataset's benchmark server. A split
            without labels can then be predicted, too.
        device: auto, cpu or cuda.
        checkpoint: `best` or `last`.
        cache: use this cache instead of the recipe's.
        workers: data-loading processes; None takes the recipe's.
        quiet: show no progress.

    Returns:
        `run`, `split`, `checkpoint`, `step`, `cache`, `other_cache` (where it is not the one of the training: 8 hex of
        a digest over the split's content), `samples`, `labelled`, `protocol`, `mIoU`, `groups` (the
        mIoU of each, where the classes have some), `mAcc`, `allAcc`, per-class values (all None without labels),
        `seconds`; of the full protocol also `tta`, `pre_grid_size`, `fragments` (seen by the network) and `passes`
        (forward passes); `submission`, the file to upload, where one was written.

    Raises:
        UsageError: settings that do not fit each other, or a run that gives no classes.
        UnknownNameError: no such protocol, set or split.
        MissingDataError: the split has no labels, and no submission is asked for.
        CacheError: as `load_run`, `CachedDataset` and `Submission`.
    """
    _check(protocol, tta)
    run = load_run(run_dir, device=device, checkpoint=checkpoint, cache=cache)
    split = (run.recipe.splits.val or "val") if split is None else split
    reader = open_cache(run.recipe.require_cache())
    labelled = has_labels(reader, split)
    if not labelled and submission is None:
        raise MissingDataError(
            f"cache {str(reader.paths.root)!r}, split {split!r}: samples have no 'segment', so there is nothing to "
            "score; choose a split with labels, or write the predictions for a benchmark server with --submission DIR"
        )
    dataset = run.dataset(split, labelled=labelled)
    amp, workers = run.recipe.training.amp, run.recipe.data.workers if workers is None else workers
    evaluator: Evaluator | FullEvaluator
    if protocol == "full":
        evaluator = FullEvaluator(dataset, full_protocol(run, tta), run.device, amp=amp, workers=workers)
    else:
        evaluator = Evaluator(dataset, Processes(0, 1, run.device), amp=amp, workers=workers)
    target = None
    if submission is not None:
        images, pretrained = run.recipe.vfm is not None, run.recipe.init is not None
        target = Submission(submission, reader, split, dataset.ids, images=images, pretrained=pretrained)
    with SampleProgress(f"evaluating {split} ({protocol})", len(dataset), enabled=not quiet) as progress:

        def on_sample(name: str, prediction: NDArray[np.int64]) -> None:
            if target is not None:
                target.write(name, prediction)
            progress.advance()

        scores = evaluator(run.model, on_sample)
    results = {
        "run": str(run_dir),
        "split": split,
        "checkpoint": checkpoint,
        "step": run.step,
        "cache": str(reader.paths.root),
        "other_cache": None if run.on_own_cache() else CacheInfo.of([dataset]).identity[:8],
        "samples": len(dataset),
        "labelled": labelled,
        **scores,
    }
    if target is not None:
        results["submission"] = str(target.finish())
    _keep(Path(run_dir), results)
    return results


def predict_sample(
    run: TrainedRun, sample_id: str, protocol: str = "fast", *, tta: str | None = None
) -> NDArray[np.int64]:
    """[M] int64 class of every point of a sample, in the dataset's own order.

    Args:
        run: gives class scores.
        sample_id: of the run's cache.
        protocol: `fast` or `full`.
        tta: named set of test-time augmentations of the full protocol; None takes the recipe's.

    Raises:
        UsageError: settings that do not fit each other, or a run that gives no classes.
        UnknownNameError: no such protocol, set, or sample in the cache.
        CacheError: as `TrainedRun.dataset`.
    """
    _check(protocol, tta)
    cache = open_cache(run.recipe.require_cache())
    dataset = run.dataset(cache.sample_info(sample_id).split, labelled=False)
    index, amp = dataset.ids.index(sample_id), run.recipe.training.amp
    if protocol == "full":
        settings = full_protocol(run, tta)
        whole = FullSamples(dataset, settings.pre_grid_size)[index]
        source = whole.source_index
        prediction = FullPredictor(run.model, dataset, settings, run.device, amp).predict(whole)
    else:
        sample = dataset.eval_sample(index)
        assert sample.source_index is not None
        source = sample.source_index
        prediction = predict(run.model, collate([sample]).to(run.device), amp).cpu().numpy()
    result = np.full(int(source.max()) + 1, -1, dtype=np.int64)
    result[source] = prediction
    return result


def full_protocol(run: TrainedRun, tta: str | None = None) -> FullProtocol:
    """The full protocol as a run's recipe sets it, or with another set. Raises as `FullProtocol`."""
    settings = run.recipe.evaluation
    return FullProtocol(tta=settings.tta if tta is None else tta, pre_grid_size=settings.pre_grid_size)


def has_labels(cache: CacheReader, split: str) -> bool:
    """Whether every sample of a split has labels; True where there is no such split."""
    records = (r for r in cache.geometry.values() if any(s.split == split for s in r.samples))
    return all("segment" in record.arrays for record in records)


def result_file(results: Mapping[str, Any]) -> str:
    """Name of the file in `RUN_DIR/eval` that keeps a result: split, checkpoint, protocol, TTA, and a foreign cache."""
    parts = [urllib.parse.quote(results["split"], safe=""), results["checkpoint"], results["protocol"]]
    tta = results.get("tta", "none")
    if tta != "none":
        parts.append(tta if isinstance(tta, str) else "custom")
    if results.get("other_cache") is not None:
        parts.append(f"cache-{results['other_cache']}")
    return "-".join(parts) + ".json"


def _check(protocol: str, tta: str | None) -> None:
    """Raise what `protocol` and `tta` alone are enough for, before anything is opened."""
    if protocol not in PROTOCOLS:
        raise UnknownNameError.of("protocol", protocol, PROTOCOLS)
    if tta is not None:
        FullProtocol(tta=tta)
        if protocol != "full":
            raise UsageError(f"test-time augmentation ({tta}) is part of the full protocol; add --protocol full")


def _keep(run_dir: Path, results: Mapping[str, Any]) -> None:
    """Write results to the run folder. One that cannot be written, say on a shared disk, costs no finished result."""
    path = run_dir / "eval" / result_file(results)
    try:
        path.parent.mkdir(exist_ok=True)
        replace_text(path, json.dumps(results, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        log.warning("%s cannot be written (%s); the result is only shown", path, error.strerror or error)
