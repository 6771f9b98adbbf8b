"""The Triton kernels of token reduction against the reference, on a CPU in Triton's interpreter.

A process of its own, since the interpreter is chosen when Triton is imported:
``python -m tessera.tests.token_reduction_triton``.
"""

from __future__ import annotations

import torch

from tessera.kernels.interpreter import enable_interpreter

enable_interpreter()

from tessera.kernels.tokens import reference  # noqa: E402
from tessera.kernels.tokens import triton as kernels  # noqa: E402
from tessera.kernels.tokens.assignment import Assignment  # noqa: E402
from tessera.kernels.tokens.dymu import attention_virtual  # noqa: E402
from tessera.kernels.tokens.token_sparse_attention import attention_token_sparse  # noqa: E402


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


HALF = (torch.float16, torch.bfloat16)


def check_best_match(count: int, dtype: torch.dtype) -> None:
    metric = tokens(2, 40, count).transpose(1, 2).to(dtype)  # Channels are not contiguous.
    position = torch.arange(count)
    sources, targets = position[::2].expand(2, -1), position[1::2].expand(2, -1)
    for valid in (None, tokens(2, count) > -0.5):
        best, where = kernels.best_match(metric, sources, targets, valid)
        expected = reference.best_match(metric, sources, targets, valid)
        torch.testing.assert_close(best, expected[0], atol=1e-6, rtol=0)
        seen = torch.isfinite(best)
        assert torch.equal(where[seen], expected[1][seen]), (count, dtype)


def check_ties() -> None:
    metric = torch.eye(4).repeat(1, 20, 1)  # Every token twenty times.
    targets = torch.arange(1, 80)[None]
    best, where = kernels.best_match(metric, torch.arange(4)[None], targets)
    assert torch.equal(best, torch.ones(1, 4))
    assert where.tolist() == [[3, 0, 1, 2]]


def check_energy(count: int, dtype: torch.dtype = torch.float32) -> None:
    metric = tokens(2, count, 24).to(dtype)
    for kernel in ("elu", "gauss"):
        torch.testing.assert_close(
            kernels.similarity_energy(metric, kernel, 0.3, 0.7),
            reference.similarity_energy(metric, kernel, 0.3, 0.7),
            atol=1e-6,
            rtol=0,
        )


def check_segment_sum(dtype: torch.dtype = torch.float32) -> None:
    row = torch.tensor([[0, 2, -1, 2, 2], [1, 1, 1, 1, 0]])
    a = Assignment.build(row, torch.tensor([[0, -1, 1], [4, 0, -1]]), drops=True)
    x = tokens(2, 5, 150).to(dtype).requires_grad_()
    y = kernels.segment_sum(x, a.flat_rows(), 2, 3)
    expected = reference.merge(x, a, mode="sum")
    torch.testing.assert_close(y, expected)
    weights = tokens(2, 3, 150).to(dtype)
    (grad,) = torch.autograd.grad((y * weights).sum(), x)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(grad, expected_grad)


def check_diverse() -> None:
    x, pivot = tokens(2, 65, 16), torch.tensor([3, 64])
    for objective in ("sum", "max"):
        for valid in (None, tokens(2, 65) > -1):
            picks = kernels.select_diverse(x, 12, pivot, objective, valid)
            expected = reference.select_diverse(x, 12, pivot, objective, valid)
            assert torch.equal(picks, expected), objective


def check_virtual_attention(dtype: torch.dtype, atol: float) -> None:
    row = torch.randint(0, 40, (2, 70), generator=torch.Generator().manual_seed(1))
    row[:, :40] = torch.arange(40)
    a = Assignment.from_mapping(row, 40)
    q, k, v = (tokens(3, 2, 40, 2, 24)[i].to(dtype).transpose(1, 2) for i in range(3))
    angles = torch.arange(70)[:, None] * torch.logspace(0, -2, 12).repeat(2)
    for causal in (False, True):
        settings = {"causal": causal, "merge_back": causal}
        found, expected = (
            attention_virtual(*qkv, a, angles.cos(), angles.sin(), backend=backend, **settings)
            for qkv, backend in (
                ((q, k, v), "triton"),
                ((q.float(), k.float(), v.float()), "torch"),
            )
        )
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, atol=atol, rtol=atol)


def check_sparse_attention(dtype: torch.dtype, atol: float) -> None:
    q, k, v = tokens(2, 4, 150, 16).to(dtype), *tokens(2, 2, 2, 150, 16).to(dtype)
    index = tokens(2, 4, 150).argsort(dim=2)[..., :80].sort(dim=2).values
    index[1, :, 70:] = -1  # The second sample has fewer.
    for causal in (False, True):
        found, expected = (
            attention_token_sparse(*qkv, index, causal=causal, backend=backend)
            for qkv, backend in (
                ((q, k, v), "triton"),
                ((q.float(), k.float(), v.float()), "torch"),
            )
        )
        torch.testing.assert_close(found.float(), expected, atol=atol, rtol=atol)


def main() -> None:
    for count in (1, 2, 7, 150):
        check_best_match(count, torch.float32)
    for count in (1, 65):
        check_energy(count)
    for dtype in HALF:
        check_best_match(65, dtype)
        check_energy(65, dtype)
        check_segment_sum(dtype)
    check_ties()
    check_segment_sum()
    check_diverse()
    for dtype, atol in ((torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
        check_virtual_attention(dtype, atol)
        check_sparse_attention(dtype, atol)
    print("all equal")


if __name__ == "__main__":
    main()
