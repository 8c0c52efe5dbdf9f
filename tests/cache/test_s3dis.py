"""S3DIS with 2D-3D-S: the release as `layouts/s3dis.py` writes it, read by the package's own extraction."""

import json
import pickle
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dataset_runs import run_dataset
from ditr_cache.datasets import open_dataset
from ditr_cache.datasets.base import partitions
from ditr_cache.datasets.s3dis import dataset as s3dis
from ditr_cache.datasets.s3dis import points as s3dis_points
from ditr_cache.datasets.s3dis import room_images as s3dis_images
from ditr_cache.datasets.s3dis import turn as s3dis_turn
from ditr_cache.errors import DataError, MissingDataError, UnknownNameError, UsageError
from ditr_cache.link import select_views
from layouts import s3dis as layout
from world import World

ROOM = World()
GRID = (16, 16)  # of square images
AREAS = {"val_area": 0}
SMALL = {"areas": (5,), "size": 160, "count": 3500}
OFFICE = "Area_5_office_19"
ALIGNED, PLAIN = layout.RELEASES["aligned"], layout.RELEASES["v1.2"]


def write(root, **settings):
    """A written release, whose area 3 holds a room without images among the folders of others."""
    truths = layout.write(root, **settings)
    if any(truth.split == "Area_3" for truth in truths) and (root / layout.IMAGES).exists():
        for kind in ("rgb", "depth", "pose"):
            (root / layout.IMAGES / "area_3" / "data" / kind).mkdir(parents=True)
    return {truth.sample_id: truth for truth in truths}


@pytest.fixture(scope="module")
def extracted(position_checkpoint, tmp_path_factory):
    """(truths, extraction) of rooms of the aligned release that were turned by 180, 90, 0 and 270 degrees, damaged."""
    root = tmp_path_factory.mktemp("s3dis")
    truths = write(root / "data", areas=(1, 3, 5, 6), broken_line=True, orphans=True, size=160, count=4000)
    return truths, run_dataset("s3dis", root / "data", root / "cache", position_checkpoint, grid=GRID, options=AREAS)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(root, truths) of area 5 alone, as faults are planted into its reading."""
    root = tmp_path_factory.mktemp("small")
    return root, write(root, broken_line=True, **SMALL)


@pytest.fixture(scope="module")
def office(small, tmp_path_factory):
    """(root, truths) of the one room of `small` that was turned, and that both folders of area 5 show."""
    root = tmp_path_factory.mktemp("office") / "data"
    shutil.copytree(small[0], root)
    shutil.rmtree(root / ALIGNED / "Area_5" / "hallway_6")
    return root, {OFFICE: small[1][OFFICE]}


@pytest.fixture
def copy(office, tmp_path):
    """(root, truth) of a copy of `office` that a test may damage."""
    shutil.copytree(office[0], tmp_path / "data")
    return tmp_path / "data", office[1][OFFICE]


@pytest.fixture
def run(position_checkpoint, tmp_path):
    def extract(root, **options):
        return run_dataset(
            "s3dis", root, tmp_path / "cache", position_checkpoint, grid=GRID, options={**AREAS, **options}
        )

    return extract


def differences(found, truth, *, occlusion=True):
    """What of an extracted room is not as written, in words."""
    sample = found.sample(truth.sample_id)
    order = sample.source_index.astype(np.int64)
    report = found.report(truth, ROOM)
    wrong = [] if report.right(occlusion=occlusion) else [str(report)]
    wrong += [n for n in ("color", "instance") if not (getattr(sample, n) == truth.channels[n][order]).all()]
    cosine = (sample.normal * truth.channels["normal"][order]).sum(axis=1)
    # Fitted to the neighbours: those of points near an edge are of two surfaces, here with few points within 0.3 m.
    if (cosine > 0.95).mean() < 0.75 or (cosine < -0.5).mean() > 0.01:
        wrong.append("normal")
    return [*wrong, *(["split"] if sample.split != truth.split else [])]


# --- the release ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [r for r in layout.ROOMS if r.area in (1, 5, 6)], ids=lambda r: r.sample_id)
def test_a_room_of_the_aligned_release(extracted, room):
    truths, found = extracted
    assert not differences(found, truths[room.sample_id])
    assert found.report(truths[room.sample_id], ROOM).hidden > 100


def test_a_room_without_images_keeps_its_points(extracted):
    truths, found = extracted
    truth, sample = truths["Area_3_hallway_5"], found.sample("Area_3_hallway_5")
    assert not sample.valid.any() and found.report(truth, ROOM).moved < 1e-5
    said = [f.error for f in found.totals.failures if f.sample == truth.sample_id]
    assert any(
        "hallway_5_frame_*: no such file: its points have no features" in error and "no_xyz.tar" in error
        for error in said
    )


def test_frames_without_image_or_pose_are_left_out_and_named(extracted):
    failures = [f for f in extracted[1].totals.failures if f.sample != "Area_3_hallway_5"]
    assert len(failures) == 2 and all("no such file, but others of this frame" in f.error for f in failures)
    assert {"_frame_11" in f.view for f in failures} == {True, False}


def test_the_classes_of_the_benchmark(extracted, small):
    metadata = extracted[1].cache.metadata
    assert metadata.class_names == layout.CLASSES and metadata.class_groups == ()
    colors = dict(zip(metadata.class_names, metadata.class_colors, strict=True))
    assert colors["ceiling"] == (0, 255, 0) and colors["clutter"] == (50, 50, 50)
    assert (extracted[0]["Area_5_hallway_6"].label == "clutter").any()  # its stairs among them
    instances = extracted[1].sample("Area_5_hallway_6").instance
    assert set(instances) == set(range(instances.max() + 1)) and instances.max() > 15


def test_splits(tmp_path):
    for area, room in ((1, "office_1"), (5, "office_1"), (5, "office_10"), (6, "WC_1")):
        (tmp_path / ALIGNED / f"Area_{area}" / room).mkdir(parents=True)
    (tmp_path / ALIGNED / "Area_7" / "x").mkdir(parents=True)
    (tmp_path / ALIGNED / "Area_5" / ".Trash").mkdir()
    dataset = open_dataset("s3dis", tmp_path)
    assert dataset.splits == ("train", "val")
    assert list(dataset.sample_ids("train")) == ["Area_1_office_1", "Area_6_WC_1"]
    assert list(dataset.sample_ids("val")) == ["Area_5_office_1", "Area_5_office_10"]
    assert [p.id for p in partitions(dataset, ["val"])] == ["Area_5_office_1", "Area_5_office_10"]
    fold = open_dataset("s3dis", tmp_path, {"val_area": 6})
    assert list(fold.sample_ids("val")) == ["Area_6_WC_1"] and len(fold.sample_ids("train")) == 3
    areas = open_dataset("s3dis", tmp_path, {"val_area": 0})
    assert areas.splits == ("Area_1", "Area_5", "Area_6") and list(areas.sample_ids("Area_6")) == ["Area_6_WC_1"]
    with pytest.raises(UnknownNameError, match="test"):
        dataset.sample_ids("test")
    with pytest.raises(UnknownNameError, match="did you mean 'Area_5_office_1"):
        dataset.read("Area_5_office_2")


def test_the_published_recipe_is_the_default(small):
    defaults = s3dis.S3DISDataset.defaults
    assert (defaults.grid, defaults.layout) == ((37, 37), "views")
    links = defaults.links
    assert (links.max_views, links.occlusion_tolerance, links.depth_min, links.depth_max) == (10, 0.2, 0.0, None)
    sample = open_dataset("s3dis", small[0]).read(OFFICE)
    assert len(select_views(sample, links)) == 5
    assert [v.id.split("/")[0] for v in sample.views] == ["area_5a"] * 3 + ["area_5b"] * 2
    assert [int(v.id.rsplit("_", 1)[1]) for v in sample.views] == [0, 2, 10, 0, 1]


def test_what_is_read_later_travels_to_workers(small):
    sample = open_dataset("s3dis", small[0]).read(OFFICE)
    again = pickle.loads(pickle.dumps(sample))
    assert (again.views[0].load_image() == sample.views[0].load_image()).all()
    assert len(again.load_points().coord) == len(small[1][OFFICE].coord)


# --- variants of it -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(root, truth) of the room of `office` in v1.2."""
    root = tmp_path_factory.mktemp("plain") / "data"
    truths = write(root, release="v1.2", broken_line=True, **SMALL)
    shutil.rmtree(root / PLAIN / "Area_5" / "hallway_6")
    return root, truths[OFFICE]


def test_v1_2_in_the_canonical_frame(run, plain):
    found = run(plain[0])
    assert not differences(found, layout.aligned(plain[1]))
    assert found.cache.metadata.dataset_options == AREAS


def test_v1_2_as_the_rooms_lie_in_the_building_needs_no_angles(run, plain, tmp_path):
    shutil.copytree(plain[0], tmp_path / "data")
    (tmp_path / "data" / PLAIN / "Area_5" / "Area_5_alignmentAngle.txt").unlink()
    assert not differences(run(tmp_path / "data", frame="area"), plain[1])
    with pytest.raises(MissingDataError, match=r"(?s)Area_5_alignmentAngle\.txt.*--option frame=area"):
        read(tmp_path / "data")


def test_the_aligned_release_as_the_rooms_lie_in_the_building(run, office, plain):
    assert not differences(run(office[0], frame="area"), plain[1])


def test_an_aligned_release_that_is_not_turned_at_all(run, plain, tmp_path, caplog):
    shutil.copytree(plain[0], tmp_path / "data")
    (tmp_path / "data" / PLAIN).rename(tmp_path / "data" / ALIGNED)
    assert not differences(run(tmp_path / "data"), plain[1])
    assert "says 90 degrees, but depth maps say 0, which is taken" in caplog.text


HALLWAY = "Area_5_hallway_6"


@pytest.fixture(scope="module", params=[("v1.2", None), ("v1.2", 0), ("aligned", 180), ("aligned", 0)], ids=str)
def hallway(request, tmp_path_factory):
    """(root, release, degrees, truth) of a room to which the file of angles gives 0, turned or not by other degrees."""
    release, degrees = request.param
    root = tmp_path_factory.mktemp("hallway")
    truth = write(root, release=release, turned_against_images=degrees, **SMALL)[HALLWAY]
    shutil.rmtree(root / layout.RELEASES[release] / "Area_5" / "office_19")
    return root, release, degrees, truth


@pytest.mark.parametrize("frame", ["aligned", "area"])
def test_a_room_that_is_turned_against_its_images(run, hallway, frame, caplog):
    root, release, degrees, truth = hallway
    against = 180 if degrees is None else degrees
    assert not differences(run(root, frame=frame), layout.turned(truth, against) if frame == "area" else truth)
    outvoted = {
        ("v1.2", 0): "says 180 degrees, but depth maps say 0",
        ("aligned", 180): "says 0 degrees, but depth maps",
    }
    said = [record.getMessage() for record in caplog.records if "turn" in record.name]
    assert len(said) == ((release, degrees) in outvoted)
    assert all(outvoted[release, degrees] in text for text in said)


@pytest.mark.parametrize("release", ["v1.2", "aligned"])
def test_depth_maps_are_asked_once_per_room(tmp_path, release, monkeypatch):
    write(tmp_path, release=release, areas=(5,), size=64, count=200)
    asked = []
    monkeypatch.setattr(s3dis, "settle_angle", lambda announced, *rest: asked.append((rest[2], announced)) or announced)
    dataset = open_dataset("s3dis", tmp_path)
    assert not asked
    for room in (OFFICE, HALLWAY, OFFICE):
        dataset.read(room)
    turned = (90, 0) if release == "aligned" else (0, 180)
    assert asked == [(f"sample {OFFICE!r}", turned[0]), (f"sample {HALLWAY!r}", turned[1])]


def test_rooms_that_fit_their_depth_maps_at_no_angle_are_warned_of(copy, caplog):
    root, _ = copy
    for path in root.glob("2D-3D-S/*/data/depth/*office_19*"):
        Image.fromarray(np.full((160, 160), 100, np.uint16)).save(path)
    read(root)
    (record,) = caplog.records
    assert f"sample '{OFFICE}': its depth maps fit its points badly at every angle" in record.getMessage()
    assert "90 degrees are taken" in record.getMessage() and "ditr-cache check" in record.getMessage()


def poses(root, **options):
    """(room, view) -> pose, of all rooms."""
    dataset = open_dataset("s3dis", root, {**AREAS, **options})
    samples = [dataset.read(i) for split in dataset.splits for i in dataset.sample_ids(split)]
    return {(sample.id, view.id): view.camera_from_world for sample in samples for view in sample.views}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, pose in expected.items():
        np.testing.assert_allclose(found[name], pose, atol=2e-6)


@pytest.fixture(scope="module")
def without_angles(tmp_path_factory):
    """(root, poses) of rooms that were turned by all angles, whose files of angles are gone."""
    root = tmp_path_factory.mktemp("angles")
    write(root, areas=(1, 4, 5), size=128, count=1500)
    expected = poses(root)
    for path in root.glob("*/*/*_alignmentAngle.txt"):
        path.unlink()
    return root, expected


def test_without_angles_depth_maps_tell_the_turn(without_angles, caplog):
    root, expected = without_angles
    assert_same(poses(root), expected)
    for room in layout.ROOMS:
        if room.area in (1, 4, 5):
            assert f"'{room.sample_id}': no alignment angle; depth maps say {room.angle} degrees" in caplog.text


def test_angles_of_the_other_release_beside(without_angles, tmp_path, caplog):
    root, expected = without_angles
    shutil.copytree(root, tmp_path / "data")
    write(tmp_path / "data", release="v1.2", with_images=False, areas=(1, 4, 5), count=100)
    assert_same(poses(tmp_path / "data"), expected)
    assert "no alignment angle" not in caplog.text


def test_depth_maps_outvote_angles_of_the_other_sign(office, copy, caplog):
    root, _ = copy
    path = root / ALIGNED / "Area_5" / "Area_5_alignmentAngle.txt"
    path.write_text(path.read_text().replace("office_19 90", "office_19 270"))
    assert_same(poses(root), poses(office[0]))
    assert "says 270 degrees, but depth maps say 90, which is taken" in caplog.text


def test_a_copied_annotation_stays_as_in_pointcept(run, tmp_path):
    truths = write(tmp_path, duplicate_wall="kept", **SMALL)
    assert not differences(run(tmp_path), truths[OFFICE])


def test_points_without_images(run, tmp_path):
    truths = write(tmp_path, with_images=False, **SMALL)
    found = run(tmp_path)
    for truth in truths.values():
        assert not found.sample(truth.sample_id).valid.any() and found.report(truth, ROOM).moved < 1e-5
        said = " ".join(f.error for f in found.totals.failures if f.sample == truth.sample_id)
        assert "area_5a: no such folder: its points have no features" in said and "no_xyz.tar" in said
    normal = found.sample(OFFICE).normal  # they look to the middle of the room
    truth = truths[OFFICE].channels["normal"][found.sample(OFFICE).source_index]
    assert ((normal * truth).sum(axis=1) > 0.9).mean() > 0.75


@pytest.mark.parametrize("where", ["root", "beside", "noXYZ", "option", "release as root"])
def test_places_of_the_images(small, tmp_path, where):
    root, options = tmp_path / "data", {}
    shutil.copytree(small[0] / ALIGNED, root / ALIGNED)
    target = {
        "root": root, "beside": root / layout.IMAGES, "noXYZ": root / layout.IMAGES / "noXYZ",
        "option": tmp_path / "elsewhere", "release as root": root / layout.IMAGES,
    }[where]  # fmt: skip
    for folder in ("area_5a", "area_5b"):
        shutil.copytree(small[0] / layout.IMAGES / folder, target / folder)
    if where == "option":
        options["images"] = str(target)
    start = root / ALIGNED if where == "release as root" else root
    assert len(open_dataset("s3dis", start, options).read(OFFICE).views) == 5


def test_which_release_a_folder_of_another_name_is(small, tmp_path):
    shutil.copytree(small[0] / ALIGNED, tmp_path / "S3DIS")
    with pytest.raises(UsageError, match=r"--option release=aligned .* or --option release=v1\.2"):
        open_dataset("s3dis", tmp_path / "S3DIS")
    dataset = open_dataset("s3dis", tmp_path / "S3DIS", {"release": "aligned", "images": str(small[0] / "2D-3D-S")})
    assert len(dataset.read(OFFICE).views) == 5


def test_the_folder_above_or_inside_is_passed(small, tmp_path):
    root = tmp_path / "up" / "s3dis"
    shutil.copytree(small[0] / ALIGNED, root / ALIGNED)
    (tmp_path / "up" / "a").mkdir()
    with pytest.raises(MissingDataError, match=f"neither .* nor .* in .*; pass '{root}' with --root"):
        open_dataset("s3dis", tmp_path / "up")
    with pytest.raises(MissingDataError, match=f"; pass its parent '{root / ALIGNED}' with --root"):
        open_dataset("s3dis", root / ALIGNED / "Area_5")
    with pytest.raises(
        MissingDataError, match=r"expected folders such as .*Aligned_Version/Area_5/.*Aligned_Version\.zip"
    ):
        open_dataset("s3dis", tmp_path / "up" / "a")


def test_the_archive_of_the_release_is_named(small, tmp_path):
    with pytest.raises(MissingDataError) as error:
        open_dataset("s3dis", small[0], {"release": "v1.2"})
    assert "no 'Stanford3dDataset_v1.2' in" in str(error.value) and "unpack Stanford3dDataset_v1.2.zip" in str(
        error.value
    )
    (tmp_path / "Stanford3dDataset_v1.2" / "Area_5" / "office_19").mkdir(parents=True)
    with pytest.raises(MissingDataError, match=r"unpack Stanford3dDataset_v1\.2\.zip .* again"):
        open_dataset("s3dis", tmp_path).read(OFFICE)


@pytest.mark.parametrize("library", ["pyarrow", "scipy"])
def test_a_missing_library_is_named_at_construction(small, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UsageError, match=rf"'{library}'; pip install 'ditr\[datasets\]'"):
        open_dataset("s3dis", small[0])


def test_images_of_another_size_bring_their_intrinsics(run, copy):
    root, truth = copy
    for path in root.glob("2D-3D-S/*/data/rgb/*.png"):
        Image.open(path).resize((128, 128), Image.Resampling.BOX).save(path)
    assert not differences(run(root), truth)


# --- faults, planted ------------------------------------------------------------------------------------------------


def swapped(table, *names):
    """A map of classes in which two are mistaken for each other."""
    first, second = names
    return {**table, first: table[second], second: table[first]}


def natural(room):
    """Annotations by their numbers: chair_2 before chair_10."""
    files = (room / "Annotations").glob("*.txt")
    return sorted(files, key=lambda p: (p.stem.split("_")[0], int(p.stem.split("_")[1].split()[0])))


def pose_of_the_next_frame(folder, stem, kind):
    """Poses paired by their order as text, in which frame 10 comes before frame 2."""
    if kind != "pose":
        return REAL_FILE(folder, stem, kind)
    files = sorted((folder / "data" / "pose").glob(f"{stem.rpartition('_frame_')[0]}_frame_*"))
    by_number = sorted((f.name.split("_domain")[0] for f in files), key=lambda name: int(name.rsplit("_", 1)[1]))
    return files[by_number.index(stem)]


def inverted(pose):
    return np.linalg.inv(REAL_POSE(pose))


def about_the_mean(room):
    outline = REAL_OUTLINE(room)
    return replace(outline, middle=outline.some.mean(axis=0))


def x_and_y_swapped(path, columns):
    return REAL_TABLE(path, columns)[:, [1, 0, *range(2, len(columns))]]


REAL_FILE, REAL_POSE = s3dis_images._file, s3dis_images.rigid_pose
REAL_CAMERA, REAL_COLORS = s3dis_images.camera_of, s3dis_points._colors
REAL_OUTLINE, REAL_TABLE = s3dis_points.read_outline, s3dis_points.read_table
REAL_NORMALS, REAL_TURN = s3dis_points.estimate_scan_normals, s3dis_turn.quarter_turn

TRUSTED = (s3dis, "settle_angle", lambda announced, *rest: announced)  # depth maps shall not mend what is planted
FAULTS = {
    "camera to world taken for world to camera": [(s3dis_images, "rigid_pose", inverted)],
    "depth in millimetres": [(s3dis_images, "DEPTH_UNITS", 1000.0)],
    "rooms taken as not turned": [(s3dis, "settle_angle", lambda *of: 0)],
    "turned the other way": [TRUSTED, (s3dis, "quarter_turn", lambda angle, middle: REAL_TURN(-angle, middle))],
    "turned about the origin": [TRUSTED, (s3dis, "quarter_turn", lambda angle, middle: REAL_TURN(angle, 0 * middle))],
    "turned about the mean of the points": [TRUSTED, (s3dis, "read_outline", about_the_mean)],
    "area_5b in the frame of area_5a": [(s3dis_images, "from_area_5", lambda pose: pose)],
    "area_5b by the inverse transform": [
        (s3dis_images, "AREA_5B_FROM_AREA_5", np.linalg.inv(s3dis_images.AREA_5B_FROM_AREA_5))
    ],
    "x and y swapped": [(s3dis_points, "read_table", x_and_y_swapped)],
    "one focal length for all frames": [
        (s3dis_images, "camera_of", lambda *of: replace(REAL_CAMERA(*of), fx=128.0, fy=128.0))
    ],
    "poses of other frames": [(s3dis_images, "_file", pose_of_the_next_frame)],
    "another order of classes": [(s3dis_points, "_INDEX", swapped(s3dis_points._INDEX, "door", "chair"))],
    "colours as BGR": [(s3dis_points, "_colors", lambda values, path: REAL_COLORS(values, path)[:, ::-1])],
    "another order of points": [(s3dis_points, "annotation_files", natural)],
    "normals out of the room": [(s3dis_points, "estimate_scan_normals", lambda *of: -REAL_NORMALS(*of))],
}


@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_planted_faults_are_found(office, run, monkeypatch, fault):
    root, truths = office
    for module, name, wrong in FAULTS.get(fault, []):
        monkeypatch.setattr(module, name, wrong)
    wrong = differences(run(root), truths[OFFICE])
    assert bool(wrong) == (fault != "none"), wrong


def test_damage_and_stairs_taken_wrongly_are_found(small, monkeypatch):
    """What only the other room of area 5 has."""
    root, truths = small
    room, names = open_dataset("s3dis", root).read("Area_5_hallway_6"), np.array(layout.CLASSES)
    label = truths["Area_5_hallway_6"].label
    assert (names[room.load_points().segment] == label).all()
    monkeypatch.setattr(s3dis_points, "_CLUTTER", 0)
    assert (names[room.load_points().segment] != label).sum() > 100
    monkeypatch.setattr(s3dis_points, "_REPAIRED", bytes(range(256)))
    with pytest.raises(DataError, match=r"hallway_6/Annotations/ceiling_1\.txt: cannot be read .* cut off, unpack"):
        room.load_points()


# --- bad input ------------------------------------------------------------------------------------------------------


def read(root, **options):
    return open_dataset("s3dis", root, options).read(OFFICE)


def annotation(root, name="wall_1.txt"):
    return root / ALIGNED / "Area_5" / "office_19" / "Annotations" / name


def first_pose(root):
    return sorted(root.glob("2D-3D-S/area_5a/data/pose/*office_19*"))[0]


def test_nothing_of_the_release(tmp_path):
    with pytest.raises(
        MissingDataError, match=r"Aligned_Version.*Area_5/office_19/Annotations; unpack .*\.zip .*--root"
    ):
        open_dataset("s3dis", tmp_path)
    (tmp_path / ALIGNED / "Area_5").mkdir(parents=True)
    with pytest.raises(MissingDataError, match=r"no room in .*Area_5/office_19; unpack"):
        open_dataset("s3dis", tmp_path)
    (tmp_path / ALIGNED / "Area_5" / "office_1").mkdir()
    with pytest.raises(MissingDataError, match=r"no area_<n>/data in .*nowhere.* \(--option images\).*no_xyz\.tar"):
        open_dataset("s3dis", tmp_path, {"images": "nowhere"})


@pytest.mark.parametrize("gone", ["Annotations", "every object"])
def test_a_room_without_annotation(copy, gone):
    folder = annotation(copy[0]).parent
    shutil.rmtree(folder)
    if gone == "every object":
        folder.mkdir()
        (folder / "._wall_1.txt").touch()  # of a Mac
    with pytest.raises(
        MissingDataError, match=r"office_19/Annotations/<class>_<i>\.txt: no such file.*Aligned_Version\.zip"
    ):
        read(copy[0])


@pytest.mark.parametrize("gone", ["area_5b", "area_5a/data/depth", "area_5a/data/pose"])
def test_images_that_are_unpacked_in_part(copy, gone):
    shutil.rmtree(copy[0] / layout.IMAGES / gone)
    first = gone if "/" in gone else f"{gone}/data/rgb"
    with pytest.raises(MissingDataError, match=rf"{first}: no such folder; unpack .*no_xyz\.tar.*--split Area_<n>"):
        read(copy[0])


def test_a_room_without_any_depth_map(copy):
    for path in copy[0].glob("2D-3D-S/area_5b/data/depth/*office_19*"):
        path.unlink()
    with pytest.raises(MissingDataError, match=r"area_5b/data/depth: no file of room 'office_19'.*no_xyz\.tar"):
        read(copy[0])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "KeyError: 'camera_k_matrix'"),
        ('{"camera_k_matrix": "x", "camera_rt_matrix": 1}', "ValueError"),
        (
            '{"camera_k_matrix": [[1, 0, 1], [0, 1, 1], [0, 0, 1]], "camera_rt_matrix": [[1, 0], [0, 1]]}',
            r"shape \[2, 2\]",
        ),
    ],
)
def test_a_pose_that_cannot_be_used(copy, content, said):
    path = first_pose(copy[0])
    path.write_text(content)
    sample = read(copy[0])
    assert len(sample.views) == 4
    [(view, error)] = sample.broken_views
    assert view.startswith("area_5a/camera_") and path.name in error and "no_xyz.tar" in error
    with pytest.raises(DataError, match=said):
        s3dis_images.read_frame_pose(path)


@pytest.mark.parametrize(
    ("matrix", "change", "said"),
    [
        ("camera_rt_matrix", lambda m: 1.1 * m, "expected a rotation and a translation"),
        ("camera_rt_matrix", lambda m: m * [[1], [-1], [1]], "expected a rotation and a translation"),
        ("camera_k_matrix", lambda m: 0 * m, "is not the middle of an image"),
        ("camera_k_matrix", lambda m: m * [[1e9], [1e9], [1]], "is not the middle of an image"),
        ("camera_k_matrix", lambda m: m * [[0, 1, 1], [0, 1, 1], [1, 1, 1]], "singular intrinsics"),
        ("camera_k_matrix", lambda m: m[:2], "3x3 finite intrinsics"),
        ("camera_k_matrix", lambda m: m * [[1], [2], [1]], r"of 160x320 images, the room's first is 160x160; cropped"),
    ],
)
def test_poses_and_intrinsics_that_no_camera_has(copy, matrix, change, said):
    path = first_pose(copy[0])
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, matrix: change(np.array(content[matrix])).tolist()}))
    [(_, error)] = read(copy[0]).broken_views
    assert re.search(said, error) and path.name in error


def test_an_infinite_pose_is_a_view_without_one(copy):
    path = first_pose(copy[0])
    content = json.loads(path.read_text())
    content["camera_rt_matrix"][0][3] = float("inf")
    path.write_text(json.dumps(content))
    sample = read(copy[0])
    assert len(sample.views) == 5 and not sample.broken_views
    assert len(select_views(sample, s3dis.S3DISDataset.defaults.links)) == 4


def test_one_broken_image_and_depth_map_of_another_size(run, copy):
    root, truth = copy
    image, other = sorted(root.glob("2D-3D-S/area_5a/data/rgb/*office_19*"))[1:3]
    image.write_bytes(image.read_bytes()[:100])
    depth = other.parents[1] / "depth" / other.name.replace("rgb", "depth")
    Image.fromarray(np.asarray(Image.open(depth))[:80]).save(depth)
    found = run(root)
    assert {f.error.split(": ")[0] for f in found.totals.failures} == {str(image), str(depth)}
    assert any("expected 160x160 pixels" in f.error for f in found.totals.failures)
    assert found.report(truth, ROOM).moved < 1e-5 and found.sample(OFFICE).valid.any()


def test_images_that_none_can_be_read(copy):
    for path in copy[0].glob("2D-3D-S/*/data/rgb/*office_19*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="not a readable image"):
        read(copy[0])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"no points, expected lines 'x y z r g b'"),
        (b"\n \n", r"no points"),
        (b"1.000 2.000 3.000 4 5\n", r"expected lines 'x y z r g b', got 5 values"),
        (b"1.000 2.000 3.000 4 5 6\n1.000 2.0", r"cannot be read \(.*row 2\)"),
        (b"1.000 2.000 3.000 4 5 6\n1.000 2,000 3.000 4 5 6\n", r"cannot be read .*'2,000'.* row 1"),
        (b"1.000 2.000 3.000 4 5 6\n1.000 nan 3.000 4 5 6\n", r"line 2 is not finite"),
        (b"1.000 2.000 3.000 4 5 6\n1.000 2.000 3.000 4 500 6\n", r"colour .*500.* in line 2, expected 0 to 255"),
        (bytes(range(128, 256)), r"cannot be read"),
    ],
)
def test_a_damaged_annotation(copy, content, said):
    path = annotation(copy[0])
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"wall_1\.txt: {said}") as error:
        s3dis_points.read_points(path.parents[1], np.eye(4), np.zeros((0, 3)))
    assert "unpack" in str(error.value) and "Aligned_Version.zip" in str(error.value)
    assert "usecols" not in str(error.value)


def test_an_annotation_of_absurd_size_or_extent(copy, monkeypatch):
    path = annotation(copy[0])
    path.write_bytes(b"1.000 2.000 3.000 4 5 6\n-1e12 2.000 1e12 4 5 6\n1.000 -1e12 3.000 4 5 6\n")
    with pytest.raises(DataError, match=r"office_19: points spread over .* m, expected a room in metres"):
        s3dis_points.read_points(path.parents[1], np.eye(4), np.zeros((0, 3)))
    monkeypatch.setattr(s3dis_points, "_MAX_BYTES", 50)
    with pytest.raises(DataError, match=r"\.txt: \d+ bytes, expected at most 50"):
        s3dis_points.read_points(path.parents[1], np.eye(4), np.zeros((0, 3)))


def test_blanks_and_line_ends_of_other_programs(tmp_path):
    expected = [[1, -2, 3, 4, 5, 6], [7.5, 8, 9, 10, 11, 12]]
    for text in (
        "1.000 -2.000 3.000 4 5 6\r\n7.500 8 9 10 11 12\r\n",
        " 1.0  -2.0\t3.0 4 5 6\n7.5 8 9 10 11 12",
        "1 -2 3 4.000000 5.0 6\n\n7.500000 8 9 10 11 12\n",
        "1.\x1000000\x00-2 3 4 5 \x16\n7.5 8 9 10 11 12\n",
    ):
        (tmp_path / "wall_1.txt").write_bytes(text.encode())
        assert s3dis_points.read_table(tmp_path / "wall_1.txt", s3dis_points.COLUMNS).tolist() == expected
    assert s3dis_points.read_table(tmp_path / "wall_1.txt", "xyz").tolist() == [[1, -2, 3], [7.5, 8, 9]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("office_19 45", r"line 3 is 'office_19 45', expected a room and 0, 90, 180 or 270 degrees"),
        ("office_19", r"line 3 is 'office_19'"),
        ("office_19 x", r"line 3"),
        ("office_19 nan", r"line 3"),
        ("office_19 90\noffice_19 180", r"line 4 gives room 'office_19' a second angle"),
    ],
)
def test_a_file_of_angles_that_cannot_be_used(copy, line, said):
    path = copy[0] / ALIGNED / "Area_5" / "Area_5_alignmentAngle.txt"
    path.write_text(f"## a ##\n\n{line}\n")
    with pytest.raises(DataError, match=rf"Area_5_alignmentAngle\.txt: {said}"):
        read(copy[0])


def test_angles_as_other_programs_write_them(tmp_path):
    path = tmp_path / "angles.txt"
    path.write_text("## a ##\n  ## b\r\noffice_1 -90\r\n\nmy  room 360.0\nWC_1  180\nWC_1 180\noffice_2\t90 \n")
    assert s3dis_turn.read_angles(path) == {"office_1": 270, "my  room": 0, "WC_1": 180, "office_2": 90}


def test_no_angle_and_no_answer_from_depth_maps(copy):
    (copy[0] / ALIGNED / "Area_5" / "Area_5_alignmentAngle.txt").unlink()
    for path in copy[0].glob("2D-3D-S/*/data/depth/*office_19*"):
        Image.fromarray(np.full((160, 160), 65535, np.uint16)).save(path)
    with pytest.raises(DataError, match=r"^no file of alignment angles.*get Area_<n>_alignmentAngle\.txt"):
        read(copy[0])
    shutil.rmtree(copy[0] / layout.IMAGES)
    with pytest.raises(MissingDataError, match=r"^no angle of room 'office_19'.*Area_5_alignmentAngle\.txt; unpack"):
        read(copy[0], frame="area")


def test_rooms_whose_names_begin_alike_keep_their_images_apart(tmp_path):
    for room in ("office_1", "office_19", "my_office_1"):
        for kind, suffix in s3dis_images.KINDS.items():
            folder = tmp_path / "area_1" / "data" / kind
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"camera_{'ab' * 16}_{room}_frame_7_domain_{kind}.{suffix}").touch()
            (folder / f"camera_{'ab' * 16}_{room}_frame_equirectangular_domain_{kind}.{suffix}").touch()
    images = s3dis_images.AreaImages(tmp_path, 1)
    for room in ("office_1", "office_19", "my_office_1"):
        with pytest.raises(DataError, match=rf"_{room}_frame_7_domain_rgb.png: not a readable image"):
            images.views(room)
    assert images.views("office") == images.views("office_9") == ((), ())


def test_a_room_with_an_odd_name(run, copy):
    root, truth = copy
    odd = "salle d'été 1%_#19"
    (root / ALIGNED / "Area_5" / "office_19").rename(root / ALIGNED / "Area_5" / odd)
    for path in root.glob("2D-3D-S/*/data/*/*office_19*"):
        path.rename(path.with_name(path.name.replace("office_19", odd)))
    angles = root / ALIGNED / "Area_5" / "Area_5_alignmentAngle.txt"
    angles.write_text(angles.read_text(encoding="utf-8").replace("office_19", odd), encoding="utf-8")
    assert not differences(run(root), replace(truth, sample_id=f"Area_5_{odd}"))
