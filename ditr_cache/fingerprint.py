"""Whether a dataset still is what a partition's links were made from: calibration, poses and split, by fingerprint.

Links are made once, and a VFM that is added later reads its images through them. Where the calibration on disk was
changed in between, its features would land on points that another calibration found. Comparing costs no file: a sample
that is opened for its images holds its cameras and poses already. Points and labels are not opened again: those of the
cache stay what they were, with the features that belong to them. `same_source` compares them, too, on demand.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike

from ditr_cache.errors import MismatchError, shortened
from ditr_cache.sample import Camera, Sample, View
from ditr_cache.schema import FINGERPRINT_DIGITS, GeometryRecord, SampleInfo

PIXEL_STEPS = 2.0**12
UNIT_STEPS = 2.0**20
"""Steps per pixel, and per metre or unit of a rotation, to which values are rounded. Links are stored no finer than a
65536th of the image, and a matrix that was inverted by another library differs in its last bits. Powers of two, because
decimal numbers, as files hold them, then never lie half-way between two steps."""

_PART = FINGERPRINT_DIGITS // 3
_PARTS = {"camera": slice(0, _PART), "depth camera": slice(_PART, 2 * _PART), "pose": slice(2 * _PART, 3 * _PART)}


def fingerprint(view: View) -> str:
    """24 hex digits: 8 each of the camera, the camera of the depth map, and the pose of a view."""
    pose = _rounded(view.camera_from_world.reshape(-1), UNIT_STEPS)
    return _short(_camera(view.camera)) + _short(_camera(view.depth_camera)) + _short(pose)


def calibration_of(sample: Sample, info: SampleInfo) -> str:
    """The fingerprints of a sample's linked views, one after the other, as `GeometryRecord.calibration` holds them."""
    by_id = {view.id: view for view in sample.views}
    return "".join(fingerprint(by_id[view.id]) for view in info.views)


def check_source(record: GeometryRecord, position: int, sample: Sample) -> None:
    """Compare a sample as the dataset has it now with the one that the links of a partition were made from.

    Views that the dataset no longer has are not compared, nor is the calibration with a record that was written before
    there were fingerprints.

    Args:
        record: of the committed geometry.
        position: of the sample in it.
        sample: as read from the dataset.

    Raises:
        MismatchError: another split, camera or pose; names the sample, the first view and the part.
    """
    info = record.samples[position]
    if sample.split != info.split:
        raise MismatchError(
            f"sample {sample.id!r}: its geometry in the cache is of split {info.split!r}, the dataset has it in split "
            f"{sample.split!r} now; {remedy(record)}"
        )
    if not record.calibration:
        return
    by_id, stored = {view.id: view for view in sample.views}, record.calibration[position]
    changed: dict[str, list[str]] = {}
    for number, view in enumerate(info.views):
        if view.id in by_id:
            old = stored[number * FINGERPRINT_DIGITS : (number + 1) * FINGERPRINT_DIGITS]
            parts = _differing(old, fingerprint(by_id[view.id]))
            if parts:
                changed[view.id] = parts
    if changed:
        first, parts = next(iter(changed.items()))
        others = f" (and {len(changed) - 1} more views: {shortened(list(changed)[1:])})" if len(changed) > 1 else ""
        raise MismatchError(
            f"view {first!r} of sample {sample.id!r}{others}: its points were linked with another {' and '.join(parts)}"
            f" than the dataset has now; {remedy(record)}"
        )


def remedy(record: GeometryRecord) -> str:
    """What to do about a partition that the dataset is not the source of any more."""
    return (
        f"use another --out for the changed data, or bring the old data back; or remove partition {record.partition!r} "
        "by `ditr-cache verify CACHE --root ROOT --repair`; `extract` then makes it and its features anew"
    )


def _differing(old: str, new: str) -> list[str]:
    return [name for name, digits in _PARTS.items() if old[digits] != new[digits]]


def _camera(camera: Camera | None) -> bytes:
    if camera is None:
        return b""
    pixels = _rounded((camera.fx, camera.fy, camera.cx, camera.cy), PIXEL_STEPS)
    words = f"{camera.model} {camera.width} {camera.height} {len(camera.distortion)} ".encode()
    return words + pixels + _rounded(camera.distortion, UNIT_STEPS)


def _rounded(values: ArrayLike, steps: float) -> bytes:
    with np.errstate(over="ignore"):
        # Adding zero makes -0.0 the same as 0.0.
        rounded = np.rint(np.asarray(values, dtype=np.float64) * steps) + 0.0
    rounded[np.isnan(rounded)] = np.nan
    return rounded.astype("<f8").tobytes()


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_PART]
