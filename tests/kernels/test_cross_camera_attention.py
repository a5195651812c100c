import pytest
import torch
from torch.library import opcheck

from rigfuse.kernels import BackendError, cross_camera_attention
from support.numerics import assert_within_budget

NONE, ALL = -1, slice(None)


def explicit(query, key, value, block_table, key_mask=None, scale=None):
    """Independent formulation: for each query block and head, its keys one after another, and their softmax."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    blocks = []
    for n, row in enumerate(block_table.tolist()):
        rows = [ALL if key_mask is None else key_mask[s].nonzero()[:, 0] for s in row]
        if not sum(len(key[s][keep]) for s, keep in zip(row, rows) if s >= 0):
            blocks.append(torch.zeros_like(query[n]))
            continue
        keys = torch.cat([key[s][keep] for s, keep in zip(row, rows) if s >= 0])
        values = torch.cat([value[s][keep] for s, keep in zip(row, rows) if s >= 0])
        heads = [
            torch.softmax(query[n, :, h] @ keys[:, h].T * scale, dim=-1) @ values[:, h] for h in range(query.shape[2])
        ]
        blocks.append(torch.stack(heads, dim=1))
    return torch.stack(blocks)


def tensors(queries, length_q, heads, dim, blocks, length_k, *, dtype=torch.float32, device="cpu"):
    """query, key, value and a gradient of the output."""
    sizes = [(queries, length_q), (blocks, length_k), (blocks, length_k), (queries, length_q)]
    made = [torch.randn(*size, heads, dim, dtype=torch.float64).to(device, dtype) for size in sizes]
    return [t.requires_grad_() for t in made[:3]], made[3]


def with_gradients(function, inputs, grad):
    out = function(*inputs)
    return (out, *torch.autograd.grad(out, inputs, grad.to(out.dtype), materialize_grads=True))


def check_against_explicit(inputs, grad, table, key_mask, backend, scale=None):
    keyword = dict(key_mask=key_mask, scale=scale)
    actual = with_gradients(lambda *qkv: cross_camera_attention(*qkv, table, backend=backend, **keyword), inputs, grad)
    double = [t.detach().double().requires_grad_() for t in inputs]
    exact = with_gradients(lambda *qkv: explicit(*qkv, table, **keyword), double, grad.double())
    plain = with_gradients(lambda *qkv: explicit(*qkv, table, **keyword), inputs, grad)
    assert actual[0].dtype == inputs[0].dtype and actual[0].is_contiguous()
    for what, *results in zip(("out", "dquery", "dkey", "dvalue"), actual, exact, plain):
        if inputs[0].dtype == torch.float64:
            torch.testing.assert_close(*results[:2], rtol=1e-12, atol=1e-12)
        else:
            assert_within_budget(*results, what=what)


CASES = {
    # (Nq, Lq, heads, dim, S, Lk), table
    "several tiles": ((2, 131, 1, 16, 3, 139), [[0, 2], [1, NONE]]),
    "absent and repeated": ((4, 13, 2, 32, 5, 23), [[0, 1, NONE, 3], [3, 3, 2, 3], [NONE] * 4, [NONE, NONE, 0, NONE]]),
    "odd dim": ((2, 17, 3, 40, 3, 91), [[2, 0], [0, 1]]),
    "one key a block": ((2, 3, 2, 24, 4, 1), [[1, 0, 2], [0, 1, 3]]),
    "widest": ((2, 70, 1, 128, 2, 37), [[1, 1, 0], [NONE, 0, 0]]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_equals_the_explicit_formulation(backend, dtype, case, masked, device, guarded_allocations):
    sizes, table = CASES[case]
    inputs, grad = tensors(*sizes, dtype=dtype, device=device)
    table = torch.tensor(table, device=device, dtype=torch.int32 if masked else torch.int64)
    key_mask = None
    if masked:
        key_mask = torch.rand(sizes[4], sizes[5], device=device) > 0.3
        key_mask[:2, 0], key_mask[-1] = True, False
    check_against_explicit(inputs, grad, table, key_mask, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_key_is_returned(backend, dtype, device):
    """Its probability is 1, so the gradients of query and key are rounding errors of 0."""
    inputs, grad = tensors(1, 3, 2, 24, 2, 1, dtype=dtype, device=device)
    table = torch.tensor([[1, NONE]], device=device)
    call = lambda *qkv: cross_camera_attention(*qkv, table, backend=backend)  # noqa: E731
    out, dquery, dkey, dvalue = with_gradients(call, inputs, grad)
    assert torch.equal(out, inputs[2][1:].expand_as(out))
    torch.testing.assert_close(dvalue[1], grad[0].sum(0, keepdim=True))
    for zero in (dquery, dkey):
        assert zero.abs().max() < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("scale", [0.0, -0.7, 40.0])
def test_scale_and_large_logits(backend, scale, device):
    inputs, grad = tensors(2, 7, 2, 16, 3, 11, dtype=torch.float64, device=device)
    table = torch.tensor([[0, 2], [1, NONE]], device=device)

    def call(function, **options):
        return with_gradients(lambda *qkv: function(*qkv, table, scale=scale, **options), inputs, grad)

    for got, expected in zip(call(cross_camera_attention, backend=backend), call(explicit)):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_nobody_sees_masked_keys_and_unlisted_blocks(backend, dtype, device, guarded_allocations):
    (query, key, value), grad = tensors(5, 19, 2, 16, 5, 21, dtype=dtype, device=device)
    table = torch.tensor([[0, 1], [1, 2], [NONE, NONE], [2, 2], [3, NONE]], device=device)  # nobody lists block 4
    key_mask = torch.rand(5, 21, device=device) > 0.4
    key_mask[2] = False
    unseen = ~key_mask
    unseen[4] = True
    dirt = torch.tensor([float("nan"), float("inf"), -float("inf")], device=device, dtype=dtype)
    dirt = dirt[torch.arange(unseen.sum(), device=device) % 3, None, None]

    def results(dirty):
        q, k, v, g = query.detach().clone(), key.detach().clone(), value.detach().clone(), grad.clone()
        k[unseen], v[unseen] = (dirt, dirt) if dirty else (0, 0)
        if dirty:  # blocks 2 and 3 have no key
            q[2], q[3], g[2], g[3] = float("nan"), float("inf"), float("inf"), float("nan")
        inputs = [t.requires_grad_() for t in (q, k, v)]
        call = lambda *qkv: cross_camera_attention(*qkv, table, key_mask=key_mask, backend=backend)  # noqa: E731
        return with_gradients(call, inputs, g)

    clean, dirty = results(False), results(True)
    for before, after in zip(clean, dirty):
        assert after.isfinite().all()
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    out, dquery, dkey, dvalue = dirty
    for zero in (out[2:4], dquery[2:4], dkey[unseen], dvalue[unseen]):
        assert not zero.any()
    assert out[[0, 1, 4]].any() and dkey[key_mask & ~unseen].all()


@pytest.mark.parametrize("second", [NONE, 0])
def test_what_a_hostile_query_reaches(backend, device, second):
    """NaN in one query spreads to its own result and to the gradients of the keys it sees, no further."""
    (query, key, value), grad = tensors(2, 5, 1, 16, 3, 6, device=device)
    hostile = query.detach().clone()
    hostile[0, 2] = float("nan")
    table = torch.tensor([[0, second], [1, 2]], device=device)
    call = lambda *qkv: cross_camera_attention(*qkv, table, backend=backend)  # noqa: E731
    out, dquery, dkey, dvalue = with_gradients(call, [hostile.requires_grad_(), key, value], grad)
    assert out[0, 2].isnan().all() and dquery[0, 2].isnan().all()
    assert dkey[0].isnan().all() and dvalue[0].isnan().all()
    others = torch.tensor([0, 1, 3, 4], device=device)
    for reached in (out[0, others], out[1], dquery[0, others], dquery[1], dkey[1:], dvalue[1:]):
        assert reached.isfinite().all()


def test_entries_out_of_range_name_no_block(backend, device):
    """Where the table is not read back, on a GPU, it is the kernel that must not follow it."""
    if backend == "torch":
        from rigfuse.kernels.cross_camera_attention.torch import cross_camera_attention as unchecked
    else:
        from rigfuse.kernels.cross_camera_attention.ops import cross_camera_attention as unchecked
    inputs, grad = tensors(2, 5, 2, 16, 3, 6, device=device)
    wild = torch.tensor([[0, 3, -2], [2**62, 1, -(2**62)]], device=device)
    tame = torch.tensor([[0, NONE, NONE], [NONE, 1, NONE]], device=device)
    call = lambda table: with_gradients(lambda *qkv: unchecked(*qkv, table, None, 0.25), inputs, grad)  # noqa: E731
    for got, expected in zip(call(wild), call(tame)):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def layouts(tensor):
    """The same values in other memory: heads before length, a slice, a last dimension that is not dense."""
    yield tensor.transpose(1, 2).contiguous().transpose(1, 2)
    yield torch.cat([tensor, tensor], dim=-1)[..., : tensor.shape[-1]]
    yield torch.stack([tensor, tensor], dim=2)[:, :, 1]
    yield torch.stack([tensor, tensor], dim=-1)[..., 0]


def test_strides(backend, device):
    inputs, grad = tensors(2, 18, 2, 24, 3, 35, device=device)
    table, key_mask = torch.tensor([[0, NONE, 2], [1, 1, 0]], device=device), torch.rand(3, 35, device=device) > 0.3
    wide_table, wide_mask = table.T.contiguous().T, torch.stack([key_mask, ~key_mask], dim=2)[..., 0]

    def results(inputs, grad, table, key_mask):
        call = lambda *qkv: cross_camera_attention(*qkv, table, key_mask=key_mask, backend=backend)  # noqa: E731
        return with_gradients(call, inputs, grad)

    expected = results(inputs, grad, table, key_mask)
    for *strided, strided_grad in zip(*(layouts(t.detach()) for t in (*inputs, grad))):
        assert not any(t.is_contiguous() for t in (*strided, strided_grad, wide_table, wide_mask))
        strided = [t.requires_grad_() for t in strided]
        for got, want in zip(results(strided, strided_grad, wide_table, wide_mask), expected):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_expanded(backend, device):
    """Stride 0: one head for all, one key block for all, a gradient that is one number."""
    inputs, _ = tensors(1, 9, 1, 16, 1, 10, device=device)
    table = torch.tensor([[0, 1, 2]], device=device).expand(4, 3)

    def results(expand):
        query, key, value = (expand(t, n) for t, n in zip(inputs, (4, 3, 3)))
        out = cross_camera_attention(query, key, value, table, backend=backend)
        return (out, *torch.autograd.grad(out.sum(), inputs))

    expanded = results(lambda t, n: t.expand(n, -1, 5, -1))
    repeated = results(lambda t, n: t.repeat(n, 1, 5, 1))
    for got, expected in zip(expanded, repeated):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_equal_table_is_dense_attention(backend, device):
    inputs, grad = tensors(1, 33, 2, 32, 4, 12, device=device)
    table = torch.arange(4, device=device)[None]

    def dense(query, key, value):
        heads_first = (t.flatten(0, 1).transpose(0, 1) for t in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(0, 1)[None]

    call = lambda table: with_gradients(  # noqa: E731
        lambda *qkv: cross_camera_attention(*qkv, table, backend=backend), inputs, grad
    )
    permuted = call(table[:, torch.tensor([2, 0, 3, 1], device=device)])
    for got, other, expected in zip(call(table), permuted, with_gradients(dense, inputs, grad)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "sizes, width",
    [
        ((0, 5, 2, 16, 3, 4), 2),
        ((2, 0, 2, 16, 3, 4), 2),
        ((2, 5, 2, 16, 3, 4), 0),
        ((2, 5, 2, 16, 0, 4), 2),
        ((2, 5, 0, 16, 3, 4), 2),
    ],
    ids=["no query block", "no query", "no entry", "no key block", "no head"],
)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_empty(backend, sizes, width, masked, device):
    inputs, grad = tensors(*sizes, device=device)
    table = torch.full((sizes[0], width), -1 if sizes[4] == 0 else 1, device=device)
    key_mask = torch.ones(sizes[4], sizes[5], dtype=torch.bool, device=device) if masked else None
    call = lambda *qkv: cross_camera_attention(*qkv, table, key_mask=key_mask, backend=backend)  # noqa: E731
    out, *grads = with_gradients(call, inputs, grad)
    assert out.shape == inputs[0].shape and out.requires_grad and not out.any()
    for got, tensor in zip(grads, inputs):
        assert got.shape == tensor.shape and not got.any()


def test_gradcheck(backend, device):
    (query, key, value), _ = tensors(2, 3, 1, 16, 3, 2, dtype=torch.float64, device=device)
    table = torch.tensor([[0, 0, NONE], [1, 2, 0]], device=device)
    key_mask = torch.tensor([[True, False], [True, True], [False, False]], device=device)
    call = lambda *qkv: cross_camera_attention(*qkv, table, key_mask=key_mask, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(call, (query, key, value), fast_mode=True)


@pytest.mark.parametrize("wanted", ["query", "key", "value"])
def test_each_gradient_alone(backend, wanted, device):
    inputs, grad = tensors(2, 5, 2, 16, 3, 6, device=device)
    table = torch.tensor([[0, 2], [1, NONE]], device=device)
    call = lambda *qkv: cross_camera_attention(*qkv, table, backend=backend)  # noqa: E731
    index = ("query", "key", "value").index(wanted)
    expected = with_gradients(call, inputs, grad)[1 + index]
    alone = [t if i == index else t.detach() for i, t in enumerate(inputs)]
    (got,) = torch.autograd.grad(call(*alone), [alone[index]], grad)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_opcheck(device):
    from rigfuse.kernels.cross_camera_attention import ops

    (query, key, value), grad = tensors(2, 5, 2, 24, 3, 6, device=device)
    table, key_mask = torch.tensor([[0, 2], [1, NONE]], device=device), torch.rand(3, 6, device=device) > 0.3
    strided = next(layouts(query.detach()))
    for mask in (key_mask, None):
        arguments = (strided, key.detach(), value.detach(), table, mask)
        opcheck(ops._forward_op, (*arguments, 0.2))
        out, lse = ops._forward_op(*arguments, 0.2)
        opcheck(ops._backward_op, (grad, *arguments, out, lse, 0.2, [True, False, True]))


# Dynamo instantiates an autograd.Function itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_full_graph(backend, masked, device):
    def call(query, key, value, table, key_mask):
        return cross_camera_attention(query, key, value, table, key_mask=key_mask, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ((2, 7, 2, 16, 3, 9), (3, 11, 2, 16, 4, 5)):
        inputs, grad = tensors(*sizes, device=device)
        table = torch.randint(-1, 3, (sizes[0], 3), device=device)
        key_mask = torch.rand(sizes[4:], device=device) > 0.3 if masked else None
        expected = with_gradients(lambda *qkv: call(*qkv, table, key_mask), inputs, grad)  # noqa: B023
        got = with_gradients(lambda *qkv: compiled(*qkv, table, key_mask), inputs, grad)  # noqa: B023
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b)


def test_repeats_bit_for_bit(backend, device):
    inputs, grad = tensors(3, 40, 2, 16, 4, 37, dtype=torch.float16, device=device)
    table = torch.tensor([[0, 1, 2], [2, 2, 0], [1, NONE, 2]], device=device)
    call = lambda *qkv: cross_camera_attention(*qkv, table, backend=backend)  # noqa: E731
    first = with_gradients(call, inputs, grad)
    for _ in range(3 if device == "cpu" else 250):
        for got, expected in zip(with_gradients(call, inputs, grad), first):
            assert torch.equal(got, expected)


def test_autocast(backend, device):
    (query, key, value), _ = tensors(2, 5, 2, 16, 3, 6, device=device)
    table = torch.tensor([[0, 2], [1, NONE]], device=device)
    with torch.autocast(device, dtype=torch.float16):
        out = cross_camera_attention(query, key.half(), value, table, backend=backend)
        double = cross_camera_attention(query.double(), key.double(), value.double(), table, backend=backend)
    assert out.dtype == torch.float16 and double.dtype == torch.float64
    expected = cross_camera_attention(query.half(), key.half(), value.half(), table, backend=backend)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert [g.dtype for g in grads] == [torch.float32] * 3


def test_bfloat16_on_the_plain_backend():
    inputs, grad = tensors(2, 13, 2, 32, 3, 21, dtype=torch.bfloat16)
    table, key_mask = torch.tensor([[0, 2], [NONE, NONE]]), torch.rand(3, 21) > 0.3
    check_against_explicit(inputs, grad, table, key_mask, "torch")
    with pytest.raises(BackendError, match="cannot serve"):
        cross_camera_attention(*inputs, table, backend="triton")


def valid_arguments():
    (query, key, value), _ = tensors(2, 5, 2, 16, 3, 6)
    return dict(query=query, key=key, value=value, block_table=torch.zeros(2, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(query=[1.0]), TypeError, "query must be a tensor, got list"),
        (dict(query=torch.zeros(2, 5, 32)), ValueError, r"query has shape \(2, 5, 32\), needs \(Nq, Lq, heads, dim\)"),
        (dict(query=torch.zeros(2, 5, 2, 8)), ValueError, "query has dim 8, needs 16 to 128"),
        (dict(query=torch.zeros(2, 5, 2, 129)), ValueError, "query has dim 129, needs 16 to 128"),
        (dict(key=torch.zeros(3, 6, 3, 16)), ValueError, r"key has shape \(3, 6, 3, 16\), needs .* = \(3, 6, 2, 16\)"),
        (dict(key=torch.zeros(3, 0, 2, 16)), ValueError, "key has Lk = 0, needs at least 1"),
        (dict(value=torch.zeros(3, 7, 2, 16)), ValueError, r"value has shape \(3, 7, 2, 16\)"),
        (dict(value=None), TypeError, "value must be a tensor, got NoneType"),
        (dict(block_table=torch.zeros(3, 4, dtype=torch.int64)), ValueError, r"block_table has shape \(3, 4\)"),
        (dict(key_mask=torch.ones(3, 5, dtype=torch.bool)), ValueError, r"key_mask has shape \(3, 5\)"),
        (dict(query=torch.zeros(2, 5, 2, 16, dtype=torch.int32)), TypeError, "query is int32, needs float32"),
        (dict(key=torch.zeros(3, 6, 2, 16).half()), TypeError, "key is float16, needs float32"),
        (dict(value=torch.zeros(3, 6, 2, 16).double()), TypeError, "value is float64, needs float32"),
        (dict(block_table=torch.zeros(2, 4)), TypeError, "block_table is float32, needs int32, int64"),
        (dict(key_mask=torch.ones(3, 6)), TypeError, "key_mask is float32, needs bool"),
        (dict(scale="1"), TypeError, "scale is a str, needs a float"),
        (dict(scale=torch.ones(())), TypeError, "scale is a Tensor, needs a float"),
        (dict(key=torch.zeros(3, 6, 2, 16, device="meta")), ValueError, "key is on meta, needs cpu like query"),
        (dict(block_table=torch.full((2, 4), 3)), ValueError, "block_table has values from 3 to 3, needs -1 to 2"),
        (dict(block_table=torch.full((2, 4), -2)), ValueError, "block_table has values from -2 to -2, needs -1 to 2"),
        (dict(backend="cuda"), BackendError, "backend is 'cuda'; choose one of"),
    ],
)
def test_bad_input(change, error, message):
    cross_camera_attention(**valid_arguments())
    with pytest.raises(error, match=f"^(cross_camera_attention: )?{message}"):
        cross_camera_attention(**{**valid_arguments(), **change})
