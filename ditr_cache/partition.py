"""One partition end to end: read -> link -> embed -> fuse -> encode -> commit."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditr_cache.codecs import EncodedRows, concatenate_rows
from ditr_cache.datasets.base import DATASETS, Dataset, Defaults, OptionValue, Partition, dataset_class, open_dataset
from ditr_cache.errors import CacheError, DataError, StorageError, UnknownNameError, UsageError
from ditr_cache.geometry import morton_order, point_spacing
from ditr_cache.link import Links, concatenate, link_view, select_views
from ditr_cache.progress import PartitionSummary
from ditr_cache.sample import Points, Sample
from ditr_cache.sample_features import SampleFeatures
from ditr_cache.schema import (
    IGNORE_INDEX,
    LAYOUTS,
    NOT_FUSED,
    BrokenView,
    FeatureRecord,
    GeometryRecord,
    LinkSettings,
    SampleInfo,
    VFMSpec,
    ViewInfo,
)
from ditr_cache.store import LINK_ARRAYS, OPTIONAL_POINT_ARRAYS, CacheWriter
from ditr_cache.vfm import FrozenVFM, VFMRequest

log = logging.getLogger(__name__)

STORED_DTYPES = {
    "color": np.uint8,
    "normal": np.float16,
    "strength": np.float32,
    "segment": np.int16,
    "instance": np.int32,
}

UNLABELLED = {"segment": IGNORE_INDEX, "instance": -1}
"""What points of a sample without labels get, in a partition where others have some."""


@dataclass(frozen=True, kw_only=True)
class ExtractSettings:
    """All that a worker needs to extract a partition by itself. Plain values only: it is sent to workers.

    Args:
        dataset, root: which dataset, and where.
        cache: URL of the cache.
        vfm: the model that was asked for; without an image size or grid it gets the grid of the dataset's recipe.
        options: of the dataset.
        layout: one of `LAYOUTS`; None: `fused` where `fuse` is given, else the dataset's.
        fuse: how a point's views are reduced in the layout `fused`; None: `mean`.
        codec: how rows are stored.
        retry_incomplete: redo partitions that were committed without some of their views.
        batch_size: images per forward pass; None: 32 on a GPU, 1 on a CPU, where a larger batch only misses the caches.

    Raises:
        UnknownNameError: no such layout.
        UsageError: `fuse` for a layout that reduces nothing.
    """

    dataset: str
    root: str
    cache: str
    vfm: VFMRequest
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    layout: str | None = None
    fuse: str | None = None
    codec: str = "float16"
    retry_incomplete: bool = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        # A dataset that is not in the registry was opened by other means and has no recipe.
        defaults = dataset_class(self.dataset).defaults if self.dataset in DATASETS else Defaults()
        if self.layout is None:
            object.__setattr__(self, "layout", "fused" if self.fuse is not None else defaults.layout)
        if self.vfm.image_size is None and self.vfm.grid is None:
            object.__setattr__(self, "vfm", replace(self.vfm, grid=defaults.grid))
        if self.layout not in LAYOUTS:
            raise UnknownNameError.of("layout", str(self.layout), LAYOUTS)
        if self.layout == "views" and self.fuse is not None:
            raise UsageError(
                f"--fuse {self.fuse} reduces the views of a point, but --layout views keeps them all and leaves the "
                "choice to the reader; leave --fuse out, or use --layout fused"
            )

    def complete_spec(self, spec: VFMSpec) -> VFMSpec:
        """The model's spec with what these settings add to the identity of the features."""
        fuse = NOT_FUSED if self.layout == "views" else self.fuse or "mean"
        return replace(spec, layout=str(self.layout), fuse=fuse, codec=self.codec)


class PartitionWorker:
    """Extracts partitions one after the other. The VFM is loaded once, when the first features are needed.

    Args:
        settings: see there.
        vfm: a model that is loaded already; None loads it from the settings.
        expected_key: the VFM key of the run; a worker whose weights give another one refuses to work.
        dataset: opened already; None opens it.
    """

    def __init__(
        self,
        settings: ExtractSettings,
        vfm: FrozenVFM | None = None,
        expected_key: str | None = None,
        dataset: Dataset | None = None,
    ) -> None:
        self.settings = settings
        self.dataset = dataset or open_dataset(settings.dataset, settings.root, settings.options)
        self.writer = CacheWriter(settings.cache)
        self.vfm = vfm if vfm is not None else FrozenVFM(settings.vfm)
        self.spec = settings.complete_spec(self.vfm.spec)
        if expected_key is not None and self.spec.key != expected_key:
            raise UsageError(
                f"this worker's VFM is {self.spec.key!r}, expected {expected_key!r}: its weights or its version of "
                "ditr differ from the client's"
            )
        self.batch_size = settings.batch_size or (32 if self.vfm.device.type == "cuda" else 1)

    def __call__(self, partition: Partition) -> PartitionSummary:
        """Extract one partition. Never raises for bad input: that is recorded in the summary."""
        try:
            return self._extract(partition)
        except StorageError as error:
            return _failed(partition, error, fatal=True)
        except CacheError as error:
            return _failed(partition, error)
        except Exception as error:
            log.exception("partition %s", partition.id)
            return _failed(partition, error)

    def _extract(self, partition: Partition) -> PartitionSummary:
        geometry, features = committed(self.writer, self.spec, partition, self.settings.retry_incomplete)
        if geometry is not None and features is not None:
            return reused_summary(geometry, features)
        # Broken views of reused geometry were reported by the run that made it.
        reported: tuple[BrokenView, ...] = ()
        written = 0
        status = "reused"
        if geometry is None:
            geometry = make_geometry(self.dataset.read, partition, self.writer)
            reported, written, status = geometry.broken_views, sum(geometry.files.values()), "computed"
        features = self._make_features(geometry)
        return PartitionSummary(
            partition=partition.id,
            status="done",
            geometry=status,
            images=features.images,
            points=sum(s.points for s in geometry.samples),
            valid_points=sum(features.valid_points),
            bytes=written + sum(features.files.values()),
            failures=(*reported, *features.broken_views),
        )

    def _make_features(self, geometry: GeometryRecord) -> FeatureRecord:
        started = time.perf_counter()
        links = self.writer.read_arrays(geometry, LINK_ARRAYS)
        parts = [SampleFeatures.of(geometry, position, links, self.spec) for position in range(len(geometry.samples))]
        wanted = [(part, view) for part in parts for view in part.linked_views]
        load = self._image_loaders(geometry)
        tasks = [lambda p=part, v=view: self.vfm.prepare(load(p.info.id, v)()) for part, view in wanted]
        rows: list[EncodedRows] = []
        indices: list[NDArray[np.int32]] = []
        broken: list[BrokenView] = []
        images = base = 0
        batch: list[tuple[SampleFeatures, str, NDArray[np.uint8]]] = []
        open_parts = deque(parts)

        def finish(upto: SampleFeatures | None) -> None:
            """Fuse and encode, in order, the samples before `upto`: their tokens need not be kept any longer."""
            nonlocal base
            while open_parts and open_parts[0] is not upto:
                found, index = open_parts.popleft().encoded(self.vfm.device)
                rows.append(found)
                indices.append(np.where(index >= 0, index + base, -1).astype(np.int32))
                base += len(found.table)

        for position, result in _ahead(tasks, depth=2 * self.batch_size):
            part, view = wanted[position]
            if isinstance(result, CacheError):
                part.drop(view)
                broken.append(BrokenView(sample=part.info.id, view=view, error=str(result)))
            else:
                batch.append((part, view, result))
            if batch and (len(batch) == self.batch_size or position == len(wanted) - 1):
                tokens = self.vfm.embed([image for _, _, image in batch])
                for (of, name, _), grid in zip(batch, tokens, strict=True):
                    of.put(name, grid)
                images += len(batch)
                finish(batch[-1][0])
                batch.clear()
        finish(None)
        return self.writer.commit_features(
            self.spec,
            geometry,
            concatenate_rows(rows),
            np.concatenate(indices),
            images=images,
            broken_views=broken,
            seconds=time.perf_counter() - started,
        )

    def _image_loaders(self, geometry: GeometryRecord) -> Callable[[str, str], Callable[[], NDArray[np.uint8]]]:
        """Look up a view's image by sample and view; a sample is opened once, its points are not read."""
        opened: dict[str, dict[str, Callable[[], NDArray[np.uint8]]]] = {}
        errors: dict[str, DataError] = {}
        there = False
        for info in geometry.samples:
            if not info.views:
                continue
            try:
                opened[info.id] = {v.id: v.load_image for v in self.dataset.read(info.id).views}
            except DataError as error:  # one scan of many
                opened[info.id], errors[info.id] = {}, error
            there = there or any(view.id in opened[info.id] for view in info.views)
        if opened and not there:  # nothing to commit: a folder of images that was moved is not a damaged image
            raise next(iter(errors.values()), None) or DataError(
                f"partition {geometry.partition!r}: none of the views that its points were linked to is in the dataset "
                "any more; put the images back, then run again"
            )

        def find(sample: str, view: str) -> Callable[[], NDArray[np.uint8]]:
            if view not in opened[sample]:
                raise errors.get(sample) or DataError(
                    f"view {view!r} of sample {sample!r} was linked, but the dataset no longer has it"
                )
            return opened[sample][view]

        return find


def committed(
    writer: CacheWriter, spec: VFMSpec, partition: Partition, retry_incomplete: bool
) -> tuple[GeometryRecord | None, FeatureRecord | None]:
    """What of a partition is there already and stays: its geometry, and its features made from that geometry."""
    geometry, features = writer.geometry(partition.id), writer.features(spec, partition.id)
    if geometry is not None and not _same_samples(geometry, partition):
        geometry = None  # a download that has changed since: other scans fall into the partition
    if geometry is None or (features is not None and features.geometry_digest != geometry.digest):
        features = None
    if retry_incomplete and any(r is not None and r.broken_views for r in (geometry, features)):
        return None, None
    return geometry, features


def _same_samples(geometry: GeometryRecord, partition: Partition) -> bool:
    left_out = {b.sample for b in geometry.broken_views if not b.view}
    return {s.id for s in geometry.samples} | left_out == set(partition.sample_ids)


def reused_summary(geometry: GeometryRecord, features: FeatureRecord) -> PartitionSummary:
    """Summary of a partition that was there already."""
    return PartitionSummary(
        partition=geometry.partition,
        status="reused",
        geometry="reused",
        points=sum(s.points for s in geometry.samples),
        valid_points=sum(features.valid_points),
    )


def make_geometry(read: Callable[[str], Sample], partition: Partition, writer: CacheWriter) -> GeometryRecord:
    """Read, sort, link and commit the geometry of one partition.

    A sample that cannot be read is left out where the partition has others.

    Raises:
        DataError: no sample of the partition can be read.
    """
    started = time.perf_counter()
    infos: list[SampleInfo] = []
    clouds: list[dict[str, NDArray[Any]]] = []
    links: list[Links] = []
    broken: list[BrokenView] = []
    base = 0
    for sample_id in partition.sample_ids:
        try:
            info, cloud, sample_links, sample_broken = _link_sample(read(sample_id), writer.metadata.links)
        except DataError as error:
            if len(partition.sample_ids) == 1:
                raise
            broken.append(BrokenView(sample=sample_id, view="", error=str(error)))
            continue
        infos.append(info)
        clouds.append(cloud)
        links.extend(replace(x, point=x.point + np.uint32(base)) for x in sample_links)
        broken.extend(sample_broken)
        base += info.points
    if not infos:
        raise DataError(f"partition {partition.id!r}: none of its {len(partition.sample_ids)} samples can be read")
    every = concatenate(links)
    arrays = _concatenate_clouds(clouds)
    arrays["offset"] = np.cumsum([i.points for i in infos], dtype=np.int64)
    arrays |= {"link_point": every.point, "link_uv": every.uv, "link_depth": every.depth}
    return writer.commit_geometry(
        partition.id, infos, arrays, broken_views=broken, seconds=time.perf_counter() - started
    )


def _concatenate_clouds(clouds: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Point arrays of all samples, one after the other; scans without labels among others are unlabelled ones."""
    names = [name for name in clouds[0] if all(name in c for c in clouds)]
    names += [n for n in UNLABELLED if n not in names and any(n in c for c in clouds)]

    def part(cloud: Mapping[str, NDArray[Any]], name: str) -> NDArray[Any]:
        if name in cloud:
            return cloud[name]
        return np.full(len(cloud["coord"]), UNLABELLED[name], dtype=STORED_DTYPES[name])

    return {name: np.concatenate([part(c, name) for c in clouds]) for name in names}


def _link_sample(
    sample: Sample, settings: LinkSettings
) -> tuple[SampleInfo, dict[str, NDArray[Any]], list[Links], list[BrokenView]]:
    points: Points = sample.load_points()
    if not len(points.coord):
        raise DataError(f"sample {sample.id!r} has no points")
    order = morton_order(points.coord)
    cloud: dict[str, NDArray[Any]] = {
        "coord": points.coord[order].astype(np.float32),
        "source_index": order.astype(np.uint32),
    }
    for name in OPTIONAL_POINT_ARRAYS:
        array = getattr(points, name)
        if array is not None:
            cloud[name] = array[order].astype(STORED_DTYPES[name])
    spacing = point_spacing(cloud["coord"])
    broken = [BrokenView(sample=sample.id, view=view, error=error) for view, error in sample.broken_views]
    infos: list[ViewInfo] = []
    links: list[Links] = []
    seen = np.zeros(len(order), dtype=bool)
    for view in select_views(sample, settings):
        try:
            found = link_view(cloud["coord"], view, settings, spacing=spacing, order=order)
        except DataError as error:
            broken.append(BrokenView(sample=sample.id, view=view.id, error=str(error)))
            continue
        infos.append(ViewInfo(id=view.id, links=len(found.point)))
        links.append(found)
        seen[found.point] = True
    if not seen.any():
        usable = f"{len(infos)} usable views (of {len(sample.views)})"
        why = f"{usable}: its {len(order)} points are kept with coverage 0"
        if infos:
            why = (
                f"none of {len(order)} points is visible in any of its {usable}; are poses, depth units and depth "
                "range right? kept with coverage 0"
            )
        broken.append(BrokenView(sample=sample.id, view="", error=why))
    info = SampleInfo(
        id=sample.id, split=sample.split, points=len(order), linked_points=int(seen.sum()), views=tuple(infos)
    )
    return info, cloud, links, broken


def _ahead(tasks: Sequence[Callable[[], Any]], depth: int) -> Iterator[tuple[int, Any]]:
    """Run tasks in threads, at most `depth` ahead of the consumer; yields (position, result or CacheError) in order."""
    pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="decode")
    try:
        pending: deque[Future[Any]] = deque()
        for position in range(len(tasks)):
            while len(pending) < depth and position + len(pending) < len(tasks):
                pending.append(pool.submit(tasks[position + len(pending)]))
            try:
                result = pending.popleft().result()
            except CacheError as error:
                result = error
            yield position, result
    finally:
        pool.shutdown(cancel_futures=True)


def _failed(partition: Partition, error: Exception, *, fatal: bool = False) -> PartitionSummary:
    text = str(error) if isinstance(error, CacheError) else f"{type(error).__name__}: {error}"
    failures = tuple(BrokenView(sample=i, view="", error=text) for i in partition.sample_ids)
    return PartitionSummary(partition=partition.id, status="failed", failures=failures, fatal=fatal)
