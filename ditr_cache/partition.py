"""One partition end to end: read -> link -> embed -> fuse -> encode -> commit."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray

from ditr_cache.batcher import Batcher, Stopped, Turn
from ditr_cache.claims import Claims, TakenOverError, features_claim, geometry_claim, new_run
from ditr_cache.codec_state import as_stored, read_codec
from ditr_cache.codecs import EncodedRows, check_codec, concatenate_rows
from ditr_cache.datasets.base import DATASETS, Dataset, Defaults, OptionValue, Partition, dataset_class, open_dataset
from ditr_cache.errors import CacheError, DataError, MismatchError, StorageError, UnknownNameError, UsageError
from ditr_cache.fingerprint import check_source
from ditr_cache.geometry_partition import make_geometry
from ditr_cache.progress import PartitionSummary
from ditr_cache.sample import Sample
from ditr_cache.sample_features import SampleFeatures
from ditr_cache.schema import (
    LAYOUTS,
    LINK_ARRAYS,
    NOT_FUSED,
    BrokenView,
    FeatureRecord,
    GeometryRecord,
    VFMSpec,
)
from ditr_cache.store import CacheWriter
from ditr_cache.timeline import Timeline, this_process
from ditr_cache.vfm import FrozenVFM, VFMRequest

log = logging.getLogger(__name__)

MAX_DECODERS = 16
"""Threads that decode and resize images: as many keep up with a small VFM on a large GPU."""


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
        codec: how rows are stored, see `codecs`.
        retry_incomplete: redo partitions that were committed without some of their views.
        batch_size: images per forward pass; None: 32 on a GPU, 1 on a CPU, where a larger batch only misses the caches.
        profile: whether summaries bring along every span of their timelines.
        run: name of the run, under which its workers claim partitions.

    Raises:
        UnknownNameError: no such layout or codec.
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
    profile: bool = False
    run: str = field(default_factory=new_run)

    def __post_init__(self) -> None:
        # A dataset that is not in the registry was opened by other means and has no recipe.
        defaults = dataset_class(self.dataset).defaults if self.dataset in DATASETS else Defaults()
        if self.layout is None:
            object.__setattr__(self, "layout", "fused" if self.fuse is not None else defaults.layout)
        if self.vfm.image_size is None and self.vfm.grid is None:
            object.__setattr__(self, "vfm", replace(self.vfm, grid=defaults.grid))
        check_codec(self.codec)
        if self.layout not in LAYOUTS:
            raise UnknownNameError.of("layout", str(self.layout), LAYOUTS)
        if self.layout == "views" and self.fuse is not None:
            raise UsageError(
                f"--fuse {self.fuse} reduces the views of a point, but --layout views keeps them all and leaves the "
                "choice to the reader; leave --fuse out, or use --layout fused"
            )

    def batch_size_on(self, device: torch.device) -> int:
        """Images per forward pass on that device."""
        return self.batch_size or (32 if device.type == "cuda" else 1)

    def complete_spec(self, spec: VFMSpec) -> VFMSpec:
        """The model's spec with what these settings add to the identity of the features."""
        fuse = NOT_FUSED if self.layout == "views" else self.fuse or "mean"
        return replace(spec, layout=str(self.layout), fuse=fuse, codec=self.codec)


class PartitionWorker:
    """Extracts partitions; several threads may call it at the same time, for one partition each.

    Then one partition is read and linked, or lifted, encoded and written, while another is embedded. All go through one
    `Batcher`, which fills its batches across them.

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
        self.spec = as_stored(self.writer.paths, settings.complete_spec(self.vfm.spec))
        self.codec = read_codec(self.writer.paths, self.spec)
        if expected_key is not None and self.spec.key != expected_key:
            raise UsageError(
                f"this worker's VFM is {self.spec.key!r}, expected {expected_key!r}: its weights or its version of "
                "ditr differ from the client's"
            )
        self.batch_size = settings.batch_size_on(self.vfm.device)
        self._batcher = Batcher(self.vfm, self.batch_size, ahead=1 if self.vfm.device.type == "cuda" else 0)
        # As many threads as this process may use cores; a file system may be slow even where cores are few.
        decoders = min(MAX_DECODERS, max(4, torch.get_num_threads()))
        self._decode_ahead = max(decoders, self.batch_size)
        self._decoders = ThreadPoolExecutor(max_workers=decoders, thread_name_prefix="decode")
        # One partition at a time is read and linked: what datasets keep of the sample at work is kept once.
        self._reading = Lock()
        self._claims = Claims(self.writer.paths, settings.run)

    def __call__(self, partition: Partition) -> PartitionSummary:
        """Extract one partition. Never raises for bad input: that is recorded in the summary.

        Raises:
            Stopped: the worker was stopped before the partition was committed.
        """
        timeline = Timeline(keep_spans=self.settings.profile)
        try:
            with self._claims.hold(features_claim(self.spec.key, partition.id)) as mine:
                summary = self._extract(partition, timeline) if mine else _busy(partition)
        except Stopped:
            raise
        except TakenOverError:
            summary = _busy(partition)
        except StorageError as error:
            summary = _failed(partition, error, fatal=True)
        except CacheError as error:
            summary = _failed(partition, error)
        except Exception as error:
            log.exception("partition %s", partition.id)
            summary = _failed(partition, error)
        return replace(summary, process=this_process(), stages=timeline.seconds, spans=timeline.spans)

    def stop(self) -> None:
        """End partitions that are at work, at the next view or batch, with `Stopped`; later ones at once."""
        self._batcher.stop()

    def _extract(self, partition: Partition, timeline: Timeline) -> PartitionSummary:
        # Broken views of reused geometry were reported by the run that made it.
        reported: tuple[BrokenView, ...] = ()
        written = 0
        status = "reused"
        with self._reading:
            self._batcher.check()
            geometry, features = committed(self.writer, self.spec, partition, self.settings.retry_incomplete)
            if geometry is not None and features is not None:
                return reused_summary(geometry, features)
            read = cache(self.dataset.read)  # linked and opened for its images, a sample is read once
            if geometry is None:
                with self._claims.hold(geometry_claim(partition.id)) as mine:
                    if not mine:  # a run with another VFM makes it
                        return _busy(partition)
                    geometry, _ = committed(self.writer, self.spec, partition, self.settings.retry_incomplete)
                    if geometry is None:
                        geometry = make_geometry(read, partition, self.writer, timeline, self._batcher.check)
                        reported, written, status = geometry.broken_views, sum(geometry.files.values()), "computed"
            with timeline.stage("read"):
                load = _image_loaders(geometry, read)
        with self.vfm.stream_of_thread(), self._batcher.turn() as turn:
            features = self._make_features(geometry, load, timeline, turn)
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

    def _make_features(
        self, geometry: GeometryRecord, load: ImageLoader, timeline: Timeline, turn: Turn
    ) -> FeatureRecord:
        started = time.perf_counter()
        with timeline.stage("read"):
            links = self.writer.read_arrays(geometry, LINK_ARRAYS)
        parts = [
            SampleFeatures.of(geometry, i, links, self.spec, self.codec, timeline) for i in range(len(geometry.samples))
        ]
        rows: list[EncodedRows] = []
        indices: list[NDArray[np.int32]] = []
        broken: list[BrokenView] = []
        images = base = 0
        open_parts = deque(parts)

        def finish(upto: SampleFeatures | None) -> None:
            """Fuse and encode, in order, the samples before `upto`: their tokens need not be kept any longer."""
            nonlocal base
            while open_parts and open_parts[0] is not upto:
                found, index = open_parts.popleft().encoded(self.vfm.device)
                rows.append(found)
                indices.append(np.where(index >= 0, index + base, -1).astype(np.int32))
                base += len(found.table)

        prepared = self._prepared(parts, load, broken, timeline)
        with closing(prepared), closing(self._batcher.embed(prepared, timeline, turn)) as embedded:
            for (part, view), tokens in embedded:
                finish(part)
                part.put(view, tokens)
                images += 1
        finish(None)
        with timeline.stage("encode"):
            table = concatenate_rows(rows)
        self._batcher.check()
        self._claims.check(features_claim(self.spec.key, geometry.partition))
        with timeline.stage("write"):
            return self.writer.commit_features(
                self.spec,
                geometry,
                table,
                np.concatenate(indices),
                images=images,
                broken_views=broken,
                seconds=time.perf_counter() - started,
            )

    def _prepared(
        self, parts: Sequence[SampleFeatures], load: ImageLoader, broken: list[BrokenView], timeline: Timeline
    ) -> Generator[tuple[tuple[SampleFeatures, str], NDArray[np.uint8]], None, None]:
        """The prepared images of all linked views, in order; those that cannot be read are dropped and recorded."""

        def prepare(part: SampleFeatures, view: str) -> NDArray[np.uint8]:
            with timeline.stage("decode"):
                image = load(part.info.id, view)()
            with timeline.stage("resize"):
                return self.vfm.prepare(image)

        wanted = iter([(part, view) for part in parts for view in part.linked_views])
        pending: deque[tuple[SampleFeatures, str, Future[NDArray[np.uint8]]]] = deque()
        try:
            while True:
                while len(pending) < self._decode_ahead and (task := next(wanted, None)) is not None:
                    pending.append((*task, self._decoders.submit(prepare, *task)))
                if not pending:
                    return
                part, view, image = pending.popleft()
                try:
                    yield (part, view), image.result()
                except CacheError as error:
                    part.drop(view)
                    broken.append(BrokenView(sample=part.info.id, view=view, error=str(error)))
        finally:
            for _, _, image in pending:
                image.cancel()


ImageLoader = Callable[[str, str], Callable[[], NDArray[np.uint8]]]
"""From a sample and a view to what reads its image."""


def _image_loaders(geometry: GeometryRecord, read: Callable[[str], Sample]) -> ImageLoader:
    """Look up a view's image by sample and view; a sample is opened once, its points are not read.

    Raises:
        MismatchError: the dataset's calibration is not the one that the points were linked with.
        DataError: none of the linked views is there any more.
    """
    opened: dict[str, dict[str, Callable[[], NDArray[np.uint8]]]] = {}
    errors: dict[str, DataError] = {}
    there = False
    for position, info in enumerate(geometry.samples):
        if not info.views:
            continue
        try:
            sample = read(info.id)
            check_source(geometry, position, sample)
            opened[info.id] = {v.id: v.load_image for v in sample.views}
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
    """What of a partition is there already and stays: its geometry, and its features made from that geometry.

    Raises:
        MismatchError: geometry that another version of the projection made.
    """
    geometry, features = writer.geometry(partition.id), writer.features(spec, partition.id)
    if geometry is not None and not _same_samples(geometry, partition):
        geometry = None  # a download that has changed since: other scans fall into the partition
    if features is not None and (
        geometry is None or features.geometry_digest != geometry.digest or features.vfm_digest != spec.digest
    ):
        features = None
    if retry_incomplete and any(r is not None and r.broken_views for r in (geometry, features)):
        return None, None
    if geometry is not None and geometry.projection_version != spec.projection_version:
        raise MismatchError(
            f"cache {str(writer.paths.root)!r}: the links of partition {partition.id!r} were made by projection "
            f"version {geometry.projection_version}, expected {spec.projection_version} of this ditr; use another --out"
        )
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


def _busy(partition: Partition) -> PartitionSummary:
    return PartitionSummary(partition=partition.id, status="busy")


def _failed(partition: Partition, error: Exception, *, fatal: bool = False) -> PartitionSummary:
    text = str(error) if isinstance(error, CacheError) else f"{type(error).__name__}: {error}"
    failures = tuple(BrokenView(sample=i, view="", error=text) for i in partition.sample_ids)
    return PartitionSummary(partition=partition.id, status="failed", failures=failures, fatal=fatal)
