"""The geometry of one partition: read -> sort -> link -> commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditr_cache.blocks import PointBlocks
from ditr_cache.datasets.base import Partition
from ditr_cache.errors import DataError
from ditr_cache.fingerprint import calibration_of
from ditr_cache.geometry import morton_order, point_spacing
from ditr_cache.link import Links, concatenate, link_view, select_views
from ditr_cache.sample import Points, Sample
from ditr_cache.schema import IGNORE_INDEX, BrokenView, GeometryRecord, LinkSettings, SampleInfo, ViewInfo
from ditr_cache.store import OPTIONAL_POINT_ARRAYS, CacheWriter
from ditr_cache.timeline import Timeline

STORED_DTYPES = {
    "color": np.uint8,
    "normal": np.float16,
    "strength": np.float32,
    "segment": np.int16,
    "instance": np.int32,
}

UNLABELLED = {"segment": IGNORE_INDEX, "instance": -1}
"""What points of a sample without labels get, in a partition where others have some."""


def make_geometry(
    read: Callable[[str], Sample],
    partition: Partition,
    writer: CacheWriter,
    timeline: Timeline | None = None,
    check: Callable[[], None] = lambda: None,
) -> GeometryRecord:
    """Read, sort, link and commit the geometry of one partition.

    A sample that cannot be read is left out where the partition has others.

    Args:
        read: opens a sample by its id.
        partition: which samples.
        writer: of the cache.
        timeline: gets the time that each stage takes.
        check: called before every sample and view; whatever it raises ends the work.

    Raises:
        DataError: no sample of the partition can be read.
    """
    timeline = timeline or Timeline()
    started = time.perf_counter()
    infos: list[SampleInfo] = []
    calibration: list[str] = []
    clouds: list[dict[str, NDArray[Any]]] = []
    links: list[Links] = []
    broken: list[BrokenView] = []
    base = 0
    for sample_id in partition.sample_ids:
        try:
            check()
            with timeline.stage("read"):
                sample = read(sample_id)
            info, cloud, sample_links, sample_broken = _link_sample(sample, writer.metadata.links, timeline, check)
        except DataError as error:
            if len(partition.sample_ids) == 1:
                raise
            broken.append(BrokenView(sample=sample_id, view="", error=str(error)))
            continue
        infos.append(info)
        calibration.append(calibration_of(sample, info))
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
    with timeline.stage("write"):
        return writer.commit_geometry(
            partition.id,
            infos,
            arrays,
            broken_views=broken,
            seconds=time.perf_counter() - started,
            calibration=calibration,
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
    sample: Sample, settings: LinkSettings, timeline: Timeline, check: Callable[[], None]
) -> tuple[SampleInfo, dict[str, NDArray[Any]], list[Links], list[BrokenView]]:
    with timeline.stage("read"):
        points: Points = sample.load_points()
    if not len(points.coord):
        raise DataError(f"sample {sample.id!r} has no points")
    with timeline.stage("link"):
        order, cloud = sorted_cloud(points)
        spacing = point_spacing(cloud["coord"])
    blocks = PointBlocks.of(cloud["coord"])
    broken = [BrokenView(sample=sample.id, view=view, error=error) for view, error in sample.broken_views]
    infos: list[ViewInfo] = []
    links: list[Links] = []
    seen = np.zeros(len(order), dtype=bool)
    for view in select_views(sample, settings):
        check()
        try:
            with timeline.stage("link"):
                found = link_view(blocks, view, settings, spacing=spacing, order=order)
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


def sorted_cloud(points: Points) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
    """Morton order of the points, and their arrays in that order, as stored."""
    order = morton_order(points.coord)
    cloud: dict[str, NDArray[Any]] = {
        "coord": points.coord[order].astype(np.float32),
        "source_index": order.astype(np.uint32),
    }
    for name in OPTIONAL_POINT_ARRAYS:
        array = getattr(points, name)
        if array is not None:
            cloud[name] = array[order].astype(STORED_DTYPES[name])
    return order, cloud
