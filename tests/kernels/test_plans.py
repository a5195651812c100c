"""Calls of the Triton backend that are planned once and repeated, and checks whose outcome is remembered."""

import gc
import importlib
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch

from rigfuse.kernels import bev_warp, cross_camera_attention, gated_fusion, window_bias_attention
from rigfuse.kernels.runtime import arguments, plans
from support.operations import EXAMPLES, run


@pytest.fixture(autouse=True)
def no_plans():
    plans.forget()
    yield
    plans.forget()


def count_launches(function, monkeypatch):
    """The names of the launch functions that calls of an operation run themselves, without a plan."""
    made, triton = [], importlib.import_module(f"{function.__module__.removesuffix('.api')}.triton")
    for name in ("launch_forward", "launch_backward"):
        if hasattr(triton, name):
            original = getattr(triton, name)

            def counted(*arguments, name=name, original=original):
                made.append(name)
                return original(*arguments)

            monkeypatch.setattr(triton, name, counted)
    return made


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].stride() == value.stride(), name
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_planned_call_computes_what_the_function_does(name, monkeypatch, device):
    example, made = EXAMPLES[name], count_launches(EXAMPLES[name].function, monkeypatch)
    for seed in range(3):
        given = example.make(torch.float32, device, example.tiny, seed=seed)
        planned = run(example, given, backend="triton")
    assert made and len(made) == 2 * len(set(made))  # the first call and the one that is recorded
    plans.forget()
    assert_same_bits(planned, run(example, given, backend="triton"))


def fusion(dtype=torch.float32, device="cpu", skip=0, memory_format=torch.contiguous_format):
    """Arguments of `gated_fusion`, `skip` elements behind the start of their memory."""
    memory = torch.randn(3, 2 * 4 * 3 * 4 + skip, device=device).to(dtype)
    return [row[skip:].view(2, 4, 3, 4).contiguous(memory_format=memory_format) for row in memory]


@pytest.mark.parametrize(
    "change",
    [
        dict(dtype=torch.float64),
        dict(skip=1),  # element: the pointers are no longer multiples of 16
        dict(memory_format=torch.channels_last),
    ],
    ids=str,
)
def test_what_differs_in_kind_has_a_plan_of_its_own(change, monkeypatch, device):
    made = count_launches(gated_fusion, monkeypatch)
    for _ in range(3):
        gated_fusion(*fusion(device=device), backend="triton")
    assert len(made) == 2
    given = fusion(device=device, **change)
    actual = gated_fusion(*given, backend="triton")
    assert len(made) == 3 and actual.stride() == given[0].stride()
    torch.testing.assert_close(actual, gated_fusion(*given, backend="definition"))


def test_the_precision_of_products_has_a_plan_of_its_own(monkeypatch, device):
    made = count_launches(cross_camera_attention, monkeypatch)
    given = EXAMPLES["cross_camera_attention"].make(torch.float32, device)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "highest", "highest", "high"):
            torch.set_float32_matmul_precision(precision)
            cross_camera_attention(**given, backend="triton")
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(made) == 3


def like(tensor):
    return torch.empty_like(tensor)


def test_another_device_has_a_plan_of_its_own():
    for device in ("cpu", "cpu", "cpu", "meta"):
        assert plans.repeat(like, [torch.zeros(2, device=device)]).device.type == device


def test_one_tensor_for_two_arguments(device):
    given = EXAMPLES["cross_camera_attention"].make(torch.float32, device)
    same = given | {"value": given["key"]}
    for _ in range(3):
        cross_camera_attention(**same, backend="triton")
    actual = cross_camera_attention(**given, backend="triton")
    torch.testing.assert_close(actual, cross_camera_attention(**given, backend="torch"))


def of_views(x, others, factor, factors):
    """Of every kind that a launch function does: views of views, in-place writes into views, several results."""
    part = x[1:].transpose(0, 1)[::2]
    out = torch.zeros_like(part)
    out[:, 1:] = part[:, 1:].expand(part.shape[0], -1) * factor
    out[0].add_(others[1].sum())
    values, order = torch.sort(x.t().contiguous().t(), dim=1, stable=True)
    number = torch.searchsorted(values[0].contiguous(), values[0].contiguous(), sorter=order[0].argsort())
    return [out, None, values.detach(), (order, number), factors]


# Below autograd torch does not take operations apart: `contiguous` arrives, which may copy or not.
@pytest.mark.parametrize("where", [nullcontext, torch._C._AutoDispatchBelowAutograd], ids=["above", "below"])
def test_views_writes_and_several_results(where):
    for number in range(4):
        x = torch.randn(200)[4 * number :][:72].view(6, 12)  # elsewhere in its memory each time
        others = [torch.randn(3), torch.randn(2)]
        expected = of_views(x, others, 2.0, [1, 2])
        with where():
            out, nothing, values, (order, ranks), factors = plans.repeat(of_views, [x, others, 2.0, [1, 2]])
        assert nothing is None and factors == [1, 2]
        for actual, wanted in zip((out, values, order, ranks), (expected[0], expected[2], *expected[3])):
            assert torch.equal(actual, wanted) and actual.stride() == wanted.stride()


def test_what_depends_on_values_is_refused():
    def first_number(tensor):
        return tensor * float(tensor[0])

    plans.repeat(first_number, [torch.ones(2)])
    with pytest.raises(NotImplementedError, match="must not depend on the values"):
        plans.repeat(first_number, [torch.ones(2)])


def test_memory_is_given_back_as_soon_as_nobody_needs_it(monkeypatch):
    def chain(tensor):
        first = torch.empty_like(tensor)
        second = torch.empty_like(first.fill_(1.0)).copy_(first)
        del first
        return torch.empty_like(second).copy_(second)

    alive, empty_strided = [], torch.empty_strided

    def watched(*arguments, **options):
        made = empty_strided(*arguments, **options)
        alive.append((weakref.ref(made), [other() is not None for other, _ in alive]))
        return made

    for _ in range(2):
        plans.repeat(chain, [torch.zeros(3)])
    monkeypatch.setattr(torch, "empty_strided", watched)
    assert torch.equal(plans.repeat(chain, [torch.zeros(3)]), torch.ones(3))
    assert [others for _, others in alive] == [[], [True], [False, True]]


def test_plans_hold_no_tensors(device):
    given = fusion(device=device)
    for _ in range(3):
        results = [gated_fusion(*given, backend="triton")]
    held = [weakref.ref(tensor) for tensor in (*given, *results)]
    del given, results
    gc.collect()
    assert not any(tensor() is not None for tensor in held)


def test_plans_are_bounded_and_the_latest_used_are_kept():
    def add(tensor, number):
        made.append(number)
        return tensor + number

    made, one = [], torch.ones(1)
    for number in range(plans.MOST + 1):
        for _ in range(2):
            plans.repeat(add, [one, number])
        plans.repeat(add, [one, 0])
    made.clear()
    assert plans.repeat(add, [one, 0]) == 1 and plans.repeat(add, [one, plans.MOST]) == plans.MOST + 1 and not made
    assert plans.repeat(add, [one, 1]) == 2 and made == [1]


def test_threads_share_plans():
    results = {}

    def work(number):
        x = torch.full((6, 12), float(number))
        results[number] = all(torch.equal(plans.repeat(double, [x]), 2 * x) for _ in range(50))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), True)


def double(x):
    return torch.empty_like(x).copy_(x)[1:].mul(2).new_empty(x.shape).copy_(x).mul_(2)


def checked(monkeypatch):
    """The names of the operations whose arguments are looked at, not remembered."""
    names, check = [], arguments.Arguments._check

    def noted(self, *given):
        names.append(self.operation)
        return check(self, *given)

    monkeypatch.setattr(arguments.Arguments, "_check", noted)
    return names


def test_arguments_that_have_passed_pass_again(monkeypatch, device):
    names = checked(monkeypatch)
    for wider in (0, 0, 0, 1):
        given = [torch.randn(2, 4, 3, 5 + wider, device=device) for _ in range(3)]
        gated_fusion(*given, backend="torch")
    assert names == ["gated_fusion"] * 2


def test_what_has_passed_says_nothing_about_another_call(device):
    """Each differs from one that passed in one thing."""
    features, transform = torch.randn(1, 4, 5, 6, device=device), torch.eye(2, 3, device=device)[None]
    for _ in range(2):
        bev_warp(features, transform)
    for error, message, given in [
        (ValueError, "features has shape", (features[0], transform)),
        (TypeError, "transform is float64", (features, transform.double())),
        (TypeError, "transform must be a dense tensor, got a sparse_coo", (features, transform.to_sparse())),
        (ValueError, "transform is on meta", (features, transform.to("meta"))),
        (ValueError, "transform requires grad", (features, transform.clone().requires_grad_())),
        (TypeError, "transform must be a tensor, got list", (features, [1.0])),
    ]:
        with pytest.raises(error, match=f"bev_warp: {message}"):
            bev_warp(*given)
    with torch.no_grad():
        wanted = transform.clone().requires_grad_()
        bev_warp(features, wanted)
    with pytest.raises(ValueError, match="transform requires grad"):
        bev_warp(features, wanted)


def test_autocast_is_followed_by_calls_that_have_passed_without_it(device):
    given = EXAMPLES["window_bias_attention"].make(torch.float32, device)
    plain = window_bias_attention(**given, backend="torch")
    with torch.autocast(device, dtype=torch.float16):
        halves = [window_bias_attention(**given, backend="torch") for _ in range(2)]
    assert plain.dtype == torch.float32 and [half.dtype for half in halves] == [torch.float16] * 2
    assert window_bias_attention(**given, backend="torch").dtype == torch.float32
