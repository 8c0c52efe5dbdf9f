"""The published augmentations by name, as pure functions of a sample and a random generator.

A transform never writes into the arrays it is given, and it moves `PointSample.row` with its point and never changes
it: the link between a point and its feature survives every augmentation. Defaults are those of Pointcept's ScanNet
recipes. Angles are degrees, lengths metres, colours 0..255.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pydantic

from ditr_cache.errors import UnknownNameError, UsageError
from ditr_train.data import chromatic, spatial
from ditr_train.data.elastic import ElasticDistortion
from ditr_train.data.instances import INSTANCE_TRANSFORMS
from ditr_train.data.sample import PointSample


class Transform(Protocol):
    """A step of augmentation."""

    def __call__(self, points: PointSample, rng: np.random.Generator) -> PointSample:
        """The augmented points; every random draw comes from `rng`."""


TRANSFORMS: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        spatial.CenterShift, spatial.RandomDropout, spatial.RandomRotate, spatial.RandomScale, spatial.RandomShift,
        spatial.RandomFlip, spatial.RandomJitter, spatial.SphereCrop, spatial.PointClip, spatial.PointClipDistance,
        ElasticDistortion, chromatic.ChromaticAutoContrast, chromatic.ChromaticTranslation, chromatic.ChromaticJitter,
        chromatic.ChromaticDrop, chromatic.ChromaticNormalize, *INSTANCE_TRANSFORMS,
    )
}  # fmt: skip
"""Name of every transform that a recipe can list -> class."""

POINTWISE = (spatial.PointClip, spatial.PointClipDistance, chromatic.ChromaticNormalize)
"""Those that draw nothing and treat each point by itself: what `data.at_test` can list."""


def build_transform(name: str, args: Mapping[str, Any]) -> Transform:
    """Transform `name` with its arguments.

    Raises:
        UnknownNameError: no such transform, or an argument that it does not have; names the nearest.
        UsageError: a value that it cannot use.
    """
    if name not in TRANSFORMS:
        raise UnknownNameError.of("transform", name, TRANSFORMS)
    cls = TRANSFORMS[name]
    known = {f.name for f in dataclasses.fields(cls)}
    for key in args:
        if key not in known:
            raise UnknownNameError.of(f"argument of {name}", str(key), known)
    try:
        return pydantic.TypeAdapter(cls).validate_python(dict(args))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join([name, *map(str, first["loc"])])
        message = first["msg"].removeprefix("Value error, ").removeprefix(f"{name}: ")
        got = "" if first["type"] == "value_error" else f", got {first['input']!r}"  # a check of ours says it
        raise UsageError(f"{where}: {message[:1].lower()}{message[1:]}{got}") from error


def apply(transforms: Sequence[Transform], points: PointSample, rng: np.random.Generator) -> PointSample:
    """`points` after every transform in turn."""
    for transform in transforms:
        points = transform(points, rng)
    return points


def needs_instances(transforms: Sequence[Transform]) -> bool:
    """Whether one of them reads `PointSample.instance`."""
    return any(isinstance(transform, INSTANCE_TRANSFORMS) for transform in transforms)
