"""How the points of each room of S3DIS are turned about z against the poses of its images.

aligned = R_z(-angle) (area - middle) + middle, with an angle of `Area_<n>_alignmentAngle.txt` in degrees and the middle
of the box that bounds the room's points, which is the same in both releases. Nobody documents the sign, nor that the
aligned release was turned by these files, nor that v1.2 lies as the poses have it (`V1_2_TURNED` does not); so the
depth maps are asked of every room, and their answer counts where it is clear.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.s3dis.points import Outline
from ditr_cache.errors import DataError
from ditr_cache.geometry import inside, project, to_camera
from ditr_cache.sample import View

_LOG = logging.getLogger(__name__)

ANGLES = (0, 90, 180, 270)

V1_2_TURNED = {"Area_2_hallway_11": 180, "Area_5_hallway_6": 180}
"""Rooms of v1.2 that do not lie as their images have them, and degrees; found by DeepViewAgg, which uses the same
poses. Whether they are so in the aligned release nobody says."""

_DEPTH_MAPS = 6
_TOLERANCE = 0.1  # metres
_CLEAR = 0.8  # of the best angle's votes: an empty box fits the wrong turns, too, and must not outvote a file by a hair
_ENOUGH = 200  # votes for the best angle: a few points outvote no file


def read_angles(path: Path) -> dict[str, int]:
    """Room -> degrees, one of `ANGLES`, of a file of alignment angles.

    Raises:
        DataError: a line that is not a room and a multiple of 90 degrees, or a room with two angles.
    """
    angles: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        *rooms, text = line.strip().rsplit(None, 1)
        try:
            angle = float(text)
        except ValueError:
            angle = float("nan")
        if not rooms or angle % 360 not in ANGLES:
            raise DataError(f"{path}: line {number} is {line[:80]!r}, expected a room and 0, 90, 180 or 270 degrees")
        if angles.setdefault(rooms[0], int(angle % 360)) != angle % 360:
            raise DataError(f"{path}: line {number} gives room {rooms[0]!r} a second angle")
    return angles


def quarter_turn(degrees: int, middle: NDArray[np.float64]) -> NDArray[np.float64]:
    """[4, 4] rotation about a vertical axis through `middle` by a multiple of 90 degrees, exact."""
    c, s = ((1, 0), (0, 1), (-1, 0), (0, -1))[degrees // 90 % 4]
    matrix = np.eye(4)
    matrix[:2, :2] = [[c, -s], [s, c]]
    matrix[:3, 3] = middle - matrix[:3, :3] @ middle
    return matrix


def settle_angle(announced: int | None, outline: Outline, views: Sequence[View], where: str, source: str) -> int:
    """The angle by which a room is turned against its poses: the announced one, unless depth maps clearly say another.

    Args:
        announced: by `source`; None where there is none.
        outline: of the points as the files have them.
        views: of the room, in the frame of the area.
        where: names the room in warnings.
        source: what announced the angle.

    Raises:
        DataError: nothing is announced, and no depth map agrees with any angle.
    """
    votes = depth_votes(outline, views)
    best = ANGLES[int(np.argmax(votes))]
    counts = ", ".join(f"{count} for {angle}" for angle, count in zip(ANGLES, votes, strict=True))
    if announced is None:
        if max(votes) <= 0:
            raise DataError(
                f"no file of alignment angles, and the room's depth maps agree with none of {ANGLES} degrees; get "
                "Area_<n>_alignmentAngle.txt from the S3DIS download (either release has it)"
            )
        _LOG.warning("%s: no alignment angle; depth maps say %d degrees (votes: %s)", where, best, counts)
        return best
    if max(votes) < _ENOUGH:
        _LOG.warning(
            "%s: its depth maps fit its points badly at every angle; %d degrees are taken, as %s says, but look at it "
            "with `ditr-cache check` (votes: %s)",
            where,
            announced,
            source,
            counts,
        )
    elif votes[ANGLES.index(announced)] < _CLEAR * max(votes):
        _LOG.warning(
            "%s: %s says %d degrees, but depth maps say %d, which is taken (votes: %s)",
            where,
            source,
            announced,
            best,
            counts,
        )
        return best
    return announced


def depth_votes(outline: Outline, views: Sequence[View]) -> tuple[int, int, int, int]:
    """How well some of the depth maps fit the room's points, if it was turned by each of `ANGLES`.

    A point that lies where the depth map has a surface is a vote for, one that floats before it a vote against; what is
    behind may be hidden.
    """
    votes = [0, 0, 0, 0]
    for i in np.unique(np.linspace(0, len(views) - 1, _DEPTH_MAPS).round().astype(int)) if views else ():
        camera, load = views[i].depth_camera, views[i].load_depth
        assert camera is not None and load is not None
        if not np.isfinite(views[i].camera_from_world).all():
            continue
        try:
            depth = load()
        except DataError:  # reported where the view is used
            continue
        for k, angle in enumerate(ANGLES):
            in_camera = to_camera(outline.some, views[i].camera_from_world @ quarter_turn(angle, outline.middle))
            in_camera = in_camera[in_camera[:, 2] > 0]
            u, v = project(in_camera, camera)
            seen = inside(u, v, camera)
            measured, z = depth[v[seen].astype(np.intp), u[seen].astype(np.intp)], in_camera[seen, 2]
            known = measured > 0
            votes[k] += int((known & (np.abs(z - measured) <= _TOLERANCE)).sum())
            votes[k] -= int((known & (z < measured - _TOLERANCE)).sum())
    return votes[0], votes[1], votes[2], votes[3]
