"""Tolerances taken from an error budget instead of a number somebody chose."""

import torch


def assert_within_budget(actual, exact, plain, *, what=""):
    """`actual` errs at most twice as much as plain PyTorch in the same dtype, plus rounding of the largest value.

    actual: the result under test. exact: the same in float64 from an independent formulation. plain: the same from
    PyTorch in `actual`'s dtype. Non-finite values must stand in the same places with the same sign.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    finite = exact.isfinite()
    torch.testing.assert_close(actual.double()[~finite], exact.double()[~finite], equal_nan=True)
    if not finite.any():
        return
    exact = exact.double()[finite]
    error = (actual.double()[finite] - exact).abs().max()
    plain_error = (plain.double()[finite] - exact).abs().max()
    budget = 2 * (plain_error + torch.finfo(actual.dtype).eps * exact.abs().max())
    assert bool(error <= budget), (
        f"{what}: error {error:.3e} exceeds the budget {budget:.3e} (plain: {plain_error:.3e})"
    )


def gradients(output, inputs, grad):
    """The gradients of `output` against `grad` for each of `inputs` that asks for one."""
    return torch.autograd.grad(output, [t for t in inputs if t is not None and t.requires_grad], grad)
