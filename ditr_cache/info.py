"""What a cache holds, from its records alone: nothing is decoded."""

from __future__ import annotations

from typing import Any

from ditr_cache.errors import MismatchError
from ditr_cache.schema import FORMAT_VERSION, FeatureRecord, VFMSpec
from ditr_cache.store import CacheReader


def cache_info(cache: CacheReader) -> dict[str, Any]:
    """The object that `info --json` prints.

    `coverage` of a VFM is the fraction of the points of its samples that have a feature; `incomplete` counts
    partitions that were committed without some of their views, `mismatched` those whose geometry was made again since.
    `views_per_point` is the mean number of views that see a linked point.
    """
    infos = [s for record in cache.geometry.values() for s in record.samples]
    points = sum(s.points for s in infos)
    linked_points = sum(s.linked_points for s in infos)
    links = sum(v.links for s in infos for v in s.views)
    return {
        "format_version": FORMAT_VERSION,
        "dataset": cache.metadata.dataset,
        "samples": len(infos),
        "points": points,
        "coverage": round(linked_points / points, 6) if points else 0.0,
        "views": sum(len(s.views) for s in infos),
        "links": links,
        "views_per_point": round(links / linked_points, 3) if linked_points else 0.0,
        "geometry_bytes": sum(sum(r.files.values()) for r in cache.geometry.values()),
        "incomplete": sum(bool(r.broken_views) for r in cache.geometry.values()),
        "vfms": [_vfm_info(cache, spec) for spec in cache.vfms.values()],
    }


def _vfm_info(cache: CacheReader, spec: VFMSpec) -> dict[str, Any]:
    records: dict[str, FeatureRecord] = {}
    mismatched = 0
    for partition in cache.geometry:
        try:
            record = cache.feature_record(spec, partition)
        except MismatchError:
            mismatched += 1
            continue
        if record is not None:
            records[partition] = record
    points = sum(s.points for p in records for s in cache.geometry[p].samples)
    return {
        "key": spec.key,
        "name": spec.name,
        "dim": spec.dim,
        "layout": spec.layout,
        "fuse": spec.fuse,
        "codec": spec.codec,
        "grid": list(spec.grid),
        "image_size": list(spec.image_size),
        "samples": sum(len(cache.geometry[p].samples) for p in records),
        "rows": sum(r.rows for r in records.values()),
        "bytes": sum(sum(r.files.values()) for r in records.values()),
        "coverage": round(sum(sum(r.valid_points) for r in records.values()) / points, 6) if points else 0.0,
        "incomplete": sum(bool(r.broken_views) for r in records.values()),
        "mismatched": mismatched,
    }
