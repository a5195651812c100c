"""What memory a training step of a map network needs, from its settings alone."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

from .experiment import MapExperiment, MapModel
from .first_step import Part, made_up_batch

# Hidden vectors that autograd keeps of a token in a block of a Llama (without grouped queries, measured) …
_KEPT_IN_BLOCK = 14.1
_KEPT_OF_RECOMPUTED = 1.0  # … and of one that is computed again: its input
_GIB = 2**30


def memory_of_step(settings: MapExperiment, model: MapModel, parts: list[Part]) -> dict[str, float]:
    """GiB that a training step needs, by what needs it; an estimate.

    Frozen weights; weights, gradients and Adam's two moments of what is trained, in float32; what autograd keeps of the
    language model's blocks: of a token their inputs where they are computed again, and about 14 hidden vectors of the
    one block that is; and what it keeps of image backbone and Q-Former, counted in float32 on the meta device with
    attention that stores no scores (under autocast it is less). Workspaces are not in it.

    Args:
        settings: of the network.
        model: on the meta device, see `on_meta`.
        parts: its parts.
    """
    config, batch = settings.model, settings.loader.batch_size
    lm, size = config.lm, {"float32": 4}.get(config.lm.dtype, 2)
    rows, columns = config.qformer.grid
    tokens = len(config.images.cameras) * rows * columns + config.instances * (1 + config.points)
    vector = batch * tokens * lm.width * size / _GIB
    language = next(part for part in parts if part.name == "language")
    kept = _KEPT_IN_BLOCK * lm.layers
    if lm.checkpoint:
        kept = _KEPT_OF_RECOMPUTED * lm.layers + _KEPT_IN_BLOCK
    images, qformer = _kept(settings, model.train())
    needs = {
        "frozen weights": (language.frozen * size + sum(p.frozen for p in parts if p is not language) * 4) / _GIB,
        "trained weights, gradients, moments": 16 * sum(part.trained for part in parts) / _GIB,
        "kept of the language model's blocks": kept * vector if language.frozen else 0.0,
        "kept of the image backbone": batch * images / _GIB,
        "kept of the Q-Former": batch * qformer / _GIB,
    }
    return needs | {"together": sum(needs.values())}


def _kept(settings, model):
    """Bytes that autograd keeps of the images and of the Q-Former of one sample."""
    batch = made_up_batch(settings, 1)
    with _plain_attention():
        images = torch.empty(batch.images.shape, device="meta")
        kept, (tokens, parts, _) = _counted(model, lambda: model.images(images, batch.frame))
        return kept, _counted(model, lambda: model.qformer(tokens, parts))[0]


def _counted(model, compute):
    """(bytes of the tensors that autograd keeps, weights apart; what was computed)."""
    weights, seen = {weight.untyped_storage()._cdata for weight in model.parameters()}, {}

    def note(tensor):
        storage = tensor.untyped_storage()
        seen[storage._cdata] = storage  # kept alive, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = compute()
    return sum(storage.nbytes() for place, storage in seen.items() if place not in weights), result


class _Attention(torch.autograd.Function):
    """Keeps what fused attention keeps: queries, keys, values and its result."""

    @staticmethod
    def forward(ctx, query, key, value):
        result = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, result)
        return result


@contextmanager
def _plain_attention():
    fused = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, key, value, *_, **__: _Attention.apply(query, key, value)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused
