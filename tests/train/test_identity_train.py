"""A run is continued and used only on what it was trained with: every part of the VFM, the classes, the geometry."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditr_cache.codecs import EncodedRows
from ditr_cache.errors import MismatchError
from ditr_cache.schema import PROJECTION_VERSION, VFMSpec
from ditr_cache.store import CacheWriter, open_cache
from ditr_train.evaluate import evaluate
from ditr_train.run_folder import RunFolder
from ditr_train.trainer import train
from runs import recipe

POINTS = 60

CHANGES: dict[str, Any] = {
    "architecture": "other_net",
    "weights_sha256": "0" * 63 + "1",
    "tap": "blocks.2",
    "norm": False,
    "mean": (0.51,),
    "std": (0.49,),
    "interpolation": "bilinear",
    "image_size": (28, 42),
    "grid": (2, 3),
    "dim": 12,
    "layout": "views",
    "fuse": "last",
    "codec": "float16",
    "projection_version": PROJECTION_VERSION + 1,
}

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def cache(make_cache: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("identity") / "cache", train=3, val=1, points=POINTS)


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identity") / "run"
    train(recipe(cache, training__epochs=1), folder, device="cpu", quiet=True)
    return folder


def resume(run: Path, cache: Path) -> dict[str, Any]:
    return train(recipe(cache, training__epochs=1), run, device="cpu", resume=True, quiet=True)


def test_every_part_of_a_vfm_is_in_the_table() -> None:
    """But the name, and what a codec was fitted to be, which has a test of its own."""
    rest = {"name", "codec_digest", "explained_variance"}
    assert {field.name for field in dataclasses.fields(VFMSpec)} == rest | CHANGES.keys()


def test_a_codec_that_was_fitted_to_other_data_is_refused(run: Path, make_spec: Callable[..., VFMSpec]) -> None:
    _, info = RunFolder(run).open()
    info.check_vfm(make_spec())
    with pytest.raises(MismatchError, match="codec_digest differs"):
        info.check_vfm(make_spec(codec_digest="1" * 64))


@pytest.mark.parametrize("field", CHANGES)
def test_features_of_another_vfm_are_refused_by_the_part_that_differs(
    run: Path, make_cache: Make, make_spec: Callable[..., VFMSpec], tmp_path: Path, field: str
) -> None:
    how = {"layout": "views"} if field == "layout" else {"specs": (make_spec(**{field: CHANGES[field]}),)}
    other = make_cache(tmp_path / "other", train=3, val=1, points=POINTS, **how)
    with pytest.raises(MismatchError, match=f"not those the run was trained with: {field} differs, expected "):
        resume(run, other)
    with pytest.raises(MismatchError, match=f"not those the run was trained with: {field} differs, expected "):
        evaluate(run, device="cpu", cache=str(other))


@pytest.mark.parametrize("classes", [("floor", "wall", "poster"), ("wall", "floor", "picture")])
def test_other_classes_are_refused(run: Path, make_cache: Make, tmp_path: Path, classes: tuple[str, ...]) -> None:
    other = make_cache(tmp_path / "other", train=3, val=1, points=POINTS, classes=classes)
    with pytest.raises(MismatchError, match="classes"):
        resume(run, other)
    with pytest.raises(MismatchError, match="the classes differ: class"):
        evaluate(run, device="cpu", cache=str(other))


# --- geometry -------------------------------------------------------------------------------------------------------


def swap_points(arrays: dict[str, Any]) -> None:
    """The points 0 and 1 change places in the dataset's own order."""
    source = arrays["source_index"]
    first, second = np.flatnonzero(source == 0)[0], np.flatnonzero(source == 1)[0]
    source[first], source[second] = 1, 0


def change_label(arrays: dict[str, Any]) -> None:
    arrays["segment"][5] = (arrays["segment"][5] + 1) % 3


def move_point(arrays: dict[str, Any]) -> None:
    arrays["coord"][5, 0] += 0.01


def move_link(arrays: dict[str, Any]) -> None:
    arrays["link_uv"][5, 0] += 1


GEOMETRY_ROWS = {"point order": swap_points, "labels": change_label, "coordinates": move_point, "links": move_link}


def with_geometry_changed(cache: Path, room: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Make one partition again with another geometry, and its features of the same rows."""
    reader, writer = open_cache(cache), CacheWriter(cache)
    record, spec = reader.geometry[room], reader.resolve_vfm("fake")
    rows = reader.read_stored(room, spec.key).features
    assert rows is not None
    arrays = writer.read_arrays(record, list(record.arrays))
    change(arrays)
    changed = writer.commit_geometry(room, record.samples, arrays)
    assert changed.digest != record.digest
    with pytest.raises(MismatchError, match="features of another geometry"):
        open_cache(cache).read(room)
    encoded = EncodedRows(table=rows.table, scale=rows.scale)
    writer.commit_features(spec, changed, encoded, rows.index, images=1)


@pytest.mark.parametrize("name", GEOMETRY_ROWS)
def test_a_run_is_not_continued_on_another_geometry(run: Path, cache: Path, tmp_path: Path, name: str) -> None:
    other = shutil.copytree(cache, tmp_path / "other")
    with_geometry_changed(other, "room01", GEOMETRY_ROWS[name])
    with pytest.raises(MismatchError, match=r"training samples of cache .* made anew"):
        resume(run, other)
    # It may be used there, but its score does not stand for that on the cache of the training.
    results = evaluate(run, device="cpu", cache=str(other))
    assert results["other_cache"] is not None
    assert (run / "eval" / f"val-best-fast-cache-{results['other_cache']}.json").is_file()


def test_features_of_another_geometry_are_refused(run: Path, cache: Path, tmp_path: Path) -> None:
    other = shutil.copytree(cache, tmp_path / "other")
    reader, writer = open_cache(other), CacheWriter(other)
    for room in ("room01", "room03"):  # one to train on, one to evaluate
        arrays = writer.read_arrays(reader.geometry[room], list(reader.geometry[room].arrays))
        swap_points(arrays)
        writer.commit_geometry(room, reader.geometry[room].samples, arrays)
    with pytest.raises(MismatchError, match="features of another geometry"):
        resume(run, other)
    with pytest.raises(MismatchError, match="features of another geometry"):
        evaluate(run, device="cpu", cache=str(other))
    with pytest.raises(MismatchError, match="features of another geometry"):
        train(recipe(other), tmp_path / "new", device="cpu", quiet=True)


def test_where_a_cache_lies_and_when_it_was_made_do_not_matter(
    run: Path, cache: Path, make_cache: Make, tmp_path: Path
) -> None:
    moved = shutil.copytree(cache, tmp_path / "moved")
    again = make_cache(tmp_path / "again", train=3, val=1, points=POINTS)
    for other in (moved, again):
        done = resume(run, other)
        assert done["steps"] == done["resumed_from"]
        assert evaluate(run, device="cpu", cache=str(other))["other_cache"] is None
