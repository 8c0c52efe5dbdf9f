"""`ditr-cache check` and `datasets`: what is said of a download before hours are spent on it."""

import json
import logging
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

import world as bed
from ditr_cache import check as check_module
from ditr_cache.check import check, odd_camera
from ditr_cache.datasets import ClassInfo, Dataset, Need
from ditr_cache.datasets import base as base_module
from ditr_cache.errors import DataError, MissingDataError, StorageError
from ditr_cache.overlay import Overlay, depth_colors
from ditr_cache.sample import Camera, Points, Sample, View

CAMERA = Camera(width=320, height=240, fx=200.0, fy=205.0, cx=155.0, cy=122.0)
STANDS = tuple(bed.pose((x, 0.9, 1.4), yaw=0.2, pitch=0.15) for x in (-0.4, 0.2, 0.6, 0.9))
ROOM = bed.World()


@cache
def pictures(i: int) -> tuple[np.ndarray, np.ndarray]:
    eye = bed.pinhole(320, 240, 200.0, 205.0, 155.0, 122.0, STANDS[i])
    return ROOM.image(eye), ROOM.depth(eye).astype(np.float32)


def view(i: int) -> View:
    return View(
        id=f"frame-{i}",
        camera=CAMERA,
        camera_from_world=STANDS[i],
        load_image=lambda: pictures(i)[0],
        depth_camera=CAMERA,
        load_depth=lambda: pictures(i)[1],
    )


def points() -> Points:
    places, surface = ROOM.points(4000)
    label = np.where(surface < 7, surface, -1)
    return Points(coord=places.astype(np.float32), segment=label.astype(np.int16))


def right(name: str) -> Sample:
    return Sample(id=name, split="train", views=tuple(view(i) for i in range(4)), load_points=points)


class Download(Dataset):
    """Six samples; `changes` replaces some."""

    name: ClassVar[str] = "download"
    title: ClassVar[str] = "a download"
    needs: ClassVar[tuple[Need, ...]] = ()

    def __init__(self, root: Path = Path("/data"), **changes: Sample | Exception) -> None:
        self.root, self.changes = root, changes
        self.ids = {"train": ["a", "b", "c", "d"], "val": ["e", "f"]}
        self.reads = 0

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        return tuple(ClassInfo(name, (10 * i, 200, 30)) for i, name in enumerate(bed.NAMES[:7]))

    def read(self, sample_id: str) -> Sample:
        found = self.changes.get(sample_id, right(sample_id))
        if isinstance(found, Exception):
            raise found
        return found


def kinds(report: check_module.CheckReport) -> list[tuple[str, str, str]]:
    return [(p.kind, p.sample, p.view) for p in report.problems]


def test_a_right_download(tmp_path):
    seen = []
    report = check(
        Download(), overlay=tmp_path / "sub" / "o.png", progress=lambda done, total: seen.append((done, total))
    )
    assert not report.problems and seen[-1] == (6, 6)
    assert (report.splits, report.samples, report.views, report.used) == ({"train": 4, "val": 2}, 6, 24, 24)
    assert (report.loaded_samples, report.loaded_images, report.points) == (4, 12, 16000)
    assert 0.8 < report.labelled < 0.95 and 0.3 < report.coverage < 0.8
    picture = np.asarray(Image.open(tmp_path / "sub" / "o.png"))
    assert picture.shape == (24 + 3 * 720, 960, 3)
    deep = check(Download(), deep=True)
    assert (deep.loaded_samples, deep.loaded_images, deep.points) == (6, 24, 24000)
    assert (
        "6 samples (train 4, val 2), 7 classes" in "\n".join(report.lines())
        and list(report.lines())[-1] == "no problems"
    )


def test_what_is_missing_or_unreadable_is_named_and_the_rest_goes_on():
    def broken() -> np.ndarray:
        raise DataError("frame-1.jpg: not a readable image")

    torn = replace(view(1), load_image=broken)
    report = check(
        Download(
            b=MissingDataError("b/velodyne/000000.bin: no such file; unpack data_odometry_velodyne.zip"),
            c=DataError("c/calib.txt: 11 numbers"),
            e=replace(right("e"), views=(view(0), torn), broken_views=(("frame-9", "frame-9.txt: no such file"),)),
        ),
        deep=True,
    )
    assert kinds(report) == [
        ("missing", "b", ""), ("unreadable", "c", ""), ("missing", "e", "frame-9"), ("unreadable", "e", "frame-1"),
    ]  # fmt: skip
    assert report.samples == 4 and report.loaded_images == 4 * 3 + 1
    text = "\n".join(report.lines(shown=1))
    assert "unpack data_odometry_velodyne.zip" in text and "missing: and 1 more" in text
    assert text.endswith("2 missing, 2 unreadable")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"camera": replace(CAMERA, fx=20000.0, fy=20000.0)}, "field of view of 0.9 degrees"),
        ({"camera": replace(CAMERA, cx=310.0)}, "principal point (310, 122)"),
        ({"depth_camera": replace(CAMERA, cy=1.0)}, "intrinsics of the depth map"),
        ({"camera_from_world": STANDS[0] * [[1.5], [1.5], [1.5], [1]]}, "not orthonormal"),
        ({"load_image": lambda: np.zeros((10, 20, 3), np.uint8)}, "image of 20x10 pixels, its camera says 320x240"),
    ],
)
def test_what_can_hardly_be_meant(fault, said):
    sample = replace(right("a"), views=(replace(view(0), **fault), *right("a").views[1:]))
    report = check(Download(a=sample), deep=True)
    assert any(said in p.text for p in report.problems), report.problems
    assert {(p.sample, p.view) for p in report.problems} == {("a", "frame-0")}


def test_millimetres_and_poses_of_another_frame():
    big = points()
    sample = replace(right("a"), load_points=lambda: replace(big, coord=big.coord * 1000))
    report = check(Download(a=sample))
    assert any("measure 5000 m" in p.text and "metres?" in p.text for p in report.problems)
    far = STANDS[0].copy()
    far[:3, 3] += 5000
    sample = replace(right("a"), views=(replace(view(0), camera_from_world=far),))
    report = check(Download(a=sample))
    assert any("outside the points' bounds" in p.text for p in report.problems)
    assert any("are poses, depth units and axes right?" in p.text for p in report.problems)


def test_a_sample_without_views_or_points():
    empty = replace(right("b"), views=())
    nothing = replace(right("a"), load_points=lambda: Points(coord=np.zeros((0, 3), np.float32)))
    report = check(Download(a=nothing, b=empty), deep=True)
    assert kinds(report) == [("implausible", "a", ""), ("missing", "b", "")]
    assert "coverage 0" in report.problems[1].text


def test_what_is_said_of_a_whole_sample_is_no_frame():
    bare = replace(right("a"), views=(), broken_views=(("", "images: no such file"),))
    report = check(Download(a=bare))
    assert report.views == 20 and kinds(report)[0] == ("missing", "a", "")


def test_no_overlay_where_nothing_is_seen(tmp_path):
    none = {name: replace(right(name), views=()) for name in "abcdef"}
    report = check(Download(**none), overlay=tmp_path / "o.png")
    assert report.problems[-1].text == "no overlay: no image sees a point" and not (tmp_path / "o.png").exists()


def test_an_overlay_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        check(Download(), overlay=tmp_path / "file" / "o.png")


def test_points_lie_where_they_belong_in_the_overlay():
    image = np.full((50, 100, 3), 200, np.uint8)
    uv = np.array([[16384, 32768], [49152, 0]], np.uint16)  # a quarter from the left in the middle; upper right
    picture = Overlay(
        title="t", image=image, uv=uv, depth=np.array([1, 9], np.float32), segment=np.array([0, -1], np.int16),
        colors=[(250, 0, 0)],
    ).draw()  # fmt: skip
    panel = np.asarray(picture)[24 + 2 * 480 :]
    assert panel[240, 240].tolist() == [250, 0, 0] and panel[0, 720].tolist() == [150, 150, 150]
    assert (panel[300, 300] == 90).all()
    near, far = depth_colors(np.array([1, 9], np.float32))
    assert near[0] > near[2] and far[2] > far[0]


def test_panoramas_are_exempt_of_plausible_intrinsics():
    assert odd_camera(Camera.panorama(width=512, height=256), "image") == []


def test_what_differs_in_numbers_alone_is_told_once():
    """As of a sequence whose calibration is gone: 4541 scans say the same, and must not hide what else is wrong."""
    gone = {f: DataError(f"sequences/00/calib.txt of scan {i:06d}: no Tr") for i, f in enumerate("abcd")}
    report = check(Download(**gone, e=DataError("sequences/08/labels/000001.label: no such file")))
    lines = [line for line in report.lines(shown=2) if line.startswith("unreadable")]
    assert lines == [
        "unreadable: a: sequences/00/calib.txt of scan 000000: no Tr (and 3 more like it)",
        "unreadable: e: sequences/08/labels/000001.label: no such file",
    ]
    assert len(report.problems) == 5


def test_folders_without_permission_are_problems_and_no_traceback():
    report = check(Download(b=PermissionError(13, "Permission denied", "/data/b/scans")))
    assert kinds(report) == [("unreadable", "b", "")] and "make it readable" in report.problems[0].text


def test_unlabelled_samples_do_not_count_as_unlabelled_points():
    bare = replace(right("a"), load_points=lambda: replace(points(), segment=None))
    assert check(Download(a=bare)).labelled == check(Download()).labelled > 0.8
    only_first = {name: replace(right(name), views=()) for name in "bcdef"}
    assert len(list(check(Download(a=bare, **only_first)).lines())) > 3


def test_an_unreadable_image_is_not_called_a_wrong_pose():
    def broken() -> np.ndarray:
        raise DataError("frame.jpg: not a readable image")

    torn = replace(right("a"), views=tuple(replace(view(i), load_image=broken) for i in range(4)))
    assert {p.kind for p in check(Download(a=torn), deep=True).problems} == {"unreadable"}


class Reluctant(Download):
    """Warns of what it leaves out."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        for _ in range(2):
            logging.getLogger("ditr_cache.datasets.somewhere").warning("3 of %d scans are left out", 9)


def test_what_the_reader_warns_of_is_in_the_report(run, monkeypatch, tmp_path):
    monkeypatch.setitem(base_module.DATASETS, "download", "test_check:Reluctant")
    done = run("check", "--dataset", "download", "--root", str(tmp_path), "--json")
    assert done.code == 0 and done.json["warnings"] == ["3 of 9 scans are left out"]
    text = run("check", "--dataset", "download", "--root", str(tmp_path)).out
    assert "warning: 3 of 9 scans are left out" in text and text.strip().endswith("no problems, 1 warnings")


class Locked(Download):
    """Below a folder that cannot be listed."""

    def __init__(self, root: Path) -> None:
        raise PermissionError(13, "Permission denied", str(root / "sequences"))


def test_a_root_that_cannot_be_listed(run, monkeypatch, tmp_path):
    monkeypatch.setitem(base_module.DATASETS, "download", "test_check:Locked")
    done = run("check", "--dataset", "download", "--root", str(tmp_path))
    assert done.code == 2 and "Permission denied" in done.err and "make it readable" in done.err


# --- the commands ---------------------------------------------------------------------------------------------------


def test_the_command(run, monkeypatch, tmp_path):
    monkeypatch.setitem(base_module.DATASETS, "download", "test_check:Download")
    done = run("check", "--dataset", "download", "--root", str(tmp_path), "--json", "-o", str(tmp_path / "o.png"))
    assert done.code == 0 and json.loads(done.out)["samples"] == 6 and (tmp_path / "o.png").is_file()
    done = run("check", "--dataset", "download", "--root", str(tmp_path), "-o", str(tmp_path))
    assert done.code == 2 and "is a directory" in done.err
    done = run("check", "--dataset", "download", "--root", str(tmp_path / "none"))
    assert done.code == 2 and "is not a folder" in done.err
    done = run("check", "--dataset", "download", "--root", str(tmp_path), "--option", "views=none")
    assert done.code == 2 and "unknown option of dataset 'download' 'views'" in done.err
