"""The cache on disk: writer (temporary -> rename -> record) and reader.

A partition is a group of arrays beside a commit record, a JSON file that is written last. Without a valid record a
partition does not exist; the record names every file with its size and every array with its SHA-256, so that a file
that is missing, cut, altered or exchanged is found at open (sizes), at read (checksums) or by `verify` (digests).
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from ditr_cache.arrays import ArrayGroup
from ditr_cache.block_cache import local_cache
from ditr_cache.cached import CachedSample, StoredFeatures, StoredSample, check_view
from ditr_cache.codec_state import read_codec, write_codec
from ditr_cache.codecs import Codec, EncodedRows
from ditr_cache.errors import (
    CorruptCacheError,
    DataError,
    MismatchError,
    MissingDataError,
    StorageError,
    UnknownNameError,
    UnwritableError,
    UsageError,
)
from ditr_cache.files import (
    Location,
    Paths,
    check_files,
    check_name,
    entries,
    exists,
    file_name,
    location,
    read_document,
    read_documents,
    read_record,
    remove_group,
    storage_errors,
    sync,
    temporary_prefix,
    write_text,
)
from ditr_cache.groups import open_group, write_group
from ditr_cache.remote import RemotePath
from ditr_cache.schema import (
    PROJECTION_VERSION,
    BrokenView,
    CacheMetadata,
    FeatureRecord,
    GeometryRecord,
    SampleInfo,
    VFMSpec,
)
from ditr_cache.views import LinkedRows

log = logging.getLogger(__name__)

R = TypeVar("R", GeometryRecord, FeatureRecord)

OPTIONAL_POINT_ARRAYS = ("color", "normal", "strength", "segment", "instance")

REMEMBERED_GROUPS = 512
"""Groups whose metadata a reader keeps parsed: some ten kilobytes each, and at every read some ten milliseconds."""


def check_index(spec: VFMSpec, geometry: GeometryRecord, index: NDArray[np.integer], rows: int) -> None:
    """Raise `MismatchError` where an index does not fit its layout, its geometry or its table of `rows` rows."""
    of, entries = "point", sum(s.points for s in geometry.samples)
    if spec.layout == "views":
        of, entries = "link", sum(v.links for s in geometry.samples for v in s.views)
    if index.shape != (entries,):
        raise MismatchError(
            f"features of partition {geometry.partition!r}: expected an index of {entries} entries, one per {of} "
            f"(layout {spec.layout}), got {list(index.shape)}"
        )
    if entries and not -1 <= index.min() <= index.max() < rows:
        raise MismatchError(
            f"features of partition {geometry.partition!r}: expected an index of rows 0 to {rows - 1}, or -1, got "
            f"{index.min()} to {index.max()}"
        )


# --- writer ---------------------------------------------------------------------------------------------------------


class CacheWriter:
    """Commits partitions to a cache. Many processes may hold one writer each, on different partitions."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.paths = Paths(location(url))
        self.metadata = read_document(self.paths.metadata, CacheMetadata)
        self._created: set[str] = set()

    @classmethod
    def create(cls, url: str | os.PathLike[str], metadata: CacheMetadata) -> Self:
        """Writer of a new cache, or of one that exists with the same metadata.

        Raises:
            MismatchError: the cache exists with other metadata; names each part that differs.
            UsageError: a folder that holds something else.
            UnwritableError: the folder cannot be written.
        """
        paths = Paths(location(url))
        try:
            if exists(paths.metadata):
                cls(url).check(metadata)
            elif entries(paths.root, ""):
                raise UsageError(f"{str(paths.root)!r} is not empty and not a cache; pass an empty folder as --out")
            else:
                write_text(paths.metadata, metadata.to_json())
            probe_writable(paths.root)
        except StorageError as error:
            raise UnwritableError(str(error)) from error
        return cls(url)

    def check(self, metadata: CacheMetadata) -> None:
        """Raise `MismatchError` where the cache was made with other metadata; names each part that differs.

        Of another dataset, that alone is named.
        """
        have, want = asdict(self.metadata), asdict(metadata)
        if have["dataset"] != want["dataset"]:  # then everything else differs, too
            raise MismatchError(
                f"cache {str(self.paths.root)!r} is of dataset {have['dataset']!r}, asked for {want['dataset']!r}; use "
                "another --out"
            )
        pairs = [(k, have[k], want[k]) for k in want if k != "links"]
        pairs += [(f"links.{k}", have["links"][k], want["links"][k]) for k in want["links"]]
        differing = [f"{name}: the cache has {old!r}, asked for {new!r}" for name, old, new in pairs if old != new]
        if differing:
            raise MismatchError(
                f"cache {str(self.paths.root)!r} was made with other settings (use another --out): "
                + "; ".join(differing)
            )

    def geometry(self, partition: str) -> GeometryRecord | None:
        """The record of a committed geometry partition, None where there is none that is valid."""
        return self._committed(self.paths.geometry, partition, GeometryRecord)

    def features(self, spec: VFMSpec, partition: str) -> FeatureRecord | None:
        """The record of a committed feature partition, None where there is none that is valid."""
        return self._committed(self.paths.features(spec.key), partition, FeatureRecord)

    def _committed(self, folder: Location, partition: str, cls: type[R]) -> R | None:
        try:
            record = read_record(self.paths.record(folder, partition), cls)
            check_files(self.paths.group(folder, record), record.files, record.offsets)
        except MissingDataError:
            return None
        except (CorruptCacheError, MismatchError) as error:
            log.warning("%s: will be made again", error)
            return None
        return record

    def read_arrays(self, record: GeometryRecord, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Arrays of a committed geometry partition."""
        group = open_group(self.paths, self.paths.geometry, record)
        return {name: group.read(name) for name in names}

    def commit_geometry(
        self,
        partition: str,
        samples: Sequence[SampleInfo],
        arrays: Mapping[str, NDArray[np.generic]],
        *,
        broken_views: Sequence[BrokenView] = (),
        seconds: float = 0.0,
        calibration: Sequence[str] = (),
        projection_version: int = PROJECTION_VERSION,
    ) -> GeometryRecord:
        """Write and commit one geometry partition.

        Args:
            partition: its id.
            samples: in the order of the arrays.
            arrays: `coord` [N, 3] float32, `source_index` [N] uint32, `offset` [S] int64 (cumulative), the optional
                point arrays, and `link_point` [L] uint32, `link_uv` [L, 2] uint16, `link_depth` [L] float16, the
                links of all views one after the other.
            broken_views: views left out.
            seconds: how long it took.
            calibration: fingerprints of the views, per sample; empty where there are none.
            projection_version: of the linking.

        Raises:
            DataError: labels beyond the cache's classes.
        """
        self._check_labels(partition, arrays.get("segment"))
        folder = self.paths.geometry
        replaced = self._discard(folder, partition, GeometryRecord)
        record = GeometryRecord(
            partition=partition,
            samples=tuple(samples),
            **write_group(self.paths, folder, partition, arrays),
            broken_views=tuple(broken_views),
            seconds=seconds,
            calibration=tuple(calibration),
            projection_version=projection_version,
        )
        write_text(self.paths.record(folder, partition), record.to_json())
        self._remove_replaced(replaced, folder, record)
        return record

    def _check_labels(self, partition: str, segment: NDArray[Any] | None) -> None:
        if segment is None:
            return
        classes, ignored = len(self.metadata.class_names), self.metadata.ignore_index
        wrong = segment[(segment != ignored) & ((segment < 0) | (segment >= classes))]
        if len(wrong):
            raise DataError(
                f"geometry of partition {partition!r}: expected labels 0 to {classes - 1} of the dataset's {classes} "
                f"classes, or {ignored} (ignored), got {len(wrong)} others, for example {wrong[0]}; map them in the "
                "dataset's reader"
            )

    def commit_features(
        self,
        spec: VFMSpec,
        geometry: GeometryRecord,
        rows: EncodedRows,
        index: NDArray[np.int32],
        *,
        images: int,
        broken_views: Sequence[BrokenView] = (),
        seconds: float = 0.0,
    ) -> FeatureRecord:
        """Write and commit one feature partition.

        Args:
            spec: the VFM.
            geometry: what the features were made from.
            rows: of T tokens, those of a sample together.
            index: the row of each point [N], or in the layout `views` of each link [L]; -1 where it has none.
            images: number of images that went through the VFM.
            broken_views: views left out.
            seconds: how long it took.

        Raises:
            MismatchError: the index does not fit the geometry or the rows.
        """
        check_index(spec, geometry, index, len(rows.table))
        folder = self.paths.features(spec.key)
        self._create_store(spec)
        replaced = self._discard(folder, geometry.partition, FeatureRecord)
        arrays: dict[str, NDArray[Any]] = {"table": rows.table, "index": index}
        if rows.scale is not None:
            arrays["scale"] = rows.scale
        valid = index >= 0
        ends = np.cumsum([s.points for s in geometry.samples])
        if spec.layout == "views":
            seen = self.read_arrays(geometry, ("link_point",))["link_point"][valid]
            valid = np.zeros(ends[-1], dtype=bool)
            valid[seen] = True
        record = FeatureRecord(
            partition=geometry.partition,
            vfm_digest=spec.digest,
            geometry_digest=geometry.digest,
            **write_group(self.paths, folder, geometry.partition, arrays),
            rows=len(rows.table),
            valid_points=tuple(int(part.sum()) for part in np.split(valid, ends[:-1])),
            images=images,
            broken_views=tuple(broken_views),
            seconds=seconds,
        )
        write_text(self.paths.record(folder, geometry.partition), record.to_json())
        self._remove_replaced(replaced, folder, record)
        return record

    def create_codec(self, spec: VFMSpec, codec: Codec) -> None:
        """Store what a codec was fitted to be. Before the first commit of features that it encodes."""
        write_codec(self.paths, spec, codec)
        self._create_store(spec)

    def _create_store(self, spec: VFMSpec) -> None:
        if spec.key in self._created:
            return
        vfm_file = self.paths.features(spec.key) / "vfm.json"
        if not exists(vfm_file):
            read_codec(self.paths, spec)  # features that cannot be decoded must not be committed
            write_text(vfm_file, spec.to_json())
        self._created.add(spec.key)

    def _discard(self, folder: Location, partition: str, cls: type[R]) -> Location | None:
        """Take a commit back before its arrays are replaced: at no moment does a record describe other arrays.

        In object storage the new arrays get a name of their own. There the commit stands until the next one replaces
        it; returns where its arrays lie, to be removed after that.
        """
        path = self.paths.record(folder, partition)
        if isinstance(path, RemotePath):
            try:
                return self.paths.group(folder, read_document(path, cls))
            except (MissingDataError, CorruptCacheError):
                return None
        with storage_errors(path, "remove"):
            if path.exists():
                path.unlink()
                sync(path.parent)
        return None

    def _remove_replaced(
        self, replaced: Location | None, folder: Location, record: GeometryRecord | FeatureRecord
    ) -> None:
        if replaced is not None and replaced != self.paths.group(folder, record):
            remove_group(replaced)


def probe_writable(root: Location) -> None:
    """Raise `StorageError` where nothing can be written below a folder."""
    if isinstance(root, RemotePath):
        probe = root / f"{temporary_prefix()}.tmp"
        probe.write_bytes(b"\0")
        probe.unlink()
        return
    with storage_errors(root, "write to"), tempfile.TemporaryFile(dir=root) as file:
        file.write(b"\0")


# --- reader ---------------------------------------------------------------------------------------------------------


def open_cache(url: str | os.PathLike[str]) -> CacheReader:
    """Open a cache for reading.

    Raises:
        MissingDataError: no cache there.
        FormatVersionError: written by a newer version.
        CorruptCacheError: `cache.json` was altered.
    """
    return CacheReader(url)


class CacheReader:
    """Reads samples of a cache. Picklable, holds no open files, safe to use from many processes."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.paths = Paths(location(url))
        try:
            self.metadata = read_document(self.paths.metadata, CacheMetadata)
        except MissingDataError as error:
            raise MissingDataError(
                f"{str(self.paths.root)!r} is not a cache: it has no cache.json; name a folder that `ditr-cache "
                "extract --out` made"
            ) from error
        if isinstance(self.paths.root, RemotePath):
            local_cache()  # settings that cannot be used are found now, not at the first sample
        self.geometry: dict[str, GeometryRecord] = {}
        """Record of every committed geometry partition."""
        self._where: dict[str, tuple[str, int]] = {}
        for path, record in read_documents(self.paths.records(self.paths.geometry), GeometryRecord):
            if isinstance(record, CorruptCacheError):
                log.warning("skipped: %s", record)
                continue
            try:
                check_name(path, record)
            except MismatchError as error:
                log.warning("skipped: %s", error)
                continue
            self.geometry[record.partition] = record
            self._where.update({s.id: (record.partition, i) for i, s in enumerate(record.samples)})
        self.vfms: dict[str, VFMSpec] = {}
        """Every VFM of the cache by its key."""
        for path, spec in read_documents([store / "vfm.json" for store in self.paths.stores], VFMSpec):
            if isinstance(spec, CorruptCacheError):
                log.warning("skipped: %s", spec)
                continue
            if file_name(spec.key) != path.parent.name:
                raise MismatchError(
                    f"{path}: the folder is named {path.parent.name!r} but describes {spec.key!r}; "
                    "it was renamed or altered, restore its name or remove it"
                )
            self.vfms[spec.key] = spec
        self._features: dict[tuple[str, str], FeatureRecord] = {}
        self._codecs: dict[str, Codec] = {}
        self._remember_groups()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_remembered"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._remember_groups()

    def _remember_groups(self) -> None:
        """Parse the metadata of a group once, not at every read; no file stays open for it."""
        self._remembered = lru_cache(maxsize=REMEMBERED_GROUPS)(self._open_group)

    @property
    def samples(self) -> list[str]:
        """Ids of all committed samples, sorted."""
        return sorted(self._where)

    @property
    def splits(self) -> list[str]:
        """Splits of the committed samples, sorted."""
        return sorted({s.split for record in self.geometry.values() for s in record.samples})

    def split_ids(self, split: str) -> list[str]:
        """Ids of the committed samples of one split. Raises `UnknownNameError` where it has none."""
        if split not in self.splits:
            raise UnknownNameError.of(f"split of cache {str(self.paths.root)!r}", split, self.splits)
        return [i for i in self.samples if self.sample_info(i).split == split]

    def sample_info(self, sample_id: str) -> SampleInfo:
        """What the record says of a sample. Raises `UnknownNameError`."""
        partition, position = self._locate(sample_id)
        return self.geometry[partition].samples[position]

    def resolve_vfm(self, vfm: str | None = None) -> VFMSpec:
        """The VFM of that key, or the only one of that name; for None the only one of the cache.

        Raises:
            UnknownNameError: none of that key or name.
            UsageError: several, or none at all.
        """
        if vfm in self.vfms:
            return self.vfms[vfm]
        found = [s for s in self.vfms.values() if vfm is None or s.name == vfm]
        if len(found) == 1:
            return found[0]
        if found:
            raise UsageError(
                f"cache {str(self.paths.root)!r} has several VFMs"
                + (f" named {vfm!r}" if vfm else "")
                + f", name one by its key: {', '.join(s.key for s in found)}"
            )
        if vfm is None:
            raise UsageError(
                f"cache {str(self.paths.root)!r} holds no features yet; run `ditr-cache extract` with --vfm"
            )
        names = {*self.vfms, *(s.name for s in self.vfms.values())}
        raise UnknownNameError.of(
            f"VFM of cache {str(self.paths.root)!r}", vfm, names, "`ditr-cache extract --vfm` adds one."
        )

    def samples_with(self, vfm: str | None = None) -> list[str]:
        """Ids of the samples that have features of a VFM, sorted. Raises as `feature_record` and `resolve_vfm`."""
        spec = self.resolve_vfm(vfm)
        unread = [p for p in self.geometry if (spec.key, p) not in self._features]
        partitions = {self._feature_path(spec, p): p for p in unread}
        for path, record in read_documents(list(partitions), FeatureRecord):
            self._remember_features(spec, partitions[path], path, record)
        return [i for i in self.samples if (spec.key, self._where[i][0]) in self._features]

    def feature_record(self, spec: VFMSpec, partition: str) -> FeatureRecord | None:
        """The commit record of a feature partition, None where it is not committed.

        Raises:
            MismatchError: the features were made from another geometry, or by another VFM.
            CorruptCacheError: the record was altered.
        """
        if (spec.key, partition) not in self._features:
            path = self._feature_path(spec, partition)
            try:
                record = read_document(path, FeatureRecord)
            except MissingDataError:
                return None
            self._remember_features(spec, partition, path, record)
        return self._features[spec.key, partition]

    def _feature_path(self, spec: VFMSpec, partition: str) -> Location:
        return self.paths.record(self.paths.features(spec.key), partition)

    def _remember_features(
        self, spec: VFMSpec, partition: str, path: Location, record: FeatureRecord | CorruptCacheError
    ) -> None:
        if isinstance(record, CorruptCacheError):
            raise record
        for what, have, want in (
            ("VFM", record.vfm_digest, spec.digest),
            ("geometry (points, their order, or links)", record.geometry_digest, self.geometry[partition].digest),
        ):
            if have != want:
                raise MismatchError(
                    f"{path}: features of another {what}: expected digest {want[:16]}, got {have[:16]}; "
                    "run `ditr-cache extract` again to rebuild them"
                )
        self._features[spec.key, partition] = record

    def codec(self, spec: VFMSpec) -> Codec:
        """What decodes the rows of a VFM.

        Raises:
            MissingDataError, CorruptCacheError, MismatchError: what the codec was fitted to be is not there, damaged,
                or that of another store.
        """
        if spec.key not in self._codecs:
            self._codecs[spec.key] = read_codec(self.paths, spec)
        return self._codecs[spec.key]

    def read_stored(
        self, sample_id: str, vfm: str | None, *, view: str | None = None, rng: np.random.Generator | None = None
    ) -> StoredSample:
        """One sample with its feature rows as stored; no features where `vfm` is None.

        Args:
            sample_id: its id.
            vfm: key or name.
            view: of a VFM in the layout `views`, which view gives a point its row: `last`, `nearest` or `random`; None
                takes the last.
            rng: what `random` draws from.

        Raises:
            UnknownNameError: no such sample, VFM or choice of view.
            UsageError: `random` without `rng`.
            MissingDataError: the sample has no features of this VFM.
            CorruptCacheError: a file is missing, cut or damaged.
            MismatchError: features of another geometry, or a choice of view where the cache holds one per point.
        """
        spec = None if vfm is None else self.resolve_vfm(vfm)
        partition, position = self._locate(sample_id)
        record = self.geometry[partition]
        group = self._group(None, partition)
        rows = record.point_slice(position)
        points: dict[str, Any] = dict.fromkeys(("coord", "source_index", *OPTIONAL_POINT_ARRAYS))
        present = [name for name in points if name in record.arrays]
        with group.announced(present, rows):
            points.update((name, group.read(name, rows)) for name in present)
        if points["normal"] is not None:
            points["normal"] = points["normal"].astype(np.float32)
        points["source_index"] = points["source_index"].astype(np.int64)
        features = None if spec is None else _SampleFeatures(self, sample_id, spec).stored(view, rng)
        return StoredSample(id=sample_id, split=record.samples[position].split, features=features, **points)

    def read(self, sample_id: str, vfm: str | None = None) -> CachedSample:
        """One sample, decoded. `vfm` is a key or a name; None takes the only VFM, or no features where there are none.

        Of a VFM in the layout `views`, a point's feature is the mean over all of its views. Raises as `read_stored`.
        """
        spec = self.resolve_vfm(vfm) if vfm is not None or self.vfms else None
        stored = self.read_stored(sample_id, None)
        feature, valid = None, np.zeros(len(stored.coord), dtype=bool)
        if spec is not None:
            feature, valid = _SampleFeatures(self, sample_id, spec).decoded()
        counts = np.bincount(self._link_points(*self._locate(sample_id)), minlength=len(stored.coord))
        return CachedSample(
            **{k: v for k, v in vars(stored).items() if k != "features"},
            link_count=counts.astype(np.int32),
            feature=feature,
            valid=valid,
        )

    def _link_points(self, partition: str, position: int) -> NDArray[np.int64]:
        """[L] the point of each link of a sample, counted from its first. Raises `CorruptCacheError`."""
        record = self.geometry[partition]
        points = record.point_slice(position)
        found = self._group(None, partition).read("link_point", record.link_slice(position)).astype(np.int64)
        _check_range(found, points.start, points.stop, f"partition {partition!r}: link_point")
        found -= points.start
        return found

    def _group(self, spec: VFMSpec | None, partition: str) -> ArrayGroup:
        """Reader of a committed group: of a VFM's features, or for None of the geometry.

        Raises:
            CorruptCacheError: a file is missing, or was cut.
        """
        record = self._record(spec, partition)
        where = self.paths.group(self._folder(spec), record)
        if isinstance(where, Path):
            check_files(where, record.files, record.offsets)
        return self._remembered(spec, partition)

    def _open_group(self, spec: VFMSpec | None, partition: str) -> ArrayGroup:
        return open_group(self.paths, self._folder(spec), self._record(spec, partition))

    def _folder(self, spec: VFMSpec | None) -> Location:
        return self.paths.geometry if spec is None else self.paths.features(spec.key)

    def _record(self, spec: VFMSpec | None, partition: str) -> GeometryRecord | FeatureRecord:
        return self.geometry[partition] if spec is None else self._features[spec.key, partition]

    def _locate(self, sample_id: str) -> tuple[str, int]:
        if sample_id not in self._where:
            raise UnknownNameError.of(f"sample of cache {str(self.paths.root)!r}", sample_id, self._where)
        return self._where[sample_id]


def _check_range(values: NDArray[np.integer], start: int, stop: int, what: str) -> None:
    """Raise `CorruptCacheError` where indices are outside of [start, stop): what they are of would be too small."""
    if len(values) and not start <= values.min() <= values.max() < stop:
        raise CorruptCacheError(
            f"{what}: expected {start} to {stop - 1}, got {values.min()} to {values.max()}; run `ditr-cache verify`, "
            "and do not use a cache from a source that you do not know"
        )


class _SampleFeatures:
    """Features of one sample. Raises `MissingDataError` where it has none of that VFM."""

    def __init__(self, reader: CacheReader, sample_id: str, spec: VFMSpec) -> None:
        self.reader, self.spec = reader, spec
        self.partition, self.position = reader._locate(sample_id)
        self.geometry = reader.geometry[self.partition]
        if reader.feature_record(spec, self.partition) is None:
            raise MissingDataError(
                f"sample {sample_id!r} has no features of {spec.key!r}; run `ditr-cache extract --vfm {spec.name}`"
            )
        self.group = reader._group(spec, self.partition)

    def stored(self, view: str | None, rng: np.random.Generator | None) -> StoredFeatures:
        """One row per point; in the layout `views` that of the chosen view, by default the last."""
        check_view(self.spec, view)
        if self.spec.layout == "fused":
            return self._rows(self._index(self.geometry.point_slice(self.position)))
        of = self.geometry.link_slice(self.position)
        geometry = self.reader._group(None, self.partition)
        links = self._links(self._index(of))
        if view == "nearest":
            return self._rows(links.nearest(geometry.read("link_depth", of)))
        if view == "random":
            if rng is None:
                raise UsageError("view 'random': expected rng, a generator to draw from, got None")
            return self._rows(links.random(rng))
        return self._rows(links.last())

    def decoded(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """[N, C] float32, zero where a point has no feature, and [N] bool whether it has one."""
        if self.spec.layout == "views":
            rows = self._rows(self._index(self.geometry.link_slice(self.position)))
            return self._links(rows.index).mean(rows.decoded())
        rows = self.stored(None, None)
        valid = rows.index >= 0
        feature = np.zeros((len(valid), self.spec.dim), dtype=np.float32)
        feature[valid] = rows.decoded()[rows.index[valid]]
        return feature, valid

    def _links(self, row: NDArray[np.int32]) -> LinkedRows:
        points = self.geometry.point_slice(self.position)
        return LinkedRows(
            row=row,
            point=self.reader._link_points(self.partition, self.position),
            ends=np.cumsum([v.links for v in self.geometry.samples[self.position].views], dtype=np.int64),
            points=points.stop - points.start,
        )

    def _index(self, of: slice) -> NDArray[np.int32]:
        with self.group.announced(("index",), of):
            index = self.group.read("index", of)
        record = self.reader._record(self.spec, self.partition)
        assert isinstance(record, FeatureRecord)
        _check_range(index, -1, record.rows, f"features of {self.spec.key!r}, partition {self.partition!r}: index")
        return index

    def _rows(self, index: NDArray[np.int32]) -> StoredFeatures:
        """The rows that an index names, which stand together; they are read when they are asked for."""
        present = index[index >= 0]
        first = int(present.min()) if len(present) else 0
        if first:
            index = np.where(index >= 0, index - first, -1).astype(np.int32)

        def take(rows: NDArray[np.integer]) -> EncodedRows:
            read = {n: self.group.read_rows(n, rows + first) for n in ("table", "scale") if n in self.group.infos}
            return EncodedRows(table=read["table"], scale=read.get("scale"))

        return StoredFeatures(
            index=index,
            rows=int(present.max()) + 1 - first if len(present) else 0,
            take=take,
            spec=self.spec,
            codec=self.reader.codec(self.spec),
        )
