"""The whole run: plan what is asked for, run every partition, sum up."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace

from ditr_cache.datasets.base import Dataset, Partition, changed_options, open_dataset, partitions
from ditr_cache.errors import MissingDataError, UnknownNameError, UsageError
from ditr_cache.executors import run_here, run_on_dask
from ditr_cache.files import Paths, local_path, read_document, remove_leftovers
from ditr_cache.partition import ExtractSettings, PartitionWorker, committed, reused_summary
from ditr_cache.progress import PartitionSummary, ProgressDisplay, RunTotals
from ditr_cache.schema import OCCLUSION, CacheMetadata
from ditr_cache.store import CacheWriter
from ditr_cache.vfm import FrozenVFM, resolve_device

log = logging.getLogger(__name__)


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
    """

    settings: ExtractSettings
    links: dict[str, int | float | str] = field(default_factory=dict)
    splits: tuple[str, ...] | None = None
    limit: int | None = None
    workers: int | None = None
    scheduler: str | None = None


def resolve(request: ExtractRequest) -> tuple[Dataset, list[Partition], CacheMetadata]:
    """Dataset, partitions and metadata of a request; reads only `cache.json`, writes nothing.

    Raises:
        CacheError: whatever makes the request unusable.
    """
    options = request.settings.options
    dataset = open_dataset(request.settings.dataset, request.settings.root, options)
    wanted = partitions(dataset, request.splits)[: request.limit]
    existing = Paths(local_path(request.settings.cache)).metadata
    try:
        links = replace(read_document(existing, CacheMetadata).links, **request.links)  # type: ignore[arg-type]
    except MissingDataError:
        links = replace(dataset.defaults.links, **request.links)  # type: ignore[arg-type]
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
    """
    dataset, wanted, metadata = resolve(request)
    if request.scheduler is None:  # the workers of a scheduler elsewhere have devices of their own
        resolve_device(request.settings.vfm.device)
    # Workers load their own model: for them only its identity is needed here, and no memory of a device.
    here = request.workers == 0 and request.scheduler is None
    vfm = FrozenVFM(request.settings.vfm if here else replace(request.settings.vfm, device="cpu"))
    spec = request.settings.complete_spec(vfm.spec)
    writer = CacheWriter.create(request.settings.cache, metadata)
    leftovers = remove_leftovers(writer.paths.root)
    if leftovers:
        log.info("removed %d temporary files of an interrupted run", leftovers)
    with ProgressDisplay(len(wanted), quiet=quiet) as display:
        missing: list[Partition] = []
        for partition in wanted:
            geometry, features = committed(writer, spec, partition, request.settings.retry_incomplete)
            if geometry is not None and features is not None:
                display(reused_summary(geometry, features))
            else:
                missing.append(partition)
        if not missing:
            return display.totals
        with contextlib.closing(_run(request, dataset, vfm, spec.key, missing)) as summaries:
            for summary in summaries:
                display(summary)
                if summary.fatal:  # every further partition would fail alike; the next run continues here
                    break
    return display.totals


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
