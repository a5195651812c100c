"""cross_camera_attention: what is its own, beside the properties of every operation."""

import math

import pytest
import torch

from rigfuse.kernels import cross_camera_attention
from rigfuse.kernels.cross_camera_attention.api import OPERATION
from support.numerics import assert_as_exact_as_the_definition

NONE = -1


def tensors(queries, length_q, heads, dim, blocks, length_k, *, dtype=torch.float32, device="cpu"):
    """query, key, value and a gradient of the output."""
    sizes = [(queries, length_q), (blocks, length_k), (blocks, length_k), (queries, length_q)]
    made = [torch.randn(*size, heads, dim, dtype=torch.float64).to(device, dtype) for size in sizes]
    return [t.requires_grad_() for t in made[:3]], made[3]


def with_gradients(function, inputs, grad):
    out = function(*inputs)
    return (out, *torch.autograd.grad(out, inputs, grad.to(out.dtype), materialize_grads=True))


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
def test_equals_the_definition(backend, dtype, case, masked, device, guarded_allocations):
    sizes, table = CASES[case]
    inputs, grad = tensors(*sizes, dtype=dtype, device=device)
    table = torch.tensor(table, device=device, dtype=torch.int32 if masked else torch.int64)
    key_mask = None
    if masked:
        key_mask = torch.rand(sizes[4], sizes[5], device=device) > 0.3
        key_mask[:2, 0], key_mask[-1] = True, False
    call = lambda *qkv, backend: cross_camera_attention(*qkv, table, key_mask=key_mask, backend=backend)  # noqa: E731
    out, *_ = assert_as_exact_as_the_definition(call, inputs, grad, backend, rtol=1e-12)
    assert out.is_contiguous()


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
    call = lambda *qkv, backend: cross_camera_attention(*qkv, table, scale=scale, backend=backend)  # noqa: E731
    assert_as_exact_as_the_definition(call, inputs, grad, backend, rtol=1e-9)


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


def test_entries_out_of_range_name_no_block(any_backend, device):
    """Where the table is not read back, on a GPU, it is the kernel that must not follow it."""
    inputs, grad = tensors(2, 5, 2, 16, 3, 6, device=device)
    wild = torch.tensor([[0, 3, -2], [2**62, 1, -(2**62)]], device=device)
    tame = torch.tensor([[0, NONE, NONE], [NONE, 1, NONE]], device=device)

    def call(table):
        return with_gradients(lambda *qkv: OPERATION(any_backend, (*qkv, table, None), 0.25), inputs, grad)

    for got, expected in zip(call(wild), call(tame)):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_equal_table_is_dense_attention(any_backend, device):
    inputs, grad = tensors(1, 33, 2, 32, 4, 12, device=device)
    table = torch.arange(4, device=device)[None]

    def dense(query, key, value):
        heads_first = (t.flatten(0, 1).transpose(0, 1) for t in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(0, 1)[None]

    call = lambda table: with_gradients(  # noqa: E731
        lambda *qkv: cross_camera_attention(*qkv, table, backend=any_backend), inputs, grad
    )
    permuted = call(table[:, torch.tensor([2, 0, 3, 1], device=device)])
    for got, other, expected in zip(call(table), permuted, with_gradients(dense, inputs, grad)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(query=torch.zeros(2, 5, 2, 8)), ValueError, "query has dim = 8, needs 16 to 128"),
        (dict(query=torch.zeros(2, 5, 2, 129)), ValueError, "query has dim = 129, needs 16 to 128"),
        (dict(key=torch.zeros(3, 0, 2, 16)), ValueError, "key has Lk = 0, needs at least 1"),
        (dict(key=torch.zeros(3, 6, 2, 16).half()), TypeError, "key is float16, needs float32"),
        (dict(value=torch.zeros(3, 6, 2, 16).double()), TypeError, "value is float64, needs float32"),
        (dict(scale="1"), TypeError, "scale is a str, needs a finite number or None"),
        (dict(scale=torch.ones(())), TypeError, "scale is a Tensor, needs a finite number or None"),
        (dict(scale=math.nan), ValueError, "scale is nan, needs a finite number"),
        (dict(scale=-math.inf), ValueError, "scale is -inf, needs a finite number"),
        (dict(block_table=torch.full((2, 4), 3)), ValueError, "block_table has values from 3 to 3, needs -1 to 2"),
        (dict(block_table=torch.full((2, 4), -2)), ValueError, "block_table has values from -2 to -2, needs -1 to 2"),
    ],
)
def test_bad_input(change, error, message):
    (query, key, value), _ = tensors(2, 5, 2, 16, 3, 6)
    valid = dict(query=query, key=key, value=value, block_table=torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(error, match=f"^cross_camera_attention: {message}"):
        cross_camera_attention(**{**valid, **change})
