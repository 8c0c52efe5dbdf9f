"""Valid files of every kind that the package reads, small, and the repairs of their checksums after mutation."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ditr_cache.schema import canonical_digest
from layouts.clouds import Cloud
from world import World


def clouds(folder: Path) -> dict[str, list[bytes]]:
    """Suffix -> point files."""
    world = World()
    rng = np.random.default_rng(0)
    places, surface = rng.uniform(0, 2, (40, 3)), rng.integers(0, 8, 40)
    ids = dict.fromkeys(("", "wall", "floor", "office board", "panel"), 3)
    found: dict[str, list[bytes]] = {}
    for points in ("ply", "pcd", "pcd-compressed", "las", "laz"):
        for binary in (True, False):
            label = "label" if points in ("las", "laz") and binary else None
            cloud = Cloud(places, surface, world, np.eye(4), ids, True, label)
            _, _, name = cloud.write(folder, f"cloud{binary}", points, binary)
            found.setdefault(Path(name).suffix, []).append((folder / name).read_bytes())
    found[".bin"] = [rng.random((20, 4)).astype("<f4").tobytes()]
    return found


def meshes(folder: Path) -> list[bytes]:
    """PLY files with faces, and with lists before the vertices."""
    from ditr_cache.datasets.ply import write_ply

    names = ("x", "y", "z")
    vertices: dict[str, Any] = {name: np.arange(6, dtype=np.float32) for name in names}
    vertices |= {name: np.arange(6, dtype=np.uint8) for name in ("red", "green", "blue")}
    write_ply(folder / "mesh.ply", vertices, np.array([[0, 1, 2], [3, 4, 5]], dtype=np.int32))
    head = "ply\nformat {} 1.0\nelement face 2\nproperty list uchar int vertex_indices\nelement vertex 4\n"
    head += "property float x\nproperty float y\nproperty float z\nend_header\n"
    text = head.format("ascii") + "3 0 1 2\n4 0 1 2 3\n" + "0 0 0\n1 0 0\n1 1 0\n0 1 1\n"
    faces = struct.pack(">BiiiBiiii", 3, 0, 1, 2, 4, 0, 1, 2, 3)
    big = head.format("binary_big_endian").encode() + faces + np.arange(12, dtype=">f4").tobytes()
    return [(folder / "mesh.ply").read_bytes(), text.encode(), big]


def images() -> list[bytes]:
    """PNG and JPEG of every kind that is read."""
    rng = np.random.default_rng(0)
    color = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    found = []
    for array, kind, options in (
        (color, "PNG", {}), (color, "JPEG", {}), (color, "JPEG", {"progressive": True}), (color[..., 0], "JPEG", {}),
        (color[..., 0].astype(np.uint16) * 99, "PNG", {}), (color[..., 0], "PNG", {}),
    ):  # fmt: skip
        stream = io.BytesIO()
        Image.fromarray(array).save(stream, kind, **options)
        found.append(stream.getvalue())
    stream = io.BytesIO()
    Image.fromarray(color).quantize(16).save(stream, "PNG")
    return [*found, stream.getvalue()]


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of each chunk of a PNG, as far as they are whole."""
    at = 8
    while at + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        at += 12 + length


def with_right_sums(data: bytes) -> bytes:
    """A PNG whose checksums fit what was made of it; other files as they are."""
    if not data.startswith(b"\x89PNG"):
        return data
    fixed = data[:8]
    for name, content in png_chunks(data):
        fixed += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return fixed


def signed(data: bytes) -> bytes:
    """A document of the cache with the checksum that a stranger would give it; other bytes as they are."""
    try:
        body = json.loads(data)
        body.pop("checksum", None)
        return json.dumps({**body, "checksum": canonical_digest(body)}).encode()
    except (ValueError, AttributeError, TypeError, RecursionError):
        return data


def depth_maps(folder: Path) -> dict[str, list[bytes]]:
    """Suffix -> depth maps of posed captures, and labels."""
    values = np.random.default_rng(0).random((6, 8)).astype("<f4")
    found: dict[str, list[bytes]] = {".bin": [b"8&6&1&" + values.tobytes()], ".npy": []}
    for array in (values, (values * 9).astype("<u2"), values[..., None].astype("<f8")):
        np.save(folder / "depth.npy", array)
        found[".npy"].append((folder / "depth.npy").read_bytes())
    return found
