"""`extract --dry-run`: what it promises against what the run then does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ditr_cache.errors import DataError
from ditr_cache.extract import ExtractRequest, extract
from ditr_cache.partition import ExtractSettings
from ditr_cache.plan import estimate
from ditr_cache.vfm import VFMRequest


@pytest.fixture
def request_(tiny_rooms: Path, make_checkpoint: Callable[..., Path], tmp_path: Path) -> ExtractRequest:
    vfm = VFMRequest(name="test_vit", checkpoint=str(make_checkpoint()), image_size=(32, 48), device="cpu")
    settings = ExtractSettings(dataset="rooms", root=str(tiny_rooms), cache=str(tmp_path / "cache"), vfm=vfm)
    return ExtractRequest(settings=settings, workers=0)


def files(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.mark.parametrize(
    ("links", "codec"), [({}, "float16"), ({"max_views": 2}, "int8"), ({"every_nth_frame": 2}, "float16")]
)
def test_the_run_does_what_was_estimated(
    request_: ExtractRequest, tmp_path: Path, links: dict[str, Any], codec: str
) -> None:
    request = replace(request_, links=links, settings=replace(request_.settings, codec=codec))
    plan = estimate(request)
    assert list(tmp_path.iterdir()) == []
    totals = extract(request, quiet=True)
    assert (plan.partitions, plan.reused, plan.geometry) == (3, 0, 3)
    assert plan.images == totals.images
    assert plan.points == pytest.approx(totals.points, rel=0.3)
    assert plan.bytes == pytest.approx(totals.bytes, rel=0.3)
    assert plan.seconds > 0
    on_disk = sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*") if p.is_file() and ".zarr" in str(p))
    assert totals.bytes == on_disk


def test_what_is_there_is_not_counted(request_: ExtractRequest, tmp_path: Path) -> None:
    extract(replace(request_, limit=1), quiet=True)
    before = files(tmp_path)
    plan = estimate(request_)
    assert (plan.partitions, plan.reused, plan.geometry) == (2, 1, 2)
    # Another VFM finds the geometry of one partition.
    other = replace(request_, settings=replace(request_.settings, fuse="last"))
    plan = estimate(other)
    assert (plan.partitions, plan.reused, plan.geometry) == (3, 0, 2)
    assert files(tmp_path) == before
    totals = extract(other, quiet=True)
    assert (totals.geometry["computed"], totals.images) == (plan.geometry, plan.images)
    assert plan.bytes == pytest.approx(totals.bytes, rel=0.3)
    plan = estimate(other)
    assert (plan.partitions, plan.reused, plan.images, plan.points, plan.bytes, plan.seconds) == (0, 3, 0, 0, 0, 0)


def test_a_broken_sample_does_not_stop_the_estimate(request_: ExtractRequest, tiny_rooms: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_rooms, tmp_path / "rooms")
    request = replace(request_, settings=replace(request_.settings, root=str(tmp_path / "rooms")))
    meshes = sorted((tmp_path / "rooms/scans").glob("*/*clean_2.ply"))
    meshes[0].write_bytes(meshes[0].read_bytes()[:500])
    plan = estimate(request)
    assert (plan.partitions, plan.images) == (3, 12)
    assert plan.bytes > 0
    for mesh in meshes:
        mesh.write_bytes(mesh.read_bytes()[:500])
    with pytest.raises(DataError, match="truncated"):
        estimate(request)
    assert not (tmp_path / "cache").exists()
