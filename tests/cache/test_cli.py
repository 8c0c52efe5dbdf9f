"""The command line's contract: commands, flags, JSON objects, exit codes."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Semaphore
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ditr_cache.synthesize
from ditr_cache import cli, open_cache
from ditr_cache.partition import PartitionWorker
from ditr_cache.synthesize import RoomsSettings
from support import Run

FLAGS = {
    "extract": "--dataset --root --out --split --vfm --checkpoint --image-size --every-nth-frame --max-views --layout "
    "--fuse --codec --fit-split --device --workers --scheduler --limit --retry-incomplete --dry-run --profile --json",
    "info": "CACHE --json",
    "verify": "CACHE --repair --root --json",
    "show": "CACHE SAMPLE -o --vfm",
    "du": "CACHE --json",
    "rm": "CACHE --vfm --yes --json",
    "copy": "SOURCE TARGET --vfm --codec --json",
    "compare": "CACHE_A CACHE_B --vfm-a --vfm-b --split --points --json",
    "synthesize": "--scenes --seed --point-spacing",
}


Arguments = tuple[object, ...]


@pytest.fixture(scope="module")
def arguments(tiny_rooms: Path, make_checkpoint: Callable[..., Path]) -> Arguments:
    """Of `ditr-cache`, to extract three small rooms with a tiny ViT in this process; add --out."""
    named = ("--dataset", "rooms", "--root", tiny_rooms, "--vfm", "test_vit", "--checkpoint", make_checkpoint())
    return ("extract", *named, "--image-size", "32x48", "--workers", 0)


@pytest.fixture(scope="module")
def cache(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of the rooms; tests leave it as it is."""
    path = tmp_path_factory.mktemp("finished") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ditr-cache", *map(str, arguments), "--out", str(path)])
        cli.main()
    return path


def tree(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# --- help and wrong use ---------------------------------------------------------------------------------------------


def test_help_lists_every_command(run: Run) -> None:
    for flag in ("--help", "-h"):
        outcome = run(flag)
        assert outcome.code == 0
        assert all(command in outcome.out for command in FLAGS)


@pytest.mark.parametrize("command", FLAGS)
def test_help_of_a_command_names_its_flags(run: Run, command: str) -> None:
    outcome = run(command, "--help")
    assert outcome.code == 0
    assert [flag for flag in FLAGS[command].split() if flag not in outcome.out] == []


def test_version(run: Run) -> None:
    outcome = run("--version")
    assert outcome.code == 0
    assert "0.1.0" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "Usage"),
        (("extrakt",), "extrakt"),
        (("extract", "--root", ".", "--out", "x"), "--dataset"),
        (("extract", "--dataset", "rooms", "--out", "x"), "--root"),
        (("extract", "--dataset", "rooms", "--root", "."), "--out"),
        (("extract", "--dataset", "rooms", "--root", ".", "--out", "x", "--fuse", "median"), "nearest"),
        (("extract", "--dataset", "rooms", "--root", ".", "--out", "x", "--codec", "int4"), "int8"),
        (("extract", "--dataset", "rooms", "--root", ".", "--out", "x", "--image-size", "large"), "420x560"),
        (("extract", "--dataset", "rooms", "--root", ".", "--out", "x", "--image-size", "0x64"), "positive"),
        (("extract", "--dataset", "rooms", "--root", ".", "--out", "x", "--limit", "0"), "--limit"),
        (("extract", "--dataset", "rooms", "--root", ".", "--out", "x", "--workers", "-1"), "--workers"),
        (("extract", "--dataset", "rooms", "--root", ".", "--out", "x", "--every-nth-frame", "two"), "two"),
        (("info",), "CACHE"),
        (("verify", "a", "b"), "b"),
        (("show", "a", "b"), "-o"),
        (("synthesize", "x", "--scenes", "1"), "--scenes"),
        (("synthesize", "x", "--seed", "-1"), "--seed"),
        (("synthesize", "x", "--point-spacing", "3"), "point_spacing must be in"),
    ],
)
def test_wrong_use_exits_2_and_names_what_is_wrong(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run(*arguments)
    assert outcome.code == 2
    assert named in outcome.err
    assert outcome.out == ""
    assert list(tmp_path.iterdir()) == []


# --- extract --------------------------------------------------------------------------------------------------------


def check_totals(totals: dict[str, Any]) -> None:
    """The object of `extract --json` has these keys and types, and no others."""
    assert set(totals) == {
        "partitions",
        "geometry",
        "images",
        "points",
        "coverage",
        "seconds",
        "bytes",
        "stages",
        "failures",
    }
    assert set(totals["partitions"]) == {"done", "reused", "failed"}
    assert set(totals["geometry"]) == {"computed", "reused"}
    for count in (*totals["partitions"].values(), *totals["geometry"].values()):
        assert type(count) is int
    assert all(type(totals[name]) is int for name in ("images", "points", "bytes"))
    assert isinstance(totals["coverage"], float) and 0 <= totals["coverage"] <= 1
    assert isinstance(totals["seconds"], float) and totals["seconds"] >= 0
    assert list(totals["stages"]) == ["read", "link", "decode", "resize", "forward", "lift", "encode", "write"]
    assert all(isinstance(seconds, float) and seconds >= 0 for seconds in totals["stages"].values())
    for failure in totals["failures"]:
        assert set(failure) == {"sample", "view", "error"}
        assert isinstance(failure["sample"], str) and isinstance(failure["error"], str)
        assert failure["view"] is None or isinstance(failure["view"], str)


def test_extract_json_is_one_object_on_stdout(run: Run, arguments: Arguments, tmp_path: Path) -> None:
    outcome = run(*arguments, "--out", tmp_path / "cache", "--json")
    assert outcome.code == 0
    assert outcome.out.count("\n") == 1
    check_totals(outcome.json)
    assert outcome.json["partitions"] == {"done": 3, "reused": 0, "failed": 0}
    assert outcome.json["geometry"] == {"computed": 3, "reused": 0}
    assert outcome.json["images"] == 12
    assert outcome.json["failures"] == []
    stored = open_cache(tmp_path / "cache")
    assert outcome.json["points"] == sum(stored.sample_info(i).points for i in stored.samples)
    assert outcome.json["bytes"] <= sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*") if p.is_file())
    assert outcome.json["bytes"] > 0.5 * sum(
        p.stat().st_size for p in (tmp_path / "cache").rglob("*") if p.is_file() and ".zarr" in str(p)
    )


def test_extract_without_json_says_what_it_did(run: Run, arguments: Arguments, tmp_path: Path) -> None:
    first = run(*arguments, "--out", tmp_path / "cache")
    assert first.code == 0
    assert "3 done, 0 already there, 0 failed" in first.out
    assert "3/3 partitions" in first.err, "without a terminal progress is plain lines"
    for part in ("images/s", "points/s", "ETA", "B"):
        assert part in first.err
    second = run(*arguments, "--out", tmp_path / "cache")
    assert second.code == 0
    assert "0 done, 3 already there, 0 failed" in second.out


def test_extract_with_failures_exits_1_and_lists_them(
    run: Run, arguments: Arguments, tiny_rooms: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_rooms, tmp_path / "rooms")
    image = tmp_path / "rooms/scans/scene0001_00/color/1.jpg"
    image.write_bytes(image.read_bytes()[:300])
    arguments = (*arguments, "--out", tmp_path / "cache", "--root", tmp_path / "rooms")
    outcome = run(*arguments, "--json")
    assert outcome.code == 1
    check_totals(outcome.json)
    (failure,) = outcome.json["failures"]
    assert (failure["sample"], failure["view"]) == ("scene0001_00", "1")
    assert str(image) in failure["error"]
    plain = run(*arguments, "--out", tmp_path / "second")
    assert plain.code == 1
    assert "scene0001_00 view 1" in plain.err
    assert "--retry-incomplete" in plain.err


def test_stopped_by_the_user_exits_1_and_goes_on_later(
    run: Run, arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = PartitionWorker.__call__
    others = Semaphore(0)

    def stop_at_the_last(self: PartitionWorker, partition: Any) -> Any:
        if partition.id == "scene0001_00":  # of the split val, which comes after train
            assert others.acquire(timeout=60) and others.acquire(timeout=60)
            raise KeyboardInterrupt
        summary = whole(self, partition)
        others.release()
        return summary

    arguments = (*arguments, "--out", tmp_path / "cache", "--json")
    with monkeypatch.context() as patch:
        patch.setattr(PartitionWorker, "__call__", stop_at_the_last)
        outcome = run(*arguments)
    assert outcome.code == 1
    assert "the same command goes on from here" in outcome.err
    assert run(*arguments).json["partitions"] == {"done": 1, "reused": 2, "failed": 0}


def test_dry_run_estimates_and_writes_nothing(run: Run, arguments: Arguments, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    outcome = run(*arguments, "--out", cache, "--dry-run", "--json")
    assert outcome.code == 0
    assert outcome.out.count("\n") == 1
    assert set(outcome.json) == {"estimate"}
    estimate = outcome.json["estimate"]
    assert {"partitions", "images", "points", "bytes", "seconds"} <= set(estimate)
    assert all(type(estimate[name]) is int for name in ("partitions", "images", "points", "bytes"))
    assert isinstance(estimate["seconds"], float)
    assert estimate["partitions"] == 3
    plain = run(*arguments, "--out", cache, "--dry-run")
    assert plain.code == 0
    assert "3 partitions" in plain.out and "12 images" in plain.out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_leaves_an_existing_cache_as_it_is(run: Run, arguments: Arguments, cache: Path) -> None:
    before = tree(cache)
    outcome = run(*arguments, "--out", cache, "--fuse", "last", "--dry-run", "--json")
    assert outcome.json["estimate"]["partitions"] == 3
    assert tree(cache) == before
    finished = run(*arguments, "--out", cache, "--dry-run", "--json").json["estimate"]
    assert (finished["partitions"], finished["images"], finished["bytes"]) == (0, 0, 0)
    assert tree(cache) == before


# --- info, verify, show ---------------------------------------------------------------------------------------------


def test_info_json(run: Run, cache: Path) -> None:
    outcome = run("info", cache, "--json")
    assert outcome.code == 0
    info = outcome.json
    types = {"format_version": int, "dataset": str, "samples": int, "points": int, "geometry_bytes": int, "vfms": list}
    assert {name: type(info[name]) for name in types} == types
    assert (info["format_version"], info["dataset"], info["samples"], info["incomplete"]) == (1, "rooms", 3, 0)
    (vfm,) = info["vfms"]
    types = {"key": str, "name": str, "dim": int, "layout": str, "codec": str, "grid": list, "samples": int}
    types |= {"bytes": int, "coverage": float}
    assert {name: type(vfm[name]) for name in types} == types
    assert (vfm["name"], vfm["dim"], vfm["layout"], vfm["codec"], vfm["grid"], vfm["samples"]) == (
        "test_vit",
        64,
        "fused",
        "float16",
        [2, 3],
        3,
    )
    assert vfm["key"].startswith("test_vit-") and len(vfm["key"]) == len("test_vit-") + 8
    stored = open_cache(cache)
    valid = np.concatenate([stored.read(i).valid for i in stored.samples])
    assert info["points"] == len(valid)
    assert vfm["coverage"] == pytest.approx(valid.mean(), abs=1e-6)
    for folder, size in ((cache / "geometry", info["geometry_bytes"]), (cache / "features" / vfm["key"], vfm["bytes"])):
        assert sum(p.stat().st_size for p in folder.rglob("*.zarr/**/*") if p.is_file()) == size


def test_info_without_json(run: Run, cache: Path) -> None:
    outcome = run("info", cache)
    assert outcome.code == 0
    assert "rooms: 3 samples" in outcome.out
    assert "bytes per point" in outcome.out


def test_verify_json_of_a_clean_cache(run: Run, cache: Path) -> None:
    before = tree(cache)
    for repair in ((), ("--repair",)):
        outcome = run("verify", cache, "--json", *repair)
        assert outcome.code == 0
        # Three geometry partitions, three feature partitions and the store's own document.
        assert outcome.json == {"checked": 7, "ok": 7, "corrupt": [], "missing": [], "mismatched": []}
    assert tree(cache) == before
    assert "7 checked, 7 ok" in run("verify", cache).out


def test_verify_exits_1_where_anything_is_wrong(run: Run, arguments: Arguments, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    run(*arguments, "--out", cache)
    (cache / "geometry/scene0000_00.zarr/coord/c/0/0").unlink()
    outcome = run("verify", cache, "--json")
    assert outcome.code == 1
    assert set(outcome.json) == {"checked", "ok", "corrupt", "missing", "mismatched"}
    assert "geometry/scene0000_00" in outcome.json["missing"]
    plain = run("verify", cache)
    assert plain.code == 1
    assert "bad geometry/scene0000_00" in plain.out


def test_verify_with_the_dataset(run: Run, arguments: Arguments, cache: Path, tiny_rooms: Path, tmp_path: Path) -> None:
    """What the dataset cannot say is told, and never removed."""
    whole = run("verify", cache, "--root", tiny_rooms, "--json")
    assert whole.code == 0
    assert whole.json == {"checked": 7, "ok": 7, "corrupt": [], "missing": [], "mismatched": [], "not_compared": []}
    other = shutil.copytree(tiny_rooms, tmp_path / "rooms")
    (mesh,) = (other / "scans/scene0000_00").glob("*_vh_clean_2.ply")
    mesh.unlink()
    before = tree(cache)
    outcome = run("verify", cache, "--root", other, "--repair")
    assert outcome.code == 1
    assert "bad geometry/scene0000_00: cannot be compared with the dataset: " in outcome.out
    assert "7 checked, 6 ok" in outcome.out and tree(cache) == before
    assert run("verify", cache, "--root", tmp_path / "nowhere").code == 2


def test_show_writes_a_picture(run: Run, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "new/picture.png"
    outcome = run("show", cache, "scene0000_00", "-o", path, "--vfm", "test_vit")
    assert outcome.code == 0
    assert outcome.out.strip() == str(path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    # RGB, labels, PCA and coverage side by side, each with three viewpoints below each other: none is blank.
    for column in np.array_split(pixels, 4, axis=1):
        for panel in np.array_split(column[44:], 3, axis=0):
            assert (panel != 255).any(axis=2).mean() > 0.05


def test_show_of_an_unknown_sample_or_vfm_names_the_nearest(run: Run, cache: Path, tmp_path: Path) -> None:
    outcome = run("show", cache, "scene0000_01", "-o", tmp_path / "x.png")
    assert outcome.code == 2
    assert "'scene0000_00'" in outcome.err
    outcome = run("show", cache, "scene0000_00", "-o", tmp_path / "x.png", "--vfm", "test_vitt")
    assert outcome.code == 2
    assert "'test_vit'" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_show_where_the_picture_cannot_be_written(run: Run, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = run("show", cache, "scene0000_00", "-o", tmp_path / "file/x.png")
    assert outcome.code == 1
    assert "cannot write" in outcome.err


@pytest.mark.parametrize("command", [("info",), ("info", "--json"), ("verify",), ("show", "x", "-o", "x.png")])
def test_a_folder_that_is_no_cache(run: Run, tmp_path: Path, command: tuple[str, ...]) -> None:
    outcome = run(command[0], tmp_path, *command[1:])
    assert outcome.code == 2
    assert str(tmp_path) in outcome.err and "cache.json" in outcome.err
    assert outcome.out == ""


# --- synthesize -----------------------------------------------------------------------------------------------------


def test_synthesize_is_decided_by_its_seed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = functools.partial(RoomsSettings, frames=2, color_size=(32, 24), depth_size=(16, 12), point_spacing=0.4)
    monkeypatch.setattr(ditr_cache.synthesize, "RoomsSettings", tiny)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        outcome = run("synthesize", tmp_path / folder, "--scenes", 2, "--seed", seed)
        assert outcome.code == 0
        assert outcome.out.strip() == str(tmp_path / folder)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    mesh = "scans/scene0000_00/scene0000_00_vh_clean_2.ply"
    assert tree(tmp_path / "a")[mesh] != tree(tmp_path / "c")[mesh]
    assert sorted(p.name for p in (tmp_path / "a/scans").iterdir()) == ["scene0000_00", "scene0001_00"]
    # Again it has nothing to do; over rooms of another seed it refuses.
    assert run("synthesize", tmp_path / "a", "--scenes", 2, "--seed", 3).code == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    refused = run("synthesize", tmp_path / "a", "--scenes", 2, "--seed", 4)
    assert refused.code == 2
    assert "seed" in refused.err


# --- the installed script and the Python interface ------------------------------------------------------------------


def test_console_script(arguments: Arguments, tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("ditr-cache")
    command = [script, *arguments, "--out", tmp_path / "cache", "--json"]
    extracted = subprocess.run([str(a) for a in command], capture_output=True, text=True, timeout=120)
    assert extracted.returncode == 0, extracted.stderr
    check_totals(json.loads(extracted.stdout))
    assert extracted.stdout.count("\n") == 1
    refused = subprocess.run([str(script), "info", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert refused.stdout == "" and refused.stderr.startswith("error: ")


def test_python_interface(cache: Path) -> None:
    opened = open_cache(cache)
    assert opened.samples == ["scene0000_00", "scene0001_00", "scene0002_00"]
    (key,) = opened.vfms
    for vfm in (None, key, "test_vit"):
        sample = opened.read("scene0000_00", vfm=vfm)
        n = len(sample.coord)
        expected = {
            "coord": ((n, 3), np.float32),
            "color": ((n, 3), np.uint8),
            "normal": ((n, 3), np.float32),
            "segment": ((n,), np.int16),
            "feature": ((n, 64), np.float32),
            "valid": ((n,), np.bool_),
            "source_index": ((n,), np.int64),
        }
        assert {name: (sample[name].shape, sample[name].dtype) for name in expected} == expected
        assert sorted(sample.source_index) == list(range(n))
        assert not sample["feature"][~sample["valid"]].any()
