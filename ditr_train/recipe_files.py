"""Recipes as files: by name from where recipes lie, or by path; a file may extend another one.

With `extends: other`, a file's own keys win over the other's, key by key, and lists are replaced whole. It may extend
several, `extends: [one, other]`: each wins over those before it. `published` belongs to one recipe and is not
inherited; nor are the settings of a backbone where `model.backbone.name` names another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditr_cache.errors import DataError, MissingDataError, UnknownNameError, UsageError
from ditr_train.models.config import backbone_name
from ditr_train.recipe import Recipe, parse_recipe
from ditr_train.recipe_sections import PublishedConfig
from ditr_train.recipe_yaml import YamlError, parse_yaml, read_yaml

MAX_FILES = 50
"""Most files that a recipe may extend; those that come with the package extend up to six."""


def recipe_folders() -> list[Path]:
    """Where recipes lie: in the installed package, and in the source tree beside it."""
    package = Path(__file__).resolve().parent
    return [f for f in (package / "pipelines", package.parent / "pipelines") if f.is_dir()]


@dataclass(frozen=True, kw_only=True)
class RecipeSummary:
    """What a recipe says of itself.

    Args:
        description: one line.
        published: the score that it was published with; None where it was not.
    """

    description: str
    published: PublishedConfig | None


def list_recipes(folders: Sequence[Path] | None = None) -> dict[str, str]:
    """Name -> description of the recipes that can be run; see `recipe_summaries`."""
    return {name: summary.description for name, summary in recipe_summaries(folders).items()}


def recipe_summaries(folders: Sequence[Path] | None = None) -> dict[str, RecipeSummary]:
    """The recipes that can be run, by name; files `base` and `base-*` only hold what others share."""
    found: dict[str, RecipeSummary] = {}
    for folder in recipe_folders() if folders is None else folders:
        for path in folder.rglob("*.yaml"):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if path.stem == "base" or path.stem.startswith("base-") or name in found:
                continue
            values = _read_yaml(path)
            published = values.get("published")
            found[name] = RecipeSummary(
                description=str(values.get("description", "")),
                published=None if published is None else PublishedConfig.model_validate(published),
            )
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
    values = _resolve(name, recipe_folders() if folders is None else folders, (), {})
    # The backbone first: naming another one drops the settings of the one before, not those given beside it.
    for override in sorted(overrides, key=lambda o: o.partition("=")[0].strip() != "model.backbone.name"):
        _override(values, override)
    return parse_recipe(values)


def read_recipe(path: Path) -> Recipe:
    """A recipe from one file as `Recipe.to_yaml` wrote it. Raises as `load_recipe`."""
    return parse_recipe(_read_yaml(path))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path)
    except OSError as error:
        raise MissingDataError(f"recipe {str(path)!r} cannot be read: {error.strerror or error}") from error
    except (YamlError, UnicodeDecodeError) as error:
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


def _resolve(
    name: str, folders: Sequence[Path], seen: tuple[Path, ...], done: dict[Path, dict[str, Any]]
) -> dict[str, Any]:
    """The values of a recipe over those that it extends; `done` are the files that were resolved before."""
    path = _find(name, folders)
    own = path.resolve()
    if own in done:  # each file once, however many paths lead to it
        return done[own]
    if own in seen:
        raise UsageError(f"recipe {str(path)!r}: extends itself through {', '.join(p.stem for p in seen)}")
    if len(done) + len(seen) >= MAX_FILES:
        raise UsageError(f"recipe {str(path)!r}: extended by a recipe of more than {MAX_FILES} files")
    values = _read_yaml(path)
    parents = values.pop("extends", [])
    if isinstance(parents, str):
        parents = [parents]
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UsageError(f"recipe {str(path)!r}: extends: expected the name of a recipe, or several, got {parents!r}")
    merged: dict[str, Any] = {}
    for parent in parents:
        if parent.endswith((".yaml", ".yml")):  # a file is named from the one that extends it
            parent = str(path.parent / parent)
        merged = _extend(merged, _resolve(parent, folders, (*seen, own), done))
    merged.pop("published", None)
    done[own] = _extend(merged, values)
    return done[own]


def _extend(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` over `base`; settings of a backbone are not handed on to another one."""
    model, changed = base.get("model"), own.get("model")
    backbone = changed.get("backbone") if isinstance(changed, Mapping) else None
    if isinstance(model, Mapping) and isinstance(backbone, Mapping) and "name" in backbone:
        below = model.get("backbone")
        if isinstance(below, Mapping) and backbone_name(below) != backbone_name(backbone):
            base = {**base, "model": {key: value for key, value in model.items() if key != "backbone"}}
    return _merge(base, own)


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
        value = parse_yaml(text)
    except YamlError as error:
        raise UsageError(f"--set {key}: the value {text!r} is not YAML") from error
    if path == ["model", "backbone", "name"]:
        values.update(_extend(values, {"model": {"backbone": {"name": value}}}))
    else:
        _assign(values, key, path, value)


def _assign(values: dict[str, Any], key: str, path: Sequence[str], value: Any, done: str = "") -> None:
    """Set the value at a path of keys; the entry of a list is named by its number."""
    first, rest = path[0], path[1:]
    if not rest:
        values[first] = value
        return
    here = f"{done}.{first}".lstrip(".")
    below = values.get(first)
    if isinstance(below, list):
        numbered = {str(number): item for number, item in enumerate(below)}
        if rest[0] not in numbered:
            raise UsageError(f"--set {key}: {here} has entries 0 to {len(below) - 1}, got {rest[0]!r}")
        _assign(numbered, key, rest, value, here)
        values[first] = list(numbered.values())
        return
    if below is not None and not isinstance(below, dict):
        raise UsageError(f"--set {key}: {here} is a value, it has no keys below it")
    values[first] = dict(below or {})
    _assign(values[first], key, rest, value, here)
