"""The way of the camera through a room: once around, looking at the far side, now up, now down."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditr_cache.synthesize.layout import Room

_DISTANCE = 3.3  # metres to the wall that a view aims at, where the room is large enough
_PITCHES = (-7.0, -36.0, -21.0)  # degrees above the horizon, in turn


def camera_path(rng: np.random.Generator, room: Room, frames: int) -> list[NDArray[np.float64]]:
    """World-from-camera poses.

    Args:
        rng: random stream.
        room: the room.
        frames: number of poses.

    Returns:
        `frames` matrices [4, 4]; all cameras stand inside the room, 1.3 to 1.7 m above the floor.
    """
    half = np.array([room.width, room.depth]) / 2
    first = rng.uniform(0, 2 * np.pi)
    poses = []
    for i in range(frames):
        yaw = first + 2 * np.pi * i / frames
        look = np.array([np.cos(yaw), np.sin(yaw)])
        reach = (half / np.maximum(np.abs(look), 1e-9)).min()  # from the middle to the wall ahead, and behind
        back = np.clip(_DISTANCE - reach, -0.5, reach - 0.6)
        place = half - back * look + rng.normal(0, 0.08, 2)
        place = np.clip(place, 0.5, 2 * half - 0.5)
        angle = yaw + np.radians(rng.normal(0, 3))
        pitch = np.radians(_PITCHES[i % len(_PITCHES)] + rng.normal(0, 2))
        eye = np.array([*place, rng.uniform(1.3, 1.7)])
        poses.append(_look(eye, angle, pitch, np.radians(rng.normal(0, 1.5))))
    return poses


def _look(eye: NDArray[np.float64], yaw: float, pitch: float, roll: float) -> NDArray[np.float64]:
    """Pose [4, 4] of a camera at `eye`: x right, y down, z forward."""
    forward = np.array([np.cos(yaw) * np.cos(pitch), np.sin(yaw) * np.cos(pitch), np.sin(pitch)])
    right = np.array([np.sin(yaw), -np.cos(yaw), 0.0])
    down = np.cross(forward, right)
    c, s = np.cos(roll), np.sin(roll)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([c * right + s * down, c * down - s * right, forward], axis=1)
    pose[:3, 3] = eye
    return pose
