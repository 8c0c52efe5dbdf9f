"""A COLMAP workspace as a capture: a sparse model with its images, or a dense workspace with depth maps.

```
<capture>/images/<name>   sparse/0/{cameras,images}.{bin,txt}   depths/<name>.png          a sparse model
<capture>/images/<name>   sparse/{cameras,images}.{bin,txt}     stereo/depth_maps/<name>.geometric.bin   fused.ply
```

`rigs` and `frames` of newer versions say nothing that `images` does not, and the points of the sparse model are no
point cloud: a few thousand corners.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from ditr_cache.datasets.colmap import has_model, read_cameras, read_images
from ditr_cache.datasets.posed.frames import Description, PosedFrame, path_inside
from ditr_cache.errors import DataError

_LOG = logging.getLogger(__name__)

_FILES = ("cameras.bin", "cameras.txt", "images.bin", "images.txt")


def model_folder(folder: Path) -> Path | None:
    """Where the COLMAP model of a capture lies, perhaps incomplete; None where there is none.

    The largest number is not the largest model: of several that COLMAP could not join, the first is taken.
    """
    models = _numbered_models(folder)
    if models:
        return models[0]
    if any((folder / "sparse" / name).is_file() for name in _FILES):
        return folder / "sparse"
    return folder if has_model(folder) else None


def read_workspace(folder: Path, root: Path, *, depth: bool, depth_unit: float) -> Description:
    """The registered images of the COLMAP model of a capture; see `read_transforms` for the arguments.

    Raises:
        MissingDataError: a file of the model is missing.
        DataError: a file of the model is damaged.
    """
    model = model_folder(folder) or folder / "sparse" / "0"
    others = [other.name for other in _numbered_models(folder) if other != model]
    if others:
        _LOG.warning(
            "%s: COLMAP made several models that share no world; taking %s, leaving out %s and their images",
            folder,
            model.name,
            ", ".join(others),
        )
    cameras = read_cameras(model)
    pictures = folder / "images" if (folder / "images").is_dir() else folder
    frames: list[PosedFrame] = []
    broken: list[tuple[str, DataError]] = []
    for image in read_images(model):
        try:
            if image.camera_id not in cameras:
                raise DataError(f"{model}: image {image.name!r} is of camera {image.camera_id}, which is not there")
            path = path_inside(image.name, pictures, root, f"{model} image {image.id}")
        except DataError as error:
            broken.append((image.name, error))
            continue
        frames.append(
            PosedFrame(
                id=image.name,
                image=path,
                camera=cameras[image.camera_id],
                camera_from_world=image.camera_from_world,
            )
        )
    if depth:
        frames = _with_depth(frames, folder, depth_unit)
    return Description(source=model, frames=tuple(frames), broken=tuple(broken))


def _numbered_models(folder: Path) -> list[Path]:
    """Models `sparse/0`, `sparse/1`, ..."""
    sparse = folder / "sparse"
    numbers = [p for p in sparse.iterdir() if p.name.isascii() and p.name.isdigit()] if sparse.is_dir() else []
    return [p for p in sorted(numbers, key=lambda p: int(p.name)) if any((p / name).is_file() for name in _FILES)]


def _with_depth(frames: list[PosedFrame], folder: Path, unit: float) -> list[PosedFrame]:
    """The frames with the depth maps of COLMAP's stereo, or of `depths/`; as they are where there is none."""
    stereo, measured = folder / "stereo" / "depth_maps", folder / "depths"
    for kind in ("geometric", "photometric"):
        files = [stereo / f"{frame.id}.{kind}.bin" for frame in frames]
        if stereo.is_dir() and any(path.is_file() for path in files):
            return [replace(frame, depth=path, depth_unit=1.0) for frame, path in zip(frames, files, strict=True)]
    if measured.is_dir():
        return [replace(f, depth=(measured / f.id).with_suffix(".png"), depth_unit=unit) for f in frames]
    return frames
