"""Batches: which samples make up which step, how they are joined, and the worker processes that make them.

Every draw is a function of (seed, epoch, position in the epoch). What a step sees therefore depends neither on the
number of workers, nor on the number of ranks or accumulation steps, nor on where a run was interrupted and resumed.
Mix3D joins neighbours of a micro-batch: they are the same ones as long as micro-batches have an even number of samples.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from ditr_cache.errors import CacheError, DataError, StorageError, UsageError
from ditr_train.data.dataset import MAX_INJECTED_EXTENT, VoxelSample
from ditr_train.data.sample import FeatureRows, PointBatch
from ditr_train.data.voxelize import group

Batch = TypeVar("Batch", covariant=True)

_ORDER, _SAMPLE, _MIX = 0, 1, 2  # independent streams of random numbers


@dataclass(frozen=True)
class BatchPlan:
    """What one micro-batch is made of.

    Args:
        epoch: counted from 0.
        items: (position in the epoch, index of the sample) of each sample.
    """

    epoch: int
    items: tuple[tuple[int, int], ...]


def accumulation_steps(batch_size: int, world: int, micro_batch: int, *, pairs: bool = False) -> int:
    """Fewest micro-batches of at most `micro_batch` samples into which each of `world` processes can cut its even share
    of a global batch; with `pairs`, as for Mix3D, of an even number of samples where that can be.

    Raises:
        UsageError: the batch cannot be shared evenly by so many processes.
    """
    share, rest = divmod(batch_size, world)
    if rest or share == 0:
        raise UsageError(
            f"data.batch_size: {batch_size} samples cannot be shared evenly by {world} processes; run as many as "
            "divide it, or choose a multiple"
        )
    fitting = [steps for steps in range(1, share + 1) if share % steps == 0 and share // steps <= micro_batch]
    even = [steps for steps in fitting if share // steps % 2 == 0]
    return even[0] if pairs and even else fitting[0]


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """Which samples each step of a run sees. Pure arithmetic: reads nothing.

    Args:
        sizes: number of samples of each source; samples are counted through all of them.
        batch_size: samples per optimiser step, over all ranks and accumulation steps.
        loop: how often an epoch goes through its samples.
        ratios: of an epoch's samples, how many come from each source, relative to each other; an epoch stays as long.
            None: every sample once.
        seed: of the order.
        accumulation: micro-batches per optimiser step and rank.
        rank, world: this process and the number of processes.

    Raises:
        UsageError: a batch that cannot be shared out evenly, or that is larger than an epoch; a ratio so small that
            its source would never be seen.
    """

    sizes: tuple[int, ...]
    batch_size: int
    loop: int = 1
    ratios: tuple[float, ...] | None = None
    seed: int = 0
    accumulation: int = 1
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        parts = self.accumulation * self.world
        if self.batch_size % parts:
            raise UsageError(
                f"data.batch_size: {self.batch_size} samples cannot be shared evenly by {self.world} processes x "
                f"{self.accumulation} accumulation steps; choose a multiple of {parts}"
            )
        if self.steps_per_epoch < 1:
            raise UsageError(
                f"data.batch_size: an epoch has {sum(self.counts)} samples x loop {self.loop}, fewer than one batch of "
                f"{self.batch_size}; lower data.batch_size or raise data.loop"
            )
        for source, count in enumerate(self.counts):
            if count == 0:
                raise UsageError(
                    f"sources.{source}.ratio: so small that an epoch of {sum(self.sizes)} samples would hold none of "
                    "this source; raise it, or leave the source out"
                )

    @property
    def counts(self) -> tuple[int, ...]:
        """How many samples of each source one pass holds."""
        if self.ratios is None:
            return self.sizes
        # The ends of the shares are rounded, not the shares: their sum stays.
        ends = np.rint(np.cumsum(self.ratios) / sum(self.ratios) * sum(self.sizes)).astype(int)
        return tuple(np.diff(ends, prepend=0).tolist())

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch; samples that do not fill a batch are left out, others in each epoch."""
        return sum(self.counts) * self.loop // self.batch_size

    def order(self, epoch: int) -> NDArray[np.int64]:
        """[samples of an epoch] index of the sample at each position; each pass goes through all sources."""
        rng = np.random.default_rng([self.seed, _ORDER, epoch])
        return np.concatenate([self._one_pass(rng) for _ in range(self.loop)])

    def _one_pass(self, rng: np.random.Generator) -> NDArray[np.int64]:
        if self.ratios is None:
            return rng.permutation(sum(self.sizes))
        parts, first = [], 0
        for size, count in zip(self.sizes, self.counts, strict=True):
            repeats = -(-count // size)  # no sample is seen twice before every other was seen once
            parts.append(first + np.concatenate([rng.permutation(size) for _ in range(repeats)])[:count])
            first += size
        return rng.permutation(np.concatenate(parts))

    def batches(self, start: int, stop: int) -> Iterator[BatchPlan]:
        """This rank's micro-batches of the optimiser steps `start`..`stop` - 1, counted from the run's begin."""
        size = self.batch_size // (self.accumulation * self.world)
        order, of_epoch = np.empty(0, dtype=np.int64), -1
        for step in range(start, stop):
            epoch, in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != of_epoch:
                order, of_epoch = self.order(epoch), epoch
            for part in range(self.accumulation):
                first = in_epoch * self.batch_size + (part * self.world + self.rank) * size
                yield BatchPlan(epoch, tuple((p, int(order[p])) for p in range(first, first + size)))


class TrainSamples(Protocol):
    """What training batches are made of: one dataset, or several joined."""

    def train_sample(self, index: int, rng: np.random.Generator) -> VoxelSample:
        """Sample `index`, augmented by draws from `rng`."""


class EvalSamples(Protocol):
    """What evaluation batches are made of."""

    def eval_sample(self, index: int) -> VoxelSample:
        """Sample `index` as it is."""


class TrainBatches:
    """Makes the training batch of a plan; runs in the workers.

    Args:
        dataset: of the training split.
        seed: of the augmentation.
        mix_prob: probability that two neighbours of a batch become one sample (Mix3D).
    """

    def __init__(self, dataset: TrainSamples, *, seed: int, mix_prob: float = 0.0) -> None:
        self.dataset, self.seed, self.mix_prob = dataset, seed, mix_prob

    def __getitem__(self, plan: BatchPlan) -> PointBatch:
        samples = [
            self.dataset.train_sample(index, np.random.default_rng([self.seed, _SAMPLE, plan.epoch, position]))
            for position, index in plan.items
        ]
        mixed: list[VoxelSample] = []
        for i in range(0, len(samples), 2):
            pair = samples[i : i + 2]
            rng = np.random.default_rng([self.seed, _MIX, plan.epoch, plan.items[i][0]])
            mixed += [mix(*pair)] if len(pair) == 2 and rng.random() < self.mix_prob else pair
        return collate(mixed)


class EvalBatches:
    """Makes the evaluation batch of one sample; runs in the workers."""

    def __init__(self, dataset: EvalSamples) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> PointBatch:
        return collate([self.dataset.eval_sample(index)])


def mix(first: VoxelSample, second: VoxelSample) -> VoxelSample:
    """Mix3D: both samples in one room, their middles (x, y) and floors (z) on each other, or sensor on sensor.

    The second is moved by whole voxels, so that both keep their voxels; of two that coincide the first one's stays,
    as a network needs unique voxels.

    Raises:
        DataError: samples that are not centred lie too far apart.
    """
    grid_coord = np.concatenate([first.grid_coord, second.grid_coord + _shift(first, second)])
    low = grid_coord.min(axis=0)
    grid_coord -= low
    order, starts, _ = group(grid_coord)
    keep = np.sort(order[starts])

    def joined(name: str) -> Any:
        a, b = getattr(first, name), getattr(second, name)
        return None if a is None or b is None else np.concatenate([a, b])

    row = None
    if first.row is not None and second.row is not None and first.table is not None:
        row = np.concatenate([first.row, np.where(second.row >= 0, second.row + len(first.table), -1)])[keep]
    segment = joined("segment")
    return VoxelSample(
        name=f"{first.name}+{second.name}",
        coord=joined("coord")[keep],
        grid_coord=grid_coord[keep],
        feat=joined("feat")[keep],
        segment=None if segment is None else segment[keep],
        table=joined("table"),
        scale=joined("scale"),
        row=row,
        decoder=first.decoder,
        origin=None if first.origin is None or second.origin is None else first.origin + low,
    )


def _shift(first: VoxelSample, second: VoxelSample) -> NDArray[np.int32]:
    """[3] voxels by which the second sample moves to be mixed with the first."""
    low, high = first.grid_coord.min(axis=0), first.grid_coord.max(axis=0)
    other_low, other_high = second.grid_coord.min(axis=0), second.grid_coord.max(axis=0)
    if first.origin is None or second.origin is None:
        shift: NDArray[np.int32] = (low + high - other_low - other_high) // 2
        shift[2] = low[2] - other_low[2]
        return shift
    # Their coordinates are in one frame already, and stay: grid coordinates follow.
    between = second.origin - first.origin
    extent = int((np.maximum(high, other_high + between) - np.minimum(low, other_low + between)).max()) + 1
    if extent > MAX_INJECTED_EXTENT:
        raise DataError(
            f"samples {first.name!r} and {second.name!r} reach over {extent} voxels in one frame, and mixed ones may "
            f"over {MAX_INJECTED_EXTENT}: they are not in the frame of a sensor; set data.center, or data.mix_prob to 0"
        )
    return between.astype(np.int32)


def collate(samples: Sequence[VoxelSample]) -> PointBatch:
    """One batch of voxelized samples; feature rows stay as stored."""

    def joined(arrays: Sequence[NDArray[Any] | None]) -> torch.Tensor | None:
        present = [a for a in arrays if a is not None]
        return torch.from_numpy(np.concatenate(present)) if present else None

    def offsets(counts: Sequence[int]) -> torch.Tensor:
        return torch.tensor(np.cumsum(counts), dtype=torch.int64)

    coord = joined([s.coord for s in samples])
    grid_coord = joined([s.grid_coord for s in samples])
    feat = joined([s.feat for s in samples])
    assert coord is not None and grid_coord is not None and feat is not None
    ends = np.cumsum([0, *(len(s.coord) for s in samples)])
    features = None
    table = joined([s.table for s in samples])
    if table is not None:
        starts = np.cumsum([0, *(0 if s.table is None else len(s.table) for s in samples)])
        index = [
            None if s.row is None else np.where(s.row >= 0, s.row + start, -1)
            for s, start in zip(samples, starts[:-1], strict=True)
        ]
        joined_index = joined(index)
        assert joined_index is not None
        scale = joined([s.scale for s in samples])
        features = FeatureRows(table=table, scale=scale, index=joined_index, decoder=samples[0].decoder)
    inverse = joined(
        [None if s.inverse is None else s.inverse + start for s, start in zip(samples, ends[:-1], strict=True)]
    )
    return PointBatch(
        coord=coord,
        grid_coord=grid_coord,
        feat=feat,
        offset=offsets([len(s.coord) for s in samples]),
        segment=joined([s.segment for s in samples]),
        features=features,
        names=tuple(s.name for s in samples),
        inverse=inverse,
        full_segment=joined([s.full_segment for s in samples]),
        full_offset=None if inverse is None else offsets([len(s.inverse) for s in samples if s.inverse is not None]),
    )


class Batches(Protocol[Batch]):
    """Makes a batch from a key; runs in the workers."""

    def __getitem__(self, key: Any, /) -> Batch:
        """The batch of a key."""


class _Guarded(Generic[Batch]):
    """Hands errors of the data over as values: a `DataLoader` would wrap them in a traceback."""

    def __init__(self, source: Batches[Batch]) -> None:
        self.source = source

    def __getitem__(self, key: Any) -> Batch | CacheError:
        try:
            return self.source[key]
        except CacheError as error:
            return error


class BatchLoader(Generic[Batch]):
    """Batches for a sequence of keys, made ahead of time by worker processes.

    Args:
        source: makes a batch from a key.
        keys: `BatchPlan`s or sample indices, in the order in which batches come out.
        workers: number of processes; 0 makes batches in this one.
        pin_memory: put batches into page-locked memory (for a GPU).

    Raises:
        CacheError: while iterating, whatever a batch raised where it was made.
        StorageError: while iterating, a worker was killed.
    """

    def __init__(
        self,
        source: Batches[Batch],
        keys: Iterable[Any],
        *,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self._loader: DataLoader[Any] = DataLoader(
            _Guarded(source),  # type: ignore[arg-type]
            sampler=keys,
            batch_size=None,
            num_workers=workers,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=_init_worker,
            # Workers inherit the open cache; starting them costs nothing and they never touch a GPU.
            multiprocessing_context="fork" if workers else None,
            generator=torch.Generator(),  # its own: building an iterator must not advance the global one
        )

    def __iter__(self) -> Iterator[Batch]:
        try:
            for batch in self._started():
                if isinstance(batch, CacheError):
                    raise batch
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise StorageError(
                f"a data-loading process ended unexpectedly ({str(error).splitlines()[0]}); it was probably out of "
                "memory or shared memory: lower data.workers or data.batch_size, or enlarge /dev/shm"
            ) from error

    def _started(self) -> Iterator[Any]:
        """The loader's iterator, its workers started.

        torch then answers the death of a worker with an exception wherever the main thread happens to be: in the middle
        of a training step, or of a clean-up that swallows it. Without its handler it is found where a batch is waited
        for, within some seconds, and nowhere else.
        """
        if threading.current_thread() is not threading.main_thread():
            return iter(self._loader)  # torch sets no handler there
        before = signal.getsignal(signal.SIGCHLD)
        try:
            return iter(self._loader)
        finally:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def eval_loader(
    dataset: EvalSamples, share: Sequence[int], *, workers: int = 0, pin_memory: bool = False
) -> BatchLoader[PointBatch]:
    """The samples `share` of a dataset, one evaluation batch each; arguments as of `BatchLoader`."""
    return BatchLoader(EvalBatches(dataset), share, workers=min(workers, len(share)), pin_memory=pin_memory)


def _init_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches the whole process group; the main process decides when to stop, and stops its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
