"""The audio codecs of Hugging Face transformers behind one interface.

The networks are transformers' own (Apache-2.0), an optional dependency; a class here says how one is
called, so that tokens are ``[B, Q, T]`` and L samples give exactly ``ceil(L / hop)`` frames:

- `EncodecTokenizer`: High Fidelity Neural Audio Compression, arXiv 2210.13438 (facebook/encodec_*)
- `DacTokenizer`: High-Fidelity Audio Compression with Improved RVQGAN, arXiv 2306.06546 (descript/dac_*)
- `MimiTokenizer`: Moshi, arXiv 2410.00037 (kyutai/mimi)
- `XcodecTokenizer`: Codec Does Matter, arXiv 2408.17175 (hf-audio/xcodec-*)
- `Xcodec2Tokenizer`: Llasa, arXiv 2502.04128 (HKUSTAudio/xcodec2-hf)
- `VibeVoiceTokenizer`: VibeVoice, arXiv 2508.19205; continuous
- `PocketTTSTokenizer`: Continuous Audio Language Models, arXiv 2509.06926; continuous

Weight norm is folded into plain weights. Items of a batch must have one length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...modalities.errors import InputError
from ..base import AudioTokenizer

if TYPE_CHECKING:
    from .streaming import Stream


def build_codec(config: dict[str, Any], model_type: str) -> nn.Module:
    """A codec of transformers with random weights, without weight norm, in float32.

    Raises:
        InputError: transformers is not installed, or the configuration is of something else.
    """
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise InputError(
            f'The "{model_type}" network is run by the package transformers, which is not installed: '
            'pip install "transformers==5.23.0".'
        ) from error
    found = config.get("model_type")
    if found != model_type:
        raise InputError(f'This configuration is of "{found}", not of "{model_type}".')
    options = {key: value for key, value in config.items() if key != "model_type"}
    try:
        codec = AutoModel.from_config(
            AutoConfig.for_model(model_type, **options), dtype=torch.float32
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f'This is no configuration of "{model_type}": {line}') from error
    return fold_weight_norm(codec)


def fold_weight_norm(module: nn.Module) -> nn.Module:
    """Replace every weight that a parametrization computes by its value."""
    for part in module.modules():
        if parametrize.is_parametrized(part):
            for name in list(part.parametrizations):
                parametrize.remove_parametrizations(part, name)
    return module


class TransformersCodec(ModelMixin, ConfigMixin, AudioTokenizer):
    """What the codecs share.

    Args:
        codec_config: the codec's configuration, as in its config.json; default: transformers' own.
        num_codebooks: codebooks in use, coarse ones first; default: all.
    """

    model_type: str

    @register_to_config
    def __init__(
        self, codec_config: dict[str, Any] | None = None, num_codebooks: int | None = None
    ):
        super().__init__()
        self.codec = build_codec(codec_config or {"model_type": self.model_type}, self.model_type)
        config = self.codec.config
        # VibeVoice's configuration does not say.
        self.sample_rate = getattr(config, "sampling_rate", 24_000)
        most = self._setup(config)
        self.num_codebooks = most if num_codebooks is None else num_codebooks
        if not 1 <= self.num_codebooks <= most:
            raise InputError(f"This codec has 1 to {most} codebooks, got {num_codebooks}.")

    def _setup(self, config: Any) -> int:
        """Set ``hop``, ``vocab_size`` or ``latent_dim``, ``streaming``; give the codebooks there are."""
        raise InputError("Choose a codec's own class, for example MimiTokenizer.")

    def _encode(self, audio: Tensor) -> Tensor:
        """Sound of whole frames -> tokens."""
        return self.codec.encode(audio).audio_codes

    def _decode(self, tokens: Tensor) -> Tensor:
        """Tokens -> sound ``[B, 1, about T * hop]``."""
        return self.codec.decode(tokens).audio_values

    @torch.no_grad()
    def encode(self, audio: Tensor) -> Tensor:
        """Sound ``[B, 1, L]`` in [-1, 1] -> tokens int64 ``[B, Q, T]``, or latents ``[B, T, latent_dim]``.

        Raises:
            InputError: another shape, no samples, or values that are not finite.
        """
        self.check_audio(audio)
        return self._encode(self._whole_frames(audio.to(self.dtype)))

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens ``[B, Q, T]``, or latents ``[B, T, latent_dim]`` -> sound ``[B, 1, T * hop]``.

        Raises:
            InputError: another shape, or ids outside the codebooks.
        """
        self.check_tokens(tokens)
        frames = tokens.shape[1 if self.vocab_size is None else 2]
        sound = self._decode(tokens)
        return F.pad(sound, (0, frames * self.hop - sound.shape[-1]))

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise InputError unless these are tokens or latents of this codec."""
        if self.vocab_size is not None:
            return super().check_tokens(tokens)
        fits = tokens.ndim == 3 and tokens.dtype.is_floating_point and tokens.shape[1] > 0
        if not fits or tokens.shape[2] != self.latent_dim:
            raise InputError(
                f"This tokenizer decodes latents of shape [batch, frames, {self.latent_dim}], got "
                f"{str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)}."
            )
        return None

    def _whole_frames(self, audio: Tensor) -> Tensor:
        """Silence behind the sound, up to a whole frame."""
        return F.pad(audio, (0, -audio.shape[-1] % self.hop))


class EncodecTokenizer(TransformersCodec):
    """EnCodec of 24 kHz (causal, so that it streams) and of 32 kHz (MusicGen's; not causal).

    That of 48 kHz is refused: it scales each second by its loudness, which its tokens do not hold.
    """

    model_type = "encodec"

    def _setup(self, config: Any) -> int:
        if config.normalize or config.chunk_length_s is not None or config.audio_channels != 1:
            raise InputError(
                "This EnCodec is stereo or scales pieces by their loudness, so that its tokens "
                "alone do not decode: take the one of 24 or 32 kHz."
            )
        self.hop, self.vocab_size = config.hop_length, config.codebook_size
        self.streaming = config.use_causal_conv and config.norm_type == "weight_norm"
        self.first_frames = max(config.kernel_size, config.last_kernel_size)
        return len(self.codec.quantizer.layers)

    def _whole_frames(self, audio: Tensor) -> Tensor:
        return audio  # Its convolutions fill the last frame themselves, by reflection.

    def _quantize(self, latents: Tensor) -> Tensor:
        # The codec counts codebooks by their bandwidth, and rounds down.
        quantizer = self.codec.quantizer
        kbps = (
            (self.num_codebooks + 0.5) * self.codec.bits_per_codebook * quantizer.frame_rate / 1000
        )
        return quantizer.encode(latents, kbps).transpose(0, 1)

    def _encode(self, audio: Tensor) -> Tensor:
        return self._quantize(self.codec.encoder(audio))

    def _decode(self, tokens: Tensor) -> Tensor:
        return self.codec.decoder(self.codec.quantizer.decode(tokens.transpose(0, 1)))

    def stream_encoder(self) -> Stream:
        layers = LayerStream(self.codec.encoder.layers)

        def encode(audio: Tensor) -> Tensor:
            return self._quantize(layers(audio))

        return CodecStream(self.hop, self.first_frames, encode, self._no_tokens)

    def stream_decoder(self) -> Stream:
        layers = LayerStream(self.codec.decoder.layers)

        def decode(tokens: Tensor) -> Tensor:
            self.check_tokens(tokens)
            return layers(self.codec.quantizer.decode(tokens.transpose(0, 1)))

        return CodecStream(1, self.first_frames, decode, _no_sound)

    def _no_tokens(self, piece: Tensor) -> Tensor:
        return piece.new_zeros(len(piece), self.num_codebooks, 0, dtype=torch.long)


class DacTokenizer(TransformersCodec):
    """DAC. Its decoder gives a few samples less than T * hop; they are filled up with zeros."""

    model_type = "dac"

    def _setup(self, config: Any) -> int:
        self.hop, self.vocab_size = config.hop_length, config.codebook_size
        return config.n_codebooks

    def _encode(self, audio: Tensor) -> Tensor:
        return self.codec.encode(audio, self.num_codebooks).audio_codes

    def _decode(self, tokens: Tensor) -> Tensor:
        return self.codec.decode(audio_codes=tokens).audio_values[:, None]


class MimiTokenizer(TransformersCodec):
    """Mimi: the first codebook tells of words, the others of sound. Streams both ways."""

    model_type = "mimi"
    streaming = True
    first_frames = 1

    def _setup(self, config: Any) -> int:
        self.hop, self.vocab_size = config.frame_size, config.codebook_size
        return config.num_quantizers

    def _apply(self, *args: Any, **options: Any) -> MimiTokenizer:
        # Its codebooks keep a table that would stay behind on the old device.
        for module in self.codec.modules():
            if hasattr(module, "_embed"):
                module._embed = None
        return super()._apply(*args, **options)

    def _quantize(self, latents: Tensor) -> Tensor:
        return self.codec.quantizer.encode(latents, self.num_codebooks).transpose(0, 1)

    def _dequantize(self, tokens: Tensor) -> Tensor:
        return self.codec.quantizer.decode(tokens)

    def _encode(self, audio: Tensor) -> Tensor:
        return self._quantize(self.codec.encoder(audio).latents)

    def _decode(self, tokens: Tensor) -> Tensor:
        return self.codec.decoder(self._dequantize(tokens)).audio_values

    def stream_encoder(self) -> Stream:
        encoder = self.codec.encoder
        layers, down = LayerStream(encoder.encoder_seanet.layers), LayerStream([encoder.downsample])
        transformer = TransformerStream(encoder.encoder_transformer)

        def encode(audio: Tensor) -> Tensor:
            audio = self._whole_frames(audio)
            return self._quantize(down(transformer(layers(audio))))

        return CodecStream(self.hop, self.first_frames, encode, self._no_tokens)

    def stream_decoder(self) -> Stream:
        decoder = self.codec.decoder
        up, layers = LayerStream([decoder.upsample]), LayerStream(decoder.decoder_seanet.layers)
        transformer = TransformerStream(decoder.decoder_transformer)

        def decode(tokens: Tensor) -> Tensor:
            self.check_tokens(tokens)
            return layers(transformer(up(self._dequantize(tokens))))

        frame_axis = 1 if self.vocab_size is None else -1
        return CodecStream(1, self.first_frames, decode, _no_sound, frame_axis)

    def _no_tokens(self, piece: Tensor) -> Tensor:
        if self.vocab_size is None:
            return piece.new_zeros(len(piece), 0, self.latent_dim)
        return piece.new_zeros(len(piece), self.num_codebooks, 0, dtype=torch.long)


class PocketTTSTokenizer(MimiTokenizer):
    """Mimi's network with continuous frames, of Kyutai's Pocket TTS."""

    model_type = "pocket_tts_audio_tokenizer"

    def _setup(self, config: Any) -> int:
        self.hop, self.vocab_size, self.latent_dim = config.frame_size, None, config.latent_dim
        return 1

    def _quantize(self, latents: Tensor) -> Tensor:
        return latents.mT

    def _dequantize(self, tokens: Tensor) -> Tensor:
        return self.codec.latent_proj(tokens.to(self.dtype).mT)


class XcodecTokenizer(TransformersCodec):
    """X-Codec: features of HuBERT or WavLM, which it contains, beside those of the sound."""

    model_type = "xcodec"

    def _setup(self, config: Any) -> int:
        self.sample_rate = config.sample_rate
        self.hop, self.vocab_size = config.hop_length, config.codebook_size
        return config.num_quantizers

    def _encode(self, audio: Tensor) -> Tensor:
        return self.codec.encode(audio).audio_codes[:, : self.num_codebooks]


class Xcodec2Tokenizer(TransformersCodec):
    """X-Codec 2: one codebook of 65,536 ids by FSQ, over features of w2v-BERT 2.0.

    It always adds a zero sample before it fills up to whole frames: L samples give
    ``L // hop + 1`` frames.
    """

    model_type = "xcodec2"

    def _setup(self, config: Any) -> int:
        from transformers import Xcodec2FeatureExtractor

        self.hop = config.hop_length
        self.vocab_size = 1
        for levels in config.quantization_levels:
            self.vocab_size *= levels
        self.features = Xcodec2FeatureExtractor(
            sampling_rate=config.sampling_rate, hop_length=config.hop_length
        )
        return 1

    def num_frames(self, samples: int) -> int:
        return samples // self.hop + 1

    def _whole_frames(self, audio: Tensor) -> Tensor:
        return audio  # The feature extractor does it.

    def _encode(self, audio: Tensor) -> Tensor:
        inputs = self.features(
            [each[0] for each in audio.cpu()],
            sampling_rate=self.sample_rate,
            return_tensors="pt",
        ).to(audio.device)
        codes = self.codec.encode(inputs["input_values"], inputs["input_features"]).audio_codes
        return codes.long()


class VibeVoiceTokenizer(TransformersCodec):
    """VibeVoice's acoustic tokenizer: 7.5 continuous frames a second. Streams both ways.

    Latents are the encoder's, without the noise that its training adds.
    """

    model_type = "vibevoice_acoustic_tokenizer"
    streaming = True

    def _setup(self, config: Any) -> int:
        self.hop, self.vocab_size, self.latent_dim = config.hop_length, None, config.hidden_size
        return 1

    def _encode(self, audio: Tensor) -> Tensor:
        return self.codec.encode(audio, sample=False).latents

    def _decode(self, tokens: Tensor) -> Tensor:
        return self.codec.decode(tokens.to(self.dtype)).audio

    def stream_encoder(self) -> Stream:
        cache = None

        def encode(audio: Tensor) -> Tensor:
            nonlocal cache
            out = self.codec.encode(
                self._whole_frames(audio), padding_cache=cache, use_cache=True, sample=False
            )
            cache = out.padding_cache
            return out.latents

        return CodecStream(
            self.hop, 1, encode, lambda piece: piece.new_zeros(len(piece), 0, self.latent_dim)
        )

    def stream_decoder(self) -> Stream:
        cache = None

        def decode(latents: Tensor) -> Tensor:
            nonlocal cache
            self.check_tokens(latents)
            out = self.codec.decode(latents.to(self.dtype), padding_cache=cache, use_cache=True)
            cache = out.padding_cache
            return out.audio

        return CodecStream(1, 1, decode, _no_sound, frame_axis=1)


# --- Exact streams of causal layers ---


def _no_sound(piece: Tensor) -> Tensor:
    return torch.zeros(len(piece), 1, 0, device=piece.device)


class CodecStream:
    """Collects whole frames and hands them on.

    Args:
        frame: samples (1 where frames come in) of one frame.
        first: frames that the first piece must have, since layers reflect it at its beginning.
        run: called with each piece; only the last one may end within a frame.
        nothing: an empty result for a piece that is too short.
        frame_axis: of what comes in.
    """

    approximate = False

    def __init__(self, frame: int, first: int, run: Any, nothing: Any, frame_axis: int = -1):
        self.frame, self.first, self.run, self.nothing = frame, first, run, nothing
        self.axis = frame_axis
        self.buffer: Tensor | None = None
        self.started = False

    @torch.no_grad()
    def push(self, piece: Tensor) -> Tensor:
        """Take samples or frames; give what is finished."""
        if self.buffer is not None:
            piece = torch.cat([self.buffer, piece], self.axis)
        # At least one frame stays for `flush`, which must end with the layers' own padding.
        ready = (piece.shape[self.axis] - 1) // self.frame
        if ready < (1 if self.started else self.first):
            self.buffer = piece
            return self.nothing(piece)
        whole, rest = ready * self.frame, piece.shape[self.axis] - ready * self.frame
        piece, self.buffer = piece.split([whole, rest], self.axis)
        self.started = True
        return self.run(piece)

    @torch.no_grad()
    def flush(self) -> Tensor:
        """Give the rest."""
        if self.buffer is None:
            raise InputError("Nothing was pushed into this stream.")
        piece, self.buffer = self.buffer, None
        return self.run(piece)


class LayerStream:
    """Runs SEANet's causal layers of transformers piece by piece, each with what it remembers.

    A convolution remembers its last inputs, a transposed one the sum that its next outputs start
    from, an LSTM its state. Pieces but the last must be whole frames.
    """

    def __init__(self, layers: Any):
        self.layers = layers
        self.memory: dict[nn.Module, Any] = {}

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self._run(layer, x)
        return x

    def _run(self, layer: nn.Module, x: Tensor) -> Tensor:
        kind = type(layer).__name__
        if kind.endswith("ConvTranspose1d"):
            return self._transposed(layer, x)
        if kind.endswith("Conv1d"):
            return self._convolve(layer, x)
        if kind.endswith("ResnetBlock"):
            inner = x
            for part in layer.block:
                inner = self._run(part, inner)
            return self._run(layer.shortcut, x) + inner
        if kind.endswith("LSTM"):
            sequence = x.permute(2, 0, 1)
            out, self.memory[layer] = layer.lstm(sequence, self.memory.get(layer))
            return (out + sequence).permute(1, 2, 0)
        return layer(x)

    def _convolve(self, layer: nn.Module, x: Tensor) -> Tensor:
        past, missing = int(layer.padding_total), -x.shape[-1] % layer.conv.stride[0]
        if layer not in self.memory:
            x = layer._pad1d(x, (past, missing), layer.pad_mode)
        else:
            x = F.pad(torch.cat([self.memory[layer], x], -1), (0, missing), layer.pad_mode)
        end = x.shape[-1] - missing
        self.memory[layer] = x[..., end - past : end]
        return layer.conv(x)

    def _transposed(self, layer: nn.Module, x: Tensor) -> Tensor:
        out = layer.conv(x)
        shared = layer.conv.kernel_size[0] - layer.conv.stride[0]
        out, ahead = out.split([out.shape[-1] - shared, shared], -1)
        if layer in self.memory:
            out = out + F.pad(self.memory[layer], (0, out.shape[-1] - shared))
        if layer.conv.bias is not None:
            ahead = ahead - layer.conv.bias[:, None]
        self.memory[layer] = ahead
        return out


class TransformerStream:
    """Runs a causal transformer over ``[B, C, T]`` piece by piece with a key/value cache."""

    def __init__(self, transformer: nn.Module):
        self.transformer = transformer
        self.cache: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        out = self.transformer(x.mT, past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        return out.last_hidden_state.mT
