"""The same runners as those of the model without a text."""

from tessera.tests.parity.runners.nbp_gpt import RUNNERS

__all__ = ["RUNNERS"]
