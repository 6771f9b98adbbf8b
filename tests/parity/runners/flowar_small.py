"""The same runners as FlowAR's with cross-attention."""

from tessera.tests.parity.runners.flowar import RUNNERS

__all__ = ["RUNNERS"]
