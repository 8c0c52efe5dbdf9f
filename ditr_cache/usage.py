"""What a cache takes on disk, array by array, and what lies there that no reader sees."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditr_cache.errors import CorruptCacheError, MissingDataError
from ditr_cache.files import RESERVED_NAMES, Location, Paths, file_name, location, read_document, read_documents, tree
from ditr_cache.progress import human_bytes, human_count
from ditr_cache.schema import CacheMetadata, FeatureRecord, GeometryRecord, VFMSpec


@dataclass
class StoreUsage:
    """What the geometry, or one VFM's features, take.

    Args:
        folder: `geometry`, or `features/<key>`.
        spec: the VFM; None for the geometry.
        partitions, points: committed, and of their samples.
        rows: that are stored; 0 for the geometry.
        files, bytes: that lie there, of committed partitions and their documents.
        arrays: bytes of each array by its name, as committed.
        documents: bytes of the rest: records, the VFM's description, the codec, what zarr says of groups.
        missing: files that were committed and are gone or of another size.
    """

    folder: str
    spec: VFMSpec | None = None
    partitions: int = 0
    points: int = 0
    rows: int = 0
    files: int = 0
    bytes: int = 0
    arrays: Counter[str] = field(default_factory=Counter)
    documents: int = 0
    missing: int = 0

    @property
    def bytes_per_point(self) -> float | None:
        """Of the samples that are committed here."""
        return self.bytes / self.points if self.points else None

    @property
    def bytes_per_row(self) -> float | None:
        """Of the stored rows; None for the geometry."""
        return self.bytes / self.rows if self.rows else None

    def to_dict(self) -> dict[str, Any]:
        """Part of the object that `du --json` prints."""
        of_vfm: dict[str, Any] = {}
        if self.spec is not None:
            of_vfm = {
                "key": self.spec.key,
                "name": self.spec.name,
                "codec": self.spec.codec,
                "layout": self.spec.layout,
            }
            of_vfm |= {"rows": self.rows, "bytes_per_row": _rounded(self.bytes_per_row)}
        return of_vfm | {
            "partitions": self.partitions,
            "points": self.points,
            "files": self.files,
            "bytes": self.bytes,
            "bytes_per_point": _rounded(self.bytes_per_point),
            "arrays": dict(sorted(self.arrays.items())),
            "documents": self.documents,
            "missing": self.missing,
        }

    def lines(self) -> list[str]:
        """For people."""
        about = [f"{self.files} files", f"{self.partitions} partitions", f"{human_count(self.points)} points"]
        if self.bytes_per_point is not None:
            about.append(f"{self.bytes_per_point:.1f} bytes per point")
        if self.spec is not None:
            about.insert(2, f"{human_count(self.rows)} rows")
        if self.bytes_per_row is not None:
            about.append(f"{self.bytes_per_row:.1f} per row")
        parts = [*self.arrays.most_common(), ("documents", self.documents)]
        return [
            _line(self.bytes, f"{self.folder}: {', '.join(about)}"),
            *(_line(size, f"  {name}") for name, size in parts),
            *([f"{self.missing:>10} files missing or cut; run `ditr-cache verify --repair`"] if self.missing else []),
        ]


@dataclass
class CacheUsage:
    """What a cache takes.

    Args:
        cache: its path or URL.
        files, bytes: of everything that lies there.
        geometry, vfms: what readers see.
        temporary: files and bytes of temporary files: of runs that go on, and of killed ones.
        orphans: path below the cache -> bytes of what else no reader sees: arrays without a valid record, features of
            a geometry that is not there or was made again, files that are none of a cache.
    """

    cache: str
    files: int
    bytes: int
    geometry: StoreUsage
    vfms: list[StoreUsage]
    temporary: tuple[int, int]
    orphans: Counter[str]

    def to_dict(self) -> dict[str, Any]:
        """The object that `du --json` prints."""
        return {
            "cache": self.cache,
            "files": self.files,
            "bytes": self.bytes,
            "geometry": self.geometry.to_dict(),
            "vfms": [vfm.to_dict() for vfm in self.vfms],
            "temporary": {"files": self.temporary[0], "bytes": self.temporary[1]},
            "orphans": {"bytes": self.orphans.total(), "entries": sorted(self.orphans)},
        }

    def lines(self) -> list[str]:
        """For people."""
        lines = [line for store in (self.geometry, *self.vfms) for line in store.lines()]
        if self.temporary[0]:
            lines.append(
                _line(self.temporary[1], f"in {self.temporary[0]} temporary files, of runs that go on or were killed")
            )
        lines += [_line(size, f"{entry}: seen by no reader") for entry, size in sorted(self.orphans.items())]
        return [*lines, _line(self.bytes, f"in all, {self.files} files")]


def disk_usage(url: str | os.PathLike[str]) -> CacheUsage:
    """What a cache takes on disk. Reads its records and lists its files; decodes nothing.

    Raises:
        MissingDataError: no cache there.
        CorruptCacheError: `cache.json` is damaged.
        FormatVersionError: written by a newer version.
    """
    paths = Paths(location(url))
    try:
        read_document(paths.metadata, CacheMetadata)
    except MissingDataError as error:
        raise MissingDataError(f"{str(paths.root)!r} is not a cache: it has no cache.json") from error
    files = tree(paths.root)
    unseen = dict(files)
    unseen.pop(paths.metadata.name, None)
    geometry: dict[str, GeometryRecord] = {}
    usage = StoreUsage("geometry")
    for path, record in read_documents(_listed_records(paths.geometry, "geometry", files), GeometryRecord):
        if not isinstance(record, CorruptCacheError):
            geometry[record.partition] = record
            usage.points += sum(s.points for s in record.samples)
            _count(usage, path.name, record, files, unseen)
    stores = []
    for path, spec in read_documents(_listed_specs(paths, files), VFMSpec):
        if not isinstance(spec, CorruptCacheError) and file_name(spec.key) == path.parent.name:
            stores.append(_vfm_usage(path.parent, spec, geometry, files, unseen))
    temporary = [size for name, size in unseen.items() if _is_temporary(name)]
    orphans: Counter[str] = Counter()
    for name, size in unseen.items():
        if not _is_temporary(name):
            parts = name.split("/")
            orphans["/".join(parts[: 3 if parts[0] == "features" else 2])] += size
    return CacheUsage(
        cache=str(paths.root),
        files=len(files),
        bytes=sum(files.values()),
        geometry=usage,
        vfms=stores,
        temporary=(len(temporary), sum(temporary)),
        orphans=orphans,
    )


def _vfm_usage(
    folder: Location,
    spec: VFMSpec,
    geometry: dict[str, GeometryRecord],
    files: dict[str, int],
    unseen: dict[str, int],
) -> StoreUsage:
    usage = StoreUsage(f"features/{folder.name}", spec)
    for name in RESERVED_NAMES:
        usage.documents += _take(usage, f"{usage.folder}/{name}.json", unseen)
    for path, record in read_documents(_listed_records(folder, usage.folder, files), FeatureRecord):
        if isinstance(record, CorruptCacheError) or record.vfm_digest != spec.digest:
            continue
        of = geometry.get(record.partition)
        if of is not None and of.digest == record.geometry_digest:
            usage.points += sum(s.points for s in of.samples)
            usage.rows += record.rows
            _count(usage, path.name, record, files, unseen)
    return usage


def _listed_records(folder: Location, name: str, files: Iterable[str]) -> list[Location]:
    """Commit records of a folder, from the listing: the storage is not asked a second time."""
    names = (n.removeprefix(f"{name}/") for n in files if n.startswith(f"{name}/") and n.endswith(".json"))
    found = [n for n in names if "/" not in n and n[0] != "." and n.removesuffix(".json") not in RESERVED_NAMES]
    return [folder / n for n in sorted(found)]


def _listed_specs(paths: Paths, files: Iterable[str]) -> list[Location]:
    parts = (name.split("/") for name in sorted(files))
    keys = [p[1] for p in parts if len(p) == 3 and p[0] == "features" and p[2] == "vfm.json" and p[1][0] != "."]
    return [paths.root / "features" / key / "vfm.json" for key in keys]


def _count(
    usage: StoreUsage,
    document: str,
    record: GeometryRecord | FeatureRecord,
    files: dict[str, int],
    unseen: dict[str, int],
) -> None:
    """Add one committed partition to what its store takes, and take its files from those that nobody saw."""
    usage.partitions += 1
    usage.documents += _take(usage, f"{usage.folder}/{document}", unseen)
    where = str(Paths(Path()).group(Path(usage.folder), record))
    for name, size in record.files.items():
        array, slash, _ = name.partition("/")
        if slash:
            usage.arrays[array] += size
        elif not record.offsets:
            usage.documents += size
        if not record.offsets:
            usage.missing += files.get(f"{where}/{name}") != size
            _take(usage, f"{where}/{name}", unseen)
    if record.offsets:
        whole = _take(usage, where, unseen)
        usage.missing += where not in files
        usage.documents += max(0, whole - sum(size for name, size in record.files.items() if "/" in name))


def _take(usage: StoreUsage, name: str, unseen: dict[str, int]) -> int:
    if name not in unseen:
        return 0
    size = unseen.pop(name)
    usage.files += 1
    usage.bytes += size
    return size


def _is_temporary(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _line(size: int, text: str) -> str:
    return f"{human_bytes(size):>10}  {text}"
