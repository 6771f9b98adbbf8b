"""The Sound tab: speech that is heard while it is made, sounds, and codecs on one's own recording."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ...modalities.audio import load_audio
from ...modalities.errors import InputError
from ...modalities.phonemes import phonemise
from ...modalities.text import clean_prompt
from ...pipelines.seeds import check_seed, random_seed
from ..codec_job import CodecJob
from ..faults import guarded
from ..sound_job import AudioJob, SoundJob, SpeechJob
from ..studio import Studio
from .picture import run_for_program, seed_number
from .widgets import (
    QUIET,
    Shown,
    connect,
    file_data,
    jobs_component,
    markup,
    missing,
    owner_key,
    stop_named,
)

MAX_CHARACTERS = 5_000
MAX_SOUNDS = 4
MAX_CODECS = 8
MAX_RECORDING_SECONDS = 60.0
TEXT = "The kettle is boiling. Would you like a cup of tea?"
CAPTION = "a plucked guitar playing a C major chord"
_SAY = "<p>Type a text: it is heard while it is made.</p>"
_MAKE = "<p>Say what it should sound like.</p>"
_COMPARE = "<p>Record something or drop a file to hear what each codec keeps of it.</p>"


def speech_job(
    studio: Studio,
    owner: str,
    text: str,
    voice: str | None = None,
    speed: float = 1.0,
    seed: int | None = None,
) -> SpeechJob:
    """A checked job, not queued yet.

    Raises:
        InputError: nothing to speak, a text that is too long, no such voice, or a bad number.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            f"The text has {len(text):,} characters; at most {MAX_CHARACTERS:,} are spoken here, "
            "so shorten it, or use tessera speak --file."
        )
    phonemise(text)
    voices = studio.sounds.generator_config("voice")["speakers"]
    if voice and voice not in voices:
        raise InputError(f'There is no voice "{voice[:40]}": choose from {", ".join(voices)}.')
    if not 0.25 <= speed <= 4:
        raise InputError(f"The speed must lie in 0.25 to 4 (1 is natural), got {speed}.")
    seed = random_seed() if seed is None else check_seed(seed)
    return SpeechJob(studio, owner, text, seed, voice or None, speed)


def sound_job(
    studio: Studio,
    owner: str,
    caption: str,
    seconds: float | None = None,
    count: int = 1,
    seed: int | None = None,
) -> SoundJob:
    """A checked job, not queued yet.

    Raises:
        InputError: an empty caption, or a number out of its range.
    """
    longest = studio.sounds.generator_config("sound")["max_seconds"]
    if seconds is not None and not 0 < seconds <= longest:
        raise InputError(f"A sound lasts more than 0 and up to {longest:g} seconds, got {seconds}.")
    if not 1 <= count <= MAX_SOUNDS:
        raise InputError(f"The app makes 1 to {MAX_SOUNDS} sounds at once, got {count}.")
    seed = random_seed() if seed is None else check_seed(seed)
    return SoundJob(studio, owner, clean_prompt(caption), seed, seconds, count)


def codec_job(studio: Studio, owner: str, path: str | None, codecs: Sequence[str]) -> CodecJob:
    """A checked job, not queued yet.

    Raises:
        InputError: no recording, a damaged or too long one, or no codec.
    """
    if path is None:
        raise InputError("Record something or drop a file first.")
    if not 1 <= len(codecs) <= MAX_CODECS:
        raise InputError(f"Choose 1 to {MAX_CODECS} codecs, got {len(codecs)}.")
    name = os.path.basename(path)
    audio, rate = load_audio(
        Path(path), mono=True, max_seconds=MAX_RECORDING_SECONDS, name=f'"{name}"'
    )
    return CodecJob(studio, owner, audio, rate, name, codecs)


def sound_tab(studio: Studio, owner: gr.BrowserState) -> list[Shown]:
    """Returns what shows the jobs of each part."""
    with gr.Tabs(elem_id="sound-tabs"):
        with gr.Tab("Speech"):
            shown = _speech_part(studio, owner)
        with gr.Tab("Sounds"):
            shown += _sound_part(studio, owner)
        with gr.Tab("Codecs"):
            shown += _codec_part(studio, owner)
    return shown


def _speech_part(studio: Studio, owner: gr.BrowserState) -> list[Shown]:
    if not studio.sounds.found("voice"):
        return missing("a voice")
    voices = list(studio.sounds.generator_config("voice")["speakers"])
    with gr.Row(elem_classes="ts-bench"):
        with gr.Column(scale=3, min_width=0, elem_classes="ts-results"):
            jobs = jobs_component("sound.js", _SAY, elem_id="speech")
        with gr.Column(scale=1, min_width=240, elem_classes="ts-settings"):
            text = gr.Textbox(
                label="Text", placeholder=TEXT, lines=4, max_lines=12, elem_id="speech-text"
            )
            choose = gr.Radio if len(voices) <= 8 else gr.Dropdown
            voice = choose(voices, value=voices[0], label="Voice", visible=len(voices) > 1)
            speed = gr.Slider(0.5, 2, value=1, step=0.05, label="Speed")
            seed = gr.Textbox(label="Seed of the speech", placeholder="random", max_lines=1)
            with gr.Row(elem_classes="ts-choices"):
                go = gr.Button("Speak", variant="primary", elem_id="speak")
                stop = gr.Button("Stop", min_width=70, scale=0)

    def start(owner: Any, text: str, voice: str, speed: float, seed: str) -> tuple[str, str]:
        owner = owner_key(owner)
        text = text if text and text.strip() else TEXT
        studio.jobs.submit(speech_job(studio, owner, text, voice, float(speed), seed_number(seed)))
        return owner, text

    async def speech(
        text: str, voice: str = "", speed: float = 1.0, seed: int | None = None
    ) -> dict[str, Any]:
        """Speak a text; yields the state with every piece of sound, at last the file."""
        job = speech_job(studio, secrets.token_hex(16), text, voice, speed, seed)
        async for state in run_for_program(studio, job, api_state):
            yield state

    gr.api(guarded(speech), api_name="speech", concurrency_limit=None)
    jobs.stop_job(stop_named(studio), owner, trigger_mode="multiple", **QUIET)
    inputs = [text, voice, speed, seed]
    triggers = [go.click, text.submit, seed.submit]
    return connect(studio, "speech", owner, triggers, start, inputs, [text], jobs, stop)


def _sound_part(studio: Studio, owner: gr.BrowserState) -> list[Shown]:
    if not studio.sounds.found("sound"):
        return missing("sounds")
    longest = studio.sounds.generator_config("sound")["max_seconds"]
    with gr.Row(elem_classes="ts-bench"):
        with gr.Column(scale=3, min_width=0, elem_classes="ts-results"):
            jobs = jobs_component("sound.js", _MAKE, elem_id="sounds")
        with gr.Column(scale=1, min_width=240, elem_classes="ts-settings"):
            caption = gr.Textbox(
                label="Caption", placeholder=CAPTION, lines=1, max_lines=4, elem_id="caption"
            )
            seconds = gr.Slider(
                0,
                longest,
                value=0,
                step=0.5,
                label="Seconds",
                info="0 is as long as such sounds are.",
            )
            count = gr.Radio(
                list(range(1, MAX_SOUNDS + 1)), value=1, label="Variants", elem_id="variants"
            )
            seed = gr.Textbox(label="Seed of the sound", placeholder="random", max_lines=1)
            with gr.Row(elem_classes="ts-choices"):
                go = gr.Button("Make", variant="primary", elem_id="make-sound")
                stop = gr.Button("Stop", min_width=70, scale=0)

    def start(owner: Any, caption: str, seconds: float, count: int, seed: str) -> tuple[str, str]:
        owner = owner_key(owner)
        caption = caption if caption and caption.strip() else CAPTION
        values = (float(seconds) or None, int(count), seed_number(seed))
        studio.jobs.submit(sound_job(studio, owner, caption, *values))
        return owner, caption

    async def sound(
        caption: str, seconds: float | None = None, count: int = 1, seed: int | None = None
    ) -> dict[str, Any]:
        """Make sounds of a caption; yields the state after every frame, at last the files."""
        job = sound_job(studio, secrets.token_hex(16), caption, seconds, count, seed)
        async for state in run_for_program(studio, job, api_state):
            yield state

    gr.api(guarded(sound), api_name="sound", concurrency_limit=None)
    jobs.stop_job(stop_named(studio), owner, trigger_mode="multiple", **QUIET)
    inputs = [caption, seconds, count, seed]
    triggers = [go.click, caption.submit, seed.submit]
    return connect(studio, "sound", owner, triggers, start, inputs, [caption], jobs, stop)


def _codec_part(studio: Studio, owner: gr.BrowserState) -> list[Shown]:
    names = studio.sounds.codec_names()
    if not names:
        return missing("a codec")
    with gr.Row(elem_classes="ts-bench"):
        with gr.Column(scale=3, min_width=0, elem_classes="ts-results"):
            jobs = jobs_component("codecs.js", _COMPARE, elem_id="codecs")
        with gr.Column(scale=1, min_width=240, elem_classes="ts-settings"):
            recording = gr.Audio(
                sources=["upload", "microphone"],
                type="filepath",
                label="Recording",
                buttons=[],
                elem_id="recording",
            )
            # The file as it was uploaded, whatever is in it.
            recording.preprocess = lambda payload: None if payload is None else payload.path
            codecs = gr.CheckboxGroup(names, value=names[:MAX_CODECS], label="Codecs")
            with gr.Row(elem_classes="ts-choices"):
                go = gr.Button("Compare codecs", variant="primary", elem_id="compare-codecs")
                stop = gr.Button("Stop", min_width=70, scale=0)
            markup('<p class="ts-hint">More codecs: see the Models tab.</p>')

    def start(owner: Any, path: str | None, chosen: list[str]) -> str:
        owner = owner_key(owner)
        studio.jobs.submit(codec_job(studio, owner, path, chosen))
        return owner

    inputs = [recording, codecs]
    return connect(studio, "codecs", owner, [go.click], start, inputs, [], jobs, stop)


def api_state(studio: Studio, job: AudioJob) -> dict[str, Any]:
    """What a program sees of a job: {state, step, total, seeds, seconds, sounds}."""
    return {
        "state": job.state,
        "step": job.step,
        "total": job.total,
        "seeds": [item.seed for item in job.items],
        "seconds": [item.seconds for item in job.items],
        "sounds": [file_data(item.files["wav"]) for item in job.items if item.name],
    }
