"""Miniature data and models that several tests share: random weights, built in under a second."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw

from tessera.generators.autoregressive.flexar import FlexAR
from tessera.generators.conditioning.clip import TextImageCLIP, train_bpe
from tessera.tokenizers.image.flextok import FlexTok

if TYPE_CHECKING:
    from tessera.pipelines.text_to_image import TextToImagePipeline

COLOURS = {
    "red": ("rot", "#d22"),
    "green": ("grün", "#292"),
    "blue": ("blau", "#23d"),
    "yellow": ("gelb", "#ec2"),
    "black": ("schwarz", "#111"),
}
SHAPES = {"circle": "Kreis", "square": "Quadrat", "triangle": "Dreieck", "ring": "Ring"}
STYLES = {"fluent-3d": 12, "fluent-flat": 4}  # Style -> outline in pixels.


def tiny_pack(folder: Path) -> Path:
    """A sticker pack of 5 colours x 4 shapes x 2 styles at 128x128; "black ring" is the test split.

    Returns the folder, made if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    bins = {style: b"" for style in STYLES}
    names = {}
    with open(folder / "captions.jsonl", "w", encoding="utf8") as table:
        for number, (colour, shape) in enumerate((c, s) for c in COLOURS for s in SHAPES):
            code, name = f"{0x1F300 + number:x}", f"{colour} {shape}"
            names[code] = {"en": name, "de": f"{COLOURS[colour][0]} {SHAPES[shape]}"}
            for style, outline in STYLES.items():
                data = _draw(shape, COLOURS[colour][1], outline)
                row = {
                    "id": f"{style}/{code}",
                    "style": style,
                    "unicode": code,
                    "base": code,
                    "name": name,
                    "keywords": [shape, "shape"],
                    "group": "symbols",
                    "split": "test" if name == "black ring" else "train",
                    "offset": len(bins[style]),
                    "length": len(data),
                }
                table.write(json.dumps(row) + "\n")
                bins[style] += data
    for style, data in bins.items():
        (folder / f"{style}.bin").write_bytes(data)
    with gzip.open(folder / "names_i18n.json.gz", "wt", encoding="utf8") as file:
        json.dump(names, file)
    return folder


def _draw(shape: str, colour: str, outline: int) -> bytes:
    image = Image.new("RGBA", (128, 128))
    draw = ImageDraw.Draw(image)
    box, border = (14, 14, 114, 114), {"outline": "#555", "width": outline}
    if shape == "circle":
        draw.ellipse(box, colour, **border)
    elif shape == "square":
        draw.rectangle(box, colour, **border)
    elif shape == "triangle":
        draw.polygon([(64, 14), (114, 114), (14, 114)], colour, **border)
    else:
        draw.ellipse(box, outline=colour, width=3 * outline)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def tiny_tokenizer() -> FlexTok:
    """FlexTok over 32x32 pictures: 16 ordered tokens of 512 ids, over a VAE's 16x16 latents."""
    torch.manual_seed(0)
    tokenizer = FlexTok(
        image_size=32,
        vae_config={
            "block_out_channels": [8, 8],
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "latent_channels": 4,
            "sample_size": 32,
            "mid_block_add_attention": False,
        },
        latent_channels=4,
        latent_size=16,
        patch_size=4,
        max_grid=4,
        num_registers=16,
        fsq_levels=(8, 8, 8),
        encoder_dim=32,
        encoder_depth=1,
        decoder_dim=32,
        decoder_depth=1,
        head_dim=16,
        num_inference_steps=2,
        guidance_scale=1.0,
        normalized_guidance=False,
    )
    # A fresh decoder outputs zero; random weights let every token change the picture.
    for parameter in [*tokenizer.encoder.parameters(), *tokenizer.decoder.parameters()]:
        torch.nn.init.normal_(parameter, std=0.2)
    return tokenizer.eval()


def tiny_clip() -> TextImageCLIP:
    """Both towers at width 32, 32x32 pictures, 16 text tokens, a BPE of `tiny_pack`'s names."""
    torch.manual_seed(1)
    clip = TextImageCLIP(
        embed_dim=16,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        text_cfg={"context_length": 16, "vocab_size": 320, "width": 32, "heads": 2, "layers": 1},
    )
    clip.bpe = train_bpe([f"{c} {s}, 3d flat" for c in COLOURS for s in SHAPES], 320)
    return clip.eval()


def tiny_pipeline() -> TextToImagePipeline:
    """Text to 32x32 pictures in 16 tokens, styles "3d" and "flat"; what it draws is noise."""
    from tessera.pipelines.text_to_image import TextToImagePipeline

    tokenizer, clip = tiny_tokenizer(), tiny_clip()
    torch.manual_seed(2)
    generator = FlexAR(
        vocab_size=tokenizer.vocab_size,
        num_tokens=tokenizer.num_tokens,
        text_dim=clip.text_dim,
        dim=32,
        depth=2,
        heads=2,
        mlp_hidden=64,
    )
    # At the usual scale the prompt would hardly change what is drawn.
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return TextToImagePipeline(
        tokenizer, generator.eval(), clip, styles="3d,flat", default_num_tokens=8
    )
