"""What is fuzzed: every reader of files that come from elsewhere."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import corpora
from conftest import cache_metadata, feature_rows, geometry_arrays, vfm_spec, write_partition
from ditr_cache.arrays import array_infos, fill_group
from ditr_cache.codecs import make_codec
from ditr_cache.datasets.base import open_dataset
from ditr_cache.datasets.colmap import read_cameras, read_images
from ditr_cache.datasets.images import image_size, read_color, read_depth, read_ids
from ditr_cache.datasets.json_rows import check_ends, rows, rows_where
from ditr_cache.datasets.ply import read_ply
from ditr_cache.datasets.posed.classes import read_classes
from ditr_cache.datasets.posed.depth import depth_map_size, read_depth_map
from ditr_cache.datasets.posed.transforms import read_transforms
from ditr_cache.datasets.scannet.sens import open_sens
from ditr_cache.errors import CacheError
from ditr_cache.link import link_view
from ditr_cache.pointcloud.readers import open_cloud
from ditr_cache.schema import CacheMetadata, Document, FeatureRecord, GeometryRecord, LinkSettings, VFMSpec
from ditr_cache.store import CacheWriter, open_cache
from ditr_cache.weights import load_weights
from ditr_train.checkpoint import load_checkpoint
from ditr_train.foreign.files import read_public_file
from ditr_train.recipe_files import load_recipe, recipe_folders
from engine import Target
from layouts import nuscenes, posed, s3dis, scannet200, scannetpp, semantickitti, structured3d, waymo
from test_sens import sens_bytes

Array = NDArray[Any]
Maker = Callable[[Path], Iterator[Target]]

REMEDY = "get it again"


def all_targets(folder: Path, names: tuple[str, ...] = ("",)) -> list[Target]:
    """The targets whose names start with one of `names`; what they read and write lies below `folder`."""
    makers: dict[str, Maker] = {
        "cloud": _clouds, "mesh": _meshes, "sens": _sens, "image": _images, "document": _documents, "store": _stores,
        "store-values": _values, "rows": _tables, "transforms": _transforms, "depth": _depth_maps,
        "classes": _classes, "colmap": _colmap, "recipe": _recipes, "checkpoint": _checkpoints,
        **{f"dataset-{name}": partial(_dataset, name, write) for name, write in DATASETS.items()},
    }  # fmt: skip
    found: list[Target] = []
    for group, make in makers.items():
        if any(name.startswith(group) or group.startswith(name) for name in names):
            below = folder / group
            below.mkdir(parents=True)
            found += [target for target in make(below) if target.name.startswith(names)]
    return found


def _file_target(name: str, path: Path, corpus: list[bytes], read: Callable[[Path], object]) -> Target:
    """A target whose input is the content of one file."""

    def run(data: bytes) -> None:
        path.write_bytes(data)
        read(path)

    return Target(name, corpus, run)


def _clouds(folder: Path) -> Iterator[Target]:
    def read(path: Path) -> None:
        for labels in (False, True):
            for _ in open_cloud(path, labels=labels).chunks(16):
                pass

    for suffix, corpus in corpora.clouds(folder).items():
        yield _file_target(f"cloud{suffix}", folder / f"input{suffix}", corpus, read)


def _meshes(folder: Path) -> Iterator[Target]:
    yield _file_target("mesh.ply", folder / "input.ply", corpora.meshes(folder), read_ply)


def _sens(folder: Path) -> Iterator[Target]:
    def read(path: Path) -> None:
        sens = open_sens(path)
        for frame in range(min(2, len(sens))):
            sens.read_depth(frame)
            sens.read_color(frame)

    corpus = [sens_bytes(color=color, depth=depth, frames=2) for color in (1, 2) for depth in (0, 1)]
    yield _file_target("sens", folder / "input.sens", corpus, read)


def _images(folder: Path) -> Iterator[Target]:
    path = folder / "input.png"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        size = image_size(path)
        errors = []
        for read in (read_color, read_depth, read_ids):
            try:
                read(path, size=size, where="image")
            except CacheError as error:
                errors.append(error)
        if len(errors) == 3:
            raise errors[0]

    yield Target("image", corpora.images(), run, repair=corpora.with_right_sums)


def _small_cache(folder: Path) -> None:
    writer = CacheWriter.create(folder, cache_metadata())
    specs = (vfm_spec(), vfm_spec(name="other", codec="int8"))
    write_partition(writer, "scene", [("one", 30)], *specs)


def _documents(folder: Path) -> Iterator[Target]:
    _small_cache(folder / "cache")
    kinds: dict[type[Document], str] = {
        CacheMetadata: "cache.json", GeometryRecord: "geometry/scene.json", FeatureRecord: "features/*/scene.json",
        VFMSpec: "features/*/vfm.json",
    }  # fmt: skip
    for cls, pattern in kinds.items():
        corpus = [p.read_bytes() for p in sorted((folder / "cache").glob(pattern))]

        def run(data: bytes, cls: type[Document] = cls) -> None:
            document = cls.from_json(data, "here")
            assert cls.from_json(document.to_json(), "here") == document

        yield Target(f"document-{cls.__name__}", corpus, run, repair=corpora.signed)


def _stores(folder: Path) -> Iterator[Target]:
    """A whole cache, one file of which is another; records say its size, as a stranger's would."""
    _small_cache(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    choices = {
        "store-metadata": [f for f in files if f.name == "zarr.json"],
        "store-chunks": [f for f in files if "c" in f.relative_to(folder).parts],
        "store-documents": [f for f in files if f.suffix == ".json" and f.name != "zarr.json"],
    }
    for name, chosen in choices.items():

        def run(data: bytes, chosen: list[Path] = chosen) -> None:
            with _replaced(chosen[data[0] % len(chosen)], data[1:]):
                cache = open_cache(folder)
                for vfm in cache.vfms or (None,):
                    for sample in cache.samples:
                        cache.read(sample, vfm)

        corpus = [bytes([i]) + file.read_bytes() for i, file in enumerate(chosen)]
        repair = _signed_behind_first if name == "store-documents" else None
        yield Target(name, corpus, run, repair=repair, kept=1)


@contextlib.contextmanager
def _replaced(file: Path, content: bytes) -> Iterator[None]:
    """A file of a cache of other content, and the record of its partition with the size of that."""
    group = next((p for p in file.parents if p.name.endswith(".zarr")), None)
    record = None if group is None else group.with_suffix(".json")
    kept = [(p, p.read_bytes()) for p in (file, record) if p is not None]
    try:
        file.write_bytes(content)
        if group is not None and record is not None:
            body = json.loads(record.read_text())
            body["files"][file.relative_to(group).as_posix()] = len(content)
            body["checksums"] = {}  # as in records that are older than these: more of the decoders is reached
            record.write_bytes(corpora.signed(json.dumps(body).encode()))
        yield
    finally:
        for path, before in kept:
            path.write_bytes(before)


def _values(folder: Path) -> Iterator[Target]:
    """A cache whose arrays hold anything, under checksums and records that fit."""
    writer = CacheWriter.create(folder, cache_metadata())
    infos, arrays = geometry_arrays([("one", 30), ("two", 20)])
    links = len(arrays["link_point"])
    specs = (vfm_spec(), vfm_spec(name="every", codec="int8", layout="views", fuse="none"))
    record = writer.commit_geometry("scans", infos, arrays)
    groups: dict[str, dict[str, Array]] = {"geometry": arrays}
    for spec in specs:
        rows, index = feature_rows(record, arrays, spec)
        if spec.layout == "views":
            rows, index = np.ones((links, spec.dim), np.float32), np.arange(links, dtype=np.int32)
        encoded = make_codec(spec.codec, spec.dim).encode(rows)
        writer.commit_features(spec, record, encoded, index, images=1)
        scale = {} if encoded.scale is None else {"scale": encoded.scale}
        groups[f"features/{spec.key}"] = {"table": encoded.table, "index": index, **scale}
    places = [(group, name) for group in groups for name in sorted(groups[group])]

    def write(group: str, content: dict[str, Array], geometry_digest: str) -> str:
        below = folder / group / "scans.zarr"
        shutil.rmtree(below)
        below.mkdir()
        fill_group(below, content)
        path = folder / group / "scans.json"
        old = json.loads(path.read_text())
        files = {p.relative_to(below).as_posix(): p.stat().st_size for p in below.rglob("*") if p.is_file()}
        new = {**old, "files": files, "checksums": {}, "arrays": {k: vars(v) for k, v in array_infos(content).items()}}
        if group != "geometry":
            new["geometry_digest"] = geometry_digest
        path.write_bytes(corpora.signed(json.dumps(new).encode()))
        return GeometryRecord.from_json(path.read_bytes(), group).digest if group == "geometry" else geometry_digest

    def run(data: bytes) -> None:
        group, name = places[data[0] % len(places)]
        old = groups[group][name]
        content = data[1 : 1 + old.nbytes].ljust(old.nbytes, b"\xff")
        digest = write("geometry", groups["geometry"], "")
        for other in groups:
            changed = {name: np.frombuffer(content, old.dtype).reshape(old.shape)} if other == group else {}
            digest = write(other, {**groups[other], **changed}, digest)
        cache = open_cache(folder)
        for spec in specs:
            for sample in cache.samples:
                cache.read(sample, spec.key)
                for view in (None, "random", "nearest") if spec.layout == "views" else (None,):
                    cache.read_stored(sample, spec.key, view=view, rng=np.random.default_rng(0))

    corpus = [bytes([i]) + groups[group][name].tobytes() for i, (group, name) in enumerate(places)]
    yield Target("store-values", corpus, run, kept=1)


def _signed_behind_first(data: bytes) -> bytes:
    return data[:1] + corpora.signed(data[1:])


def _tables(folder: Path) -> Iterator[Target]:
    table = [{"token": f"{i:04x}", "next": "", "is_key_frame": i % 2 == 0, "n": i} for i in range(8)]
    corpus = [json.dumps(table).encode(), json.dumps(table, indent=0).encode(), b"[]"]

    def read(path: Path) -> None:
        check_ends(path, REMEDY)
        searched = list(rows_where(path, "token", {"0001", "0003"}, REMEDY))
        assert searched == [r for r in rows(path, REMEDY) if r.get("token") in ("0001", "0003")]
        list(rows_where(path, "is_key_frame", True, REMEDY))

    yield _file_target("rows", folder / "table.json", corpus, read)


def _transforms(folder: Path) -> Iterator[Target]:
    for kind in ("nerfstudio", "ngp"):
        root = folder / kind
        posed.write(root, kind=kind, depth=True, model="OPENCV")
        path = next(root.rglob("transforms.json"))

        def read(path: Path) -> None:
            read_transforms(path.parent, path.parent, depth=True, depth_unit=1e-3)

        yield _file_target(f"transforms-{kind}", path, [path.read_bytes()], read)


def _depth_maps(folder: Path) -> Iterator[Target]:
    for suffix, corpus in corpora.depth_maps(folder).items():

        def read_depth_file(path: Path) -> None:
            read_depth_map(path, size=depth_map_size(path), unit=1.0)

        yield _file_target(f"depth{suffix}", folder / f"depth-input{suffix}", corpus, read_depth_file)


def _classes(folder: Path) -> Iterator[Target]:
    classes = {
        ".txt": [b"wall 1 2 3\nfloor\n"],
        ".json": [b'[{"id": 3, "name": "wall", "color": [1, 2, 3]}, {"id": 4, "name": "x"}]', b'{"0": "wall"}'],
    }
    for suffix, corpus in classes.items():
        yield _file_target(f"classes{suffix}", folder / f"classes{suffix}", corpus, read_classes)


def _colmap(folder: Path) -> Iterator[Target]:
    for suffix, binary in ((".bin", True), (".txt", False)):
        root = folder / suffix[1:]
        posed.write(root, kind="colmap", binary=binary)
        models = sorted(p.parent for p in root.rglob(f"images{suffix}"))
        model = models[0]
        for kind, read in (("cameras", read_cameras), ("images", read_images)):

            def whole(path: Path, read: Callable[[Path], object] = read) -> None:
                list(read(path.parent))  # type: ignore[call-overload]

            yield _file_target(
                f"colmap-{kind}{suffix}", model / f"{kind}{suffix}", [(model / f"{kind}{suffix}").read_bytes()], whole
            )


def _recipes(folder: Path) -> Iterator[Target]:
    paths = sorted(p for p in recipe_folders()[0].rglob("*.yaml") if not p.stem.startswith("base"))
    recipes = [p.read_bytes() for p in paths[::4]]

    def read_recipe(path: Path) -> None:
        load_recipe(str(path))

    # As if beside the others: `extends` names them.
    yield _file_target("recipe", folder / "recipe.yaml", recipes, read_recipe)


def _checkpoints(folder: Path) -> Iterator[Target]:
    saved = folder / "saved.pt"
    torch.save({"format_version": 1, "model": {"a.weight": torch.ones(3, 2), "b": torch.zeros(4).half()}}, saved)
    whole = [saved.read_bytes()]
    yield _file_target("checkpoint-own", folder / "last.pt", whole, load_checkpoint)
    network = torch.nn.Linear(2, 3)
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, saved)
    weights = [saved.read_bytes()]
    yield _file_target("checkpoint-public", folder / "public.pth", weights, read_public_file)
    yield _file_target("checkpoint-vfm", folder / "vfm.pt", weights, lambda path: load_weights(network, "linear", path))


# --- whole datasets -------------------------------------------------------------------------------------------------

MAX_FILE = 1 << 21
"""Files of a dataset that are mutated: of the larger ones, too much time would go into copying."""


DATASETS: dict[str, Callable[[Path], object]] = {
    "nuscenes": nuscenes.write,
    "posed": lambda root: posed.write(root, depth=True),
    "s3dis": lambda root: s3dis.write(root, areas=(5,), size=64, count=300),
    "scannet200": scannet200.write,
    "scannetpp": lambda root: scannetpp.write(root, iphone=False),
    "semantickitti": lambda root: semantickitti.write(root, scans=1, azimuths=20, image_scale=0.1),
    "structured3d": lambda root: structured3d.write(root, size=(64, 36), panorama_size=(64, 32), points=300),
    "waymo": lambda root: waymo.write(root, splits=("training",), image_scale=0.05),
}


def _dataset(name: str, write: Callable[[Path], object], folder: Path) -> Iterator[Target]:
    """A release with one file changed, opened and read as `extract` does."""
    root = folder / "release"
    write(root)
    if name == "s3dis":
        root = next(p for p in (root / "aligned", root) if p.is_dir())
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.stat().st_size <= MAX_FILE)
    content = [p.read_bytes() for p in files]

    def run(data: bytes) -> None:
        number = int.from_bytes(data[:2], "big") % len(files)
        files[number].write_bytes(data[2:])
        try:
            _read_some(name, root)
        finally:
            files[number].write_bytes(content[number])

    # Kinds of files, not files, are equally likely: there are many images.
    kinds: dict[str, list[bytes]] = {}
    for i, (path, data) in enumerate(zip(files, content, strict=True)):
        kinds.setdefault(path.suffix or path.name, []).append(i.to_bytes(2, "big") + data)
    corpus = [data for group in kinds.values() for data in (group * 12)[: max(12, min(len(group), 24))]]
    yield Target(f"dataset-{name}", corpus, run, repair=_repaired_behind_second, kept=2)


def _repaired_behind_second(data: bytes) -> bytes:
    return data[:2] + corpora.with_right_sums(data[2:])


def _read_some(name: str, root: Path) -> None:
    dataset = open_dataset(name, root)
    ids = [sample for split in dataset.splits for sample in dataset.sample_ids(split)[:1]]
    errors: list[CacheError] = []
    for sample_id in ids[:2]:
        try:
            _read_sample(dataset.read(sample_id), errors)
        except CacheError as error:
            errors.append(error)


def _read_sample(sample: object, errors: list[CacheError]) -> None:
    points = sample.load_points()  # type: ignore[attr-defined]
    coord = points.coord[:500].astype(np.float32)
    for view in sample.views[:2]:  # type: ignore[attr-defined]
        try:
            with np.errstate(over="ignore"):  # depths beyond float16 become infinite
                link_view(coord, view, LinkSettings(), spacing=0.05, order=np.arange(len(coord)))
            view.load_image()
        except CacheError as error:
            errors.append(error)
