"""Miniature models of video: random weights, built in under a second."""

from __future__ import annotations

import torch
from torch import nn

from tessera.generators.autoregressive.larp_ar import LARPGenerator
from tessera.generators.conditioning.clip import TextImageCLIP
from tessera.generators.linear_video.lingen import LinGen
from tessera.generators.linear_video.vfimamba import VFIMamba
from tessera.generators.masked.phenaki import Phenaki
from tessera.generators.next_block.nbp import NBP
from tessera.pipelines.frame_interpolation import FrameInterpolationPipeline
from tessera.pipelines.image_to_video import ImageToVideoPipeline
from tessera.pipelines.text_to_video import ClassToVideoPipeline, TextToVideoPipeline
from tessera.tests.tiny import tiny_clip
from tessera.tokenizers.video.larp import LARP
from tessera.tokenizers.video.nbp import NBPTokenizer
from tessera.tokenizers.video.phenaki import CViViT


def _random(model: nn.Module, std: float = 0.3) -> nn.Module:
    for name, parameter in model.named_parameters():
        # Wide ways in and out, so that texts and tokens outweigh the draws.
        wide = any(part in name for part in ("embedding", "text_proj", "cross", "head."))
        if "norm" not in name:
            nn.init.normal_(parameter, std=1.0 if wide else std)
    return model.eval()


def tiny_causal_tokenizer() -> NBPTokenizer:
    """9 frames of 16 px, 1 + 4 k: 3 steps of 2x2 ids."""
    torch.manual_seed(0)
    return NBPTokenizer(16, 9, (32, 32, 32), num_blocks=1, fsq_levels=(8, 8, 8)).eval()


def tiny_block_pipeline() -> TextToVideoPipeline:
    """Text to clips by NBP: a window of 9 frames, blocks of 4 ids."""
    tokenizer, clip = tiny_causal_tokenizer(), tiny_clip()
    torch.manual_seed(1)
    generator = NBP(
        vocab_size=tokenizer.vocab_size,
        num_tokens=12,
        block_size=4,
        text_vocab_size=0,
        text_length=8,
        max_positions=32,
        dim=32,
        depth=2,
        heads=2,
        top_k=None,
        top_p=1.0,
        text_dim=clip.text_dim,
    )
    return TextToVideoPipeline(tokenizer, _random(generator), clip)


def tiny_frames_pipeline() -> ImageToVideoPipeline:
    """NBP that goes on from frames alone."""
    tokenizer = tiny_causal_tokenizer()
    torch.manual_seed(1)
    generator = NBP(
        tokenizer.vocab_size, 12, 4, 0, 0, max_positions=32, dim=32, depth=2, heads=2, top_k=None
    )
    return ImageToVideoPipeline(tokenizer, _random(generator))


def tiny_masked_pipeline(clip: TextImageCLIP | None = None) -> TextToVideoPipeline:
    """Text to clips by Phenaki: 5 frames of 16 px are 3 steps of 2x2 ids; a window of 7 frames."""
    clip = clip or tiny_clip()
    torch.manual_seed(0)
    small = {"dim": 32, "heads": 2, "head_dim": 16, "vocab_size": 64}
    tokenizer = CViViT(16, 5, spatial_depth=1, temporal_depth=1, **small)
    generator = Phenaki(
        max_tokens=16, depth=2, text_dim=clip.text_dim, num_steps=3, temperature=40.0, **small
    )
    return TextToVideoPipeline(tokenizer.eval(), _random(generator, 0.2), clip)


def tiny_flow_pipeline() -> TextToVideoPipeline:
    """Text to clips of any length by LinGen, over the codes of the causal tokenizer."""
    clip = tiny_clip()
    torch.manual_seed(0)
    tokenizer = NBPTokenizer(
        16,
        9,
        (32, 32, 32),
        num_blocks=1,
        fsq_levels=(8, 8, 8),
        latent_mean=(0.0, 0.1, 0.0),
        latent_std=(1.0, 1.0, 0.5),
    ).eval()
    generator = LinGen(
        latent_channels=3,
        patch_size=1,
        dim=32,
        depth=1,
        head_dim=16,
        text_dim=clip.text_dim,
        window=(4, 2, 2),
        review_window=(2, 2, 2),
        review_tokens_from=64,
        d_state=8,
        headdim=16,
        num_steps=3,
    )
    for parameter in generator.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return TextToVideoPipeline(tokenizer, generator.eval(), clip)


def tiny_class_video(frame_prediction: bool = False) -> ClassToVideoPipeline | ImageToVideoPipeline:
    """Clips of 4 frames of 8 px by LARP: of 3 classes, or after frames."""
    torch.manual_seed(0)
    small = {
        f"{part}_{name}": n
        for part in ("encoder", "decoder")
        for name, n in (("dim", 16), ("depth", 1), ("heads", 2))
    }
    tokenizer = LARP(8, 4, 4, 2, num_latent_tokens=6, codebook_size=19, code_dim=4, prior_depth=0, **small)  # fmt: skip
    generator = LARPGenerator(19, 6, 3, frame_prediction, dim=32, depth=2, heads=2, mlp_hidden=32)
    tokenizer, generator = _random(tokenizer), _random(generator)
    if frame_prediction:
        return ImageToVideoPipeline(tokenizer, generator)
    return ClassToVideoPipeline(tokenizer, generator, ["archery", "bowling", "surfing"])


def tiny_interpolation() -> FrameInterpolationPipeline:
    """VFIMamba of width 4."""
    torch.manual_seed(0)
    return FrameInterpolationPipeline(VFIMamba(dim=4, depths=(1, 1, 1, 1, 1)).eval())
