"""The room of the dataset tests itself: eyes see what they project, and the judge finds right what is right."""

from dataclasses import replace

import numpy as np
import pytest

import world as bed
from analytic_scene import HIGH, LOW, feature_of
from ditr_cache.cached import CachedSample

GRID = (12, 16)
FINE = (24, 48)  # a panorama spreads over all directions
STANDS = bed.pose((0.2, 0.9, 1.4), yaw=0.2, pitch=0.15, roll=0.05)
EYES = {
    "pinhole": bed.pinhole(320, 240, 200.0, 205.0, 155.0, 122.0, STANDS),
    "radial-tangential": bed.distorted(320, 240, 200.0, 205.0, 155.0, 122.0, (-0.25, 0.07, 0.002, -0.003), STANDS),
    "fisheye": bed.fisheye(320, 240, 110.0, 112.0, 158.0, 118.0, (-0.03, 0.004, -0.001, 0.0002), STANDS),
    "panorama": bed.panorama(480, 240, STANDS),
}


@pytest.mark.parametrize("name", EYES)
def test_a_pixel_s_ray_projects_onto_it(name):
    eye = EYES[name]
    origin, rays = eye.rays()
    u, v, seen = eye.project((origin + 2.5 * rays).reshape(-1, 3))
    columns, rows = np.meshgrid(np.arange(eye.width) + 0.5, np.arange(eye.height) + 0.5)
    assert seen.mean() > (0.999 if name != "fisheye" else 0.6)  # its corners lie beyond half a circle
    np.testing.assert_allclose(u[seen], columns.ravel()[seen], atol=2e-3)
    np.testing.assert_allclose(v[seen], rows.ravel()[seen], atol=2e-3)


def extracted(
    eye: bed.Eye, room: bed.World, grid: tuple[int, int], *, shift: int = 0
) -> tuple[CachedSample, bed.Truth]:
    """A cached sample as an extraction would make it, by plain means of patches; `shift` moves features by columns."""
    places, surface = room.points(6000)
    shown = room.image(eye).astype(float) / 255
    rows = (np.arange(eye.height) + 0.5) * grid[0] / eye.height
    columns = (np.arange(eye.width) + 0.5) * grid[1] / eye.width
    token = np.zeros((*grid, 3))
    count = np.zeros(grid)
    patches = (rows.astype(int)[:, None], columns.astype(int)[None, :])
    np.add.at(token, patches, shown)
    np.add.at(count, patches, 1)
    token /= count[..., None]
    u, v, seen = eye.project(places)
    _, distance = room.cast(eye.origin, places - eye.origin)
    valid = seen & (distance > 1 - 1e-3)
    row = np.clip(v * grid[0] / eye.height, 0, grid[0] - 1).astype(int)
    column = np.clip(u * grid[1] / eye.width, 0, grid[1] - 1).astype(int)
    feature = feature_of(token[row, (column + shift) % grid[1]])
    labels = np.array(bed.NAMES)[surface]
    truth = bed.Truth(sample_id="s", split="train", world=places, coord=places, label=labels, eyes={"0": eye})
    sample = CachedSample(
        id="s", split="train", coord=places.astype(np.float32), segment=surface.astype(np.int16),
        source_index=np.arange(len(places), dtype=np.uint32), feature=feature, valid=valid,
        link_count=valid.astype(np.int32), color=None, normal=None, strength=None, instance=None,
    )  # fmt: skip
    return sample, truth


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("name", EYES)
def test_the_judge(name, scale):
    room, eye, grid = bed.World(scale), EYES[name], FINE if name == "panorama" else GRID
    away = eye.camera_from_world.copy()
    away[:3, 3] *= scale
    sample, truth = extracted(replace(eye, camera_from_world=away), room, grid)
    report = bed.judge(sample, truth, room, grid, bed.NAMES)
    assert report.right(), (report, report.errors.max())
    assert report.hidden > 25
    shifted, _ = extracted(replace(eye, camera_from_world=away), room, grid, shift=1)
    assert not bed.judge(shifted, truth, room, grid, bed.NAMES).right()
    none = replace(sample, valid=np.zeros_like(sample.valid))
    assert bed.judge(none, truth, room, grid, bed.NAMES).missing > 300
    everywhere = replace(sample, valid=np.ones_like(sample.valid))
    assert bed.judge(everywhere, truth, room, grid, bed.NAMES).ghosts > 25
    assert bed.judge(replace(sample, segment=np.roll(sample.segment, 1)), truth, room, grid, bed.NAMES).wrong_labels
    moved = bed.judge(replace(sample, coord=sample.coord + np.float32(0.1)), truth, room, grid, bed.NAMES)
    assert not moved.right()


def test_the_room_fits_its_colours():
    places, _ = bed.World().points(100)
    assert (places >= LOW).all() and (places <= HIGH).all()
    assert [name for name, _ in bed.World().quads()] == list(bed.NAMES)
