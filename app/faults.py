"""Errors become one sentence; what nobody expected goes to the log under an id."""

from __future__ import annotations

import errno
import functools
import inspect
import logging
import secrets
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from ..modalities.errors import InputError

LOG_NAME = "tessera.log"
log = logging.getLogger("tessera.app")


def log_to(folder: Path) -> None:
    """Write the log to ``folder/tessera.log``, at most 1 MB."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = RotatingFileHandler(
        folder / LOG_NAME, maxBytes=1_000_000, encoding="utf8", delay=True
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def explain(error: BaseException) -> str:
    """The sentence that people see."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f' in "{Path(error.filename).parent}"' if error.filename else ""
        return f"The disk is full{where}: free some space and try again."
    if isinstance(error, MemoryError):
        return "Not enough memory: close something, or make fewer pictures at once."
    number = secrets.token_hex(2)
    log.error("id %s", number, exc_info=error)
    return f"Something went wrong (id {number}). Your prompt is kept. Details: {LOG_NAME}"


def guarded(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Let an event handler show its errors as a toast of one sentence, without a traceback."""
    import gradio as gr

    def toast(error: Exception) -> gr.Error:
        return gr.Error(explain(error), title="", duration=12, print_exception=False)

    if inspect.isasyncgenfunction(handler):

        @functools.wraps(handler)
        async def watch(*args: Any, **options: Any) -> Any:
            try:
                async for value in handler(*args, **options):
                    yield value
            except gr.Error:
                raise
            except Exception as error:
                raise toast(error) from None

        return watch

    @functools.wraps(handler)
    def call(*args: Any, **options: Any) -> Any:
        try:
            return handler(*args, **options)
        except gr.Error:
            raise
        except Exception as error:
            raise toast(error) from None

    return call
