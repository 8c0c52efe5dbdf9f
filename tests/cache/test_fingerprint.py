"""Fingerprints of views: what changes them, what does not, and how a record is compared with its source."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditr_cache.errors import MismatchError
from ditr_cache.fingerprint import PIXEL_STEPS, UNIT_STEPS, calibration_of, check_source, fingerprint
from ditr_cache.sample import Camera, Sample, View
from ditr_cache.schema import GeometryRecord, SampleInfo, ViewInfo
from ditr_cache.store import open_cache

CAMERA = Camera(
    width=640, height=480, fx=577.870605, fy=577.6, cx=319.5, cy=-0.0, model="radial_tangential",
    distortion=(0.1, -0.02, 0.001, 0.0),
)  # fmt: skip
DEPTH = Camera(width=320, height=240, fx=288.9, fy=288.8, cx=159.5, cy=119.5)
POSE = np.array([[0, -1, 0, 1.25], [0, 0, -1, 0.3], [1, 0, 0, -2.7182818], [0, 0, 0, 1]], float)
PARTS = ("camera", "depth camera", "pose")


def view(**changes) -> View:
    made = View(
        id="7", camera=CAMERA, camera_from_world=POSE, load_image=lambda: None, depth_camera=DEPTH,
        load_depth=lambda: None,
    )  # fmt: skip
    return replace(made, **changes)


def differing(a: View, b: View) -> list[str]:
    digits = [[f[i : i + 8] for i in (0, 8, 16)] for f in (fingerprint(a), fingerprint(b))]
    return [part for part, x, y in zip(PARTS, *digits, strict=True) if x != y]


def moved(row: int, column: int, by: float) -> np.ndarray:
    pose = POSE.copy()
    pose[row, column] += by
    return pose


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        *[({"camera": replace(CAMERA, **{name: getattr(CAMERA, name) + by})}, "camera")
          for name, by in (("fx", 0.01), ("fy", -0.01), ("cx", 0.01), ("cy", 1e-3), ("width", 1), ("height", 1))],
        ({"camera": replace(CAMERA, distortion=(0.1, -0.02, 0.001, 2e-6))}, "camera"),
        ({"camera": replace(CAMERA, distortion=(*CAMERA.distortion, 0.0))}, "camera"),
        ({"camera": replace(CAMERA, model="fisheye")}, "camera"),
        ({"depth_camera": replace(DEPTH, cx=DEPTH.cx + 0.5)}, "depth camera"),
        ({"depth_camera": None}, "depth camera"),
        *[({"camera_from_world": moved(row, column, 3e-6)}, "pose") for row in range(3) for column in range(4)],
        ({"camera_from_world": np.full((4, 4), np.nan)}, "pose"),
        ({"camera_from_world": np.linalg.inv(POSE)}, "pose"),
    ],
)  # fmt: skip
def test_each_part_of_the_calibration_is_told(changes, part):
    assert differing(view(), view(**changes)) == [part]


def test_what_is_no_calibration_does_not_count():
    assert fingerprint(view()) == fingerprint(view(id="8", load_image=lambda: 1, load_depth=None))
    assert fingerprint(view()) == fingerprint(view(camera=replace(CAMERA, cy=0.0)))
    # Order in memory and the bits of NaN are no content either.
    assert fingerprint(view()) == fingerprint(view(camera_from_world=np.asfortranarray(POSE)))
    lost = [np.full((4, 4), np.nan), -np.full((4, 4), np.nan)]
    assert len({fingerprint(view(camera_from_world=pose)) for pose in lost}) == 1


@given(
    st.integers(-(10**9), 10**9), st.integers(0, 6), st.lists(st.integers(-3, 3), min_size=16, max_size=16)
)  # fmt: skip
def test_the_last_bits_of_a_decimal_number_do_not_count(digits, decimals, bits):
    """Files hold decimal numbers; inverting a pose in another library, or on another CPU, moves its last bits."""
    value = float(f"{digits}e-{decimals}") % 100
    pose = POSE.copy()
    pose[:3, 3] = value, -value, value / 7
    nudged = pose + np.array(bits).reshape(4, 4) * np.spacing(np.abs(pose).max())
    # A seventh may lie anywhere: kept only where it is not within the nudge of half a step.
    half = np.abs(pose * UNIT_STEPS % 1 - 0.5).min()
    if half > 1e-6:
        assert differing(view(camera_from_world=pose), view(camera_from_world=nudged)) == []


@given(st.floats(1, 5000), st.floats(-2, 2))
def test_a_change_of_a_step_or_more_always_counts(value, steps):
    before = view(camera=replace(CAMERA, fx=value), camera_from_world=moved(0, 3, value))
    steps += np.copysign(1.0, steps)
    camera, pose = replace(CAMERA, fx=value + steps / PIXEL_STEPS), moved(0, 3, value + steps / UNIT_STEPS)
    assert differing(before, view(camera=camera, camera_from_world=pose)) == ["camera", "pose"]


# --- a record and its source ----------------------------------------------------------------------------------------


def sample(*views: View, split: str = "train") -> Sample:
    return Sample(id="room", split=split, views=views, load_points=lambda: None)


def record_of(made_from: Sample, linked: tuple[str, ...], *, calibrated: bool = True) -> GeometryRecord:
    views = tuple(ViewInfo(id=name, links=1) for name in linked)
    info = SampleInfo(id="room", split=made_from.split, points=9, linked_points=3, views=views)
    calibration = (calibration_of(made_from, info),) if calibrated else ()
    return GeometryRecord(partition="p", samples=(info,), arrays={}, files={}, calibration=calibration)


SOURCE = sample(view(id="0"), view(id="1"), view(id="2"))


def test_a_source_that_is_the_same_passes():
    record = record_of(SOURCE, ("0", "2"))
    check_source(record, 0, SOURCE)
    # Views that were not linked, or are gone, or came, are not compared.
    check_source(record, 0, sample(view(id="0"), view(id="1", camera=DEPTH), view(id="2")))
    check_source(record, 0, sample(view(id="2"), view(id="9")))


def test_a_source_that_changed_is_refused_by_view_and_part():
    record = record_of(SOURCE, ("0", "2"))
    other = view(id="2", camera=DEPTH, camera_from_world=moved(1, 3, 0.1))
    with pytest.raises(MismatchError) as caught:
        check_source(record, 0, sample(view(id="0"), other))
    message = str(caught.value)
    assert "view '2' of sample 'room'" in message and "another camera and pose than" in message
    assert "--out" in message and "remove partition 'p'" in message and "more views" not in message
    with pytest.raises(MismatchError, match=r"view '0' .*and 1 more views: 2\).*another depth camera than"):
        check_source(record, 0, sample(*(view(id=name, depth_camera=CAMERA) for name in "0123")))


def test_a_sample_of_another_split_is_refused():
    with pytest.raises(MismatchError, match=r"sample 'room'.* of split 'train', the dataset has it in split 'val' now"):
        check_source(record_of(SOURCE, ("0",), calibrated=False), 0, replace(SOURCE, split="val"))


def test_records_without_fingerprints_are_not_compared(pytestconfig):
    record = record_of(SOURCE, ("0",), calibrated=False)
    check_source(record, 0, sample(view(id="0", camera=DEPTH)))
    for old in open_cache(pytestconfig.rootpath / "tests/data/v1").geometry.values():
        assert (old.calibration, old.projection_version) == ((), 1)


def test_fingerprints_are_no_part_of_the_digest():
    """Frozen caches keep their digests, and two hosts whose poses differ in a last bit agree."""
    with_them, without = record_of(SOURCE, ("0",)), record_of(SOURCE, ("0",), calibrated=False)
    assert with_them.calibration and with_them.digest == without.digest
    assert replace(without, projection_version=2).digest == without.digest
    assert {"calibration", "projection_version"} <= json.loads(with_them.to_json()).keys() & asdict(without).keys()
