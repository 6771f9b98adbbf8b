"""The Models tab: everything that can be loaded by name, with its size and licences."""

from __future__ import annotations

import html

import gradio as gr

from ...weights.registry import ModelInfo, list_models, model_info
from ..studio import availability
from .widgets import markup

_HEADS = ("Model", "What it does", "Tokens", "Size", "Licence", "State")
_STATES = {"shipped": "ok", "on disk": "ok", "needs download": "far"}


def size_text(info: ModelInfo) -> str:
    if info.size_mb is None:
        return ""
    return f"{info.size_mb / 1000:.1f} GB" if info.size_mb >= 1000 else f"{info.size_mb:.0f} MB"


def models_table(names: list[str] | None = None) -> str:
    """The registry as an HTML table."""
    rows = "".join(_row(model_info(name)) for name in (list_models() if names is None else names))
    heads = "".join(f"<th>{head}</th>" for head in _HEADS)
    return (
        f'<div class="ts-scroll"><table class="ts-models"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(info: ModelInfo) -> str:
    state = availability(info)
    flag = '<span class="ts-tag warn">not for commercial use</span>' if info.non_commercial else ""
    where = f"<small>{html.escape(info.hub_id)}</small>" if info.hub_id else ""
    cells = (
        f"<strong>{html.escape(info.name)}</strong>{where}",
        f"{html.escape(info.task.replace('-', ' '))}<small>{html.escape(info.title)}</small>",
        html.escape(info.tokens or ""),
        size_text(info),
        f"{flag}<small>Code: {html.escape(info.license_code)}</small>"
        f"<small>Weights: {html.escape(info.license_weights)}</small>",
        f'<span class="ts-tag {_STATES[state]}">{state}</span>',
    )
    labelled = zip(_HEADS, cells, strict=True)
    return "<tr>" + "".join(f'<td data-head="{h}">{cell}</td>' for h, cell in labelled) + "</tr>"


def models_tab() -> gr.HTML:
    """Returns the table, which `models_table` fills."""
    markup(
        '<p class="ts-hint">Shipped models work without a network. The app downloads nothing by '
        "itself: the others are loaded by their name in Python or on the command line, which "
        "fetches them once.</p>",
    )
    return markup(models_table(), elem_id="models")
