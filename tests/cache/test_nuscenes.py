"""nuScenes: written releases are read as they were written, planted faults are found, damage is told."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from dataset_runs import Extracted, run_dataset
from ditr_cache.arrays import SHARD_BYTES
from ditr_cache.datasets import open_dataset
from ditr_cache.datasets.base import partitions
from ditr_cache.datasets.images import read_color
from ditr_cache.datasets.nuscenes import dataset as nuscenes
from ditr_cache.datasets.nuscenes import release as nuscenes_release
from ditr_cache.datasets.nuscenes import tables as nuscenes_tables
from ditr_cache.datasets.nuscenes.dataset import NuScenesDataset, global_from_sensor, read_points, rigid
from ditr_cache.datasets.nuscenes.labels import index_of_category
from ditr_cache.datasets.nuscenes.release import archive_number, scene_list
from ditr_cache.datasets.nuscenes.tables import CAMERAS, LIDAR, Pose, Tables, rows_where
from ditr_cache.datasets.nuscenes.tables import _read_poses as read_poses
from ditr_cache.errors import DataError, MissingDataError, UnknownNameError
from ditr_cache.link import link_view
from ditr_cache.partition import ExtractSettings
from ditr_cache.sample import Sample
from ditr_cache.schema import IGNORE_INDEX
from ditr_cache.store import open_cache
from ditr_cache.vfm import VFMRequest
from ditr_train.benchmark_labels import NUSCENES
from ditr_train.submission import BENCHMARKS
from layouts import nuscenes as layout
from layouts.nuscenes import STREET, write_tables
from world import Truth

TRAINVAL = "v1.0-trainval"
RECIPE = Path(__file__).parents[2] / "pipelines/nuscenes/base.yaml"


@dataclass(frozen=True)
class Written:
    """What a writer wrote."""

    root: Path
    truths: Sequence[Truth]

    def of(self, split: str) -> list[Truth]:
        return [truth for truth in self.truths if truth.split == split]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """v1.0-trainval and v1.0-test below one root, as most people have them."""
    root = tmp_path_factory.mktemp("nuscenes")
    truths = layout.write(root, lidar_ids=True) + layout.write(root, version="v1.0-test", lidar_ids=True)
    return Written(root, truths)


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Written:
    root = tmp_path_factory.mktemp("nuscenes_mini")
    return Written(root, layout.write(root, version="v1.0-mini", lidar_ids=True))


@pytest.fixture(scope="module")
def extracted(written: Written, tmp_path_factory: pytest.TempPathFactory, position_checkpoint: Path) -> Extracted:
    return run_dataset("nuscenes", written.root, tmp_path_factory.mktemp("nuscenes_cache") / "c", position_checkpoint)


@pytest.fixture
def copy(written: Written, tmp_path: Path) -> Path:
    """The written v1.0-trainval, to be damaged; a release as of who took the archives of keyframes."""
    others = shutil.ignore_patterns("sweeps", "maps", "v1.0-test", "n008-*")
    return Path(shutil.copytree(written.root, tmp_path / "copy", ignore=others))


def edit(root: Path, table: str, change: Callable[[list[dict[str, Any]]], object], version: str = TRAINVAL) -> None:
    """Change the rows of a table in place."""
    path = root / version / f"{table}.json"
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found, indent=0))


def read_val(root: Path, **options: str) -> Sample:
    """The one sample of the split `val`."""
    dataset = open_dataset("nuscenes", root, options)
    (sample_id,) = dataset.sample_ids("val")
    return dataset.read(sample_id)


def of_val(root: Path, table: str, channel: str) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Finds the row of `sample_data`, `ego_pose` or `calibrated_sensor` that a frame of the split `val` needs."""
    data = json.loads((root / TRAINVAL / "sample_data.json").read_text())
    token = read_val(root).id
    sample = next(row["sample_token"] for row in data if row["token"] == token)
    keyframes = (row for row in data if row["sample_token"] == sample and row["is_key_frame"])
    (frame,) = (row for row in keyframes if f"/{channel}/" in row["filename"])
    key = {"sample_data": "token", "ego_pose": "ego_pose_token", "calibrated_sensor": "calibrated_sensor_token"}[table]
    return lambda found: next(row for row in found if row["token"] == frame[key])


def as_written(run: Extracted, truth: Truth) -> bool:
    """Whether features, labels, coordinates and strength of a sample are those that were written."""
    sample = run.sample(truth.sample_id)
    strength = truth.channels["strength"][sample.source_index] / 255
    return run.report(truth, STREET).right(occlusion=False) and bool(np.allclose(sample.strength, strength, atol=1e-6))


# --- what was written is read ---------------------------------------------------------------------------------------


def test_every_sample_is_right(written: Written, extracted: Extracted) -> None:
    assert extracted.totals.failures == []
    assert {t.split for t in written.truths} == {"train", "val", "test"}
    for truth in written.truths:
        assert as_written(extracted, truth), truth.sample_id
        sample = extracted.sample(truth.sample_id)
        assert sample.split == truth.split
        assert np.array_equal(sample.coord, truth.coord[sample.source_index].astype(np.float32))
        # Scans of the test split have no labels, and all are of scenes of their own.
        assert (sample.segment is None) == (truth.label is None)
        assert sample.strength.max() <= 1
    assert set(extracted.cache.geometry) == {"scene-0001-000000", "scene-0003-000000", "scene-0077-000000"}


def test_mini_has_its_own_splits(mini: Written, tmp_path: Path, position_checkpoint: Path) -> None:
    run = run_dataset("nuscenes", mini.root, tmp_path / "cache", position_checkpoint)
    assert run.totals.failures == []
    for truth in mini.truths:
        assert as_written(run, truth)
        assert f"mini_{run.sample(truth.sample_id).split}" == truth.split
    # Scene 0553 trains in mini, and validates in v1.0-trainval: no cache may take one for the other.
    names = {"mini-scene-0061-000000", "mini-scene-0553-000000", "mini-scene-0103-000000"}
    assert set(run.cache.geometry) == names


def test_a_cache_that_grows_from_mini_has_the_official_splits(
    mini: Written, tmp_path: Path, position_checkpoint: Path
) -> None:
    """Mini's rows are a part of v1.0-trainval's, with the same tokens."""
    root = Path(shutil.copytree(mini.root, tmp_path / "data", ignore=shutil.ignore_patterns("sweeps")))
    run_dataset("nuscenes", root, tmp_path / "cache", position_checkpoint)
    shutil.copytree(root / "v1.0-mini", root / TRAINVAL)
    cache = run_dataset("nuscenes", root, tmp_path / "cache", position_checkpoint).cache
    tables = Tables(root / TRAINVAL, "")
    for split in ("train", "val"):
        official = [i for i in tables.ids if tables.scene(i) in scene_list(split)]
        assert cache.split_ids(split) == sorted(official) and official
    moved_over = {t.sample_id for t in mini.of("mini_train")} & set(cache.split_ids("val"))
    assert {tables.scene(i) for i in moved_over} == {"scene-0553"}


def test_without_lidarseg(tmp_path: Path, position_checkpoint: Path) -> None:
    truths = layout.write(tmp_path / "data", lidarseg=False, lidar_ids=True)
    match = r"v1\.0-trainval/lidarseg\.json: no such file; unpack nuScenes-lidarseg-all-v1\.0\.tar\.bz2.*labels=none"
    with pytest.raises(MissingDataError, match=match):
        open_dataset("nuscenes", tmp_path / "data")
    run = run_dataset(
        "nuscenes", tmp_path / "data", tmp_path / "cache", position_checkpoint,
        options={"labels": "none"}, splits=["val"],
    )  # fmt: skip
    (truth,) = (t for t in truths if t.split == "val")
    assert as_written(run, truth) and run.sample(truth.sample_id).segment is None
    assert run.cache.metadata.dataset_options == {"labels": "none"}


def test_classes_are_the_benchmark_s(written: Written) -> None:
    dataset = open_dataset("nuscenes", written.root)
    names = [c.name for c in dataset.classes]
    assert names == yaml.safe_load(RECIPE.read_text())["classes"]
    assert (
        {name: i for i, name in enumerate(names, 1)}
        == NUSCENES
        == {name: i for i, name in enumerate(layout.CHALLENGE, 1)}
    )
    colors = {c.name: c.color for c in dataset.classes}
    # utils/color_map.py of the devkit
    assert (
        colors["car"] == (255, 158, 0) and colors["pedestrian"] == (0, 0, 230) and colors["barrier"] == (112, 128, 144)
    )
    assert colors["driveable_surface"] == (0, 207, 191) and colors["vegetation"] == (0, 175, 0)
    table = index_of_category(written.root / TRAINVAL / "category.json", "")
    for name, general in layout.CHALLENGE.items():
        assert {int(table[i]) for i in general} == {names.index(name)}
    ignored = set(range(32)) - {i for general in layout.CHALLENGE.values() for i in general}
    assert {int(table[i]) for i in ignored} == {IGNORE_INDEX}


def test_splits_and_order(written: Written) -> None:
    dataset = open_dataset("nuscenes", written.root)
    assert dataset.splits == ("train", "val", "test")
    for split in dataset.splits:
        ids = [truth.sample_id for truth in written.of(split)]
        assert list(dataset.sample_ids(split)) == ids  # written in the order of time; the tables' rows are in none
        assert all(BENCHMARKS["nuscenes"].sample_id.fullmatch(i) for i in ids)
    assert [p.id for p in partitions(dataset, ["val"])] == ["scene-0003-000000"]
    with pytest.raises(UnknownNameError, match=r"'vall'.*did you mean 'val'"):
        dataset.sample_ids("vall")
    with pytest.raises(UnknownNameError, match=r"sample of dataset 'nuscenes' '0{32}'"):
        dataset.read("0" * 32)


def test_the_lists_are_the_official_ones() -> None:
    scenes = {name: set(scene_list(name)) for name in ("train", "val", "test", "mini_train", "mini_val")}
    assert [len(found) for found in scenes.values()] == [700, 150, 150, 8, 2]
    assert len(scenes["train"] | scenes["val"] | scenes["test"]) == 1000
    assert scenes["mini_train"] & scenes["val"] == {"scene-0553", "scene-0796"}


def test_which_releases_are_read(written: Written, mini: Written, tmp_path: Path) -> None:
    def splits(version: str, *roots: Path) -> dict[str, int]:
        root = tmp_path / "-".join((version, *(r.name for r in roots)))
        for folder in (folder for r in roots for folder in r.iterdir()):
            (root / folder.name).parent.mkdir(exist_ok=True)
            if not (root / folder.name).exists():
                (root / folder.name).symlink_to(folder)
        dataset = open_dataset("nuscenes", root, {"version": version})
        return {split: len(dataset.sample_ids(split)) for split in dataset.splits}

    assert splits("auto", written.root, mini.root) == {"train": 2, "val": 1, "test": 2}
    assert splits("auto", mini.root) == splits("v1.0-mini", written.root, mini.root) == {"train": 3, "val": 1}
    assert splits(TRAINVAL, written.root) == {"train": 2, "val": 1}
    assert splits("v1.0-test", written.root) == {"test": 2}


def test_a_real_keyframe(realdata: Path) -> None:
    """The counts of its README: depth beyond 1 m, 0 <= u < 1600, 0 <= v < 900."""
    root = realdata / "nuscenes"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    dataset = open_dataset("nuscenes", root)
    assert dataset.splits == ("train", "val") and not dataset.sample_ids("val")
    (sample_id,) = dataset.sample_ids("train")
    assert sample_id == "4518fecdedfac0e69ee02c30f1f215b8" and dataset.sequence(sample_id) == "mini-scene-0061"
    sample = dataset.read(sample_id)
    points = sample.load_points()
    assert len(points.coord) == 34688 and points.strength is not None and points.segment is not None
    assert 0.5 < points.strength.max() <= 1 and (points.segment != IGNORE_INDEX).sum() <= 980
    links = {v.id: link_view(points.coord, v, dataset.defaults.links, spacing=0.1) for v in sample.views}
    assert {name: len(found.point) for name, found in links.items()} == {
        "CAM_FRONT": 3067, "CAM_FRONT_RIGHT": 3079, "CAM_FRONT_LEFT": 3704, "CAM_BACK": 4826, "CAM_BACK_LEFT": 4097,
        "CAM_BACK_RIGHT": 3379,
    }  # fmt: skip
    assert len(np.unique(np.concatenate([found.point for found in links.values()]))) == 20206
    assert sample.views[3].load_image().shape == (900, 1600, 3)


def test_the_published_recipe(written: Written) -> None:
    defaults = NuScenesDataset.defaults
    assert [n * 14 for n in defaults.grid] == [378, 672]
    assert (defaults.layout, defaults.links.occlusion, defaults.links.depth_min) == ("views", "none", 1.0)
    sample = read_val(written.root)
    assert [view.id for view in sample.views] == list(CAMERAS) and sample.every_nth_frame == 1


# --- files, rows and time of a whole release -------------------------------------------------------------------------


def test_a_release_has_few_files(written: Written, tmp_path: Path, make_checkpoint) -> None:
    """Fewer than 10 000 per VFM: counted in a small cache, then with the largest arrays that a scene can have."""
    from ditr_cache.extract import ExtractRequest, extract

    settings = ExtractSettings(
        dataset="nuscenes", root=str(written.root), cache=str(tmp_path / "cache"), codec="int8",
        vfm=VFMRequest(name="test_vit", checkpoint=str(make_checkpoint("test_vit")), image_size=(32, 64), device="cpu"),
    )  # fmt: skip
    extract(ExtractRequest(settings=settings, splits=("val",), workers=0), quiet=True)
    cache = open_cache(tmp_path / "cache")
    (spec,) = cache.vfms.values()
    assert spec.layout == "views"
    folder = cache.paths.features(spec.key)
    files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    small = len(files) - 1  # vfm.json is there once
    assert sum("/table/c/" in name for name in files) == 1
    scenes, scans, dim = 850 + 150, 41, 1024  # 34 149 samples in 850 scenes
    rows, columns = NuScenesDataset.defaults.grid
    tokens = scans * len(CAMERAS) * rows * columns
    for codec, bytes_of_row, of_scale in (("int8", dim, 0), ("float16", 2 * dim, 2)):
        shards = -(-tokens * bytes_of_row // SHARD_BYTES)
        assert 1 + scenes * (small - of_scale - 1 + shards) < 10_000, codec
    entries = scans * 34_720 * 1.2  # points of a scan, links of a point that any image sees
    assert 4 * entries < SHARD_BYTES and scans <= NuScenesDataset.samples_per_partition


def test_large_tables_are_what_json_load_says(tmp_path: Path) -> None:
    """Against the whole tables in memory, and rows found by plain loops."""
    write_tables(tmp_path, scenes=3, samples_per_scene=4, sweeps=True)
    whole = {p.stem: json.loads(p.read_text()) for p in (tmp_path / TRAINVAL).glob("*.json")}
    by_token = {name: {row["token"]: row for row in found} for name, found in whole.items()}
    tables = Tables(tmp_path / TRAINVAL, "")
    seen = 0
    for row in whole["sample_data"]:
        calibrated = by_token["calibrated_sensor"][row["calibrated_sensor_token"]]
        channel = by_token["sensor"][calibrated["sensor_token"]]["channel"]
        if not row["is_key_frame"] or channel.startswith("RADAR"):
            continue
        scan = next(
            r["token"] for r in whole["sample_data"]
            if r["sample_token"] == row["sample_token"] and r["is_key_frame"] and "LIDAR_TOP" in r["filename"]
        )  # fmt: skip
        frame, pose = tables.frame(scan, channel), by_token["ego_pose"][row["ego_pose_token"]]
        assert (frame.filename, frame.timestamp, frame.size) == (
            row["filename"],
            row["timestamp"],
            (row["width"], row["height"]),
        )
        assert frame.global_from_ego == Pose(rotation=tuple(pose["rotation"]), translation=tuple(pose["translation"]))
        assert list(frame.sensor.ego_from_sensor.rotation) == calibrated["rotation"]
        assert [list(line) for line in frame.sensor.intrinsic] == calibrated["camera_intrinsic"]
        scene = by_token["scene"][by_token["sample"][row["sample_token"]]["scene_token"]]["name"]
        assert tables.scene(scan) == scene
        seen += 1
    assert seen == 3 * 4 * 7 and len(tables.ids) == 12
    times = [(tables.scene(i), tables.frame(i, LIDAR).timestamp) for i in tables.ids]
    assert times == sorted(times)


# --- planted faults -------------------------------------------------------------------------------------------------


def still_right(written: Written, tmp_path: Path, checkpoint: Path, split: str = "val") -> bool:
    """Whether all is as written, read by a reader with a fault. Without one it is: `test_every_sample_is_right`."""
    run = run_dataset("nuscenes", written.root, tmp_path / "cache", checkpoint, splits=[split])
    assert all("kept with coverage 0" in failure.error for failure in run.totals.failures), (
        "the fault breaks the reader"
    )
    return all(as_written(run, truth) for truth in written.of(split))


def wrong_direction(frame):
    return np.linalg.inv(global_from_sensor(frame))


def without_ego_motion(frame):
    return rigid(frame.sensor.ego_from_sensor)


def without_calibration(frame):
    return rigid(frame.global_from_ego)


def scalar_last(pose):
    x, y, z, w = pose.rotation
    return rigid(replace(pose, rotation=(w, x, y, z)))


def centimetres(pose):
    return rigid(replace(pose, translation=tuple(t / 100 for t in pose.translation)))


def swapped(*arguments):
    points = read_points(*arguments)
    return replace(points, coord=points.coord[:, [1, 0, 2]])


def by_row(path, remedy):
    """Labels by the rows of `category.json`, not by their index."""
    table, found = index_of_category(path, remedy), json.loads(path.read_text())
    of_name = {row["name"]: table[row["index"]] for row in found}
    return np.array([*(of_name[row["name"]] for row in found), *table[len(found) :]])


def next_class(path, remedy):
    table = index_of_category(path, remedy)
    return np.where(table >= 0, (table + 1) % 16, table)


def blue_first(source, **more):
    return read_color(source, **more)[..., ::-1]


def off_centre(camera, where):
    return replace(camera, cx=camera.cx - 30)


def other_pose(folder, number_of, remedy):
    poses, times = read_poses(folder, number_of, remedy)
    return np.roll(poses, 1, axis=0), times


def sweeps(path, key, wanted, remedy):
    """Of every camera the last frame before the keyframe, where there is one."""
    if key != "is_key_frame":
        return rows_where(path, key, wanted, remedy)

    def rank(row):
        return row["is_key_frame"] == (f"/{LIDAR}/" in row["filename"]), row["timestamp"]

    frames = sorted(json.loads(path.read_text()), key=rank)
    return {(row["sample_token"], row["calibrated_sensor_token"]): row for row in frames}.values()


FAULTS = {
    "wrong pose direction": (nuscenes, "global_from_sensor", wrong_direction),
    "ego motion not compensated": (nuscenes, "global_from_sensor", without_ego_motion),
    "calibration ignored": (nuscenes, "global_from_sensor", without_calibration),
    "pose of another time": (nuscenes_tables, "_read_poses", other_pose),
    "quaternions with w last": (nuscenes, "rigid", scalar_last),
    "translations in centimetres": (nuscenes, "rigid", centimetres),
    "x and y swapped": (nuscenes, "read_points", swapped),
    "labels by row": (nuscenes_release, "index_of_category", by_row),
    "labels off by one": (nuscenes_release, "index_of_category", next_class),
    "blue first": (nuscenes, "read_color", blue_first),
    "crop without principal point": (nuscenes, "check_principal_point", off_centre),
    "sweeps for keyframes": (nuscenes_tables, "rows_where", sweeps),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str, written: Written, tmp_path: Path, position_checkpoint: Path, monkeypatch) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    split = "train" if fault == "sweeps for keyframes" else "val"  # one keyframe has no sweeps
    assert not still_right(written, tmp_path, position_checkpoint, split)


# --- bad input: the release -----------------------------------------------------------------------------------------


def test_no_release(tmp_path: Path, written: Written) -> None:
    match = (
        r"no v1\.0-trainval/scene\.json or v1\.0-mini/scene\.json in .*; unpack v1\.0-trainval_meta\.tgz or v1\.0-mini"
    )
    with pytest.raises(MissingDataError, match=match):
        open_dataset("nuscenes", tmp_path)
    with pytest.raises(MissingDataError, match=f"pass {re.escape(repr(str(written.root)))} with --root"):
        open_dataset("nuscenes", written.root / TRAINVAL)
    with pytest.raises(MissingDataError, match=f"pass {re.escape(repr(str(written.root)))} with --root"):
        open_dataset("nuscenes", written.root.parent)
    with pytest.raises(
        MissingDataError,
        match=r"v1\.0-mini/scene.*there is v1\.0-trainval and v1\.0-test: --option version=v1\.0-trainval",
    ):
        open_dataset("nuscenes", written.root, {"version": "v1.0-mini"})


def test_the_folders_of_lidarseg_alone_are_no_release(mini: Written, tmp_path: Path) -> None:
    root = Path(shutil.copytree(mini.root, tmp_path / "data"))
    (root / TRAINVAL).mkdir()
    for name in ("lidarseg", "category"):
        shutil.copy(root / "v1.0-mini" / f"{name}.json", root / TRAINVAL)
    assert len(open_dataset("nuscenes", root).sample_ids("train")) == 3


@pytest.mark.parametrize("table", nuscenes_release.TABLES)
def test_a_missing_table(copy: Path, table: str) -> None:
    (copy / TRAINVAL / f"{table}.json").unlink()
    with pytest.raises(MissingDataError, match=rf"{table}\.json: no such file; unpack v1\.0-trainval_meta\.tgz"):
        open_dataset("nuscenes", copy)


@pytest.mark.parametrize("table", [*nuscenes_release.TABLES, "lidarseg", "category"])
def test_a_truncated_table(copy: Path, table: str) -> None:
    path = copy / TRAINVAL / f"{table}.json"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(
        DataError, match=rf"{table}\.json: .*truncated or damaged; unpack (v1\.0-trainval_meta|nuScenes-lidarseg-all)"
    ):
        open_dataset("nuscenes", copy)


@pytest.mark.parametrize(
    ("table", "refers"),
    [
        ("sensor", "calibrated_sensor"),
        ("calibrated_sensor", "sample_data"),
        ("scene", "sample"),
        ("sample", "sample_data"),
        ("ego_pose", "sample_data"),
    ],
)
def test_tables_of_different_releases(copy: Path, table: str, refers: str) -> None:
    """A row is missing, say the calibration of a camera."""
    sample_id = read_val(copy).id
    edit(copy, table, list.clear)
    match = rf"{table}\.json: no row '\w+', which {refers}\.json refers to.*unpack v1\.0-trainval_meta"
    with pytest.raises(DataError, match=match):
        open_dataset("nuscenes", copy).read(sample_id)


def test_poses_are_read_once(copy: Path, monkeypatch) -> None:
    """Poses that cannot be read do not cost seconds for every sample."""
    sample_id = read_val(copy).id
    edit(copy, "ego_pose", lambda found: found[0].pop("rotation"))
    edit(copy, "ego_pose", lambda found: [row.update(token=found[0]["token"]) for row in found])
    dataset = open_dataset("nuscenes", copy)
    for _ in range(2):
        with pytest.raises(DataError, match=r"ego_pose\.json"):
            dataset.read(sample_id)
        monkeypatch.setattr(nuscenes_tables, "rows_where", None)


@pytest.mark.parametrize(
    ("table", "change", "match"),
    [
        ("calibrated_sensor", {"rotation": [1, 0, 0]}, "expected 4 numbers"),
        ("calibrated_sensor", {"translation": "1 2 3"}, "expected 3 numbers"),
        ("sample_data", {"timestamp": "noon"}, "TypeError"),
        ("sample_data", {"timestamp": 2**80}, "OverflowError"),
        ("sample", {"scene_token": ["a"]}, "TypeError"),
        ("scene", {"token": {}}, "TypeError"),
    ],
)
def test_rows_of_other_types(copy: Path, table: str, change: dict[str, Any], match: str) -> None:
    edit(copy, table, lambda found: [row.update(change) for row in found])
    with pytest.raises(DataError, match=rf"{table}\.json: row .* is not as nuScenes describes it.*{match}.*unpack"):
        open_dataset("nuscenes", copy)


def test_a_key_that_is_missing(copy: Path) -> None:
    edit(copy, "sample_data", lambda found: [row.pop("ego_pose_token") for row in found])
    with pytest.raises(DataError, match=r"sample_data\.json: row .*KeyError: 'ego_pose_token'"):
        open_dataset("nuscenes", copy)


def test_lidarseg_that_was_not_unpacked_over_the_tables(copy: Path) -> None:
    edit(copy, "category", lambda found: [row.pop("index") for row in found])
    with pytest.raises(
        MissingDataError, match=r"category\.json: its categories have no 'index'.*unpack nuScenes-lidarseg-all"
    ):
        open_dataset("nuscenes", copy)
    edit(copy, "category", lambda found: [row.update(index=1, name="vehicle.ufo") for row in found])
    with pytest.raises(DataError, match=r"category\.json: category 'vehicle\.ufo' with index 1"):
        open_dataset("nuscenes", copy)


def test_lidarseg_one_folder_too_deep(copy: Path) -> None:
    inner = copy / "nuScenes-lidarseg-all-v1.0"
    shutil.move(copy / "lidarseg", inner / "lidarseg")
    with pytest.raises(
        MissingDataError, match=r"_lidarseg\.bin: no such file, but there is .*: move what is in .* up to"
    ):
        read_val(copy)
    (inner / TRAINVAL).mkdir()
    shutil.move(copy / TRAINVAL / "lidarseg.json", inner / TRAINVAL / "lidarseg.json")
    with pytest.raises(
        MissingDataError, match=r"lidarseg\.json: no such file, but there is .*all-v1\.0.*: move what is in"
    ):
        open_dataset("nuscenes", copy)


def test_scenes_of_no_list(copy: Path, caplog) -> None:
    edit(copy, "scene", lambda found: found[1].update(name="scene-9999"))
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset("nuscenes", copy)
    assert "1 scenes are in no official list of v1.0-trainval and are left out: scene-9999" in caplog.text
    assert len(dataset.sample_ids("train")) == 2 and not dataset.sample_ids("val")
    edit(copy, "scene", lambda found: [row.update(name="scene-9999") for row in found])
    with pytest.raises(MissingDataError, match=r"list no sample of an official scene; unpack v1\.0-trainval_meta"):
        open_dataset("nuscenes", copy, {"version": TRAINVAL})


# --- bad input: a sample --------------------------------------------------------------------------------------------


def file_of(root: Path, channel: str) -> Path:
    row = of_val(root, "sample_data", channel)(json.loads((root / TRAINVAL / "sample_data.json").read_text()))
    return root / str(row["filename"])


def test_a_missing_scan_names_its_archive(copy: Path) -> None:
    sample_id = read_val(copy).id
    file_of(copy, LIDAR).unlink()
    match = (
        r"LIDAR_TOP/.*\.pcd\.bin: no such file; unpack v1\.0-trainval01_blobs\.tgz, or v1\.0-trainval01_keyframes\.tgz"
    )
    with pytest.raises(MissingDataError, match=match):
        open_dataset("nuscenes", copy).read(sample_id)


def test_archives_of_scenes() -> None:
    """Issue 664 of the devkit: a scan of scene-0103 comes in v1.0-trainval02_keyframes.tgz."""
    numbers = {s: archive_number(s) for s in ("scene-0001", "scene-0102", "scene-0103", "scene-0553", "scene-1110")}
    assert list(numbers.values()) == [1, 1, 2, 6, 10]


def test_missing_labels(copy: Path) -> None:
    sample_id = read_val(copy).id
    (copy / f"lidarseg/{TRAINVAL}/{sample_id}_lidarseg.bin").unlink()
    with pytest.raises(
        MissingDataError, match=rf"{sample_id}_lidarseg\.bin: no such file; unpack nuScenes-lidarseg-all-v1\.0"
    ):
        read_val(copy)
    assert read_val(copy, labels="none").load_points().segment is None
    edit(copy, "lidarseg", lambda found: found.pop())
    dataset = open_dataset("nuscenes", copy)
    with pytest.raises(
        MissingDataError, match=r"lidarseg\.json: no row for sample '\w+'; unpack nuScenes-lidarseg-all"
    ):
        for split in ("train", "val"):
            for i in dataset.sample_ids(split):
                dataset.read(i)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b""])
def test_labels_of_another_length(copy: Path, change: Callable[[bytes], bytes]) -> None:
    sample = read_val(copy)
    path = copy / f"lidarseg/{TRAINVAL}/{sample.id}_lidarseg.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=r"_lidarseg\.bin: .* labels for the 8060 points.*unpack nuScenes-lidarseg-all"):
        sample.load_points()


def test_labels_of_no_category(copy: Path) -> None:
    sample = read_val(copy)
    path = copy / f"lidarseg/{TRAINVAL}/{sample.id}_lidarseg.bin"
    path.write_bytes(b"\x4d\x4d" + path.read_bytes()[2:])
    with pytest.raises(DataError, match=r"2 points have labels that category\.json does not list, for example 77"):
        sample.load_points()


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 39, b"\0" * 20 * (nuscenes.MAX_POINTS + 1)], ids=["empty", "cut", "huge"]
)
def test_a_damaged_scan(copy: Path, content: bytes) -> None:
    sample = read_val(copy)
    file_of(copy, LIDAR).write_bytes(content)
    with pytest.raises(
        DataError, match=rf"pcd\.bin: {len(content)} bytes, expected 1 to .* points.*unpack v1\.0-trainval01"
    ):
        sample.load_points()


def test_coordinates_that_are_not_finite(copy: Path) -> None:
    sample = read_val(copy, labels="none")
    file_of(copy, LIDAR).write_bytes(np.full((3, 5), np.nan, "<f4").tobytes())
    with pytest.raises(DataError, match=r"pcd\.bin: points: 3 of 3 coordinates are not finite"):
        sample.load_points()


def test_a_missing_image_is_left_out(copy: Path) -> None:
    file_of(copy, "CAM_BACK").unlink()
    sample = read_val(copy)
    assert [v.id for v in sample.views] == [c for c in CAMERAS if c != "CAM_BACK"]
    ((view, text),) = sample.broken_views
    assert view == "CAM_BACK" and re.search(r"\.jpg: no such file; unpack v1\.0-trainval01_blobs", text)


def test_a_scene_without_images(copy: Path, tmp_path: Path, position_checkpoint: Path) -> None:
    """As with the lidar archives alone: its points are kept, and it is said that no image sees them."""
    sample_id = read_val(copy).id
    for channel in CAMERAS:
        file_of(copy, channel).unlink()
    run = run_dataset("nuscenes", copy, tmp_path / "cache", position_checkpoint, splits=["val"])
    texts = [failure.error for failure in run.totals.failures]
    assert len(texts) == 7 and "kept with coverage 0" in texts[-1]
    assert len(run.sample(sample_id).coord) == 8060 and run.totals.covered == 0


def test_images_that_were_resized_or_cut(copy: Path) -> None:
    sample = read_val(copy)
    front, back = file_of(copy, "CAM_FRONT"), file_of(copy, "CAM_BACK")
    Image.open(front).resize((160, 108)).save(front)
    back.write_bytes(back.read_bytes()[:2000])
    views = {view.id: view for view in sample.views}
    with pytest.raises(
        DataError, match=r"CAM_FRONT.*expected 320x216 pixels.*got 160x108; images have to be as released"
    ):
        views["CAM_FRONT"].load_image()
    with pytest.raises(DataError, match=r"CAM_BACK.*truncated or damaged.*unpack v1\.0-trainval01"):
        views["CAM_BACK"].load_image()


def broken_view(root: Path, channel: str) -> str:
    """Why the view of one camera is left out; all others are there."""
    sample = read_val(root)
    assert len(sample.views) == 5
    ((view, text),) = sample.broken_views
    assert view == channel
    return text


def test_a_camera_without_a_keyframe_or_with_two(copy: Path) -> None:
    row = of_val(copy, "sample_data", "CAM_FRONT")
    edit(copy, "sample_data", lambda found: row(found).update(is_key_frame=False))
    assert "no keyframe of CAM_FRONT for sample" in broken_view(copy, "CAM_FRONT")
    edit(copy, "sample_data", lambda found: found.extend([{**found[0], **row(found), "is_key_frame": True}] * 2))
    assert "several keyframes of CAM_FRONT for sample" in broken_view(copy, "CAM_FRONT")


def test_a_sample_without_a_scan_or_with_two(copy: Path, caplog) -> None:
    row = of_val(copy, "sample_data", LIDAR)
    edit(copy, "sample_data", lambda found: found.append(dict(row(found))))
    with pytest.raises(DataError, match="several keyframes of LIDAR_TOP for sample"):
        read_val(copy)
    edit(
        copy,
        "sample_data",
        lambda found: [r.update(is_key_frame=False) for r in found if r["token"] == row(found)["token"]],
    )
    with caplog.at_level(logging.WARNING):
        assert not open_dataset("nuscenes", copy).sample_ids("val")
    assert "1 samples have no keyframe of LIDAR_TOP and are left out" in caplog.text


@pytest.mark.parametrize(
    "rotation", [[0, 0, 0, 0], [0.9, 0.1, 0.2, 0.3], [float("nan"), 0, 0, 1], [1e200, 0, 0, 1e200]], ids=str
)
@pytest.mark.parametrize("table", ["ego_pose", "calibrated_sensor"])
def test_rotations_that_are_none(copy: Path, rotation: list[float], table: str) -> None:
    camera, lidar = (of_val(copy, table, channel) for channel in ("CAM_FRONT", LIDAR))
    sample_id = read_val(copy).id
    edit(copy, table, lambda found: camera(found).update(rotation=rotation))
    assert re.search(
        rf"CAM_FRONT, {table}: quaternion .* has length .* expected length 1", broken_view(copy, "CAM_FRONT")
    )
    edit(copy, table, lambda found: lidar(found).update(rotation=rotation))
    with pytest.raises(
        DataError, match=rf"sample '{sample_id}' of scene-0003: LIDAR_TOP, {table}: quaternion .* has length"
    ):
        open_dataset("nuscenes", copy).read(sample_id)


@pytest.mark.parametrize(
    ("intrinsic", "text"),
    [
        ([], "expected a 3x3"),
        ([[300.0, 0, 160]], "expected a 3x3"),
        ([[0.0, 0, 160], [0, 0, 108], [0, 0, 1]], "singular"),
        ([[1266.0, 0, 816], [0, 1266, 491], [0, 0, 1]], "of another image size"),
    ],
)
def test_intrinsics_that_are_none(copy: Path, intrinsic: list[list[float]], text: str) -> None:
    row = of_val(copy, "calibrated_sensor", "CAM_BACK")
    edit(copy, "calibrated_sensor", lambda found: row(found).update(camera_intrinsic=intrinsic))
    found = broken_view(copy, "CAM_BACK")
    assert text in found and "CAM_BACK, calibrated_sensor" in found


def moved(row: Callable[[list[dict[str, Any]]], dict[str, Any]], by: int) -> Callable[[list[dict[str, Any]]], None]:
    """Moves the time stamp of a row."""
    return lambda found: row(found).update(timestamp=row(found)["timestamp"] + by)


def test_poses_and_images_of_another_time(copy: Path) -> None:
    pose, image = of_val(copy, "ego_pose", "CAM_BACK_LEFT"), of_val(copy, "sample_data", "CAM_BACK_LEFT")  # -600 us
    lidar_pose, sample_id = of_val(copy, "ego_pose", LIDAR), read_val(copy).id
    edit(copy, "ego_pose", moved(pose, 50_000))
    assert "CAM_BACK_LEFT: its ego pose is 0.050 s away from it" in broken_view(copy, "CAM_BACK_LEFT")
    edit(copy, "ego_pose", moved(pose, 150_000))
    edit(copy, "sample_data", moved(image, 200_000))
    assert len(read_val(copy).views) == 6  # late, but nearer than the next keyframe, and with a pose of its own time
    edit(copy, "ego_pose", moved(pose, 200_000))
    edit(copy, "sample_data", moved(image, 200_000))
    assert re.search(r"samples/CAM_BACK_LEFT/.*: taken 0\.400 s away from the scan", broken_view(copy, "CAM_BACK_LEFT"))
    edit(copy, "ego_pose", moved(lidar_pose, -(10**15)))
    with pytest.raises(DataError, match=rf"sample '{sample_id}' of scene-0003: LIDAR_TOP: its ego pose is"):
        open_dataset("nuscenes", copy).read(sample_id)


def test_equal_time_stamps_and_rows_in_any_order(copy: Path, caplog) -> None:
    ids = list(open_dataset("nuscenes", copy).sample_ids("train"))
    for table in ("sample", "sample_data", "ego_pose", "scene", "calibrated_sensor"):
        edit(copy, table, list.reverse)
    assert open_dataset("nuscenes", copy).sample_ids("train") == ids

    def at_once(found: list[dict[str, Any]]) -> None:
        for row in found:
            row["timestamp"] = 7

    edit(copy, "sample_data", at_once)
    with caplog.at_level(logging.WARNING):
        assert open_dataset("nuscenes", copy).sample_ids("train") == sorted(ids)
    assert f"1 samples have the time stamp of the one before, the first is '{max(ids)}'" in caplog.text


def test_ids_with_odd_characters(copy: Path, tmp_path: Path, position_checkpoint: Path, written: Written) -> None:
    """Tokens are whatever the tables say: here one with a slash, blanks, quotes and a letter beyond ASCII."""
    sample_id, odd = read_val(copy).id, "../a b/'\u00e9\"\\\n"
    of_tables = (("sample_data", "token"), ("ego_pose", "token"), ("lidarseg", "sample_data_token"))
    for table, key in (*of_tables, ("sample_data", "ego_pose_token")):
        edit(copy, table, lambda found, key=key: [row.update({key: odd}) for row in found if row[key] == sample_id])
    run = run_dataset("nuscenes", copy, tmp_path / "cache", position_checkpoint, splits=["val"])
    (truth,) = written.of("val")
    assert run.totals.failures == [] and as_written(run, replace(truth, sample_id=odd))


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "samples/../../secret.jpg", "a\0b"])
def test_names_that_lead_out_of_the_root(copy: Path, name: str) -> None:
    (copy.parent / "secret.jpg").write_bytes(file_of(copy, "CAM_FRONT").read_bytes())
    camera, scan = (of_val(copy, "sample_data", channel) for channel in ("CAM_FRONT", LIDAR))
    sample_id = read_val(copy).id
    edit(copy, "sample_data", lambda found: camera(found).update(filename=name))
    assert "expected a file below" in broken_view(copy, "CAM_FRONT")
    edit(copy, "sample_data", lambda found: scan(found).update(filename=name))
    with pytest.raises(DataError, match=r"expected a file below .*unpack them again"):
        open_dataset("nuscenes", copy).read(sample_id)
