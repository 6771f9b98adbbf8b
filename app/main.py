"""The web app: ``tessera app``, or this file run by itself, as a Hugging Face Space does."""

from __future__ import annotations

import html
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def register_package() -> None:
    """Make the checkout importable as ``tessera`` where the package is not installed."""
    if importlib.util.find_spec("tessera") is not None:
        return
    spec = importlib.util.spec_from_file_location(
        "tessera", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules["tessera"] = package
    spec.loader.exec_module(package)


register_package()
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr  # noqa: E402

from tessera.app.faults import LOG_NAME, guarded, log_to  # noqa: E402
from tessera.app.sound_models import SoundModels  # noqa: E402
from tessera.app.studio import Studio  # noqa: E402
from tessera.app.tabs.compare import compare_tab  # noqa: E402
from tessera.app.tabs.edit import edit_tab  # noqa: E402
from tessera.app.tabs.library import library_tab  # noqa: E402
from tessera.app.tabs.models import models_tab, models_table  # noqa: E402
from tessera.app.tabs.picture import picture_tab  # noqa: E402
from tessera.app.tabs.reconstruct import reconstruct_tab  # noqa: E402
from tessera.app.tabs.sound import sound_tab  # noqa: E402
from tessera.app.tabs.video import video_tab  # noqa: E402
from tessera.app.tabs.widgets import ACTION, QUIET, asset, markup, owner_key  # noqa: E402
from tessera.app.video_models import VideoModels  # noqa: E402
from tessera.modalities.errors import InputError  # noqa: E402
from tessera.weights.registry import list_models  # noqa: E402

# Pipelines that `further_models` takes, and what they are for.
MODEL_KINDS = {
    "TextToSpeechPipeline": "voice",
    "TextToSoundPipeline": "sound",
    "TextToVideoPipeline": "clips",
    "ClassToVideoPipeline": "clips",
    "ImageToVideoPipeline": "clips",
    "FrameInterpolationPipeline": "between",
}
_FONT = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
_BRAND = (
    '<div class="ts-brand"><svg viewBox="0 0 64 64" aria-hidden="true"><g class="ts-mark">'
    '<rect x="4" y="4" width="26" height="26" rx="6"/>'
    '<rect x="34" y="4" width="26" height="26" rx="6"/>'
    '<rect x="4" y="34" width="26" height="26" rx="6"/>'
    '<rect x="34" y="34" width="26" height="26" rx="6"/></g></svg><h1>Tessera</h1></div>'
)


def theme() -> gr.Theme:
    """One accent colour, system fonts: nothing is fetched."""
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="stone",
        font=_FONT,
        font_mono=_MONO,
        radius_size="lg",
    ).set(
        body_background_fill="#faf9f7",
        body_background_fill_dark="#171614",
        background_fill_primary_dark="#1f1e1b",
        background_fill_secondary_dark="#1f1e1b",
        block_background_fill_dark="#1f1e1b",
        block_border_width="0px",
        block_radius="14px",
        block_shadow="none",
        block_label_text_weight="500",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        button_transition="background-color 0.15s",
    )


def headline_html(studio: Studio) -> str:
    state = "busy" if studio.loading else "bad" if studio.failure else "ok"
    return f'<p class="ts-headline {state}">{html.escape(studio.headline())}</p>'


def build(studio: Studio) -> gr.Blocks:
    """The page over a studio."""
    card = studio.card()
    with gr.Blocks(title="Tessera", delete_cache=(600, 3600), analytics_enabled=False) as demo:
        owner = gr.BrowserState("", storage_key="tessera.owner", secret="tessera")
        saved = gr.BrowserState([], storage_key="tessera.inputs", secret="tessera")
        with gr.Row(elem_id="header"):
            markup(_BRAND, elem_id="brand")
            headline = markup(headline_html(studio), elem_id="headline")
            gr.Button("Light / dark", size="sm", elem_id="theme", scale=0, min_width=90)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Picture", id="picture"):
                picture = picture_tab(
                    studio, card, owner, saved, headline, lambda: headline_html(studio), tabs
                )
            with gr.Tab("Sound", id="sound"):
                shown = sound_tab(studio, owner)
            with gr.Tab("Video", id="video"):
                shown += video_tab(studio, owner)
            with gr.Tab("Tokens", id="tokens"):
                reconstructions, watch_reconstructions = reconstruct_tab(studio, owner)
            with gr.Tab("Edit", id="edit-tab"):
                edits, watch_edits = edit_tab(studio, card, owner)
            with gr.Tab("Compare", id="compare-tab"):
                sheets, watch_sheets = compare_tab(studio, card, owner)
            with gr.Tab("Library", id="library") as library:
                shelf_inputs, shelf_outputs, refresh = library_tab(
                    studio, card, owner, picture.inputs, tabs
                )
            with gr.Tab("Models", id="models") as models:
                table = models_tab()
        gr.api(list_model_names, api_name="models")

        library.select(refresh, shelf_inputs, shelf_outputs, **ACTION)
        models.select(models_table, None, table, **QUIET)

        def attach(key: Any, values: Any) -> list[Any]:
            """What the browser remembers: whose jobs to show, and what was in the fields."""
            fields = picture.inputs.all()
            known = isinstance(values, list) and len(values) == len(fields)
            return [owner_key(key), *(values if known else [gr.skip()] * len(fields))]

        attached = demo.load(
            guarded(attach), [owner, saved], [owner, *picture.inputs.all()], **QUIET
        )
        attached.success(
            picture.watch, owner, [picture.stage, headline], trigger_mode="multiple", **ACTION
        )
        # Of each tab with jobs: the handler that watches them, and where they are shown.
        for watch, jobs in (
            (watch_reconstructions, reconstructions),
            (watch_edits, edits),
            (watch_sheets, sheets),
            *shown,
        ):
            attached.success(watch, owner, jobs, trigger_mode="multiple", **ACTION)
    return demo


def list_model_names(pattern: str = "*") -> list[str]:
    """Names of the models that can be loaded, shipped ones first."""
    return list_models(pattern[:100])


def serve(demo: gr.Blocks, studio: Studio, **options: Any) -> tuple[Any, str, str]:
    """Launch the page: jobs bounded, only its own folders readable, errors without tracebacks."""
    log_to(studio.log_folder)
    return demo.queue(default_concurrency_limit=4, max_size=64, api_open=True).launch(
        allowed_paths=[str(studio.folder), str(studio.scratch)],
        blocked_paths=[str(studio.log_folder / LOG_NAME)],
        show_error=False,
        ssr_mode=False,
        theme=theme(),
        css=asset("style.css"),
        head=f"<script>{asset('page.js')}</script>",
        footer_links=["api"],
        run_history=False,
        enable_monitoring=False,
        prevent_thread_lock=True,
        # No request of the server to itself: a busy machine or a proxy would fail it.
        _frontend=False,
        **options,
    )


def further_models(folders: Sequence[Path]) -> tuple[SoundModels, VideoModels]:
    """The models that are there, and those of some folders: a voice or a model of sounds takes the
    place of the shipped one, models of clips and of frames in between come before the others.

    Raises:
        InputError: a folder that holds none of them.
    """
    from tessera.pipelines.loading import pipeline_class

    found: dict[str, list[Path]] = {kind: [] for kind in ("voice", "sound", "clips", "between")}
    for folder in folders:
        kind = MODEL_KINDS.get(pipeline_class(folder) or "")
        if kind is None:
            raise InputError(
                f'"{folder}" holds no model of sound or video: give a folder as '
                "save_pretrained or tessera train writes it."
            )
        found[kind].append(folder)
    sounds = {kind: str(found[kind][-1]) for kind in ("voice", "sound") if found[kind]}
    return SoundModels(**sounds), VideoModels(found["clips"], found["between"])


def launch(
    port: int | None = None,
    listen: bool = False,
    auth: str | None = None,
    open_browser: bool = False,
    share: bool = False,
    metadata: bool = True,
    outputs: Path = Path("outputs"),
    max_upload: str = "50mb",
    model: str = "sticker",
    add: Sequence[Path] = (),
) -> None:
    """Serve the app until Ctrl-C.

    Args:
        port: default: the first free one from 7860.
        listen: also to other computers; needs ``auth``.
        auth: "user:password" that the page asks for.
        share: through a public address of Gradio's; needs ``auth``.
        metadata: whether pictures carry how they were made.
        outputs: folder of the pictures.
        max_upload: size of the largest upload, such as "50mb".
        model: name or folder of the model that opens the Picture tab.
        add: folders of further models, see `further_models`.

    Raises:
        InputError: ``listen`` or ``share`` without ``auth``, or a value that means nothing.
    """
    login = login_pair(auth)
    for name, wanted in (("--listen", listen), ("--share", share)):
        if wanted and login is None:
            raise InputError(
                f"{name} lets others use this app and see its pictures: add --auth user:password."
            )
    if not is_size(max_upload):
        raise InputError(f'"{max_upload}" is not a size: write for example --max-upload 100mb.')
    sounds, videos = further_models(add)
    studio = Studio(model, Path(outputs), metadata, sounds=sounds, videos=videos)
    try:
        demo = build(studio)
        _, url, public_url = serve(
            demo,
            studio,
            quiet=True,
            server_name="0.0.0.0" if listen else "127.0.0.1",
            server_port=port,
            auth=login,
            share=share,
            inbrowser=open_browser,
            max_file_size=max_upload,
        )
        print(f"Tessera: {public_url or url} (Ctrl-C stops it)", flush=True)
        # After the page is up: loading would slow it down.
        studio.start()
        demo.block_thread()
    except OSError as error:
        if "port" not in str(error):
            raise
        raise InputError(f"Port {port} is in use: choose another with --port.") from error
    finally:
        studio.close()


def login_pair(auth: str | None) -> tuple[str, str] | None:
    """``"user:password"`` -> both.

    Raises:
        InputError: one of them is missing.
    """
    if auth is None:
        return None
    user, _, password = auth.partition(":")
    if not user or not password:
        raise InputError("--auth must be user:password, with both parts.")
    return user, password


def is_size(text: str) -> bool:
    """Whether Gradio reads the text as a file size."""
    return re.fullmatch(r"[1-9]\d{0,5} ?(b|kb|mb|gb)", text.strip().lower()) is not None


def launch_space() -> None:
    """As a Space: strangers share the server, its address and port come from the environment."""
    studio = Studio(shared=True)
    demo = build(studio)
    serve(demo, studio, max_file_size="20mb")
    studio.start()
    demo.block_thread()


if __name__ == "__main__":
    try:
        launch_space() if "SPACE_ID" in os.environ else launch()
    except InputError as error:
        sys.exit(str(error))
