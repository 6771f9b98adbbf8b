"""The small CLIP: its text, its pictures, its loss, its files."""

from __future__ import annotations

import pytest
import torch

from tessera.generators.conditioning.clip import TextImageCLIP
from tessera.modalities.errors import InputError
from tessera.tests.tiny import tiny_clip


@pytest.fixture(scope="module")
def clip() -> TextImageCLIP:
    return tiny_clip()


def test_embeddings_have_unit_length_and_do_not_depend_on_the_batch(clip):
    texts = ["red circle", "blue square, 3d", ""]
    together = clip.encode_text(texts)
    assert torch.allclose(together.norm(dim=1), torch.ones(3), atol=1e-5)
    for text, row in zip(texts, together, strict=True):
        assert torch.allclose(clip.encode_text([text])[0], row, atol=1e-5)


def test_features_are_padded_to_the_longest_text(clip):
    features, mask = clip.text_features(["red circle", "red circle, 3d flat red circle"])
    assert features.shape == (2, mask.shape[1], clip.text_dim)
    assert mask[1].all() and not mask[0].all()
    alone, alone_mask = clip.text_features(["red circle"])
    assert alone_mask.all()
    assert torch.allclose(alone[0], features[0][mask[0]], atol=1e-5)


def test_case_and_unicode_forms_are_one_text(clip):
    ids = clip.tokenize(["Red CIRCLE", "red circle", "ｒｅｄ circle"])
    assert torch.equal(ids[0], ids[1]) and torch.equal(ids[0], ids[2])


def test_long_texts_are_cut_and_counted(clip):
    text = "red circle " * 30
    ids = clip.tokenize([text])
    assert ids.shape == (1, clip.context_length)
    assert int(ids[0, -1]) == clip.bpe.token_to_id("<end>")
    assert clip.count_tokens(text) > clip.context_length


def test_pictures_of_any_size(clip):
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert clip.encode_image(picture).shape == (1, 16)
    small = picture[..., :32, :32]
    assert torch.equal(clip.encode_image(small * 5), clip.encode_image((small * 5).clamp(-1, 1)))


def test_loss_with_several_positives(clip):
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = clip.tokenize(["red circle", "red circle", "blue square", "green ring"])
    same = torch.tensor([0, 0, 1, 2])
    positives = same[:, None] == same[None]
    loss, parts = clip(images, ids, positives)
    image = clip.encode_image(images)
    text = clip.model.encode_text(ids, normalize=True)
    logits = clip.model.logit_scale.exp() * image @ text.T
    by_hand = 0.0
    for table, targets in ((logits, positives), (logits.T, positives.T)):
        for row, target in zip(table.log_softmax(1), targets, strict=True):
            by_hand = by_hand - row[target].mean() / 8
    assert torch.allclose(loss, by_hand, atol=1e-5)
    assert 0 <= parts["image_to_text"] <= 1
    loss.backward()
    clip.zero_grad()


def test_save_and_load_are_exact(clip, tmp_path):
    clip.save_pretrained(tmp_path)
    again = TextImageCLIP.from_pretrained(tmp_path).eval()
    assert torch.equal(again.encode_text(["red ring"]), clip.encode_text(["red ring"]))
    (tmp_path / "bpe.json").unlink()
    with pytest.raises(InputError, match=r"bpe\.json"):
        TextImageCLIP.from_pretrained(tmp_path)


def test_open_clip_architectures_plug_in_by_name(tmp_path):
    clip = TextImageCLIP(open_clip_name="RN50").eval()
    weights = tmp_path / "weights.pt"
    torch.save(clip.model.state_dict(), weights)
    loaded = TextImageCLIP.from_open_clip("RN50", str(weights))
    assert loaded.image_size == 224 and loaded.context_length == 77
    assert torch.equal(loaded.encode_text(["a fox"]), clip.encode_text(["a fox"]))
    features, mask = loaded.text_features(["a red fox", "fox"])
    assert features.shape[2] == loaded.text_dim and mask.sum(1).tolist() == [5, 3]


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="no-such-model"):
        TextImageCLIP.from_open_clip("no-such-model", "openai")
