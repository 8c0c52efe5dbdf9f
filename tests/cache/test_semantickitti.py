"""SemanticKITTI: the written release is read as it was written, planted faults are found, damage is told."""

from __future__ import annotations

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
from ditr_cache.datasets import open_dataset
from ditr_cache.datasets.base import partitions
from ditr_cache.datasets.images import read_color
from ditr_cache.datasets.semantickitti import dataset as semantickitti
from ditr_cache.datasets.semantickitti import labels as semantickitti_labels
from ditr_cache.datasets.semantickitti import odometry as kitti_odometry
from ditr_cache.datasets.semantickitti.dataset import read_points
from ditr_cache.datasets.semantickitti.labels import read_labels
from ditr_cache.datasets.semantickitti.odometry import Calibration, OdometryFolders
from ditr_cache.errors import DataError, MissingDataError, UnknownNameError
from ditr_cache.schema import IGNORE_INDEX
from ditr_train.benchmark_labels import SEMANTICKITTI
from ditr_train.evaluate import evaluate
from ditr_train.recipe import parse_recipe
from ditr_train.trainer import train
from layouts import semantickitti as layout
from support import Run
from world import Truth, World

NAME = "semantickitti"
WORLD = World(6.0)
GRID = (8, 24)
ODD_DIGITS = "\u0660" * 6  # digits to str.isdigit and to int, but none of a file of the release
RECIPE = Path(__file__).parents[2] / "pipelines/semantickitti/base.yaml"


@dataclass(frozen=True)
class Release:
    root: Path
    truths: Sequence[Truth]

    def of(self, split: str) -> list[Truth]:
        return [truth for truth in self.truths if truth.split == split]


@pytest.fixture(scope="session")
def extract_release(position_checkpoint: Path) -> Callable[..., Extracted]:
    def extract(root: Path, out: Path, **more: Any) -> Extracted:
        return run_dataset(NAME, root, out, position_checkpoint, grid=GRID, **more)

    return extract


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    root = tmp_path_factory.mktemp("semantickitti")
    return Release(root, layout.write(root, world=WORLD))


@pytest.fixture(scope="session")
def extracted(release: Release, tmp_path_factory: pytest.TempPathFactory, extract_release) -> Extracted:
    return extract_release(release.root, tmp_path_factory.mktemp("semantickitti_cache") / "cache")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """One scan of sequence 08 with few points, to be damaged: its folder."""
    layout.write(tmp_path, world=WORLD, sequences=("08",), scans=1, azimuths=20, image_scale=0.1)
    return tmp_path / "dataset/sequences/08"


def read_small(small: Path) -> Any:
    return open_dataset(NAME, small.parents[2]).read("08/000000")


def expected_instance(truth: Truth, root: Path) -> np.ndarray:
    """From the file's two halves, independently of the reader."""
    sequence, scan = truth.sample_id.split("/")
    halves = np.fromfile(root / f"dataset/sequences/{sequence}/labels/{scan}.label", "<u2").reshape(-1, 2).astype(int)
    assert (halves[:, 1] == truth.channels["instance"]).all()
    return np.where(halves[:, 1] == 0, -1, halves[:, 0] * 65536 + halves[:, 1])


def as_written(run: Extracted, truth: Truth, root: Path) -> bool:
    """Whether features, labels, coordinates, strength and instances of a scan are those that were written."""
    sample = run.sample(truth.sample_id)
    order = sample.source_index
    right = run.report(truth, WORLD).right(occlusion=False)
    right &= bool((sample.strength == truth.channels["strength"][order]).all())
    if truth.label is not None:
        right &= bool((sample.instance == expected_instance(truth, root)[order]).all())
    return right


# --- what was written is read -----------------------------------------------------------------------------------------


def test_every_scan_is_right(release: Release, extracted: Extracted) -> None:
    assert extracted.totals.failures == []
    assert {t.split for t in release.truths} == {"train", "val", "test"}
    for truth in release.truths:
        assert as_written(extracted, truth, release.root), truth.sample_id
        sample = extracted.sample(truth.sample_id)
        assert sample.split == truth.split
        assert np.array_equal(sample.coord, truth.coord[sample.source_index].astype(np.float32))
        assert (sample.instance is None) == (sample.segment is None) == (truth.label is None)


def test_the_release_s_own_calibration(tmp_path: Path, extract_release) -> None:
    truths = layout.write(tmp_path, world=WORLD, rig="official", scans=1, folder=".")
    run = extract_release(tmp_path, tmp_path / "cache")
    for truth in truths:
        assert run.report(truth, WORLD).right(occlusion=False), truth.sample_id


def test_image_sizes_of_the_release(tmp_path: Path) -> None:
    layout.write(tmp_path, world=WORLD, rig="official", scans=1, azimuths=4, image_scale=1)
    dataset = open_dataset(NAME, tmp_path)
    cameras = {s: dataset.read(f"{s}/000000").views[0].camera for s in ("03", "08", "13")}
    assert {s: (c.width, c.height) for s, c in cameras.items()} == {
        "03": (1242, 375), "08": (1226, 370), "13": (1241, 376),
    }  # fmt: skip
    assert (cameras["08"].fx, cameras["08"].cx, cameras["08"].cy) == (707.0912, 601.8873, 183.1104)


@pytest.mark.parametrize("below", [".", "dataset"])
def test_the_root_may_be_the_folder_dataset(release: Release, below: str) -> None:
    dataset = open_dataset(NAME, release.root / below)
    assert [i for split in dataset.splits for i in dataset.sample_ids(split)] == [t.sample_id for t in release.truths]


def test_each_zip_unpacked_into_a_folder_of_its_own(tmp_path: Path, small: Path) -> None:
    expected = read_small(small)
    apart = tmp_path / "apart"
    # The first place has the calib.txt of data_odometry_color.zip, which knows no Tr.
    for zipped, names in {"color": ("image_2",), "labels": ("labels",), "velodyne": ("velodyne",)}.items():
        folder = apart / f"data_odometry_{zipped}/dataset/sequences/08"
        folder.mkdir(parents=True)
        for name in names:
            shutil.copytree(small / name, folder / name)
    calib = apart / "data_odometry_zcalib/dataset/sequences/08/calib.txt"
    calib.parent.mkdir(parents=True)
    shutil.copy(small / "calib.txt", calib)
    lines = calib.read_text().splitlines(keepends=True)
    (apart / "data_odometry_color/dataset/sequences/08/calib.txt").write_text("".join(lines[:4]))
    shutil.copytree(apart / "data_odometry_velodyne", apart / ".trash/dataset/sequences/03")
    dataset = open_dataset(NAME, apart)
    assert [list(dataset.sample_ids(split)) for split in dataset.splits] == [[], ["08/000000"], []]
    sample = dataset.read("08/000000")
    assert np.array_equal(sample.views[0].camera_from_world, expected.views[0].camera_from_world)
    assert np.array_equal(sample.load_points().segment, expected.load_points().segment)
    assert np.array_equal(sample.views[0].load_image(), expected.views[0].load_image())


def test_calibration_as_other_editors_leave_it(small: Path) -> None:
    expected = read_small(small).views[0].camera_from_world
    path = small / "calib.txt"
    path.write_bytes(b"\r\n" + path.read_bytes().replace(b"\n", b"\r\n\r\n") + b"\xff\xfe: comment\r\n")
    assert np.array_equal(read_small(small).views[0].camera_from_world, expected)


# --- the benchmark ----------------------------------------------------------------------------------------------------

CONTENT = {
    10: 0.0408185, 11: 0.000166095, 13: 2.78797e-05, 15: 0.000398386, 18: 0.00206336, 20: 0.00162182, 30: 0.000176986,
    31: 1.10659e-08, 32: 5.53295e-09, 40: 0.198749, 44: 0.0147172, 48: 0.143923, 49: 0.00390486, 50: 0.132686,
    51: 0.0723592, 60: 4.70841e-05, 70: 0.266815, 71: 0.00603501, 72: 0.0781422, 80: 0.0028555, 81: 0.000615596,
    252: 0.00178931, 253: 0.0001271, 254: 0.000160598, 255: 3.74555e-05, 257: 0.000113516, 258: 0.000101579,
    259: 4.38401e-05,
}  # fmt: skip
"""Raw id -> share of the points: `content` of SemanticKITTI's `config/semantic-kitti.yaml`."""


def test_classes_splits_and_defaults(release: Release, extracted: Extracted) -> None:
    dataset = open_dataset(NAME, release.root)
    names = [c.name for c in dataset.classes]
    assert names == list(SEMANTICKITTI) == list(extracted.cache.metadata.class_names)
    colors = {c.name: c.color for c in dataset.classes}
    assert colors["car"] == (100, 150, 245) and colors["other-vehicle"] == (0, 0, 255)
    assert colors["road"] == (255, 0, 255) and colors["traffic-sign"] == (255, 0, 0)
    assert dataset.splits == ("train", "val", "test")
    assert semantickitti.SPLITS == {"train": layout.TRAIN, "val": layout.VALIDATION, "test": layout.TEST}
    counts = {split: sum(semantickitti.SCANS[s] for s in of) for split, of in semantickitti.SPLITS.items()}
    assert counts == {"train": 19130, "val": 4071, "test": 20351}
    assert dataset.release.samples == dataset.release.images == 43_552
    defaults = dataset.defaults
    assert (defaults.grid, defaults.layout, defaults.links.occlusion) == ((27, 89), "views", "none")
    assert (27 * 14, 89 * 14) == (378, 1246)  # DITR's image size, of ViT patches of 14


def test_the_recipe_has_the_classes_in_this_order(release: Release) -> None:
    recipe = yaml.safe_load(RECIPE.read_text())
    names = [c.name for c in open_dataset(NAME, release.root).classes]
    assert recipe["classes"] == names
    share = dict.fromkeys(names, 0.0)
    for raw, content in CONTENT.items():
        share[layout.BENCHMARK_NAME[raw]] += content
    np.testing.assert_allclose(recipe["loss"]["class_weights"], [-np.log(share[n]) for n in names], atol=2e-3)


def test_every_raw_id(tmp_path: Path) -> None:
    path = tmp_path / "000000.label"
    raw = np.array(list(layout.BENCHMARK_NAME), dtype="<u4")
    (raw | (65535 << 16)).tofile(path)
    segment, instance = read_labels(path, len(raw))
    names = [*(c.name for c in semantickitti_labels.classes()), ""]
    assert [names[i] for i in segment] == list(layout.BENCHMARK_NAME.values())
    assert segment.dtype == np.int16 and instance.dtype == np.int32
    assert (instance >> 16 == raw).all() and (instance & 0xFFFF == 65535).all()
    raw.tofile(path)
    assert (read_labels(path, len(raw))[1] == -1).all()
    assert [int(read_labels(path, len(raw))[0][list(raw).index(i)]) for i in SEMANTICKITTI.values()] == [*range(19)]


def test_partitions_are_of_one_sequence(tmp_path: Path) -> None:
    for sequence, scans in (("08", 130), ("07", 3)):
        folder = tmp_path / "sequences" / sequence / "velodyne"
        folder.mkdir(parents=True)
        for scan in range(scans):
            (folder / f"{scan:06d}.bin").touch()
    found = partitions(open_dataset(NAME, tmp_path))
    assert [(p.id, len(p.sample_ids)) for p in found] == [
        ("07-000000", 3), ("08-000000", 64), ("08-000064", 64), ("08-000128", 2),
    ]  # fmt: skip
    assert found[1].sample_ids[:2] == ("08/000000", "08/000001")


def test_kitti_odometry_without_semantickitti(release: Release, extract_release, tmp_path: Path) -> None:
    """No file of labels is asked for, and none is read or listed."""
    root = tmp_path / "kitti"
    shutil.copytree(release.root, root, ignore=shutil.ignore_patterns("labels"))
    with pytest.raises(MissingDataError, match=r"labels/000000\.label: no such file; .*, or --option labels=none$"):
        open_dataset(NAME, root).read("08/000000")
    labels = root / "dataset/sequences/08/labels"
    labels.mkdir()
    for name in ("000000.label", "000007.label"):  # unreadable, and without its scan
        (labels / name).write_bytes(b"?")
    run = extract_release(root, tmp_path / "cache", options={"labels": "none"})
    assert run.totals.failures == [] and run.cache.metadata.dataset_options == {"labels": "none"}
    assert run.cache.samples_with() == [truth.sample_id for truth in release.truths]
    for truth in release.truths:
        bare = replace(truth, label=None)
        assert as_written(run, bare, root) and run.sample(truth.sample_id).split == truth.split
        assert run.sample(truth.sample_id).segment is None and run.sample(truth.sample_id).instance is None


def test_a_test_split_is_predicted_with_and_without_labels(tmp_path: Path, extract_release) -> None:
    """A run on a cache with labels writes the server's files from one without: what it predicts from is the same."""
    root = tmp_path / "release"
    layout.write(root, world=WORLD, scans=1, azimuths=20, image_scale=0.1)
    labelled, bare = (
        extract_release(root, tmp_path / labels, options={"labels": labels}) for labels in ("official", "none")
    )
    recipe = parse_recipe(
        {
            "cache": str(tmp_path / "official"),
            "data": {"grid_size": 0.2, "feat": ["coord", "strength"], "batch_size": 1, "workers": 0},
            "model": {"backbone": {"stem_channels": 8, "stem_kernel_size": 3, "channels": [8, 8], "layers": [1, 1]}},
            "training": {"steps": 1},
        }
    )
    train(recipe, tmp_path / "run", device="cpu", quiet=True)
    written = []
    for run in (labelled, bare):
        out = tmp_path / f"{run.cache.paths.root.name}-predictions"
        results = evaluate(tmp_path / "run", "test", submission=out, cache=str(run.cache.paths.root), device="cpu")
        assert results["samples"] == 1 and not results["labelled"] and Path(results["submission"]).is_file()
        written.append(np.fromfile(out / "sequences/13/predictions/000000.label", "<u4"))
    assert np.array_equal(*written) and set(written[0]) <= set(SEMANTICKITTI.values())
    assert len(written[0]) == len(read_points(root / "dataset/sequences/13/velodyne/000000.bin", None).coord)


def test_an_unknown_split_and_unknown_samples(release: Release) -> None:
    dataset = open_dataset(NAME, release.root)
    with pytest.raises(UnknownNameError, match="'vall': did you mean 'val'"):
        dataset.sample_ids("vall")
    for name in (
        "08/000009",
        "08/1",
        "8",
        "",
        "08",
        "08/../03/000000",
        "/etc/passwd",
        "08/000000\n",
        f"08/{ODD_DIGITS}",
    ):
        with pytest.raises(UnknownNameError, match="sample of dataset 'semantickitti'"):
            dataset.read(name)


# --- golden faults: each, planted in the reader, is found -------------------------------------------------------------


def posed(change: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[[pytest.MonkeyPatch], None]:
    """A fault in the camera or in `camera_from_velodyne`."""
    original = Calibration.posed_camera

    def wrong(self: Calibration, size: tuple[int, int]) -> tuple[Any, Any]:
        return change(*original(self, size))

    return lambda patch: patch.setattr(Calibration, "posed_camera", wrong)


def calibrated(change: Callable[[Calibration], Calibration]) -> Callable[[pytest.MonkeyPatch], None]:
    """A fault in what is taken from calib.txt."""
    original = kitti_odometry.read_calibration
    return lambda patch: patch.setattr(semantickitti, "read_calibration", lambda *a: change(original(*a)))


def pointed(**changes: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """A fault in some array of the points, a function of all of them."""

    def wrong(*files: Path) -> Any:
        points = read_points(*files)
        return replace(points, **{name: change(points) for name, change in changes.items()})

    return lambda patch: patch.setattr(semantickitti, "read_points", wrong)


def labelled(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[pytest.MonkeyPatch], None]:
    """A fault in the table of raw ids."""
    table = semantickitti_labels._index_of_raw()
    return lambda patch: patch.setattr(semantickitti_labels, "_index_of_raw", lambda: change(table.copy()))


def text_of_calibration(patch: pytest.MonkeyPatch) -> None:
    original = kitti_odometry._text
    patch.setattr(kitti_odometry, "_text", lambda p: original(p).replace("P2:", "Px:").replace("P3:", "P2:"))


def image_of_the_other_scan(patch: pytest.MonkeyPatch) -> None:
    original = OdometryFolders.files

    def wrong(self: OdometryFolders, sequence: str, name: str) -> list[Path]:
        other = {"image_2/000000.png": "image_2/000001.png", "image_2/000001.png": "image_2/000000.png"}
        return original(self, sequence, other.get(name, name))

    patch.setattr(OdometryFolders, "files", wrong)


def moving_ignored(table: np.ndarray) -> np.ndarray:
    table[252:260] = IGNORE_INDEX
    return table


def lane_marking_ignored(table: np.ndarray) -> np.ndarray:
    table[60] = IGNORE_INDEX
    return table


def millimetres(camera: Any, pose: np.ndarray) -> tuple[Any, np.ndarray]:
    pose = pose.copy()
    pose[:3, 3] /= 1000
    return camera, pose


def without_shift(calibration: Calibration) -> Calibration:
    return replace(calibration, projection=np.column_stack([calibration.projection[:, :3], np.zeros(3)]))


def undivided_shift(calibration: Calibration) -> Calibration:
    shift = calibration.projection[:, :3] @ calibration.projection[:, 3]
    return replace(calibration, projection=np.column_stack([calibration.projection[:, :3], shift]))


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "camera to lidar taken as lidar to camera": posed(lambda camera, pose: (camera, np.linalg.inv(pose))),
    "metres taken as millimetres": posed(millimetres),
    "x and y exchanged": posed(lambda c, pose: (replace(c, fx=c.fy, fy=c.fx, cx=c.cy, cy=c.cx), pose)),
    "fourth column of P2 forgotten": calibrated(without_shift),
    "fourth column of P2 taken as metres": calibrated(undivided_shift),
    "P3 taken as P2": text_of_calibration,
    "the right camera's images": lambda patch: patch.setattr(semantickitti, "CAMERA", "image_3"),
    "the image of another moment": image_of_the_other_scan,
    "BGR": lambda patch: patch.setattr(semantickitti, "read_color", lambda *a, **k: read_color(*a, **k)[..., ::-1]),
    "axes of the points exchanged": pointed(coord=lambda points: points.coord[:, [1, 0, 2]]),
    "strength of another column": pointed(strength=lambda points: points.coord[:, 2].copy()),
    "labels of another order": pointed(segment=lambda points: points.segment[::-1].copy()),
    "ids with instances not masked": pointed(
        segment=lambda points: np.where(points.instance >= 0, IGNORE_INDEX, points.segment).astype(np.int16)
    ),
    "train ids from 1": labelled(lambda table: np.where(table >= 0, (table + 1) % 19, table).astype(np.int16)),
    "moving objects ignored": labelled(moving_ignored),
    "lane markings ignored": labelled(lane_marking_ignored),
    "instance numbers signed": pointed(
        instance=lambda points: np.where(points.instance & 0x8000, -1, points.instance).astype(np.int32)
    ),
    "instance numbers of all classes in one": pointed(instance=lambda points: points.instance & 0xFFFF),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, release, extracted, extract_release, tmp_path, monkeypatch) -> None:
    truths = release.of("val")
    assert all(as_written(extracted, truth, release.root) for truth in truths)
    FAULTS[fault](monkeypatch)
    run = extract_release(release.root, tmp_path / "cache", splits=("val",))
    assert not any(as_written(run, truth, release.root) for truth in truths)


# --- half-unpacked releases -------------------------------------------------------------------------------------------


def test_no_sequences(tmp_path: Path, small: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingDataError, match=r"no folder 'sequences'.*data_odometry_velodyne\.zip.*--root"):
        open_dataset(NAME, tmp_path / "empty")
    for inside in (small, small.parent):
        with pytest.raises(MissingDataError, match=f"pass {str(small.parents[1])!r} with --root"):
            open_dataset(NAME, inside)
    above = tmp_path / "up"
    (above / "a").mkdir(parents=True)
    (above / "kitti" / "sequences").mkdir(parents=True)
    with pytest.raises(MissingDataError, match=f"no folder 'sequences'.*; pass '{above / 'kitti'}' with --root"):
        open_dataset(NAME, above)
    shutil.rmtree(small / "velodyne")
    with pytest.raises(MissingDataError, match=r"no scan such as 00/velodyne/000000\.bin.*data_odometry_velodyne\.zip"):
        open_dataset(NAME, tmp_path)


@pytest.mark.parametrize(
    ("name", "download"),
    [
        ("velodyne/000000.bin", "data_odometry_velodyne.zip"),
        ("labels/000000.label", "data_odometry_labels.zip"),
        ("labels", "data_odometry_labels.zip"),
        ("calib.txt", "data_odometry_calib.zip"),
    ],
)
def test_a_missing_file_is_named_with_its_download(small: Path, name: str, download: str) -> None:
    (small / "velodyne/000001.bin").write_bytes(bytes(16))
    path = small / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(MissingDataError) as caught:
        read_small(small)
    assert str(path) in str(caught.value) and "no such file" in str(caught.value) and download in str(caught.value)


def test_a_calibration_without_tr(tmp_path: Path) -> None:
    layout.write(tmp_path, sequences=("08",), scans=1, azimuths=4, image_scale=0.1, without_tr=("08",))
    path = tmp_path / "dataset/sequences/08/calib.txt"
    with pytest.raises(MissingDataError, match=rf"{path}: .*'Tr:'.*unpack data_odometry_calib\.zip .*last, over it"):
        open_dataset(NAME, tmp_path).read("08/000000")


def test_what_is_not_the_whole_release_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layout.write(tmp_path, sequences=("03", "08"), scans=1, azimuths=4, image_scale=0.1, without_images=("03",))
    sequences = tmp_path / "dataset/sequences"
    for name in ("22", "00 (copy)", ".cache", "04"):
        (sequences / name).mkdir()
    for name in ("000001 (1).bin", "1.bin", "._000001.bin", "000001.bin.part", f"{ODD_DIGITS}.bin"):
        (sequences / "08/velodyne" / name).touch()
    dataset = open_dataset(NAME, tmp_path)
    assert [*dataset.sample_ids("train"), *dataset.sample_ids("val")] == ["03/000000", "08/000000"]
    told = caplog.text
    assert "left out: 00 (copy), 22" in told and ".cache" not in told and ".part" not in told and "._0" not in told
    assert f"000001 (1).bin, 1.bin, {ODD_DIGITS}.bin" in told
    assert re.search(r"sequences without scans \(unpack data_odometry_velodyne\.zip.*: 04\n", told)
    assert re.search(r"sequences without images.*data_odometry_color\.zip.*: 03\n", told)
    assert "another number of scans than the release: 03 (1 of 801), 08 (1 of 4071)" in told


# --- damaged files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, extract_release) -> Extracted:
    """Sequence 03 without images, and of the seven scans of 08 all but the first damaged, each in another way."""
    root = tmp_path_factory.mktemp("damaged")
    layout.write(root, world=WORLD, sequences=("03", "08"), scans=7, azimuths=60, without_images=("03",))
    folder = root / "dataset/sequences/08"
    (folder / "image_2/000001.png").unlink()
    Image.new("RGB", (100, 30)).save(folder / "image_2/000002.png")
    for name in ("image_2/000003.png", "velodyne/000004.bin", "labels/000005.label"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2 - 2])
    (folder / "velodyne/000006.bin").unlink()
    return extract_release(root, root / "cache")


def test_damage_is_recorded_and_the_rest_goes_on(damaged: Extracted) -> None:
    failures = {(f.sample, f.view): f.error for f in damaged.totals.failures if f.sample.startswith("08")}
    assert damaged.totals.partitions == {"done": 2, "reused": 0, "failed": 0}
    for key, parts in {
        ("08/000001", "image_2"): ("image_2/000001.png: no such file", "data_odometry_color.zip"),
        ("08/000002", "image_2"): ("image_2/000002.png", "expected 490x148", "got 100x30"),
        ("08/000003", "image_2"): ("image_2/000003.png", "truncated"),
        ("08/000004", ""): ("velodyne/000004.bin", "truncated", "unpack data_odometry_velodyne.zip"),
        ("08/000005", ""): ("labels/000005.label", "labels for the", "unpack data_odometry_labels.zip"),
        ("08/000006", ""): ("velodyne/000006.bin: no such file", "unpack data_odometry_velodyne.zip"),
    }.items():
        error = failures.pop(key)
        assert [part for part in parts if part not in error] == [], error
    assert list(failures) == [("08/000001", "")] and "coverage 0" in failures["08/000001", ""]
    assert damaged.cache.samples_with() == [f"03/{scan:06d}" for scan in range(7)] + [
        f"08/{scan:06d}" for scan in range(4)
    ]
    assert [bool(damaged.sample(f"08/{scan:06d}").valid.any()) for scan in range(4)] == [True, False, False, False]


def test_a_sequence_without_images_is_kept_with_coverage_0(damaged: Extracted) -> None:
    failures = [f for f in damaged.totals.failures if f.sample == "03/000000"]
    assert [f.view for f in failures] == ["image_2", ""]
    assert "sequence 03 has no images" in failures[0].error and "data_odometry_color.zip" in failures[0].error
    assert "kept with coverage 0" in failures[1].error
    sample = damaged.sample("03/000000")
    assert len(sample.coord) > 1000 and (sample.segment >= 0).any() and not sample.valid.any()


def test_check_finds_it_before(small: Path, run: Run) -> None:
    call = ("check", "--dataset", NAME, "--root", small.parents[2], "--json")
    assert (found := run(*call)).code == 0 and found.json["splits"] == {"train": 0, "val": 1, "test": 0}
    assert found.json["problems"] == [] and found.json["coverage"] > 0.1
    shutil.copy(small / "labels/000000.label", small / "labels/000001.label")
    found = run(*call)
    (problem,) = found.json["problems"]
    assert found.code == 1 and problem["kind"] == "missing" and problem["sample"] == "08/000001"
    assert "velodyne/000001.bin" in problem["text"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (r"(?m)^P2: \S+", "P2: x", "P2: expected 12 numbers"),
        (r"(?m)^P2: \S+", "P2: inf", "P2: expected 12 finite numbers"),
        (r"(?m)^P2: \S+", "P2: 0", "singular intrinsics"),
        (r"(?m)^P2: \S+ \S+", "P2: 280 50", "without skew"),
        (r"(?m)^Tr: \S+", "Tr:", "Tr: expected 12 finite numbers, got 11"),
        (r"(?m)^Tr: \S+ \S+", "Tr: 0.1 -0.7", "expected a rotation"),
        (r"(?m)^Tr: (\S+) -?(\S+)", r"Tr: \1 \2", "expected a rotation"),  # mirrored
        (r"(?s)Tr:.*", "Tr: 1 0 0 0", "got 4"),
    ],
)
def test_a_calibration_that_cannot_be_used(small: Path, old: str, new: str, told: str) -> None:
    path = small / "calib.txt"
    text, count = re.subn(old, new, path.read_text(), count=1)
    assert count == 1
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_small(small)
    assert str(path) in str(caught.value) and told in str(caught.value)
    assert "unpack data_odometry_calib.zip" in str(caught.value)


@pytest.mark.parametrize("size", [(613, 185), (1216, 352)])  # of a resize, and of KITTI depth completion's crop
def test_images_of_another_size_than_their_calibration(tmp_path: Path, size: tuple[int, int]) -> None:
    layout.write(tmp_path, sequences=("08",), scans=1, azimuths=4, image_scale=1, rig="official")
    Image.new("RGB", size).save(tmp_path / "dataset/sequences/08/image_2/000000.png")
    told = rf"calib\.txt: P2 is of images of 1226x370 .*{size[0]}x{size[1]}; unpack data_odometry_color\.zip"
    with pytest.raises(DataError, match=told):
        open_dataset(NAME, tmp_path).read("08/000000")


def test_scaled_images_need_a_scaled_calibration(small: Path) -> None:
    Image.new("RGB", (60, 18)).save(small / "image_2/000000.png")
    with pytest.raises(DataError, match=r"calib\.txt: P2: principal point .* scale them with the image"):
        read_small(small)


def test_the_size_is_of_the_first_image_that_can_be_read(small: Path) -> None:
    shutil.copy(small / "image_2/000000.png", small / "image_2/000001.png")
    (small / "image_2/000000.png").write_bytes(b"")
    (view,) = read_small(small).views
    assert (view.camera.width, view.camera.height) == (123, 37)
    with pytest.raises(DataError, match=r"image_2/000000\.png: not a readable image"):
        view.load_image()


@pytest.mark.parametrize(
    ("times", "told"),
    [
        ("0\n0.1\n0.1\n0.3\n", r"times\.txt: 1 times are not later.*line 3 \(0\.1 s\)"),
        ("0\n0.2\n0.1\n0.05\n", r"times\.txt: 2 times are not later.*line 3 \(0\.1 s\).*paired by their numbers"),
        ("0\nnan\n", r"times\.txt: 1 times are not later"),
        ("", r"times\.txt: 0 times, but scans up to 000000"),
        ("\xff\xfe garbage", r"times\.txt: expected one number of seconds per line"),
        (None, None),
    ],
)
def test_times_decide_nothing(small: Path, caplog: pytest.LogCaptureFixture, times: str | None, told: str) -> None:
    path = small / "times.txt"
    expected = read_small(small).views[0].camera_from_world
    assert "times.txt" not in caplog.text
    path.unlink() if times is None else path.write_text(times, encoding="latin-1")
    caplog.clear()
    caplog.set_level(logging.WARNING)
    sample = read_small(small)
    assert np.array_equal(sample.views[0].camera_from_world, expected)
    assert "times.txt" not in caplog.text if told is None else re.search(told, caplog.text)


def test_points_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "000000.bin"
    for content, told in ((b"", "no points"), (bytes(100), "100 bytes"), (bytes(15), "truncated")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"000000\.bin: .*{told}.*unpack data_odometry_velodyne\.zip"):
            read_points(path, None)
    np.array([[0, 0, 0, 0], [1, np.nan, 2, 0]], dtype="<f4").tofile(path)
    with pytest.raises(DataError, match=r"000000\.bin: points: 1 of 2 coordinates are not finite, first at index 1"):
        read_points(path, None)
    path.write_bytes(bytes(32))
    assert read_points(path, None).segment is None
    monkeypatch.setattr(semantickitti, "MAX_POINTS", 1)
    with pytest.raises(DataError, match=r"000000\.bin: 2 points, expected a scan of at most 1"):
        read_points(path, None)


@pytest.mark.parametrize("size", [0, 4, 396, 399, 404])
def test_a_label_file_of_another_length(tmp_path: Path, size: int) -> None:
    path = tmp_path / "000000.label"
    path.write_bytes(bytes(size))
    told = rf"000000\.label: {size / 4:g} labels for the 100 points .*unpack data_odometry_labels\.zip"
    with pytest.raises(DataError, match=told):
        read_labels(path, 100)


def test_labels_that_are_train_ids(tmp_path: Path) -> None:
    path = tmp_path / "000000.label"
    np.tile(np.array([9, 15, 17, 13, 1], dtype="<u4"), 40).tofile(path)
    with pytest.raises(DataError, match=r"40% of the points .*\(9, 17\).*remap_semantic_labels\.py"):
        read_labels(path, 200)
    stray = np.full(200, 40, dtype="<u4")
    stray[0] = 77 | 5 << 16
    stray.tofile(path)
    segment, instance = read_labels(path, 200)
    assert segment[0] == IGNORE_INDEX and instance[0] == -1 and (segment[1:] == 8).all()
