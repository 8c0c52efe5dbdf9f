"""The Waymo reader on a release that `layouts/waymo.py` wrote: what is right, planted faults, bad input."""

import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dataset_runs import Extracted, run_dataset
from ditr_cache.datasets import open_dataset
from ditr_cache.datasets.base import dataset_class, partitions
from ditr_cache.datasets.waymo import camera as waymo_camera
from ditr_cache.datasets.waymo import dataset as waymo
from ditr_cache.datasets.waymo import lidar as waymo_lidar
from ditr_cache.datasets.waymo import segment as waymo_segment
from ditr_cache.datasets.waymo import tables as waymo_tables
from ditr_cache.datasets.waymo.tables import Table
from ditr_cache.errors import DataError, MissingDataError, UnknownNameError, UsageError
from ditr_cache.geometry import inside
from ditr_cache.sample import Camera
from layouts import waymo as writer
from world import Eye, Truth

GRID = (12, 24)
ALL = {"frames": "all"}
TRAIN, UNLABELLED, VAL, *TESTS = (f"{context}_{t}" for context, stamps, _ in writer.SEGMENTS.values() for t in stamps)
SEGMENT, (FIRST, SECOND), _ = writer.SEGMENTS["training"]
SPLITS = {"training": "train", "validation": "val", "testing": "test"}


def cropped(eye: Eye) -> Eye:
    """The eye of an image whose upper rows were cut off, until it is as wide as 1920 x 886."""
    top = eye.height - round(eye.width * 886 / 1920)
    if top <= 0:
        return eye
    pixels = np.meshgrid(np.arange(eye.width) + 0.5, np.arange(eye.height) + 0.5)
    rays = eye.to_ray(*pixels)[top:]  # the writer remembers those of all pixels, and no others

    def to_pixel(points):
        u, v, seen = eye.to_pixel(points)
        return u, v - top, seen

    def to_ray(u, v):
        return rays if u.shape == rays.shape[:2] else eye.to_ray(u, v + top)

    return replace(eye, height=eye.height - top, to_pixel=to_pixel, to_ray=to_ray)


def written(root: Path, **settings: Any) -> list[Truth]:
    """A release in the reader's order of points, and its truth in cropped images."""
    truths = writer.write(root, **{"order": "return", **settings})
    return [replace(t, eyes={name: cropped(eye) for name, eye in t.eyes.items()}) for t in truths]


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> tuple[Path, dict[str, Truth]]:
    root = tmp_path_factory.mktemp("waymo") / "release"
    return root, {truth.sample_id: truth for truth in written(root)}


@pytest.fixture(scope="module")
def extracted(release, tmp_path_factory, position_checkpoint) -> Extracted:
    return run_dataset(
        "waymo", release[0], tmp_path_factory.mktemp("waymo-cache") / "c", position_checkpoint, grid=GRID, options=ALL
    )


@pytest.fixture
def copy(release, tmp_path) -> Path:
    """The training split of the release, to be damaged."""
    shutil.copytree(release[0] / "training", tmp_path / "release" / "training")
    return tmp_path / "release"


@pytest.fixture(autouse=True)
def nothing_remembered():
    """Files are remembered by size and time; planted faults change neither."""
    for remembered in (waymo_segment.open_segment, waymo_segment.load_points, waymo_segment._released):
        remembered.cache_clear()


def file_of(root: Path, component: str, split: str = "training") -> Path:
    return next((root / split / component).glob("*.parquet"))


def edit(root: Path, component: str, change: Callable[[list[dict[str, Any]]], object], split: str = "training") -> Path:
    """Change the rows of a file in place, or give others."""
    path = file_of(root, component, split)
    table = pq.read_table(path)
    rows = table.to_pylist()
    changed = change(rows)
    rows = changed if isinstance(changed, list) else rows
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    return path


def cell(row: dict[str, Any], name: str) -> str:
    """Full name of a component's column."""
    return next(key for key in row if key.endswith(f"].{name}"))


def put(name: str, value: Any, **keys: int) -> Callable[[list[dict[str, Any]]], None]:
    """Set a column, of rows with these keys."""

    def change(rows):
        for row in rows:
            if all(row[f"key.{key}"] == wanted for key, wanted in keys.items()):
                row[cell(row, name)] = value(row[cell(row, name)]) if callable(value) else value

    return change


def without(**keys: int) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """All rows but those with these keys."""
    return lambda rows: [row for row in rows if any(row[f"key.{key}"] != value for key, value in keys.items())]


def extract(root: Path, tmp_path: Path, checkpoint: Path, **options: str) -> Extracted:
    """The training split, all frames where nothing else is said."""
    return run_dataset(
        "waymo", root, tmp_path / "cache", checkpoint, grid=GRID, options={**ALL, **options}, splits=("train",)
    )


def said(error: pytest.ExceptionInfo[BaseException], *words: object) -> bool:
    """Whether a message holds all of these."""
    missing = [str(word) for word in words if str(word) not in str(error.value)]
    assert not missing, f"{missing} not in {error.value}"
    return True


# --- what is right --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample_id", [TRAIN, UNLABELLED, VAL, *TESTS])
def test_released_projections_put_features_on_their_points(sample_id, release, extracted):
    truth = release[1][sample_id]
    report = extracted.report(truth, writer.STREET)
    assert report.right(occlusion=False), report
    assert report.hidden > 1000
    sample = extracted.sample(sample_id)
    order = sample.source_index.astype(int)
    np.testing.assert_allclose(sample.strength, np.tanh(truth.channels["strength"][order]), atol=1e-6)
    assert sample.split == SPLITS[truth.split]
    if truth.label is not None:
        np.testing.assert_array_equal(sample.instance, truth.channels["instance"][order])
        assert (sample.segment >= 0).sum() > 1000


def test_nothing_fails_and_frames_without_labels_are_ignored(extracted):
    assert not extracted.totals.failures and extracted.totals.images == 25
    # The other frame of the segment has labels, so this one has them, too: all ignored.
    assert (extracted.sample(UNLABELLED).segment == -1).all() and (extracted.sample(UNLABELLED).instance == -1).all()
    assert all(extracted.sample(i).segment is None for i in TESTS)


def test_our_geometry_puts_features_on_their_points(release, tmp_path, position_checkpoint):
    cache = extract(release[0], tmp_path, position_checkpoint, projection="geometry")
    for sample_id in (TRAIN, UNLABELLED):
        report = cache.report(release[1][sample_id], writer.STREET)
        assert report.right(occlusion=False), report
    assert cache.cache.metadata.dataset_options == {**ALL, "projection": "geometry"}


def test_uncropped_images_show_more(release, extracted, tmp_path, position_checkpoint):
    whole = extract(release[0], tmp_path, position_checkpoint, crop="none")
    truth = {t.sample_id: t for t in writer.write(tmp_path / "again", splits=("training",), order="return")}[TRAIN]
    report = whole.report(truth, writer.STREET)
    assert report.right(occlusion=False), report
    assert whole.sample(TRAIN).valid.sum() > extracted.sample(TRAIN).valid.sum() + 300


def test_first_returns_alone(release, tmp_path, position_checkpoint):
    root, truths = release
    both = open_dataset("waymo", root).read(TRAIN).load_points()
    sample = open_dataset("waymo", root, {"returns": "first"}).read(TRAIN)
    first = sample.load_points()
    count = len(first.coord)
    assert 0.7 * len(both.coord) < count < len(both.coord)
    np.testing.assert_array_equal(first.coord, both.coord[:count])  # second returns come after all first ones
    np.testing.assert_array_equal(first.segment, both.segment[:count])
    projection = truths[TRAIN].channels["projection"][:count]
    for number, view in enumerate(sample.views, 1):
        found = view.load_projection()
        np.testing.assert_array_equal(found.point, np.flatnonzero((projection[:, [0, 3]] == number).any(axis=1)))


VARIANTS = [
    {"empty_laser": 2, "null_second": 1},
    {"empty_laser": 1},  # the one with labels, and most points
    {"missing_laser": 3, "null_second": 5},
    {"null_second": 4, "row_group_size": 1},
    {"row_group_size": 256, "image_scale": 0.12, "seed": 3},
]


def test_transforms_of_single_precision(release, copy, tmp_path, position_checkpoint):
    """They are doubles in the release; written as floats, poses still are poses, a millimetre off."""
    for path in copy.glob("training/*/*.parquet"):
        table = pq.read_table(path)
        for i, name in enumerate(table.schema.names):
            if name.endswith(".transform"):
                assert table.schema.types[i].value_type == pa.float64()
                table = table.set_column(i, name, table[name].cast(pa.list_(pa.float32(), 16)))
        pq.write_table(table, path)
    for projection in ("released", "geometry"):
        cache = extract(copy, tmp_path / projection, position_checkpoint, projection=projection, frames="labelled")
        report = cache.report(release[1][TRAIN], writer.STREET)
        assert report.right(occlusion=False), report
        assert not cache.totals.failures


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_every_variant_of_the_release(settings, tmp_path, position_checkpoint):
    truth = written(tmp_path / "release", splits=("training",), **settings)[0]
    cache = extract(tmp_path / "release", tmp_path, position_checkpoint, frames="labelled")
    report = cache.report(truth, writer.STREET)
    assert report.right(occlusion=False, at_least=100), report
    assert not cache.totals.failures


def test_a_point_in_two_images_is_linked_to_both(release):
    sample = open_dataset("waymo", release[0]).read(TRAIN)
    found = [set(view.load_projection().point.tolist()) for view in sample.views]
    projection = release[1][TRAIN].channels["projection"]
    assert len(found[0] & found[1]) == ((projection[:, 0] == 1) & (projection[:, 3] == 2)).sum() > 50
    assert [view.id for view in sample.views] == list(writer.CAMERAS)


def test_whole_pixels_are_taken_at_their_centres_and_cropped(release):
    sample = open_dataset("waymo", release[0]).read(TRAIN)
    projection = release[1][TRAIN].channels["projection"]
    found = sample.views[0].load_projection()  # FRONT is always in the first slot
    np.testing.assert_array_equal(found.u, projection[found.point, 1] + 0.5)
    np.testing.assert_array_equal(found.v, projection[found.point, 2] + 0.5 - 59)
    assert sample.views[0].load_image().shape == (133, 288, 3) == sample.views[3].load_image().shape
    assert sample.views[0].camera.cy == pytest.approx(641.5 * 0.15 - 59)


def test_samples_splits_and_partitions(release):
    dataset = open_dataset("waymo", release[0])
    assert dataset.splits == ("train", "val", "test")
    # By default the frames of the benchmark: labelled ones, and those of the official list.
    assert [dataset.sample_ids(s) for s in dataset.splits] == [[TRAIN], [VAL], list(writer.LISTED)]
    every = open_dataset("waymo", release[0], ALL)
    assert every.sample_ids("train") == [TRAIN, UNLABELLED]
    assert [p.id for p in partitions(every, ["train"])] == [f"{SEGMENT}-000000"]
    assert partitions(every, ["train"])[0].sample_ids == (TRAIN, UNLABELLED)
    with pytest.raises(UnknownNameError, match="did you mean 'train'"):
        dataset.sample_ids("training")


def test_classes_are_those_of_the_recipes(release):
    recipe = yaml.safe_load((Path(__file__).parents[2] / "pipelines/waymo/base.yaml").read_text())
    classes = open_dataset("waymo", release[0]).classes
    assert [c.name for c in classes] == recipe["classes"]
    assert len({c.color for c in classes}) == 22
    known = {name: number for number, name, _ in writer.LABELS.values() if name}
    assert {name: [c.name for c in classes].index(name) + 1 for name in known} == known


def test_defaults_are_those_of_the_published_recipe():
    cls = dataset_class("waymo")
    assert cls.defaults.grid == (22, 48) and cls.defaults.layout == "views" and cls.defaults.links.occlusion == "none"
    assert cls.samples_per_partition == 64
    assert cls.release.samples == 32_649 and cls.release.images == 5 * 32_649
    assert {need.path.split("/")[1] for need in cls.needs} == set(writer._COMPONENTS)


def test_the_official_list_of_test_frames():
    frames = waymo.read_test_frames(Path("nowhere"))
    assert len(frames) == 150 and sum(map(len, frames.values())) == 2982
    assert all(len(str(t)) == 16 for found in frames.values() for t in found)


def test_samples_can_be_sent_to_other_processes(release):
    sample = pickle.loads(pickle.dumps(open_dataset("waymo", release[0], {"projection": "geometry"}).read(TRAIN)))
    assert len(sample.load_points().coord) == len(release[1][TRAIN].world)
    assert sample.views[0].load_image().dtype == np.uint8


def test_a_file_is_decoded_once_and_only_wanted_rows_are_kept(release, monkeypatch):
    decoded = []
    real = Table._decoded
    monkeypatch.setattr(Table, "_decoded", lambda self, group: decoded.append(group) or real(self, group))
    table = Table(file_of(release[0], "lidar"), {SECOND})
    for echo in (1, 2):
        for laser in range(1, 6):
            table.image(echo, SECOND, laser, channels=4)
    assert decoded == [1, 2]  # ten rows in groups of four; the first has none of this frame
    kept = [table._keys[row] for rows in table._groups.values() for row in rows]
    assert sorted(kept) == [(SECOND, laser) for laser in range(1, 6)]


# --- rolling shutter ------------------------------------------------------------------------------------------------

READOUT, EXPOSURE = 0.04, 0.004
ALONG = {
    1: lambda u, v, eye: v / eye.height,
    2: lambda u, v, eye: u / eye.width,
    3: lambda u, v, eye: 1 - v / eye.height,
    4: lambda u, v, eye: 1 - u / eye.width,
}


@pytest.mark.parametrize("direction", ALONG)
def test_a_rolling_shutter_is_followed_by_our_geometry(direction, copy, release):
    """The point of every pixel is where the car's true pose at the pixel's own time puts it."""
    edit(copy, "camera_calibration", put("rolling_shutter_direction", direction))

    def roll(rows):
        for row in rows:
            middle = row[cell(row, "pose_timestamp")] + 0.003  # the pose need not be that of the middle
            row[cell(row, "rolling_shutter_params.shutter")] = EXPOSURE
            row[cell(row, "rolling_shutter_params.camera_trigger_time")] = middle - (READOUT + EXPOSURE) / 2
            row[cell(row, "rolling_shutter_params.camera_readout_done_time")] = middle + (READOUT + EXPOSURE) / 2

    images = pq.read_table(edit(copy, "camera_image", roll)).to_pylist()
    drive = writer._Drive((-0.5, 3.75), 1.52)
    truth = release[1][TRAIN]
    sample = open_dataset("waymo", copy, {"projection": "geometry"}).read(TRAIN)
    ahead = 0.0
    for camera, view in zip(writer._cameras(0.15), sample.views, strict=True):
        row = next(r for r in images if (r["key.frame_timestamp_micros"], r["key.camera_name"]) == (FIRST, camera.name))
        stored = np.reshape(row[cell(row, "pose.transform")], (4, 4))
        np.testing.assert_allclose(drive.pose(camera.delay), stored, atol=1e-9)  # the test knows the drive
        found = view.load_projection()
        top = 192 - 133 if camera.name <= 3 else 0
        keep = inside(found.u, found.v, view.camera)
        point, u, v = found.point[keep][::40], found.u[keep][::40], found.v[keep][::40] + top
        assert len(point) > 15
        for where, at_u, at_v in zip(truth.world[point], u, v, strict=True):
            after = 0.003 + READOUT * (ALONG[direction](at_u, at_v, camera.lens) - 0.5)
            true_u, true_v, seen = camera.eye(drive.pose(camera.delay + after)).project(where[None])
            assert seen[0] and abs(true_u[0] - at_u) < 0.15 and abs(true_v[0] - at_v) < 0.15
            still_u, still_v, _ = camera.eye(drive.pose(camera.delay)).project(where[None])
            ahead = max(ahead, abs(still_u[0] - at_u), abs(still_v[0] - at_v))
    assert ahead > 3  # pixels off, were the shutter ignored


# --- planted faults -------------------------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def pose_direction(patch: Patch) -> None:
    real = waymo.image_from_frame
    patch.setattr(waymo, "image_from_frame", lambda *a: np.linalg.inv(real(*a)))


def ego_motion_to_the_image(patch: Patch) -> None:
    patch.setattr(waymo, "image_from_frame", lambda *a: np.eye(4))


def ego_motion_within_a_turn(patch: Patch) -> None:
    real = waymo_lidar.moved_by
    patch.setattr(waymo_lidar, "moved_by", lambda p, poses: real(p, np.median(poses, axis=0, keepdims=True)))


def pose_of_the_other_frame(patch: Patch) -> None:
    real, other = waymo_lidar.frame_pose, {FIRST: SECOND, SECOND: FIRST}
    patch.setattr(waymo_lidar, "frame_pose", lambda table, t: real(table, other[t]))


def image_of_the_other_frame(patch: Patch) -> None:
    real, other = Table.binary, {FIRST: SECOND, SECOND: FIRST}
    patch.setattr(Table, "binary", lambda self, name, t, camera: real(self, name, other[t], camera))


def joined_by_position(patch: Patch) -> None:
    real = Table.row

    def row(self, *key):
        return sorted(self._rows).index(key) if self.path.parent.name == "lidar_pose" else real(self, *key)

    patch.setattr(Table, "row", row)


def distortion_ignored(patch: Patch) -> None:
    real = waymo.read_lens

    def read(*a, **k):
        lens = real(*a, **k)
        return replace(lens, whole=replace(lens.whole, model="pinhole", distortion=()))

    patch.setattr(waymo, "read_lens", read)


def axes_mirrored(patch: Patch) -> None:
    patch.setattr(waymo_camera, "OURS_FROM_WAYMO", np.diag([-1.0, 1, 1, 1]) @ waymo_camera.OURS_FROM_WAYMO)


def crop_without_the_principal_point(patch: Patch) -> None:
    patch.setattr(
        Camera, "cropped", lambda self, *, left, top, width, height: replace(self, width=width, height=height)
    )


def released_rows_not_cropped(patch: Patch) -> None:
    patch.setattr(waymo, "load_released", lambda *a: waymo_segment._released(*a[:3])[a[3]])


def released_columns_and_rows_swapped(patch: Patch) -> None:
    real = waymo.load_released

    def load(*a):
        found = real(*a)
        return replace(found, u=found.v, v=found.u)

    patch.setattr(waymo, "load_released", load)


def projections_of_other_points(patch: Patch) -> None:
    real = waymo_segment.released_projections
    patch.setattr(waymo_segment, "released_projections", lambda found, *a: real(list(found)[::-1], *a))


def colours_swapped(patch: Patch) -> None:
    real = waymo.load_image
    patch.setattr(waymo, "load_image", lambda *a: real(*a)[..., ::-1])


def millimetres(patch: Patch) -> None:
    real = waymo_lidar._directions
    patch.setattr(waymo_lidar, "_directions", lambda *a: real(*a) / 1000)


def azimuth_without_the_yaw(patch: Patch) -> None:
    real = waymo_lidar._directions
    patch.setattr(waymo_lidar, "_directions", lambda scan, pose, up: real(scan, np.eye(4), up))


def inclinations_upside_down(patch: Patch) -> None:
    real = waymo_lidar._inclinations
    patch.setattr(waymo_lidar, "_inclinations", lambda *a: real(*a)[::-1])


def labels_of_another_map(patch: Patch) -> None:
    real = waymo_lidar._labels
    patch.setattr(waymo_lidar, "_labels", lambda *a: np.where(real(*a) >= 0, (real(*a) + 1) % 22, -1))


def labels_of_columns_in_reverse(patch: Patch) -> None:
    real = waymo_lidar._labels
    patch.setattr(waymo_lidar, "_labels", lambda *a: real(*a)[::-1])


RELEASED = [
    ego_motion_within_a_turn, pose_of_the_other_frame, image_of_the_other_frame, joined_by_position,
    released_rows_not_cropped, released_columns_and_rows_swapped, projections_of_other_points, colours_swapped,
    millimetres, azimuth_without_the_yaw, inclinations_upside_down, labels_of_another_map, labels_of_columns_in_reverse,
]  # fmt: skip
GEOMETRY = [
    pose_direction, ego_motion_to_the_image, distortion_ignored, axes_mirrored, crop_without_the_principal_point,
]  # fmt: skip


@pytest.mark.parametrize(
    ("projection", "fault"),
    [*(("released", f) for f in RELEASED), *(("geometry", f) for f in GEOMETRY)],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_planted_faults_are_caught(projection, fault, release, tmp_path, position_checkpoint, monkeypatch):
    """Unplanted, the same data pass: `test_released_projections_...` and `test_our_geometry_...`."""
    fault(monkeypatch)
    frames = "all" if fault in (image_of_the_other_frame, joined_by_position) else "labelled"
    cache = extract(release[0], tmp_path, position_checkpoint, projection=projection, frames=frames)
    assert not cache.report(release[1][TRAIN], writer.STREET).right(occlusion=False, at_least=1)


def test_another_order_of_points_is_caught(tmp_path, extracted):
    other = writer.write(tmp_path, splits=("training",), order="laser")[0]
    assert not extracted.report(other, writer.STREET).right(occlusion=False, at_least=1)


# --- half a release -------------------------------------------------------------------------------------------------

EVERY = tuple(writer._COMPONENTS)


@pytest.mark.parametrize("component", EVERY)
def test_a_component_that_was_not_downloaded(component, copy):
    shutil.rmtree(copy / "training" / component)
    with pytest.raises(MissingDataError) as error:
        open_dataset("waymo", copy)
    assert said(error, copy / "training" / component, f"gs://waymo_open_dataset_v_2_0_1/training/{component}")


@pytest.mark.parametrize("component", [c for c in EVERY if c not in ("camera_image", "lidar_segmentation")])
def test_a_file_that_was_not_downloaded(component, copy):
    path = file_of(copy, component)
    path.unlink()
    with pytest.raises(MissingDataError) as error:
        open_dataset("waymo", copy).read(TRAIN)
    assert said(error, path, "no such file", f"_v_2_0_1/training/{component} (Waymo")


def test_without_projections_our_geometry_is_offered(copy):
    shutil.rmtree(copy / "training/lidar_camera_projection")
    with pytest.raises(MissingDataError, match="--option projection=geometry"):
        open_dataset("waymo", copy)
    assert len(open_dataset("waymo", copy, {"projection": "geometry"}).read(TRAIN).views) == 5


def test_without_labels_all_frames_are_offered(copy):
    shutil.rmtree(copy / "training/lidar_segmentation")
    with pytest.raises(MissingDataError, match="--option frames=all"):
        open_dataset("waymo", copy)
    assert open_dataset("waymo", copy, ALL).read(TRAIN).load_points().segment is None


def test_a_split_that_is_not_whole_blocks_no_other(copy, release, run):
    """Of the location's segments nothing is needed for the benchmark; of the others, where they are asked for."""
    poses = copy / "testing_location/vehicle_pose/elsewhere.parquet"
    poses.parent.mkdir(parents=True)
    shutil.copy(file_of(release[0], "vehicle_pose", "testing"), poses)
    shutil.copytree(release[0] / "validation/vehicle_pose", copy / "validation/vehicle_pose")
    dataset = open_dataset("waymo", copy)
    assert dataset.splits == ("train", "val", "test_location")
    assert dataset.sample_ids("train") == [TRAIN] and len(dataset.read(TRAIN).views) == 5
    assert dataset.sample_ids("test_location") == [] and len(partitions(dataset, ["train", "test_location"])) == 1
    for asked in (lambda: dataset.sample_ids("val"), lambda: partitions(dataset), lambda: dataset.read(VAL)):
        with pytest.raises(MissingDataError) as error:
            asked()
        assert said(error, copy / "validation/lidar", "_v_2_0_1/validation/lidar (Waymo", "--split")
    found = run("check", "--dataset", "waymo", "--root", copy, "--json")
    assert found.code == 1 and found.json["splits"] == {"train": 1, "test_location": 0}
    (problem,) = found.json["problems"]
    assert problem["kind"] == "missing" and not problem["sample"] and str(copy / "validation/lidar") in problem["text"]
    assert f"\nmissing: {problem['text']}" in run("check", "--dataset", "waymo", "--root", copy).out
    every = open_dataset("waymo", copy, ALL)
    assert every.sample_ids("train") == [TRAIN, UNLABELLED]
    with pytest.raises(MissingDataError, match="testing_location/lidar"):
        every.sample_ids("test_location")
    shutil.rmtree(copy / "training/lidar")
    with pytest.raises(MissingDataError, match="training/lidar"):  # no split is left that has a sample
        open_dataset("waymo", copy)


def test_an_empty_folder_of_a_split_blocks_no_other(copy):
    for component in EVERY:
        (copy / "validation" / component).mkdir(parents=True)
    dataset = open_dataset("waymo", copy)
    assert dataset.sample_ids("train") == [TRAIN]
    with pytest.raises(MissingDataError, match=r"no segment in .*validation.*--split"):
        dataset.sample_ids("val")


def test_segments_without_labelled_frames_are_left_out_and_named(copy, caplog):
    for folder in (copy / "training").iterdir():
        source = next(folder.glob("*.parquet"))
        if folder.name != "lidar_segmentation":
            shutil.copy(source, folder / "another_segment.parquet")
    (copy / "training/lidar/_SUCCESS").write_text("")  # issue 802 of the official repository
    (copy / "training/lidar/.hidden.parquet").write_text("")
    assert open_dataset("waymo", copy).sample_ids("train") == [TRAIN]
    assert "1 of 2 segments" in caplog.text and "no labelled frames" in caplog.text and "another_segment" in caplog.text


def test_a_segment_without_images_keeps_its_points(copy, tmp_path, position_checkpoint):
    path = file_of(copy, "camera_image")
    path.rename(path.with_suffix(".part"))
    cache = extract(copy, tmp_path, position_checkpoint)
    sample = cache.sample(TRAIN)
    assert len(sample.coord) > 10_000 and not sample.valid.any() and (sample.segment >= 0).any()
    errors = [f.error for f in cache.totals.failures if f.sample == TRAIN]
    assert any("coverage 0" in e for e in errors)
    assert any(str(path) in e and "_v_2_0_1/training/camera_image (Waymo" in e for e in errors)


@pytest.mark.parametrize(
    ("place", "hint"),
    [
        ("training", "pass its parent"),
        ("empty", "Perception v2.0.x (waymo.com/open)"),
        ("v1", "TFRecords are version 1"),
    ],
)
def test_a_wrong_root(place, hint, copy):
    (copy / "empty").mkdir()
    (copy / "v1").mkdir()
    (copy / "v1/segment-1.tfrecord").write_text("")
    with pytest.raises(MissingDataError) as error:
        open_dataset("waymo", copy / place)
    assert said(error, "no folder 'training'", hint)


def test_the_folder_above_is_passed(copy):
    (copy.parent / "a" / "training").mkdir(parents=True)  # somebody else's
    with pytest.raises(MissingDataError, match=f"no folder 'training' in .*; pass '{copy}' with --root"):
        open_dataset("waymo", copy.parent)


def test_an_empty_split(copy):
    for path in (copy / "training").glob("*/*.parquet"):
        path.unlink()
    with pytest.raises(MissingDataError, match="no segment in"):
        open_dataset("waymo", copy)


def test_a_segment_in_two_splits(copy):
    shutil.copytree(copy / "training", copy / "validation")
    with pytest.raises(DataError) as error:
        open_dataset("waymo", copy)
    assert said(error, SEGMENT, "training", "validation", "delete the copy")


def test_frames_and_segments_that_are_not_there(release):
    dataset = open_dataset("waymo", release[0])
    for name in (UNLABELLED, f"{SEGMENT}_1", f"{SEGMENT}_0{FIRST}", "../../etc_1", "", "/etc/passwd_1"):
        with pytest.raises(UnknownNameError):
            dataset.read(name)
    with pytest.raises(UnknownNameError, match=f"did you mean '{TRAIN}'"):
        dataset.read(TRAIN[:-1])


def test_pyarrow_is_not_installed(release, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match=r"pip install 'ditr\[datasets\]'"):
        open_dataset("waymo", release[0]).sample_ids("train")


# --- bad files ------------------------------------------------------------------------------------------------------


def read_all(root: Path, sample_id: str = TRAIN, **options: str) -> None:
    """Everything that extraction reads of one frame."""
    sample = open_dataset("waymo", root, options).read(sample_id)
    for view in sample.views:
        view.load_image()
        if view.load_projection is not None:
            view.load_projection()
    sample.load_points()


@pytest.mark.parametrize(
    ("component", "fault"),
    [*((c, "truncated") for c in EVERY), *(("lidar", f) for f in ("scrambled", "empty", "other"))],
)
def test_damaged_files(component, fault, copy):
    path = file_of(copy, component)
    content = path.read_bytes()
    if fault == "scrambled":  # the pages, not the footer
        content = content[:4] + bytes(255 - b for b in content[4 : len(content) // 2]) + content[len(content) // 2 :]
    path.write_bytes({"truncated": content[:-20], "scrambled": content, "empty": b"", "other": b"PAR1 or not"}[fault])
    with pytest.raises(DataError) as error:
        read_all(copy)
    assert said(error, path, "download")


def test_a_file_of_another_segment(copy):
    path = file_of(copy, "lidar")
    edit(copy, "lidar", lambda rows: [row | {"key.segment_context_name": "../elsewhere"} for row in rows])
    with pytest.raises(DataError) as error:
        read_all(copy)
    assert said(error, path, "'../elsewhere'", SEGMENT, "its own name")


@pytest.mark.parametrize(("bound", "words"), [("MAX_ROWS", "2 rows, expected at most 1"), ("MAX_CELLS", "decodes to")])
def test_sizes_are_checked_before_anything_is_decoded(bound, words, release, monkeypatch):
    monkeypatch.setattr(waymo_tables, bound, 1)
    with pytest.raises(DataError) as error:
        open_dataset("waymo", release[0], ALL).sample_ids("train")
    assert said(error, file_of(release[0], "vehicle_pose"), words)


@pytest.mark.parametrize(
    ("component", "column"),
    [("lidar", "range_image_return1.values"), ("camera_calibration", "intrinsic.k1"), ("camera_image", "image"),
     ("vehicle_pose", "world_from_vehicle.transform")],
)  # fmt: skip
def test_a_missing_column(component, column, copy):
    path = file_of(copy, component)
    table = pq.read_table(path)
    name = next(n for n in table.schema.names if n.endswith(f"].{column}"))
    pq.write_table(table.drop_columns([name]), path)
    sample_errors: list[str] = []
    try:
        sample = open_dataset("waymo", copy).read(TRAIN)
        sample_errors += [error for _, error in sample.broken_views]
        read_all(copy)
    except DataError as error:
        sample_errors.append(str(error))
    assert any(str(path) in e and name in e for e in sample_errors)


def test_labels_of_another_size(copy):
    def shorten(rows):
        for row in rows:
            values, shape = (cell(row, f"range_image_return1.{part}") for part in ("values", "shape"))
            height, width, channels = row[shape]
            row[values], row[shape] = row[values][: -width * channels], [height - 1, width, channels]

    path = edit(copy, "lidar_segmentation", shorten)
    with pytest.raises(DataError) as error:
        read_all(copy)
    assert said(error, path, "31x256 pixels", "return 1 32x256", "download both again")


def test_values_that_are_not_of_their_shape(copy):
    path = edit(copy, "lidar", put("range_image_return2.shape", [32, 255, 4], laser_name=1))
    with pytest.raises(DataError) as error:
        read_all(copy)
    assert said(error, path, "range_image_return2", "[32, 255, 4]", "download it again")


@pytest.mark.parametrize("wrong", [23, -5])
def test_labels_that_no_class_has(wrong, copy):
    def spoil(values):
        values[2 * 256 * 9 + 1 :: 2] = [wrong] * len(values[2 * 256 * 9 + 1 :: 2])
        return values

    path = edit(copy, "lidar_segmentation", put("range_image_return1.values", spoil))
    with pytest.raises(DataError) as error:
        read_all(copy)
    assert said(error, path, f"class {wrong} of", "lidar TOP", "expected 0 (undefined) to 22")


def test_a_frame_without_any_point(copy, tmp_path, position_checkpoint):
    change = put("range_image_return1.values", lambda values: [-1.0] * len(values), frame_timestamp_micros=SECOND)
    edit(copy, "lidar", change)
    change = put("range_image_return2.values", lambda values: [-1.0] * len(values), frame_timestamp_micros=SECOND)
    path = edit(copy, "lidar", change)
    with pytest.raises(DataError) as error:
        open_dataset("waymo", copy, ALL).read(UNLABELLED).load_points()
    assert said(error, path, SECOND, "no lidar has a single return", "leave the frame out")
    cache = extract(copy, tmp_path, position_checkpoint)  # the other frame of the partition goes on
    assert cache.totals.points == len(cache.sample(TRAIN).coord)
    assert [f.sample for f in cache.totals.failures] == [UNLABELLED]


def test_poses_of_pixels_of_another_drive(copy):
    path = edit(copy, "lidar_pose", put("range_image_return1.values", lambda values: [0.0] * len(values)))
    with pytest.raises(DataError) as error:
        read_all(copy)
    assert said(error, path, "vehicle_pose", "expected at most 20", "download both again")


def test_points_without_a_pose_take_that_of_their_column(copy, release):
    def forget(values):
        values[10 * 256 * 6 : 14 * 256 * 6] = [0.0] * (4 * 256 * 6)
        return values

    edit(copy, "lidar_pose", put("range_image_return1.values", forget))
    coord = open_dataset("waymo", copy).read(TRAIN).load_points().coord
    assert np.abs(coord - release[1][TRAIN].coord).max() < 2e-3


@pytest.mark.parametrize("component", ["lidar", "lidar_camera_projection"])
def test_a_lidar_without_a_row_in_one_of_two_files(component, copy):
    path = edit(copy, component, without(frame_timestamp_micros=FIRST, laser_name=3))
    with pytest.raises(DataError) as error:
        read_all(copy)
    assert said(error, path, "no rows", "laser_name 3", FIRST)
    read_all(copy, UNLABELLED, **ALL)


@pytest.mark.parametrize("projection", ["released", "geometry"])
def test_a_lidar_without_any_return_has_no_row(projection, copy, caplog):
    """Of neither file; told once for a segment."""
    whole = open_dataset("waymo", copy, ALL).read(TRAIN).load_points()
    for component in ("lidar", "lidar_camera_projection"):
        for laser in (3, 5):
            edit(copy, component, without(laser_name=laser))
    dataset = open_dataset("waymo", copy, {**ALL, "projection": projection})
    for sample_id in (TRAIN, UNLABELLED):
        assert len(dataset.read(sample_id).views) == 5
    assert caplog.text.count("no row of lidar") == 1
    assert f"{file_of(copy, 'lidar')}: no row of lidar SIDE_LEFT at {FIRST}" in caplog.text
    found = dataset.read(TRAIN).load_points().coord
    assert 0.5 * len(whole.coord) < len(found) < len(whole.coord)
    assert {tuple(point) for point in found} < {tuple(point) for point in whole.coord}


def test_without_projections_a_missing_row_is_a_lidar_without_returns(copy):
    shutil.rmtree(copy / "training/lidar_camera_projection")
    edit(copy, "lidar", without(laser_name=3))
    assert len(open_dataset("waymo", copy, {"projection": "geometry"}).read(TRAIN).load_points().coord) > 9000


def test_top_needs_its_row(copy):
    for component in ("lidar", "lidar_camera_projection"):
        path = edit(copy, component, without(frame_timestamp_micros=FIRST, laser_name=1))
    with pytest.raises(DataError) as error:
        read_all(copy)
    assert said(error, path.parents[1] / "lidar", "no rows", "laser_name 1", FIRST)


def test_a_pyarrow_that_is_too_old(copy, monkeypatch):
    """pyarrow 25 says this of a null second return, whose shape is a list of a fixed size."""

    def read(*_: object, **__: object) -> None:
        raise pa.ArrowInvalid("Expected all lists to be of size=3 but index 2 had size=0")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", read)
    with pytest.raises(DataError) as error:
        read_all(copy)
    assert said(error, "needs pyarrow 26 or newer", pa.__version__, "pip install -U pyarrow")
    assert str(error.value).startswith(str(copy)) and "download" not in str(error.value)


def test_duplicate_time_stamps(copy):
    path = edit(copy, "vehicle_pose", lambda rows: [*rows, rows[-1]])
    double = pq.read_table(path).to_pylist()[-1]["key.frame_timestamp_micros"]
    dataset = open_dataset("waymo", copy, ALL)
    assert dataset.sample_ids("train") == [TRAIN, UNLABELLED]  # unique, by time, although the file is the other way
    with pytest.raises(DataError) as error:
        dataset.read(f"{SEGMENT}_{double}")
    assert said(error, path, "2 rows", double)


def test_rows_in_no_order_of_time(release):
    stamps = pq.read_table(file_of(release[0], "vehicle_pose"))["key.frame_timestamp_micros"].to_pylist()
    assert stamps == [SECOND, FIRST]
    assert open_dataset("waymo", release[0], ALL).sample_ids("train") == [TRAIN, UNLABELLED]


def skewed(matrix: list[float]) -> list[float]:
    return [matrix[0] * 1.2, *matrix[1:]]


@pytest.mark.parametrize(
    ("component", "column"),
    [("vehicle_pose", "world_from_vehicle.transform"), ("lidar_calibration", "extrinsic.transform")],
)
@pytest.mark.parametrize("change", [skewed, lambda m: [float("nan")] * 16, lambda m: [0.0] * 16])
def test_poses_that_are_no_rigid_motion(component, column, change, copy):
    path = edit(copy, component, put(column, change))
    with pytest.raises(DataError) as error:
        read_all(copy)
    assert said(error, path, column, "download the file again")


def test_one_image_with_a_bad_pose(copy):
    path = edit(copy, "camera_image", put("pose.transform", skewed, frame_timestamp_micros=FIRST, camera_name=2))
    sample = open_dataset("waymo", copy).read(TRAIN)
    assert [view.id for view in sample.views] == ["FRONT", "FRONT_RIGHT", "SIDE_LEFT", "SIDE_RIGHT"]
    ((name, error),) = sample.broken_views
    assert name == "FRONT_LEFT" and str(path) in error and "expected a rotation" in error


def test_one_image_is_missing(copy):
    path = edit(copy, "camera_image", without(frame_timestamp_micros=FIRST, camera_name=5))
    sample = open_dataset("waymo", copy, ALL).read(TRAIN)
    ((name, error),) = sample.broken_views
    assert name == "SIDE_RIGHT" and str(path) in error and "no rows" in error and len(sample.views) == 4
    assert not open_dataset("waymo", copy, ALL).read(UNLABELLED).broken_views


def test_a_segment_that_lacks_a_camera(copy):
    for component in ("camera_image", "camera_calibration"):
        edit(copy, component, without(camera_name=5))
    sample = open_dataset("waymo", copy).read(TRAIN)
    assert len(sample.views) == 4 and not sample.broken_views


def test_a_camera_without_calibration(copy):
    path = edit(copy, "camera_calibration", without(camera_name=1))
    ((name, error),) = open_dataset("waymo", copy).read(TRAIN).broken_views
    assert name == "FRONT" and str(path) in error and "camera_name 1" in error


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("intrinsic.f_u", 0.0, "singular intrinsics"),
        ("width", None, "got null"),
        ("rolling_shutter_direction", 9, "0 to 5"),
    ],
)
def test_calibrations_that_no_camera_has(column, value, words, copy):
    path = edit(copy, "camera_calibration", put(column, value, camera_name=3))
    ((name, error),) = open_dataset("waymo", copy).read(TRAIN).broken_views
    assert name == "FRONT_RIGHT" and str(path) in error and words in error


@pytest.mark.parametrize(
    ("content", "words"),
    [(lambda jpeg: jpeg[:500], "truncated or damaged"), (None, "is empty"), ("other", "expected 288x192 pixels")],
)
def test_images_that_cannot_be_used(content, words, copy, tmp_path, position_checkpoint):
    if content == "other":
        rows = pq.read_table(file_of(copy, "camera_image")).to_pylist()
        content = next(row[cell(row, "image")] for row in rows if row["key.camera_name"] == 4)
    path = edit(copy, "camera_image", put("image", content, frame_timestamp_micros=FIRST, camera_name=1))
    cache = extract(copy, tmp_path, position_checkpoint)
    ((sample, view, error),) = [(f.sample, f.view, f.error) for f in cache.totals.failures]
    assert (sample, view) == (TRAIN, "FRONT") and str(path) in error and words in error
    assert cache.totals.images == 9


def test_a_readout_that_no_camera_has(copy):
    edit(copy, "camera_calibration", put("rolling_shutter_direction", 4))
    path = edit(copy, "camera_image", put("rolling_shutter_params.camera_readout_done_time", 0.0, camera_name=2))
    ((name, error),) = open_dataset("waymo", copy, {"projection": "geometry"}).read(TRAIN).broken_views
    assert name == "FRONT_LEFT" and str(path) in error and "--option projection=released" in error
    assert not open_dataset("waymo", copy).read(TRAIN).broken_views


@pytest.mark.parametrize(
    ("value", "words"), [(None, "no projection of return 1 of lidar TOP"), (lambda v: [7.0] * len(v), "camera 7")]
)
def test_projections_that_cannot_be_used(value, words, copy):
    path = edit(copy, "lidar_camera_projection", put("range_image_return1.values", value, laser_name=1))
    with pytest.raises(DataError) as error:
        read_all(copy)
    assert said(error, path, words, "--option projection=geometry")


def test_projections_outside_of_the_image_are_no_links(copy, tmp_path, position_checkpoint):
    def move(values):
        return [5000.0 if i % 6 in (1, 4) else x for i, x in enumerate(values)]

    for echo in (1, 2):
        edit(copy, "lidar_camera_projection", put(f"range_image_return{echo}.values", move))
    cache = extract(copy, tmp_path, position_checkpoint)
    assert cache.totals.covered == 0 and any("coverage 0" in f.error for f in cache.totals.failures)


def test_a_list_of_test_frames_beside_the_data_wins(release, tmp_path):
    root = tmp_path / "release"
    shutil.copytree(release[0] / "testing", root / "testing")
    context, timestamp = TESTS[1].rsplit("_", 1)
    listed = root / waymo.TEST_FRAMES
    listed.write_text(f"# ours\n\n{context},{timestamp}\nelsewhere,1\n")
    assert open_dataset("waymo", root).sample_ids("test") == [TESTS[1]]
    listed.write_text(f"{context},{timestamp}\n{context} {timestamp}\n")
    with pytest.raises(DataError) as error:
        open_dataset("waymo", root).sample_ids("test")
    assert said(error, listed, "line 2", "segment,timestamp")


def test_listed_frames_that_are_not_on_disk(release, caplog):
    assert open_dataset("waymo", release[0]).sample_ids("test") == [TESTS[0]]
    path = file_of(release[0], "vehicle_pose", "testing")
    assert str(path) in caplog.text and "19 of the 20 frames" in caplog.text and waymo.TEST_FRAMES in caplog.text


def test_names_with_odd_characters(tmp_path, position_checkpoint, monkeypatch):
    name = "run 7_#% \u00e9\u6f22 ..'\""
    monkeypatch.setitem(writer.SEGMENTS, "training", (name, (FIRST, SECOND), (0,)))
    truth = written(tmp_path / "release", splits=("training",))[0]
    cache = extract(tmp_path / "release", tmp_path, position_checkpoint)
    assert truth.sample_id == f"{name}_{FIRST}"
    assert cache.report(truth, writer.STREET).right(occlusion=False)
