"""Copy a cache, whole or in part, and store its features under another codec: no image is read, no VFM runs.

Partition after partition is read, compared with the digests of its record, and committed to the target as an extraction
commits it. What the target has already is left alone, so that a copy that was stopped goes on where it was.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditr_cache.claims import POLL_SECONDS, Claims, features_claim, geometry_claim, new_run
from ditr_cache.codec_state import codec_spec, find_fitted, read_codec
from ditr_cache.codecs import Codec, EncodedRows, check_codec, concatenate_rows, make_codec, needs_fit
from ditr_cache.errors import CorruptCacheError, DataError, MismatchError, UsageError
from ditr_cache.files import file_name, location, read_documents, remove_leftovers
from ditr_cache.fitted_codecs import FIT_ROWS, TRAIN_SPLIT, fit_codec
from ditr_cache.schema import FeatureRecord, GeometryRecord, VFMSpec
from ditr_cache.store import CacheReader, CacheWriter, open_cache
from ditr_cache.task_progress import TaskProgress
from ditr_cache.verify import verified_arrays

log = logging.getLogger(__name__)

FIT_SAMPLES = 1024
"""Most samples that they are taken from: 64 rows of each."""

BLOCK_VALUES = 1 << 23
"""Values that are decoded and encoded at once: 32 MiB as float32."""


@dataclass(frozen=True, kw_only=True)
class CopyRequest:
    """One call of `ditr-cache copy`.

    Args:
        source, target: paths or URLs of caches; the same one adds transcoded features to it.
        vfms: keys or names of those whose features are copied; none: all.
        codec: how rows are stored in the target; None: as they are.
    """

    source: str
    target: str
    vfms: tuple[str, ...] = ()
    codec: str | None = None


@dataclass
class CopyTotals:
    """What a copy did.

    Args:
        keys: key of each VFM in the source -> in the target.
        geometry, features: numbers of partitions `copied` and `reused`, which were there.
        failures: (entry of the source, what is wrong with it) of what was left out.
        bytes: written to the target.
        seconds: taken.
    """

    keys: dict[str, str] = field(default_factory=dict)
    geometry: dict[str, int] = field(default_factory=lambda: {"copied": 0, "reused": 0})
    features: dict[str, int] = field(default_factory=lambda: {"copied": 0, "reused": 0})
    failures: list[tuple[str, str]] = field(default_factory=list)
    bytes: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The object that `copy --json` prints."""
        return {
            "vfms": dict(self.keys),
            "geometry": dict(self.geometry),
            "features": dict(self.features),
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "failures": [{"entry": entry, "error": error} for entry, error in self.failures],
        }


@dataclass(frozen=True, kw_only=True)
class _Store:
    """One VFM's features: from where, to where, and how rows change on the way.

    Args:
        source, target: of the VFM; equal where rows are copied as they are.
        decoder, encoder: None where they are.
        records: of the source, by partition.
        finished: partitions that are through, however they ended.
    """

    source: VFMSpec
    target: VFMSpec
    decoder: Codec | None
    encoder: Codec | None
    records: dict[str, FeatureRecord]
    finished: set[str] = field(default_factory=set)


def copy(request: CopyRequest, *, quiet: bool = False) -> CopyTotals:
    """Copy what the target has not. Stopped at any moment, the same call goes on from there.

    Raises:
        CacheError: wrong use or unusable input, found before anything is copied; what is wrong with a partition is in
            `failures`.
        StorageError: the target cannot be written.
    """
    started = time.perf_counter()
    copier = _Copier(request, quiet=quiet)
    copier.run()
    copier.totals.seconds = time.perf_counter() - started
    return copier.totals


class _Copier:
    def __init__(self, request: CopyRequest, *, quiet: bool) -> None:
        self.quiet, self.totals = quiet, CopyTotals()
        self.reader = open_cache(request.source)
        self.same = is_same(self.reader, request.target)
        specs = _chosen(self.reader, request, same=self.same)
        _try_codec(specs, request.codec)
        self.writer = (
            CacheWriter(request.target) if self.same else CacheWriter.create(request.target, self.reader.metadata)
        )
        leftovers = remove_leftovers(self.writer.paths.root)
        if leftovers:
            log.info("removed %d temporary files of an interrupted run", leftovers)
        self._failed: list[tuple[str, str]] = [*_damaged(self.reader, every_vfm=not request.vfms)]
        self.claims = Claims(self.writer.paths, new_run())
        self._geometry: dict[str, GeometryRecord | None] = {}
        """Of partitions that are through: what the target has, None where it cannot have it."""
        stores = [self._store(spec, request.codec) for spec in specs]
        self.stores = [store for store in stores if store is not None]
        self.totals.keys = {store.source.key: store.target.key for store in self.stores}

    def run(self) -> None:
        """Copy partition after partition, the geometry of each before its features."""
        source = self.reader.geometry
        total = 0 if self.same else sum(_size(record) for record in source.values())
        total += sum(_size(record) for store in self.stores for record in store.records.values())
        with TaskProgress("copy", total, quiet=self.quiet) as self.progress:
            for entry, reason in self._failed:
                self._fail(entry, reason)
            waiting = sorted(source)
            while waiting:
                busy = [partition for partition in waiting if not self._partition(partition)]
                if len(busy) == len(waiting):
                    time.sleep(POLL_SECONDS)
                waiting = busy

    def _partition(self, partition: str) -> bool:
        """Copy what the target has not of a partition; False where another run is making some of it."""
        record = self.reader.geometry[partition]
        if partition not in self._geometry:
            if self.same:
                self._geometry[partition] = record
            elif not self._copy_geometry(record):
                return False
        geometry = self._geometry[partition]
        finished = True
        for store in self.stores:
            if partition not in store.records or partition in store.finished:
                continue
            if geometry is None or self._copy_features(store, geometry):
                store.finished.add(partition)
            else:
                finished = False
        return finished

    def _copy_geometry(self, record: GeometryRecord) -> bool:
        there = self.writer.geometry(record.partition)
        if there is None:
            with self.claims.hold(geometry_claim(record.partition)) as mine:
                if not mine:
                    return False
                there = self.writer.geometry(record.partition)
                if there is None:
                    self._geometry[record.partition] = self._commit_geometry(record)
                    return True
        self.progress.advance(_size(record), worked=False)
        self._geometry[record.partition] = there if there.digest == record.digest else None
        if there.digest == record.digest:
            self.totals.geometry["reused"] += 1
        else:
            self._fail(
                f"geometry/{record.partition}",
                f"the target has another geometry of it: digest {there.digest[:16]}, the source's is "
                f"{record.digest[:16]}; copy to another cache",
            )
        return True

    def _commit_geometry(self, record: GeometryRecord) -> GeometryRecord | None:
        """The geometry in the target, None where it cannot be copied."""
        try:
            arrays = dict(verified_arrays(self.reader.paths, self.reader.paths.geometry, record))
            made = self.writer.commit_geometry(
                record.partition,
                record.samples,
                arrays,
                broken_views=record.broken_views,
                seconds=record.seconds,
                calibration=record.calibration,
                projection_version=record.projection_version,
            )
        except (CorruptCacheError, DataError, MismatchError) as error:
            self._fail(f"geometry/{record.partition}", str(error))
            return None
        finally:
            self.progress.advance(_size(record))
        self.totals.geometry["copied"] += 1
        self.totals.bytes += _size(made)
        return made

    def _copy_features(self, store: _Store, geometry: GeometryRecord) -> bool:
        record = store.records[geometry.partition]
        if not self._has_features(store, geometry):
            with self.claims.hold(features_claim(store.target.key, geometry.partition)) as mine:
                if not mine:
                    return False
                if not self._has_features(store, geometry):
                    self._commit_features(store, record, geometry)
                    return True
        self.totals.features["reused"] += 1
        self.progress.advance(_size(record), worked=False)
        return True

    def _has_features(self, store: _Store, geometry: GeometryRecord) -> bool:
        there = self.writer.features(store.target, geometry.partition)
        current = (store.target.digest, geometry.digest)
        return there is not None and (there.vfm_digest, there.geometry_digest) == current

    def _commit_features(self, store: _Store, record: FeatureRecord, geometry: GeometryRecord) -> None:
        folder = self.reader.paths.features(store.source.key)
        try:
            arrays = dict(verified_arrays(self.reader.paths, folder, record))
            rows = EncodedRows(table=arrays["table"], scale=arrays.get("scale"))
            made = self.writer.commit_features(
                store.target,
                geometry,
                _encoded_again(rows, store),
                arrays["index"],
                images=record.images,
                broken_views=record.broken_views,
                seconds=record.seconds,
            )
        except (CorruptCacheError, DataError, MismatchError) as error:
            self._fail(f"features/{store.source.key}/{geometry.partition}", str(error))
            return
        finally:
            self.progress.advance(_size(record))
        self.totals.features["copied"] += 1
        self.totals.bytes += _size(made)

    def _fail(self, entry: str, reason: str) -> None:
        self.totals.failures.append((entry, reason))
        self.progress.skipped(entry, reason)

    def _store(self, spec: VFMSpec, codec: str | None) -> _Store | None:
        """What becomes of one VFM's features; None where nothing can decode them, which is noted as a failure."""
        try:
            decoder = self.reader.codec(spec)
        except (CorruptCacheError, DataError, MismatchError) as error:
            self._failed.append((f"features/{spec.key}/codec.json", str(error)))
            return None
        records = self._records(spec)
        if codec is None or codec == spec.codec:
            if spec.codec_digest and not self.same:
                self.writer.create_codec(spec, decoder)
            return _Store(source=spec, target=spec, decoder=None, encoder=None, records=records)
        if spec.codec != "float16":
            log.warning(
                "%s: rows of %s are encoded again as %s: the errors of both add up", spec.key, spec.codec, codec
            )
        target = replace(spec, codec=codec, codec_digest="", explained_variance=None)
        encoder: Codec
        if not needs_fit(codec):
            encoder = make_codec(codec, spec.dim)
        elif (fitted := find_fitted(self.writer.paths, target)) is not None:
            target, encoder = fitted, read_codec(self.writer.paths, fitted)
        else:
            encoder = fit_codec(codec, training_rows(self.reader, spec, sorted(records), quiet=self.quiet))
            target = codec_spec(target, encoder)
            self.writer.create_codec(target, encoder)
        return _Store(source=spec, target=target, decoder=decoder, encoder=encoder, records=records)

    def _records(self, spec: VFMSpec) -> dict[str, FeatureRecord]:
        """Of the source, by partition; those that are damaged, or of another geometry, are noted as failures."""
        found: dict[str, FeatureRecord] = {}
        paths = self.reader.paths
        for path, record in read_documents(paths.records(paths.features(spec.key)), FeatureRecord):
            reason = ""
            if isinstance(record, CorruptCacheError):
                reason = str(record)
            elif record.partition not in self.reader.geometry:
                reason = "its geometry is missing or damaged"
            elif record.vfm_digest != spec.digest:
                reason = f"made by VFM {record.vfm_digest[:16]}, its store is of {spec.digest[:16]}"
            elif record.geometry_digest != self.reader.geometry[record.partition].digest:
                reason = "made from another geometry than the source has now; run `ditr-cache extract` on it again"
            else:
                found[record.partition] = record
            if reason:
                self._failed.append((f"features/{spec.key}/{path.stem}", reason))
        return found


def is_same(reader: CacheReader, target: str | os.PathLike[str]) -> bool:
    """Whether a path or URL names the cache that a reader has open."""
    return location(target).resolve() == reader.paths.root.resolve()


def training_rows(
    reader: CacheReader, spec: VFMSpec, partitions: Sequence[str], *, quiet: bool = True
) -> NDArray[np.float32]:
    """Rows [M, C] float32 of training samples, M at most `FIT_ROWS`, evenly spread over them and within each.

    Where the cache has no split `TRAIN_SPLIT` with features, rows of all samples, which the log says.

    Args:
        reader: of the cache.
        spec: of the VFM.
        partitions: those that have features.
        quiet: show no progress.

    Raises:
        DataError: there is no row that can be read.
    """
    infos = [sample for partition in partitions for sample in reader.geometry[partition].samples]
    ids = [sample.id for sample in infos if sample.split == TRAIN_SPLIT]
    if not ids:
        log.warning(
            "cache %r has no features of a split %r: the codec is fitted to rows of all of its splits (%s)",
            str(reader.paths.root), TRAIN_SPLIT, ", ".join(sorted({s.split for s in infos})) or "none",
        )  # fmt: skip
        ids = [sample.id for sample in infos]
    ids = [ids[i] for i in spread(len(ids), FIT_SAMPLES)]
    parts = []
    with TaskProgress("read training rows", len(ids), unit="samples", quiet=quiet) as progress:
        for sample_id in ids:
            try:
                stored = reader.read_stored(sample_id, spec.key).features
                assert stored is not None
                rows = stored.take(spread(stored.rows, FIT_ROWS // len(ids)))
            except CorruptCacheError as error:
                log.warning("sample %r is left out of the fit: %s", sample_id, error)
            else:
                parts.append(stored.codec.decode(rows.table, rows.scale))
            progress.advance(1)
    if not sum(map(len, parts)):
        raise DataError(
            f"cache {str(reader.paths.root)!r}: no row of {spec.key!r} to fit a codec to; look at its coverage with "
            "`ditr-cache info`"
        )
    return np.concatenate(parts)


def spread(count: int, most: int) -> NDArray[np.int64]:
    """At most that many of the positions 0 to count - 1, ascending, at even distances."""
    return (np.arange(min(count, most), dtype=np.int64) * count) // max(1, min(count, most))


def _encoded_again(rows: EncodedRows, store: _Store) -> EncodedRows:
    if store.decoder is None or store.encoder is None:
        return rows
    step = max(1, BLOCK_VALUES // store.source.dim)
    parts = []
    for first in range(0, max(1, len(rows.table)), step):
        of = slice(first, first + step)
        block = store.decoder.decode(rows.table[of], None if rows.scale is None else rows.scale[of])
        parts.append(store.encoder.encode(block))
    return concatenate_rows(parts)


def _chosen(reader: CacheReader, request: CopyRequest, *, same: bool) -> list[VFMSpec]:
    """The VFMs that are asked for. Raises `UsageError` where the request would do nothing, or one thing twice."""
    if request.codec is not None:
        check_codec(request.codec)
    named = [reader.resolve_vfm(vfm) for vfm in request.vfms]
    specs = list(dict.fromkeys(named)) or [reader.vfms[key] for key in sorted(reader.vfms)]
    if request.codec is None and same:
        raise UsageError("source and target are the same cache; name another target, or a --codec to add beside")
    if same:  # beside what is to be encoded again stands what an earlier run made of it
        specs = [spec for spec in specs if spec.codec != request.codec]
    if request.codec is not None and not specs:
        raise UsageError(
            f"cache {str(reader.paths.root)!r} has no features that are not {request.codec} already"
            if reader.vfms
            else f"cache {str(reader.paths.root)!r} holds no features to encode as {request.codec}"
        )
    becomes: dict[VFMSpec, str] = {}
    for spec in specs:
        target = spec if request.codec is None else replace(
            spec, codec=request.codec, codec_digest="", explained_variance=None
        )  # fmt: skip
        if target in becomes:
            raise UsageError(
                f"{becomes[target]!r} and {spec.key!r} would become the same store under {request.codec}; name one by "
                "--vfm"
            )
        becomes[target] = spec.key
    return specs


def _try_codec(specs: Sequence[VFMSpec], codec: str | None) -> None:
    """Encode one row, so that what the codec needs and this installation lacks is told before anything is copied."""
    if codec is not None and not needs_fit(codec):
        for spec in specs:
            make_codec(codec, spec.dim).encode(np.zeros((1, spec.dim), np.float32))


def _damaged(reader: CacheReader, *, every_vfm: bool) -> list[tuple[str, str]]:
    """Documents of a cache that its reader left out: of partitions and, where all are asked for, of VFMs."""
    paths = reader.paths
    known = {file_name(partition) for partition in reader.geometry}
    found = [
        (f"geometry/{path.stem}", str(error))
        for path, error in read_documents(
            [p for p in paths.records(paths.geometry) if p.stem not in known], GeometryRecord
        )
        if isinstance(error, CorruptCacheError)
    ]
    if every_vfm:
        keys = {file_name(key) for key in reader.vfms}
        documents = [store / "vfm.json" for store in paths.stores if store.name not in keys]
        found += [
            (f"features/{path.parent.name}/vfm.json", str(error))
            for path, error in read_documents(documents, VFMSpec)
            if isinstance(error, CorruptCacheError)
        ]
    return found


def _size(record: GeometryRecord | FeatureRecord) -> int:
    return sum(record.files.values())
