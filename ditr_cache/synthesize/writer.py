"""One room in ScanNet's layout of files."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ditr_cache.datasets.ply import write_ply
from ditr_cache.sample import Camera
from ditr_cache.synthesize.boxes import Faces
from ditr_cache.synthesize.camera_path import camera_path
from ditr_cache.synthesize.layout import Room, furnish
from ditr_cache.synthesize.raycast import TextureAtlas, cast, halved
from ditr_cache.synthesize.sampling import Mesh, sample_mesh
from ditr_cache.synthesize.settings import RoomsSettings

_ABOVE = 215.0  # grey level of what is seen above the walls


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """A generated room with everything that is written of it.

    Args:
        room, faces, mesh: the surfaces and their scan.
        atlas: textures of the faces.
        color_camera, depth_camera: intrinsics; both cameras share the pose.
        poses: world-from-camera matrices [4, 4] by which the frames are rendered.
        lost: frames whose pose is not known to the reader.
        noise_seed: of the colour sensor's noise.
    """

    room: Room
    faces: Faces
    mesh: Mesh
    atlas: TextureAtlas
    color_camera: Camera
    depth_camera: Camera
    poses: list[NDArray[np.float64]]
    lost: frozenset[int]
    noise_seed: tuple[int, ...]


def scene_id(number: int) -> str:
    """Name of room `number`, as ScanNet names its first scans."""
    return f"scene{number:04d}_00"


def build_scene(number: int, *, seed: int, settings: RoomsSettings) -> Scene:
    """Room `number` of the series `seed`; depends on nothing else but the settings."""
    layout, path, scan, loss = (np.random.default_rng((seed, number, part)) for part in range(4))
    room = furnish(layout, settings.texel)
    faces = Faces.of(room.boxes)
    atlas = TextureAtlas(room.textures, settings.texel)
    lost = loss.random() < settings.lost_pose_probability
    width, height = settings.color_size
    focal = settings.focal * width
    color = Camera(width=width, height=height, fx=focal, fy=focal * 1.002, cx=width / 2 + 1.5, cy=height / 2 - 0.8)
    # The depth sensor sees a little more than the colour camera, and its principal point is its own.
    depth = color.resized(width=settings.depth_size[0], height=settings.depth_size[1])
    depth = replace(depth, fx=depth.fx * 0.96, fy=depth.fy * 0.96, cx=depth.cx - 1.1, cy=depth.cy + 0.9)
    return Scene(
        room=room,
        faces=faces,
        mesh=sample_mesh(scan, room, faces, atlas, spacing=settings.point_spacing, noise=settings.surface_noise),
        atlas=atlas,
        color_camera=color,
        depth_camera=depth,
        poses=camera_path(path, room, settings.frames),
        lost=frozenset([int(loss.integers(settings.frames))]) if lost else frozenset(),
        noise_seed=(seed, number, 4),
    )


def render_color(scene: Scene, frame: int, *, noise: float) -> NDArray[np.uint8]:
    """[height, width, 3] RGB of one frame, with sensor noise of standard deviation `noise`."""
    final = scene.color_camera
    camera = final.resized(width=2 * final.width, height=2 * final.height)  # four rays a pixel
    faces, hits = scene.faces, cast(scene.faces, camera, scene.poses[frame], dtype=np.float32)
    # Rays without a hit carry -1, the last face: painted like it, then overpainted.
    albedo = scene.atlas.sample(
        faces.texture[hits.face],
        hits.s + faces.shift.astype(np.float32)[hits.face],
        hits.t,
        hits.depth * np.float32(1 / camera.fx),
    )
    lit = albedo * scene.room.shade(faces, hits.face, hits.s, hits.t)[..., None]
    lit[hits.face < 0] = _ABOVE
    rgb = halved(lit)
    rng = np.random.default_rng((*scene.noise_seed, frame))
    rgb += noise * rng.standard_normal(rgb.shape, dtype=np.float32)
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)


def render_depth(scene: Scene, frame: int) -> NDArray[np.uint16]:
    """[height, width] depth of one frame in millimetres along z, 0 where nothing is hit."""
    depth = cast(scene.faces, scene.depth_camera, scene.poses[frame]).depth
    return np.minimum(np.rint(depth * 1000), 65_535).astype(np.uint16)


def write_scene(folder: Path, name: str, scene: Scene, settings: RoomsSettings) -> None:
    """Write one room into the existing, empty `folder`, in the layout of ScanNet's scans and exported frames."""
    mesh = scene.mesh
    vertices = dict(zip("xyz", mesh.coord.T, strict=True)) | dict(
        zip(("red", "green", "blue"), mesh.color.T, strict=True)
    )
    vertices["alpha"] = np.full(len(mesh.coord), 255, dtype=np.uint8)
    write_ply(folder / f"{name}_vh_clean_2.ply", vertices, mesh.faces)
    write_ply(folder / f"{name}_vh_clean_2.labels.ply", {**vertices, "label": mesh.label}, mesh.faces)
    (folder / f"{name}.txt").write_text(_description(scene))
    for part in ("color", "depth", "pose", "intrinsic"):
        (folder / part).mkdir()
    for kind, camera in (("color", scene.color_camera), ("depth", scene.depth_camera)):
        matrix = np.diag([camera.fx, camera.fy, 1.0, 1.0])
        matrix[:2, 2] = camera.cx, camera.cy
        (folder / "intrinsic" / f"intrinsic_{kind}.txt").write_text(_matrix(matrix))
        (folder / "intrinsic" / f"extrinsic_{kind}.txt").write_text(_matrix(np.eye(4)))
    for frame, pose in enumerate(scene.poses):
        color = render_color(scene, frame, noise=settings.image_noise)
        Image.fromarray(color).save(folder / "color" / f"{frame}.jpg", quality=settings.jpeg_quality)
        Image.fromarray(render_depth(scene, frame)).save(folder / "depth" / f"{frame}.png")
        known = pose if frame not in scene.lost else np.full((4, 4), -math.inf)
        (folder / "pose" / f"{frame}.txt").write_text(_matrix(known))


def _matrix(matrix: NDArray[np.float64]) -> str:
    return "".join(" ".join(f"{value:.9f}" for value in row) + "\n" for row in matrix)


def _description(scene: Scene) -> str:
    color, depth = scene.color_camera, scene.depth_camera
    identity = " ".join(f"{value:.6f}" for value in np.eye(4).ravel())
    lines = {
        "axisAlignment": identity,
        "colorHeight": color.height,
        "colorToDepthExtrinsics": identity,
        "colorWidth": color.width,
        "depthHeight": depth.height,
        "depthWidth": depth.width,
        "fx_color": f"{color.fx:.6f}",
        "fx_depth": f"{depth.fx:.6f}",
        "fy_color": f"{color.fy:.6f}",
        "fy_depth": f"{depth.fy:.6f}",
        "mx_color": f"{color.cx:.6f}",
        "mx_depth": f"{depth.cx:.6f}",
        "my_color": f"{color.cy:.6f}",
        "my_depth": f"{depth.cy:.6f}",
        "numColorFrames": len(scene.poses),
        "numDepthFrames": len(scene.poses),
        "numIMUmeasurements": 0,
        "sceneType": "Generated room",
    }
    return "".join(f"{name} = {value}\n" for name, value in lines.items())
