"""Starts for generators over ids: what is alike begins alike.

The ids of finite scalar quantization (Mentzer et al., ICLR 2024, arXiv 2309.15505) are cells of a small
grid of codes, those of a clip stand on a grid in time and space. Embeddings that know nothing of it must
meet every id, and every place, in the data. Here each is a sum of one smooth random function a dimension
of its grid, the size of NBP's own random start; training is free to leave it. The ids of a codebook have
no grid, but codes: there embeddings are codes, turned at random.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..generators.autoregressive.frames import FrameTransformer
from ..generators.next_block.nbp import NBP
from ..tokenizers.quantizers.ema import EMACodebook
from ..tokenizers.video.nbp import NBPTokenizer

STD = 0.02
# Over how many levels, and places, the functions of two neighbours stay alike.
LEVEL_REACH, PLACE_REACH = 1.5, 0.7
# Beside conditions of about 1.
EMBEDDED, HEAD = 0.3, 0.05


@torch.no_grad()
def smooth_ids(model: NBP, tokenizer: NBPTokenizer) -> None:
    """Write the embeddings of video ids and places, and the head, after `NBP.init_weights`, in place."""
    quantizer, dim = tokenizer.quantizer, model.config.dim
    ids = torch.arange(quantizer.vocab_size, device=quantizer.sizes.device)
    digits = quantizer.ids_to_digits(ids).cpu()
    for rows in (model.embedding.weight, model.head.weight):
        rows[model.first_video :] = smooth(digits, quantizer.levels, LEVEL_REACH, dim)
    # Behind a text the begin and the first ids but one stand before the ids in order.
    first = model.config.text_length + model.config.block_size if model.hybrid else 0
    index = torch.arange(len(model.positions) - first)
    steps, height, width = tokenizer.grid
    places = torch.stack([index // (height * width), index // width % height, index % width], 1)
    places = places[: steps * height * width]
    model.positions[first : first + len(places)] = smooth(
        places, (steps, height, width), PLACE_REACH, dim
    )


@torch.no_grad()
def ids_of_codes(model: FrameTransformer, codebooks: Sequence[EMACodebook]) -> None:
    """Write the embeddings of ids, and the head, in place: alike for codes that are alike, and in the
    head as in the embedding, so that a frame is likely to be like the one before.
    """
    dim, size = model.head.in_features, model.vocab_size
    for q, codebook in enumerate(codebooks):
        codes = codebook.embed.float().cpu()
        turn = torch.randn(codes.shape[1], dim)
        # Of one length, so that each is nearest to itself.
        turned = nn.functional.normalize((codes - codes.mean(0)) @ turn, dim=1) * dim**0.5
        first = q * (size + 2)
        model.embedding.weight[first : first + size] = EMBEDDED * turned
        model.head.weight[q * size : (q + 1) * size] = HEAD * turned


def smooth(cells: Tensor, sizes: Sequence[int], reach: float, dim: int) -> Tensor:
    """Rows ``[N, dim]`` of standard deviation `STD` for cells ``[N, D]`` of a grid of these sizes."""
    total = torch.zeros(len(cells), dim)
    for axis, size in enumerate(sizes):
        steps = torch.arange(size).float()
        kernel = torch.exp(-((steps[:, None] - steps) ** 2) / (2 * reach**2))
        mix = nn.functional.normalize(kernel, dim=1)
        total += (mix @ torch.randn(size, dim))[cells[:, axis]]
    return total * STD / len(sizes) ** 0.5
