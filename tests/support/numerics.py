"""Tolerances taken from an error budget instead of a number somebody chose."""

from functools import partial

import torch


def assert_within_budget(actual, exact, plain, *, draws=(), what=""):
    """`actual` errs at most twice as much as plain PyTorch in the same dtype, plus rounding of the largest value.

    actual: the result under test. exact: the same in float64 from an independent formulation. plain: the same from
    PyTorch in `actual`'s dtype. draws: pairs of exact and plain on other inputs of the same kind; the largest of a few
    errors is luck, that of several draws less so. Non-finite values must stand in the same places with the same sign.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    finite = exact.isfinite()
    torch.testing.assert_close(actual.double()[~finite], exact.double()[~finite], equal_nan=True)
    if not finite.any():
        return
    exact = exact.double()[finite]
    error = (actual.double()[finite] - exact).abs().max()
    plain_error = (plain.double()[finite] - exact).abs().max()
    for other_exact, other_plain in draws:
        plain_error = plain_error.maximum((other_plain.double() - other_exact.double()).abs().max())
    budget = 2 * (plain_error + torch.finfo(actual.dtype).eps * exact.abs().max())
    assert bool(error <= budget), (
        f"{what}: error {error:.3e} exceeds the budget {budget:.3e} (plain: {plain_error:.3e})"
    )


def assert_as_exact_as_the_definition(call, inputs, grad, backend, *, names=None, rtol=1e-11, plain=None, more=()):
    """`call(*inputs, backend=…)` and its gradients equal those of the definition.

    In float64 to `rtol`, otherwise within the budget of the definition in the same dtype. On a single number a
    formulation may be exact by luck: it is judged with the gradient before it, or held to a multiple of the rounding.
    plain: another formulation that sets the budget, where the definition rounds less than can be asked for.
    more: pairs of other inputs of the same kind and a grad: of a single number the worst of these draws counts.
    """

    def evaluate(function, tensors, grad=grad):
        out = function(*tensors)
        out = out if isinstance(out, tuple) else (out,)
        wanted = [t for t in tensors if t is not None and t.requires_grad]
        return [*out, *torch.autograd.grad(out[0], wanted, grad.to(out[0].dtype))]

    def widen(t):
        wide = t.detach().double() if t is not None and t.is_floating_point() else t
        return wide.requires_grad_() if t is not None and t.requires_grad else wide

    definition = partial(call, backend="definition")
    formulation = plain or definition
    actual, plain = evaluate(partial(call, backend=backend), inputs), evaluate(formulation, inputs)
    exact = evaluate(definition, [widen(t) for t in inputs])
    draws = [(evaluate(definition, [widen(t) for t in other], g), evaluate(formulation, other, g)) for other, g in more]
    double = any(t is not None and t.dtype == torch.float64 for t in inputs)
    for number, (one, true, other) in enumerate(zip(actual, exact, plain)):
        what = names[number] if names else f"result {number}"
        assert one.dtype == other.dtype and one.shape == other.shape, what
        if double:
            tolerance = rtol if one.dtype == torch.float64 else 2e-7
            torch.testing.assert_close(
                one.double(), true.double(), rtol=tolerance, atol=tolerance, equal_nan=True,
                msg=lambda m: f"{what}: {m}",
            )  # fmt: skip
        elif one.ndim == 0 and one.dtype == actual[number - 1].dtype:
            others = [[_with_the_one_before(group, number) for group in pair] for pair in draws]
            results = (_with_the_one_before(group, number) for group in (actual, exact, plain))
            assert_within_budget(*results, draws=others, what=what)
        elif one.ndim == 0:
            eps = torch.finfo(inputs[0].dtype).eps
            torch.testing.assert_close(one.double(), true.double(), rtol=50 * eps, atol=1e-5)
        else:
            assert_within_budget(one, true, other, what=what)
    return actual


def _with_the_one_before(results, number):
    return torch.cat([results[number - 1].flatten(), results[number][None]])
