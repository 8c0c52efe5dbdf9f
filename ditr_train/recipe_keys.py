"""Unknown keys of a recipe, found before its values are read, so that the nearest known ones can be named."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from ditr_cache.errors import UnknownNameError, UsageError
from ditr_train.models.config import BACKBONES, DEFAULT_BACKBONE, backbone_name


def refuse_unknown(values: Any, annotation: Any, prefix: str) -> None:
    """Raise `UnknownNameError` for the first key that no field of the annotated type has, however deep."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType) and set(typing.get_args(annotation)) == set(
        BACKBONES.values()
    ):
        annotation = _backbone_type(values, prefix)
    known = _fields(annotation)
    if known is None or not isinstance(values, Mapping):
        return
    for key, value in values.items():
        if key not in known:
            where = f" of {prefix.rstrip('.')!r}" if prefix else ""
            raise UnknownNameError.of(f"recipe key {prefix}{key!s}: key{where}", str(key), known)
        nested = known[key]
        if isinstance(value, list):
            for i, item in enumerate(value):
                refuse_unknown(item, _item_type(nested), f"{prefix}{key}.{i}.")
        else:
            refuse_unknown(value, nested, f"{prefix}{key}.")


def _backbone_type(values: Any, prefix: str) -> Any:
    if isinstance(values, str):
        section = prefix.rstrip(".")
        raise UsageError(
            f"{section}: expected settings, got {values!r}; choose a backbone with --set {section}.name={values}"
        )
    name = backbone_name(values) if isinstance(values, Mapping) else DEFAULT_BACKBONE
    if name not in BACKBONES:
        raise UnknownNameError.of(f"backbone in {prefix}name", name, BACKBONES)
    return BACKBONES[name]


def _item_type(annotation: Any) -> Any:
    """Type of the items of a tuple (also where it may be something else, too); None for every other type."""
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((item for a in typing.get_args(annotation) if (item := _item_type(a)) is not None), None)
    return None


def _fields(annotation: Any) -> dict[str, Any] | None:
    """Name -> type of the fields of a section (also where it may be None); None for every other type."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        found = [f for a in typing.get_args(annotation) if (f := _fields(a)) is not None]
        return found[0] if found else None
    if not isinstance(annotation, type):
        return None
    if issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation):
        hints = typing.get_type_hints(annotation)
        names = (
            annotation.model_fields
            if issubclass(annotation, BaseModel)
            else [f.name for f in dataclasses.fields(annotation)]
        )
        return {name: hints[name] for name in names}
    return None
