"""Compare features of the same points in two caches: how alike they are, what they take, what a linear probe sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditr_cache.cached import StoredSample
from ditr_cache.errors import DataError, MismatchError, MissingDataError, UnknownNameError, UsageError
from ditr_cache.fitted_codecs import TRAIN_SPLIT
from ditr_cache.ridge import LinearProbe, NormalEquations, class_iou, count_pairs, mean_iou
from ditr_cache.schema import FeatureRecord, VFMSpec
from ditr_cache.store import CacheReader, open_cache
from ditr_cache.task_progress import TaskProgress
from ditr_cache.transcode import spread

VAL_SPLIT = "val"
"""The split that is compared and judged, where none is named."""

POINTS = 500_000
"""Points that are compared, and that train a probe, where no number is given."""

LEAST_PER_SAMPLE = 500
"""Points of a sample where there are many: fewer samples are read then, evenly spread."""

PERCENTILES = (0.1, 1, 5, 50)


@dataclass(frozen=True, kw_only=True)
class CompareRequest:
    """One call of `ditr-cache compare`.

    Args:
        cache_a, cache_b: paths or URLs.
        vfm_a, vfm_b: keys or names; None: the only one of the cache.
        split: the samples that are compared, and that probes are judged on; None: `val`, all where there is none.
        points: most points that are compared, and most that train a probe; evenly spread over samples.
    """

    cache_a: str
    cache_b: str
    vfm_a: str | None = None
    vfm_b: str | None = None
    split: str | None = None
    points: int = POINTS


@dataclass(frozen=True, kw_only=True)
class StoreFigures:
    """What one of the two takes and tells.

    Args:
        cache, spec: which one.
        bytes, rows, points, valid_points: of all of its committed features; points of their samples, and those of them
            that have a feature.
        iou: of each class on the judged points, None for absent classes; None without a probe.
        miou: their mean.
    """

    cache: str
    spec: VFMSpec
    bytes: int
    rows: int
    points: int
    valid_points: int
    iou: dict[str, float | None] | None = None
    miou: float | None = None

    @property
    def coverage(self) -> float:
        """Fraction of the points that have a feature."""
        return self.valid_points / self.points if self.points else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Part of the object that `compare --json` prints."""
        return {
            "cache": self.cache,
            "vfm": self.spec.key,
            "codec": self.spec.codec,
            "layout": self.spec.layout,
            "dim": self.spec.dim,
            "bytes": self.bytes,
            "bytes_per_point": round(self.bytes / max(1, self.points), 3),
            "bytes_per_row": round(self.bytes / max(1, self.rows), 3),
            "coverage": round(self.coverage, 6),
            "mIoU": self.miou,
            "IoU": self.iou,
        }


@dataclass(kw_only=True)
class Comparison:
    """What was found.

    Args:
        split: that was compared; None: all.
        samples, points: compared.
        train_points, judged_points: of the probes; 0 without.
        a, b: the two.
        cosine: `p0.1`, `p1`, `p5`, `p50` and `mean` over the compared points; None where widths differ.
        notes: what was left out, and why.
    """

    split: str | None
    samples: int
    points: int
    train_points: int
    judged_points: int
    a: StoreFigures
    b: StoreFigures
    cosine: dict[str, float] | None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The object that `compare --json` prints."""
        return {
            "split": self.split,
            "samples": self.samples,
            "points": self.points,
            "cosine": self.cosine,
            "a": self.a.to_dict(),
            "b": self.b.to_dict(),
            "probe": {"train_points": self.train_points, "judged_points": self.judged_points}
            if self.judged_points
            else None,
            "notes": self.notes,
        }

    def lines(self) -> list[str]:
        """For people."""
        a, b = self.a.to_dict(), self.b.to_dict()
        rows = [
            ("codec", [f"{s['codec']}, {s['layout']}, {s['dim']}-d" for s in (a, b)]),
            ("bytes per point", [f"{s['bytes_per_point']:.1f}" for s in (a, b)]),
            ("bytes per row", [f"{s['bytes_per_row']:.1f}" for s in (a, b)]),
            ("coverage", [f"{s['coverage']:.1%}" for s in (a, b)]),
        ]
        if self.judged_points:
            rows.append(("probe mIoU", [f"{s['mIoU']:.4f}" for s in (a, b)]))
        lines = [
            f"A: {a['vfm']} of {a['cache']}",
            f"B: {b['vfm']} of {b['cache']}",
            f"{'split ' + self.split if self.split else 'all splits'}: {self.samples} samples, {self.points} points",
            *(f"  {name:<16} A {of_a:<24} B {of_b}" for name, (of_a, of_b) in rows),
        ]
        if self.cosine is not None:
            figures = ", ".join(f"{name} {value:.6f}" for name, value in self.cosine.items())
            lines.append(f"  cosine of A and B: {figures}")
        return [*lines, *(f"note: {note}" for note in self.notes)]


def compare(request: CompareRequest, *, quiet: bool = False) -> Comparison:
    """Compare point by point the samples that both caches have. In memory are one sample of each, and [C, C] sums.

    Points are the same where both caches have the same geometry of a sample, or the same points (by `source_index`) at
    the same coordinates. A probe is fitted for each cache, to the same points of the split `train`, and judged on the
    same compared points of `split`: those with a label, and a feature in both.

    Raises:
        UsageError, UnknownNameError: no such VFM or split, or a number of points that is none.
        MissingDataError: no sample in common.
        MismatchError: a sample has other points in the other cache.
        CorruptCacheError: what has to be read is damaged.
        DataError: labels beyond the classes.
    """
    if request.points < 1:
        raise UsageError(f"points: expected at least 1, got {request.points}")
    return _Comparer(request).run(quiet)


@dataclass(frozen=True)
class _Side:
    reader: CacheReader
    spec: VFMSpec

    @property
    def name(self) -> str:
        return f"{self.spec.key!r} of {str(self.reader.paths.root)!r}"

    def figures(self) -> StoreFigures:
        records: dict[str, FeatureRecord] = {}
        for partition in self.reader.geometry:
            record = self.reader.feature_record(self.spec, partition)
            if record is not None:
                records[partition] = record
        return StoreFigures(
            cache=str(self.reader.paths.root),
            spec=self.spec,
            bytes=sum(sum(r.files.values()) for r in records.values()),
            rows=sum(r.rows for r in records.values()),
            points=sum(s.points for p in records for s in self.reader.geometry[p].samples),
            valid_points=sum(sum(r.valid_points) for r in records.values()),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pair:
    """One sample in both caches.

    Args:
        id: its id.
        a, b: it, with its features.
        order: [N] where in `b` each point of `a` stands; None where they stand alike.
    """

    id: str
    a: StoredSample
    b: StoredSample
    order: NDArray[np.int64] | None

    @property
    def valid(self) -> NDArray[np.bool_]:
        """[N] whether both have a feature for a point, in the order of `a`."""
        assert self.a.features is not None and self.b.features is not None
        of_b = self.b.features.index >= 0
        return (self.a.features.index >= 0) & (of_b if self.order is None else of_b[self.order])


class _Comparer:
    def __init__(self, request: CompareRequest) -> None:
        self.points = request.points
        reader_a = open_cache(request.cache_a)
        reader_b = reader_a if request.cache_b == request.cache_a else open_cache(request.cache_b)
        self.a = _Side(reader_a, reader_a.resolve_vfm(request.vfm_a))
        self.b = _Side(reader_b, reader_b.resolve_vfm(request.vfm_b))
        of_b = set(reader_b.samples_with(self.b.spec.key))
        self.ids = [i for i in reader_a.samples_with(self.a.spec.key) if i in of_b]
        if not self.ids:
            raise MissingDataError(
                f"no sample has features of {self.a.name} and of {self.b.name}; expected the same ids"
            )
        self.notes: list[str] = []
        self.split = self._resolve_split(request.split)
        self.ignored = reader_a.metadata.ignore_index
        self.names = reader_a.metadata.class_names
        labelled = (record for record in reader_a.geometry.values() if "segment" in record.arrays)
        self._labelled = {sample.id for record in labelled for sample in record.samples}

    def run(self, quiet: bool) -> Comparison:
        """Fit the probes, then go through what is compared."""
        judged = self._ids_of(self.split)
        train = self._ids_of(TRAIN_SPLIT) if self._probes_apply(judged) else []
        with TaskProgress("compare", 2 * len(train) + len(judged), unit="samples", quiet=quiet) as self.progress:
            probes, train_points = self._fit(train)
            cosines, counts = self._judge(judged, probes)
        figures = [self.a.figures(), self.b.figures()]
        if counts is not None and counts[0].any():
            figures = [
                StoreFigures(**vars(of) | {"miou": mean_iou(found), "iou": self._by_name(found)})
                for of, found in zip(figures, counts, strict=True)
            ]
        elif counts is not None:
            self.notes.append(f"no probe: no compared point of split {self.split!r} has a label")
            counts = None
        if not len(cosines):
            self.notes.append("no point has a feature in both caches")
        elif self.a.spec.dim != self.b.spec.dim:
            self.notes.append(f"no cosine: features are {self.a.spec.dim}-d and {self.b.spec.dim}-d")
        return Comparison(
            split=self.split,
            samples=len(judged),
            points=len(cosines),
            train_points=train_points if counts is not None else 0,
            judged_points=int(counts[0].sum()) if counts is not None else 0,
            a=figures[0],
            b=figures[1],
            cosine=_summary(cosines) if len(cosines) and self.a.spec.dim == self.b.spec.dim else None,
            notes=self.notes,
        )

    def _resolve_split(self, split: str | None) -> str | None:
        splits = {self.a.reader.sample_info(i).split for i in self.ids}
        if split is not None and split not in splits:
            raise UnknownNameError.of("split of the samples that both caches have", split, splits)
        if split is None and VAL_SPLIT not in splits:
            self.notes.append(f"no split {VAL_SPLIT!r}: all splits are compared ({', '.join(sorted(splits))})")
            return None
        return split or VAL_SPLIT

    def _ids_of(self, split: str | None) -> list[str]:
        """Evenly spread samples of a split (of all for None), as many as give `LEAST_PER_SAMPLE` points each."""
        ids = [i for i in self.ids if split is None or self.a.reader.sample_info(i).split == split]
        return [ids[i] for i in spread(len(ids), max(1, self.points // LEAST_PER_SAMPLE))]

    def _probes_apply(self, judged: Sequence[str]) -> bool:
        train = self._ids_of(TRAIN_SPLIT)
        if self.split is None:
            reason = f"no split {VAL_SPLIT!r} to judge it on; name one by --split"
        elif not train:
            reason = f"no split {TRAIN_SPLIT!r} to fit it to"
        elif not self.names or not self._labelled.issuperset([*train, *judged]):
            reason = "no labels"
        else:
            if self.split == TRAIN_SPLIT:
                self.notes.append("probes are judged on the split that they are fitted to")
            return True
        self.notes.append(f"no probe: {reason}")
        return False

    def _fit(self, ids: Sequence[str]) -> tuple[list[LinearProbe], int]:
        """A probe of each side, and the number of points that they are fitted to; none without samples."""
        counts = np.zeros(len(self.names), dtype=np.int64)
        chosen: list[NDArray[np.int64]] = []
        for sample_id in ids:  # weights of classes follow from all points, so these are chosen before any is added
            pair = self._pair(sample_id)
            labels = self._labels(pair.a)
            candidates = np.flatnonzero(pair.valid & (labels >= 0))
            points = candidates[spread(len(candidates), self.points // len(ids))]
            counts += np.bincount(labels[points], minlength=len(counts))
            chosen.append(points)
            self.progress.advance(1)
        if ids and np.count_nonzero(counts) < 2:
            self.notes.append(
                f"no probe: points of split {TRAIN_SPLIT!r} with a label and a feature in both caches are of "
                f"{np.count_nonzero(counts)} classes, two are needed"
            )
            self.progress.advance(len(ids))
            return [], 0
        equations = [NormalEquations(side.spec.dim, counts) for side in (self.a, self.b)]
        for sample_id, points in zip(ids, chosen, strict=True):
            pair = self._pair(sample_id)
            labels = self._labels(pair.a)[points]
            for sums, features in zip(equations, self._features(pair, points), strict=True):
                sums.add(features, labels)
            self.progress.advance(1)
        return [sums.solve() for sums in equations] if ids else [], int(counts.sum())

    def _judge(
        self, ids: Sequence[str], probes: Sequence[LinearProbe]
    ) -> tuple[NDArray[np.float32], list[NDArray[np.int64]] | None]:
        """Cosines [P] of the compared points (zeros where widths differ), and the pairs of classes of each probe."""
        classes = len(self.names)
        counts = [np.zeros((classes, classes), dtype=np.int64) for _ in probes]
        parts = [np.empty(0, np.float32)]
        for sample_id in ids:
            pair = self._pair(sample_id)
            candidates = np.flatnonzero(pair.valid)
            points = candidates[spread(len(candidates), self.points // len(ids))]
            both = self._features(pair, points)
            same_width = both[0].shape == both[1].shape
            parts.append(cosine(*both) if same_width else np.zeros(len(points), np.float32))
            if probes:
                labels = self._labels(pair.a)[points]
                for found, probe, features in zip(counts, probes, both, strict=True):
                    found += count_pairs(probe.predict(features[labels >= 0]), labels[labels >= 0], classes)
            self.progress.advance(1)
        return np.concatenate(parts), counts or None

    def _pair(self, sample_id: str) -> _Pair:
        a, b = (side.reader.read_stored(sample_id, side.spec.key) for side in (self.a, self.b))
        same = np.array_equal(a.source_index, b.source_index) and np.array_equal(a.coord, b.coord)
        return _Pair(id=sample_id, a=a, b=b, order=None if same else self._order(a, b))

    def _order(self, a: StoredSample, b: StoredSample) -> NDArray[np.int64]:
        """[N] where in `b` each point of `a` stands."""
        of_a, of_b = np.argsort(a.source_index, kind="stable"), np.argsort(b.source_index, kind="stable")
        order = np.empty(len(of_a), dtype=np.int64)
        where = f"sample {a.id!r} of {self.a.name} and of {self.b.name}"
        if not np.array_equal(a.source_index[of_a], b.source_index[of_b]):
            raise MismatchError(
                f"{where}: expected the same points, got {len(of_a)} and {len(of_b)}, of which "
                f"{len(np.intersect1d(a.source_index, b.source_index))} are the same; extract both from the same data"
            )
        order[of_a] = of_b
        moved = np.flatnonzero((a.coord != b.coord[order]).any(axis=1))
        if len(moved):
            raise MismatchError(
                f"{where}: expected points at the same coordinates, {len(moved)} are elsewhere, for example "
                f"{a.source_index[moved[0]]}: {a.coord[moved[0]].tolist()} and {b.coord[order[moved[0]]].tolist()}; "
                "extract both from the same data"
            )
        return order

    def _features(self, pair: _Pair, points: NDArray[np.int64]) -> list[NDArray[np.float32]]:
        """Features [n, C] of chosen points of `a`, which both sides have."""
        of_b = points if pair.order is None else pair.order[points]
        return [_decoded(self.a, pair.a, points), _decoded(self.b, pair.b, of_b)]

    def _labels(self, sample: StoredSample) -> NDArray[np.int64]:
        """[N] int64 labels, -1 where ignored. Raises `DataError` for labels beyond the classes."""
        assert sample.segment is not None
        labels = np.where(sample.segment == self.ignored, -1, sample.segment.astype(np.int64))
        low, high = int(labels.min(initial=-1)), int(labels.max(initial=-1))
        if low < -1 or high >= len(self.names):
            raise DataError(
                f"sample {sample.id!r}: expected labels 0 to {len(self.names) - 1}, or {self.ignored} (ignored), got "
                f"{low} to {high}; extract the dataset again"
            )
        return labels

    def _by_name(self, counts: NDArray[np.int64]) -> dict[str, float | None]:
        return dict(zip(self.names, class_iou(counts), strict=True))


def _decoded(side: _Side, sample: StoredSample, points: NDArray[np.int64]) -> NDArray[np.float32]:
    """[n, C] of points that have a feature; in the layout `views` the mean over their views."""
    if side.spec.layout == "views":
        feature = side.reader.read(sample.id, side.spec.key).feature
        assert feature is not None
        return feature[points]
    assert sample.features is not None
    rows, where = np.unique(sample.features.index[points], return_inverse=True)
    stored = sample.features.take(rows)
    return sample.features.codec.decode(stored.table, stored.scale)[where]


def cosine(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float32]:
    """[n] float32 cosine of rows [n, C]; two zero rows are alike (1), a zero row and another are not (0)."""
    # Each is divided by its peak first: squares of what float32 holds need not be float64.
    peak_a, peak_b = (np.abs(x).max(axis=1, initial=0.0, keepdims=True).astype(np.float64) for x in (a, b))
    unit_a, unit_b = (x / np.where(peak > 0, peak, 1) for x, peak in ((a, peak_a), (b, peak_b)))
    norms = np.sqrt(np.square(unit_a).sum(axis=1) * np.square(unit_b).sum(axis=1))
    found = np.einsum("nc,nc->n", unit_a, unit_b) / np.where(norms > 0, norms, 1)
    both_zero = (peak_a[:, 0] == 0) & (peak_b[:, 0] == 0)
    return np.where(both_zero, 1.0, np.clip(found, -1, 1)).astype(np.float32)


def _summary(cosines: NDArray[np.float32]) -> dict[str, float]:
    values = np.percentile(cosines.astype(np.float64), PERCENTILES)
    found = {f"p{p:g}": round(float(v), 7) for p, v in zip(PERCENTILES, values, strict=True)}
    return found | {"mean": round(float(cosines.mean(dtype=np.float64)), 7)}
