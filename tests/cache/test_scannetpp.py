"""ScanNet++ by its reader, on what the independent writer of `layouts` wrote; planted faults; bad input."""

import importlib
import json
import logging
import pickle
import shutil
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_runs import run_dataset
from ditr_cache import geometry, link
from ditr_cache.datasets import colmap, documents, open_dataset, video
from ditr_cache.datasets.scannet.scannet200_labels import SCANNET200
from ditr_cache.datasets.scannetpp import dataset as scannetpp
from ditr_cache.datasets.scannetpp import depth as scannetpp_depth
from ditr_cache.datasets.scannetpp import labels as scannetpp_labels
from ditr_cache.datasets.scannetpp import views as scannetpp_views
from ditr_cache.datasets.scannetpp.labels import benchmark_classes, smallest_objects
from ditr_cache.errors import DataError, MissingDataError, UnknownNameError, UsageError
from ditr_cache.schema import IGNORE_INDEX
from layouts import scannetpp as layout
from world import World


@cache
def surfaces_of(eye):
    return World().surfaces(eye)


class Room(World):
    """The room that remembers what it showed: the scenes of a release share their cameras."""

    def surfaces(self, eye):
        return surfaces_of(eye)


ROOM = Room()
TRAIN, VAL, TEST = "1f3a9c07de", "7450386219", "e90d4f82b1"
SOURCES = {
    "dslr": ("dslr/",),
    "dslr-undistorted": ("dslr_undistorted/",),
    "iphone": tuple(f"iphone/frame_{n:06}" for n in range(0, 21, 10)),
    "iphone-video": tuple(f"iphone/frame_{n:06}" for n in range(0, 21, 5)),
}
# The mesh has a vertex every decimetre: on a slanted surface those around a point are up to half a metre nearer.
LINKS = {
    "dslr": {"occlusion_tolerance": 0.7},
    "dslr-undistorted": {"occlusion_tolerance": 0.7},
    "iphone": {},
    "iphone-video": {"every_nth_frame": 5},  # frames that COLMAP has, and frames between them
}
STRONG_LENS = (-0.3, 0.1, 0.002, -0.003)


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """Write a release with the given variants once; (root, truths)."""

    @cache
    def written(**variants):
        root = tmp_path_factory.mktemp("scannetpp")
        return root, layout.write(root, **variants)

    return written


@pytest.fixture(scope="module")
def extracted(write, position_checkpoint, tmp_path_factory):
    """The plain release, extracted by one source of views; (extraction, truths)."""

    @cache
    def run(views):
        root, truths = write()
        out = tmp_path_factory.mktemp("cache")
        options = {} if views == "dslr" else {"views": views}
        return run_dataset("scannetpp", root, out, position_checkpoint, options=options, links=LINKS[views]), truths

    return run


@pytest.fixture
def again(position_checkpoint, tmp_path):
    """Extract some scenes of a release and judge them; None where a scene could not be extracted."""

    def run(release, views, splits=("train",)):
        root, truths = release
        made = run_dataset(
            "scannetpp", root, tmp_path / f"{views}-{len(list(tmp_path.iterdir()))}", position_checkpoint,
            options={"views": views}, links=LINKS[views], splits=splits,
        )  # fmt: skip
        if made.totals.partitions["failed"]:
            return None
        return [
            made.report(layout.of_source(truth, *SOURCES[views]), ROOM) for truth in truths if truth.split in splits
        ]

    return run


@pytest.fixture
def copy(write, tmp_path):
    """A copy of the plain release that may be damaged: the root, and the folder of the scene of split train."""
    root = tmp_path / "release"
    shutil.copytree(write()[0], root)
    return root, root / "data" / TRAIN


def read(root, views="dslr", sample=TRAIN):
    return open_dataset("scannetpp", root, {"views": views}).read(sample)


def edit(path, change):
    document = json.loads(path.read_text())
    path.write_text(json.dumps(change(document) or document))


# --- the release as written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", SOURCES)
def test_features_labels_and_coordinates(extracted, views):
    made, truths = extracted(views)
    assert not made.totals.failures
    for truth in truths:
        report = made.report(layout.of_source(truth, *SOURCES[views]), ROOM)
        assert report.right(), (truth.sample_id, report, report.errors.max())
        assert report.hidden > 500


def test_channels_splits_and_classes(extracted):
    made, truths = extracted("dslr")
    for truth in truths:
        sample = made.sample(truth.sample_id)
        order = sample.source_index.astype(int)
        assert sample.split == truth.split
        np.testing.assert_array_equal(sample.color, truth.channels["color"][order])
        np.testing.assert_allclose(sample.normal, truth.channels["normal"][order], atol=2e-3)
        if truth.split == "test":
            assert sample.segment is None
        else:
            np.testing.assert_array_equal(sample.instance, truth.channels["instance"][order])
    metadata = made.cache.metadata
    assert metadata.class_names == layout.TOP100
    assert len(set(metadata.class_colors)) == 100
    known = {info.name: info.color for info in SCANNET200.values()}
    assert [c for n, c in zip(metadata.class_names, metadata.class_colors, strict=True) if n == "wall"] == [
        known["wall"]
    ]
    assert metadata.dataset_options == {}
    assert extracted("iphone")[0].cache.metadata.dataset_options == {"views": "iphone"}


def test_splits_are_the_lists_and_scenes_those_on_disk(write, caplog):
    dataset = open_dataset("scannetpp", write()[0])
    assert dataset.splits == ("train", "val", "test")
    assert [list(dataset.sample_ids(s)) for s in dataset.splits] == [[TRAIN], [VAL], [TEST]]
    assert not caplog.records  # the scene for novel view synthesis alone is in none of these lists
    with pytest.raises(UnknownNameError, match="train"):
        dataset.sample_ids("trian")
    with pytest.raises(UnknownNameError):
        dataset.read("b2c4d6e8f0")
    with pytest.raises(UsageError, match=r"views='drone'.*dslr, dslr-undistorted, iphone, iphone-video"):
        open_dataset("scannetpp", write()[0], {"views": "drone"})


def test_views_are_in_order_and_bad_photos_left_out(write):
    root, _ = write()
    photos = ["DSC02311.JPG", "DSC02317.JPG", "DSC02324.JPG", "DSC02402.JPG"]
    for views in ("dslr", "dslr-undistorted"):
        assert [v.id for v in read(root, views).views] == photos
    assert [v.id for v in read(root, "iphone").views] == [f"frame_{n:06}" for n in (0, 10, 20)]
    video_frames = read(root, "iphone-video")
    assert [v.id for v in video_frames.views] == [f"frame_{n:06}" for n in range(21)]
    assert video_frames.every_nth_frame == 10
    assert read(root).every_nth_frame == 1
    models = {views: read(root, views).views[0].camera.model for views in SOURCES}
    assert models == {
        "dslr": "fisheye", "dslr-undistorted": "pinhole", "iphone": "radial_tangential",
        "iphone-video": "radial_tangential",
    }  # fmt: skip


def test_samples_can_be_pickled(write):
    for views in SOURCES:
        sample = pickle.loads(pickle.dumps(read(write()[0], views)))
        assert sample.views[1].load_image().shape == (sample.views[1].camera.height, sample.views[1].camera.width, 3)
        assert sample.load_points().segment is not None


# As in the release of 2023; as in some older scenes; and after the toolkit's scripts ran.
OLD = {
    "oversegmented": True, "depth_encoding": "zlib", "video": "rgb.mp4", "undistorted": "undistorted",
    "bad_photo": False, "anonymised": True,
}  # fmt: skip
STREAM = {"depth_encoding": "zlib_whole", "dslr": False}
PREPARED = {"iphone_frames": True, "iphone_distortion": STRONG_LENS, "dslr": False}


@pytest.mark.parametrize(
    ("views", "variants"),
    [
        ("dslr", OLD),
        ("dslr-undistorted", OLD),
        ("iphone", OLD),
        ("iphone", STREAM),
        ("iphone", PREPARED),
        ("iphone-video", PREPARED),
    ],
)
def test_variants_of_the_release(write, again, views, variants):
    for report in again(write(**variants), views, ("val",)):
        assert report.right(), (report, report.errors.max())


def test_colours_of_extracted_frames_and_of_the_video_agree(write):
    root, _ = write(**PREPARED)
    path = root / "data" / TRAIN / "iphone"
    for number in (20, 0, 7, 10):
        decoded = video.read_video_frame(path / "rgb.mkv", number, size=layout.IPHONE_SIZE, where="frame")
        stored = np.asarray(Image.open(path / "rgb" / f"frame_{number:06}.jpg")).astype(int)
        assert np.abs((decoded - stored).mean(axis=(0, 1))).max() < 0.5
        assert np.abs(decoded - stored).mean() < 2.5


# --- planted faults -------------------------------------------------------------------------------------------------


def of_images(change):
    """A fault in every pose of COLMAP."""

    def plant(monkeypatch):
        real = scannetpp_views.read_images
        monkeypatch.setattr(
            scannetpp_views,
            "read_images",
            lambda folder: (replace(i, camera_from_world=change(i.camera_from_world)) for i in real(folder)),
        )

    return plant


def of_cameras(change):
    """A fault in every camera of COLMAP."""

    def plant(monkeypatch):
        real = scannetpp_views.read_cameras
        monkeypatch.setattr(
            scannetpp_views, "read_cameras", lambda folder: {k: change(c) for k, c in real(folder).items()}
        )

    return plant


def of_function(module, name, change):
    """A fault in what a function returns."""

    def plant(monkeypatch):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: change(real(*a, **k)))

    return plant


def quaternion_the_other_way(monkeypatch):
    real = colmap._pose
    monkeypatch.setattr(colmap, "_pose", lambda q, t, where: real((*q[1:], q[0]), t, where))


def the_next_frame(monkeypatch):
    real = scannetpp_views.read_video_frame
    monkeypatch.setattr(
        scannetpp_views, "read_video_frame", lambda path, number, **k: real(path, min(number + 1, 20), **k)
    )


def the_depth_of_the_frame_before(monkeypatch):
    real = scannetpp_views.read_depth_frame
    monkeypatch.setattr(
        scannetpp_views, "read_depth_frame", lambda path, number, **k: real(path, max(number - 1, 0), **k)
    )


def the_pose_in_arkit_s_world(monkeypatch):
    real = scannetpp_views._matrix
    monkeypatch.setattr(
        scannetpp_views, "_matrix", lambda r, key, side: real(r, key.replace("aligned_pose", "pose"), side)
    )


def bad_photos_kept(monkeypatch):
    real = scannetpp_views.read_json

    def without_flags(path, remedy):
        document = real(path, remedy)
        for frame in document.get("frames", []):
            frame["is_bad"] = False
        return document

    monkeypatch.setattr(scannetpp_views, "read_json", without_flags)


def largest_object_wins(monkeypatch):
    real = smallest_objects
    monkeypatch.setattr(
        scannetpp_labels,
        "smallest_objects",
        lambda of, objects: real(of, iter(sorted(objects, key=lambda o: -len(o[2]))[:1])),
    )


def dropped_objects_count(monkeypatch):
    real = scannetpp_labels._objects
    index = {"sticker": IGNORE_INDEX, "object": IGNORE_INDEX}
    monkeypatch.setattr(scannetpp_labels, "_objects", lambda path, known: real(path, {**index, **known}))


def no_map_of_labels(monkeypatch):
    monkeypatch.setattr(
        scannetpp, "class_indices", lambda root, classes: {info.name: i for i, info in enumerate(classes)}
    )


def undistorted_by_the_fisheye(monkeypatch):
    monkeypatch.setattr(scannetpp_views, "_pinhole", lambda path: colmap.read_cameras(path.parents[1] / "colmap")[1])


def fisheye_hides_by_z(monkeypatch):
    """Far off its axis points are near along z, and would hide half of the picture."""
    real = link.visible_by_zbuffer

    def by_z(u, v, near, camera, **settings):
        x, y = geometry.undistort((u - camera.cx) / camera.fx, (v - camera.cy) / camera.fy, camera)
        return real(u, v, near / np.sqrt(1 + x * x + y * y), camera, **settings)

    monkeypatch.setattr(link, "visible_by_zbuffer", by_z)


TURN = np.array([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1]])  # of nerfstudio's world
FAULTS = {
    "camera to world": ("dslr", of_images(np.linalg.inv)),
    "the world of transforms.json": ("dslr", of_images(lambda m: m @ TURN)),
    "axes of OpenGL": ("dslr", of_images(lambda m: np.diag([1.0, -1, -1, 1]) @ m)),
    "quaternion as xyzw": ("dslr", quaternion_the_other_way),
    "fisheye ignored": ("dslr", of_cameras(lambda c: replace(c, model="pinhole", distortion=()))),
    "x and y swapped": ("dslr", of_cameras(lambda c: replace(c, fx=c.fy, fy=c.fx, cx=c.cy, cy=c.cx))),
    "blue first": ("dslr", of_function(scannetpp_views, "read_color", lambda image: image[..., ::-1])),
    "fisheye hides by z": ("dslr", fisheye_hides_by_z),
    "bad photos kept": ("dslr", bad_photos_kept),
    "undistorted by the fisheye": ("dslr-undistorted", undistorted_by_the_fisheye),
    "largest object wins": ("dslr", largest_object_wins),
    "objects that are dropped count": ("dslr", dropped_objects_count),
    "labels not mapped": ("dslr", no_map_of_labels),
    "classes in another order": (
        "dslr",
        of_function(scannetpp, "class_indices", lambda index: {k: (v + 1) % 100 for k, v in index.items()}),
    ),
    "millimetres": ("iphone", of_function(scannetpp_depth, "depth_in_metres", lambda depth: depth * 1000)),
    "the next frame": ("iphone-video", the_next_frame),
    "depth of the frame before": ("iphone", the_depth_of_the_frame_before),
    "the pose in ARKit's world": ("iphone-video", the_pose_in_arkit_s_world),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(write, again, monkeypatch, fault):
    """All these sources are right without a fault: `test_features_labels_and_coordinates`."""
    views, plant = FAULTS[fault]
    plant(monkeypatch)
    reports = again(write(), views)
    assert reports is None or not reports[0].right()


def test_a_lens_that_is_ignored_is_found(write, again, monkeypatch):
    """Right without the fault: `test_variants_of_the_release`."""
    of_cameras(lambda c: replace(c, distortion=(0.0,) * 4))(monkeypatch)
    assert not again(write(**PREPARED), "iphone")[0].right()


# --- bad input ------------------------------------------------------------------------------------------------------


def test_the_folder_of_the_scenes_is_passed(copy):
    root, _ = copy
    (root.parent / "a").mkdir()
    (root.parent / "empty" / "data").mkdir(parents=True)  # which many folders have
    for inside in ("data", "splits"):
        with pytest.raises(MissingDataError, match=rf"no folder 'data' .*; pass its parent '{root}' with --root"):
            open_dataset("scannetpp", root / inside)
    for near in (root / "data" / TRAIN, root.parent):
        with pytest.raises(MissingDataError, match=rf"no folder 'data' .*; pass '{root}' with --root"):
            open_dataset("scannetpp", near)
    with pytest.raises(MissingDataError, match=r"no folder 'data' .*; expected data/<id>/scans/mesh_aligned.*script"):
        open_dataset("scannetpp", root.parent / "a")


def test_no_lists_and_no_scenes(copy):
    root, _ = copy
    for scene in (root / "data").iterdir():
        shutil.rmtree(scene)
    with pytest.raises(MissingDataError, match=r"none of the 3 scenes in .*splits is in .*data.*download"):
        open_dataset("scannetpp", root)
    shutil.rmtree(root / "splits")
    with pytest.raises(MissingDataError, match=r"splits.nvs_sem_train.txt: no such file, nor .*download script"):
        open_dataset("scannetpp", root)


def test_scenes_that_were_not_downloaded_are_left_out(copy, caplog):
    root, _ = copy
    shutil.rmtree(root / "data" / VAL)
    (root / "data" / ".DS_Store").write_bytes(b"")
    with (root / "splits" / "nvs_sem_train.txt").open("a") as file:
        file.write("\n../../etc\nödd scene #1\n")
    odd = root / "data" / "ödd scene #1"
    shutil.copytree(root / "data" / TRAIN, odd)
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset("scannetpp", root)
    assert [list(dataset.sample_ids(s)) for s in dataset.splits] == [[TRAIN, odd.name], [], [TEST]]
    assert "2 of 5 scenes" in caplog.text
    assert len(dataset.read(odd.name).views) == 4


@pytest.mark.parametrize(
    ("views", "missing", "asset"),
    [
        ("dslr", "scans/mesh_aligned_0.05.ply", "scan_mesh_path"),
        ("dslr", "scans/segments.json", "scan_mesh_segs_path"),
        ("dslr", "scans/segments_anno.json", "scan_anno_json_path"),
        ("dslr", "dslr/resized_images", "dslr_resized_dir"),
        ("dslr", "dslr/nerfstudio/transforms.json", "dslr_nerfstudio_transform_path"),
        ("dslr", "dslr/colmap/cameras.txt", "dslr_colmap_dir"),
        ("dslr", "dslr/colmap/images.txt", "dslr_colmap_dir"),
        ("dslr-undistorted", "dslr/resized_undistorted_images", "dslr_resized_undistorted_dir"),
        (
            "dslr-undistorted",
            "dslr/nerfstudio/transforms_undistorted.json",
            "dslr_nerfstudio_transform_undistorted_path",
        ),
        ("iphone", "iphone/rgb.mkv", "iphone_video_path"),
        ("iphone", "iphone/depth.bin", "iphone_depth_path"),
        ("iphone", "iphone/colmap/images.txt", "iphone_colmap_dir"),
        ("iphone-video", "iphone/colmap", "iphone_colmap_dir"),
        ("iphone-video", "iphone/pose_intrinsic_imu.json", "iphone_pose_intrinsic_imu_path"),
    ],
)
def test_a_half_unpacked_scene(copy, views, missing, asset):
    root, scene = copy
    path = scene / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(MissingDataError) as error:
        read(root, views)
    assert missing in str(error.value)
    assert asset in str(error.value)


def test_the_map_of_labels_is_missing(copy):
    root, _ = copy
    path = root / "metadata" / "semantic_benchmark" / "map_benchmark.csv"
    path.write_text("class,count\nwall,3\n")
    with pytest.raises(DataError, match=r"map_benchmark.csv: expected columns class and semantic_map_to"):
        read(root)
    path.write_text("class,count,semantic_map_to\ncupboard,3,None\n")
    with pytest.raises(DataError, match=r"map_benchmark.csv: maps no label"):
        read(root)
    path.unlink()
    with pytest.raises(MissingDataError, match=r"map_benchmark.csv: no such file.*metadata"):
        read(root)
    assert read(root, sample=TEST).load_points().segment is None


def test_the_classes_are_those_of_the_download(copy):
    root, _ = copy
    path = root / "metadata" / "semantic_benchmark" / "top100.txt"
    assert tuple(c.name for c in benchmark_classes(Path("nowhere"))) == layout.TOP100
    path.write_text("wall\nfloor\nunicorn\n")
    assert [c.name for c in open_dataset("scannetpp", root).classes] == ["wall", "floor", "unicorn"]
    path.write_text("wall\nwall\n")
    with pytest.raises(DataError, match=r"top100.txt: expected one class a line, each once"):
        open_dataset("scannetpp", root)


def test_a_scene_without_photos_keeps_its_points(copy, position_checkpoint, tmp_path):
    root, scene = copy
    shutil.rmtree(scene / "dslr")
    made = run_dataset("scannetpp", root, tmp_path / "none", position_checkpoint, splits=("train",))
    texts = [failure.error for failure in made.totals.failures]
    assert any("dslr: no such folder, its points have no features; download" in text for text in texts)
    assert any("kept with coverage 0" in text for text in texts)
    sample = made.sample(TRAIN)
    assert len(sample.coord) > 5000
    assert not sample.valid.any()
    assert (sample.segment != IGNORE_INDEX).any()


def test_a_scene_whose_models_have_no_images(copy):
    root, scene = copy
    for source in ("dslr", "iphone"):
        (scene / source / "colmap" / "images.txt").write_text("# Image list\n# Number of images: 0\n")
    assert read(root, "iphone").views == ()
    sample = read(root)
    assert sample.views == ()
    assert "no pose for photo DSC02311.JPG" in dict(sample.broken_views)["DSC02311.JPG"]


def test_single_photos_are_missing_or_damaged(copy):
    root, scene = copy
    images = scene / "dslr" / "resized_images"
    (images / "DSC02317.JPG").unlink()
    (images / "DSC02324.JPG").write_bytes((images / "DSC02324.JPG").read_bytes()[:500])
    Image.new("RGB", (40, 30)).save(images / "DSC02402.JPG")
    sample = read(root)
    assert "DSC02317.JPG: no such file; download" in dict(sample.broken_views)["DSC02317.JPG"]
    views = {view.id: view for view in sample.views}
    assert list(views) == ["DSC02311.JPG", "DSC02324.JPG", "DSC02402.JPG"]
    with pytest.raises(DataError, match=r"DSC02324.JPG: not a readable image"):
        views["DSC02324.JPG"].load_image()
    with pytest.raises(DataError, match=r"DSC02402.JPG: expected 300x200 pixels .* got 40x30"):
        views["DSC02402.JPG"].load_image()


@pytest.mark.parametrize("views", ["dslr", "dslr-undistorted"])
def test_withheld_photos_of_a_test_scene_are_left_out(copy, views, caplog):
    root, _ = copy
    for scene in (TRAIN, TEST):
        for path in (root / "data" / scene / "dslr").glob("resized_*images/DSC02402.JPG"):  # all of its test_frames
            path.unlink()
    with caplog.at_level(logging.INFO):
        sample = read(root, views, TEST)
    assert len(sample.views) == 3 and sample.broken_views == ()
    (said,) = (record.getMessage() for record in caplog.records)
    assert f"{TEST}/dslr/nerfstudio/transforms.json: none of the 1 photos of test_frames" in said
    assert "DSC02402.JPG: no such file" in dict(read(root, views).broken_views)["DSC02402.JPG"]  # not withheld there


def test_a_test_scene_that_has_some_of_its_test_photos_reports_the_others(copy):
    root, _ = copy
    edit(
        root / "data" / TEST / "dslr" / "nerfstudio" / "transforms.json",
        lambda d: d["test_frames"].append({**d["test_frames"][0], "file_path": "DSC02403.JPG"}),
    )
    sample = read(root, sample=TEST)
    assert [name for name, _ in sample.broken_views] == ["DSC02403.JPG"] and len(sample.views) == 4


def test_photos_made_smaller_take_their_camera_along(copy):
    root, scene = copy
    for path in (scene / "dslr" / "resized_images").iterdir():
        Image.open(path).resize((150, 100)).save(path)
    camera = read(root).views[0].camera
    assert (camera.width, camera.height) == (150, 100)
    assert camera.fx == pytest.approx(135.3 / 2)
    for path in (scene / "dslr" / "resized_images").iterdir():
        Image.open(path).resize((150, 150)).save(path)
    with pytest.raises(DataError, match=r"images of 150x150 pixels, but their camera is of 300x200.*cropped"):
        read(root)


def test_labels_of_another_mesh(copy):
    root, scene = copy
    edit(scene / "scans" / "segments.json", lambda d: {"segIndices": d["segIndices"][:-3]})
    with pytest.raises(DataError, match=r"segments.json: segments of \d+ vertices, expected the \d+ of .*download"):
        read(root).load_points()
    edit(scene / "scans" / "segments.json", lambda d: {"segIndices": [1.5]})
    with pytest.raises(DataError, match=r"segments.json: expected a list of whole numbers 'segIndices'"):
        read(root).load_points()


def test_a_mask_of_another_mesh(copy):
    root, scene = copy
    (scene / "scans" / "mesh_aligned_0.05_mask.txt").write_text("3\n99999999\n")
    with pytest.raises(DataError, match=r"mask.txt: names vertices 3 to 99999999, expected 0 to"):
        read(root).load_points()
    (scene / "scans" / "mesh_aligned_0.05_mask.txt").write_text("3\nwall\n")
    with pytest.raises(DataError, match=r"mask.txt: expected one vertex index a line"):
        read(root).load_points()
    (scene / "scans" / "mesh_aligned_0.05_mask.txt").unlink()
    assert read(root).load_points().segment is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {"segGroups": {}}, r"expected a list of objects 'segGroups'"),
        (lambda d: {"segGroups": [{"objectId": 1, "label": "wall"}]}, r"object 0 of 'segGroups': expected"),
        (
            lambda d: {"segGroups": [{"objectId": -1, "label": "wall", "segments": []}]},
            r"object 0 .* a whole number 'objectId'",
        ),
        (lambda d: {"segGroups": [7]}, r"object 0 of 'segGroups': expected"),
    ],
)
def test_annotations_that_are_none(copy, change, message):
    root, scene = copy
    edit(scene / "scans" / "segments_anno.json", change)
    with pytest.raises(DataError, match=rf"segments_anno.json: {message}"):
        read(root).load_points()


@pytest.mark.parametrize("name", ["scans/segments.json", "scans/segments_anno.json", "dslr/nerfstudio/transforms.json"])
def test_truncated_json(copy, name):
    root, scene = copy
    path = scene / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=rf"{path.name}: not JSON .* truncated or damaged; download"):
        read(root).load_points()


def test_documents_are_bounded(copy, monkeypatch):
    root, _ = copy
    monkeypatch.setattr(documents, "MAX_BYTES", 300)
    with pytest.raises(DataError, match=r"transforms.json: larger than 300 bytes"):
        scannetpp_views.dslr_views(root / "data" / TRAIN, undistorted=False)


def test_a_truncated_mesh(copy):
    root, scene = copy
    path = scene / "scans" / "mesh_aligned_0.05.ply"
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(DataError, match=r"mesh_aligned_0.05.ply: .*truncated"):
        read(root).load_points()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("fl_x"), r"expected numbers fl_x, fl_y, cx, cy, w, h"),
        (lambda d: d.update(camera_model="OPENCV_FISHEYE"), r"camera model 'OPENCV_FISHEYE', expected 'PINHOLE'"),
        (lambda d: d.update(fl_y=0), r"singular intrinsics"),
    ],
)
def test_intrinsics_of_undistorted_photos(copy, change, message):
    root, scene = copy

    def of(document):
        change(document)
        return document

    edit(scene / "dslr" / "nerfstudio" / "transforms_undistorted.json", of)
    with pytest.raises(DataError, match=rf"transforms_undistorted.json: .*{message}"):
        read(root, "dslr-undistorted")


def test_lists_of_photos_that_are_none(copy):
    root, scene = copy
    edit(scene / "dslr" / "nerfstudio" / "transforms.json", lambda d: {"frames": [{"file_path": 3}]})
    with pytest.raises(DataError, match=r"transforms.json: expected a list 'frames' of objects with 'file_path'"):
        read(root)


@pytest.mark.parametrize("source", ["dslr", "iphone"])
def test_images_twice_or_of_no_camera(copy, source):
    root, scene = copy
    path = scene / source / "colmap" / "images.txt"
    text = path.read_text()
    path.write_text(text.replace(" 1 DSC02317.JPG", " 7 DSC02317.JPG").replace(" 1 frame_000010", " 7 frame_000010"))
    with pytest.raises(DataError, match=r"is of camera 7, which is not there; download"):
        read(root, source)
    path.write_text(text.replace("DSC02317", "a/DSC02311").replace("frame_000010", "video/frame_000000"))
    with pytest.raises(DataError, match=r"image (a/DSC02311.JPG|video/frame_000000.jpg) stands there twice"):
        read(root, source)


def test_frames_with_odd_numbers(copy):
    root, scene = copy
    path = scene / "iphone" / "colmap" / "images.txt"
    text = path.read_text()
    path.write_text(text.replace("frame_000010.jpg", "frame_20.jpg"))
    with pytest.raises(DataError, match=r"frame 20 stands there twice, as frame_\d+ and frame_\d+"):
        read(root, "iphone")
    path.write_text(text.replace("frame_000010.jpg", "first.jpg"))
    with pytest.raises(DataError, match=r"image 'first.jpg' has no frame number"):
        read(root, "iphone")


def test_poses_of_the_video_that_cannot_be_used(copy):
    root, scene = copy
    path = scene / "iphone" / "pose_intrinsic_imu.json"

    def spoil(document):
        document["frame_000001"]["aligned_pose"] = np.diag([2.0, 1, 1, 1]).tolist()  # not orthonormal
        del document["frame_000002"]["aligned_pose"]
        document["frame_000003"]["aligned_pose"][0][3] = float("inf")  # tracking was lost
        document["frame_000004"]["intrinsic"] = [[1, 2], [3, 4]]
        document["frame_000005"]["intrinsic"][0][0] = 0
        for name in ("frame_000006", "frame_000007"):  # twice, and back in time: frames are told by their names
            document[name]["timestamp"] = document["frame_000000"]["timestamp"]

    edit(path, spoil)
    sample = read(root, "iphone-video")
    broken = dict(sample.broken_views)
    assert sorted(broken) == [f"frame_{n:06}" for n in (1, 2, 4, 5)]
    assert "pose_intrinsic_imu.json: frame_000001: pose: expected a rotation" in broken["frame_000001"]
    assert "aligned_pose" in broken["frame_000002"]
    assert "'intrinsic' of 3x3 numbers, got shape [2, 2]" in broken["frame_000004"]
    assert "singular intrinsics" in broken["frame_000005"]
    posed = [v.id for v in sample.views if np.isfinite(v.camera_from_world).all()]
    assert posed == ["frame_000000", *(f"frame_{n:06}" for n in range(6, 21))]
    edit(path, lambda d: {"second": d["frame_000000"]})
    with pytest.raises(DataError, match=r"pose_intrinsic_imu.json: expected records by frame, .* got 'second'"):
        read(root, "iphone-video")


def test_frames_that_the_toolkit_extracted_in_part(write, tmp_path):
    root = tmp_path / "release"
    shutil.copytree(write(**PREPARED)[0], root)
    folder = root / "data" / TRAIN / "iphone"
    (folder / "rgb" / "frame_000010.jpg").unlink()
    (folder / "depth" / "frame_000020.png").unlink()
    views = read(root, "iphone").views
    assert all(view.load_image().shape == (216, 288, 3) and view.load_depth().shape == (192, 256) for view in views)
    (folder / "rgb.mkv").unlink()
    (folder / "depth.bin").unlink()
    broken = dict(read(root, "iphone").broken_views)
    assert "frame_000010.jpg: no such file, and no video; download" in broken["frame_000010"]
    assert "frame_000020.png: no such file, and no depth.bin; download" in broken["frame_000020"]


def test_missing_libraries_are_named_at_construction_where_they_are_needed(write, monkeypatch):
    packed, prepared = write()[0], write(**PREPARED)[0]
    for library in ("av", "lz4"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, library, None)
            for views in ("iphone", "iphone-video"):
                with pytest.raises(UsageError, match=rf"'{library}'; pip install 'ditr\[datasets\]'"):
                    open_dataset("scannetpp", packed, {"views": views})
                assert open_dataset("scannetpp", prepared, {"views": views})
            assert open_dataset("scannetpp", packed)


def test_the_library_for_videos_is_named_before_work_starts(write, monkeypatch):
    real = importlib.import_module

    def without_av(module):
        if module == "av":
            raise ImportError(module)
        return real(module)

    monkeypatch.setattr(importlib, "import_module", without_av)
    with pytest.raises(UsageError, match=r"'av'; pip install 'ditr\[datasets\]'"):
        read(write()[0], "iphone")
    assert read(write(**PREPARED)[0], "iphone").views


# --- the rule of labels ---------------------------------------------------------------------------------------------


def test_the_first_three_objects_count_and_the_smallest_wins():
    segment_of = np.array([5, 5, 5, 5, 9, 9, 2])
    objects = [
        (1, 10, np.array([5, 9])),
        (2, 11, np.array([5])),
        (3, 12, np.array([5, 9, 777])),  # no vertex is of segment 777
        (4, 13, np.array([9, 5])),  # the fourth of segment 5; as large as the vertices that it still counts for, two
        (5, 14, np.array([], dtype=int)),
        (6, 15, np.array([9])),  # the fourth of segment 9
    ]
    label, instance = smallest_objects(segment_of, iter(objects))
    assert label.tolist() == [11] * 4 + [13, 13, IGNORE_INDEX]
    assert instance.tolist() == [2] * 4 + [4, 4, -1]


def test_labels_equal_a_loop():
    rng = np.random.default_rng(0)
    for _ in range(20):
        names = rng.choice(10_000, 12, replace=False)
        segment_of = rng.choice(names, 60)
        objects = [(n, n % 5, rng.choice([*names, 20_000], rng.integers(0, 6))) for n in range(12)]  # some twice
        label, instance = smallest_objects(segment_of, iter(objects))
        counted, best = [0] * 60, [61] * 60
        expected = [(IGNORE_INDEX, -1)] * 60
        for number, index, segments in objects:
            members = [v for v in range(60) if segment_of[v] in segments and counted[v] < 3]
            for vertex in members:
                counted[vertex] += 1
                if len(members) < best[vertex]:
                    best[vertex], expected[vertex] = len(members), (index, number)
        assert list(zip(label.tolist(), instance.tolist(), strict=True)) == expected


def test_an_object_costs_no_more_than_it_is_large():
    """Twenty times the objects of the same vertices: three times the time, not twenty times."""
    segment_of = np.arange(1_000_000) // 20 * 7

    def seconds(objects):
        parts = np.array_split(np.unique(segment_of), objects)
        start = time.process_time()
        smallest_objects(segment_of, ((n, 0, part) for n, part in enumerate(parts)))
        return time.process_time() - start

    assert min(seconds(1000) for _ in range(3)) < 6 * min(seconds(50) for _ in range(3))
