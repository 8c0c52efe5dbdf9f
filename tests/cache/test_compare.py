"""`ditr-cache compare`: the same points, whatever their order; figures against plain numpy; probes that can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ditr_cache import compare as module
from ditr_cache import open_cache
from ditr_cache.codecs import make_codec
from ditr_cache.compare import CompareRequest, Comparison, compare, cosine
from ditr_cache.errors import MismatchError, MissingDataError, UnknownNameError, UsageError
from ditr_cache.ridge import NormalEquations, count_pairs, mean_iou
from ditr_cache.schema import SampleInfo, VFMSpec, ViewInfo
from ditr_cache.store import CacheWriter
from ditr_cache.transcode import CopyRequest, copy
from support import Run

SAMPLES = {"room-0": "train", "room-1": "train", "room-2": "val"}
POINTS, CLASSES, DIM = 300, 3, 6


def write_cache(
    path: Path,
    metadata: Callable[..., Any],
    *specs: VFMSpec,
    noise: float = 0.3,
    order: int | None = None,
    splits: dict[str, str] = SAMPLES,
    labels: bool = True,
    moved: float = 0.0,
) -> Path:
    """A cache whose features tell the labels, up to noise; `order` is the seed of the points' order."""
    names = ("floor", "wall", "chair", "absent")
    writer = CacheWriter.create(path, metadata(class_names=names, class_colors=((0, 0, 0),) * 4))
    for number, (name, split) in enumerate(splits.items()):
        rng = np.random.default_rng(number)
        coord = rng.normal(size=(POINTS, 3)).astype(np.float32)
        coord[7] += moved
        segment = rng.choice([-1, 0, 1, 2], p=[0.1, 0.6, 0.2, 0.1], size=POINTS).astype(np.int16)
        means = np.random.default_rng(99).normal(size=(CLASSES + 1, DIM)) * 2
        clean = means[segment] + rng.normal(size=(POINTS, DIM)) * 0.2
        unseen = rng.random(POINTS) < 0.1
        turned = np.arange(POINTS) if order is None else np.random.default_rng([order, number]).permutation(POINTS)
        link = np.flatnonzero(~unseen[turned])
        info = SampleInfo(
            id=name, split=split, points=POINTS, linked_points=len(link), views=(ViewInfo(id="v", links=len(link)),)
        )
        arrays = {
            "coord": coord[turned], "source_index": turned.astype(np.uint32), "offset": np.array([POINTS]),
            "link_point": link.astype(np.uint32), "link_uv": np.zeros((len(link), 2), np.uint16),
            "link_depth": np.ones(len(link), np.float16),
        }  # fmt: skip
        if labels:
            arrays["segment"] = segment[turned]
        geometry = writer.commit_geometry(name, [info], arrays)
        for spec in specs:
            rows = (clean + np.random.default_rng([number, 5]).normal(size=clean.shape) * noise)[turned][link]
            rows = np.tile(rows, spec.dim // DIM).astype(np.float32)
            index = np.full(POINTS, -1, np.int32)
            index[link] = np.arange(len(link))
            writer.commit_features(spec, geometry, make_codec(spec.codec, spec.dim).encode(rows), index, images=1)
    return path


@pytest.fixture(scope="module")
def spec(make_spec: Callable[..., VFMSpec]) -> VFMSpec:
    return make_spec(dim=DIM)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, make_metadata, spec: VFMSpec) -> Path:
    return write_cache(tmp_path_factory.mktemp("a") / "cache", make_metadata, spec)


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The same under int8."""
    path = tmp_path_factory.mktemp("b") / "cache"
    copy(CopyRequest(source=str(cache), target=str(path), codec="int8"), quiet=True)
    return path


def compared(a: Path, b: Path, **options: Any) -> Comparison:
    return compare(CompareRequest(cache_a=str(a), cache_b=str(b), **options), quiet=True)


def plain_cosines(a: Path, b: Path, sample: str) -> NDArray[np.float64]:
    one, two = (open_cache(c).read(sample) for c in (a, b))
    both = one.valid & two.valid
    x, y = one.feature[both].astype(np.float64), two.feature[both].astype(np.float64)
    return np.array([v @ w / np.sqrt((v @ v) * (w @ w)) for v, w in zip(x, y, strict=True)])


# --- figures --------------------------------------------------------------------------------------------------------


def test_cosine_and_bytes(cache: Path, coarse: Path) -> None:
    found = compared(cache, coarse)
    expected = plain_cosines(cache, coarse, "room-2")
    assert (found.split, found.samples, found.points, found.notes) == ("val", 1, len(expected), [])
    assert found.cosine is not None and found.cosine.keys() == {"p0.1", "p1", "p5", "p50", "mean"}
    for name, value in found.cosine.items():
        of = expected.mean() if name == "mean" else np.percentile(expected, float(name[1:]))
        assert value == pytest.approx(of, abs=2e-7)
    assert found.cosine["p0.1"] < found.cosine["mean"] < 1
    for side, path in ((found.a, cache), (found.b, coarse)):
        reader = open_cache(path)
        records = [reader.feature_record(side.spec, p) for p in reader.geometry]
        size = sum(sum(r.files.values()) for r in records)
        assert side.to_dict()["bytes_per_point"] == pytest.approx(size / (3 * POINTS), abs=1e-3)
        assert side.to_dict()["bytes_per_row"] == pytest.approx(size / sum(r.rows for r in records), abs=1e-3)
        assert side.coverage == pytest.approx(sum(r.valid_points[0] for r in records) / (3 * POINTS))


def test_probes_are_what_plain_numpy_finds(cache: Path, coarse: Path) -> None:
    found = compared(cache, coarse)
    for side, path in ((found.a, cache), (found.b, coarse)):
        reader = open_cache(path)
        train, val = ([reader.read(i) for i in reader.split_ids(s)] for s in ("train", "val"))

        def labelled(samples: list[Any]) -> tuple[NDArray, NDArray]:
            kept = [s.valid & (s.segment >= 0) for s in samples]
            x = np.concatenate([s.feature[k] for s, k in zip(samples, kept, strict=True)])
            return x, np.concatenate([s.segment[k] for s, k in zip(samples, kept, strict=True)]).astype(np.int64)

        x, y = labelled(train)
        sums = NormalEquations(DIM, np.bincount(y, minlength=4))
        sums.add(x, y)
        x_val, y_val = labelled(val)
        counts = count_pairs(sums.solve().predict(x_val), y_val, 4)
        assert side.miou == pytest.approx(mean_iou(counts)) and found.judged_points == len(y_val)
        assert side.iou is not None and side.iou["absent"] is None and found.train_points == len(y)
    assert found.a.miou is not None and 0.7 < found.a.miou <= 1


def test_noise_lowers_the_probe(cache: Path, tmp_path: Path, make_metadata, spec: VFMSpec) -> None:
    noisy = write_cache(tmp_path / "noisy", make_metadata, replace(spec, name="noisy"), noise=6.0)
    found = compared(cache, noisy)
    assert found.a.miou is not None and found.b.miou is not None and found.b.miou < found.a.miou - 0.2
    assert found.cosine is not None and found.cosine["mean"] < 0.9


def test_a_cache_is_like_itself(cache: Path) -> None:
    found = compared(cache, cache)
    assert found.cosine == pytest.approx({"p0.1": 1, "p1": 1, "p5": 1, "p50": 1, "mean": 1}, abs=1e-7)
    assert found.a == found.b


def test_two_vfms_of_one_cache(tmp_path: Path, make_metadata, spec: VFMSpec) -> None:
    wide = replace(spec, name="wide", dim=2 * DIM)
    path = write_cache(tmp_path / "cache", make_metadata, spec, wide)
    with pytest.raises(UsageError, match="several VFMs"):
        compared(path, path)
    found = compared(path, path, vfm_a=spec.key, vfm_b="wide")
    assert found.cosine is None and found.notes == ["no cosine: features are 6-d and 12-d"]
    assert found.a.miou == pytest.approx(found.b.miou, abs=0.02) and found.points > 0


def test_fewer_points(cache: Path, coarse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compared(cache, coarse, points=50).points == 50
    found = compared(cache, coarse, points=600)
    assert found.train_points <= 600 and found.samples == 1
    monkeypatch.setattr(module, "LEAST_PER_SAMPLE", 40)
    found = compared(cache, coarse, points=40, split="train")
    assert (found.samples, found.points) == (1, 40)
    with pytest.raises(UsageError, match="at least 1"):
        compared(cache, coarse, points=0)


def test_layouts_compare(tmp_path: Path, make_metadata, spec: VFMSpec, cache: Path) -> None:
    """Tokens of all views, their mean taken at reading, are what `fused` stored."""
    path = tmp_path / "views"
    copy(CopyRequest(source=str(cache), target=str(path)), quiet=True)
    writer, reader = CacheWriter(path), open_cache(cache)
    viewed = replace(spec, layout="views", fuse="none")
    for partition, geometry in reader.geometry.items():
        stored = reader.read_stored(partition, spec.key).features
        rows = make_codec("float16", spec.dim).encode(stored.decoded())
        writer.commit_features(viewed, geometry, rows, np.arange(stored.rows, dtype=np.int32), images=1)
    found = compared(path, path, vfm_a=spec.key, vfm_b=viewed.key)
    assert found.cosine is not None and found.cosine["p0.1"] == pytest.approx(1, abs=1e-6)
    assert found.a.miou == found.b.miou and found.a.coverage == found.b.coverage


# --- the same points ------------------------------------------------------------------------------------------------


def test_points_in_another_order(cache: Path, tmp_path: Path, make_metadata, spec: VFMSpec) -> None:
    turned = write_cache(tmp_path / "turned", make_metadata, spec, order=1)
    digests = [{p: r.digest for p, r in open_cache(c).geometry.items()} for c in (cache, turned)]
    assert digests[0] != digests[1]
    # The unseen points are others: what only one has takes no part.
    found = compared(cache, turned)
    one, two = (open_cache(c).read("room-2") for c in (cache, turned))
    both = one.valid[np.argsort(one.source_index)] & two.valid[np.argsort(two.source_index)]
    assert found.points == both.sum() and found.cosine is not None
    assert found.cosine["p0.1"] == pytest.approx(1, abs=1e-6)
    assert found.a.miou == pytest.approx(found.b.miou)


def test_other_points_are_refused(cache: Path, tmp_path: Path, make_metadata, spec: VFMSpec) -> None:
    moved = write_cache(tmp_path / "moved", make_metadata, spec, moved=0.5)
    with pytest.raises(MismatchError, match=r"sample 'room-0'.*1 are elsewhere.* 7: "):
        compared(cache, moved)
    fewer = tmp_path / "fewer"
    writer = CacheWriter.create(fewer, open_cache(cache).metadata)
    reader = open_cache(cache)
    for partition, record in reader.geometry.items():
        arrays = CacheWriter(cache).read_arrays(record, tuple(record.arrays))
        arrays["source_index"] = arrays["source_index"] + np.uint32(1)
        geometry = writer.commit_geometry(partition, record.samples, arrays)
        stored = reader.read_stored(partition, spec.key).features
        writer.commit_features(spec, geometry, stored.encoded, stored.index, images=1)
    with pytest.raises(MismatchError, match=r"expected the same points, got 300 and 300, of which 299 are the same"):
        compared(cache, fewer)
    other = write_cache(tmp_path / "other", make_metadata, spec, splits={"elsewhere": "val"})
    with pytest.raises(MissingDataError, match="same ids"):
        compared(cache, other)


# --- what cannot be judged ------------------------------------------------------------------------------------------


def test_without_labels_there_is_no_probe(tmp_path: Path, make_metadata, spec: VFMSpec) -> None:
    path = write_cache(tmp_path / "cache", make_metadata, spec, labels=False)
    found = compared(path, path)
    assert found.notes == ["no probe: no labels"] and found.a.miou is None and found.to_dict()["probe"] is None
    assert found.cosine is not None and not any("mIoU" in line for line in found.lines())


def test_without_splits_all_is_compared(tmp_path: Path, make_metadata, spec: VFMSpec) -> None:
    path = write_cache(tmp_path / "cache", make_metadata, spec, splits={"x": "all", "y": "all"})
    found = compared(path, path)
    assert found.split is None and found.samples == 2
    assert [n.split(":")[0] for n in found.notes] == ["no split 'val'", "no probe"]
    found = compared(path, path, split="all")
    assert found.notes == ["no probe: no split 'train' to fit it to"] and found.samples == 2
    with pytest.raises(UnknownNameError, match="did you mean 'all'"):
        compared(path, path, split="al")


def test_judged_on_what_it_was_fitted_to(cache: Path, coarse: Path) -> None:
    found = compared(cache, coarse, split="train")
    assert found.notes == ["probes are judged on the split that they are fitted to"] and found.samples == 2


def test_a_single_class_is_no_probe(
    cache: Path, coarse: Path, tmp_path: Path, make_metadata, spec: VFMSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module._Comparer, "_labels", lambda self, sample: np.zeros(len(sample.coord), np.int64))
    found = compared(cache, coarse)
    assert found.a.miou is None and found.judged_points == 0 and "are of 1 classes" in found.notes[0]


# --- rows -----------------------------------------------------------------------------------------------------------


def test_cosine_of_extreme_rows() -> None:
    tiny, huge = np.float32(1e-38), np.float32(3e38)
    a = np.array([[0, 0], [0, 0], [tiny, 0], [huge, huge], [1, 1]], np.float32)
    b = np.array([[0, 0], [1, 2], [huge, 0], [huge, -huge], [-1, -1]], np.float32)
    np.testing.assert_allclose(cosine(a, b), [1, 0, 1, 0, -1], atol=1e-7)
    assert cosine(a[:0], b[:0]).shape == (0,)


def test_the_command(run: Run, cache: Path, coarse: Path) -> None:
    outcome = run("compare", cache, coarse, "--json")
    assert outcome.code == 0 and outcome.err == ""
    assert set(outcome.json) == {"split", "samples", "points", "cosine", "a", "b", "probe", "notes"}
    keys = "cache vfm codec layout dim bytes bytes_per_point bytes_per_row coverage mIoU IoU"
    assert set(outcome.json["a"]) == set(outcome.json["b"]) == set(keys.split())
    assert outcome.json["b"]["codec"] == "int8" and outcome.json["probe"]["judged_points"] > 0
    outcome = run("compare", cache, coarse, "--vfm-a", "fake", "--split", "val", "--points", 100)
    assert outcome.code == 0 and "ETA 0 s" in outcome.err
    for text in ("probe mIoU", "bytes per point", "coverage", "p0.1", "mean", "100 points"):
        assert text in outcome.out
    assert run("compare", cache).code == 2
    assert run("compare", cache, cache.parent).code == 2


@pytest.mark.parametrize("command", ["du", "rm", "copy", "compare"])
def test_help_has_examples(run: Run, command: str) -> None:
    outcome = run(command, "--help")
    assert outcome.code == 0 and f"ditr-cache {command} " in outcome.out.partition("Options:")[0].partition("\n")[2]
    assert command in run("--help").out
