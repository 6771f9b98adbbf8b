"""SongGen: patterns of two tracks, conditions, the end of a song, prompts, training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer as TextTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from tessera.generators.autoregressive.songgen import (
    TRACKS,
    SongGen,
    combine_tracks,
    encode_lyrics,
    encode_voice,
    split_tracks,
)
from tessera.modalities.errors import InputError
from tessera.weights.convert.songgen import convert_state_dict

CODES = 10


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def tiny(pattern: str = "mixed_pro", **options) -> SongGen:
    torch.manual_seed(0)
    model = SongGen(
        pattern=pattern,
        num_codebooks=4,
        codebook_size=CODES,
        dim=16,
        depth=2,
        heads=2,
        mlp_hidden=32,
        max_positions=80,
        text_dim=16,
        lyrics_vocab=20,
        lyrics_dim=12,
        lyrics_depth=1,
        lyrics_heads=2,
        lyrics_hidden=24,
        voice_layers=3,
        voice_dim=8,
        dropout=0.0,
        **options,
    ).eval()
    with torch.no_grad():
        model.head.weight.mul_(4)
        model.embedding.weight.mul_(2)
        # One channel is constant and makes ids that are no codes unlikely, as in a trained model.
        model.norm.weight[0], model.norm.bias[0] = 0.0, 1.0
        model.head.weight[:, 0] = 0.0
        model.head.weight.view(model.rows, -1, 16)[:, CODES:, 0] = -40.0
    return model


def condition(batch: int = 2):
    g = torch.Generator().manual_seed(7)
    text, lyrics = (
        torch.randn(batch, 3, 16, generator=g),
        torch.randint(20, (batch, 5), generator=g),
    )
    text_mask, lyrics_mask = torch.ones(batch, 3).bool(), torch.ones(batch, 5).bool()
    text_mask[-1, 2:] = lyrics_mask[-1, 3:] = False
    return text, text_mask, lyrics, lyrics_mask


@pytest.mark.parametrize("pattern", TRACKS)
def test_labels_of_all_patterns_split_into_tracks(pattern):
    model = tiny(pattern)
    codes = torch.randint(CODES, (2, 2, 4, 6), generator=seeds(0)[0])
    tracks = dict(zip(model.tracks, codes, strict=False))
    labels = model.labels(tracks)
    assert labels.shape[1] == model.rows
    for item in range(2):
        found = model.codes(torch.nn.functional.pad(labels, (1, 0), value=model.bos))[item]
        assert all(torch.equal(found[name], tracks[name][item]) for name in model.tracks)
    # One end a row, after its codes, and nothing of the start is learned.
    counted = (labels != model.bos) & (model.inputs(labels) != model.pad)
    if not pattern.startswith(
        "interleaving"
    ):  # There an end lies two columns before the next input.
        assert ((labels == model.pad) & counted).sum(-1).eq(1).all()
    given = [codes[i] for i in range(len(model.tracks))]
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            split_tracks(combine_tracks(given, pattern, 98, 99), pattern), given, strict=True
        )
    )


def test_ragged_labels_end_where_an_item_ends():
    model = tiny("mixed")
    codes = torch.randint(CODES, (2, 4, 6), generator=seeds(0)[0])
    labels = model.labels({"mixed": codes}, torch.tensor([6, 3]))
    alone = model.labels({"mixed": codes[1:, :, :3]})
    assert torch.equal(labels[1:, :, : alone.shape[-1]], alone)
    assert bool((labels[1, :, alone.shape[-1] :] == model.pad).all())


@pytest.mark.parametrize("pattern", ["mixed_pro", "interleaving_A_V", "parallel_A_V"])
def test_cached_steps_are_those_of_the_whole_sequence(pattern):
    model, given = tiny(pattern), condition()
    *_, raw = model.stream(*given, seeds(0, 1), max_length=24, temperature=0, raw=True)
    *_, written = model.stream(*given, seeds(0, 1), max_length=24, temperature=0)
    with torch.no_grad():
        memory, mask = model.condition(*given)
        logits = model.logits(model.hidden(written[..., :-1], model.memories(memory), mask))
    logits[..., model.pad] = -torch.inf
    free = raw[..., 1:] != model.pad
    assert free.float().mean() > 0.5
    assert torch.equal(logits.argmax(-1)[free], raw[..., 1:][free])


def test_rows_end_one_after_the_other_and_songs_end():
    model, given = tiny("mixed"), condition()
    with torch.no_grad():
        head = model.head.weight.view(model.rows, -1, 16)
        head.zero_()
        # Any hidden state makes a pad likely, but not sure.
        model.norm.weight.zero_()
        model.norm.bias.fill_(1.0)
        head[:, model.pad] = 2.0 / 16
    *_, raw = model.stream(*given, seeds(0, 1), max_length=60, top_k=None, raw=True)
    assert raw.shape[-1] < 60
    first = (raw == model.pad).long().argmax(-1)
    assert bool((first[:, 1:] > first[:, :-1]).all())
    assert bool((raw == model.pad)[..., -1].any(-1).all())


def test_items_have_their_own_seeds_and_masked_conditions_are_not_read():
    model, given = tiny(), condition()
    songs = model.generate(*given, seeds(3, 4), max_length=16)
    alone = model.generate(
        given[0][1:, :2],
        given[1][1:, :2],
        given[2][1:, :3],
        given[3][1:, :3],
        seeds(4),
        max_length=16,
    )
    assert torch.equal(songs[1]["mixed"], alone[0]["mixed"])
    assert songs[0]["mixed"].shape == (4, 12)
    states = 100 * torch.randn(2, 3, 4, 8, generator=seeds(0)[0])
    none = torch.zeros(2).bool()
    silent = model.generate(
        *given, seeds(3, 4), max_length=16, voice_states=states, voice_mask=none
    )
    assert torch.equal(silent[0]["mixed"], songs[0]["mixed"])
    heard = model.generate(
        *given, seeds(3, 4), max_length=16, voice_states=states, voice_mask=~none
    )
    assert not torch.equal(heard[0]["mixed"], songs[0]["mixed"])


@pytest.mark.parametrize("pattern", ["mixed", "interleaving_V_A", "parallel_V_A"])
def test_songs_go_on_from_a_prompt(pattern):
    model = tiny(pattern)
    codes = torch.randint(CODES, (2, 2, 4, 5), generator=seeds(0)[0])
    prompt = dict(zip(model.tracks, codes, strict=False))
    songs = model.generate(*condition(), seeds(0, 1), max_length=40, prompt=prompt)
    for name in model.tracks:
        assert torch.equal(songs[1][name][:, :5], prompt[name][1])
        assert songs[1][name].shape[1] > 5
    turns = 2 if pattern.startswith("interleaving") else 1
    with pytest.raises(InputError, match="leave room"):
        model.generate(*condition(), seeds(0, 1), max_length=8 * turns, prompt=prompt)
    with pytest.raises(InputError, match="same number of frames"):
        model.generate(*condition(), seeds(0, 1), max_length=40, prompt={"drums": codes[0]})


def test_description_is_projected_unless_its_projection_was_never_trained():
    model = tiny()
    assert model.projects_text("auto") and not model.projects_text("reference")
    torch.nn.init.zeros_(model.text_proj.bias)
    assert not model.projects_text("auto") and model.projects_text("always")
    with pytest.raises(InputError, match="auto, always or reference"):
        model.projects_text("never")


@pytest.mark.parametrize("pattern", ["mixed_pro", "interleaving_A_V", "parallel_std"])
def test_training_lowers_the_loss(pattern):
    model, given = tiny(pattern), condition()
    model.init_weights()
    codes = torch.randint(CODES, (2, 2, 4, 6), generator=seeds(0)[0])
    tracks = {"mixed": codes[0], "vocal": codes[1], "accompaniment": codes[0]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss, parts = model(tracks, *given, progress=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert ("vocal_cross_entropy" in parts) == (pattern == "mixed_pro")
    for progress in (0.0, 0.5, 0.7, 1.0):
        torch.testing.assert_close(model.codebook_weights(progress).sum().item(), 1.0)


def test_lyrics_are_read_as_they_are_sung():
    words = ["[UNK]", "[en]two", "[SPACE]", "cats", ".", "mew"]
    tokenizer = TextTokenizer(WordLevel({word: i + 1 for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = Split(r"[SPACE]", "isolated")
    ids, mask = encode_lyrics(tokenizer, ["2 cats", "  2 cats 2 cats\n"])
    assert ids[0, :5].tolist() == [261, 2, 3, 4, 0] and mask.sum(1).tolist() == [5, 9]
    with pytest.raises(InputError, match="no English word"):
        encode_lyrics(tokenizer, ["... \n !"])


def test_voice_is_normalised_padded_and_absent_where_silent():
    seen = []

    def mert(x, output_hidden_states):
        seen.append(x)
        return SimpleNamespace(hidden_states=(x[:, :6].view(2, 3, 2), x[:, :6].view(2, 3, 2) + 1))

    audio = torch.zeros(2, 1, 80_000)
    audio[0, 0] = torch.sin(torch.arange(80_000) / 9)
    states, present = encode_voice(audio, mert)
    assert seen[0].shape == (2, 72_000) and present.tolist() == [True, False]
    torch.testing.assert_close(seen[0][0].square().mean().item(), 1.0, atol=1e-3, rtol=0)
    assert states.shape == (2, 2, 3, 2)


def test_models_are_saved_and_refuse_what_does_not_fit(tmp_path):
    model, given = tiny("interleaving_A_V"), condition()
    model.save_pretrained(tmp_path)
    again = SongGen.from_pretrained(tmp_path).eval()
    one, other = (
        m.generate(*given, seeds(0, 1), max_length=20)[0]["vocal"] for m in (model, again)
    )
    assert torch.equal(one, other)
    with pytest.raises(InputError, match="16 to 80 columns"):
        model.generate(*given, seeds(0, 1), max_length=12)
    with pytest.raises(InputError, match="mixed_pro"):
        SongGen(pattern="trio")
    with pytest.raises(InputError, match="lm_heads"):
        convert_state_dict({"decoder.lm_heads.x.weight": torch.ones(1)}, {})
