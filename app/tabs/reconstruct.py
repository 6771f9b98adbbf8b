"""The Tokens tab: what tokenizers keep of a picture, by number of tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ...modalities.errors import InputError
from ...modalities.image import load_image
from ..faults import guarded
from ..reconstruct_job import ReconstructJob
from ..studio import Studio
from .widgets import (
    ACTION,
    QUIET,
    jobs_component,
    markup,
    owner_key,
    picture_file,
    stop_first,
    watcher,
)

MAX_TOKENIZERS = 8
_EMPTY = "<p>Drop a picture to see it as tokens, from one token to all.</p>"


def enqueue(
    studio: Studio, owner: Any, path: str | None, tokenizers: Sequence[str]
) -> tuple[str, ReconstructJob]:
    """Queue the reconstruction of an uploaded picture.

    Returns:
        The owner's key and the job.

    Raises:
        InputError: no picture, a damaged one, or no tokenizer.
    """
    owner = owner_key(owner)
    if path is None:
        raise InputError("Drop a picture first.")
    if not 1 <= len(tokenizers) <= MAX_TOKENIZERS:
        raise InputError(f"Choose 1 to {MAX_TOKENIZERS} tokenizers, got {len(tokenizers)}.")
    name = os.path.basename(path)
    picture = load_image(Path(path), name=f'"{name}"')
    job = ReconstructJob(studio, owner, picture, name, tokenizers)
    studio.jobs.submit(job)
    return owner, job


def reconstruct_tab(studio: Studio, owner: gr.BrowserState) -> tuple[gr.HTML, Any]:
    """Returns the list of jobs and the handler that shows it."""
    names = studio.tokenizer_names()
    with gr.Row(elem_classes="ts-bench"):
        with gr.Column(scale=3, min_width=0, elem_classes="ts-results"):
            rows = jobs_component("reconstruct.js", _EMPTY, elem_id="reconstructions")
        with gr.Column(scale=1, min_width=240, elem_classes="ts-settings"):
            picture = picture_file(
                label="Picture",
                placeholder="Drop a picture",
                height=220,
                elem_id="reconstruct-picture",
            )
            tokenizers = gr.CheckboxGroup(
                names, value=names[:1], label="Tokenizers", elem_id="tokenizers"
            )
            with gr.Row(elem_classes="ts-choices"):
                go = gr.Button("Reconstruct", variant="primary", elem_id="reconstruct")
                stop = gr.Button("Stop", min_width=70, scale=0)
            markup('<p class="ts-hint">More tokenizers: see the Models tab.</p>')

    watch = watcher(studio, "reconstruction")

    def start(owner: Any, path: str | None, chosen: list[str]) -> str:
        return enqueue(studio, owner, path, chosen)[0]

    def start_dropped(owner: Any, path: str | None, chosen: list[str]) -> str:
        return owner_key(owner) if path is None else start(owner, path, chosen)

    for trigger, handler in ((go.click, start), (picture.change, start_dropped)):
        gr.on(
            [trigger],
            guarded(handler),
            [owner, picture, tokenizers],
            owner,
            trigger_mode="multiple",
            **ACTION,
        ).success(
            watch,
            owner,
            rows,
            trigger_mode="multiple",
            **ACTION,
        )
    stop.click(stop_first(studio, "reconstruction"), owner, **QUIET)
    return rows, watch
