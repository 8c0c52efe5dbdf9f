"""What a run will do, and its bytes and seconds, before anything is done (`extract --dry-run`)."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ditr_cache.codec_state import as_stored
from ditr_cache.codecs import needs_fit
from ditr_cache.datasets.base import Dataset, Partition
from ditr_cache.errors import DataError
from ditr_cache.extract import ExtractRequest, resolve
from ditr_cache.files import Paths, location
from ditr_cache.fitting import fitted_spec
from ditr_cache.geometry_partition import make_geometry
from ditr_cache.lift import TokenTable, fuse
from ditr_cache.link import evenly_spread, select_views
from ditr_cache.partition import PartitionWorker, committed
from ditr_cache.progress import human_bytes, human_count
from ditr_cache.schema import LINK_ARRAYS, CacheMetadata, GeometryRecord, VFMSpec
from ditr_cache.store import CacheWriter
from ditr_cache.vfm import FrozenVFM

PROBED_SAMPLES = 8
"""Samples, evenly spread, whose views are counted."""

PROBED_SCANS = 8
"""Scans of the probed partition that are linked."""

PROBED_IMAGES = 8
"""Images whose way from file to store is timed."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will do.

    Args:
        partitions: those that are missing, and will be made.
        reused: those that are there already.
        geometry: how many of the missing ones need their geometry made, too.
        images, points: that will be embedded, and covered by the missing partitions.
        bytes: that will be written.
        seconds: on one worker like this machine.
    """

    partitions: int
    reused: int
    geometry: int
    images: int
    points: int
    bytes: int
    seconds: float

    def to_dict(self) -> dict[str, float]:
        """For `--json`."""
        return {**asdict(self), "seconds": round(self.seconds, 1)}

    def line(self) -> str:
        """For people."""
        return (
            f"{self.partitions} partitions to make ({self.reused} there already, geometry of {self.geometry} missing): "
            f"{human_count(self.images)} images, {human_count(self.points)} points, {human_bytes(self.bytes)}, "
            f"about {self.seconds / 60:.1f} minutes on one worker like this machine"
        )


def estimate(request: ExtractRequest) -> Estimate:
    """Estimate a run from a short probe: one sample is linked and its size on disk taken, a few images are embedded.

    The cache is not touched; the probe's own files go to a temporary folder that is removed.

    Raises:
        CacheError: whatever would make the run itself unusable.
    """
    dataset, wanted, metadata = resolve(request)
    vfm = FrozenVFM(request.settings.vfm)
    spec = request.settings.complete_spec(vfm.spec)
    missing, without_geometry = _missing(request, metadata, wanted, spec)
    if not missing:
        return Estimate(partitions=0, reused=len(wanted), geometry=0, images=0, points=0, bytes=0, seconds=0.0)
    images = round(_mean_views(dataset, metadata, missing) * _samples(missing))
    with tempfile.TemporaryDirectory(prefix="ditr-plan-") as folder:
        probe = _probe(request, dataset, metadata, missing, vfm, Path(folder))
    seconds = probe.geometry_seconds * _samples(without_geometry) + probe.seconds_per_image * images
    return Estimate(
        partitions=len(missing),
        reused=len(wanted) - len(missing),
        geometry=len(without_geometry),
        images=images,
        points=round(probe.points * _samples(missing)),
        bytes=round(probe.geometry_bytes * _samples(without_geometry) + probe.feature_bytes * _samples(missing)),
        seconds=seconds,
    )


@dataclass(frozen=True, kw_only=True)
class _Probe:
    """Figures of one sample, on average over those probed."""

    points: float
    geometry_bytes: float
    geometry_seconds: float
    feature_bytes: float
    seconds_per_image: float


def _missing(
    request: ExtractRequest, metadata: CacheMetadata, wanted: list[Partition], spec: VFMSpec
) -> tuple[list[Partition], list[Partition]]:
    """Partitions without features, and those among them without geometry."""
    if not Paths(location(request.settings.cache)).metadata.exists():
        return wanted, wanted
    writer = CacheWriter(request.settings.cache)
    writer.check(metadata)
    spec = as_stored(writer.paths, spec)
    missing, without_geometry = [], []
    for partition in wanted:
        geometry, features = committed(writer, spec, partition, request.settings.retry_incomplete)
        if geometry is None:
            without_geometry.append(partition)
        if features is None:
            missing.append(partition)
    return missing, without_geometry


def _samples(partitions: list[Partition]) -> int:
    return sum(len(partition.sample_ids) for partition in partitions)


def _mean_views(dataset: Dataset, metadata: CacheMetadata, missing: list[Partition]) -> float:
    """Mean number of views of a sample."""
    ids = [sample_id for partition in missing for sample_id in partition.sample_ids]
    counts = []
    for sample_id in evenly_spread(ids, PROBED_SAMPLES):
        try:
            counts.append(len(select_views(dataset.read(sample_id), metadata.links)))
        except DataError:
            continue  # the run itself will record it; the estimate rests on the others
    return float(np.mean(counts)) if counts else 0.0


def _probe(
    request: ExtractRequest,
    dataset: Dataset,
    metadata: CacheMetadata,
    missing: list[Partition],
    vfm: FrozenVFM,
    folder: Path,
) -> _Probe:
    """Link the first readable partition; embed a few of its views in a second cache and time that.

    Of a partition of many scans the first few stand for all.
    """
    full = CacheWriter.create(folder / "full", metadata)
    for whole in missing[:PROBED_SAMPLES]:
        partition = Partition(whole.id, whole.sample_ids[:PROBED_SCANS])
        try:
            geometry = make_geometry(dataset.read, partition, full)
            break
        except DataError as error:
            failure = error
    else:
        raise failure
    # Batches are of one size: fewer images than one would be timed as if it were full of them.
    images = max(PROBED_IMAGES, request.settings.batch_size_on(vfm.device))
    views = max(1, images // len(partition.sample_ids))
    few = replace(metadata, links=replace(metadata.links, max_views=views))
    writer = CacheWriter.create(folder / "few", few)
    # Of few views most points repeat the row of a neighbour, which compresses as the rows of all views will not:
    # fused by `last`, as in the layout `views`, every row is stored once, and tells what a row of its own takes.
    fuse_once = None if request.settings.layout == "views" else "last"
    settings = replace(request.settings, cache=str(folder / "few"), fuse=fuse_once)
    if needs_fit(settings.codec):
        spec = settings.complete_spec(vfm.spec)
        fitted_spec(writer, dataset, vfm, spec, splits=request.fit_splits, images=PROBED_IMAGES)
    worker = PartitionWorker(settings, vfm, dataset=dataset)
    vfm.embed([np.zeros((*vfm.spec.image_size, 3), dtype=np.uint8)])  # the first pass is never a typical one
    worker(partition)
    features = worker.writer.features(worker.spec, partition.id)
    points = sum(s.points for s in geometry.samples)
    feature_bytes = seconds_per_image = 0.0
    if features is not None and features.images:
        rows, entries = _count_rows(full, geometry, worker.spec, request.settings.fuse or "mean")
        row_bytes = sum(n for name, n in features.files.items() if name.startswith(("table/c/", "scale/c/")))
        index_bytes = sum(n for name, n in features.files.items() if name.startswith("index/c/"))
        other_bytes = sum(features.files.values()) - row_bytes - index_bytes
        bytes_per_entry = index_bytes / max(1, *features.arrays["index"].shape)
        feature_bytes = row_bytes / max(1, features.rows) * rows + bytes_per_entry * entries + other_bytes
        seconds_per_image = features.seconds / features.images
    samples = len(geometry.samples)
    return _Probe(
        points=points / samples,
        geometry_bytes=sum(geometry.files.values()) / samples,
        geometry_seconds=geometry.seconds / samples,
        feature_bytes=feature_bytes / samples,
        seconds_per_image=seconds_per_image,
    )


def _count_rows(writer: CacheWriter, geometry: GeometryRecord, spec: VFMSpec, how: str) -> tuple[int, int]:
    """Different rows, and entries of the index, that the features of a partition will have: known from its links.

    Points that see the same tokens have equal rows, and equal rows of neighbours compress to next to nothing.
    """
    links = writer.read_arrays(geometry, LINK_ARRAYS)
    per_view = [v.links for s in geometry.samples for v in s.views]
    table = TokenTable(links["link_uv"], per_view, spec.grid, dim=1, device=torch.device("cpu"))
    if spec.layout == "views":
        return len(table.rows), len(table.link_row)
    table.rows.uniform_(generator=torch.Generator().manual_seed(0))  # tokens that differ, as true ones do
    rows, index = fuse(table, links["link_point"], links["link_depth"], sum(s.points for s in geometry.samples), how)
    return len(np.unique(np.concatenate(list(rows)))), len(index)
