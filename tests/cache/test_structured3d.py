"""Structured3D: the release as `layouts/structured3d.py` writes it, read, judged, and with faults planted."""

from __future__ import annotations

import logging
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy.spatial import cKDTree

import layouts.structured3d as release
from dataset_runs import Extracted, run_dataset
from ditr_cache.datasets import open_dataset
from ditr_cache.datasets.fusion import first_of_voxels
from ditr_cache.datasets.images import read_ids
from ditr_cache.datasets.structured3d import dataset as reader
from ditr_cache.datasets.structured3d import renderings
from ditr_cache.datasets.structured3d.dataset import Structured3DDataset
from ditr_cache.errors import DataError, MissingDataError, UnknownNameError, UsageError
from ditr_cache.sample import Points
from world import Eye, Truth, World

WORLD = World()
GRIDS = {"perspective": (12, 16), "panorama": (24, 48), "both": (24, 48)}
EVERYWHERE = {"depth_min": 0.1, "depth_max": 20.0}  # the judge knows of no depth range
COARSE = 0.06  # metres, of voxels: enough points for the judge, in little time
LIVING, NO_PERSPECTIVES, KITCHEN, TEST_ROOM = (room.name for room in release.ROOMS)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Truth]]:
    root = tmp_path_factory.mktemp("structured3d") / "release"
    return root, release.write(root, size=(256, 144))


@pytest.fixture(scope="module")
def extracted(
    written: tuple[Path, list[Truth]], position_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Extracted]:
    """The whole release, extracted once for each value of the option `views`."""
    made: dict[str, Extracted] = {}

    def of(views: str) -> Extracted:
        if views not in made:
            out = tmp_path_factory.mktemp("structured3d") / views
            made[views] = extract(written[0], out, position_checkpoint, views)
        return made[views]

    return of


def extract(root: Path, out: Path, checkpoint: Path, views: str, **settings: object) -> Extracted:
    options = {"views": views, "voxel_size": COARSE}
    return run_dataset("structured3d", root, out, checkpoint, grid=GRIDS[views], options=options, links=EVERYWHERE,
                       **settings)  # type: ignore[arg-type]  # fmt: skip


def truth_of(run: Extracted, truth: Truth, views: str) -> Truth:
    """The truth of the points that the reader made, and of the cameras that give features."""
    sample = run.sample(truth.sample_id)
    coord = np.empty_like(sample.coord)
    coord[sample.source_index.astype(int)] = sample.coord
    eyes = {
        name: without_poles(eye, GRIDS[views][0]) if name.startswith("panorama") else eye
        for name, eye in truth.eyes.items()
        if views == "both" or name.startswith(views)
    }
    return replace(release.truth_at(truth, coord, WORLD), eyes=eyes, label=None)


def without_poles(eye: Eye, rows: int) -> Eye:
    """A panorama whose uppermost and lowest patches show nothing for sure.

    Around a pole a patch is a wedge of a degree: 8 bits of colour do not tell the place in it from its neighbours.
    """

    def to_pixel(p: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        u, v, seen = eye.to_pixel(p)
        patch = eye.height / rows
        return u, np.where(v < patch, -0.5, np.where(v > eye.height - patch, eye.height + 0.5, v)), seen

    return replace(eye, to_pixel=to_pixel)


def features_right(run: Extracted, truth: Truth, views: str) -> bool:
    return run.report(truth_of(run, truth, views), WORLD).right()


def channels_right(run: Extracted, truth: Truth) -> bool:
    """Whether points lie on surfaces, and say what these are there."""
    sample, true = run.sample(truth.sample_id), truth_of(run, truth, "both")
    order = sample.source_index.astype(int)
    certain = true.channels["certain"][order]
    names = np.array([*run.cache.metadata.class_names, ""])
    label = release.truth_at(truth, sample.coord, WORLD).label
    assert label is not None
    if certain.mean() < 0.98 or (names[sample.segment] != label)[certain].any():
        return False
    color = true.channels["color"][order].astype(int)
    if sample.color is None or sample.normal is None or sample.instance is None:
        return False
    if np.abs(sample.color.astype(int) - color)[certain].max() > 2:
        return False
    cosine = np.abs((sample.normal.astype(float) * true.channels["normal"][order]).sum(axis=1))[certain]
    # Near an edge a normal is of both surfaces.
    return bool(
        np.quantile(cosine, 0.1) > 0.99 and (sample.instance == true.channels["instance"][order])[certain].all()
    )


# --- the release as it is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", GRIDS)
def test_features_lie_within_half_a_patch(
    views: str, extracted: Callable[[str], Extracted], written: tuple[Path, list[Truth]]
) -> None:
    run = extracted(views)
    for truth in written[1]:
        if views == "perspective" and truth.sample_id == NO_PERSPECTIVES:
            continue
        report = run.report(truth_of(run, truth, views), WORLD)
        assert report.right(at_least=1000), (truth.sample_id, report)
        assert views == "both" or truth.sample_id == NO_PERSPECTIVES or report.hidden > 500


def test_points_say_what_is_there(extracted: Callable[[str], Extracted], written: tuple[Path, list[Truth]]) -> None:
    run = extracted("perspective")
    for truth in written[1]:
        assert channels_right(run, truth), truth.sample_id
        sample, info = run.sample(truth.sample_id), run.cache.sample_info(truth.sample_id)
        assert info.split == truth.split
        cells = np.floor(sample.coord.astype(np.float64) / COARSE)
        assert len(np.unique(cells, axis=0)) > 0.995 * len(cells)
        assert (sample.segment == -1).any()


def test_every_visible_surface_has_points(
    extracted: Callable[[str], Extracted], written: tuple[Path, list[Truth]]
) -> None:
    """Perspectives and panorama together: also of what the views that get features do not see."""
    run = extracted("perspective")
    for truth in written[1]:
        tree = cKDTree(run.sample(truth.sample_id).coord)
        seen = np.zeros(len(truth.world), dtype=bool)
        for eye in truth.eyes.values():
            u, v, inside = eye.project(truth.world)
            rays = truth.world - eye.origin
            surface, distance = WORLD.cast(eye.origin, rays)
            normal = np.array([np.ptp(corners, axis=0) == 0 for _, corners in WORLD.quads()], dtype=float)[surface]
            length = np.linalg.norm(rays, axis=1)
            facing = np.abs((rays * normal).sum(axis=1)) > 0.3 * length
            border = (u > 4) & (u < eye.width - 4) & (v > 4) & (v < eye.height - 4)
            seen |= inside & border & (distance > 1 - 1e-4) & facing & (length < 3)
        away, _ = tree.query(truth.coord[seen])
        assert seen.sum() > 1000 and np.quantile(away, 0.95) < COARSE and away.max() < 0.15


def test_a_room_without_perspectives_has_coverage_0_and_says_so(extracted: Callable[[str], Extracted]) -> None:
    run = extracted("perspective")
    sample = run.sample(NO_PERSPECTIVES)
    assert len(sample.coord) > 10_000 and (sample.valid is None or not sample.valid.any())
    failures = run.totals.failures
    assert {failure.sample for failure in failures} == {NO_PERSPECTIVES}
    text = " ".join(failure.error for failure in failures)
    assert "kept with coverage 0" in text and "no perspective renderings" in text
    assert "unpack Structured3D_perspective_full_00.zip again" in text and "--option views=both" in text
    assert not extracted("both").totals.failures
    assert extracted("both").sample(NO_PERSPECTIVES).valid.mean() > 0.9


def test_classes_and_colours_are_the_benchmarks(written: tuple[Path, list[Truth]]) -> None:
    classes = Structured3DDataset(written[0]).classes
    assert [c.name for c in classes] == list(release.CLASSES25.values())
    assert [c.color for c in classes] == [release.PALETTE[i] for i in release.CLASSES25]
    recipe = yaml.safe_load((Path(__file__).parents[2] / "pipelines/structured3d/base.yaml").read_text())
    assert recipe["classes"] == [c.name for c in classes] and recipe["dataset"] == Structured3DDataset.name


def test_splits_leave_out_what_is_invalid_or_has_no_images(written: tuple[Path, list[Truth]]) -> None:
    root, truths = written
    dataset = Structured3DDataset(root)
    assert dataset.splits == ("train", "val", "test")
    for split in dataset.splits:
        assert list(dataset.sample_ids(split)) == sorted(t.sample_id for t in truths if t.split == split)
    for scene, room in (*release.ERRATA, release.NOT_DOWNLOADED):
        assert (root / "Structured3D" / scene / "2D_rendering" / room).is_dir()
        with pytest.raises(UnknownNameError, match="unknown sample"):
            dataset.read(f"{scene}_room_{room}")
    with pytest.raises(UnknownNameError, match="did you mean 'train'"):
        dataset.sample_ids("training")
    assert dataset.sequence(LIVING) == "scene_00000"


def test_the_errata_are_the_authors() -> None:
    lines = reader._errata()
    assert len(lines) == 96 and sum("_room_" not in line for line in lines) == 6
    assert {"scene_01155", "scene_03398", "scene_00010_room_846619"} <= lines


@pytest.mark.parametrize("fault", ["scene", "room"])
def test_errata_that_are_forgotten_are_noticed(
    fault: str, written: tuple[Path, list[Truth]], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {line for line in reader._errata() if ("_room_" in line) == (fault == "scene")}
    monkeypatch.setattr(reader, "_errata", lambda: known)
    dataset = Structured3DDataset(written[0])
    assert sorted(i for s in dataset.splits for i in dataset.sample_ids(s)) != sorted(t.sample_id for t in written[1])


def test_defaults_are_the_published_recipe() -> None:
    defaults = Structured3DDataset.defaults
    assert [14 * n for n in defaults.grid] == [350, 630] and defaults.layout == "views"
    links = defaults.links
    assert (links.depth_min, links.depth_max, links.occlusion_tolerance, links.occlusion) == (1.0, 4.0, 0.2, "auto")
    assert all(need.download.startswith("Structured3D_") for need in Structured3DDataset.needs)


# --- variants of the release ------------------------------------------------------------------------------------------

HOUSE = "Structured3D/scene_03120"
TINY = {"size": (96, 54), "panorama_size": (96, 48), "points": 40}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Small images of the release, written once for each variant; not to be changed."""
    folder, made = tmp_path_factory.mktemp("structured3d-tiny"), {}

    def write(**variant: object) -> Path:
        key = repr(sorted(variant.items()))
        if key not in made:
            made[key] = folder / str(len(made))
            release.write(made[key], **TINY, **variant)  # type: ignore[arg-type]
        return made[key]

    return write


@pytest.fixture
def copy(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """The house with the kitchen, in small images, that a test may spoil."""
    unread = shutil.ignore_patterns("empty", "simple", "830640", "albedo.png", "normal.png", "layout.*")
    shutil.copytree(tiny() / HOUSE, tmp_path / "release" / HOUSE, ignore=unread)
    return tmp_path / "release"


def all_ids(dataset: Structured3DDataset) -> list[str]:
    return [i for split in dataset.splits for i in dataset.sample_ids(split)]


def same(a: Points, b: Points, but: tuple[str, ...] = ()) -> bool:
    names = [n for n in ("coord", "color", "normal", "segment", "instance") if n not in but]
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names)


def test_downloads_may_be_unpacked_each_into_its_own_folder(tiny: Callable[..., Path]) -> None:
    merged, apart = Structured3DDataset(tiny()), Structured3DDataset(tiny(packing="apart"))
    inner = Structured3DDataset(tiny() / "Structured3D")
    assert all_ids(merged) == all_ids(apart) == all_ids(inner)
    for sample_id in all_ids(merged):
        samples = [dataset.read(sample_id) for dataset in (merged, apart, inner)]
        assert len({tuple(v.id for v in s.views) for s in samples}) == 1
        assert all(s.broken_views == () for s in samples) == (sample_id != NO_PERSPECTIVES)
        clouds = [s.load_points() for s in samples]
        assert clouds[0].instance is not None and same(clouds[0], clouds[1]) and same(clouds[0], clouds[2])


def test_archives_that_are_still_packed_are_named_with_the_command(tiny: Callable[..., Path]) -> None:
    with pytest.raises(MissingDataError, match=r'no room.*unpack the archives first.*7z x -y -o\S+ "\$f"; done'):
        Structured3DDataset(tiny(packing="zip"))


@pytest.mark.parametrize("left_out", ["annotation_3d", "perspective_empty"])
def test_downloads_that_are_not_needed_may_be_missing(left_out: str, tiny: Callable[..., Path]) -> None:
    whole, less = Structured3DDataset(tiny()), Structured3DDataset(tiny(leave_out=(left_out,)))
    assert all_ids(whole) == all_ids(less)
    assert same(whole.read(KITCHEN).load_points(), less.read(KITCHEN).load_points())


def test_without_the_boxes_there_are_no_instances(tiny: Callable[..., Path]) -> None:
    whole, less = Structured3DDataset(tiny()), Structured3DDataset(tiny(leave_out=("bbox",)))
    points = less.read(LIVING).load_points()
    assert points.instance is None and same(points, whole.read(LIVING).load_points(), but=("instance",))


@pytest.mark.parametrize("packing", ["merged", "apart"])
def test_instances_alone_make_no_perspective(packing: str, tiny: Callable[..., Path]) -> None:
    """The archive of boxes has them of rooms, too, whose perspectives were never released."""
    dataset = Structured3DDataset(tiny(never_released=True, packing=packing))
    room = "_room_".join(release.NEVER_RELEASED)
    assert room in dataset.sample_ids("train")
    sample = dataset.read(room)
    ((name, error),) = sample.broken_views
    assert not sample.views and name == "" and "no perspective renderings" in error
    alone = Structured3DDataset(tiny(leave_out=("perspective_full", "perspective_empty")), views="panorama")
    assert same(sample.load_points(), alone.read(LIVING).load_points())


def test_a_perspective_of_which_instances_are_all_is_none_of_a_room(copy: Path) -> None:
    for path in (copy / VIEW).iterdir():
        if path.name != "instance.png":
            path.unlink()
    sample = Structured3DDataset(copy).read(KITCHEN)
    assert [v.id for v in sample.views] == ["perspective/full/0"] and not sample.broken_views


def test_without_panoramas_points_are_what_perspectives_see(
    tiny: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    whole, less = Structured3DDataset(tiny()), Structured3DDataset(tiny(leave_out=("panorama",)))
    assert set(all_ids(whole)) - set(all_ids(less)) == {NO_PERSPECTIVES}
    sample = less.read(KITCHEN)
    points, full = sample.load_points(), whole.read(KITCHEN).load_points()
    assert [v.id for v in sample.views] == ["perspective/full/0", "perspective/full/2"] and not sample.broken_views
    assert len(points.coord) < 0.95 * len(full.coord) and points.instance is not None and not caplog.records
    # Perspectives come first, so every point of theirs is a point of the whole.
    assert set(map(tuple, points.coord)) <= set(map(tuple, full.coord))


def test_without_perspectives_the_default_views_are_missed_before_any_work(tiny: Callable[..., Path]) -> None:
    root = tiny(leave_out=("perspective_full", "perspective_empty"))
    with pytest.raises(
        MissingDataError, match=r"no perspective renderings.*Structured3D_perspective_full_00\.zip.*views=panorama"
    ):
        Structured3DDataset(root)
    sample = Structured3DDataset(root, views="panorama").read(KITCHEN)
    assert [v.id for v in sample.views] == ["panorama/full"] and len(sample.load_points().coord) > 500
    with pytest.raises(MissingDataError, match=r"no panorama renderings.*Structured3D_panorama_00\.zip"):
        Structured3DDataset(tiny(leave_out=("panorama",)), views="both")


def test_an_archive_that_lacks_is_warned_of(
    copy: Path, tiny: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    for path in (copy / HOUSE / "2D_rendering/830662/perspective").glob("*/*/*"):
        if path.name != "instance.png":  # which the archive of boxes brings
            path.unlink()
    with pytest.raises(MissingDataError, match=r"unpack Structured3D_perspective_full_15\.zip"):
        Structured3DDataset(copy)
    # Scenes 01600 to 01799 were never released with perspectives: nothing to warn of.
    released = tiny() / "Structured3D/scene_00000/2D_rendering"
    shutil.copytree(released / "485142", copy / "Structured3D/scene_00000/2D_rendering/485142")
    shutil.copytree(released / "490854", copy / "Structured3D/scene_01600/2D_rendering/490854")
    dataset = Structured3DDataset(copy)
    (record,) = caplog.records
    assert "no perspective renderings of 1 rooms" in record.getMessage()
    assert record.getMessage().endswith("unpack Structured3D_perspective_full_15.zip")
    assert "scene_01600_room_490854" in dataset.sample_ids("train")


def test_pixels_that_hang_in_mid_air_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truths = release.write(tmp_path, size=(160, 90), panorama_size=(192, 96), flying=True, errata=False, points=4000)
    (truth,) = (t for t in truths if t.split == "val")
    surfaces = cKDTree(truth.world)

    def points() -> tuple[int, int]:
        """How many, and how many of them off every surface by more than truth's places are away from each other."""
        points = Structured3DDataset(tmp_path).read(truth.sample_id).load_points()
        places = release.truth_at(truth, points.coord, WORLD).world
        off = places[WORLD.surface_of(places) < 0]
        return len(places), int((surfaces.query(off)[0] > 0.2).sum())

    count, in_mid_air = points()
    monkeypatch.setattr(renderings, "_GRAZING", 0.0)
    count_with, in_mid_air_with = points()
    assert 10 * in_mid_air < in_mid_air_with and count > 0.9 * count_with


def test_light_is_of_panorama_images_alone(tiny: Callable[..., Path]) -> None:
    raw, cold = (Structured3DDataset(tiny(), views="both", light=light).read(LIVING) for light in ("raw", "cold"))
    assert same(raw.load_points(), cold.load_points())
    changed = [not np.array_equal(a.load_image(), b.load_image()) for a, b in zip(raw.views, cold.views, strict=True)]
    assert changed == [False, False, False, True]
    ratio = cold.views[-1].load_image()[..., 0].mean() / raw.views[-1].load_image()[..., 0].mean()
    assert ratio == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize("option", [{"views": "top"}, {"light": "warmlight"}, {"voxel_size": 0.0}])
def test_options_that_cannot_be_used(option: dict, tiny: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"views=perspective\|panorama\|both.*voxel_size"):
        Structured3DDataset(tiny(), **option)


def test_points_do_not_depend_on_the_views_that_get_features(tiny: Callable[..., Path]) -> None:
    clouds = [Structured3DDataset(tiny(), views=views).read(LIVING).load_points() for views in GRIDS]
    assert same(clouds[0], clouds[1]) and same(clouds[0], clouds[2])
    finer = Structured3DDataset(tiny(), voxel_size=0.01).read(LIVING).load_points()
    assert len(finer.coord) > len(clouds[0].coord)


def test_samples_travel_to_other_processes(tiny: Callable[..., Path]) -> None:
    sample = Structured3DDataset(tiny()).read(KITCHEN)
    points, view = pickle.loads(pickle.dumps((sample.load_points, sample.views[0].load_image)))
    assert same(points(), sample.load_points()) and np.array_equal(view(), sample.views[0].load_image())


def test_the_first_point_of_a_voxel_stays_as_it_is() -> None:
    def cloud(x: list[float], segment: list[int]) -> Points:
        coord = np.stack([x, np.zeros(len(x)), np.zeros(len(x))], axis=1).astype(np.float32)
        return Points(coord=coord, segment=np.array(segment, dtype=np.int16))

    first = first_of_voxels(
        [cloud([], []), cloud([0.25, 0.31, -0.1], [1, 2, 3]), cloud([0.0, 0.11, 0.29], [4, 5, 6])], 0.1
    )
    assert first is not None and first.segment is not None and first.color is None
    assert first.segment.tolist() == [3, 4, 5, 1, 2]
    assert first.coord[:, 0].tolist() == pytest.approx([-0.1, 0.0, 0.11, 0.25, 0.31])
    assert first_of_voxels([cloud([], [])], 0.1) is None and first_of_voxels([], 0.1) is None
    with pytest.raises(DataError, match="the pose is damaged"):
        first_of_voxels([cloud([1e9], [0])], 0.1)


# --- planted faults ---------------------------------------------------------------------------------------------------


def as_it_is(matrix: np.ndarray) -> np.ndarray:
    return np.asarray(matrix)


def plant_wrong_direction(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(renderings, "invert_pose", as_it_is)


def plant_places_in_millimetres(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(renderings, "MILLIMETRES", 1.0)


def plant_depth_in_millimetres(patch: pytest.MonkeyPatch) -> None:
    true = renderings.read_depth
    patch.setattr(renderings, "read_depth", lambda *a, **k: true(*a, scale=1.0, **k))


def plant_swapped_axes(patch: pytest.MonkeyPatch) -> None:
    """x and y of the house, which mirrors it, as Pointcept's files are."""
    true, swap = renderings._numbers, [1, 0, 2, 4, 3, 5, 7, 6, 8, 9, 10, 11]
    patch.setattr(renderings, "_numbers", lambda path, count: true(path, count)[swap[:count]])


def plant_whole_angles(patch: pytest.MonkeyPatch) -> None:
    true = renderings._numbers
    halves = np.array([1.0] * 9 + [0.5, 0.5, 1])
    patch.setattr(renderings, "_numbers", lambda path, count: true(path, count) * halves[:count])


def plant_depth_along_the_ray(patch: pytest.MonkeyPatch) -> None:
    true = renderings.unproject

    def unproject(depth: np.ndarray, camera: object) -> np.ndarray:
        points = true(depth, camera)  # type: ignore[arg-type]
        length = np.linalg.norm(points, axis=2, keepdims=True)
        return points * np.divide(depth[..., None], length, out=np.ones_like(length), where=length > 0)

    patch.setattr(renderings, "unproject", unproject)


def plant_another_positions_camera(patch: pytest.MonkeyPatch) -> None:
    true = renderings._numbers
    patch.setattr(renderings, "_numbers", lambda path, n: true(path.parents[1] / "0" / path.name if n > 3 else path, n))


def plant_another_positions_image(patch: pytest.MonkeyPatch) -> None:
    true = reader.open_rendering

    def open_rendering(name: str, images: renderings.Images, *, panorama: bool) -> renderings.Rendering:
        other = images if panorama else replace(images, color=images.color.parents[1] / "0" / images.color.name)
        return true(name, other, panorama=panorama)

    patch.setattr(reader, "open_rendering", open_rendering)


def plant_unfurnished_rooms(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reader, "_PERSPECTIVES", "perspective/empty")


def plant_mirrored_images(patch: pytest.MonkeyPatch) -> None:
    true = renderings.read_color
    patch.setattr(renderings, "read_color", lambda *a, **k: true(*a, **k)[:, ::-1])


def plant_colours_of_opencv(patch: pytest.MonkeyPatch) -> None:
    true = renderings.read_color
    patch.setattr(renderings, "read_color", lambda *a, **k: true(*a, **k)[..., ::-1])


def plant_the_first_25_ids(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(renderings, "nyu40_to_index", lambda ids, _: np.where(ids <= 25, ids - 1, -1).astype(np.int16))


def plant_labels_as_colours(patch: pytest.MonkeyPatch) -> None:
    def read_red(path: Path, *, size: tuple[int, int], where: str) -> np.ndarray:
        if path.name != "semantic.png":
            return read_ids(path, size=size, where=where)
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))[..., 0].astype(np.int32)

    patch.setattr(renderings, "read_ids", read_red)


def plant_background_as_an_object(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(renderings, "_BACKGROUND", 0)


def plant_the_documented_panorama(patch: pytest.MonkeyPatch) -> None:
    """Its middle column along negative y."""
    true = renderings.panorama_camera

    def turned(*args: object) -> object:
        camera, pose = true(*args)  # type: ignore[arg-type]
        return camera, np.diag([-1.0, 1, -1, 1]) @ pose

    patch.setattr(renderings, "panorama_camera", turned)


def plant_a_panorama_upside_down(patch: pytest.MonkeyPatch) -> None:
    true = renderings.panorama_camera

    def turned(*args: object) -> object:
        camera, pose = true(*args)  # type: ignore[arg-type]
        return camera, np.diag([-1.0, -1, 1, 1]) @ pose

    patch.setattr(renderings, "panorama_camera", turned)


FAULTS = {
    "perspective": (
        plant_wrong_direction, plant_places_in_millimetres, plant_depth_in_millimetres, plant_swapped_axes,
        plant_whole_angles, plant_depth_along_the_ray, plant_another_positions_camera, plant_another_positions_image,
        plant_unfurnished_rooms, plant_mirrored_images, plant_colours_of_opencv, plant_the_first_25_ids,
        plant_labels_as_colours, plant_background_as_an_object,
    ),
    "panorama": (
        plant_depth_in_millimetres, plant_swapped_axes, plant_the_documented_panorama, plant_a_panorama_upside_down,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(extracted: Callable[[str], Extracted], written: tuple[Path, list[Truth]]) -> Truth:
    """The truth of the one room of split `val`, which is right where no fault is planted."""
    (truth,) = (t for t in written[1] if t.split == "val")
    for views in FAULTS:
        assert features_right(extracted(views), truth, views) and channels_right(extracted(views), truth)
    return truth


@pytest.mark.parametrize(("views", "plant"), [(v, f) for v in FAULTS for f in FAULTS[v]])
def test_a_planted_fault_is_noticed(
    views: str,
    plant: Callable[[pytest.MonkeyPatch], None],
    sound: Truth,
    written: tuple[Path, list[Truth]],
    position_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    run = extract(written[0], tmp_path / "cache", position_checkpoint, views, splits=("val",))
    assert run.cache.samples == [sound.sample_id]
    assert not (channels_right(run, sound) and features_right(run, sound, views))


# --- bad input --------------------------------------------------------------------------------------------------------

VIEW = f"{HOUSE}/2D_rendering/830662/perspective/full/2"
PANORAMA = f"{HOUSE}/2D_rendering/830662/panorama"


def broken(root: Path, name: str = "perspective/full/2") -> str:
    """The error of the kitchen's only broken rendering; the others serve."""
    sample = Structured3DDataset(root).read(KITCHEN)
    ((view, error),) = sample.broken_views
    assert view == name and len(sample.views) == (2 if name == "panorama/full" else 1)
    assert len(sample.load_points().coord) > 500
    return error


@pytest.mark.parametrize("file", ["camera_pose.txt", "rgb_rawlight.png", "depth.png", "semantic.png"])
def test_a_file_of_a_perspective_is_missing(file: str, copy: Path) -> None:
    (copy / VIEW / file).unlink()
    error = broken(copy)
    assert f"2/{file}: no such file" in error
    assert "comes with Structured3D_perspective_full_15.zip, unpack that again" in error


@pytest.mark.parametrize("file", ["camera_xyz.txt", "full/rgb_rawlight.png", "full/depth.png", "full/semantic.png"])
def test_a_file_of_the_panorama_is_missing(file: str, copy: Path) -> None:
    (copy / PANORAMA / file).unlink()
    error = broken(copy, "panorama/full")
    assert f"panorama/{file}: no such file; it comes with Structured3D_panorama_15.zip" in error


@pytest.mark.parametrize("panorama", [True, False])
def test_a_half_unpacked_room_is_found_before_any_work(panorama: bool, copy: Path) -> None:
    if not panorama:
        shutil.rmtree(copy / PANORAMA)
    for path in (copy / VIEW).parent.iterdir():
        (path / "camera_pose.txt").unlink()
    with pytest.raises(
        MissingDataError, match=r"full/0/camera_pose\.txt: no such file; it comes with Structured3D_perspective_full_15"
    ):
        Structured3DDataset(copy).read(KITCHEN)
    if panorama:  # where panoramas get the features, points of the perspectives are all that lacks
        sample = Structured3DDataset(copy, views="panorama").read(KITCHEN)
        assert len(sample.views) == 1 and len(sample.broken_views) == 2


def test_a_room_of_which_no_view_is_readable_keeps_its_points(copy: Path) -> None:
    for path in (copy / VIEW).parent.glob("*/rgb_rawlight.png"):
        path.write_bytes(b"damaged")
    sample = Structured3DDataset(copy).read(KITCHEN)
    assert [name for name, _ in sample.broken_views] == ["perspective/full/0", "perspective/full/2"]
    assert not sample.views and len(sample.load_points().coord) > 500
    shutil.rmtree(copy / PANORAMA)
    with pytest.raises(DataError, match=r"0/rgb_rawlight\.png: not a readable image"):
        Structured3DDataset(copy).read(KITCHEN)


def test_half_unpacked_apart_names_the_folder_of_the_download(tiny: Callable[..., Path], tmp_path: Path) -> None:
    root = tmp_path / "release"
    shutil.copytree(tiny(packing="apart"), root)
    (missing,) = root.glob(f"*/{VIEW}/depth.png")
    missing.unlink()
    assert broken(root).startswith(f"{missing}: no such file")


@pytest.mark.parametrize("file", ["rgb_rawlight.png", "depth.png", "semantic.png"])
def test_a_cut_image_is_left_out_and_named(file: str, copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Archives of the release have wrong checksums here and there (issue 43 of the devkit)."""
    path = copy / VIEW / file
    path.write_bytes(path.read_bytes()[:-200])
    whole = Structured3DDataset(copy).read(KITCHEN)
    points = whole.load_points()
    (record,) = caplog.records
    assert KITCHEN in record.getMessage() and f"2/{file}" in record.getMessage()
    assert "truncated or damaged" in record.getMessage() and len(points.coord) > 500


@pytest.mark.parametrize("fault", ["size", "empty"])
def test_instances_that_cannot_be_read_cost_nothing_else(
    fault: str, copy: Path, tiny: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """That of the panorama of room 141 of scene_00706 has 1600x1200 pixels (issue 63 of the devkit)."""
    path = copy / VIEW / "instance.png"
    if fault == "size":
        Image.fromarray(np.zeros((120, 160), np.uint16)).save(path)
    else:
        path.write_bytes(b"")
    points, whole = (Structured3DDataset(root).read(KITCHEN).load_points() for root in (copy, tiny()))
    assert same(points, whole, but=("instance",)) and points.instance is not None and whole.instance is not None
    lost = points.instance != whole.instance
    assert 0 < lost.sum() < (whole.instance >= 0).sum() and (points.instance[lost] == -1).all()
    (record,) = caplog.records
    assert f"{KITCHEN}: the points of perspective/full/2 are of no instance: {path}: " in record.getMessage()


def test_an_empty_image_is_a_broken_view(copy: Path) -> None:
    (copy / VIEW / "rgb_rawlight.png").write_bytes(b"")
    assert "2/rgb_rawlight.png: not a readable image" in broken(copy)


def test_images_of_another_size(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    def resize(path: Path, size: tuple[int, int]) -> None:
        with Image.open(path) as image:
            resized = image.resize(size, Image.Resampling.NEAREST)
        resized.save(path)

    for name in ("rgb_rawlight.png", "depth.png", "semantic.png", "instance.png"):
        resize(copy / VIEW / name, (192, 108))  # resized as a whole: the fields of view still hold
    sample = Structured3DDataset(copy).read(KITCHEN)
    assert not sample.broken_views and sample.views[1].camera.width == 192
    assert sample.views[1].camera.fx == pytest.approx(2 * sample.views[0].camera.fx)
    assert sample.load_points() and not caplog.records
    resize(copy / VIEW / "depth.png", (96, 54))
    Structured3DDataset(copy).read(KITCHEN).load_points()
    assert "2/depth.png: expected 192x108 pixels" in caplog.text and "got 96x54" in caplog.text
    resize(copy / VIEW / "rgb_rawlight.png", (100, 100))
    error = broken(copy)
    assert "2/rgb_rawlight.png: 100x100 pixels do not fit the fields of view in camera_pose.txt" in error
    resize(copy / PANORAMA / "full/rgb_rawlight.png", (96, 40))
    errors = dict(Structured3DDataset(copy).read(KITCHEN).broken_views)
    assert "twice as wide as high" in errors["panorama/full"] and "96x40" in errors["panorama/full"]


def good_numbers(copy: Path) -> list[float]:
    return [float(word) for word in (copy / VIEW / "camera_pose.txt").read_text().split()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: n[:11], "expected 12 finite numbers of a camera, got 11"),
        (lambda n: [], "got 0"),
        (lambda n: [*n[:3], float("nan"), *n[4:]], "expected 12 finite numbers"),
        (lambda n: [*n[:6], *n[3:6], *n[9:]], "a view direction and another direction that is up"),
        (lambda n: [*n[:3], 0, 0, 0, *n[6:]], "another direction that is up"),
        (lambda n: [*n[:6], n[3], n[4], n[5] + 0.1, *n[9:]], "another direction that is up"),
        (lambda n: [*n[:9], 40.0, 25.3, 1], "between 0 and pi/2 radians, got 40"),
    ],
)
def test_a_camera_that_cannot_be(change: Callable[[list[float]], list[float]], message: str, copy: Path) -> None:
    path = copy / VIEW / "camera_pose.txt"
    path.write_text(" ".join(str(number) for number in change(good_numbers(copy))))
    error = broken(copy)
    assert str(path) in error and message in error and "unpack it again" in error


def test_directions_need_not_be_of_unit_length(copy: Path, tiny: Callable[..., Path]) -> None:
    numbers = good_numbers(copy)
    (copy / VIEW / "camera_pose.txt").write_text(
        " ".join(str(n * (7 if 3 <= i < 9 else 1)) for i, n in enumerate(numbers))
    )
    views = [Structured3DDataset(root).read(KITCHEN).views[1] for root in (copy, tiny())]
    np.testing.assert_allclose(views[0].camera_from_world, views[1].camera_from_world, atol=1e-9)
    np.testing.assert_allclose(views[0].camera_from_world[:3, :3] @ views[0].camera_from_world[:3, :3].T, np.eye(3),
                               atol=1e-12)  # fmt: skip


@pytest.mark.parametrize("up", ["tilted", "of the house"])
def test_up_need_not_be_at_a_right_angle_to_the_view(up: str, copy: Path, tiny: Callable[..., Path]) -> None:
    numbers = np.array(good_numbers(copy))
    forward, across = numbers[3:6], numbers[6:9]
    # The roll of this view is 0, so that the house's z makes the same image.
    numbers[6:9] = across + 2 * forward if up == "tilted" else (0, 0, 1)
    (copy / VIEW / "camera_pose.txt").write_text(" ".join(map(str, numbers)))
    views = [Structured3DDataset(root).read(KITCHEN).views[1] for root in (copy, tiny())]
    np.testing.assert_allclose(views[0].camera_from_world, views[1].camera_from_world, atol=1e-4)


def test_a_camera_of_words(copy: Path) -> None:
    (copy / VIEW / "camera_pose.txt").write_bytes(b"\xff\xfe<html>404</html>" * 1000)
    assert "camera_pose.txt: expected 12 numbers of a camera" in broken(copy)
    (copy / PANORAMA / "camera_xyz.txt").write_text("1 2")
    errors = dict(Structured3DDataset(copy).read(KITCHEN).broken_views)
    assert "camera_xyz.txt: expected 3 finite numbers" in errors["panorama/full"]


def test_labels_that_a_tool_turned_into_colours(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = copy / VIEW / "semantic.png"
    with Image.open(path) as image:
        colors = image.convert("RGB")
    colors.save(path)
    Structured3DDataset(copy).read(KITCHEN).load_points()
    assert f"{path}: expected an image of ids" in caplog.text and "take the released file" in caplog.text


def test_a_room_of_which_no_pixel_has_depth(copy: Path) -> None:
    for path in (copy / PANORAMA).parent.glob("*/full/**/depth.png"):
        with Image.open(path) as image:
            empty = np.zeros((image.height, image.width), dtype=np.uint16)
        Image.fromarray(empty).save(path)
    sample = Structured3DDataset(copy).read(KITCHEN)
    with pytest.raises(DataError, match=f"{KITCHEN}: no points: 0 of 3 renderings cannot be read, the others have no"):
        sample.load_points()


def test_a_view_far_outside_is_no_points_and_no_overflow(copy: Path) -> None:
    numbers = good_numbers(copy)
    path = copy / VIEW / "camera_pose.txt"
    path.write_text(" ".join(map(str, [1e30, *numbers[1:]])))
    with pytest.raises(DataError, match="the pose is damaged"):
        Structured3DDataset(copy).read(KITCHEN).load_points()


def test_folders_with_odd_names_are_no_rooms(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    rooms = copy / HOUSE / "2D_rendering"
    for name in ("830662 (1)", "Küche", "..830662", "\uff18\uff13\uff10"):
        shutil.copytree(rooms / "830662", rooms / name)
    shutil.copytree(copy / HOUSE, copy / "Structured3D/scene_03120 (copy)")
    (copy / "Structured3D/scene_03130").write_text("not a folder")
    (rooms.parents[1] / "scene_03131").mkdir()
    dataset = Structured3DDataset(copy)
    assert list(dataset.sample_ids("val")) == [KITCHEN]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "3 folders are left out" in record.getMessage()
    for odd in ("scene_03120_room_../830662", "scene_03120_room_", "../../etc/passwd", ""):
        with pytest.raises(UnknownNameError, match="unknown sample"):
            dataset.read(odd)


def test_positions_are_numbers_with_gaps_in_their_order(copy: Path) -> None:
    folder = (copy / VIEW).parent
    shutil.copytree(folder / "0", folder / "10")
    shutil.copytree(folder / "0", folder / "0 (copy)")
    (folder / "7").write_text("not a folder")
    sample = Structured3DDataset(copy).read(KITCHEN)
    assert [v.id for v in sample.views] == [f"perspective/full/{i}" for i in (0, 2, 10)]
    assert not sample.broken_views


def test_a_folder_above_the_root(copy: Path, tmp_path: Path) -> None:
    root = tmp_path / "up" / "s3d"
    (tmp_path / "up" / "a").mkdir(parents=True)
    shutil.copytree(copy, root / "unpacked")
    assert open_dataset("structured3d", root).ids
    with pytest.raises(MissingDataError, match=f"no room with renderings at .*; pass '{root}' with --root"):
        open_dataset("structured3d", root.parent)


def test_a_root_without_rooms(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"no room with renderings at .*expected Structured3D/.*--root"):
        open_dataset("structured3d", tmp_path)
    with zipfile.ZipFile(tmp_path / "Structured3D_panorama_00.zip", "w"):
        pass
    with pytest.raises(MissingDataError, match="unpack the archives first"):
        open_dataset("structured3d", tmp_path)
