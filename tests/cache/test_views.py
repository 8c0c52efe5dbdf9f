"""Layout `views`: every linked token stored once; the reader gives each point the token of one view, or the mean."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditr_cache import open_cache
from ditr_cache.arrays import ArrayGroup
from ditr_cache.cached import VIEW_CHOICES
from ditr_cache.errors import MismatchError, UnknownNameError, UsageError
from ditr_cache.extract import ExtractRequest
from ditr_cache.extract import extract as run_extract
from ditr_cache.partition import ExtractSettings
from ditr_cache.plan import estimate
from ditr_cache.schema import SampleInfo, VFMSpec, ViewInfo
from ditr_cache.store import CacheWriter
from ditr_cache.verify import verify
from ditr_cache.vfm import VFMRequest
from ditr_cache.views import LinkedRows
from plain_rows import decode, encode
from support import Outcome, Run, assert_same

ROOMS = ["scene0000_00", "scene0001_00", "scene0002_00"]


# --- links of one sample --------------------------------------------------------------------------------------------


@dataclass
class Case:
    """Random links, and what sees each point by plain loops."""

    links: LinkedRows
    depth: np.ndarray
    rows: int

    @classmethod
    def make(cls, seed: int, points: int = 40, views: int = 4, rows: int = 9, dropped: frozenset[int] = frozenset()):
        rng = np.random.default_rng(seed)
        seen = [np.flatnonzero(rng.random(points) < rng.random()) for _ in range(views)]
        point = np.concatenate([*seen, np.zeros(0, np.int64)]).astype(np.uint32)
        row = [np.full(len(s), -1) if i in dropped else rng.integers(0, rows, len(s)) for i, s in enumerate(seen)]
        links = LinkedRows(
            row=np.concatenate([*row, np.zeros(0, np.int64)]).astype(np.int32),
            point=point,
            ends=np.cumsum([len(s) for s in seen], dtype=np.int64),
            points=points,
        )
        # Few distinct depths, so that equally near views occur.
        return cls(links, rng.choice([0.5, 1.0, 1.5], len(point)).astype(np.float16), rows)

    def sightings(self) -> list[list[tuple[float, int]]]:
        """(depth, row) of each point in the order of the views."""
        found: list[list[tuple[float, int]]] = [[] for _ in range(self.links.points)]
        for point, row, depth in zip(self.links.point, self.links.row, self.depth, strict=True):
            if row >= 0:
                found[point].append((float(depth), int(row)))
        return found


CASES = (
    st.integers(0, 2**32 - 1), st.integers(1, 50), st.integers(0, 5), st.integers(1, 12),
    st.frozensets(st.integers(0, 4)),
)  # fmt: skip


@given(*CASES)
def test_one_row_per_point_against_plain_loops(seed, points, views, rows, dropped):
    case = Case.make(seed, points, views, rows, dropped)
    last, nearest = case.links.last(), case.links.nearest(case.depth)
    drawn = case.links.random(np.random.default_rng(seed))
    again = case.links.random(np.random.default_rng(seed))
    assert {a.dtype for a in (last, nearest, drawn)} == {np.dtype(np.int32)} and np.array_equal(drawn, again)
    for point, found in enumerate(case.sightings()):
        if not found:
            assert last[point] == nearest[point] == drawn[point] == -1
            continue
        assert last[point] == found[-1][1]
        least = min(depth for depth, _ in found)
        assert nearest[point] == [row for depth, row in found if depth == least][-1]
        assert drawn[point] in {row for _, row in found}


@given(*CASES, st.sampled_from(["float16", "int8"]))
def test_mean_against_plain_loops(seed, points, views, rows, dropped, codec):
    case = Case.make(seed, points, views, rows, dropped)
    encoded = encode(np.random.default_rng(seed).normal(size=(rows, 3)).astype(np.float32), codec)
    tokens = decode(encoded.table, encoded.scale).astype(np.float64)
    mean, valid = case.links.mean(decode(encoded.table, encoded.scale))
    assert mean.dtype == np.float32 and mean.shape == (points, 3)
    for point, found in enumerate(case.sightings()):
        expected = np.mean([tokens[row] for _, row in found], axis=0) if found else np.zeros(3)
        assert np.allclose(mean[point], expected, atol=1e-6) and valid[point] == bool(found)


def test_every_view_of_a_point_is_equally_likely_and_no_other_is_drawn():
    """Rows are the views' numbers here, so that a draw tells which view was taken."""
    views, points, draws = 5, 60, 4000
    rng = np.random.default_rng(0)
    seen = rng.random((views, points)) < 0.6
    links = LinkedRows(
        row=np.nonzero(seen)[0].astype(np.int32),
        point=np.nonzero(seen)[1],
        ends=np.cumsum(seen.sum(axis=1)),
        points=points,
    )
    counts = np.zeros((views + 1, points), dtype=np.int64)
    for _ in range(draws):
        counts[links.random(rng), np.arange(points)] += 1
    visible = seen.sum(axis=0)
    assert (counts[-1] == np.where(visible == 0, draws, 0)).all(), "row -1 exactly where no view sees the point"
    assert (counts[:-1][~seen] == 0).all()
    share = counts[:-1] / draws
    for point in np.flatnonzero(visible):
        p = 1 / visible[point]
        limit = 5 * np.sqrt(p * (1 - p) / draws)
        assert (np.abs(share[seen[:, point], point] - p) <= limit).all()


def test_points_with_the_same_views_take_the_same_view():
    """As with DITR, whose views come in random order: a surface is not speckled by views drawn point by point."""
    everywhere = np.repeat(np.arange(4), 30).astype(np.int32)
    links = LinkedRows(row=everywhere, point=np.tile(np.arange(30), 4), ends=30 * np.arange(1, 5), points=30)
    drawn = {tuple(np.unique(links.random(np.random.default_rng(seed)))) for seed in range(20)}
    assert drawn == {(0,), (1,), (2,), (3,)}


# --- stores ---------------------------------------------------------------------------------------------------------


def commit_views(
    writer: CacheWriter, partition: str, infos: list[SampleInfo], arrays: dict[str, np.ndarray], spec: VFMSpec
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and index as committed: a few tokens per view, the second view of the first sample dropped."""
    record = writer.commit_geometry(partition, infos, arrays)
    rng = np.random.default_rng(3)
    index, base = [], 0
    for i, view in enumerate(v for s in infos for v in s.views):
        if i == 1:
            index.append(np.full(view.links, -1))
            continue
        _, used = np.unique(rng.integers(0, 4, view.links), return_inverse=True)
        index.append(base + used)
        base += used.max() + 1 if len(used) else 0
    rows = rng.normal(size=(base, spec.dim)).astype(np.float32)
    joined = np.concatenate(index).astype(np.int32)
    writer.commit_features(spec, record, encode(rows, spec.codec), joined, images=len(index) - 1)
    return rows, joined


@pytest.mark.parametrize("codec", ["float16", "int8"])
@pytest.mark.parametrize("sizes", [[("scene", 80)], [("a", 30), ("b", 1), ("c", 57)]])
def test_samples_come_back_point_by_point(writer, make_arrays, make_spec, sizes, codec):
    spec = make_spec(layout="views", fuse="none", codec=codec)
    infos, arrays = make_arrays(sizes)
    rows, index = commit_views(writer, "scans", infos, arrays, spec)
    stored_rows = decode(**vars(encode(rows, codec)))
    reader = open_cache(writer.paths.root)
    record = reader.feature_record(spec, "scans")
    assert record.rows == len(rows)
    start = 0
    for position, (name, points) in enumerate(sizes):
        mine = (arrays["link_point"] >= start) & (arrays["link_point"] < start + points) & (index >= 0)
        found: list[list[tuple[float, int]]] = [[] for _ in range(points)]
        for link in np.flatnonzero(mine):
            point = int(arrays["link_point"][link]) - start
            found[point].append((float(arrays["link_depth"][link]), int(index[link])))
        assert record.valid_points[position] == sum(map(bool, found))
        sample = reader.read(name)
        assert sample.feature.dtype == np.float32 and sample.valid.tolist() == [bool(f) for f in found]
        for point, sightings in enumerate(found):
            expected = stored_rows[[row for _, row in sightings]].mean(axis=0) if sightings else np.zeros(spec.dim)
            assert np.allclose(sample.feature[point], expected, atol=1e-6)
        assert (
            sample.link_count.sum() == ((arrays["link_point"] >= start) & (arrays["link_point"] < start + points)).sum()
        )
        for view in (None, *VIEW_CHOICES):
            features = reader.read_stored(name, "fake", view=view, rng=np.random.default_rng(1)).features
            assert features.index.shape == (points,) and features.table.dtype == np.dtype(codec)
            assert features.index.max(initial=-1) == len(features.table) - 1, "only rows of the sample are read"
            got = decode(features.table, features.scale)
            for point, sightings in enumerate(found):
                assert (features.index[point] >= 0) == bool(sightings)
                if not sightings:
                    continue
                nearest = min(depth for depth, _ in sightings)
                allowed = {
                    "nearest": [row for depth, row in sightings if depth == nearest][-1:],
                    "random": [row for _, row in sightings],
                }.get(view, [sightings[-1][1]])
                assert any(np.array_equal(got[features.index[point]], stored_rows[row]) for row in allowed)
        start += points
    assert verify(writer.paths.root).clean


def test_links_are_read_only_where_they_are_needed(writer, make_arrays, make_partition, make_spec, monkeypatch):
    spec = make_spec(layout="views", fuse="none")
    commit_views(writer, "one", *make_arrays([("one", 40)]), spec)
    make_partition(writer, "two", [("two", 40)], make_spec(name="plain"))
    reader = open_cache(writer.paths.root)
    read: list[str] = []
    whole = ArrayGroup.read

    def noting(group: ArrayGroup, name: str, *rest: Any) -> Any:
        read.append(name)
        return whole(group, name, *rest)

    monkeypatch.setattr(ArrayGroup, "read", noting)

    def links_read(*arguments: Any, **more: Any) -> list[str]:
        read.clear()
        reader.read_stored(*arguments, **more)
        return sorted(n for n in read if n.startswith("link_"))

    assert links_read("one", None) == links_read("two", None) == links_read("two", "plain") == []
    assert links_read("one", "fake") == ["link_point"]
    assert links_read("one", "fake", view="random", rng=np.random.default_rng(0)) == ["link_point"]
    assert links_read("one", "fake", view="nearest") == ["link_depth", "link_point"]


def test_wrong_choices_say_what_to_do(writer, make_arrays, make_partition, make_spec):
    commit_views(writer, "one", *make_arrays([("one", 40)]), make_spec(layout="views", fuse="none"))
    make_partition(writer, "two", [("two", 40)], make_spec(name="plain"))
    reader = open_cache(writer.paths.root)
    with pytest.raises(MismatchError, match=r"'last'.*'plain-\w+' holds one feature per point.*--layout views"):
        reader.read_stored("two", "plain", view="last")
    with pytest.raises(UnknownNameError, match="did you mean 'nearest'"):
        reader.read_stored("one", "fake", view="neares")
    with pytest.raises(UsageError, match="expected rng"):
        reader.read_stored("one", "fake", view="random")


def test_a_view_without_links_and_a_sample_without_views(writer, make_metadata, make_spec):
    spec = make_spec(layout="views", fuse="none")
    views = ViewInfo(id="0", links=0), ViewInfo(id="1", links=2)
    infos = [
        SampleInfo(id="a", split="train", points=3, linked_points=2, views=views),
        SampleInfo(id="b", split="train", points=2, linked_points=0, views=()),
    ]
    arrays = {
        "coord": np.zeros((5, 3), np.float32), "source_index": np.arange(5, dtype=np.uint32),
        "offset": np.array([3, 5]), "link_point": np.array([0, 2], np.uint32), "link_uv": np.zeros((2, 2), np.uint16),
        "link_depth": np.ones(2, np.float16),
    }  # fmt: skip
    record = writer.commit_geometry("scans", infos, arrays)
    rows = encode(np.ones((1, 5), np.float32), "float16")
    writer.commit_features(spec, record, rows, np.zeros(2, np.int32), images=1)
    reader = open_cache(writer.paths.root)
    assert reader.read("a").valid.tolist() == [True, False, True] and not reader.read("b").valid.any()
    features = reader.read_stored("b", "fake", view="random", rng=np.random.default_rng(0)).features
    assert features.table.shape == (0, 5) and features.index.tolist() == [-1, -1]
    assert reader.feature_record(spec, "scans").valid_points == (2, 0)


@pytest.mark.parametrize("layout", ["fused", "views"])
def test_an_index_that_does_not_fit_is_never_committed(writer, make_arrays, make_spec, layout):
    spec = make_spec(layout=layout, fuse="none" if layout == "views" else "mean")
    infos, arrays = make_arrays([("scene", 30)])
    record = writer.commit_geometry("scene", infos, arrays)
    entries = 30 if layout == "fused" else len(arrays["link_point"])
    rows = encode(np.ones((4, 5), np.float32), "float16")
    with pytest.raises(MismatchError, match=f"expected an index of {entries} entries"):
        writer.commit_features(spec, record, rows, np.zeros(entries + 1, np.int32), images=1)
    for wrong in (4, -2):
        with pytest.raises(MismatchError, match="rows 0 to 3, or -1"):
            writer.commit_features(spec, record, rows, np.full(entries, wrong, np.int32), images=1)
    assert open_cache(writer.paths.root).vfms == {}


@pytest.mark.parametrize("layout", ["fused", "views"])
def test_verify_finds_an_index_that_does_not_fit(writer, make_arrays, make_spec, layout, monkeypatch):
    """As only another program could have written it: its digests are right, and still it names no row."""
    spec = make_spec(layout=layout, fuse="none" if layout == "views" else "mean")
    infos, arrays = make_arrays([("scene", 30)])
    record = writer.commit_geometry("scene", infos, arrays)
    entries = 30 if layout == "fused" else len(arrays["link_point"])
    with monkeypatch.context() as patch:
        patch.setattr("ditr_cache.store.check_index", lambda *_: None)
        rows = encode(np.ones((4, 5), np.float32), "float16")
        writer.commit_features(spec, record, rows, np.full(entries, 7, np.int32), images=1)
    assert verify(writer.paths.root).mismatched == [f"features/{spec.key}/scene"]


# --- extraction -----------------------------------------------------------------------------------------------------


Extract = Callable[..., Outcome]


@pytest.fixture
def extract(tiny_rooms: Path, make_checkpoint: Callable[..., Path], tmp_path: Path, run: Run) -> Extract:
    """`ditr-cache extract` of the tiny rooms with a tiny ViT, in this process."""

    def call(*more: object, out: str = "cache") -> Outcome:
        named = [
            "--dataset",
            "rooms",
            "--root",
            tiny_rooms,
            "--out",
            tmp_path / out,
            "--vfm",
            "test_vit",
            "--workers",
            0,
        ]
        return run("extract", *named, "--checkpoint", make_checkpoint(), "--image-size", "32x64", "--json", *more)

    return call


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_each_choice_is_what_fusing_would_have_stored(extract: Extract, tmp_path: Path, codec: str):
    extract("--layout", "views", "--codec", codec)
    first = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache/geometry").rglob("*") if p.is_file()}
    for fuse in ("mean", "last", "nearest"):
        assert extract("--fuse", fuse, "--codec", codec).json["geometry"] == {"computed": 0, "reused": 3}
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache/geometry").rglob("*") if p.is_file()} == first
    cache = open_cache(tmp_path / "cache")
    by_fuse = {spec.fuse: spec.key for spec in cache.vfms.values()}
    assert cache.vfms[by_fuse["none"]].layout == "views"
    for room in ROOMS:
        every, fused = cache.read(room, by_fuse["none"]), cache.read(room, by_fuse["mean"])
        np.testing.assert_array_equal(every.valid, fused.valid)
        np.testing.assert_array_equal(every.valid, every.link_count > 0)
        peak = np.abs(every.feature).max(axis=1, keepdims=True)
        # float16 rounds each token and the mean; int8 is off by half a step, a 127th of the token's peak, in both.
        bound = 2**-9 * peak if codec == "float16" else peak.max() / 127
        assert (np.abs(every.feature - fused.feature) <= bound + 1e-5).all()
        for choice in ("last", "nearest"):
            one = cache.read_stored(room, by_fuse["none"], view=choice).features
            other = cache.read_stored(room, by_fuse[choice]).features
            valid = one.index >= 0
            np.testing.assert_array_equal(valid, other.index >= 0)
            a, b = (decode(f.table, f.scale)[f.index[valid]] for f in (one, other))
            np.testing.assert_array_equal(a, b)
    again = extract("--layout", "views", "--codec", codec)
    assert again.json["partitions"] == {"done": 0, "reused": 3, "failed": 0}


def test_fuse_has_no_place_beside_views(extract: Extract, tmp_path: Path):
    outcome = extract("--layout", "views", "--fuse", "mean")
    assert outcome.code == 2 and "--fuse" in outcome.err and "--layout fused" in outcome.err
    assert extract("--layout", "view").code == 2
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UnknownNameError, match="did you mean 'views'"):
        ExtractSettings(dataset="rooms", root="", cache="", vfm=VFMRequest(name="test_vit"), layout="view")


def test_a_broken_image_costs_its_view_until_it_is_mended(
    extract: Extract, tiny_rooms: Path, tmp_path: Path, run: Run
) -> None:
    rooms = shutil.copytree(tiny_rooms, tmp_path / "rooms")
    image = next((rooms / "scans" / ROOMS[0] / "color").glob("2.*"))
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    outcome = extract("--root", rooms, "--layout", "views")
    assert (outcome.code, outcome.json["images"]) == (1, 11)
    assert [(f["sample"], f["view"]) for f in outcome.json["failures"]] == [(ROOMS[0], "2")]
    cache = open_cache(tmp_path / "cache")
    (spec,) = cache.vfms.values()
    record, info = cache.feature_record(spec, ROOMS[0]), cache.sample_info(ROOMS[0])
    ends = np.cumsum([0, *(v.links for v in info.views)])
    whose = [v.id for v in info.views].index("2")
    table = cache.read_stored(ROOMS[0], spec.key).features
    assert record.arrays["index"].shape == (ends[-1],) and info.views[whose].links > 0
    assert (np.abs(decode(table.table, table.scale)).max(axis=1) > 0).all(), "rows of the lost view are not stored"
    assert json.loads(run("info", tmp_path / "cache", "--json").out)["vfms"][0]["incomplete"] == 1
    image.write_bytes(whole)
    outcome = extract("--root", rooms, "--layout", "views", "--retry-incomplete")
    assert (outcome.code, outcome.json["partitions"]) == (0, {"done": 1, "reused": 2, "failed": 0})
    extract("--layout", "views", out="clean")
    assert_same(tmp_path / "cache", tmp_path / "clean")
    assert verify(tmp_path / "cache").clean


def test_info_and_show(extract: Extract, tmp_path: Path, run: Run):
    extract("--layout", "views")
    found = run("info", tmp_path / "cache", "--json").json
    (vfm,) = found["vfms"]
    assert (vfm["layout"], vfm["fuse"], vfm["samples"]) == ("views", "none", 3)
    cache = open_cache(tmp_path / "cache")
    samples = [cache.read(i) for i in cache.samples]
    counts = np.concatenate([s.link_count for s in samples])
    assert found["views_per_point"] == pytest.approx(counts.sum() / (counts > 0).sum(), abs=1e-3)
    assert vfm["coverage"] == pytest.approx(np.concatenate([s.valid for s in samples]).mean(), abs=1e-6)
    text = run("info", tmp_path / "cache").out
    assert ", views, grid" in text and f"({found['views_per_point']:.1f} see a linked point)" in text
    assert run("show", tmp_path / "cache", ROOMS[0], "-o", tmp_path / "room.png").code == 0


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_the_run_does_what_was_estimated(
    tiny_rooms: Path, make_checkpoint: Callable[..., Path], tmp_path: Path, codec: str
) -> None:
    vfm = VFMRequest(name="test_vit", checkpoint=str(make_checkpoint()), image_size=(64, 96), device="cpu")
    settings = ExtractSettings(
        dataset="rooms", root=str(tiny_rooms), cache=str(tmp_path / "cache"), vfm=vfm, layout="views", codec=codec
    )
    request = ExtractRequest(settings=settings, workers=0)
    plan = estimate(request)
    assert list(tmp_path.iterdir()) == []
    totals = run_extract(request, quiet=True)
    assert plan.images == totals.images
    assert plan.bytes == pytest.approx(totals.bytes, rel=0.3)


# --- the right feature on the right point ---------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_every_choice_lies_within_half_a_patch_of_its_point(bed, position_vfm, tmp_path, codec):
    result = bed.run(tmp_path / "cache", position_vfm, bed.right_views(), layout="views", codec=codec)
    assert result.summary.status == "done" and not result.summary.failures and result.summary.images == 3
    report = bed.check(result.sample, fuse="mean")
    assert report.right, (report.errors.max(), report)
    cache = open_cache(tmp_path / "cache")
    (key,) = cache.vfms
    rng = np.random.default_rng(0)
    for view, fuse in (("last", "last"), ("nearest", "nearest"), ("random", "random")):
        stored = cache.read_stored("scene", key, view=view, rng=rng).features
        report = bed.check(bed.with_features(result.sample, stored), fuse=fuse)
        assert report.right, (view, report.errors.max(), report)
