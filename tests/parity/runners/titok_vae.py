"""The same runners as TiTok's."""

from tessera.tests.parity.runners.titok import RUNNERS

__all__ = ["RUNNERS"]
