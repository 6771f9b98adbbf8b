"""The vector quantizer: nearest codes, gradients, codebook updates, revival, use; linear layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tessera.kernels import linear as kernel
from tessera.tokenizers.quantizers.vq import VectorQuantizer, codebook_use


def quantizer(vocab_size: int = 20, dim: int = 6, **options) -> VectorQuantizer:
    """Codes drawn from a normal distribution."""
    torch.manual_seed(0)
    vq = VectorQuantizer(vocab_size, dim, **options)
    torch.nn.init.normal_(vq.embedding.weight)
    return vq


def vectors(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("l2_norm", [False, True])
def test_codes_are_the_nearest(l2_norm):
    vq, z = quantizer(l2_norm=l2_norm), vectors(3, 5, 6)
    codebook = vq.embedding.weight
    points = (F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)) if l2_norm else (z, codebook)
    expected = torch.cdist(*(p.double() for p in points)).argmin(-1)
    codes, ids, _ = vq(z)
    assert torch.equal(ids, expected) and torch.equal(vq.nearest(z), expected)
    assert torch.allclose(codes, points[1][expected], atol=1e-6)
    assert torch.allclose(vq.ids_to_codes(ids), points[1][expected], atol=1e-6)


def test_of_equal_codes_the_first():
    vq = quantizer()
    with torch.no_grad():
        vq.embedding.weight[7] = vq.embedding.weight[3]
    assert vq.nearest(vq.embedding.weight[7]) == 3


@pytest.mark.parametrize("l2_norm", [False, True])
def test_losses_and_straight_through_gradient(l2_norm):
    vq, z = quantizer(l2_norm=l2_norm, commitment=0.25), vectors(4, 6).requires_grad_()
    codes, ids, loss = vq(z)
    normed = F.normalize(z, dim=-1) if l2_norm else z
    distance = (normed - vq.ids_to_codes(ids)).square().mean().item()
    assert loss.item() == pytest.approx(1.25 * distance, rel=1e-5)
    upstream = vectors(4, 6).flip(0)
    (through,) = torch.autograd.grad((codes * upstream).sum(), z, retain_graph=True)
    (direct,) = torch.autograd.grad((normed * upstream).sum(), z, retain_graph=True)
    assert torch.allclose(through, direct)
    loss.backward()
    used = vq.embedding.weight.grad.abs().sum(1) > 0
    assert used.nonzero().flatten().tolist() == sorted(set(ids.tolist()))


def test_float32_inside_bf16_and_autocast():
    vq, z = quantizer(vocab_size=400), vectors(200, 6)
    expected = vq.nearest(z)
    with torch.autocast("cpu", torch.bfloat16):
        codes, ids, _ = vq(z)
    assert torch.equal(ids, expected) and codes.dtype == torch.float32
    half = vq.bfloat16()
    assert torch.equal(half(z.bfloat16())[1], half.nearest(z.bfloat16().float()))


def test_gradient_training_lowers_the_loss():
    vq, z = quantizer(), vectors(200, 6)
    optimizer = torch.optim.Adam(vq.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        loss = vq(z)[2]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_moving_average_is_the_mean_of_what_a_code_got():
    """After t batches a code is sum(decay^(t-k) sums_k) / sum(decay^(t-k) counts_k) (appendix A.1)."""
    vq = quantizer(ema=True, decay=0.8)
    assert list(p for p in vq.parameters() if p.requires_grad) == []
    before = vq.embedding.weight.clone()
    sums, counts = torch.zeros(20, 6), torch.zeros(20)
    for k in range(5):
        z = vectors(5, 30, 6)[k]
        ids = vq(z)[1]
        one_hot = F.one_hot(ids, 20).float()
        sums, counts = 0.8 * sums + one_hot.T @ z, 0.8 * counts + one_hot.sum(0)
    used = counts > 0
    assert torch.allclose(vq.embedding.weight[used], sums[used] / counts[used, None], atol=1e-5)
    assert torch.equal(vq.embedding.weight[~used], before[~used])
    assert not used.all()


@pytest.mark.parametrize("ema", [False, True])
def test_dead_codes_come_alive(ema):
    z = vectors(300, 6) * 0.1 + 5
    use = {}
    for revive in (False, True):
        vq = quantizer(ema=ema, revive=revive)
        for _ in range(3):
            ids = vq(z)[1]
        use[revive] = float(codebook_use(ids, 20)["codebook_usage"])
    assert use[False] < 0.3 and use[True] > 0.5


def test_revival_leaves_codes_in_use():
    vq = quantizer(vocab_size=2, dim=2, revive=True)
    with torch.no_grad():
        vq.embedding.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    vq(torch.tensor([[0.9, 0.0], [-0.9, 0.0]]))
    expected = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert torch.allclose(vq.embedding.weight, expected, atol=1e-4)


def test_the_codebook_rests_outside_training():
    vq = quantizer(ema=True, revive=True).eval()
    before = {name: value.clone() for name, value in vq.state_dict().items()}
    vq(vectors(30, 6))
    assert all(torch.equal(value, before[name]) for name, value in vq.state_dict().items())


def test_codebook_use():
    even = codebook_use(torch.tensor([[0, 1], [2, 3]]), 8)
    assert float(even["perplexity"]) == pytest.approx(4)
    assert float(even["codebook_usage"]) == 0.5
    assert float(codebook_use(torch.zeros(9, dtype=torch.int64), 8)["perplexity"]) == 1


@pytest.mark.parametrize("shape", [(5, 24), (2, 37, 24), (3, 24), (0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_torch(shape, bias):
    torch.manual_seed(0)
    layer = kernel.Linear(24, 16, bias=bias)
    x = torch.randn(shape)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with torch.no_grad():
        assert torch.allclose(layer(x), expected.float(), atol=1e-5)
        rows = x[..., 1:, :] if x.ndim == 3 else x
        assert torch.allclose(layer(rows), layer(x)[..., -rows.shape[-2] :, :], atol=1e-6)
    layer(x).sum().backward()
    assert torch.allclose(layer.weight.grad, x.reshape(-1, 24).sum(0).expand(16, -1), atol=1e-5)


def test_linear_follows_autocast():
    layer, x = kernel.Linear(8, 8), torch.randn(64, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.no_grad():
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
