"""A network applied to a cloud of any size, tile by tile, and to a cached sample."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ditr_cache.errors import StorageError
from ditr_cache.pointcloud.cloud import PointCloud
from ditr_cache.pointcloud.normals import estimate_normals
from ditr_cache.store import open_cache
from ditr_train.data.chromatic import ChromaticNormalize
from ditr_train.data.dataset import VoxelSample
from ditr_train.data.loader import collate
from ditr_train.data.sample import PointSample
from ditr_train.data.spatial import center
from ditr_train.data.transforms import Transform, apply
from ditr_train.data.voxelize import voxelize
from ditr_train.distributed import autocast
from ditr_train.pointcloud.output import OutputFiles, output_bytes
from ditr_train.pointcloud.placed import PlacedCloud
from ditr_train.pointcloud.spill import Spill, record_dtype
from ditr_train.pointcloud.survey import CHUNK, Survey, survey
from ditr_train.pointcloud.tiles import TilePlan, Tiling, plan_tiles
from ditr_train.recipe import Recipe
from ditr_train.trained import TrainedRun

Phase = Callable[[str, int], Callable[[int], None]]
"""Told the name of a phase and its number of points; gives what is told of those that are done."""


@dataclass(frozen=True, kw_only=True)
class Normals:
    """How normals are estimated, see `estimate_normals`.

    Args:
        viewpoint: x, y and z in the coordinates of the file that normals point towards; None: they point upwards.
    """

    viewpoint: tuple[float, float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was predicted.

    Args:
        points: of the input.
        per_class: number of points of each class; the others have no finite coordinates.
        tiles: how many.
        files: paths of what was written.
    """

    points: int
    per_class: tuple[int, ...]
    tiles: int
    files: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Frame:
    """Where tiles lie, so that a voxel is the same one whichever tile sees it.

    Args:
        origin: [T, 3] float64 metres, of each tile; whole voxels from each other.
        cells: [T, 3] int64, the same in voxels from the cloud's middle, or from its origin where it is not centred.
        low: [3] int64, the lowest voxel of the cloud, from there.
    """

    origin: NDArray[np.float64]
    cells: NDArray[np.int64]
    low: NDArray[np.int64]

    @classmethod
    def of(cls, found: Survey, plan: TilePlan, grid_size: float, *, centred: bool) -> _Frame:
        """The frame of a cloud. That of one tile is `center`, as in training: the middle of x and y, the lowest z.

        All tiles of a cloud that is not centred are in its own frame.
        """
        low, high = found.low, found.high
        middle = np.array([*(low[:2] + high[:2]) / 2, low[2]], low.dtype).astype(np.float64) if centred else np.zeros(3)
        cells = np.zeros((len(plan.tiles), 3), np.int64)
        if centred and len(plan.tiles) > 1:
            centers = np.array([tile.center for tile in plan.tiles])
            cells[:, :2] = np.rint((centers - middle[:2]) / grid_size)
        local_low = (low.astype(np.float64) - middle).astype(np.float32)
        return cls(origin=middle + cells * grid_size, cells=cells, low=_cell(local_low, grid_size))


def predict_cloud(
    run: TrainedRun,
    cloud: PointCloud,
    tiling: Tiling,
    *,
    folder: Path,
    stem: str,
    tmp: Path,
    softmax: bool,
    normals: Normals | None,
    phase: Phase,
) -> Outcome:
    """Predict every point of a file, in memory that does not depend on their number.

    Args:
        run: a network that reads points only, and that moves none of them at test time where it centres them.
        cloud: has the channels that the network reads; normals may be missing where they are estimated.
        tiling: how it is cut.
        folder, stem: of the files that are written.
        tmp: folder of temporary files.
        softmax: also write the softmax.
        normals: how missing normals are estimated; None: none are missing.
        phase: is told of the progress.

    Raises:
        DataError: the file's content cannot be used.
        StorageError: not enough space, or files that cannot be written.
    """
    classes = len(run.info.class_names)
    data = run.recipe.data
    seen = cloud if data.center else PlacedCloud(cloud, moving_at_test(run.recipe), tiling.grid_size)
    found = survey(seen, tiling.cell_size, tiling.grid_size, phase("reading", cloud.count))
    plan = plan_tiles(found.cells, tiling)
    frame = _Frame.of(found, plan, tiling.grid_size, centred=data.center)
    estimate = "normal" in data.feat and "normal" not in cloud.channels
    channels = [name for name in data.feat if name in cloud.channels]
    spilled = sum(tile.points for tile in plan.tiles) * record_dtype(channels).itemsize
    results = output_bytes(cloud.count, classes, cloud.coord_dtype, softmax=softmax)
    _require_space(cloud, ((folder, results), (tmp, spilled)))
    per_class = np.zeros(classes, np.int64)
    with OutputFiles(folder, stem, cloud.count, classes, softmax=softmax) as files:
        with Spill(plan, channels, frame.origin, tmp) as spill:
            spill.fill(seen, found, phase("sorting into tiles", cloud.count))
            advance = phase("predicting", found.finite)
            for t, tile in enumerate(plan.tiles):
                per_class += _predict_tile(
                    run, spill, t, frame, files, tiling, normals if estimate else None, softmax=softmax
                )
                advance(tile.core)
        files.write_ply(
            (chunk.coord for chunk in cloud.chunks(CHUNK)),
            cloud.coord_dtype,
            run.info.class_names,
            run.info.class_colors,
        )
        written = files.commit()
    return Outcome(points=cloud.count, per_class=tuple(per_class.tolist()), tiles=len(plan.tiles), files=tuple(written))


def predict_cached(run: TrainedRun, sample_id: str, *, folder: Path, stem: str, softmax: bool) -> Outcome:
    """Predict every point of a cached sample at once, exactly as evaluation does, in the dataset's own order.

    A point of the dataset that the cache does not hold gets label -1 and coordinates that are not a number.

    Raises:
        UnknownNameError: no such sample.
        CacheError: as `TrainedRun.dataset`.
        StorageError: files that cannot be written.
    """
    cache = open_cache(run.recipe.require_cache())
    dataset = run.dataset(cache.sample_info(sample_id).split, labelled=False)
    sample = dataset.eval_sample(dataset.ids.index(sample_id))
    assert sample.source_index is not None and sample.inverse is not None
    source, classes = sample.source_index, len(run.info.class_names)
    label, probability = _classify(run, sample)
    label = label[sample.inverse]
    coord = np.full((int(source.max()) + 1, 3), np.nan, np.float32)
    coord[source] = cache.read_stored(sample_id, None).coord
    with OutputFiles(folder, stem, len(coord), classes, softmax=softmax) as files:
        files.put(source, label, probability[sample.inverse] if softmax else None)
        files.write_ply([coord], coord.dtype, run.info.class_names, run.info.class_colors)
        written = files.commit()
    per_class = np.bincount(label, minlength=classes)
    return Outcome(points=len(coord), per_class=tuple(per_class.tolist()), tiles=1, files=tuple(written))


def _predict_tile(
    run: TrainedRun,
    spill: Spill,
    tile: int,
    frame: _Frame,
    files: OutputFiles,
    tiling: Tiling,
    normals: Normals | None,
    *,
    softmax: bool,
) -> NDArray[np.int64]:
    """Predict the core of a tile; returns the number of points of each class."""
    points, low = _voxel_points(spill, tile, tiling.grid_size)
    grid_coord = voxelize(points.coord, tiling.grid_size).grid_coord
    # Coarse sites join the same voxels in every tile, and in a cloud that is not cut.
    grid_coord += ((_cell(low, tiling.grid_size) + frame.cells[tile] - frame.low) % tiling.stride).astype(np.int32)
    if normals is not None:
        viewpoint = None if normals.viewpoint is None else np.array(normals.viewpoint) - frame.origin[tile]
        points = replace(points, normal=estimate_normals(points.coord, viewpoint))
    label, probability = _classify(run, _network_sample(points, low, grid_coord, run.recipe))
    per_class = np.zeros(probability.shape[1], np.int64)
    for some in spill.read(tile):
        core = some.position >= 0
        # Every voxel of these points has its point in `points`, which are sorted by voxel.
        coord = np.concatenate([points.coord, some.points.coord[core]])
        voxel = voxelize(coord, tiling.grid_size).inverse[len(points) :]
        files.put(some.position[core], label[voxel], probability[voxel] if softmax else None)
        per_class += np.bincount(label[voxel], minlength=len(per_class))
    return per_class


def _voxel_points(spill: Spill, tile: int, grid_size: float) -> tuple[PointSample, NDArray[np.float32]]:
    """The first point of every voxel of a tile, sorted by voxel, and the lowest coordinates of all its points."""
    kept: PointSample | None = None
    low = np.full(3, np.inf, np.float32)
    for some in spill.read(tile):
        low = np.minimum(low, some.points.coord.min(axis=0))
        points = some.points if kept is None else _joined(kept, some.points)
        kept = points.take(voxelize(points.coord, grid_size).pick)
    assert kept is not None
    return kept, low


def _joined(first: PointSample, second: PointSample) -> PointSample:
    pairs = {f.name: (getattr(first, f.name), getattr(second, f.name)) for f in fields(first)}
    joined = {name: np.concatenate(pair) for name, pair in pairs.items() if isinstance(pair[0], np.ndarray)}
    return replace(first, **joined)  # type: ignore[arg-type]


def moving_at_test(recipe: Recipe) -> tuple[Transform, ...]:
    """The transforms of `data.at_test` that move points; the others change colours."""
    return tuple(t for t in recipe.data.reading()["at_test"] if not isinstance(t, ChromaticNormalize))


def _network_sample(
    points: PointSample, low: NDArray[np.float32], grid_coord: NDArray[np.int32], recipe: Recipe
) -> VoxelSample:
    """Voxels of a tile as the network sees them in evaluation; `low` [3] is the lowest corner of all its points."""
    if recipe.data.center:
        points = replace(points, coord=points.coord - np.array([0, 0, low[2]], np.float32))
        points = center(points, apply_z=False)
    colors = [t for t in recipe.data.reading()["at_test"] if isinstance(t, ChromaticNormalize)]
    points = apply(colors, points, np.random.default_rng(0))
    return VoxelSample(
        name=points.name,
        coord=points.coord,
        grid_coord=grid_coord,
        feat=points.channels(recipe.data.feat),
        segment=None,
    )


def _classify(run: TrainedRun, sample: VoxelSample) -> tuple[NDArray[np.int64], NDArray[np.float16]]:
    """Class [V] and softmax [V, K] of each voxel."""
    batch = collate([sample]).to(run.device)
    with torch.inference_mode(), autocast(run.device, run.recipe.training.amp):
        scores = run.model(batch)
        return scores.argmax(dim=1).cpu().numpy(), torch.softmax(scores, dim=1).half().cpu().numpy()


def _cell(coord: NDArray[np.float32], grid_size: float) -> NDArray[np.int64]:
    """The voxel of coordinates, as `voxelize` has it."""
    return np.floor(coord.astype(np.float64) / grid_size).astype(np.int64)


def _require_space(cloud: PointCloud, wanted: Sequence[tuple[Path, int]]) -> None:
    """Raise `StorageError` where a file system has less space than what is to be written to folders on it."""
    need: dict[int, tuple[Path, int]] = {}
    for folder, size in wanted:
        device = folder.stat().st_dev
        first, total = need.get(device, (folder, 0))
        need[device] = first, total + size
    for folder, size in need.values():
        free = shutil.disk_usage(folder).free
        if size > free:
            raise StorageError(
                f"{cloud.path}: predicting it needs {size / 1e9:.2f} GB in {str(folder)!r}, {free / 1e9:.2f} GB are "
                "free; free space, or choose other folders with -o and --tmp"
            )
