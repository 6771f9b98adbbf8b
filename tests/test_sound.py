"""SoundTransformer: captions, lengths, guidance, training."""

from __future__ import annotations

import pytest
import torch

from tessera.generators.autoregressive.sound import SoundTransformer
from tessera.generators.conditioning.words import WordEncoder, pooled, split_words
from tessera.modalities.errors import InputError
from tessera.pipelines.text_to_sound import TextToSoundPipeline
from tessera.tests.tiny import streams, tiny_codec, tiny_spectrum_codec


def tiny(**options) -> SoundTransformer:
    torch.manual_seed(0)
    settings = {"dim": 32, "heads": 2, "mlp_hidden": 32, "text_depth": 1, "depth": 2, "window": 8}
    model = SoundTransformer(
        words=["a", "bell", "drum"],
        frame_rate=50.0,
        max_seconds=2.0,
        **{"vocab_size": 16, **settings, **options},
    )
    model.init_weights()
    torch.nn.init.normal_(model.decoder.head.weight, std=0.5)
    return model.eval()


def test_split_words():
    assert split_words("A Hi-hat's hit, at 3!") == ["a", "hi-hat's", "hit", "at", "3"]


def test_a_typo_is_nearer_than_another_word():
    torch.manual_seed(0)
    encoder = WordEncoder(["trumpet", "marimba"], 64)
    states, _ = encoder(["trumpet trumpett marimba"])
    word, typo, other = states[0].detach()
    near, far = (torch.cosine_similarity(word, x, dim=0) for x in (typo, other))
    assert near > 0.5 > far


def test_pooled_leaves_padding_out():
    states = torch.tensor([[[1.0], [3.0], [9.0]]])
    assert pooled(states, torch.tensor([[True, True, False]])).item() == 2


def test_an_item_does_not_depend_on_its_batch():
    model = tiny()
    both = model.generate(["a bell", "drum"], streams(1, 2), seconds=0.3, guidance_scale=2.0)
    for i, caption in enumerate(["a bell", "drum"]):
        alone = model.generate([caption], streams(1 + i), seconds=0.3, guidance_scale=2.0)[0]
        assert torch.equal(both[i], alone)
    assert both[0].shape == (1, 15)


@pytest.mark.parametrize("seconds", [0.0, -1.0, 2.1, float("nan")])
def test_lengths_beyond_the_model_are_refused(seconds):
    with pytest.raises(InputError, match="up to 2 seconds"):
        tiny().lengths(["a bell"], seconds)


@pytest.mark.parametrize("codebooks", [1, 2])
def test_training_learns_captions_and_lengths(codebooks):
    model = tiny(dropout=0.0, token_dropout=0.0, num_codebooks=codebooks).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    captions, lengths = ["a bell", "a drum", ""], torch.tensor([10, 30, 20])
    tokens = torch.tensor([3, 9, 5])[:, None, None].expand(-1, codebooks, 30)
    for _ in range(80):
        loss, parts = model(tokens, lengths, captions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(parts["nll"]) < 0.2
    model.eval()
    made = model.generate(["a bell", "a drum"], streams(0, 1), temperature=0)
    assert [len(ids[0]) for ids in made] == pytest.approx([10, 30], abs=4)
    assert all(len(ids) == codebooks for ids in made)
    assert set(made[0].flatten().tolist()) == {3} and set(made[1].flatten().tolist()) == {9}


@pytest.fixture(scope="module")
def pipeline() -> TextToSoundPipeline:
    return TextToSoundPipeline(tiny_codec(3200, (2, 4, 8), 16), tiny())


def test_several_sounds_of_a_caption(pipeline):
    made = pipeline(
        "a bell", seconds=0.5, num_sounds_per_prompt=2, generator=streams(7, 8), temperature=2.0
    )
    alone = pipeline("a bell", seconds=0.5, generator=streams(8), temperature=2.0)
    assert made.seeds == [7, 8] and made.sample_rate == 3200
    assert made.sounds[0].shape == (1, 1600)
    assert torch.equal(made.tokens[1], alone.tokens[0])
    assert not torch.equal(made.tokens[0], made.tokens[1])
    assert float(made.sounds[0][0, -1]) == 0


def test_progress_counts_frames_and_a_callback_cancels(pipeline):
    steps = []
    pipeline("a bell", seconds=0.1, callback=lambda step, total: steps.append((step, total)))
    assert steps == [(i, 5) for i in range(1, 6)]

    def stop(step, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline("a bell", callback=stop)
    assert pipeline("a bell", seconds=0.1).sounds


def test_the_generator_must_write_what_the_codec_reads():
    words = "writes 50 frames a second of 1 x 16 ids, the codec reads 50 frames a second of 2 x 32"
    with pytest.raises(InputError, match=words):
        TextToSoundPipeline(tiny_spectrum_codec(4000, 80, 320), tiny())


def test_all_codebooks_of_a_frame_are_there():
    codec = tiny_spectrum_codec(4000, 80, 320)
    model = tiny(vocab_size=codec.vocab_size, num_codebooks=2)
    pipeline = TextToSoundPipeline(codec, model)
    made = pipeline(["a bell", "drum"], generator=streams(1, 2), temperature=2.0, seconds=0.3)
    assert [tokens.shape for tokens in made.tokens] == [(2, 15), (2, 15)]
    assert all(0 <= int(tokens.min()) <= int(tokens.max()) < 32 for tokens in made.tokens)
    assert made.sounds[0].shape == (1, 15 * 80)
    again = pipeline.decode_tokens(made.tokens[1])
    assert torch.equal(again, made.sounds[1])


def test_a_pipeline_is_saved_and_loaded(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    again = TextToSoundPipeline.from_pretrained(tmp_path)
    made, remade = (
        p("a bell", seconds=0.2, generator=streams(1)).sounds[0] for p in (pipeline, again)
    )
    assert torch.equal(made, remade)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": " "}, "empty"),
        ({"prompt": "a bell", "seconds": 60.0}, "up to 2 seconds"),
        ({"prompt": "a bell", "num_sounds_per_prompt": 0}, "at least 1"),
        ({"prompt": "a bell", "guidance_scale": float("nan")}, "[Gg]uidance"),
    ],
)
def test_bad_requests(pipeline, settings, message):
    with pytest.raises(InputError, match=message):
        pipeline(**settings)
