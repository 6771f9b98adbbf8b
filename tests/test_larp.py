"""LARP: tokens of clips, training with drawn codes and the prior; its generators."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from tessera.generators.autoregressive.larp_ar import LARPGenerator
from tessera.generators.sampling import guide
from tessera.modalities.errors import InputError
from tessera.tests.tiny import streams
from tessera.tokenizers.auto import AutoTokenizer
from tessera.tokenizers.video.larp import LARP
from tessera.training.video_losses import VideoTokenizerLoss
from tessera.weights.convert import larp as convert_tokenizer
from tessera.weights.convert import larp_ar as convert_generator
from tessera.weights.loading import load_strict
from tessera.weights.registry import list_models, model_info

V, N, CLASSES = 24, 10, 5
SIZES = {"image_size": 8, "num_frames": 4, "patch_size": 4, "temporal_patch_size": 2}
SIZES |= {"num_latent_tokens": 6, "codebook_size": 19, "code_dim": 4}
SIZES |= {
    f"{part}_{name}": n
    for part in ("encoder", "decoder", "prior")
    for name, n in (("dim", 16), ("depth", 2), ("heads", 2))
}


@pytest.fixture(scope="module")
def tokenizer() -> LARP:
    torch.manual_seed(0)
    model = LARP(**SIZES)
    model.init_weights()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def video() -> torch.Tensor:
    return torch.rand(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_encode_takes_the_nearest_direction(tokenizer, video):
    latents = F.normalize(tokenizer.encode_latents(video), dim=-1)
    codes = F.normalize(tokenizer.quantizer.embedding.weight, dim=-1)
    assert torch.equal(tokenizer.encode(video), (latents @ codes.T).argmax(-1))
    clip = tokenizer.decode(tokenizer.encode(video))
    assert clip.shape == video.shape
    assert (tokenizer.num_tokens, tokenizer.vocab_size, tokenizer.num_frames) == (6, 19, 4)


def test_draws_follow_the_probabilities_and_the_items_generator(tokenizer, video):
    p = tokenizer.code_probabilities(tokenizer.encode_latents(video[:1]))[0, 0]
    drawn = torch.cat([tokenizer.encode(video[:1], streams(i))[:, 0] for i in range(400)])
    share = torch.bincount(drawn, minlength=19) / 400
    assert (share - p).abs().max() < 0.08
    both = tokenizer.encode(video, streams(3, 4))
    assert torch.equal(tokenizer.encode(video[1:], streams(4))[0], both[1])


def test_short_clips_are_padded_and_others_refused(tokenizer, video):
    short = video[:, :, :3]
    with pytest.raises(InputError, match=r"\[batch, 3, 4 frames, 8, 8\], got \[2, 3, 3, 8, 8\]"):
        tokenizer.encode(short)
    padded = tokenizer.pad(short)
    assert torch.equal(padded[:, :, 3], short[:, :, 2]) and torch.equal(padded[:, :, :3], short)
    assert tokenizer.pad(video).shape == video.shape
    with pytest.raises(InputError, match="exactly 6 tokens, got 5"):
        tokenizer.decode(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(InputError, match="cannot be cut into patches"):
        LARP(**SIZES | {"num_frames": 5})


def test_only_the_rows_that_are_read_are_computed(tokenizer, video):
    """Last blocks of fewer rows give what whole blocks give."""
    encoder = tokenizer.encoder
    patches = encoder.patch_embed(video).flatten(2).transpose(1, 2) + encoder.positions
    x = torch.cat([patches, encoder.queries.expand(2, -1, -1)], dim=1)
    for block in encoder.blocks:
        x = block(x)
    assert torch.allclose(encoder(video), x[:, -6:], atol=1e-5)


def test_the_prior_sees_the_past_alone(tokenizer):
    codes = F.normalize(torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    changed = codes.clone()
    changed[:, 3] = -changed[:, 3]
    a, b = tokenizer.prior(codes), tokenizer.prior(changed)
    assert torch.allclose(a[:, 1:4], b[:, 1:4], atol=1e-6) and not torch.allclose(a[:, 4], b[:, 4])


def test_training_reaches_every_weight_and_lowers_the_loss(video):
    torch.manual_seed(0)
    model = LARP(**SIZES, prior_dropout=0.0).train()
    model.init_weights()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        decoded, regularizer, parts = model(video, mix=0.5)
        loss = (decoded - video).abs().mean() + regularizer
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and {"vq", "prior", "perplexity"} <= set(parts)
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


def test_without_mixing_both_rounds_of_the_prior_are_one_cross_entropy(tokenizer, video):
    codes, ids, _ = tokenizer.quantizer(tokenizer.encode_latents(video))
    codebook = tokenizer.quantizer.ids_to_codes(torch.arange(19))
    logits = (tokenizer.prior(codes) @ codebook.T)[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(tokenizer.prior_loss(codes, ids, 0.0), expected, atol=1e-5)
    assert not torch.allclose(tokenizer.prior_loss(codes, ids, 1.0), expected, atol=1e-3)


def test_files(tokenizer, video, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.encode(video), tokenizer.encode(video))
    with pytest.raises(InputError, match=r'"vae\.weight" is not a weight'):
        convert_tokenizer.convert_state_dict({"vae.weight": torch.zeros(1)}, dict(tokenizer.config))


# --- Generators ---


def build(**options) -> LARPGenerator:
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "num_tokens": N, "num_classes": CLASSES, "dim": 32, "depth": 2}
    return LARPGenerator(**sizes | {"heads": 4, "mlp_hidden": 48, "guidance_scale": 3.0} | options)


def randomized(model: LARPGenerator) -> LARPGenerator:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> LARPGenerator:
    return randomized(build())


@pytest.fixture(scope="module")
def predictor() -> LARPGenerator:
    return randomized(build(frame_prediction=True))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 3, 4])


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, V, (3, N), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("guided", [None, 1, 4])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_cached_decoding_equals_full_recomputation(model, labels, scale, guided):
    ids = model.generate(
        labels, streams(0, 1, 2), guidance_scale=scale, guided_tokens=guided, temperature=0
    )
    logits = model.logits(ids[:, :-1], labels)
    null = model.logits(ids[:, :-1], torch.full_like(labels, CLASSES))
    for i in range(N):
        weight = scale if guided is None or i < guided else 1.0
        assert torch.equal(guide(logits[:, i], null[:, i], weight).argmax(-1), ids[:, i])


def test_several_places_at_once(model, labels, tokens):
    """What speculative decoding asks for, across the end of guidance too."""
    whole = model.decoder(labels, 3.0, 4)
    expected = torch.cat([whole(tokens[:, :i], i, 1) for i in range(7)], dim=1)
    some = model.decoder(labels, 3.0, 4)
    some(tokens[:, :2], 0, 3)
    assert torch.allclose(some(tokens[:, :6], 3, 4), expected[:, 3:], atol=1e-5)


def test_no_unconditional_half_runs_without_guidance(model, labels):
    rows = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    model.generate(labels, streams(0, 1, 2), guidance_scale=1.0)
    model.generate(labels, streams(0, 1, 2), guided_tokens=4)
    hook.remove()
    assert rows == [3] * N + [6] * 4 + [3] * (N - 4)


def test_frames_are_predicted_from_the_tokens_of_a_clip(predictor, tokens):
    ids = predictor.generate(tokens, streams(0, 1, 2), temperature=0)
    logits = predictor.logits(ids[:, :-1], tokens)
    assert torch.equal(logits.argmax(-1), ids)
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % V
    assert not torch.equal(predictor.logits(ids[:, :-1], changed), logits)
    with pytest.raises(InputError, match=r"\[batch, 10\], got int64 \[3, 9\]"):
        predictor.generate(tokens[:, :-1], streams(0, 1, 2))


def test_items_and_given_tokens(model, labels, tokens):
    together = model.generate(labels, streams(5, 6, 7))
    for i in range(3):
        assert torch.equal(model.generate(labels[i : i + 1], streams(5 + i))[0], together[i])
    mask = torch.zeros(3, N, dtype=torch.bool)
    mask[:, ::2] = True
    kept = model.generate(labels, streams(0, 1, 2), tokens=tokens, token_mask=mask)
    assert torch.equal(kept[mask], tokens[mask])


@pytest.mark.parametrize("frame_prediction", [False, True])
def test_training_the_generator(labels, tokens, frame_prediction):
    model = build(frame_prediction=frame_prediction, dropout=0.0)
    model.init_weights()
    condition = tokens.flip(1) if frame_prediction else labels
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss, parts = model.train()(tokens, condition)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(parts["nll"].item())
    assert losses[0] == pytest.approx(torch.tensor(float(V)).log().item(), abs=1e-4)
    assert losses[-1] < 0.5 * losses[0]
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_tokens": N + 1}, f"1 to {N} tokens, got {N + 1}"),
        ({"temperature": -1.0}, "Temperature must be 0"),
        ({"condition": torch.tensor([0, 1, CLASSES + 1])}, "Class labels must lie in 0 to 4"),
        ({"generators": streams(0)}, "one random generator an item: 3, got 1"),
        ({"guidance_scale": float("nan")}, "guidance scale must be a finite number"),
    ],
)
def test_illegal_settings_are_refused(model, labels, settings, words):
    with pytest.raises(InputError, match=words):
        model.generate(**{"condition": labels, "generators": streams(0, 1, 2), **settings})


def test_generator_files(model, labels, tmp_path):
    model.save_pretrained(tmp_path)
    again = LARPGenerator.from_pretrained(tmp_path)
    expected = model.generate(labels, streams(0, 1, 2))
    assert torch.equal(again.generate(labels, streams(0, 1, 2)), expected)
    with pytest.raises(InputError, match='"freqs_cis" is not a weight'):
        convert_generator.convert_state_dict({"freqs_cis": torch.zeros(1)}, dict(model.config))
    with pytest.raises(InputError, match=r'"embedding\.weight" is missing'):
        load_strict(model, {})


def test_registry_builds_the_published_sizes():
    assert list_models("larp*", task="video-tokenizer") == ["larp-l-long"]
    for name in list_models("larp*"):
        info = model_info(name)
        with torch.device("meta"):
            built = info.model_class()(**info.config)
        assert abs(sum(p.numel() for p in built.parameters()) / 1e6 / info.parameters - 1) < 0.01


def test_published_configurations_are_read():
    text = """{"bottleneck_token_num": 1024, "input_size": 128, "frame_num": 16,
      "bottleneck": {"name": "b", "args": {"bottleneck_dim": 16, "norm": "none", "regularizer":
      {"name": "vq", "args": {"codebook_size": 8192, "l2_normalized": true, "dim": 16}}}}}"""
    assert convert_tokenizer.read_config(json.loads(text)) == {
        "image_size": 128,
        "num_frames": 16,
        "num_latent_tokens": 1024,
        "code_dim": 16,
        "codebook_size": 8192,
        "l2_norm": True,
    }
    published = {"dim": 1280, "n_layer": 30, "multiple_of": 256, "rope_base": 10000}
    read = convert_generator.read_config(published)
    assert read == {"dim": 1280, "depth": 30, "mlp_hidden": 3584}


def test_the_whole_loss(video):
    torch.manual_seed(0)
    tokenizer = LARP(**SIZES, prior_dropout=0.0)
    tokenizer.init_weights()
    loss = VideoTokenizerLoss(tokenizer, {"regularizer": 1.0}, {}, None, 0, distance="l1")
    value, parts = loss(video, 0, mix=0.0)
    regularizer = 0.1 * parts["vq"] + 0.06 * parts["prior"]
    assert torch.allclose(value, parts["l1"] + regularizer, atol=1e-5)
