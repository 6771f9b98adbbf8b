"""The package: what it contains, what importing it costs, what the registry knows."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tessera
from tessera.modalities.errors import InputError
from tessera.weights.loading import converter, licence_notice
from tessera.weights.registry import list_models, model_info, resolve_model

ROOT = Path(tessera.__file__).parent
CODE = ("app", "benchmarks", "evaluation", "generators", "kernels", "modalities", "pipelines")
CODE += ("tokenizers", "training", "weights")
PUBLISHED = list_models(shipped=False)


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_every_folder_of_code_is_in_the_package_list():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    folders = {path.parent for part in CODE for path in (ROOT / part).rglob("*.py")}
    names = {".".join(("tessera", *folder.relative_to(ROOT).parts)) for folder in folders}
    assert listed == names | {"tessera"}


def test_no_folder_shadows_another_package():
    assert not [path for part in CODE for path in (ROOT / part).rglob("__init__.py")]


def test_importing_is_light():
    heavy = "torch numpy diffusers gradio transformers PIL yaml typer"
    code = f"import sys, tessera; print([m for m in '{heavy}'.split() if m in sys.modules])"
    assert run(code).strip() == "[]"


@pytest.mark.parametrize("name", [n for n in tessera.__all__ if n != "__version__"])
def test_public_names_load(name):
    assert getattr(tessera, name).__name__ == name


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = tessera.Nothing


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows_are_complete(name):
    info = model_info(name)
    assert info.name == name == name.lower() and "/" not in name
    assert info.hub_id.count("/") == 1 and info.files
    assert info.license_code and info.license_weights
    assert info.title and info.paper and info.parameters
    assert hasattr(converter(info.system), "convert_state_dict")
    kind = info.model_class()
    inspect.signature(kind).bind(**info.config)
    notice = licence_notice(info)
    assert (notice is not None) == info.non_commercial
    if notice:
        assert info.license_weights in notice


@pytest.mark.parametrize("hub_id", sorted({model_info(n).hub_id for n in PUBLISHED}))
def test_a_hub_id_finds_its_model_or_names_them_all(hub_id):
    names = [name for name in PUBLISHED if model_info(name).hub_id == hub_id]
    if len(names) == 1:
        assert model_info(hub_id.upper()).name == names[0]
    else:
        with pytest.raises(InputError, match=f"several models: name one of {', '.join(names)}."):
            model_info(hub_id.upper())


def test_models_are_found_by_pattern_task_and_place():
    assert list_models("flextok*") == [n for n in list_models() if n.startswith("flextok")]
    assert "flextok-d12-d12" in list_models("epfl-vilab/*", task="image-tokenizer")
    assert "flextok-d12-d12" not in list_models(shipped=True)
    assert list_models("no-such-*") == []
    with pytest.raises(InputError, match="no-such-model"):
        model_info("no-such-model")


def test_where_a_model_is(tmp_path, monkeypatch):
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model("owner/name") == "owner/name"
    for name in ("no-such-model", "../up", "/no/such/folder", "a/b/c"):
        with pytest.raises(InputError, match="Unknown model"):
            resolve_model(name)
