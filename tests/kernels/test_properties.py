"""What holds for every operation and every backend, on the examples that the benchmark has too."""

import re
import warnings

import pytest
import torch
from torch.utils._pytree import tree_map_only

from rigfuse.kernels import BackendError
from support.numerics import assert_within_budget
from support.operations import EXAMPLES, Recorder, cast, gradient_like, run, tensors_of, with_leaves

# Dynamo instantiates an autograd.Function itself.
DYNAMO = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(params=EXAMPLES)
def example(request):
    return EXAMPLES[request.param]


def assert_close_to_the_last_digits(actual, expected, what):
    """float64, or what was rounded from it."""
    tolerance = 1e-11 if actual.dtype == torch.float64 else 2e-7
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}"
    )


def assert_same(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and actual[name].shape == value.shape, name
        torch.testing.assert_close(actual[name], value, equal_nan=True, msg=lambda m: f"{name}: {m}", **tolerance)


def assert_same_bits(actual, expected):
    assert_same(actual, expected, rtol=0, atol=0)


def test_equals_the_definition(example, backend, dtype, device, guarded_allocations):
    """Also: writes every number of its results and none beside them."""
    draws = []
    for seed in range(1 if dtype == torch.float64 else 4):
        arguments = example.make(dtype, device, seed=seed)
        plain = run(example, arguments, backend="definition")
        draws.append((run(example, cast(arguments, torch.float64), backend="definition"), plain))
    exact, plain = draws[0]
    actual = run(example, example.make(dtype, device), backend=backend)
    assert all(result.isfinite().all() and result.any() for result in actual.values())
    for name, result in actual.items():
        assert result.dtype == plain[name].dtype, name
        if dtype == torch.float64:
            assert_close_to_the_last_digits(result, exact[name], what=name)
        elif result.numel() > 1:  # on one number a formulation may be exact by luck
            others = [(wide[name], narrow[name]) for wide, narrow in draws[1:]]
            assert_within_budget(result, exact[name], plain[name], draws=others, what=name)
        else:
            torch.testing.assert_close(
                result.double(), exact[name].double(), rtol=50 * torch.finfo(dtype).eps, atol=1e-5
            )


def poison_like(tensor):
    """What must not be read: NaN, the opposite, the largest integer."""
    if tensor.dtype == torch.bool:
        return ~tensor
    return torch.full_like(tensor, float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


def strided(tensor, dim, step):
    """The same numbers with a step along a dimension, and poison between them."""
    return torch.stack([tensor, *[poison_like(tensor)] * (step - 1)], dim=dim + 1).select(dim + 1, 0)


def in_layout(tensor, layout, step):
    """The same numbers elsewhere in memory; with stride 0, the first ones along a dimension for all."""
    last, reverse = tensor.ndim - 1, list(reversed(range(tensor.ndim)))
    return {
        "as it is": lambda: tensor,
        "step along the first": lambda: strided(tensor, 0, step),
        "step along the last": lambda: strided(tensor, last, step),
        "reversed": lambda: tensor.permute(reverse).contiguous().permute(reverse),
        "stride 0 along the first": lambda: strided(tensor.narrow(0, 0, 1), 0, step).expand_as(tensor),
        "stride 0 along the last": lambda: strided(tensor.narrow(last, 0, 1), 0, step).expand_as(tensor),
    }[layout]()


# Of an operation's arguments in order, and again from the start: no two of them lie alike.
LAYOUTS = [
    ("step along the first", "step along the last", "reversed"),
    ("step along the last", "reversed", "step along the first"),
    ("reversed", "step along the first", "step along the last"),
    ("stride 0 along the first", "as it is"),
    ("as it is", "stride 0 along the first"),
    ("stride 0 along the last", "as it is"),
    ("as it is", "stride 0 along the last"),
]


@pytest.mark.parametrize("layouts", LAYOUTS, ids=", ".join)
def test_strides(example, layouts, backend, device):
    """Every argument, and the gradient of the output, with steps, transposed and expanded."""
    arguments = example.make(torch.float64, device, example.tiny)
    tensors = {name: arguments[name] for name in tensors_of(example, arguments) if arguments[name].ndim}
    if example.table.gradients:
        tensors["grad"] = gradient_like(run(example, arguments, backend="torch", wanted=())["out"])
    views = {
        name: in_layout(tensor, layouts[place % len(layouts)], step=2 + place)
        for place, (name, tensor) in enumerate(tensors.items())
    }

    def call(given):
        grad = given.get("grad")
        return run(example, arguments | {n: t for n, t in given.items() if n != "grad"}, grad=grad, backend=backend)

    expected, actual = call({name: view.contiguous().clone() for name, view in views.items()}), call(views)
    assert actual.keys() == expected.keys() and expected["out"].any()
    for result, value in expected.items():
        assert_close_to_the_last_digits(actual[result], value, result)


@pytest.mark.parametrize("name, change", [(n, c) for n, e in EXAMPLES.items() for c in e.empty], ids=str)
def test_nothing_to_compute(name, change, any_backend, device):
    """Results and gradients have their shapes, and are zero."""
    example = EXAMPLES[name]
    arguments = example.make(torch.float32, device, {**example.sizes, **change})
    results = run(example, arguments, backend=any_backend)
    assert not results.pop("out").any()
    for result, gradient in results.items():
        if result.startswith("gradient"):
            leaf = arguments[result.removeprefix("gradient of ")]
            assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype and not gradient.any()
    shapes = {n: t.shape for n, t in run(example, arguments, backend="definition").items()}
    assert shapes == {n: t.shape for n, t in run(example, arguments, backend=any_backend).items()}


def tiny(example, device):
    """A function of the leaves alone, and these, in float64."""
    arguments, leaves = with_leaves(example, example.make(torch.float64, device, example.tiny))
    if not leaves:
        pytest.skip("has no gradients")

    def call(backend, *tensors):
        returned = example.function(**{**arguments, **dict(zip(leaves, tensors))}, backend=backend)
        return returned[0] if isinstance(returned, tuple) else returned

    return call, list(leaves.values())


def test_gradients_equal_differences(example, any_backend, device):
    call, leaves = tiny(example, device)
    assert torch.autograd.gradcheck(lambda *tensors: call(any_backend, *tensors), leaves, fast_mode=True)


def test_second_derivatives_are_right_or_refused(example, any_backend, device):
    """Of all leaves together and of each alone; the definition has them."""
    call, leaves = tiny(example, device)

    def second(backend, wanted):
        tensors = [leaf if number in wanted else leaf.detach() for number, leaf in enumerate(leaves)]
        chosen = [leaves[number] for number in wanted]
        out = call(backend, *tensors)
        first = torch.autograd.grad(out, chosen, gradient_like(out).requires_grad_(), create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), chosen, allow_unused=True)

    if any_backend == "definition":
        assert torch.autograd.gradgradcheck(lambda *tensors: call("definition", *tensors), leaves, fast_mode=True)
    for wanted in (range(len(leaves)), *([number] for number in range(len(leaves)))):
        try:
            actual = second(any_backend, wanted)
        except NotImplementedError as error:
            assert any_backend != "definition" and "backend='definition' has those" in str(error)
            continue
        for one, other in zip(actual, second("definition", wanted)):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other)


def test_ops_keep_the_rules_of_torch(example, backend, device):
    """opcheck of every op that a call and its backward pass reach, on strided tensors."""
    arguments = example.make(torch.float32, device, example.tiny)
    for name in tensors_of(example, arguments)[:1]:
        arguments[name] = torch.stack([arguments[name]] * 2, dim=-1)[..., 0]
    with Recorder() as recorder:
        run(example, arguments, backend=backend)
        run(example, arguments, backend=backend, wanted=example.table.gradients[:1])
    assert recorder.calls or backend == "torch"
    for op, args in recorder.calls:
        torch.library.opcheck(op, tree_map_only(torch.Tensor, torch.Tensor.detach, args))


@DYNAMO
def test_compiles_to_a_full_graph(example, backend, device):
    """Forward and backward, its results in the layout that eager gives them. Sizes change where the graph holds ops of
    this package; what plain PyTorch does then is its own affair, and slow to find out."""
    torch._dynamo.reset()
    changing = backend == "triton"

    def call(**arguments):
        returned = example.function(**arguments, backend=backend)
        return (2 * returned[0], *returned[1:]) if isinstance(returned, tuple) else 2 * returned

    compiled = torch.compile(call, fullgraph=True, dynamic=changing, backend="aot_eager")
    for sizes in (example.tiny, example.other)[: 1 + changing]:
        arguments = example.make(torch.float32, device, sizes)
        expected = run(example, arguments, function=call)
        actual = run(example, arguments, function=compiled)
        assert_same(actual, expected)
        assert actual["out"].stride() == expected["out"].stride()


def test_repeats_itself_bit_for_bit(example, any_backend, device, monkeypatch):
    if any_backend == "definition" and device == "cuda":
        pytest.skip("grid_sample and index_put add atomically")
    # The interpreter runs one program after another: there is nothing to see in many.
    arguments = example.make(torch.float32, device, None if device == "cuda" else example.tiny)
    first = run(example, arguments, backend=any_backend)
    for _ in range(2 if device == "cuda" else any_backend == "definition"):
        assert_same_bits(run(example, arguments, backend=any_backend), first)
    if any_backend != "definition":  # nor is anything called that PyTorch knows not to repeat itself
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        try:
            assert_same_bits(run(example, arguments, backend=any_backend), first)
        finally:
            torch.use_deterministic_algorithms(False)


def test_each_gradient_alone(example, backend, device):
    """Each is what it is together with the others."""
    arguments = example.make(torch.float32, device, example.tiny)
    together = run(example, arguments, backend=backend)
    for name in example.table.gradients:
        alone = run(example, arguments, wanted=(name,), backend=backend)
        assert_same_bits(alone, {key: together[key] for key in alone})


def test_autocast(example, any_backend, device):
    """The inputs of products are cast, float64 excepted; everything else is computed as ever."""
    arguments = example.make(torch.float32, device, example.tiny)
    followers = [name for name, argument in example.table.arguments.items() if argument.autocast]
    half = {**arguments, **{name: arguments[name].half() for name in followers}}
    expected = run(example, half, backend=any_backend)
    with torch.autocast(device, dtype=torch.float16):
        actual = run(example, arguments, backend=any_backend)
    for name in example.table.gradients:
        key = f"gradient of {name}"
        expected[key] = expected[key].to(arguments[name].dtype)
    assert_same_bits(actual, expected)
    if not followers:
        return
    wide = cast(arguments, torch.float64)
    expected = run(example, wide, backend=any_backend)
    with torch.autocast(device, dtype=torch.float16):
        assert_same_bits(run(example, wide, backend=any_backend), expected)


def test_bfloat16_is_refused_by_the_interpreter(example, device):
    arguments = example.make(torch.bfloat16, device)
    if device == "cuda" or not any(
        t.dtype == torch.bfloat16 for t in arguments.values() if isinstance(t, torch.Tensor)
    ):
        pytest.skip("there is a GPU, or no argument in bfloat16")
    with pytest.raises(BackendError, match="cannot serve this call: .* cannot compute bfloat16"):
        example.function(**arguments, backend="triton")


NO_TENSOR = "(must be a tensor, got {0}|is a {0}, needs a number or a tensor)"
TENSORS = [(name, argument) for name, example in EXAMPLES.items() for argument in example.table.arguments]


def nested_like(tensor):
    """Nested tensors of as many axes, in both layouts; one of them has no shape that can be read."""
    parts = [tensor.detach()] * 2 if tensor.ndim < 2 else list(tensor.detach().unbind())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of the layout itself
        strided = torch.nested.nested_tensor(parts, layout=torch.strided)
    return strided, torch.nested.nested_tensor([part.reshape(-1) for part in parts], layout=torch.jagged)


@pytest.mark.parametrize("name, argument", TENSORS, ids=lambda value: value)
def test_bad_tensors(name, argument):
    """Each tensor in a wrong type, shape, dtype, layout, place: an error that says which, what came, what is needed."""
    example = EXAMPLES[name]
    arguments = example.make(torch.float32)
    row, tensor = example.table.arguments[argument], arguments[argument]
    cases = [
        (TypeError, NO_TENSOR.format("list"), [1.0]),
        (TypeError, "is complex64, needs ", tensor.to(torch.complex64)),
        (TypeError, "must be a dense tensor, got a sparse_coo one", torch.zeros(tensor.shape).to_sparse()),
        *((TypeError, "must be a dense tensor, got a nested one", nested) for nested in nested_like(tensor)),
    ]
    if row.dims is not None:
        cases.append((ValueError, rf"has shape \(.*\), needs \({', '.join(map(str, row.dims[0]))}", tensor[None, None]))
        if tensor.ndim:
            cases.append((ValueError, r"has shape \(.*\), needs \(", torch.cat([tensor] * 2)[:, None, None]))
    if not row.optional:
        cases.append((TypeError, NO_TENSOR.format("NoneType"), None))
    if argument != next(iter(example.table.arguments)):
        cases.append((ValueError, "is on meta, needs cpu like ", tensor.to("meta")))
    if not row.gradient and tensor.is_floating_point():
        cases.append((ValueError, "requires grad, but gets no gradient", tensor.clone().requires_grad_()))
    for error, message, value in cases:
        with pytest.raises(error, match=f"^{example.table.operation}: {re.escape(argument)} {message}"):
            example.function(**{**arguments, argument: value})
    if argument == "features":  # whose size is the result's, where that is not given
        with pytest.raises(TypeError, match="must be a dense tensor"):
            example.function(**{**arguments, "features": nested_like(tensor)[0], "output_size": None})
    with pytest.raises(BackendError, match="backend is 'cuda'; choose one of auto, torch, triton, definition"):
        example.function(**arguments, backend="cuda")
