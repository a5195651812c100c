"""Triton backend: a query walks its windows; a square of tokens walks the queries whose windows touch it.

The latter are found through one sort. The first cell of a query's window on a map has a number, counted row after row
over all places at which a window that touches the map can begin. Sorted by it, the windows that touch a square of the
map are a run of neighbours for each row of such places. Nothing is added atomically.
"""

import torch
import triton
import triton.language as tl

from ..runtime import launch
from ..runtime.attention import dot_precision, head_of, load_rows, softmax_step, store_rows
from ..runtime.launch import Heads, accumulator_dtype, strided, triton_dtype
from ..runtime.plans import enqueue
from ..window_bias_attention.triton.primitives import LOG2_E, Centers, corner
from . import configs


@triton.jit
def _places(size, window):
    """How many places a window can begin at along one side and touch it. One that is larger is as good as as large."""
    return size + tl.minimum(window, size) - 1


@triton.jit
def window_attention_windows(
    centers, parts_ptr, numbers_ptr, maps, windows, length, places, nowhere,
    MAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each window, (B, Lq, maps), the part on its map and, if wanted, the number of the place at which it begins.

    A part is its first token, its columns and rows (none off the map), and the width of the map.
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], as all below
    mask = offs < windows
    m, i = offs % MAPS, offs // MAPS % length
    b = offs // MAPS // length
    start, height, width, window, place = m * 0, m * 0, m * 0, m * 0, m * 0
    next_start, next_place = 0, 0
    for each in tl.static_range(MAPS):
        here = m == each
        start = tl.where(here, next_start, start)
        place = tl.where(here, next_place, place)
        height = tl.where(here, maps[3 * each], height)
        width = tl.where(here, maps[3 * each + 1], width)
        window = tl.where(here, maps[3 * each + 2], window)
        next_start += maps[3 * each] * maps[3 * each + 1]
        next_place += _places(maps[3 * each], maps[3 * each + 2]) * _places(maps[3 * each + 1], maps[3 * each + 2])
    left, top, touches = corner(centers, b, i, mask, m, height, width, window)
    x = tl.where(touches, tl.maximum(left, 0.0), 0.0).to(tl.int32)
    y = tl.where(touches, tl.maximum(top, 0.0), 0.0).to(tl.int32)
    columns = tl.where(touches, tl.minimum(left + window, width), 0.0).to(tl.int32) - x
    rows = tl.where(touches, tl.minimum(top + window, height), 0.0).to(tl.int32) - y
    parts_ptr += 4 * offs.to(tl.int64)
    tl.store(parts_ptr, start + y * width + x, mask=mask)
    tl.store(parts_ptr + 1, columns, mask=mask)
    tl.store(parts_ptr + 2, rows, mask=mask)
    tl.store(parts_ptr + 3, width, mask=mask)
    if numbers_ptr is not None:
        # Of a window that begins before the map it is the end that counts.
        wide, high = tl.minimum(window, width), tl.minimum(window, height)
        column = tl.where(x > 0, x, columns - wide) + wide - 1
        row = tl.where(y > 0, y, rows - high) + high - 1
        number = b.to(tl.int64) * places + place + row * (width + wide - 1) + column
        tl.store(numbers_ptr + offs, tl.where(touches, number, nowhere), mask=mask)


@triton.jit
def _part(parts_ptr, window):
    """Its first token, columns, cells and the width of its map."""
    parts_ptr += 4 * window
    columns = tl.load(parts_ptr + 1)
    return tl.load(parts_ptr), columns, columns * tl.load(parts_ptr + 2), tl.load(parts_ptr + 3)


@triton.jit
def _tokens(token, columns, cells, width, first, BLOCK_N: tl.constexpr):
    """[BLOCK_N]: tokens of such a part, from its cell `first` on, and which of them there are."""
    offs_n = first + tl.arange(0, BLOCK_N)
    row = offs_n // columns
    return (token + row * width + offs_n - row * columns).to(tl.int64), offs_n < cells


@triton.jit
def _pointers(tensor, b, rows, first_head, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_H, BLOCK_D]: where some heads of some rows lie."""
    offs_h = (first_head + tl.arange(0, BLOCK_H)).to(tl.int64)
    offs = rows.to(tl.int64)[:, None, None] * tensor.row + (offs_h * tensor.head)[None, :, None]
    return tensor.ptr + b.to(tl.int64) * tensor.block + offs + (tl.arange(0, BLOCK_D) * tensor.column)[None, None, :]


@triton.jit
def window_attention_forward(
    query, key, value, parts_ptr, out, lse_ptr,
    scale: tl.float64,
    length, heads, maps,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    """One query and some of its heads."""
    blocks = tl.cdiv(heads, BLOCK_H)
    first_head = tl.program_id(0) % blocks * BLOCK_H
    b, i = tl.program_id(0) // blocks // length, tl.program_id(0) // blocks % length
    offs_h = first_head + tl.arange(0, BLOCK_H)  # [BLOCK_H], as m_i and l_i
    mask = (offs_h < heads)[:, None] & (tl.arange(0, BLOCK_D) < DIM)[None, :]  # [BLOCK_H, BLOCK_D], as q and acc
    row_i = i + tl.arange(0, 1)  # [1]
    q = tl.load(_pointers(query, b, row_i, first_head, BLOCK_H, BLOCK_D), mask=mask[None], other=0.0).to(ACC_DTYPE)
    scale_log2 = tl.full([], scale, ACC_DTYPE) * LOG2_E
    m_i = tl.full([BLOCK_H], float("-inf"), ACC_DTYPE)
    l_i = tl.zeros([BLOCK_H], ACC_DTYPE)
    acc = tl.zeros([BLOCK_H, BLOCK_D], ACC_DTYPE)
    for m in range(maps):
        token, columns, cells, width = _part(parts_ptr, (b * length + i).to(tl.int64) * maps + m)
        for first in range(0, cells, BLOCK_N):
            offs_j, mask_n = _tokens(token, columns, cells, width, first, BLOCK_N)  # [BLOCK_N]
            # [BLOCK_N, BLOCK_H, BLOCK_D], as v
            within = mask_n[:, None, None] & mask[None]
            k = tl.load(_pointers(key, b, offs_j, first_head, BLOCK_H, BLOCK_D), mask=within, other=0.0)
            v = tl.load(_pointers(value, b, offs_j, first_head, BLOCK_H, BLOCK_D), mask=within, other=0.0)
            scores = tl.sum(k.to(ACC_DTYPE) * q, axis=2) * scale_log2  # [BLOCK_N, BLOCK_H]
            scores = tl.where(mask_n[:, None], scores, float("-inf"))
            p, m_i, l_i, acc = softmax_step(tl.trans(scores), m_i, l_i, acc, False)
            acc += tl.sum(tl.trans(p)[:, :, None] * v.to(ACC_DTYPE), axis=0)
    l_i = tl.where(l_i == 0, 1.0, l_i)  # no token, zeros
    acc = (acc / l_i[:, None]).to(out.ptr.dtype.element_ty)
    tl.store(_pointers(out, b, row_i, first_head, BLOCK_H, BLOCK_D), acc[None], mask=mask[None])
    lse_ptr += (b * heads + offs_h).to(tl.int64) * length + i
    tl.store(lse_ptr, m_i + tl.log2(l_i), mask=offs_h < heads)


@triton.jit
def window_attention_backward_query(
    grad, query, key, value, out, parts_ptr, lse_ptr, delta_ptr, dquery,
    scale: tl.float64,
    length, heads, maps,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    """delta = sum(grad · out), and the queries' gradient where it is wanted, of one query and some of its heads."""
    blocks = tl.cdiv(heads, BLOCK_H)
    first_head = tl.program_id(0) % blocks * BLOCK_H
    b, i = tl.program_id(0) // blocks // length, tl.program_id(0) // blocks % length
    offs_h = first_head + tl.arange(0, BLOCK_H)  # [BLOCK_H], as delta and lse
    mask = (offs_h < heads)[:, None] & (tl.arange(0, BLOCK_D) < DIM)[None, :]  # [BLOCK_H, BLOCK_D], as dq
    row_i = i + tl.arange(0, 1)  # [1]
    # [1, BLOCK_H, BLOCK_D], as o and q
    do = tl.load(_pointers(grad, b, row_i, first_head, BLOCK_H, BLOCK_D), mask=mask[None], other=0.0).to(ACC_DTYPE)
    o = tl.load(_pointers(out, b, row_i, first_head, BLOCK_H, BLOCK_D), mask=mask[None], other=0.0).to(ACC_DTYPE)
    delta = tl.sum(tl.sum(do * o, axis=2), axis=0)
    row = (b * heads + offs_h).to(tl.int64) * length + i
    tl.store(delta_ptr + row, delta, mask=offs_h < heads)
    if dquery is not None:
        q = tl.load(_pointers(query, b, row_i, first_head, BLOCK_H, BLOCK_D), mask=mask[None], other=0.0).to(ACC_DTYPE)
        lse = tl.load(lse_ptr + row, mask=offs_h < heads, other=0.0)
        scale_log2 = tl.full([], scale, ACC_DTYPE) * LOG2_E
        dq = tl.zeros([BLOCK_H, BLOCK_D], ACC_DTYPE)
        for m in range(maps):
            token, columns, cells, width = _part(parts_ptr, (b * length + i).to(tl.int64) * maps + m)
            for first in range(0, cells, BLOCK_N):
                offs_j, mask_n = _tokens(token, columns, cells, width, first, BLOCK_N)  # [BLOCK_N]
                # [BLOCK_N, BLOCK_H, BLOCK_D], as v
                within = mask_n[:, None, None] & mask[None]
                k = tl.load(_pointers(key, b, offs_j, first_head, BLOCK_H, BLOCK_D), mask=within, other=0.0)
                v = tl.load(_pointers(value, b, offs_j, first_head, BLOCK_H, BLOCK_D), mask=within, other=0.0)
                k = k.to(ACC_DTYPE)
                scores = tl.sum(k * q, axis=2) * scale_log2  # [BLOCK_N, BLOCK_H], as p and ds
                p = tl.where(mask_n[:, None], tl.exp2(scores - lse[None, :]), 0.0)
                ds = p * (tl.sum(v.to(ACC_DTYPE) * do, axis=2) - delta[None, :])
                dq += tl.sum(ds[:, :, None] * k, axis=0)
        dq = (dq * tl.full([], scale, ACC_DTYPE)).to(dquery.ptr.dtype.element_ty)
        tl.store(_pointers(dquery, b, row_i, first_head, BLOCK_H, BLOCK_D), dq[None], mask=mask[None])


@triton.jit
def _square(number, maps, MAPS: tl.constexpr, SIDE: tl.constexpr):
    """Square `number` when every map is cut into squares of SIDE × SIDE cells.

    Returns its first column and row, and of its map the first token, height, width, window and the number of its first
    place.
    """
    start, height, width, window, place, square = 0, 0, 0, 0, 0, 0
    next_start, next_place, next_square = 0, 0, 0
    for each in tl.static_range(MAPS):
        here = number >= next_square
        square = tl.where(here, next_square, square)
        start = tl.where(here, next_start, start)
        place = tl.where(here, next_place, place)
        height = tl.where(here, maps[3 * each], height)
        width = tl.where(here, maps[3 * each + 1], width)
        window = tl.where(here, maps[3 * each + 2], window)
        next_square += tl.cdiv(maps[3 * each], SIDE) * tl.cdiv(maps[3 * each + 1], SIDE)
        next_start += maps[3 * each] * maps[3 * each + 1]
        next_place += _places(maps[3 * each], maps[3 * each + 2]) * _places(maps[3 * each + 1], maps[3 * each + 2])
    across = tl.cdiv(width, SIDE)
    x, y = (number - square) % across * SIDE, (number - square) // across * SIDE
    return x, y, start, height, width, window, place


@triton.jit
def window_attention_backward_key(
    grad, query, key, value, lse_ptr, delta_ptr, numbers_ptr, order_ptr, starts_ptr, dkey, dvalue, maps,
    scale: tl.float64,
    length, heads, squares, places,
    MAPS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    SIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
    ACC_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a square of tokens: of the queries whose windows touch it, in the order of the places."""
    head = tl.program_id(0) % heads
    b = tl.program_id(0) // heads // squares
    square = tl.program_id(0) // heads % squares
    first_x, first_y, start, height, width, window, place = _square(square, maps, MAPS, SIDE)
    wide, high = tl.minimum(window, width), tl.minimum(window, height)
    x = first_x + tl.arange(0, SIDE * SIDE) % SIDE  # [SIDE²], as y, mask_n and offs_j
    y = first_y + tl.arange(0, SIDE * SIDE) // SIDE
    mask_n = (x < width) & (y < height)
    offs_j = (start + y * width + x).to(tl.int64)
    # [SIDE², BLOCK_D], as v, dk and dv
    k = load_rows(key, head_of(key, b, head), offs_j, mask_n, True, DIM, BLOCK_D)
    v = load_rows(value, head_of(value, b, head), offs_j, mask_n, True, DIM, BLOCK_D)
    dk = tl.zeros([SIDE * SIDE, BLOCK_D], ACC_DTYPE)
    dv = tl.zeros([SIDE * SIDE, BLOCK_D], ACC_DTYPE)
    scale_log2 = tl.full([], scale, ACC_DTYPE) * LOG2_E
    row_ptr = (b * heads + head).to(tl.int64) * length

    # A place is so far before its window's last cell as the map's first place before the map's first cell: the windows
    # that touch column x begin at the places x … x + wide − 1, and so for rows.
    across = width + wide - 1
    end_x = tl.minimum(first_x + SIDE, width) + wide - 1
    end_y = tl.minimum(first_y + SIDE, height) + high - 1
    first_place = b.to(tl.int64) * places + place
    for first_row in range(first_y, end_y, BLOCK_R):
        rows = first_row + tl.arange(0, BLOCK_R)  # [BLOCK_R], as all runs
        run_ptr = starts_ptr + first_place + rows * across
        begin = tl.load(run_ptr + first_x, mask=rows < end_y, other=0)
        count = tl.load(run_ptr + end_x, mask=rows < end_y, other=0) - begin
        end = tl.cumsum(count, axis=0)
        for first in range(0, tl.sum(count, axis=0), BLOCK_M):
            offs = first + tl.arange(0, BLOCK_M)  # [BLOCK_M], as all of the queries
            mask_m = offs < tl.sum(count, axis=0)
            run = (offs[:, None] >= (end - count)[None, :]) & (offs[:, None] < end[None, :])  # [BLOCK_M, BLOCK_R]
            offs += tl.sum(tl.where(run, (begin - end + count)[None, :], 0), axis=1)
            offs_i = tl.load(order_ptr + offs, mask=mask_m, other=0) // MAPS % length
            number = (tl.load(numbers_ptr + offs, mask=mask_m, other=0) - first_place).to(tl.int32)
            left, top = number % across - (wide - 1), number // across - (high - 1)
            q = load_rows(query, head_of(query, b, head), offs_i, mask_m, True, DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
            do = load_rows(grad, head_of(grad, b, head), offs_i, mask_m, True, DIM, BLOCK_D)
            lse = tl.load(lse_ptr + row_ptr + offs_i, mask=mask_m, other=0.0)
            delta = tl.load(delta_ptr + row_ptr + offs_i, mask=mask_m, other=0.0)
            # [SIDE², BLOCK_M], as inside, p, dp and ds
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC_DTYPE) * scale_log2
            inside = (x[:, None] >= left[None, :]) & (x[:, None] < (left + wide)[None, :]) & mask_m[None, :]
            inside &= (y[:, None] >= top[None, :]) & (y[:, None] < (top + high)[None, :])
            p = tl.where(inside, tl.exp2(scores - lse[None, :]), 0.0)
            dv += tl.dot(p.to(do.dtype), do, input_precision=PRECISION, out_dtype=ACC_DTYPE)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION, out_dtype=ACC_DTYPE)
            ds = p * (dp - delta[None, :])
            dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION, out_dtype=ACC_DTYPE)
    dk *= tl.full([], scale, ACC_DTYPE)
    store_rows(dkey, head_of(dkey, b, head), offs_j, dk, mask_n, DIM, BLOCK_D)
    store_rows(dvalue, head_of(dvalue, b, head), offs_j, dv, mask_n, DIM, BLOCK_D)


def _meta(query):
    dim, dtype = query.shape[3], accumulator_dtype(query.dtype)
    return dict(DIM=dim, BLOCK_D=triton.next_power_of_2(dim), ACC_DTYPE=triton_dtype(dtype))


def launch_forward(query, key, value, centers, maps, scale):
    batch, length, heads, dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads, length), dtype=accumulator_dtype(query.dtype), device=query.device)
    if query.numel():
        parts = _windows(centers, maps, None, 0)
        config = configs.by_query(launch.architecture(query.device), query.element_size(), dim, heads)
        enqueue(
            window_attention_forward, batch * length * triton.cdiv(heads, config["BLOCK_H"]),
            *(strided(Heads, tensor) for tensor in (query, key, value)), parts, strided(Heads, out), lse,
            scale, length, heads, len(maps) // 3, **_meta(query), **config,
        )  # fmt: skip
    return out, lse


def launch_backward(grad, out, lse, query, key, value, centers, maps, scale, needs_grad):
    if query.numel() == 0:
        return [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value)]
    batch, length, heads, dim = query.shape
    architecture, tokens_wanted = launch.architecture(query.device), any(needs_grad[1:])
    numbers, places = _numbers(centers, maps) if tokens_wanted else (None, 0)
    parts = _windows(centers, maps, numbers, places)
    dquery = torch.empty(query.shape, dtype=query.dtype, device=query.device) if needs_grad[0] else None
    delta = torch.empty_like(lse)
    inputs = [strided(Heads, tensor) for tensor in (grad, query, key, value)]
    config = configs.by_query(architecture, query.element_size(), dim, heads)
    enqueue(
        window_attention_backward_query, batch * length * triton.cdiv(heads, config["BLOCK_H"]),
        *inputs, strided(Heads, out), parts, lse, delta, strided(Heads, dquery), scale, length, heads, len(maps) // 3,
        **_meta(query), **config,
    )  # fmt: skip
    if not tokens_wanted:
        return dquery, None, None

    config = configs.by_key(architecture, query.element_size(), dim)
    numbers, order = numbers.sort(stable=True)
    every = torch.arange(batch * places + 1, dtype=numbers.dtype, device=query.device)
    starts = torch.searchsorted(numbers, every, out_int32=True)  # where each place's windows begin, and the end
    across = lambda cells: triton.cdiv(cells, config["SIDE"])  # noqa: E731
    squares = sum(across(height) * across(width) for height, width in zip(maps[::3], maps[1::3]))
    dkey, dvalue = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (key, value))
    enqueue(
        window_attention_backward_key, batch * squares * heads,
        *inputs, lse, delta, numbers, order, starts, strided(Heads, dkey), strided(Heads, dvalue), tuple(maps),
        scale, length, heads, squares, places,
        MAPS=len(maps) // 3, PRECISION=dot_precision(query.dtype, query.device), **_meta(query), **config,
    )  # fmt: skip
    return dquery, dkey, dvalue


def _numbers(centers, maps):
    """Memory for the numbers of all windows' places, and how many places an element of the batch has."""
    sides = zip(maps[::3], maps[1::3], maps[2::3])
    places = sum(
        (height + min(window, height) - 1) * (width + min(window, width) - 1) for height, width, window in sides
    )
    index = torch.int32 if len(centers) * places < 2**31 else torch.int64
    return torch.empty(centers.shape[:3].numel(), dtype=index, device=centers.device), places


def _windows(centers, maps, numbers, places):
    """The parts (B, Lq, maps, 4) of the windows on their maps; fills the numbers of their places, if given."""
    batch, length, count = centers.shape[:3]
    parts = torch.empty((batch, length, count, 4), dtype=torch.int32, device=centers.device)
    enqueue(
        window_attention_windows, triton.cdiv(batch * length * count, 256),
        strided(Centers, centers), parts, numbers, tuple(maps), batch * length * count, length, places, batch * places,
        MAPS=count, BLOCK=256,
    )  # fmt: skip
    return parts
