"""Whether a generator writes what a tokenizer reads."""

from __future__ import annotations

from diffusers import ModelMixin

from ..modalities.errors import InputError
from ..tokenizers.base import Tokenizer
from .autoregressive.tokenbridge import TokenBridge


def check_fit(generator: ModelMixin, tokenizer: Tokenizer) -> None:
    """Raise InputError unless the tokenizer decodes the generator's tokens.

    They agree in ids or in the width of continuous tokens, and in length; of an ordered tokenizer a
    generator may write the first tokens alone. TokenBridge and VAR also compute with the
    tokenizer's levels and codes: theirs must be the same.
    """
    config = generator.config
    if isinstance(generator, TokenBridge):
        length, vocab_size, latent_dim = config.num_tokens * config.channels, config.levels, None
    else:
        own = isinstance(getattr(type(generator), "num_tokens", None), property)
        length = generator.num_tokens if own else config.num_tokens
        vocab_size, latent_dim = config.get("vocab_size"), config.get("latent_dim")
    kind = (vocab_size, latent_dim)
    fits = length <= tokenizer.num_tokens if tokenizer.ordered else length == tokenizer.num_tokens
    if not fits or kind != (tokenizer.vocab_size, tokenizer.latent_dim):
        raise InputError(
            f"The generator writes {_tokens(length, *kind)}, the tokenizer reads "
            f"{_tokens(tokenizer.num_tokens, tokenizer.vocab_size, tokenizer.latent_dim)}: they do "
            "not fit."
        )
    if hasattr(type(generator), "check_quantizer"):
        generator.check_quantizer(getattr(tokenizer, "quantizer", None))


def _tokens(length: int, vocab_size: int | None, latent_dim: int | None) -> str:
    what = f"{vocab_size} ids" if latent_dim is None else f"width {latent_dim}"
    return f"{length} tokens of {what}"
