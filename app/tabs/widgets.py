"""Pieces that several tabs use."""

from __future__ import annotations

import asyncio
import html
import re
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import gradio as gr

from ...modalities.errors import InputError
from ...modalities.image import read_record
from ..faults import guarded
from ..studio import Card, Studio

ASSETS = Path(__file__).parent.parent / "assets"
ANY_STYLE = "any"
COUNTS = (1, 4, 8)
# Of one owner, newest first; older pictures are in the Library.
SHOWN_JOBS = 8
POLL_SECONDS = 0.1

_SETTING_LABELS = {
    "style": "Style",
    "num_tokens": "Tokens",
    "num_inference_steps": "Decoder steps",
    "guidance_scale": "Guidance",
    "temperature": "Temperature",
    "top_k": "Top-k",
    "top_p": "Top-p",
    "num_frames": "Frames",
    "frame_rate": "Frames a second",
    "begins_with": "Begins with",
    "factor": "Times as many frames",
    "voice": "Voice",
    "speed": "Speed",
    "seconds": "Seconds",
}

# What shows the jobs of a kind: the handler that watches them, and the component.
Shown = tuple[Any, gr.HTML]

# An event that cannot fail: past the queue, whose path alone shows errors on the page.
QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
# Any other event; the job queue decides what waits, Gradio's does not.
ACTION = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}


def picture_file(**options: Any) -> gr.Image:
    """A drop zone that hands over the path of the file as it was uploaded, whatever is in it."""
    image = gr.Image(
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        buttons=[],
        **options,
    )
    # Gradio would open the picture first, and answer a damaged one with an error of its own. (A
    # subclass would do, but Gradio writes a .pyi file beside the source of each.)
    image.preprocess = lambda payload: None if payload is None else payload.path
    return image


def asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf8")


def component(script: str, template: str, value: dict[str, Any], **options: Any) -> gr.HTML:
    """An HTML component that a script of ours fills from its JSON value."""
    return gr.HTML(
        value=value,
        html_template=template,
        js_on_load=asset("common.js") + asset(script),
        apply_default_css=False,
        padding=False,
        **options,
    )


def markup(value: str = "", **options: Any) -> gr.HTML:
    """HTML that only our own style sheet shapes."""
    return gr.HTML(value, apply_default_css=False, padding=False, **options)


def jobs_component(script: str, empty: str, **options: Any) -> gr.HTML:
    """The component that shows a list of jobs; ``empty`` stands there while there is none."""
    template = (
        '<div class="ts-status" role="status" aria-live="polite"></div>'
        f'<div class="ts-empty">{empty}</div><div class="ts-jobs"></div>'
    )
    return component(
        script, template, {"boot": "", "version": -1, "example": "", "jobs": []}, **options
    )


@dataclass
class PictureInputs:
    """The fields of the Picture tab, in the order of `settings_values`."""

    prompt: gr.Textbox
    style: gr.Radio
    count: gr.Radio
    seed: gr.Textbox
    num_tokens: gr.Slider
    guidance_scale: gr.Slider
    temperature: gr.Slider

    def all(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]


def settings_values(
    card: Card, prompt: str, seed: int | None, count: int, settings: dict[str, Any]
) -> list[Any]:
    """Values for `PictureInputs.all`, from settings that anybody may have written."""
    style = settings.get("style")
    return [
        prompt,
        style if style in card.styles else ANY_STYLE,
        count if count in COUNTS else 1,
        "" if seed is None else str(seed),
        min(settings.get("num_tokens") or card.default_num_tokens, card.num_tokens),
        min(settings.get("guidance_scale", card.guidance_scale), max(10, card.guidance_scale)),
        min(settings.get("temperature", card.temperature or 0), max(2, card.temperature or 0)),
    ]


def record_values(card: Card, record: dict[str, Any], what: str) -> list[Any]:
    """Values for `PictureInputs.all` out of a file's record: "all", "prompt" or "seed"."""
    prompt, seed = record.get("prompt") or "", record.get("seed")
    keep = gr.skip()
    if what == "prompt":
        return [prompt, *[keep] * 6]
    if what == "seed":
        return [keep, keep, keep, "" if seed is None else str(seed), *[keep] * 3]
    return settings_values(card, prompt, seed, 1, record.get("settings") or {})


def record_table(record: dict[str, Any] | None) -> str:
    """A record as an HTML table; everything in it may come from strangers."""
    if record is None:
        return ""
    settings = record["settings"]
    rows = {
        "Prompt": record["prompt"],
        "Seed": record["seed"],
        **{label: settings.get(key) for key, label in _SETTING_LABELS.items()},
        "Model": record["model"],
        "Made": (record["created"] or "").replace("T", " ").removesuffix("Z"),
        "With": record["software"],
    }
    cells = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(str(value))}</td></tr>"
        for key, value in rows.items()
        if value not in (None, "")
    )
    return f'<table class="ts-record">{cells}</table>'


def read_settings(path: str | None) -> dict[str, Any] | None:
    """The record of a dropped picture; None after the picture was taken away.

    Raises:
        InputError: not a picture, or one without a record.
    """
    if path is None:
        return None
    try:
        record = read_record(path)
    except InputError as error:  # The name on the server's disk is the uploaded one.
        raise InputError(str(error).replace(str(Path(path).parent) + "/", "")) from error
    if record is None:
        raise InputError(
            "This file has no Tessera settings (made elsewhere, or saved as a clean copy)."
        )
    return record


def restore_panel(card: Card, inputs: PictureInputs, tabs: gr.Tabs, elem_id: str) -> None:
    """A drop zone that reads how a picture was made, and buttons that take it over."""
    record = gr.State(None)
    picture = picture_file(
        label="Settings from a picture",
        placeholder="Drop a picture",
        height=150,
        elem_id=elem_id,
    )
    table = markup()
    with gr.Row(visible=False, elem_classes="ts-choices") as buttons:
        names = {"all": "Use all", "prompt": "Use prompt", "seed": "Use seed"}
        choices = {what: gr.Button(name, size="sm") for what, name in names.items()}

    def read(path: str | None) -> tuple[Any, ...]:
        found = read_settings(path)
        return found, record_table(found), gr.Row(visible=found is not None)

    picture.change(guarded(read), picture, [record, table, buttons], **ACTION)
    for what, button in choices.items():
        use_record(button.click, what, record, card, inputs, tabs)


def use_record(
    event: Callable[..., Any],
    what: str,
    record: gr.State,
    card: Card,
    inputs: PictureInputs,
    tabs: gr.Tabs,
) -> None:
    """On the event, put "all", the "prompt" or the "seed" of a record into the Picture tab."""

    def use(found: dict[str, Any] | None) -> list[Any]:
        if found is None:
            raise InputError("Choose a picture that has settings first.")
        return [*record_values(card, found, what), gr.Tabs(selected="picture")]

    event(guarded(use), record, [*inputs.all(), tabs], **ACTION)


def owner_key(owner: Any) -> str:
    """The key of a browser: what it remembers, or a new one of 128 random bits."""
    if isinstance(owner, str) and re.fullmatch(r"[0-9a-f]{32}", owner):
        return owner
    return secrets.token_hex(16)


def watcher(
    studio: Studio, kind: str, also: Sequence[Callable[[], Any]] = ()
) -> Callable[..., AsyncIterator[Any]]:
    """A handler that shows an owner's jobs until nothing more will happen.

    Each page has one of a kind: a new one, started with every new job, makes the one before end.
    ``also`` are functions of further outputs.
    """
    latest: dict[str | None, object] = {}

    async def watch(owner: str, request: gr.Request) -> AsyncIterator[Any]:
        me, session = object(), request.session_hash
        latest[session] = me
        seen = None
        try:
            while latest.get(session) is me:
                version = studio.jobs.version
                active = studio.loading or studio.jobs.active(owner, kind)
                if version != seen:
                    seen = version
                    page = jobs_page(studio, owner, kind, version)
                    yield (page, *(function() for function in also)) if also else page
                elif not active:
                    return
                await asyncio.sleep(POLL_SECONDS)
        finally:
            if latest.get(session) is me:
                del latest[session]

    return guarded(watch)


def jobs_page(studio: Studio, owner: str, kind: str, version: int) -> dict[str, Any]:
    """The value of a `jobs_component`: the owner's jobs, newest first."""
    newest = studio.jobs.of(owner, kind)[::-1][:SHOWN_JOBS]
    return {
        "boot": studio.boot,
        "version": version,
        "example": studio.example,
        "jobs": [job.view() for job in newest],
    }


def stop_first(studio: Studio, kind: str) -> Callable[[str], None]:
    """A handler that stops the owner's oldest pending job of a kind."""

    def stop(owner: str) -> None:
        for job in studio.jobs.of(owner, kind):
            if job.pending and not job.cancel.is_set():
                studio.jobs.stop(job)
                return

    return guarded(stop)


def stop_named(studio: Studio) -> Callable[..., None]:
    """A handler that stops the owner's job that a component's event names."""

    def stop(owner: str, event: gr.EventData) -> None:
        job = studio.jobs.find(owner, str(event.id))
        if job is not None and job.pending:
            studio.jobs.stop(job)

    return guarded(stop)


def file_data(path: str | Path) -> dict[str, Any]:
    """A file in the answer to a program."""
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


def missing(what: str) -> list[Shown]:
    """One line in place of a screen."""
    markup(f'<p class="ts-hint">No model of {what} is on this computer.</p>')
    return []


def connect(
    studio: Studio,
    kind: str,
    owner: gr.BrowserState,
    triggers: list[Any],
    start: Any,
    inputs: list[Any],
    outputs: list[Any],
    jobs: gr.HTML,
    stop: gr.Button,
) -> list[Shown]:
    """Triggers start a job, the page watches it, Stop stops it; returns what shows such jobs."""
    watch = watcher(studio, kind)
    gr.on(
        triggers,
        guarded(start),
        [owner, *inputs],
        [owner, *outputs],
        trigger_mode="multiple",
        **ACTION,
    ).success(watch, owner, jobs, trigger_mode="multiple", **ACTION)
    stop.click(stop_first(studio, kind), owner, **QUIET)
    return [(watch, jobs)]
