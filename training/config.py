"""Recipes: YAML with a base, named sizes and ``key=value`` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..modalities.errors import InputError

RECIPES = Path(__file__).parent / "recipes"


def list_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe by name or path.

    ``size=gpu`` picks one of the recipe's ``sizes`` (default: the first listed), whose entries
    replace those of the base; then each ``dotted.key=value`` is set, the value read as YAML.

    Raises:
        InputError: an unknown recipe, size or key, or an override that is not ``key=value``.
    """
    path = Path(name)
    if not path.is_file():
        path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise InputError(
            f'No recipe "{name}": give a YAML file or one of {", ".join(list_recipes())}.'
        )
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf8"))
    except yaml.YAMLError as error:
        raise InputError(f'"{path}" is not valid YAML: {str(error).splitlines()[0]}.') from error
    changes = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise InputError(f'"{override}" is not key=value.')
        changes[key] = yaml.safe_load(value)
    sizes = recipe.pop("sizes", {})
    size = changes.pop("size", next(iter(sizes), None))
    if size is not None:
        if size not in sizes:
            raise InputError(f'Recipe "{path.stem}" has no size "{size}": {", ".join(sizes)}.')
        _merge(recipe, sizes[size])
    for key, value in changes.items():
        node = recipe
        *parents, last = key.split(".")
        for part in parents:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            raise InputError(f'Recipe "{path.stem}" has no setting "{key}".')
        node[last] = value
    return recipe


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value
