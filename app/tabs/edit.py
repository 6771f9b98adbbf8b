"""The Edit tab: paint over a part of a picture and have it drawn anew, or go on beyond a side."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image

from ...modalities.errors import InputError
from ..faults import guarded
from ..picture_job import PictureJob
from ..studio import Card, Studio
from .picture import model_label, requests, seed_number
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

COUNT = 4
INSIDE = "painted area"
_EMPTY = (
    "<p>Drop a picture, paint over what shall change, and say what shall be there.</p>"
    "<p>For models whose tokens form a grid.</p>"
)


class EditJob(PictureJob):
    """
    Args:
        picture, mask: of one size; white in the mask is drawn anew.
        side: where to go on instead; None is in-painting.
    """

    kind = "edit"

    def __init__(
        self, studio: Studio, owner: str, request: Any, picture: Any, mask: Any, side: str | None
    ):
        super().__init__(studio, owner, request)
        self.picture, self.mask, self.side = picture, mask, side

    def make_edit(self, pipeline: Any) -> Any:
        if self.side is not None:
            return pipeline.outpainting(self.picture, self.side)
        return pipeline.inpainting(self.picture, self.mask)


def painted(value: dict[str, Any] | None) -> tuple[Image.Image, Image.Image]:
    """Picture and mask of an editor's value.

    Raises:
        InputError: there is no picture.
    """
    if not value or value.get("background") is None:
        raise InputError("Drop a picture first.")
    picture = value["background"].convert("RGB")
    mask = Image.new("L", picture.size)
    for layer in value.get("layers") or []:
        mask.paste(
            255, (0, 0), layer.convert("RGBA").getchannel("A").point(lambda a: 255 * (a > 32))
        )
    return picture, mask


def enqueue(
    studio: Studio,
    card: Card,
    owner: Any,
    value: dict[str, Any] | None,
    prompt: str | None,
    where: str,
    model: str,
    seed: str | None,
) -> tuple[str, EditJob]:
    """Queue an edit.

    Returns:
        The owner's key and the job.

    Raises:
        InputError: no picture, nothing painted, no such class, or too many jobs.
    """
    owner = owner_key(owner)
    picture, mask = painted(value)
    if where == INSIDE and mask.getbbox() is None:
        raise InputError("Paint over what shall be drawn anew first.")
    chosen = None if model == studio.name else model
    if chosen is not None:
        card = studio.card_of(chosen)
    text = prompt if prompt and prompt.strip() else card.example
    found = requests(card, text, count=COUNT, seed=seed_number(seed), model=chosen)
    side = None if where == INSIDE else where
    job = EditJob(studio, owner, found[0], picture, mask, side)
    studio.jobs.submit(job)
    return owner, job


def edit_tab(studio: Studio, card: Card, owner: gr.BrowserState) -> tuple[gr.HTML, Any]:
    """Returns the list of jobs and the handler that shows it."""
    names = studio.image_models()
    with gr.Row(elem_classes="ts-bench"):
        with gr.Column(scale=3, min_width=0, elem_classes="ts-results"):
            editor = gr.ImageEditor(
                type="pil",
                label="Picture",
                sources=("upload", "clipboard"),
                brush=gr.Brush(default_size=24, colors=["#e11d48"], color_mode="fixed"),
                layers=False,
                transforms=(),
                height=420,
                elem_id="edit-picture",
            )
            stage = jobs_component("stage.js", _EMPTY, elem_id="edits")
        with gr.Column(scale=1, min_width=240, elem_classes="ts-settings"):
            prompt = gr.Textbox(label="What shall be there", placeholder=card.example, max_lines=4)
            where = gr.Radio(
                [INSIDE, "left", "right", "top", "bottom"],
                value=INSIDE,
                label="Where",
                info="A side goes on beyond the picture.",
            )
            model = gr.Dropdown(
                [(model_label(name), name) for name in names],
                value=names[0],
                label="Model",
                visible=len(names) > 1,
            )
            seed = gr.Textbox(label="Seed of the edit", placeholder="random", max_lines=1)
            with gr.Row(elem_classes="ts-choices"):
                go = gr.Button("Draw anew", variant="primary", elem_id="edit")
                stop = gr.Button("Stop", min_width=70, scale=0)
            markup(
                '<p class="ts-hint">Four pictures. What is not painted over stays as it is, to the '
                "size of a token.</p>"
            )

    watch = watcher(studio, "edit")

    def start(owner: Any, *values: Any) -> str:
        return enqueue(studio, card, owner, *values)[0]

    gr.on(
        [go.click, prompt.submit],
        guarded(start),
        [owner, editor, prompt, where, model, seed],
        owner,
        trigger_mode="multiple",
        **ACTION,
    ).success(watch, owner, stage, trigger_mode="multiple", **ACTION)
    stop.click(stop_first(studio, "edit"), owner, **QUIET)
    stage.stop_job(stop_named(studio), owner, trigger_mode="multiple", **QUIET)
    return stage, watch
