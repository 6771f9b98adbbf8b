"""The Library tab: what was made before, with its settings."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr

from ...modalities.errors import InputError
from ..faults import guarded
from ..outputs import TRASH, medium
from ..studio import Card, Studio
from .widgets import (
    ACTION,
    PictureInputs,
    component,
    markup,
    record_table,
    restore_panel,
    use_record,
)

PAGE = 60
# What the Picture tab can make again.
PICTURES = ("TextToImagePipeline", "ClassToImagePipeline")
NOTHING = "Nothing made yet. Everything you create is kept here."
_TEMPLATE = '<div class="ts-empty"><p></p></div><div class="ts-shelf"></div>'


def shelf(studio: Studio, owner: str, text: str, pages: int, chosen: str = "") -> dict[str, Any]:
    """The value of the shelf component: the newest files whose prompt or name has the text."""
    outputs = studio.outputs(owner)
    names = outputs.names(text or "")
    shown = names[: PAGE * pages]
    return {
        "files": [
            {"name": name, "path": str(outputs.folder / name), "kind": medium(name)}
            for name in shown
        ],
        "more": len(names) - len(shown),
        "chosen": chosen,
        "note": f"Nothing matches “{text}”." if text else NOTHING,
    }


def library_tab(
    studio: Studio, card: Card, owner: gr.BrowserState, inputs: PictureInputs, tabs: gr.Tabs
) -> tuple[list[Any], list[Any], Any]:
    """Returns inputs, outputs and handler that show the newest files."""
    pages, chosen, record, trashed = gr.State(1), gr.State(""), gr.State(None), gr.State("")
    with gr.Row(elem_classes="ts-bench"):
        with gr.Column(scale=3, min_width=0, elem_classes="ts-results"):
            search = gr.Textbox(
                label="Filter",
                show_label=False,
                placeholder="Filter by words of the prompt",
                max_lines=1,
                container=False,
                elem_id="filter",
            )
            pictures = component(
                "shelf.js",
                _TEMPLATE,
                {"files": [], "more": 0, "chosen": "", "note": NOTHING},
                elem_id="shelf",
            )
            older = gr.Button("Older", visible=False, elem_id="older")
        with gr.Column(scale=1, min_width=240, elem_classes="ts-settings"):
            with gr.Group(visible=False, elem_id="details") as details:
                player = component(
                    "player.js", '<div class="ts-player"></div>', {"path": "", "kind": ""}
                )
                table = markup(elem_id="details-table")
                with gr.Row(elem_classes="ts-choices") as uses:
                    names = {"all": "Use all", "prompt": "Use prompt", "seed": "Use seed"}
                    choices = {what: gr.Button(text, size="sm") for what, text in names.items()}
                with gr.Row(elem_classes="ts-choices"):
                    download = gr.DownloadButton("Download", size="sm")
                    delete = gr.Button("Delete", size="sm", variant="stop")
            undo = gr.Button("Undo delete", visible=False, size="sm", elem_id="undo")
            restore_panel(card, inputs, tabs, elem_id="library-picture")
            if not studio.shared:
                markup(
                    f'<p class="ts-hint">Kept in {html.escape(studio.folder.name)}/, deleted '
                    f"ones in {html.escape(studio.folder.name)}/trash/.</p>",
                )

    def listing(owner: str, text: str, count: int, mark: str = "") -> tuple[Any, ...]:
        page = shelf(studio, owner, text, count, mark)
        return page, gr.Button(visible=page["more"] > 0, value=f"Older ({page['more']})")

    def refresh(owner: str, text: str) -> tuple[Any, ...]:
        return *listing(owner, text, 1), 1

    def more(owner: str, text: str, count: int, mark: str) -> tuple[Any, ...]:
        return *listing(owner, text, count + 1, mark), count + 1

    def choose(owner: str, event: gr.EventData) -> tuple[Any, ...]:
        outputs, picked = studio.outputs(owner), str(event.name)
        found = outputs.record(picked)
        text = record_table(found) or '<p class="ts-hint">This file has no Tessera settings.</p>'
        path, drawn = outputs.path(picked), found is not None and found["pipeline"] in PICTURES
        return (
            picked,
            found,
            gr.Group(visible=True),
            text,
            gr.DownloadButton(value=path),
            {"path": str(path), "kind": medium(path)},
            gr.Row(visible=drawn),
        )

    def throw_away(owner: str, text: str, count: int, picked: str) -> tuple[Any, ...]:
        if not picked:
            raise InputError("Choose a file first.")
        moved = studio.outputs(owner).delete(picked)
        gone = "/".join(moved.parts[-2:])
        return (
            *listing(owner, text, count),
            "",
            None,
            gr.Group(visible=False),
            gone,
            gr.Button(visible=True),
        )

    def bring_back(owner: str, text: str, count: int, gone: str) -> tuple[Any, ...]:
        outputs = studio.outputs(owner)
        if gone:
            outputs.restore(outputs.folder / TRASH / gone)
        return *listing(owner, text, count), "", gr.Button(visible=False)

    show = [pictures, older]
    state = [owner, search]
    gr.on(
        [search.change],
        guarded(refresh),
        state,
        [*show, pages],
        trigger_mode="always_last",
        **ACTION,
    )
    older.click(guarded(more), [*state, pages, chosen], [*show, pages], **ACTION)
    pictures.choose(
        guarded(choose),
        owner,
        [chosen, record, details, table, download, player, uses],
        trigger_mode="always_last",
        **ACTION,
    )
    delete.click(
        guarded(throw_away),
        [*state, pages, chosen],
        [*show, chosen, record, details, trashed, undo],
        **ACTION,
    )
    undo.click(guarded(bring_back), [*state, pages, trashed], [*show, trashed, undo], **ACTION)
    for what, button in choices.items():
        use_record(button.click, what, record, card, inputs, tabs)
    return state, [*show, pages], guarded(refresh)
