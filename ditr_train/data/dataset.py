"""Samples of a cache as the network sees them: augmented, voxelized, with the feature rows that are left."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ditr_cache.cached import StoredSample, check_view
from ditr_cache.errors import DataError, MismatchError, MissingDataError, UnknownNameError, UsageError
from ditr_cache.schema import VFMSpec
from ditr_cache.store import CacheReader
from ditr_train.data.row_decoder import RowDecoder
from ditr_train.data.sample import PointSample
from ditr_train.data.spatial import SphereCrop, center
from ditr_train.data.transforms import Transform, apply, needs_instances
from ditr_train.data.voxelize import voxelize

CHANNELS = {"coord": 3, "color": 3, "normal": 3, "strength": 1, "height": 1}
"""What the network input can be made of -> number of channels."""

MAX_INJECTED_EXTENT = 2**16
"""Most voxels along an axis of a sample with VFM features: 16 bits of the keys by which they are pooled."""


@dataclass(frozen=True, kw_only=True, eq=False)
class VoxelSample:
    """One voxelized sample of V voxels, still numpy.

    Args:
        name: id of the sample.
        coord: [V, 3] float32 metres.
        grid_coord: [V, 3] int32, unique, >= 0.
        feat: [V, C_in] float32 network input.
        segment: [V] int64, -1 where ignored; None where the cache has no labels.
        table: [T, W] as stored, only rows that a voxel uses; None where no VFM is read.
        scale: [T] float32 factors of the rows; None for codecs without.
        row: [V] int64 row of `table` of each voxel, -1 where it has no feature.
        decoder: of the rows.
        inverse: [M] int64, evaluation only: each point's voxel.
        full_segment: [M] int64, evaluation only: the labels of all points.
        source_index: [M] int64, evaluation only: each point's position in the dataset's own order.
        origin: [3] int64, training only: the voxel of grid coordinate 0, counted from that of coordinate 0; None where
            samples are centred, each in a frame of its own.
    """

    name: str
    coord: NDArray[np.float32]
    grid_coord: NDArray[np.int32]
    feat: NDArray[np.float32]
    segment: NDArray[np.int64] | None
    table: NDArray[np.generic] | None = None
    scale: NDArray[np.float32] | None = None
    row: NDArray[np.int64] | None = None
    decoder: RowDecoder = field(default_factory=RowDecoder)
    inverse: NDArray[np.int64] | None = None
    full_segment: NDArray[np.int64] | None = None
    source_index: NDArray[np.int64] | None = None
    origin: NDArray[np.int64] | None = None


class CachedDataset:
    """The samples of one split of a cache. Picklable; holds no open files and no sample.

    Everything that can be known before the first sample is read is checked here.

    Args:
        cache: an open cache.
        split: one of its splits.
        grid_size: edge of a voxel in metres.
        feat: names of the input channels, in order: `coord`, `color`, `normal`, `strength`, `height`.
        vfm: name or key of the VFM whose rows are read; None reads none.
        transforms: augmentation of training samples, before they are voxelized.
        centred: the middle of the x and y extent and the lowest point move to 0 first, x and y once more after the
            crop; False: coordinates stay in the dataset's frame, for lidar the sensor's.
        at_test: what evaluated samples get in place of `transforms`; draws nothing.
        crop_rate: training samples are cropped to this share of their voxels around a random one; None: not.
        point_max: training samples are then cropped to at most this many voxels around a random one; None: never.
        class_names: the classes that the caller expects; None takes the cache's.
        labelled: read labels, and refuse a split or cache without (segmentation needs them, distillation and
            prediction do not).
        fraction: use this share of the samples only, at least one. Smaller shares are subsets of larger ones.
        fraction_seed: which samples.
        view: which view gives a point its feature where the cache holds all of them (layout `views`): `random`, drawn
            anew for each training sample (evaluation takes the last), `last` or `nearest`; None: `random`, and nothing
            where the cache holds one feature per point.

    Raises:
        UnknownNameError: no such split, or one without samples; no such VFM, channel or choice of view.
        UsageError: an empty channel list.
        DataError: the cache has no classes.
        MissingDataError: a channel, the labels or features are missing for some samples of the split.
        MismatchError: the cache's classes are not `class_names`, features belong to another geometry, or a choice of
            view is asked for where the cache holds one feature per point.
    """

    def __init__(
        self,
        cache: CacheReader,
        split: str,
        *,
        grid_size: float,
        feat: Sequence[str],
        vfm: str | None = None,
        transforms: Sequence[Transform] = (),
        centred: bool = True,
        at_test: Sequence[Transform] = (),
        crop_rate: float | None = None,
        point_max: int | None = None,
        class_names: Sequence[str] | None = None,
        labelled: bool = True,
        fraction: float = 1.0,
        fraction_seed: int = 0,
        view: str | None = None,
    ) -> None:
        self.cache = cache
        self.split = split
        self.grid_size = grid_size
        self.feat = tuple(feat)
        self.transforms = tuple(transforms)
        self.centred, self.at_test = centred, tuple(at_test)
        by_rate = () if crop_rate is None else (SphereCrop(rate=crop_rate),)
        self.crops = by_rate if point_max is None else (*by_rate, SphereCrop(point_max=point_max))
        self._needs_instances = needs_instances(self.transforms)
        self.labelled = labelled
        self.view = view
        self.ids: list[str] = some_of(cache.split_ids(split), fraction, fraction_seed)
        """Ids of the samples, sorted."""
        self.vfm: VFMSpec | None = None if vfm is None else cache.resolve_vfm(vfm)
        self.decoder = RowDecoder() if self.vfm is None else RowDecoder.of(cache.codec(self.vfm))
        self.class_names, self.class_groups = cache.metadata.class_names, cache.metadata.class_groups
        self._check_classes(class_names)
        self._check_arrays()
        self._check_features()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def in_channels(self) -> int:
        """Width of the network input."""
        return sum(CHANNELS[name] for name in self.feat)

    def train_sample(self, index: int, rng: np.random.Generator) -> VoxelSample:
        """Sample `index`, augmented by draws from `rng`, one random point per voxel, cropped.

        Raises:
            CorruptCacheError: the cache is damaged.
            DataError: nothing is left to train on.
        """
        stored, points = self.read(index, rng)
        points = apply(self.transforms, self._centred(points), rng)
        voxels = voxelize(points.coord, self.grid_size, rng)
        points, grid_coord, origin = points.take(voxels.pick), voxels.grid_coord, voxels.origin
        for crop in self.crops:
            if (keep := crop.keep(points.coord, rng)) is not None:
                points, grid_coord = points.take(keep), grid_coord[keep]
                low = grid_coord.min(axis=0)
                grid_coord, origin = grid_coord - low, origin + low
        return replace(self._sample(stored, points, grid_coord), origin=None if self.centred else origin)

    def eval_sample(self, index: int) -> VoxelSample:
        """Sample `index` as it is, with `inverse` to all of its points. Raises as `train_sample`."""
        stored, points = self.read(index)
        points = self.placed(points)
        voxels = voxelize(points.coord, self.grid_size)
        return replace(
            self._sample(stored, points.take(voxels.pick), voxels.grid_coord),
            inverse=voxels.inverse,
            full_segment=points.segment,
            source_index=stored.source_index,
        )

    def read(self, index: int, rng: np.random.Generator | None = None) -> tuple[StoredSample, PointSample]:
        """Sample `index` as cached, and its points as `feat` needs them; `rng` is that of a training sample, None
        evaluates. Raises as `train_sample`.
        """
        view = None
        if self.vfm is not None and self.vfm.layout == "views":
            view = self.view or "random"
            if view == "random":
                # A stream of its own: augmentation is the same whatever view is chosen, and in either layout.
                view, rng = ("last", None) if rng is None else (view, rng.spawn(1)[0])
        vfm = None if self.vfm is None else self.vfm.key
        stored = self.cache.read_stored(self.ids[index], vfm, view=view, rng=rng)
        if len(stored.coord) == 0:
            raise DataError(f"sample {stored.id!r} of cache {str(self.cache.paths.root)!r}: no points")
        segment = None
        if self.labelled and stored.segment is not None:
            segment = stored.segment.astype(np.int64)
            segment[segment == self.cache.metadata.ignore_index] = -1
        return stored, PointSample(
            name=stored.id,
            coord=stored.coord,
            color=None if stored.color is None or "color" not in self.feat else stored.color.astype(np.float32),
            normal=stored.normal if "normal" in self.feat else None,
            strength=stored.strength if "strength" in self.feat else None,
            segment=segment,
            instance=stored.instance.astype(np.int64)
            if self._needs_instances and stored.instance is not None
            else None,
            row=None if stored.features is None else stored.features.index.astype(np.int64),
        )

    def placed(self, points: PointSample) -> PointSample:
        """Points of a sample to evaluate, as `read` gives them, where the network wants them."""
        return apply(self.at_test, self._centred(points), np.random.default_rng(0))

    def seen(self, points: PointSample) -> PointSample:
        """Points as a network input is made of them, after every augmentation, voxelization and crop."""
        return center(points, apply_z=False) if self.centred else points

    def _centred(self, points: PointSample) -> PointSample:
        return center(points, apply_z=True) if self.centred else points

    def _sample(self, stored: StoredSample, points: PointSample, grid_coord: NDArray[np.int32]) -> VoxelSample:
        points = self.seen(points)
        sample = VoxelSample(
            name=points.name,
            coord=points.coord,
            grid_coord=grid_coord,
            feat=points.channels(self.feat),
            segment=points.segment,
        )
        if stored.features is None or points.row is None:
            return sample
        if (extent := int(grid_coord.max()) + 1) > MAX_INJECTED_EXTENT:
            raise DataError(
                f"sample {points.name!r}: {extent} voxels along an axis, and VFM features are pooled over at most "
                f"{MAX_INJECTED_EXTENT}; raise data.grid_size, or crop with data.point_max"
            )
        used, row = used_rows(points.row, stored.features.rows)
        rows = stored.features.take(used)  # only now: what a crop leaves out is not read
        return replace(sample, table=rows.table, scale=rows.scale, row=row, decoder=self.decoder)

    def _check_classes(self, expected: Sequence[str] | None) -> None:
        have, root = list(self.class_names), str(self.cache.paths.root)
        if not have and self.labelled:
            raise DataError(
                f"cache {root!r} of dataset {self.cache.metadata.dataset!r} has no classes, so nothing can be trained "
                "on it; extract a dataset with labels"
            )
        if expected is None or list(expected) == have:
            return
        if len(expected) != len(have):
            part = f"expected {len(expected)} classes, the cache has {len(have)}"
        else:
            i = next(i for i, (a, b) in enumerate(zip(expected, have, strict=True)) if a != b)
            part = f"class {i} is expected to be {expected[i]!r}, the cache says {have[i]!r}"
        raise MismatchError(
            f"cache {root!r}: the classes differ: {part}; use the cache that belongs to the recipe, or, to train on "
            "this one's own classes, --set classes=null"
        )

    def _check_arrays(self) -> None:
        if not self.feat:
            raise UsageError(f"data.feat: expected at least one of {', '.join(CHANNELS)}, got none")
        for name in self.feat:
            if name not in CHANNELS:
                raise UnknownNameError.of("input channel (data.feat)", name, CHANNELS)
        wanted = [name for name in self.feat if name not in ("coord", "height")] + ["segment"] * self.labelled
        wanted += ["instance"] * self._needs_instances
        chosen, root = set(self.ids), str(self.cache.paths.root)
        lacking: dict[str, list[str]] = {}
        for record in self.cache.geometry.values():
            for name in wanted:
                if name not in record.arrays:
                    lacking.setdefault(name, []).extend(s.id for s in record.samples if s.id in chosen)
        for name, ids in lacking.items():
            if ids:
                remedy = {
                    "segment": "choose a split with labels",
                    "instance": "remove the instance transforms from data.augment",
                }.get(name, "remove it from data.feat")
                raise MissingDataError(
                    f"cache {root!r}, split {self.split!r}: {len(ids)} of {len(self)} samples have no {name!r} "
                    f"({_some(ids)}); {remedy}, or extract a dataset that has it"
                )

    def _check_features(self) -> None:
        if self.vfm is None:
            return
        check_view(self.vfm, self.view)
        present = set(self.cache.samples_with(self.vfm.key))
        missing = [i for i in self.ids if i not in present]
        if missing:
            raise MissingDataError(
                f"cache {str(self.cache.paths.root)!r}, split {self.split!r}: {len(missing)} of {len(self)} samples "
                f"have no features of {self.vfm.key!r} ({_some(missing)}); run `ditr-cache extract --vfm "
                f"{self.vfm.name} --split {self.split} ...` on this cache to make them"
            )


def some_of(ids: Sequence[str], fraction: float, seed: int) -> list[str]:
    """A share of the samples, in their order: rounded, at least one, and part of every larger share of that seed."""
    drawn = sorted(ids, key=lambda sample: hashlib.sha256(f"{seed}:{sample}".encode()).digest())
    chosen = set(drawn[: max(1, round(fraction * len(drawn)))])
    return [sample for sample in ids if sample in chosen]


def used_rows(row: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of a table of `count` rows that points use, so that the others need not travel.

    Args:
        row: [N] row of each point, -1 where none.

    Returns:
        The used rows, ascending [T], and [N] the position of each point's row among them (-1 stays).
    """
    used = np.zeros(count, dtype=bool)
    used[row[row >= 0]] = True
    # The last entry is what position -1 reads.
    position = np.append(np.cumsum(used) - 1, -1)
    return np.flatnonzero(used), position[row]


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")
