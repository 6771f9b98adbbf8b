"""Miniature data and models that several tests share: random weights, built in under a second."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw

from tessera.generators.autoregressive.flexar import FlexAR
from tessera.generators.conditioning.clip import TextImageCLIP, train_bpe
from tessera.tokenizers.audio.spectrum_vq import SpectrumVQ
from tessera.tokenizers.audio.wavtokenizer import WavTokenizer
from tessera.tokenizers.image.flextok import FlexTok

if TYPE_CHECKING:
    from tessera.pipelines.class_to_image import ClassToImagePipeline
    from tessera.pipelines.text_to_image import TextToImagePipeline
    from tessera.pipelines.text_to_sound import TextToSoundPipeline
    from tessera.pipelines.text_to_speech import TextToSpeechPipeline
    from tessera.tokenizers.base import Tokenizer

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


def _randomize(model: torch.nn.Module, std: float) -> torch.nn.Module:
    """Every weight random, so that conditions and tokens all count."""
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=1.0 if "class" in name or "embedding" in name else std)
    return model.eval()


CLASSES = ("red circle", "blue ring", "green square", "green triangle", "black ring")
GRID = 4  # tokens along the pictures of all grid tokenizers here


def tiny_grid_tokenizer(kind: str) -> Tokenizer:
    """ "vqgan", "scales", "kl" or "levels": a grid of 4x4 tokens."""
    from tessera.tokenizers.image.kl16_vae import KL16VAE
    from tessera.tokenizers.image.maskgit_vqgan import MaskGITVQGAN
    from tessera.tokenizers.image.tokenbridge import TokenBridgeTokenizer
    from tessera.tokenizers.image.var_vqvae import MultiScaleVQVAE

    torch.manual_seed(0)
    if kind == "vqgan":
        tokenizer = MaskGITVQGAN(16, (1, 1, 1), 32, 1, z_channels=8, codebook_size=24)
    elif kind == "scales":
        tokenizer = MultiScaleVQVAE(24, 8, (32, 64), (1, 2, 3, GRID))
        torch.nn.init.normal_(tokenizer.quantizer.codebook.embedding.weight, std=0.3)
    else:
        tokenizer = KL16VAE(
            8,
            (32, 64),
            ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            ("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
        )
    if kind == "levels":
        tokenizer = TokenBridgeTokenizer.from_continuous(tokenizer, 16, value_range=(-0.5, 0.5))
    return tokenizer.eval()


def tiny_class_pipeline(family: str) -> ClassToImagePipeline:
    """Classes to pictures of noise, by a random generator of a family, over its kind of tokenizer."""
    from tessera.generators.autoregressive.flexar import FlexARClass
    from tessera.generators.autoregressive.rar import RAR
    from tessera.generators.autoregressive.tokenbridge import TokenBridge
    from tessera.generators.autoregressive.xar import XAR
    from tessera.generators.masked.enat import ENAT
    from tessera.generators.masked.himar import HiMAR
    from tessera.generators.masked.maskgit import MaskGIT
    from tessera.generators.next_scale.flowar import FlowAR
    from tessera.generators.next_scale.var import VAR
    from tessera.pipelines.class_to_image import ClassToImagePipeline

    count = len(CLASSES)
    ids = {"vocab_size": 24, "num_tokens": GRID**2, "num_classes": count}
    small = {"dim": 32, "heads": 2}
    two = {"encoder_dim": 32, "encoder_depth": 1, "encoder_heads": 2}
    two |= {"decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 2, "buffer_size": 2}
    torch.manual_seed(3)
    if family == "flexar":
        generator = FlexARClass(512, 16, count, 32, 2, 2, 64)
        tokenizer = tiny_tokenizer()
    elif family in ("rar", "maskgit", "enat"):
        tokenizer = tiny_grid_tokenizer("vqgan")
        generator = {
            "rar": lambda: RAR(**ids, **small, depth=2, mlp_hidden=64, guidance_scale=4.0),
            "maskgit": lambda: MaskGIT(
                **ids, **small, depth=2, mlp_hidden=64, num_steps=4, temperature=3.0
            ),
            "enat": lambda: ENAT(
                **ids, **small, encoder_depth=2, decoder_depth=1, mlp_hidden=64, num_steps=4
            ),
        }[family]()
    elif family == "tokenbridge":
        tokenizer = tiny_grid_tokenizer("levels")
        generator = TokenBridge(
            GRID**2, 4, 16, (-0.5, 0.5), 3.0, (2, 0, 3, 1), count, **two, head_dim=32, head_depth=1,
            head_heads=2, num_steps=4,
        )  # fmt: skip
    elif family == "var":
        tokenizer = tiny_grid_tokenizer("scales")
        generator = VAR(24, 8, (1, 2, 3, GRID), count, **small, depth=2)
    else:
        tokenizer = tiny_grid_tokenizer("kl")
        parts = {"dim": 32, "encoder_depth": 1, "decoder_depth": 1, "heads": 2}
        generator = {
            "flowar": lambda: FlowAR(
                4, (1, 2, GRID), count, **parts, flow_dim=64, flow_depth=1, num_steps=4
            ),
            "xar": lambda: XAR(4, GRID, 2, count, **parts, num_steps=3),
            "himar": lambda: HiMAR(
                4, 4, GRID**2, count, **two, head_dim=32, head_depth=1, dit_dim=32, dit_depth=1,
                dit_heads=2, pivot_steps=2, num_steps=2, pivot_diffusion_steps=4, diffusion_steps=4,
            ),
        }[family]()  # fmt: skip
    std = 0.3 if generator.latent_dim is None else 0.1
    return ClassToImagePipeline(tokenizer, _randomize(generator, std), CLASSES)


def tiny_maskgen_pipeline(kind: str) -> TextToImagePipeline:
    """Text to 32x32 pictures of noise by MaskGen, "vq" or "kl", over a decoder that reads the text."""
    from tessera.generators.masked.maskgen import MaskGenKL, MaskGenVQ
    from tessera.pipelines.text_to_image import TextToImagePipeline
    from tessera.tokenizers.image.tatitok import TATiTok

    torch.manual_seed(4)
    clip = TextImageCLIP(
        embed_dim=32,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        text_cfg={"context_length": 16, "vocab_size": 320, "width": 32, "heads": 2, "layers": 2},
    )
    clip.bpe = tiny_clip().bpe
    shape = {"encoder_dim": 32, "encoder_depth": 1, "encoder_heads": 2}
    shape |= {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
    shape |= {"text_context_length": 16, "text_embed_dim": 32}
    own = {"vq": {"codebook_size": 24, "token_size": 8}}
    own |= {"kl": {"quantize_mode": "vae", "token_size": 4}}
    tokenizer = TATiTok(32, 8, 8, **own[kind], **shape)
    small = {"num_tokens": 8, "dim": 32, "depth": 2, "heads": 2, "text_dim": 32, "micro_dim": 8}
    if kind == "vq":
        generator = MaskGenVQ(24, **small, num_steps=4, guidance_scale=3.0)
    else:
        generator = MaskGenKL(4, **small, head_dim=32, head_depth=1, num_steps=4, diffusion_steps=4)
    return TextToImagePipeline(
        tokenizer.eval(), _randomize(generator, {"vq": 0.3, "kl": 0.1}[kind]), clip.eval()
    )


def tiny_codec(
    sample_rate: int = 1000, strides: Sequence[int] = (2, 5), vocab_size: int = 32
) -> WavTokenizer:
    """WavTokenizer, by default of 1 kHz and 100 frames a second; what it decodes is noise."""
    torch.manual_seed(3)
    codec = WavTokenizer(
        sample_rate=sample_rate,
        filters=4,
        strides=strides,
        lstm_layers=1,
        latent_dim=8,
        vocab_size=vocab_size,
        dim=64,
        intermediate_dim=32,
        num_layers=1,
    )
    codec.init_weights()
    codec.quantizer.embed.normal_()
    return codec.eval()


def tiny_spectrum_codec(
    sample_rate: int = 1000, hop: int = 10, n_fft: int = 80, num_codebooks: int = 2
) -> SpectrumVQ:
    """SpectrumVQ, by default of 1 kHz and 100 frames a second; what it decodes is noise."""
    torch.manual_seed(4)
    codec = SpectrumVQ(
        sample_rate,
        hop,
        n_fft,
        latent_dim=8,
        vocab_size=32,
        num_codebooks=num_codebooks,
        dim=32,
        intermediate_dim=32,
        encoder_layers=1,
        decoder_layers=1,
        codebook={"dead_code_threshold": 0.1, "kmeans_iterations": 10},
    )
    codec.init_weights()
    with torch.no_grad():
        for codebook in codec.quantizer.codebooks:
            codebook.embed.normal_(std=0.02)
    return codec.eval()


def streams(*seeds: int) -> list[torch.Generator]:
    """A generator of each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def tiny_voice() -> TextToSpeechPipeline:
    """Two voices that speak noise, about as long as speech."""
    from tessera.generators.autoregressive.speech import SpeechTransformer
    from tessera.modalities.phonemes import PHONES
    from tessera.pipelines.text_to_speech import TextToSpeechPipeline

    torch.manual_seed(1)
    small = {"dim": 32, "heads": 2, "mlp_hidden": 32, "text_depth": 1, "depth": 2, "window": 8}
    model = SpeechTransformer(PHONES, ["kathleen", "bob"], vocab_size=32, frame_rate=100.0, **small)
    model.init_weights()
    torch.nn.init.constant_(model.duration_head.bias, 2.2)
    torch.nn.init.normal_(model.decoder.head.weight, std=0.5)
    return TextToSpeechPipeline(tiny_codec(8000, (4, 4, 5)), model.eval(), default_voice="kathleen")


def tiny_sound() -> TextToSoundPipeline:
    """Sounds of noise, up to two seconds."""
    from tessera.generators.autoregressive.sound import SoundTransformer
    from tessera.pipelines.text_to_sound import TextToSoundPipeline

    torch.manual_seed(2)
    small = {"dim": 32, "heads": 2, "mlp_hidden": 32, "text_depth": 1, "depth": 2, "window": 8}
    codec = tiny_spectrum_codec(8000, 80, 640)
    model = SoundTransformer(
        ["a", "bell", "drum"],
        vocab_size=codec.vocab_size,
        num_codebooks=codec.num_codebooks,
        frame_rate=codec.frame_rate,
        max_seconds=2.0,
        **small,
    )
    model.init_weights()
    torch.nn.init.constant_(model.length_head.bias, 4.0)
    torch.nn.init.normal_(model.decoder.head.weight, std=0.5)
    return TextToSoundPipeline(codec, model.eval())
