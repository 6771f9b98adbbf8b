"""Recipes: YAML with a base, named sizes and ``key=value`` overrides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..modalities.errors import InputError

RECIPES = Path(__file__).parent / "recipes"


class Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in YAML 1.2; 1.1 wants it written 1.0e-3."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class Settings(dict):
    """A mapping of a recipe: a setting that it lacks is the writer's mistake, not a bug."""

    def __missing__(self, key: str) -> Any:
        raise InputError(f'The recipe has no setting "{key}": add it to the file.')


def list_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a recipe by name or path.

    ``size=gpu`` picks one of the recipe's ``sizes`` (default: the first listed), whose entries
    replace those of the base; then each ``dotted.key=value`` is set, the value read as YAML.

    Raises:
        InputError: an unknown recipe, size or key, a file that is not a YAML mapping, or an
            override that is not ``key=value`` or not of the setting's kind.
    """
    path = Path(name)
    if not path.is_file():
        path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise InputError(
            f'No recipe "{name}": give a YAML file or one of {", ".join(list_recipes())}.'
        )
    try:
        recipe = yaml.load(path.read_text(encoding="utf8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f'"{path}" is not valid YAML: {str(error).splitlines()[0]}.') from error
    if not isinstance(recipe, dict):
        raise InputError(f'"{path}" is not a recipe: it should hold "task: ..." and settings.')

    changes = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise InputError(f'"{override}" is not key=value: write e.g. training.steps=100.')
        changes[key] = value
    sizes = recipe.pop("sizes", {})
    size = changes.pop("size", next(iter(sizes), None))
    if size is not None:
        if size not in sizes:
            raise InputError(
                f'Recipe "{path.stem}" has no size "{size}": choose from {", ".join(sizes)}.'
            )
        _merge(recipe, sizes[size])
    for key, value in changes.items():
        node = recipe
        *parents, last = key.split(".")
        for part in parents:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            raise InputError(f'Recipe "{path.stem}" has no setting "{key}": check its spelling.')
        node[last] = _parse(key, value, node[last])
    return _to_settings(recipe)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _parse(key: str, text: str, old: Any) -> Any:
    """The value of an override, of the kind of the one that it replaces; null is no name."""
    if isinstance(old, str):
        return None if text == "null" else text
    problem = InputError(f'"{text}" does not fit {key}, which is {old}: give such a value.')
    try:
        value = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise problem from error
    if isinstance(old, int) and isinstance(value, float) and value.is_integer():
        value = int(value)
    whole_for_real = isinstance(old, float) and type(value) is int
    if old is not None and type(value) is not type(old) and not whole_for_real:
        raise problem
    return value


def _to_settings(value: Any) -> Any:
    if isinstance(value, dict):
        return Settings({key: _to_settings(item) for key, item in value.items()})
    return value
