"""The same runners as those of the trunk BERT."""

from tessera.tests.parity.runners.titok_maskgit import RUNNERS

__all__ = ["RUNNERS"]
