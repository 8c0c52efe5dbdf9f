"""Made `v1/`, a small cache of format version 1, and `v1.npz`, what its samples must read as. Run once, never again.

Every later version of the reader must read `v1/` as it stands. A new format version gets a folder and a script of its
own; this script only shows how the first one came to be.
"""

import sys
from pathlib import Path

import numpy as np

from ditr_cache.codecs import make_codec
from ditr_cache.schema import BrokenView, CacheMetadata, LinkSettings, SampleInfo, VFMSpec, ViewInfo
from ditr_cache.store import CacheWriter

FOLDER = Path(__file__).parent
PARTITIONS = (("scene0000_00", (("scene0000_00", "train", 70),)), ("scans/0", (("a ü", "val", 40), ("b", "val", 25))))


def spec(name: str, codec: str, dim: int) -> VFMSpec:
    """A made-up VFM."""
    return VFMSpec(
        name=name, architecture="made_up", weights_sha256=f"{dim:064x}", tap="blocks.11", norm=True,
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bicubic", image_size=(420, 560),
        grid=(30, 40), dim=dim, layout="fused", fuse="mean", codec=codec,
    )  # fmt: skip


def main() -> None:
    """Write both."""
    if (FOLDER / "v1").exists():
        sys.exit("tests/data/v1 is frozen: it is never made again")
    metadata = CacheMetadata(
        dataset="frozen",
        class_names=("wall", "floor"),
        class_colors=((174, 199, 232), (152, 223, 138)),
        links=LinkSettings(every_nth_frame=2, max_views=8, depth_max=6.5),
    )
    writer = CacheWriter.create(FOLDER / "v1", metadata)
    rng = np.random.default_rng(1)
    expected = {}
    for partition, samples in PARTITIONS:
        n = sum(points for *_, points in samples)
        link_point = np.sort(rng.choice(n, n // 2, replace=False)).astype(np.uint32)
        coord = rng.normal(size=(n, 3)).astype(np.float32)
        arrays = {
            "coord": coord,
            "color": rng.integers(0, 256, (n, 3), dtype=np.uint8),
            "normal": (coord / np.linalg.norm(coord, axis=1, keepdims=True)).astype(np.float16),
            "segment": rng.integers(-1, 2, n).astype(np.int16),
            "instance": rng.integers(-1, 5, n).astype(np.int32),
            "source_index": np.concatenate([rng.permutation(p) for *_, p in samples]).astype(np.uint32),
            "offset": np.cumsum([p for *_, p in samples]).astype(np.int64),
            "link_point": link_point,
            "link_uv": rng.integers(0, 65536, (len(link_point), 2)).astype(np.uint16),
            "link_depth": rng.uniform(0.5, 6, len(link_point)).astype(np.float16),
        }
        ends = np.cumsum([0, *(p for *_, p in samples)])
        infos = []
        for (name, split, points), start in zip(samples, ends[:-1], strict=True):
            linked = int(((link_point >= start) & (link_point < start + points)).sum())
            view = ViewInfo(id="frame-000002", links=linked)
            infos.append(SampleInfo(id=name, split=split, points=points, linked_points=linked, views=(view,)))
        broken = [BrokenView(sample=samples[0][0], view="frame-000004", error="truncated")] if n == 70 else []
        record = writer.commit_geometry(partition, infos, arrays, broken_views=broken, seconds=0.5)
        features = {}
        for vfm in (spec("half", "float16", 6), spec("eight", "int8", 9)):
            rows = rng.normal(size=(len(link_point), vfm.dim)).astype(np.float32)
            index = np.full(n, -1, np.int32)
            index[link_point] = np.arange(len(link_point))
            codec = make_codec(vfm.codec, vfm.dim)
            encoded = codec.encode(rows)
            writer.commit_features(vfm, record, encoded, index, images=1, seconds=0.25)
            features[vfm.name] = np.zeros((n, vfm.dim), np.float32)
            features[vfm.name][link_point] = codec.decode(encoded.table, encoded.scale)
        for (name, *_), start, end in zip(samples, ends[:-1], ends[1:], strict=True):
            for key in ("coord", "color", "normal", "segment", "instance", "source_index"):
                expected[f"{name}|{key}"] = arrays[key][start:end]
            expected[f"{name}|valid"] = np.isin(np.arange(start, end), link_point)
            for key, feature in features.items():
                expected[f"{name}|{key}"] = feature[start:end]
    np.savez_compressed(FOLDER / "v1.npz", **expected)


if __name__ == "__main__":
    main()
