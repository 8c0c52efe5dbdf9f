"""Whatever must change the identity of features or geometry does, and what would mix the two is refused or rebuilt.

Every row is a change made for real: a cache is extracted, one thing is changed, and it is extracted again into the same
cache. What must not change an identity is in `test_identity_invariants`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ditr_cache.datasets.base import dataset_class
from ditr_cache.errors import MismatchError
from ditr_cache.partition import ExtractSettings
from ditr_cache.schema import PROJECTION_VERSION, VFMSpec
from ditr_cache.store import CacheWriter, open_cache
from ditr_cache.verify import verify
from ditr_cache.vfm import FrozenVFM
from identity_runs import (
    ROOMS,
    change_mesh,
    change_number,
    geometry_digests,
    identities,
    run,
    settings_of,
    write_rooms,
)

CHANGED = ROOMS[0]
"""The room that changes of the dataset alter; the other stays."""

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class World:
    """A dataset, weights, and a cache that was made of them, of two VFMs: one fuses by `mean`, one takes the `last`."""

    root: Path
    checkpoint: Path
    cache: Path
    mean: str
    last: str


@pytest.fixture(scope="module")
def original(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("original")
    root, cache, checkpoint = write_rooms(folder / "rooms"), folder / "cache", make_checkpoint()
    for fuse in ("mean", "last"):
        totals = run(settings_of(root, cache, checkpoint, fuse=fuse))
        assert totals.partitions == {"done": 2, "reused": 0, "failed": 0}
    keys = {spec.fuse: key for key, spec in open_cache(cache).vfms.items()}
    return World(root, checkpoint, cache, **keys)


@pytest.fixture
def world(original: World, tmp_path: Path) -> World:
    """A copy, to be changed."""
    return replace(
        original,
        root=shutil.copytree(original.root, tmp_path / "rooms"),
        cache=shutil.copytree(original.cache, tmp_path / "cache"),
    )


# --- the VFM --------------------------------------------------------------------------------------------------------


def save_changed(checkpoint: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    import torch

    state = torch.load(checkpoint, weights_only=True)
    change(state)
    torch.save(state, folder / "changed.pt")
    return folder / "changed.pt"


def flip_one_bit(world: World, folder: Path, patch: Patch) -> dict[str, Any]:
    import torch

    def flip(state: dict[str, Any]) -> None:
        state["blocks.2.mlp.fc1.weight"].view(torch.int32)[5, 7] ^= 1

    return {"checkpoint": str(save_changed(world.checkpoint, folder, flip))}


def tap_one_block_earlier(world: World, folder: Path, patch: Patch) -> dict[str, Any]:
    import timm

    create = timm.create_model

    def shorter(*arguments: Any, **options: Any) -> Any:
        model = create(*arguments, **options)
        model.feature_info = model.feature_info[:-1]
        return model

    patch.setattr(timm, "create_model", shorter)
    return {}


def leave_out_the_norm(world: World, folder: Path, patch: Patch) -> dict[str, Any]:
    begin = FrozenVFM.__init__

    def without(self: FrozenVFM, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        self.spec = replace(self.spec, norm=False)

    patch.setattr(FrozenVFM, "__init__", without)
    return {}


def preprocess_with(changes: dict[str, Any], world: World, folder: Path, patch: Patch) -> dict[str, Any]:
    import timm

    resolve = timm.data.resolve_data_config
    patch.setattr(timm.data, "resolve_data_config", lambda *a, **o: {**resolve(*a, **o), **changes})
    return {}


def halve_the_patch(world: World, folder: Path, patch: Patch) -> dict[str, Any]:
    import timm

    def halve(state: dict[str, Any]) -> None:
        state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][..., ::2, ::2].clone()

    patch.setattr(timm, "create_model", partial(timm.create_model, patch_size=8, img_size=80))
    return {"checkpoint": str(save_changed(world.checkpoint, folder, halve))}


def with_settings(changes: dict[str, Any], world: World, folder: Path, patch: Patch) -> dict[str, Any]:
    return changes


@dataclass(frozen=True)
class Row:
    """One change: what it does, the fields of the spec that must differ, and whether rows of features do for sure."""

    change: Callable[[World, Path, Patch], dict[str, Any]]
    fields: set[str]
    seen: bool = True


VFM_ROWS = {
    "one weight bit": Row(flip_one_bit, {"weights_sha256"}, seen=False),  # too small a change for float16
    "tap": Row(tap_one_block_earlier, {"tap"}),
    "norm": Row(leave_out_the_norm, {"norm"}),
    "mean": Row(partial(preprocess_with, {"mean": (0.5, 0.5, 0.4)}), {"mean"}),
    "std": Row(partial(preprocess_with, {"std": (0.5, 0.6, 0.5)}), {"std"}),
    "size": Row(partial(with_settings, {"image_size": (48, 48)}), {"image_size", "grid"}),
    "patch": Row(halve_the_patch, {"weights_sha256", "grid"}),
    "layout": Row(partial(with_settings, {"layout": "views"}), {"layout", "fuse"}),
    "fuse": Row(partial(with_settings, {"fuse": "nearest"}), {"fuse"}),
    "codec": Row(partial(with_settings, {"codec": "int8"}), {"codec"}),
    "fitted codec": Row(
        partial(with_settings, {"codec": "pca8-int8"}), {"codec", "codec_digest", "explained_variance"}
    ),
    # Resized images only: the image's own size is that of the network elsewhere.
    "interpolation": Row(partial(preprocess_with, {"interpolation": "bilinear"}), {"interpolation"}),
}


def differing(a: VFMSpec, b: VFMSpec) -> set[str]:
    one, other = asdict(a), asdict(b)
    return {name for name in one if one[name] != other[name]}


@pytest.mark.parametrize("name", VFM_ROWS)
def test_another_vfm_gets_a_key_beside_and_is_never_taken_for_the_first(
    world: World, tmp_path: Path, monkeypatch: Patch, name: str
) -> None:
    row = VFM_ROWS[name]
    first = settings_of(world.root, world.cache, world.checkpoint)
    if name == "interpolation":
        first = replace(first, vfm=replace(first.vfm, image_size=(48, 48)))
        run(first)
    vfms = open_cache(world.cache).vfms
    (key,) = {k for k, s in vfms.items() if (s.image_size, s.fuse) == (first.vfm.image_size, "mean")}
    before = identities(world.cache, key)
    with monkeypatch.context() as patch:
        changes = row.change(world, tmp_path, patch)
        vfm = {n: v for n, v in changes.items() if n in first.vfm.__dataclass_fields__}
        rest = {n: v for n, v in changes.items() if n not in vfm}
        totals = run(replace(first, vfm=replace(first.vfm, **vfm), **rest))

    # A key of its own, on the same geometry, and the first VFM's features stay what they were.
    assert (totals.partitions["done"], totals.geometry) == (2, {"computed": 0, "reused": 2})
    cache = open_cache(world.cache)
    (other,) = cache.vfms.keys() - vfms.keys()
    assert differing(cache.vfms[key], cache.vfms[other]) == row.fields
    assert identities(world.cache, key) == before
    tables = [cache.feature_record(cache.vfms[k], CHANGED).arrays["table"] for k in (key, other)]
    assert not row.seen or tables[0] != tables[1]

    # Its partitions in the first one's place: no reader takes them, verify finds them, extract makes them again.
    features = world.cache / "features"
    for path in (features / other).iterdir():
        if path.name not in ("vfm.json", "codec.json"):
            target = features / key / path.name
            (shutil.rmtree if target.is_dir() else Path.unlink)(target)
            (shutil.copytree if path.is_dir() else shutil.copy)(path, target)
    with pytest.raises(MismatchError, match="features of another VFM"):
        open_cache(world.cache).read(CHANGED, key)
    assert len(verify(world.cache).mismatched) == 2
    totals = run(first)
    assert totals.partitions == {"done": 2, "reused": 0, "failed": 0}
    assert identities(world.cache, key) == before and verify(world.cache).clean


def test_another_network_gets_a_key_beside(world: World, make_checkpoint: Callable[..., Path]) -> None:
    before = identities(world.cache)
    checkpoint = make_checkpoint("test_efficientnet")
    totals = run(settings_of(world.root, world.cache, checkpoint, name="test_efficientnet"))
    assert totals.geometry == {"computed": 0, "reused": 2}
    assert identities(world.cache, world.mean, world.last) == before and len(open_cache(world.cache).vfms) == 3


def test_another_version_of_the_projection_is_refused(world: World, tmp_path: Path, monkeypatch: Patch) -> None:
    """It would be named in the key of features that were lifted through links of the old one."""
    before = identities(world.cache)
    complete, commit = ExtractSettings.complete_spec, CacheWriter.commit_geometry
    with monkeypatch.context() as newer:
        version = PROJECTION_VERSION + 1
        newer.setattr(
            ExtractSettings, "complete_spec", lambda s, spec: replace(complete(s, spec), projection_version=version)
        )
        newer.setattr(CacheWriter, "commit_geometry", lambda *a, **o: commit(*a, **o, projection_version=version))
        expected = f"made by projection version {PROJECTION_VERSION}, expected {version} .* another --out"
        with pytest.raises(MismatchError, match=expected):
            run(settings_of(world.root, world.cache, world.checkpoint))
        assert identities(world.cache) == before
        settings = settings_of(world.root, tmp_path / "new", world.checkpoint)
        assert run(settings).partitions["done"] == 2
        assert run(settings).partitions["reused"] == 2
    assert world.mean not in open_cache(tmp_path / "new").vfms
    with pytest.raises(MismatchError, match=f"made by projection version {version}, expected {PROJECTION_VERSION} "):
        run(settings)


# --- what all partitions have in common -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("every_nth_frame", 2),
        ("max_views", 1),
        ("occlusion_tolerance", 0.1),
        ("depth_min", 0.3),
        ("depth_max", 3.0),
        ("occlusion", "none"),
    ],
)
def test_other_links_are_refused(world: World, setting: str, value: Any) -> None:
    before = identities(world.cache)
    with pytest.raises(MismatchError, match=rf"links\.{setting}: the cache has .*, asked for {value!r}"):
        run(settings_of(world.root, world.cache, world.checkpoint), links={setting: value})
    assert identities(world.cache) == before


@pytest.mark.parametrize("part", ["name", "color", "order"])
def test_other_classes_are_refused(world: World, monkeypatch: Patch, part: str) -> None:
    rooms = dataset_class("rooms")
    table = dict(rooms.class_table)
    first, second = list(table)[:2]
    if part == "order":
        table[first], table[second] = table[second], table[first]
    else:
        table[first] = replace(table[first], **{part: {"name": "carpet", "color": (1, 2, 3)}[part]})
    monkeypatch.setattr(rooms, "class_table", table)
    with pytest.raises(MismatchError, match="class_colors" if part == "color" else "class_names"):
        run(settings_of(world.root, world.cache, world.checkpoint))


# --- the data under a cache -----------------------------------------------------------------------------------------


def scan(root: Path) -> Path:
    return root / "scans" / CHANGED


def change_color_camera(root: Path) -> None:
    change_number(scan(root) / "intrinsic/intrinsic_color.txt", 0, 2, 1.0)


def change_depth_camera(root: Path) -> None:
    change_number(scan(root) / "intrinsic/intrinsic_depth.txt", 0, 0, 1.0)


def change_pose(root: Path) -> None:
    change_number(scan(root) / "pose/0.txt", 2, 3, 0.01)


def change_split(root: Path) -> None:
    train, val = (root / f"scannetv2_{split}.txt" for split in ("train", "val"))
    here, there = (train, val) if CHANGED in train.read_text() else (val, train)
    there.write_text(there.read_text() + here.read_text())
    here.write_text("")


def change_order(root: Path) -> None:
    def permute(vertices: dict[str, Any], faces: Any) -> tuple[dict[str, Any], Any]:
        order = np.random.default_rng(0).permutation(len(vertices["x"]))
        return {name: column[order] for name, column in vertices.items()}, np.argsort(order).astype(np.int32)[faces]

    change_mesh(root, CHANGED, permute)


def change_column(name: str, by: float, root: Path) -> None:
    def change(vertices: dict[str, Any], faces: Any) -> tuple[dict[str, Any], Any]:
        if name == "label" and name in vertices:
            vertices[name][3] = next(x for x in np.unique(vertices[name]) if x not in (0, vertices[name][3]))
        elif name in vertices:
            vertices[name][3] = vertices[name][3] + by if by < 1 else vertices[name][3] ^ int(by)
        return vertices, faces

    change_mesh(root, CHANGED, change)


def change_depth(root: Path) -> None:
    path = scan(root) / "depth/0.png"
    depth = np.asarray(Image.open(path)).copy()
    depth[: len(depth) // 2] = 0
    Image.fromarray(depth).save(path)


CALIBRATION_ROWS = {
    "intrinsics": (change_color_camera, "view '0' of sample '{}'.* linked with another camera than"),
    "depth intrinsics": (change_depth_camera, "view '0' of sample '{}'.* linked with another depth camera than"),
    "pose": (change_pose, "view '0' of sample '{}': .* linked with another pose than"),
    "split": (change_split, "sample '{}': its geometry in the cache is of split .* now"),
}
"""Row -> (change, what the error says of which sample)."""

DATA_ROWS = {
    "point order": change_order,
    "coordinates": partial(change_column, "x", 0.05),
    "colour": partial(change_column, "red", 128),
    "labels": partial(change_column, "label", 0),
    "depth map": change_depth,
}
EVERY_ROW = {name: change for name, (change, _) in CALIBRATION_ROWS.items()} | DATA_ROWS


@pytest.mark.parametrize("name", CALIBRATION_ROWS)
def test_a_second_vfm_is_refused_on_another_calibration(world: World, name: str) -> None:
    change, message = CALIBRATION_ROWS[name]
    backup = shutil.copytree(world.root, world.root.with_name("backup"))
    before = identities(world.cache, world.mean, world.last)
    change(world.root)
    second = settings_of(world.root, world.cache, world.checkpoint, fuse="nearest")
    totals = run(second)
    # The room that changed is refused, the other goes on, and what was there stays.
    assert (totals.partitions["done"], totals.partitions["failed"]) == (1, 1)
    (failure,) = totals.failures
    assert failure.sample == CHANGED
    assert re.search(message.format(CHANGED), failure.error) and "another --out" in failure.error
    assert identities(world.cache, world.mean, world.last) == before
    cache = open_cache(world.cache)
    (other,) = cache.vfms.keys() - {world.mean, world.last}
    assert cache.samples_with(other) == [ROOMS[1]]
    # With the old data back the run goes on.
    totals = run(replace(second, root=str(backup)))
    assert totals.partitions == {"done": 1, "reused": 1, "failed": 0}


@pytest.mark.parametrize("name", DATA_ROWS)
def test_a_second_vfm_belongs_to_the_points_of_the_cache(world: World, name: str) -> None:
    """Points are not read again: those of the cache, with the features of both VFMs, stay as they were."""
    before = identities(world.cache, world.mean, world.last)
    DATA_ROWS[name](world.root)
    second = settings_of(world.root, world.cache, world.checkpoint, fuse="nearest")
    assert run(second).partitions == {"done": 2, "reused": 0, "failed": 0}
    assert identities(world.cache, world.mean, world.last) == before


SOURCE_ROWS = {
    "point order": "another coord of|another source_index of",
    "coordinates": "another coord of|another source_index of",
    "colour": "another color of 1 of",
    "labels": "another segment of 1 of",
} | {name: message for name, (_, message) in CALIBRATION_ROWS.items()}
"""Row -> what `verify --root` says of the room that changed; nothing of depth maps is stored."""


@pytest.mark.parametrize("name", SOURCE_ROWS)
def test_a_changed_dataset_is_found_and_its_partition_made_anew(world: World, name: str) -> None:
    """Also where everything is committed, so that a run would open nothing."""
    first = settings_of(world.root, world.cache, world.checkpoint, fuse="mean")
    assert verify(world.cache, root=world.root).clean
    EVERY_ROW[name](world.root)
    assert run(first).partitions == {"done": 0, "reused": 2, "failed": 0}
    assert verify(world.cache).clean
    report = verify(world.cache, root=world.root, repair=True)
    assert report.mismatched == [f"geometry/{CHANGED}"] and not report.not_compared
    assert re.search(SOURCE_ROWS[name].format(CHANGED), report.reasons[f"geometry/{CHANGED}"])
    assert report.missing == [f"features/{key}/{CHANGED}" for key in sorted((world.mean, world.last))]
    assert run(first).partitions == {"done": 1, "reused": 1, "failed": 0}
    assert verify(world.cache, root=world.root).clean


@pytest.mark.parametrize("name", EVERY_ROW)
def test_features_of_the_old_geometry_are_refused_and_rebuilt(world: World, tmp_path: Path, name: str) -> None:
    """Geometry made again, as the error says, from changed data: the features of it are outdated, and no others."""
    first = settings_of(world.root, world.cache, world.checkpoint, fuse="mean")
    second = replace(first, fuse="last")
    old = geometry_digests(world.cache)
    EVERY_ROW[name](world.root)
    (world.cache / "geometry" / f"{CHANGED}.json").unlink()
    totals = run(first)
    assert totals.partitions == {"done": 1, "reused": 1, "failed": 0}
    assert totals.geometry == {"computed": 1, "reused": 1}
    new = geometry_digests(world.cache)
    assert {partition for partition in old if old[partition] != new[partition]} == {CHANGED}

    cache = open_cache(world.cache)
    assert cache.read(CHANGED, world.mean).valid.any() and cache.read(ROOMS[1], world.last).valid.any()
    with pytest.raises(MismatchError, match="features of another geometry"):
        cache.read(CHANGED, world.last)
    with pytest.raises(MismatchError, match="features of another geometry"):
        cache.samples_with(world.last)
    assert verify(world.cache).mismatched == [f"features/{world.last}/{CHANGED}"]
    assert run(second).partitions == {"done": 1, "reused": 1, "failed": 0}
    assert verify(world.cache).clean
    run(replace(second, cache=str(tmp_path / "clean")))
    assert identities(world.cache, world.last) == identities(tmp_path / "clean", world.last)
