"""The whole run: plan what is asked for, run every partition, sum up."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from ditr_cache.claims import POLL_SECONDS, Claims, features_claim, geometry_claim
from ditr_cache.codec_state import find_fitted
from ditr_cache.codecs import needs_fit
from ditr_cache.datasets.base import Dataset, Partition, changed_options, open_dataset, partitions
from ditr_cache.errors import MissingDataError, StorageError, UnknownNameError, UnwritableError, UsageError
from ditr_cache.executors import run_on_dask
from ditr_cache.files import Paths, location, read_document, remove_leftovers
from ditr_cache.fitting import fitted_spec
from ditr_cache.in_process import run_here
from ditr_cache.partition import ExtractSettings, PartitionWorker, committed, reused_summary
from ditr_cache.progress import PartitionSummary, ProgressDisplay, RunTotals
from ditr_cache.schema import OCCLUSION, CacheMetadata, FeatureRecord, GeometryRecord, VFMSpec
from ditr_cache.store import CacheWriter
from ditr_cache.timeline import ChromeTrace, describe_stages
from ditr_cache.vfm import FrozenVFM, resolve_device

log = logging.getLogger(__name__)

LOOKING = 16
"""Partitions that are looked for at the same time."""


@dataclass(frozen=True, kw_only=True)
class ExtractRequest:
    """One call of `ditr-cache extract`.

    Args:
        settings: what every worker needs.
        links: link settings that were named; None takes the cache's, or the defaults where it is new.
        splits: None takes all.
        limit: at most this many partitions; None takes all.
        workers: 0 runs in this process; None takes one process per GPU, one where there is none.
        scheduler: address of a running dask scheduler.
        fit_splits: whose samples a codec is fitted to; None: `train`, or all splits where there is none of that name.
        profile: file that gets a Chrome trace of what the workers did when; None writes none.
    """

    settings: ExtractSettings
    links: dict[str, int | float | str] = field(default_factory=dict)
    splits: tuple[str, ...] | None = None
    limit: int | None = None
    workers: int | None = None
    scheduler: str | None = None
    profile: Path | None = None
    fit_splits: tuple[str, ...] | None = None


def resolve(request: ExtractRequest) -> tuple[Dataset, list[Partition], CacheMetadata]:
    """Dataset, partitions and metadata of a request; reads only `cache.json`, writes nothing.

    Raises:
        CacheError: whatever makes the request unusable.
    """
    options = request.settings.options
    dataset = open_dataset(request.settings.dataset, request.settings.root, options)
    wanted = partitions(dataset, request.splits)[: request.limit]
    existing = Paths(location(request.settings.cache)).metadata
    try:
        links = replace(read_document(existing, CacheMetadata).links, **request.links)  # type: ignore[arg-type]
    except MissingDataError:
        links = replace(dataset.defaults.links, **request.links)  # type: ignore[arg-type]
    except StorageError as error:  # found before any work
        raise UnwritableError(str(error)) from error
    if links.occlusion not in OCCLUSION:
        raise UnknownNameError.of("occlusion test", links.occlusion, OCCLUSION)
    if links.depth_max is not None and links.depth_max <= links.depth_min:
        raise UsageError(
            f"no point is both nearer than --depth-max {links.depth_max:g} and farther than --depth-min "
            f"{links.depth_min:g}; one that was not given is the cache's or the dataset's"
        )
    metadata = CacheMetadata(
        dataset=dataset.name,
        class_names=tuple(c.name for c in dataset.classes),
        class_colors=tuple(c.color for c in dataset.classes),
        class_groups=tuple(c.group for c in dataset.classes) if any(c.group for c in dataset.classes) else (),
        dataset_options=changed_options(dataset.name, options),
        links=links,
    )
    return dataset, wanted, metadata


def extract(request: ExtractRequest, *, quiet: bool = False) -> RunTotals:
    """Extract everything that is asked for and missing. Stopped at any moment, the same call goes on from there.

    Raises:
        CacheError: wrong use or unusable input, found before work starts.
        StorageError: the file for the profile cannot be written.
    """
    request = replace(request, settings=replace(request.settings, profile=request.profile is not None))
    dataset, wanted, metadata = resolve(request)
    if request.scheduler is None:  # the workers of a scheduler elsewhere have devices of their own
        resolve_device(request.settings.vfm.device)
    # Workers load their own model: for them only its identity is needed here, and no memory of a device.
    here = request.workers == 0 and request.scheduler is None
    vfm = FrozenVFM(request.settings.vfm if here else replace(request.settings.vfm, device="cpu"))
    writer = CacheWriter.create(request.settings.cache, metadata)
    spec = _complete_spec(request, writer, dataset, vfm)
    leftovers = remove_leftovers(writer.paths.root)
    if leftovers:
        log.info("removed %d temporary files of an interrupted run", leftovers)
    with ProgressDisplay(len(wanted), quiet=quiet) as display:
        missing: list[Partition] = []
        for partition, geometry, features in _looked_for(writer, spec, wanted, request.settings.retry_incomplete):
            if geometry is not None and features is not None:
                display(reused_summary(geometry, features))
            else:
                missing.append(partition)
        if not missing:
            return display.totals
        with contextlib.ExitStack() as stack:
            trace = stack.enter_context(ChromeTrace(request.profile)) if request.profile is not None else None
            for summary in stack.enter_context(
                contextlib.closing(_rounds(request, dataset, vfm, writer, spec, missing))
            ):
                display(summary)
                if trace is not None:
                    trace.add(summary.process, summary.partition, summary.spans)
                if summary.fatal:  # every further partition would fail alike; the next run continues here
                    break
    totals = display.totals
    log.info("%s", describe_stages(totals.stages, totals.seconds, len(totals.workers)))
    return totals


def _complete_spec(request: ExtractRequest, writer: CacheWriter, dataset: Dataset, vfm: FrozenVFM) -> VFMSpec:
    """The identity of the features, their codec fitted where it has to be."""
    spec = request.settings.complete_spec(vfm.spec)
    if not needs_fit(spec.codec):
        return spec
    found = find_fitted(writer.paths, spec)
    if found is not None:
        return found
    if request.scheduler is None and vfm.device != resolve_device(request.settings.vfm.device):
        vfm = FrozenVFM(request.settings.vfm)  # for a while, before the workers load theirs
    return fitted_spec(writer, dataset, vfm, spec, splits=request.fit_splits)


def _looked_for(
    writer: CacheWriter, spec: VFMSpec, wanted: Sequence[Partition], retry_incomplete: bool
) -> Iterator[tuple[Partition, GeometryRecord | None, FeatureRecord | None]]:
    """What of each partition is there, see `committed`. Looked for side by side: a storage may be far away."""
    with ThreadPoolExecutor(max_workers=LOOKING, thread_name_prefix="look") as pool:
        for first in range(0, len(wanted), 4 * LOOKING):
            some = wanted[first : first + 4 * LOOKING]
            found = pool.map(lambda partition: committed(writer, spec, partition, retry_incomplete), some)
            for partition, (geometry, features) in zip(some, found, strict=True):
                yield partition, geometry, features


def _rounds(
    request: ExtractRequest,
    dataset: Dataset,
    vfm: FrozenVFM,
    writer: CacheWriter,
    spec: VFMSpec,
    wanted: Sequence[Partition],
) -> Generator[PartitionSummary, None, None]:
    """Run partitions; those that another run is making are waited for, and made where it gives them up."""
    claims = Claims(writer.paths, request.settings.run)
    free = list(wanted)
    busy: dict[str, Partition] = {}
    while free or busy:
        with contextlib.closing(_run(request, dataset, vfm, spec.key, free) if free else _none()) as summaries:
            by_id = {partition.id: partition for partition in free}
            for summary in summaries:
                if summary.status == "busy":
                    busy[summary.partition] = by_id[summary.partition]
                else:
                    yield summary
        if busy:
            log.warning("waiting for another run on this cache, which makes %d of the partitions", len(busy))
        free = []
        while busy and not free:
            time.sleep(POLL_SECONDS)
            for partition in list(busy.values()):
                geometry, features = committed(writer, spec, partition, request.settings.retry_incomplete)
                if geometry is not None and features is not None:
                    yield reused_summary(geometry, features)
                elif all(map(claims.is_free, (features_claim(spec.key, partition.id), geometry_claim(partition.id)))):
                    free.append(partition)
                else:
                    continue
                del busy[partition.id]


def _none() -> Generator[PartitionSummary, None, None]:
    yield from ()


def _run(
    request: ExtractRequest, dataset: Dataset, vfm: FrozenVFM, key: str, wanted: Sequence[Partition]
) -> Generator[PartitionSummary, None, None]:
    if request.workers == 0 and request.scheduler is None:
        return run_here(PartitionWorker(request.settings, vfm, dataset=dataset), wanted)
    workers = request.workers or _processes(request)
    return run_on_dask(request.settings, key, wanted, workers=workers, scheduler=request.scheduler)


def _processes(request: ExtractRequest) -> int:
    """Local processes where none are asked for: one per GPU, one where there is none."""
    if request.scheduler is not None or resolve_device(request.settings.vfm.device).type != "cuda":
        return 1
    import torch

    return torch.cuda.device_count()
