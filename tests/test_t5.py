"""T5's encoder: equal to transformers', from published files, in float32 and bfloat16."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as TextTokenizer
from tokenizers import models, pre_tokenizers, processors

from tessera.generators.conditioning.t5 import T5Encoder, TextT5, relative_buckets
from tessera.modalities.errors import InputError
from tessera.weights.convert.t5 import convert_state_dict, read_config
from tessera.weights.loading import load_strict

WORDS = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "red", "blue", "ring"])}
TINY = {"vocab_size": 50, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_heads": 2}
SHORT = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}


def tiny_tokenizer() -> TextTokenizer:
    texts = TextTokenizer(models.WordLevel(WORDS, "<unk>"))
    texts.pre_tokenizer = pre_tokenizers.Whitespace()
    texts.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    return texts


def twins(**options):
    """Transformers' model of random weights, and ours with the same."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    reference = transformers.T5EncoderModel(transformers.T5Config(**TINY, **options)).eval()
    for name, parameter in reference.named_parameters():
        if "layer_norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    config = read_config(json.loads(reference.config.to_json_string()))
    ours = T5Encoder(**config).eval()
    load_strict(ours, convert_state_dict(reference.state_dict(), config))
    return reference, ours


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
@pytest.mark.parametrize("length", [1, 9, 150])
@torch.no_grad()
def test_features_are_those_of_transformers(kind, length):
    reference, ours = twins(feed_forward_proj=kind, **(SHORT if length == 9 else {}))
    ids = torch.randint(50, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, length).bool()
    mask[1, length // 2 + 1 :] = False
    wanted = reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours(ids, mask), wanted, atol=1e-5, rtol=1e-5)
    wanted = reference.bfloat16()(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    found = ours.bfloat16()(ids, mask)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, atol=0.06, rtol=0.03)


def test_buckets_grow_with_the_distance():
    distance = torch.arange(-200, 201)
    found = relative_buckets(distance, 32, 128)
    left, right = found[:200].flip(0), found[201:]
    assert found[200] == 0 and torch.equal(right, left + 16)
    assert left[:7].tolist() == [1, 2, 3, 4, 5, 6, 7] and bool((left.diff() >= 0).all())
    assert left[127:].eq(15).all() and left[:90].max() < 15


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_published_files_are_loaded(tmp_path, kind):
    config = {**TINY, "vocab_size": len(WORDS), "feed_forward_proj": kind}
    torch.manual_seed(0)
    state, inner = {"shared.weight": torch.randn(len(WORDS), 24)}, 12
    state["encoder.final_layer_norm.weight"] = torch.rand(24)
    state["decoder.final_layer_norm.weight"] = torch.rand(24)
    for layer in range(3):
        attention, feed_forward = (f"encoder.block.{layer}.layer.{part}" for part in (0, 1))
        for name in "qkv":
            state[f"{attention}.SelfAttention.{name}.weight"] = torch.randn(inner, 24)
        state[f"{attention}.SelfAttention.o.weight"] = torch.randn(24, inner)
        for name in ("wi",) if kind == "relu" else ("wi_0", "wi_1"):
            state[f"{feed_forward}.DenseReluDense.{name}.weight"] = torch.randn(40, 24)
        state[f"{feed_forward}.DenseReluDense.wo.weight"] = torch.randn(24, 40)
        for part in (attention, feed_forward):
            state[f"{part}.layer_norm.weight"] = torch.rand(24)
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    state[bias] = torch.randn(32, 2)
    save_file(state, tmp_path / "model.safetensors")
    published = {"model_type": "t5", "is_encoder_decoder": True, **config}
    (tmp_path / "config.json").write_text(json.dumps(published))
    with pytest.raises(InputError, match=r"tokenizer\.json.* is missing"):
        TextT5.from_hub(str(tmp_path))
    texts = tiny_tokenizer()
    texts.enable_padding(length=9)
    texts.save(str(tmp_path / "tokenizer.json"))

    tower = TextT5.from_hub(str(tmp_path))
    features, mask = tower.text_features(["red ring", "blue"])
    assert features.shape == (2, 3, 24) and mask.sum(1).tolist() == [3, 2]
    assert torch.equal(tower.encoder.relative_bias.weight, state[bias])
    shards = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(state)}
    for file in set(shards.values()):
        save_file({n: v for n, v in state.items() if shards[n] == file}, tmp_path / file)
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    again, _ = TextT5.from_hub(str(tmp_path)).text_features(["red ring", "blue"])
    assert torch.equal(again, features)

    index.unlink()
    del state[bias]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r'"relative_bias\.weight" is missing'):
        TextT5.from_hub(str(tmp_path))


def test_what_is_no_t5_is_refused():
    with pytest.raises(InputError, match=r'"encoder\.pooler\.weight" is not a weight'):
        convert_state_dict({"encoder.pooler.weight": torch.ones(1)}, {})
    with pytest.raises(InputError, match='"bert", not of a T5'):
        read_config({"model_type": "bert"})
    with pytest.raises(InputError, match='got "gated-silu"'):
        T5Encoder(feed_forward_proj="gated-silu")
