"""The official test protocol: fragments, test-time augmentation, and a class for every point from the sum of softmaxes.

Each augmented copy of a sample is voxelized into as many fragments as its fullest voxel has points, so that the network
sees every point; the softmax scores of a point are summed over all fragments that hold it and over all copies, and the
class with the largest sum is its prediction. This is the protocol behind the published tables (Pointcept's
`SemSegTester`, which DITR uses); the numbers of `ditr_train.evaluate.Evaluator` are not comparable with it.

A feature row belongs to a point, whichever fragment the point is in: the rows of a sample are read and brought to the
device once, and each fragment has an index of its own into them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ditr_cache.cached import StoredSample
from ditr_cache.errors import UsageError
from ditr_train.data.dataset import CachedDataset, VoxelSample, used_rows
from ditr_train.data.loader import BatchLoader, collate
from ditr_train.data.row_decoder import RowDecoder
from ditr_train.data.sample import FeatureRows, PointBatch, PointSample
from ditr_train.data.voxelize import Fragments, fragments, voxelize
from ditr_train.distributed import autocast
from ditr_train.metrics import ConfusionMatrix
from ditr_train.tta import Augmentation, tta_set

OnSample = Callable[[str, NDArray[np.int64]], None]
"""Called with a sample's id and the [M] class of each of its points, in the cache's order."""


@dataclass(frozen=True, kw_only=True)
class FullProtocol:
    """Settings of the official protocol.

    Args:
        tta: name of a set of `ditr_train.tta`, or augmentations.
        pre_grid_size: metres; samples are first reduced to one point per voxel of this size, whose prediction all
            points of the voxel get. None: not.
        points_per_pass: voxels of one forward pass; as many fragments as fit are joined, one at least.

    Raises:
        UnknownNameError: no set of that name.
        UsageError: no augmentation, or a number that is not positive.
    """

    tta: str | tuple[Augmentation, ...] = "none"
    pre_grid_size: float | None = None
    points_per_pass: int = 1 << 18

    def __post_init__(self) -> None:
        tta_set(self.tta)
        if self.points_per_pass < 1 or (self.pre_grid_size is not None and not self.pre_grid_size > 0):
            raise UsageError(
                "full protocol: expected positive points_per_pass and pre_grid_size, got "
                f"{self.points_per_pass} and {self.pre_grid_size}"
            )

    @property
    def augmentations(self) -> tuple[Augmentation, ...]:
        """Of every copy of a sample."""
        return tta_set(self.tta)


@dataclass(frozen=True, kw_only=True, eq=False)
class FullSample:
    """A sample as the full protocol needs it: N points that the network is to see, and the M points to predict.

    Args:
        points: N points, placed as the dataset does, not augmented.
        features: the rows of these points, as stored, and [N] index; None for a network that reads points only.
        inverse: [M] int64, the one among the N that stands for each point; None where N = M.
        segment: [M] int64 labels, -1 where ignored; None where the split has none.
        source_index: [M] int64, each point's position in the dataset's own order.
    """

    points: PointSample
    features: FeatureRows | None
    inverse: NDArray[np.int64] | None
    segment: NDArray[np.int64] | None
    source_index: NDArray[np.int64]

    def pin_memory(self) -> FullSample:
        """With the feature rows in page-locked memory; `DataLoader` calls it."""
        return self if self.features is None else replace(self, features=self.features.map(Tensor.pin_memory))


class FullSamples:
    """Reads the samples of a dataset for the full protocol; runs in a worker."""

    def __init__(self, dataset: CachedDataset, pre_grid_size: float | None = None) -> None:
        self.dataset, self.pre_grid_size = dataset, pre_grid_size

    def __getitem__(self, index: int) -> FullSample:
        """Sample `index`. Raises as `CachedDataset.eval_sample`."""
        stored, points = self.dataset.read(index)
        points = self.dataset.placed(points)
        segment, inverse = points.segment, None
        if self.pre_grid_size is not None:
            voxels = voxelize(points.coord, self.pre_grid_size)
            points, inverse = points.take(voxels.pick), voxels.inverse
        return FullSample(
            points=replace(points, segment=None, row=None),
            features=_rows(stored, points, self.dataset.decoder),
            inverse=inverse,
            segment=segment,
            source_index=stored.source_index,
        )


def _rows(stored: StoredSample, points: PointSample, decoder: RowDecoder) -> FeatureRows | None:
    if stored.features is None or points.row is None:
        return None
    used, row = used_rows(points.row, stored.features.rows)
    rows = stored.features.take(used)
    return FeatureRows(
        table=torch.from_numpy(rows.table),
        scale=None if rows.scale is None else torch.from_numpy(rows.scale),
        decoder=decoder,
        index=torch.from_numpy(row),
    )


class FullPredictor:
    """Scores all points of a sample by the full protocol.

    Args:
        model: gives class scores; its mode is left as it was.
        dataset: tells grid size and input channels.
        protocol: settings.
        device: where the network computes.
        amp: as in the recipe.
    """

    def __init__(
        self, model: nn.Module, dataset: CachedDataset, protocol: FullProtocol, device: torch.device, amp: str = "off"
    ) -> None:
        self.model, self.dataset, self.protocol, self.device, self.amp = model, dataset, protocol, device, amp
        self.fragments = 0
        """Fragments that the network has seen."""
        self.passes = 0
        """Forward passes so far."""

    def scores(self, sample: FullSample) -> Tensor:
        """[N, K] float32 sums of softmax scores, on the device, of the N points of a sample."""
        features = sample.features
        if features is not None:
            features = features.map(lambda t: t.to(self.device, non_blocking=True))
        total = torch.zeros(len(sample.points), len(self.dataset.class_names), device=self.device)
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                for augmentation in self.protocol.augmentations:
                    self._add_scores(total, augmentation(sample.points), features)
        finally:
            self.model.train(training)
        return total

    def predict(self, sample: FullSample) -> NDArray[np.int64]:
        """[M] class of every point of a sample, in the cache's order."""
        prediction: NDArray[np.int64] = self.scores(sample).argmax(dim=1).cpu().numpy()
        return prediction if sample.inverse is None else prediction[sample.inverse]

    def _add_scores(self, total: Tensor, points: PointSample, features: FeatureRows | None) -> None:
        parts = fragments(points.coord, self.dataset.grid_size)
        together = max(1, self.protocol.points_per_pass // len(parts.grid_coord))
        for first in range(0, len(parts), together):
            picks = [parts.pick(number) for number in range(first, min(first + together, len(parts)))]
            where = torch.from_numpy(np.concatenate(picks)).to(self.device)
            batch = self._batch(points, parts, picks)
            if features is not None:
                batch = replace(batch, features=replace(features, index=features.index[where]))
            with autocast(self.device, self.amp):
                probability = self.model(batch).float().softmax(dim=1)
            # One fragment at a time: no point is in it twice, so that the order of the sum is always the same.
            for at, part in zip(where.split(len(picks[0])), probability.split(len(picks[0])), strict=True):
                total.index_add_(0, at, part)
            self.fragments += len(picks)
            self.passes += 1

    def _batch(self, points: PointSample, parts: Fragments, picks: Sequence[NDArray[np.int64]]) -> PointBatch:
        """Fragments as a batch of their own samples, without features, on the device."""
        samples = []
        for pick in picks:
            chosen = self.dataset.seen(points.take(pick))
            samples.append(
                VoxelSample(
                    name=chosen.name,
                    coord=chosen.coord,
                    grid_coord=parts.grid_coord,
                    feat=chosen.channels(self.dataset.feat),
                    segment=None,
                )
            )
        return collate(samples).to(self.device, non_blocking=True)


class FullEvaluator:
    """Scores a network on all points of a split by the full protocol.

    Args:
        dataset: of the split; without labels nothing is scored.
        protocol: settings.
        device: where the network computes.
        amp: as in the recipe.
        workers: 1 or more: the next sample is read by another process while the device computes.
    """

    def __init__(
        self,
        dataset: CachedDataset,
        protocol: FullProtocol,
        device: torch.device,
        *,
        amp: str = "off",
        workers: int = 0,
    ) -> None:
        self.dataset, self.protocol, self.device, self.amp = dataset, protocol, device, amp
        # Reading is short beside the passes: more processes would only hold more samples in memory.
        self._samples = BatchLoader(
            FullSamples(dataset, protocol.pre_grid_size),
            range(len(dataset)),
            workers=min(workers, 1),
            pin_memory=device.type == "cuda",
        )

    def __call__(self, model: nn.Module, on_sample: OnSample | None = None) -> dict[str, Any]:
        """mIoU, mAcc, allAcc and values per class as `Evaluator`, with `tta`, `fragments` and `passes`.

        Args:
            model: gives class scores.
            on_sample: called with every sample's prediction.

        Raises:
            CacheError: as `CachedDataset.eval_sample`.
        """
        started = time.perf_counter()
        predictor = FullPredictor(model, self.dataset, self.protocol, self.device, self.amp)
        confusion = ConfusionMatrix(len(self.dataset.class_names), ignore_index=-1)
        for sample in self._samples:
            prediction = predictor.predict(sample)
            if sample.segment is not None:
                confusion.update(prediction, sample.segment)
            if on_sample is not None:
                on_sample(sample.points.name, prediction)
        return {
            "protocol": "full",
            "tta": _plain(self.protocol.tta),
            "pre_grid_size": self.protocol.pre_grid_size,
            "fragments": predictor.fragments,
            "passes": predictor.passes,
            **confusion.results(self.dataset.class_names, self.dataset.class_groups),
            "seconds": time.perf_counter() - started,
        }


def _plain(tta: str | tuple[Augmentation, ...]) -> str | list[dict[str, Any]]:
    """For JSON: the name of a set, or its augmentations."""
    return tta if isinstance(tta, str) else [asdict(augmentation) for augmentation in tta]
