"""Partitions of many scans: the same features as scan by scan, bounded memory, and lists of scans that change."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

import world as bed
from dataset_runs import Extracted, run_dataset
from ditr_cache import lift, sample_features
from ditr_cache.datasets import DATASETS, ClassInfo, Dataset, Need, Option
from ditr_cache.errors import DataError, MismatchError, UnknownNameError
from ditr_cache.extract import ExtractRequest, extract
from ditr_cache.partition import ExtractSettings
from ditr_cache.plan import estimate
from ditr_cache.sample import Camera, Points, Sample, View
from ditr_cache.store import open_cache
from ditr_cache.vfm import VFMRequest

CAMERA = Camera(width=160, height=120, fx=100.0, fy=102.5, cx=77.5, cy=61.0)
GRID = (6, 8)
ROOM = bed.World()


def stands(scan: int, camera: int) -> np.ndarray:
    return bed.pose((-0.6 + 0.2 * scan, 0.9, 1.4), yaw=0.6 - 0.5 * camera, pitch=0.15)


@cache
def picture(scan: int, camera: int) -> np.ndarray:
    return ROOM.image(bed.pinhole(160, 120, 100.0, 102.5, 77.5, 61.0, stands(scan, camera)))


class Drive(Dataset):
    """Seven scans of one drive with two cameras each, in partitions of four or of one."""

    name: ClassVar[str] = "drive"
    title: ClassVar[str] = "a drive"
    needs: ClassVar[tuple[Need, ...]] = ()
    options: ClassVar[tuple[Option, ...]] = (Option("together", 4, "scans in a partition"),)
    scans: ClassVar[tuple[int, ...]] = tuple(range(7))
    unlabelled: ClassVar[tuple[int, ...]] = ()
    torn: ClassVar[tuple[tuple[int, int], ...]] = ()
    gone: ClassVar[tuple[int, ...]] = ()

    def __init__(self, root: Path, *, together: int = 4) -> None:
        self.root = root
        self.samples_per_partition = together  # type: ignore[misc]
        self.ids = {"train": [f"00/{i:06d}" for i in self.scans]}

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        return tuple(ClassInfo(name, (1, 2, 3)) for name in bed.NAMES)

    def sequence(self, sample_id: str) -> str:
        return "00"

    def read(self, sample_id: str) -> Sample:
        scan = int(sample_id[-6:])
        if scan in self.gone:
            raise DataError(f"{sample_id}.bin: truncated")

        def load_points() -> Points:
            places, surface = ROOM.points(1500 + 10 * scan, seed=scan)
            label = None if scan in self.unlabelled else surface.astype(np.int16)
            return Points(
                coord=places.astype(np.float32), strength=np.full(len(places), scan, np.float32), segment=label
            )

        def load(camera: int) -> np.ndarray:
            if (scan, camera) in self.torn:
                raise DataError(f"{sample_id} camera {camera}: truncated")
            return picture(scan, camera)

        views = tuple(
            View(
                id=f"cam{c}",
                camera=CAMERA,
                camera_from_world=stands(scan, c),
                load_image=lambda c=c: load(c),
            )
            for c in range(2)
        )
        return Sample(id=sample_id, split="train", views=views, load_points=load_points)


@pytest.fixture
def drive(monkeypatch, tmp_path):
    monkeypatch.setitem(DATASETS, "drive", "test_scans:Drive")
    import test_scans  # the module that the registry imports

    return test_scans.Drive


def run(tmp_path: Path, checkpoint: Path, name: str, **options: int) -> Extracted:
    return run_dataset("drive", tmp_path, tmp_path / name, checkpoint, grid=GRID, options=options)


def same_samples(a: Extracted, b: Extracted) -> None:
    assert a.cache.samples == b.cache.samples and len(a.cache.samples) == 7
    for sample_id in a.cache.samples:
        one, other = a.sample(sample_id), b.sample(sample_id)
        for name in ("coord", "strength", "segment", "source_index", "feature", "valid", "link_count"):
            np.testing.assert_array_equal(one[name], other[name], err_msg=f"{sample_id} {name}")


def test_the_same_features_as_scan_by_scan(drive, tmp_path, position_checkpoint):
    together = run(tmp_path, position_checkpoint, "together")
    assert sorted(together.cache.geometry) == ["00-000000", "00-000004"] and together.totals.images == 14
    apart = run(tmp_path, position_checkpoint, "apart", together=1)
    assert len(apart.cache.geometry) == 7
    same_samples(together, apart)
    assert 0.1 < np.mean([together.sample(i).valid.mean() for i in together.cache.samples]) < 0.9
    files = [len([p for p in (tmp_path / n).rglob("*") if p.is_file()]) for n in ("together", "apart")]
    assert files[0] < 0.5 * files[1]


@pytest.mark.parametrize("layout", ["fused", "views"])
def test_tokens_of_one_scan_are_held_at_once(drive, tmp_path, position_checkpoint, monkeypatch, layout):
    """A batch may span scans, but what is finished is encoded: 64 scans of Waymo would not fit otherwise."""
    alive: set[int] = set()
    most = 0

    class Counted(lift.TokenTable):
        def __init__(self, *args: object, **kwargs: object) -> None:
            nonlocal most
            super().__init__(*args, **kwargs)  # type: ignore[arg-type]
            alive.add(id(self))
            most = max(most, len(alive))

    def finished(function):
        def wrapped(table, *rest):
            found = function(table, *rest)
            alive.discard(id(table))
            return found

        return wrapped

    monkeypatch.setattr(sample_features, "TokenTable", Counted)
    monkeypatch.setattr(sample_features, "fuse", finished(lift.fuse))
    monkeypatch.setattr(sample_features, "every_token", finished(lift.every_token))
    settings = ExtractSettings(
        dataset="drive",
        root=str(tmp_path),
        cache=str(tmp_path / "cache"),
        vfm=VFMRequest(name="test_vit", checkpoint=str(position_checkpoint), image_size=(96, 128), device="cpu"),
        options={"together": 7},
        layout=layout,
        batch_size=3,
    )
    totals = extract(ExtractRequest(settings=settings, workers=0), quiet=True)
    assert totals.images == 14 and not totals.failures and not alive and most <= 3
    cache = open_cache(tmp_path / "cache")
    assert len(cache.geometry) == 1 and all(cache.read(i).valid.any() for i in cache.samples)


def test_damaged_views_and_scans_are_left_out_and_the_others_are_right(
    drive, tmp_path, position_checkpoint, monkeypatch
):
    right = run(tmp_path, position_checkpoint, "right")
    monkeypatch.setattr(drive, "torn", ((1, 0), (1, 1), (6, 1)))
    monkeypatch.setattr(drive, "gone", (2,))
    damaged = run(tmp_path, position_checkpoint, "damaged")
    left_out = {(f.sample, f.view) for f in damaged.totals.failures}
    assert left_out == {("00/000001", "cam0"), ("00/000001", "cam1"), ("00/000006", "cam1"), ("00/000002", "")}
    assert damaged.cache.samples == [i for i in right.cache.samples if i != "00/000002"]
    for scan in (0, 3, 4, 5):
        name = f"00/{scan:06d}"
        np.testing.assert_array_equal(damaged.sample(name).feature, right.sample(name).feature)
    assert not damaged.sample("00/000001").valid.any() and damaged.sample("00/000006").valid.any()
    again = run(tmp_path, position_checkpoint, "damaged")
    assert again.totals.partitions == {"done": 0, "reused": 2, "failed": 0}


def test_a_scan_that_is_gone_for_the_second_vfm_costs_no_other(drive, tmp_path, position_checkpoint, monkeypatch):
    first = run(tmp_path, position_checkpoint, "cache")
    monkeypatch.setattr(drive, "gone", (1, 4, 5, 6))
    again = run_dataset("drive", tmp_path, tmp_path / "cache", position_checkpoint, grid=(12, 16))
    assert again.totals.partitions == {"done": 1, "reused": 0, "failed": 1}
    assert {f.sample for f in again.totals.failures} == {"00/000001", "00/000004", "00/000005", "00/000006"}
    assert all("truncated" in f.error for f in again.totals.failures)
    (key,) = {spec.key for spec in again.cache.vfms.values()} - set(first.cache.vfms)
    assert again.cache.read("00/000000", key).valid.any() and not again.cache.read("00/000001", key).valid.any()


def test_scans_without_labels_among_others_are_unlabelled_ones(drive, tmp_path, position_checkpoint, monkeypatch):
    monkeypatch.setattr(drive, "unlabelled", (1, 4, 5, 6))
    found = run(tmp_path, position_checkpoint, "cache")
    assert (found.sample("00/000001").segment == -1).all() and (found.sample("00/000000").segment >= 0).all()
    assert found.sample("00/000005").segment is None  # nobody in its partition has labels


def test_a_download_that_went_on_is_made_again_where_it_changed(drive, tmp_path, position_checkpoint, monkeypatch):
    monkeypatch.setattr(drive, "scans", (0, 1, 3, 4, 5))
    run(tmp_path, position_checkpoint, "cache")
    monkeypatch.setattr(drive, "scans", (0, 1, 3, 4, 5, 6))
    grown = run(tmp_path, position_checkpoint, "cache")
    assert grown.totals.partitions == {"done": 1, "reused": 1, "failed": 0}
    monkeypatch.setattr(drive, "scans", tuple(range(7)))
    grown = run(tmp_path, position_checkpoint, "cache")
    assert grown.totals.partitions == {"done": 2, "reused": 0, "failed": 0}
    same_samples(grown, run(tmp_path, position_checkpoint, "clean"))


def test_a_download_that_shrank_to_one_scan_of_a_partition(drive, tmp_path, position_checkpoint, monkeypatch):
    run(tmp_path, position_checkpoint, "cache")
    monkeypatch.setattr(drive, "scans", (0, 1, 2, 3, 6))
    shrunk = run(tmp_path, position_checkpoint, "cache")
    assert shrunk.totals.partitions == {"done": 1, "reused": 1, "failed": 0}
    assert [s.id for s in shrunk.cache.geometry["00-000004"].samples] == ["00/000006"]


def test_an_occlusion_test_that_is_none_is_refused(drive, tmp_path, position_checkpoint):
    with pytest.raises(UnknownNameError, match="occlusion test 'off'"):
        run_dataset("drive", tmp_path, tmp_path / "c", position_checkpoint, grid=GRID, links={"occlusion": "off"})
    assert not (tmp_path / "c").exists()


def test_the_estimate_counts_scans(drive, tmp_path, position_checkpoint):
    settings = ExtractSettings(
        dataset="drive",
        root=str(tmp_path),
        cache=str(tmp_path / "cache"),
        vfm=VFMRequest(name="test_vit", checkpoint=str(position_checkpoint), image_size=(96, 128), device="cpu"),
        options={"together": 4},
        layout="views",
    )
    plan = estimate(ExtractRequest(settings=settings, workers=0))
    assert (plan.partitions, plan.geometry, plan.images) == (2, 2, 14)
    totals = extract(ExtractRequest(settings=settings, workers=0), quiet=True)
    assert plan.points == pytest.approx(totals.points, rel=0.02)
    assert plan.bytes == pytest.approx(totals.bytes, rel=0.25)


def test_options_are_part_of_the_cache_s_identity(drive, tmp_path, position_checkpoint):
    first = run(tmp_path, position_checkpoint, "cache", together=2)
    assert first.cache.metadata.dataset_options == {"together": 2}
    with pytest.raises(MismatchError, match=r"dataset_options: the cache has .*'together': 2.*asked for \{\}"):
        run(tmp_path, position_checkpoint, "cache")


def test_settings_take_the_recipe_of_their_dataset():
    """Sent to workers as plain values, so resolved once."""
    vfm = VFMRequest(name="test_vit")
    outdoors = ExtractSettings(dataset="semantickitti", root="x", cache="y", vfm=vfm)
    assert (outdoors.layout, outdoors.vfm.grid) == ("views", (27, 89))
    assert replace(outdoors, layout=None, fuse="last").layout == "fused"
    sized = ExtractSettings(dataset="semantickitti", root="x", cache="y", vfm=replace(vfm, image_size=(32, 32)))
    assert sized.vfm.grid is None and sized.vfm.image_size == (32, 32)
