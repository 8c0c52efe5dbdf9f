"""`ditr-cache verify`: every kind of damage is found, named, and repaired without touching the rest."""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditr_cache import cli, open_cache
from ditr_cache.errors import CacheError
from ditr_cache.store import CacheReader
from ditr_cache.verify import verify
from support import Run, read_array

ROOMS = ["scene0000_00", "scene0001_00", "scene0002_00"]
GEOMETRY, FEATURES = f"geometry/{ROOMS[0]}", f"features/{{key}}/{ROOMS[0]}"
Call = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def call(run: Run) -> Call:
    """`ditr-cache ARGUMENTS --json` in this process: exit code, JSON object, stderr."""

    def with_json(*arguments: object) -> tuple[int, dict[str, Any], str]:
        outcome = run(*arguments, "--json")
        return outcome.code, outcome.json if outcome.out else {}, outcome.err

    return with_json


@pytest.fixture(scope="module")
def arguments(tiny_rooms: Path, make_checkpoint: Callable[..., Path]) -> tuple[object, ...]:
    """Of an extraction of three rooms in this process; add --out."""
    named = ("--dataset", "rooms", "--root", tiny_rooms, "--vfm", "test_vit", "--checkpoint", make_checkpoint())
    return ("extract", *named, "--image-size", "32x48", "--codec", "int8", "--workers", 0)


@pytest.fixture(scope="module")
def finished(arguments: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ditr-cache", *map(str, arguments), "--out", str(path)])
        cli.main()
    return path


@pytest.fixture
def cache(finished: Path, tmp_path: Path) -> Path:
    """A finished cache, to be damaged."""
    return shutil.copytree(finished, tmp_path / "cache")


def key_of(cache: Path) -> str:
    return next((cache / "features").iterdir()).name


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position if position >= 0 else len(data) // 2] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def remove(path: Path) -> None:
    path.unlink()


DAMAGE = {"flip": flip, "truncate": truncate, "remove": remove}


def entries(found: dict[str, Any]) -> dict[str, list[str]]:
    return {kind: found[kind] for kind in ("corrupt", "missing", "mismatched") if found[kind]}


# --- what is found --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("array", ["coord", "normal", "segment", "source_index", "link_uv", "link_point"])
def test_damaged_geometry_array(call: Call, cache: Path, array: str, damage: str) -> None:
    """The features of damaged geometry are not to be used either: they belong to geometry that is not there."""
    chunk = next(p for p in (cache / f"{GEOMETRY}.zarr" / array / "c").rglob("*") if p.is_file())
    DAMAGE[damage](chunk)
    code, found, _ = call("verify", cache)
    features = FEATURES.format(key=key_of(cache))
    expected = {"missing": [GEOMETRY, features]} if damage == "remove" else {"corrupt": [GEOMETRY]}
    assert (code, entries(found)) == (1, {"missing": [features], **expected})
    assert (found["checked"], found["ok"]) == (7, 5)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("array", ["table", "scale", "index"])
def test_damaged_feature_array(call: Call, cache: Path, array: str, damage: str) -> None:
    features = FEATURES.format(key=key_of(cache))
    chunk = next(p for p in (cache / f"{features}.zarr" / array / "c").rglob("*") if p.is_file())
    DAMAGE[damage](chunk)
    code, found, _ = call("verify", cache)
    assert (code, entries(found)) == (1, {"missing" if damage == "remove" else "corrupt": [features]})


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damaged_record(call: Call, cache: Path, damage: str) -> None:
    features = FEATURES.format(key=key_of(cache))
    DAMAGE[damage](cache / f"{features}.json")
    code, found, _ = call("verify", cache)
    assert (code, entries(found)) == (1, {"corrupt": [features]})
    DAMAGE[damage](cache / f"geometry/{ROOMS[1]}.json")
    code, found, _ = call("verify", cache)
    assert (code, entries(found)["corrupt"]) == (1, [f"geometry/{ROOMS[1]}", features])
    assert open_cache(cache).samples == [ROOMS[0], ROOMS[2]], "no reader takes it for a partition"


def test_removed_record(call: Call, cache: Path) -> None:
    """Arrays without a record are no partition: features that belong to it hang in the air."""
    features = FEATURES.format(key=key_of(cache))
    (cache / f"{features}.json").unlink()
    code, found, _ = call("verify", cache)
    assert (code, found["checked"], entries(found)) == (0, 6, {})
    (cache / f"geometry/{ROOMS[1]}.json").unlink()
    code, found, _ = call("verify", cache)
    assert (code, entries(found)) == (1, {"missing": [f"features/{key_of(cache)}/{ROOMS[1]}"]})


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_store_document(call: Call, cache: Path, damage: str) -> None:
    document = f"features/{key_of(cache)}/vfm.json"
    DAMAGE[damage](cache / document)
    code, found, _ = call("verify", cache)
    assert code == 1
    assert document in found["missing" if damage == "remove" else "corrupt"]


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damaged_cache_document(call: Call, cache: Path, damage: str) -> None:
    """Without it nothing can be judged."""
    DAMAGE[damage](cache / "cache.json")
    code, found, error = call("verify", cache)
    assert code == 1
    assert found == {} and "cache.json" in error


def test_renamed_store_is_mismatched(call: Call, cache: Path) -> None:
    folder = cache / "features" / key_of(cache)
    folder.rename(folder.with_name("dinov2-large-01234567"))
    code, found, _ = call("verify", cache)
    assert (code, found["mismatched"]) == (1, ["features/dinov2-large-01234567/vfm.json"])


def test_features_of_another_geometry_are_mismatched(
    call: Call, cache: Path, arguments: tuple[object, ...], tmp_path: Path
) -> None:
    call(*arguments, "--out", tmp_path / "other", "--max-views", 1)
    features = FEATURES.format(key=key_of(cache))
    for end in (".json", ".zarr"):
        target = cache / (features + end)
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        source = tmp_path / "other" / (features + end)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    code, found, _ = call("verify", cache)
    assert (code, entries(found)) == (1, {"mismatched": [features]})


def test_features_of_another_vfm_are_mismatched(
    call: Call, cache: Path, arguments: tuple[object, ...], tmp_path: Path
) -> None:
    call(*arguments, "--out", tmp_path / "other", "--fuse", "last")
    features = FEATURES.format(key=key_of(cache))
    other = FEATURES.format(key=key_of(tmp_path / "other"))
    shutil.copy(tmp_path / f"other/{other}.json", cache / f"{features}.json")
    code, found, _ = call("verify", cache)
    assert (code, entries(found)) == (1, {"mismatched": [features]})


def read_all(reader: CacheReader) -> list[np.ndarray[Any, Any]]:
    """All arrays of the first room, as a reader gets them, with the links."""
    (key,) = reader.vfms
    record = reader.geometry[ROOMS[0]]
    features = reader.feature_record(reader.vfms[key], ROOMS[0])
    assert features is not None
    arrays = []
    for folder, infos in ((reader.paths.geometry, record.arrays), (reader.paths.features(key), features.arrays)):
        where = reader.paths.arrays(folder, ROOMS[0])
        arrays += [read_array(where, name, info) for name, info in infos.items()]
    return arrays


def test_no_flipped_byte_passes_unseen(cache: Path) -> None:
    """Whatever byte of whatever file flips: it is found, or readers still get exactly what was committed."""
    expected = read_all(open_cache(cache))
    rng = np.random.default_rng(0)
    files = [p for stem in (GEOMETRY, FEATURES.format(key=key_of(cache))) for p in cache.glob(f"{stem}*/**/*")]
    files += [*cache.glob(f"{GEOMETRY}.json"), *cache.glob("features/*/*.json")]
    found = 0
    for path in sorted(p for p in files if p.is_file()):
        whole = path.read_bytes()
        for position in rng.integers(len(whole), size=1):
            flip(path, int(position))
            try:
                clean = verify(cache).clean
            except CacheError:
                clean = False
            found += not clean
            if clean:
                for array, was in zip(read_all(open_cache(cache)), expected, strict=True):
                    np.testing.assert_array_equal(array, was, err_msg=str(path))
            path.write_bytes(whole)
    assert found > 10
    assert verify(cache).clean


# --- what is repaired -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "damage", "geometry", "done"),
    [
        (f"{GEOMETRY}.zarr/coord/c/0/0", "flip", 1, 1),
        (f"{GEOMETRY}.zarr/link_uv/c/0/0", "remove", 1, 1),
        (f"{GEOMETRY}.json", "truncate", 1, 1),
        (f"{GEOMETRY}.json", "remove", 1, 1),
        (f"{FEATURES}.zarr/table/c/0/0", "flip", 0, 1),
        (f"{FEATURES}.zarr/table/zarr.json", "remove", 0, 1),
        (f"{FEATURES}.json", "flip", 0, 1),
        ("features/{key}/vfm.json", "truncate", 0, 3),
        ("features/{key}/vfm.json", "remove", 0, 3),
    ],
)
def test_repair_and_extract_rebuild_just_what_was_bad(
    call: Call,
    cache: Path,
    finished: Path,
    arguments: tuple[object, ...],
    path: str,
    damage: str,
    geometry: int,
    done: int,
) -> None:
    DAMAGE[damage](cache / path.format(key=key_of(cache)))
    code, found, _ = call("verify", cache)
    assert code == 1
    again, repaired, _ = call("verify", cache, "--repair")
    assert again == 1
    assert {e for kind in entries(found).values() for e in kind} <= {e for k in entries(repaired).values() for e in k}
    code, clean, _ = call("verify", cache)
    assert (code, entries(clean)) == (0, {})
    code, totals, _ = call(*arguments, "--out", cache)
    assert (code, totals["partitions"]) == (0, {"done": done, "reused": 3 - done, "failed": 0})
    assert totals["geometry"] == {"computed": geometry, "reused": 3 - geometry}
    assert call("verify", cache)[:2] == call("verify", finished)[:2]
    for array, was in zip(read_all(open_cache(cache)), read_all(open_cache(finished)), strict=True):
        np.testing.assert_array_equal(array, was)


def test_repair_of_one_store_leaves_the_other_vfm(call: Call, cache: Path, arguments: tuple[object, ...]) -> None:
    call(*arguments, "--out", cache, "--codec", "float16")
    good, bad = sorted(open_cache(cache).vfms.values(), key=lambda spec: spec.codec)
    flip(cache / f"features/{bad.key}/{ROOMS[0]}.zarr/table/c/0/0")
    call("verify", cache, "--repair")
    reader = open_cache(cache)
    assert (reader.samples_with(good.key), reader.samples_with(bad.key)) == (ROOMS, ROOMS[1:])


def test_repair_removes_leftovers_of_dead_processes(call: Call, cache: Path) -> None:
    dead = cache / f"geometry/.{socket.gethostname()}+2147483646+x.tmp"
    alive = cache / f"geometry/.{socket.gethostname()}+1+x.tmp"
    for folder in (dead, alive):
        folder.mkdir()
    assert call("verify", cache)[0] == 0, "a temporary folder is no damage"
    assert dead.exists()
    call("verify", cache, "--repair")
    assert not dead.exists()
    assert alive.exists(), "its process is at work"


def test_damage_is_refused_by_readers_until_repaired(cache: Path) -> None:
    path = cache / f"{GEOMETRY}.zarr/coord/c/0/0"
    flip(path)
    with pytest.raises(CacheError, match=r"coord.*verify --repair"):
        open_cache(cache).read(ROOMS[0])
    truncate(path)
    with pytest.raises(CacheError, match=r"expected \d+ bytes as committed"):
        open_cache(cache).read(ROOMS[0])
    assert open_cache(cache).read(ROOMS[1]).valid.any()
