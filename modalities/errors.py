"""The one error that people see."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from the user: the message is one sentence with the value and what to do."""
