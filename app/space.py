"""Assemble a Hugging Face Space: ``python -m tessera.app.space FOLDER [--push OWNER/NAME]``.

The Space runs the same ``app/main.py`` from a plain copy of the package. Its requirements differ from
the library's: CPU wheels of torch, no gradio (the Space's ``sdk_version`` brings it), nothing that
only training needs.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

from ..modalities.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
FILES = ("__init__.py", "__main__.py", "py.typed", "LICENSE", "NOTICE")
FOLDERS = ("app", "generators", "kernels", "modalities", "pipelines", "tokenizers", "weights")
CPU_WHEELS = "--extra-index-url https://download.pytorch.org/whl/cpu"
LEFT_OUT = ("gradio", "gradio_client", "triton", "tensorboard", "torchmetrics", "webdataset")
_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "*.egg-info")


def space_requirements(requirements: str) -> str:
    """The library's requirements -> those of a CPU Space."""
    kept = [
        line
        for line in requirements.splitlines()
        if line.strip() and re.split(r"[=<>;\[ ]", line.strip())[0] not in LEFT_OUT
    ]
    return "\n".join([CPU_WHEELS, *kept]) + "\n"


def assemble(folder: Path) -> None:
    """Write the Space into a new or empty folder.

    Raises:
        InputError: something is there already, or this is an installed package without the
            checkout's requirements.txt.
    """
    requirements = ROOT / "requirements.txt"
    if not requirements.is_file():
        raise InputError(f'"{requirements}" is missing: run this from a checkout of Tessera.')
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f'"{folder}" is there already: give a new or empty folder.')
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy2(ROOT / name, folder / name)
    for name in FOLDERS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=_IGNORED)
    shutil.copy2(Path(__file__).with_name("README_space.md"), folder / "README.md")
    text = space_requirements(requirements.read_text(encoding="utf8"))
    (folder / "requirements.txt").write_text(text, encoding="utf8")


def push(folder: Path, repository: str) -> str:
    """Upload the folder as a Space of the hub account that is logged in; returns its address.

    Raises:
        InputError: nobody is logged in.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise InputError("Nobody is logged in to the hub: run hf auth login first.")
    api = HfApi()
    url = api.create_repo(repository, repo_type="space", space_sdk="gradio", exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=repository, repo_type="space")
    return str(url)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tessera.app.space")
    parser.add_argument("folder", type=Path, help="new or empty folder to write the Space to")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload it as this Space")
    options = parser.parse_args(arguments)
    try:
        assemble(options.folder)
        print(options.folder)
        if options.push:
            print(push(options.folder, options.push))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
