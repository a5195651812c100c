"""Triton backend. A program owns BLOCK_P cells of one image and walks their channels, so that what has one channel
(gate, importance) is read once and its gradient is summed in a fixed order."""

import torch
import triton
import triton.language as tl

from ..runtime.launch import Image, Vector, accumulator_dtype, rows_follow, strided, triton_dtype
from ..runtime.plans import enqueue
from . import configs


@triton.jit
def _cells(image, n, offs_p, width, FLAT: tl.constexpr):
    """[BLOCK_P] pointers to channel 0 of the cells `offs_p`. FLAT: the cells of a map are evenly spaced."""
    base = image.ptr + n.to(tl.int64) * image.batch
    if FLAT:
        return base + offs_p * image.column
    return base + (offs_p // width) * image.row + (offs_p % width) * image.column


@triton.jit
def _load(image, cells, offs_c, mask, ACC_DTYPE: tl.constexpr):
    """[BLOCK_P, BLOCK_C], widened."""
    return tl.load(cells[:, None] + offs_c[None, :] * image.channel, mask=mask, other=0.0).to(ACC_DTYPE)


@triton.jit
def _store(image, n, offs_p, offs_c, width, value, mask, FLAT: tl.constexpr):
    """Stores `value` [BLOCK_P, BLOCK_C] unless nobody asks for this image."""
    if image is not None:
        cells = _cells(image, n, offs_p, width, FLAT)  # [BLOCK_P]
        tl.store(cells[:, None] + offs_c[None, :] * image.channel, value, mask=mask)


@triton.jit
def _takes_part(missing, n):
    """Whether image n is fused; one that is present is returned as it is."""
    fuse = True
    if missing is not None:
        fuse = tl.load(missing.ptr + n.to(tl.int64) * missing.step) != 0
    return fuse


@triton.jit
def gated_fusion_forward(
    original, completed, gate, fine, importance, missing, out,
    channels, height, width,
    GATE_PER_CHANNEL: tl.constexpr, FLAT: tl.constexpr, ACC_DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(height * width, BLOCK_P)
    n = tl.program_id(0) // tiles
    offs_p = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    mask_p = offs_p < height * width  # [BLOCK_P]
    fuse = _takes_part(missing, n)

    original_p = _cells(original, n, offs_p, width, FLAT)  # [BLOCK_P]
    completed_p = _cells(completed, n, offs_p, width, FLAT)  # [BLOCK_P]
    gate_p = _cells(gate, n, offs_p, width, FLAT)  # [BLOCK_P]
    if not GATE_PER_CHANNEL:
        g = tl.sigmoid(tl.load(gate_p, mask=mask_p & fuse, other=0.0).to(ACC_DTYPE))[:, None]  # [BLOCK_P, 1]
    if fine is not None:
        fine_p = _cells(fine, n, offs_p, width, FLAT)  # [BLOCK_P]
        importance_p = _cells(importance, n, offs_p, width, FLAT)  # [BLOCK_P]
        i = tl.load(importance_p, mask=mask_p & fuse, other=0.0).to(ACC_DTYPE)[:, None]  # [BLOCK_P, 1]

    for start_c in range(0, channels, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        mask = mask_p[:, None] & (offs_c < channels)[None, :]  # [BLOCK_P, BLOCK_C]
        o = tl.load(
            original_p[:, None] + offs_c[None, :] * original.channel, mask=mask, other=0.0
        )  # [BLOCK_P, BLOCK_C]
        result = o  # [BLOCK_P, BLOCK_C]
        if fuse:
            c = _load(completed, completed_p, offs_c, mask, ACC_DTYPE)  # [BLOCK_P, BLOCK_C]
            if fine is not None:
                c += i * (_load(fine, fine_p, offs_c, mask, ACC_DTYPE) - c)
            if GATE_PER_CHANNEL:
                g = tl.sigmoid(_load(gate, gate_p, offs_c, mask, ACC_DTYPE))  # [BLOCK_P, BLOCK_C]
            wide = o.to(ACC_DTYPE)  # [BLOCK_P, BLOCK_C]
            result = (wide + g * (c - wide)).to(o.dtype)
        _store(out, n, offs_p, offs_c, width, result, mask, FLAT)


@triton.jit
def gated_fusion_backward(
    grad, original, completed, gate, fine, importance, missing,
    doriginal, dcompleted, dgate, dfine, dimportance,
    channels, height, width,
    GATE_PER_CHANNEL: tl.constexpr, FLAT: tl.constexpr, ACC_DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(height * width, BLOCK_P)
    n = tl.program_id(0) // tiles
    offs_p = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    mask_p = offs_p < height * width  # [BLOCK_P]
    # Of an image that is present every gradient but the original's is zero.
    fuse = _takes_part(missing, n)

    grad_p = _cells(grad, n, offs_p, width, FLAT)  # [BLOCK_P]
    original_p = _cells(original, n, offs_p, width, FLAT)  # [BLOCK_P]
    completed_p = _cells(completed, n, offs_p, width, FLAT)  # [BLOCK_P]
    gate_p = _cells(gate, n, offs_p, width, FLAT)  # [BLOCK_P]
    if not GATE_PER_CHANNEL:
        g = tl.sigmoid(tl.load(gate_p, mask=mask_p & fuse, other=0.0).to(ACC_DTYPE))[:, None]  # [BLOCK_P, 1]
        dgate_p = tl.zeros([BLOCK_P], dtype=ACC_DTYPE)
    if fine is not None:
        fine_p = _cells(fine, n, offs_p, width, FLAT)  # [BLOCK_P]
        importance_p = _cells(importance, n, offs_p, width, FLAT)  # [BLOCK_P]
        i = tl.load(importance_p, mask=mask_p & fuse, other=0.0).to(ACC_DTYPE)[:, None]  # [BLOCK_P, 1]
        dimportance_p = tl.zeros([BLOCK_P], dtype=ACC_DTYPE)

    for start_c in range(0, channels, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        mask = mask_p[:, None] & (offs_c < channels)[None, :]  # [BLOCK_P, BLOCK_C], as all below
        mask_fuse = mask & fuse
        dout = _load(grad, grad_p, offs_c, mask, ACC_DTYPE)
        o = _load(original, original_p, offs_c, mask_fuse, ACC_DTYPE)
        c = _load(completed, completed_p, offs_c, mask_fuse, ACC_DTYPE)
        if GATE_PER_CHANNEL:
            g = tl.sigmoid(_load(gate, gate_p, offs_c, mask_fuse, ACC_DTYPE))
        dproposal = tl.where(fuse, dout * g, 0.0)
        proposal = c
        dc = dproposal
        if fine is not None:
            difference = _load(fine, fine_p, offs_c, mask_fuse, ACC_DTYPE) - c
            proposal = c + i * difference
            dc = dproposal * (1 - i)
            dimportance_p += tl.sum(dproposal * difference, axis=1)  # [BLOCK_P]
            _store(dfine, n, offs_p, offs_c, width, dproposal * i, mask, FLAT)
        dlogits = dproposal * (proposal - o) * (1 - g)
        if GATE_PER_CHANNEL:
            _store(dgate, n, offs_p, offs_c, width, dlogits, mask, FLAT)
        else:
            dgate_p += tl.sum(dlogits, axis=1)  # [BLOCK_P]
        _store(doriginal, n, offs_p, offs_c, width, dout - dproposal, mask, FLAT)
        _store(dcompleted, n, offs_p, offs_c, width, dc, mask, FLAT)

    one_channel = tl.arange(0, 1)  # [1]
    if not GATE_PER_CHANNEL:
        _store(dgate, n, offs_p, one_channel, width, dgate_p[:, None], mask_p[:, None], FLAT)
    if fine is not None:
        _store(dimportance, n, offs_p, one_channel, width, dimportance_p[:, None], mask_p[:, None], FLAT)


def _launch(kernel, images, missing, outputs):
    original, gate_logits = images["original"], images["gate_logits"]
    n, channels, height, width = original.shape
    if original.numel() == 0:
        return
    floats = [t for t in images.values() if t is not None]
    config = configs.tile(channels, channels_last=original.stride(1) == 1 and channels > 1)
    enqueue(
        kernel, n * triton.cdiv(height * width, config["BLOCK_P"]),
        *(strided(Image, t) for t in images.values()),
        strided(Vector, missing),
        *(strided(Image, t) for t in outputs),
        channels, height, width,
        GATE_PER_CHANNEL=gate_logits.shape[1] == channels,
        FLAT=rows_follow(*floats, *outputs),
        ACC_DTYPE=triton_dtype(accumulator_dtype(*(t.dtype for t in floats))),
        **config,
    )  # fmt: skip


def launch_forward(original, completed, gate_logits, fine, importance, missing):
    out = torch.empty_like(original)
    images = dict(original=original, completed=completed, gate_logits=gate_logits, fine=fine, importance=importance)
    _launch(gated_fusion_forward, images, missing, [out])
    return out


def launch_backward(grad, original, completed, gate_logits, fine, importance, missing, needs_grad):
    inputs = dict(original=original, completed=completed, gate_logits=gate_logits, fine=fine, importance=importance)
    # Without channels no program runs, but a gate has cells all the same.
    allocate = torch.empty_like if original.numel() else torch.zeros_like
    gradients = [allocate(t) if needed else None for t, needed in zip(inputs.values(), needs_grad)]
    _launch(gated_fusion_backward, dict(grad=grad, **inputs), missing, gradients)
    return gradients
