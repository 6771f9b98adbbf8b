"""The Video tab: clips that are seen while they are made, stories, and smoother clips."""

from __future__ import annotations

import html
import os
import secrets
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from ...modalities.errors import InputError
from ...modalities.image import load_image
from ...modalities.text import clean_prompt
from ...modalities.video import VideoReader
from ...pipelines.frame_interpolation import even_frames
from ...pipelines.seeds import check_seed, random_seed
from ..commands_video import is_clip
from ..faults import guarded
from ..outputs import medium
from ..studio import Studio
from ..video_job import ClipJob, ClipRequest, SmoothJob
from ..video_records import story_scenes, told
from .picture import model_label, run_for_program, seed_number
from .widgets import (
    ACTION,
    QUIET,
    Shown,
    component,
    connect,
    file_data,
    jobs_component,
    markup,
    missing,
    owner_key,
    stop_named,
)

MAX_CLIPS = 4
MAX_SECONDS = 60.0
MAX_SCENES = 12
FACTORS = (2, 4, 8)
MAX_SMOOTH_FRAMES = 1_200
MAX_SMOOTH_PIXELS = 1920 * 1088
PROMPT = "a butterfly flapping"
STORY = "1: a seed falling\n2: a flower growing\n1: a flower waving"
_MAKE = "<p>Say what moves: you see it while it is made.</p>"
_TELL = "<p>Write a line for each scene: how long it lasts and what happens.</p>"
_SMOOTH = "<p>Drop a clip: new frames are made between its frames.</p>"


def clip_job(
    studio: Studio,
    owner: str,
    prompt: str | None,
    model: str = "",
    begin: str | None = None,
    seconds: float | None = None,
    frame_rate: float | None = None,
    guidance_scale: float | None = None,
    count: int = 1,
    seed: int | None = None,
) -> ClipJob:
    """A checked job, not queued yet.

    Args:
        model: empty is the first that is there.
        begin: a picture that moves, or a clip that goes on.

    Raises:
        InputError: nothing to make, a file that cannot be used, or a number out of its range.
    """
    model = model or _first(studio.videos.clip_names(), "clips")
    condition = studio.videos.condition(model)
    image, go_on = (None, None) if begin is None else beginning(begin)
    if condition == "frames":
        if begin is None:
            raise InputError(f'"{model}" goes on from frames: begin with a picture or a clip.')
        prompt = None
    else:
        prompt = clean_prompt(prompt or "")
    if seconds is not None and not 0 < seconds <= MAX_SECONDS:
        raise InputError(
            f"A clip lasts more than 0 and up to {MAX_SECONDS:g} seconds here, got {seconds}."
        )
    if not 1 <= count <= MAX_CLIPS:
        raise InputError(f"The app makes 1 to {MAX_CLIPS} clips at once, got {count}.")
    _check_numbers(frame_rate, guidance_scale)
    seed = random_seed() if seed is None else check_seed(seed)
    return ClipJob(
        studio,
        owner,
        ClipRequest(
            model,
            seed,
            prompt,
            count=count,
            seconds=seconds,
            frame_rate=frame_rate,
            guidance_scale=guidance_scale,
            image=image,
            go_on=go_on,
        ),
    )


def story_job(
    studio: Studio,
    owner: str,
    text: str,
    model: str = "",
    frame_rate: float | None = None,
    guidance_scale: float | None = None,
    seed: int | None = None,
) -> ClipJob:
    """A checked job, not queued yet.

    Args:
        text: a line for each scene, "2: a seed falls".

    Raises:
        InputError: a line that is no scene, a story that is too long, or a bad number.
    """
    scenes = checked_story(text)
    model = model or _first(story_models(studio), "stories")
    if studio.videos.condition(model) != "text":
        raise InputError(f'"{model}" reads no text and tells no stories: choose another model.')
    _check_numbers(frame_rate, guidance_scale)
    seed = random_seed() if seed is None else check_seed(seed)
    request = ClipRequest(
        model,
        seed,
        scenes=tuple(scenes),
        frame_rate=frame_rate,
        guidance_scale=guidance_scale,
    )
    return ClipJob(studio, owner, request)


def smooth_job(
    studio: Studio,
    owner: str,
    path: str | None,
    factor: int = 2,
    frame_rate: float | None = None,
    input_rate: float | None = None,
    model: str = "",
) -> SmoothJob:
    """A checked job, not queued yet.

    Raises:
        InputError: no clip, one that cannot be used, or a number out of its range.
    """
    if path is None:
        raise InputError("Drop a clip first.")
    model = model or _first(studio.videos.between_names(), "frames in between")
    if factor not in FACTORS:
        raise InputError(f"The factor is one of {', '.join(map(str, FACTORS))}, got {factor}.")
    for rate in (frame_rate, input_rate):
        if rate is not None and not 0 < rate <= 240:
            raise InputError(f"Frames a second must be above 0 and at most 240, got {rate:g}.")
    name = os.path.basename(path)
    with VideoReader(Path(path), name=f'"{name}"') as reader:
        indices, rate = even_frames(reader, input_rate)
        size = reader.width, reader.height
    total = 1 + factor * (len(indices) - 1)
    if total > MAX_SMOOTH_FRAMES or size[0] * size[1] > MAX_SMOOTH_PIXELS:
        raise InputError(
            f'"{name}" would have {total:,} frames of {size[0]} x {size[1]}; here it is up to '
            f"{MAX_SMOOTH_FRAMES:,} of 1920 x 1080: make it shorter or smaller first, or use "
            "tessera interpolate."
        )
    if (frame_rate or rate * factor) > 240:
        raise InputError(
            f"The result would have {rate * factor:g} frames a second, at most 240 can be written: "
            "lower the factor, or name a rate."
        )
    return SmoothJob(
        studio, owner, Path(path), name, indices, rate, model, factor, frame_rate, input_rate
    )


def beginning(path: str) -> tuple[Path | None, Path | None]:
    """A checked file as (picture, clip), one of them None.

    Raises:
        InputError: neither, or damaged.
    """
    file, name = Path(path), f'"{os.path.basename(path)}"'
    if not is_clip(file):
        load_image(file, name=name)
        return file, None
    with VideoReader(file, name=name):
        return None, file


def checked_story(text: str) -> list[tuple[str, float]]:
    """The scenes of a text.

    Raises:
        InputError: a line that is no scene, too many, or too long.
    """
    scenes = story_scenes(text)
    seconds = sum(length for _, length in scenes)
    if len(scenes) > MAX_SCENES:
        raise InputError(f"A story here has up to {MAX_SCENES} scenes, got {len(scenes)}.")
    if not all(length > 0 for _, length in scenes) or not seconds <= MAX_SECONDS:
        raise InputError(
            f"Scenes last more than 0 seconds, together up to {MAX_SECONDS:g}, got "
            f"{', '.join(f'{length:g}' for _, length in scenes)}."
        )
    told(scenes)
    return scenes


def story_models(studio: Studio) -> list[str]:
    videos = studio.videos
    return [name for name in videos.clip_names() if videos.condition(name) == "text"]


def timeline(text: str) -> str:
    """A story as a bar of its scenes, or what is wrong with it, as HTML."""
    if not text.strip():
        text = STORY
    try:
        scenes = checked_story(text)
    except InputError as error:
        return f'<p class="ts-warning">{html.escape(str(error))}</p>'
    cells = "".join(
        f'<li style="flex-grow: {seconds:g}"><b>{seconds:g} s</b>{html.escape(prompt)}</li>'
        for prompt, seconds in scenes
    )
    return f'<ol class="ts-timeline">{cells}</ol>'


def _first(names: list[str], what: str) -> str:
    if not names:
        raise InputError(f"No model of {what} is on this computer.")
    return names[0]


def _check_numbers(frame_rate: float | None, guidance_scale: float | None) -> None:
    if frame_rate is not None and not 0 < frame_rate <= 60:
        raise InputError(f"Frames a second must be above 0 and at most 60, got {frame_rate:g}.")
    if guidance_scale is not None and not 0 <= guidance_scale <= 100:
        raise InputError(f"Guidance must lie in 0 to 100, got {guidance_scale:g}.")


def video_tab(studio: Studio, owner: gr.BrowserState) -> list[Shown]:
    """Returns what shows the jobs of each part."""
    with gr.Tabs(elem_id="video-tabs") as tabs:
        with gr.Tab("Clip", id="clip"):
            clips, begin, opened, shown = _clip_part(studio, owner)
        with gr.Tab("Story", id="story"):
            stories, more = _story_part(studio, owner)
            shown += more
        with gr.Tab("Smoother", id="smoother"):
            recording, more = _smooth_part(studio, owner)
            shown += more

    def file_of(owner: str, event: gr.EventData) -> str:
        job, index = studio.jobs.find(owner, str(event.id)), int(event.index)
        if not isinstance(job, ClipJob) or not 0 <= index < len(job.items):
            raise InputError("This job is gone: its clips are in the Library.")
        return job.items[index].files["webp"]

    def go_on(owner: str, event: gr.EventData) -> tuple[str, gr.Accordion, gr.Tabs]:
        return file_of(owner, event), gr.Accordion(open=True), gr.Tabs(selected="clip")

    def smoothen(owner: str, event: gr.EventData) -> tuple[str, gr.Tabs]:
        return file_of(owner, event), gr.Tabs(selected="smoother")

    for jobs in (clips, stories):
        if jobs is not None:
            jobs.go_on(guarded(go_on), owner, [begin, opened, tabs], **ACTION)
            if recording is not None:
                jobs.smoothen(guarded(smoothen), owner, [recording, tabs], **ACTION)
    return shown


def _file(label: str, what: str, **options: Any) -> gr.File:
    """A drop zone for one file, as it was uploaded, and a look at it."""
    file = gr.File(label=label, height=110, file_types=what.split(), **options)
    # The file as it was uploaded, whatever is in it.
    file.preprocess = lambda payload: None if payload is None else payload.path
    view = component(
        "player.js", '<div class="ts-player"></div>', {"path": "", "kind": ""}, visible=False
    )

    def show(path: str | None) -> gr.HTML:
        value = {"path": path or "", "kind": medium(path) if path else ""}
        return gr.HTML(value=value, visible=path is not None)

    file.change(show, file, view, **QUIET)
    return file


def _model_choice(names: list[str]) -> gr.Dropdown:
    return gr.Dropdown(
        [(model_label(name), name) for name in names],
        value=names[0],
        label="Model",
        visible=len(names) > 1,
    )


def _fine_settings() -> tuple[gr.Number, gr.Number]:
    """Rate and guidance."""
    with gr.Accordion("Settings", open=False):
        rate = gr.Number(None, label="Frames a second", placeholder="the model's own")
        guidance = gr.Number(
            None,
            label="Guidance",
            placeholder="the model's own",
            info="How strongly the prompt is followed.",
        )
    return rate, guidance


def _clip_part(
    studio: Studio, owner: gr.BrowserState
) -> tuple[gr.HTML | None, gr.File | None, gr.Accordion | None, list[Shown]]:
    """Returns the list of jobs, the file to begin with and what opens it, what shows the jobs."""
    names = studio.videos.clip_names()
    if not names:
        return None, None, None, missing("moving pictures")
    with gr.Row(elem_classes="ts-bench"):
        with gr.Column(scale=3, min_width=0, elem_classes="ts-results"):
            jobs = jobs_component("video.js", _MAKE, elem_id="clips")
        with gr.Column(scale=1, min_width=240, elem_classes="ts-settings"):
            prompt = gr.Textbox(
                label="What moves",
                placeholder=PROMPT,
                lines=1,
                max_lines=4,
                elem_id="clip-prompt",
            )
            model = _model_choice(names)
            seconds = gr.Slider(
                0, 16, value=0, step=0.5, label="Seconds", info="0 is as long as its clips are."
            )
            count = gr.Radio(
                list(range(1, MAX_CLIPS + 1)), value=1, label="Clips", elem_id="clip-count"
            )
            seed = gr.Textbox(label="Seed of the clip", placeholder="random", max_lines=1)
            with gr.Accordion(
                "Begin with a picture or a clip", open=False, elem_id="begin"
            ) as opened:
                begin = _file("First frames", "image video", elem_id="begin-file")
            rate, guidance = _fine_settings()
            with gr.Row(elem_classes="ts-choices"):
                go = gr.Button("Make", variant="primary", elem_id="make-clip")
                stop = gr.Button("Stop", min_width=70, scale=0)

    def start(
        owner: Any,
        prompt: str,
        model: str,
        begin: str | None,
        seconds: float,
        rate: float | None,
        guidance: float | None,
        count: int,
        seed: str,
    ) -> tuple[str, str]:
        owner = owner_key(owner)
        if not (prompt and prompt.strip()) and studio.videos.condition(model) == "text":
            prompt = PROMPT
        values = (float(seconds) or None, rate, guidance, int(count), seed_number(seed))
        studio.jobs.submit(clip_job(studio, owner, prompt, model, begin, *values))
        return owner, prompt

    async def video(
        prompt: str,
        model: str = "",
        seconds: float | None = None,
        frame_rate: float | None = None,
        guidance_scale: float | None = None,
        count: int = 1,
        seed: int | None = None,
    ) -> dict[str, Any]:
        """Make clips of a prompt; yields the state after every step, at last the files."""
        numbers = (seconds, frame_rate, guidance_scale, count, seed)
        job = clip_job(studio, secrets.token_hex(16), prompt, model, None, *numbers)
        async for state in run_for_program(studio, job, api_state):
            yield state

    gr.api(guarded(video), api_name="video", concurrency_limit=None)
    jobs.stop_job(stop_named(studio), owner, trigger_mode="multiple", **QUIET)
    inputs = [prompt, model, begin, seconds, rate, guidance, count, seed]
    triggers = [go.click, prompt.submit, seed.submit]
    shown = connect(studio, "clip", owner, triggers, start, inputs, [prompt], jobs, stop)
    return jobs, begin, opened, shown


def _story_part(studio: Studio, owner: gr.BrowserState) -> tuple[gr.HTML | None, list[Shown]]:
    names = story_models(studio)
    if not names:
        return None, missing("stories")
    with gr.Row(elem_classes="ts-bench"):
        with gr.Column(scale=3, min_width=0, elem_classes="ts-results"):
            jobs = jobs_component("video.js", _TELL, elem_id="stories")
        with gr.Column(scale=1, min_width=240, elem_classes="ts-settings"):
            text = gr.Textbox(
                label="Scenes",
                info="A line each: seconds, a colon, what happens.",
                placeholder=STORY,
                lines=5,
                max_lines=MAX_SCENES,
                elem_id="story-text",
            )
            bar = markup(timeline(""))
            model = _model_choice(names)
            seed = gr.Textbox(label="Seed of the story", placeholder="random", max_lines=1)
            rate, guidance = _fine_settings()
            with gr.Row(elem_classes="ts-choices"):
                go = gr.Button("Tell", variant="primary", elem_id="tell")
                stop = gr.Button("Stop", min_width=70, scale=0)

    def start(
        owner: Any,
        text: str,
        model: str,
        rate: float | None,
        guidance: float | None,
        seed: str,
    ) -> tuple[str, str]:
        owner = owner_key(owner)
        text = text if text and text.strip() else STORY
        studio.jobs.submit(story_job(studio, owner, text, model, rate, guidance, seed_number(seed)))
        return owner, text

    async def story(
        scenes: str,
        model: str = "",
        frame_rate: float | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
    ) -> dict[str, Any]:
        """Tell a story of one line a scene, "2: a seed falls"; yields the state after every step,
        at last the file."""
        job = story_job(
            studio, secrets.token_hex(16), scenes, model, frame_rate, guidance_scale, seed
        )
        async for state in run_for_program(studio, job, api_state):
            yield state

    gr.api(guarded(story), api_name="story", concurrency_limit=None)
    text.change(timeline, text, bar, trigger_mode="always_last", **QUIET)
    jobs.stop_job(stop_named(studio), owner, trigger_mode="multiple", **QUIET)
    inputs = [text, model, rate, guidance, seed]
    triggers = [go.click, text.submit, seed.submit]
    return jobs, connect(studio, "story", owner, triggers, start, inputs, [text], jobs, stop)


def _smooth_part(studio: Studio, owner: gr.BrowserState) -> tuple[gr.File | None, list[Shown]]:
    names = studio.videos.between_names()
    if not names:
        return None, missing("frames in between")
    with gr.Row(elem_classes="ts-bench"):
        with gr.Column(scale=3, min_width=0, elem_classes="ts-results"):
            jobs = jobs_component("smooth.js", _SMOOTH, elem_id="smoothed")
        with gr.Column(scale=1, min_width=240, elem_classes="ts-settings"):
            clip = _file("Clip", "video image", elem_id="smooth-file")
            factor = gr.Radio(
                [(f"{n} x", n) for n in FACTORS], value=2, label="Frames", elem_id="factor"
            )
            model = _model_choice(names)
            with gr.Accordion("Settings", open=False):
                rate = gr.Number(
                    None, label="Frames a second", placeholder="so that it lasts as long"
                )
                input_rate = gr.Number(
                    None,
                    label="Read the clip at",
                    placeholder="its own rate",
                    info="Frames a second, for a clip whose rate varies.",
                )
            with gr.Row(elem_classes="ts-choices"):
                go = gr.Button("Make smoother", variant="primary", elem_id="make-smooth")
                stop = gr.Button("Stop", min_width=70, scale=0)
            markup('<p class="ts-hint">Sound is left out.</p>')

    def start(
        owner: Any,
        path: str | None,
        factor: int,
        rate: float | None,
        input_rate: float | None,
        model: str,
    ) -> str:
        owner = owner_key(owner)
        studio.jobs.submit(smooth_job(studio, owner, path, int(factor), rate, input_rate, model))
        return owner

    async def interpolate(
        clip: dict[str, Any],
        factor: int = 2,
        frame_rate: float | None = None,
        input_frame_rate: float | None = None,
        model: str = "",
    ) -> dict[str, Any]:
        """Make frames between those of a clip (of handle_file); yields the state after every frame,
        at last the file."""
        job = smooth_job(
            studio,
            secrets.token_hex(16),
            uploaded(clip),
            factor,
            frame_rate,
            input_frame_rate,
            model,
        )
        async for state in run_for_program(studio, job, smooth_state):
            yield state

    gr.api(guarded(interpolate), api_name="interpolate", concurrency_limit=None)
    jobs.stop_job(stop_named(studio), owner, trigger_mode="multiple", **QUIET)
    inputs = [clip, factor, rate, input_rate, model]
    return clip, connect(studio, "smooth", owner, [go.click], start, inputs, [], jobs, stop)


def uploaded(file: Any) -> str:
    """The path of a file that a program uploaded.

    Raises:
        InputError: any other path or value.
    """
    path = file.get("path") if isinstance(file, dict) else None
    folder = Path(get_upload_folder()).resolve()
    if not isinstance(path, str) or not Path(path).resolve().is_relative_to(folder):
        raise InputError("Pass a file of your own: gradio_client's handle_file(path).")
    return path


def api_state(studio: Studio, job: ClipJob) -> dict[str, Any]:
    """What a program sees of a job: {state, step, total, scene, seeds, frames, frame_rate, clips}."""
    return {
        "state": job.state,
        "step": job.step,
        "total": job.total,
        "scene": job.scene,
        "seeds": [item.seed for item in job.items],
        "frames": [item.frames for item in job.items],
        "frame_rate": job.rate,
        "clips": [file_data(item.files["webp"]) for item in job.items if item.name],
    }


def smooth_state(studio: Studio, job: SmoothJob) -> dict[str, Any]:
    """The same of a smoother clip: {state, step, total, frame_rate, clips}."""
    return {
        "state": job.state,
        "step": job.done,
        "total": job.total,
        "frame_rate": job.after.rate,
        "clips": [file_data(job.after.source)] if job.output else [],
    }
