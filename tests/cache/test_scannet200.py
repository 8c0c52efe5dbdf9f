"""ScanNet200 in its official layout: what the independent writer wrote is read, and faults in the reader are seen."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset_runs import Extracted, run_dataset
from ditr_cache.check import check
from ditr_cache.datasets import documents, meshes, open_dataset
from ditr_cache.datasets.nyu40 import SCANNET20
from ditr_cache.datasets.scannet import annotation
from ditr_cache.datasets.scannet import dataset as scannet
from ditr_cache.datasets.scannet.annotation import LABEL_TABLE, read_annotation, read_label_table
from ditr_cache.datasets.scannet.scannet200_labels import SCANNET200
from ditr_cache.errors import DataError, MissingDataError, UnknownNameError
from ditr_cache.sample import Sample
from ditr_cache.schema import LinkSettings
from ditr_train.benchmark_labels import SCANNET200 as SUBMITTED
from layouts import scannet200 as layout
from world import Truth, World

WORLD = World()
TRAIN, VAL, TEST = (scan.name for scan in layout.SCANS)
ALL_DEPTHS = {"depth_min": 0.1, "depth_max": 20.0}
"""The recipe links 1 to 4 m only; the judge asks for everything that a camera sees."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Truth]]:
    """The release with exported frames, and what is true of it. Not to be changed."""
    root = tmp_path_factory.mktemp("scannet200")
    return root, layout.write(root, world=WORLD)


@pytest.fixture
def root(written: tuple[Path, list[Truth]], tmp_path: Path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(written[0], tmp_path / "release")


@pytest.fixture
def run(position_checkpoint: Path, tmp_path: Path) -> Callable[..., Extracted]:
    """Extraction of all that a camera sees."""
    return partial(run_dataset, "scannet200", out=tmp_path / "cache", checkpoint=position_checkpoint, links=ALL_DEPTHS)


def read(root: Path, sample_id: str = TRAIN) -> Sample:
    return open_dataset("scannet200", root).read(sample_id)


def file(root: Path, suffix: str, scan: str = TRAIN) -> Path:
    return root / "scans" / scan / f"{scan}{suffix}"


def change(path: Path, alter: Callable[[Any], object]) -> None:
    document = json.loads(path.read_text())
    alter(document)
    path.write_text(json.dumps(document))


def faults(done: Extracted, truths: Sequence[Truth]) -> set[str]:
    """Everything that is not as it was written."""
    found = {"failures"} if done.totals.failures else set()
    for truth in truths:
        if truth.sample_id not in done.cache.samples:
            found.add("lost")
            continue
        sample, report = done.sample(truth.sample_id), done.report(truth, WORLD)
        checks = {
            "features": replace(report, missing=0, ghosts=0, wrong_labels=0, moved=0).right(),
            "missing": not report.missing,
            "ghosts": not report.ghosts,
            "labels": not report.wrong_labels and (sample.segment is None) == (truth.label is None),
            "coord": report.moved < 1e-6,
            "split": done.cache.sample_info(truth.sample_id).split == truth.split,
        }
        for name, true in truth.channels.items():
            stored = getattr(sample, name)
            tolerance = 1e-3 if name == "normal" else 0  # stored as float16
            checks[name] = stored is not None and np.abs(stored - true[sample.source_index]).max() <= tolerance
        found |= {name for name, right in checks.items() if not right}
    return found


# --- what was written is read ---------------------------------------------------------------------------------------


def test_exported_frames(written: tuple[Path, list[Truth]], run: Callable[..., Extracted]) -> None:
    root, truths = written
    done = run(root)
    assert faults(done, truths) == set()
    assert done.totals.images == sum(len(truth.eyes) for truth in truths)  # not those whose pose is lost
    assert done.cache.metadata.class_names == tuple(c.name for c in SCANNET200.values())
    assert done.cache.metadata.class_groups == tuple(c.group for c in SCANNET200.values())
    for truth in truths:
        assert (truth.label is None) == (truth.split == "test")
        views = done.cache.sample_info(truth.sample_id).views
        assert [view.id for view in views] == list(truth.eyes) and all(view.links for view in views)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"frames": "sens"}, set()),
        ({"frames": "sens", "table": "pointcept", "shrink": 2}, set()),
        ({"holes": True}, {"missing"}),  # a point without a depth is not linked
    ],
)
def test_every_way_it_is_released(
    options: dict[str, Any], expected: set[str], run: Callable[..., Extracted], tmp_path: Path
) -> None:
    truths = layout.write(tmp_path / "release", world=WORLD, **options)
    assert faults(run(tmp_path / "release"), truths) == expected


def test_scans_without_images_are_points_alone_and_say_so(run: Callable[..., Extracted], tmp_path: Path) -> None:
    truths = layout.write(tmp_path / "release", world=WORLD, frames="none")
    done = run(tmp_path / "release")
    assert done.totals.partitions["done"] == 3 and done.totals.coverage == 0 and done.totals.points == 33051
    assert faults(done, truths) == {"failures", "features"}  # the judge had no feature to judge
    for scan in (TRAIN, VAL, TEST):
        said = " ".join(failure.error for failure in done.totals.failures if failure.sample == scan)
        assert f"{scan}.sens: no such file" in said and "--type .sens" in said and "--retry-incomplete" in said


def test_the_200_classes_are_those_of_the_benchmark(written: tuple[Path, list[Truth]]) -> None:
    assert {c.name: i for i, c in SCANNET200.items()} == SUBMITTED and list(SCANNET200) == list(SUBMITTED.values())
    classes = open_dataset("scannet200", written[0]).classes
    assert classes == tuple(SCANNET200.values()) and len(classes) == 200
    assert [sum(c.group == g for c in classes) for g in ("head", "common", "tail")] == [66, 68, 66]
    assert len({c.color for c in classes}) == 200 and classes[1].color == (188, 189, 34)
    assert {SCANNET200[i].name for i in layout.CLASSES} == set(layout.CLASSES.values())
    assert SCANNET200[1191] == classes[199] and (classes[199].name, classes[199].group) == ("mattress", "common")


def test_defaults_are_those_of_the_recipe(written: tuple[Path, list[Truth]]) -> None:
    dataset = open_dataset("scannet200", written[0])
    assert dataset.defaults.grid == (30, 40) and dataset.defaults.layout == "fused"
    assert dataset.defaults.links == LinkSettings(occlusion_tolerance=0.2, depth_min=1.0, depth_max=4.0)
    assert {split: dataset.sample_ids(split) for split in dataset.splits} == {
        "train": [TRAIN], "val": [VAL], "test": [TEST],
    }  # fmt: skip


def test_check_finds_no_fault(written: tuple[Path, list[Truth]], tmp_path: Path) -> None:
    report = check(open_dataset("scannet200", written[0]), deep=True, overlay=tmp_path / "overlay.png")
    assert report.problems == [] and report.loaded_images == 10 and (tmp_path / "overlay.png").exists()
    assert 0.75 < report.labelled < 0.9  # of the train and val scans, which have labels


def test_workers_can_be_sent_a_sample(written: tuple[Path, list[Truth]]) -> None:
    sample = pickle.loads(pickle.dumps(read(written[0], VAL)))
    assert len(sample.load_points().segment) == 11017 and sample.views[0].load_image().shape == (242, 324, 3)


def test_every_tenth_frame_of_a_video_that_was_exported_whole(root: Path) -> None:
    folder = root / "scans" / TRAIN
    for kind in ("color", "depth", "pose"):
        first, *others = sorted((folder / kind).iterdir(), key=lambda path: int(path.stem))
        for other in others:
            other.unlink()
        for i in range(1, 120):
            (folder / kind / f"{i}{first.suffix}").symlink_to(first)
    assert read(root).every_nth_frame == 10
    (folder / "color" / "7.jpg").unlink()  # gaps: somebody chose
    assert read(root).every_nth_frame == 1


# --- labels ---------------------------------------------------------------------------------------------------------


def annotate(tmp_path: Path, segments: list[int], groups: list[tuple[int, str, list[int]]]) -> tuple[Path, Path]:
    aggregation, segs = tmp_path / "s.aggregation.json", tmp_path / "s.segs.json"
    found = [{"id": i, "objectId": i, "label": label, "segments": members} for i, label, members in groups]
    aggregation.write_text(json.dumps({"segGroups": found}))
    segs.write_text(json.dumps({"segIndices": segments}))
    return aggregation, segs


def test_annotation_equals_a_loop(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = {"wall": 1, "doors": 5, "door": 5, "folded table": 1193, "stick": 1163, "none": 0}
    index = {1: 0, 5: 4, 1163: list(SCANNET200).index(1163)}
    for _ in range(20):
        named = rng.choice(10_000, 12, replace=False)
        segments = rng.choice(named, 60).tolist()
        labels = rng.choice([*ids, "unheard of"], 8).tolist()
        groups = [(n, label, rng.choice(named, 4).tolist()) for n, label in enumerate(["wall", *labels])]
        segment, instance = [-1] * 60, [-1] * 60
        for number, label, members in groups:
            for vertex, of in enumerate(segments):
                if of in members:
                    segment[vertex], instance[vertex] = index.get(ids.get(label, 0), -1), number
        found = read_annotation(*annotate(tmp_path, segments, groups), tmp_path / "t", ids, SCANNET200, 60)
        assert found[0].tolist() == segment and found[1].tolist() == instance
        assert (found[0].dtype, found[1].dtype) == (np.int16, np.int32)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_label_table_with_any_line_ends(tmp_path: Path, end: str, last: bool) -> None:
    path = tmp_path / "t.tsv"
    rows = ["count\traw_category\tcategory\tid", "3\tdoor\tdoor\t5", "1\tdoors \tdoor\t6", "1\tdoor\tgate\t7"]
    path.write_bytes(("\ufeff" * last + end.join(rows) + end * last).encode())
    assert read_label_table(path, "id") == {"door": 5, "doors ": 6}  # names as they stand; the first of two
    assert read_label_table(path, "count") == {"door": 3, "doors ": 1}


@pytest.mark.parametrize("folder", ["tasks", "meta_data", "scans"])
def test_label_table_beside_the_scans(root: Path, folder: str) -> None:
    (root / folder).mkdir(exist_ok=True)
    (root / LABEL_TABLE).rename(root / folder / LABEL_TABLE)
    assert (read(root).load_points().segment >= 0).mean() > 0.5


def test_objects_in_no_segment_of_the_mesh_and_no_objects(tmp_path: Path) -> None:
    found = read_annotation(*annotate(tmp_path, [4, 4], []), tmp_path, {}, SCANNET200, 2)
    assert found[0].tolist() == found[1].tolist() == [-1, -1]
    objects = annotate(tmp_path, [4, 9], [(3, "wall", [9, 77]), (4, "wall", [])])
    found = read_annotation(*objects, tmp_path, {"wall": 1}, SCANNET200, 2)
    assert found[0].tolist() == [-1, 0] and found[1].tolist() == [-1, 3]


def test_scannet_reads_its_classes_and_instances_of_the_same_objects(
    written: tuple[Path, list[Truth]], root: Path
) -> None:
    for name in (TRAIN, VAL):
        file(root, ".aggregation.json", name).unlink()
    by_object, by_vertex = open_dataset("scannet", written[0]), open_dataset("scannet", root)
    assert by_object.classes == tuple(SCANNET20.values())
    columns, *rows = (line.split("|") for line in layout.TABLE.split("\n"))
    nyu40 = {layout.CLASSES.get(int(row[0])): int(row[columns.index("nyu40id")]) for row in rows}
    index = {name: list(SCANNET20).index(n) if n in SCANNET20 else -1 for name, n in nyu40.items()}
    for truth in written[1][:2]:
        points = by_object.read(truth.sample_id).load_points()
        np.testing.assert_array_equal(points.instance, truth.channels["instance"])
        known = truth.label != ""  # a folded table is a table, and none of the 200
        assert points.segment[known].tolist() == [index[name] for name in truth.label[known]]
        assert (points.segment[~known] >= 0).any()
        other = by_vertex.read(truth.sample_id).load_points()
        foreign = (truth.label == "stand") & (truth.sample_id == "scene0270_00")  # 50 in its .labels.ply
        assert other.instance is None and foreign.any() == (truth.sample_id == "scene0270_00")
        np.testing.assert_array_equal(points.segment[~foreign], other.segment[~foreign])
        assert (points.segment[foreign] == 19).all() and (other.segment[foreign] == -1).all()
    assert by_object.read(TEST).load_points().segment is None


# --- faults planted in the reader are seen --------------------------------------------------------------------------

Plant = Callable[[pytest.MonkeyPatch], None]


def plant(module: Any, name: str, wrap: Callable[..., Any]) -> Plant:
    """Replaces a function by `wrap(original, *its arguments)`."""
    original = getattr(module, name)
    return lambda patch: patch.setattr(module, name, lambda *a, **k: wrap(original, *a, **k))


def aligned(read_points: Callable[..., Any], path: Path, labels: Any) -> Any:
    points = read_points(path, labels)
    info = path.with_name(f"{path.parent.name}.txt").read_text()
    if "axisAlignment = " not in info:
        return points
    matrix = np.array(info.split("axisAlignment = ")[1].split("\n")[0].split(), dtype=float).reshape(4, 4)
    return replace(points, coord=(points.coord @ matrix[:3, :3].T + matrix[:3, 3]).astype(np.float32))


def registered(read_pose: Callable[..., Any], path: Path) -> Any:
    line = next(s for s in layout.SCANS if s.name == path.parents[1].name).extrinsics or " ".join("1000010000100001")
    return np.array(line.split(), dtype=float).reshape(4, 4) @ read_pose(path)


def by_category(read_table: Callable[..., Any], path: Path, column: str) -> dict[str, int]:
    header, *rows = (line.split("\t") for line in path.read_text().splitlines())
    return {r[header.index("raw_category")]: SUBMITTED.get(r[header.index("category")].strip(), 0) for r in rows}


def by_nyu40(read_table: Callable[..., Any], path: Path, column: str) -> dict[str, int]:
    header, *rows = (line.split("\t") for line in path.read_text().splitlines())
    return {r[header.index("raw_category")]: int(r[header.index("nyu40id")]) for r in rows}


PLANTED: dict[str, tuple[Plant, set[str]]] = {
    "camera-to-world as world-to-camera": (
        plant(scannet, "read_tracked_pose", lambda f, path: np.linalg.inv(f(path))), {"missing"},
    ),
    "pose of the next frame": (
        plant(scannet, "read_tracked_pose", lambda f, path: f(path.with_name(f"{(int(path.stem) + 10) % 30}.txt"))),
        {"features"},
    ),
    "colorToDepthExtrinsics applied": (plant(scannet, "read_tracked_pose", registered), {"features"}),
    "depth in millimetres": (
        plant(scannet, "read_depth", lambda f, *a, **k: 1000 * f(*a, **k)), {"missing"},
    ),
    "depth of the next frame": (
        plant(scannet, "read_depth", lambda f, path, **k: f(path.with_name(f"{(int(path.stem) + 10) % 30}.png"), **k)),
        {"missing"},
    ),
    "axisAlignment applied": (plant(scannet, "read_mesh_points", aligned), {"coord"}),
    "x and y of the principal point swapped": (
        plant(scannet, "exported_camera", lambda f, *a: replace(c := f(*a), cx=c.cy, cy=c.cx)), {"features"},
    ),
    "intrinsics of depth for colour": (
        plant(scannet, "exported_camera", lambda f, scan, info, kind, size: replace(
            f(scan, info, "depth", (160, 120)), width=size[0], height=size[1])), {"features"},
    ),
    "images in BGR": (plant(scannet, "read_color", lambda f, *a, **k: f(*a, **k)[..., ::-1]), {"features"}),
    "points in BGR": (
        plant(scannet, "read_mesh_points", lambda f, *a: replace(p := f(*a), color=p.color[:, ::-1])), {"color"},
    ),
    "normals turned inside out": (plant(meshes, "vertex_normals", lambda f, c, i: f(c, i[:, ::-1])), {"normal"}),
    "NYU40 ids as ids of classes": (plant(scannet, "read_label_table", by_nyu40), {"labels"}),
    "classes by the name of the category": (plant(scannet, "read_label_table", by_category), {"labels"}),
    "labels in the order of the groups": (
        plant(scannet, "read_annotation", lambda f, *a: f(*a[:4], dict(sorted(a[4].items(), key=lambda c: c[1].group)),
            a[5])), {"labels"},
    ),
    "the first of an object's groups": (
        plant(annotation, "read_objects", lambda f, *a: reversed(list(f(*a)))), {"instance"},
    ),
    "segments as numbers of vertices": (
        plant(annotation, "read_segments", lambda f, path, vertices, *_: np.arange(vertices)),
        {"labels", "instance"},
    ),
    "objects of the high-resolution mesh": (
        lambda patch: patch.setattr(scannet, "AGGREGATION", "_vh_clean.aggregation.json"), {"labels"},
    ),
    "segments of the high-resolution mesh": (
        lambda patch: patch.setattr(scannet, "SEGMENTS", "_vh_clean.segs.json"), {"lost", "failures"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_seen(
    fault: str, written: tuple[Path, list[Truth]], run: Callable[..., Extracted], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the fault the same scans have none: `test_exported_frames`."""
    plant_it, expected = PLANTED[fault]
    plant_it(monkeypatch)
    split = "train" if fault.startswith("classes") else "val"
    truths = [truth for truth in written[1] if truth.split == split]
    assert expected <= faults(run(written[0], splits=(split,)), truths)


def test_planted_pose_direction_in_a_sens_file(
    run: Callable[..., Extracted], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    truths = layout.write(tmp_path / "release", world=WORLD, frames="sens")
    monkeypatch.setattr(scannet, "tracked_pose", lambda pose: np.asarray(pose, dtype=np.float64))
    assert "missing" in faults(run(tmp_path / "release"), truths)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["_vh_clean_2.ply", ".aggregation.json", "_vh_clean_2.0.010000.segs.json"])
def test_half_a_scan(root: Path, suffix: str) -> None:
    file(root, suffix).unlink()
    with pytest.raises(MissingDataError) as error:
        read(root)
    assert (
        str(error.value) == f"{file(root, suffix)}: no such file; download it with ScanNet's script (--type {suffix})"
    )
    assert read(root, VAL).views  # others are not touched


def test_no_label_table(root: Path) -> None:
    (root / LABEL_TABLE).unlink()
    with pytest.raises(MissingDataError, match=rf"no {LABEL_TABLE} in '{root}', .* \(--label_map\)"):
        open_dataset("scannet200", root)
    shutil.rmtree(root / "scans")  # test scans have no labels and need none
    assert read(root, TEST).load_points().segment is None


def test_half_the_folders_of_frames(root: Path) -> None:
    shutil.rmtree(root / "scans" / TRAIN / "color")
    ((_, error),) = read(root).broken_views
    assert f"{TRAIN}.sens: no such file" in error and "--type .sens" in error
    shutil.rmtree(root / "scans" / VAL / "intrinsic")
    info = file(root, ".txt", VAL)
    assert read(root, VAL).views  # the numbers are in <id>.txt, too
    info.unlink()
    with pytest.raises(MissingDataError, match=r"intrinsic_color\.txt: no such file, .*--export_intrinsics"):
        read(root, VAL)


@pytest.mark.parametrize("damage", ["half", "empty", "text", "list"])
@pytest.mark.parametrize("suffix", [annotation.AGGREGATION, annotation.SEGMENTS])
def test_damaged_annotation(root: Path, suffix: str, damage: str) -> None:
    path = file(root, suffix)
    data = path.read_bytes()
    path.write_bytes({"half": data[: len(data) // 2], "empty": b"", "text": b"\xff\xfe<html>", "list": b"[]"}[damage])
    with pytest.raises(DataError) as error:
        read(root).load_points()
    text = str(error.value)
    assert text.startswith(str(path)) and "download it again" in text and f"--type {suffix}" in text
    assert ("expected a JSON object" if damage == "list" else "not JSON") in text


@pytest.mark.parametrize(
    ("change_group", "shown"),
    [
        (lambda g: g.pop("label"), "'segments'"),
        (lambda g: g.update(segments=[1.5]), "[1.5]"),
        (lambda g: g.update(segments=[[1], [2, 3]]), "[[1], [2, 3]]"),
        (lambda g: g.update(segments=["1"]), "['1']"),
        (lambda g: g.update(segments=[2**80]), str(2**80)),
        (lambda g: g.update(id=-3), "-3"),
        (lambda g: g.update(id=2**40), str(2**40)),
        (lambda g: g.update(id=True), "True"),
    ],
)
def test_objects_that_are_none(root: Path, change_group: Callable[[Any], object], shown: str) -> None:
    path = file(root, ".aggregation.json")
    change(path, lambda d: change_group(d["segGroups"][2]) or d["segGroups"][2].update(objectId=0))
    with pytest.raises(DataError) as error:
        read(root).load_points()
    assert f"{path}: object 2 of 'segGroups': expected a whole number 'id'" in str(error.value)
    assert shown in str(error.value)


def test_groups_and_segments_that_are_no_lists(root: Path) -> None:
    change(file(root, ".aggregation.json"), lambda d: d.update(segGroups={"a": 1}))
    with pytest.raises(DataError, match=r"\.aggregation\.json: expected a list of objects 'segGroups'"):
        read(root).load_points()
    change(file(root, annotation.SEGMENTS), lambda d: d.pop("segIndices"))
    with pytest.raises(DataError, match=r"segs\.json: expected a list of whole numbers 'segIndices'"):
        read(root).load_points()


def test_segments_of_another_length(root: Path, run: Callable[..., Extracted]) -> None:
    path = file(root, annotation.SEGMENTS)
    change(path, lambda d: d.update(segIndices=d["segIndices"][:-1]))
    done = run(root)
    assert done.totals.partitions == {"done": 2, "reused": 0, "failed": 1}
    (failure,) = done.totals.failures
    assert failure.sample == TRAIN and f"{path}: segments of 11016 vertices, expected the 11017" in failure.error
    assert "different meshes" in failure.error and "--type _vh_clean_2.ply" in failure.error


def test_files_that_do_not_belong_together(root: Path) -> None:
    change(file(root, ".aggregation.json"), lambda d: [g.update(segments=[10**9]) for g in d["segGroups"]])
    with pytest.raises(DataError, match=r"none of its 19 objects has a segment of .* different meshes"):
        read(root).load_points()
    (root / LABEL_TABLE).write_text("id\traw_category\n4\tMöbel\n")
    with pytest.raises(DataError, match=rf"objects is of a category of .*{LABEL_TABLE}, the first is .*--label_map"):
        read(root, VAL).load_points()


NO_TABLES = ("", "<html>\n", "id\tcategory\n1\twall\n", "id\traw_category\nx\twall\n", "raw_category\tid\nwall\n")


@pytest.mark.parametrize("text", NO_TABLES)
def test_a_table_that_is_none(root: Path, text: str) -> None:
    (root / LABEL_TABLE).write_text(text)
    with pytest.raises(DataError, match=rf"{LABEL_TABLE}: not ScanNet's label table, .*\(--label_map\)"):
        open_dataset("scannet200", root)


def test_files_are_not_read_without_bound(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset("scannet200", root)
    monkeypatch.setattr(documents, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match=r"segs\.json: larger than 1000 bytes, .*--type"):
        dataset.read(TRAIN).load_points()


def test_an_empty_mesh_loses_its_scan_only(root: Path, run: Callable[..., Extracted]) -> None:
    path = file(root, "_vh_clean_2.ply")
    names = "".join(f"property float {n}\n" for n in "xyz")
    path.write_text(f"ply\nformat ascii 1.0\nelement vertex 0\n{names}end_header\n")
    change(file(root, annotation.SEGMENTS), lambda d: d.update(segIndices=[]))
    done = run(root, splits=("train", "test"))
    assert done.totals.partitions["failed"] == 1 and "has no points" in done.totals.failures[0].error
    path.write_bytes(b"ply\nformat binary_little_endian 1.0\nelement vertex 9\n")
    with pytest.raises(DataError, match=r"_vh_clean_2\.ply: .*truncated"):
        read(root).load_points()


def test_bad_frames_cost_themselves_only(root: Path, run: Callable[..., Extracted]) -> None:
    first, second = root / "scans" / TRAIN, root / "scans" / VAL
    (first / "depth" / "10.png").unlink()
    np.savetxt(first / "pose" / "20.txt", np.diag([1, 1, 1.1, 1]))
    (second / "color" / "0.jpg").write_bytes((second / "color" / "0.jpg").read_bytes()[:2000])
    Image.new("RGB", (64, 48)).save(second / "color" / "10.jpg")
    done = run(root, splits=("train", "val"))
    assert done.totals.images == 3  # of seven
    said = {(failure.sample, failure.view): failure.error for failure in done.totals.failures}
    assert set(said) == {(TRAIN, "10"), (TRAIN, "20"), (VAL, "0"), (VAL, "10")}
    assert "no depth file for 10.jpg" in said[TRAIN, "10"]
    assert "20.txt: pose: expected a rotation and a translation" in said[TRAIN, "20"]
    assert "0.jpg: " in said[VAL, "0"] and "truncated" in said[VAL, "0"]
    assert "10.jpg: expected 324x242 pixels" in said[VAL, "10"] and "got 64x48" in said[VAL, "10"]


def test_scans_with_names_of_their_own(root: Path, run: Callable[..., Extracted]) -> None:
    name = "Café & Co #1 (2)"
    (root / "scannetv2_train.txt").write_text(f"{name}\n../../etc\n")
    folder = (root / "scans" / TRAIN).rename(root / "scans" / name)
    for path in folder.glob(f"{TRAIN}*"):
        path.rename(folder / path.name.replace(TRAIN, name))
    dataset = open_dataset("scannet200", root)
    assert dataset.splits == ("train",) and dataset.sample_ids("train") == [name]
    done = run(root)
    assert done.totals.failures == [] and len(done.sample(name).coord) == 11017


def test_unlisted_scans_and_unknown_names(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "scans" / "scene9999_00").mkdir()
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset("scannet200", root)
    assert "scene9999_00" in caplog.text and dataset.sample_ids("train") == [TRAIN]
    with pytest.raises(UnknownNameError, match="did you mean"):
        dataset.read("scene0270_01")
