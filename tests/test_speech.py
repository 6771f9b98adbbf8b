"""SpeechTransformer and TextToSpeechPipeline: alignment, caches, streaming, errors."""

from __future__ import annotations

import itertools

import pytest
import torch

from tessera.generators.autoregressive.frames import FrameTransformer
from tessera.generators.autoregressive.speech import SpeechTransformer
from tessera.modalities.errors import InputError
from tessera.modalities.phonemes import PHONES
from tessera.pipelines.text_to_speech import TextToSpeechPipeline
from tessera.tests.tiny import streams, tiny_codec
from tessera.training.audio_tasks import frame_durations, random_crops


def tiny_generator(**options) -> SpeechTransformer:
    torch.manual_seed(1)
    settings = {"dim": 32, "heads": 2, "mlp_hidden": 32, "text_depth": 1, "depth": 2, "window": 8}
    model = SpeechTransformer(
        phones=PHONES,
        speakers=["ann", "bob"],
        vocab_size=32,
        frame_rate=62.5,
        **settings | options,
    )
    model.init_weights()
    torch.nn.init.constant_(model.duration_head.bias, 1.6)
    torch.nn.init.normal_(model.decoder.head.weight, std=0.5)
    return model.eval()


@pytest.fixture(scope="module")
def pipeline() -> TextToSpeechPipeline:
    return TextToSpeechPipeline(tiny_codec(4000, (2, 4, 8)), tiny_generator(), default_voice="ann")


def frame_model(**options) -> FrameTransformer:
    torch.manual_seed(0)
    settings = {"depth": 2, "window": 5, "dropout": 0.0, "token_dropout": 0.0}
    return FrameTransformer(16, 32, heads=2, mlp_hidden=48, **settings | options)


@pytest.mark.parametrize("codebooks", [1, 3])
def test_rolling_cache_equals_the_masked_pass(codebooks):
    model = frame_model(num_codebooks=codebooks).eval()
    condition, lengths = torch.randn(2, 13 + codebooks - 1, 32), torch.tensor([13, 8])
    steps = list(model.stream(condition, lengths, streams(0, 1), temperature=0))
    ids = torch.stack(steps, dim=2)
    assert ids.shape == (2, codebooks, 13) and bool((ids[1, :, 8:] == 16).all())
    best = model.logits(ids, lengths, condition).argmax(-1)
    assert torch.equal(best[0], ids[0]) and torch.equal(best[1, :, :8], ids[1, :, :8])


def test_frames_beyond_the_window_are_not_seen():
    model = frame_model(depth=1, window=4).eval()
    condition, ids = torch.randn(1, 10, 32), torch.randint(16, (1, 1, 10))
    changed, lengths = ids.clone(), torch.tensor([10])
    changed[..., 2] = (ids[..., 2] + 1) % 16  # Read by frame 3, hence seen by frames 3 to 6.
    logits = [model.logits(each, lengths, condition)[0, 0] for each in (ids, changed)]
    moved = (logits[0] - logits[1]).abs().amax(-1)
    assert (moved > 1e-6).nonzero().flatten().tolist() == [3, 4, 5, 6]


def test_codebook_q_sees_the_frames_up_to_q_steps_before():
    """What the delay is for: row 1 of a frame sees row 0 of it and of the next; row 0 not row 1's."""
    model = frame_model(depth=1, window=20, num_codebooks=2).eval()
    condition, ids = torch.randn(1, 11, 32), torch.randint(16, (1, 2, 10))
    lengths = torch.tensor([10])
    plain = model.logits(ids, lengths, condition)[0]
    for row, seen in ((0, (5, 4)), (1, (6, 5))):
        changed = ids.clone()
        changed[0, row, 4] = (ids[0, row, 4] + 1) % 16
        moved = (model.logits(changed, lengths, condition)[0] - plain).abs().amax(-1) > 1e-6
        assert [int(each.nonzero()[0]) for each in moved] == list(seen)


def test_a_hidden_history_leaves_the_condition():
    model = frame_model(history_dropout=1.0, num_codebooks=2).train()
    condition, lengths = torch.randn(1, 11, 32), torch.tensor([10])
    a, b = (model.logits(torch.randint(16, (1, 2, 10)), lengths, condition) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, model.logits(a.argmax(-1), lengths, condition + 1))


def test_an_item_does_not_depend_on_its_batch():
    model = tiny_generator()
    phones = [["pau", "k", "ae", "t", "pau"], ["pau", "ow", "pau"]]
    speakers = torch.tensor([0, 1])
    both = model.generate(phones, speakers, streams(3, 4))
    for i, alone in enumerate(both):
        single = model.generate(phones[i : i + 1], speakers[i : i + 1], streams(3 + i))[0]
        assert torch.equal(single, alone)


def test_guidance_of_one_needs_no_second_half_and_more_changes_the_tokens():
    model = tiny_generator()
    torch.nn.init.normal_(model.null_phone)
    arguments = ([["pau", "k", "ae", "t", "pau"]], torch.tensor([0]))
    plain, guided = (
        model.generate(*arguments, streams(0), guidance_scale=scale)[0] for scale in (1.0, 4.0)
    )
    assert plain.shape == guided.shape and not torch.equal(plain, guided)


def test_every_phone_has_its_frames_in_order():
    model = tiny_generator()
    durations = torch.tensor([[2, 1, 3], [4, 1, 0]])
    states = torch.arange(6.0).view(2, 3, 1).expand(2, 3, 32)
    torch.nn.init.zeros_(model.from_start.weight)
    torch.nn.init.zeros_(model.to_end.weight)
    spread = model.spread(states, durations, 6)[..., 0]
    assert spread.tolist() == [[0, 0, 1, 2, 2, 2], [3, 3, 3, 3, 4, 5]]


def test_speed_divides_the_length():
    model, speaker = tiny_generator(), torch.tensor([0])
    phones = [["pau", *["k", "ae", "t"] * 20, "pau"]]
    lengths = [int(model.plan(phones, speaker, speed).lengths) for speed in (0.5, 1.0, 2.0)]
    assert lengths[0] == pytest.approx(2 * lengths[1], rel=0.05)
    assert lengths[1] == pytest.approx(2 * lengths[2], rel=0.15)


def test_training_learns_which_phone_makes_which_token():
    model = tiny_generator(dropout=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(60):
        phones = torch.randint(len(PHONES), (8, 6))
        durations = torch.randint(1, 4, (8, 6))
        tokens = torch.nn.utils.rnn.pad_sequence(
            [p.repeat_interleave(d) % 32 for p, d in zip(phones, durations, strict=True)],
            batch_first=True,
        )
        loss, parts = model(tokens, phones, durations, torch.zeros(8, dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(parts["nll"]))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("ends", "frames", "expected"),
    [
        ([0.1, 0.2, 0.4], 4, [1, 1, 2]),
        ([0.01, 0.02, 0.4], 4, [1, 1, 2]),
        ([0.38, 0.39, 0.4], 4, [2, 1, 1]),
        ([0.4, 0.4, 0.4, 0.4], 4, [1, 1, 1, 1]),
        ([0.1], 3, [3]),
    ],
)
def test_frame_durations(ends, frames, expected):
    assert frame_durations(torch.tensor(ends), frames, 10).tolist() == expected


def test_frame_durations_refuses_more_phones_than_frames():
    with pytest.raises(InputError, match="3 phones do not fit into 2 frames"):
        frame_durations(torch.tensor([0.1, 0.2, 0.3]), 2, 10)


def test_random_crops_repeat_what_is_short_and_keep_silence_silent():
    sounds = [torch.ones(5), torch.zeros(40)]
    crops = random_crops(sounds, 16, torch.Generator().manual_seed(0))
    assert crops.shape == (2, 1, 16)
    assert 10 ** (-6 / 20) <= float(crops[0].max()) <= 10 ** (-1 / 20)
    assert not crops[1].any()


def test_the_stream_is_what_the_call_gives(pipeline):
    text = "The kettle is boiling. Pour it!"
    chunks = list(pipeline.stream(text, seed=5))
    speech = pipeline(text, seed=5)
    assert torch.equal(torch.cat([c.audio for c in chunks], -1), speech.audio)
    assert len(chunks) > 2 and chunks[-1].sentence == 1 and chunks[-1].sentences == 2
    assert chunks[-1].seconds == pytest.approx(speech.audio.shape[-1] / 4000)
    assert chunks[0].audio.shape[-1] < chunks[1].audio.shape[-1]


def test_a_sentence_sounds_the_same_in_any_company(pipeline):
    first = pipeline("It rains.", seed=5).audio
    both = pipeline("It rains. It pours.", seed=5).audio
    assert torch.equal(first, both[:, : first.shape[-1]])


def test_words_have_times_in_order_within_the_sound(pipeline):
    speech = pipeline("Five big dogs. No cats!", seed=0)
    assert [word.text for word in speech.words] == ["Five", "big", "dogs", "No", "cats"]
    assert [word.sentence for word in speech.words] == [0, 0, 0, 1, 1]
    times = [t for word in speech.words for t in (word.start, word.end)]
    assert times == sorted(times) and times[-1] <= speech.audio.shape[-1] / 4000


def test_seeds_and_voices_change_the_sound(pipeline):
    one = pipeline("Hello.", seed=1).audio
    assert torch.equal(one, pipeline("Hello.", seed=1).audio)
    assert not torch.equal(one, pipeline("Hello.", seed=2).audio)
    other = pipeline("Hello.", voice="bob", seed=1).audio
    assert other.shape != one.shape or not torch.equal(one, other)


def test_cancelling_leaves_a_usable_pipeline(pipeline):
    whole = pipeline("It rains. It pours.", seed=1).audio
    list(itertools.islice(pipeline.stream("It rains. It pours.", seed=1), 1))

    def stop(chunk):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline("It rains.", seed=1, callback=stop)
    assert torch.equal(whole, pipeline("It rains. It pours.", seed=1).audio)


def test_save_and_load(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    again = TextToSpeechPipeline.from_pretrained(tmp_path)
    assert torch.equal(again("Hi.", seed=1).audio, pipeline("Hi.", seed=1).audio)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": ""}, "nothing to speak"),
        ({"text": "..."}, "nothing to speak"),
        ({"text": "\N{PARTY POPPER} \N{GRINNING FACE}"}, "nothing to speak"),
        ({"text": "Привет, мир."}, r"cyrillic capital letter pe\) cannot be spoken"),
        ({"text": "你好"}, "cannot be spoken"),
        ({"text": "Hi.", "voice": "eve"}, 'no voice "eve": choose from ann, bob'),
        ({"text": "Hi.", "speed": 9.0}, "speed must lie in 0.25 to 4"),
        ({"text": "Hi.", "speed": float("nan")}, "speed must lie in 0.25 to 4"),
        ({"text": "Hi.", "seed": -1}, "Seed must be"),
        ({"text": "Hi.", "temperature": -1.0}, "Temperature"),
        ({"text": "Hi.", "top_k": 0}, "top_k"),
    ],
)
def test_bad_input(pipeline, settings, message):
    with pytest.raises(InputError, match=message):
        pipeline(**settings)


@pytest.mark.parametrize("text", ["It rains. " * 10_000, "word " * 20_000, "a" * 100_000])
def test_a_hundred_thousand_characters_begin_at_once(pipeline, text):
    chunks = list(itertools.islice(pipeline.stream(text, seed=0), 2))
    assert chunks[0].sentences >= 400 and chunks[0].audio.shape[-1] > 0


def test_a_codec_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match='no voice "eve"'):
        TextToSpeechPipeline(tiny_codec(4000, (2, 4, 8)), tiny_generator(), default_voice="eve")
    codec = tiny_codec(4000, (2, 4, 8))
    codec.vocab_size = 16
    with pytest.raises(InputError, match="do not fit"):
        TextToSpeechPipeline(codec, tiny_generator(), default_voice="ann")
