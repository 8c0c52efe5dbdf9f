"""Caches small enough to train from in a test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ditr_cache.schema import CacheMetadata, LinkSettings, SampleInfo, VFMSpec, ViewInfo
from ditr_cache.store import CacheWriter
from plain_rows import encode

CLASSES = ("floor", "wall", "picture")


def vfm_spec(name: str = "fake", **changes: object) -> VFMSpec:
    fields: dict[str, object] = {
        "name": name, "architecture": "fake_net", "weights_sha256": "0" * 64, "tap": "last", "norm": True,
        "mean": (0.5,), "std": (0.5,), "interpolation": "bicubic", "image_size": (28, 28), "grid": (2, 2), "dim": 8,
        "codec": "int8",
    }  # fmt: skip
    return VFMSpec(**{**fields, **changes})  # type: ignore[arg-type]


def write_cache(
    root: Path,
    *,
    train: int = 4,
    val: int = 2,
    points: int = 1500,
    specs: Sequence[VFMSpec] = (vfm_spec(),),
    classes: Sequence[str] = CLASSES,
    without: Sequence[str] = (),
    featureless: Sequence[str] = (),
    numbered: bool = False,
    seed: int = 0,
    layout: str = "fused",
) -> Path:
    """A cache of rooms of 2 x 2 x 1 m: floor, wall, and a picture on the wall that only its features tell apart.

    In the layout `views` three views see the points, one to three a point, and each has a row of its own for it.
    """
    metadata = CacheMetadata(
        dataset="test",
        class_names=tuple(classes),
        class_colors=tuple((40 * i, 90, 200) for i in range(len(classes))),
        links=LinkSettings(),
    )
    writer = CacheWriter.create(root, metadata)
    for i in range(train + val):
        rng = np.random.default_rng([seed, i])
        n = points + 10 * i
        uv = rng.random((n, 2))
        wall = rng.random(n) < 0.5
        picture = wall & (np.abs(uv - 0.5) < 0.25).all(axis=1)
        coord = np.where(
            wall[:, None],
            np.stack([2 * uv[:, 0], np.full(n, 2.0), uv[:, 1]], axis=1),
            np.stack([2 * uv[:, 0], 2 * uv[:, 1], np.zeros(n)], axis=1),
        ).astype(np.float32) + np.float32(5 + i)
        segment = np.where(picture, 2, wall.astype(np.int64))
        segment[rng.random(n) < 0.05] = -1
        seen = rng.random(n) < 0.8
        name = f"room{i:02d}"
        arrays = {
            "coord": coord,
            "color": rng.integers(0, 256, (n, 3), dtype=np.uint8),
            "normal": np.where(wall[:, None], [0, -1, 0], [0, 0, 1]).astype(np.float16),
            "segment": segment.astype(np.int16),
            "source_index": rng.permutation(n).astype(np.uint32),
            "offset": np.array([n], dtype=np.int64),
            "link_point": np.flatnonzero(seen).astype(np.uint32),
            "link_uv": np.zeros((int(seen.sum()), 2), dtype=np.uint16),
            "link_depth": np.ones(int(seen.sum()), dtype=np.float16),
        }
        views = [ViewInfo(id="view0", links=int(seen.sum()))]
        if layout == "views":
            draw = np.random.default_rng([seed, i, 1]).random((3, n))
            by_view = seen & ((draw < 0.5) | (draw == draw.min(axis=0)))
            view, point = np.nonzero(by_view)
            views = [ViewInfo(id=f"view{v}", links=int(s.sum())) for v, s in enumerate(by_view)]
            arrays["link_point"], arrays["link_uv"] = point.astype(np.uint32), np.zeros((len(point), 2), np.uint16)
            arrays["link_depth"] = (3 - view).astype(np.float16)
        info = SampleInfo(
            id=name, split="train" if i < train else "val", points=n, linked_points=int(seen.sum()), views=tuple(views)
        )
        record = writer.commit_geometry(name, [info], {k: v for k, v in arrays.items() if k not in without})
        for spec in specs:
            if name in featureless:
                continue
            rows = rng.normal(size=(int(seen.sum()), spec.dim)).astype(np.float32)
            rows[:, 0] += 4 * picture[seen]
            if numbered:  # a channel that tells which point a row belongs to
                rows[:, 1] = np.flatnonzero(seen)
            index = np.full(n, -1, dtype=np.int32)
            index[seen] = np.arange(seen.sum())
            if layout == "views":
                spec = replace(spec, layout="views", fuse="none")
                rows, index = rows[index[point]], np.arange(len(point), dtype=np.int32)
                rows[:, 2] = view  # tells which view a row belongs to
            writer.commit_features(spec, record, encode(rows, spec.codec), index, images=1)
    return root


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Networks this small only lose by threads, most of all where other work runs beside the tests."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_cache() -> Callable[..., Path]:
    return write_cache


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., VFMSpec]:
    return vfm_spec


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training and two validation rooms with the features of one VFM (`fake`, int8)."""
    return write_cache(tmp_path_factory.mktemp("cache") / "tiny")
