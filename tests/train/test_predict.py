"""`predict`: files and cached samples to labels, tiled or whole, in the input's own order."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import laspy
import numpy as np
import pytest
import torch
from plyfile import PlyData, PlyElement
from pypcd4 import Encoding
from pypcd4 import PointCloud as Pypcd
from rich.console import Console

from ditr_cache.errors import (
    CacheError,
    DataError,
    MismatchError,
    MissingDataError,
    StorageError,
    UnknownNameError,
    UnwritableError,
    UsageError,
)
from ditr_cache.schema import CacheMetadata, LinkSettings, SampleInfo
from ditr_cache.store import CacheWriter, open_cache
from ditr_train import inference
from ditr_train.checkpoint import save_checkpoint
from ditr_train.cli import main
from ditr_train.evaluate import predict_sample
from ditr_train.inference import Normals
from ditr_train.models.build import build_segmentor
from ditr_train.pointcloud import spill as spill_module
from ditr_train.pointcloud.progress import PredictProgress
from ditr_train.predict import predict_inputs
from ditr_train.recipe import parse_recipe
from ditr_train.run_folder import RunFolder, RunInfo
from ditr_train.trained import load_run
from ditr_train.trainer import train

CLASSES = ("floor", "wall", "picture")
COLORS = ((0, 90, 200), (40, 90, 200), (80, 90, 200))
WIDTH = {"coord": 3, "color": 3, "normal": 3, "strength": 1, "height": 1}


def recipe(feat: tuple[str, ...], **values: Any) -> Any:
    backbone = {"stem_channels": 8, "stem_kernel_size": 3, "channels": [8, 8], "layers": [1, 1], "norm_momentum": 0.1}
    return parse_recipe(
        {
            "data": {"grid_size": 0.1, "feat": list(feat), "batch_size": 2, "workers": 0},
            "model": {"backbone": backbone, "injection": None},
            "optimizer": {"lr": 0.02},
            "training": {"epochs": 2},
            **values,
        }
    )


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run folder of a network with random weights, large enough that its classes depend on the points."""

    def make(*feat: str, **values: Any) -> Path:
        folder = tmp_path_factory.mktemp("runs") / "run"
        of = recipe(feat, **values)
        channels = sum(WIDTH[name] for name in feat)
        torch.manual_seed(0)
        model = build_segmentor(of.model, in_channels=channels, num_classes=3)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=1.0 if name.startswith("head") else 0.2)
        info = RunInfo(
            caches=(), class_names=CLASSES, class_colors=COLORS, in_channels=channels, vfm=None, init=None,
            versions={}, device="cpu", command="", git_commit=None,
        )  # fmt: skip
        RunFolder(folder).create(of, info)
        save_checkpoint(RunFolder(folder).best, {"model": model.state_dict(), "step": 7})
        return folder

    return make


@pytest.fixture(scope="module")
def trained(tiny_cache: Path, make_run: Callable[..., Path]) -> Path:
    """A plain run on the coordinates, colours and normals of the tiny cache."""
    return make_run("coord", "color", "normal", cache=str(tiny_cache))


@pytest.fixture(scope="module")
def colored(make_run: Callable[..., Path]) -> Path:
    """A run whose network reads colours, so that nothing but the neighbourhood of a point decides."""
    return make_run("color")


def scene(points: int = 4000, side: float = 12.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates and colours of a bumpy floor."""
    rng = np.random.default_rng(seed)
    xy = rng.random((points, 2)) * side
    coord = np.column_stack([xy, np.sin(xy[:, 0]) + rng.random(points) * 0.2]).astype(np.float32)
    return coord, rng.integers(0, 256, (points, 3), dtype=np.uint8)


def write_ply(
    path: Path, coord: np.ndarray, color: np.ndarray | None = None, *, text: bool = False, **extra: Any
) -> Path:
    columns = {axis: coord[:, i] for i, axis in enumerate("xyz")}
    if color is not None:
        columns |= {name: color[:, i] for i, name in enumerate(("red", "green", "blue"))}
    columns |= extra
    table = np.empty(len(coord), [(name, values.dtype) for name, values in columns.items()])
    for name, values in columns.items():
        table[name] = values
    PlyData([PlyElement.describe(table, "vertex")], text=text).write(str(path))
    return path


def labels(run: Path, path: Path | str, out: Path, **options: Any) -> np.ndarray:
    done = predict_inputs(run, [path], out, device="cpu", quiet=True, **options)["inputs"][0]
    got = np.load(done["files"][0])
    assert got.dtype == np.int16 and len(got) == done["points"]
    return got


# --- the same as evaluation -----------------------------------------------------------------------------------------


def test_a_file_gets_what_evaluation_gives_its_sample(trained: Path, tiny_cache: Path, tmp_path: Path) -> None:
    sample = open_cache(tiny_cache).read("room04")
    expected = predict_sample(load_run(trained, device="cpu"), "room04")[sample.source_index]
    assert sample.color is not None and sample.normal is not None and len(set(expected.tolist())) > 1
    normals = {f"n{axis}": sample.normal[:, i] for i, axis in enumerate("xyz")}
    path = write_ply(tmp_path / "room.ply", sample.coord, sample.color, **normals)
    done = predict_inputs(trained, [path], tmp_path / "out", softmax=True, device="cpu", quiet=True)
    (summary,) = done["inputs"]
    got = np.load(tmp_path / "out" / "room.labels.npy")
    np.testing.assert_array_equal(got, expected)
    assert (summary["points"], summary["unlabelled"], summary["tiles"]) == (len(got), 0, 1)
    assert summary["share"] == {c: (got == i).mean() for i, c in enumerate(CLASSES)}

    softmax = np.load(tmp_path / "out" / "room.softmax.npy")
    assert softmax.shape == (len(got), 3) and softmax.dtype == np.float16
    np.testing.assert_allclose(softmax.sum(axis=1, dtype=np.float32), 1, atol=2e-3)
    assert (softmax.argmax(axis=1) == got).mean() > 0.99  # float16 may hide which of two is larger

    ply = PlyData.read(tmp_path / "out" / "room.ply")
    vertex = ply["vertex"]
    assert ply.comments == ["label -1: no prediction", "label 0: floor", "label 1: wall", "label 2: picture"]
    assert [(p.name, p.val_dtype) for p in vertex.properties] == [
        ("x", "f4"), ("y", "f4"), ("z", "f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1"), ("label", "i4")
    ]  # fmt: skip
    np.testing.assert_array_equal(np.stack([vertex[a] for a in "xyz"], axis=1), sample.coord)
    np.testing.assert_array_equal(vertex["label"], got)
    np.testing.assert_array_equal(
        np.stack([vertex[c] for c in ("red", "green", "blue")], axis=1), np.array(COLORS)[got]
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["room.labels.npy", "room.ply", "room.softmax.npy"]


def test_a_cached_sample_in_the_datasets_order(trained: Path, tiny_cache: Path, tmp_path: Path) -> None:
    got = labels(trained, "room05", tmp_path, softmax=True)
    np.testing.assert_array_equal(got, predict_sample(load_run(trained, device="cpu"), "room05"))
    sample = open_cache(tiny_cache).read("room05")
    vertex = PlyData.read(tmp_path / "room05.ply")["vertex"]
    in_cache_order = np.stack([vertex[a] for a in "xyz"], axis=1)[sample.source_index]
    np.testing.assert_array_equal(in_cache_order, sample.coord)
    assert (np.load(tmp_path / "room05.softmax.npy").argmax(axis=1) == got).mean() > 0.99


def test_a_plain_network_needs_no_cache(trained: Path, tiny_cache: Path, tmp_path: Path) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    shutil.copytree(trained, run)
    shutil.copytree(tiny_cache, cache)
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace(str(tiny_cache), str(cache)))
    assert len(labels(run, "room05", tmp_path / "out")) > 0
    shutil.rmtree(cache)
    coord, color = scene(300)
    normals = {n: np.full(300, n == "nz", np.float32) for n in ("nx", "ny", "nz")}
    path = write_ply(tmp_path / "a.ply", coord, color, **normals)
    assert len(labels(run, path, tmp_path / "out")) == 300
    with pytest.raises(MissingDataError, match=r"'room05' is no file.*is not a cache.*--cache"):
        labels(run, "room05", tmp_path / "out")
    assert len(labels(run, "room05", tmp_path / "out", cache=str(tiny_cache))) > 0


# --- tiles ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(colored: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A file, and its labels from one tile."""
    folder = tmp_path_factory.mktemp("whole")
    path = write_ply(folder / "scene.ply", *scene())
    got = labels(colored, path, folder / "out")
    assert np.bincount(got, minlength=3).min() > 100
    return path, got


@pytest.mark.parametrize("tile", [2.0, 3.7])
def test_borders_of_tiles_leave_no_seam(
    colored: Path, whole: tuple[Path, np.ndarray], tmp_path: Path, tile: float
) -> None:
    path, expected = whole
    agreement = {}
    for overlap in (0.0, None, 2.0):
        got = labels(colored, path, tmp_path, tile=tile, overlap=overlap)
        agreement[overlap] = (got == expected).mean()
    # 20 voxels are more than this network sees; the default covers four of its coarsest sites.
    assert agreement[2.0] > 0.9995 and agreement[None] > 0.999 and agreement[0.0] < 0.995


def test_a_tile_read_in_many_chunks(
    colored: Path, whole: tuple[Path, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = whole
    monkeypatch.setattr(spill_module, "CHUNK", 100)
    np.testing.assert_array_equal(labels(colored, path, tmp_path), expected)


def test_labels_follow_their_points(colored: Path, tmp_path: Path) -> None:
    # One point per voxel: which point stands for a voxel cannot depend on the order.
    grid = np.stack(np.meshgrid(np.arange(40), np.arange(30)), axis=-1).reshape(-1, 2)
    coord = np.column_stack([grid * 0.1 + 0.05, np.zeros(len(grid))]).astype(np.float32)
    color = scene(len(coord))[1]
    expected = labels(colored, write_ply(tmp_path / "a.ply", coord, color), tmp_path / "o")
    order = np.random.default_rng(0).permutation(len(coord))
    for tile in (None, 1.0):
        got = labels(colored, write_ply(tmp_path / "b.ply", coord[order], color[order]), tmp_path / "o", tile=tile)
        assert (got == expected[order]).mean() > 0.999


# --- what files hold ------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_labels(colored: Path, tmp_path: Path) -> None:
    coord, color = scene()
    expected = labels(colored, write_ply(tmp_path / "a.ply", coord, color), tmp_path / "out")
    paths = [write_ply(tmp_path / "ascii.ply", coord, color, text=True)]
    paths.append(write_ply(tmp_path / "unit.ply", coord, color / np.float32(255)))
    packed = Pypcd.encode_rgb(color).reshape(-1, 1)
    for name, encoding in (("b.pcd", Encoding.BINARY), ("c.pcd", Encoding.BINARY_COMPRESSED)):
        Pypcd.from_xyzrgb_points(np.column_stack([coord, packed])).save(tmp_path / name, encoding)
        paths.append(tmp_path / name)
    far = np.array([431_000, 5_812_000, 300])
    for name, factor in (("eight.las", 1), ("sixteen.laz", 257)):
        las = laspy.LasData(laspy.LasHeader(point_format=3, version="1.4"))
        las.header.offsets, las.header.scales = far, np.full(3, 1e-6)
        las.x, las.y, las.z = (coord + far).T
        las.red, las.green, las.blue = (color.astype(np.uint16) * factor).T
        las.write(str(tmp_path / name))
        paths.append(tmp_path / name)
    for path in paths:
        assert (labels(colored, path, tmp_path / "out") == expected).mean() > 0.999, path
    vertex = PlyData.read(tmp_path / "out" / "eight.ply")["vertex"]
    assert vertex["x"].dtype == np.float64
    np.testing.assert_allclose(vertex["y"], coord[:, 1] + far[1], atol=2e-6, rtol=0)


def test_strength_from_a_kitti_scan(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run("coord", "strength")
    coord, _ = scene(500)
    np.column_stack([coord, np.linspace(0, 1, 500)]).astype(np.float32).tofile(tmp_path / "000000.bin")
    got = labels(run, tmp_path / "000000.bin", tmp_path / "out")
    same = write_ply(tmp_path / "a.ply", coord, intensity=np.linspace(0, 1, 500).astype(np.float32))
    np.testing.assert_array_equal(labels(run, same, tmp_path / "out"), got)


def test_points_without_coordinates(colored: Path, tmp_path: Path) -> None:
    coord, color = scene(1000)
    expected = labels(colored, write_ply(tmp_path / "a.ply", coord, color), tmp_path / "o")
    bad = np.array([0, 500, 999])
    at = np.arange(1000) + np.searchsorted(bad, np.arange(1000), side="right")
    with_bad, colors = np.full((1003, 3), np.nan, np.float32), np.zeros((1003, 3), np.uint8)
    with_bad[at], colors[at] = coord, color
    done = predict_inputs(
        colored,
        [write_ply(tmp_path / "b.ply", with_bad, colors)],
        tmp_path / "o",
        softmax=True,
        device="cpu",
        quiet=True,
    )
    got = np.load(tmp_path / "o" / "b.labels.npy")
    np.testing.assert_array_equal(got[at], expected)
    rest = np.setdiff1d(np.arange(1003), at)
    assert done["inputs"][0]["unlabelled"] == 3 and (got[rest] == -1).all()
    assert (np.load(tmp_path / "o" / "b.softmax.npy")[rest] == 0).all()
    assert PlyData.read(tmp_path / "o" / "b.ply")["vertex"]["red"][rest].max() == 0
    with pytest.raises(DataError, match="none of its 4 points"):
        labels(colored, write_ply(tmp_path / "c.ply", np.full((4, 3), np.nan), colors[:4]), tmp_path / "o")


def test_channels_that_a_file_lacks(make_run: Callable[..., Path], colored: Path, tmp_path: Path) -> None:
    coord, color = scene(400)
    plain, rgb = write_ply(tmp_path / "a.ply", coord), write_ply(tmp_path / "b.ply", coord, color)
    with pytest.raises(MismatchError, match=r"a\.ply: the network reads color, the file has no color, only coord"):
        labels(colored, plain, tmp_path / "o")
    run = make_run("coord", "color", "normal")
    with pytest.raises(MismatchError, match=r"no normal, only coord, color; estimate normals .* --estimate-normals"):
        labels(run, rgb, tmp_path / "o")
    with pytest.raises(MismatchError, match="no color"):
        labels(run, plain, tmp_path / "o", normals=Normals())
    assert not (tmp_path / "o").exists()
    up, down = (labels(run, rgb, tmp_path / "o", normals=Normals(viewpoint=v)) for v in (None, (6.0, 6.0, -1000.0)))
    assert up.min() >= 0 and (up != down).any()
    tiled = labels(run, rgb, tmp_path / "o", normals=Normals(), tile=100.0)
    np.testing.assert_array_equal(tiled, up)


# --- networks that cannot be used -----------------------------------------------------------------------------------


def test_injection_needs_a_cached_sample(tiny_cache: Path, tmp_path: Path) -> None:
    model = {**recipe(("color",)).model_dump(mode="json")["model"], "injection": {}}
    of = recipe(("color",), cache=str(tiny_cache), vfm="fake", model=model, training={"steps": 1})
    train(of, tmp_path / "run", device="cpu", quiet=True)
    path = write_ply(tmp_path / "a.ply", *scene(50))
    with pytest.raises(UsageError, match=r"a\.ply: the network .* features of 'fake'.*ditr-cache extract --vfm fake"):
        labels(tmp_path / "run", path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    expected = predict_sample(load_run(tmp_path / "run", device="cpu"), "room04")
    np.testing.assert_array_equal(labels(tmp_path / "run", "room04", tmp_path / "out"), expected)


CLIPS: dict[str, dict[str, Any]] = {
    "PointClip": {"low": [-7, -5, -1.5], "high": [7, 5, 0.6]},
    "PointClipDistance": {"radius": 7, "low": -1.5, "high": 0.6},
}


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A KITTI scan around its sensor, and a cache whose only sample has the same points."""
    folder = tmp_path_factory.mktemp("scan")
    rng = np.random.default_rng(3)
    angle, radius = rng.random(5000) * 2 * np.pi, 1 + 11 * rng.random(5000)
    coord = np.column_stack([radius * np.cos(angle) + 3, radius * np.sin(angle), 0.4 * rng.random(5000) * radius - 2])
    coord, strength = coord.astype(np.float32), rng.random(5000, dtype=np.float32)
    np.column_stack([coord, strength]).tofile(folder / "000007.bin")
    metadata = CacheMetadata(dataset="test", class_names=CLASSES, class_colors=COLORS, links=LinkSettings())
    arrays = {
        "coord": coord, "strength": strength, "source_index": np.arange(5000, dtype=np.uint32),
        "offset": np.array([5000]), "link_point": np.empty(0, np.uint32), "link_uv": np.empty((0, 2), np.uint16),
        "link_depth": np.empty(0, np.float16),
    }  # fmt: skip
    info = SampleInfo(id="scan", split="val", points=5000, linked_points=0, views=())
    CacheWriter.create(folder / "cache", metadata).commit_geometry("scan", [info], arrays)
    return folder / "000007.bin", folder / "cache"


@pytest.fixture(scope="module")
def make_lidar_run(scan: tuple[Path, Path], make_run: Callable[..., Path]) -> Callable[..., Path]:
    """Run folder of a network in the frame of its sensor, with one of `CLIPS` at test time."""

    def make(*feat: str, clip: str | None = None, **data: Any) -> Path:
        at_test = [] if clip is None else [{"name": clip, "args": CLIPS[clip]}]
        data = {**recipe(feat).model_dump(mode="json")["data"], "center": False, "at_test": at_test, **data}
        return make_run(*feat, cache=str(scan[1]), data=data)

    return make


@pytest.mark.parametrize("clip", [None, *CLIPS])
def test_a_scan_in_the_frame_of_its_sensor_gets_what_evaluation_gives(
    scan: tuple[Path, Path], tmp_path: Path, make_lidar_run: Callable[..., Path], clip: str | None
) -> None:
    run = make_lidar_run("coord", "strength", "height", clip=clip)
    expected = predict_sample(load_run(run, device="cpu"), "scan")
    got = labels(run, scan[0], tmp_path / "out")
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(labels(run, "scan", tmp_path / "sample"), expected)
    assert np.sort(np.bincount(got, minlength=3))[1] > 500
    # The file that comes back has the points as they were given.
    values = np.fromfile(scan[0], np.float32).reshape(-1, 4)
    vertex = PlyData.read(tmp_path / "out" / "000007.ply")["vertex"]
    np.testing.assert_array_equal(np.stack([vertex[a] for a in "xyz"], axis=1), values[:, :3])
    # Another frame is another input, by whole voxels or not, and so is another clamp.
    values[:, 0] += 3.2
    values.tofile(tmp_path / "moved.bin")
    assert (labels(run, tmp_path / "moved.bin", tmp_path / "out") != expected).mean() > 0.02
    if clip is not None:
        free = make_lidar_run("coord", "strength", "height")
        assert (labels(free, scan[0], tmp_path / "out") != expected).mean() > 0.02


@pytest.mark.parametrize("clip", [None, *CLIPS])
def test_tiles_of_a_scan_stay_in_the_frame_of_its_sensor(
    scan: tuple[Path, Path], tmp_path: Path, make_lidar_run: Callable[..., Path], clip: str | None
) -> None:
    run = make_lidar_run("coord", "strength", clip=clip)
    whole = labels(run, scan[0], tmp_path)
    # 20 voxels are more than this network sees; a clamp pulls points over more than that.
    (done,) = predict_inputs(run, [scan[0]], tmp_path, tile=3.0, overlap=2.0, device="cpu", quiet=True)["inputs"]
    assert done["tiles"] > 4 and (np.load(done["files"][0]) == whole).mean() > 0.9995


def test_points_without_a_place_in_the_frame_of_a_sensor(
    scan: tuple[Path, Path], tmp_path: Path, make_lidar_run: Callable[..., Path]
) -> None:
    run = make_lidar_run("coord", "strength", clip="PointClip")
    expected = labels(run, scan[0], tmp_path / "out")
    values = np.fromfile(scan[0], np.float32).reshape(-1, 4)
    bad = np.float32([[np.inf, 0, 0, 0], [0, np.nan, 0, 0], [0, 0, -np.inf, 0]])
    np.concatenate([bad[:2], values, bad[2:]]).tofile(tmp_path / "bad.bin")
    got = labels(run, tmp_path / "bad.bin", tmp_path / "out")
    np.testing.assert_array_equal(got, [-1, -1, *expected, -1])
    # Far from the origin float32 has no voxels: of 0.1 m, beyond 2^17 of them.
    for far, refused in ((13_000, False), (13_200, True), (5_800_000, True)):
        given = write_ply(tmp_path / "far.ply", values[:, :3] + np.float64([0, far, 0]), intensity=values[:, 3])
        if refused:
            with pytest.raises(DataError, match=r"far\.ply: coordinates reach \d+ m .*up to 13107 m; subtract the"):
                labels(run, given, tmp_path / "far")
            assert list((tmp_path / "far").iterdir()) == []
        else:
            labels(run, given, tmp_path / "near")


def test_a_clamp_of_centred_points_needs_a_cached_sample(
    scan: tuple[Path, Path], tmp_path: Path, make_lidar_run: Callable[..., Path]
) -> None:
    run = make_lidar_run("strength", clip="PointClip", center=True)
    with pytest.raises(UsageError, match=r"000007\.bin: .* centred points that PointClip .*--cache CACHE"):
        labels(run, scan[0], tmp_path / "out")
    expected = predict_sample(load_run(run, device="cpu"), "scan")
    np.testing.assert_array_equal(labels(run, "scan", tmp_path / "out"), expected)


def test_colors_and_heights_of_a_file_are_those_of_evaluation(
    tmp_path: Path, make_run: Callable[..., Path], tiny_cache: Path
) -> None:
    normalize = {"name": "ChromaticNormalize", "args": {"mean": [0.9, 0.1, 0.5], "std": [0.1, 0.2, 0.3]}}
    data = {**recipe(("color", "height")).model_dump(mode="json")["data"], "at_test": [normalize]}
    run = make_run("color", "height", cache=str(tiny_cache), data=data)
    room = open_cache(tiny_cache).read("room04")
    path = write_ply(tmp_path / "room.ply", room.coord, room.color)
    in_order = np.empty(len(room.source_index), np.int64)
    in_order[:] = predict_sample(load_run(run, device="cpu"), "room04")[room.source_index]
    np.testing.assert_array_equal(labels(run, path, tmp_path / "out"), in_order)
    plain = make_run("color", "height", cache=str(tiny_cache))
    assert (labels(plain, path, tmp_path / "plain") != in_order).any()


def test_distillation_has_no_classes(tmp_path: Path, tiny_cache: Path) -> None:
    of = recipe(("color",), cache=str(tiny_cache), vfm="fake", task="distill", training={"steps": 1})
    info = RunInfo(
        caches=(), class_names=(), class_colors=(), in_channels=3, vfm=None, init=None, versions={}, device="cpu",
        command="", git_commit=None,
    )  # fmt: skip
    RunFolder(tmp_path / "run").create(of, info)
    with pytest.raises(UsageError, match=r"is a distillation.*/finetune --set init="):
        labels(tmp_path / "run", "room04", tmp_path / "out")


# --- outputs --------------------------------------------------------------------------------------------------------


def test_equal_names_get_numbers(colored: Path, tmp_path: Path) -> None:
    paths = []
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        paths.append(
            write_ply(tmp_path / folder / "Scan.ply" if folder == "b" else tmp_path / folder / "scan.ply", *scene(60))
        )
    paths.insert(1, write_ply(tmp_path / "scan-2.ply", *scene(70)))
    done = predict_inputs(colored, paths, tmp_path / "out", device="cpu", quiet=True)
    names = [Path(summary["files"][0]).name.removesuffix(".labels.npy") for summary in done["inputs"]]
    assert (
        names == ["scan", "scan-2", "Scan-3", "scan-4"] and len(np.load(tmp_path / "out" / "scan-2.labels.npy")) == 70
    )


def test_an_input_is_never_replaced(colored: Path, tmp_path: Path) -> None:
    path = write_ply(tmp_path / "a.ply", *scene(60))
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"would replace the input .*a\.ply'; choose another folder with -o"):
        labels(colored, path, tmp_path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stop", ["error", "sigterm"])
def test_a_stopped_run_leaves_what_was_there(
    colored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    path, out = write_ply(tmp_path / "a.ply", *scene(600)), tmp_path / "out"
    labels(colored, path, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def stopped(*_: Any) -> None:
        if stop == "error":
            raise RuntimeError("out of memory")
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError if stop == "error" else KeyboardInterrupt):
        patch.setattr(inference, "_classify", stopped)
        labels(colored, path, out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert signal.getsignal(signal.SIGTERM) is handler
    write_ply(path, *scene(500))
    assert len(labels(colored, path, out)) == 500 and len(list(out.iterdir())) == 2


def test_space_is_checked_first(colored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_ply(tmp_path / "a.ply", *scene(600))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 20_000, 20_000))
    # 600 points: 21 bytes in the results and 23 in the temporary file.
    with pytest.raises(StorageError, match=r"needs 0\.00 GB in .* free; free space"):
        labels(colored, path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 27_000, 27_000))
    assert len(labels(colored, path, tmp_path / "out")) == 600


def test_folders_that_cannot_be_written(colored: Path, tmp_path: Path) -> None:
    path = write_ply(tmp_path / "a.ply", *scene(60))
    for options in ({"out": path / "out"}, {"out": tmp_path / "o", "tmp": path}):
        with pytest.raises(UnwritableError, match="choose another folder"):
            labels(colored, path, **options)  # type: ignore[arg-type]


def test_one_bad_file_of_several_ends_nothing(
    colored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_ply(tmp_path / "good.ply", *scene(60))
    bad = write_ply(tmp_path / "bad.ply", *scene(60), text=True)
    bad.write_text("\n".join(bad.read_text().splitlines()[:-5]))
    done = predict_inputs(colored, [bad, good], tmp_path / "out", device="cpu", quiet=True)
    assert [s["input"] for s in done["inputs"]] == [str(good)] and "ends after 55" in done["failed"][0]["error"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["good.labels.npy", "good.ply"]
    assert call("predict", str(colored), str(bad), str(good), "-o", str(tmp_path / "out"), "--device", "cpu") == 1
    captured = capsys.readouterr()
    assert "error: " in captured.err and "good.ply: 60 points in 1 tile" in captured.out
    assert call("predict", str(colored), str(bad), "-o", str(tmp_path / "out"), "--device", "cpu") == 2


# --- command line ---------------------------------------------------------------------------------------------------


def call(*args: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(list(args))
    return int(done.value.code or 0)


def test_command(colored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_ply(tmp_path / "a.ply", *scene(700)))
    args = ("predict", str(colored), path, "-o", str(tmp_path / "out"), "--device", "cpu")
    assert call(*args) == 0
    out = capsys.readouterr().out
    assert "a.ply: 700 points in 1 tile" in out and "floor" in out and "a.labels.npy" in out
    assert call(*args, "--json", "--softmax", "--tile", "5", "--overlap", "auto", "--tmp", str(tmp_path / "t")) == 0
    captured = capsys.readouterr()
    done = json.loads(captured.out)
    assert done["step"] == 7 and done["failed"] == [] and done["inputs"][0]["tiles"] > 1 and captured.err == ""
    assert len(done["inputs"][0]["files"]) == 3 and list((tmp_path / "t").iterdir()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "Missing argument 'INPUT...'"),
        (("nothing.ply",), "nothing.ply: no such file"),
        (("cloud.xyz",), "'cloud.xyz' is no file (a file would end in .ply"),
        (("a.ply", "--tile", "large"), "--tile: expected a number of metres or auto, got 'large'"),
        (("a.ply", "--tile", "0.01"), "tile: expected at least 0.2 metres"),
        (("a.ply", "--viewpoint", "0", "0", "1"), "needs --estimate-normals"),
        (("a.ply", "--checkpoint", "last"), "no last.pt yet"),
    ],
)
def test_wrong_use(
    colored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    args: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_ply(tmp_path / "a.ply", *scene(20))
    assert call("predict", str(colored), *args, "-o", "out", "--device", "cpu") == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and captured.out == ""
    assert not (tmp_path / "out").exists()


def test_ids_that_are_not_there(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"'room5' is no file .* did you mean 'room05'"):
        labels(trained, "room5", tmp_path)
    with pytest.raises(CacheError, match="is not a run folder"):
        labels(tmp_path / "none", "room05", tmp_path)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_tells_rate_and_remaining_time(terminal: bool) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120)
    with PredictProgress(console=console, every=0.0) as progress:
        phase = progress.of("a.ply")
        phase("reading", 2000)(2000)
        advance = phase("predicting", 2000)
        advance(500)
        advance(500)
    assert "a.ply: predicting" in text.getvalue() and "k points/s" in text.getvalue()
    if not terminal:
        assert "1,000/2,000 points" in text.getvalue() and "s left" in text.getvalue()
    with PredictProgress(enabled=False, console=Console(file=(silent := io.StringIO()))) as progress:
        progress.of("a.ply")("reading", 10)(10)
    assert silent.getvalue() == ""


def test_help_needs_no_torch() -> None:
    script = (
        "import sys; from ditr_train.cli import main\n"
        "try: main(['predict', '--help'])\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False" and "--estimate-normals" in done.stdout
