"""DyMU's encoder: names of both published layouts, and tokens that depend on the picture."""

from __future__ import annotations

import pytest
import torch

from tessera.generators.conditioning.dymu import DyMUEncoder
from tessera.modalities.errors import InputError
from tessera.weights.convert.dymu import convert_state_dict
from tessera.weights.loading import load_strict

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
CLIP = {
    "architecture": "vit_large_patch14_clip_quickgelu_336",
    "settings": SMALL | {"num_classes": 8},
}
SIGLIP = {"architecture": "vit_base_patch16_siglip_384", "settings": SMALL}


def published(model: DyMUEncoder, prefix: str) -> dict[str, torch.Tensor]:
    """timm's names, with the text tower and a threshold a block."""
    state = {f"{prefix}{name}": value for name, value in model.vit.state_dict().items()}
    for i, threshold in enumerate((0.7, 0.8)):
        state[f"{prefix}blocks.{i}.threshold"] = torch.tensor(threshold)
    return state | {"module.text.weight": torch.zeros(1), "module.logit_scale": torch.zeros(())}


@pytest.mark.parametrize("config", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_timm_names(config):
    torch.manual_seed(0)
    model, other = DyMUEncoder(**config).eval(), DyMUEncoder(**config).eval()
    load_strict(other, convert_state_dict(published(model, "module.visual.trunk."), config))
    assert other.thresholds.tolist() == pytest.approx([0.7, 0.8])
    other.thresholds.fill_(1)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(other(image).x, model(image).x)


def test_open_clip_names():
    torch.manual_seed(0)
    model, other = DyMUEncoder(**CLIP).eval(), DyMUEncoder(**CLIP).eval()
    renames = [
        ("patch_embed.proj", "conv1"), ("cls_token", "class_embedding"), ("norm_pre", "ln_pre"),
        ("pos_embed", "positional_embedding"), ("blocks.", "transformer.resblocks."),
        ("norm1", "ln_1"), ("norm2", "ln_2"), ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj", "attn.out_proj"), ("fc1", "c_fc"), ("fc2", "c_proj"),
        ("norm.", "ln_post."), ("head.weight", "proj"),
    ]  # fmt: skip
    with torch.no_grad():
        model.vit.head.bias.zero_()
    state = {}
    for name, value in published(model, "visual.").items():
        for old, new in renames:
            name = name.replace(old, new)
        if name.endswith(("class_embedding", "positional_embedding")):
            value = value.squeeze(0) if name.endswith("positional_embedding") else value.flatten()
        if name == "visual.proj":
            value = value.T
        if not name.endswith("head.bias"):
            state[name] = value
    load_strict(other, convert_state_dict(state, CLIP))
    for (name, ours), theirs in zip(
        other.vit.state_dict().items(), model.vit.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_plain_pictures_get_fewer_tokens():
    torch.manual_seed(0)
    model = DyMUEncoder(**SIGLIP).eval()
    model.thresholds.fill_(0.99)
    pictures = torch.stack([torch.zeros(3, 16, 16), torch.rand(3, 16, 16) * 2 - 1])
    with torch.no_grad():
        model.vit.pos_embed.zero_()  # So that the patches of a plain picture are equal.
        plain, busy = model(pictures[:1]), model(pictures[1:])
        both = model(pictures)
    assert plain.x.shape[1] == 4  # Half of 16 in each of two blocks.
    assert busy.x.shape[1] > plain.x.shape[1]
    assert both.assignment.num.tolist() == [4, busy.x.shape[1]]
    torch.testing.assert_close(both.x[0, :4], plain.x[0], atol=1e-3, rtol=1e-3)
    assert both.size.sum().item() == pytest.approx(32)


def test_unknown_name():
    with pytest.raises(InputError, match=r"queue\.weight"):
        convert_state_dict({"queue.weight": torch.zeros(1)}, {})
