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


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


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


def check_energy(count: int) -> None:
    metric = tokens(2, count, 24)
    for kernel in ("elu", "gauss"):
        torch.testing.assert_close(
            kernels.similarity_energy(metric, kernel, 0.3, 0.7),
            reference.similarity_energy(metric, kernel, 0.3, 0.7),
            atol=1e-6,
            rtol=0,
        )


def check_segment_sum() -> None:
    row = torch.tensor([[0, 2, -1, 2, 2], [1, 1, 1, 1, 0]])
    a = Assignment.build(row, torch.tensor([[0, -1, 1], [4, 0, -1]]), drops=True)
    x = tokens(2, 5, 150).requires_grad_()
    y = kernels.segment_sum(x, a.flat_rows(), 2, 3)
    expected = reference.merge(x, a, mode="sum")
    torch.testing.assert_close(y, expected)
    weights = tokens(2, 3, 150)
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


def main() -> None:
    for count in (1, 2, 7, 150):
        check_best_match(count, torch.float32)
    for count in (1, 65):
        check_energy(count)
    # The interpreter multiplies bfloat16 as the integers that it keeps them in.
    check_best_match(65, torch.float16)
    check_ties()
    check_segment_sum()
    check_diverse()
    print("all equal")


if __name__ == "__main__":
    main()
