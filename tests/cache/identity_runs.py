"""Small extractions of generated rooms, and what identifies their results: for the tests of identity."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ditr_cache.datasets.ply import read_ply, write_ply
from ditr_cache.extract import ExtractRequest, extract
from ditr_cache.partition import ExtractSettings
from ditr_cache.progress import RunTotals
from ditr_cache.store import open_cache
from ditr_cache.synthesize import RoomsSettings, synthesize
from ditr_cache.vfm import VFMRequest

ROOMS = ("scene0000_00", "scene0001_00")
SIZE = (32, 48)


def write_rooms(root: Path) -> Path:
    """Two rooms of some hundred points, the first for validation; three views each."""
    settings = RoomsSettings(frames=3, color_size=SIZE[::-1], depth_size=(24, 16), point_spacing=0.3)
    synthesize(root, scenes=len(ROOMS), seed=1, settings=settings)
    return root


def settings_of(root: Path, cache: Path, checkpoint: Path, **changes: Any) -> ExtractSettings:
    """Of a tiny ViT on the rooms; `changes` are those of the settings, or where it has such a field, of the VFM."""
    vfm = {"name": "test_vit", "checkpoint": str(checkpoint), "image_size": SIZE, "device": "cpu"}
    vfm |= {name: changes.pop(name) for name in list(changes) if name in VFMRequest.__dataclass_fields__}
    named = {"layout": "fused", "codec": "float16", **changes}
    return ExtractSettings(dataset="rooms", root=str(root), cache=str(cache), vfm=VFMRequest(**vfm), **named)


def run(settings: ExtractSettings, workers: int = 0, **how: Any) -> RunTotals:
    """`ditr-cache extract` without its command line. In one thread: the last bits of a sum depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return extract(ExtractRequest(settings=settings, workers=workers, **how), quiet=True)
    finally:
        torch.set_num_threads(threads)


def geometry_digests(cache: Path) -> dict[str, str]:
    """Of every partition."""
    return {name: record.digest for name, record in open_cache(cache).geometry.items()}


def identities(cache: Path, *keys: str) -> dict[str, Any]:
    """All that identifies a cache's content, of all VFMs or of those named: its metadata, the records of its
    partitions with the SHA-256 of every array, all but the seconds that it took."""
    reader = open_cache(cache)
    found: dict[str, Any] = {"cache": asdict(reader.metadata), "digests": geometry_digests(cache)}
    found["geometry"] = {name: _timeless(record) for name, record in reader.geometry.items()}
    for key, spec in reader.vfms.items():
        if key in keys or not keys:
            records = {name: reader.feature_record(spec, name) for name in reader.geometry}
            found[key] = asdict(spec), {n: None if r is None else _timeless(r) for n, r in records.items()}
    return json.loads(json.dumps(found))


def _timeless(record: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(record).items() if name != "seconds"}


# --- changes of a dataset on disk -----------------------------------------------------------------------------------


def change_number(path: Path, row: int, column: int, by: float) -> None:
    """Add to one number of a text file with a matrix."""
    lines = [line.split() for line in path.read_text().splitlines()]
    lines[row][column] = f"{float(lines[row][column]) + by:.9f}"
    path.write_text("".join(" ".join(line) + "\n" for line in lines))


def change_mesh(root: Path, scene: str, change: Any) -> None:
    """Change vertices (dict of columns) and faces of both meshes of a scene: `change(vertices, faces)` returns both."""
    for suffix in ("", ".labels"):
        path = root / "scans" / scene / f"{scene}_vh_clean_2{suffix}.ply"
        ply = read_ply(path)
        write_ply(path, *change({name: column.copy() for name, column in ply.vertices.items()}, ply.faces))
