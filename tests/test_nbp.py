"""NBP: clips coded piece by piece, blocks written after texts and after frames."""

from __future__ import annotations

import argparse

import pytest
import torch
import torch.nn.functional as F

from tessera.generators.next_block.nbp import NBP, ucf_text
from tessera.generators.sampling import guide
from tessera.modalities.errors import InputError
from tessera.tests.tiny import streams
from tessera.tokenizers.auto import AutoTokenizer
from tessera.tokenizers.video.nbp import CausalConv3d, NBPTokenizer
from tessera.weights.convert import nbp as convert_tokenizer
from tessera.weights.convert import nbp_gpt as convert_generator
from tessera.weights.loading import read_state_dict
from tessera.weights.registry import list_models, model_info

P, V, TEXT, WORDS = 4, 29, 3, 11


@pytest.fixture(scope="module")
def tokenizer() -> NBPTokenizer:
    torch.manual_seed(0)
    return NBPTokenizer(16, 9, (32, 32, 64), num_blocks=1).eval()


@pytest.fixture
def video() -> torch.Tensor:
    return torch.rand(2, 3, 9, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pieces", [[1, 4, 4], [5, 2, 2], [1, 2, 2, 2, 2]])
def test_a_convolution_goes_on_where_the_last_piece_ended(stride, pieces):
    torch.manual_seed(0)
    conv, x = CausalConv3d(3, 5, stride=(stride, 1)), torch.randn(2, 3, 9, 6, 6)
    past: dict = {}
    parts = [conv(piece, past) for piece in x.split(pieces, dim=2)]
    assert torch.allclose(torch.cat(parts, 2), conv(x), atol=1e-5)


def test_one_frame_is_convolved_as_a_still_clip():
    torch.manual_seed(0)
    conv, x = CausalConv3d(3, 5), torch.randn(2, 3, 1, 6, 6)
    assert torch.allclose(conv(x), conv(x.expand(-1, -1, 4, -1, -1))[:, :, :1], atol=1e-5)


@torch.no_grad()
def test_pieces_give_what_the_whole_gives(tokenizer, video):
    latents = tokenizer.encode_latents(video)
    past: dict = {}
    parts = [tokenizer.encode_latents(piece, past) for piece in video.split([5, 4], dim=2)]
    assert torch.allclose(torch.cat(parts, 1), latents, atol=1e-4)
    codes, ids = tokenizer.quantizer(latents)
    whole = tokenizer.decode_codes(codes)
    assert whole.shape == video.shape
    for steps in (1, 2):
        assert torch.equal(tokenizer.encode(video, steps), ids.flatten(1))
        assert torch.allclose(tokenizer.decode(ids.flatten(1), steps), whole, atol=1e-4)
    first = next(tokenizer.decode_stream(iter(ids.flatten(1).split(4, dim=1))))
    assert torch.allclose(first, whole[:, :, :1], atol=1e-4)


@torch.no_grad()
def test_no_frame_looks_ahead(tokenizer, video):
    ids = tokenizer.encode(video)
    assert ids.shape == (2, 12) and tokenizer.tokens_per_step == 4
    assert torch.equal(tokenizer.encode(video[:, :, :5]), ids[:, :8])
    assert torch.equal(tokenizer.encode(video[:, :, :1]), ids[:, :4])


def test_wrong_clips_and_tokens_are_refused(tokenizer, video):
    with pytest.raises(InputError, match=r"\[batch, 3, 1 \+ 4 k frames, 16, 16\]"):
        tokenizer.encode(video[:, :, :4])
    with pytest.raises(InputError, match="a multiple of 4 tokens, got 6"):
        tokenizer.decode(torch.zeros(1, 6, dtype=torch.int64))
    with pytest.raises(InputError, match="must lie in 0 to 63999"):
        tokenizer.decode(torch.full((1, 4), 64000))
    with pytest.raises(InputError, match="multiples of 8"):
        NBPTokenizer(20, 9)


def test_every_level_is_reached(tokenizer):
    z = torch.linspace(-9, 9, 4001)[:, None].expand(-1, 6)
    codes, ids = tokenizer.quantizer(z)
    for level, column in zip(tokenizer.quantizer.levels, codes.T, strict=True):
        assert len(column.unique()) == level
    assert torch.equal(tokenizer.quantizer.ids_to_codes(ids), codes)


def test_training_the_tokenizer(tokenizer, video):
    model = NBPTokenizer(16, 9, (32, 32, 64), num_blocks=1)
    decoded, regularizer, parts = model(video)
    ((decoded - video).abs().mean() + regularizer).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing and decoded.shape == video.shape and 0 < parts["distinct_ids"] <= 1


def test_tokenizer_files(tokenizer, video, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.encode(video), tokenizer.encode(video))
    with pytest.raises(InputError, match=r'"loss\.weight" is not a weight'):
        convert_tokenizer.convert_state_dict({"module.loss.weight": torch.zeros(1)}, {})


# --- The transformer ---


def build(text: bool, **options) -> NBP:
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "num_tokens": 24, "block_size": P, "max_positions": 48, "dim": 32}
    sizes |= {"text_vocab_size": WORDS if text else 0, "text_length": TEXT if text else 0}
    return NBP(**sizes | {"depth": 2, "heads": 4, "top_k": None, "top_p": 1.0} | options)


def randomized(model: NBP) -> NBP:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def hybrid() -> NBP:
    return randomized(build(text=True))


@pytest.fixture(scope="module")
def plain() -> NBP:
    return randomized(build(text=False))


@pytest.fixture
def text() -> torch.Tensor:
    return torch.tensor([[1, 5, 2], [1, 7, 8], [1, 2, 2]])


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, V, (3, 24), generator=torch.Generator().manual_seed(2))


def test_the_mask_by_hand(hybrid, plain):
    assert torch.equal(
        plain.mask(12),
        torch.block_diag(*[torch.ones(4, 4)] * 3).bool() | torch.ones(12, 12).tril().bool(),
    )
    mask = hybrid.mask(TEXT + 12)
    expected = torch.ones(15, 15).tril().bool()
    expected[:3, :3] = True  # A text sees all of itself.
    expected[7:11, 7:11] = expected[11:15, 11:15] = True
    assert torch.equal(mask, expected)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_cached_blocks_equal_full_recomputation(hybrid, text, scale):
    null = torch.full_like(text, 2)
    stream = hybrid.stream_joint(text, streams(0, 1, 2), temperature=0, guidance_scale=scale)
    *_, last = stream
    # Teacher forcing over joint ids, since logits are not restricted to those of video.
    tokens = last - hybrid.first_video
    logits = guide(hybrid.logits(tokens, text), hybrid.logits(tokens, null), scale)
    assert torch.equal(logits.argmax(-1), last)


@torch.no_grad()
def test_blocks_go_on_from_given_frames(plain, tokens):
    prefix = tokens[:, :8]
    ids = plain.generate(prefix, streams(0, 1, 2), temperature=0)
    assert ids.shape == (3, 16)
    logits = plain.logits(torch.cat([prefix, ids], dim=1))
    assert torch.equal(logits[:, 4:].argmax(-1), ids)


def test_what_is_yielded_when(hybrid, plain, text, tokens):
    counts = [ids.shape[1] for ids in hybrid.stream(text, streams(0, 1, 2), 10)]
    assert counts == [1, 2, 3, 4, 8, 10]
    counts = [ids.shape[1] for ids in plain.stream(tokens[:, :4], streams(0, 1, 2), 8)]
    assert counts == [4, 8]


def test_an_item_draws_the_same_alone_and_in_a_batch(hybrid, text):
    together = hybrid.generate(text, streams(5, 6, 7), top_k=9, top_p=0.9)
    for i in range(3):
        alone = hybrid.generate(text[i : i + 1], streams(5 + i), top_k=9, top_p=0.9)
        assert torch.equal(alone[0], together[i])
    assert int(together.min()) >= 0 and int(together.max()) < V


def test_given_tokens_are_kept(hybrid, text, tokens):
    mask = torch.rand(3, 14, generator=torch.Generator().manual_seed(3)) < 0.5
    ids = hybrid.generate(text, streams(0, 1, 2), tokens=tokens[:, :14], token_mask=mask)
    assert torch.equal(ids[:, :14][mask], tokens[:, :14][mask])


def test_loss_is_the_cross_entropy_of_the_ids_to_come(hybrid, plain, text, tokens):
    loss, _ = hybrid(tokens, text)
    logits = hybrid.logits(tokens, text)
    expected = F.cross_entropy(logits.flatten(0, 1), (tokens + hybrid.first_video).flatten())
    assert torch.allclose(loss, expected)
    loss, _ = plain(tokens)
    expected = F.cross_entropy(plain.logits(tokens).flatten(0, 1), tokens[:, P:].flatten())
    assert torch.allclose(loss, expected)


@pytest.mark.parametrize("with_text", [False, True])
def test_training(text, tokens, with_text):
    model = build(with_text, dropout=0.0, text_dropout=0.2)
    model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss, _ = model.train()(tokens, text if with_text else None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_tokens": 46}, "1 to 44 tokens, got 46"),
        ({"condition": torch.zeros(3, 4, dtype=torch.int64)}, r"3 text ids.*got int64 \[3, 4\]"),
        ({"condition": torch.full((3, TEXT), WORDS)}, f"0 to {WORDS - 1}, got {WORDS}"),
        ({"temperature": -1.0}, "Temperature must be 0"),
        ({"generators": streams(0)}, "one random generator an item: 3, got 1"),
    ],
)
def test_illegal_settings_are_refused(hybrid, text, settings, words):
    with pytest.raises(InputError, match=words):
        hybrid.generate(**{"condition": text, "generators": streams(0, 1, 2), **settings})


def test_prefixes_are_whole_blocks(plain, tokens):
    with pytest.raises(InputError, match="4 k ids that a clip begins with"):
        plain.generate(tokens[:, :6], streams(0, 1, 2))


def test_names_of_classes():
    assert ucf_text(["ApplyEyeMakeup", "Archery"]).shape == (2, 8)
    with pytest.raises(InputError, match='"Juggling" is no class of UCF-101'):
        ucf_text(["Juggling"])


def test_files(hybrid, text, tmp_path):
    hybrid.save_pretrained(tmp_path)
    again = NBP.from_pretrained(tmp_path)
    expected = hybrid.generate(text, streams(0, 1, 2))
    assert torch.equal(again.generate(text, streams(0, 1, 2)), expected)
    with pytest.raises(InputError, match='"rotary" is not a weight'):
        convert_generator.convert_state_dict({"rotary": torch.zeros(1)}, {})


def test_training_checkpoints_are_read_around_what_is_no_weight(tmp_path):
    weights = {
        "transformer.head.weight": torch.ones(2, 2),
        "transformer.blocks.0.mask": torch.ones(1),
    }
    weights["first_stage_model.decoder.weight"] = torch.ones(3)
    saved = {"state_dict": weights, "hyper_parameters": argparse.Namespace(lr=1.0), "epoch": 3}
    torch.save(saved, tmp_path / "a.ckpt")
    state = convert_generator.convert_state_dict(read_state_dict(tmp_path / "a.ckpt"), {})
    assert list(state) == ["head.weight"]


def test_registry_builds_the_published_sizes():
    for name in list_models("nbp-*"):
        info = model_info(name)
        with torch.device("meta"):
            built = info.model_class()(**info.config)
        assert abs(sum(p.numel() for p in built.parameters()) / 1e6 / info.parameters - 1) < 0.01
