"""The same runners as TA-TiTok's."""

from tessera.tests.parity.runners.tatitok import RUNNERS

__all__ = ["RUNNERS"]
