"""The Compare tab: one prompt and seed over the values of two settings."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ...modalities.text import clean_prompt
from ...pipelines.class_names import find_class
from ..faults import guarded
from ..grid_job import GridJob
from ..studio import Card, Studio
from ..xy_grid import NAMES, Axis
from .picture import model_label, seed_number
from .widgets import (
    ACTION,
    QUIET,
    jobs_component,
    markup,
    owner_key,
    stop_first,
    stop_named,
    watcher,
)

_EMPTY = "<p>Choose one or two settings and their values: a picture for each pair of them.</p>"
_NOTHING = "none"


def enqueue(
    studio: Studio,
    card: Card,
    owner: Any,
    prompt: str | None,
    model: str,
    seed: str | None,
    x_name: str,
    x_values: str,
    y_name: str,
    y_values: str,
) -> tuple[str, GridJob]:
    """Queue a grid.

    Returns:
        The owner's key and the job.

    Raises:
        InputError: an axis without values, no such class, or too many jobs.
    """
    owner = owner_key(owner)
    chosen = None if model == studio.name else model
    if chosen is not None:
        card = studio.card_of(chosen)
    text = clean_prompt(prompt if prompt and prompt.strip() else card.example)
    if card.num_classes:
        find_class(text, card.num_classes, card.class_names)
    x = Axis.of(x_name, x_values or "")
    y = None if y_name == _NOTHING else Axis.of(y_name, y_values or "")
    job = GridJob(studio, owner, text, seed_number(seed), x, y, chosen)
    studio.jobs.submit(job)
    return owner, job


def compare_tab(studio: Studio, card: Card, owner: gr.BrowserState) -> tuple[gr.HTML, Any]:
    """Returns the list of jobs and the handler that shows it."""
    names = studio.image_models()
    with gr.Row(elem_classes="ts-bench"):
        with gr.Column(scale=3, min_width=0, elem_classes="ts-results"):
            sheets = jobs_component("compare.js", _EMPTY, elem_id="sheets")
        with gr.Column(scale=1, min_width=240, elem_classes="ts-settings"):
            prompt = gr.Textbox(
                label="Prompt of the grid",
                placeholder=card.example,
                max_lines=4,
                elem_id="sheet-prompt",
            )
            model = gr.Dropdown(
                [(model_label(name), name) for name in names],
                value=names[0],
                label="Model",
                visible=len(names) > 1,
            )
            seed = gr.Textbox(label="Seed of the grid", placeholder="random", max_lines=1)
            x_name = gr.Dropdown(list(NAMES), value="guidance", label="Across")
            x_values = gr.Textbox(value="1, 3, 6", label="Values across", max_lines=3)
            y_name = gr.Dropdown([_NOTHING, *NAMES], value="temperature", label="Down")
            y_values = gr.Textbox(value="0.5, 1", label="Values down", max_lines=3)
            with gr.Row(elem_classes="ts-choices"):
                go = gr.Button("Compare", variant="primary", elem_id="compare")
                stop = gr.Button("Stop", min_width=70, scale=0)
            markup('<p class="ts-hint">All pictures have the same seed.</p>')

    watch = watcher(studio, "grid")

    def start(owner: Any, *values: Any) -> str:
        return enqueue(studio, card, owner, *values)[0]

    gr.on(
        [go.click, prompt.submit],
        guarded(start),
        [owner, prompt, model, seed, x_name, x_values, y_name, y_values],
        owner,
        trigger_mode="multiple",
        **ACTION,
    ).success(watch, owner, sheets, trigger_mode="multiple", **ACTION)
    stop.click(stop_first(studio, "grid"), owner, **QUIET)
    sheets.stop_job(stop_named(studio), owner, trigger_mode="multiple", **QUIET)
    return sheets, watch
