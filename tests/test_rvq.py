"""Residual vector quantization."""

from __future__ import annotations

import torch

from tessera.tokenizers.quantizers.rvq import ResidualVQ


def trained(codebooks: int, z: torch.Tensor) -> ResidualVQ:
    torch.manual_seed(0)
    model = ResidualVQ(codebooks, 8, 4, dead_code_threshold=0.1, kmeans_iterations=20).train()
    for _ in range(20):
        model(z)
    return model.eval()


def test_each_codebook_brings_the_codes_nearer():
    z = torch.randn(4, 50, 4, generator=torch.Generator().manual_seed(1))
    errors = [float((trained(n, z)(z)[0] - z).square().mean()) for n in (1, 2, 4)]
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1]


def test_ids_codes_and_the_gradient():
    z = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(2))
    model = trained(3, z)
    z.requires_grad_()
    codes, ids, loss = model(z)
    assert ids.shape == (2, 3, 9) and torch.equal(model.nearest(z), ids)
    torch.testing.assert_close(model.ids_to_codes(ids), codes)
    codes.sum().backward(retain_graph=True)
    assert torch.equal(z.grad, torch.ones_like(z))
    z.grad = None
    loss.backward()
    assert float(z.grad.abs().max()) > 0
    # By hand: the first codebook takes the nearest code, the second that of what is left.
    first, second = (codebook.embed for codebook in model.codebooks[:2])
    distances = (z[0, 0, None] - first).norm(dim=1)
    assert int(distances.argmin()) == int(ids[0, 0, 0])
    rest = z[0, 0] - first[ids[0, 0, 0]]
    assert int((rest - second).norm(dim=1).argmin()) == int(ids[0, 1, 0])
