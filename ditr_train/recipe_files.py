"""Recipes as files: by name from where recipes lie, or by path; a file may extend another one.

With `extends: other`, a file's own keys win over the other's, key by key, and lists are replaced whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ditr_cache.errors import DataError, MissingDataError, UnknownNameError, UsageError
from ditr_train.recipe import Recipe, parse_recipe


def recipe_folders() -> list[Path]:
    """Where recipes lie: in the installed package, and in the source tree beside it."""
    package = Path(__file__).resolve().parent
    return [f for f in (package / "pipelines", package.parent / "pipelines") if f.is_dir()]


def list_recipes(folders: Sequence[Path] | None = None) -> dict[str, str]:
    """Name -> description of the recipes that can be run; `base` files only hold what others share."""
    found: dict[str, str] = {}
    for folder in recipe_folders() if folders is None else folders:
        for path in folder.rglob("*.yaml"):
            if path.stem != "base":
                name = path.relative_to(folder).with_suffix("").as_posix()
                found.setdefault(name, str(_read_yaml(path).get("description", "")))
    return dict(sorted(found.items()))


def load_recipe(name: str, overrides: Sequence[str] = (), folders: Sequence[Path] | None = None) -> Recipe:
    """The recipe of that name (say `demo/inject`), or of a YAML file, with `key.path=value` overrides.

    Args:
        name: a name below one of `folders`, or a path that ends in .yaml or .yml.
        overrides: values are YAML, say `data.batch_size=4`, `vfm=null`, `data.feat=[color,normal]`.
        folders: where names are looked up; None: `recipe_folders()`.

    Raises:
        UnknownNameError: no such recipe, or an unknown key; names the nearest.
        UsageError: a value that cannot be used; names its key.
        MissingDataError, DataError: a file that is not there or not YAML.
    """
    values = _resolve(name, recipe_folders() if folders is None else folders, ())
    for override in overrides:
        _override(values, override)
    return parse_recipe(values)


def read_recipe(path: Path) -> Recipe:
    """A recipe from one file as `Recipe.to_yaml` wrote it. Raises as `load_recipe`."""
    return parse_recipe(_read_yaml(path))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise MissingDataError(f"recipe {str(path)!r} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"recipe {str(path)!r} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"recipe {str(path)!r}: expected a mapping of keys to values, got {type(values).__name__}")
    return values


def _find(name: str, folders: Sequence[Path]) -> Path:
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    for folder in folders:
        if (path := folder / f"{name}.yaml").is_file():
            return path
    raise UnknownNameError.of("recipe", name, list_recipes(folders), "A path that ends in .yaml names a file.")


def _resolve(name: str, folders: Sequence[Path], seen: tuple[Path, ...]) -> dict[str, Any]:
    path = _find(name, folders)
    if path.resolve() in seen:
        raise UsageError(f"recipe {str(path)!r}: extends itself through {', '.join(p.stem for p in seen)}")
    values = _read_yaml(path)
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise UsageError(f"recipe {str(path)!r}: extends: expected the name of a recipe, got {parent!r}")
    if parent.endswith((".yaml", ".yml")):  # a file is named from the one that extends it
        parent = str(path.parent / parent)
    return _merge(_resolve(parent, folders, (*seen, path.resolve())), values)


def _merge(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return merged


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UsageError(f"--set: expected key=value (say data.batch_size=4), got {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {key}: the value {text!r} is not YAML") from error
    for depth, part in enumerate(path[:-1]):
        if values.get(part) is None:
            values[part] = {}
        if not isinstance(values[part], dict):
            raise UsageError(f"--set {key}: {'.'.join(path[: depth + 1])} is a value, it has no keys below it")
        values[part] = dict(values[part])
        values = values[part]
    values[path[-1]] = value
