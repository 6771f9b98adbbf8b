"""The same runners as those of the class-conditional generator."""

from tessera.tests.parity.runners.larp_ar import RUNNERS

__all__ = ["RUNNERS"]
