"""What can be trained on sound: codecs over waveforms, and generators over their tokens."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..generators.autoregressive.sound import SoundTransformer
from ..generators.autoregressive.speech import SpeechTransformer
from ..generators.conditioning.words import split_words
from ..modalities.audio import spectrogram_image
from ..modalities.audio_datasets import Utterance, load_sounds, load_utterances, open_audio_dataset
from ..modalities.errors import InputError
from ..modalities.image import save_image
from ..modalities.phonemes import PHONES
from ..modalities.pitch import transposed, transposed_caption
from ..tokenizers.audio.spectrum_vq import SpectrumVQ
from ..tokenizers.audio.wavtokenizer import WavTokenizer
from ..tokenizers.auto import AutoTokenizer
from ..tokenizers.base import AudioTokenizer
from ..tokenizers.quantizers.rvq import ResidualVQ
from .audio_losses import AudioAdversarialLoss, AudioDiscriminators, CodecLoss
from .id_warm_start import ids_of_codes
from .tasks import Task, build, load_frozen, shuffled_index

# Level at which generators' training sounds are tokenized, in dB of full scale.
CODEC_PEAK = -3.0
# Batches of sounds are drawn so many at once, and cut by length.
BATCHES = 8
SOUND_STARTS = ("codes", "random")


class SoundCrops(Task):
    """Random crops of sounds, for a ``codec``."""

    codec: WavTokenizer | SpectrumVQ

    @cached_property
    def sounds(self) -> list[Tensor]:
        return load_sounds(self.recipe["data"], self.codec.sample_rate)

    def batch(
        self, index: int, size: int, generator: torch.Generator, rows: slice
    ) -> dict[str, Any]:
        picked = shuffled_index(index, size, len(self.sounds), self.recipe["seed"])
        samples = round(self.recipe["data"]["seconds"] * self.codec.sample_rate)
        samples -= samples % self.codec.hop
        audio = random_crops([self.sounds[int(i)] for i in picked], samples, generator)
        step = index // self.recipe["training"]["gradient_accumulation"]
        return {"audio": audio[rows], "step": step}

    @torch.no_grad()
    def sample(self, path: Path) -> None:
        """Spectrograms of four sounds, and below each that of what its tokens decode to."""
        pictures = []
        for sound in self.sounds[:: max(1, len(self.sounds) // 4)][:4]:
            audio = sound.float()[None, None].to(self.device)
            decoded = self.codec.decode(self.codec.encode(audio))[..., : audio.shape[-1]]
            for each in (audio, decoded):
                pictures.append(spectrogram_image(each[0], self.codec.sample_rate))
        save_stack(pictures, path)

    def export(self, folder: Path) -> None:
        self.codec.save_pretrained(folder)


class CodecTask(SoundCrops):
    """WavTokenizer on random crops of sounds.

    ``start: NAME`` begins with the weights of a trained one (shipped, published or a folder).
    ``codec: FOLDER`` continues a trained one with its encoder and codebook as they are, so that its
    tokens stay what they are and a generator over them can be trained at the same time.
    """

    def __init__(self, recipe: dict[str, Any], device: torch.device):
        super().__init__(recipe, device)
        loss = recipe["loss"]
        if None not in (recipe["codec"], recipe["start"]):
            raise InputError("codec and start both name a trained codec: set one of them to null.")
        if recipe["codec"] is not None:
            self.codec = load_frozen(WavTokenizer, recipe, "codec")
            self.codec.encoder.requires_grad_(False)
            self.codec.quantizer.frozen = True
        elif recipe["start"] is not None:
            self.codec = AutoTokenizer.from_pretrained(recipe["start"])
            if not isinstance(self.codec, WavTokenizer):
                raise InputError(
                    f'start is "{recipe["start"]}", a {type(self.codec).__name__}: give the name '
                    "or folder of a WavTokenizer."
                )
            self.codec.float()
        else:
            self.codec = build(WavTokenizer, **recipe["model"])
            self.codec.init_weights()
        adversarial = None
        if loss["weights"]["gan"] > 0:
            adversarial = AudioAdversarialLoss(
                build(AudioDiscriminators, **recipe["discriminators"])
            )
        self.model = CodecLoss(
            self.codec,
            loss["windows"],
            loss["n_mels"],
            loss["weights"],
            adversarial,
            loss["gan_start"],
            loss["quantize_start"],
        )

    @property
    def networks(self) -> list[nn.Module]:
        adversarial = self.model.adversarial
        return [self.codec] if adversarial is None else [self.codec, adversarial]


class SpectrumCodecTask(SoundCrops):
    """SpectrumVQ on random crops of sounds."""

    def __init__(self, recipe: dict[str, Any], device: torch.device):
        super().__init__(recipe, device)
        self.model = self.codec = build(SpectrumVQ, **recipe["model"])
        self.codec.init_weights()

    def batch(
        self, index: int, size: int, generator: torch.Generator, rows: slice
    ) -> dict[str, Any]:
        drawn = super().batch(index, size, generator, rows)
        quantize = drawn.pop("step") >= self.recipe["quantize_start"]
        return {**drawn, "quantize": quantize, "commitment": self.recipe["commitment"]}


def save_stack(pictures: list[Image.Image], path: Path) -> None:
    """Pictures of one width, one below the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = Image.new("RGB", (pictures[0].width, sum(p.height for p in pictures)), "white")
    y = 0
    for picture in pictures:
        canvas.paste(picture, (0, y))
        y += picture.height
    save_image(canvas, path)


def peak_normalized(audio: Tensor, decibels: float) -> Tensor:
    """``[L]`` with its peak at so many dB of full scale; digital silence stays as it is."""
    return audio * (10 ** (decibels / 20) / max(float(audio.abs().max()), 1e-3))


def random_crops(sounds: list[Tensor], samples: int, generator: torch.Generator) -> Tensor:
    """A piece of each sound ``[L]``, its peak at a random -1 to -6 dB of full scale.

    The peak is that of the whole sound, so that a quiet piece stays quiet. A shorter sound is
    repeated.

    Returns:
        float32 ``[B, 1, samples]``.
    """
    draws = torch.rand(len(sounds), 2, generator=generator)
    crops = []
    for sound, (where, level) in zip(sounds, draws.tolist(), strict=True):
        sound = peak_normalized(sound.float(), -1 - 5 * level)
        if len(sound) < samples:
            sound = sound.repeat(-(-samples // len(sound)))
        start = int(where * (len(sound) - samples + 1))
        crops.append(sound[start : start + samples])
    return torch.stack(crops)[:, None]


def load_codec(recipe: dict[str, Any], dtype: torch.dtype = torch.float32) -> AudioTokenizer:
    """The recipe's ``codec``, a name or folder: any whose tokens are ids.

    Raises:
        InputError: no such tokenizer, or one of another kind.
    """
    codec = AutoTokenizer.from_pretrained(recipe["codec"], dtype=dtype)
    if not isinstance(codec, AudioTokenizer) or codec.vocab_size is None:
        raise InputError(
            f'codec is "{recipe["codec"]}", a {type(codec).__name__}: a model of sounds needs a '
            "tokenizer of sound into ids."
        )
    return codec


class SpeechTask(Task):
    """Phones to tokens, over cached tokens of a frozen codec.

    Every utterance is tokenized at several offsets of less than a frame, which are several readings
    of the same words to the model.
    """

    def __init__(self, recipe: dict[str, Any], device: torch.device):
        super().__init__(recipe, device)
        self.codec = load_frozen(WavTokenizer, recipe, "codec").to(device).eval()
        utterances = load_utterances(recipe["data"], self.codec.sample_rate)
        self.model = build(
            SpeechTransformer,
            phones=PHONES,
            speakers=sorted({u.speaker for u in utterances}),
            vocab_size=self.codec.vocab_size,
            frame_rate=self.codec.frame_rate,
            **recipe["model"],
        )
        self.model.init_weights()
        self.items = [item for u in utterances for item in self.readings(u)]
        self.items.sort(key=lambda item: len(item["tokens"]))

    @torch.no_grad()
    def readings(self, utterance: Utterance) -> list[dict[str, Tensor]]:
        """Tokens ``[T]``, phones ``[P]``, durations ``[P]`` and speaker, of each offset."""
        rate, hop = self.codec.sample_rate, self.codec.hop
        audio = peak_normalized(utterance.audio.float(), CODEC_PEAK)
        phones = torch.tensor(self.model.ids_of(utterance.phones))
        speaker = torch.tensor(self.model.speaker_id(utterance.speaker))
        found = []
        for offset in range(0, hop, hop // self.recipe["data"]["offsets"]):
            tokens = self.codec.encode(audio[None, None, offset:].to(self.device))[0, 0].cpu()
            ends = torch.tensor(utterance.ends) - offset / rate
            durations = frame_durations(ends, len(tokens), self.codec.frame_rate)
            found.append(
                {"tokens": tokens, "phones": phones, "durations": durations, "speaker": speaker}
            )
        return found

    def batch(
        self, index: int, size: int, generator: torch.Generator, rows: slice
    ) -> dict[str, Any]:
        """Items of about one length: neighbours in the list, of a place drawn anew each time."""
        reach = min(4 * size, len(self.items))
        start = int(torch.randint(len(self.items) - reach + 1, (1,), generator=generator))
        picked = start + torch.randperm(reach, generator=generator)[:size][rows]
        items = [self.items[int(i)] for i in picked]
        padded = {
            key: nn.utils.rnn.pad_sequence([item[key] for item in items], batch_first=True)
            for key in ("tokens", "phones", "durations")
        }
        return padded | {"speakers": torch.stack([item["speaker"] for item in items])}

    @torch.no_grad()
    def sample(self, path: Path) -> None:
        """Spectrograms of four utterances spoken from their phones."""
        items = self.items[:: max(1, len(self.items) // 4)][:4]
        names = list(self.model.phone_ids)
        ids = self.model.generate(
            [[names[int(i)] for i in item["phones"]] for item in items],
            torch.stack([item["speaker"] for item in items]).to(self.device),
            [torch.Generator().manual_seed(i) for i in range(len(items))],
        )
        sounds = [self.codec.decode(tokens[None])[0] for tokens in ids]
        save_stack([spectrogram_image(x, self.codec.sample_rate) for x in sounds], path)

    def export(self, folder: Path) -> None:
        self.model.save_pretrained(folder)


def frame_durations(ends: Tensor, frames: int, frame_rate: float) -> Tensor:
    """Frames of each phone int64 ``[P]``, at least one, all together ``frames``.

    Args:
        ends: of the phones, in seconds ``[P]``; the last one lasts to the end of the frames.

    Raises:
        InputError: more phones than frames.
    """
    count = len(ends)
    if count > frames:
        raise InputError(f"{count} phones do not fit into {frames} frames: drop this utterance.")
    edges = (ends * frame_rate).round().long()
    edges[-1] = frames
    # Push edges that have met apart, first forwards from the start, then backwards from the end.
    steps = torch.arange(1, count + 1)
    edges = ((edges - steps).cummax(0).values + steps).clamp(min=steps)
    edges = torch.minimum(edges, frames - count + steps)
    return torch.diff(edges, prepend=edges.new_zeros(1))


class SoundTask(Task):
    """Captions to tokens, over cached tokens of a frozen codec, at several offsets as in SpeechTask and
    in several keys. Items of a batch are of about one length; an epoch has all of them.

    ``start: codes`` begins with embeddings that know the codebook (see `id_warm_start`), ``random``
    without.
    """

    def __init__(self, recipe: dict[str, Any], device: torch.device):
        super().__init__(recipe, device)
        self.codec = load_codec(recipe).to(device)
        data = recipe["data"]
        dataset = open_audio_dataset(data["root"], **data["options"])
        self.captions = [dataset.text(i) for i in range(len(dataset))]
        self.model = build(
            SoundTransformer,
            words=sorted({word for caption in self.captions for word in split_words(caption)}),
            vocab_size=self.codec.vocab_size,
            num_codebooks=self.codec.num_codebooks,
            frame_rate=self.codec.frame_rate,
            max_seconds=data["max_seconds"],
            **recipe["model"],
        )
        self.model.init_weights()
        start = recipe["start"]
        if start not in SOUND_STARTS:
            raise InputError(f'Unknown start "{start}": choose from {", ".join(SOUND_STARTS)}.')
        if start == "codes":
            if not isinstance(self.codec, WavTokenizer | SpectrumVQ):
                raise InputError(
                    f"start=codes needs a WavTokenizer or a SpectrumVQ as its codec, got "
                    f"{type(self.codec).__name__}: set start=random."
                )
            vq = self.codec.quantizer
            ids_of_codes(self.model.decoder, vq.codebooks if isinstance(vq, ResidualVQ) else [vq])
        sounds = load_sounds(data, self.codec.sample_rate)
        self.readings: list[list[tuple[str, Tensor]]] = [[] for _ in sounds]
        # All sounds of a transposition in turn: each has its own filter.
        for semitones in range(-data["semitones"], data["semitones"] + 1):
            for sound, caption, readings in zip(sounds, self.captions, self.readings, strict=True):
                caption = transposed_caption(caption, semitones)
                moved = transposed(sound.float(), semitones)
                readings.extend((caption, tokens) for tokens in self.tokenize(moved))
        self.lengths = torch.tensor([readings[0][1].shape[1] for readings in self.readings])

    @torch.no_grad()
    def tokenize(self, sound: Tensor) -> list[Tensor]:
        """Tokens ``[Q, T]`` of a sound ``[L]``, cut to the longest that is made, at each offset."""
        data, hop = self.recipe["data"], self.codec.hop
        longest = int(data["max_seconds"] * self.codec.sample_rate)
        audio = peak_normalized(sound[:longest], CODEC_PEAK)
        offsets = range(0, min(hop, len(audio)), hop // data["offsets"])
        return [
            self.codec.encode(audio[None, None, offset:].to(self.device))[0].cpu()
            for offset in offsets
        ]

    def batch(
        self, index: int, size: int, generator: torch.Generator, rows: slice
    ) -> dict[str, Any]:
        group, place = divmod(index, BATCHES)
        drawn = shuffled_index(group, BATCHES * size, len(self.lengths), self.recipe["seed"])
        by_length = drawn[self.lengths[drawn].argsort(stable=True)]
        picked = by_length.split(size)[place][rows]
        draws = torch.rand(size, 2, generator=generator)[rows].tolist()
        tokens, captions = [], []
        for item, (which, drop) in zip(picked.tolist(), draws, strict=True):
            readings = self.readings[item]
            caption, ids = readings[int(which * len(readings))]
            tokens.append(ids)
            captions.append("" if drop < self.recipe["data"]["caption_dropout"] else caption)
        padded = nn.utils.rnn.pad_sequence([each.T for each in tokens], batch_first=True)
        return {
            "tokens": padded.mT,
            "lengths": torch.tensor([each.shape[1] for each in tokens]),
            "captions": captions,
        }

    @torch.no_grad()
    def sample(self, path: Path) -> None:
        """Spectrograms of the sounds that four captions make."""
        captions = self.captions[:: max(1, len(self.captions) // 4)][:4]
        ids = self.model.generate(
            captions, [torch.Generator().manual_seed(i) for i in range(len(captions))]
        )
        sounds = [self.codec.decode(tokens[None])[0] for tokens in ids]
        save_stack([spectrogram_image(x, self.codec.sample_rate) for x in sounds], path)

    def export(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
