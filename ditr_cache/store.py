"""The cache on disk: writer (temporary -> rename -> record) and reader. The only importer of zarr.

A partition is a zarr group beside a commit record, a JSON file that is written last. Without a valid record a
partition does not exist; the record names every file with its size and every array with its SHA-256, so that a file
that is missing, cut or altered is found at open (sizes), at read (checksums of the codecs) or by `verify` (digests).
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from ditr_cache.cached import CachedSample, StoredFeatures, StoredSample, check_view
from ditr_cache.codecs import EncodedRows, decode
from ditr_cache.errors import (
    CacheError,
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
    Paths,
    check_files,
    file_name,
    local_path,
    read_document,
    remove_folder,
    storage_errors,
    sync,
    temporary_prefix,
    umask,
    write_text,
)
from ditr_cache.schema import (
    ArrayInfo,
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

CHUNK_BYTES = 1 << 19
"""Target size of a chunk before compression: small enough for crops, large enough for the disk."""

SHARD_BYTES = 1 << 28
"""Largest shard before compression: one file per array for nearly every partition."""

REMEMBERED_ARRAYS = 4096
"""Arrays whose metadata a reader keeps parsed: some kilobytes each, and at every read some milliseconds."""

OPTIONAL_POINT_ARRAYS = ("color", "normal", "strength", "segment", "instance")
LINK_ARRAYS = ("link_point", "link_uv", "link_depth")

_CHUNK_KEYS = {"name": "default", "configuration": {"separator": "/"}}


# --- arrays ---------------------------------------------------------------------------------------------------------


def array_digest(array: NDArray[np.generic]) -> str:
    """SHA-256 (hex) of an array's shape, dtype and content in C order."""
    digest = hashlib.sha256(f"{array.dtype.str}{list(array.shape)}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


def _write_array(group: zarr.Group, name: str, array: NDArray[np.generic]) -> None:
    row_bytes = max(1, array[:1].nbytes)
    rows = max(1, min(len(array), 1 << max(0, (CHUNK_BYTES // row_bytes).bit_length() - 1)))
    chunks = (rows, *array.shape[1:])
    shard_rows = rows * max(1, min(-(-len(array) // rows), SHARD_BYTES // max(1, rows * row_bytes)))
    # A single chunk needs no shard around it, and is read in fewer steps.
    shards = (shard_rows, *array.shape[1:]) if shard_rows > rows else None
    # Integers of one column (indices, links) shrink many times under bitshuffle; rows of features only under zstd.
    compressors: list[Any] = [ZstdCodec(level=1, checksum=True)]
    if array.ndim == 1 and array.dtype.kind in "iu":
        compressors = [BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"), Crc32cCodec()]
    stored = group.create_array(
        name,
        shape=array.shape,
        dtype=array.dtype,
        chunks=chunks,
        shards=shards,
        compressors=compressors,
        fill_value=0,
    )
    if array.size:
        stored[...] = array


def _open_array(where: str, info: ArrayInfo) -> zarr.Array[Any]:
    stored = zarr.open_array(store=where, mode="r")
    if tuple(stored.shape) != info.shape or stored.dtype != np.dtype(info.dtype):
        raise CorruptCacheError(
            f"{where}: expected {info.dtype}{list(info.shape)} as its record says, got "
            f"{stored.dtype}{list(stored.shape)}; run `ditr-cache verify --repair`"
        )
    # Chunks that are all zero are not stored, so these two decide values that no checksum covers.
    if stored.fill_value != 0 or stored.metadata.to_dict()["chunk_key_encoding"] != _CHUNK_KEYS:
        raise CorruptCacheError(f"{where}: its zarr.json was altered; run `ditr-cache verify --repair`")
    return stored


def read_array(
    folder: Path,
    name: str,
    info: ArrayInfo,
    rows: slice = slice(None),
    open_array: Callable[[str, ArrayInfo], zarr.Array[Any]] = _open_array,
) -> NDArray[Any]:
    """Rows of one array of a group. Raises `CorruptCacheError` where it cannot be decoded or is not as recorded."""
    where = folder / name
    try:
        return np.asarray(open_array(str(where), info)[rows])
    except CacheError:
        raise
    except Exception as error:  # zarr and its codecs raise many types for damaged bytes; all mean the same here
        raise CorruptCacheError(
            f"{where}: cannot be decoded ({type(error).__name__}: {error}); run `ditr-cache verify --repair`"
        ) from error


def _write_arrays(folder: Path, arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, int]:
    """Write a group of arrays as `folder`, atomically and durably; returns its files with their sizes."""
    with storage_errors(folder, "write"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=temporary_prefix(), suffix=".tmp", dir=folder.parent))
        try:
            group = zarr.open_group(store=str(temporary), mode="w", zarr_format=3)
            for name, array in arrays.items():
                _write_array(group, name, array)
            paths = sorted(p for p in temporary.rglob("*") if p.is_file())
            files = {p.relative_to(temporary).as_posix(): p.stat().st_size for p in paths}
            for path in [*paths, *(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
                sync(path)
            temporary.chmod(0o777 & ~umask())
            remove_folder(folder)
            temporary.rename(folder)
            sync(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return files


def _info(arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, ArrayInfo]:
    return {k: ArrayInfo(shape=a.shape, dtype=a.dtype.str, sha256=array_digest(a)) for k, a in arrays.items()}


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
        self.paths = Paths(local_path(url))
        self.metadata = read_document(self.paths.metadata, CacheMetadata)

    @classmethod
    def create(cls, url: str | os.PathLike[str], metadata: CacheMetadata) -> Self:
        """Writer of a new cache, or of one that exists with the same metadata.

        Raises:
            MismatchError: the cache exists with other metadata; names each part that differs.
            UsageError: a folder that holds something else.
            UnwritableError: the folder cannot be written.
        """
        paths = Paths(local_path(url))
        if paths.metadata.exists():
            cls(url).check(metadata)
        elif paths.root.is_dir() and any(p for p in paths.root.iterdir() if not p.name.startswith(".")):
            raise UsageError(f"{str(paths.root)!r} is not empty and not a cache; pass an empty folder as --out")
        try:
            if not paths.metadata.exists():
                write_text(paths.metadata, metadata.to_json())
            with storage_errors(paths.root, "write to"), tempfile.TemporaryFile(dir=paths.root) as probe:
                probe.write(b"\0")
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

    def _committed(self, folder: Path, partition: str, cls: type[R]) -> R | None:
        try:
            record = read_document(self.paths.record(folder, partition), cls)
            check_files(self.paths.arrays(folder, partition), record.files)
        except MissingDataError:
            return None
        except CorruptCacheError as error:
            log.warning("%s: will be made again", error)
            return None
        return record

    def read_arrays(self, record: GeometryRecord, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Arrays of a committed geometry partition."""
        folder = self.paths.arrays(self.paths.geometry, record.partition)
        return {name: read_array(folder, name, record.arrays[name]) for name in names}

    def commit_geometry(
        self,
        partition: str,
        samples: Sequence[SampleInfo],
        arrays: Mapping[str, NDArray[np.generic]],
        *,
        broken_views: Sequence[BrokenView] = (),
        seconds: float = 0.0,
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

        Raises:
            DataError: labels beyond the cache's classes.
        """
        self._check_labels(partition, arrays.get("segment"))
        folder = self.paths.geometry
        self._discard(folder, partition)
        record = GeometryRecord(
            partition=partition,
            samples=tuple(samples),
            arrays=_info(arrays),
            files=_write_arrays(self.paths.arrays(folder, partition), arrays),
            broken_views=tuple(broken_views),
            seconds=seconds,
        )
        write_text(self.paths.record(folder, partition), record.to_json())
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
        vfm_file = folder / "vfm.json"
        if not vfm_file.exists():
            write_text(vfm_file, spec.to_json())
        self._discard(folder, geometry.partition)
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
            arrays=_info(arrays),
            files=_write_arrays(self.paths.arrays(folder, geometry.partition), arrays),
            rows=len(rows.table),
            valid_points=tuple(int(part.sum()) for part in np.split(valid, ends[:-1])),
            images=images,
            broken_views=tuple(broken_views),
            seconds=seconds,
        )
        write_text(self.paths.record(folder, geometry.partition), record.to_json())
        return record

    def _discard(self, folder: Path, partition: str) -> None:
        """Take a commit back before its arrays are replaced: at no moment does a record describe other arrays."""
        record = self.paths.record(folder, partition)
        with storage_errors(record, "remove"):
            if record.exists():
                record.unlink()
                sync(record.parent)


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
        self.paths = Paths(local_path(url))
        if not self.paths.metadata.exists():
            raise MissingDataError(
                f"{str(self.paths.root)!r} is not a cache: it has no cache.json; name a folder that `ditr-cache "
                "extract --out` made"
            )
        self.metadata = read_document(self.paths.metadata, CacheMetadata)
        self.geometry: dict[str, GeometryRecord] = {}
        """Record of every committed geometry partition."""
        self._where: dict[str, tuple[str, int]] = {}
        for path in sorted(self.paths.geometry.glob("*.json")):
            try:
                record = read_document(path, GeometryRecord)
            except CorruptCacheError as error:
                log.warning("skipped: %s", error)
                continue
            self.geometry[record.partition] = record
            self._where.update({s.id: (record.partition, i) for i, s in enumerate(record.samples)})
        self.vfms: dict[str, VFMSpec] = {}
        """Every VFM of the cache by its key."""
        for path in sorted((self.paths.root / "features").glob("*/vfm.json")):
            try:
                spec = read_document(path, VFMSpec)
            except CorruptCacheError as error:
                log.warning("skipped: %s", error)
                continue
            if file_name(spec.key) != path.parent.name:
                raise MismatchError(
                    f"{path}: the folder is named {path.parent.name!r} but describes {spec.key!r}; "
                    "it was renamed or altered, restore its name or remove it"
                )
            self.vfms[spec.key] = spec
        self._features: dict[tuple[str, str], FeatureRecord] = {}
        self._remember_arrays()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_open_array"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._remember_arrays()

    def _remember_arrays(self) -> None:
        """Parse the metadata of an array once, not at every read; no file stays open for it."""
        self._open_array = lru_cache(maxsize=REMEMBERED_ARRAYS)(_open_array)

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
        with_features = {p for p in self.geometry if self.feature_record(spec, p) is not None}
        return [i for i in self.samples if self._where[i][0] in with_features]

    def feature_record(self, spec: VFMSpec, partition: str) -> FeatureRecord | None:
        """The commit record of a feature partition, None where it is not committed.

        Raises:
            MismatchError: the features were made from another geometry, or by another VFM.
            CorruptCacheError: the record was altered.
        """
        if (spec.key, partition) not in self._features:
            path = self.paths.record(self.paths.features(spec.key), partition)
            try:
                record = read_document(path, FeatureRecord)
            except MissingDataError:
                return None
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
        return self._features[spec.key, partition]

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
        folder = self.paths.arrays(self.paths.geometry, partition)
        check_files(folder, record.files)
        rows = record.point_slice(position)
        points: dict[str, Any] = {
            name: self._read(folder, name, record.arrays[name], rows) if name in record.arrays else None
            for name in ("coord", "source_index", *OPTIONAL_POINT_ARRAYS)
        }
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
        partition, position = self._locate(sample_id)
        record = self.geometry[partition]
        link_point = self._read_geometry(partition, "link_point", slice(None))
        counts = np.bincount(link_point, minlength=sum(s.points for s in record.samples))
        return CachedSample(
            **{k: v for k, v in vars(stored).items() if k != "features"},
            link_count=counts[record.point_slice(position)].astype(np.int32),
            feature=feature,
            valid=valid,
        )

    def _read_geometry(self, partition: str, name: str, rows: slice) -> NDArray[Any]:
        folder = self.paths.arrays(self.paths.geometry, partition)
        return self._read(folder, name, self.geometry[partition].arrays[name], rows)

    def _read(self, folder: Path, name: str, info: ArrayInfo, rows: slice = slice(None)) -> NDArray[Any]:
        return read_array(folder, name, info, rows, self._open_array)

    def _locate(self, sample_id: str) -> tuple[str, int]:
        if sample_id not in self._where:
            raise UnknownNameError.of(f"sample of cache {str(self.paths.root)!r}", sample_id, self._where)
        return self._where[sample_id]


class _SampleFeatures:
    """Features of one sample. Raises `MissingDataError` where it has none of that VFM."""

    def __init__(self, reader: CacheReader, sample_id: str, spec: VFMSpec) -> None:
        self.reader, self.spec = reader, spec
        self.partition, self.position = reader._locate(sample_id)
        self.geometry = reader.geometry[self.partition]
        record = reader.feature_record(spec, self.partition)
        if record is None:
            raise MissingDataError(
                f"sample {sample_id!r} has no features of {spec.key!r}; run `ditr-cache extract --vfm {spec.name}`"
            )
        self.record = record
        self.folder = reader.paths.arrays(reader.paths.features(spec.key), self.partition)
        check_files(self.folder, record.files)

    def stored(self, view: str | None, rng: np.random.Generator | None) -> StoredFeatures:
        """One row per point; in the layout `views` that of the chosen view, by default the last."""
        check_view(self.spec, view)
        if self.spec.layout == "fused":
            return self._rows(self._index(self.geometry.point_slice(self.position)))
        links = self._links(self._index(self.geometry.link_slice(self.position)))
        if view == "nearest":
            depth = self.reader._read_geometry(self.partition, "link_depth", self.geometry.link_slice(self.position))
            return self._rows(links.nearest(depth))
        if view == "random":
            if rng is None:
                raise UsageError("view 'random': expected rng, a generator to draw from, got None")
            return self._rows(links.random(rng))
        return self._rows(links.last())

    def decoded(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """[N, C] float32, zero where a point has no feature, and [N] bool whether it has one."""
        if self.spec.layout == "views":
            rows = self._rows(self._index(self.geometry.link_slice(self.position)))
            return self._links(rows.index).mean(rows.table, rows.scale)
        rows = self.stored(None, None)
        valid = rows.index >= 0
        feature = np.zeros((len(valid), rows.table.shape[1]), dtype=np.float32)
        used = rows.index[valid]
        feature[valid] = decode(rows.table[used], None if rows.scale is None else rows.scale[used])
        return feature, valid

    def _links(self, row: NDArray[np.int32]) -> LinkedRows:
        points, links = self.geometry.point_slice(self.position), self.geometry.link_slice(self.position)
        return LinkedRows(
            row=row,
            point=self.reader._read_geometry(self.partition, "link_point", links) - points.start,
            ends=np.cumsum([v.links for v in self.geometry.samples[self.position].views], dtype=np.int64),
            points=points.stop - points.start,
        )

    def _index(self, entries: slice) -> NDArray[np.int32]:
        return self.reader._read(self.folder, "index", self.record.arrays["index"], entries)

    def _rows(self, index: NDArray[np.int32]) -> StoredFeatures:
        """The rows that an index names. A sample's rows stand together: only its part of the table is read."""
        present = index[index >= 0]
        used = slice(int(present.min()), int(present.max()) + 1) if len(present) else slice(0, 0)
        if used.start:
            index = np.where(index >= 0, index - used.start, -1).astype(np.int32)
        arrays = {
            name: self.reader._read(self.folder, name, self.record.arrays[name], used)
            for name in ("table", "scale")
            if name in self.record.arrays
        }
        return StoredFeatures(table=arrays["table"], scale=arrays.get("scale"), index=index, spec=self.spec)
