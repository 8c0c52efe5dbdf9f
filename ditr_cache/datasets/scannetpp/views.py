"""The views of a ScanNet++ scene: photos of the DSLR, as taken or undistorted, and frames of the iPhone.

Poses are COLMAP's, which are world to camera in the frame of the mesh. `nerfstudio/transforms*.json` of the release are
in another frame ((x, y, z) of the mesh is (y, x, -z) there) and are read for what only they tell: which photos are bad,
and the intrinsics of the undistorted ones. `pose_intrinsic_imu.json` holds two poses for every frame of the video:
`pose` is in ARKit's own world, `aligned_pose` is camera to mesh.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.colmap import ColmapImage, camera_of, read_cameras, read_images
from ditr_cache.datasets.documents import read_json
from ditr_cache.datasets.frames import first_image_size, frame_number, invert_pose, same_aspect
from ditr_cache.datasets.images import read_color, read_depth
from ditr_cache.datasets.scannetpp.depth import DEPTH_SIZE, read_depth_frame
from ditr_cache.datasets.video import read_video_frame, require_video
from ditr_cache.errors import DataError, MissingDataError
from ditr_cache.pointcloud.optional import check_installed
from ditr_cache.sample import Camera, View

_LOG = logging.getLogger(__name__)

Frames = tuple[tuple[View, ...], tuple[tuple[str, str], ...]]
"""Views in order, and broken views (id, error)."""

UNDISTORTED = ("resized_undistorted_images", "undistorted_images")
"""Folders of undistorted photos: as released since April 2025, and as the toolkit's `dslr/undistort.py` names them."""

VIDEOS = ("rgb.mkv", "rgb.mp4")
"""Names of the iPhone's video: now, and up to 2024."""


def released(path: Path, asset: str) -> Path:
    """`path`, a file or folder of the release. Raises `MissingDataError`, which names the asset to download."""
    if not path.exists():
        raise MissingDataError(f"{path}: no such file; {download(asset)}")
    return path


def download(asset: str) -> str:
    """Remedy for what is missing of an asset."""
    return f"download it with ScanNet++'s script (asset {asset} in download_scannetpp.yml)"


# --- DSLR -----------------------------------------------------------------------------------------------------------


def dslr_views(scene: Path, *, undistorted: bool, withheld: bool = False) -> Frames:
    """Photos of both lists of `transforms.json` that are not marked as bad, by name.

    Args:
        scene: folder of the scene.
        undistorted: the undistorted photos, rather than those as taken.
        withheld: whether all of `test_frames` may be missing, as where a benchmark keeps them back.

    Raises:
        MissingDataError: the photos, their poses or the lists are missing.
        DataError: they cannot be used.
    """
    folder = scene / "dslr"
    if not folder.exists():
        return _no_views(folder, "dslr_resized_dir, dslr_colmap_dir, dslr_nerfstudio_transform_path")
    images, asset = released(folder / "resized_images", "dslr_resized_dir"), "dslr_resized_dir"
    if undistorted:
        asset = "dslr_resized_undistorted_dir"
        found = next((folder / name for name in UNDISTORTED if (folder / name).is_dir()), folder / UNDISTORTED[0])
        images = released(found, f"{asset}, or make it with the toolkit's dslr.undistort")
    lists = released(folder / "nerfstudio" / "transforms.json", "dslr_nerfstudio_transform_path")
    train, test = _good_photos(lists)
    cameras, poses = _colmap(folder / "colmap", "dslr_colmap_dir")
    present = {path.name for path in images.iterdir()}
    if withheld and test and not test & present:
        _LOG.info("%s: none of the %d photos of test_frames is in %s; they are left out", lists, len(test), images)
        test = set()
    names = train | test
    photos, broken = [], []
    for name in sorted(names):
        if name not in present:
            broken.append((name, f"{images / name}: no such file; {download(asset)}"))
        elif name not in poses:
            broken.append((name, f"{folder / 'colmap'}: no pose for photo {name}; {download('dslr_colmap_dir')}"))
        else:
            photos.append((name, poses[name]))
    if undistorted:
        asset = "dslr_nerfstudio_transform_undistorted_path"
        path = released(folder / "nerfstudio" / "transforms_undistorted.json", asset)
        cameras = dict.fromkeys(cameras, _pinhole(path))
    cameras = _of_images(cameras, [images / name for name, _ in photos], images)
    views = (_photo(images / name, cameras, image) for name, image in photos)
    return tuple(views), tuple(broken)


def _photo(path: Path, cameras: Mapping[int, Camera], image: ColmapImage) -> View:
    camera = cameras[image.camera_id]
    return View(
        id=path.name,
        camera=camera,
        camera_from_world=image.camera_from_world,
        load_image=partial(read_color, path, size=(camera.width, camera.height), where=str(path)),
    )


def _good_photos(path: Path) -> list[set[str]]:
    """Names of the photos of `frames` and of `test_frames` that are not blurred or otherwise bad."""
    document = read_json(path, download("dslr_nerfstudio_transform_path"))
    names = []
    for key in ("frames", "test_frames"):
        frames = document.get(key, [])
        if not isinstance(frames, list) or not all(
            isinstance(f, dict) and isinstance(f.get("file_path"), str) for f in frames
        ):
            raise DataError(
                f"{path}: expected a list '{key}' of objects with 'file_path'; "
                f"{download('dslr_nerfstudio_transform_path')}"
            )
        names.append({_basename(f["file_path"]) for f in frames if not f.get("is_bad", False)})
    return names


def _pinhole(path: Path) -> Camera:
    """The camera of the undistorted photos."""
    asset = "dslr_nerfstudio_transform_undistorted_path"
    document = read_json(path, download(asset))
    try:
        parameters = [float(document[key]) for key in ("fl_x", "fl_y", "cx", "cy")]
        width, height = int(document["w"]), int(document["h"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: expected numbers fl_x, fl_y, cx, cy, w, h ({error}); {download(asset)}") from error
    if document.get("camera_model") != "PINHOLE":
        raise DataError(
            f"{path}: camera model {document.get('camera_model')!r}, expected 'PINHOLE' for undistorted photos; "
            f"{download(asset)}"
        )
    return camera_of("PINHOLE", parameters, width=width, height=height, where=str(path))


# --- iPhone ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Frame:
    """A frame of the video with a pose. `name` is `frame_000020`, without a suffix."""

    name: str
    number: int
    camera: Camera
    camera_from_world: NDArray[np.float64]


def check_libraries(scenes: Iterable[Path]) -> None:
    """Raise `UsageError` where a library that the frames of some scene need is not installed; none is imported.

    Scenes whose frames or depth were all extracted by the toolkit need none of them.
    """
    packed = {"video": False, "depth": False}
    for scene in scenes:
        folder = scene / "iphone"
        packed["video"] |= not (folder / "rgb").is_dir() and any((folder / name).is_file() for name in VIDEOS)
        packed["depth"] |= not (folder / "depth").is_dir() and (folder / "depth.bin").is_file()
        if all(packed.values()):
            break
    if packed["video"]:
        check_installed("av", "frames of videos", "datasets")
    if packed["depth"]:
        check_installed("lz4", "depth maps of ScanNet++'s iPhone", "datasets")


def iphone_views(scene: Path, *, every_frame: bool) -> Frames:
    """Frames of the iPhone's video with its depth, in time order.

    Args:
        scene: folder of the scene.
        every_frame: all that ARKit tracked, aligned to the mesh; else those that COLMAP has (every tenth).

    Raises:
        MissingDataError: video, depth or poses are missing.
        DataError: they cannot be used.
        UsageError: a library to decode the video is needed and not installed.
    """
    folder = scene / "iphone"
    if not folder.exists():
        return _no_views(folder, "iphone_video_path, iphone_depth_path, iphone_colmap_dir")
    broken: list[tuple[str, str]] = []
    frames = sorted(
        _tracked_frames(folder, broken) if every_frame else _registered_frames(folder), key=lambda f: f.number
    )
    for before, after in pairwise(frames):
        if before.number == after.number:
            raise DataError(f"{folder}: frame {before.number} stands there twice, as {before.name} and {after.name}")
    pixels, depths = _Pixels(folder, frames), _Depths(folder)
    views = []
    for frame in frames:
        try:
            views.append(_phone_view(frame, pixels, depths))
        except MissingDataError as error:
            broken.append((frame.name, str(error)))
    return tuple(views), tuple(broken)


def _phone_view(frame: _Frame, pixels: _Pixels, depths: _Depths) -> View:
    camera, load_image = pixels.of(frame)
    return View(
        id=frame.name,
        camera=camera,
        camera_from_world=frame.camera_from_world,
        load_image=load_image,
        # ARKit's depth is that of the colour camera, in fewer pixels.
        depth_camera=frame.camera.resized(width=DEPTH_SIZE[0], height=DEPTH_SIZE[1]),
        load_depth=depths.of(frame),
    )


def _registered_frames(folder: Path) -> Iterator[_Frame]:
    """Frames that COLMAP registered, with its refined poses and its one camera."""
    cameras, poses = _colmap(folder / "colmap", "iphone_colmap_dir")
    for name, image in poses.items():
        number = frame_number(name)
        if number is None:
            raise DataError(
                f"{folder / 'colmap'}: image {name!r} has no frame number, expected names such as frame_000020.jpg; "
                f"{download('iphone_colmap_dir')}"
            )
        yield _Frame(Path(name).stem, number, cameras[image.camera_id], image.camera_from_world)


def _tracked_frames(folder: Path, broken: list[tuple[str, str]]) -> Iterator[_Frame]:
    """Every frame of the video with ARKit's pose and intrinsics, and the lens that COLMAP found."""
    asset = "iphone_pose_intrinsic_imu_path"
    path = released(folder / "pose_intrinsic_imu.json", asset)
    cameras = read_cameras(released(folder / "colmap", "iphone_colmap_dir"))
    lens = next(iter(cameras.values()))
    for name, record in read_json(path, download(asset)).items():
        number = frame_number(name)
        if number is None or not isinstance(record, dict):
            raise DataError(f"{path}: expected records by frame, say 'frame_000020', got {name!r}; {download(asset)}")
        try:
            camera, pose = _matrix(record, "intrinsic", 3), _matrix(record, "aligned_pose", 4)
            yield _Frame(
                name,
                number,
                replace(
                    Camera.from_matrix(camera, width=lens.width, height=lens.height),
                    model=lens.model,
                    distortion=lens.distortion,
                ),
                invert_pose(pose),
            )
        except DataError as error:
            broken.append((name, f"{path}: {name}: {error}"))


def _matrix(record: Mapping[str, Any], key: str, side: int) -> NDArray[np.float64]:
    try:
        matrix = np.array(record[key], dtype=np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"expected a matrix {key!r} ({type(error).__name__}: {error})") from error
    if matrix.shape != (side, side):
        raise DataError(f"expected {key!r} of {side}x{side} numbers, got shape {list(matrix.shape)}")
    return matrix


class _Pixels:
    """Where the colours of frames come from: images that the toolkit extracted, else the video."""

    def __init__(self, folder: Path, frames: Iterable[_Frame]) -> None:
        self._images = folder / "rgb"
        self._files = {path.name for path in self._images.iterdir()} if self._images.is_dir() else set()
        self._video = next((folder / name for name in VIDEOS if (folder / name).is_file()), None)
        if self._video is None and not self._images.is_dir():
            released(folder / VIDEOS[0], "iphone_video_path")
        if self._video is not None and any(f"{frame.name}.jpg" not in self._files for frame in frames):
            require_video()
        paths = [self._images / f"{f.name}.jpg" for f in frames if f"{f.name}.jpg" in self._files]
        self._size = _size_of(paths)

    def of(self, frame: _Frame) -> tuple[Camera, Any]:
        """Camera and loader of a frame. Raises `MissingDataError`."""
        name, camera = f"{frame.name}.jpg", frame.camera
        if name in self._files:
            path = self._images / name
            camera = _resized(camera, self._size, path)
            size = (camera.width, camera.height)
            return camera, partial(read_color, path, size=size, where=str(path))
        if self._video is None:
            raise MissingDataError(
                f"{self._images / name}: no such file, and no video; {download('iphone_video_path')}"
            )
        size, where = (camera.width, camera.height), f"{frame.name} of {self._video}"
        return camera, partial(read_video_frame, self._video, frame.number, size=size, where=where)


class _Depths:
    """Where the depth of frames comes from: images that the toolkit extracted, else `depth.bin`."""

    def __init__(self, folder: Path) -> None:
        self._images = folder / "depth"
        self._files = {path.name for path in self._images.iterdir()} if self._images.is_dir() else set()
        self._packed = folder / "depth.bin"
        self._is_packed = self._packed.is_file()
        if not self._is_packed and not self._images.is_dir():
            released(self._packed, "iphone_depth_path")

    def of(self, frame: _Frame) -> Any:
        """Loader of a frame's depth. Raises `MissingDataError`."""
        path = self._images / f"{frame.name}.png"
        if path.name in self._files:
            return partial(read_depth, path, size=DEPTH_SIZE, where=str(path))
        if not self._is_packed:
            raise MissingDataError(f"{path}: no such file, and no depth.bin; {download('iphone_depth_path')}")
        return partial(read_depth_frame, self._packed, frame.number, where=f"{frame.name} of {self._packed}")


# --- both -----------------------------------------------------------------------------------------------------------


def _no_views(folder: Path, assets: str) -> Frames:
    error = (
        f"{folder}: no such folder, its points have no features; download the assets {assets} with ScanNet++'s script, "
        "then run again with --retry-incomplete"
    )
    return (), (("", error),)


def _colmap(folder: Path, asset: str) -> tuple[dict[int, Camera], dict[str, ColmapImage]]:
    """Cameras by id, and posed images by name without folders (some scenes have them)."""
    for name in ("cameras", "images"):
        if not (folder / f"{name}.bin").is_file():
            released(folder / f"{name}.txt", asset)
    cameras = read_cameras(folder)
    images: dict[str, ColmapImage] = {}
    for image in read_images(folder):
        name = _basename(image.name)
        if name in images or image.camera_id not in cameras:
            what = "stands there twice" if name in images else f"is of camera {image.camera_id}, which is not there"
            raise DataError(f"{folder}: image {image.name} {what}; {download(asset)}")
        images[name] = image
    return cameras, images


def _basename(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _of_images(cameras: Mapping[int, Camera], paths: list[Path], folder: Path) -> dict[int, Camera]:
    """Cameras of the images as they are: somebody may have made them smaller."""
    size = _size_of(paths)
    return {key: _resized(camera, size, folder) for key, camera in cameras.items()}


def _size_of(paths: list[Path]) -> tuple[int, int] | None:
    try:
        return first_image_size(paths)
    except DataError:  # none there, or none readable: said of each when it is loaded
        return None


def _resized(camera: Camera, size: tuple[int, int] | None, where: Path) -> Camera:
    """The camera of images of (width, height) `size`. Raises `DataError` where they were cropped."""
    if size is None or size == (camera.width, camera.height):
        return camera
    if not same_aspect(size, (camera.width, camera.height)):
        raise DataError(
            f"{where}: images of {size[0]}x{size[1]} pixels, but their camera is of {camera.width}x{camera.height}; "
            "cropped images cannot be used, download the released ones again"
        )
    return camera.resized(width=size[0], height=size[1])
