"""VAR: the multi-scale tokenizer and the next-scale generator."""

from __future__ import annotations

import math

import pytest
import torch

from tessera.generators.next_scale.var import VAR
from tessera.generators.sampling import guide
from tessera.generators.schedules import guidance_weight
from tessera.modalities.errors import InputError
from tessera.tests.tiny import streams
from tessera.tokenizers.image.var_vqvae import MultiScaleVQVAE
from tessera.tokenizers.quantizers.residual import MultiScaleResidualVQ
from tessera.weights.convert import var, var_vqvae
from tessera.weights.loading import load_strict
from tessera.weights.registry import find_model, list_models, model_info

SCALES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def tokenizer() -> MultiScaleVQVAE:
    torch.manual_seed(0)
    model = MultiScaleVQVAE(
        vocab_size=24, code_dim=8, block_out_channels=(32, 64), patch_nums=SCALES
    )
    torch.nn.init.normal_(model.quantizer.codebook.embedding.weight, std=0.3)
    return model.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_sizes(tokenizer, images):
    ids = tokenizer.encode(images)
    assert tokenizer.image_size == 8
    assert ids.shape == (3, tokenizer.num_tokens) == (3, 30)
    assert tokenizer.decode(ids).shape == images.shape


def test_tokenizer_batch_equals_one_by_one(tokenizer, images):
    ids = tokenizer.encode(images)
    decoded = tokenizer.decode(ids)
    for i in range(3):
        assert torch.equal(tokenizer.encode(images[i : i + 1])[0], ids[i])
        assert torch.allclose(tokenizer.decode(ids[i : i + 1])[0], decoded[i], atol=1e-5)


def test_ids_decode_to_the_sum_that_encoding_made(tokenizer, images):
    codes, ids, _ = tokenizer.quantizer(tokenizer.encode_latents(images))
    assert torch.allclose(tokenizer.quantizer.ids_to_codes(ids), codes, atol=1e-5)


def test_each_id_is_the_nearest_code_of_what_is_left(tokenizer, images):
    """Every scale's ids, from the plain distance to the residual of the scales before."""
    quantizer = tokenizer.quantizer
    latents = tokenizer.encode_latents(images).detach()
    ids = quantizer(latents)[1]
    start = 0
    for scale, side in enumerate(SCALES):
        done = quantizer.ids_to_codes(ids[:, :start]) if start else 0
        cells = torch.nn.functional.adaptive_avg_pool2d(latents - done, side)
        cells = cells.flatten(2).transpose(1, 2)
        nearest = torch.cdist(cells, quantizer.codebook.embedding.weight).argmin(-1)
        assert torch.equal(nearest, ids[:, start : start + side * side]), scale
        start += side * side


@pytest.mark.parametrize("count", [1, 4, 5, 13, 14, 29, 30])
def test_prefixes_decode_by_whole_scales(tokenizer, images, count):
    ids = tokenizer.encode(images)
    whole = max(n for n in (1, 5, 14, 30) if n <= count)
    decoded = tokenizer.decode(ids[:, :count])
    assert torch.equal(decoded, tokenizer.decode(ids[:, :whole]))
    assert decoded.isfinite().all() and decoded.abs().max() <= 1


def test_next_inputs_are_the_sum_so_far_shrunk(tokenizer, images):
    quantizer, ids = tokenizer.quantizer, tokenizer.encode(images)
    inputs = quantizer.next_inputs(ids)
    assert inputs.shape == (3, 29, 8)
    so_far = quantizer.ids_to_codes(ids[:, :5])
    expected = torch.nn.functional.adaptive_avg_pool2d(so_far, 3).flatten(2).transpose(1, 2)
    assert torch.allclose(inputs[:, 4:13], expected, atol=1e-6)


def test_published_phis_are_shared_by_neighbours():
    with torch.device("meta"):
        phis = MultiScaleResidualVQ(8, 4, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)).phi_of_scale
    assert phis == sorted(phis) and set(phis) == {0, 1, 2, 3}


def test_tokenizer_training_moves_every_weight(tokenizer, images):
    loss, parts = tokenizer(images)
    loss.backward()
    still = [n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    tokenizer.zero_grad()
    # A key bias adds the same to every score of a row: softmax drops it.
    assert all(name.endswith("to_k.bias") for name in still)
    assert torch.allclose(parts["l1"] + parts["vq"], loss)
    assert 1 <= parts["perplexity"] <= 24


def test_gradient_passes_straight_through(tokenizer):
    z = torch.randn(1, 8, 4, 4, requires_grad=True)
    codes, _, loss = tokenizer.quantizer(z)
    (gradient,) = torch.autograd.grad(codes.sum(), z)
    assert torch.equal(gradient, torch.ones_like(z)) and loss > 0


def test_unused_codes_are_revived():
    torch.manual_seed(0)
    quantizer = MultiScaleResidualVQ(16, 4, (1, 2, 4), revive=True)
    torch.nn.init.constant_(quantizer.codebook.embedding.weight, 50.0)
    quantizer.codebook.embedding.weight.data[0] = 0
    z = torch.randn(8, 4, 4, 4)
    quantizer(z)
    assert quantizer(z)[1].unique().numel() > 1


def test_tokenizer_saves_and_loads_exactly(tokenizer, images, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = MultiScaleVQVAE.from_pretrained(tmp_path)
    ids = tokenizer.encode(images)
    assert torch.equal(again.encode(images), ids)
    assert torch.equal(again.decode(ids), tokenizer.decode(ids))


def test_bfloat16_tokenizer_is_near(tokenizer, images, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    half = MultiScaleVQVAE.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.quantizer.codebook.embedding.weight.dtype == torch.float32
    ids = tokenizer.encode(images)
    assert (half.encode(images) == ids).float().mean() > 0.7
    assert (half.decode(ids).float() - tokenizer.decode(ids)).abs().max() < 0.05


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.zeros(1, 31, dtype=torch.int64), "1 to 30 tokens, got 31"),
        (torch.full((1, 5), 24), "0 to 23, got 24"),
        (torch.zeros(1, 5), "whole numbers"),
    ],
)
def test_wrong_tokens_are_refused(tokenizer, tokens, words):
    with pytest.raises(InputError, match=words):
        tokenizer.decode(tokens)


def test_wrong_picture_size_is_refused(tokenizer):
    with pytest.raises(InputError, match="8"):
        tokenizer.encode(torch.zeros(1, 3, 16, 8))


def test_another_tokenizer_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"class_emb\.weight"):
        var_vqvae.convert_state_dict({"class_emb.weight": torch.zeros(8, 4)}, {})
    with pytest.raises(InputError, match=r"encoder\.conv_in\.weight"):
        load_strict(tokenizer, var_vqvae.convert_state_dict({}, {}))


@pytest.mark.parametrize("name", list_models("var-vqvae*"))
def test_published_tokenizers(name):
    info = model_info(name)
    with torch.device("meta"):
        model = info.model_class()(**info.config)
    assert f"1-{model.num_tokens}" == info.tokens and model.vocab_size == info.vocab_size
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == info.parameters
    assert model.image_size == int(name.rpartition("-")[2])


CLASSES = 5


@pytest.fixture(scope="module", params=[False, True], ids=["adaln", "shared-adaln"])
def model(request) -> VAR:
    """Every weight random, so that no path is zero."""
    torch.manual_seed(0)
    model = VAR(24, 8, SCALES, CLASSES, dim=32, depth=2, heads=4, shared_adaln=request.param)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name.endswith("log_scale")), std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def quantizer(tokenizer) -> MultiScaleResidualVQ:
    return tokenizer.quantizer


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 3, 4])


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_cached_decoding_equals_full_recomputation(model, quantizer, labels, scale):
    settings = {"guidance_scale": scale, "temperature": 0}
    ids = model.generate(labels, streams(0, 1, 2), quantizer, **settings)
    inputs = quantizer.next_inputs(ids)
    logits = model.logits(inputs, labels)
    null = model.logits(inputs, torch.full_like(labels, CLASSES))
    start = 0
    for k, side in enumerate(SCALES):
        here = slice(start, start + side * side)
        guided = guide(logits[:, here], null[:, here], guidance_weight("linear", scale, k / 3))
        assert torch.equal(guided.argmax(-1), ids[:, here])
        start = here.stop


def test_a_scale_does_not_see_the_finer_ones(model, labels):
    inputs = torch.randn(3, 29, 8)
    changed = inputs.clone()
    changed[:, 13:] += 1
    before, after = model.logits(inputs, labels), model.logits(changed, labels)
    assert torch.equal(before[:, :14], after[:, :14])
    assert not torch.allclose(before[:, 14:], after[:, 14:])
    assert torch.allclose(model.logits(inputs[:, :13], labels), before[:, :14], atol=1e-5)


def test_batch_equals_one_by_one(model, quantizer, labels):
    together = model.generate(labels, streams(5, 6, 7), quantizer)
    for i in range(3):
        alone = model.generate(labels[i : i + 1], streams(5 + i), quantizer)
        assert torch.equal(alone[0], together[i])
    assert torch.equal(model.generate(labels, streams(5, 6, 7), quantizer), together)
    assert not torch.equal(model.generate(labels, streams(8, 9, 10), quantizer), together)


def test_stream_yields_whole_scales(model, quantizer, labels, tokenizer):
    parts = list(model.stream(labels, streams(0, 1, 2), quantizer))
    assert [part.shape[1] for part in parts] == [1, 5, 14, 30]
    assert all(torch.equal(part, parts[-1][:, : part.shape[1]]) for part in parts)
    assert tokenizer.decode(parts[1]).shape == (3, 3, 8, 8)


def test_top_k_1_is_greedy(model, quantizer, labels):
    greedy = model.generate(labels, streams(0, 1, 2), quantizer, temperature=0)
    drawn = model.generate(labels, streams(3, 4, 5), quantizer, top_k=1)
    assert torch.equal(greedy, drawn)


def test_given_tokens_stay_and_steer_the_rest(model, quantizer, labels):
    free = model.generate(labels, streams(0, 1, 2), quantizer, temperature=0)
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[:, :, :2] = True
    keep = model.token_mask(mask)
    assert keep.shape == (3, 30) and keep[:, 14:].view(3, 4, 4)[:, :, :2].all()
    given = (free + 7) % 24
    edited = model.generate(
        labels, streams(0, 1, 2), quantizer, temperature=0, tokens=given, token_mask=keep
    )
    assert torch.equal(edited[keep], given[keep]) and not torch.equal(edited[~keep], free[~keep])


def test_training_moves_every_weight(model, quantizer, labels):
    tokens = torch.randint(0, 24, (3, 30))
    with torch.no_grad():
        inputs = quantizer.next_inputs(tokens)
    loss, parts = model(tokens, inputs, labels)
    loss.backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    model.zero_grad()
    assert still == [] and parts["nll"] == loss


def test_labels_and_paths_are_dropped_in_training_alone(model, quantizer, labels):
    tokens = torch.randint(0, 24, (3, 30))
    inputs = quantizer.next_inputs(tokens).detach()
    model.register_to_config(label_dropout=1.0)
    kept = model(tokens, inputs, labels)[0]
    null = model(tokens, inputs, torch.full_like(labels, CLASSES))[0]
    model.train()
    for block in model.blocks:
        block.drop_path.p = 0.0
    dropped = model(tokens, inputs, labels)[0]
    model.eval()
    model.register_to_config(label_dropout=0.1)
    assert torch.allclose(dropped, null) and not torch.allclose(kept, null)


def test_a_new_model_knows_nothing(quantizer, labels):
    torch.manual_seed(0)
    model = VAR(24, 8, SCALES, CLASSES, dim=32, depth=2, heads=4).eval()
    model.init_weights()
    loss, _ = model(torch.randint(0, 24, (3, 30)), torch.randn(3, 29, 8), labels)
    assert abs(float(loss.detach()) - math.log(24)) < 0.05


def test_generator_saves_and_loads_exactly(model, quantizer, labels, tmp_path):
    model.save_pretrained(tmp_path)
    again = VAR.from_pretrained(tmp_path)
    ids = model.generate(labels, streams(0, 1, 2), quantizer)
    assert torch.equal(again.generate(labels, streams(0, 1, 2), quantizer), ids)
    half = VAR.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    inputs = quantizer.next_inputs(ids)
    exact = model.logits(inputs, labels)
    assert (half.logits(inputs, labels) - exact).abs().max() < 0.05 * exact.abs().max()
    assert half.generate(labels, streams(0, 1, 2), quantizer).shape == ids.shape


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"labels": torch.tensor([6])}, "0 to 4"),
        ({"labels": torch.tensor([0.0])}, "whole numbers"),
        ({"generators": streams(0, 1)}, "1, got 2"),
        ({"temperature": -1.0}, "Temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"tokens": torch.zeros(1, 30, dtype=torch.int64)}, "token_mask"),
        ({"quantizer": MultiScaleResidualVQ(24, 8, (1, 2))}, "do not fit"),
        ({"quantizer": MultiScaleResidualVQ(25, 8, SCALES)}, "do not fit"),
    ],
)
def test_wrong_settings_are_refused(model, quantizer, settings, words):
    usual = {"labels": torch.tensor([0]), "generators": streams(0), "quantizer": quantizer}
    with pytest.raises(InputError, match=words):
        model.generate(**usual | settings)


def test_another_generator_is_refused(model):
    with pytest.raises(InputError, match=r"encoder\.conv_in\.weight"):
        var.convert_state_dict({"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)}, {})
    with pytest.raises(InputError, match='"start" is missing'):
        load_strict(model, var.convert_state_dict({"head.bias": torch.zeros(24)}, {}))


def test_one_repository_holds_tokenizer_and_generators():
    for kind, names in (
        ("-to-image", "var-d16, var-d20"),
        ("-tokenizer", "var-vqvae-256, var-vqvae-512"),
    ):
        with pytest.raises(InputError, match=f"holds several models: name one of {names}"):
            find_model("FoundationVision/var", kind)
