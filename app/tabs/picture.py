"""The Picture tab: a sentence in, pictures out, token by token."""

from __future__ import annotations

import asyncio
import html
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from ...modalities.errors import InputError
from ...modalities.text import expand_prompt
from ...pipelines.class_names import find_class
from ...pipelines.seeds import MAX_SEED, check_seed, random_seed
from ...weights.registry import find_model
from ..faults import guarded
from ..jobs import Job
from ..picture_job import PictureJob, PictureRequest
from ..studio import EXAMPLES, Card, Studio
from .widgets import (
    ACTION,
    ANY_STYLE,
    COUNTS,
    POLL_SECONDS,
    QUIET,
    PictureInputs,
    file_data,
    jobs_component,
    markup,
    owner_key,
    restore_panel,
    settings_values,
    stop_first,
    stop_named,
    watcher,
)

MAX_COUNT = max(COUNTS)
_EMPTY = (
    '<figure class="ts-example"><div class="ts-card"><img alt="" hidden></div>'
    f"<figcaption>example: {html.escape(EXAMPLES[0])}</figcaption></figure>"
    "<p>Type what you want to see and press Enter.</p>"
)


def seed_number(text: str | None) -> int:
    """The seed in the box; a random one where it is empty.

    Raises:
        InputError: anything else than a whole number from 0 to 4294967295.
    """
    text = (text or "").strip()
    if not text:
        return random_seed()
    try:
        return check_seed(int(text))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(
            f'Seed must be a whole number from 0 to {MAX_SEED}, got "{text[:24]}". '
            "Leave it empty for a random seed."
        ) from error


def requests(
    card: Card,
    prompt: str,
    style: str | None = None,
    count: int = 1,
    seed: int | None = None,
    num_tokens: int | None = None,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    num_steps: int | None = None,
    model: str | None = None,
) -> list[PictureRequest]:
    """One request for each alternative in the prompt's braces, all checked.

    Raises:
        InputError: a value out of its range.
    """
    if style in (None, "", ANY_STYLE):
        style = None
    elif style not in card.styles:
        raise InputError(f'Unknown style "{style[:40]}": choose from {", ".join(card.styles)}.')
    if not 1 <= count <= MAX_COUNT:
        raise InputError(f"The app makes 1 to {MAX_COUNT} pictures at once, got {count}.")
    if card.takes_tokens and num_tokens is not None and not 1 <= num_tokens <= card.num_tokens:
        raise InputError(
            f"This model makes 1 to {card.num_tokens} tokens, got {num_tokens}. "
            f"Use {min(max(num_tokens, 1), card.num_tokens)}."
        )
    if num_steps is not None and not 1 <= num_steps <= 1000:
        raise InputError(f"Steps must lie in 1 to 1000, got {num_steps}.")
    for name, value in (("Guidance", guidance_scale), ("Temperature", temperature)):
        if value is not None and not 0 <= value <= 100:
            raise InputError(f"{name} must lie in 0 to 100, got {value}.")
    seed = random_seed() if seed is None else check_seed(seed)
    texts = expand_prompt(prompt)
    if card.num_classes:
        for text in texts:
            find_class(text, card.num_classes, card.class_names)
    values = (style, num_tokens, guidance_scale, temperature, num_steps, model)
    return [PictureRequest(text, seed, count, *values) for text in texts]


def enqueue(
    studio: Studio,
    card: Card,
    owner: Any,
    prompt: str | None,
    style: str | None,
    count: int,
    seed: str | None,
    num_tokens: int,
    guidance_scale: float,
    temperature: float,
    num_steps: int | None = None,
    model: str | None = None,
) -> tuple[str, str, list[PictureJob]]:
    """Create was pressed: queue the jobs.

    Returns:
        The owner's key, the text for the prompt box (an empty one gets the example), the jobs.

    Raises:
        InputError: a value out of its range, or too many jobs are waiting; nothing is queued.
    """
    owner = owner_key(owner)
    prompt = prompt if prompt and prompt.strip() else card.example
    values = requests(
        card,
        prompt,
        style,
        int(count),
        seed_number(seed),
        int(num_tokens),
        float(guidance_scale),
        float(temperature),
        None if num_steps is None or card.num_steps is None else int(num_steps),
        model,
    )
    jobs = [PictureJob(studio, owner, request) for request in values]
    studio.jobs.submit(*jobs)
    return owner, prompt, jobs


def model_label(name: str) -> str:
    """A model's name, and whether its terms forbid commercial use."""
    info = find_model(name)
    return f"{name} (not for commercial use)" if info is not None and info.non_commercial else name


@dataclass
class PictureTab:
    """What `build` connects to the other tabs and to the page's start."""

    inputs: PictureInputs
    stage: gr.HTML
    watch: Any


def picture_tab(
    studio: Studio,
    card: Card,
    owner: gr.BrowserState,
    saved: gr.BrowserState,
    headline: gr.HTML,
    show_headline: Any,
    tabs: gr.Tabs,
) -> PictureTab:
    with gr.Row(elem_id="ask"):
        prompt = gr.Textbox(
            label="Prompt",
            show_label=False,
            placeholder=card.example,
            lines=1,
            max_lines=6,
            scale=1,
            container=False,
            autofocus=True,
            elem_id="prompt",
            html_attributes=gr.InputHTMLAttributes(enterkeyhint="go", spellcheck=True),
        )
        create = gr.Button("Create", variant="primary", elem_id="create", scale=0, min_width=110)
        stop = gr.Button("Stop", elem_id="stop", scale=0, min_width=80)
    note = markup(elem_id="note")
    with gr.Row(elem_id="examples", visible=not card.num_classes) as examples:
        chips = {text: gr.Button(text, size="sm", min_width=0, scale=0) for text in EXAMPLES}
    with gr.Row(elem_id="bench"):
        with gr.Column(elem_id="results", scale=3, min_width=0):
            stage = jobs_component("stage.js", _EMPTY, elem_id="stage")
        with gr.Column(elem_id="settings", scale=1, min_width=240):
            names = studio.image_models()
            kind = gr.Radio if len(names) <= 8 else gr.Dropdown
            model = kind(
                [(model_label(name), name) for name in names],
                value=names[0],
                label="Model",
                visible=len(names) > 1,
                elem_id="model",
            )
            style = gr.Radio(
                [ANY_STYLE, *card.styles],
                value=ANY_STYLE,
                label="Style",
                elem_id="style",
                visible=bool(card.styles),
            )
            count = gr.Radio(list(COUNTS), value=4, label="Pictures", elem_id="count")
            seed = gr.Textbox(
                label="Seed",
                placeholder="random",
                max_lines=1,
                elem_id="seed",
                html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
            )
            with gr.Accordion("Settings", open=False, elem_id="more"):
                num_tokens = gr.Slider(
                    1,
                    card.num_tokens,
                    value=card.default_num_tokens,
                    step=1,
                    label="Tokens",
                    info="Fewer are coarser and quicker.",
                    visible=card.takes_tokens,
                    elem_id="tokens",
                )
                guidance = gr.Slider(
                    1,
                    max(10, card.guidance_scale),
                    value=card.guidance_scale,
                    step=0.5,
                    label="Guidance",
                    info="How strongly the prompt is followed.",
                )
                temperature = gr.Slider(
                    0,
                    2,
                    value=card.temperature or 0,
                    visible=card.temperature is not None,
                    step=0.05,
                    label="Temperature",
                    info="Lower is safer, higher is wilder.",
                )
                num_steps = gr.Slider(
                    1,
                    100,
                    value=card.num_steps or 1,
                    step=1,
                    label="Steps",
                    info="More are finer and slower.",
                    visible=card.num_steps is not None,
                )
            inputs = PictureInputs(prompt, style, count, seed, num_tokens, guidance, temperature)
            with gr.Accordion("Settings from a picture", open=False, elem_id="restore"):
                restore_panel(card, inputs, tabs, elem_id="restore-picture")

    watch = watcher(studio, "picture", also=[show_headline])
    fields = inputs.all()

    def start(owner: Any, num_steps: Any, model: str, *values: Any) -> tuple[Any, ...]:
        chosen = None if model == studio.name else model
        found = card if chosen is None else studio.card_of(chosen)
        owner, text, jobs = enqueue(studio, found, owner, *values, num_steps, chosen)
        warnings = [job.warning for job in jobs if job.warning]
        if warnings:
            gr.Warning(warnings[0], title="", duration=8)
        return owner, text, [text, *values[1:]]

    def start_example(text: str) -> Any:
        return lambda owner, steps, model, _, *values: start(owner, steps, model, text, *values)

    def connect(triggers: list[Any], handler: Any) -> None:
        gr.on(
            triggers,
            guarded(handler),
            [owner, num_steps, model, *fields],
            [owner, prompt, saved],
            trigger_mode="multiple",
            **ACTION,
        ).success(
            watch,
            owner,
            [stage, headline],
            trigger_mode="multiple",
            **ACTION,
        )

    connect([create.click, prompt.submit, seed.submit], start)
    for text, chip in chips.items():
        connect([chip.click], start_example(text))

    stop.click(stop_first(studio, "picture"), owner, **QUIET)
    stage.stop_job(stop_named(studio), owner, trigger_mode="multiple", **QUIET)

    def shaped(found: Card, values: list[Any], steps: int | None) -> list[Any]:
        """The fields as a model takes them, with values of `settings_values`; then steps, examples."""
        text, look, many, number, tokens, scale, heat = values
        return [
            gr.Textbox(value=text, placeholder=found.example),
            gr.Radio([ANY_STYLE, *found.styles], value=look, visible=bool(found.styles)),
            many,
            number,
            gr.Slider(maximum=found.num_tokens, value=tokens, visible=found.takes_tokens),
            gr.Slider(maximum=max(10, found.guidance_scale), value=scale),
            gr.Slider(
                maximum=max(2, found.temperature or 0),
                value=heat,
                visible=found.temperature is not None,
            ),
            gr.Slider(
                maximum=max(100, found.num_steps or 0),
                value=steps or found.num_steps or 1,
                visible=found.num_steps is not None,
            ),
            gr.Row(visible=not found.num_classes),
        ]

    def use_settings(owner: str, event: gr.EventData) -> list[Any]:
        job = studio.jobs.find(owner, str(event.id))
        index = int(event.index)
        if not isinstance(job, PictureJob) or not 0 <= index < len(job.items):
            raise InputError("This job is gone: its pictures are in the Library.")
        request, seed = job.request, job.items[index].seed
        if event.what == "seed":
            keep = gr.skip()
            return [keep, keep, keep, str(seed), *[keep] * 6]
        settings = {
            key: value
            for key in ("style", "num_tokens", "guidance_scale", "temperature")
            if (value := getattr(request, key)) is not None
        }
        found = studio.card_of(request.model)
        values = settings_values(found, request.prompt, seed, request.count, settings)
        return [*shaped(found, values, request.num_steps), request.model or studio.name]

    all_fields = [*fields, num_steps, examples]
    stage.use_settings(guarded(use_settings), owner, [*all_fields, model], **ACTION)

    def choose_model(name: str) -> list[Any]:
        """Another model: what it takes, with its usual values; prompt, count and seed stay."""
        found = studio.card_of(name)
        usual = shaped(found, settings_values(found, "", None, 1, {}), None)
        return [gr.Textbox(placeholder=found.example), usual[1], gr.skip(), gr.skip(), *usual[4:]]

    # Of people alone: use_settings brings the values of its model along.
    model.input(
        guarded(choose_model),
        model,
        all_fields,
        trigger_mode="always_last",
        **ACTION,
    )

    def more(owner: str, event: gr.EventData) -> None:
        """Vary or Finish was pressed below a picture."""
        job = studio.jobs.find(owner, str(event.id))
        index = int(event.index)
        if not isinstance(job, PictureJob) or not 0 <= index < len(job.items):
            raise InputError("This job is gone: its pictures are in the Library.")
        item, finish = job.items[index], event.what == "finish"
        count = len(item.tokens)
        request = replace(
            job.request,
            seed=item.seed if finish else random_seed(),
            count=1 if finish else 4,
            num_tokens=studio.load(job.request.model).num_tokens if finish else count,
            given=tuple(item.tokens),
            keep=count if finish else max(count // 4, 1),
        )
        studio.jobs.submit(PictureJob(studio, owner, request))

    stage.more(guarded(more), owner, trigger_mode="multiple", **ACTION).success(
        watch, owner, [stage, headline], trigger_mode="multiple", **ACTION
    )

    def describe(text: str, name: str) -> str:
        warning = studio.prompt_warning(text) if name == studio.name else ""
        return f'<p class="ts-warning">{html.escape(warning)}</p>' if warning else ""

    prompt.change(describe, [prompt, model], note, trigger_mode="always_last", **QUIET)
    gr.on(
        [field.input for field in fields],
        lambda *values: list(values),
        fields,
        saved,
        trigger_mode="always_last",
        **QUIET,
    )
    image_endpoint(studio, card)
    return PictureTab(inputs, stage, watch)


def image_endpoint(studio: Studio, card: Card) -> None:
    """The endpoint ``/image`` for gradio_client."""

    async def image(
        prompt: str,
        style: str = "",
        count: int = 1,
        seed: int | None = None,
        num_tokens: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        num_steps: int | None = None,
        model: str = "",
    ) -> dict[str, Any]:
        """Make pictures from a sentence, or of a class; yields the state after every few tokens.

        The last value holds the files: {state, step, total, seeds, tokens, images}. Cancelling
        stops the work.
        """
        chosen = None if model in ("", studio.name) else model
        found = card if chosen is None else await asyncio.to_thread(studio.card_of, chosen)
        numbers = (num_tokens, guidance_scale, temperature, num_steps)
        values = requests(found, prompt, style, count, seed, *numbers, chosen)
        if len(values) > 1:
            raise InputError("This endpoint makes one prompt at a time: leave out the braces.")
        job = PictureJob(studio, secrets.token_hex(16), values[0])
        async for state in run_for_program(studio, job, api_state):
            yield state

    gr.api(guarded(image), api_name="image", concurrency_limit=None)


async def run_for_program(
    studio: Studio, job: Job, state: Callable[[Studio, Any], dict[str, Any]]
) -> AsyncIterator[dict[str, Any]]:
    """Queue a job and yield its states until it has ended; closing the iterator stops it.

    Raises:
        InputError: it failed.
    """
    studio.jobs.submit(job)
    seen = None
    try:
        while True:
            pending, version = job.pending, studio.jobs.version
            if version != seen:
                seen = version
                yield state(studio, job)
            if not pending:
                break
            await asyncio.sleep(POLL_SECONDS)
    finally:
        job.cancel.set()
    if job.error:
        raise InputError(job.error)


def api_state(studio: Studio, job: PictureJob) -> dict[str, Any]:
    folder = studio.outputs(job.owner).folder
    return {
        "state": job.state,
        "step": job.step,
        "total": job.total,
        "seeds": [item.seed for item in job.items],
        "tokens": [item.tokens for item in job.items],
        "warning": job.warning,
        "images": [file_data(folder / item.name) for item in job.items if item.name],
    }
